"""The README's code runs, and the files that it names exist."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np

from sdiff_jax import config

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_pieces_work_alone():
  shape = (2, 32, 32, 3)
  names = {
    "net": lambda x, t, cond: jnp.zeros_like(x),
    "xt": jnp.ones(shape),
    "v": jnp.ones(shape),
    "t": jnp.array([0.3, 1.2]),
    "cond": None,
    "seeds": np.arange(2),
  }
  exec(BLOCKS[0], names)
  assert names["g"].shape == names["x0"].shape == shape
  assert names["table"].evaluations == 31


def test_a_noise_prediction_of_your_own():
  assert len(BLOCKS[1].strip().splitlines()) < 15
  names = {"eps": lambda x, t: 0.9 * x, "np": np}
  shrunk = BLOCKS[1].replace("(32, 32, 3)", "(4,)").replace("1000", "50")
  exec(shrunk, names)
  assert names["result"].x.shape == (16, 4)
  assert np.all(names["result"].passes < 50)


def test_the_data_sets_have_the_fields_that_are_shown():
  c = config.base()
  exec(BLOCKS[2], {"c": c, "config": config})
  assert c.data.tfds_name == "cifar10"


def test_named_files_exist():
  links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
  commands = re.findall(r"(?:configs|benchmarks)/\w+\.\w+", TEXT)
  assert "docs/digits.png" in links
  for name in {*links, *commands}:
    assert (ROOT / name).exists(), name
