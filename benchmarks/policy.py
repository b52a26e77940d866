"""Modeled time of a chunk of actions on one accelerator, for one robot.

  python benchmarks/policy.py RUN [--window=20]

RUN is a policy's work directory after --job=rollout, which measured the iterations. A
call of the network costs max(FLOPs / peak, bytes / bandwidth), plus a launch for every
kernel; launches dominate small networks. Their number is the number of instructions of
the programs compiled for a CPU; the compilers of GPUs and TPUs fuse differently.
Nothing here was measured on an accelerator.
"""

import argparse
import json
import pathlib
import re

import jax
import jax.numpy as jnp

from sdiff_jax.experiment import policies, sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.policies import Policy

# float32 matrix products in FLOP/s (TF32 on the H100, 6 passes of bf16 on TPU v5e and
# v6e), bytes/s of memory, seconds a launch (CUDA graphs; steps of a TPU program).
CHIPS = {
  "H100 SXM": (495e12, 3.35e12, 2.5e-6),
  "TPU v5e": (197e12 / 6, 0.82e12, 1.0e-6),
  "TPU v6e": (918e12 / 6, 1.64e12, 1.0e-6),
}
KERNELS = re.compile(r"= \S+ (fusion|dot|convolution|custom-call|while|reduce|copy)\(")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("run", type=pathlib.Path)
  parser.add_argument("--window", type=int, default=20)
  given = parser.parse_args()
  config = workdir_lib.read(str(given.run))
  config.sampler.window = given.window
  experiment, params = workdir_lib.trained(config, str(given.run))
  rows = json.loads((given.run / "rollout" / "results.json").read_text())
  print(f"{'sampler':16} iterations " + " ".join(f"{name:>12}" for name in CHIPS))
  for row in rows:
    sampler = sampling.build_sampler(config, row["sampler"])
    flops, size = _cost(experiment, params, sampler.window)
    launches = _launches(policies.build(config, experiment, params, sampler))
    times = [
      row["passes"] * (max(flops / peak, size / memory) + launches * launch)
      for peak, memory, launch in CHIPS.values()
    ]
    cells = " ".join(f"{1e3 * t:9.3f} ms" for t in times)
    print(
      f"{row['sampler']:16} {row['passes']:6.1f} {cells}   {launches} launches per iteration"
    )


def _cost(experiment, params, batch: int) -> tuple[float, float]:
  """Returns FLOPs of a call of the network, and bytes of its parameters and inputs."""
  source = experiment.dataset
  x = jnp.zeros((batch, *source.shape), jnp.float32)
  cond = {
    "observation": jnp.zeros((batch, *source.cond["observation"].shape), jnp.float32)
  }
  call = jax.jit(experiment.network.apply).lower(params, x, jnp.ones(batch), cond)
  leaves = jax.tree.leaves((params["net"], x, x, cond))
  return float(call.cost_analysis()["flops"]), float(
    sum(leaf.nbytes for leaf in leaves)
  )


def _launches(policy: Policy) -> int:
  """Returns the instructions of the loop's body, or of all of it without a loop."""
  text = policy.compiled.as_text()
  blocks = re.split(r"\n\n", text)
  counts = [len(KERNELS.findall(b)) for b in blocks if not b.startswith("%fused")]
  return max(counts)


if __name__ == "__main__":
  main()
