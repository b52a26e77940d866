"""Solvers of the reverse process as arrays of coefficients.

Step i of a solver takes state x_i to x_{i+1} with one evaluation of the denoiser. It
adds noise, evaluates, and combines the last states and denoised values linearly:

    x_hat_i = x_i + noise_before_i z'_i,
    d_i     = denoiser(x_hat_i, time_i),
    x_{i+1} = x_coef_i0 x_hat_i + x_coef_i1 x_hat_{i-1}
              + sum_n denoised_coef_in d_{i-n} + noise_coef_i z_i,

with independent z_i, z'_i ~ N(0, I). A solver with two evaluations for each step of its
noise schedule has two such steps (stages). Coefficients are computed once, on the host,
in float64, so every sampling loop can run every solver.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.diffusion import trigflow
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.types import Array, Cond, Denoiser

# The unit of tolerances and errors, in standard deviations of the data. It is about the
# noise of one step of DDPM with 100 steps, so 0.1 is a common tolerance.
TOLERANCE_UNIT = 0.1


class StepCoefficients(NamedTuple):
  """Coefficients of solver steps as device arrays that broadcast against states.

  Attributes:
    x: of x_hat_i and x_hat_{i-1}.
    denoised: of d_i, d_{i-1}, ..., as many as the solver's `memory`.
    noise: of z_i; None for a solver that adds no noise after the evaluation.
    noise_before: of z'_i; None for a solver that adds no noise before the evaluation.
    alpha: see `SolverTableau`.
    gain: see `SolverTableau`.
  """

  x: list[Array]
  denoised: list[Array]
  noise: Array | None
  noise_before: Array | None
  alpha: Array
  gain: Array


class SolverTableau(NamedTuple):
  """The coefficients of R solver steps, and what loops need to know of each step.

  Attributes:
    x_coef: coefficients of x_hat_i and x_hat_{i-1}, float64 [R, 2].
    denoised_coef: coefficients of d_i, d_{i-1}, ..., d_{i-H+1}, float64 [R, H].
    noise_coef: standard deviation of the noise after the evaluation, float64 [R].
    noise_before: standard deviation of the noise before the evaluation, float64 [R].
    time: the time that the denoiser is given, float64 [R].
    alpha: the signal coefficient of the state that is evaluated, float64 [R]; an exact
      denoiser has 0 <= dd/dx <= 1 / alpha.
    gain: dd/dx for Gaussian data with standard deviation sigma_d, float64 [R]; a first
      guess.
    scale: standard deviation of the next state given this state and x0, float64 [R];
      0 in a step to clean data.
    init_std: standard deviation of the first state.
    sigma_d: standard deviation of the data, approximately.
    starts: whether a step of the noise schedule starts at the state, bool [R]; the others
      are stages inside a step.
    end_time: the time of the state that a flow map is asked for, float64 [R]; None for
      solvers that know one time.
  """

  x_coef: np.ndarray
  denoised_coef: np.ndarray
  noise_coef: np.ndarray
  noise_before: np.ndarray
  time: np.ndarray
  alpha: np.ndarray
  gain: np.ndarray
  scale: np.ndarray
  init_std: float
  sigma_d: float
  starts: np.ndarray
  end_time: np.ndarray | None = None

  @property
  def evaluations(self) -> int:
    """The number of solver steps R, each with one evaluation of the denoiser."""
    return len(self.time)

  @property
  def uses_previous_state(self) -> bool:
    """Whether some step depends on x_hat_{i-1}."""
    return bool(self.x_coef[:, 1].any())

  @property
  def uses_noise(self) -> bool:
    """Whether some step adds noise after its evaluation."""
    return bool(self.noise_coef.any())

  @property
  def uses_noise_before(self) -> bool:
    """Whether some step adds noise before its evaluation."""
    return bool(self.noise_before.any())

  @property
  def history(self) -> int:
    """The number of denoised values H that a step combines."""
    return self.denoised_coef.shape[1]

  @property
  def memory(self) -> int:
    """The number of states that x_{i+1} depends on, directly or by a denoised value."""
    return max(1 + self.uses_previous_state, self.history)

  @property
  def grid(self) -> np.ndarray:
    """The times of the states between the steps of the noise schedule, float64 [N + 1]."""
    return np.append(self.time[self.starts], 0.0)

  def of_grid(self, states: Array) -> Array:
    """Returns the states [B, N + 1, ...] at the times of `grid`, without stages.

    Args:
      states: all states, [B, R + 1, ...] (see `Samples`).
    """
    return states[:, np.append(np.flatnonzero(self.starts), self.evaluations)]

  def coefficients(self, dtype: jnp.dtype) -> StepCoefficients:
    """Returns the coefficients as device arrays [R] of a dtype.

    Args:
      dtype: of the arrays.
    """
    missing = np.zeros((self.evaluations, self.memory - self.history))
    columns = (
      [*self.x_coef.T],
      [*self.denoised_coef.T, *missing.T],
      self.noise_coef if self.uses_noise else None,
      self.noise_before if self.uses_noise_before else None,
      self.alpha,
      self.gain,
    )
    arrays = jax.tree.map(lambda column: jnp.asarray(column, dtype), columns)
    return StepCoefficients(*arrays)

  def with_end_time(self, denoiser: Denoiser) -> Denoiser:
    """Returns a denoiser that is given the end time of a step as a condition.

    Args:
      denoiser: (x [N, ...], time [N], cond) -> estimate of x0 [N, ...].
    """
    if self.end_time is None:
      return denoiser
    times, ends = self.time, self.end_time

    def call(x: Array, time: Array, cond: Cond) -> Array:
      # The times are distinct, and each is one of the steps'.
      distance = jnp.abs(time[:, None] - jnp.asarray(times, time.dtype)[None])
      end = jnp.asarray(ends, time.dtype)[jnp.argmin(distance, axis=1)]
      return denoiser(x, time, trigflow.with_end_time(cond, end))

    return call

  def scaled(self, temperature: float) -> "SolverTableau":
    """Returns the solver with its first state and all noise times a temperature."""
    return self._replace(
      noise_coef=temperature * self.noise_coef,
      noise_before=temperature * self.noise_before,
      init_std=temperature * self.init_std,
    )


class SolverStep(NamedTuple):
  """One step of a solver, from which `assemble` makes a tableau.

  Attributes:
    index: the step of the noise schedule that it belongs to.
    x: coefficients of x_hat_i and, if there is a second, of x_hat_{i-1}.
    denoised: coefficients of d_i, d_{i-1}, ...
    noise: coefficient of the noise after the evaluation.
    noise_before: coefficient of the noise before the evaluation.
    point: (alpha, sigma, time) of the evaluation; None for the start of the schedule's
      step.
  """

  index: int  # type: ignore[assignment]  # of the step, not tuple.index
  x: Sequence[float]
  denoised: Sequence[float]
  noise: float = 0.0
  noise_before: float = 0.0
  point: tuple[float, float, float] | None = None


def posterior_std(schedule: NoiseSchedule) -> np.ndarray:
  """Returns sigma' (1 - (alpha sigma' / (alpha' sigma))^2)^(1/2), float64 [N].

  It is the standard deviation of x' given x and x0, the noise of DDPM
  (arXiv:2006.11239, eq. 7); alpha' and sigma' are those at the end of a step.

  Args:
    schedule: N steps.
  """
  ratio = schedule.alpha * schedule.sigma_next / (schedule.alpha_next * schedule.sigma)
  return schedule.sigma_next * (1 - ratio**2) ** 0.5


def assemble(schedule: NoiseSchedule, steps: Sequence[SolverStep]) -> SolverTableau:
  """Returns the tableau of solver steps on a noise schedule.

  Args:
    schedule: the noise levels.
    steps: the R solver steps, in order.

  Example:
    >>> from sdiff_jax.diffusion import noise_schedules
    >>> schedule = noise_schedules.edm(np.array([2.0, 1.0, 0.0]))
    >>> euler = [SolverStep(0, [0.5], [0.5]), SolverStep(1, [0.0], [1.0])]
    >>> assemble(schedule, euler).x_coef
    array([[0.5, 0. ],
           [0. , 0. ]])
  """
  index = [step.index for step in steps]
  starts = [*zip(schedule.alpha, schedule.sigma, schedule.time, strict=True)]
  points = [step.point or starts[step.index] for step in steps]
  alpha, sigma, time = np.array(points, np.float64).T
  denoised = _matrix([step.denoised for step in steps])
  used = np.flatnonzero(denoised.any(axis=0))
  return SolverTableau(
    _matrix([step.x for step in steps], 2),
    denoised[:, : 1 + max(used, default=0)],
    np.array([step.noise for step in steps], np.float64),
    np.array([step.noise_before for step in steps], np.float64),
    time,
    alpha,
    gain=alpha * schedule.sigma_d**2 / ((alpha * schedule.sigma_d) ** 2 + sigma**2),
    scale=posterior_std(schedule)[index],
    init_std=float(schedule.sigma[0]),
    sigma_d=schedule.sigma_d,
    starts=np.diff(index, prepend=-1) > 0,
  )


def _matrix(vectors: Sequence[Sequence[float]], width: int = 0) -> np.ndarray:
  """Returns vectors as rows of one array, filled up with zeros."""
  matrix = np.zeros((len(vectors), max(width, *map(len, vectors), 1)))
  for row, vector in zip(matrix, vectors, strict=True):
    row[: len(vector)] = vector
  return matrix


def apply_step(
  coefficients: StepCoefficients,
  x: Sequence[Array],
  denoised: Sequence[Array],
  z: Array | None = None,
) -> Array:
  """Returns x_{i+1} of the recurrence, rounded in the same way in every program.

  A compiler may fuse a product into the sum that follows, which rounds once instead of
  twice, and what it fuses depends on the surrounding program. Products are therefore
  kept apart from their sums, and the sum runs from left to right.

  Args:
    coefficients: of the steps; they broadcast against the states.
    x: x_hat_i and, if the solver uses it, x_hat_{i-1}, [...] each.
    denoised: d_i, d_{i-1}, ..., [...] each.
    z: noise of unit variance, [...]; unused by a solver without noise.

  Returns:
    The next state, [...].
  """
  terms = [c * v for c, v in zip(coefficients.x, x, strict=False)]
  terms += [c * v for c, v in zip(coefficients.denoised, denoised, strict=False)]
  if coefficients.noise is not None:
    assert z is not None
    terms.append(coefficients.noise * z)
  return functools.reduce(jnp.add, [_keep_apart(term) for term in terms])


def add_noise(
  coefficients: StepCoefficients, x: Array, z_before: Array | None
) -> Array:
  """Returns x_hat_i = x_i + noise_before_i z'_i, rounded as in `apply_step`.

  Args:
    coefficients: of the steps; they broadcast against the states.
    x: states, [...].
    z_before: noise of unit variance, [...]; unused by a solver without such noise.
  """
  if coefficients.noise_before is None:
    return x
  assert z_before is not None
  return x + _keep_apart(coefficients.noise_before * z_before)


def _keep_apart(product: Array) -> Array:
  """Returns a product behind an operation that no compiler fuses it through."""
  return jnp.maximum(product, jnp.finfo(product.dtype).min)
