"""Shows that the networks of torch_networks.py are equal to ours.

  python3 -m venv /tmp/torch            # PyTorch is no dependency of ours
  /tmp/torch/bin/pip install torch numpy
  python third_party/torch_networks_check.py --torch=/tmp/torch/bin/python

Small networks with random weights are evaluated here and there, in float32: relative
differences of outputs, of the diffusion loss and of the norm of its gradient. At full
size the numbers of parameters are compared. The script fails above 1e-4.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdiff_jax.data import class_cond
from sdiff_jax.diffusion import trigflow
from sdiff_jax.models import dit, edm2

TOLERANCE, SIGMA_D, CLASSES, BATCH = 1e-4, 0.5, 10, 3
SHAPE = (16, 16, 4)
OPTIONS: dict[str, dict[str, Any]] = {
  "edm2": {
    "channels": 16,
    "channel_mult": (1, 2, 3),
    "blocks": 2,
    "attn_resolutions": (8,),
    "head_channels": 8,
  },
  "dit": {"patch": 2, "width": 32, "depth": 3, "heads": 2},
}


def arrays(name: str) -> dict[str, np.ndarray]:
  """Returns parameters, inputs, output, loss and gradient norm of one network."""
  options = {"shape": SHAPE, "cond": class_cond(CLASSES), **OPTIONS[name]}
  if name == "edm2":
    network = edm2.build(sigma_d=SIGMA_D, **options)
  else:
    network = dit.build(**options)
  rng = np.random.default_rng(1)

  # F is 0 at the start, which would hide mistakes.
  def moved(x: jax.Array) -> jax.Array:
    return x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)

  params = jax.tree.map(moved, network.init(jax.random.key(0)))
  x, z = (rng.standard_normal((BATCH, *SHAPE)).astype(np.float32) for _ in range(2))
  t = np.array([0.1, 0.8, 1.5], np.float32)
  label = np.array([3, -1, 7], np.int32)

  def loss(params: Any) -> jax.Array:
    xt = trigflow.perturb(x, z, t)
    F = network.apply(params, xt / SIGMA_D, t, {"label": label})
    error = F - trigflow.velocity(x, z, t) / SIGMA_D
    w = network.logvar(params, t)
    return jnp.mean(jnp.exp(w) * jnp.mean(error**2, (1, 2, 3)) - w)

  value, gradient = jax.jit(jax.value_and_grad(loss))(params)
  result = {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree.leaves_with_path(params)
  }
  F = jax.jit(network.apply)(params, x, t, {"label": label})
  numbers = {"F": F, "loss": value, "norm": optax.tree.norm(gradient)}
  return result | {"x": x, "z": z, "t": t, "label": label, **numbers}


def full_sizes() -> dict[str, int]:
  """Returns the numbers of parameters of EDM2-S and DiT-XL/2."""
  cond = class_cond(1000)
  small = edm2.build(shape=(64, 64, 4), cond=cond, sigma_d=SIGMA_D, preset="S")
  sizes = {"width": 1152, "depth": 28, "heads": 16}
  large = dit.build(shape=(32, 32, 4), cond=cond, patch=2, **sizes)
  counts = {}
  for name, network in (("EDM2-S", small), ("DiT-XL/2", large)):
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    counts[f"{name} parameters"] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  return counts


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--torch", required=True, help="a Python with PyTorch")
  options = parser.parse_args()
  script = pathlib.Path(__file__).with_name("torch_networks.py")
  settings = {
    name: {"shape": SHAPE, "classes": CLASSES, **OPTIONS[name]} for name in OPTIONS
  }
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "arrays.npz"
    stored = {f"{name}:{k}": v for name in OPTIONS for k, v in arrays(name).items()}
    np.savez(path, options=json.dumps(settings), **stored)
    command = [options.torch, str(script), f"--check={path}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  theirs, failed = json.loads(done.stdout.splitlines()[-1]), False
  counts = full_sizes()
  for name, value in theirs.items():
    ok = value == counts[name] if name in counts else value <= TOLERANCE
    failed |= not ok
    print(f"{name}: {value} {'' if ok else 'DIFFERS'}")
  sys.exit(int(failed))


if __name__ == "__main__":
  main()
