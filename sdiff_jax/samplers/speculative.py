"""Speculative sampling of a solver with noise, exact in law, without a tolerance.

The states of a window are a draft: each was made from the one before by a guess of
the denoiser there, and noise. A pass evaluates the denoiser at all of them, and
accepts states one after the other by the reflection coupling of two Gaussians, whose
means are the draft's and the table's (autospeculation, arXiv:2505.03983; arXiv:
2501.05370, algorithm 4). So the law of the samples is that of `sequential`. As the
draft's noise is independent of its means, noise of rows that come after a rejected
one is used again, and their next guess starts from what the pass has found there.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from sdiff_jax import registry
from sdiff_jax.samplers import _sliding_window
from sdiff_jax.samplers._ring_buffer import RingBuffer, wide
from sdiff_jax.samplers._sliding_window import Callback, Iteration, Samples, UpdateRule
from sdiff_jax.samplers.paradigms import secant
from sdiff_jax.samplers.solvers import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, PRNGKey


def check_options(tableau: SolverTableau, options: dict[str, Any]) -> dict[str, Any]:
  """Returns the options, or raises a ValueError for one that does not fit."""
  _sliding_window.check_window(tableau, options["window"])
  check(tableau)
  return options


def check(table: SolverTableau) -> None:
  """Raises a ValueError for a table without noise."""
  if not (table.s[:-1] > 0).all():
    raise ValueError(
      "name: speculation needs noise in every row but the last: specddpm, "
      "specdpmpp2m_sde"
    )


@registry.register(
  "samplers", "speculative", prefix="spec", check=check_options, exact=True
)
def sample(
  denoiser: Denoiser,
  table: SolverTableau,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  *,
  window: int = 0,
  sharding: NamedSharding | None = None,
  callback: Callback | None = None,
  max_iterations: int = 0,
) -> Samples:
  """Returns a draw with the law of `sequential.sample`; `error` is 0.

  Args:
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...]; N = B window.
    table: the solver; every row but the last has noise.
    x: first state, [B, ...] (see `sequential.initial`).
    keys: one key a sample, [B].
    cond: conditions, leading [B].
    window: rows verified at once, theta.
    sharding: of the axes [B, W]; None on one device.
    callback: a preview (see windows.Callback); None for none.
    max_iterations: most calls of the denoiser (see windows.run); 0 for any number.

  Raises:
    ValueError: a window that does not exist, or a table without noise.
  """
  check(table)
  ring = RingBuffer(window, sharding)

  def uniform(key: PRNGKey, i: Array) -> Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, i + 1), 1))

  def improve(now: Iteration) -> tuple[Array, Array, Array, Array]:
    u = jax.vmap(jax.vmap(uniform, in_axes=(None, 0)))(keys, now.begin[:, None] + now.k)
    accepted, made = reflection_coupling(now.phi, now.old, now.row["s"], now.z, u)
    last = jnp.minimum(window, table.evaluations - now.begin)[:, None] - 1
    # The last row has made no draft yet: its Phi is a draw from the table.
    made = jnp.where(wide(now.k == last, made.ndim), now.phi, made)
    stride = 1 + jnp.min(jnp.where(accepted | (now.k > last), last, now.k), axis=1)
    ahead = wide(now.k - (stride - 1)[:, None], made.ndim)  # of the last row done
    factors = [jnp.where(ahead > 0, factor, 0) for factor in now.factors]
    phi = jnp.where(ahead > 0, now.phi, jnp.where(ahead == 0, made, now.old))
    new = _sliding_window.propagate_change(ring, factors, phi, now.old)
    none = jnp.zeros(len(stride), x.dtype)
    return new, stride, none, none

  method = UpdateRule(secant, improve)
  given = (x, keys, cond, ring, method, callback, max_iterations)
  return _sliding_window.sliding_window(denoiser, table, *given)


def reflection_coupling(
  phi: Array, draft: Array, s: Array, z: Array, u: Array
) -> tuple[Array, Array]:
  """Reflection coupling of N(phi - s z, s^2) with the draft, a draw by the same z.

  With D = (phi - draft) / s, the means' distance, a draft is accepted where
  ln u <= z . D - |D|^2 / 2, else reflected: phi - 2 s D (D . z) / |D|^2.

  Args:
    phi: mean of the table's Gaussian, and s z, [B, W, ...].
    draft: mean of the draft's Gaussian, and s z, [B, W, ...].
    s: standard deviation, [B, W, 1, ...].
    z: standard Gaussian, [B, W, ...].
    u: uniform in [0, 1), [B, W].

  Returns:
    Whether the draft is a draw from the table's Gaussian [B, W], and one for where it
    is not, [B, W, ...].
  """
  axes = tuple(range(2, phi.ndim))
  distance = (phi - draft) / jnp.where(s > 0, s, 1)
  dot, square = (jnp.sum(distance * v, axes, keepdims=True) for v in (z, distance))
  accepted = jnp.log(u) <= (dot - square / 2).reshape(u.shape)
  reflected = phi - 2 * s * distance * dot / jnp.where(square > 0, square, 1)
  return accepted, reflected
