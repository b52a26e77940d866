"""The door to sampling: names, options, seeds; solvers and loops from outside."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_xla import xla_flags

from sdiff_jax import config as configs
from sdiff_jax import samplers
from sdiff_jax.data import digits
from sdiff_jax.diffusion import noise_schedules, time_grids
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.samplers import _gaussian_mixture, sequential
from sdiff_jax.samplers import sampler as sampler_lib
from sdiff_jax.training import state
from sdiff_jax.training.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
DENOISER = _gaussian_mixture.denoiser(0.5)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "paraddpm", "specddpm", "srdsddim"])
def test_a_sample_is_made_from_its_own_seed(name):
  """Keys, prior and loop; the same from traced seeds and in any company."""
  options = {"window": 4} if samplers.takes(name, "window") else {}
  sampler = samplers.build(name, sigma_d=0.5, steps=8, **options)

  @jax.jit
  def from_seeds(seeds):
    return samplers.sample(sampler, DENOISER, seeds, (16,))

  @jax.jit
  def by_hand(seeds):
    keys = sequential.keys_from_seeds(seeds)
    x = sequential.sample_prior(sampler.tableau, keys, (16,))
    return sampler_lib.run(sampler, DENOISER, x, keys, None)

  seeds = jnp.arange(4)
  for ours, expected in zip(from_seeds(seeds), by_hand(seeds), strict=True):
    np.testing.assert_array_equal(ours, expected)
  others = from_seeds(jnp.array([7, 2, 9, 3])).x
  np.testing.assert_array_equal(others[1::2], from_seeds(seeds).x[2:])
  assert from_seeds(seeds).x.shape == (4, 16)


def test_a_noise_schedule_takes_the_place_of_steps():
  schedule = noise_schedules.trigflow(time_grids.uniform_timesteps(6, 0.5), 0.5)
  ours = samplers.build("ddim", schedule).tableau
  expected = samplers.build("ddim", sigma_d=0.5, steps=6).tableau
  for a, b in zip(ours, expected, strict=True):
    np.testing.assert_array_equal(a, b)
  for extra in ({"steps": 6}, {"sigma_d": 0.5}, {"timesteps": (1.0,)}):
    with pytest.raises(ValueError, match=f"^{next(iter(extra))}="):
      samplers.build("ddim", schedule, **extra)
  with pytest.raises(ValueError, match="^steps: needed without a noise schedule"):
    samplers.build("ddim", sigma_d=0.5)


def test_names_are_prefixes_and_solvers():
  names = samplers.names()
  assert {"heun", "paraddpm", "specddpm", "srdsddim", "pararealddim"} <= {*names}
  for prefix in ("para", "spec", "srds", "parareal"):
    assert f"{prefix}heun" in names
  alias = samplers.build("paradpmsolver", sigma_d=0.5, steps=4, window=2)
  named = samplers.build("paradpmpp2m", sigma_d=0.5, steps=4, window=2)
  for a, b in zip(alias.tableau, named.tableau, strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(ValueError, match=r"^name='hein': .*did you mean 'heun'"):
    samplers.build("hein", sigma_d=0.5, steps=4)


@pytest.mark.parametrize(
  ("name", "option", "takers"),
  [
    ("heun", {"window": 4}, "paraheun"),
    ("specddpm", {"tolerance": 0.3}, "paraddpm"),
    ("heun", {"eta": 0.5}, "the solver ddim"),
    ("paraddim", {"callback": print}, "given to `sample`"),
    ("ddim", {"speed": 1}, "no sampler does"),
  ],
)
def test_an_option_that_a_sampler_does_not_take_is_refused(name, option, takers):
  with pytest.raises(ValueError, match=f"^{next(iter(option))}=.*{takers}"):
    samplers.build(name, sigma_d=0.5, steps=8, **option)


@pytest.mark.parametrize("option", ["mesh", "callback", "coarse_denoiser"])
def test_an_argument_that_a_sampler_does_not_take_is_refused(option):
  sampler = samplers.build("heun", sigma_d=0.5, steps=4)
  with pytest.raises(ValueError, match=f"^{option}: the sampler 'heun' does not take"):
    samplers.sample(sampler, DENOISER, [0], (16,), **{option: print})


def test_a_window_must_be_chosen_before_sampling():
  sampler = samplers.build("paraddim", sigma_d=0.5, steps=4)
  with pytest.raises(ValueError, match="^window=0: "):
    samplers.sample(sampler, DENOISER, [0], (16,))
  assert sampler.replace(window=2).options["window"] == 2
  assert sampler.sequential().name == "ddim"


# A solver and a loop, whose names would mislead a parser of prefixes and suffixes.
SOLVER = """
from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids
from sdiff_jax.samplers.solvers import ddim

@registry.register("samplers.solvers", "paramount", timesteps=time_grids.karras_timesteps)
def paramount(schedule, power=1.0):
  return ddim.ddim(schedule, eta=0.0)
"""
LOOP = """
import jax.numpy as jnp
from sdiff_jax import registry
from sdiff_jax.samplers import sequential
from sdiff_jax.samplers._samples import Samples

@registry.register("samplers", "twice", prefix="twice")
def run(denoiser, tableau, x, keys, cond, *, strength=0.5):
  def blended(x, time, cond):
    first = denoiser(x, time, cond)
    return first + strength * (denoiser(x, time, cond) - first)
  x = sequential.sample(blended, tableau, x, keys, cond)
  count = jnp.full(len(x), 2 * tableau.evaluations, jnp.int32)
  return Samples(x, count, count, *[jnp.zeros(len(x), x.dtype)] * 2)
"""


@pytest.mark.slow
def test_a_solver_and_a_loop_from_outside_are_one_file_each(tmp_path):
  (tmp_path / "outside_solver.py").write_text(SOLVER)
  (tmp_path / "outside_loop.py").write_text(LOOP)
  config = configs.base()
  config.model = configs.component("models", "mlp", width=16, depth=1)
  workdir = str(tmp_path / "run")
  workdir_lib.save_or_check_config(config, workdir, digits.build())
  params = experiments.build(config).network.init(jax.random.key(0))
  with Checkpoints(workdir, keep=1) as checkpoints:
    created = state.create(params, optax.identity(), tuple(config.ema.profiles))
    checkpoints.save(1, created)

  def sample(name):
    command = [sys.executable, "-m", "sdiff_jax.main", f"--workdir={workdir}"]
    command += ["--config=configs/digits_diffusion.py", "--job=sample"]
    command += ["--config.plugins=('outside_solver', 'outside_loop')"]
    command += [f"--config.sampler.name={name}", "--config.sampler.steps=3"]
    command += ["--config.sample.num=4", "--config.sample.batch_size=4"]
    done = subprocess.run(
      command,
      cwd=ROOT,
      env=os.environ
      | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "XLA_FLAGS": xla_flags(1)},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(f"{workdir}/samples.npz") as arrays:
      return done.stdout, arrays["arr_0"]

  text, images = sample("paramount")
  assert " 3 evaluations each" in text
  text, again = sample("twiceparamount")
  assert " 6 evaluations each" in text
  np.testing.assert_allclose(again.astype(int), images.astype(int), atol=1)
