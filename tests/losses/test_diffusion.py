"""The diffusion objective: its minimum, and its part in consistency training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian, random_params

from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.losses import ConsistencyOptions, diffusion, scm
from sdiff_jax.models import mlp
from sdiff_jax.types import Network

SIGMA_D = 0.6
DATA = Gaussian(jnp.array([[0.3, -0.5]]), jnp.array([[0.2, 0.9]]), SIGMA_D)


def gaussian(n: int, seed: int = 0) -> jax.Array:
  rng = np.random.default_rng(seed)
  return DATA.mean + DATA.std * jnp.asarray(rng.normal(size=(n, 2)), jnp.float32)


def off(params, x, t, cond, *, key=None):
  """The best network, moved by params[0] x + params[1] t + params[2]."""
  a, b, c = params["net"]
  return DATA.diffusion_net(x, t) + a * x + b * trigflow.expand(t, x) + c


NETWORK = Network(
  init=lambda key: {"net": jnp.zeros(3), "logvar": jnp.float32(0.0)},
  apply=off,
  logvar=lambda params, t: params["logvar"] * t,
)


@pytest.mark.parametrize("logvar", [0.0, 1.5])
def test_minimum_is_the_closed_form(key, logvar):
  """The loss is quadratic in the move; its vertex is at none, whatever w(t)."""
  loss = diffusion.build(network=NETWORK, sigma_d=SIGMA_D)
  batch = {"x0": gaussian(2**17), "cond": None}

  def value(net):
    params = {"net": net, "logvar": jnp.float32(logvar)}
    return loss(params, batch, key, jnp.int32(0), None)[0]

  @jax.jit
  def derivatives(net):
    return jax.grad(value)(net), jax.hessian(value)(net)

  slope, curvature = derivatives(jnp.zeros(3))
  assert np.linalg.eigvalsh(curvature).min() > 0.1
  vertex = -np.linalg.solve(curvature, slope)
  np.testing.assert_allclose(vertex, 0, atol=0.01)


@pytest.fixture
def drawn(monkeypatch):
  """Collects x0, z, t of every step."""
  calls, real = [], trigflow.perturb

  def spy(x0, z, t):
    calls.append((x0, z, t))
    return real(x0, z, t)

  monkeypatch.setattr(trigflow, "perturb", spy)
  return calls


@pytest.mark.parametrize("adaptive", [True, False])
def test_value(key, drawn, adaptive):
  """mean e^w |F - v/sigma_d|^2 / D - w, with w = 2 t or 0."""
  loss = diffusion.build(network=NETWORK, sigma_d=SIGMA_D, adaptive_weight=adaptive)
  params = {"net": jnp.array([0.3, 0.1, -0.2]), "logvar": jnp.float32(2.0)}
  batch = {"x0": gaussian(64), "cond": None}
  value, aux = loss(params, batch, key, jnp.int32(0), None)
  ((x0, z, t),) = drawn
  c, s = np.cos(t)[:, None], np.sin(t)[:, None]
  x, v = (c * x0 + s * z) / SIGMA_D, c * z - s * x0
  mse = np.mean((off(params, x, t, None) - v / SIGMA_D) ** 2, 1)
  w = np.asarray(2 * t if adaptive else 0 * t)
  assert float(value) == pytest.approx(float(np.mean(np.exp(w) * mse - w)), rel=1e-5)
  assert float(aux["mse"]) == pytest.approx(float(mse.mean()), rel=1e-5)
  assert np.std(z) == pytest.approx(SIGMA_D, rel=0.15)


def test_angles_are_log_normal(key, drawn):
  loss = diffusion.build(network=NETWORK, sigma_d=SIGMA_D, p_mean=-0.4, p_std=1.0)
  batch = {"x0": gaussian(4000), "cond": None}
  loss(NETWORK.init(key), batch, key, jnp.int32(0), None)
  tau = np.log(SIGMA_D * np.tan(drawn[0][2]))
  assert tau.mean() == pytest.approx(-0.4, abs=0.06)
  assert tau.std() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_labels_are_dropped(key, rate):
  seen = []

  def apply(params, x, t, cond, *, key=None):
    seen.append((cond["label"], key))
    return off(params, x, t, cond)

  net = NETWORK._replace(apply=apply)
  loss = diffusion.build(network=net, sigma_d=SIGMA_D, label_dropout=rate)
  label = jnp.arange(4000) % 5
  batch = {"x0": gaussian(4000), "cond": {"label": label}}
  loss(NETWORK.init(key), batch, key, jnp.int32(0), None)
  ((found, dropout_key),) = seen
  dropped = np.asarray(found) == -1
  assert dropped.mean() == pytest.approx(rate, abs=4 * (rate / 4000) ** 0.5)
  np.testing.assert_array_equal(found[~dropped], label[~dropped])
  assert dropout_key is not None


@functools.cache
def mlp_net():
  """A network with its parameters, compiled once."""
  net = mlp.build(shape=(2,), cond={}, width=16, depth=2)
  params = random_params(net, dtype="float32")
  return net._replace(apply=jax.jit(net.apply)), params


@pytest.mark.parametrize(
  "tangent_normalizer", [pytest.param("none", marks=pytest.mark.slow), "rms"]
)
@pytest.mark.parametrize("angle", [0.3, 1.2])
def test_consistency_training_starts_as_diffusion(
  key, monkeypatch, tangent_normalizer, angle
):
  """At r = 0 the gradients are parallel for one sample.

  g = -cos^2 t sigma_d (F - v/sigma_d), so the gradient of |F - F^- - g|^2 is
  sigma_d cos^2 t that of |F - v/sigma_d|^2, over |g| + c if normalized.
  """
  net, params = mlp_net()
  z = SIGMA_D * jax.random.normal(key, (1, 2))
  t = jnp.full(1, angle)
  # Both draw the same angle and noise.
  monkeypatch.setattr(time_grids, "log_normal", lambda *args, **options: t)
  monkeypatch.setattr(jax.random, "normal", lambda *args: z / SIGMA_D)
  common = {"network": net, "sigma_d": SIGMA_D}
  options = ConsistencyOptions(
    tangent_normalizer=tangent_normalizer, c=0.3, adaptive_weight=False
  )
  consistency = scm.build(**common, velocity="data", options=options)
  batch = {"x0": gaussian(1), "cond": None}

  def gradient(loss):
    grads = jax.grad(lambda p: loss(p, batch, key, jnp.int32(0), None)[0])(params)
    return np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads["net"])])

  factor = SIGMA_D * np.cos(angle) ** 2
  if tangent_normalizer == "rms":
    x0 = batch["x0"]
    F = net.apply(params, trigflow.perturb(x0, z, t) / SIGMA_D, t, None)
    g = factor * (F - trigflow.velocity(x0, z, t) / SIGMA_D)
    factor /= np.sqrt(np.mean(np.square(g))) + 0.3
  expected = factor * gradient(diffusion.build(**common, adaptive_weight=False))
  found = gradient(consistency)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
  assert np.linalg.norm(found) > 0.01
