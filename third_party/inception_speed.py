"""Images per second of Inception-v3 at 299 x 299 here and in PyTorch, alternating.

  taskset --cpu-list 0 python third_party/inception_speed.py \\
    --torch=PYTHON-WITH-TORCH-AND-TORCHVISION [--batch=8] [--rounds=5]

PyTorch runs torchvision's network in a process of its own, whose convolutions are those
of FID's; the poolings at their sides differ, which costs nothing. Weights are random.
Prints the median of each side, and of the ratio of each pair of turns.
"""

import argparse
import json
import statistics
import sys
import time

from peer import Peer

THEIRS = """
import sys, time, torch, torchvision
torch.manual_seed(0)
net = torchvision.models.inception_v3(
  num_classes=1008, aux_logits=False, init_weights=False, weights=None).eval()
x = torch.rand(int(sys.argv[1]), 3, 299, 299)
if sys.argv[2] == "last":
  net, x = (y.to(memory_format=torch.channels_last) for y in (net, x))
with torch.inference_mode():
  net(x)
  for line in sys.stdin:
    begin = time.perf_counter()
    net(x)
    print(time.perf_counter() - begin, flush=True)
"""


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--torch", required=True)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()

  import jax
  import jax.numpy as jnp

  from sdiff_jax.metrics.features import inception

  net, size = inception.Inception(), (args.batch, inception.SIDE, inception.SIDE, 3)
  params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, *size[1:])))
  x = jax.random.uniform(jax.random.key(1), size)
  apply = jax.jit(net.apply)
  jax.block_until_ready(apply(params, x))

  def ours() -> float:
    begin = time.perf_counter()
    jax.block_until_ready(apply(params, x))
    return time.perf_counter() - begin

  rows = {"jax": [], "torch": [], "torch, channels last": []}
  peers = {}
  for name, order in (("torch", "first"), ("torch, channels last", "last")):
    peers[name] = Peer(args.torch, "-c", THEIRS, str(args.batch), order)
  for _ in range(args.rounds):
    rows["jax"].append(ours())
    for name, peer in peers.items():
      rows[name].append(peer.ask())
  for peer in peers.values():
    peer.close()
  out = {}
  for name, seconds in rows.items():
    ratios = [a / b for a, b in zip(rows["jax"], seconds, strict=True)]
    rate = args.batch / statistics.median(seconds)
    out[name] = {"images/s": round(rate, 2), "jax/this": statistics.median(ratios)}
  json.dump(out, sys.stdout, indent=2)
  print()


if __name__ == "__main__":
  main()
