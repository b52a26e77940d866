"""Pods by name, and the chips' numbers against each other."""

import types

import pytest

from sdiff_jax.capacity import chips as chips_lib


@pytest.mark.parametrize(
  ("name", "chips"),
  [("v5e:16x16", 256), ("v5p:4x4x8", 128), ("tpu7x:4x4x4", 64), ("h100x64", 64)],
)
def test_names(name, chips):
  assert chips_lib.parse(name) == chips_lib.Pod(
    name, name[: -len(name)] or _chip(name), chips
  )


def _chip(name):
  return "h100" if name.startswith("h100") else name.split(":")[0]


@pytest.mark.parametrize("name", ["", "v7x:2x2", "v5e", "v5e:4", "v5p:4x4", "h100x0"])
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
