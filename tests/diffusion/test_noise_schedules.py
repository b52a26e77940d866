"""Noise schedules and solvers against the numbers of diffusers' schedulers, in float64.

The model is the exact posterior mean of a Gaussian mixture, so eps and v agree.
"""

import json
import pathlib

import numpy as np
import pytest
from closed_forms import mixture_mean, run_recurrence

from sdiff_jax.diffusion import noise_schedules
from sdiff_jax.samplers import solvers
from sdiff_jax.samplers.solvers import dpmpp

FILE = pathlib.Path(__file__).parents[1] / "fixtures" / "schedulers.npz"
with np.load(FILE) as arrays:
  PEER = dict(arrays)
RUNS = json.loads(str(PEER["runs"]))
SCHEDULES = {"squaredcos_cap_v2": "cosine", "scaled_linear": "scaled_linear"}
RANGE = {"start": 0.00085, "end": 0.012}


def abar_of(run: dict) -> np.ndarray:
  return noise_schedules.alphas_cumprod(SCHEDULES[run["beta"]], run["T"], **RANGE)


def posterior_mean(kind, x, alpha, sigma):
  """E[x0 | x] for x = alpha x0 + sigma eps and the mixture of the runs of a kind."""
  mixture = {k: PEER[f"{kind}/{k}"] for k in ("means", "stds", "weights")}
  return mixture_mean(mixture, x, alpha, sigma)


def solve(kind, table, abar, noise=None, clip=None):
  """Runs a solver on the mixture, whose noise level follows from the time."""

  def denoiser(x, time):
    level = abar[round(time)]
    d = posterior_mean(kind, x, level**0.5, (1 - level) ** 0.5)
    return d if clip is None else np.clip(d, -clip, clip)

  return run_recurrence(table, PEER[f"{kind}/x_init"], denoiser, noise)


def of(kind: str) -> list[str]:
  # DDIM there clips x0 and keeps the eps from before, which no solver in x0 can.
  return [
    name
    for name, run in RUNS.items()
    if name.startswith(kind) and not (kind == "ddim" and run["clip"])
  ]


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2_T100", "scaled_linear_T1000"])
def test_schedules(schedule):
  name, _, steps = schedule.rpartition("_T")
  abar = noise_schedules.alphas_cumprod(SCHEDULES[name], int(steps), **RANGE)
  np.testing.assert_allclose(abar, PEER[f"abar/{schedule}"], rtol=1e-12)


def test_linear_schedule():
  abar = noise_schedules.alphas_cumprod("linear", 4, start=0.1, end=0.4)
  np.testing.assert_allclose(abar, [0.9, 0.72, 0.504, 0.3024], rtol=1e-12)


@pytest.mark.parametrize("name", of("ddim"))
def test_ddim(name):
  run, abar = RUNS[name], abar_of(RUNS[name])
  at = noise_schedules.timesteps(
    run["T"], run["N"], run["spacing"], run.get("offset", 0)
  )
  np.testing.assert_array_equal(at, PEER[f"{name}/timesteps"])
  schedule = noise_schedules.vp(
    abar,
    at,
    ends=at - run["T"] // run["N"],
    final_abar=1.0 if run["a1"] else abar[0],
  )
  final = solve("ddim", solvers.from_schedule("ddim", schedule), abar)
  np.testing.assert_allclose(final, PEER[f"{name}/final"], atol=1e-9)


@pytest.mark.parametrize("name", of("ddpm"))
def test_ddpm(name):
  run, abar = RUNS[name], abar_of(RUNS[name])
  at = noise_schedules.timesteps(run["T"], run["N"], run["spacing"])
  np.testing.assert_array_equal(at, PEER[f"{name}/timesteps"])
  table = solvers.from_schedule("ddpm", noise_schedules.vp(abar, at))
  clip = 1.0 if run["clip"] else None
  final = solve("ddpm", table, abar, PEER["noise"], clip)
  np.testing.assert_allclose(final, PEER[f"{name}/final"], atol=1e-9)


@pytest.mark.parametrize("name", of("dpmpp"))
def test_dpmpp(name):
  run, abar = RUNS[name], abar_of(RUNS[name])
  T, N, offset = run["T"], run["N"], run.get("offset", 0)
  if run["spacing"] == "trailing":
    at = noise_schedules.timesteps(T, N, "trailing")
  else:  # one point more than steps, of which the last is left out
    at = noise_schedules.timesteps(T, N + 1, run["spacing"], offset)[:-1]
  np.testing.assert_array_equal(at, PEER[f"{name}/timesteps"])
  last = 1.0 if run["fs"] == "zero" else abar[0]
  schedule = noise_schedules.vp(abar, at, final_abar=last)
  table = dpmpp.dpmpp(schedule, run.get("order", 2))
  final = solve("dpmpp", table, abar)
  np.testing.assert_allclose(final, PEER[f"{name}/final"], atol=1e-9)


def vp_chain():
  abar = noise_schedules.alphas_cumprod("cosine", 60)
  return noise_schedules.vp(abar, noise_schedules.timesteps(60, 20, "leading"))


CHAINS = {
  "vp": vp_chain(),
  "trigflow": noise_schedules.trigflow(np.linspace(1.5, 0.0, 21), 0.5),
  "edm": noise_schedules.edm(np.append(np.geomspace(80, 0.01, 20), 0.0)),
  "flow": noise_schedules.flow(np.linspace(0.99, 0.0, 21)),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_points_lie_on_the_path(kind):
  schedule = CHAINS[kind]
  for alpha, sigma, time in zip(*schedule[:3], strict=True):
    found = schedule.point(np.log(alpha / sigma))
    np.testing.assert_allclose(found, (alpha, sigma, time), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("kind", CHAINS)
def test_noise_keeps_the_law_of_a_gaussian(kind):
  """A step of DDPM is exact for x0 ~ N(0, v) if x0 given x is drawn, not averaged."""
  schedule, v = CHAINS[kind], 0.3
  table = solvers.from_schedule("ddpm", schedule)
  var = schedule.alpha[0] ** 2 * v + schedule.sigma[0] ** 2
  for i, (alpha, sigma) in enumerate(zip(schedule.alpha, schedule.sigma, strict=True)):
    gain = alpha * v / (alpha**2 * v + sigma**2)  # d = gain x
    x_coef, denoised_coef = table.x_coef[i, 0], table.denoised_coef[i, 0]
    mean = x_coef + denoised_coef * gain
    left = v - gain * alpha * v  # variance of x0 given x
    var = mean**2 * var + table.noise_coef[i] ** 2 + denoised_coef**2 * left
  expected = schedule.alpha_next[-1] ** 2 * v + schedule.sigma_next[-1] ** 2
  assert var == pytest.approx(expected, rel=1e-9)


def test_eta_leads_from_ddim_to_ddpm():
  schedule = noise_schedules.trigflow(np.linspace(1.5, 0.0, 9), 0.5)
  half = solvers.from_schedule("ddim", schedule, eta=0.5)
  whole = solvers.from_schedule("ddpm", schedule)
  np.testing.assert_allclose(half.noise_coef, whole.noise_coef / 2, rtol=1e-12)
  # Noise and what is left of eps make up sigma' together.
  np.testing.assert_allclose(
    np.hypot(half.x_coef[:, 0] * schedule.sigma, half.noise_coef),
    schedule.sigma_next,
    rtol=1e-12,
  )
  assert not solvers.from_schedule("ddim", schedule).uses_noise


def test_large_variance_is_beta():
  abar = noise_schedules.alphas_cumprod("linear", 10)
  schedule = noise_schedules.vp(abar, np.arange(10)[::-1])
  table = solvers.from_schedule("ddpm_large", schedule)
  betas = np.linspace(1e-4, 0.02, 10)[::-1]
  np.testing.assert_allclose(table.noise_coef[:-1] ** 2, betas[:-1], rtol=1e-9)
  assert table.noise_coef[-1] == 0


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: noise_schedules.alphas_cumprod("square", 10),
      "schedule='square': must be 'linear'",
    ),
    (
      lambda: noise_schedules.timesteps(10, 11, "leading"),
      "steps=11: must be in 1 to 10",
    ),
    (
      lambda: noise_schedules.timesteps(10, 0, "leading"),
      "steps=0: must be in 1 to 10",
    ),
    (
      lambda: noise_schedules.timesteps(10, 5, "even"),
      "spacing='even': must be 'leading'",
    ),
    (
      lambda: solvers.from_schedule("ddpm_huge", PATH),
      "name='ddpm_huge': must be one of .*ddpm, ddpm_large",
    ),
    (lambda: dpmpp.dpmpp(PATH, 4), "order=4: must be 1, 2 or 3"),
    (lambda: dpmpp.dpmpp(PATH, 3, sde=True), "order=3: .* 1 or 2 for the SDE"),
  ],
)
def test_mistakes_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


PATH = noise_schedules.trigflow(np.linspace(1.5, 0.0, 5), 0.5)
