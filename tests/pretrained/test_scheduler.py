"""Schedules of scheduler_config.json against the numbers of diffusers' schedulers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture_mean, run_recurrence
from conftest import FIXTURES

from sdiff_jax.diffusion import noise_schedules
from sdiff_jax.pretrained.diffusers import scheduler
from sdiff_jax.samplers import solvers
from sdiff_jax.samplers.solvers import dpmpp
from sdiff_jax.samplers.tableau import SolverTableau

with np.load(FIXTURES / "schedulers.npz") as arrays:
  PEER = dict(arrays)
RUNS = json.loads(str(PEER["runs"]))
RUNS = {k: run for k, run in RUNS.items() if run.get("order") != 1}
RANGE = {"beta_start": 0.00085, "beta_end": 0.012}
CLASSES = {"ddim": "DDIM", "ddpm": "DDPM", "dpmpp": "DPMSolverMultistep"}


def config_of(name: str) -> dict:
  """Returns the scheduler_config.json of a run."""
  run, kind = RUNS[name], name.split("/")[0].split("_")[0]
  kind = next(k for k in CLASSES if kind.startswith(k))
  config = {"_class_name": f"{CLASSES[kind]}Scheduler", "_diffusers_version": "0.42.1"}
  config |= RANGE | {"beta_schedule": run["beta"], "num_train_timesteps": run["T"]}
  config |= {"timestep_spacing": run["spacing"], "steps_offset": run.get("offset", 0)}
  if kind == "ddim":
    config |= {"set_alpha_to_one": bool(run["a1"]), "clip_sample": run["clip"]}
  if kind == "ddpm":
    config["clip_sample"] = run["clip"]
  if kind == "dpmpp":
    config |= {"solver_order": run.get("order", 2), "final_sigmas_type": run["fs"]}
  return config


def table_of(name: str) -> SolverTableau:
  """Returns the solver of a run, as the tests of noise schedules have checked it."""
  run = RUNS[name]
  T, N, spacing = run["T"], run["N"], run["spacing"]
  start, end = RANGE.values()
  names = {"squaredcos_cap_v2": "cosine", "scaled_linear": "scaled_linear"}
  abar = noise_schedules.alphas_cumprod(names[run["beta"]], T, start=start, end=end)
  at = PEER[f"{name}/timesteps"]
  if name.startswith("ddim"):
    last = 1.0 if run["a1"] else abar[0]
    assert spacing in ("leading", "trailing", "linspace")
    path = noise_schedules.vp(abar, at, ends=at - T // N, final_abar=last)
    return solvers.from_schedule("ddim", path)
  if name.startswith("ddpm"):
    return solvers.from_schedule("ddpm", noise_schedules.vp(abar, at))
  last = 1.0 if run["fs"] == "zero" else abar[0]
  path = noise_schedules.vp(abar, at, final_abar=last)
  return dpmpp.dpmpp(path, run.get("order", 2))


@pytest.mark.parametrize("name", RUNS)
def test_tables(name):
  config = config_of(name)
  schedule = scheduler.from_config(config)
  found = scheduler.tableau(schedule, RUNS[name]["N"])
  wanted = table_of(name)._replace(init_std=1.0)  # the scale of the peer's noise
  np.testing.assert_array_equal(found.time, PEER[f"{name}/timesteps"])
  for column, values in zip(wanted._fields, wanted, strict=True):
    if values is None:
      assert getattr(found, column) is None
    else:
      np.testing.assert_allclose(getattr(found, column), values, err_msg=column)
  assert schedule.clip == bool(config.get("clip_sample", False))
  assert schedule.kind == "eps"


CLIPPED = [k for k, run in RUNS.items() if k.startswith("ddim") and run["clip"]]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CLIPPED)
def test_clipped_ddim(name):
  """The noise is that of before the clip."""
  # What predicts x0 there, for any network.
  schedule = scheduler.from_config(config_of(name) | {"prediction_type": "sample"})
  table = scheduler.tableau(schedule, RUNS[name]["N"])

  def predict(x, time, cond):
    level = schedule.abar[round(float(time[0]))]
    mixture = {k: PEER[f"ddim/{k}"] for k in ("means", "stds", "weights")}
    mean = mixture_mean(mixture, x, level**0.5, (1 - level) ** 0.5)
    return jnp.asarray(mean)

  denoiser = scheduler.denoiser(predict, schedule, table)
  x = run_recurrence(
    table,
    jnp.asarray(PEER["ddim/x_init"]),
    lambda x, t: denoiser(x, jnp.full(len(x), t), None),
  )
  np.testing.assert_allclose(x, PEER[f"{name}/final"], atol=1e-8)


def of(name: str, **fields) -> scheduler.Schedule:
  return scheduler.from_config({"_class_name": f"{name}Scheduler"} | fields)


@pytest.mark.parametrize(
  ("name", "fields", "solver"),
  [
    ("DDIMParallel", {}, "ddim"),
    ("DDPMParallel", {}, "ddpm"),
    ("DDPM", {"variance_type": "fixed_large"}, "ddpm_large"),
    ("PNDM", {"skip_prk_steps": True}, "ddim"),
    ("EulerDiscrete", {}, "euler"),
    ("DPMSolverMultistep", {"solver_order": 3}, "dpmpp3m"),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp2m_sde"),
    ("UniPCMultistep", {}, "unipc2"),
    ("UniPCMultistep", {"solver_order": 3}, "unipc3"),
  ],
)
def test_solvers(name, fields, solver):
  schedule = of(name, **fields)
  assert schedule.solver == solver
  assert scheduler.tableau(schedule, 10).evaluations == 10


def test_fields_of_another_class():
  """Stable Diffusion 2's files have them; they mean nothing there."""
  other = {"clip_sample": True, "skip_prk_steps": True}
  other |= {"interpolation_type": "log_linear"}
  assert of("PNDM", **other).clip == 0
  assert of("EulerDiscrete", set_alpha_to_one=False).last == 1
  with pytest.raises(ValueError, match="interpolation_type='log_linear'"):
    of("EulerDiscrete", **other)


def test_fields():
  """Defaults are those of each class; another solver may be asked for."""
  found = of("PNDM", prediction_type="v_prediction", steps_offset=1)
  assert (found.kind, found.offset, found.clip) == ("v", 1, 0)
  assert found.last == found.abar[0] == 1 - 1e-4
  assert of("DDIM").last == 1
  assert of("DPMSolverMultistep").spacing == "linspace"
  assert of("DDPM", clip_sample_range=2.0).clip == 2
  betas = [0.1, 0.2, 0.5]
  np.testing.assert_allclose(of("DDIM", trained_betas=betas).abar, [0.9, 0.72, 0.36])
  ddpm = scheduler.tableau(found, 20, "ddpm")
  assert ddpm.noise_coef[0] > 0
  assert ddpm.noise_coef[-1] == 0  # to clean data, whatever the schedule's last is


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"_class_name": "HeunDiscreteScheduler"},
      "_class_name='HeunDiscreteScheduler': must be one of DDIM",
    ),
    ({"eta": 1, "thresholding": 2}, "thresholding=2: must be .*; unknown fields: eta"),
    ({"prediction_type": "flow"}, "prediction_type='flow': must be one of epsilon, v_"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid': must be one of linear"),
    (
      {"_class_name": "DDPMScheduler", "variance_type": "learned"},
      "variance_type='learned': must be one of fixed_small",
    ),
    (
      {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4},
      r"solver_order=4: must be 'dpmsolver\+\+' or UniPC with order 2 or 3",
    ),
    (
      {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun"},
      "values not supported: solver_type='heun'",
    ),
  ],
)
def test_what_is_not_supported(fields, message):
  with pytest.raises(ValueError, match=message):
    scheduler.from_config({"_class_name": "DDIMScheduler"} | fields)


def test_unknown_solver():
  with pytest.raises(
    ValueError, match="^name='plms': must be one of consistency, ddim"
  ):
    scheduler.tableau(of("DDIM"), 10, "plms")
