"""Euler's method and zero terminal SNR against the numbers of diffusers' schedulers."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture_mean, run_recurrence
from conftest import FIXTURES

from sdiff_jax.pretrained.diffusers import scheduler

with np.load(FIXTURES / "euler.npz") as arrays:
  PEER = dict(arrays)
RUNS = json.loads(str(PEER["runs"]))
MIXTURE = {k: PEER[k] for k in ("means", "stds", "weights")}


def schedule_of(name: str) -> scheduler.Schedule:
  run = RUNS[name]
  return scheduler.from_config(
    {"_class_name": f"{run['class']}Scheduler"} | run["config"]
  )


def mean(x, alpha: float) -> np.ndarray:
  return mixture_mean(MIXTURE, x, alpha, (1 - alpha**2) ** 0.5)


@pytest.mark.parametrize("name", RUNS)
def test_last_states(name):
  """All spacings, predictions and numbers of steps, from 1 to those of training."""
  schedule, steps = schedule_of(name), RUNS[name]["steps"]
  tableau = scheduler.tableau(schedule, steps)
  if f"{name}/timesteps" in PEER:
    np.testing.assert_allclose(tableau.time, PEER[f"{name}/timesteps"], rtol=1e-6)
  alphas = dict(zip(tableau.time, tableau.alpha, strict=True))
  x = tableau.init_std * PEER["z"]
  x = run_recurrence(tableau, x, lambda x, time: mean(x, alphas[time]))
  np.testing.assert_allclose(x, PEER[f"{name}/final"], rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [k for k in RUNS if RUNS[k]["steps"] in (2, 10)])
def test_denoiser(name):
  """The denoiser of each prediction has the noise level of the solver's step."""
  schedule = schedule_of(name)
  tableau = scheduler.tableau(schedule, RUNS[name]["steps"])
  kind = RUNS[name]["config"]["prediction_type"]
  alphas = dict(zip(tableau.time, tableau.alpha, strict=True))

  def predict(x, time, cond):
    alpha = alphas[float(time[0])]
    sigma = (1 - alpha**2) ** 0.5
    x0 = jnp.asarray(mean(x, alpha))
    eps = (x - alpha * x0) / sigma
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[
      kind
    ]

  denoiser = scheduler.denoiser(predict, schedule, tableau)
  for time, alpha in alphas.items():
    x = jnp.asarray(PEER["z"])
    found = denoiser(x, jnp.full(len(x), time), None)
    np.testing.assert_allclose(found, mean(x, alpha), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_gaussian(spacing):
  """Data of standard deviation 0.3 come out of 10 steps with that of Euler, not DDIM."""
  config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
  config |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": spacing}
  tableau = scheduler.tableau(scheduler.from_config(config), 10)
  ratio = np.append((1 / tableau.alpha**2 - 1) ** 0.5, 0.0)
  std = ratio[0]  # of x0 + sigma eps
  for sigma, after in itertools.pairwise(ratio):
    std *= 1 + (after - sigma) * sigma / (0.09 + sigma**2)
  alphas = dict(zip(tableau.time, tableau.alpha, strict=True))

  def posterior_mean(x, time):
    alpha = alphas[time]
    return alpha * 0.09 / (alpha**2 * 0.09 + 1 - alpha**2) * x

  found = run_recurrence(tableau, np.array([tableau.init_std]), posterior_mean)
  np.testing.assert_allclose(found, std, rtol=1e-9)
  assert found == pytest.approx(
    {"linspace": 0.201, "trailing": 0.189}[spacing], abs=2e-3
  )


def of(name: str, **fields) -> scheduler.Schedule:
  return scheduler.from_config({"_class_name": f"{name}Scheduler"} | fields)


@pytest.mark.parametrize(
  "solver", ["ddim", "ddpm", "euler", "dpm2s", "dpmpp2m", "unipc2"]
)
@pytest.mark.parametrize("betas", [{"trained_betas": [0.1, 0.3, 0.6, 1.0]}, {}])
def test_zero_terminal_snr_by_any_solver(solver, betas):
  """Pure noise at the first timestep: all coefficients and the levels are finite."""
  fields = betas or {"rescale_betas_zero_snr": True}
  schedule = of("DDIM", prediction_type="v_prediction", clip_sample=False, **fields)
  schedule = schedule._replace(spacing="trailing")
  tableau = scheduler.tableau(schedule, 4, solver)
  assert all(np.isfinite(column).all() for column in tableau if column is not None)
  denoiser = scheduler.denoiser(lambda x, t, _: -x, schedule, tableau, solver)
  x = jnp.ones((len(tableau.time), 2))
  with jax.debug_nans(True):
    d = denoiser(x, jnp.asarray(tableau.time, jnp.float32), None)
  np.testing.assert_allclose(d[0], 1.0, atol=1e-3)  # x0 = -v


@pytest.mark.parametrize(
  "fields", [{"rescale_betas_zero_snr": True}, {"trained_betas": [0.1, 1]}]
)
def test_noise_of_pure_noise(fields):
  with pytest.raises(
    ValueError, match="^prediction_type='epsilon': .*zero terminal SNR"
  ):
    of("DDIM", **fields)


def test_leading_with_as_many_steps_as_timesteps():
  """diffusers' DDIM asks for timestep 1000 of 1000, too, and its Euler takes it."""
  fields = {"timestep_spacing": "leading", "steps_offset": 1}
  for name in ("DDIM", "DDPM", "PNDM"):
    with pytest.raises(ValueError, match=r"^steps=1000: begins at timestep 1000 .*=1,"):
      scheduler.tableau(of(name, **fields), 1000)
    assert scheduler.tableau(of(name, **fields), 999).time[0] == 999
  assert scheduler.tableau(of("EulerDiscrete", **fields), 1000).time[0] == 1000
  for name in ("DPMSolverMultistep", "UniPCMultistep"):
    for spacing in ("leading", "linspace"):
      schedule = of(name, timestep_spacing=spacing)
      with pytest.raises(ValueError, match=r"^steps=1000: must be in 1 to 999"):
        scheduler.tableau(schedule, 1000)
    assert scheduler.tableau(of(name, timestep_spacing="trailing"), 1000).time[0] == 999


def test_grids_that_are_not_supported():
  with pytest.raises(ValueError, match="interpolation_type='log_linear'"):
    of("EulerDiscrete", interpolation_type="log_linear")
