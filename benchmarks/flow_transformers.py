"""SD3's and Flux's transformers beside diffusers, sequential and in parallel.

  python benchmarks/flow_transformers.py --peer=PYTHON [--kind=sd3|flux] [--pairs=5]
    [--windows 2 4 8] [--steps 10 20 28 50]

PYTHON has torch and diffusers (see third_party/diffusers_flow_speed.py). Both sample the
same random network of 50 million parameters from the same noise, batch 1, float32, without
guidance, in turns; the ratios are medians over pairs, of seconds and of the seconds of
processors, which other work on the machine changes less. Then the iterations of ParaDiGMS,
its evaluations, and its error (root mean square of the
difference to the sequential sample, divided by that of the sample), for each window.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.experiment import published_model
from sdiff_jax.pretrained.diffusers import loading, scheduler, weights
from sdiff_jax.samplers import sampler as sampler_lib
from sdiff_jax.samplers import sequential
from sdiff_jax.types import Array

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "third_party"))

from peer import Peer  # noqa: E402

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
    """Returns a function without arguments: -> final state, iterations, evaluations."""
    name = "paraddim" if options else "ddim"
    schedule, sampler = published_model.build_sampler(
      self.schedule, name=name, steps=steps, **options
    )
    keys = sequential.keys_from_seeds(np.arange(1))

    @jax.jit
    def run(params, x: Array, cond) -> tuple[Array, Array, Array]:
      def net(x, t, cond):
        return self.network.apply(params, x, t, cond)

      denoise = scheduler.denoiser(net, schedule, sampler.tableau)
      out = sampler_lib.run(sampler, denoise, x, keys, cond)
      return out.x, jnp.max(out.num_iterations), jnp.sum(out.num_evaluations)

    return lambda: jax.block_until_ready(run(self.params, self.start, self.cond))


def seconds(call: Callable[[], tuple]) -> tuple[float, float]:
  """Returns the seconds of a call, and those of all processors."""
  begin = time.perf_counter(), time.process_time()
  call()
  return time.perf_counter() - begin[0], time.process_time() - begin[1]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--peer", required=True, help="Python with torch and diffusers")
  parser.add_argument("--kind", choices=("sd3", "flux"), default="sd3")
  parser.add_argument("--pairs", type=int, default=5)
  parser.add_argument("--windows", type=int, nargs="*", default=(2, 3, 4, 8))
  parser.add_argument("--steps", type=int, nargs="*", default=(10, 20, 28, 50))
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    script = ROOT / "third_party" / "diffusers_flow_speed.py"
    with Peer(options.peer, str(script), name, options.kind) as peer:
      print(options.kind, peer.read())
      ours = Sampling(folder)
      compare(ours, peer.ask, folder, options.pairs)
      table(ours, peer.ask, options.steps, options.windows)


def compare(ours: Sampling, ask: Callable, folder: pathlib.Path, pairs: int) -> None:
  """Prints the ratios of a sample of 28 steps, the peer's seconds over ours."""
  call = ours.compiled(28)
  x = call()[0]
  ask(28)
  theirs = np.moveaxis(np.load(folder / "end.npy"), 1, -1)
  print(f"largest difference {np.abs(x - theirs).max() / np.abs(theirs).max():.1e}")
  times = np.array([(ask(28), seconds(call)) for _ in range(pairs)])
  for k, name in enumerate(("seconds", "seconds of processors")):
    peer, own = times[:, 0, k], times[:, 1, k]
    line = (
      f"28 steps, {name}: ours {np.median(own):.2f}, diffusers {np.median(peer):.2f}"
    )
    print(f"{line}, {np.median(peer / own):.2f}x", flush=True)


def table(
  ours: Sampling, ask: Callable, counts: Sequence[int], windows: Sequence[int]
) -> None:
  """Prints for each window the largest tolerance whose error is below TARGET.

  Seconds are ours / the peer's, of the next run of each.
  """
  print(
    "| steps | window | tolerance | iterations | evaluations | error | s | s of processors |"
  )
  print("|---|---|---|---|---|---|---|---|")
  for steps in counts:
    exact = ours.compiled(steps)()[0]
    for window in (w for w in windows if w <= steps):
      for tolerance in TOLERANCES:
        call = ours.compiled(steps, window=window, tolerance=tolerance)
        x, iterations, evaluations = call()
        error = jnp.sqrt(jnp.mean((x - exact) ** 2) / jnp.mean(exact**2))
        if error <= TARGET or tolerance == TOLERANCES[-1]:
          row = (
            steps,
            window,
            tolerance,
            int(iterations),
            int(evaluations),
            f"{error:.1e}",
          )
          pairs = zip(seconds(call), ask(steps), strict=True)
          row = *row, *(f"{own:.2f} / {peer:.2f}" for own, peer in pairs)
          print(f"| {' | '.join(map(str, row))} |", flush=True)
          break


if __name__ == "__main__":
  main()
