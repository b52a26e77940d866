"""A step of sCD of Stable Diffusion 3's transformer beside dew's (dewml on PyPI).

  python benchmarks/dew.py --peer=PYTHON [--batch=32] [--pairs=9] [--steps=1]

PYTHON has dewml, see third_party/dew_step.py; it may run this script, too, so that both
have the same JAX. Both distill a transformer of the same form and size from a teacher of
random weights, with Adam and one average, in float32, on latents and texts of the same
sizes. Their processes run the same number of steps in turns, and the ratio is the median
over pairs; the user time of all threads is counted as well, since it tells the work on a
machine that others use. Memory is what XLA plans for the program, and the peak of the
resident set of each process.
"""

import argparse
import json
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import config as configs
from sdiff_jax.data import Dataset, PixelCodec
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import training
from sdiff_jax.pretrained.diffusers import saving, sd3_transformer, trigflow_network
from sdiff_jax.types import CondSpec

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "third_party"))

from peer import Peer  # noqa: E402

WIDTH, HEADS, DEPTH = 256, 4, 4
SIDE, CHANNELS, PATCH = 16, 16, 2  # of the latents
TOKENS, TEXT, POOLED = 32, 256, 128  # of the text
NETWORK = {  # SD3Transformer2DModel of diffusers
  "_class_name": "SD3Transformer2DModel",
  "sample_size": SIDE,
  "patch_size": PATCH,
  "in_channels": CHANNELS,
  "out_channels": CHANNELS,
  "num_layers": DEPTH,
  "attention_head_dim": WIDTH // HEADS,
  "num_attention_heads": HEADS,
  "joint_attention_dim": TEXT,
  "caption_projection_dim": WIDTH,
  "pooled_projection_dim": POOLED,
  "pos_embed_max_size": SIDE // PATCH,
  "qk_norm": None,
}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}


class Step:
  """Our step, compiled, and its state."""

  def __init__(self, folder: pathlib.Path, batch_size: int):
    config, key = configs.base(), jax.random.key(0)
    params = jax.jit(sd3_transformer.from_config(NETWORK).init)(key)
    parts = {"transformer": saving.network(NETWORK, params)}
    parts["scheduler"] = saving.scheduler(SCHEDULER)
    saving.save(str(folder), {"_class_name": "StableDiffusion3Pipeline"}, parts)
    shapes = {"text": (TOKENS, TEXT), "pooled": (POOLED,)}
    specs = {name: CondSpec(shape, np.float32) for name, shape in shapes.items()}
    codec = PixelCodec((SIDE, SIDE, CHANNELS), (0.0,), (0.5,))
    dataset = Dataset(lambda k: None, 0, specs, codec)
    config.model = configs.component("models", "pretrained", folder=str(folder))
    config.loss = configs.component("losses", "scm", velocity="teacher")
    config.train.batch_size = batch_size
    network = experiments.network(config, dataset)
    trainer = training.build_trainer(config, network, network, None)
    teacher = trigflow_network.parameters(str(folder))
    self.state = trainer.init(key, teacher)
    rng = np.random.default_rng(0)
    x0 = config.sigma_d * rng.standard_normal((batch_size, *dataset.shape))
    cond = {k: rng.standard_normal((batch_size, *s)) for k, s in shapes.items()}
    batch = jax.tree.map(jnp.float32, {"x0": x0, "cond": cond})
    self.arguments = batch, key, jax.tree.map(jnp.asarray, teacher)
    step = jax.jit(trainer.update, donate_argnums=0)
    self.step = step.lower(self.state, *self.arguments).compile()

  def run(self, steps: int) -> None:
    for _ in range(steps):
      self.state, metrics = self.step(self.state, *self.arguments)
    jax.block_until_ready(self.state)
    assert np.isfinite(float(metrics["loss"]))

  def about(self) -> dict:
    """Returns numbers of the program, as those of third_party/dew_step.py."""
    plan = self.step.memory_analysis()
    planned = plan.temp_size_in_bytes + plan.argument_size_in_bytes
    planned += plan.output_size_in_bytes - plan.alias_size_in_bytes
    net = jax.tree.leaves(self.state.params["net"])
    return {
      "jax": jax.__version__,
      "parameters": sum(x.size for x in net),
      "gflop": self.step.cost_analysis()["flops"] / 1e9,
      "planned_megabytes": planned / 1e6,
    }


def timed(call: Callable[[int], None], steps: int) -> dict[str, float]:
  """Returns wall and user seconds of a step, and the peak of the resident set."""
  user, begin = resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter()
  call(steps)
  seconds = time.perf_counter() - begin
  usage = resource.getrusage(resource.RUSAGE_SELF)
  peak = usage.ru_maxrss / 1e3
  user = usage.ru_utime - user
  return {"seconds": seconds / steps, "user": user / steps, "peak_megabytes": peak}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--peer", required=True, help="Python with dewml")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--pairs", type=int, default=9)
  parser.add_argument("--steps", type=int, default=1, help="in a row")
  options = parser.parse_args()
  network = {k: v for k, v in NETWORK.items() if v is not None}
  sizes = {"network": network, "tokens": TOKENS, "batch": options.batch}
  script = str(ROOT / "third_party" / "dew_step.py")
  with Peer(options.peer, script, json.dumps(sizes)) as peer:
    compare(peer, options)


def compare(peer: Peer, options: argparse.Namespace) -> None:
  """Times both in turns, and prints ratios and peaks of memory."""
  theirs_about = peer.read()
  with tempfile.TemporaryDirectory() as folder:
    ours = Step(pathlib.Path(folder), options.batch)
  for name, about in (("dew", theirs_about), ("ours", ours.about())):
    print(name, json.dumps(about), flush=True)
  peer.ask(options.steps)
  timed(ours.run, options.steps)
  steps = options.steps
  pairs = [(peer.ask(steps), timed(ours.run, steps)) for _ in range(options.pairs)]
  for name in ("seconds", "user"):
    theirs, own = ([pair[i][name] for pair in pairs] for i in range(2))
    ratios = [a / b for a, b in zip(theirs, own, strict=True)]
    print(
      f"{name} a step: dew {statistics.median(theirs):.3f}, ours "
      f"{statistics.median(own):.3f}; ratio {statistics.median(ratios):.2f}, from "
      f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} pairs"
    )
  peaks = [pairs[-1][i]["peak_megabytes"] for i in range(2)]
  print(f"peak of the resident set: dew {peaks[0]:,.0f} MB, ours {peaks[1]:,.0f} MB")


if __name__ == "__main__":
  main()
