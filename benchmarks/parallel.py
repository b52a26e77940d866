"""Parallel samplers compared at equal error to the sequential sampler.

  python benchmarks/parallel.py [--digits=runs/demo/seed0/teacher]
                                [--fashion=runs/fashion/seed0/teacher]
                                [--seeds=3] [--samples=16] [--only=WORD]

The tolerance is swept; iterations and evaluations are those where the final states
differ from the sequential ones by the target error (of each sample, its root mean square
divided by that of its states; the mean over samples, interpolated in its logarithm; nan
if no tolerance reaches it), and the tolerance is in brackets. Speculation has no error.
Means over seeds x samples. The data are a mixture in 16 dimensions, whose denoiser is
known, and trained teachers whose work directories exist.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import tqdm

from sdiff_jax import samplers
from sdiff_jax.diffusion import trigflow
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.samplers import _gaussian_mixture, comparison

# solver, steps, window, error
CASES = (
  ("ddpm", 100, 20, 1e-2),
  ("ddpm", 1000, 48, 3e-3),
  ("ddim", 50, 25, 1e-2),
  ("ddim", 200, 32, 1e-2),
  ("dpmpp2m", 50, 25, 1e-2),
)
RULES = ("published", "picard", "linear", "secant")
TAUS = np.geomspace(10.0, 3e-3, 15)


class Data(NamedTuple):
  """Something to sample from: (params, ...) -> d, its parameters, shape and classes."""

  denoiser: Callable
  params: dict
  shape: tuple[int, ...]
  classes: int


def trained(workdir: str) -> Data:
  experiment, params = workdir_lib.trained(workdir_lib.read(workdir), workdir)

  def denoiser(params, x, t, cond):
    net = lambda x, t, cond: experiment.network.apply(params, x, t, cond)  # noqa: E731
    return trigflow.denoiser(net, experiment.sigma_d)(x, t, cond)

  source = experiment.dataset
  return Data(denoiser, params, source.shape, source.num_classes)


def toy() -> Data:
  net = _gaussian_mixture.denoiser(sigma_d=0.5)
  return Data(lambda params, *args: net(*args), {}, (16,), 0)


def at_error(errors: np.ndarray, values: np.ndarray, wanted: float) -> float:
  """Returns the value where the error is as wanted; NaN outside what was swept."""
  order = np.argsort(errors)
  logs = np.log(np.maximum(errors[order], 1e-12))
  if not logs[0] <= np.log(wanted) <= logs[-1]:
    return float("nan")
  return float(np.interp(np.log(wanted), logs, values[order]))


def measure(data: Data, case: tuple, num_seeds: int, num_samples: int) -> dict:
  """Returns (iterations, evaluations, tolerance) of every rule and of speculation."""
  name, steps, window, wanted = case
  seeds = np.arange(num_seeds * num_samples)
  cond = {"label": jnp.asarray(seeds % max(data.classes, 1), jnp.int32)}
  sequential = samplers.build(name, sigma_d=0.5, steps=steps)

  def denoiser_of(params):
    return functools.partial(data.denoiser, params)

  measure_cost = comparison.sweep(
    denoiser_of, data.params, sequential, seeds, data.shape, cond
  )
  results = {}
  for rule in RULES:
    rows = []
    parallel = samplers.from_tableau(
      f"para{name}", sequential.tableau, window=window, update_rule=rule
    )
    for tau, cost in zip(TAUS, measure_cost(parallel, TAUS), strict=False):
      rows.append([*cost, np.log(tau)])
      if cost.error < wanted / 10:
        break
    iterations, evaluations, errors, taus = np.array(rows).T
    values = (iterations, evaluations, taus)
    iterations, evaluations, tau = (at_error(errors, v, wanted) for v in values)
    results[rule] = iterations, evaluations, float(np.exp(tau))
  try:
    speculative = samplers.from_tableau(
      f"spec{name}", sequential.tableau, window=window
    )
  except ValueError:  # a solver without noise
    return results
  (cost,) = measure_cost(speculative)
  return results | {"speculative": (cost.num_iterations, cost.num_evaluations, 0.0)}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--digits", default="runs/demo/seed0/teacher")
  parser.add_argument("--fashion", default="runs/fashion/seed0/teacher")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--samples", type=int, default=16)
  parser.add_argument("--only", default="", help="cases that hold this word")
  parser.add_argument("--json", default="", help="write the numbers there as well")
  args = parser.parse_args()
  sources = {"mixture": toy}
  for name in ("digits", "fashion"):
    workdir = getattr(args, name)
    if os.path.isdir(workdir):
      sources[name] = functools.partial(trained, workdir)
  jobs = [(name, case) for case in CASES for name in sources]
  jobs = [j for j in jobs if args.only in f"{j[0]} {j[1][0]}-{j[1][1]}"]
  numbers = {}
  print(
    "| solver, window, error | data | " + " | ".join([*RULES, "speculative"]) + " |"
  )
  print("|---|---|" + "---|" * (len(RULES) + 1))
  for source, case in tqdm.tqdm(jobs):
    found = measure(sources[source](), case, args.seeds, args.samples)
    name, steps, window, wanted = case
    label = f"{name}-{steps}, {window}, {wanted:g}"
    numbers[f"{label} {source}"] = found
    cells = [found.get(rule) for rule in (*RULES, "speculative")]
    cells = ["" if c is None else f"{c[0]:.1f}/{c[1]:.0f} ({c[2]:.2g})" for c in cells]
    tqdm.tqdm.write(f"| {label} | {source} | " + " | ".join(cells) + " |")
    if args.json:
      with open(args.json, "w", encoding="utf-8") as file:
        json.dump(numbers, file, indent=2)


if __name__ == "__main__":
  main()
