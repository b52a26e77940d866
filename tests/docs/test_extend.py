"""The files of docs/extend, run from outside the package as its page says."""

import importlib
import os
import pathlib
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax import main, samplers
from sdiff_jax.diffusion import noise_schedules

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "extend"
PAGE = (FOLDER.parent / "extend.md").read_text("utf-8")
PIECES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "config")
TINY = ("--config.train.steps=3", "--config.train.batch_size=8")


@pytest.fixture(scope="module", autouse=True)
def importable():
  """Puts the folder on Python's path, as PYTHONPATH does in the page's commands."""
  sys.path.insert(0, str(FOLDER))
  yield
  sys.path.remove(str(FOLDER))


def command(workdir: os.PathLike, *fields: str) -> str:
  """Returns the last line of a command with the config of the page."""
  arguments = [f"--config={FOLDER / 'config.py'}", f"--workdir={workdir}", *fields]
  return main.run(main.parse(["main", *TINY, *arguments]))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
  """A trained run."""
  workdir = tmp_path_factory.mktemp("blobs")
  command(workdir)
  return workdir


def test_the_page_shows_every_file():
  assert sorted(re.findall(r"<!-- file: docs/extend/(\w+)\.py -->", PAGE)) == sorted(
    [*PIECES, "config"]
  )


@pytest.mark.parametrize(
  "name", ["ab2", pytest.param("paraab2", marks=pytest.mark.slow)]
)
def test_it_trains_and_samples(run, name):
  fields = "--config.sample.num=8", "--config.sample.batch_size=8"
  command(run, "--job=sample", f"--config.sampler.name={name}", *fields)
  with np.load(run / "samples.npz") as samples:
    assert samples["arr_0"].shape == (8, 8, 8, 1)
  (run / "samples.npz").unlink()


def test_the_job_runs(run):
  line = command(run, "--job=count_parameters", "--config.count_parameters.unit=1000")
  assert float(line.removesuffix(" parameters")) > 1


def test_a_field_that_a_piece_lacks_is_refused(run):
  with pytest.raises(main.UserError, match="no such field"):
    command(run, "--config.loss.d=1")


def test_the_solver_has_order_two():
  """For Gaussian data the end of the probability flow is known in closed form."""
  importlib.import_module("ab2")
  std, sigma = 0.5, 5.0
  x = jnp.linspace(-1.0, 1.0, 5)[:, None]
  errors = []
  for steps in (20, 40, 80):
    # To a small noise, where the error is that of the method.
    sigmas = np.linspace(sigma**0.5, 0.5**0.5, steps + 1) ** 2
    sampler = samplers.build("ab2", noise_schedules.edm(sigmas))

    def denoiser(x, time, cond):
      return x * (std**2 / (std**2 + time**2)).reshape(-1, 1)

    end = integrate(sampler.tableau, denoiser, x)
    exact = x * ((std**2 + 0.5**2) / (std**2 + sigma**2)) ** 0.5
    errors.append(float(jnp.abs(end - exact).max()))
  orders = np.log2(np.divide(errors[:-1], errors[1:]))
  np.testing.assert_allclose(orders, 2, atol=0.35)


def integrate(tableau, denoiser, x):
  """Runs the recurrence of a tableau, as its documentation writes it."""
  states, denoised = [x, x], [x, x]
  for i in range(tableau.evaluations):
    denoised = [
      denoiser(states[0], jnp.full(len(x), tableau.time[i]), None),
      denoised[0],
    ]
    new = sum(c * s for c, s in zip(tableau.x_coef[i], states, strict=True))
    new += sum(c * d for c, d in zip(tableau.denoised_coef[i], denoised, strict=False))
    states = [new, states[0]]
  return states[0]
