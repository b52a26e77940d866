"""Fields know what they allow: every piece and every section refuses what has no sense."""

import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax import config, fields, registry, samplers
from sdiff_jax.experiment import explanations
from sdiff_jax.losses import scm
from sdiff_jax.models import mlp
from sdiff_jax.types import CondSpec, Network, UserError

NAN, INF = math.nan, math.inf
NUMBERS = (NAN, INF, -INF, -1, 0, 0.5, -0.5, 2**31, 10**400, 10**5000, 1e300, -1e300)
OTHERS = ("", "text", "a/b", "\0", "x" * 10_000, None, {}, object(), 1j, b"x", True)
TUPLES = (
  (),
  (0,),
  (-1,),
  (NAN,),
  (INF,),
  ("a",),
  (None,),
  ((),),
  (1, 1, 1),
  (2.0, 1.0),
)
TUPLES += ((1,) * 5000, (10**400,), ({},), [1.0, "a"])
VALUES = NUMBERS + OTHERS + TUPLES
SHAPES = {"unet1d": (4, 3)}
NETWORK = Network(
  init=lambda key: {"net": jnp.float32(0.5), "logvar": jnp.float32(0.0)},
  apply=lambda params, x, t, cond, *, key=None: params["net"] * x,
  logvar=lambda params, t: params["logvar"] * t,
)


def pieces(*kinds: str) -> list[tuple[str, str]]:
  return [(kind, name) for kind in kinds for name in registry.names(kind)]


def outcome(label: str, call, value: object) -> str:
  """Returns the message of a refusal, "" for success; no other error is allowed."""
  try:
    call(value)
  except UserError as error:
    message = str(error)
    assert message.startswith(label), (value, message)
    assert len(message) <= 500
    assert "\n" not in message
    return message
  return ""


def fits(value: object, field: fields.Field) -> bool:
  try:
    fields.check("x", value, field.annotation)
  except ValueError:
    return False
  return True


def no_folder(folder: str, **options: str) -> None:
  raise ValueError(f"folder={folder}: has no network")


@pytest.mark.parametrize(("kind", "name"), pieces("losses", "models"))
def test_a_piece_refuses_in_one_line_what_it_does_not_allow(kind, name):
  """Allowed values build, or are refused for their relation to other fields."""
  facts = registry.lookup(kind, name).facts
  small = {k: v for k, v in facts.get("minimal", {}).items() if k != "shape"}
  given = {"sigma_d": 0.5, "network": NETWORK, "teacher": NETWORK.apply}
  given |= {"shape": facts.get("minimal", {}).get("shape", ())}
  given |= {"cond": {"label": CondSpec((), np.int32, 3)}, "reader": no_folder}
  if kind == "losses":
    given = {k: v for k, v in given.items() if k not in ("shape", "cond", "reader")}
  for field, declared in registry.declarations(kind, name).items():

    def call(value: object, field=field) -> None:
      section = {"name": name} | small | {field: value}
      built = registry.build(kind, section, "config.x", **given)
      if kind == "models":
        jax.eval_shape(built.init, jax.random.key(0))

    for value in VALUES:
      message = outcome("config.x.", call, value)
      if not fits(value, declared):
        assert message.startswith(f"config.x.{field}="), (value, message)


@pytest.mark.parametrize("name", ["edm_stochastic", "unipc2", "paraddim", "specddpm"])
def test_a_sampler_refuses_in_one_line_what_it_does_not_allow(name):
  declared = config.declarations()["sampler"] | config.declarations()[""]
  for field in ["sigma_d", "steps", *samplers.options(name)]:

    def call(value: object, field=field) -> None:
      with registry.argument_errors("config.sampler"):
        samplers.build(name, **{"sigma_d": 0.5, "steps": 4} | {field: value})

    for value in VALUES:
      message = outcome("config.sampler.", call, value)
      if not fits(value, declared[field]) and field != "sigma_d":
        assert message.startswith(f"config.sampler.{field}"), (value, message)


@pytest.mark.parametrize(("kind", "name"), pieces("data"))
def test_a_data_set_refuses_in_one_line_what_it_does_not_allow(kind, name):
  for field, declared in registry.declarations(kind, name).items():

    def call(value: object, field=field) -> None:
      registry.check(kind, {"name": name, field: value}, "config.data")

    for value in VALUES:
      message = outcome(f"config.data.{field}=", call, value)
      assert bool(message) == (not fits(value, declared))


@pytest.mark.parametrize("section", [*config.declarations()])
def test_a_section_refuses_in_one_line_what_it_does_not_allow(section):
  start = config.base().to_dict()
  label = f"config.{section}." if section else "config."
  for field, declared in config.declarations()[section].items():

    def call(value: object, field=field) -> None:
      changed = start[section] | {field: value} if section else value
      config.check(start | {section or field: changed})

    for value in VALUES if (section, field) != ("", "plugins") else ():
      if fits(value, declared):
        continue
      message = outcome(f"{label}{field}", call, value)
      assert message, value


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"evaluate.folder": "../x"}, "folder='../x': must be a folder inside the work"),
    ({"evaluate.folder": "/x"}, "folder='/x': must be a folder inside the work"),
    ({"evaluate.folder": ""}, "folder='': must be a folder inside the work"),
    ({"evaluate.pr_num_images": 3}, "pr_num_images=3: must be 0 or above 3"),
    ({"evaluate.num": 3}, "num=3: must be above 3 for precision and recall"),
    ({"evaluate.samplers": ()}, r"samplers=\(\): name one, or images, or set base"),
    ({"evaluate.samplers": ("heun/2",) * 2}, "samplers=.*: name one of them twice"),
    ({"study.runs": ({"name": "a"},)}, r"runs\[0\]={'name': 'a'}: must have name, co"),
    (
      {"study.runs": ({"name": "a", "config": "x.py", "guidance": NAN},)},
      r"runs\[0\].guidance=nan: must be from 0 to 1000",
    ),
  ],
)
def test_relations_between_fields_of_a_section(changed, message):
  c = config.base()
  c.update_from_flattened_dict(changed)
  section = next(iter(changed)).partition(".")[0]
  with pytest.raises(UserError, match=f"^config.{section}.{message}"):
    config.validate(c)


@pytest.mark.parametrize(("kind", "name"), pieces("losses", "models", "data"))
def test_defaults_are_allowed_and_every_field_is_explained(kind, name):
  section = {"losses": "loss", "models": "model", "data": "data"}[kind]
  text = explanations.explain(f"{section}.{name}")
  for field, declared in registry.declarations(kind, name).items():
    assert fits(declared.default, declared), field
    assert declared.describe() != "anything", field
    assert declared.doc, field
    assert f"{section}.{field} of {name} = " in text


def test_sections_are_explained():
  for section, members in config.declarations().items():
    for field, declared in members.items():
      assert fits(declared.default, declared), field
      assert declared.doc, f"{section}.{field}"
  assert explanations.explain("optim.b1") == (
    "optim.b1 = 0.9\n  a number of at least 0 and below 1\n  decay of the first moment."
  )
  with pytest.raises(UserError, match="no such field; did you mean optim.b1"):
    explanations.explain("optim.b_1")


def test_calls_from_python_are_checked():
  with pytest.raises(ValueError, match="^width=0: must be from 1 to 65536$"):
    mlp.build(shape=(2,), cond={}, width=0)
  with pytest.raises(ValueError, match="^p_std=nan: must be above 0$"):
    scm._tangent.ConsistencyOptions(p_std=NAN)
  with pytest.raises(ValueError, match=r"^guidance=\(2.0, 1.0\): must be \(\) or"):
    scm._tangent.ConsistencyOptions(guidance=(2.0, 1.0))


@pytest.mark.parametrize(
  ("value", "annotation", "message"),
  [
    (INF, fields.Positive, "x=inf: must be finite"),
    (True, fields.Count, "x=True: must be an integer of at least 1"),
    (1.0, int, "x=1.0: must be an integer"),
    (2**31, fields.Count, r"x=2147483648: must be below 2\^31"),
    (1e300, float, r"x=1e\+300: must be below 3.4e38"),
    ("c", Literal["a", ""], "x='c': must be one of a, ''"),
    (
      "ab",
      fields.Scales,
      "x='ab': must be a tuple of one or more numbers, each above 0",
    ),
    ((1, 2, 3), tuple[int, int], r"x=\(1, 2, 3\): must be a tuple of 2 integers"),
    (0, Annotated[float | None, fields.Range(above=0)], "x=0: must be above 0"),
  ],
)
def test_messages(value, annotation, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    fields.check("x", value, annotation)


def test_values_that_fit():
  for value, annotation in (
    (3, float),
    (np.float32(3), float),
    (np.int64(3), fields.Count),
    ([1, 2.0], fields.Scales),
    (None, Annotated[float | None, fields.Range(above=0)]),
    (jnp.float32(3), Annotated[float | jax.Array, fields.Range(above=0)]),
    (INF, Annotated[float, fields.Range(0, finite=False)]),
  ):
    fields.check("x", value, annotation)
