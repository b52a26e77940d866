"""What a run reports survives kills, restarts and odd values."""

import io
import itertools
import json
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sdiff_jax.io import progress
from sdiff_jax.training import metric_writer

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def _log(workdir, steps, start=0, value=0.0):
  with metric_writer.Writer(workdir, total=10, start=start) as out:
    for step in steps:
      out.scalars(step, {"loss": value})


def _events(workdir):
  """Returns the TensorBoard events of a run, file by file in order."""
  events = []
  for path in sorted((workdir / "tensorboard").glob("events*")):
    content, at = path.read_bytes(), 0
    while at < len(content):
      (length,) = struct.unpack_from("<Q", content, at)
      events.append(Event.FromString(content[at + 12 : at + 12 + length]))
      at += 16 + length  # the length and the record each carry a checksum
  return events


def test_scalars_are_lines_of_strict_json(tmp_path):
  with metric_writer.Writer(tmp_path, total=2) as out:
    out.scalars(1, {"a": 1, "b": np.float32(0.5), "c": jnp.bfloat16(2)})
    out.scalars(np.int64(2), {"a": np.nan, "b": jnp.inf, "c": -np.inf, "d": 0.1})

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line, parse_constant=refuse) for line in lines] == [
    {"step": 1, "a": 1.0, "b": 0.5, "c": 2.0},
    {"step": 2, "a": None, "b": None, "c": None, "d": 0.1},
  ]


def test_lines_are_on_disk_before_the_writer_closes(tmp_path):
  with metric_writer.Writer(tmp_path, total=2) as out:
    out.scalars(1, {"loss": 3})
    assert metric_writer.read_metrics(tmp_path) == [{"step": 1, "loss": 3.0}]


def test_leaving_closes_the_files_even_after_an_error(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    with metric_writer.Writer(tmp_path, total=2) as out:
      raise KeyboardInterrupt
  with pytest.raises(ValueError, match="closed file"):
    out.scalars(1, {"loss": 3})


def test_resume_drops_the_lost_lines(tmp_path):
  _log(tmp_path, [2, 4, 6, 8], value=1.0)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 10, "lo')
  _log(tmp_path, [6, 8, 10], start=4, value=2.0)
  text = (tmp_path / "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  assert [(row["step"], row["loss"]) for row in rows] == [
    (2, 1.0),
    (4, 1.0),
    (6, 2.0),
    (8, 2.0),
    (10, 2.0),
  ]
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"metrics.jsonl", "tensorboard"}  # no temporary file is left


def test_a_start_from_scratch_drops_everything(tmp_path):
  _log(tmp_path, [0, 1])
  _log(tmp_path, [0])
  assert [row["step"] for row in metric_writer.read_metrics(tmp_path)] == [0]


def test_a_kill_while_lines_are_dropped_loses_none(tmp_path, monkeypatch):
  _log(tmp_path, [1, 2, 3])

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(metric_writer.os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    _log(tmp_path, [], start=2)
  assert [row["step"] for row in metric_writer.read_metrics(tmp_path)] == [1, 2, 3]


def test_read_metrics_tolerates_half_a_line_or_no_file(tmp_path):
  assert metric_writer.read_metrics(tmp_path) == []
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"')
  assert metric_writer.read_metrics(tmp_path) == [{"step": 1}]


def test_tensorboard_purges_the_lost_steps(tmp_path):
  _log(tmp_path, [4, 6])
  _log(tmp_path, [6], start=4)
  events = _events(tmp_path)
  starts = [e.step for e in events if e.session_log.status == SessionLog.START]
  assert starts == [0, 5]  # TensorBoard hides what came before from that step on
  assert [e.step for e in events if e.summary.value] == [4, 6, 6]


def test_tensorboard_gets_finite_numbers_only(tmp_path):
  with metric_writer.Writer(tmp_path, total=1) as out:
    out.scalars(1, {"loss": 2.0, "norm": np.nan})
  values = [value for event in _events(tmp_path) for value in event.summary.value]
  assert [(value.tag, value.simple_value) for value in values] == [("loss", 2.0)]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_go_to_disk_and_tensorboard(tmp_path, channels):
  image = np.arange(4 * 5 * channels, dtype=np.uint8).reshape(4, 5, channels)
  with metric_writer.Writer(tmp_path, total=1) as out:
    out.image(70, "ema", image)
  path = tmp_path / "samples" / "ema_0000070.png"
  with Image.open(path) as stored:
    np.testing.assert_array_equal(np.asarray(stored), image.squeeze())
  (value,) = (v for event in _events(tmp_path) for v in event.summary.value)
  with Image.open(io.BytesIO(value.image.encoded_image_string)) as stored:
    expected = np.broadcast_to(image, (4, 5, 3))
    np.testing.assert_array_equal(np.asarray(stored.convert("RGB")), expected)


def test_an_inactive_writer_writes_nothing(tmp_path, capsys):
  with metric_writer.Writer(tmp_path / "run", total=1, active=False) as out:
    out.scalars(1, {"loss": 1.0})
    out.image(1, "ema", np.zeros((2, 2, 3), np.uint8))
    out.progress(1, images_per_second=1.0, loss=1.0)
  assert list(tmp_path.iterdir()) == []
  assert capsys.readouterr().err == ""


def test_plain_progress_prints_now_and_then(tmp_path, capsys, monkeypatch):
  clock = itertools.count(100, 12)  # seconds: twelve pass between two calls
  monkeypatch.setattr(
    progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock))
  )
  with metric_writer.Writer(tmp_path, total=80, start=10, unit="points") as out:
    for step in range(20, 81, 10):
      out.progress(step, images_per_second=1234.4, loss=0.25)
  assert capsys.readouterr().err.splitlines() == [
    "step 20/80, 1,234 points/s, loss 0.25",
    "step 50/80, 1,234 points/s, loss 0.25, 00:36 left",
    "step 80/80, 1,234 points/s, loss 0.25, 00:00 left",
  ]


def test_plain_progress_always_prints_the_last_step(tmp_path, capsys):
  with metric_writer.Writer(tmp_path, total=3) as out:
    for step in (1, 2, 3):
      out.progress(step, images_per_second=1.0, loss=1.0)
  lines = capsys.readouterr().err.splitlines()
  assert [line.split(",")[0] for line in lines] == ["step 1/3", "step 3/3"]


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", terminal)
  with metric_writer.Writer(tmp_path, total=100, start=40) as out:
    out.progress(75, images_per_second=2500.0, loss=0.125)
  last = terminal.getvalue().split("\r")[-1]
  assert last.startswith("step  75% |")
  assert "| 75/100, 2,500 images/s, loss 0.125, " in last
  assert last.rstrip().endswith(" left")
