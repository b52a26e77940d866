"""Flow map on Fashion-MNIST, from a fifth of its teacher's training compute.

  python -m sdiff_jax.main --config=configs/fashion_flow_map.py

Trained on data, from the weights of configs/fashion_diffusion.py. Data, network and
optimizer are those of configs/fashion_scd.py; the network has a second time as an input.
"""

import pathlib

from sdiff_jax import config
from sdiff_jax.experiment import variants

DISTILLATION = pathlib.Path(__file__).with_name("fashion_scd.py")


def get_config():
  c = config.inherit(DISTILLATION)
  c.loss = config.component(
    "losses", "flow_map", velocity="teacher", warmup_steps=60, adaptive_weight=False
  )
  c.loss.consistency_fraction = 0.25
  variants.train_on_data(c)
  c.train.steps = 374  # 20% of the FLOPs of the teacher
  c.checkpoint.update(keep_every=0)
  c.sampler.update(name="flow_map", steps=2)
  c.evaluate.samplers = ("flow_map/1", "flow_map/2", "flow_map/4")
  return c
