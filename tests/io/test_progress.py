"""Progress of long work, on a terminal and in a log."""

import io
import itertools
import sys
import types

import pytest

from sdiff_jax.io import progress


@pytest.fixture
def clock(monkeypatch):
  """Lets ten seconds pass between two calls."""
  clock = itertools.count(0, 10)
  monkeypatch.setattr(
    progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock))
  )


def test_a_log_gets_an_estimate_and_a_line_each_30_seconds(clock, capsys):
  with progress.Progress(1000, label="sample", unit="image", initial=100) as shown:
    for _ in range(9):
      shown.add(100)
  assert capsys.readouterr().err.splitlines() == [
    "sample 200/1000 images",
    "sample 300/1000 images, 10 images/s, about 01:10 left",
    "sample 600/1000 images, 10 images/s, 00:40 left",
    "sample 900/1000 images, 10 images/s, 00:10 left",
    "sample 1000/1000 images, 10 images/s, 00:00 left",
  ]


def test_short_work_is_not_estimated(clock, capsys):
  with progress.Progress(3, label="encode", unit="file") as shown:
    for _ in range(3):
      shown.add()
  assert capsys.readouterr().err.splitlines() == [
    "encode 1/3 files",
    "encode 3/3 files, 0.1 files/s, 00:00 left",
  ]


def test_a_terminal_gets_a_bar(monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", terminal)
  with progress.Progress(100, label="sample", unit="image", initial=40) as shown:
    shown.add(35)
  last = terminal.getvalue().split("\r")[-1]
  assert last.startswith("sample  75% |")
  assert "| 75/100 images, " in last
  assert " images/s, " in last


def test_other_processes_show_nothing(capsys):
  with progress.Progress(2, label="sample", active=False) as shown:
    shown.add(2)
  assert shown.done == 2
  assert capsys.readouterr().err == ""
