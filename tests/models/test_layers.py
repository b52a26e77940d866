"""Embeddings of times and norms, which the networks share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import close

from sdiff_jax.models.layers import common as common_lib

x64 = pytest.mark.usefixtures("x64")


@x64
def test_embedding_of_the_angle_is_slow():
  """Frequencies fall from 1 to 1e-4, so |d/dt| <= 1: nothing explodes in dF/dt."""
  t = jnp.linspace(0, np.pi / 2, 50)
  value, slope = jax.jvp(
    lambda t: common_lib.positional(t, 16), (t,), (jnp.ones_like(t),)
  )
  assert value.shape == (50, 16)
  assert jnp.max(jnp.abs(slope)) <= 1
  close(slope[0, 8:], 10_000.0 ** (-np.arange(8) / 7))
  close(value[:, :8] ** 2 + value[:, 8:] ** 2, 1)


def test_norms():
  rng = np.random.default_rng(0)
  x = jnp.asarray(5 + 3 * rng.normal(size=(4, 64)), jnp.float32)
  close(common_lib.rms_norm(x), x / np.sqrt(np.mean(np.square(x), 1, keepdims=True)))
  centred = np.asarray(x) - np.mean(x, 1, keepdims=True)
  close(common_lib.layer_norm(x), centred / np.std(x, 1, keepdims=True))
  assert common_lib.rms_norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_adaptive_double_norm():
  """norm(x) pnorm(s(emb)) + pnorm(b(emb)), for tokens and for vectors."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
  emb = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
  norm = common_lib.AdaptiveDoubleNorm(jnp.dtype("float32"))
  params = norm.init(jax.random.key(0), x, emb)
  scale, shift = (
    common_lib.rms_norm(emb @ p["kernel"] + p["bias"][None])[:, None]
    for p in (params["params"][k] for k in ("scale", "shift"))
  )
  y = norm.apply(params, x, emb)
  close(y, common_lib.layer_norm(x) * scale + shift)
  close(norm.apply(params, x[:, 2], emb), y[:, 2])
  assert jnp.min(jnp.mean(scale**2, -1)) > 0.9


def test_adaptive_norm_without_the_second_norm():
  """norm(x) (1 + s(emb)) + b(emb), of the same parameters."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
  emb = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
  norm = common_lib.AdaptiveNorm(jnp.dtype("float32"))
  double = common_lib.AdaptiveDoubleNorm(jnp.dtype("float32"))
  params = norm.init(jax.random.key(0), x, emb)
  assert jax.tree.all(
    jax.tree.map(jnp.array_equal, params, double.init(jax.random.key(0), x, emb))
  )
  scale, shift = (
    (emb @ p["kernel"] + p["bias"][None])[:, None]
    for p in (params["params"][k] for k in ("scale", "shift"))
  )
  close(norm.apply(params, x, emb), common_lib.layer_norm(x) * (1 + scale) + shift)


@x64
def test_fourier_features_are_fast():
  """cos and sin of 2 pi 16 n t with normal n, one draw for all."""
  t = jnp.linspace(0, np.pi / 2, 50)
  value, slope = jax.jvp(
    lambda t: common_lib.fourier(t, 512), (t,), (jnp.ones_like(t),)
  )
  cos, sin = np.split(value, 2, axis=1)
  close(cos**2 + sin**2, 1)
  frequencies = slope[0, 256:]  # those of the sines, at 0
  angles = t[:, None] * frequencies[None]
  close(cos, np.cos(angles))
  close(sin, np.sin(angles))
  assert np.std(frequencies) == pytest.approx(2 * np.pi * 16, rel=0.15)
  assert abs(np.mean(frequencies)) < 20
  np.testing.assert_array_equal(common_lib.fourier(t, 512), value)


def test_wide_keeps_what_is_wide():
  for narrow in ("bfloat16", "float16"):
    assert common_lib.to_accumulation_dtype(jnp.zeros(2, narrow)).dtype == jnp.float32
  assert common_lib.to_accumulation_dtype(jnp.zeros(2)).dtype == jnp.float32
