"""Options of XLA that let the programs of tests compile quickly.

They compile for longer than they run. With these options they need a fifth of the time
of the defaults. Not to be imported after JAX has started.
"""

import platform

import jaxlib.version

X86 = ("x86_64", "AMD64")
OPTIONS = "--xla_backend_optimization_level=0"
# Processes of the tests already use every core; to split a program costs more than it gains.
OPTIONS += " --xla_cpu_parallel_codegen_split_count=1"
# XLA does not start with options that it does not know, and may drop these. Without the
# fusion emitters LLVM may contract a product and a sum of one program, and not of another;
# AVX has no instruction for both.
if jaxlib.version.__version_info__ < (0, 11) and platform.machine() in X86:
  OPTIONS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX"


def xla_flags(devices: int) -> str:
  """Returns the value of XLA_FLAGS for so many simulated devices."""
  return f"--xla_force_host_platform_device_count={devices} {OPTIONS}"
