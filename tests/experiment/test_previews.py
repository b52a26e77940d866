"""Metrics of samples while a network is trained."""

import json
import types

import jax
import numpy as np
import pytest

from sdiff_jax import config as configs
from sdiff_jax.experiment import build, previews
from sdiff_jax.jobs import evaluate, train
from sdiff_jax.training import goodput, metric_writer
from sdiff_jax.types import UserError


def small(**fields):
  c = configs.base()
  c.model = configs.component("models", "mlp", width=8, depth=1)
  c.train.update(steps=2, batch_size=8, log_every=1, evaluate_every=2)
  c.sampler.update(name="ddim", steps=2)
  c.evaluate.update(num=16, batch_size=8, samplers=("ddim/2",))
  c.update_from_flattened_dict(fields)
  return c


@pytest.mark.slow
def test_they_are_those_of_the_job_evaluate(tmp_path):
  c, workdir = small(), str(tmp_path)
  train.run(c, workdir)
  first, last = metric_writer.read_metrics(workdir)
  assert "frechet" not in first
  assert goodput.read(workdir)["evaluate"] > 0
  evaluate.run(c, workdir)
  (row,) = json.loads((tmp_path / "evaluate" / "results.json").read_text())
  for name in ("frechet", "precision", "recall"):
    assert last[name] == pytest.approx(row[name], rel=1e-5), name


def test_samples_that_are_not_finite_have_none(capsys):
  c = small(**{"evaluate.pr_num_images": 0})
  experiment = build.build(c)
  previewed = previews.build(c, experiment)
  assert previewed.sample is None

  def evaluate(value: float) -> dict[str, float]:
    params = jax.tree.map(
      lambda x: np.full(x.shape, value, x.dtype),
      jax.eval_shape(experiment.network.init, jax.random.key(0)),
    )
    state = types.SimpleNamespace(step=7, ema={c.ema.profiles[0]: params})
    return previewed.evaluate(state)

  assert evaluate(np.nan) == {}
  assert "step 7: sampler 'ddim'" in capsys.readouterr().err
  assert evaluate(0.0)["frechet"] > 1  # of noise


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"evaluate.features": ""}, "evaluate_every=2: needs config.evaluate.features or"),
    ({"evaluate.batch_size": 9}, "config.evaluate.batch_size=9: does not divide over"),
    (
      {"evaluate.clip": "DIR"},
      "config.evaluate.clip=DIR: .* set config.sample.prompts",
    ),
    (
      {"evaluate.clip": "DIR", "sample.prompts": "a cat"},
      "config.sample.prompts=a cat: the network was trained without texts",
    ),
  ],
)
def test_mistakes(fields, message):
  c = small(**fields)
  with pytest.raises(UserError, match=message):
    previews.build(c, build.build(c))
