"""ParaDiGMS: Picard iteration over a window of a solver's rows (arXiv:2305.16317).

`windows` is the loop. Here a row is done when the state that it starts from has
changed by no more than the tolerance. With tolerance 0 the result is that of
`sequential`, to the bit where a denoiser treats its rows alike.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sdiff_jax import registry
from sdiff_jax.samplers import _sliding_window
from sdiff_jax.samplers._ring_buffer import RingBuffer
from sdiff_jax.samplers._sliding_window import Callback, Iteration, Samples, UpdateRule
from sdiff_jax.samplers.solvers import TOLERANCE_UNIT, SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, PRNGKey

ULPS = 4  # changes of so many units in the last place count as none


def check_options(tableau: SolverTableau, options: dict[str, Any]) -> dict[str, Any]:
  """Returns the options, or raises a ValueError for one that does not fit."""
  _sliding_window.check_window(tableau, options["window"])
  check(options["tolerance"], options["update_rule"])
  return options


def check(tolerance: float | Array, update_rule: str) -> None:
  """Raises a ValueError for a tolerance or a rule that does not exist."""
  if isinstance(tolerance, float | int) and not 0 <= tolerance < float("inf"):
    raise ValueError(f"tolerance={tolerance}: take 0 or more")
  if update_rule not in UPDATE_RULES:
    raise ValueError(f"update_rule={update_rule!r}: take one of {[*UPDATE_RULES]}")


@registry.register(
  "samplers", "paradigms", prefix="para", check=check_options, bounds_tv=True
)
def sample(
  denoiser: Denoiser,
  table: SolverTableau,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  *,
  window: int = 0,
  tolerance: float | Array = 0.1,
  update_rule: str = "secant",
  sharding: NamedSharding | None = None,
  callback: Callback | None = None,
  max_iterations: int = 0,
) -> Samples:
  """Returns the last state of the recurrence of `tables`, found in parallel.

  Args:
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...]; N = B window.
    table: the solver.
    x: first state, [B, ...] (see `sequential.initial`).
    keys: one key a sample, [B]; unused by a table without noise.
    cond: conditions, leading [B].
    window: rows evaluated at once, W.
    tolerance: largest change of an accepted state, as a root mean square; 1 is UNIT
      of the data's standard deviation.
    update_rule: how changes carry on, a key of RULES. "published" is arXiv:2305.16317 to the
      letter, its unit the noise of the row; the others start new states from the
      last d, and keep a multistep solver's history.
    sharding: of the axes [B, W]; None on one device.
    callback: a preview (see windows.Callback); None for none.
    max_iterations: most calls of the denoiser (see windows.run); 0 for any number.

  Raises:
    ValueError: a window, tolerance or rule that does not exist.
  """
  check(tolerance, update_rule)
  ring, published = RingBuffer(window, sharding), update_rule == "published"
  unit = jnp.asarray(_unit(table, published), x.dtype)
  noise = jnp.asarray(np.append(table.scale, 0.0), x.dtype)

  def improve(now: Iteration) -> tuple[Array, Array, Array, Array]:
    new = _sliding_window.propagate_change(ring, now.factors, now.phi, now.old)
    state = jnp.minimum(now.begin[:, None] + now.k + 1, table.evaluations)
    allowed = unit[state]
    change = _mean_square(new - now.old)
    floor = (ULPS * jnp.finfo(x.dtype).eps) ** 2 * _mean_square(new)
    good = change <= jnp.maximum((tolerance * allowed) ** 2, floor)
    stride = 1 + jnp.min(jnp.where(good, window - 1, now.k), axis=1)
    stride = jnp.minimum(stride, table.evaluations - now.begin)
    counts = (now.k < (stride - 1)[:, None]) & (change > floor)
    relative = change**0.5 / jnp.where(allowed > 0, allowed, 1)
    norm = (change * x[0].size) ** 0.5
    variation = jnp.where(counts, norm / (2 * noise[state]), 0).sum(axis=1)
    return new, stride, jnp.max(jnp.where(counts, relative, 0), axis=1), variation

  method = UpdateRule(UPDATE_RULES[update_rule], improve, published)
  given = (x, keys, cond, ring, method, callback, max_iterations)
  return _sliding_window.sliding_window(denoiser, table, *given)


def _unit(table: SolverTableau, published: bool) -> np.ndarray:
  """Returns the unit of errors of states 0 to R, float64 [R + 1].

  UNIT sigma_d. Published: the standard deviation of the noise that leaves the state,
  and all but nothing where there is none.
  """
  if published:
    return np.append(np.maximum(table.scale, 1e-10), 0.0)
  return np.full(table.evaluations + 1, TOLERANCE_UNIT * table.sigma_d)


def _mean_square(x: Array) -> Array:
  """Returns the mean of x^2 over a sample, [B, W]."""
  return jnp.mean(jnp.square(x), tuple(range(2, x.ndim)))


def _picard(row: dict, slopes: tuple[Array, ...]) -> tuple[Array, ...]:
  return 1 - row["p"], row["p"], jnp.zeros_like(row["p"])


def _linear(row: dict, slopes: tuple[Array, ...]) -> tuple[Array, ...]:
  return row["a"], row["p"], jnp.zeros_like(row["p"])


def secant(row: dict, slopes: tuple[Array, ...]) -> tuple[Array, ...]:
  """A = a + b dd_i/dx_i, A' = p + c dd_{i-1}/dx_{i-1}, A'' = e dd_{i-2}/dx_{i-2}."""
  now, one_ago, two_ago = slopes
  return row["a"] + row["b"] * now, row["p"] + row["c"] * one_ago, row["e"] * two_ago


# How a change of a state carries on to those after it (see windows.Method.factors).
UPDATE_RULES: dict[str, Callable[..., Array]] = {
  "published": _picard,
  "picard": _picard,
  "linear": _linear,
  "secant": secant,
}
