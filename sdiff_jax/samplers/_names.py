"""The names of samplers: every solver, alone and behind the prefix of every loop.

A sampling loop registers itself under the kind "samplers" with a function

    (denoiser, tableau, x, keys, cond, *, option=default, ...) -> Samples

whose keyword arguments are its options. Facts of a loop:

    prefix     what stands in front of a solver's name in the name of a sampler
    aliases    further prefixes
    check      (tableau, options) -> options, or a ValueError for one that does not fit
    exact      whether samples have the distribution of the sequential sampler
    bounds_tv  whether `Samples.tv_bound` is a bound
"""

import difflib
import inspect
from typing import NoReturn

from sdiff_jax import registry
from sdiff_jax.samplers import solvers
from sdiff_jax.types import Json

KIND = "samplers"
ALIASES = {"paradpmsolver": "paradpmpp2m"}
# Options that are given when samples are made; all others when a sampler is built.
RUNTIME = {
  "mesh": "sharding",
  "callback": "callback",
  "coarse_denoiser": "coarse_denoiser",
  "record": "record",
}
# Options of every sampler that is built on the TrigFlow process.
COMMON = {"timesteps": (), "temperature": 1.0}
RUNTIME_ONLY = frozenset(RUNTIME.values())


def loops() -> dict[str, registry.Piece]:
  """Returns all registered loops by name; those of `contrib` are imported as well."""
  registry.import_modules("sdiff_jax.contrib")
  return {name: registry.lookup(KIND, name) for name in registry.names(KIND)}


def loop_parameters(loop: str) -> dict[str, Json]:
  """Returns the keyword arguments of a loop with their defaults."""
  parameters = inspect.signature(loops()[loop].build).parameters.values()
  return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


def table() -> dict[str, tuple[str, str]]:
  """Returns name -> (loop, solver) of every sampler."""
  pairs: dict[str, tuple[str, str]] = {}
  for loop, piece in loops().items():
    for prefix in (piece.facts["prefix"], *piece.facts.get("aliases", ())):
      for solver in solvers.names():
        name = prefix + solver
        if name in pairs:
          raise ValueError(
            f"name={name!r}: stands for {pairs[name]} and for {(loop, solver)}; rename "
            "the solver, or the prefix of the loop"
          )
        pairs[name] = loop, solver
  return pairs | {alias: pairs[name] for alias, name in ALIASES.items()}


def lookup(name: str) -> tuple[str, str]:
  """Returns the loop and the solver of a sampler's name.

  Raises:
    ValueError: an unknown name.
  """
  known = table()
  if name not in known:
    near = difflib.get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    prefixes = [p.facts["prefix"] for p in loops().values() if p.facts["prefix"]]
    raise ValueError(
      f"name={name!r}: must be a solver, one of {', '.join(solvers.names())}, alone or "
      f"behind a prefix, one of {', '.join(prefixes)}{hint}"
    )
  return known[name]


def refuse(name: str, option: str, value: Json) -> NoReturn:
  """Raises a ValueError: a sampler does not take an option; it names those that do."""
  loop, solver = lookup(name)
  stated = option if value is None else f"{option}={value!r}"
  takers = []
  of_solvers = [s for s in solvers.names() if option in solvers.options(s)]
  if of_solvers:
    takers.append(f"the solver {', '.join(of_solvers)}")
  prefixes = [
    f"{piece.facts['prefix']}{solver}"
    for key, piece in loops().items()
    if RUNTIME.get(option, option) in loop_parameters(key)
  ]
  if prefixes:
    takers.append(" or ".join(prefixes))
  if option in RUNTIME and prefixes and RUNTIME[option] in loop_parameters(loop):
    raise ValueError(f"{stated}: given to `sample`, not to `build`")
  others = f"; it is for {' or '.join(takers)}" if takers else "; no sampler does"
  raise ValueError(f"{stated}: the sampler {name!r} does not take it{others}")
