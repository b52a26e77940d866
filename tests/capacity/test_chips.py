"""Pods by name, and the chips' numbers against each other."""

import types

import pytest

from sdiff_jax.capacity import chips as chips_lib


@pytest.mark.parametrize(
  ("name", "pod"),
  [
    ("v5e:16x16", ("v5e:16x16", "v5e", 256, 1)),
    ("v5p:4x4x8", ("v5p:4x4x8", "v5p", 128, 1)),
    ("tpu7x:4x4x4", ("tpu7x:4x4x4", "tpu7x", 64, 1)),
    ("h100x64", ("h100x64", "h100", 64, 1)),
    ("2xv5e:16x16", ("2xv5e:16x16", "v5e", 512, 2)),
    ("1xv5e:2x2", ("v5e:2x2", "v5e", 4, 1)),
    # Accelerator types: v4 and v5p count cores, of which a chip has two.
    ("v5litepod-256", ("v5e:16x16", "v5e", 256, 1)),
    ("v6e-256", ("v6e:16x16", "v6e", 256, 1)),
    ("v4-8", ("v4:2x2x1", "v4", 4, 1)),
    ("v5p-128", ("v5p:4x4x4", "v5p", 64, 1)),
    ("4xv6e-16", ("4xv6e:4x4", "v6e", 64, 4)),
  ],
)
def test_names(name, pod):
  assert chips_lib.parse(name) == pod


def test_a_larger_pod_has_as_many_slices():
  assert chips_lib.larger(chips_lib.parse("2xv5e:8x16")).name == "2xv5e:16x16"
  assert chips_lib.larger(chips_lib.parse("2xv5e:16x16")) is None


@pytest.mark.parametrize("chip", chips_lib.CHIPS)
def test_efficiencies_are_fractions_with_a_source(chip):
  efficiency = chips_lib.EFFICIENCIES[chip]
  assert 0 <= efficiency.launch < 1e-5
  assert all(0 < x <= 1 for x in efficiency[1:4])
  assert efficiency.is_calibrated == (chip == "h100")
  assert ("measured on" in efficiency.source) == efficiency.is_calibrated


@pytest.mark.parametrize(
  "name",
  [
    "",
    "v7x:2x2",
    "v5e",
    "v5e:4",
    "v5p:4x4",
    "h100x0",
    "v6e-7",
    "2xh100x8",
    "0xv5e:2x2",
  ],
)
def test_other_names_are_refused_in_a_line_that_lists_some(name):
  with pytest.raises(ValueError, match=r"^topology=.*such as") as error:
    chips_lib.parse(name)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("chip", chips_lib.CHIPS)
def test_sizes_of_a_chip_rise_to_its_largest(chip):
  pod = chips_lib.parse(
    f"{chip}{'x' if chip == 'h100' else ':'}{chips_lib.CHIPS[chip].sizes[0]}"
  )
  counts = [pod.chips]
  while pod := chips_lib.larger(pod):
    counts.append(pod.chips)
  assert len(counts) == len(chips_lib.CHIPS[chip].sizes)
  assert counts == sorted(set(counts))


@pytest.mark.parametrize("chip", chips_lib.CHIPS.values(), ids=chips_lib.CHIPS)
def test_numbers_are_of_one_kind_of_machine(chip):
  """Operations a byte of memory, and memories read in a second: within a factor."""
  assert 150 < chip.peak / chip.memory_rate < 600
  assert 20 < chip.memory_rate / chip.memory < 60
  assert chip.network < chip.link * chip.links < chip.memory_rate
  assert chip.source


def test_a_missing_compiler_says_what_to_install(monkeypatch):
  monkeypatch.setattr(chips_lib, "_is_installed", lambda module: False)
  with pytest.raises(
    ValueError, match=r"pip install -e '.\[rehearse\]'; a v5e is not needed"
  ):
    chips_lib.devices(chips_lib.parse("v5e:2x2"))
  with pytest.raises(ValueError, match=r"pip install -e '.\[cuda\]'"):
    chips_lib.devices(chips_lib.parse("h100x8"))


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x1"])
def test_the_cores_of_a_v4_chip_are_one_device(monkeypatch, name):
  """Otherwise JAX refuses to make a mesh of TPUs above v3."""
  asked = {}

  def describe(**options):
    asked.update(options)
    return types.SimpleNamespace(devices=[0, 1, 2, 3])

  monkeypatch.setattr(chips_lib, "_is_installed", lambda module: True)
  monkeypatch.setattr(chips_lib.topologies, "get_topology_desc", describe)
  assert len(chips_lib.devices(chips_lib.parse(name))) == 4
  assert asked.get("chip_config_name") == (
    "megacore" if name.startswith("v4") else None
  )
