"""The configs of CIFAR-10 and ImageNet: the paper's numbers, sizes, and a few steps.

Numbers are those of arXiv:2410.11081, appendix G, written out once more, so that a
config that changes is noticed.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import random_params
from test_config import CONFIGS, load

from sdiff_jax import config, registry
from sdiff_jax.data import class_cond
from sdiff_jax.experiment import build, sampling, training
from sdiff_jax.jobs import train
from sdiff_jax.training import state
from sdiff_jax.types import UserError

ALL = ("S", "M", "L", "XL", "XXL")
DATA = {"imagenet64": ALL[:4], "imagenet512": ALL}
KINDS = ("diffusion", "sct", "scd")
FILES = [f"{data}_{kind}" for data in ("cifar10", *DATA) for kind in KINDS]

# By size: steps in thousands, learning rate, dropout, width of the average.
TEACHERS = {
  "imagenet64": {
    "S": (1048, 1e-2, 0, 0.075),
    "M": (1486, 9e-3, 0.10, 0.06),
    "L": (761, 8e-3, 0.10, 0.04),
    "XL": (540, 7e-3, 0.10, 0.04),
  },
  "imagenet512": {
    "S": (1048, 1e-2, 0, 0.025),
    "M": (1048, 9e-3, 0.1, 0.03),
    "L": (696, 8e-3, 0.1, 0.015),
    "XL": (598, 7e-3, 0.1, 0.02),
    "XXL": (376, 6.5e-3, 0.1, 0.015),
  },
}
RATES = {"S": 1e-4, "M": 9e-5, "L": 8e-5, "XL": 7e-5, "XXL": 6.5e-5}
# Steps in thousands, dropout of S, dropout of the others.
STUDENTS = {
  "imagenet64_sct": (400, 0.45, 0.45),
  "imagenet64_scd": (400, 0, 0),
  "imagenet512_sct": (100, 0.25, 0.35),
  "imagenet512_scd": (200, 0, 0.10),
}
# P_mean and P_std of the teacher and of its students.
PROPOSALS = {
  "cifar10": ((-1.2, 1.2), (-1.0, 1.4)),
  "imagenet64": ((-0.8, 1.6), (-1.0, 1.6)),
  "imagenet512": ((-0.4, 1.0), (-0.8, 1.6)),
}
# Millions of parameters, without what the adaptive double norm adds.
MILLIONS = {"S": 280.2, "M": 497.8, "L": 777.6, "XL": 1119.4, "XXL": 1523.4}


def get(name: str, *words: str):
  return load(CONFIGS / f"{name}.py", *words)


SIZES = [(data, size) for data in DATA for size in DATA[data]]
LATENT_S = ("imagenet512", "S")
sizes = pytest.mark.parametrize(("data", "size"), SIZES)


@sizes
def test_teachers_of_imagenet(data, size):
  c = get(f"{data}_diffusion", size)
  config.validate(c)
  steps, rate, dropout, width = TEACHERS[data][size]
  assert (c.train.steps, c.optim.learning_rate) == (steps * 1000, rate)
  assert (c.model.preset, c.model.dropout) == (size, dropout)
  assert c.ema.profiles == (f"power/{width}",)
  assert c.loss.name == "diffusion"
  assert c.loss.label_dropout == {"imagenet64": 0, "imagenet512": 0.1}[data]
  assert not c.model.guidance
  assert sampling.build_sampler(c).tableau.evaluations == 63
  guidance = 1 if data == "imagenet64" else 1.4 if size == "S" else 1.2
  assert c.sample.guidance == guidance


@sizes
@pytest.mark.parametrize("kind", ["sct", "scd"])
def test_students_of_imagenet(data, size, kind):
  name = f"{data}_{kind}"
  c = get(name, size)
  config.validate(c)
  steps, of_smallest, of_others = STUDENTS[name]
  assert (c.train.steps, c.optim.learning_rate) == (steps * 1000, RATES[size])
  assert c.model.dropout == (of_smallest if size == "S" else of_others)
  assert (c.model.preset, c.model.dropout_resolution) == (size, 16)
  assert c.ema.profiles == ("power/0.05",)
  guided = name == "imagenet512_scd"
  assert c.loss.guidance == ((1.0, 2.0) if guided else ())
  assert c.model.guidance == guided
  assert c.teacher.config == f"configs/{data}_diffusion.py:{size}"
  assert c.init_from == f"runs/{data}_diffusion_{size}"
  assert c.teacher.workdir == ("" if name.endswith("sct") else c.init_from)


@sizes
@pytest.mark.parametrize("kind", KINDS)
def test_what_all_of_imagenet_share(data, size, kind):
  c = get(f"{data}_{kind}", size)
  assert (c.train.batch_size, c.train.flip, c.sigma_d) == (2048, False, 0.5)
  assert (c.optim.name, c.optim.b1, c.optim.b2, c.optim.eps) == (
    "adam",
    0.9,
    0.99,
    1e-11,
  )
  assert c.optim.schedule == "inverse_sqrt"
  assert c.optim.reference_steps == {"imagenet64": 35e3, "imagenet512": 70e3}[data]
  assert c.optim.rampup_images == 10e6
  assert (c.model.name, c.model.process, c.model.norm) == ("edm2", "trigflow", "double")
  assert (c.model.embedding, c.model.dtype) == ("positional", "float16")
  assert c.class_conditional


@pytest.mark.parametrize("kind", KINDS)
def test_cifar10(kind):
  c = get(f"cifar10_{kind}")
  config.validate(c)
  assert (c.train.batch_size, c.train.steps, c.sigma_d) == (512, 400_000, 0.5)
  moments = (c.optim.name, c.optim.learning_rate, c.optim.b1, c.optim.b2, c.optim.eps)
  teacher = kind == "diffusion"
  assert moments == (
    ("adam", 1e-3, 0.9, 0.999, 1e-8) if teacher else ("radam", 1e-4, 0.9, 0.99, 1e-8)
  )
  assert c.optim.schedule == "constant"
  assert c.model.dropout == {"diffusion": 0.13, "sct": 0.20, "scd": 0}[kind]
  assert (c.model.name, c.model.dtype) == ("ddpmpp", "float32")
  assert c.ema.profiles == ("half_life/500000",)
  assert (c.data.mean, c.data.std) == ((0.0,), (0.5,))
  assert not c.class_conditional
  evaluations = sampling.build_sampler(c).tableau.evaluations
  assert evaluations == (35 if teacher else 2)


@pytest.mark.parametrize("name", FILES)
def test_objectives(name):
  c = get(name)
  data, _, kind = name.partition("_")
  assert (c.loss.p_mean, c.loss.p_std) == PROPOSALS[data][kind != "diffusion"]
  assert c.loss.adaptive_weight
  if kind != "diffusion":
    assert c.loss.velocity == {"sct": "data", "scd": "teacher"}[kind]
    assert (c.loss.tangent_normalizer, c.loss.c, c.loss.warmup_steps) == (
      "l2",
      0.1,
      10_000,
    )
    grid = sampling.build_sampler(c, "consistency/2").tableau.time
    np.testing.assert_allclose(grid[:2], [np.arctan(80 / 0.5), 1.1])


def parameters(c, shape: tuple[int, ...], **changed) -> int:
  classes = 1000 if c.class_conditional else 0
  given = {"shape": shape, "cond": class_cond(classes), "sigma_d": c.sigma_d}
  net = registry.build("models", c.model.to_dict() | changed, **given)
  shapes = jax.eval_shape(net.init, jax.random.key(0))["net"]
  return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
  ("data", "size"),
  [pytest.param(*c, marks=[pytest.mark.slow] * (c != LATENT_S)) for c in SIZES],
)
def test_sizes_of_the_networks(data, size):
  """Beyond the paper's table: the double norm has another linear layer in a block."""
  shape = (64, 64, 3 if data == "imagenet64" else 4)
  c = get(f"{data}_diffusion", size)
  assert parameters(c, shape, norm="single") == pytest.approx(
    MILLIONS[size] * 1e6, rel=2e-4
  )
  if size == "S":
    assert parameters(c, shape) == pytest.approx(293.9e6, rel=2e-4)
    student = parameters(get(f"{data}_scd", size), shape)
    guidance = 192 * 768 if data == "imagenet512" else 0  # features, embedding
    assert student == parameters(c, shape) + guidance


@pytest.mark.slow
def test_size_of_the_network_of_cifar10():
  c = get("cifar10_scd")
  assert parameters(c, (32, 32, 3), norm="single") == 55_732_739  # EDM's 55.7
  assert parameters(c, (32, 32, 3)) == 60_049_667


def test_words():
  for given in ("S,tiny", "tiny,S", "tiny"):
    c = get("imagenet512_scd", given)
    assert (c.data.name, c.model.preset) == ("digits", "S")
    assert c.train.steps == 4
  assert get("imagenet64_sct", "tiny").init_from.endswith("64_diffusion_tiny")
  for given in ("XXL", "S,M", "S tiny", "s"):
    message = (
      f"imagenet64_sct.py:{given}: variants are one of 'S', 'M', 'L', 'XL', and 'tiny'"
    )
    with pytest.raises(UserError, match=message):
      get("imagenet64_sct", given)
  with pytest.raises(UserError, match="cifar10_scd.py:S: the only variant is 'tiny'"):
    get("cifar10_scd", "S")


def word(name: str) -> str:
  return "tiny" if name.startswith("cifar10") else "S,tiny"


@pytest.fixture
def unoptimized():
  """Programs that run twice are not worth the time of XLA's optimization."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize(
  "name",
  ["cifar10_diffusion", "imagenet512_scd"],
)
@pytest.mark.slow
def test_two_steps(name):
  """A step of the tiny network, from random weights, moves all of them."""
  c = get(name, word(name))
  c.optim.rampup_images = 0
  built = build.build(c)
  net = built.network
  params = net.normalize(random_params(net, dtype="float32"))
  frozen = None
  if c.loss.name == "scm":
    of_teacher = get(name.replace("scd", "diffusion"), word(name))
    frozen = random_params(build.build(of_teacher).network, 1, "float32")
    assert jax.tree.structure(frozen) != jax.tree.structure(params)  # guidance
  teacher = build.network(of_teacher, built.dataset) if frozen else None
  trainer = training.build_trainer(c, net, teacher, mesh=None)
  run = jax.jit(trainer.update)
  images, cond = built.dataset[np.arange(4)]
  batch = {"x0": jnp.asarray(images / 255, jnp.float32), "cond": cond}
  before = current = state.create(params, trainer.optimizer, c.ema.profiles)
  for _ in range(2):
    current, metrics = run(current, batch, jax.random.key(0), frozen)
    assert np.isfinite(metrics["loss"])
    assert metrics["skipped"] == 0
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, current.params)
  assert all(jax.tree.leaves(moved["net"]))


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_float16_keeps_the_gradient_of_a_mean_over_the_papers_batch():
  """Measured: relative errors .56 without the loss scale, .0026 with it."""
  c = get("imagenet64_scd", "S")
  small = {"channels": 16, "channel_mult": (1, 2), "blocks": 1, "head_channels": 16}
  given = {"shape": (64, 64, 3), "cond": class_cond(10), "sigma_d": 0.5}
  share = 8 / c.train.batch_size  # a batch of 8 weighs what it weighs in 2048

  def gradient(dtype: str, scale: float) -> np.ndarray:
    model = c.model.to_dict() | small | {"dtype": dtype, "remat": ""}
    net = registry.build("models", model, **given)
    params, frozen = (
      net.normalize(random_params(net, seed, "float32")) for seed in (0, 1)
    )
    params["logvar"] = jax.tree.map(jnp.zeros_like, params["logvar"])
    loss = training.build_loss(c, net, net)
    x0 = 0.5 * jax.random.normal(jax.random.key(1), (8, 64, 64, 3))
    batch = {"x0": x0, "cond": {"label": jnp.arange(8)}}
    rest = (batch, jax.random.key(0), jnp.int32(10_000), frozen)
    of_net = jax.jit(jax.grad(lambda p: scale * share * loss(p, *rest)[0]))(params)
    leaves = jax.tree.leaves(of_net["net"])
    return np.concatenate([np.ravel(leaf) / scale for leaf in leaves])

  true = gradient("float32", 1.0)
  without, scaled = (
    np.linalg.norm(gradient("float16", scale) - true) / np.linalg.norm(true)
    for scale in (1.0, c.train.loss_scale)
  )
  assert without > 0.1
  assert scaled < 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("name", FILES)
def test_the_tiny_runs(name, tmp_path: pathlib.Path):
  """The job `train` as a user starts it, from a teacher of random weights."""
  c = get(name, word(name))
  if c.teacher.config:
    file = f"{name.split('_')[0]}_diffusion"
    teacher_config = get(file, word(name))
    teacher = build.build(teacher_config)
    params = random_params(teacher.network, dtype="float32")
    c.init_from = str(tmp_path / "teacher")
    if c.teacher.workdir:
      c.teacher.workdir = c.init_from
    params = teacher.network.normalize(params)
    training.save_initial(teacher_config, teacher, c.init_from, params)
  run = str(tmp_path / "run")
  assert train.run(c, run) == f"trained 4 steps: {run}"
  assert (tmp_path / "run" / "training.json").exists()
