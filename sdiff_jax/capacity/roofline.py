"""The time of a program, modelled from what it computes, reads and sends.

Nothing here is measured. With F operations, M bytes of memory traffic and R bytes sent
on a ring, on each device,

  t_compute = F / peak,   t_memory = M / memory rate,   t_link = R / link rate,

  overlapped: t = max(t_compute, t_memory, t_link),
  in turn:    t = t_compute + t_memory + t_link,

and a device lies between the two: the first is what no schedule beats, the second what
it takes if nothing overlaps. Peaks are the makers'; no device reaches them.
"""

from typing import NamedTuple

from sdiff_jax.capacity.chips import Chip
from sdiff_jax.capacity.hlo import Collective

FORMULA = "max(F / peak, M / memory rate, R / link rate); in turn: their sum"


class Time(NamedTuple):
  """Modelled seconds of one run of a program on one device."""

  compute: float
  memory: float
  link: float

  @property
  def overlapped(self) -> float:
    """Returns the time if all three go on at once."""
    return max(self)

  @property
  def in_turn(self) -> float:
    """Returns the time if one comes after the other."""
    return sum(self)


def link_rate(chip: Chip, chips: int, cores: int = 1) -> float:
  """Returns the bytes that a device sends in a second on a ring.

  Where a pod is more than an island, every ring is taken to leave it.

  Args:
    chip: one of pods.CHIPS.
    chips: of the pod.
    cores: devices of a chip, which share its links.
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
  """Returns the modelled time of a program.

  Args:
    chip: one of pods.CHIPS.
    chips: of the pod.
    flops: operations of one device.
    memory: bytes that one device reads and writes.
    collectives: what devices send.
    cores: devices of a chip; each has its share of what the chip can do.
  """
  links = sum(c.times * c.ring for c in collectives) / link_rate(chip, chips, cores)
  return Time(flops * cores / chip.peak, memory * cores / chip.memory_rate, links)


def utilisation(flops: float, seconds: float, chip: Chip, chips: int) -> float:
  """Returns the share of peak, F_model / (t chips peak).

  F_model are the operations of the model's step over all devices, without those that
  are done again to save memory (arXiv:2204.02311, appendix B).
  """
  return flops / (seconds * chips * chip.peak)
