"""The transformer's experiments, shrunk by their word, from teacher to student."""

import json
import pathlib

import numpy as np
import pytest

from sdiff_jax import config as configs
from sdiff_jax.jobs import train
from sdiff_jax.types import UserError

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def load(name: str, word: str):
  return configs.load(f"{CONFIGS / name}.py" + (f":{word}" if word else ""))


def trained(name: str, folder: pathlib.Path) -> None:
  config = load(f"imagenet256_dit_{name}", "tiny")
  assert config.model.attention == "fused"
  assert config.model.remat
  if name == "scd":
    config.teacher.workdir = str(folder / "diffusion")
  run = folder / name
  assert train.run(config, str(run)) == f"trained 4 steps: {run}"
  lines = (run / "metrics.jsonl").read_text().splitlines()
  assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)
  assert json.loads((run / "training.json").read_text())["flops"] > 0


@pytest.mark.slow
def test_a_few_steps_of_the_teacher(tmp_path):
  """Fused attention under remat in a loop, on eight devices."""
  trained("diffusion", tmp_path)


@pytest.mark.slow
def test_a_few_steps_of_the_student(tmp_path):
  """The same inside the jvp of a loss, with the teacher's velocity."""
  trained("diffusion", tmp_path)
  trained("scd", tmp_path)


@pytest.mark.parametrize("name", ["diffusion", "scd"])
def test_other_words(name):
  with pytest.raises(
    UserError, match=f"dit_{name}.py:small: the only variant is 'tiny'"
  ):
    load(f"imagenet256_dit_{name}", "small")
  assert load(f"imagenet256_dit_{name}", "").model.patch == 8  # 32 x 32 tokens
