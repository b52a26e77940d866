"""How to sample, by name: a solver's table and the loop that runs its rows.

A name is a solver's, whose rows then run one after the other, or one with the loop in
front: paraddpm, paraddim, paradpmpp2m, paraheun, ... (ParaDiGMS), specddpm,
specdpmpp2m_sde (speculation), srdsddim (parareal).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sdiff_jax.contrib import parareal
from sdiff_jax.samplers import (
  _gaussian_mixture,
  paradigms,
  sequential,
  solvers,
  speculative,
)
from sdiff_jax.samplers._sliding_window import Samples
from sdiff_jax.samplers.solvers import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, PRNGKey

LOOPS = ("para", "spec", "srds")
ALIASES = {"paradpmsolver": "paradpmpp2m"}


class Sampler(NamedTuple):
  """A sampler.

  Attributes:
    loop: one of LOOPS, or "" for one row after the other.
    table: the solver.
    window: rows at once, or blocks of parareal; 0 where it is yet to be chosen.
    tolerance: see `paradigms.sample` and `parareal.sample`.
    update_rule: see `paradigms.sample`.
    max_passes: see `windows.run`; for para and spec.
  """

  loop: str
  table: SolverTableau
  window: int = 0
  tolerance: float = 0.1
  update_rule: str = "secant"
  max_passes: int = 0


def build(
  *,
  name: str,
  window: int = 0,
  tolerance: float = 0.1,
  update_rule: str = "secant",
  **solver: object,
) -> Sampler:
  """Returns the plan of a name, such as "paraddpm".

  Args:
    name: a solver, maybe with a loop in front.
    window: see Plan.
    tolerance: see Plan.
    update_rule: see Plan.
    **solver: the other arguments of `tables.build`.

  Raises:
    ValueError: an unknown name, or values that do not fit.
  """
  loop, kind = parse(name)
  table = solvers.build(name=kind, **solver)
  return from_tableau(
    loop, table, window=window, tolerance=tolerance, update_rule=update_rule
  )


def parse(name: str) -> tuple[str, str]:
  """Returns the loop and the solver of a name, ("para", "ddpm") of "paraddpm".

  Raises:
    ValueError: an unknown name.
  """
  full = ALIASES.get(name, name)
  loop = next((loop for loop in LOOPS if full.startswith(loop)), "")
  if full.removeprefix(loop) not in solvers.SOLVERS:
    raise ValueError(
      f"sampler.name={name!r}: take one of {[*solvers.SOLVERS]}, maybe with 'para', "
      "'spec' or 'srds' in front"
    )
  return loop, full.removeprefix(loop)


def from_tableau(
  loop: str,
  table: SolverTableau,
  *,
  window: int = 0,
  tolerance: float = 0.1,
  update_rule: str = "secant",
) -> Sampler:
  """Returns the plan of a table; the arguments are those of Plan.

  Raises:
    ValueError: values that do not fit.
  """
  plan = Sampler(loop, table, window, tolerance, update_rule)
  if not loop:
    return plan
  if not 0 <= window <= table.evaluations:
    raise ValueError(
      f"sampler.window={window}: take 1 to {table.evaluations}, the rows of the table, "
      "or 0 for one that fits the machine"
    )
  if loop == "para":
    paradigms.check(tolerance, update_rule)
  if loop == "spec":
    speculative.check(table)
  if loop == "srds":
    parareal.check(table, tolerance)
    if table.uses("p", "c", "e"):
      raise ValueError("sampler.name: of the names, parareal takes srdsddim alone")
    blocks = window or round(table.evaluations**0.5)
    parareal.boundaries(table.evaluations, blocks)
    plan = plan._replace(window=blocks)
  return plan


def run(
  plan: Sampler,
  denoiser: Denoiser,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  *,
  sharding: NamedSharding | None = None,
  coarse: Denoiser | None = None,
) -> Samples:
  """Returns what a plan makes of the first state, and what it took.

  Args:
    plan: with its window chosen.
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...].
    x: first state, [B, ...].
    keys: one key a sample, [B].
    cond: conditions, leading [B].
    sharding: of the axes [B, window]; None on one device.
    coarse: denoiser of parareal's sweep; None for `denoiser`.
  """
  if plan.loop == "para":
    options = {"tolerance": plan.tolerance, "update_rule": plan.update_rule}
    options |= {"window": plan.window, "sharding": sharding}
    options["max_passes"] = plan.max_passes
    return paradigms.sample(denoiser, plan.table, x, keys, cond, **options)
  if plan.loop == "spec":
    options = {"window": plan.window, "sharding": sharding}
    options["max_passes"] = plan.max_passes
    return speculative.sample(denoiser, plan.table, x, keys, cond, **options)
  if plan.loop == "srds":
    return parareal.sample(
      denoiser,
      plan.table,
      x,
      cond,
      coarse=coarse or denoiser,
      blocks=plan.window,
      tolerance=plan.tolerance,
      sharding=sharding,
    )
  count = jnp.full(len(x), plan.table.evaluations, jnp.int32)
  x = sequential.sample(denoiser, plan.table, x, keys, cond)
  none = jnp.zeros(len(x), x.dtype)
  return Samples(x, count, count, none, none)


class WindowEstimate(NamedTuple):
  """What a window is expected to take: passes, and seconds for a batch."""

  window: int
  passes: float
  seconds: float


def autotune_window(
  plan: Sampler, cost: Callable[[int], float], multiple: int = 1
) -> list[WindowEstimate]:
  """Returns what windows are expected to take, the best one first.

  Passes hang on solver and tolerance more than on the network: they are those of a
  mixture of Gaussians in 16 dimensions. Windows grow until the time does.

  Args:
    plan: with any window.
    cost: window -> seconds of a call of the denoiser for a batch, measured.
    multiple: windows are multiples of it.

  Raises:
    ValueError: no multiple fits the table.
  """
  rows, tried = plan.table.evaluations, []
  sizes = [n for k in range(2, 10) for n in (2**k, 3 * 2 ** (k - 1))] + [rows]
  for window in sorted({n for n in sizes if n <= rows and n % multiple == 0}):
    count = expected_iterations(plan._replace(window=window))
    tried.append(WindowEstimate(window, count, count * cost(window)))
    if tried[-1].seconds > 1.5 * min(t.seconds for t in tried):
      break
  if not tried:
    raise ValueError(
      f"sampler.steps: no window of {rows} rows divides over {multiple} devices"
    )
  return sorted(tried, key=lambda t: t.seconds)


def expected_iterations(plan: Sampler) -> float:
  """Returns the mean calls of the denoiser that 16 samples of the mixture take."""
  denoiser = _gaussian_mixture.denoiser(plan.table.sigma_d)
  keys = sequential.keys_from_seeds(np.arange(16))
  x = sequential.sample_prior(plan.table, keys, (16,))
  return float(jax.jit(lambda: run(plan, denoiser, x, keys, None).passes)().mean())
