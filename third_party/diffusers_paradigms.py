"""ParaDiGMS here and in diffusers: same network, solver, window, tolerance, machine.

  python3 -m venv /tmp/torch            # PyTorch is no dependency of ours
  /tmp/torch/bin/pip install torch numpy diffusers transformers accelerate
  python third_party/diffusers_paradigms.py --torch=/tmp/torch/bin/python
                                            [--workdir=runs/demo/seed0/teacher]

The network is the MLP trained on the digits, as a v-prediction on the cosine
schedule. diffusers runs its StableDiffusionParadigmsPipeline (its own loop, latents
out); we run the rule of the paper, and our own with its default tolerance, whose unit
is another. Errors are of each to its own sequential sampler, over a batch; the last
column is diffusers' time over ours.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.diffusion import noise_schedules, parameterizations
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.samplers import paradigms, sequential, solvers

HALF = pathlib.Path(__file__).with_name("diffusers_half.py")
OURS = {"published": 0.1, "secant": 0.1}  # rule -> tolerance
# solver, training steps, steps, window
LOOPS = (("ddpm", 100, 100, 20), ("ddpm", 1000, 1000, 48), ("ddim", 1000, 50, 25))
CASES = [
  {"kind": kind, "train_steps": T, "steps": N, "window": W, "batch": batch}
  for kind, T, N, W in LOOPS
  for batch in (1, 16)
]


def ours(case: dict, rule: str, net, shape: tuple[int, ...]) -> dict:
  """Returns passes and evaluations, their means, median seconds and the error."""
  abar = noise_schedules.alphas_cumprod("cosine", case["train_steps"])
  at = noise_schedules.timesteps(case["train_steps"], case["steps"], "leading")
  table = solvers.from_schedule(case["kind"], noise_schedules.vp(abar, at))
  level = parameterizations.vp(abar)

  def predict(x, time, cond):
    alpha, sigma = level(time)
    return net(x, jnp.arctan2(sigma, alpha), cond)

  denoiser = parameterizations.denoiser(predict, "v", level)
  keys = sequential.keys_from_seeds(np.arange(case["batch"]))
  x = sequential.sample_prior(table, keys, shape)
  cond = {"label": jnp.arange(case["batch"]) % 10}
  options = {"window": case["window"], "tolerance": OURS[rule], "update_rule": rule}
  call = jax.jit(lambda x: paradigms.run(denoiser, table, x, keys, cond, **options))
  alone = jax.jit(lambda x: sequential.sample(denoiser, table, x, keys, cond))(x)
  found = jax.block_until_ready(call(x))
  seconds = []
  for _ in range(5):
    begin = time.perf_counter()
    jax.block_until_ready(call(x))
    seconds.append(time.perf_counter() - begin)
  error = np.sqrt(np.mean((found.x - alone) ** 2) / np.mean(alone**2))
  return {
    "passes": float(found.num_iterations.mean()),
    "evaluations": float(found.num_evaluations.mean()),
    "seconds": sorted(seconds)[2],
    "error": float(error),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--torch", required=True, help="a Python that has diffusers")
  parser.add_argument("--workdir", default="runs/demo/seed0/teacher")
  args = parser.parse_args()
  config = workdir_lib.read(args.workdir)
  experiment, params = workdir_lib.trained(config, args.workdir)
  shape = experiment.dataset.shape

  def net(x, t, cond):
    return experiment.network.apply(params, x, t, cond)

  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((16, *shape), np.float32)}
    for path, leaf in jax.tree.leaves_with_path({"student": params}):
      arrays[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    np.savez(folder / "ours.npz", **arrays)
    settings = {k: config.model[k] for k in ("width", "depth", "embed")}
    settings |= {"shape": shape, "classes": 10, "sigma_d": 1.0}
    (folder / "settings.json").write_text(json.dumps(settings))
    cases = [case | {"tolerance": OURS["published"]} for case in CASES]
    (folder / "cases.json").write_text(json.dumps(cases))
    subprocess.run([args.torch, str(HALF), str(folder)], check=True)
    theirs = json.loads((folder / "rows.json").read_text())
  print(
    "| solver, window, batch | who | passes | evaluations | error | s a sample | x |"
  )
  print("|---|---|---|---|---|---|---|")
  for case, their in zip(CASES, theirs, strict=True):
    name = f"{case['kind']}-{case['steps']}, {case['window']}, {case['batch']}"
    rows = {"diffusers, tau 0.1": their}
    for rule, tolerance in OURS.items():
      rows[f"ours, {rule}, tau {tolerance}"] = ours(case, rule, net, shape)
    for who, row in rows.items():
      cells = [name, who, f"{row['passes']:.1f}", f"{row['evaluations']:.0f}"]
      cells += [f"{row['error']:.1e}", f"{row['seconds'] / case['batch']:.4f}"]
      cells += [f"{their['seconds'] / row['seconds']:.1f}"]
      print("|", " | ".join(cells), "|")


if __name__ == "__main__":
  main()
