"""The two-time objective: closed forms, and the losses that it contains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian, central, random_params
from trained_maps import rms, train

from sdiff_jax import losses, registry, samplers
from sdiff_jax.diffusion import trigflow
from sdiff_jax.experiment.sampling import network_denoiser
from sdiff_jax.losses import ConsistencyOptions, diffusion, flow_map, scm
from sdiff_jax.models import mlp
from sdiff_jax.types import CondSpec

SIGMA_D = 0.5
SHAPE = (2, 3)
END_TIME = {trigflow.END_TIME: CondSpec((), "float32")}
x64 = pytest.mark.usefixtures("x64")


def times(batch: int = 6, seed: int = 0):
  rng = np.random.default_rng(seed)
  t = rng.uniform(0.2, 1.5, batch)
  return jnp.asarray(t), jnp.asarray(t * rng.uniform(0.0, 0.9, batch))


@functools.cache
def network(dtype: str = "float32", **options):
  net = mlp.build(shape=SHAPE, width=16, depth=2, cond=END_TIME, dtype=dtype, **options)
  return net, random_params(net, dtype=dtype)


def batch():
  x0 = np.random.default_rng(1).normal(size=(8, *SHAPE))
  return {"x0": jnp.asarray(SIGMA_D * x0, "float32"), "cond": {}}


def options(**changes):
  return ConsistencyOptions(
    tangent_normalizer="none", warmup_steps=0, adaptive_weight=False, **changes
  )


def value_and_grad(loss, params, data, frozen=None):
  def value(params):
    return loss(params, data, jax.random.key(3), jnp.int32(5), frozen)[0]

  return jax.jit(jax.value_and_grad(value))(params)


@x64
@pytest.mark.parametrize("std", [0.2, 0.5, 0.9])
def test_the_tangent_vanishes_at_the_true_map(std):
  # q(u)^2 = std^2 cos^2 u + sigma_d^2 sin^2 u, and the map is x q(s) / q(t).
  data = Gaussian(jnp.float64(0.1), jnp.float64(std), SIGMA_D)
  t, s = times()
  xt = jnp.asarray(np.random.default_rng(2).normal(size=(len(t), *SHAPE)))
  v = data.velocity(xt, t)
  _, g = flow_map.tangent(data.flow_map_net, xt, t, v, None, sigma_d=SIGMA_D, s=s)
  assert float(jnp.max(jnp.abs(g))) < 1e-9
  wrong = flow_map.tangent(
    data.flow_map_net, xt, t, v + 0.1, None, sigma_d=SIGMA_D, s=s
  )[1]
  assert float(jnp.max(jnp.abs(wrong))) > 1e-3


@x64
def test_the_tangent_is_the_derivative_of_the_map():
  net, params = network("float64")
  net = functools.partial(net.apply, params)
  t, s = times()
  rng = np.random.default_rng(4)
  xt, v = (jnp.asarray(a) for a in rng.normal(size=(2, len(t), *SHAPE)))
  cond = trigflow.with_end_time(None, s)

  def f(xt, t):
    return trigflow.rotate(xt, net(xt / SIGMA_D, t, cond), t, s, SIGMA_D)

  slope = central(f, (xt, t), (v, jnp.ones_like(t)))
  expected = trigflow.expand(jnp.cos(t - s), xt) * slope
  _, g = flow_map.tangent(net, xt, t, v, None, sigma_d=SIGMA_D, s=s)
  np.testing.assert_allclose(g, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
  "velocity", [pytest.param("data", marks=pytest.mark.slow), "teacher"]
)
def test_the_end_time_0_is_scm_to_the_bit(velocity):
  net, params = network()

  def teacher(frozen, x, t, cond):
    return frozen * x

  common = {"network": net, "sigma_d": SIGMA_D, "velocity": velocity}
  common["teacher"] = teacher if velocity == "teacher" else None
  two_times = flow_map.build(**common, diffusion_fraction=0.0, consistency_fraction=1.0)

  def with_end_time(params, x, t, cond, *, key=None):
    cond = trigflow.with_end_time(cond, jnp.zeros_like(t))
    return net.apply(params, x, t, cond, key=key)

  one_time = scm.build(**common | {"network": net._replace(apply=with_end_time)})
  ours = value_and_grad(two_times, params, batch(), jnp.float32(0.3))
  expected = value_and_grad(one_time, params, batch(), jnp.float32(0.3))
  jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_the_end_time_t_is_the_diffusion_loss():
  net, params = network()
  settings = {"p_mean": -1.0, "p_std": 1.4}
  two_times = flow_map.build(
    network=net,
    sigma_d=SIGMA_D,
    velocity="data",
    diffusion_fraction=1.0,
    options=options(**settings),
  )

  def at_its_own_time(params, x, t, cond, *, key=None):
    return net.apply(params, x, t, trigflow.with_end_time(cond, t), key=key)

  one_time = diffusion.build(
    network=net._replace(apply=at_its_own_time),
    sigma_d=SIGMA_D,
    adaptive_weight=False,
    label_dropout=0.0,
    **settings,
  )
  value, gradient = value_and_grad(two_times, params, batch())
  expected, slope = value_and_grad(one_time, params, batch())
  # g = v - sigma_d F has the unit of the data, and F - F^- that of F.
  np.testing.assert_allclose(value, SIGMA_D**2 * expected, rtol=1e-6)
  for ours, theirs in zip(*map(jax.tree.leaves, (gradient, slope)), strict=True):
    np.testing.assert_allclose(ours, SIGMA_D * theirs, rtol=1e-5, atol=1e-6)


def test_end_times_have_the_fractions_that_are_asked_for():
  t = jnp.full(100_000, 1.2)
  s = flow_map.end_times(jax.random.key(0), t, 0.25, 0.1)
  np.testing.assert_allclose(jnp.mean(s == t), 0.25, atol=0.006)
  np.testing.assert_allclose(jnp.mean(s == 0), 0.1, atol=0.004)
  rest = s[(s > 0) & (s < t)]
  np.testing.assert_allclose(jnp.mean(rest), 0.6, atol=0.006)
  with pytest.raises(ValueError, match=r"diffusion_fraction=0\.8: must be at most"):
    flow_map.build(
      network=network()[0],
      sigma_d=SIGMA_D,
      velocity="data",
      diffusion_fraction=0.8,
      consistency_fraction=0.3,
    )


def test_every_network_starts_as_the_network_without_an_end_time():
  key = jax.random.key(0)
  x, t = jax.random.normal(key, (2, 8, 8, 4)), jnp.array([0.3, 1.2])
  for name in ("mlp", "dit"):
    tiny = dict(registry.lookup("models", name).facts.get("tiny", {}))
    section = {"name": name, **tiny}
    given = {"shape": (8, 8, 4), "sigma_d": SIGMA_D}
    plain = registry.build("models", section, "model", cond={}, **given)
    timed = registry.build("models", section, "model", cond=END_TIME, **given)
    params = jax.eval_shape(plain.init, key)
    further = jax.jit(timed.init)(key)
    layer = {
      "/".join(map(str, p)) for p, _ in jax.tree_util.tree_leaves_with_path(further)
    }
    assert len(layer) > len(jax.tree.leaves(params)), name
    apply = jax.jit(timed.apply)
    outputs = [
      apply(further, x, t, trigflow.with_end_time(None, s))
      for s in (0.5 * t, jnp.zeros(2))
    ]
    np.testing.assert_array_equal(*outputs, err_msg=name)


def test_the_sampler_follows_the_true_map_on_any_grid():
  data = Gaussian(jnp.float32(0.1), jnp.float32(0.9), SIGMA_D)

  def denoiser(x, t, cond):
    return trigflow.denoise(x, data.flow_map_net(x / SIGMA_D, t, cond), t, SIGMA_D)

  x = []
  for steps, timesteps in ((1, ()), (2, ()), (4, ()), (3, (1.5645, 1.3, 0.2))):
    sampler = samplers.build(
      "flow_map", sigma_d=SIGMA_D, steps=steps, timesteps=timesteps
    )
    x.append(samplers.sample(sampler, denoiser, range(4), SHAPE).x)
  for other in x[1:3]:
    np.testing.assert_allclose(other, x[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(x[3], x[0], rtol=1e-3, atol=1e-3)  # from another start


def test_gamma_1_is_consistency_sampling():
  schedule = {"sigma_d": SIGMA_D, "steps": 4}
  ours = samplers.build("flow_map", gamma=1.0, **schedule).tableau
  expected = samplers.build("consistency", **schedule).tableau
  np.testing.assert_allclose(ours.end_time, 0.0, atol=1e-12)
  for name in ("denoised_coef", "noise_coef", "x_coef", "end_time"):
    np.testing.assert_allclose(
      getattr(ours, name), getattr(expected, name), atol=1e-12, err_msg=name
    )
  half = samplers.build("flow_map", gamma=0.5, **schedule).tableau
  assert (half.end_time[:-1] < ours.time[1:]).all()
  assert half.uses_noise


@pytest.mark.slow
def test_a_trained_map_is_the_true_one():
  data = Gaussian(jnp.float32(0.0), jnp.float32(0.9), SIGMA_D)
  net = mlp.build(shape=(1,), width=64, depth=3, cond=END_TIME)

  def teacher(frozen, x, t, cond):
    return data.diffusion_net(x, t)

  loss = flow_map.build(
    network=net,
    sigma_d=SIGMA_D,
    teacher=teacher,
    options=ConsistencyOptions(warmup_steps=300, adaptive_weight=False),
  )
  params = train(loss, net, lambda key: 0.9 * jax.random.normal(key, (256, 1)))
  rng = np.random.default_rng(0)
  t = jnp.asarray(rng.uniform(0.05, 1.5, 2000), jnp.float32)
  s = t * jnp.asarray(rng.uniform(0.0, 1.0, 2000), jnp.float32)
  xt = data.flow(0.9 * jnp.asarray(rng.normal(size=(2000, 1)), jnp.float32), 0 * t, t)
  F = net.apply(params, xt / SIGMA_D, t, trigflow.with_end_time(None, s))
  error = trigflow.rotate(xt, F, t, s, SIGMA_D) - data.flow(xt, t, s)
  assert rms(error) <= 0.02 * SIGMA_D


def test_solvers_that_know_one_time_use_the_velocity():
  net, params = network()
  seen = []

  def apply(params, x, t, cond, *, key=None):
    seen.append(cond)
    return net.apply(params, x, t, cond)

  spy = net._replace(apply=apply)
  denoiser = network_denoiser(spy, params, sigma_d=SIGMA_D, end_time_input=True)
  t = jnp.array([0.5, 1.0])
  denoiser(jnp.ones((2, *SHAPE)), t, None)
  np.testing.assert_array_equal(seen[-1][trigflow.END_TIME], t)
  denoiser(jnp.ones((2, *SHAPE)), t, trigflow.with_end_time(None, 0 * t))
  np.testing.assert_array_equal(seen[-1][trigflow.END_TIME], 0 * t)
  assert (
    trigflow.END_TIME in losses.facts({"name": "flow_map", "velocity": "data"}).cond
  )
