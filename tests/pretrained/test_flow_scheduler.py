"""The scheduler of flow matching against that of diffusers, on an exact model."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.pretrained.diffusers import flow_scheduler, scheduler
from sdiff_jax.samplers import paradigms, sequential

NAME = {"_class_name": flow_scheduler.CLASS_NAME}
quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def of(**fields) -> flow_scheduler.FlowSchedule:
  return scheduler.from_config(NAME | fields)


def velocity(mixture: dict, x, sigma):
  """E[eps - x0 | x] of a mixture of Gaussians, x [S, D] and sigma [S]."""
  means, stds, weights = (mixture[k] for k in ("means", "stds", "weights"))
  sigma, (d,) = sigma[:, None], x.shape[1:]
  alpha = 1 - sigma
  var = (alpha * stds[None]) ** 2 + sigma**2
  residual = x[:, None] - alpha[..., None] * means[None]
  log = np.log(weights)[None] - (residual**2).sum(-1) / (2 * var) - d / 2 * np.log(var)
  share = np.exp(log - log.max(1, keepdims=True))
  share = (share / share.sum(1, keepdims=True))[..., None]
  eps = sigma * (share * residual / var[..., None]).sum(1)
  pull = (alpha * stds[None] ** 2 / var)[..., None]
  return eps - (share * (means[None] + pull * residual)).sum(1)


def test_equal_to_diffusers(fixture):
  """Timesteps and end states of 1 to 1,000 steps; its inputs are rounded to float32."""
  arrays = fixture("flow_scheduler")
  runs = json.loads(str(arrays["runs"]))
  assert {run["steps"] for run in runs.values()} == {1, 2, 3, 10, 28, 50, 1000}
  for name, run in runs.items():
    schedule = of(**run["config"])._replace(
      spacing=run["spacing"], tokens=run["tokens"] or 4096
    )
    table = scheduler.tableau(schedule, run["steps"])
    np.testing.assert_allclose(
      schedule.train_steps * table.time[:: run["every"]],
      arrays[f"{name}/timesteps"],
      rtol=1e-6,
      err_msg=name,
    )
    x = arrays["z"] * table.init_std
    for time, a, b in zip(table.time, table.x_coef, table.denoised_coef, strict=True):
      x = a[0] * x + b[0] * (x - time * velocity(arrays, x, np.full(len(x), time)))
    np.testing.assert_allclose(x, arrays[f"{name}/final"], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  "solver", [pytest.param("ddim", marks=pytest.mark.slow), "ddpm"]
)
def test_in_parallel(solver, monkeypatch):
  """At tolerance 0 the last states of both loops are equal to the bit.

  Each operation of the model rounds once, so that rows come out alike in any program.
  """
  monkeypatch.setattr(paradigms, "ULPS", 0)
  schedule = of(shift=3.0)
  table = scheduler.tableau(schedule, 28, solver)

  def predict(x, time, cond):
    return x / (1 + jnp.abs(x) + time[:, None] / 1024)

  denoiser = scheduler.denoiser(predict, schedule, table, solver)
  keys = sequential.keys_from_seeds(np.arange(3))
  x = sequential.sample_prior(table, keys, (4,))

  @quickly
  def run(x, keys):
    args = denoiser, table, x, keys, None
    return sequential.sample(*args), paradigms.run(*args, window=7, tolerance=0.0)

  one, many = run(x, keys)
  np.testing.assert_array_equal(many.x, one)
  assert jnp.abs(one - x).max() > 0.1


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"invert_sigmas": True}, "values not supported: invert_sigmas=True"),
    ({"shift": 0}, "shift=0: must be a number above 0"),
    ({"time_shift_type": "cubic"}, "time_shift_type='cubic': must be one of expon"),
    (
      {"use_karras_sigmas": True, "use_exponential_sigmas": True},
      "use_karras_sigmas=True: not with",
    ),
    (
      {"use_dynamic_shifting": True, "base_image_seq_len": 4096},
      "base_image_seq_len=4096: must be below max_image_seq_len=4096",
    ),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    of(**fields)


@pytest.mark.parametrize(
  ("schedule", "steps", "solver", "message"),
  [
    ({}, 0, "", "steps=0: must be at least 1"),
    ({"spacing": "leading"}, 4, "", "timestep_spacing='leading': must be one of lins"),
    ({}, 8, "unipc3", "name='unipc3': has no finite step from pure noise"),
    ({"terminal": 0.1}, 1, "", "steps=1: must be at least 2 for shift_terminal"),
  ],
)
def test_wrong_tableaus(schedule, steps, solver, message):
  with pytest.raises(ValueError, match=message):
    scheduler.tableau(of()._replace(**schedule), steps, solver)


def test_a_negative_linear_shift():
  fields = {"time_shift_type": "linear", "base_shift": -1.0, "max_shift": 1.0}
  schedule = of(use_dynamic_shifting=True, **fields)._replace(tokens=256)
  with pytest.raises(ValueError, match="base_shift=-1.0: makes the shift -1"):
    scheduler.tableau(schedule, 4)
