"""Distillation of exact velocities reaches the exact consistency functions."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import MIXTURE, MIXTURE_F, MIXTURE_T, MIXTURE_X, Gaussian

from sdiff_jax.diffusion import trigflow
from sdiff_jax.losses import ConsistencyOptions, scm
from sdiff_jax.models import mlp
from sdiff_jax.training import ema, optimizers, state, step
from sdiff_jax.types import Array, Denoiser

SIGMA_D = 0.5
START = np.arctan(80 / SIGMA_D)  # the angle of one-step sampling
STEPS, BATCH = 3000, 512


def distill(velocity: Callable, draw: Callable[[Array], Array]) -> Denoiser:
  """Trains an MLP on a velocity (xt, t) -> v and returns its average as f.

  Without the adaptive weight: as the tangent at some t vanishes, e^w grows there,
  and what is left of the error moves slower (0.017 instead of 0.010 sigma_d below
  in as many steps, even with a rate tuned for it).
  """
  shape = jax.eval_shape(draw, jax.random.key(0)).shape[1:]
  network = mlp.build(shape=shape, cond={}, width=64, depth=2)

  def teacher(frozen, x, t, cond):
    return velocity(x * SIGMA_D, t) / SIGMA_D

  loss = scm.build(
    network=network,
    teacher=teacher,
    sigma_d=SIGMA_D,
    options=ConsistencyOptions(warmup_steps=0, adaptive_weight=False),
  )
  rate = optimizers.build_schedule(
    schedule="cosine",
    learning_rate=3e-3,
    steps=STEPS,
    batch_size=BATCH,
    rampup_images=100 * BATCH,
    end_lr_fraction=0.0,
    reference_steps=1,
  )
  optimizer = optimizers.build(
    rate, name="adam", b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip=0.0
  )
  profile = "power/0.1"
  train_step = step.build(loss, optimizer, ema=ema.betas((profile,), BATCH))

  # It runs for longer than it compiles, unlike most programs of tests.
  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
  def train(start):
    def body(now, _):
      key = jax.random.fold_in(jax.random.key(2), now.step)
      batch = {"x0": draw(key), "cond": None}
      return train_step(now, batch, jax.random.key(1), None)[0], None

    return jax.lax.scan(body, start, None, length=STEPS)[0]

  params = network.init(jax.random.key(0))
  end = train(state.create(params, optimizer, (profile,)))
  assert int(end.step) == STEPS

  def student(x, t, cond):
    return network.apply(end.ema[profile], x, t, cond)

  return trigflow.denoiser(student, SIGMA_D)


def noisy(x0: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns x_t with fresh noise, and t for each, in float64."""
  z = SIGMA_D * np.random.default_rng(1).standard_normal(x0.shape)
  return np.cos(t) * x0 + np.sin(t) * z, np.full(len(x0), t)


def rmse(f: Denoiser, truth: Callable, xt: np.ndarray, t: np.ndarray) -> float:
  found = f(jnp.asarray(xt, jnp.float32), jnp.asarray(t, jnp.float32), None)
  return float(np.sqrt(np.mean((np.asarray(found) - truth(xt, t)) ** 2)))


@pytest.mark.slow
def test_gaussian():
  """Means off 0, deviations of 0.3 to 1.6 sigma_d: RMSE of 0.02 sigma_d."""
  mean, std = np.array([[0.3, -0.2, 0.0, 0.5]]), np.array([[0.3, 0.5, 0.8, 0.15]])
  data = Gaussian(jnp.asarray(mean), jnp.asarray(std), SIGMA_D)

  def draw(key):
    return data.mean + data.std * jax.random.normal(key, (BATCH, 4))

  f = distill(data.velocity, draw)
  x0 = mean + std * np.random.default_rng(0).standard_normal((4096, 4))
  for t in (START, 1.1):
    error = rmse(f, data.consistency, *noisy(x0, t))
    print("RMSE", t, error / SIGMA_D)
    assert error <= 0.02 * SIGMA_D, t


@pytest.mark.slow
def test_mixture():
  """Two modes: the values of f* that the reference lists, and two whole maps."""
  means, stds = jnp.asarray(MIXTURE.means[0]), jnp.asarray(MIXTURE.stds[0])
  share = jnp.log(jnp.asarray(MIXTURE.weights[0]))

  def draw(key):
    key_k, key_z = jax.random.split(key)
    k = jax.random.categorical(key_k, share, shape=(BATCH, 1))
    return means[k] + stds[k] * jax.random.normal(key_z, (BATCH, 1))

  np.testing.assert_allclose(
    MIXTURE.consistency(MIXTURE_X, MIXTURE_T), MIXTURE_F, atol=1e-10
  )
  f = distill(MIXTURE.velocity, draw)
  found = f(jnp.asarray(MIXTURE_X), jnp.asarray(MIXTURE_T), None)
  print(found[:, 0] - MIXTURE_F[:, 0])
  np.testing.assert_allclose(found, MIXTURE_F, atol=0.03)
  x0 = MIXTURE.sample(np.random.default_rng(0), 4096)
  for t in (START, 1.1):
    print(rmse(f, MIXTURE.consistency, *noisy(x0, t)))
    assert rmse(f, MIXTURE.consistency, *noisy(x0, t)) <= 0.03, t
