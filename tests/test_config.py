"""Configs: fields, validation, and every experiment file of the repository."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax import config, registry
from sdiff_jax.data import digits, pipeline
from sdiff_jax.experiment import build, sampling, training
from sdiff_jax.types import UserError

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def load(path: pathlib.Path, *words: str):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*words)


ALL = sorted(CONFIGS.glob("*.py"))
FILES = [path for path in ALL if load(path).job == "train"]
# Those whose data are not everywhere, with the word that makes them small.
WORDS = {p.stem: ("tiny",) for p in FILES if p.stem.startswith(("imagenet", "cifar10"))}


def test_configs_of_other_jobs_validate():
  for path in {*ALL} - {*FILES}:
    c = load(path)
    config.validate(c)
    assert c.job in registry.names("jobs")


def test_push_t_as_published():
  path = CONFIGS / "pusht_diffusion.py"
  c = load(path, "published")
  config.validate(c)
  assert (c.model.name, c.model.process, c.loss.name) == ("unet1d", "ddpm", "ddpm")
  assert (c.data.horizon, c.data.n_obs_steps, c.data.n_action_steps) == (16, 2, 8)
  with pytest.raises(UserError, match="the only variant is 'published'"):
    load(path, "pubished")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_validates_and_its_step_traces(path, tmp_path):
  config.validate(load(path))
  c = load(path, *WORDS.get(path.stem, ()))
  config.validate(c)
  if c.data.name == "trajectories":
    c.data.path = str(tmp_path / "episodes.npz")
    arrays = {"state": np.ones((40, 20)), "action": np.ones((40, 2))}
    np.savez(c.data.path, **arrays, episode_ends=[40])
  built = build.build(c)
  network = built.network
  of_teacher = c.copy_and_resolve_references()
  of_teacher.model.update({k: False for k in c.model if k == "guidance"})
  teacher = build.network(of_teacher, built.dataset)
  loss = training.build_loss(c, network, teacher)
  params, frozen = (
    jax.eval_shape(net.init, jax.random.key(0)) for net in (network, teacher)
  )
  size = 4
  batch = {
    "x0": jax.ShapeDtypeStruct((size, *built.dataset.shape), jnp.float32),
    "cond": pipeline.conditions(built.dataset, size),
  }
  step = jax.ShapeDtypeStruct((), jnp.int32)
  frozen = frozen if c.loss.name == "scm" else None
  value, aux = jax.eval_shape(loss, params, batch, jax.random.key(0), step, frozen)
  assert value.shape == ()
  assert "mse" in aux
  for sampler in c.evaluate.samplers:
    assert (
      sampling.build_sampler(c, sampler, c.evaluate.samplers).tableau.evaluations >= 1
    )


def test_guided_word():
  c = load(CONFIGS / "digits_scd.py", "guided")
  assert c.model.guidance
  assert c.loss.guidance == (1.0, 2.0)
  with pytest.raises(UserError, match="the only variant is 'guided'"):
    load(CONFIGS / "digits_scd.py", "guide")


def test_an_unconditional_network_is_not_told_the_classes():
  c = config.base()
  source = digits.build()
  for c.class_conditional in (True, False):
    shapes = jax.eval_shape(build.network(c, source).init, jax.random.key(0))
    paths = [jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(shapes)]
    assert any("label" in path for path in paths) == c.class_conditional


def test_fields_are_the_defaults_of_build():
  section = config.component("models", "mlp", width=32)
  assert section.name == "mlp"
  assert section.width == 32
  assert set(section) == {"name"} | set(registry.fields("models", "mlp"))
  assert "shape" not in section  # given by the job


def test_unknown_piece_lists_what_exists():
  message = r"models: no 'mpl'; did you mean 'mlp'\?.*known: .*dit, .*mlp"
  with pytest.raises(UserError, match=message):
    config.component("models", "mpl")
  with pytest.raises(UserError, match="losses: no 'weighting'"):
    config.component("losses", "weighting")  # a module without build


def test_unknown_field_names_the_nearest():
  with pytest.raises(UserError, match="models.widht: .*did you mean width"):
    config.component("models", "mlp", widht=3)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("train.batch_size", 0, "config.train.batch_size=0: must be above 0"),
    ("train.steps", -1, "config.train.steps=-1: must not be negative"),
    ("checkpoint.keep_every", -2, "config.checkpoint.keep_every=-2: must not be neg"),
    ("sigma_d", float("nan"), "config.sigma_d=nan: must be above 0"),
    ("ema.profiles", (), "config.ema.profiles"),
    ("model.name", "dit", "config.model.embed: models/dit has no such field"),
  ],
)
def test_validation_names_field_and_value(field, value, message):
  c = config.base()
  c.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=message):
    config.validate(c)


def test_a_refusal_of_a_piece_is_the_users_error():
  section = config.component("models", "dit", patch=3).to_dict()
  with pytest.raises(UserError, match="model.patch=3: must divide"):
    registry.build("models", section, shape=(8, 8, 1), classes=0)


def test_name_and_number():
  assert config.name_and_number("heun/16", "x") == ("heun", 16.0)
  for text in ("heun", "heun/", "heun/a"):
    with pytest.raises(UserError, match="config.x: .* name/number"):
      config.name_and_number(text, "x")
