"""Schedulers of diffusers that sample a consistency model, and the times of their steps.

`LCMScheduler` takes f(x, t) = c_skip x + c_out d, where d is the estimate of x0 by the
network, c_skip = s^2 / (s^2 + (10 t)^2) and c_out = 10 t / (s^2 + (10 t)^2)^0.5 with
s = 0.5. A model that is trained in TrigFlow has f = d: at the timesteps of up to four
steps c_skip and 1 - c_out are below 1e-7, the rounding of float32.
`SCMScheduler`, which SANA-Sprint has, and
`FlowMatchEulerDiscreteScheduler` with stochastic_sampling have f = d, and the step
x' = (1 - sigma') d + sigma' z, up to the unit of the states.
"""

import numpy as np

from sdiff_jax.pretrained.diffusers import (
  flow_schedule,
  flow_scheduler,
  lcm_scheduler,
  scheduler,
  scheduler_fields,
)
from sdiff_jax.pretrained.diffusers.flow_schedule import FlowSchedule
from sdiff_jax.pretrained.diffusers.lcm_scheduler import Boundary
from sdiff_jax.pretrained.diffusers.scheduler import Schedule
from sdiff_jax.types import Json

CLASS_NAME = "LCMScheduler"
SCM = {  # of SANA-Sprint, whose pipeline maps rectified flow to TrigFlow
  "_class_name": flow_scheduler.SCM_NAME,
  "num_train_timesteps": 1000,
  "prediction_type": "trigflow",
  "sigma_data": 0.5,
}
SCALING = 10.0  # of the timestep in c_skip and c_out
# What the schedulers keep of the source's, which determines the process.
KEPT = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
KEPT += ("trained_betas", "prediction_type", "rescale_betas_zero_snr")
KEPT_OF_FLOW = ("num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift")
KEPT_OF_FLOW += ("max_shift", "base_image_seq_len", "max_image_seq_len")
KEPT_OF_FLOW += ("time_shift_type",)


def scheduler_config(config: dict[str, Json]) -> dict[str, Json]:
  """Returns the scheduler_config.json by which diffusers samples a consistency model.

  Args:
    config: of the network that it was distilled from.

  Raises:
    ValueError: a process that is not supported.

  Example:
    >>> scheduler_config({"_class_name": "DDIMScheduler"})["_class_name"]
    'LCMScheduler'
  """
  if config["_class_name"] == flow_scheduler.SCM_NAME:
    return config
  if isinstance(scheduler.from_config(config), FlowSchedule):
    fields = flow_scheduler.FIELDS
    kept = {k: config.get(k, fields[k].default) for k in KEPT_OF_FLOW}
    name = flow_scheduler.CLASS_NAME
    return {"_class_name": name, **kept, "stochastic_sampling": True}
  fields = scheduler_fields.FIELDS | scheduler_fields.ZERO_SNR
  kept = {k: config.get(k, fields[k].default) for k in KEPT}
  return {
    "_class_name": CLASS_NAME,
    **kept,
    "original_inference_steps": kept["num_train_timesteps"],
    "timestep_scaling": SCALING,
    "set_alpha_to_one": True,
    "clip_sample": False,
    "steps_offset": 1,  # without an effect; pipelines warn of another one
  }


def timesteps(schedule: Schedule, steps: int) -> np.ndarray:
  """Returns the timestep at which each step of `LCMScheduler` starts, int [N].

  Args:
    schedule: the process, with T training timesteps.
    steps: number of steps N.

  Raises:
    ValueError: more steps than timesteps.

  Example:
    >>> timesteps(scheduler.from_config({"_class_name": "DDIMScheduler"}), 4)
    array([999, 749, 499, 249])
  """
  count = len(schedule.abar)
  if not 1 <= steps <= count:
    raise ValueError(f"steps={steps}: must be in 1 to {count}")
  return lcm_scheduler.timesteps(Boundary(count, SCALING), count, steps)


def times(
  schedule: Schedule | FlowSchedule, steps: int, data_std: float = 1.0
) -> tuple[float, ...]:
  """Returns the TrigFlow time at which each step of diffusers starts.

      tan t = sigma / (alpha data_std)

  Args:
    schedule: the process.
    steps: number of steps.
    data_std: standard deviation of the data in the unit of the network.

  Raises:
    ValueError: a number of steps that does not fit.

  Example:
    >>> flow = scheduler.from_config({"_class_name": flow_scheduler.CLASS_NAME})
    >>> [round(t, 4) for t in times(flow._replace(spacing="trailing"), 2)]
    [1.5708, 0.7854]
  """
  if isinstance(schedule, FlowSchedule):
    sigma = flow_schedule.sigmas(schedule, steps)
    alpha = 1 - sigma
  else:
    abar = schedule.abar[timesteps(schedule, steps)]
    alpha, sigma = abar**0.5, (1 - abar) ** 0.5
  return tuple(np.arctan2(sigma, alpha * data_std).tolist())
