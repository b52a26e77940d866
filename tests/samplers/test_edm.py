"""EDM's stochastic sampler: against EDM's code, without churn, and in distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import run_recurrence
from test_sequential import as_net, mixture

from sdiff_jax.diffusion import noise_schedules, time_grids, trigflow
from sdiff_jax.samplers import paradigms, sequential, solvers

SIGMA_D = 0.5
OPTIONS = {"s_churn": 20.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}


@pytest.fixture
def edm(fixture, x64, monkeypatch):
  """The fixture of EDM's sampler; its churn noise is that of every sampler."""
  data = fixture("edm_heun")
  churn = jnp.asarray(data["edm1_churn/churn_noise"])  # one a step, of two stages each
  monkeypatch.setattr(
    sequential, "noise_before", lambda keys, i, shape: churn[i // 2, keys]
  )
  return data


@pytest.mark.parametrize("process", ["edm", "trigflow"])
@pytest.mark.parametrize("loop", ["sequential", "paradigms"])
def test_churn_of_edm(edm, process, loop):
  """S_churn 20, S_tmin 0.05, S_tmax 50, S_noise 1.003 over 12 steps."""
  sigmas = time_grids.karras(12)
  if process == "edm":
    denoiser, schedule = mixture(edm), noise_schedules.edm(sigmas)
  else:
    denoiser = trigflow.denoiser(as_net(mixture(edm)), SIGMA_D)
    schedule = noise_schedules.trigflow(np.arctan(sigmas / SIGMA_D), SIGMA_D)
  tableau = solvers.from_schedule("edm_stochastic", schedule, **OPTIONS)
  x = tableau.init_std * jnp.asarray(edm["latents"])
  keys = jnp.arange(len(x))
  if loop == "sequential":
    found = sequential.sample(denoiser, tableau, x, keys, None)
  else:
    options = {"window": 9, "tolerance": 0.0}
    found = paradigms.run(denoiser, tableau, x, keys, None, **options).x
  np.testing.assert_allclose(found, edm["edm1_churn/final"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{"s_churn": 0.0}, {"s_tmin": 90.0}])
def test_without_churn_it_is_heun(options):
  schedule = noise_schedules.trigflow(np.linspace(1.5, 0.0, 9), SIGMA_D)
  heun = solvers.from_schedule("heun", schedule)
  found = solvers.from_schedule("edm_stochastic", schedule, **options)
  for column, values in zip(heun._fields, heun, strict=True):
    np.testing.assert_array_equal(getattr(found, column), values, err_msg=column)


def test_churn_is_bounded_and_inside_its_range():
  sigmas = np.append(np.geomspace(80, 0.01, 10), 0.0)
  schedule = noise_schedules.edm(sigmas)
  tableau = solvers.from_schedule(
    "edm_stochastic", schedule, s_churn=1e6, s_tmin=0.1, s_tmax=10.0, s_noise=1.0
  )
  starts, added = tableau.time[::2], tableau.noise_before[::2]
  inside = (sigmas[:-1] >= 0.1) & (sigmas[:-1] <= 10.0)
  # gamma = 2^(1/2) - 1 doubles the variance.
  np.testing.assert_allclose(added, np.where(inside, sigmas[:-1], 0.0), rtol=1e-12)
  np.testing.assert_allclose(starts, np.where(inside, 2**0.5, 1) * sigmas[:-1])
  assert not tableau.noise_before[1::2].any()


def churned_variance(steps: int, s_churn: float, variance: float) -> float:
  """Returns the variance of samples of N(0, variance), exactly.

  The denoiser is linear, so a state is a vector of the coefficients of the independent
  noises that it is made of.
  """
  tableau = solvers.build(
    sigma_d=SIGMA_D, name="edm_stochastic", steps=steps, s_churn=s_churn, s_noise=1.0
  )
  first, *added = np.eye(1 + tableau.evaluations)

  def denoiser(x, t):
    c, s = np.cos(t), SIGMA_D * np.sin(t)
    return c * variance / (c**2 * variance + s**2) * x

  start = tableau.init_std * first
  return float(np.sum(run_recurrence(tableau, start, denoiser, None, added) ** 2))


@pytest.mark.parametrize("variance", [0.01, 0.3, 1.0])
def test_the_distribution_of_a_gaussian_is_the_limit_of_many_steps(variance):
  errors = [abs(churned_variance(n, 20.0, variance) / variance - 1) for n in (80, 640)]
  assert errors[1] < 2e-3
  assert errors[0] / errors[1] > 7


def test_the_parallel_sampler_follows_the_churn_in_few_iterations():
  tableau = solvers.build(sigma_d=SIGMA_D, name="edm_stochastic", steps=20)

  def denoiser(x, t, cond):
    c, s = jnp.cos(t)[:, None], SIGMA_D * jnp.sin(t)[:, None]
    v = jnp.geomspace(1e-3, 1.0, 8)[None]
    return c * v / (c**2 * v + s**2) * x

  keys = sequential.keys_from_seeds(np.arange(3))
  x = sequential.sample_prior(tableau, keys, (8,))
  alone = jax.jit(functools.partial(sequential.sample, denoiser, tableau))
  options = {"window": tableau.evaluations, "tolerance": 1e-3}
  call = jax.jit(functools.partial(paradigms.run, denoiser, tableau, **options))
  found = call(x, keys, None)
  np.testing.assert_allclose(found.x, alone(x, keys, None), atol=1e-3)
  assert np.all(found.num_iterations <= 10)
