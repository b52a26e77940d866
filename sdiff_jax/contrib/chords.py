"""CHORDS: cores that start at several steps of a solver, and rectify each other.

Core 0 takes the N steps F of an ODE solver from the first one on, one a pass. Core k
starts a pass after core k - 1, at step i_k, from a coarse step G of that core: one step
of DDIM from i_{k-1}. When core k - 1 arrives at step b, where core k began, the coarse
step from there to the next state of core k is replaced,

    x^k_{j+1} = F_j(x^k_j) + G_{b, j+1}(x^{k-1}_b) - G_{b, j+1}(x^k_b),

and core k begins anew at j + 1. The last of K cores ends after K - 1 + N - i_{K-1}
passes; core 0, which is the sequential sampler, ends last, after N (arXiv:2507.15260;
the order of updates is that of the authors' program, github.com/hanjq17/CHORDS).
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sdiff_jax import registry
from sdiff_jax.contrib import parareal
from sdiff_jax.fields import Index, Range
from sdiff_jax.samplers import tableau as tableau_lib
from sdiff_jax.samplers._ring_buffer import RingBuffer, map_slots, wide
from sdiff_jax.samplers._samples import Samples
from sdiff_jax.samplers.tableau import TOLERANCE_UNIT, SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, Json, PRNGKey

# Number of cores -> where they start, in fiftieths of the steps. Those of 8 cores are the
# authors'; those of 4 double in the same way.
STARTS = {1: (0,), 2: (0, 16), 4: (0, 8, 16, 32), 8: (0, 2, 4, 8, 16, 24, 32, 40)}


class Plan(NamedTuple):
  """What each of K cores does in each of N passes.

  Attributes:
    position: the step that it evaluates, int [N, K].
    begin: the step where it began, int [N, K].
    active: whether it takes a step, bool [N, K].
    rectified: whether core k - 1 is where it began, bool [N, K].
    started: whether core k - 1 starts it, bool [N, K].
  """

  position: np.ndarray
  begin: np.ndarray
  active: np.ndarray
  rectified: np.ndarray
  started: np.ndarray


def starts(num_steps: int, num_cores: int) -> np.ndarray:
  """Returns the first step of each core, int [K].

  Args:
    num_steps: number of solver steps N.
    num_cores: number of cores K, a key of `STARTS`.

  Raises:
    ValueError: another number, or steps that are too few for so many cores.

  Example:
    >>> starts(50, 4)
    array([ 0,  8, 16, 32])
  """
  if num_cores not in STARTS:
    raise ValueError(
      f"window={num_cores}: must be one of {', '.join(map(str, STARTS))} cores"
    )
  first = np.round(np.array(STARTS[num_cores]) * num_steps / 50).astype(int)
  if (np.diff(first, append=num_steps + 1) < 2).any():
    raise ValueError(f"window={num_cores}: too many cores for {num_steps} solver steps")
  return first


def plan(num_steps: int, first: np.ndarray) -> Plan:
  """Returns what cores do in every pass.

  Args:
    num_steps: number of solver steps N.
    first: first step of each core, int [K].

  Example:
    >>> plan(4, np.array([0, 2])).position.tolist()
    [[0, 1], [1, 2], [2, 3], [3, 4]]
  """
  cores, begin, rows = np.arange(len(first)), np.array(first), []
  for p in range(num_steps):
    position = first + p - cores
    active = (p >= cores) & (position < num_steps)
    left = np.roll(np.where(active, position, -1), 1)
    rectified = active & (cores > 0) & (left == begin)
    rows.append((position, begin, active, rectified, cores == p + 1))
    begin = np.where(rectified, position + 1, begin)
  return Plan(*map(np.stack, zip(*rows, strict=True)))


def check_options(tableau: SolverTableau, options: dict[str, Json]) -> dict[str, Json]:
  """Returns the options of `run`; without a window there are 4 cores.

  Args:
    tableau: the solver.
    options: by name.

  Raises:
    ValueError: a solver with noise or history, or an option that does not fit.
  """
  if tableau.uses_noise or tableau.uses_noise_before or tableau.memory > 1:
    raise ValueError(
      "name: chords needs a solver without noise and without history, such as ddim"
    )
  num_cores = options["window"] or 4
  starts(tableau.evaluations, num_cores)
  return options | {"window": num_cores}


@registry.register("samplers", "chords", prefix="chords", check=check_options)
def run(
  denoiser: Denoiser,
  tableau: SolverTableau,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  *,
  window: Index = 0,
  tolerance: Annotated[float | Array, Range(0)] = 0.1,
  max_ends: Index = 0,
  sharding: NamedSharding | None = None,
) -> Samples:
  """Returns the last state of an ODE solver's recurrence, as CHORDS approximates it.

  Args:
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...]; N = B window.
    tableau: the solver, without noise and without history.
    x: initial states, [B, ...].
    keys: unused, because there is no noise.
    cond: conditions, leading [B].
    window: number of cores K, a key of `STARTS`.
    tolerance: largest change of the end from one core to the next slower one, as a root
      mean square, in units of `TOLERANCE_UNIT` standard deviations of the data.
    max_ends: number of cores whose end is waited for at most; 1 is the fastest one, as
      in the paper, and 0 all of them.
    sharding: of the axes [B, K]; None on one device.

  Returns:
    Samples; `error` is the last change, infinite after one end.

  Raises:
    ValueError: see `check_options`.

  Example:
    >>> from sdiff_jax.samplers import sequential, solvers
    >>> tableau = solvers.build(sigma_d=0.5, name="ddim", steps=50)
    >>> keys = sequential.keys_from_seeds(np.arange(2))
    >>> x = sequential.sample_prior(tableau, keys, (2, 2))
    >>> denoise = lambda x, time, cond: 0.1 * x
    >>> run(denoise, tableau, x, keys, None, window=8, max_ends=1).num_iterations
    Array([17, 17], dtype=int32)
  """
  del keys
  check_options(tableau, {"window": window})
  steps, first = tableau.evaluations, starts(tableau.evaluations, window)
  rows = jax.tree.map(jnp.asarray, plan(steps, first))
  ring = RingBuffer(window, sharding)
  evaluate = map_slots(ring, denoiser, cond)
  columns = tableau.coefficients(x.dtype), jnp.asarray(tableau.time, x.dtype)
  coarse = [jnp.asarray(v, x.dtype) for v in parareal.composed_steps(tableau)]
  previous = np.append(0, first[:-1])
  start = [wide(v[previous, first][None], x.ndim + 1) for v in coarse]

  def advance(p: Array, states: Array, begin: list[Array]) -> tuple:
    """Returns the states after pass p, [B, K, ...], and where cores began."""
    now = jax.tree.map(lambda v: v[p], rows)

    def where(mask: Array, new: Array, old: Array) -> Array:
      return jnp.where(wide(mask[None], new.ndim), new, old)

    at = jnp.clip(now.position, 0, steps - 1)
    coefficients, time = jax.tree.map(lambda v: v[at], columns)
    d = evaluate(states, jnp.broadcast_to(time[None], states.shape[:2]))
    fresh = now.position == now.begin
    begin = [where(fresh, *pair) for pair in zip((states, d), begin, strict=True)]
    coefficients = jax.tree.map(lambda v: wide(v[None], states.ndim), coefficients)
    fine = tableau_lib.apply_step(coefficients, [states], [d])
    left = [jnp.roll(v, 1, axis=1) for v in (states, d)]
    jump = [wide(v[now.begin, at + 1][None], states.ndim) for v in coarse]
    change = sum(c * (a - b) for c, a, b in zip(jump, left, begin, strict=True))
    new = where(now.active, where(now.rectified, fine + change, fine), states)
    begun = sum(c * v for c, v in zip(start, left, strict=True))
    return ring.with_sharding(where(now.started, begun, new)), begin

  def iterate(carry: tuple) -> tuple:
    p, states, begin, last, ends, passes, evaluations, change, finished = carry
    states, begin = advance(p, states, begin)
    active, at_end = rows.active[p], rows.position[p] == steps - 1
    at_end = at_end & active  # of one core at most
    end = jnp.sum(jnp.where(wide(at_end[None], states.ndim), states, 0), axis=1)
    squares = jnp.mean(jnp.square(end - last), tuple(range(1, x.ndim)))
    taken = at_end.any() & ~finished
    change = jnp.where(
      taken, jnp.sqrt(squares) / (TOLERANCE_UNIT * tableau.sigma_d), change
    )
    change = jnp.where(taken & (ends == 0), jnp.inf, change)
    last = jnp.where(wide(taken, end.ndim), end, last)
    passes = jnp.where(finished, passes, p + 1)
    evaluations = jnp.where(
      finished, evaluations, evaluations + active.sum(dtype=jnp.int32)
    )
    ends = ends + at_end.any().astype(ends.dtype)
    done = (change <= tolerance) | at_end[0] | (ends == (max_ends or window))
    finished = finished | taken & done
    return p + 1, states, begin, last, ends, passes, evaluations, change, finished

  states = ring.with_sharding(jnp.repeat(x[:, None], window, axis=1))
  zero, begin = jnp.zeros(len(x), jnp.int32), [jnp.zeros_like(states)] * 2
  change = jnp.zeros(len(x), x.dtype)
  p = jnp.zeros((), jnp.int32)
  carry = (p, states, begin, x, p, zero, zero, change, zero > 0)
  carry = jax.lax.while_loop(lambda carry: ~carry[-1].all(), iterate, carry)
  _, _, _, last, _, passes, evaluations, change, _ = carry
  return Samples(last, passes, evaluations, change, jnp.zeros_like(change))
