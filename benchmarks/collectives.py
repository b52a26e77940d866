"""Communication of devices in an iteration of ParaDiGMS, from the compiled program.

  python benchmarks/collectives.py [--devices=8] [--window=48] [--shape=64,64,4]

Two ways to shard a window over devices, compiled for simulated devices: the ring of
slots, whose states stay where they are, and the plain way, in which every device holds
all states and only the denoiser's batch is sharded. Prints counts and bytes of
collectives by kind, in the body of the loop, for each sample.
"""

import argparse
import functools
import math
import os


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

  from sdiff_jax import samplers
  from sdiff_jax.capacity import hlo
  from sdiff_jax.distributed import sharding

  mesh = sharding.make_mesh(data=1, fsdp=1, window=args.devices)
  shape = tuple(int(n) for n in args.shape.split(","))

  def denoiser(x, time, cond):
    return x * jnp.cos(time).reshape(-1, *[1] * len(shape))

  def spread(x, time, cond):
    x = jax.lax.with_sharding_constraint(x, sharding.replicated(mesh))
    x = jax.lax.with_sharding_constraint(x, sharding.batch(mesh))
    d = jax.lax.with_sharding_constraint(denoiser(x, time, cond), sharding.batch(mesh))
    return jax.lax.with_sharding_constraint(d, sharding.replicated(mesh))

  ways = {"ring": (denoiser, mesh), "plain": (spread, None)}
  print("| solver | layout | collective | count per iteration | bytes | in states |")
  print("|---|---|---|---|---|---|")
  for name in ("ddpm", "dpmpp2m", "heun"):
    sampler = samplers.build(
      f"para{name}", sigma_d=0.5, steps=100, window=args.window, tolerance=0.1
    )
    for way, (net, over) in ways.items():
      call = functools.partial(samplers.sample, sampler, net, shape=shape, mesh=over)
      seeds = jax.ShapeDtypeStruct((1,), jnp.int32)
      run = jax.jit(lambda seeds, f=call: f(seeds=seeds)).lower(seeds).compile()
      found = [c for c in hlo.read(run.as_text()) if c.in_loop]
      kinds = [c._replace(dtype="") for c in found]
      for (kind, _), (number, size, _) in hlo.total(kinds).items():
        states = size / 4 / math.prod(shape)
        row = (name, way, kind, str(number), f"{size:,}", f"{states:.1f}")
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
  main()
