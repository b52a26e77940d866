"""Two-time flow map on 8 x 8 digits: images in any number of steps.

  python -m sdiff_jax.main --config=configs/digits_flow_map.py

Distills configs/digits_diffusion.py. Data, network and optimizer are those of
configs/digits_scd.py; the network has a second time as an input.
"""

import pathlib

from sdiff_jax import config

CONSISTENCY = pathlib.Path(__file__).with_name("digits_scd.py")


def get_config():
  c = config.inherit(CONSISTENCY)
  c.loss = config.component(
    "losses", "flow_map", velocity="teacher", warmup_steps=1600, adaptive_weight=False
  )
  c.sampler.update(name="flow_map", steps=2)
  c.evaluate.samplers = ("flow_map/1", "flow_map/2", "flow_map/4", "flow_map/8")
  return c
