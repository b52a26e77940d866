"""The slots of a window, and recurrences around them."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sdiff_jax.samplers import _ring_buffer


@pytest.mark.slow
@hypothesis.settings(max_examples=30)
@hypothesis.given(
  window=st.integers(1, 9), order=st.integers(1, 2), seed=st.integers(0, 999)
)
def test_recurrences_go_around_from_the_cut(window, order, seed):
  rng = np.random.default_rng(seed)
  begin = rng.integers(0, 100, 3)
  r = rng.standard_normal((3, window, 2))
  factors = rng.standard_normal((order, 3, window, 1))
  k = (np.arange(window) - begin[:, None]) % window
  for n in range(order):
    factors[n][k <= n] = 0  # what came before the first is not known
  r[k >= window - 1] *= 1e3
  found = _ring_buffer.solve(
    _ring_buffer.RingBuffer(window),
    [jnp.asarray(f, jnp.float32) for f in factors],
    jnp.float32(r),
  )
  for b in range(3):
    y = {}
    for i in range(begin[b], begin[b] + window):
      slot = i % window
      y[i] = r[b, slot] + sum(
        factors[n, b, slot] * y.get(i - 1 - n, 0.0) for n in range(order)
      )
      np.testing.assert_allclose(found[b, slot], y[i], rtol=1e-4, atol=1e-4)


def test_nothing_gets_past_a_cut():
  """Not even what is not finite: 0 times infinity is 0 here."""
  A = jnp.ones((1, 4, 1)).at[0, 2].set(0.0)
  r = jnp.zeros((1, 4, 1)).at[0, 1].set(jnp.inf)
  found = _ring_buffer.solve(_ring_buffer.RingBuffer(4), [A], r)
  np.testing.assert_array_equal(found[0, :, 0], [0, np.inf, 0, 0])


def test_flat_rows_come_back():
  x = jnp.arange(24.0).reshape(2, 3, 4)
  here = _ring_buffer.RingBuffer(3)
  np.testing.assert_array_equal(_ring_buffer.flatten(here, x), x.reshape(6, 4))
  np.testing.assert_array_equal(
    _ring_buffer.unflatten(here, _ring_buffer.flatten(here, x)), x
  )


@pytest.mark.parametrize("begin", [0, 2, 7])
def test_rank_and_pick(begin):
  here = _ring_buffer.RingBuffer(3)
  k = _ring_buffer.slot_offset(here, jnp.array([begin]))
  slot = int(np.flatnonzero(k[0] == 0)[0])
  assert slot == begin % 3
  x = jnp.arange(6.0).reshape(1, 3, 2)
  np.testing.assert_array_equal(_ring_buffer.gather_slot(x, k == 0)[0], x[0, slot])
