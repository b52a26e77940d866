"""The sampler flow_map beside diffusers' FlowMapEulerDiscreteScheduler."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import run_recurrence
from conftest import FIXTURES

from sdiff_jax import samplers
from sdiff_jax.diffusion import noise_schedules, rectified_flow, trigflow
from sdiff_jax.pretrained.diffusers import scheduler
from sdiff_jax.samplers import sampler as sampler_lib
from sdiff_jax.samplers import sequential

with np.load(FIXTURES / "flow_map_scheduler.npz") as arrays:
  PEER = dict(arrays)
RUNS = json.loads(str(PEER["runs"]))
SIGMA_D = 0.5
pytestmark = pytest.mark.usefixtures("x64")


def average_velocity(x, t, r):
  """u(x, t, r) of third_party/diffusers_flow_map.py."""
  return jnp.sin(3 * x + 2 * t) * (1 + r) + x * (0.5 - t * r)


def states(sampler, denoiser, start):
  keys = sequential.keys_from_seeds(np.arange(len(start)))
  run = sampler_lib.run(sampler, denoiser, start, keys, None, record=True)
  return run.states


@pytest.mark.parametrize("run", RUNS)
def test_states_on_rectified_flow_are_the_scheduler_s(run):
  def denoiser(x, t, cond):
    t, r = (trigflow.expand(a, x) for a in (t, cond[trigflow.END_TIME]))
    return x - t * average_velocity(x, t, r)

  schedule = noise_schedules.flow(PEER[f"{run}/sigmas"])
  ours = states(samplers.build("flow_map", schedule), denoiser, jnp.asarray(PEER["z"]))
  np.testing.assert_allclose(ours, PEER[f"{run}/states"], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("run", ["plain_4", "shift_2", "levels"])
def test_states_of_a_trigflow_network_are_the_scheduler_s_scaled(run):
  """The network is that whose average velocity on rectified flow is u."""
  sigmas = PEER[f"{run}/sigmas"]
  tau = jnp.asarray(sigmas)
  length = np.hypot(sigmas, 1 - sigmas)

  def net(x, t, cond):
    s = cond[trigflow.END_TIME]
    start, end = rectified_flow.time(t), rectified_flow.time(s)
    (t_, s_, a, b) = (trigflow.expand(v, x) for v in (t, s, start, end))
    xt = SIGMA_D * x
    flow = xt * jnp.hypot(a, 1 - a)
    xs = (flow - (a - b) * average_velocity(flow, a, b)) / jnp.hypot(b, 1 - b)
    return (jnp.cos(t_ - s_) * xt - xs) / (SIGMA_D * jnp.sin(t_ - s_))

  x = jnp.asarray(PEER["z"])
  u = rectified_flow.average_velocity(net, SIGMA_D)(
    x, tau[:1].repeat(3), tau[1:2].repeat(3), None
  )
  np.testing.assert_allclose(u, average_velocity(x, tau[0], tau[1]), rtol=1e-9)
  times = tuple(rectified_flow.angle(tau[:-1]).tolist())
  sampler = samplers.build(
    "flow_map", sigma_d=SIGMA_D, steps=len(times), timesteps=times
  )
  ours = states(sampler, trigflow.denoiser(net, SIGMA_D), x / length[0])
  ours = ours * length[None, :, None]
  np.testing.assert_allclose(ours, PEER[f"{run}/states"], rtol=1e-8, atol=1e-9)


CONFIGS = json.loads(str(PEER["configs"]))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_schedule_of_its_config(name):
  """Last states of 1 to 50 steps; the network is given both timesteps."""
  fields = {"_class_name": "FlowMapEulerDiscreteScheduler"} | CONFIGS[name]
  schedule = scheduler.from_config(fields)
  for steps, wanted in enumerate(PEER[f"{name}/last"], 1):
    table = scheduler.tableau(schedule, steps)
    ends = dict(zip(table.time, table.end_time, strict=True))

    def denoise(x, t, ends=ends):
      return x - t * np.asarray(average_velocity(x, t, ends[t]))

    found = run_recurrence(table, table.init_std * PEER["z"], denoise)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11, err_msg=str(steps))


def test_timesteps_of_a_network_of_two_times():
  """T sigma and T sigma' of every step, through the door of all samplers."""
  fields = {"_class_name": "FlowMapEulerDiscreteScheduler"} | CONFIGS["shift"]
  schedule, z = scheduler.from_config(fields), jnp.asarray(PEER["z"])
  table = scheduler.tableau(schedule, 8)

  def predict(x, timestep, cond):
    t, r = (trigflow.expand(v / 100, x) for v in (timestep, cond[trigflow.END_TIME]))
    return average_velocity(x, t, r)

  sampler = samplers.from_tableau("flow_map", table)
  found = states(sampler, scheduler.denoiser(predict, schedule, table), z)
  np.testing.assert_allclose(found[:, -1], PEER["shift/last"][7], rtol=1e-8, atol=1e-9)
