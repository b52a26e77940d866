"""Chips, and topologies of them to compile for without having the devices.

A pod's name is v5e:16x16, v5p:4x4x8, tpu7x:4x4x4, ... (chips along each axis of its
torus), 2xv5e:16x16 for two slices of it, the name of a cloud's accelerator type such as
v5litepod-256, or h100x64. Compiling for TPUs needs libtpu, for GPUs JAX's CUDA plugin;
neither needs a device.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies


class Chip(NamedTuple):
  """Rates and sizes of a chip, from its data sheet.

  Attributes:
    peak: bfloat16 operations per second.
    memory: size of the memory, bytes.
    memory_rate: memory bandwidth, bytes per second.
    link: bandwidth of one link in one direction, bytes per second.
    links: number of links that a ring uses at once: both directions of one axis of a
      torus, or one connection to a switch.
    island: number of chips that these links connect; between islands and between slices
      there is `network`.
    network: bandwidth of a chip between islands or slices, bytes per second.
    host: number of chips of one host of a pod.
    sizes: available topologies, smallest first.
    source: of the numbers.
  """

  peak: float
  memory: float
  memory_rate: float
  link: float
  links: int
  island: int
  network: float
  host: int
  sizes: tuple[str, ...]
  source: str


_GIB, _DOCS = 2**30, "docs.cloud.google.com/tpu/docs/"
# The bandwidth of a link is the documented bidirectional bandwidth of a chip, divided by
# 2 and by the number of its ports.
CHIPS = {
  "v4": Chip(
    *(275e12, 32 * _GIB, 1200e9, 50e9, 2, 4096, 3e9, 4),
    ("2x2x1", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    _DOCS + "v4; links: arXiv:2304.01433",
  ),
  "v5e": Chip(
    *(197e12, 16e9, 819e9, 50e9, 2, 256, 3e9, 4),
    ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    _DOCS + "v5e: 400 GB/s through 4 ports",
  ),
  "v5p": Chip(
    *(459e12, 95 * _GIB, 2765e9, 100e9, 2, 8960, 6e9, 4),
    ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    _DOCS + "tpu7x: 1200 GB/s through 6 ports",
  ),
  "v6e": Chip(
    *(918e12, 32 * _GIB, 1638e9, 100e9, 2, 256, 12e9, 4),
    ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    _DOCS + "tpu7x: 800 GB/s through 4 ports",
  ),
  "tpu7x": Chip(
    *(2307e12, 192 * _GIB, 7380e9, 100e9, 2, 9216, 12e9, 4),
    ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    _DOCS + "tpu7x: 1200 GB/s through 6 ports",
  ),
  "h100": Chip(
    *(989e12, 80e9, 3350e9, 450e9, 1, 8, 50e9, 8),
    ("1", "8", "16", "32", "64", "128", "256"),
    "NVIDIA H100 SXM data sheet (dense); one 400 Gb/s adapter a GPU, as in DGX H100",
  ),
}


class Efficiency(NamedTuple):
  """How much of its rates a chip reaches, and what starting a kernel costs.

  Attributes:
    launch: seconds between two kernels.
    memory: fraction of the memory bandwidth.
    convolution: fraction of the peak, of convolutions.
    product: fraction of the peak, of products of matrices.
    source: where the numbers come from.
  """

  launch: float
  memory: float
  convolution: float
  product: float
  source: str

  @property
  def is_calibrated(self) -> bool:
    """Whether the numbers were measured."""
    return self != IDEAL


IDEAL = Efficiency(0.0, 1.0, 1.0, 1.0, "assumed 1, uncalibrated")
EFFICIENCIES = dict.fromkeys(CHIPS, IDEAL) | {
  "h100": Efficiency(
    *(0.9e-6, 0.757, 0.68, 0.68),
    "measured on an H200, jax 0.11.2, 2026-11-27, by benchmarks/h100.py --stage=calibrate:"
    " a chain of kernels, an addition over 1 GB, a product of 8192 x 8192 matrices; "
    "convolutions are assumed to be as efficient as products",
  )
}
# Description of the GPU for XLA.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 }
"""
# Environment in which no TPU is searched for, and a missing GPU is no error.
COMPILE_ONLY = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TF_CPP_MIN_LOG_LEVEL": "2",
  "CUDA_VISIBLE_DEVICES": "-1",
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}


# Accelerator type of Google Cloud -> chip, and in how many units of it a chip counts.
ACCELERATOR_TYPES = {
  **{"v4": ("v4", 2), "v5p": ("v5p", 2)},  # cores
  **{"v5litepod": ("v5e", 1), "v5e": ("v5e", 1), "v6e": ("v6e", 1)},
}


class Pod(NamedTuple):
  """A pod.

  Attributes:
    name: of its topology, such as "v5e:4x4".
    chip: key of CHIPS.
    chips: number of chips, of all slices.
    slices: number of slices, which a network connects.
  """

  name: str
  chip: str
  chips: int
  slices: int = 1


def parse(name: str) -> Pod:
  """Returns the pod of a name.

  Raises:
    ValueError: there is no such pod; the message lists the topologies of the chip.

  Example:
    >>> parse("v5litepod-256").name, parse("2xv6e:16x16").chips
    ('v5e:16x16', 512)
  """
  count, slice_name = re.fullmatch(r"(?:([1-9]\d*)x)?(.*)", name, re.S).groups()
  slice_name = _topology(slice_name)
  chip, _, size = (
    slice_name.partition("x")
    if slice_name.startswith("h100")
    else slice_name.partition(":")
  )
  if chip not in CHIPS or (count and chip == "h100"):
    raise ValueError(
      f"topology={name!r}: must be one of {', '.join(CHIPS)} with a size, "
      "such as v5e:16x16, v5p:4x4x8, v6e-256, 2xv5e:16x16 for two slices, or h100x64"
    )
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", size) or (
    size.count("x") != CHIPS[chip].sizes[-1].count("x")
  ):
    known = ", ".join(_name(chip, size) for size in CHIPS[chip].sizes)
    raise ValueError(f"topology={name!r}: must be one such as {known}")
  slices = int(count or 1)
  prefix = f"{slices}x" if slices > 1 else ""
  chips = slices * math.prod(int(n) for n in size.split("x"))
  return Pod(prefix + slice_name, chip, chips, slices)


def _topology(name: str) -> str:
  """Returns the topology of an accelerator type of a cloud, other names as they are."""
  match = re.fullmatch(r"(v\w+)-(\d+)", name)
  if match is None or match[1] not in ACCELERATOR_TYPES:
    return name
  chip, units = ACCELERATOR_TYPES[match[1]]
  chips = int(match[2]) / units
  sizes = {math.prod(map(int, s.split("x"))): s for s in CHIPS[chip].sizes}
  return f"{chip}:{sizes[chips]}" if chips in sizes else f"{chip}:{match[2]}"


def larger(pod: Pod) -> Pod | None:
  """Returns the next larger pod of the same chip, None if there is none."""
  prefix = f"{pod.slices}x" if pod.slices > 1 else ""
  every = [parse(prefix + _name(pod.chip, size)) for size in CHIPS[pod.chip].sizes]
  return next((p for p in every if p.chips > pod.chips), None)


def _name(chip: str, size: str) -> str:
  return f"{chip}{'x' if chip == 'h100' else ':'}{size}"


def start() -> None:
  """Lets this process compile for other devices; call it before JAX is initialized."""
  os.environ.update(COMPILE_ONLY)
  jax.config.update("jax_platforms", "cpu")
  # Programs for other devices cannot be stored, nor run here.
  jax.config.update("jax_enable_compilation_cache", False)


def devices(pod: Pod) -> np.ndarray:
  """Returns the devices of a pod, to compile for.

  Raises:
    ValueError: the compiler is not installed, or does not know the pod.
  """
  gpu = pod.chip == "h100"
  compiler_module, extra = (
    ("jax_plugins.xla_cuda12", "cuda") if gpu else ("libtpu", "rehearse")
  )
  if not _is_installed(compiler_module):
    raise ValueError(
      f"topology={pod.name}: its compiler is not installed, "
      f"pip install -e '.[{extra}]'; a {pod.chip} is not needed"
    )
  try:
    if gpu:
      hosts = max(pod.chips // 8, 1)
      topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=H100,
        topology=f"{hosts}x1x{pod.chips // hosts}",
      )
    else:
      _, _, size = pod.name.partition(":")
      options = {"num_slices": pod.slices} if pod.slices > 1 else {}
      if pod.chip == "v4":  # its two cores are one device on Google Cloud
        options["chip_config_name"] = "megacore"
      topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{pod.chip}:{size}", **options
      )
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    known = ", ".join(_name(pod.chip, size) for size in CHIPS[pod.chip].sizes)
    reason = " ".join(str(error).split())[:200]
    raise ValueError(
      f"topology={pod.name}: {reason}; choose one such as {known}"
    ) from error
  return np.array(topology.devices)


def compiler(pod: str) -> str:
  """Returns the version of the compiler for a pod, "" if it is not installed."""
  package = "jax-cuda12-plugin" if parse(pod).chip == "h100" else "libtpu"
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ""


def _is_installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False
