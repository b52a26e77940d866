"""ParaDiGMS: Picard iteration over a window of solver steps (arXiv:2305.16317).

`_sliding_window` is the loop. Here a step is accepted when the state that it starts from
has changed by no more than the tolerance. With tolerance 0 the result is that of
`sequential`, bit for bit if the denoiser computes each sample of its batch alike.
"""

from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sdiff_jax import registry
from sdiff_jax.fields import Choices, Index, Range
from sdiff_jax.samplers import _sliding_window
from sdiff_jax.samplers._ring_buffer import RingBuffer
from sdiff_jax.samplers._samples import Callback, Samples
from sdiff_jax.samplers._sliding_window import Iteration, Update, UpdateRule
from sdiff_jax.samplers.tableau import (
  TOLERANCE_UNIT,
  SolverTableau,
  StepCoefficients,
)
from sdiff_jax.types import Array, Cond, Denoiser, Json, PRNGKey

ULPS = 4  # changes of so many units in the last place count as none


def check_options(tableau: SolverTableau, options: dict[str, Json]) -> dict[str, Json]:
  """Returns the options of `run` if they fit a solver; a window of 0 is unset.

  Args:
    tableau: the solver.
    options: by name.

  Raises:
    ValueError: an option that does not fit.
  """
  if options["window"]:
    _sliding_window.check_window(tableau, options["window"])
  return options


@registry.register(
  "samplers", "paradigms", prefix="para", check=check_options, bounds_tv=True
)
def run(
  denoiser: Denoiser,
  tableau: SolverTableau,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  *,
  window: Index = 0,
  tolerance: Annotated[float | Array, Range(0)] = 0.1,
  update_rule: Annotated[str, Choices(lambda: UPDATE_RULES)] = "secant",
  max_iterations: Index = 0,
  sharding: NamedSharding | None = None,
  callback: Callback | None = None,
  record: bool | None = None,
) -> Samples:
  """Returns the last state of a solver's recurrence, computed in parallel.

  Args:
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...]; N = B window.
    tableau: the solver.
    x: initial states, [B, ...] (see `sequential.sample_prior`).
    keys: one key a sample, [B]; unused by a solver without noise.
    cond: conditions, leading [B].
    window: number of steps that are evaluated at once, W.
    tolerance: largest change of an accepted state, as a root mean square; 1 is
      `TOLERANCE_UNIT` standard deviations of the data.
    update_rule: how changes propagate, a key of `UPDATE_RULES`. "published" follows
      arXiv:2305.16317 literally, and its unit is the noise of the step; the others start
      new states from the last denoised value, and keep the history of a multistep solver.
    max_iterations: see `_sliding_window.sliding_window`; 0 for no bound.
    sharding: of the axes [B, W]; None on one device.
    callback: a preview (see `Callback`); None for none.
    record: whether all states are returned.

  Returns:
    Samples, with their cost and accuracy.

  Raises:
    ValueError: a window, tolerance or rule that does not exist.

  Example:
    >>> from sdiff_jax.samplers import sequential, solvers
    >>> tableau = solvers.build(sigma_d=0.5, name="ddim", steps=8)
    >>> keys = sequential.keys_from_seeds(np.arange(3))
    >>> x = sequential.sample_prior(tableau, keys, (2, 2))
    >>> denoise = lambda x, time, cond: 0 * x
    >>> bool((run(denoise, tableau, x, keys, None, window=8).num_iterations < 8).all())
    True
  """
  ring, published = RingBuffer(window, sharding), update_rule == "published"
  unit = jnp.asarray(_unit(tableau, published), x.dtype)
  noise_std = jnp.asarray(np.append(tableau.scale, 0.0), x.dtype)

  def improve(now: Iteration) -> Update:
    new = _sliding_window.propagate_change(ring, now.factors, now.phi, now.old)
    state = jnp.minimum(now.begin[:, None] + now.offset + 1, tableau.evaluations)
    allowed = unit[state]
    change = _mean_square(new - now.old)
    floor = (ULPS * jnp.finfo(x.dtype).eps) ** 2 * _mean_square(new)
    good = change <= jnp.maximum((tolerance * allowed) ** 2, floor)
    stride = 1 + jnp.min(jnp.where(good, window - 1, now.offset), axis=1)
    stride = jnp.minimum(stride, tableau.evaluations - now.begin)
    counts = (now.offset < (stride - 1)[:, None]) & (change > floor)
    relative = change**0.5 / jnp.where(allowed > 0, allowed, 1)
    norm = (change * x[0].size) ** 0.5
    tv = jnp.where(counts, norm / (2 * noise_std[state]), 0).sum(axis=1)
    return Update(new, stride, jnp.max(jnp.where(counts, relative, 0), axis=1), tv)

  return _sliding_window.sliding_window(
    denoiser,
    tableau,
    x,
    keys,
    cond,
    ring=ring,
    rule=UpdateRule(UPDATE_RULES[update_rule], improve, published),
    callback=callback,
    max_iterations=max_iterations,
    record=bool(record),
  )


def _unit(tableau: SolverTableau, published: bool) -> np.ndarray:
  """Returns the unit of the tolerance at states 0 to R, float64 [R + 1].

  It is `TOLERANCE_UNIT` sigma_d. For the published rule, it is the standard deviation
  of the noise that is added to the state, and almost 0 where there is none.
  """
  if published:
    return np.append(np.maximum(tableau.scale, 1e-10), 0.0)
  return np.full(tableau.evaluations + 1, TOLERANCE_UNIT * tableau.sigma_d)


def _mean_square(x: Array) -> Array:
  """Returns the mean of x^2 over each state, [B, W]."""
  return jnp.mean(jnp.square(x), tuple(range(2, x.ndim)))


def _picard(step: StepCoefficients, slopes: list[Array]) -> list[Array]:
  """A = 1 - x_coef_1, A' = x_coef_1: each state moves by the change before it."""
  return _fit([1 - step.x[1], step.x[1]], slopes)


def _linear(step: StepCoefficients, slopes: list[Array]) -> list[Array]:
  """A = x_coef_0, A' = x_coef_1: denoised values are held fixed."""
  return _fit(step.x, slopes)


def _fit(factors: list[Array], slopes: list[Array]) -> list[Array]:
  """Returns as many factors as there are slopes, with zeros after the given ones."""
  missing = len(slopes) - len(factors)
  return [*factors, *[jnp.zeros_like(factors[0])] * missing][: len(slopes)]


def secant(step: StepCoefficients, slopes: list[Array]) -> list[Array]:
  """A^(n) = x_coef_n + denoised_coef_n dd_{i-n}/dx_{i-n}: linear in all states.

  Args:
    step: coefficients, [B, W, 1, ...].
    slopes: dd/dx of x_i, x_{i-1}, ..., [B, W, ...] each.

  Returns:
    A, A', ..., [B, W, ...] each, as many as slopes.
  """
  factors = [c * slope for c, slope in zip(step.denoised, slopes, strict=True)]
  for n, c in enumerate(step.x[: len(factors)]):
    factors[n] = c + factors[n]
  return factors


# How a change of a state propagates to those after it (see `UpdateRule.factors`).
UPDATE_RULES: dict[str, Callable[[StepCoefficients, list[Array]], list[Array]]] = {
  "published": _picard,
  "picard": _picard,
  "linear": _linear,
  "secant": secant,
}
