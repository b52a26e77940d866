"""SD3's and Flux's transformers beside diffusers, sequential and in parallel.

  python benchmarks/flow_transformers.py --peer=PYTHON [--kind=sd3|flux] [--pairs=5]

PYTHON has torch and diffusers (see third_party/diffusers_flow_speed.py). Both sample the
same random network of 50 million parameters from the same noise, batch 1, float32, without
guidance, in turns; the ratio is the median over pairs. Then the iterations of ParaDiGMS
and its error (root mean square of the difference to the sequential sample, divided by
that of the sample) at each window and tolerance, for 10, 20, 28 and 50 steps.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.experiment import text_to_image
from sdiff_jax.pretrained.diffusers import loading, scheduler, weights
from sdiff_jax.samplers import sampler as sampler_lib
from sdiff_jax.samplers import sequential
from sdiff_jax.types import Array

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = (10, 20, 28, 50)
WINDOWS = (2, 3, 4, 8, 14, 28)
TOLERANCES = (0.3, 0.1, 0.03, 0.01, 0.003)
TARGET = 1e-2


class Sampling:
  """Our samplers of a folder that the peer wrote."""

  def __init__(self, folder: pathlib.Path):
    part = str(folder / "transformer")
    self.network = loading.network(part)
    self.params = weights.parameters(part, self.network)
    self.schedule = loading.schedule(str(folder / "scheduler"))
    with np.load(folder / "inputs.npz") as stored:
      inputs = {k: jnp.asarray(stored[k]) for k in stored}
    self.start = jnp.moveaxis(inputs["start"], 1, -1)
    self.cond = {"text": inputs["text"], "pooled": inputs["pooled"]}
    if self.network.guided:
      self.cond["distilled_guidance"] = jnp.full(1, 3.5)

  def compiled(self, steps: int, **options: float) -> Callable[[], tuple]:
    """Returns a function without arguments: -> final state, iterations."""
    name = "paraddim" if options else "ddim"
    schedule, sampler = text_to_image.build_sampler(
      self.schedule, name=name, steps=steps, **options
    )
    keys = sequential.keys_from_seeds(np.arange(1))

    @jax.jit
    def run(params, x: Array, cond) -> tuple[Array, Array]:
      def net(x, t, cond):
        return self.network.apply(params, x, t, cond)

      denoise = scheduler.denoiser(net, schedule, sampler.tableau)
      out = sampler_lib.run(sampler, denoise, x, keys, cond)
      return out.x, jnp.max(out.num_iterations)

    return lambda: jax.block_until_ready(run(self.params, self.start, self.cond))


def seconds(call: Callable[[], tuple]) -> float:
  begin = time.perf_counter()
  call()
  return time.perf_counter() - begin


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--peer", required=True, help="Python with torch and diffusers")
  parser.add_argument("--kind", choices=("sd3", "flux"), default="sd3")
  parser.add_argument("--pairs", type=int, default=5)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    script = ROOT / "third_party" / "diffusers_flow_speed.py"
    peer = subprocess.Popen(
      [options.peer, str(script), name, options.kind],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

    def ask(steps: int) -> float:
      peer.stdin.write(f"{steps}\n")
      peer.stdin.flush()
      return float(peer.stdout.readline())

    print(options.kind, json.loads(peer.stdout.readline()))
    ours = Sampling(folder)
    compare(ours, ask, folder, options.pairs)
    table(ours, ask)
    peer.stdin.close()


def compare(ours: Sampling, ask: Callable, folder: pathlib.Path, pairs: int) -> None:
  """Prints the ratio of a sample of 28 steps, the peer's seconds over ours."""
  call = ours.compiled(28)
  x, _ = call()
  ask(28)
  theirs = np.moveaxis(np.load(folder / "end.npy"), 1, -1)
  print(f"largest difference {np.abs(x - theirs).max() / np.abs(theirs).max():.1e}")
  times = [(ask(28), seconds(call)) for _ in range(pairs)]
  ratio = statistics.median(a / b for a, b in times)
  print(
    f"28 steps: ours {statistics.median(b for _, b in times):.2f} s, diffusers ", end=""
  )
  print(f"{statistics.median(a for a, _ in times):.2f} s, {ratio:.2f}x", flush=True)


def table(ours: Sampling, ask: Callable) -> None:
  """Prints for each window the largest tolerance whose error is below TARGET."""
  print("| steps | window | tolerance | iterations | error | seconds | diffusers |")
  print("|---|---|---|---|---|---|---|")
  for steps in STEPS:
    exact, _ = ours.compiled(steps)()
    theirs = ask(steps)
    for window in (w for w in WINDOWS if w <= steps):
      for tolerance in TOLERANCES:
        call = ours.compiled(steps, window=window, tolerance=tolerance)
        x, iterations = call()
        error = jnp.sqrt(jnp.mean((x - exact) ** 2) / jnp.mean(exact**2))
        if error <= TARGET or tolerance == TOLERANCES[-1]:
          row = steps, window, tolerance, int(iterations), f"{error:.1e}"
          row = *row, f"{seconds(call):.2f}", f"{theirs:.2f}"
          print(f"| {' | '.join(map(str, row))} |", flush=True)
          break


if __name__ == "__main__":
  main()
