"""A feature network and a metric of another project, by the command line."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from quick_xla import xla_flags

from sdiff_jax import registry
from sdiff_jax.metrics import Metric

ROOT = pathlib.Path(__file__).parents[2]
NETWORK = """
import numpy as np
from sdiff_jax import registry
from sdiff_jax.metrics.features import FeatureNetwork

@registry.register(
  "metrics.features",
  "quadrants",
  columns={"fd_quadrants": ("FD-Quadrants", "{:.1f}", "in the means of quadrants")},
)
def load(path):
  def apply(params, images):
    B, H, W, C = images.shape
    x = images.astype(np.float32).reshape(B, 2, H // 2, 2, W // 2, C)
    return x.mean((2, 4, 5)).reshape(B, 4)

  return FeatureNetwork("fd_quadrants", apply, {})
"""
METRIC = """
import numpy as np
from sdiff_jax import registry
from sdiff_jax.metrics import MOMENTS, Metric

@registry.register(
  "metrics",
  "brightness",
  columns={
    "brightness": ("Brightness", "{:.3f}", "mean of the features"),
    "brightness_gap": ("Gap", "{:+.3f}", "difference to real images"),
  },
)
def build(*, network):
  def update(features, indices, size):
    return features.sum() / (size * features.shape[1])

  def compute(samples, real, brightness):
    gap = brightness - real.mean.mean()
    return {"brightness": float(brightness), "brightness_gap": float(gap)}

  return Metric(compute, needs=(MOMENTS,), update=update, merge=lambda a, b: a + b)
"""
CONFIG = """
from sdiff_jax import config

def get_config():
  c = config.base(plugins=("quadrants", "brightness"))
  c.data = config.component("data", "npz", path={data!r})
  c.evaluate.update(images={images!r}, features="quadrants", pr_num_images=5)
  return c
"""


@pytest.mark.slow
def test_a_network_and_a_metric_are_one_file_each(tmp_path):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 60, 8, 8, 1)).astype(np.uint8)
  for name, x in zip(("real", "fake"), images, strict=True):
    np.savez(tmp_path / f"{name}.npz", x)
  (tmp_path / "quadrants.py").write_text(NETWORK)
  (tmp_path / "brightness.py").write_text(METRIC)
  data, fake = (str(tmp_path / f"{name}.npz") for name in ("real", "fake"))
  (tmp_path / "config.py").write_text(CONFIG.format(data=data, images=fake))
  run = tmp_path / "run"

  def call(*args):
    done = subprocess.run(
      [sys.executable, "-m", "sdiff_jax.main", f"--workdir={run}", *args],
      cwd=ROOT,
      env=os.environ
      | {
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
        "HOME": str(tmp_path),
        "XLA_FLAGS": xla_flags(1),
      },
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  table = call(f"--config={tmp_path / 'config.py'}", "--job=evaluate")
  headers = ("FD-Quadrants", "Precision", "Recall", "Brightness", "Gap")
  assert all(header in table for header in headers)
  (row,) = json.loads((run / "evaluate" / "images.json").read_text())
  real, fake = images.astype(np.float64).mean((1, 2, 3, 4))
  assert row["brightness"] == pytest.approx(fake, rel=1e-5)
  assert row["brightness_gap"] == pytest.approx(fake - real, abs=1e-3)
  assert row["fd_quadrants"] > 0

  config = {"loss": {"name": "diffusion"}, "model": {"name": "dit"}}
  config |= {"data": {"name": "digits"}, "train": {"batch_size": 64}, "seed": 0}
  config |= {"plugins": ["quadrants", "brightness"]}
  (run / "config.json").write_text(json.dumps(config))
  (run / "evaluate" / "results.json").write_text(json.dumps([row]))
  table = call("--job=report")
  assert all(header in table for header in headers)
  page = (run / "report.html").read_text("utf-8")
  assert f"<td>{row['brightness']:.3f}</td>" in page
  assert "<dd>in the means of quadrants</dd>" in page


@pytest.mark.parametrize("kind", ["metrics", "metrics.features"])
def test_every_piece_says_how_it_is_shown(kind):
  for name in registry.names(kind):
    for key, (header, form, description) in (
      registry.lookup(kind, name).facts["columns"].items()
    ):
      assert key.isidentifier()
      assert header
      assert description
      form.format(1.0)


def test_a_metric_may_need_nothing():
  assert Metric(lambda samples, real, sums: {}).needs == ()
