"""The result of a sampling loop."""

from collections.abc import Callable
from typing import NamedTuple

from sdiff_jax.types import Array

# Called on the host in every parallel iteration, as a preview, with (number of finished
# solver steps [B], the state there [B, ...], the denoised value there [B, ...]).
Callback = Callable[[Array, Array, Array], None]


class Samples(NamedTuple):
  """Samples, and their cost and accuracy.

  Attributes:
    x: the last states, [B, ...].
    num_iterations: sequential calls of the denoiser that a sample needed, int32 [B].
    num_evaluations: states of a sample that the denoiser was evaluated at, int32 [B].
    error: largest accepted change of a state, as a root mean square in the unit of the
      tolerance, float32 [B]; 0 for exact samplers.
    tv_bound: bound of the total variation distance to the distribution of the sequential
      sampler, float32 [B]: the sum of |change| / (2 s) over accepted states, where s is
      the standard deviation of the noise that is added to the state. It holds if each
      change is at least the remaining error (arXiv:2305.16317, section 3.3), and is
      infinite where no noise follows a change.
    states: all states of the solver's recurrence, [B, R + 1, ...], the first before its
      first step and the last `x`; None unless they were asked for.
  """

  x: Array
  num_iterations: Array
  num_evaluations: Array
  error: Array
  tv_bound: Array
  states: Array | None = None
