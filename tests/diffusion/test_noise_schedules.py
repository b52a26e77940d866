"""Paths and tables against the numbers of diffusers' schedulers, in float64.

The model is the exact posterior mean of a Gaussian mixture, so eps and v agree.
"""

import json
import pathlib

import numpy as np
import pytest

from sdiff_jax.diffusion import noise_schedules
from sdiff_jax.samplers import solvers

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
  means, stds = PEER[f"{kind}/means"], PEER[f"{kind}/stds"][:, None, None]
  var = (alpha * stds) ** 2 + sigma**2
  residual = x[None] - alpha * means[:, None]
  log_weight = -0.5 * np.sum(residual**2 / var + np.log(var), -1)
  log_weight += np.log(PEER[f"{kind}/weights"])[:, None]
  weight = np.exp(log_weight - log_weight.max(0))
  mean = means[:, None] + alpha * stds**2 / var * residual
  return np.einsum("ks,ksd->sd", weight / weight.sum(0), mean)


def solve(kind, table, abar, noise=None, clip=None):
  """Runs a table on the mixture, whose level is read off the table's own time."""
  x = PEER[f"{kind}/x_init"]
  x_1 = d_1 = d_2 = np.zeros_like(x)
  for i, t in enumerate(table.time):
    level = abar[round(t)]
    d = posterior_mean(kind, x, level**0.5, (1 - level) ** 0.5)
    d = d if clip is None else np.clip(d, -clip, clip)
    a, p, b, c, e, s = (column[i] for column in table[:6])
    new = a * x + p * x_1 + b * d + c * d_1 + e * d_2
    new += 0 if s == 0 else s * noise[i]
    x, x_1, d_1, d_2 = new, x, d, d_1
  return x


def of(kind: str) -> list[str]:
  # DDIM there clips x0 and keeps the eps from before, which no table in x0 can.
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
  path = noise_schedules.vp(
    abar,
    at,
    ends=at - run["T"] // run["N"],
    last=1.0 if run["a1"] else abar[0],
  )
  final = solve("ddim", solvers.ddim(path), abar)
  np.testing.assert_allclose(final, PEER[f"{name}/final"], atol=1e-9)


@pytest.mark.parametrize("name", of("ddpm"))
def test_ddpm(name):
  run, abar = RUNS[name], abar_of(RUNS[name])
  at = noise_schedules.timesteps(run["T"], run["N"], run["spacing"])
  np.testing.assert_array_equal(at, PEER[f"{name}/timesteps"])
  table = solvers.ddpm(noise_schedules.vp(abar, at))
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
  table = solvers.dpmpp(noise_schedules.vp(abar, at, last=last), run.get("order", 2))
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
  path = CHAINS[kind]
  for alpha, sigma, time in zip(*path[:3], strict=True):
    found = path.point(np.log(alpha / sigma))
    np.testing.assert_allclose(found, (alpha, sigma, time), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("kind", CHAINS)
def test_noise_keeps_the_law_of_a_gaussian(kind):
  """A step of DDPM is exact for x0 ~ N(0, v) if x0 given x is drawn, not averaged."""
  path, v = CHAINS[kind], 0.3
  table = solvers.ddpm(path)
  var = path.alpha[0] ** 2 * v + path.sigma[0] ** 2
  for i, (alpha, sigma) in enumerate(zip(path.alpha, path.sigma, strict=True)):
    gain = alpha * v / (alpha**2 * v + sigma**2)  # d = gain x
    mean = table.a[i] + table.b[i] * gain
    left = v - gain * alpha * v  # variance of x0 given x
    var = mean**2 * var + table.s[i] ** 2 + table.b[i] ** 2 * left
  expected = path.alpha_next[-1] ** 2 * v + path.sigma_next[-1] ** 2
  assert var == pytest.approx(expected, rel=1e-9)


def test_eta_leads_from_ddim_to_ddpm():
  path = noise_schedules.trigflow(np.linspace(1.5, 0.0, 9), 0.5)
  half = solvers.ddim(path, eta=0.5)
  np.testing.assert_allclose(half.s, solvers.ddpm(path).s / 2, rtol=1e-12)
  # Noise and what is left of eps make up sigma' together.
  np.testing.assert_allclose(
    np.hypot(half.a * path.sigma, half.s), path.sigma_next, rtol=1e-12
  )
  assert not solvers.ddim(path).s.any()


def test_large_variance_is_beta():
  abar = noise_schedules.alphas_cumprod("linear", 10)
  table = solvers.ddpm(noise_schedules.vp(abar, np.arange(10)[::-1]), "large")
  betas = np.linspace(1e-4, 0.02, 10)[::-1]
  np.testing.assert_allclose(table.s[:-1] ** 2, betas[:-1], rtol=1e-9)
  assert table.s[-1] == 0


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: noise_schedules.alphas_cumprod("square", 10),
      "schedule='square': take 'linear'",
    ),
    (lambda: noise_schedules.timesteps(10, 11, "leading"), "steps=11: take 1 to 10"),
    (lambda: noise_schedules.timesteps(10, 0, "leading"), "steps=0: take 1 to 10"),
    (
      lambda: noise_schedules.timesteps(10, 5, "even"),
      "spacing='even': take 'leading'",
    ),
    (lambda: solvers.ddpm(PATH, "huge"), "variance='huge': take 'small' or 'large'"),
    (lambda: solvers.dpmpp(PATH, 4), r"order=4: DPM-Solver\+\+ has 1, 2 and 3"),
    (lambda: solvers.dpmpp(PATH, 3, sde=True), "order=3: .* its SDE 1 and 2"),
  ],
)
def test_mistakes_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


PATH = noise_schedules.trigflow(np.linspace(1.5, 0.0, 5), 0.5)
