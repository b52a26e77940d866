"""Roofline model of the time of a program.

Nothing here is measured. With F operations, M bytes of memory traffic and R bytes sent
on a ring, for each device,

  t_compute = F / peak,   t_memory = M / memory rate,   t_link = R / link rate,

  overlapped: t = max(t_compute, t_memory, t_link),
  serial:     t = t_compute + t_memory + t_link.

The first is a lower bound for every schedule, the second the time without any overlap;
a device is between the two. Peak rates are those of the data sheets, which no device
reaches.
"""

from typing import NamedTuple

from sdiff_jax.capacity.chips import Chip
from sdiff_jax.capacity.hlo import Collective

FORMULA = "max(F / peak, M / memory rate, R / link rate); serial: their sum"


class Time(NamedTuple):
  """Modeled seconds of one run of a program on one device."""

  compute: float
  memory: float
  link: float

  @property
  def overlapped(self) -> float:
    """Returns the time if all three overlap completely."""
    return max(self)

  @property
  def serial(self) -> float:
    """Returns the time if nothing overlaps."""
    return sum(self)


def link_rate(chip: Chip, chips: int, cores: int = 1) -> float:
  """Returns the rate at which a device sends on a ring, bytes per second.

  If a pod is larger than an island, every ring is assumed to leave it.

  Args:
    chip: a value of chips.CHIPS.
    chips: number of chips of the pod.
    cores: number of devices of a chip, which share its links.
  """
  return (chip.link * chip.links if chips <= chip.island else chip.network) / cores


def time(
  chip: Chip,
  chips: int,
  *,
  flops: float,
  memory: float,
  collectives: list[Collective],
  cores: int = 1,
) -> Time:
  """Returns the modeled time of a program.

  Args:
    chip: a value of chips.CHIPS.
    chips: number of chips of the pod.
    flops: operations of one device.
    memory: bytes that one device reads and writes.
    collectives: communication of one device.
    cores: number of devices of a chip; each has that fraction of its rates.
  """
  links = sum(c.calls * c.ring_bytes for c in collectives) / link_rate(
    chip, chips, cores
  )
  return Time(flops * cores / chip.peak, memory * cores / chip.memory_rate, links)


def utilization(flops: float, seconds: float, chip: Chip, chips: int) -> float:
  """Returns the model FLOPs utilization, F_model / (t chips peak).

  Args:
    flops: F_model, operations of one step over all devices, without those that
      rematerialization repeats (arXiv:2204.02311, appendix B).
    seconds: t, time of one step.
    chip: a value of chips.CHIPS.
    chips: number of chips.
  """
  return flops / (seconds * chips * chip.peak)
