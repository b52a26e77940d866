"""Checkpoints: what comes back, on which mesh, and how many are kept."""

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


def test_the_error_of_a_save_surfaces(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:

    class Broken:
      def result(self):
        raise OSError("disk full")

    checkpoints._pending = Broken()
    with pytest.raises(OSError, match="disk full"):
      checkpoints.save(1, make(1.0))
