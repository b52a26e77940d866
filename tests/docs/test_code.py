"""The Python code of the pages runs."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np

from sdiff_jax import config

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[str]:
  """Returns the Python blocks of a page."""
  return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)


def test_concepts():
  shape = (2, 32, 32, 3)
  tangent, trainer = blocks("concepts.md")
  names = {
    "net": lambda x, t, cond: jnp.zeros_like(x),
    "xt": jnp.ones(shape),
    "v": jnp.ones(shape),
    "t": jnp.array([0.3, 1.2]),
    "cond": None,
  }
  exec(tangent, names)
  assert names["F"].shape == names["g"].shape == shape
  names = {"x0": jnp.ones((8, 2))}
  exec(trainer, names)
  assert names["state"].step == 1
  assert np.isfinite(names["metrics"]["loss"])


def test_a_noise_prediction_of_your_own():
  (block,) = blocks("choose-a-sampler.md")
  assert len(block.strip().splitlines()) < 15
  shrunk = block.replace("(32, 32, 3)", "(4,)").replace("1000", "50")
  names = {"eps": lambda x, t: 0.9 * x}
  exec(shrunk, names)
  assert names["out"].x.shape == (16, 4)
  assert np.all(names["out"].num_iterations < 50)


def test_the_data_sets_have_the_fields_that_are_shown():
  (block,) = blocks("guides/data.md")
  c = config.base()
  exec(block, {"c": c, "config": config})
  assert c.data.tfds_name == "cifar10"


def test_the_network_of_edm_has_the_fields_that_are_shown():
  (block,) = blocks("guides/pretrained.md")
  c = config.base()
  exec(block, {"c": c, "config": config})
  assert c.model.process == "edm"
