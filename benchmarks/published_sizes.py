"""What the largest published models hold and compute, by their config files alone.

  python benchmarks/published_sizes.py [--model=flux_dev] [--window=8] [--calls]

Bytes of weights in bfloat16, and floating-point operations of one evaluation of the
network at its own size, counted in the traced program; nothing is compiled. From these
and the chips' data sheets: whether the weights fit where each chip has all of them, the
time of a pass whose window lies over the chips, at half the peak, and the time to gather
the weights over the links if they are sharded. With --calls, the sequential calls of
ParaDiGMS at tolerance 0.1 for 28 and 50 steps of each schedule, on a mixture of Gaussians.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp

from sdiff_jax.capacity import chips
from sdiff_jax.experiment import published_model
from sdiff_jax.pretrained.diffusers import loading
from sdiff_jax.samplers import autotune
from sdiff_jax.training import flops

ROOT = pathlib.Path(__file__).resolve().parents[1] / "configs" / "published"
MODELS = {  # guided models evaluate twice
  "stable_diffusion_xl": 2,
  "stable_diffusion3.5_large": 2,
  "flux_dev": 1,
}
PODS = ("v5e:4x4", "v6e:2x4", "v5p:2x2x4", "h100x8")
SHARE_OF_PEAK = 0.5
STEPS = (28, 50)


def size(params) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def operations(model: loading.Model) -> float:
  """Returns the operations of one evaluation of the network, without guidance."""
  struct = jax.ShapeDtypeStruct
  tokens = {
    name: struct((1, length), jnp.int32) for name, length in model.lengths.items()
  }
  cond = dict(jax.eval_shape(model.encode, model.params, tokens))
  if model.unet.guided:
    cond["distilled_guidance"] = struct((1,), jnp.float32)
  x, time = struct((1, *model.unet.shape), jnp.float32), struct((1,), jnp.float32)
  return flops.count_flops(model.unet.apply, model.params["unet"], x, time, cond)


def rows(name: str, window: int) -> None:
  model = loading.abstract(loading.configs(str(ROOT / name)), dtype="bfloat16")
  net = size(model.params["unet"])
  texts = sum(size(v) for k, v in model.params.items() if k.startswith("text"))
  count = MODELS[name] * operations(model)
  start = name, f"{net / 1e9:.1f}", f"{texts / 1e9:.1f}", f"{count / 1e12:.0f}"
  for pod in PODS:
    parsed = chips.parse(pod)
    chip, used = chips.CHIPS[parsed.chip], min(window, parsed.chips)
    fits = "yes" if net + texts < 0.9 * chip.memory else "no"
    seconds = count * -(-window // used) / (SHARE_OF_PEAK * chip.peak)
    gather = net / (chip.link * chip.links)
    row = *start, pod, fits, f"{1e3 * seconds:.0f}", f"{1e3 * gather:.0f}"
    print(f"| {' | '.join(row)} |", flush=True)


def calls(name: str, window: int) -> None:
  schedule = loading.schedule(str(ROOT / name / "scheduler"))
  row = [name]
  for steps in STEPS:
    _, sampler = published_model.build_sampler(
      schedule, name=f"para{schedule.solver}", steps=steps, window=window, tolerance=0.1
    )
    count = autotune.expected_iterations(sampler)
    row += [f"{count:.1f}", f"{steps / count:.1f}"]
  print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--model", choices=tuple(MODELS))
  parser.add_argument("--window", type=int, default=8)
  parser.add_argument("--calls", action="store_true")
  options = parser.parse_args()
  names = [options.model] if options.model else MODELS
  if options.calls:
    print("| model | calls of 28 steps | speed-up | calls of 50 steps | speed-up |")
    print("|---|---|---|---|---|", flush=True)
    for name in names:
      calls(name, options.window)
    return
  print(
    "| model | network, GB | texts, GB | TFLOP | chips | fits whole | pass, ms |",
    end="",
  )
  print(" gather, ms |\n|---|---|---|---|---|---|---|---|", flush=True)
  for name in names:
    rows(name, options.window)


if __name__ == "__main__":
  main()
