"""CHORDS and ParaDiGMS beside the sequential sampler: error against sequential calls.

  python benchmarks/chords.py [--folder=tests/fixtures/tiny-dit] [--samples=16] [--cores=4,8]

Both evaluate as many states in a call: the cores of CHORDS, or the window of ParaDiGMS.
CHORDS is stopped at the end of its fastest core, as in the paper, of the next one, and so
on; ParaDiGMS at each tolerance. The error is the root mean square of the difference to
the sequential sample over that of the sample, the mean over samples. DDIM of 50 steps, of
a mixture whose denoiser is known, and of a folder in the diffusers format (its network,
without guidance).
"""

import argparse
from collections.abc import Iterator

import jax
import numpy as np

from sdiff_jax import samplers
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import published_model, text_to_image
from sdiff_jax.pretrained.diffusers import loading
from sdiff_jax.samplers import Sampler, _gaussian_mixture, comparison

STEPS = 50
TOLERANCES = (3.0, 1.0, 0.3, 0.1, 0.03)
ENDS = (1, 2, 3)
NAMES = "ddim", "chordsddim", "paraddim"


def mixture() -> tuple:
  """Returns samplers by name, params, params -> denoiser, shape and conditions."""
  made = {
    name: samplers.build(name, sigma_d=0.5, steps=STEPS, **options(name))
    for name in NAMES
  }
  return made, {}, lambda params: _gaussian_mixture.denoiser(0.5), (16,), None


def options(name: str) -> dict[str, int]:
  return {"window": 4} if name != "ddim" else {}


def folder(path: str, count: int) -> tuple:
  """Returns the same of a folder in the diffusers format."""
  model, made = loading.load(path), {}
  for name in NAMES:
    schedule, made[name] = published_model.build_sampler(
      model.schedule, name=name, steps=STEPS, **options(name)
    )
  model = model._replace(schedule=schedule)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  pipeline = text_to_image.pipeline(model, made["ddim"], mesh, prompts=["a cat"])
  _, inputs = pipeline.requests(np.arange(count))
  cond = jax.jit(lambda params: pipeline.denoiser(params, inputs)[1])(model.params)

  def denoiser_of(params):
    return pipeline.denoiser(params, inputs)[0]

  return made, model.params, denoiser_of, pipeline.shape, cond


def rows(made: dict[str, Sampler], cores: int, measure) -> Iterator[tuple]:
  """Yields (method, setting, calls, evaluations, error)."""
  for ends in ENDS[: cores - 1]:
    by = made["chordsddim"].replace(window=cores, tolerance=0.0, max_ends=ends)
    for cost in measure(by):
      yield f"CHORDS, {cores} cores", f"end {ends}", *cost
  by = made["paraddim"].replace(window=cores)
  for tolerance, cost in zip(TOLERANCES, measure(by, TOLERANCES), strict=True):
    yield f"ParaDiGMS, window {cores}", f"tolerance {tolerance}", *cost


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--folder", help="in the diffusers format; else the mixture")
  parser.add_argument("--samples", type=int, default=16)
  parser.add_argument("--cores", default="4,8")
  given = parser.parse_args()
  source = folder(given.folder, given.samples) if given.folder else mixture()
  made, params, denoiser_of, shape, cond = source
  seeds = np.arange(given.samples)
  measure = comparison.sweep(denoiser_of, params, made["ddim"], seeds, shape, cond)
  print("| method | stopped at | sequential calls | speed-up | evaluations | error |")
  print("|---|---|---|---|---|---|")
  for cores in map(int, given.cores.split(",")):
    for method, setting, calls, evaluations, error in rows(made, cores, measure):
      speed = f"{STEPS / calls:.2f}"
      row = method, setting, f"{calls:.1f}", speed, f"{evaluations:.0f}", f"{error:.1e}"
      print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
  main()
