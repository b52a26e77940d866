"""Models in folders of the diffusers format, as Flax networks."""
