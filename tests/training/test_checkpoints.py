"""Checkpoints: what comes back, on which mesh, and how many are kept."""

import collections
import contextlib
import errno
import gc
import os
import random
import shutil
import sys
import types

import full_disk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sdiff_jax.distributed import sharding
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.training import state
from sdiff_jax.types import UserError


def make(value: float) -> state.TrainState:
  params = {"net": {"w": jnp.full((1024, 1032), value)}, "logvar": jnp.float32(value)}
  optimizer = optax.adam(1e-3)
  return state.create(params, optimizer, ("power/0.1", "half_life/100"))


def test_a_state_comes_back_bit_for_bit_on_another_mesh(tmp_path):
  saved = make(0.3)._replace(step=jnp.int32(7))
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest is None
    checkpoints.save(7, saved)
  mesh = sharding.make_mesh(2, 4, 1)
  abstract = sharding.abstract_state(jax.eval_shape(lambda: saved), mesh)
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest == 7
    loaded = checkpoints.restore(abstract)
    averages = checkpoints.restore_ema(abstract.ema)
  assert loaded.params["net"]["w"].sharding.spec == P(None, "fsdp")
  for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(loaded), strict=True):
    np.testing.assert_array_equal(a, b)
  jax.tree.map(np.testing.assert_array_equal, averages, saved.ema)


def test_only_the_newest_are_kept(tmp_path):
  with checkpoints_lib.Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, make(step))
  kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert {"2", "3"} <= kept
  assert "1" not in kept


def test_and_those_of_every_so_many_steps(tmp_path):
  with checkpoints_lib.Checkpoints(tmp_path, keep=1, keep_every=2) as checkpoints:
    for step in (1, 2, 3, 4, 5):
      checkpoints.save(step, make(step))
  kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert {n for n in kept if n.isdecimal()} == {"2", "4", "5"}
  assert checkpoints_lib.newest(tmp_path) == 5


def test_the_space_that_checkpoints_will_take(tmp_path, monkeypatch):
  one = make(1.0)
  size = sum(x.nbytes for x in jax.tree.leaves(one))

  def check(free, *, there):
    usage = collections.namedtuple("usage", "free")(free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with checkpoints_lib.Checkpoints(tmp_path, keep=2, keep_every=3) as checkpoints:
      assert len(checkpoints._checkpointer.checkpoints) == there
      checkpoints.check_disk(one, range(1, 11))

  check(5 * size, there=0)  # 3, 6, 8, 9, and 10 as it is written
  short = f"5 more checkpoints of {size / 1e6:.1f} MB need {5 * size / 1e6:.1f} MB"
  with pytest.raises(UserError, match=short):
    check(5 * size - 1, there=0)
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, one)
  check(4 * size, there=1)
  with pytest.raises(UserError, match="4 more checkpoints"):
    check(4 * size - 1, there=1)


@pytest.mark.parametrize(
  "damage", ["truncate", pytest.param("delete", marks=pytest.mark.slow)]
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, damage):
  with checkpoints_lib.Checkpoints(tmp_path, keep=3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make(step)._replace(step=jnp.int32(step)))
  files = [p for p in (tmp_path / "checkpoints/2").rglob("*") if p.is_file()]
  for path in files:
    if damage == "truncate":
      os.truncate(path, path.stat().st_size // 2)
    elif path.stat().st_size > 1000:
      path.unlink()
  abstract = sharding.abstract_state(
    jax.eval_shape(lambda: make(1.0)), sharding.make_mesh()
  )
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:  # a reader removes nothing
    checkpoints.restore_ema(abstract.ema)
  assert (tmp_path / "checkpoints/2").exists()
  with checkpoints_lib.Checkpoints(tmp_path, keep=3) as checkpoints:
    loaded = checkpoints.restore(abstract)
    assert int(loaded.step) == 1
    checkpoints.save(2, make(5.0)._replace(step=jnp.int32(2)))
  assert "checkpoint 2 is damaged, using 1" in capsys.readouterr().err
  with checkpoints_lib.Checkpoints(tmp_path, keep=3) as checkpoints:
    assert float(checkpoints.restore(abstract).params["logvar"]) == 5


def test_one_average_of_several_is_read_alone(tmp_path):
  saved = make(0.3)
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, saved)
  abstract = sharding.abstract_state(
    jax.eval_shape(lambda: saved.ema), sharding.make_mesh()
  )
  profile, *others = abstract
  assert others
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    averages = checkpoints.restore_ema({profile: abstract[profile]})
  assert [*averages] == [profile]
  jax.tree.map(np.testing.assert_array_equal, averages[profile], saved.ema[profile])


def test_no_checkpoint_and_nothing_but_damaged_ones(tmp_path):
  abstract = sharding.abstract_state(
    jax.eval_shape(lambda: make(1.0)), sharding.make_mesh()
  )
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(abstract) is None
    checkpoints.save(1, make(1.0))
  shutil.rmtree(tmp_path / "checkpoints/1/training")
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(
      UserError, match="checkpoints/1: .*training.* is missing or damaged"
    ):
      checkpoints.restore(abstract)


def small(width: int = 8, depth: int = 2) -> state.TrainState:
  layers = {f"layer{k}": {"kernel": jnp.ones((width, 4))} for k in range(depth)}
  return state.create({"net": layers}, optax.adam(1e-3), ("power/0.1", "power/0.2"))


def placed(tree):
  return sharding.abstract_state(jax.eval_shape(lambda: tree), sharding.make_mesh())


@pytest.mark.parametrize(
  ("other", "message"),
  [
    ({"width": 6}, r"net\.layer0\.kernel has shape \[8, 4\], and .* needs \[6, 4\]"),
    ({"depth": 3}, r"net\.layer2\.kernel, which the network needs, is missing"),
    ({"depth": 1}, r"net\.layer1\.kernel is no array of the network"),
  ],
)
def test_a_checkpoint_of_another_network_is_refused(tmp_path, other, message):
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(5, small())
  before = sorted(tmp_path.rglob("*"))
  needed = placed(small(**other))
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match=rf"checkpoints/5: .*{message}; it is a"):
      checkpoints.restore(needed)
    with pytest.raises(UserError, match=rf"checkpoints/5: ema\.power/0\.2\.{message}"):
      checkpoints.restore_ema({"power/0.2": needed.ema["power/0.2"]})
    with pytest.raises(UserError, match=r"ema\.power/0\.3\..* is missing"):
      checkpoints.restore_ema({"power/0.3": placed(small()).ema["power/0.2"]})
  assert sorted(tmp_path.rglob("*")) == before


def test_a_bit_that_flips_in_a_weight_is_noticed(tmp_path, capsys):
  with checkpoints_lib.Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(4, noise(4))
    checkpoints.save(5, noise(5))
  files = (tmp_path / "checkpoints" / "5" / "ema" / "d").iterdir()
  path = max(files, key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  needed = placed(noise(0))
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    averages = checkpoints.restore_ema(needed.ema)
  assert float(averages["power/0.1"]["logvar"]) == 4
  assert "checkpoint 5 is damaged, using 4: the file ema/d/" in capsys.readouterr().err
  shutil.rmtree(tmp_path / "checkpoints" / "4")
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(
      UserError, match=r"checkpoints/5: the file ema/d/.* is missing or"
    ):
      checkpoints.restore_ema(needed.ema)


def test_a_file_that_cannot_be_read_now_is_no_reason_to_remove_a_checkpoint(
  tmp_path, monkeypatch
):
  with checkpoints_lib.Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, small())
    checkpoints.save(2, small())
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:

    def fails(step, target):
      raise RuntimeError("no") from OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(checkpoints._checkpointer, "load_checkpointables", fails)
    with pytest.raises(OSError, match="Too many open files"):
      checkpoints.restore(placed(small()))
  assert checkpoints_lib.steps(tmp_path) == [1, 2]


# Orbax leaves tasks behind that did not end before its event loop was closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("sums", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_whatever_happens_to_a_file_ends_in_a_state_or_in_one_line(tmp_path, sums):
  whole, copy, rng = tmp_path / "whole", tmp_path / "copy", random.Random(0)
  with checkpoints_lib.Checkpoints(whole) as checkpoints:
    checkpoints.save(5, small())
  if not sums:  # as in checkpoints of earlier versions
    (whole / "checkpoints" / "5" / "checksums.json").unlink()
  files = [p.relative_to(whole) for p in whole.rglob("*") if p.is_file()]
  needed, refused = placed(small()), 0
  for k in range(rng.randrange(2), 3 * len(files), 2):
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    path = copy / files[k // 3]
    content = bytearray(path.read_bytes())
    if k % 3 == 0:
      content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
      path.write_bytes(content)
    elif k % 3 == 1:
      path.write_bytes(rng.choice([b"", b"garbage" * 20, content[: len(content) // 2]]))
    else:
      path.unlink()
    refused += one_line(copy, needed)
  assert 3 < refused < len(files)
  gc.collect()


def one_line(folder, needed):
  """Returns whether a checkpoint is refused; otherwise it has the right values."""
  try:
    with checkpoints_lib.Checkpoints(folder) as checkpoints:
      averages = checkpoints.restore_ema(needed.ema)
  except UserError as error:
    message = str(error)
    assert message.startswith(f"{folder / 'checkpoints' / '5'}: ")
    assert len(message) < 500
    return True
  if averages and (folder / "checkpoints" / "5" / "checksums.json").exists():
    jax.tree.map(np.testing.assert_array_equal, averages, small().ema)
  return False


def noise(step: int) -> state.TrainState:
  """Returns a state that does not compress."""
  w = jax.random.normal(jax.random.key(step), (512, 512))
  params = {"net": {"w": w}, "logvar": jnp.float32(step)}
  saved = state.create(params, optax.adam(1e-3), ("power/0.1",))
  return saved._replace(step=jnp.int32(step))


@pytest.mark.parametrize("surfaces", ["at the next save", "at the end"])
def test_a_save_that_fails(tmp_path, surfaces):
  passed = []

  def train():
    manager = checkpoints_lib.Checkpoints(tmp_path)
    with contextlib.ExitStack() as limit, manager as checkpoints:  # closed under it
      checkpoints.save(1, noise(1))
      checkpoints.wait()
      limit.enter_context(full_disk.largest_file(200_000))
      checkpoints.save(2, noise(2))
      passed.append("the save itself")
      if surfaces == "at the next save":
        checkpoints.save(3, noise(3))
      passed.append("the next save")

  with pytest.raises(OSError, match="File too large.*checkpoints"):
    train()
  assert len(passed) == (2 if surfaces == "at the end" else 1)
  assert checkpoints_lib.newest(tmp_path) == 1
  assert len(list((tmp_path / "checkpoints").iterdir())) > 1  # what it left
  abstract = sharding.abstract_state(
    jax.eval_shape(lambda: noise(1)), sharding.make_mesh()
  )
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    loaded = checkpoints.restore(abstract)
  jax.tree.map(np.testing.assert_array_equal, loaded, noise(1))
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_threads_that_report_to_a_closed_loop_are_silent(monkeypatch):
  reported = []
  monkeypatch.setattr(sys, "unraisablehook", lambda args: reported.append(args))
  checkpoints_lib._orbax.cache_clear()
  checkpoints_lib._orbax()
  for message in ("Event loop is closed", "another"):
    error = RuntimeError(message)
    sys.unraisablehook(types.SimpleNamespace(exc_value=error))
  assert [str(args.exc_value) for args in reported] == ["another"]
  monkeypatch.undo()
  checkpoints_lib._orbax.cache_clear()
