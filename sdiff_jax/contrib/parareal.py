"""Parareal: a coarse solver's sweep, corrected by a fine solver in parallel (SRDS).

The steps of a solver are divided into blocks. F_n runs the steps of block n, all blocks
at once. G_n runs a coarse solver from the start of the block to its end, the blocks
sequentially:

    U_{n+1}^{k+1} = F_n(U_n^k) + G_n(U_n^{k+1}) - G_n(U_n^k),

and after k sweeps the first k states are those of the fine solver (Lions, Maday,
Turinici 2001; arXiv:2412.08292). The coarse solver may have its own denoiser, such as a
consistency model.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sdiff_jax import registry
from sdiff_jax.fields import Index, Range
from sdiff_jax.samplers import sequential
from sdiff_jax.samplers import tableau as tableau_lib
from sdiff_jax.samplers._ring_buffer import RingBuffer, map_slots, wide
from sdiff_jax.samplers._samples import Samples
from sdiff_jax.samplers.tableau import TOLERANCE_UNIT, SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, Json, PRNGKey


def check(tableau: SolverTableau) -> None:
  """Checks that a solver has no noise.

  Args:
    tableau: the solver.

  Raises:
    ValueError: a solver with noise.
  """
  if tableau.uses_noise or tableau.uses_noise_before:
    raise ValueError("name: parareal needs a solver without noise, such as ddim")


def boundaries(num_steps: int, num_blocks: int) -> np.ndarray:
  """Returns the first step of each block, int [num_blocks]; the last may be shorter.

  Args:
    num_steps: number of solver steps.
    num_blocks: number of blocks.

  Raises:
    ValueError: the steps cannot be divided into so many blocks.

  Example:
    >>> boundaries(10, 4)
    array([0, 3, 6, 9])
  """
  size = -(-num_steps // num_blocks) if 1 <= num_blocks <= num_steps else 0
  if not size or size * (num_blocks - 1) >= num_steps:
    raise ValueError(
      f"window={num_blocks}: {num_steps} solver steps cannot be divided into so many "
      f"blocks of one size; use {max(1, round(num_steps**0.5))}"
    )
  return np.arange(num_blocks) * size


def check_blocks(tableau: SolverTableau, starts: np.ndarray) -> None:
  """Checks that no step depends on states or denoised values before its block.

  Args:
    tableau: the solver.
    starts: first step of each block, int [K].

  Raises:
    ValueError: some step does.
  """
  crosses = tableau.x_coef[starts[1:], 1].any()
  for n in range(1, tableau.history):
    for j in range(n):  # step j of a block must not use d_{i-n}
      steps = np.minimum(starts[1:] + j, tableau.evaluations - 1)
      crosses |= tableau.denoised_coef[steps, n].any()
  if crosses:
    raise ValueError(
      "name: parareal needs a solver that keeps no history from step to step, such as "
      f"ddim, and blocks of whole steps; they start at solver steps {starts.tolist()}"
    )


def composed_steps(tableau: SolverTableau) -> tuple[np.ndarray, np.ndarray]:
  """Returns a and b of the steps x' = a x + b d from any state to any later one.

  Steps of DDIM with one denoised value compose to one step.

  Args:
    tableau: of a solver with one state and one denoised value, of N steps.

  Returns:
    float64 [N + 1, N + 1] each; 1 and 0 where the end is not later.
  """
  size = tableau.evaluations + 1
  a, b = np.ones((size, size)), np.zeros((size, size))
  for j in range(size - 1):
    step_a, step_b = tableau.x_coef[j, 0], tableau.denoised_coef[j, 0]
    a[: j + 1, j + 1] = step_a * a[: j + 1, j]
    b[: j + 1, j + 1] = step_a * b[: j + 1, j] + step_b
  return a, b


def coarse_solver(tableau: SolverTableau, starts: np.ndarray) -> SolverTableau:
  """Returns the coarse solver that crosses each block by one step of DDIM.

  Its coefficients are the `composed_steps` of the solver.

  Args:
    tableau: DDIM, or another solver of one state and one denoised value.
    starts: first step of each block, int [K].

  Raises:
    ValueError: the solver is of another form.
  """
  if tableau.memory > 1:
    raise ValueError(
      "coarse_tableau: needed, because the solver's steps are not DDIM's"
    )
  ends = np.append(starts[1:], tableau.evaluations)
  a, b = (v[starts, ends] for v in composed_steps(tableau))
  coarse = {k: v[starts] for k, v in tableau._asdict().items() if np.ndim(v)}
  coarse |= {"x_coef": np.stack([a, 0 * a], 1), "denoised_coef": b[:, None]}
  return tableau._replace(**coarse)


def integrate(
  tableau: SolverTableau,
  start: Array,
  size: int,
  x: Array,
  evaluate: Callable[[Array, Array], Array],
) -> Array:
  """Returns the state `size` steps after `start`, or after the solver's last step.

  Args:
    tableau: a solver without noise; no step uses what was before its block.
    start: the first step, int [...].
    size: number of steps.
    x: states, [B, ..., *shape].
    evaluate: (x, time [...]) -> d like x.
  """
  columns = tableau.coefficients(x.dtype), jnp.asarray(tableau.time, x.dtype)

  def solver_step(carry: tuple, j: Array) -> tuple[tuple, None]:
    x, previous_x, history = carry
    i = jnp.minimum(start + j, tableau.evaluations - 1)
    inside = start + j < tableau.evaluations
    coefficients, time = jax.tree.map(lambda column: column[i], columns)
    denoised = [evaluate(x, time), *history]
    coefficients = jax.tree.map(lambda c: wide(c[None], x.ndim), coefficients)
    states = [x, previous_x] if tableau.uses_previous_state else [x]
    new = tableau_lib.apply_step(coefficients, states, denoised)
    new = jnp.where(wide(inside[None], x.ndim), new, x)
    return (new, x, denoised[: len(history)]), None

  history = [jnp.zeros_like(x)] * (tableau.history - 1)
  return jax.lax.scan(solver_step, (x, x, history), jnp.arange(size))[0][0]


def check_options(tableau: SolverTableau, options: dict[str, Json]) -> dict[str, Json]:
  """Returns the options of `run`; without a window there are about R^(1/2) blocks.

  Args:
    tableau: the solver, with R steps.
    options: by name.

  Raises:
    ValueError: a solver with noise or history, or an option that does not fit.
  """
  check(tableau)
  if tableau.memory > 1 and options.get("coarse_tableau") is None:
    raise ValueError(
      "name: parareal needs a solver without history, such as ddim, or a coarse_tableau"
    )
  num_blocks = options["window"] or round(tableau.evaluations**0.5)
  check_blocks(tableau, boundaries(tableau.evaluations, num_blocks))
  return options | {"window": num_blocks}


@registry.register(
  "samplers", "parareal", prefix="srds", aliases=("parareal",), check=check_options
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
  coarse_tableau: SolverTableau | None = None,
  coarse_denoiser: Denoiser | None = None,
  sharding: NamedSharding | None = None,
) -> Samples:
  """Returns the last state of an ODE solver's recurrence, computed by parareal.

  Args:
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...]; N = B window.
    tableau: the fine solver, without noise; no block uses what was before its start.
    x: initial states, [B, ...].
    keys: unused, because there is no noise.
    cond: conditions, leading [B].
    window: number of blocks K.
    tolerance: largest change of the last state between two sweeps, as a root mean
      square, in units of `TOLERANCE_UNIT` standard deviations of the data.
    coarse_tableau: the coarse solver. Its steps, divided into K blocks too, have the
      times of the fine solver where blocks start; None for `coarse_solver`.
    coarse_denoiser: denoiser of the coarse solver: `denoiser` if None, or a consistency
      model, whose denoised value is the end of the trajectory.
    sharding: of the axes [B, K]; None on one device.

  Returns:
    Samples; `num_iterations` counts sequential calls of either denoiser,
    `num_evaluations` those of `denoiser` alone, `error` is the last change.

  Raises:
    ValueError: a solver with noise, or with history across blocks, a number of blocks
      that does not fit, or a coarse solver with other times.

  Example:
    >>> from sdiff_jax.samplers import solvers
    >>> tableau = solvers.build(sigma_d=0.5, name="ddim", steps=9)
    >>> keys = sequential.keys_from_seeds(np.arange(2))
    >>> x = sequential.sample_prior(tableau, keys, (2, 2))
    >>> denoise = lambda x, time, cond: 0.1 * x
    >>> run(denoise, tableau, x, keys, None, window=3).x.shape
    (2, 2, 2)
  """
  del keys
  check(tableau)
  starts = boundaries(tableau.evaluations, window)
  check_blocks(tableau, starts)
  if coarse_tableau is None:
    coarse_tableau = coarse_solver(tableau, starts)
  coarse_starts = boundaries(coarse_tableau.evaluations, window)
  check(coarse_tableau)
  check_blocks(coarse_tableau, coarse_starts)
  if not np.allclose(coarse_tableau.time[coarse_starts], tableau.time[starts]):
    raise ValueError(
      "coarse_tableau: its blocks start at other times than those of the solver"
    )
  ring, size = RingBuffer(window, sharding), -(-tableau.evaluations // window)
  coarse_size = -(-coarse_tableau.evaluations // window)
  evaluate = map_slots(ring, denoiser, cond)

  def fine(states: Array) -> Array:
    """Returns F_n of the state at the start of every block, [B, K, ...]."""

    def evaluate_blocks(x: Array, time: Array) -> Array:
      return evaluate(x, jnp.broadcast_to(time[None], x.shape[:2]))

    return integrate(tableau, jnp.asarray(starts), size, states, evaluate_blocks)

  def coarse(n: Array, x: Array) -> Array:
    """Returns G_n of the state at the start of block n, [B, ...]."""

    def evaluate_block(x: Array, time: Array) -> Array:
      return sequential.with_optimization_barrier(
        coarse_denoiser or denoiser, x, jnp.broadcast_to(time, len(x)), cond
      )

    first = jnp.asarray(coarse_starts)[n]
    return integrate(coarse_tableau, first, coarse_size, x, evaluate_block)

  def sweep(correction: Array) -> tuple[Array, Array, Array]:
    """Returns the states [B, K, ...], the last one, and G_n of each."""

    def block(state: Array, inputs: tuple) -> tuple:
      n, correction = inputs
      predicted = coarse(n, state)
      return correction + predicted, (state, predicted)

    inputs = (jnp.arange(window), jnp.moveaxis(correction, 1, 0))
    last, (states, predicted) = jax.lax.scan(block, x, inputs)
    return jnp.moveaxis(states, 0, 1), last, jnp.moveaxis(predicted, 0, 1)

  def iterate(carry: tuple) -> tuple:
    k, states, last, predicted, finished, _ = carry
    new, end, predicted = sweep(fine(states) - predicted)
    change = jnp.sqrt(jnp.mean(jnp.square(end - last), tuple(range(1, x.ndim))))
    change = change / (TOLERANCE_UNIT * tableau.sigma_d)
    # Finished samples stay as they are, whatever else their batch needs.
    last = jnp.where(wide(finished, end.ndim), last, end)
    sweeps = k + (~finished).astype(jnp.int32)
    finished = finished | (change <= tolerance) | (sweeps >= window)
    return sweeps, new, last, predicted, finished, change

  states, last, predicted = sweep(jnp.zeros((len(x), window, *x.shape[1:]), x.dtype))
  zero = jnp.zeros(len(x), jnp.int32)
  carry = (zero, states, last, predicted, zero > 0, jnp.zeros(len(x), x.dtype))
  sweeps, _, last, _, _, change = jax.lax.while_loop(
    lambda carry: ~carry[4].all(), iterate, carry
  )
  coarse_steps = coarse_tableau.evaluations
  return Samples(
    last,
    num_iterations=coarse_steps + sweeps * (size + coarse_steps),
    num_evaluations=sweeps * tableau.evaluations,
    error=change,
    tv_bound=jnp.zeros_like(change),
  )
