"""What a run notes about itself: step times, goodput, traces, W&B."""

import itertools
import json
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.reports import runs
from sdiff_jax.training import goodput, loop, metric_writer, profiling, step_times
from sdiff_jax.training.goodput import Goodput
from sdiff_jax.training.profiling import Span


class Saves:
  """Stands in for checkpoints; a save takes 0.05 s."""

  latest = None

  def save(self, step, state):
    time.sleep(0.05)

  def wait(self):
    pass


@jax.jit
def step(state, batch):
  y = jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ y), jnp.eye(64) * batch)
  return state + 1, {"loss": y.sum(), "skipped": jnp.float32(0)}


def run(folder, *, steps=8, slow=0.0, watch=None, **writer) -> list[dict]:
  def batches():
    for k in itertools.count():
      time.sleep(slow)
      yield jnp.float32(k)

  options = loop.LoopOptions(
    steps=steps, batch_size=2, log_every=4, save_every=4, sample_every=4
  )

  def sample(state):
    time.sleep(0.1)
    return np.zeros((2, 2, 1), np.uint8)

  with metric_writer.Writer(folder, total=steps, **writer) as out:
    loop.run(
      step,
      jnp.int32(0),
      batches(),
      out,
      Saves(),
      options,
      sample=sample,
      watch=watch,
    )
  return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_lines_say_how_long_steps_took_and_data_were_waited_for(tmp_path):
  lines = run(tmp_path, slow=0.02)
  for line in lines:
    assert 0 < line["step_seconds"] <= line["step_seconds_worst"]
    assert line["data_seconds"] >= 4 * 0.02
  total = [line["seconds"] for line in lines]
  assert total[0] < total[1]


def test_the_worst_process_and_the_median_are_told(tmp_path):
  def gather(numbers):  # three processes, of which the last is slow
    return np.stack([numbers, numbers, numbers + np.array([0, 5.0, 7.0, 0])])

  lines = run(tmp_path, watch=loop.Watch(gather=gather))
  for line in lines:
    assert line["step_seconds"] < 1
    assert 5 < line["step_seconds_worst"] < 6
    assert 7 < line["data_seconds"] < 8


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
  devices = [
    types.SimpleNamespace(memory_stats=lambda n=n: n and {"peak_bytes_in_use": n})
    for n in (None, 5, 7)
  ]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  assert step_times.peak_memory() == 7.0
  monkeypatch.setattr(jax, "local_devices", lambda: devices[:1])
  assert step_times.peak_memory() is None


def test_seconds_are_counted_by_what_they_were_spent_on(tmp_path):
  spent = Goodput()
  seconds = run(tmp_path, watch=loop.Watch(spent=spent))[-1]["seconds"]
  assert spent.seconds["sample"] >= 2 * 0.1
  assert spent.seconds["save"] >= 2 * 0.05
  goodput.write(str(tmp_path), spent)
  again = Goodput(goodput.read(str(tmp_path)))
  assert again.starts == 2
  assert again.seconds == spent.seconds | {"train": 0.0}
  # The last save comes after the last line.
  assert spent.summary(seconds)["train"] == max(seconds - spent.seconds["save"], 0)


@pytest.mark.parametrize(("start", "seconds"), [(0, 9.0), (50, 4.0), (100, 0.0)])
def test_steps_after_the_last_checkpoint_are_lost(start, seconds):
  lines = [{"step": 50, "seconds": 5.0}, {"step": 100, "seconds": 9.0}]
  assert goodput.lost(lines, start) == seconds
  assert goodput.lost([], start) == 0


def test_operations_are_summed_without_those_inside_them():
  one = [Span("a", 0, 10e9), Span("b", 1e9, 4e9), Span("c", 2e9, 1e9)]
  two = [Span("c", 0, 3e9), Span("c", 3e9, 1e9)]
  found = profiling.by_operation([one, two])
  assert [(x["name"], x["seconds"], x["count"]) for x in found] == [
    ("a", 6.0, 1),
    ("c", 5.0, 3),
    ("b", 3.0, 1),
  ]


def test_a_trace_of_some_steps_is_on_the_page(tmp_path):
  profiler = profiling.Profiler(str(tmp_path), 3, 4)
  run(tmp_path, watch=loop.Watch(profiler=profiler))
  (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
  found = profiling.read(tmp_path / "profile" / "operations.json")
  assert (found["first"], found["steps"]) == (3, 4)
  times = [operation["seconds"] for operation in found["operations"]]
  assert times == sorted(times, reverse=True)
  assert sum(times) <= found["seconds"] * (1 + 1e-6)
  counts = {x["name"]: x["count"] for x in profiling._operations(str(trace))}
  assert 4 in counts.values(), counts  # what a step does once
  table = runs._operations(found)
  assert "Costliest operations of 4 steps from step 3 on" in table
  assert found["operations"][0]["name"] in table


def test_a_trace_that_outlasts_the_run_ends_with_it(tmp_path):
  run(tmp_path, watch=loop.Watch(profiler=profiling.Profiler(str(tmp_path), 7, 99)))
  assert (tmp_path / "profile" / "operations.json").exists()


def test_weights_and_biases_gets_what_the_other_writers_get(tmp_path, monkeypatch):
  """Against a stand-in with the interface of the package."""
  said = []

  class Run:
    def log(self, numbers, step):
      said.append((step, numbers))

    def finish(self):
      said.append("finished")

  def init(**options):
    said.append(options)
    return Run()

  module = types.SimpleNamespace(init=init, Image=lambda pixels: pixels.shape)
  monkeypatch.setitem(sys.modules, "wandb", module)
  lines = run(tmp_path, wandb="project", config={"seed": 1})
  start, *logged, end = said
  assert start["project"] == "project"
  assert start["config"] == {"seed": 1}
  assert start["resume"] == "allow"
  assert end == "finished"
  numbers = {step: x for step, x in logged if "loss" in x}
  assert list(numbers) == [4, 8]
  assert numbers[4] == {k: v for k, v in lines[0].items() if k != "step"}
  assert [step for step, x in logged if "grid" in x] == [4, 8]
  run(tmp_path, wandb="project")
  assert [x["id"] for x in said if isinstance(x, dict)] == [start["id"]] * 2


def test_the_page_has_what_the_seconds_were_spent_on():
  spent = Goodput({"starts": 2, "compile": 3.0, "lost": 1.0})
  page = runs._spent(spent.summary(4.0))
  assert "Time of 3 starts" in page
  assert "<td>compile</td><td>compiling the step</td><td>3.0</td><td>37.5%</td>" in page
  assert "<td>train</td><td>steps</td><td>4.0</td><td>50.0%</td>" in page
  assert runs._spent({}) == ""
