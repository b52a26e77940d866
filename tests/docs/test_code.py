"""The Python code of the pages runs."""

import ast
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax import config, registry

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
  files, text = blocks("guides/data.md")
  c = config.base()
  exec(files, {"c": c, "config": config})
  assert c.data.tfds_name == "cifar10"
  exec(text, {"c": c, "config": config})
  assert (c.data.name, c.encode.scale) == ("captions", "vae")


def test_networks_of_others_have_the_fields_that_are_shown():
  of_edm, of_a_folder, of_timesteps = blocks("guides/pretrained.md")
  c = config.base()
  exec(of_edm, {"c": c, "config": config})
  assert c.model.process == "edm"
  exec(of_a_folder, {"c": c, "config": config})
  assert (c.model.name, c.teacher.folder, c.init_from) == ("pretrained", "DIR", "DIR")
  exec(of_timesteps, {"c": c, "config": config})
  assert (c.loss.name, c.loss.velocity) == ("consistency", "teacher")


@pytest.mark.parametrize("page", ["docs/concepts.md", "CONTRIBUTING.md"])
def test_the_layers_are_those_of_the_architecture_test(page):
  text = (DOCS.parent / page).read_text("utf-8")
  rows = re.findall(r"^\| \d+ \| ([^|]+) \|", text, re.MULTILINE)
  layers = [set(re.findall("`(\\w+)`", row)) for row in rows]
  source = (DOCS.parent / "tests" / "test_architecture.py").read_text("utf-8")
  (written,) = re.findall(r"^LAYERS = (\(.*?^\))", source, re.DOTALL | re.MULTILINE)
  assert layers == [*ast.literal_eval(written)]


def test_required_arguments_are_listed():
  """The table of CONTRIBUTING.md has the arguments of every piece of every kind."""
  text = (DOCS.parent / "CONTRIBUTING.md").read_text("utf-8")
  rows = dict(
    re.findall(r"^\| `([\w.]+)` \| `sdiff_jax/[^|]+ \| ([^|]+) \|", text, re.M)
  )
  assert len(rows) == 10
  for kind, listed in rows.items():
    for name in registry.names(kind):
      names = set(re.findall("`(\\w+)`", listed))
      if registry.lookup(kind, name).build.__module__.startswith("sdiff_jax."):
        assert set(registry.required(kind, name)) <= names | {"folder"}, (kind, name)
