"""Configs: fields, validation, and every experiment file of the repository."""

import json
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES

from sdiff_jax import config, main, registry, renamed
from sdiff_jax.data import digits
from sdiff_jax.experiment import (
  build,
  programs,
  sampling,
  teachers,
  training,
  workdir,
)
from sdiff_jax.io import resumable
from sdiff_jax.types import UserError

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def load(path: pathlib.Path, *variant: str):
  return config.load(":".join([str(path), *variant]))


ALL = sorted(CONFIGS.glob("*.py"))
FILES = [path for path in ALL if load(path).job == "train"]
# Those whose data are not everywhere, with the word that makes them small.
WORDS = {p.stem: ("tiny",) for p in FILES if p.stem.startswith(("imagenet", "cifar10"))}


def write_idx(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes bytes as MNIST's files hold them: magic number, sizes, values."""
  header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
  path.write_bytes(header + array.tobytes())


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


# Large networks; tests/fuzz validates these configs, tests/test_paper.py their fields.
LONG = ("cifar10", "fashion_unet", "imagenet512", "imagenet64")


@pytest.mark.parametrize(
  "path",
  [pytest.param(p, marks=[pytest.mark.slow] * p.stem.startswith(LONG)) for p in FILES],
  ids=lambda p: p.stem,
)
def test_every_config_validates_and_its_step_traces(path, tmp_path):
  config.validate(load(path))
  c = load(path, *WORDS.get(path.stem, ()))
  config.validate(c)
  if c.data.name == "trajectories":
    c.data.path = str(tmp_path / "episodes.npz")
    arrays = {"state": np.ones((40, 20)), "action": np.ones((40, 2))}
    np.savez(c.data.path, **arrays, episode_ends=[40])
  if c.data.name == "idx":
    c.data.dir = str(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((10, 28, 28), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(10, dtype=np.uint8))
  if c.teacher.folder:  # a model to be downloaded, whose texts are to be encoded
    c.teacher.folder = str(FIXTURES / "tiny-sana")
    c.rehearse.shape = (8, 8, 4)
    dataset = programs.abstract_dataset(c)
    network = build.network(c, dataset)
  else:
    built = build.build(c)
    dataset, network = built.dataset, built.network
  of_teacher = c.copy_and_resolve_references()
  of_teacher.model.update({k: False for k in c.model if k == "guidance"})
  of_teacher.loss = config.component("losses", "diffusion")
  teacher = build.network(of_teacher, dataset)
  loss = training.build_loss(c, network, teacher)
  params, frozen = (
    jax.eval_shape(net.init, jax.random.key(0)) for net in (network, teacher)
  )
  size = 4
  batch = {
    "x0": jax.ShapeDtypeStruct((size, *dataset.shape), jnp.float32),
    "cond": {k: spec.batch(size) for k, spec in dataset.cond.items()},
  }
  step = jax.ShapeDtypeStruct((), jnp.int32)
  frozen = frozen if teachers.needs_teacher(c) else None
  value, aux = jax.eval_shape(loss, params, batch, jax.random.key(0), step, frozen)
  assert value.shape == ()
  assert "mse" in aux
  for sampler in c.evaluate.samplers:
    assert sampling.build_sampler(c, sampler).tableau.evaluations >= 1


def test_text_students_have_the_shapes_of_their_teachers():
  path = CONFIGS / "text_scd.py"
  folders = {
    "sana": "sana/transformer",
    "sd2": "stable_diffusion2/unet",
    "sdxl": "stable_diffusion_xl/unet",
    "sd3": "stable_diffusion3_medium/transformer",
  }
  for word, folder in folders.items():
    c = load(path, word)
    config.validate(c)
    network = json.loads((CONFIGS / "published" / folder / "config.json").read_text())
    # The published U-Net is that of 768 x 768 pixels; its base, of 512, has the same.
    side = 64 if word == "sd2" else network["sample_size"]
    assert tuple(c.rehearse.shape) == (side, side, network["in_channels"])
  c = load(path, "sana,lora")
  assert c.lora.rank == 32
  c.teacher.folder = "DIR"  # on the command line: all of them follow
  assert {c.init_from, c.model.folder, c.vae, c.text_encoder} == {"DIR"}


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
    ("train.batch_size", 0, "config.train.batch_size=0: must be at least 1"),
    ("train.steps", -1, "config.train.steps=-1: must be at least 0"),
    (
      "checkpoint.keep_every",
      -2,
      "config.checkpoint.keep_every=-2: must be at least 0",
    ),
    ("sigma_d", float("nan"), "config.sigma_d=nan: must be from 1e-06 to 1000000"),
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
    registry.build("models", section, "model", shape=(8, 8, 1), cond={})


def test_name_and_number():
  assert config.name_and_number("heun/16", "x") == ("heun", 16.0)
  for text in ("heun", "heun/", "heun/a"):
    with pytest.raises(UserError, match="config.x: .* name/number"):
      config.name_and_number(text, "x")


def test_old_names_of_fields_are_refused_with_the_new_ones():
  c = config.base()
  c.train.accumulate = 2
  with pytest.raises(
    UserError,
    match=r"^config\.train\.accumulate: is now config\.train\.grad_accum_steps$",
  ):
    config.validate(c)


@pytest.mark.parametrize(
  ("section", "component", "old", "value", "message"),
  [
    ("model", "edm2", "mults", (1, 2), "mults: is now config.model.channel_mult"),
    ("model", "ddpmpp", "modulation", "shift", "modulation: is now config.model.norm"),
    ("model", "edm2", "norm", "scale", "norm: the value 'scale' is now 'single'"),
    ("data", "trajectories", "least", 0.1, "least: is now config.data.min_range"),
  ],
)
def test_an_old_name_or_value_of_a_component_is_refused_with_the_new_one(
  section, component, old, value, message
):
  c = config.base()
  config.switch(c, section, component)
  with c.unlocked():
    c[section][old] = value
  with pytest.raises(UserError) as refused:
    config.validate(c)
  assert str(refused.value) == f"config.{section}.{message}"


def test_another_component_may_have_a_field_of_an_old_name():
  """Such as a network of another project with a field `mults`."""
  own = {"name": "mlp", "mults": (1,), "norm": "scale"}
  fields = {"model.mults": (1,), "model.norm": "scale"}
  assert not renamed.renamed_fields(fields, {"model": own})
  assert renamed.with_new_names({"model": own}) == {"model": own}


def test_old_names_on_the_command_line():
  def refused(file: str, *args: str) -> str:
    with pytest.raises(UserError) as error:
      main.parse(["main", f"--config={CONFIGS / file}", *args])
    return str(error.value)

  message = "--config.model.mults: is now --config.model.channel_mult"
  arguments = ("imagenet512_scd.py:tiny", "--config.model.mults=(1,)")
  assert refused(*arguments) == message
  message = "--config.demos.view: is now --config.data.frame"
  assert refused("pusht_diffusion.py", "--config.demos.view=block") == message
  message = "--config.model.norm: the value 'scale' is now 'single'"
  assert refused("imagenet512_scd.py:tiny", "--config.model.norm=scale") == message


@pytest.mark.parametrize(
  ("stored", "section", "expected"),
  [
    (
      {"model": {"name": "edm2", "mults": [1, 2], "norm": "scale"}},
      "model",
      {"channel_mult": (1, 2), "norm": "single"},
    ),
    ({"model": {"name": "edm2", "norm": "double"}}, "model", {"norm": "double"}),
    ({"model": {"name": "mlp", "norm": "single"}}, "model", {"norm": "single"}),
    (
      {"model": {"name": "ddpmpp", "modulation": "shift"}},
      "model",
      {"norm": "single"},
    ),
    (
      {"model": {"name": "ddpmpp", "modulation": "double_norm"}},
      "model",
      {"norm": "double"},
    ),
    (
      {
        "data": {"name": "trajectories", "least": 0.05},
        "demos": {"view": "keypoints"},
      },
      "data",
      {"min_range": 0.05, "frame": "keypoints"},
    ),
    ({"demos": {"view": "block"}}, "data", {"name": "digits"}),
  ],
)
def test_components_of_before_are_read_under_the_new_names(
  tmp_path, stored, section, expected
):
  (tmp_path / "config.json").write_text(json.dumps(OLD | stored))
  c = workdir.read(str(tmp_path))
  assert expected.items() <= c[section].to_dict().items()
  assert "view" not in c.demos
  config.validate(c)


def test_unknown_fields_of_any_section_are_refused():
  c = config.base()
  c.train.step = 2
  message = (
    r"^config\.train\.step: there is no such field; did you mean config\.train\.step"
  )
  with pytest.raises(UserError, match=message):
    config.validate(c)


def test_every_new_name_is_a_field():
  """The map of renamed fields ends in fields that exist, and starts at ones that don't."""
  c = config.base().to_dict()
  known = resumable.flatten(c).keys()
  pieces = {
    f"{section}.{field}"
    for section, kind in config.PIECES.items()
    for name in registry.names(kind)
    for field in registry.fields(kind, name)
  }
  for old, new in renamed.RENAMED.items():
    assert new.name in known | pieces, new
    assert old not in known | pieces or (old == new.name and new.values), old


# The fields that were renamed, as a work directory of before has them.
# A config.json of digits_sct, as written before fields were renamed.
OLD = json.loads(
  (CONFIGS.parent / "tests" / "fixtures" / "old_config.json").read_text()
)
STORED = {
  "conditional": False,
  "pod": "v5e:16x16",
  "ema": {"profiles": ["power/0.1"], "posthoc": "power/0.2"},
  "evaluate": {"samplers": ["heun/16"], "neighbours": 7},
  "generate": {"negative": "rain", "spacing": "leading"},
  "loss": {"name": "scm", "stabiliser": "l2", "segments": [0.5]},
  "optim": {"final": 0.1},
  "rehearse": {"what": "sample"},
  "rollout": {"actions": 4, "noise": 3},
  "sample": {"compare": True},
  "sampler": {
    "name": "heun",
    "angles": [1.5, 1.0],
    "coarse": "runs/x",
    "rule": "picard",
  },
  "train": {"accumulate": 4, "steps": 12},
}


def test_a_work_directory_of_before_is_read_under_the_new_names(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(OLD | STORED))
  c = workdir.read(str(tmp_path))
  assert (c.class_conditional, c.rehearse.topology) == (False, "v5e:16x16")
  assert (c.ema.profiles, c.ema.posthoc_std) == (("power/0.1",), "power/0.2")
  assert c.evaluate.pr_num_images == 7
  assert (c.generate.negative_prompt, c.generate.timestep_spacing) == (
    "rain",
    "leading",
  )
  assert (c.loss.tangent_normalizer, c.loss.segment_boundaries) == ("l2", (0.5,))
  assert c.loss.p_mean == registry.fields("losses", "scm")["p_mean"]
  assert (c.optim.end_lr_fraction, c.rehearse.program) == (0.1, "sample")
  assert (c.rollout.n_action_steps, c.rollout.noise_seed) == (4, 3)
  assert c.sample.compare_sequential
  sampler = (c.sampler.timesteps, c.sampler.coarse_workdir, c.sampler.update_rule)
  assert sampler == ((1.5, 1.0), "runs/x", "picard")
  assert (c.train.grad_accum_steps, c.train.steps) == (4, 12)
  config.validate(c)


def test_a_run_of_before_resumes_with_the_same_command(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(OLD))
  stored = workdir.read(str(tmp_path))
  config.validate(stored)
  assert (stored.init_from, stored.teacher.workdir) == ("/runs/teacher", "")
  c = load(CONFIGS / "digits_sct.py")
  workdir.save_or_check_config(c, str(tmp_path), digits.build())
  assert workdir.read(str(tmp_path)).optim.end_lr_fraction == c.optim.end_lr_fraction


def test_a_section_is_a_runtime_field_by_its_exact_name(tmp_path):
  """A field whose name starts like a runtime field is not one."""
  c = config.base()
  workdir.save_or_check_config(c, str(tmp_path), digits.build())
  c.sampler.steps, c.train.log_every, c.evaluate.num = 3, 7, 9
  workdir.save_or_check_config(c, str(tmp_path), digits.build())
  whole = (tmp_path / "config.json").read_text()
  for section, field in (("", "jobs"), ("", "vaes"), ("train", "log_every_thing")):
    stored = json.loads(whole)
    (stored[section] if section else stored)[field] = 1
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=rf"{field}: there is no such field"):
      workdir.save_or_check_config(c, str(tmp_path), digits.build())


def test_runtime_fields_exist():
  known = resumable.flatten(config.base().to_dict()).keys() | {
    "model.folder",
    "model.remat",
    "model.scan_blocks",
  }
  known |= {name.partition(".")[0] for name in known}
  assert config.runtime_fields() <= known
