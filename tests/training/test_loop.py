"""The loop: its order, its means, and that it never waits for the device."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.training import loop, metric_writer


class Recorder:
  """Stands in for the checkpoints and notes what happened when."""

  latest = 3

  def __init__(self):
    self.events = []

  def save(self, step, state):
    self.events.append(("save", step, int(state)))

  def wait(self):
    self.events.append(("wait",))


def run(tmp_path, *, start=0, steps=10, bad=-1, recorder=None, **changed):
  """Counts: the state is the number of steps, the loss is the batch."""
  recorder = recorder or Recorder()

  @jax.jit
  def step(state, batch):
    return state + 1, {"loss": batch, "skipped": jnp.where(batch == bad, 1.0, 0.0)}

  def sample(state):
    recorder.events.append(("sample", int(state)))
    return np.zeros((2, 2, 1), np.uint8)

  def evaluate(state):
    recorder.events.append(("evaluate", int(state)))
    return {"fid": 10.0 - int(state)}

  batches = (jnp.float32(k) for k in itertools.count(start))
  stopping = changed.pop("stopping", lambda step: False)
  options = {"log_every": 4, "save_every": 3, "sample_every": 5} | changed
  with metric_writer.Writer(tmp_path, total=steps, start=start) as out:
    state = loop.run(
      step,
      jnp.int32(start),
      batches,
      out,
      recorder,
      loop.LoopOptions(steps=steps, batch_size=2, **options),
      start=start,
      sample=sample,
      evaluate=evaluate,
      stopping=stopping,
    )
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  return int(state), recorder.events, [json.loads(line) for line in lines]


def test_order_of_events_and_means(tmp_path):
  state, events, lines = run(tmp_path)
  assert state == 10
  assert events == [
    ("save", 3, 3),
    ("sample", 5),
    ("save", 6, 6),
    ("save", 9, 9),
    ("sample", 10),
    ("save", 10, 10),
    ("wait",),
  ]
  assert [line["step"] for line in lines] == [4, 8, 10]
  means = [line["loss"] for line in lines]
  assert means == [np.mean(range(4)), np.mean(range(4, 8)), np.mean([8, 9])]
  assert all(line["images_per_second"] > 0 for line in lines)
  assert lines[0]["seconds"] < lines[-1]["seconds"]


def test_metrics_of_samples_are_in_the_line_of_their_step(tmp_path):
  """Which exists before the checkpoint of that step, so that no step is measured twice."""
  _, events, lines = run(tmp_path, sample_every=0, evaluate_every=3)
  assert events[:4] == [
    ("evaluate", 3),
    ("save", 3, 3),
    ("evaluate", 6),
    ("save", 6, 6),
  ]
  assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 10]
  assert [line.get("fid") for line in lines] == [7, None, 4, None, 1, None]
  assert [line["loss"] for line in lines] == [1, 3, 4.5, 6.5, 8, 9]


def test_it_goes_on_from_where_it_was(tmp_path):
  run(tmp_path, steps=6)
  state, events, lines = run(tmp_path, start=6, steps=10, sample_every=0)
  assert state == 10
  assert events == [("save", 9, 9), ("save", 10, 10), ("wait",)]
  assert [line["step"] for line in lines] == [4, 6, 8, 10]
  assert lines[2]["loss"] == 6.5


def test_nothing_left_to_do(tmp_path):
  state, events, lines = run(tmp_path, start=10, steps=10)
  assert (state, events, lines) == (10, [], [])


def test_a_step_that_is_not_finite_ends_the_run_before_anything_is_saved(tmp_path):
  recorder = Recorder()
  message = "step 5: the loss .* that of step 3$"
  with pytest.raises(FloatingPointError, match=message):
    run(tmp_path, bad=4, recorder=recorder)
  assert [event for event in recorder.events if event[0] == "save"] == [("save", 3, 3)]


def test_or_is_counted_and_left_out(tmp_path):
  state, _, lines = run(tmp_path, bad=4, skip_nonfinite=True)
  assert state == 10
  assert [line["skipped"] for line in lines] == [0, 0.25, 0]


def test_stopping_saves_and_returns(tmp_path):
  turns = iter([False] * 4 + [True])
  state, events, lines = run(
    tmp_path, stopping=lambda step: next(turns), sample_every=0
  )
  assert state == 5
  assert events == [("save", 3, 3), ("save", 5, 5), ("wait",)]
  assert [line["step"] for line in lines] == [4, 5]
