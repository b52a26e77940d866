"""Latency of a chunk of actions here and in PyTorch: same network, same machine.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency
  /tmp/torch/bin/pip install torch numpy diffusers
  python third_party/torch_policy.py --torch=/tmp/torch/bin/python \\
    --teacher=runs/pusht_diffusion --student=runs/pusht_scd

The network is the teacher's, for one robot. PyTorch samples it by diffusers' DDPM in
100 steps, in a process of its own (`torch_policy_half.py`); here it is sampled by the
compiled loops, sequentially and in parallel, and the student in one and two steps. Both
use a GPU if they have one. They alternate, so that one is idle while another is timed.
"""

import argparse
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from peer import Peer

from sdiff_jax import policies
from sdiff_jax.experiment import workdir as workdir_lib

HALF = pathlib.Path(__file__).with_name("torch_policy_half.py")
SAMPLERS = ("ddpm/100", "paraddpm/100", "specddpm/100", "ddim/15", "paraddim/15")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--torch", required=True, help="a Python that has PyTorch")
  parser.add_argument("--teacher", required=True)
  parser.add_argument("--student", required=True)
  parser.add_argument("--turns", type=int, default=50)
  given = parser.parse_args()
  ours = {name: policies.load(given.teacher, sampler=name) for name in SAMPLERS}
  for steps in (1, 2):
    name = f"consistency/{steps}"
    ours[name] = policies.load(given.student, sampler=name)
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "policy.npz")
    _export(given.teacher, path)
    with Peer(given.torch, str(HALF), path) as half:
      off = half.read()
      print(f"largest difference of the two networks: {off:.2g}")
      assert off < 1e-4
      took = _turns(ours, half, given.turns)
  _print(took)


def _export(workdir: str, path: str) -> None:
  """Writes the network's parameters, its inputs and its outputs."""
  experiment, params = workdir_lib.trained(workdir_lib.read(workdir), workdir)
  random = np.random.default_rng(0)
  x = random.standard_normal((4, *experiment.dataset.shape), np.float32)
  t = np.linspace(0.1, 1.5, 4, dtype=np.float32)
  seen = random.standard_normal(
    (4, *experiment.dataset.cond["observation"].shape), np.float32
  )
  F = experiment.network.apply(params, x, jnp.asarray(t), {"observation": seen})
  leaves = jax.tree.leaves_with_path(params["net"])
  arrays = {"/".join(k.key for k in path): np.asarray(v) for path, v in leaves}
  np.savez(path, x=x, t=t, seen=seen, F=np.asarray(F), **arrays)


def _turns(
  ours: dict[str, policies.Policy], half: Peer, turns: int
) -> dict[str, np.ndarray]:
  """Returns seconds of a chunk, by name, [turns]."""
  took = {name: [] for name in ("PyTorch, diffusers' DDPM/100", *ours)}
  states = np.random.default_rng(1).uniform(150, 350, (turns + 1, 2, 5))
  for turn in range(turns + 1):
    took["PyTorch, diffusers' DDPM/100"].append(half.ask())
    for name, act in ours.items():
      begin = time.perf_counter()
      act(states[turn, -act.states :], turn)
      took[name].append(time.perf_counter() - begin)
  return {name: np.array(seconds[1:]) for name, seconds in took.items()}


def _print(took: dict[str, np.ndarray]) -> None:
  theirs, alone = (took[n] for n in ("PyTorch, diffusers' DDPM/100", "ddpm/100"))
  print(f"{'':30}   median      p95   beside PyTorch  beside ddpm/100")
  for name, seconds in took.items():
    median, p95 = np.median(seconds), np.percentile(seconds, 95)
    ratios = [np.median(x / seconds) for x in (theirs, alone)]
    print(
      f"{name:30} {1e3 * median:6.2f} ms {1e3 * p95:5.2f} ms "
      f"{ratios[0]:13.1f}x {ratios[1]:15.1f}x"
    )


if __name__ == "__main__":
  main()
