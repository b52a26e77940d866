"""UniPC against diffusers' UniPCMultistepScheduler, and its orders of convergence."""

import functools
import json

import numpy as np
import pytest
from closed_forms import mixture_mean, run_recurrence
from conftest import FIXTURES
from test_solvers import SCHEDULES, error

from sdiff_jax.diffusion import noise_schedules
from sdiff_jax.pretrained.diffusers import scheduler
from sdiff_jax.samplers import solvers
from sdiff_jax.samplers.solvers import unipc

with np.load(FIXTURES / "unipc.npz") as arrays:
  PEER = dict(arrays)
RUNS = json.loads(str(PEER["runs"]))
BETA_SCHEDULES = {"squaredcos_cap_v2": "cosine", "scaled_linear": "scaled_linear"}


def abar_of(config: dict) -> np.ndarray:
  return noise_schedules.alphas_cumprod(
    BETA_SCHEDULES[config["beta_schedule"]],
    config["num_train_timesteps"],
    start=config["beta_start"],
    end=config["beta_end"],
  )


@pytest.mark.parametrize("name", RUNS)
def test_the_peer(name):
  config, steps = RUNS[name]["config"], RUNS[name]["steps"]
  abar, timesteps = abar_of(config), PEER[f"{name}/timesteps"]
  final = 1.0 if config["final_sigmas_type"] == "zero" else abar[0]
  schedule = noise_schedules.vp(abar, timesteps, final_abar=final)
  tableau = unipc.unipc(schedule, config["solver_order"], variant=config["solver_type"])
  assert tableau.evaluations == steps

  def denoiser(x, time):
    level = abar[round(time)]
    return mixture_mean(PEER, x, level**0.5, (1 - level) ** 0.5)

  found = run_recurrence(tableau, PEER["x_init"], denoiser)
  np.testing.assert_allclose(found, PEER[f"{name}/final"], rtol=1e-9, atol=1e-9)
  if config["solver_type"] == "bh2" and config["solver_order"] > 1:
    published = scheduler.from_config(
      config | {"_class_name": "UniPCMultistepScheduler"}
    )
    found = scheduler.tableau(published, steps)
    tableau = tableau._replace(init_std=1.0)  # the scale of the peer's noise
    for column, values in zip(tableau._fields, tableau, strict=True):
      if values is None:
        assert getattr(found, column) is None
      else:
        np.testing.assert_allclose(getattr(found, column), values, err_msg=column)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize(("order", "observed"), [(1, 2), (2, 3), (3, 3)])
def test_order_of_convergence(kind, variant, order, observed):
  """The corrector raises the order by one; the first steps bound it by 3."""
  solver = functools.partial(
    unipc.unipc, order=order, variant=variant, lower_order_final=False
  )
  errors = [error(solver, kind, n) for n in (100, 1600)]
  rate = np.log2(errors[0] / errors[1]) / 4
  assert rate == pytest.approx(observed, abs=0.1) if order < 3 else rate > 2.9


@pytest.mark.parametrize("kind", SCHEDULES)
def test_it_agrees_with_ddim_where_d_is_constant(kind):
  schedule = SCHEDULES[kind](9)
  first = solvers.from_schedule("ddim", schedule)
  for order in (1, 2, 3):
    table = unipc.unipc(schedule, order)
    np.testing.assert_allclose(table.x_coef, first.x_coef, rtol=1e-12)
    total = table.denoised_coef.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(total, first.denoised_coef, rtol=1e-9)
    assert table.history == order + 1


def test_mistakes_are_refused():
  with pytest.raises(ValueError, match="^order=4: must be from 1 to 3"):
    unipc.unipc(SCHEDULES["edm"](4), 4)
