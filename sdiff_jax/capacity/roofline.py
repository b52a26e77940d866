"""Model of the time of a program on chips that are not here.

With kernels k of F_k operations and M_k bytes of memory traffic, and R bytes sent on
rings, one device needs

  t = sum_k [ launch + max(F_k / (e_k peak), M_k / (e_m memory rate)) ] + R / link rate,

with the efficiencies e of `chips.EFFICIENCIES`: kernels of a device run one after
another, and communication is not overlapped with them. The ideal is

  max(sum F / peak, sum M / memory rate, R / link rate),

below which no schedule of the same kernels gets.
"""

from typing import NamedTuple

from sdiff_jax.capacity.chips import Chip, Efficiency, Pod
from sdiff_jax.capacity.hlo import Collective
from sdiff_jax.capacity.kernels import KINDS, Kernel

FORMULA = "sum over kernels of [launch + max(F / (e peak), M / (e memory rate))] + R / link rate"
IDEAL = "max(sum F / peak, sum M / memory rate, R / link rate)"


class Time(NamedTuple):
  """Modeled seconds of one run of a program on one device.

  Attributes:
    convolution: of the kernels with convolutions, without launches.
    product: of the kernels with other products.
    custom: of the kernels of Pallas, which are as efficient as products here.
    memory: of the kernels with none of them.
    launch: of the starts of all kernels.
    link: of the collectives.
    ideal: lower bound, see above.
  """

  convolution: float
  product: float
  custom: float
  memory: float
  launch: float
  link: float
  ideal: float

  @property
  def estimate(self) -> float:
    """The sum of the terms."""
    return sum(self[:-1])


def link_rates(chip: Chip, pod: Pod, cores: int = 1) -> tuple[float, float]:
  """Returns the rates at which a device sends, bytes per second.

  If a slice is larger than an island, every ring in it is assumed to leave the island.

  Args:
    chip: a value of chips.CHIPS.
    pod: the pod.
    cores: number of devices of a chip, which share its links.

  Returns:
    The rates inside a slice and between slices.
  """
  inside = chip.network
  if pod.chips // pod.slices <= chip.island:
    inside = chip.link * chip.links
  return inside / cores, chip.network / cores


def time(
  chip: Chip,
  pod: Pod,
  efficiency: Efficiency,
  *,
  kernels: list[Kernel],
  collectives: list[Collective],
  cores: int = 1,
) -> Time:
  """Returns the modeled time of a program.

  Args:
    chip: a value of chips.CHIPS.
    pod: the pod.
    efficiency: a value of chips.EFFICIENCIES.
    kernels: of one device.
    collectives: communication of one device.
    cores: number of devices of a chip; each has that fraction of its rates.
  """
  peak, rate = chip.peak / cores, chip.memory_rate / cores
  inside, between = link_rates(chip, pod, cores)
  terms = dict.fromkeys(KINDS, 0.0)
  shares = {"convolution": efficiency.convolution}
  for k in kernels:
    share = shares.get(k.kind, efficiency.product)
    busy = max(k.flops / (share * peak), k.bytes / (efficiency.memory * rate))
    terms[k.kind] += k.calls * busy
  link = sum(
    c.calls * c.ring_bytes / (between if c.between_slices else inside)
    for c in collectives
  )
  ideal = max(
    sum(k.calls * k.flops for k in kernels) / peak,
    sum(k.calls * k.bytes for k in kernels) / rate,
    link,
  )
  launch = efficiency.launch * sum(k.calls for k in kernels)
  return Time(**terms, launch=launch, link=link, ideal=ideal)


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
