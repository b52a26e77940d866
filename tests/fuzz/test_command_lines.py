"""Command lines of every kind end in success or in one UserError, see _judge.py."""

import contextlib
import io
import pathlib
import tempfile
import warnings

import _commands
import _judge
import hypothesis
import pytest


def _judged(argv: list[str], folder: str) -> str:
  with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return _judge.judge(lambda: _commands.check(argv, folder), folder)


def _run(inputs: int, *, repeatable: bool) -> None:
  """Judges many command lines."""

  @hypothesis.settings(
    max_examples=inputs,
    derandomize=repeatable,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(_commands.commands())
  def check(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
      _judged(argv, folder)

  check()
  canary = pathlib.Path(tempfile.gettempdir(), _judge.CANARY)
  assert not canary.exists(), "code of an input was run"


@pytest.mark.parametrize("file", _commands.FILES)
def test_configs_of_the_repository_are_valid(file, tmp_path, monkeypatch):
  monkeypatch.chdir(_commands.ROOT)  # some name other configs
  message = _judged(["main", f"--config={file}"], str(tmp_path))
  assert message == "" or "train it first" in message, message


def test_command_lines():
  _run(40, repeatable=True)


@pytest.mark.slow
def test_many_command_lines():
  _run(4000, repeatable=False)
