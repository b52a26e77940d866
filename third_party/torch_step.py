"""Time of a training step here and in PyTorch: same network, batch, machine.

  python3 -m venv /tmp/torch            # PyTorch is no dependency of ours
  /tmp/torch/bin/pip install torch numpy
  python third_party/torch_step.py --torch=/tmp/torch/bin/python [--of=digits]

The network and the batch are those of configs/fashion_*.py, configs/digits_*.py (`mlp`) or
configs/fashion_unet_*.py:laptop (`edm2`, behind its patches): 10 classes, float32, Adam,
one power average, and EDM2's normalization of the weights. In PyTorch (`torch_half.py`) the
sCD step is written as its public implementations are: without gradients, the teacher's
forward and `torch.func.jvp` of the student; then a second forward of the student, with
gradients. Ours also guards against steps that are not finite and measures the gradient.
--compile adds rows for `torch.compile` of the loss.

PyTorch runs in a process of its own. First both compute F, dF/dt, losses and gradient
norms of the same inputs, and the script ends where they differ; then they take turns,
so that one is idle while the other is timed. Both use all cores: run it on a quiet
machine, or on one core with `taskset --cpu-list 0` before the command.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from peer import Peer

from sdiff_jax import config, registry
from sdiff_jax.data import class_cond
from sdiff_jax.diffusion import guidance, time_grids
from sdiff_jax.training import ema, optimizers, state, step
from sdiff_jax.types import Network

CLASSES, SIGMA_D, PROFILE = 10, 0.5, "power/0.1"
UNET = {"channels": 48, "channel_mult": (1, 2), "blocks": 1, "head_channels": 48}
# Shape of a sample, batch size, network and its fields.
SIZES = {
  "fashion": ((28, 28, 1), 256, "mlp", {"width": 1024, "depth": 4}),
  "digits": ((8, 8, 1), 128, "mlp", {"width": 256, "depth": 4}),
  "unet": ((14, 14, 4), 64, "edm2", {**UNET, "attn_resolutions": (7,), "dropout": 0.0}),
}
ADAM = {"b1": 0.9, "b2": 0.99, "eps": 1e-8}
RATE = 1e-4
LOSSES = {"teacher": "diffusion", "sCD": "scm"}
AT = 5_000  # the step that both compute: halfway through the warm-up
PAUSE = 0.2  # seconds: threads that still spin must not slow the other process


class Setup(NamedTuple):
  """What both halves compute with."""

  shape: tuple[int, int, int]
  model: dict
  network: Network
  losses: dict[str, Callable]
  params: dict
  batch: dict


def setup(of: str) -> Setup:
  """Returns losses, parameters and a batch.

  The parameters are not those of a start: F is 0 there, and hides mistakes.
  """
  shape, batch_size, name, options = SIZES[of]
  model = config.component("models", name, **options).to_dict()
  network = registry.build(
    "models", model, shape=shape, cond=class_cond(CLASSES), sigma_d=SIGMA_D
  )
  losses = {
    name: registry.build(
      "losses",
      config.component("losses", loss).to_dict(),
      network=network,
      teacher=network.apply,
      sigma_d=SIGMA_D,
    )
    for name, loss in LOSSES.items()
  }
  rng = np.random.default_rng(0)
  start = network.init(jax.random.key(0))

  def moved(x: jax.Array) -> jax.Array:
    return x + 0.02 * rng.standard_normal(x.shape, np.float32)

  params = {name: jax.tree.map(moved, start) for name in ("student", "frozen")}
  x0 = SIGMA_D * jnp.asarray(rng.standard_normal((batch_size, *shape), np.float32))
  batch = {"x0": x0, "cond": {"label": jnp.arange(batch_size) % CLASSES}}
  return Setup(shape, model, network, losses, params, batch)


def drawn(name: str, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
  """Returns the t, z and labels that a loss draws from a key."""
  chosen = config.component("losses", LOSSES[name])
  key_t, key_z, key_label, _ = jax.random.split(key, 4)
  spread = {"p_mean": chosen.p_mean, "p_std": chosen.p_std}
  cond = batch["cond"]
  if name == "teacher":
    cond = guidance.drop_labels(key_label, cond, chosen.label_dropout)
  return {
    "t": time_grids.log_normal(key_t, len(batch["x0"]), **spread, sigma_d=SIGMA_D),
    "z": SIGMA_D * jax.random.normal(key_z, batch["x0"].shape),
    "label": cond["label"],
  }


def export(folder: pathlib.Path, of: Setup, key: jax.Array) -> dict:
  """Writes what the other half needs, and returns F and dF/dt of it."""
  params, batch, network = of.params, of.batch, of.network
  rng = np.random.default_rng(1)
  x, dx = rng.standard_normal((2, *batch["x0"].shape), np.float32)
  t, dt = rng.uniform(0.1, 1.5, (2, len(x))).astype(np.float32)
  F, J = jax.jvp(
    lambda x, t: network.apply(params["student"], x, t, batch["cond"]), (x, t), (dx, dt)
  )
  arrays = {"x": x, "t": t, "dx": dx, "dt": dt, "x0": batch["x0"]} | batch["cond"]
  for name in LOSSES:
    arrays |= {f"{name}/{k}": v for k, v in drawn(name, key, batch).items()}
  for path, leaf in jax.tree.leaves_with_path(params):
    arrays[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
  np.savez(folder / "ours.npz", **arrays)
  settings = {
    name: config.component("losses", k).to_dict() for name, k in LOSSES.items()
  }
  settings |= {
    "model": of.model,
    "shape": of.shape,
    "classes": CLASSES,
    "sigma_d": SIGMA_D,
    "step": AT,
  }
  adam = {"lr": RATE, "betas": (ADAM["b1"], ADAM["b2"]), "eps": ADAM["eps"]}
  exponent = ema.power_exponent(float(PROFILE.partition("/")[2])) + 1
  settings |= {"adam": adam, "exponent": exponent}
  (folder / "settings.json").write_text(json.dumps(settings))
  return {"F": F, "J": J}


def training(of: Setup, loss: Callable) -> Callable[[int], float]:
  """Returns (count) -> seconds of so many of our steps."""
  params, batch = of.params, of.batch
  rate = lambda n: jnp.float32(RATE)  # noqa: E731
  optimizer = optimizers.build(rate, name="adam", weight_decay=0.0, clip=0.0, **ADAM)
  betas = ema.betas((PROFILE,), len(batch["x0"]))
  student = jax.tree.map(jnp.copy, params["student"])
  current = state.create(student, optimizer, tuple(betas))
  options = {"ema": betas, "learning_rate": rate, "normalize": of.network.normalize}
  function = step.jitted(step.build(loss, optimizer, **options))
  key, frozen = jax.random.key(2), params["frozen"]
  compiled = function.lower(current, batch, key, frozen).compile()

  def run(count: int) -> float:
    nonlocal current
    begin = time.perf_counter()
    for _ in range(count):
      current, _ = compiled(current, batch, key, frozen)
    jax.block_until_ready(current)
    return time.perf_counter() - begin

  run(3)
  return run


def compare(theirs: Peer, folder: pathlib.Path, ours: dict, losses: dict) -> None:
  """Checks that both halves compute the same.

  Args:
    theirs: the other half.
    folder: where it writes F and J.
    ours: our F and J.
    losses: name -> () -> (our loss, our gradient).
  """
  answer = theirs.ask(["check"])
  if "error" in answer:
    raise SystemExit(answer["error"])
  print(f"jax {jax.__version__}, torch {answer['version']}; largest differences:")
  with np.load(folder / "theirs.npz") as found:
    for name, mine in ours.items():
      worst = float(jnp.abs(mine - found[name]).max() / jnp.abs(mine).max())
      print(f"  {name}: {worst:.1e} of its largest value")
      assert worst < 1e-4, name
  for name, of in losses.items():
    value, grads = of()
    norm = sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)) ** 0.5
    mine = np.array([value, norm])
    print(f"  {name}: loss and gradient norm {mine} and {np.array(answer[name])}")
    np.testing.assert_allclose(mine, answer[name], rtol=1e-3)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--torch", required=True, help="a Python that has PyTorch")
  parser.add_argument("--of", choices=SIZES, default="fashion", help="whose network")
  parser.add_argument("--compile", action="store_true", help="time torch.compile too")
  parser.add_argument("--rounds", type=int, default=20)
  parser.add_argument("--steps", type=int, default=5, help="steps a turn")
  args = parser.parse_args()
  of = setup(args.of)
  losses, params, batch = of.losses, of.params, of.batch
  key = jax.random.key(3)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    ours = export(folder, of, key)

    def gradient(loss: Callable) -> Callable:
      both = jax.jit(jax.value_and_grad(lambda *a: loss(*a)[0]))
      at = jnp.int32(AT)
      return lambda: both(params["student"], batch, key, at, params["frozen"])

    half = pathlib.Path(__file__).with_name("torch_half.py")
    with Peer(args.torch, str(half), name) as theirs:
      compare(theirs, folder, ours, {k: gradient(v) for k, v in losses.items()})
      report(args, theirs, {k: training(of, v) for k, v in losses.items()})


def report(args: argparse.Namespace, theirs: Peer, ours: dict) -> None:
  """Times both halves in turns, and prints the table."""
  rows = [(name, False) for name in ours]
  for name in ours if args.compile else ():
    rows.append((name, True))
  for row in [*rows]:
    answer = theirs.ask(["start", *row])
    if isinstance(answer, dict):
      print(f"torch.compile, {row[0]}: {answer['error']}")
      rows.remove(row)
  seconds: dict[tuple, list] = {row: [] for row in rows}
  for _ in range(args.rounds):
    for name, compiled in rows:
      mine = ours[name](args.steps)
      time.sleep(PAUSE)
      other = theirs.ask(["run", name, compiled, args.steps])
      time.sleep(PAUSE)
      seconds[name, compiled].append((mine / args.steps, other / args.steps))
  load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
  print(
    f"{len(os.sched_getaffinity(0))} cores; load of the last 1, 5, 15 minutes {load}"
  )
  print(f"\n| step | ours | torch | torch / ours, median of {args.rounds} pairs |")
  print("|---|---|---|---|")
  for (name, compiled), pairs in seconds.items():
    mine, other = (
      statistics.median(column) * 1e3 for column in zip(*pairs, strict=True)
    )
    ratio = statistics.median(b / a for a, b in pairs)
    title = f"{name}, torch.compile" if compiled else name
    print(f"| {title} | {mine:.0f} ms | {other:.0f} ms | **{ratio:.2f}** |")


if __name__ == "__main__":
  main()
