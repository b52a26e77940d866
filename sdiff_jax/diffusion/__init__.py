"""The diffusion process: TrigFlow, noise schedules, time grids, parameterizations."""
