"""The roofline against an example by hand."""

import pytest

from sdiff_jax.capacity import chips, roofline
from sdiff_jax.capacity.hlo import Collective

# 1e12 operations, 1e9 bytes of memory, 1e8 on a link, each second.
CHIP = chips.CHIPS["v5e"]._replace(
  peak=1e12, memory_rate=1e9, link=5e7, links=2, island=4, network=1e7
)
# Four devices gather 4 MB: each sends 3 MB, twice; then reduce 2 MB: 3 MB.
CALLS = [
  Collective("all-gather", "f32", 4_000_000, 4, 2, False),
  Collective("all-reduce", "bf16", 2_000_000, 4, 1, False),
]


def test_by_hand():
  time = roofline.time(CHIP, 4, flops=2e11, memory=1e8, collectives=CALLS)
  assert time == pytest.approx((0.2, 0.1, 0.09))
  assert time.overlapped == pytest.approx(0.2)
  assert time.serial == pytest.approx(0.39)
  # 4e11 operations of the model in 0.2 s by 4 chips of 1e12.
  share = roofline.utilization(4e11, time.overlapped, CHIP, 4)
  assert share == pytest.approx(0.5)


def test_beyond_an_island_links_are_the_networks():
  inside, beyond = (
    roofline.time(CHIP, n, flops=0, memory=0, collectives=CALLS) for n in (4, 8)
  )
  assert beyond.link == pytest.approx(10 * inside.link)


def test_two_devices_of_a_chip_share_it():
  one, two = (
    roofline.time(CHIP, 4, flops=1e11, memory=1e8, collectives=CALLS, cores=n)
    for n in (1, 2)
  )
  assert two == pytest.approx([2 * t for t in one])
