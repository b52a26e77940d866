"""Host memory while the shards of a made-up network are read to a device.

  python benchmarks/host_memory.py [--gigabytes=1] [--shards=4] [--tensors=8]

A folder of float16 shards, TENSORS square matrices in each, is read as any part of a
model is, to bfloat16. On a CPU the memory of the device is that of the host, so what
counts is the resident memory above that of the arrays on the device: what is staged. It
is sampled in another thread, and bounded by the peak (VmHWM) less all arrays.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.distributed import sharding
from sdiff_jax.pretrained.diffusers import weights
from sdiff_jax.pretrained.files import safetensors_file

STEM = "diffusion_pytorch_model"


class Network:
  """Matrices, as many and as large as the folder says."""

  def __init__(self, side: int, count: int):
    self.side, self.count = side, count

  def init(self, key: jax.Array) -> dict:
    shape = self.side, self.side
    return {f"layer{k}": {"kernel": jnp.zeros(shape)} for k in range(self.count)}


def memory(field: str) -> int:
  """Returns a field of /proc/self/status in bytes."""
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(status.split(f"{field}:")[1].split()[0])


def write(folder: pathlib.Path, side: int, shards: int, tensors: int) -> None:
  """Writes the shards and their index."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((side, side)).astype(np.float16)
  places = {}
  for shard in range(shards):
    file = f"{STEM}-{shard + 1:05d}-of-{shards:05d}.safetensors"
    names = [f"layer{shard * tensors + k}.weight" for k in range(tensors)]
    safetensors_file.write(folder / file, dict.fromkeys(names, x))
    places |= dict.fromkeys(names, file)
  index = {"metadata": {}, "weight_map": places}
  (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))


def measure(folder: pathlib.Path, side: int, count: int) -> dict[str, int]:
  """Returns the bytes that were staged at most, in this process."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  place = lambda params: sharding.state(params, mesh)  # noqa: E731
  jax.block_until_ready(jnp.ones(8) + 1)
  before, done, most = memory("VmRSS"), threading.Event(), 0

  def watch() -> None:
    nonlocal most
    while not done.is_set():
      resident = memory("VmRSS")
      on_device = sum(x.nbytes for x in jax.live_arrays())
      most = max(most, resident - before - on_device)
      time.sleep(1e-3)

  thread = threading.Thread(target=watch)
  thread.start()
  params = weights.parameters(
    str(folder), Network(side, count), dtype="bfloat16", place=place
  )
  jax.block_until_ready(params)
  done.set()
  thread.join()
  total = sum(x.nbytes for x in jax.tree.leaves(params))
  return {
    "staged": most,
    "peak_less_arrays": memory("VmHWM") - before - total,
    "arrays": total,
  }


def run(gigabytes: float, shards: int, tensors: int) -> dict[str, float]:
  """Returns what was staged in a process of its own, in units of a shard."""
  side = math.isqrt(int(gigabytes * 2**30 / (2 * shards * tensors)))
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write(folder, side, shards, tensors)
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    command = [sys.executable, __file__, f"--folder={name}", f"--side={side}"]
    command += [f"--count={shards * tensors}"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  found = json.loads(out)
  return {k: v / shard for k, v in found.items()} | {"shard_bytes": shard}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--gigabytes", type=float, default=1.0)
  parser.add_argument("--shards", type=int, default=4)
  parser.add_argument("--tensors", type=int, default=8, help="in a shard")
  parser.add_argument("--folder", help=argparse.SUPPRESS)
  parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
  parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.folder:
    folder = pathlib.Path(options.folder)
    print(json.dumps(measure(folder, options.side, options.count)))
    return
  found = run(options.gigabytes, options.shards, options.tensors)
  for name, value in found.items():
    print(f"{name}: {value:.3g}")


if __name__ == "__main__":
  main()
