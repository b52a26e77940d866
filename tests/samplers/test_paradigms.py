"""ParaDiGMS against diffusers' loop, the sequential loop, and its own claims."""

import functools
import json
import pathlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import random_params
from hypothesis import strategies as st

from sdiff_jax import registry
from sdiff_jax.data import class_cond
from sdiff_jax.diffusion import noise_schedules, trigflow
from sdiff_jax.samplers import paradigms, sequential, solvers

FILE = pathlib.Path(__file__).parents[1] / "fixtures" / "picard.npz"
with np.load(FILE) as arrays:
  PEER = dict(arrays)
CASES = json.loads(str(PEER["cases"]))
SCHEDULES = {"squaredcos_cap_v2": "cosine", "scaled_linear": "scaled_linear"}


def mixture(means, stds, weights, level):
  """Returns a Denoiser: E[x0 | x] of a Gaussian mixture; level: time -> (alpha, sigma).

  Only elementwise operations and sums over a row, so that a row's result does not
  depend on the others.
  """

  def denoiser(x, time, cond):
    alpha, sigma = (a[:, None] for a in level(time))
    d, total = 0.0, 0.0
    logs = []
    for mean, std, weight in zip(means, stds, weights, strict=True):
      mean = jnp.asarray(mean, x.dtype)[None]
      var = (alpha * float(std)) ** 2 + sigma**2
      residual = x - alpha * mean
      log = -0.5 * jnp.sum(residual**2 / var + jnp.log(var), -1, keepdims=True)
      best = mean + alpha * float(std) ** 2 / var * residual
      logs.append((log + float(np.log(weight)), best))
    most = functools.reduce(jnp.maximum, [log for log, _ in logs])
    for log, mean in logs:
      share = jnp.exp(log - most)
      d, total = d + share * mean, total + share
    return d / total

  return denoiser


def published(name: str):
  """Returns the peer's case as (denoiser, table, x, keys, noise)."""
  case, (size, _, _) = CASES[name], name.partition("/")
  abar = noise_schedules.alphas_cumprod(
    SCHEDULES[case["beta"]], case["T"], start=0.00085, end=0.012
  )
  at = PEER[f"{name}/timesteps"]
  schedule = noise_schedules.vp(abar, at, ends=at - case["T"] // case["N"])
  table = solvers.from_schedule(case["kind"], schedule)
  means, stds, weights = (PEER[f"{size}/{k}"] for k in ("means", "stds", "weights"))

  def level(time):
    a = jnp.asarray(abar)[time.astype(int)]
    return a**0.5, (1 - a) ** 0.5

  denoiser = mixture(means, stds, weights, level)
  if case["clip"]:
    denoiser = clipped(denoiser, table, case)
  x = jnp.asarray(PEER[f"{name}/x_init"])
  return denoiser, table, x, jnp.arange(len(x))


def clipped(denoiser, table, case):
  """Clips x0; the peer's DDIM keeps the eps of the x0 from before."""
  if case["kind"] == "ddpm":
    return lambda x, t, cond: jnp.clip(denoiser(x, t, cond), -1, 1)
  a, b, alpha = (
    jnp.zeros(case["T"]).at[table.time.astype(int)].set(v)
    for v in (table.x_coef[:, 0], table.denoised_coef[:, 0], table.alpha)
  )

  def of(x, t, cond):
    d0 = denoiser(x, t, cond)
    a_t, b_t, alpha_t = (v[t.astype(int)][:, None] for v in (a, b, alpha))
    kept = (b_t + a_t * alpha_t) * jnp.clip(d0, -1, 1) - a_t * alpha_t * d0
    return kept / b_t

  return of


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=[pytest.mark.slow] * (n.startswith("d32") or "_sl_" in n))
    for n in CASES
  ],
)
def test_published_is_the_loop_of_diffusers(name, monkeypatch):
  """Iterations, evaluations and strides are identical, the ends agree."""
  case = CASES[name]
  denoiser, table, x, keys = published(name)
  np.testing.assert_allclose(
    np.maximum(table.scale**2, 1e-20), PEER[f"{name}/variance"], rtol=1e-9, atol=1e-20
  )
  if "noise" in case:
    recorded = jnp.asarray(PEER[case["noise"]], jnp.float64)
    monkeypatch.setattr(sequential, "noise", lambda keys, i, shape: recorded[i, keys])
  begins = []
  run = jax.jit(
    functools.partial(
      paradigms.run,
      denoiser,
      table,
      window=min(case["p"], case["N"]),
      tolerance=case["tol"],
      update_rule="published",
      callback=lambda begin, x, d: begins.append(np.asarray(begin)),
    )
  )
  result = run(x, keys, None)
  jax.effects_barrier()
  np.testing.assert_array_equal(result.num_iterations, PEER[f"{name}/iters"])
  np.testing.assert_array_equal(result.num_evaluations, PEER[f"{name}/evals"])
  for mine, theirs in zip(np.array(begins).T, PEER[f"{name}/begins"], strict=True):
    theirs = theirs[(theirs >= 0) & (theirs < case["N"])]
    np.testing.assert_array_equal(mine[: len(theirs)], theirs)
  np.testing.assert_allclose(result.x, PEER[f"{name}/final"], atol=1e-4)


def exact(x, time, cond):
  """Each of its operations rounds once, so rows come out alike in any program.

  The mixture's do not: XLA's exp and what it fuses hang on the shape of the batch.
  """
  return x / (1 + jnp.abs(x) + time[:, None])


def trigflow_mixture():
  rng = np.random.default_rng(0)
  means = 0.6 * rng.standard_normal((3, 4)).astype(np.float32)
  level = lambda t: (jnp.cos(t), 0.5 * jnp.sin(t))  # noqa: E731
  return mixture(means, (0.1, 0.2, 0.3), (0.5, 0.3, 0.2), level)


SOLVERS = solvers.names()


def both(name, steps, window, tolerance, rule, seeds=(0, 1, 2), denoiser=None):
  table = solvers.build(sigma_d=0.5, name=name, steps=steps)
  keys = sequential.keys_from_seeds(np.array(seeds))
  x = sequential.sample_prior(table, keys, (4,))
  denoiser = denoiser or trigflow_mixture()
  alone = jax.jit(functools.partial(sequential.sample, denoiser, table))(x, keys, None)
  options = {"window": window, "tolerance": tolerance, "update_rule": rule}
  parallel = jax.jit(functools.partial(paradigms.run, denoiser, table, **options))
  return table, alone, parallel(x, keys, None)


@pytest.mark.parametrize(
  ("name", "window", "rule"),
  [
    pytest.param(
      name,
      window,
      "secant",
      marks=[pytest.mark.slow] * (window != 3 and name != "heun"),
    )
    for name in SOLVERS
    for window in (1, 3, 9)
  ]
  + [("ddpm", 4, rule) for rule in paradigms.UPDATE_RULES],
)
def test_tolerance_zero_is_sequential_to_the_bit(name, rule, window, monkeypatch):
  monkeypatch.setattr(paradigms, "ULPS", 0)
  table, alone, parallel = both(name, 9, window, 0.0, rule, denoiser=exact)
  np.testing.assert_array_equal(parallel.x, alone)
  assert np.all(parallel.num_iterations <= table.evaluations)
  if window == 1:
    np.testing.assert_array_equal(parallel.num_iterations, table.evaluations)
    np.testing.assert_array_equal(parallel.num_evaluations, table.evaluations)


@pytest.mark.parametrize(
  ("name", "rule"),
  [
    pytest.param(name, "secant", marks=[pytest.mark.slow] * (name != "ddpm"))
    for name in ("ddim", "ddpm", "dpmpp2m", "heun")
  ]
  + [("ddpm", rule) for rule in ("published", "picard", "linear")],
)
def test_small_tolerances_are_kept(name, rule):
  _, alone, parallel = both(name, 40, 20, 1e-3, rule)
  assert np.all(parallel.num_iterations < 40)
  assert np.all(parallel.error <= 1e-3)
  np.testing.assert_allclose(parallel.x, alone, atol=2e-3)


@hypothesis.settings(max_examples=5)
@hypothesis.given(
  name=st.sampled_from(SOLVERS),
  steps=st.integers(2, 7),
  share=st.floats(0, 1),
  batch=st.integers(2, 4),
)
def test_tolerance_zero_of_any_solver_window_and_batch(name, steps, share, batch):
  rows = solvers.build(sigma_d=0.5, name=name, steps=steps).evaluations
  window = 1 + int(share * (rows - 1))
  for denoiser, atol in ((exact, 0.0), (trigflow_mixture(), 2e-6)):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(paradigms, "ULPS", 0)
      _, alone, parallel = both(
        name, steps, window, 0.0, "secant", range(batch), denoiser
      )
    np.testing.assert_allclose(parallel.x, alone, rtol=5 * atol, atol=atol)
    assert np.all(parallel.num_iterations <= rows)


def test_networks_to_1e_5_and_in_fewer_iterations():
  """Matmuls round by their batch, so no change is 0: a few ulps count as none."""
  model = registry.build(
    "models",
    {"name": "mlp", "width": 32, "depth": 2},
    shape=(4, 4, 1),
    cond=class_cond(3),
  )
  params = random_params(model, dtype="float32")
  net = lambda x, t, cond: model.apply(params, x, t, cond)  # noqa: E731
  denoiser = trigflow.denoiser(net, 0.5)
  table = solvers.build(sigma_d=0.5, name="ddim", steps=40)
  keys, cond = sequential.keys_from_seeds(np.arange(4)), {"label": jnp.arange(4) % 3}
  x = sequential.sample_prior(table, keys, (4, 4, 1))
  alone = jax.jit(functools.partial(sequential.sample, denoiser, table))(x, keys, cond)
  call = functools.partial(paradigms.run, denoiser, table, window=40, tolerance=0.0)
  parallel = jax.jit(call)(x, keys, cond)
  np.testing.assert_allclose(parallel.x, alone, rtol=1e-5, atol=1e-5)
  assert np.all(parallel.num_iterations < 40)


def test_histories_are_kept_where_the_published_rule_forgets_them():
  """DPM-Solver++ 2M, whose published form restarts at first order in every window."""
  errors = {}
  for rule in ("secant", "published"):
    _, alone, parallel = both("dpmpp2m", 50, 16, 1e-3, rule)
    errors[rule] = np.sqrt(np.mean((parallel.x - alone) ** 2) / np.mean(alone**2))
  assert errors["secant"] < 1e-4
  assert errors["published"] > 1e-3


def test_samples_of_a_batch_do_not_know_of_each_other():
  for seed in range(3):
    _, _, one = both("ddpm", 30, 8, 0.05, "secant", seeds=(seed,))
    _, _, many = both("ddpm", 30, 8, 0.05, "secant", seeds=(0, 1, 2))
    assert one.num_iterations[0] == many.num_iterations[seed]
    assert one.num_evaluations[0] == many.num_evaluations[seed]
    # Not to the bit: XLA rounds the mixture of a single row in another way.
    np.testing.assert_allclose(one.x[0], many.x[seed], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.error[0], many.error[seed], rtol=1e-3)


@pytest.mark.slow
@hypothesis.settings(max_examples=5)
@hypothesis.given(
  window=st.integers(1, 24),
  tolerance=st.sampled_from([0.0, 1e-4, 0.1, 10.0]),
  rule=st.sampled_from([*paradigms.UPDATE_RULES]),
  name=st.sampled_from(["ddim", "ddpm", "dpmpp3m"]),
)
def test_counts_are_possible(window, tolerance, rule, name):
  _, _, result = both(name, 24, window, tolerance, rule)
  assert np.all(result.num_iterations <= 24)
  assert np.all(result.num_iterations * window >= 24)
  assert np.all(result.num_evaluations <= result.num_iterations * window)
  assert np.all(result.num_evaluations >= 24)
  assert np.all(np.isfinite(result.x))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"window": 0}, "^window=0: must be in 1 to 5"),
    ({"window": 6}, "^window=6: must be in 1 to 5"),
    ({"tolerance": -1.0}, r"^tolerance=-1\.0: must be at least 0"),
    ({"tolerance": float("nan")}, "^tolerance=nan: must be at least 0"),
    (
      {"update_rule": "newton"},
      "^update_rule='newton': must be one of published, picard",
    ),
  ],
)
def test_mistakes_are_refused(changes, message):
  options = {"window": 2, "tolerance": 0.1} | changes
  table = solvers.build(sigma_d=0.5, name="ddim", steps=5)
  keys = sequential.keys_from_seeds(np.arange(1))
  with pytest.raises(ValueError, match=message):
    paradigms.run(trigflow_mixture(), table, jnp.zeros((1, 4)), keys, None, **options)
