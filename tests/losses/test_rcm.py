"""rCM: rollouts of the student, the direction of matching, and whose turn it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian

from sdiff_jax.diffusion import trigflow
from sdiff_jax.losses import ConsistencyOptions, rcm, scm
from sdiff_jax.types import Network

SIGMA_D = 0.5
SHAPE = (2, 3)
DATA = Gaussian(0.1, 0.3, SIGMA_D)
OPTIONS = ConsistencyOptions(
  tangent_normalizer="none", warmup_steps=0, adaptive_weight=False
)
x64 = pytest.mark.usefixtures("x64")


def diffusion(frozen, x, t, cond):
  return DATA.diffusion_net(x, t)


def apply(params, x, t, cond, *, key=None):
  """The true student times a number, or as the critic the true teacher times one."""
  net = params["net"]
  return net["student"] * DATA.consistency_net(x, t) + net[
    "critic"
  ] * DATA.diffusion_net(x, t)


NETWORK = Network(
  init=lambda key: {"net": {"student": jnp.float32(1), "critic": jnp.float32(0)}},
  apply=apply,
  logvar=lambda params, t: 0 * t,
)


def params(student: float = 1.0, critic: float = 1.0):
  fake = {"net": {"student": jnp.float32(0), "critic": jnp.float32(critic)}}
  own = {"student": jnp.float32(student), "critic": jnp.float32(0)}
  return {"net": own, "fake": fake}


def batch(count: int = 64):
  return {"x0": jnp.full((count, *SHAPE), 0.1), "cond": {}}


def value_and_grad(loss):
  """Returns (weights, step) -> value, metrics and gradient, compiled once."""

  def value(weights, step):
    return loss(weights, batch(), jax.random.key(3), step, None)

  return jax.jit(jax.value_and_grad(value, has_aux=True))


@x64
def test_a_rollout_of_the_true_map_draws_data_in_any_number_of_steps():
  count = 40_000
  times = jnp.repeat(jnp.array([[1.56], [1.1], [0.8], [0.3]]), count, axis=1)
  steps = 1 + jnp.arange(count) % 4
  like = jnp.zeros((count, 1))
  x0 = rcm.rollout(
    DATA.consistency_net, jax.random.key(0), times, steps, None, like, sigma_d=SIGMA_D
  )
  for n in range(4):
    own = x0[n::4]
    np.testing.assert_allclose(jnp.mean(own), 0.1, atol=0.015)
    np.testing.assert_allclose(jnp.std(own), 0.3, rtol=0.03)


@x64
def test_a_rollout_has_its_own_number_of_steps_at_its_own_times():
  seen = []

  def net(x, t, cond):
    seen.append(t)
    return 0 * x

  times = jnp.array([[1.5] * 3, [1.2, 1.1, 1.0], [0.5, 0.4, 0.3]])
  steps = jnp.array([1, 2, 3])
  like = jnp.zeros((3, 2))
  rcm.rollout(net, jax.random.key(0), times, steps, None, like, sigma_d=SIGMA_D)
  # Those of fewer steps wait; all of them take their last step together.
  expected = [[1.5, 1.5, 1.5], [1.5, 1.5, 1.0], [1.5, 1.1, 0.3]]
  np.testing.assert_allclose(jnp.stack(seen), expected)


@x64
def test_the_direction_is_the_difference_of_two_gaussians_denoisers():
  # The student's samples are N(0.1 + m, 0.3^2), whose denoiser is known.
  shifted = Gaussian(0.1 + 0.2, 0.3, SIGMA_D)
  t = jnp.linspace(0.2, 1.5, 6)
  x0 = jnp.asarray(np.random.default_rng(0).normal(size=(6, *SHAPE)))
  xt = trigflow.perturb(x0, 0.3 * x0, t)
  fake, real = (data.posterior(xt, t)[0] for data in (shifted, DATA))
  g = rcm.matching_direction(x0, fake, real)
  scale = jnp.mean(jnp.abs(x0 - real), (1, 2), keepdims=True)
  # E[x0 | x_t] changes by m (1 - std^2 cos^2 t / V).
  V = (0.3 * jnp.cos(t)) ** 2 + (SIGMA_D * jnp.sin(t)) ** 2
  expected = trigflow.expand(0.2 * (1 - (0.3 * jnp.cos(t)) ** 2 / V), x0)
  np.testing.assert_allclose(g * scale, expected + 0 * x0, rtol=1e-9)
  np.testing.assert_allclose(rcm.matching_direction(x0, real, real), 0, atol=1e-12)


def test_the_student_is_trained_in_every_fifth_step_and_the_critic_in_the_others():
  loss = rcm.build(network=NETWORK, sigma_d=SIGMA_D, teacher=diffusion, options=OPTIONS)
  weights, call = params(student=0.9, critic=0.8), value_and_grad(loss)
  for step in (0, 1, 4, 5):
    (_, metrics), grad = call(weights, jnp.int32(step))
    own, fake = grad["net"]["student"], grad["fake"]["net"]["critic"]
    assert (own != 0) == (step % 5 == 0)
    assert (fake != 0) == (step % 5 != 0)
    assert (metrics["matching"] > 0) == (step % 5 == 0)
    assert (metrics["fake_mse"] > 0) == (step % 5 != 0)


def test_nothing_moves_where_the_student_is_its_teacher_and_lambda_0_is_scd():
  weights = params()
  loss = rcm.build(network=NETWORK, sigma_d=SIGMA_D, teacher=diffusion, options=OPTIONS)
  (_, metrics), grad = value_and_grad(loss)(weights, jnp.int32(0))
  np.testing.assert_allclose(metrics["matching"], 0, atol=1e-9)
  np.testing.assert_allclose(metrics["tangent_norm"], 0, atol=2e-4)
  np.testing.assert_allclose(grad["net"]["student"], 0, atol=1e-3)
  weights = params(student=0.9, critic=0.8)
  alone = rcm.build(
    network=NETWORK,
    sigma_d=SIGMA_D,
    teacher=diffusion,
    matching_weight=0.0,
    options=OPTIONS,
  )
  (value, _), grad = value_and_grad(alone)(weights, jnp.int32(0))
  scd = scm.build(network=NETWORK, sigma_d=SIGMA_D, teacher=diffusion, options=OPTIONS)

  def expected(weights):
    key = jax.random.split(jax.random.key(3), 3)[0]
    return scd(weights, batch(), key, jnp.int32(0), None)[0]

  wanted, slope = jax.jit(jax.value_and_grad(expected))(weights)
  np.testing.assert_allclose(value, wanted, rtol=1e-6)
  np.testing.assert_allclose(grad["net"]["student"], slope["net"]["student"], rtol=1e-5)


@x64
def test_matching_moves_samples_toward_the_teacher_s():
  # The student's samples lie too high by the critic's word, so the mean must fall.
  x0 = jnp.full((1, *SHAPE), 0.4)
  t = jnp.array([0.8])
  shifted = Gaussian(0.4, 0.3, SIGMA_D)
  xt = trigflow.perturb(x0, 0 * x0, t)
  fake, real = (data.posterior(xt, t)[0] for data in (shifted, DATA))
  g = rcm.matching_direction(x0, fake, real)
  gradient = jax.grad(lambda x: jnp.sum((x - (x0 - g)) ** 2))(x0)
  np.testing.assert_allclose(gradient, 2 * g)
  assert float(jnp.min(g)) > 0


def test_texts_and_guidance_reach_student_teacher_and_critic():
  """A text is the mean of its data, so guidance of scale s is another mean.

  F of a Gaussian is affine in its mean: F_u + s (F_c - F_u) has m_u + s (m_c - m_u). A
  student and a critic of these means are the guided teacher's, those told no scale not.
  """
  empty, options = 0.3, dataclasses.replace(OPTIONS, guidance=(1.0, 4.0))
  key_x, key = jax.random.split(jax.random.key(3))
  text = jnp.linspace(-0.4, 0.4, 64)
  x0 = trigflow.expand(text, jnp.zeros((64, *SHAPE)))
  x0 += 0.3 * jax.random.normal(key_x, x0.shape)
  samples = {"x0": x0, "cond": {"text": text, "empty_text": 0 * text + empty}}

  def of_mean(mean, x):
    return Gaussian(trigflow.expand(mean, x), 0.3, SIGMA_D)

  def of_text(frozen, x, t, cond):
    return of_mean(cond["text"], x).diffusion_net(x, t)

  def told(params, x, t, cond, *, key=None):
    net = params["net"]
    scale = 1 + net["told"] * (cond["guidance"] - 1)
    data = of_mean(empty + scale * (cond["text"] - empty), x)
    own, fake = data.consistency_net(x, t), data.diffusion_net(x, t)
    return net["student"] * own + net["critic"] * fake

  network = NETWORK._replace(apply=told)
  loss = rcm.build(network=network, sigma_d=SIGMA_D, teacher=of_text, options=options)
  call = jax.jit(jax.value_and_grad(loss, has_aux=True))

  def metrics_and_slope(student, critic):
    weights = params()
    weights["net"]["told"] = jnp.float32(student)
    weights["fake"]["net"]["told"] = jnp.float32(critic)
    (_, metrics), grad = call(weights, samples, key, jnp.int32(0), None)
    return metrics, grad["net"]["student"]

  metrics, slope = metrics_and_slope(1, 1)
  np.testing.assert_allclose(metrics["matching"], 0, atol=1e-9)
  np.testing.assert_allclose(metrics["tangent_norm"], 0, atol=2e-4)
  np.testing.assert_allclose(slope, 0, atol=1e-3)
  metrics, slope = metrics_and_slope(0, 1)
  assert metrics["matching"] < 1e-9  # teacher and critic agree on any samples
  assert metrics["tangent_norm"] > 0.1
  metrics, slope = metrics_and_slope(1, 0)
  assert metrics["matching"] > 0.1
  assert metrics["tangent_norm"] < 2e-4
