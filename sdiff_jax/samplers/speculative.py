"""Speculative sampling of a solver with noise: exact in distribution, no tolerance.

The states of a window are a draft: each was produced from the one before it with a guess
of the denoised value there, and noise. An iteration evaluates the denoiser at all of
them, and accepts states in order by the reflection coupling of two Gaussians, whose
means are the draft's and the solver's (autospeculation, arXiv:2505.03983;
arXiv:2501.05370, algorithm 4). The distribution of the samples is therefore that of
`sequential`. Because the draft's noise is independent of its means, the noise of steps
after a rejected one is used again, and their next guess starts from the denoised values
of this iteration.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from sdiff_jax import registry
from sdiff_jax.fields import Index
from sdiff_jax.samplers import _sliding_window
from sdiff_jax.samplers._ring_buffer import RingBuffer, wide
from sdiff_jax.samplers._samples import Callback, Samples
from sdiff_jax.samplers._sliding_window import Iteration, Update, UpdateRule
from sdiff_jax.samplers.paradigms import secant
from sdiff_jax.samplers.tableau import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, Json, PRNGKey


def check(tableau: SolverTableau) -> None:
  """Checks that a solver adds noise in every step but the last.

  Args:
    tableau: the solver.

  Raises:
    ValueError: it does not.

  Example:
    >>> from sdiff_jax.samplers import solvers
    >>> check(solvers.build(sigma_d=0.5, name="ddpm", steps=4))
  """
  if not (tableau.noise_coef[:-1] > 0).all():
    raise ValueError(
      "name: speculative sampling needs a solver with noise in every step but the last, "
      "such as ddpm or dpmpp2m_sde"
    )


def check_options(tableau: SolverTableau, options: dict[str, Json]) -> dict[str, Json]:
  """Returns the options of `run` if they fit a solver; a window of 0 is unset.

  Args:
    tableau: the solver.
    options: by name.

  Raises:
    ValueError: a solver without noise, or a window that does not fit.
  """
  if options["window"]:
    _sliding_window.check_window(tableau, options["window"])
  check(tableau)
  return options


@registry.register(
  "samplers", "speculative", prefix="spec", check=check_options, exact=True
)
def run(
  denoiser: Denoiser,
  tableau: SolverTableau,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  *,
  window: Index = 0,
  max_iterations: Index = 0,
  sharding: NamedSharding | None = None,
  callback: Callback | None = None,
  record: bool | None = None,
) -> Samples:
  """Draws from the distribution of `sequential.sample`; the error is 0.

  Args:
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...]; N = B window.
    tableau: the solver; every step but the last has noise.
    x: initial states, [B, ...] (see `sequential.sample_prior`).
    keys: one key a sample, [B].
    cond: conditions, leading [B].
    window: number of steps that are verified at once.
    max_iterations: see `_sliding_window.sliding_window`; 0 for no bound.
    sharding: of the axes [B, W]; None on one device.
    callback: a preview (see `Callback`); None for none.
    record: whether all states are returned.

  Returns:
    Samples, with their cost.

  Raises:
    ValueError: a window that does not fit, or a solver without noise.

  Example:
    >>> import numpy as np
    >>> from sdiff_jax.samplers import sequential, solvers
    >>> tableau = solvers.build(sigma_d=0.5, name="ddpm", steps=8)
    >>> keys = sequential.keys_from_seeds(np.arange(3))
    >>> x = sequential.sample_prior(tableau, keys, (2, 2))
    >>> run(lambda x, time, cond: 0 * x, tableau, x, keys, None, window=4).x.shape
    (3, 2, 2)
  """
  check(tableau)
  ring = RingBuffer(window, sharding)

  def uniform(key: PRNGKey, i: Array) -> Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, i + 1), 1))

  def improve(now: Iteration) -> Update:
    steps = now.begin[:, None] + now.offset
    u = jax.vmap(jax.vmap(uniform, in_axes=(None, 0)))(keys, steps)
    assert now.z is not None
    assert now.step.noise is not None
    accepted, drawn = reflection_coupling(now.phi, now.old, now.step.noise, now.z, u)
    last = jnp.minimum(window, tableau.evaluations - now.begin)[:, None] - 1
    # The last step has no draft yet: its Phi is a draw from the solver's Gaussian.
    drawn = jnp.where(wide(now.offset == last, drawn.ndim), now.phi, drawn)
    finished = jnp.where(accepted | (now.offset > last), last, now.offset)
    stride = 1 + jnp.min(finished, axis=1)
    # Distance to the last accepted step.
    ahead = wide(now.offset - (stride - 1)[:, None], drawn.ndim)
    factors = [jnp.where(ahead > 0, factor, 0) for factor in now.factors]
    phi = jnp.where(ahead > 0, now.phi, jnp.where(ahead == 0, drawn, now.old))
    new = _sliding_window.propagate_change(ring, factors, phi, now.old)
    zero = jnp.zeros(len(stride), x.dtype)
    return Update(new, stride, zero, zero)

  return _sliding_window.sliding_window(
    denoiser,
    tableau,
    x,
    keys,
    cond,
    ring=ring,
    rule=UpdateRule(secant, improve),
    callback=callback,
    max_iterations=max_iterations,
    record=bool(record),
  )


def reflection_coupling(
  phi: Array, draft: Array, s: Array, z: Array, u: Array
) -> tuple[Array, Array]:
  """Couples N(phi - s z, s^2) with the draft, a draw by the same z, by reflection.

  With D = (phi - draft) / s, the distance of the means, a draft is accepted where
  ln u <= z . D - |D|^2 / 2, and reflected otherwise: phi - 2 s D (D . z) / |D|^2.

  Args:
    phi: mean of the solver's Gaussian, plus s z, [B, W, ...].
    draft: mean of the draft's Gaussian, plus s z, [B, W, ...].
    s: standard deviation, [B, W, 1, ...].
    z: standard normal, [B, W, ...].
    u: uniform in [0, 1), [B, W].

  Returns:
    Whether the draft is a draw from the solver's Gaussian [B, W], and a draw for where
    it is not, [B, W, ...].
  """
  axes = tuple(range(2, phi.ndim))
  distance = (phi - draft) / jnp.where(s > 0, s, 1)
  dot, square = (jnp.sum(distance * v, axes, keepdims=True) for v in (z, distance))
  accepted = jnp.log(u) <= (dot - square / 2).reshape(u.shape)
  reflected = phi - 2 * s * distance * dot / jnp.where(square > 0, square, 1)
  return accepted, reflected
