"""Mid-training on trajectories: closed forms, and what a batch of states is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian

from sdiff_jax import losses, samplers
from sdiff_jax.diffusion import trigflow
from sdiff_jax.losses import cmt
from sdiff_jax.types import Network

SIGMA_D = 0.5
SHAPE = (2, 3)
x64 = pytest.mark.usefixtures("x64")


def true_network(data: Gaussian, flow_map: bool = False) -> Network:
  net = data.flow_map_net if flow_map else data.consistency_net
  return Network(
    init=lambda key: jnp.float64(1.0),
    apply=lambda params, x, t, cond, *, key=None: params * net(x, t, cond),
    logvar=lambda params, t: 0 * t,
  )


@x64
@pytest.mark.parametrize("std", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("end_time", [False, True])
def test_the_residual_vanishes_at_the_true_map(std, end_time):
  data = Gaussian(jnp.float64(0.1), jnp.float64(std), SIGMA_D)
  rng = np.random.default_rng(0)
  t = jnp.asarray(rng.uniform(0.2, 1.5, 6))
  s = t * rng.uniform(0.1, 0.9, 6) if end_time else 0 * t
  xt = jnp.asarray(rng.normal(size=(6, *SHAPE)))
  net = data.flow_map_net if end_time else data.consistency_net
  pairs = cmt.Pairs(xt, data.flow(xt, t, s), t, s, None)
  error = cmt.residual(net, pairs, sigma_d=SIGMA_D, end_time=end_time)
  np.testing.assert_allclose(error, 0, atol=1e-9)
  wrong = pairs._replace(xs=pairs.xs + 0.01)
  error = cmt.residual(net, wrong, sigma_d=SIGMA_D, end_time=end_time)
  np.testing.assert_allclose(error, -0.02, atol=1e-9)


@x64
def test_the_loss_at_the_true_map_is_the_error_of_the_solver():
  # DDIM's error halves with twice the steps, and its square falls by 4.
  data = Gaussian(jnp.float64(0.1), jnp.float64(0.2), SIGMA_D)
  network = true_network(data, flow_map=True)
  batch = {"x0": jnp.ones((320, *SHAPE)), "cond": {}}

  def mse(steps: int) -> float:
    loss = cmt.build(
      network=network,
      sigma_d=SIGMA_D,
      teacher=lambda frozen, x, t, cond: data.diffusion_net(x, t),
      solver="ddim",
      steps=steps,
      flow_map=True,
      adaptive_weight=False,
    )
    rows = jax.tree.map(lambda value: value[: 10 * steps], batch)  # ten trajectories
    return float(
      jax.jit(loss)(jnp.float64(1.0), rows, jax.random.key(0), jnp.int32(0), None)[0]
    )

  coarse, fine = mse(16), mse(32)
  assert coarse > 0
  assert 3 < coarse / fine < 5.5


def test_every_state_but_the_last_is_a_first_one_with_its_own_conditions():
  grid = np.array([1.5, 1.0, 0.5, 0.0])
  states = jnp.arange(8.0).reshape(2, 4, 1)
  cond = {"label": jnp.array([7, 9])}
  key = jax.random.key(0)
  pairs = cmt.grid_pairs(key, states, grid, cond, 6, to_data=True)
  assert pairs.xt.ravel().tolist() == [0, 1, 2, 4, 5, 6]
  assert pairs.xs.ravel().tolist() == [3, 3, 3, 7, 7, 7]
  np.testing.assert_allclose(pairs.t, [1.5, 1.0, 0.5] * 2)
  assert pairs.s.tolist() == [0.0] * 6
  assert pairs.cond["label"].tolist() == [7] * 3 + [9] * 3
  ends = set()
  for seed in range(20):
    pairs = cmt.grid_pairs(jax.random.key(seed), states, grid, cond, 6, to_data=False)
    assert bool(jnp.all(pairs.s < pairs.t))
    assert bool(jnp.all(pairs.xs > pairs.xt))
    ends |= {round(float(s), 3) for s in pairs.s[::3]}
  assert ends == {1.0, 0.5, 0.0}


def test_stored_states_are_trained_on_without_the_teacher():
  def teacher(frozen, x, t, cond):
    raise AssertionError

  seen = {}

  def apply(params, x, t, cond, *, key=None):
    seen.update(cond)
    return params * x

  network = Network(
    init=lambda key: jnp.float32(0.5), apply=apply, logvar=lambda params, t: 0 * t
  )
  loss = cmt.build(network=network, sigma_d=SIGMA_D, teacher=teacher, flow_map=True)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 2, *SHAPE)), jnp.float32)
  times = jnp.array([[1.2, 0.4]] * 4)
  cond = {"label": jnp.arange(4), cmt.TIMES: times}
  batch = {"x0": x, "cond": cond}
  value, _ = loss(jnp.float32(0.5), batch, jax.random.key(0), jnp.int32(0), None)
  f = np.cos(0.8) * x[:, 0] - np.sin(0.8) * 0.5 * x[:, 0]
  expected = np.mean(((f - x[:, 1]) / SIGMA_D) ** 2)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert set(seen) == {"label", trigflow.END_TIME}
  assert cmt.TIMES in batch["cond"]


def test_solvers_with_noise_are_refused_and_end_times_are_declared():
  network = true_network(Gaussian(0.1, 0.5, SIGMA_D))
  with pytest.raises(ValueError, match="solver='ddpm': adds noise"):
    cmt.build(network=network, sigma_d=SIGMA_D, teacher=None, solver="ddpm")
  for flow_map, names in ((False, set()), (True, {trigflow.END_TIME})):
    section = {"name": "cmt", "flow_map": flow_map}
    assert set(losses.facts(section).cond) == names


@x64
def test_drawn_trajectories_are_those_of_the_sampler():
  data = Gaussian(jnp.float64(0.1), jnp.float64(0.2), SIGMA_D)
  network, pairs = true_network(data), []

  def teacher(frozen, x, t, cond):
    return data.diffusion_net(x, t)

  def apply(params, x, t, cond, *, key=None):
    pairs.append((SIGMA_D * x, t))
    return network.apply(params, x, t, cond)

  loss = cmt.build(
    network=network._replace(apply=apply),
    sigma_d=SIGMA_D,
    teacher=teacher,
    solver="dpmpp2m",
    steps=4,
    adaptive_weight=False,
  )
  batch = {"x0": jnp.ones((4, *SHAPE)), "cond": {}}
  loss(jnp.float64(1.0), batch, jax.random.key(0), jnp.int32(0), None)
  ((xt, t),) = pairs
  sampler = samplers.build("dpmpp2m", sigma_d=SIGMA_D, steps=4)
  np.testing.assert_allclose(t, sampler.tableau.grid[:-1])
  denoiser = trigflow.denoiser(lambda x, t, cond: data.diffusion_net(x, t), SIGMA_D)
  states = samplers.sampler.run(
    sampler, denoiser, xt[:1], jax.random.split(jax.random.key(0), 1), None, record=True
  ).states
  np.testing.assert_allclose(states[0, :-1], xt, rtol=1e-12)
