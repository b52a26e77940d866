"""A loss of another project: one file, trained from the command line."""

import json
import os
import pathlib
import subprocess
import sys

from quick_xla import xla_flags

ROOT = pathlib.Path(__file__).parents[2]
PLUGIN = """
import dataclasses

import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids, trigflow


@dataclasses.dataclass(frozen=True)
class Times:
  p_mean: float = -1.0
  p_std: float = 1.0


def with_bias(params):
  return params | {"bias": jnp.float32(0.0)}


@registry.register(
  "losses", "huber", title=lambda fields: f"huber {fields['delta']}",
  init_extra_params=with_bias,
)
def build(*, network, sigma_d, delta=0.5, times=Times()):
  if delta <= 0:
    raise ValueError(f"delta={delta}: must be above 0")

  def loss(params, batch, key, step, frozen):
    x0 = batch["x0"]
    t = time_grids.log_normal(
      key, len(x0), p_mean=times.p_mean, p_std=times.p_std, sigma_d=sigma_d
    )
    z = sigma_d * jnp.ones_like(x0)
    F = network.apply(params, trigflow.perturb(x0, z, t) / sigma_d, t, batch["cond"])
    error = F + params["bias"] - trigflow.velocity(x0, z, t) / sigma_d
    return jnp.mean(jnp.sqrt(error**2 + delta**2) - delta), {"bias": params["bias"]}

  return loss
"""


def test_it_is_one_file(tmp_path):
  (tmp_path / "huber_loss.py").write_text(PLUGIN)
  run = tmp_path / "run"

  def train(*args):
    command = [sys.executable, "-m", "sdiff_jax.main", f"--workdir={run}"]
    command += ["--config=configs/digits_diffusion.py", "--config.plugins=huber_loss"]
    command += ["--config.loss.name=huber", "--config.model.name=mlp"]
    command += ["--config.model.width=16", "--config.model.depth=1"]
    command += ["--config.train.steps=6", "--config.train.log_every=2", *args]
    command += ["--config.train.sample_every=0"]
    return subprocess.run(
      command,
      cwd=ROOT,
      env=os.environ
      | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "XLA_FLAGS": xla_flags(1)},
      capture_output=True,
      text=True,
      check=False,
    )

  refused = train("--config.loss.delta=-1")
  assert refused.stderr.endswith("error: config.loss.delta=-1.0: must be above 0\n")
  done = train("--config.loss.delta=0.25", "--config.loss.p_std=0.3")
  assert done.stdout == f"trained 6 steps: {run}\n", done.stderr
  stored = json.loads((run / "config.json").read_text())["loss"]
  expected = {"name": "huber", "delta": 0.25, "p_mean": -1.0, "p_std": 0.3}
  assert stored == expected
  lines = (run / "metrics.jsonl").read_text().splitlines()
  biases = [json.loads(line)["bias"] for line in lines]
  assert biases[0] != biases[-1]  # its own parameter is trained
  assert json.loads((run / "training.json").read_text())["flops"] > 0
