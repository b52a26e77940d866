"""The model of time against examples by hand."""

import pytest

from sdiff_jax.capacity import chips, roofline
from sdiff_jax.capacity.chips import IDEAL, Efficiency, Pod
from sdiff_jax.capacity.hlo import Collective
from sdiff_jax.capacity.kernels import Kernel

# 1e12 operations, 1e9 bytes of memory, 1e8 on a link, each second.
CHIP = chips.CHIPS["v5e"]._replace(
  peak=1e12, memory_rate=1e9, link=5e7, links=2, island=4, network=1e7
)
POD = Pod("test", "v5e", 4)
# Two kernels are bound by operations, the third by memory.
KERNELS = [
  Kernel("convolution", 1e11, 10_000_000, 1, ""),
  Kernel("product", 2e10, 1_000_000, 2, ""),
  Kernel("memory", 0.0, 50_000_000, 2, ""),
]
# Four devices gather 4 MB: each sends 3 MB, twice; then reduce 2 MB: 3 MB.
CALLS = [
  Collective("all-gather", "f32", 4_000_000, 4, 2, False),
  Collective("all-reduce", "bf16", 2_000_000, 4, 1, False),
]


def time(efficiency=IDEAL, pod=POD, cores=1, kernels=KERNELS, collectives=CALLS):
  return roofline.time(
    CHIP, pod, efficiency, kernels=kernels, collectives=collectives, cores=cores
  )


def test_by_hand():
  found = time()
  terms = {"convolution": 0.1, "product": 0.04, "custom": 0.0, "memory": 0.1}
  ideal = max(0.14, 0.112, 0.09)
  assert found._asdict() == pytest.approx(
    terms | {"launch": 0.0, "link": 0.09, "ideal": ideal}
  )
  assert found.estimate == pytest.approx(0.33)
  # 4e11 operations of the model in 0.33 s by 4 chips of 1e12.
  assert roofline.utilization(4e11, 0.33, CHIP, 4) == pytest.approx(1 / 3.3)


def test_efficiencies_by_hand():
  found = time(Efficiency(1e-3, 0.5, 0.5, 0.25, "test"))
  assert found.convolution == pytest.approx(0.2)
  assert found.product == pytest.approx(0.16)
  assert found.memory == pytest.approx(0.2)
  assert found.launch == pytest.approx(5e-3)
  assert found.ideal == time().ideal


def test_a_kernel_needs_the_longer_of_its_two_times():
  slow = [Kernel("product", 1.0, 50_000_000, 1, "")]
  assert time(kernels=slow, collectives=[]).product == pytest.approx(0.05)


def test_beyond_an_island_links_are_the_networks():
  inside, beyond = (time(pod=POD._replace(chips=n)) for n in (4, 8))
  assert beyond.link == pytest.approx(10 * inside.link)


def test_slices_are_islands_and_the_network_is_between_them():
  across = CALLS[1]._replace(group_size=2, between_slices=True)
  found = time(pod=Pod("test", "v5e", 8, 2), collectives=[*CALLS, across])
  assert found.link == pytest.approx(0.09 + 2_000_000 / 1e7)


def test_two_devices_of_a_chip_share_it():
  one, two = (time(cores=n) for n in (1, 2))
  assert two == pytest.approx([2 * t for t in one])
