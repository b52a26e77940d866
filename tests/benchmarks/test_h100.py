"""The stages that are measured on a GPU, rehearsed on a CPU."""

import importlib.util
import json
import pathlib

import pytest

FILE = pathlib.Path(__file__).parents[2] / "benchmarks" / "h100.py"
PICTURES = {"attention": 1, "calibrate": 0, "sampler": 1, "step": 1, "train": 10}
SLOW = ("calibrate", "sampler", "step", "train")


@pytest.fixture(scope="module")
def h100():
  spec = importlib.util.spec_from_file_location("h100", FILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(
  "stage",
  [pytest.param(s, marks=pytest.mark.slow if s in SLOW else ()) for s in PICTURES],
)
def test_a_stage_measures_everything_and_is_not_repeated(h100, stage, tmp_path, capsys):
  command = [f"--stage={stage}", f"--out={tmp_path}", "--tiny"]
  h100.main(command)
  results = json.loads((tmp_path / f"{stage}.json").read_text())
  errors = {k: v["error"] for k, v in results.items() if "error" in v}
  assert not errors
  assert len([*tmp_path.glob("*.png")]) == PICTURES[stage]
  assert "finished in" in capsys.readouterr().out
  h100.main(command)
  assert "finished before" in capsys.readouterr().out


def test_a_stage_that_is_out_of_time_resumes(h100, tmp_path):
  stage = h100.Stage("step", tmp_path, 60.0, True)
  assert stage.measure("first", lambda: {"ms": 1.0})["ms"] == 1.0
  again = h100.Stage("step", tmp_path, -1.0, True)
  assert again.measure("first", lambda: {"ms": 2.0})["ms"] == 1.0
  with pytest.raises(h100.OutOfTime, match="second"):
    again.measure("second", lambda: {"ms": 2.0})


def test_a_failure_is_stored_and_the_next_measurement_is_made(h100, tmp_path):
  def failing() -> dict:
    raise ValueError("too large")

  stage = h100.Stage("step", tmp_path, 60.0, True)
  assert stage.measure("a", failing)["error"] == "ValueError: too large"
  stage.measure("b", lambda: {"ms": 1.0})
  assert json.loads(stage.path.read_text())["b"]["ms"] == 1.0


def test_without_a_gpu_nothing_is_measured(h100, tmp_path, capsys):
  h100.main([f"--out={tmp_path / 'out'}", "--stage=step"])
  assert capsys.readouterr().out == "step: not run: no GPU\n"
  assert not (tmp_path / "out").exists()
