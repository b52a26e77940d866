"""The registry: fields of a component, and options that several components share."""

import dataclasses

import pytest

from sdiff_jax import losses, registry
from sdiff_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Options:
  rate: float = 1.0
  steps: int = 3

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f"steps={self.steps}: must be at least 1")


DEFAULTS = Options(rate=0.5)


@registry.register("losses", "test_registry")
def component(*, network, teacher=None, weight=2.0, options=DEFAULTS):
  return network, teacher, weight, options


def test_a_dataclass_stands_for_its_fields():
  """With the values of the default instance, not those of the class."""
  fields = registry.fields("losses", "test_registry")
  assert fields == {"weight": 2.0, "rate": 0.5, "steps": 3}
  assert registry.required("losses", "test_registry") == ["network", "teacher"]


def test_fields_of_a_dataclass_are_given_flat():
  section = {"name": "test_registry", "steps": 7, "weight": 1.0}
  registry.check("losses", section, "config.loss")
  built = registry.build("losses", section, network="N", teacher="T", sigma_d=0.5)
  assert built == ("N", "T", 1.0, Options(rate=0.5, steps=7))
  with pytest.raises(UserError, match=r"^config\.loss\.steps=0: must be at least 1$"):
    registry.build("losses", section | {"steps": 0}, "config.loss", network="N")


@pytest.mark.parametrize(
  ("changed", "expected"),
  [
    ({"name": "scm", "velocity": "teacher"}, ("sCD", "consistency", True)),
    ({"name": "scm", "velocity": "data"}, ("sCT", "consistency", False)),
    ({"name": "scm_discrete", "velocity": "data"}, ("dsCT", "consistency", False)),
    ({"name": "scm_discrete"}, ("dsCD", "consistency", True)),
    ({"name": "consistency"}, ("CT", "consistency", False)),
    ({"name": "consistency", "velocity": "teacher"}, ("CD", "consistency", True)),
    ({"name": "vsd"}, ("sCD + VSD", "consistency", True)),
    ({"name": "vsd", "consistency": False}, ("VSD", "consistency", True)),
    ({"name": "diffusion"}, ("teacher", "diffusion", False)),
    ({"name": "ddpm"}, ("teacher", "diffusion", False)),
    ({"name": "test_registry"}, ("test_registry", "diffusion", False)),
  ],
)
def test_facts_of_losses(changed, expected):
  section = registry.fields("losses", changed["name"]) | changed
  facts = losses.facts(section)
  assert (facts.title, facts.family, facts.needs_teacher) == expected


def test_a_helper_module_is_no_loss():
  assert "_velocity" not in registry.names("losses")
  with pytest.raises(UserError, match="losses: no '_velocity'"):
    registry.lookup("losses", "_velocity")
