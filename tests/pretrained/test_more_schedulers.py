"""Ancestral, consistency, Karras and thresholded schedulers against diffusers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture_mean, run_recurrence
from conftest import FIXTURES

from sdiff_jax.pretrained.diffusers import scheduler
from sdiff_jax.samplers import paradigms, sequential

PEER, RUNS = {}, {}
for file in ("more_schedulers", "sigma_grids"):  # of the same mixture and noise
  with np.load(FIXTURES / f"{file}.npz") as arrays:
    PEER |= dict(arrays)
  RUNS |= json.loads(str(PEER["runs"]))
MIXTURE = {k: PEER[k] for k in ("means", "stds", "weights")}
quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def of(name: str, **fields):
  return scheduler.from_config({"_class_name": f"{name}Scheduler"} | fields)


def noise(i: int) -> np.ndarray:
  """Returns the noise of step i, [3, 4], as the script of the fixture has it."""
  return 2**0.5 * np.sin(1.7 * np.arange(12.0) + 0.9 * i).reshape(3, 4)


def mean(x, alpha: float) -> np.ndarray:
  return mixture_mean(MIXTURE, x, alpha, (1 - alpha**2) ** 0.5)


def clipped(schedule, table, alpha, x, time) -> np.ndarray:
  """Returns the denoised value, by the scheduler's own denoiser for its clips."""
  x0 = mean(x, alpha)
  if not schedule.clip:
    return x0
  own = schedule._replace(kind="x0")
  with jax.enable_x64(True):
    denoise = scheduler.denoiser(lambda *_: jnp.asarray(x0), own, table)
    return np.asarray(denoise(jnp.asarray(x), jnp.full(len(x), time), None))


@pytest.mark.parametrize("kind", sorted({name.split("/")[0] for name in RUNS}))
def test_equal_to_diffusers(kind):
  """Timesteps and end states, of all spacings and of 1 to 1,000 steps."""
  names = [name for name in RUNS if name.startswith(f"{kind}/")]
  assert len(names) >= 14
  for name in names:
    run = RUNS[name]
    schedule = of(run["class"], **run["config"])
    table = scheduler.tableau(schedule, run["steps"])
    alphas = dict(zip(table.time, table.alpha, strict=True))
    if f"{name}/timesteps" in PEER:
      time = np.asarray(table.time)
      if schedule.whole:
        time = np.round(time) if schedule.whole == "round" else np.floor(time + 1e-4)
      np.testing.assert_allclose(
        time, PEER[f"{name}/timesteps"], rtol=1e-5, atol=1e-6, err_msg=name
      )
    x = run_recurrence(
      table,
      table.init_std * PEER["z"],
      lambda x, time, s=schedule, t=table, a=alphas: clipped(s, t, a[time], x, time),
      [noise(i) for i in range(table.evaluations)],
    )
    np.testing.assert_allclose(
      x, PEER[f"{name}/final"], rtol=2e-6, atol=2e-6, err_msg=name
    )


@pytest.mark.parametrize("steps", PEER["flow_steps"].tolist())
def test_beta_levels_of_flow_matching(steps):
  """As `test_flow_scheduler` has the others."""
  schedule = of("FlowMatchEulerDiscrete", shift=3.0, use_beta_sigmas=True)
  table = scheduler.tableau(schedule, steps)
  found = 1000 * table.time
  np.testing.assert_allclose(found, PEER[f"flow_{steps}/timesteps"], rtol=1e-6)
  x = run_recurrence(
    table, PEER["z"], lambda x, time: mixture_mean(MIXTURE, x, 1 - time, time)
  )
  np.testing.assert_allclose(x, PEER[f"flow_{steps}/final"], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
  "loop",
  [
    "karras",
    pytest.param("ancestral", marks=pytest.mark.slow),
    pytest.param("lcm", marks=pytest.mark.slow),
    pytest.param("dynamic", marks=pytest.mark.slow),
  ],
)
def test_in_parallel(loop, monkeypatch):
  """At tolerance 0 the last states of both loops are equal to the bit.

  Each operation of the model rounds once, so that rows come out alike in any program.
  """
  monkeypatch.setattr(paradigms, "ULPS", 0)
  schedule = {
    "karras": lambda: of("DPMSolverMultistep", use_karras_sigmas=True),
    "ancestral": lambda: of("EulerAncestralDiscrete"),
    "lcm": lambda: of("LCM", prediction_type="sample"),
    "dynamic": lambda: of("DDIM", thresholding=True, dynamic_thresholding_ratio=0.5),
  }[loop]()
  schedule = schedule._replace(kind="x0")
  table = scheduler.tableau(schedule, 12)

  def predict(x, time, cond):
    return x / (1 + jnp.abs(x) + time[:, None] / 1024)

  denoiser = scheduler.denoiser(predict, schedule, table)
  keys = sequential.keys_from_seeds(np.arange(3))
  x = sequential.sample_prior(table, keys, (4,))

  @quickly
  def run(x, keys):
    args = denoiser, table, x, keys, None
    return sequential.sample(*args), paradigms.run(*args, window=5, tolerance=0.0)

  one, many = run(x, keys)
  np.testing.assert_array_equal(many.x, one)
  assert jnp.abs(one - x).max() > 0.1
  assert table.uses_noise == (loop in ("ancestral", "lcm"))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("name", "beta", "how"),
  [
    ("DPMSolverMultistep", "scaled_linear", np.round),
    ("DPMSolverMultistep", "squaredcos_cap_v2", np.floor),
    ("EulerDiscrete", "scaled_linear", lambda time: time),
  ],
)
def test_network_at_levels_between_timesteps(name, beta, how):
  """The denoiser has the noise level of the step, its network a whole timestep."""
  schedule = of(name, beta_schedule=beta, use_karras_sigmas=True)
  table = scheduler.tableau(schedule, 10)
  seen = []

  def predict(x, time, cond):
    seen.append(float(time[0]))
    return jnp.zeros_like(x)  # of the noise: d = x / alpha

  denoiser = scheduler.denoiser(predict, schedule, table)
  for time, alpha in zip(table.time, table.alpha, strict=True):
    d = denoiser(jnp.ones((1, 2)), jnp.array([time]), None)
    np.testing.assert_allclose(d, 1 / alpha, rtol=1e-9)
  np.testing.assert_allclose(seen, how(table.time + 1e-9), atol=1e-8)


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("FlowMapEulerDiscrete", {"shift": 0}, "shift=0: must be a number above 0"),
    (
      "EulerDiscrete",
      {"use_karras_sigmas": True, "use_exponential_sigmas": True},
      "use_karras_sigmas=True: not with use_exponential_sigmas=True",
    ),
    (
      "UniPCMultistep",
      {"use_flow_sigmas": True},
      "values not supported: use_flow_sigmas=True",
    ),
    (
      "DDIM",
      {"thresholding": True, "dynamic_thresholding_ratio": 2},
      "dynamic_thresholding_ratio=2: must be a number above 0",
    ),
  ],
)
def test_wrong_fields(name, fields, message):
  with pytest.raises(ValueError, match=message):
    of(name, **fields)


def test_wrong_steps():
  with pytest.raises(
    ValueError, match="steps=51: must be in 1 to original_inference_s"
  ):
    scheduler.tableau(of("LCM"), 51)
