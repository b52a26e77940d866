"""The training step and loop, optimizers, averages, checkpoints and metrics."""
