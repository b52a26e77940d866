"""Samplers by name: a solver's tableau, and the loop that runs its steps.

The name of a sampler is that of a solver, whose steps then run sequentially, or that of
a solver behind the prefix of a parallel loop: paraddpm, paraddim, paradpmpp2m, paraheun
(ParaDiGMS), specddpm (speculative sampling), srdsddim (parareal).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdiff_jax import fields
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.distributed import sharding as sharding_lib
from sdiff_jax.samplers import _names, sequential, solvers
from sdiff_jax.samplers._samples import Callback, Samples
from sdiff_jax.samplers.tableau import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, Json, PRNGKey

MAX_SEED = 2**31 - 1


class SamplingStats(NamedTuple):
  """The cost and the accuracy of samples, one value a sample.

  Attributes:
    num_iterations: sequential calls of the denoiser, int32 [B].
    num_evaluations: states that the denoiser was evaluated at, int32 [B].
    error: largest accepted change of a state, in the unit of the tolerance, float32
      [B]; 0 for exact samplers.
    tv_bound: bound of the total variation distance to the sequential sampler's
      distribution, float32 [B] (see `Samples`).
  """

  num_iterations: Array
  num_evaluations: Array
  error: Array
  tv_bound: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """A solver and the loop that runs its steps; made by `build`.

  Attributes:
    name: as in `names()`.
    tableau: the solver's coefficients.
    loop: the loop, a piece of the registry's kind "samplers".
    options: the loop's options: window, tolerance, ...
  """

  name: str
  tableau: SolverTableau
  loop: str
  options: Mapping[str, Json]

  @property
  def num_steps(self) -> int:
    """The number of solver steps, each with one evaluation of the denoiser."""
    return self.tableau.evaluations

  @property
  def window(self) -> int:
    """The number of steps that are evaluated at once; 0 if it is yet to be chosen."""
    return self.options.get("window", 1)

  @property
  def is_parallel(self) -> bool:
    """Whether the loop evaluates several steps at once."""
    return self.takes("window")

  def takes(self, option: str) -> bool:
    """Returns whether the sampler has an option, `mesh` and `callback` included."""
    return _names.RUNTIME.get(option, option) in _names.loop_parameters(self.loop)

  def fact(self, name: str) -> Any:
    """Returns what the loop says of itself under a name, None if it says nothing."""
    return _names.loops()[self.loop].facts.get(name)

  def replace(self, **options: Json) -> "Sampler":
    """Returns the sampler with other options of its loop.

    Raises:
      ValueError: the loop does not take an option, or not that value.
    """
    return from_tableau(self.name, self.tableau, **{**self.options, **options})

  def sequential(self) -> "Sampler":
    """Returns the sampler that runs the same steps sequentially."""
    solver = _names.lookup(self.name)[1]
    return Sampler(solver, self.tableau, _names.lookup(solver)[0], {})


def names() -> list[str]:
  """Returns the names of all samplers: every solver, alone and behind every prefix.

  Example:
    >>> {"ddim", "paraddim"} <= set(names())
    True
  """
  return sorted(_names.table())


def options(name: str) -> dict[str, Json]:
  """Returns the options that `build` takes for a sampler, with their defaults.

  Args:
    name: of the sampler.

  Raises:
    ValueError: an unknown name.

  Example:
    >>> options("heun")
    {'timesteps': (), 'temperature': 1.0}
  """
  loop, solver = _names.lookup(name)
  of_loop = {
    k: v
    for k, v in _names.loop_parameters(loop).items()
    if k not in _names.RUNTIME_ONLY
  }
  return _names.COMMON | solvers.options(solver) | of_loop


def takes(name: str, option: str) -> bool:
  """Returns whether a sampler has an option, `mesh` and `callback` included.

  Args:
    name: of the sampler.
    option: of `build` or of `sample`.

  Raises:
    ValueError: an unknown name.

  Example:
    >>> takes("paraddim", "window"), takes("ddim", "window"), takes("ddim", "eta")
    (True, False, True)
  """
  loop, _ = _names.lookup(name)
  at_run = _names.RUNTIME.get(option, option) in _names.loop_parameters(loop)
  return at_run or option in options(name)


def solver_of(name: str) -> str:
  """Returns the solver of a sampler.

  Args:
    name: of the sampler.

  Raises:
    ValueError: an unknown name.

  Example:
    >>> solver_of("paraddim")
    'ddim'
  """
  return _names.lookup(name)[1]


def build(
  name: str,
  schedule: NoiseSchedule | None = None,
  *,
  sigma_d: float | None = None,
  steps: int | None = None,
  **options: Json,
) -> Sampler:
  """Returns the sampler of a name, on a noise schedule or on the TrigFlow process.

  Args:
    name: a solver, sequential or behind the prefix of a loop (see `names`).
    schedule: noise levels at every step; None for the TrigFlow process.
    sigma_d: standard deviation of the data; of the TrigFlow process alone.
    steps: number of steps; of the TrigFlow process alone.
    **options: options of the solver and of the loop (see `options`). On the TrigFlow
      process these are also `timesteps`, the TrigFlow time at which every step starts,
      in (0, pi/2], and `temperature`, a factor of all noise.

  Raises:
    ValueError: an unknown name, an option that the sampler does not take, or a value
      that does not fit; the message starts with the name of the argument.

  Example:
    >>> sampler = build("paraddim", sigma_d=0.5, steps=50, window=16, tolerance=0.1)
    >>> sampler.num_steps, sampler.window, sampler.loop
    (50, 16, 'paradigms')
  """
  loop, solver = _names.lookup(name)
  common: dict[str, Json] = {}
  of_solver = solvers.options(solver)
  if schedule is None:
    if sigma_d is None or steps is None:
      missing = "sigma_d" if sigma_d is None else "steps"
      raise ValueError(f"{missing}: needed without a noise schedule")
    common = _names.COMMON
  elif sigma_d is not None or steps is not None:
    extra, value = ("steps", steps) if sigma_d is None else ("sigma_d", sigma_d)
    raise ValueError(f"{extra}={value}: the noise schedule determines it")
  known = common.keys() | of_solver.keys() | _names.loop_parameters(loop).keys()
  for option, value in options.items():
    if option not in known - _names.RUNTIME_ONLY:
      _names.refuse(name, option, value)
  if schedule is None:
    assert sigma_d is not None
    assert steps is not None
    of_tableau = {k: v for k, v in options.items() if k in common or k in of_solver}
    tableau = solvers.build(sigma_d=sigma_d, name=solver, steps=steps, **of_tableau)
  else:
    of_tableau = {k: v for k, v in options.items() if k in of_solver}
    tableau = solvers.from_schedule(solver, schedule, **of_tableau)
  return from_tableau(
    name, tableau, **{k: v for k, v in options.items() if k not in of_tableau}
  )


def from_tableau(name: str, tableau: SolverTableau, **options: Json) -> Sampler:
  """Returns the sampler that runs a tableau by the loop of a sampler's name.

  Args:
    name: of the sampler; its solver is not built.
    tableau: the solver's coefficients.
    **options: of the loop.

  Raises:
    ValueError: an option that the loop does not take, or a value that does not fit.

  Example:
    >>> tableau = build("ddim", sigma_d=0.5, steps=8).tableau
    >>> from_tableau("paraddim", tableau, window=4).options["window"]
    4
  """
  loop, _ = _names.lookup(name)
  piece, parameters = _names.loops()[loop], _names.loop_parameters(loop)
  for option, value in options.items():
    if option not in parameters.keys() - _names.RUNTIME_ONLY:
      _names.refuse(name, option, value)
  fields.check_all(options, fields.arguments(piece.build))
  defaults = {k: v for k, v in parameters.items() if k not in _names.RUNTIME_ONLY}
  complete = defaults | options
  if "check" in piece.facts:
    complete = piece.facts["check"](tableau, complete)
  return Sampler(name, tableau, loop, complete)


def sample(
  sampler: Sampler,
  denoiser: Denoiser,
  seeds: Array | Sequence[int],
  shape: tuple[int, ...],
  cond: Cond = None,
  *,
  x0: Array | None = None,
  mesh: Mesh | None = None,
  callback: Callback | None = None,
  coarse_denoiser: Denoiser | None = None,
  record: bool = False,
) -> Samples:
  """Returns one sample for each seed; sample k depends on seeds[k] and cond[k] alone.

  It may be called inside `jax.jit`, with seeds and conditions that are traced.

  Args:
    sampler: what `build` returned, with its window chosen.
    denoiser: (x [N, ...], time [N], cond) -> estimate of x0 [N, ...].
    seeds: integers, [B].
    shape: of one sample.
    cond: conditions by name, each with leading [B]; None for none.
    x0: data that the first states are noised versions of, such as images, [B, *shape];
      None to start from noise alone.
    mesh: devices that the window is distributed over; None for one device.
    callback: called on the host in every iteration (see `Callback`).
    coarse_denoiser: denoiser of parareal's sequential sweep; None for `denoiser`.
    record: whether all states on the way are returned as well.

  Returns:
    Samples x [B, *shape], with their cost and accuracy, and with `record` their states.

  Raises:
    ValueError: an argument that the sampler does not take, a window that is not chosen
      or does not divide over the mesh, seeds that are not integers from 0 to 2^31 - 1,
      or samples that are not finite. Values that are traced are not checked.

  Example:
    >>> sampler = build("paraddim", sigma_d=0.5, steps=8, window=4)
    >>> samples = sample(sampler, lambda x, time, cond: 0 * x, range(3), shape=(2, 2))
    >>> samples.x.shape
    (3, 2, 2)
  """
  check_seeds(seeds)
  keys = sequential.keys_from_seeds(jnp.asarray(seeds))
  if x0 is None:
    x = sequential.sample_prior(sampler.tableau, keys, tuple(shape))
  else:
    x = sequential.sample_noised(sampler.tableau, keys, x0)
  samples = run(
    sampler,
    denoiser,
    x,
    keys,
    cond,
    mesh=mesh,
    callback=callback,
    coarse_denoiser=coarse_denoiser,
    record=record or None,
  )
  _check_finite(sampler, samples.x)
  return samples


def check_seeds(seeds: Array | Sequence[int]) -> None:
  """Checks seeds, unless they are traced.

  Args:
    seeds: [B].

  Raises:
    ValueError: they are not integers from 0 to 2^31 - 1.

  Example:
    >>> check_seeds([0, 7])
  """
  if not _is_known(seeds):
    return
  values = np.asarray(seeds)
  if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
    raise ValueError(
      f"seeds: must be a list of integers, not {values.dtype} {list(values.shape)}"
    )
  wrong = values[(values < 0) | (values > MAX_SEED)]
  if wrong.size:
    raise ValueError(f"seeds={wrong[0]}: must be from 0 to 2^31 - 1 = {MAX_SEED}")


def _check_finite(sampler: Sampler, x: Array) -> None:
  """Raises a ValueError if samples [B, ...] that are known are not finite."""
  if not _is_known(x):
    return
  bad = ~np.isfinite(x).reshape(len(x), -1).all(axis=1)
  if bad.any():
    raise ValueError(
      f"denoiser: {bad.sum()} of {len(x)} samples of the sampler {sampler.name!r} with "
      f"{sampler.num_steps} steps are not finite in {x.dtype}; check the network's weights, "
      "use a wider dtype, more steps, or less guidance"
    )


def _is_known(x: Array | Sequence[int]) -> bool:
  """Returns whether the values are on this process, and not traced by `jax.jit`."""
  if isinstance(x, jax.core.Tracer):
    return False
  return not isinstance(x, jax.Array) or x.is_fully_addressable


def run(
  sampler: Sampler,
  denoiser: Denoiser,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  **runtime: Json,
) -> Samples:
  """Returns what a sampler makes of given first states, such as noised images.

  Args:
    sampler: see `sample`.
    denoiser: see `sample`.
    x: first states, [B, ...].
    keys: one random key a sample, [B].
    cond: see `sample`.
    **runtime: `mesh`, `callback`, `coarse_denoiser` and `record` of `sample`.

  Raises:
    ValueError: see `sample`.
  """
  given = {k: v for k, v in runtime.items() if v is not None}
  for option in given:
    if not sampler.takes(option):
      _names.refuse(sampler.name, option, None)
  if sampler.is_parallel and not sampler.window:
    raise ValueError(
      f"window=0: name one of 1 to {sampler.num_steps}, or choose it by "
      "autotune.autotune_window"
    )
  if "mesh" in given:
    given["sharding"] = sharding_lib.window(given.pop("mesh"))
  loop = _names.loops()[sampler.loop].build
  denoiser = sampler.tableau.with_end_time(denoiser)
  return loop(denoiser, sampler.tableau, x, keys, cond, **sampler.options, **given)
