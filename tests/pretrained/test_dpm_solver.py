"""The last steps of DPM-Solver++ against the numbers of diffusers' scheduler."""

import json

import numpy as np
import pytest
from closed_forms import mixture_mean, run_recurrence
from conftest import FIXTURES

from sdiff_jax.pretrained.diffusers import scheduler
from sdiff_jax.pretrained.diffusers.flow_schedule import FlowSchedule

with np.load(FIXTURES / "dpm_solver.npz") as arrays:
  PEER = dict(arrays)
RUNS = json.loads(str(PEER["runs"]))
MIXTURE = {k: PEER[k] for k in ("means", "stds", "weights")}
NAME = {"_class_name": "DPMSolverMultistepScheduler"}


def noise(i: int) -> np.ndarray:
  """Returns the noise of step i, [3, 4], as the script of the fixture has it."""
  return 2**0.5 * np.sin(1.7 * np.arange(12.0) + 0.9 * i).reshape(3, 4)


def table_of(run: dict):
  """Returns the schedule of a run, and its solver from noise or from data."""
  schedule = scheduler.from_config(NAME | run["config"])
  steps, taken = run["steps"], run["taken"]
  # In the middle of what is rounded to the steps that are taken, down or up.
  half = -0.5 if isinstance(schedule, FlowSchedule) else 0.5
  strength = None if taken == steps else (taken + half) / steps
  return schedule, scheduler.tableau(schedule, steps, strength=strength)


def last_state(run: dict) -> np.ndarray:
  schedule, table = table_of(run)
  assert table.evaluations == run["taken"]
  alphas = dict(zip(table.time, table.alpha, strict=True))

  def denoise(x, time):
    alpha = alphas[time]
    sigma = 1 - alpha if isinstance(schedule, FlowSchedule) else (1 - alpha**2) ** 0.5
    return mixture_mean(MIXTURE, x, alpha, sigma)

  x = table.init_std * PEER["z"]
  if run["taken"] < run["steps"]:
    x = x + table.alpha[0] * PEER["x0"]
  return run_recurrence(table, x, denoise, [noise(i) for i in range(run["taken"])])


def test_equal_to_diffusers():
  """All orders, ends and numbers of steps, from noise and from the middle."""
  for run, final in zip(RUNS, PEER["finals"], strict=True):
    np.testing.assert_allclose(
      last_state(run), final, rtol=2e-6, atol=2e-6, err_msg=str(run)
    )


@pytest.mark.parametrize(("steps", "order"), [(14, 2), (15, 3)])
def test_the_number_of_all_steps_counts(steps, order):
  """The orders of the last five of 14 and of 15 steps."""
  run = {"config": {"solver_order": 3}, "steps": steps, "taken": 5}
  orders = np.count_nonzero(table_of(run)[1].denoised_coef, axis=1)
  assert orders.tolist() == [1, 2, 3, order, 1]


@pytest.mark.parametrize("value", [2, "yes"])
def test_wrong_fields(value):
  with pytest.raises(ValueError, match="euler_at_final=.*: must be true or false"):
    scheduler.from_config(NAME | {"euler_at_final": value})
