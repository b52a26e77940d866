"""State that an interrupted computation resumes from."""

import numpy as np
import pytest

from sdiff_jax.io import snapshot

STATE = {"x": np.arange(3.0), "n": np.int64(7)}


@pytest.fixture
def path(tmp_path):
  return str(tmp_path / "run" / "partial.npz")


def saved(path, settings, **options):
  snapshot.Snapshot(path, settings, **options).save(lambda: STATE, now=True)


def test_a_state_comes_back(path):
  assert snapshot.Snapshot(path, {"seed": 0}).arrays == {}
  saved(path, {"seed": 0, "sizes": (1, 2)})
  arrays = snapshot.Snapshot(path, {"sizes": [1, 2], "seed": 0}).arrays
  assert arrays.keys() == STATE.keys()
  np.testing.assert_array_equal(arrays["x"], STATE["x"])
  assert arrays["n"] == 7


def test_other_settings_and_damaged_files_start_again(path):
  saved(path, {"seed": 0})
  assert snapshot.Snapshot(path, {"seed": 1}).arrays == {}
  with np.load(path) as stored:
    edited = {**stored, "n": np.int64(8)}
  np.savez(path, **edited)
  assert snapshot.Snapshot(path, {"seed": 0}).arrays == {}
  saved(path, {"seed": 0})
  assert snapshot.Snapshot(path, {"seed": 0}).arrays
  with open(path, "r+b") as file:
    file.truncate(200)
  assert snapshot.Snapshot(path, {"seed": 0}).arrays == {}


def test_it_saves_now_and_then(path, monkeypatch):
  monkeypatch.setattr(snapshot, "SECONDS", 3600)
  state = snapshot.Snapshot(path, {})
  state.save(lambda: pytest.fail("too early"))
  state.save(lambda: STATE, now=True)
  state.remove()
  assert snapshot.Snapshot(path, {}).arrays == {}
  state.remove()  # again


def test_one_of_several_processes_writes(path):
  saved(path, {}, write=False)
  assert snapshot.Snapshot(path, {}).arrays == {}
