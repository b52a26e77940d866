"""Damaged files of every kind end in success or in one UserError, see _judge.py."""

import contextlib
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import _judge
import _mutations
import _readers
import hypothesis
import pytest

from sdiff_jax.types import UserError

INPUTS_OF_A_SHARE = 90  # of the long test: 20,000 inputs and more of all readers
NAMES = sorted(_readers.READERS)
# Readers whose valid files take long to write are in the long test alone.
FAST = [
  pytest.param(name, marks=pytest.mark.slow) if name == "checkpoint" else name
  for name in NAMES
]


def _in_a_folder(write: Callable[[str], None], call: Callable[[str], Any]) -> str:
  """Writes an input into a new folder, judges the call on it, and returns the message."""
  folder = tempfile.mkdtemp(prefix="fuzz")
  try:
    try:
      write(folder)
    except (OSError, ValueError):  # the change does not fit the files
      return ""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
      warnings.simplefilter("ignore")
      return _judge.judge(lambda: call(folder), folder)
  finally:
    shutil.rmtree(folder)


def _run(name: str, inputs: int, *, repeatable: bool) -> None:
  """Judges a reader on many damaged inputs."""
  reader = _readers.READERS[name]

  @hypothesis.settings(
    max_examples=inputs,
    derandomize=repeatable,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(_mutations.damage(reader.files(), reader.names))
  def check(write: Callable[[str], None]) -> None:
    _in_a_folder(write, reader.call)

  check()
  canary = os.path.join(tempfile.gettempdir(), _judge.CANARY)
  assert not os.path.exists(canary), "code of an input was run"


@pytest.mark.parametrize("name", FAST)
def test_valid_files_are_read(name):
  """Otherwise the damaged ones would be refused for another reason."""
  if name == "weights canaries":
    pytest.skip("none of its files is valid")
  reader = _readers.READERS[name]
  files = reader.files()
  assert _in_a_folder(lambda folder: _mutations.write(folder, files), reader.call) == ""


@pytest.mark.parametrize("name", FAST)
def test_damaged_files(name):
  _run(name, _readers.READERS[name].share, repeatable=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_damaged_files(name):
  inputs = INPUTS_OF_A_SHARE * _readers.READERS[name].share
  _run(name, inputs, repeatable=False)


@pytest.mark.slow
def test_the_judge_sees_broken_promises(tmp_path):
  """Each promise, broken on purpose."""

  def raises() -> None:
    raise KeyError("x")

  def writes() -> None:
    (tmp_path / "new").write_text("x")

  def runs_a_process() -> None:
    os.system("true")

  class Long(UserError):
    def __str__(self) -> str:
      return "x" * 501

  def says_too_much() -> None:
    raise Long("x")

  def needs_memory() -> None:
    bytearray(b"x") * (_judge.MAX_BYTES + 2**28)

  def loops() -> None:
    while True:
      pass

  cases = {raises: "KeyError", writes: "for writing", runs_a_process: "os.system"}
  cases |= {says_too_much: "501 characters", needs_memory: "GB of memory"}
  for call, message in cases.items():
    with pytest.raises(_judge.Broken, match=message):
      _judge.judge(call, str(tmp_path))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(_judge, "MAX_SECONDS", 0.2)
    with pytest.raises(_judge.Broken, match="it computed for too long"):
      _judge.judge(loops, str(tmp_path))
  assert _judge.judge(lambda: None, str(tmp_path)) == ""
