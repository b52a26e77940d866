"""The loop of parallel samplers: a window over solver steps, all evaluated at once.

An iteration evaluates the denoiser at all states of the window with one call. Let Phi_i
be solver step i. A change of a state is propagated to the states after it by

    new_{i+1} = Phi_i(old) + A_i (new_i - old_i) + A'_i (new_{i-1} - old_{i-1}) + ...,

and the window moves to the first state that is not accepted. `paradigms` and
`speculative` define A and which states are accepted. The first state of a window is that
of the sequential sampler, so Phi of it is too: each iteration finishes at least one
step.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdiff_jax.samplers import _secant, sequential
from sdiff_jax.samplers import tableau as tableau_lib
from sdiff_jax.samplers._ring_buffer import (
  RingBuffer,
  first_state,
  gather_slot,
  map_slots,
  product,
  put_states,
  slot_offset,
  solve,
  wide,
)
from sdiff_jax.samplers._samples import Callback, Samples
from sdiff_jax.samplers._secant import Secants
from sdiff_jax.samplers.tableau import SolverTableau, StepCoefficients
from sdiff_jax.types import Array, Cond, Denoiser, PRNGKey


class WindowState(NamedTuple):
  """The window of each sample; state i of [begin, begin + W) is in slot i mod W.

  Attributes:
    begin: number of finished steps, int32 [B].
    x: states, [B, W, ...].
    z: noise after the evaluation of the steps that start there, [B, W, ...]; None for a
      solver without it.
    z_before: noise before the evaluation, [B, W, ...]; None for a solver without it.
    previous_x: x_hat of the state before `begin`, [B, ...]; None if unused.
    history: denoised values at the states before `begin`, the last first, H - 1 times
      [B, ...].
    secants: of the last iteration.
    finished: the states before `begin` and `begin` itself, [B, R + 1, ...], in order;
      None unless they are recorded.
  """

  begin: Array
  x: Array
  z: Array | None
  z_before: Array | None
  previous_x: Array | None
  history: list[Array]
  secants: Secants
  finished: Array | None


class Iteration(NamedTuple):
  """The solver steps of a window after their evaluation; arrays are [B, W, ...].

  Attributes:
    begin: number of finished steps, int32 [B].
    offset: position of the step in the window, 0 for step `begin`, int32 [B, W].
    step: coefficients of the steps.
    old: the current values of the states that the steps produce; meaningless at the last
      position.
    phi: what the steps produce.
    z: noise of the steps; None for a solver without noise.
    factors: A, A', ..., as many as the solver's `memory`; 0 where the ring is cut.
  """

  begin: Array
  offset: Array
  step: StepCoefficients
  old: Array
  phi: Array
  z: Array | None
  factors: list[Array]


class Update(NamedTuple):
  """How an iteration changes a window.

  Attributes:
    new: new states, in the slots of the steps that produce them, [B, W, ...].
    stride: number of steps that are accepted, at most those that are left, int32 [B].
    error: largest accepted change, [B].
    tv: total variation bound of the accepted changes, [B].
  """

  new: Array
  stride: Array
  error: Array
  tv: Array


class UpdateRule(NamedTuple):
  """How a window is improved.

  Attributes:
    factors: (coefficients, slopes: dd/dx of x_i, of x_{i-1}, ..., `memory` times
      [B, W, ...]) -> [A, A', ...], which broadcast against the slopes.
    improve: computes the update of a window from its evaluated steps.
    published: fill the window with copies of its last state, and forget the denoised
      values before it, as arXiv:2305.16317 does; otherwise new states are rolled out
      with their own noise and the last denoised value, which changes by the gain.
  """

  factors: Callable[[StepCoefficients, list[Array]], list[Array]]
  improve: Callable[[Iteration], Update]
  published: bool = False


def check_window(
  tableau: SolverTableau, window: int, ring: RingBuffer | None = None
) -> None:
  """Checks that a window fits a solver, and the devices of a ring.

  Raises:
    ValueError: it does not.
  """
  if not 1 <= window <= tableau.evaluations:
    raise ValueError(
      f"window={window}: must be in 1 to {tableau.evaluations}, the number of solver "
      "steps"
    )
  if ring is not None and window % ring.num_shards(1):
    raise ValueError(
      f"window={window}: does not divide over the {ring.num_shards(1)} devices of the "
      "mesh axis window"
    )


def sliding_window(
  denoiser: Denoiser,
  tableau: SolverTableau,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  *,
  ring: RingBuffer,
  rule: UpdateRule,
  callback: Callback | None = None,
  max_iterations: int = 0,
  record: bool = False,
) -> Samples:
  """Returns the last state of a solver's recurrence, by one loop on the device.

  Args:
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...]; N = B W.
    tableau: the solver.
    x: initial states, [B, ...] (see `sequential.sample_prior`).
    keys: one key a sample, [B]; unused by a solver without noise.
    cond: conditions, leading [B].
    ring: the window; every sample has its own.
    rule: how the window is improved.
    callback: a preview (see `Callback`); None for none.
    max_iterations: upper bound of the number of iterations. A sample that is not
      finished by then is the denoised value of the last state that was evaluated in its
      window; 0 for no bound.
    record: whether all states are returned; those after the last finished one are 0.

  Returns:
    Samples, with their cost and accuracy.

  Raises:
    ValueError: a window that does not fit the solver or the devices.
  """
  check_window(tableau, ring.window, ring)
  steps = _WindowSteps(ring, tableau, keys, rule)
  evaluate = map_slots(ring, denoiser, cond)

  def iterate(carry: tuple[WindowState, Samples]) -> tuple[WindowState, Samples]:
    window, result = carry
    d = evaluate(steps.noised(window), steps.time(window))
    if callback is not None:
      first = slot_offset(ring, window.begin) == 0
      jax.debug.callback(
        callback, window.begin, gather_slot(window.x, first), gather_slot(d, first)
      )
    return steps.improve(window, result, d)

  def unfinished(carry: tuple[WindowState, Samples]) -> Array:
    window, result = carry
    unfinished = window.begin < tableau.evaluations
    if max_iterations:
      unfinished &= result.num_iterations < max_iterations
    return jnp.any(unfinished)

  window, result = jax.lax.while_loop(unfinished, iterate, steps.start(x, record))
  last = gather_slot(window.x, slot_offset(ring, window.begin) == 0)
  if 0 < max_iterations < tableau.evaluations:
    finished = wide(window.begin >= tableau.evaluations, x.ndim)
    denoised = gather_slot(window.secants.denoised, steps.last_evaluated(window))
    last = jnp.where(finished, last, denoised)
  return result._replace(x=last, states=window.finished)


def propagate_change(
  ring: RingBuffer, factors: list[Array], phi: Array, old: Array
) -> Array:
  """Returns the new states by the recurrence of the module, in the slots of their steps.

  Args:
    ring: the slots.
    factors: A, A', ..., [B, W, ...] each; 0 where the ring is cut.
    phi: what the steps produce, [B, W, ...].
    old: the current values of the states that they produce, [B, W, ...].
  """
  delta = solve(ring, factors, phi - old)
  previous = [jnp.roll(delta, n + 1, axis=1) for n in range(len(factors))]
  return phi + product(factors, previous)


class _WindowSteps(NamedTuple):
  """The computations of an iteration other than the denoiser."""

  ring: RingBuffer
  tableau: SolverTableau
  keys: PRNGKey
  rule: UpdateRule

  def coefficients(self, i: Array, like: Array) -> StepCoefficients:
    """Returns the coefficients of steps i [B, W], [B, W, 1, ...]."""
    i = jnp.clip(i, 0, self.tableau.evaluations - 1)
    columns = self.tableau.coefficients(like.dtype)
    return jax.tree.map(lambda column: wide(column[i], like.ndim), columns)

  def time(self, window: WindowState) -> Array:
    """Returns the denoiser's time argument in each slot, [B, W]."""
    i = window.begin[:, None] + slot_offset(self.ring, window.begin)
    time = jnp.asarray(self.tableau.time, window.x.dtype)
    return time[jnp.minimum(i, self.tableau.evaluations - 1)]

  def noised(self, window: WindowState) -> Array:
    """Returns the states x_hat that are evaluated, [B, W, ...]."""
    if not self.tableau.uses_noise_before:
      return window.x
    i = window.begin[:, None] + slot_offset(self.ring, window.begin)
    step = self.coefficients(i, window.x)
    return tableau_lib.add_noise(step, window.x, window.z_before)

  def last_evaluated(self, window: WindowState) -> Array:
    """Returns the slot of the last step that the last iteration evaluated, [B, W]."""
    begin = window.begin - (self.ring.window - window.secants.num_seen)
    end = jnp.minimum(begin + self.ring.window, self.tableau.evaluations)
    return slot_offset(self.ring, begin) == (end - begin - 1)[:, None]

  def noise(
    self, begin: Array, shape: tuple[int, ...]
  ) -> tuple[Array | None, Array | None]:
    """Returns z and z_before of the steps of a window, [B, W, *shape] each."""

    def draw(noise: Callable[..., Array]) -> Array:
      one = lambda key, i: noise(key[None], i, shape)[0]  # noqa: E731
      steps = begin[:, None] + slot_offset(self.ring, begin)
      z = jax.vmap(jax.vmap(one, in_axes=(None, 0)))(self.keys, steps)
      return self.ring.with_sharding(z)

    return (
      draw(sequential.noise) if self.tableau.uses_noise else None,
      draw(sequential.noise_before) if self.tableau.uses_noise_before else None,
    )

  def start(self, x: Array, record: bool) -> tuple[WindowState, Samples]:
    """Returns the first window, rolled out as for Gaussian data."""
    zero, nothing = jnp.zeros(len(x), jnp.int32), jnp.zeros_like(x)
    repeated = jnp.repeat(x[:, None], self.ring.window, axis=1)
    states = self.ring.with_sharding(repeated)
    ratio = wide(jnp.ones(len(x), x.dtype), x.ndim)
    window = WindowState(
      zero,
      states,
      *self.noise(zero, x.shape[1:]),
      previous_x=x if self.tableau.uses_previous_state else None,
      history=[nothing] * (self.tableau.history - 1),
      secants=Secants(states, states, zero, ratio),
      finished=first_state(x, self.tableau.evaluations) if record else None,
    )
    window = window._replace(x=self.roll_out(window, zero, nothing))
    return window, Samples(x, zero, zero, *[jnp.zeros(len(x), x.dtype)] * 2)

  def improve(
    self, window: WindowState, result: Samples, d: Array
  ) -> tuple[WindowState, Samples]:
    """Updates the states by their denoised values, and moves the window."""
    tableau, width = self.tableau, self.ring.window
    offset = slot_offset(self.ring, window.begin)
    step = self.coefficients(window.begin[:, None] + offset, d)
    x_hat = tableau_lib.add_noise(step, window.x, window.z_before)
    states, denoised = self.histories(window, offset, x_hat, d)
    phi = tableau_lib.apply_step(step, states, denoised, window.z)
    slope, ratio = _secant.estimate_slopes(window.secants, window.x, d, offset, step)
    slopes = [jnp.roll(slope, n, axis=1) for n in range(tableau.memory)]
    factors = self.rule.factors(step, slopes)
    factors = [
      jnp.where(wide(offset <= n, d.ndim), 0, factor)
      for n, factor in enumerate(factors)
    ]
    old = jnp.roll(window.x, -1, axis=1)
    update = self.rule.improve(
      Iteration(window.begin, offset, step, old, phi, window.z, factors)
    )
    stride, remaining = update.stride, tableau.evaluations - window.begin
    result = Samples(
      result.x,
      result.num_iterations + (remaining > 0).astype(jnp.int32),
      result.num_evaluations + jnp.clip(remaining, 0, width),
      jnp.maximum(result.error, update.error),
      result.tv_bound + update.tv,
    )
    is_last = offset == (stride - 1)[:, None]  # of the accepted steps
    new = jnp.roll(update.new, 1, axis=1)  # in the slots of the states themselves
    previous_x = None
    if tableau.uses_previous_state:
      accepted = jnp.where(wide(offset == 0, d.ndim), window.x, new)
      accepted = tableau_lib.add_noise(step, accepted, window.z_before)
      previous_x = gather_slot(accepted, is_last)
    moved = WindowState(
      window.begin + stride,
      new,
      *self.noise(window.begin + stride, d.shape[2:]),
      previous_x=previous_x,
      history=[gather_slot(value, is_last) for value in denoised[:-1]],
      secants=Secants(window.x, d, width - stride, ratio),
      finished=put_states(window.finished, window.begin, offset, stride, update.new),
    )
    shift = gather_slot(d - step.gain * window.x, offset == width - 1)
    moved = moved._replace(x=self.roll_out(moved, window.begin + width, shift))
    keep = lambda a, b: jnp.where(wide(stride > 0, a.ndim), a, b)  # noqa: E731
    return jax.tree.map(keep, moved, window), result

  def histories(
    self, window: WindowState, offset: Array, x_hat: Array, d: Array
  ) -> tuple[list[Array], list[Array]]:
    """Returns [x_hat_i, x_hat_{i-1}] and [d_i, d_{i-1}, ...], [B, W, ...] each."""
    first = wide(offset == 0, d.ndim)

    def previous(value: Array, before: Array) -> Array:
      return jnp.where(first, before[:, None], jnp.roll(value, 1, axis=1))

    states, denoised = [x_hat], [d]
    if window.previous_x is not None:
      states.append(previous(x_hat, window.previous_x))
    for n, before in enumerate(window.history):
      denoised.append(previous(denoised[-1], before))
      if self.rule.published and n == 0:  # the first step is of first order
        denoised[-1] = jnp.where(first, d, denoised[-1])
    return states, denoised

  def roll_out(self, window: WindowState, last_known: Array, shift: Array) -> Array:
    """Returns the states, those after `last_known` [B] made with d = gain x + shift.

    Args:
      window: with its states up to `last_known`.
      last_known: index of a state, int32 [B].
      shift: [B, ...].
    """
    ndim, offset = window.x.ndim, slot_offset(self.ring, window.begin)
    i = window.begin[:, None] + offset  # of the state, which step i - 1 produces
    known = wide(i <= last_known[:, None], ndim)
    step = self.coefficients(i - 1, window.x)
    if self.rule.published:  # x_{i+1} = x_i
      zeros = jax.tree.map(jnp.zeros_like, step)
      step = zeros._replace(x=[jnp.ones_like(step.x[0]), *zeros.x[1:]])
    weight = sum(step.denoised[1:], step.denoised[0])
    new = weight * shift[:, None]
    if window.z is not None and step.noise is not None:
      new += step.noise * jnp.roll(window.z, 1, axis=1)
    factor = step.x[0] + weight * step.gain
    factors = [jnp.where(known, 0, factor)]
    second = wide(offset == 1, ndim)  # the state whose x_{i-2} has left the window
    if window.previous_x is not None:
      new += jnp.where(second, step.x[1] * window.previous_x[:, None], 0)
      factors.append(jnp.where(known | second, 0, step.x[1]))
    if window.z_before is not None and step.noise_before is not None:
      added = step.noise_before * jnp.roll(window.z_before, 1, axis=1)  # by step i - 1
      new += factor * added
      if self.tableau.uses_previous_state:
        new += jnp.where(second, 0, step.x[1] * jnp.roll(added, 1, axis=1))
    return solve(self.ring, factors, jnp.where(known, window.x, new))
