"""Cost of an sCD step against a teacher step of the same network and batch.

  python benchmarks/step_cost.py [--model=mlp|dit|edm2] [--pairs=100]

Prints compiled floating-point operations (loops over blocks unrolled, so that every
block counts) and the median ratio of paired times in one process. The floor of the
ratio is 5/3: teacher forward, student forward, tangent and backward (two forwards),
against forward and backward.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from sdiff_jax import config, registry
from sdiff_jax.data import class_cond
from sdiff_jax.training import ema, optimizers, state, step

SIZES = {
  "mlp": {"width": 256, "depth": 4, "unroll": 4},
  "dit": {"width": 256, "depth": 4, "unroll": 4, "heads": 4, "patch": 2},
  "edm2": {
    "channels": 64,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attn_resolutions": (8,),
  },
}
SHAPES = {"mlp": (8, 8, 1), "dit": (16, 16, 1), "edm2": (16, 16, 1)}


def compiled(model: str, loss: str, batch_size: int) -> tuple:
  """Returns the compiled step and its arguments."""
  shape, classes = SHAPES[model], 10
  section = config.component("models", model, **SIZES[model]).to_dict()
  network = registry.build(
    "models", section, shape=shape, cond=class_cond(classes), sigma_d=0.5
  )
  chosen = config.component("losses", loss).to_dict()
  objective = registry.build(
    "losses", chosen, network=network, teacher=network.apply, sigma_d=0.5
  )
  rate = lambda n: jnp.float32(1e-4)  # noqa: E731
  optimizer = optimizers.build(
    rate, name="adam", b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip=0.0
  )
  betas = ema.betas(("power/0.1",), batch_size)
  key = jax.random.key(0)
  params = network.init(key)
  frozen = jax.tree.map(jnp.copy, params) if loss == "scm" else None
  start = state.create(params, optimizer, tuple(betas))
  batch = {
    "x0": 0.5 * jax.random.normal(key, (batch_size, *shape)),
    "cond": {"label": jnp.arange(batch_size) % classes},
  }
  train_step = step.build(
    objective,
    optimizer,
    ema=betas,
    learning_rate=rate,
    normalize=network.normalize,
  )
  function = step.jitted(train_step)
  return (
    function.lower(start, batch, key, frozen).compile(),
    (batch, key, frozen),
    start,
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--model", choices=sorted(SIZES), default="mlp")
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--pairs", type=int, default=100)
  args = parser.parse_args()
  steps = {
    loss: compiled(args.model, loss, args.batch) for loss in ("diffusion", "scm")
  }
  flops = {k: s[0].cost_analysis()["flops"] for k, s in steps.items()}
  states = {k: s[2] for k, s in steps.items()}
  seconds: dict[str, list[float]] = {k: [] for k in steps}
  for pair in range(args.pairs + 5):
    for k, (function, arguments, _) in steps.items():
      begin = time.perf_counter()
      states[k], _ = function(states[k], *arguments)
      jax.block_until_ready(states[k])
      if pair >= 5:
        seconds[k].append(time.perf_counter() - begin)
  print(f"{args.model}, batch {args.batch}, {jax.devices()[0].device_kind}")
  for k in steps:
    median = statistics.median(seconds[k])
    print(f"  {k:9s}  {flops[k] / 1e9:7.3f} GFLOP  {median * 1e3:7.2f} ms")
  ratios = [b / a for a, b in zip(seconds["diffusion"], seconds["scm"], strict=True)]
  print(f"  ratio      {flops['scm'] / flops['diffusion']:7.3f}        ", end="")
  print(f"  {statistics.median(ratios):7.3f} (median of {len(ratios)} pairs)")


if __name__ == "__main__":
  main()
