"""Floating-point operations of a step of each loss, over those of a teacher's step."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

from sdiff_jax import losses, registry
from sdiff_jax.models import mlp, pretrained
from sdiff_jax.pretrained.diffusers import trigflow_network
from sdiff_jax.training import flops
from sdiff_jax.training.trainer import Trainer
from sdiff_jax.types import CondSpec

SD2 = pathlib.Path(__file__).parents[2] / "configs" / "published" / "stable_diffusion2"
SHAPE, TEXT = (96, 96, 4), (77, 1024)  # of latents and texts of Stable Diffusion 2


@functools.cache
def step_flops(name: str, **fields) -> float:
  """Returns the operations of a step on an MLP, of which matrix products are most."""
  section = {"name": name, **registry.fields("losses", name), **fields}
  facts = losses.facts(section)
  build = functools.partial(mlp.build, shape=(16, 16, 1), width=512, depth=4, unroll=4)
  network, teacher = build(cond=facts.cond), build(cond={})
  loss = registry.build(
    "losses",
    section,
    "loss",
    network=network,
    sigma_d=0.5,
    teacher=teacher.apply if facts.needs_teacher else None,
  )
  extra = facts.init_extra_params
  trainer = Trainer(loss, network, optax.adam(1e-3), init_extra_params=extra)
  batch = {"x0": jax.ShapeDtypeStruct((256, 16, 16, 1), jnp.float32), "cond": {}}
  key = jax.eval_shape(lambda: jax.random.key(0))
  frozen = jax.eval_shape(teacher.init, key) if facts.needs_teacher else None
  return flops.count_flops(trainer.update, trainer.abstract_state(), batch, key, frozen)


@pytest.mark.parametrize(
  ("name", "fields", "bound"),
  [
    pytest.param("flow_map", {"velocity": "data"}, 1.40, marks=pytest.mark.slow),
    ("flow_map", {"velocity": "teacher"}, 1.75),
    pytest.param("meanflow", {}, 1.40, marks=pytest.mark.slow),
    pytest.param("meanflow", {"improved": True}, 1.75, marks=pytest.mark.slow),
    pytest.param("facm", {"velocity": "teacher"}, 2.75, marks=pytest.mark.slow),
    ("lagrangian", {"velocity": "teacher"}, 2.40),
    pytest.param("cmt", {"steps": 4}, 1.40, marks=pytest.mark.slow),
    pytest.param(
      "rcm", {}, 4.40, marks=pytest.mark.slow
    ),  # counted as if each step were the student's
  ],
)
def test_a_step_costs_what_its_evaluations_cost(name, fields, bound):
  # One forward and one backward of twice its cost are the step of a teacher.
  ratio = step_flops(name, **fields) / step_flops("diffusion")
  assert bound - 0.15 < ratio <= bound


@functools.cache
def published_step_flops(name: str, *, guided: bool = False) -> float:
  """Returns the operations of a step on the U-Net of Stable Diffusion 2."""
  cond = {"text": CondSpec(TEXT, jnp.float16)}
  unit = {"mean": (0.0,), "std": (1 / 0.18215,), "latents": True}
  build = functools.partial(
    pretrained.build,
    shape=SHAPE,
    cond=cond,
    folder=str(SD2),
    reader=functools.partial(trigflow_network.network, **unit),
  )
  network, teacher = build(guidance=guided), build()
  fields = {"guidance": (1.0, 8.0)} if guided else {}
  section = {"name": name, **registry.fields("losses", name), **fields}
  distills = losses.facts(section).needs_teacher
  given = {"network": network, "sigma_d": 0.5}
  given["teacher"] = teacher.apply if distills else None
  loss = registry.build("losses", section, "loss", **given)
  trainer = Trainer(loss, network, optax.adam(1e-3))
  names = ("text", "empty_text")
  texts = {k: jax.ShapeDtypeStruct((2, *TEXT), jnp.float16) for k in names}
  batch = {"x0": jax.ShapeDtypeStruct((2, *SHAPE), jnp.float32), "cond": texts}
  key = jax.eval_shape(lambda: jax.random.key(0))
  frozen = jax.eval_shape(teacher.init, key) if distills else None
  return flops.count_flops(trainer.update, trainer.abstract_state(), batch, key, frozen)


@pytest.mark.slow  # two minutes: three programs of a large network
@pytest.mark.parametrize(("guided", "bound"), [(False, 1.75), (True, 2.1)])
def test_distillation_of_text_to_image(guided, bound):
  ratio = published_step_flops("scm", guided=guided) / published_step_flops("diffusion")
  print(f"guided={guided}: {ratio:.3f}")
  assert bound - 0.15 < ratio <= bound
