"""What devices tell each other in a pass of ParaDiGMS, from the compiled program.

  python benchmarks/collectives.py [--devices=8] [--window=48] [--shape=64,64,4]

Two ways to spread a window over devices, compiled for simulated ones: the ring of
slots, whose states stay where they are, and the plain way, in which every device holds
all states and only the denoiser's rows are spread. Counts and bytes of collectives by
kind, in the body of the loop, for each sample.
"""

import argparse
import collections
import functools
import math
import os
import re

BYTES = {"f32": 4, "s32": 4, "pred": 1}
KINDS = "all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter"


def count(text: str) -> dict[str, list[int]]:
  """Returns kind -> [number, bytes of its results] outside the entry computation."""
  found = collections.defaultdict(lambda: [0, 0])
  for part in re.split(r"\n(?=ENTRY|%)", text):
    if part.startswith("ENTRY"):
      continue
    for shape, kind in re.findall(rf"= (\S+|\(.*?\)) ({KINDS})(?:-start)?\(", part):
      found[kind][0] += 1
      for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        dims = [int(n) for n in sizes.split(",") if n]
        found[kind][1] += BYTES[dtype] * math.prod(dims)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--devices", type=int, default=8)
  parser.add_argument("--window", type=int, default=48)
  parser.add_argument("--shape", default="64,64,4", help="of a state")
  args = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  devices = f"--xla_force_host_platform_device_count={args.devices}"
  os.environ["XLA_FLAGS"] = devices

  import jax
  import jax.numpy as jnp

  from sdiff_jax import sharding
  from sdiff_jax.samplers import paradigms, sequential, tables

  mesh = sharding.make_mesh(data=1, fsdp=1, window=args.devices)
  shape = tuple(int(n) for n in args.shape.split(","))

  def denoiser(x, time, cond):
    return x * jnp.cos(time).reshape(-1, *[1] * len(shape))

  def spread(x, time, cond):
    x = jax.lax.with_sharding_constraint(x, sharding.replicated(mesh))
    x = jax.lax.with_sharding_constraint(x, sharding.batch(mesh))
    d = jax.lax.with_sharding_constraint(denoiser(x, time, cond), sharding.batch(mesh))
    return jax.lax.with_sharding_constraint(d, sharding.replicated(mesh))

  ways = {"ring": (denoiser, sharding.window(mesh)), "plain": (spread, None)}
  print("| table | way | kind | in a pass | bytes | in states |")
  print("|---|---|---|---|---|---|")
  for name in ("ddpm", "dpmpp2m", "heun"):
    table = tables.build(sigma_d=0.5, name=name, steps=100)
    for way, (net, over) in ways.items():
      call = functools.partial(
        paradigms.sample, net, table, window=args.window, tolerance=0.1, sharding=over
      )
      x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
      keys = jax.eval_shape(lambda: sequential.keys_of(jnp.arange(1)))
      text = jax.jit(lambda x, k, f=call: f(x, k, None)).lower(x, keys).compile()
      for kind, (number, size) in sorted(count(text.as_text()).items()):
        states = size / 4 / math.prod(shape)
        row = (name, way, kind, str(number), f"{size:,}", f"{states:.1f}")
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
  main()
