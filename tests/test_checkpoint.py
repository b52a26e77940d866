"""Checkpoints: what comes back, on which mesh, and how many are kept."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sdiff_jax import checkpoint, sharding, state
from sdiff_jax.jobs import experiment


def make(value: float) -> state.TrainState:
  params = {"net": {"w": jnp.full((1024, 1032), value)}, "logvar": jnp.float32(value)}
  optimizer = optax.adam(1e-3)
  return state.create(params, optimizer, ("power/0.1", "half_life/100"))


def test_a_state_comes_back_bit_for_bit_on_another_mesh(tmp_path):
  saved = make(0.3)._replace(step=jnp.int32(7))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest is None
    checkpoints.save(7, saved)
  mesh = sharding.make_mesh(2, 4, 1)
  abstract = experiment.place(jax.eval_shape(lambda: saved), mesh)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest == 7
    loaded = checkpoints.restore(abstract)
    averages = checkpoints.restore_ema(abstract.ema)
  assert loaded.params["net"]["w"].sharding.spec == P(None, "fsdp")
  for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(loaded), strict=True):
    np.testing.assert_array_equal(a, b)
  jax.tree.map(np.testing.assert_array_equal, averages, saved.ema)


def test_only_the_newest_are_kept(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, make(step))
  kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert {"2", "3"} <= kept
  assert "1" not in kept


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, damage):
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make(step)._replace(step=jnp.int32(step)))
  files = [p for p in (tmp_path / "checkpoints/2").rglob("*") if p.is_file()]
  for path in files:
    if damage == "truncate":
      os.truncate(path, path.stat().st_size // 2)
    elif path.stat().st_size > 1000:
      path.unlink()
  abstract = experiment.place(jax.eval_shape(lambda: make(1.0)), sharding.make_mesh())
  with checkpoint.Checkpoints(tmp_path) as checkpoints:  # a reader removes nothing
    checkpoints.restore_ema(abstract.ema)
  assert (tmp_path / "checkpoints/2").exists()
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    loaded = checkpoints.restore(abstract)
    assert int(loaded.step) == 1
    checkpoints.save(2, make(5.0)._replace(step=jnp.int32(2)))
  assert "checkpoint 2 is damaged, using 1" in capsys.readouterr().err
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    assert float(checkpoints.restore(abstract).params["logvar"]) == 5


def test_no_checkpoint_and_nothing_but_damaged_ones(tmp_path):
  abstract = experiment.place(jax.eval_shape(lambda: make(1.0)), sharding.make_mesh())
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(abstract) is None
    checkpoints.save(1, make(1.0))
  shutil.rmtree(tmp_path / "checkpoints/1/training")
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(Exception, match="training"):
      checkpoints.restore(abstract)


def test_the_error_of_a_save_surfaces(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:

    class Broken:
      def result(self):
        raise OSError("disk full")

    checkpoints._pending = Broken()
    with pytest.raises(OSError, match="disk full"):
      checkpoints.save(1, make(1.0))
