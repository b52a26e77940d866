"""Trains Stable Diffusion 3's transformer by dew's sCD, as many steps as it is asked for.

  python3.12 -m venv /tmp/dew && /tmp/dew/bin/pip install dewml==0.1.0 -e .
  /tmp/dew/bin/python benchmarks/dew.py --peer=/tmp/dew/bin/python   # the same JAX

benchmarks/dew.py gives the sizes as JSON. The objective is `rcm` with dmd_weight=0, which
is sCD without its regularizer; the step is the one that dew's `Trainer` compiles. Each
line of stdin is a number of steps, and each of stdout says what one of them cost.
"""

import json
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dew.diffusion import presets
from dew.diffusion.process import DenoisingCondition
from dew.inputs import CharTable, Condition, Field, InputSpec
from dew.nn.backbones.sd3 import SD3Transformer
from dew.objectives.diffusion.consistency import ConsistencyDistillationObjective
from dew.training import Trainer

VOCABULARY = 130


class Texts(CharTable):
  """Token states and a pooled vector out of a table of random numbers."""

  pooled_features = 0

  def encode(self, params: dict, tokens: dict) -> DenoisingCondition:
    hidden = params["table"][tokens["input_ids"]]
    return DenoisingCondition(hidden, hidden[:, 0, : self.pooled_features])


def objective(sizes: dict) -> ConsistencyDistillationObjective:
  c = sizes["network"]
  model = SD3Transformer(
    patch_size=c["patch_size"],
    in_channels=c["in_channels"],
    out_channels=c["out_channels"],
    num_layers=c["num_layers"],
    heads=c["num_attention_heads"],
    head_dim=c["attention_head_dim"],
    joint_attention_dim=c["joint_attention_dim"],
    caption_projection_dim=c["caption_projection_dim"],
    pooled_projection_dim=c["pooled_projection_dim"],
    sample_size=c["sample_size"],
    pos_embed_max_size=c["pos_embed_max_size"],
  )
  shape = (c["sample_size"], c["sample_size"], c["in_channels"])
  Texts.pooled_features = c["pooled_projection_dim"]
  encoder = Texts.from_pretrained(
    tokens=sizes["tokens"], features=c["joint_attention_dim"], vocab=VOCABULARY
  )
  inputs = InputSpec(Field("image", shape), {"conditioning": Condition(encoder)})
  example = encoder.encode(encoder.params, encoder.tokenize([""]))
  variables = jax.jit(model.init)(
    jax.random.key(0), jnp.ones((1, *shape)), jnp.ones(1), example
  )
  variables = {**variables, "encoders": {"conditioning": encoder.params}}
  return ConsistencyDistillationObjective(
    model, presets.Flow(), inputs, variables=variables, dmd_weight=0.0
  )


def main() -> None:
  sizes = json.loads(sys.argv[1])
  batch_size = sizes["batch"]
  built = objective(sizes)
  trainer = Trainer(built, optax.adam(1e-4), key=jax.random.key(0))
  state, _, _ = trainer.place()
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (batch_size, *built.inputs.sample.shape))
  texts = built.inputs.conditions["conditioning"].encoder.tokenize(
    ["a flower in a garden, red"] * batch_size
  )
  batch = {"image": pixels.astype(np.float32), "text": texts}
  step = trainer.compile(state, batch)
  plan = trainer.executable.memory_analysis()
  planned = plan.temp_size_in_bytes + plan.argument_size_in_bytes
  planned += plan.output_size_in_bytes - plan.alias_size_in_bytes
  about = {
    "jax": jax.__version__,
    "parameters": sum(x.size for x in jax.tree.leaves(built.variables["params"])),
    "gflop": trainer.executable.cost_analysis()["flops"] / 1e9,
    "planned_megabytes": planned / 1e6,
  }
  print(json.dumps(about), flush=True)
  for line in sys.stdin:
    count = int(line)
    user, begin = resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter()
    for _ in range(count):
      state, loss, *_ = step(state, batch)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - begin
    usage = resource.getrusage(resource.RUSAGE_SELF)
    assert np.isfinite(float(loss))
    cost = {"seconds": seconds / count, "user": (usage.ru_utime - user) / count}
    print(json.dumps({**cost, "peak_megabytes": usage.ru_maxrss / 1e3}), flush=True)


if __name__ == "__main__":
  main()
