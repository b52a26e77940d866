"""Solvers against Gaussian flows: changes of variables, orders, distributions, counts."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian, run_recurrence
from hypothesis import strategies as st

from sdiff_jax import registry
from sdiff_jax.diffusion import noise_schedules, time_grids, trigflow
from sdiff_jax.samplers import sequential, solvers
from sdiff_jax.samplers.solvers import dpmpp
from sdiff_jax.samplers.tableau import SolverTableau

SIGMA_D = 0.5


def vp_schedule(steps: int) -> noise_schedules.NoiseSchedule:
  """A variance-preserving schedule, alpha from 0.1 to 0.9, whose time is alpha."""

  def point(log_snr):
    alpha = 1 / np.sqrt(1 + np.exp(-2 * log_snr))
    return alpha, np.sqrt(1 - alpha**2), alpha

  alpha = np.linspace(0.1, 0.9, steps + 1)
  return noise_schedules.from_levels(
    alpha, np.sqrt(1 - alpha**2), alpha, point, sigma_d=1.0
  )


def trig_schedule(steps: int) -> noise_schedules.NoiseSchedule:
  return noise_schedules.trigflow(np.linspace(1.4, 0.3, steps + 1), SIGMA_D)


def edm_schedule(steps: int) -> noise_schedules.NoiseSchedule:
  return noise_schedules.edm(np.geomspace(20, 0.1, steps + 1))


MEAN, STD = 0.4, 0.8


def score(x, alpha, sigma):
  """Standard score of x under alpha N(MEAN, STD^2) + N(0, sigma^2)."""
  return (x - alpha * MEAN) / np.hypot(alpha * STD, sigma)


def posterior_mean(x, alpha, sigma):
  gain = alpha * STD**2 / np.hypot(alpha * STD, sigma)
  return MEAN + gain * score(x, alpha, sigma)


SCHEDULES = {"trigflow": trig_schedule, "edm": edm_schedule, "vp": vp_schedule}
# (alpha, sigma) at a time of each process
COEFFICIENTS = {
  "trigflow": lambda t: (np.cos(t), SIGMA_D * np.sin(t)),
  "edm": lambda sigma: (1.0, sigma),
  "vp": lambda alpha: (alpha, np.sqrt(1 - alpha**2)),
}


def error(solver, kind: str, steps: int) -> float:
  """Returns the distance from the flow's end, from one standard deviation off."""
  schedule = SCHEDULES[kind](steps)
  first, last = schedule.alpha[0], schedule.alpha_next[-1]
  s_first, s_last = schedule.sigma[0], schedule.sigma_next[-1]
  x = first * MEAN + np.hypot(first * STD, s_first)
  exact = last * MEAN + np.hypot(last * STD, s_last)

  def denoiser(x, time):
    return posterior_mean(x, *COEFFICIENTS[kind](time))

  return abs(run_recurrence(solver(schedule), x, denoiser) - exact)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
  ("solver", "order"),
  [("ddim", 1), ("heun", 2), ("dpm2s", 2), (dpmpp.dpmpp, 2)],
)
def test_order_of_convergence(kind, solver, order):
  """Halving the steps divides the error by 2^order."""
  if isinstance(solver, str):
    solver = functools.partial(solvers.from_schedule, solver)
  errors = np.array([error(solver, kind, n) for n in (100, 200, 400)])
  rates = np.log2(errors[:-1] / errors[1:])
  np.testing.assert_allclose(rates, order, atol=0.1)
  assert errors[0] < 0.02


@pytest.mark.parametrize("kind", SCHEDULES)
def test_multistep_solvers_agree_with_ddim_where_d_is_constant(kind):
  schedule = SCHEDULES[kind](9)
  first = solvers.from_schedule("ddim", schedule)
  for order in (1, 2, 3):
    table = dpmpp.dpmpp(schedule, order)
    np.testing.assert_allclose(table.x_coef, first.x_coef, rtol=1e-12)
    total = table.denoised_coef.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(total, first.denoised_coef, rtol=1e-9)
    assert table.history == order
    assert table.denoised_coef.any(axis=0).all()


@pytest.mark.parametrize(("order", "rate"), [(1, 0.9), (2, 1.8)])
def test_the_sde_solver_converges_to_the_distribution_of_a_gaussian(order, rate):
  """x0 ~ N(0, v): states stay Gaussian, so the variance is exact."""
  v, errors = 0.3, []
  for steps in (50, 100, 200):
    schedule = noise_schedules.trigflow(np.linspace(1.4, 0.3, steps + 1), SIGMA_D)
    table = dpmpp.dpmpp(schedule, order, sde=True)
    denoised_coef = np.pad(table.denoised_coef, ((0, 0), (0, 2 - table.history)))
    gain = schedule.alpha * v / (schedule.alpha**2 * v + schedule.sigma**2)
    # (x, d before) stay jointly Gaussian; the noise joins x alone.
    cov = np.zeros((2, 2))
    cov[0, 0] = schedule.alpha[0] ** 2 * v + schedule.sigma[0] ** 2
    for i, g in enumerate(gain):
      (b, c), a = denoised_coef[i], table.x_coef[i, 0]
      move = np.array([[a + b * g, c], [g, 0.0]])
      cov = move @ cov @ move.T + np.diag([table.noise_coef[i] ** 2, 0.0])
    exact = schedule.alpha_next[-1] ** 2 * v + schedule.sigma_next[-1] ** 2
    errors.append(abs(cov[0, 0] - exact))
  assert np.log2(errors[0] / errors[1]) > rate
  assert np.log2(errors[1] / errors[2]) > rate


def test_heun_is_of_second_order_down_to_data():
  """The last step, Euler's, goes from noise to none and keeps the order."""
  f = Gaussian(np.array(MEAN), np.array(STD), SIGMA_D)
  x = np.array(0.7)
  exact = f.consistency(x, np.array(1.2))

  def denoiser(x, time):
    return posterior_mean(x, np.cos(time), SIGMA_D * np.sin(time))

  grids = (
    noise_schedules.trigflow(np.linspace(1.2, 0, n + 1), SIGMA_D)
    for n in (50, 100, 200)
  )
  tables = [solvers.from_schedule("heun", schedule) for schedule in grids]
  errors = [abs(float(run_recurrence(t, x, denoiser) - exact)) for t in tables]
  assert errors[0] / errors[1] > 3.4
  assert errors[1] / errors[2] > 3.4


def any_denoiser(x, sigma):
  """A denoiser of the variance-exploding process that is no one's posterior mean."""
  return np.tanh(x) / (1 + sigma) + 0.1 * np.sin(3 * x)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm2s"])
@hypothesis.given(seed=st.integers(0, 10**6), steps=st.integers(1, 12))
def test_solvers_do_not_depend_on_the_process(solver, seed, steps):
  """EDM's process at sigma and TrigFlow's at arctan(sigma / sigma_d) are one ODE."""
  rng = np.random.default_rng(seed)
  sigmas = np.append(np.sort(rng.uniform(0.01, 80, steps))[::-1], 0)
  x = sigmas[0] * rng.standard_normal()
  angles = np.arctan(sigmas / SIGMA_D)

  def on_trigflow(xt, t):
    return any_denoiser(xt / np.cos(t), SIGMA_D * np.tan(t))

  on_edm = solvers.from_schedule(solver, noise_schedules.edm(sigmas))
  edm = run_recurrence(on_edm, x, any_denoiser)
  trig = solvers.from_schedule(solver, noise_schedules.trigflow(angles, SIGMA_D))
  assert trig.init_std == pytest.approx(sigmas[0] * np.cos(angles[0]), rel=1e-12)
  found = run_recurrence(trig, np.cos(angles[0]) * x, on_trigflow)
  assert found == pytest.approx(edm, rel=1e-10, abs=1e-10)


@hypothesis.given(seed=st.integers(0, 10**6))
def test_ddim_is_euler_and_rotation(seed):
  """Euler's step of dx/dsigma = (x - d)/sigma, and `rotate`."""
  rng = np.random.default_rng(seed)
  sigmas = np.array([rng.uniform(1, 80), rng.uniform(0.01, 1)])
  x, d = rng.normal(size=2)
  step = solvers.from_schedule("ddim", noise_schedules.edm(sigmas))
  a, b = step.x_coef[0, 0], step.denoised_coef[0, 0]
  euler = x + (sigmas[1] - sigmas[0]) * (x - d) / sigmas[0]
  assert a * x + b * d == pytest.approx(euler, rel=1e-12, abs=1e-12)
  t, s = np.arctan(sigmas / SIGMA_D)
  schedule = noise_schedules.trigflow(np.array([t, s]), SIGMA_D)
  step = solvers.from_schedule("ddim", schedule)
  a, b = step.x_coef[0, 0], step.denoised_coef[0, 0]
  F = (np.cos(t) * x - d) / (SIGMA_D * np.sin(t))
  with jax.enable_x64(True):
    turned = float(trigflow.rotate(*(jnp.array(a) for a in (x, F, t, s)), SIGMA_D))
  assert a * x + b * d == pytest.approx(turned, rel=1e-12, abs=1e-12)


def test_heun_averages_noise_predictions():
  """Against the step written for eps, not for dx/dt (reference, section 1.2)."""
  t, s, x = 1.2, 0.7, 0.3
  noises = SIGMA_D * np.tan([t, s])
  y, eps = x / np.cos(t), []
  for noise, start in ((noises[0], y), (noises[1], None)):
    start = y + (noises[1] - noises[0]) * eps[0] if start is None else start
    eps.append((start - any_denoiser(start, noise)) / noise)
  expected = np.cos(s) * (y + (noises[1] - noises[0]) * sum(eps) / 2)
  schedule = noise_schedules.trigflow(np.array([t, s]), SIGMA_D)

  def denoiser(xt, t):
    return any_denoiser(xt / np.cos(t), SIGMA_D * np.tan(t))

  found = run_recurrence(solvers.from_schedule("heun", schedule), x, denoiser)
  assert found == pytest.approx(expected, rel=1e-12)


def distribution(table: SolverTableau, f: Gaussian, mean, std, shrink=0.0) -> tuple:
  """Returns mean and deviation after consistency sampling with f (1 - shrink sin t).

  f is affine and the noise independent, so both are exact.
  """
  columns = (table.denoised_coef[:, 0], table.noise_coef, table.time)
  for b, s, t in zip(*columns, strict=True):
    at = np.array(t)
    scale = 1 - shrink * np.sin(t)
    offset = float(f.consistency(np.array(0.0), at))
    slope = scale * (float(f.consistency(np.array(1.0), at)) - offset)
    mean = b * (slope * mean + scale * offset)
    std = np.hypot(b * slope * std, s)
  return mean, std


@pytest.mark.usefixtures("x64")
@hypothesis.settings(
  max_examples=25,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(seed=st.integers(0, 10**6), steps=st.integers(1, 8))
def test_consistency_sampling_is_exact_on_any_grid(seed, steps):
  rng = np.random.default_rng(seed)
  f = Gaussian(np.array(rng.normal()), np.array(rng.uniform(0.1, 2)), SIGMA_D)
  angles = np.sort(rng.uniform(0.05, np.pi / 2, steps))[::-1]
  table = solvers.build(
    sigma_d=SIGMA_D, name="consistency", steps=steps, timesteps=tuple(angles)
  )
  start = f.mean * np.cos(angles[0])
  spread = np.hypot(f.std * np.cos(angles[0]), SIGMA_D * np.sin(angles[0]))
  np.testing.assert_allclose(
    distribution(table, f, start, spread), (f.mean, f.std), rtol=1e-10, atol=1e-10
  )


@pytest.mark.usefixtures("x64")
def test_error_accumulates_as_in_the_reference():
  """Section 6.2, item 3: Monte Carlo there, of error 0.0008; exact here."""
  f = Gaussian(np.array(0.0), np.array(SIGMA_D), SIGMA_D)
  short = []
  for steps in (1, 2, 4, 8, 16):
    angles = np.linspace(np.arctan(160), 0, steps + 1)
    schedule = noise_schedules.trigflow(angles, SIGMA_D)
    table = solvers.from_schedule("consistency", schedule)
    short.append(SIGMA_D - distribution(table, f, 0.0, SIGMA_D, shrink=0.02)[1])
  assert np.all(np.diff(short) > 0)
  reference = [0.0094, 0.0125, 0.0142, 0.0171, 0.0201]
  np.testing.assert_allclose(short, reference, atol=0.0012)


@pytest.mark.parametrize(
  ("name", "steps", "evaluations"),
  [("ddim", 18, 18), ("heun", 18, 35), ("heun", 32, 63), ("dpm2s", 18, 35)],
)
def test_evaluations(name, steps, evaluations):
  table = solvers.build(sigma_d=SIGMA_D, name=name, steps=steps)
  assert table.evaluations == evaluations
  np.testing.assert_allclose(np.tan(table.time[0]) * SIGMA_D, 80)
  assert solvers.build(sigma_d=SIGMA_D, name=name, steps=1).evaluations == 1


@pytest.mark.parametrize("temperature", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(
  "name", ["consistency", "ddpm", "ddim", "heun", "edm_stochastic"]
)
def test_temperature_scales_the_distribution_of_centered_gaussian_data(
  name, temperature
):
  """Every step is linear there, so the samples are temperature times those at 1."""
  f = Gaussian(np.array(0.0), np.array(0.3), SIGMA_D)
  made = []

  def denoiser(x, t, cond):
    return f.consistency(x, t) if name == "consistency" else f.posterior(x, t)[0]

  for factor in (1.0, temperature):
    table = solvers.build(sigma_d=SIGMA_D, name=name, steps=3, temperature=factor)
    keys = sequential.keys_from_seeds(np.arange(5))
    x = sequential.sample_prior(table, keys, (2,))
    made.append(sequential.sample(denoiser, table, x, keys, None))
  assert np.abs(made[0]).max() > 0.1
  np.testing.assert_allclose(made[1], temperature * made[0], 1e-4, 1e-5)


def test_timesteps_replace_the_grid():
  table = solvers.build(sigma_d=SIGMA_D, name="consistency", steps=2)
  np.testing.assert_allclose(table.time, [np.arctan(160), 1.1])
  given = solvers.build(
    sigma_d=SIGMA_D, name="consistency", steps=1, timesteps=(1.5, 1.0, 0.2)
  )
  np.testing.assert_allclose(given.time, [1.5, 1.0, 0.2])
  assert given.init_std == pytest.approx(SIGMA_D * np.sin(1.5))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"name": "rk4"}, "^name='rk4': must be one of consistency, ddim"),
    ({"steps": 0}, "^steps=0: must be from 1 to 100000"),
    ({"temperature": -1.0}, r"^temperature=-1\.0: must be at least 0"),
    ({"eta": 1.5}, r"^eta=1\.5: must be from 0 to 1"),
    ({"name": "heun", "eta": 0.5}, r"^eta=0\.5: the solver 'heun' has no such option"),
    ({"timesteps": (1.0, 1.2)}, r"^timesteps=\(1\.0, 1\.2\): must decrease"),
    (
      {"name": "edm_stochastic", "s_churn": -1.0},
      r"^s_churn=-1\.0: must be at least 0",
    ),
    ({"name": "unipc2", "variant": "bh3"}, "^variant='bh3': must be one of bh1, bh2"),
  ],
)
def test_mistakes_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    solvers.build(**{"sigma_d": SIGMA_D, "name": "ddim", "steps": 4} | changes)


def test_grids_of_solvers():
  for name in solvers.names():
    grid = registry.lookup("samplers.solvers", name).facts["timesteps"]
    table = solvers.build(sigma_d=SIGMA_D, name=name, steps=5)
    if name != "edm_stochastic":  # which evaluates at higher noise levels
      assert set(grid(5, SIGMA_D)[:-1]) <= set(table.time)
  np.testing.assert_allclose(
    np.diff(time_grids.uniform_timesteps(5, SIGMA_D), 2), 0, atol=1e-15
  )


@pytest.mark.parametrize("start", [np.pi / 2, 1.5708, 1.5707])
def test_heun_refuses_to_start_at_almost_pure_noise(start):
  with pytest.raises(
    ValueError, match="^timesteps: heun cannot start at noise .* use dpm2s"
  ):
    solvers.build(sigma_d=0.5, name="heun", steps=2, timesteps=(start, 1.0))
  table = solvers.build(sigma_d=0.5, name="dpm2s", steps=2, timesteps=(start, 1.0))
  assert all(np.isfinite(column).all() for column in table[:-2])


def test_the_gain_is_that_of_gaussian_data():
  for sigma_d in (0.5, 1.0):
    schedule = noise_schedules.trigflow(np.linspace(1.5, 0, 5), sigma_d)
    table = solvers.from_schedule("ddim", schedule)
    np.testing.assert_allclose(table.gain, np.cos(schedule.time))
  sigmas = np.array([80.0, 2.0, 0.5, 0.0])
  gain = solvers.from_schedule("ddim", noise_schedules.edm(sigmas)).gain
  np.testing.assert_allclose(gain, 0.25 / (0.25 + sigmas[:-1] ** 2))
