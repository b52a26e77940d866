"""Classifier-free guidance as linear algebra of two networks."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sdiff_jax.diffusion import guidance

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 2, 3))
T = jnp.linspace(0.1, 1.5, 6)
COND = {"label": jnp.array([0, 1, 2, 0, 1, 2]), "guidance": jnp.arange(6.0)}


def net(x, t, cond):
  """A network that uses all of its inputs."""
  label = cond["label"].astype(x.dtype)[:, None, None]
  other = (t * cond["guidance"])[:, None, None]
  return jnp.sin(x * (label + 2)) + label * other + x * other


def unconditional(x, t):
  return net(x, t, COND | {"label": jnp.full(6, -1)})


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_scale_one_is_conditional_and_zero_unconditional():
  close(guidance.classifier_free(net, 1.0)(X, T, COND), net(X, T, COND))
  close(guidance.classifier_free(net, 0.0)(X, T, COND), unconditional(X, T))
  assert not np.allclose(net(X, T, COND), unconditional(X, T), atol=0.1)


@hypothesis.given(scale=st.floats(-3, 8, width=32))
def test_linear_in_the_scale(scale):
  F_u, F_c = unconditional(X, T), net(X, T, COND)
  close(guidance.classifier_free(net, scale)(X, T, COND), F_u + scale * (F_c - F_u))


def test_each_sample_has_its_own_scale():
  scales = jnp.array([0.0, 1.0, 1.5, 2.0, -1.0, 4.0])
  together = guidance.classifier_free(net, scales)(X, T, COND)
  for k, scale in enumerate(scales):
    close(together[k], guidance.classifier_free(net, float(scale))(X, T, COND)[k])


def test_network_runs_once_on_both_halves():
  batches = []

  def counted(x, t, cond):
    batches.append(jax.tree.map(len, (x, t, cond)))
    return net(x, t, cond)

  guidance.classifier_free(counted, 2.0)(X, T, COND)
  assert batches == [(12, 12, {"label": 12, "guidance": 12})]


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_labels_are_dropped_at_the_rate(rate):
  n = 40_000
  labels = jnp.arange(n) % 7
  cond = guidance.drop_labels(KEY, {"label": labels, "guidance": jnp.ones(n)}, rate)
  dropped = np.asarray(cond["label"] == guidance.NO_LABEL)
  sd = (rate * (1 - rate) / n) ** 0.5
  assert dropped.mean() == pytest.approx(rate, abs=4 * sd)
  np.testing.assert_array_equal(cond["label"][~dropped], labels[~dropped])
  np.testing.assert_array_equal(cond["guidance"], 1)


def test_no_labels_and_no_rate_change_nothing():
  assert guidance.drop_labels(KEY, None, 0.5) is None
  np.testing.assert_array_equal(
    guidance.drop_labels(KEY, COND, 0.0)["label"], COND["label"]
  )
