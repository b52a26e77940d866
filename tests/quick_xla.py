"""Options of XLA that let the programs of tests compile quickly.

They compile for longer than they run. With these options they need half of the time of
the defaults. Not to be imported after JAX has started.
"""

OPTIONS = "--xla_backend_optimization_level=0"


def xla_flags(devices: int) -> str:
  """Returns the value of XLA_FLAGS for so many simulated devices."""
  return f"--xla_force_host_platform_device_count={devices} {OPTIONS}"
