"""Eight simulated devices, strict types: set before JAX starts."""

import os

from quick_xla import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(devices=8)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"

import atexit
import gc
import shutil
import tempfile

# Compiled programs, shared by all processes of a run of the tests and then removed.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sdiff_jax_tests_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
  atexit.register(
    shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True
  )

import pathlib
import sys

import buckets
import hypothesis
import jax
import numpy as np
import pytest

from sdiff_jax import main, registry

# Tracing makes many objects and few cycles; Python's own threshold of 700 objects costs a
# twentieth of the time of the tests.
gc.set_threshold(50_000, 20, 20)

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def cache() -> str:
  """The folder of compiled programs that all processes share."""
  return os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture(scope="session")
def bucket():
  """gs://test, of an emulator that runs as long as the tests."""
  with buckets.bucket() as (name, _):
    yield name


@pytest.fixture(autouse=True, scope="module")
def outside_pieces():
  """Forgets the pieces that a file of tests registers from outside the package."""
  before = {*registry._PIECES}
  yield
  for name in {*registry._PIECES} - before:
    module = registry._PIECES[name].build.__module__
    if not module.startswith("sdiff_jax."):
      del registry._PIECES[name]
      sys.modules.pop(module, None)


@pytest.fixture
def key() -> jax.Array:
  return jax.random.key(0)


@pytest.fixture
def x64():
  """Turns on float64 for one test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def fixture():
  """Loads tests/fixtures/<name>.npz."""

  def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
      return dict(arrays)

  return load


@pytest.fixture
def refused(capsys, monkeypatch):
  """(args) -> the error of a command that is refused, run in this process."""
  monkeypatch.chdir(FIXTURES.parents[1])

  def error(*args: str) -> str:
    with pytest.raises(SystemExit) as caught:
      main.main(["main", *args])
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text

  return error
