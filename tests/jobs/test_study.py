"""The job `study`: from configs to a page, once."""

import glob
import json
import os

import pytest

from sdiff_jax import config as config_lib
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import studies, training
from sdiff_jax.jobs import study
from sdiff_jax.training import summary
from sdiff_jax.types import UserError

CHANGES = (
  "model.width=16",
  "model.depth=1",
  "train.steps=2",
  "train.sample_every=0",
  "checkpoint.every=2",
  "evaluate.num=104",
  "evaluate.batch_size=104",
  "evaluate.baselines=False",
  "evaluate.pr_num_images=0",
)


def runs_on_disk(folder):
  """Returns the files of all runs of a study, with the times that they were written."""
  return {p: p.stat().st_mtime_ns for p in folder.glob("seed*/**/*") if p.is_file()}


def tiny(**more):
  digits = "configs/digits_{}.py".format
  runs = {
    "teacher": studies.run(digits("diffusion"), "evaluate.samplers=('ddim/2',)"),
    "vsd": studies.run(
      digits("scd"),
      "loss=vsd",
      "evaluate.samplers=('consistency/1',)",
      teacher="teacher",
    ),
    "eight": studies.run(
      digits("diffusion"), "evaluate.samplers=('ddim/3',)", weights="teacher"
    ),
  }
  return studies.build(
    "tiny",
    runs,
    title="A study",
    lead="Of nothing.",
    x="evaluations",
    panels=("frechet", "ratio"),
    seeds=(0,),
    changes=CHANGES,
    **more,
  )


@pytest.mark.slow
def test_a_study_ends_in_a_page_and_resumes(tmp_path, capsys):
  config, workdir = tiny(), str(tmp_path)
  made = study.run(config, workdir)
  assert made == f"study of 3 runs: {tmp_path}/tiny.html"
  rows = json.loads((tmp_path / "tiny.json").read_text())
  names = [entry["name"] for entry in config.study.runs]
  assert names == ["teacher", "vsd", "eight"]
  assert [row["run"] for row in rows] == names
  assert [row["evaluations"] for row in rows] == [2, 1, 3]
  by_run = {row["run"]: row for row in rows}
  assert by_run["teacher"]["ratio"] == 1
  ratio = by_run["eight"]["frechet"] / by_run["teacher"]["frechet"]
  assert by_run["eight"]["ratio"] == pytest.approx(ratio)
  ratio = by_run["vsd"]["frechet"] / by_run["teacher"]["frechet"]
  assert by_run["vsd"]["ratio"] == pytest.approx(ratio)
  models = ["teacher", "sCD + VSD", "teacher"]
  assert [row["model"] for row in rows] == models
  text = (tmp_path / "tiny.html").read_text()
  assert "Of nothing." in text
  assert "vsd, consistency/1" in text
  for name in ("tiny.png", "tiny.svg"):
    assert (tmp_path / name).stat().st_size > 1000
  # A second time nothing is trained or measured, and the page is the same.
  before = runs_on_disk(tmp_path)
  study.run(config, workdir)
  assert runs_on_disk(tmp_path) == before
  assert (tmp_path / "tiny.html").read_text() == text
  # The training's log gives points, too.
  logged = tiny(source="log")
  logged.study.update(name="log", x="step", panels=("loss",))
  study.run(logged, workdir)
  lines = json.loads((tmp_path / "log.json").read_text())
  assert {row["series"] for row in lines} == {*names}
  assert os.path.exists(tmp_path / "log.html")


@pytest.mark.slow
def test_the_tangent_of_every_checkpoint(tmp_path):
  digits = "configs/digits_{}.py".format
  one = "evaluate.samplers=('consistency/1',)"
  runs = {
    "teacher": studies.run(digits("diffusion"), drawn=False),
    "student": studies.run(
      digits("scd"), one, teacher="teacher", checkpoints=True, series="s"
    ),
  }
  config = studies.build(
    "parts",
    runs,
    title="A study",
    lead="Of parts.",
    x="step",
    panels=("grad_x", "d_t"),
    source="tangent",
    seeds=(0,),
    changes=(*CHANGES, "checkpoint.every=1", "evaluate.latency=True"),
  )
  study.run(config, str(tmp_path))
  rows = json.loads((tmp_path / "parts.json").read_text())
  assert [(row["run"], row["step"]) for row in rows] == [("student", 1), ("student", 2)]
  assert all(row["latency"] > 0 and "ratio" not in row for row in rows)
  names = ("velocity", "state", "grad_x", "d_t")
  for row in rows:
    sizes = [row[name] for name in names]
    assert min(sizes[1:]) > 0
    assert sizes[0] >= 0  # 0 as long as the student is its teacher to the bit
    # A norm of a sum.
    assert row["tangent"] < sum(sizes)
    assert row["tangent"] > 2 * max(sizes) - sum(sizes)
  assert rows[0]["state"] == rows[1]["state"]  # the batch is the same
  assert rows[0]["d_t"] != rows[1]["d_t"]
  text = (tmp_path / "parts.html").read_text()
  before = runs_on_disk(tmp_path)
  study.run(config, str(tmp_path))
  assert runs_on_disk(tmp_path) == before
  assert (tmp_path / "parts.html").read_text() == text


@pytest.mark.slow
def test_parallel_samplers_over_tolerances_and_windows(tmp_path, monkeypatch):
  file = "configs/digits_diffusion.py"
  fields = ("sampler.steps=6", "sampler.window=4", "sample.num=8")
  runs = {"teacher": studies.run(file, drawn=False)} | {
    name: studies.run(file, f"sampler.name={name}", *fields, weights="teacher")
    for name in ("paraddim", "specddpm")
  }
  config = studies.build(
    "tiny",
    runs,
    title="A study",
    lead="Of windows.",
    x="tolerance",
    panels=("passes", ("window", "passes")),
    source="parallel",
    seeds=(0,),
    changes=CHANGES,
  )
  monkeypatch.setattr(study.probes, "TOLERANCES", (0.0, 100.0))
  monkeypatch.setattr(study.probes, "WINDOWS", (1, 4, 16))
  study.run(config, str(tmp_path))
  rows = json.loads((tmp_path / "tiny.json").read_text())
  at = {(r["series"], r.get("tolerance"), r.get("window")): r for r in rows}
  assert [*at] == [
    *(("paraddim", tolerance, None) for tolerance in (0.0, 100.0)),
    *((name, None, n) for name in ("paraddim", "specddpm") for n in (1, 4)),
  ]
  exact, rough, alone = (
    at["paraddim", *k] for k in ((0, None), (100, None), (None, 1))
  )
  assert exact["error"] < 1e-5 < rough["error"]
  assert rough["passes"] == 2 < exact["passes"] <= 6
  assert (alone["passes"], alone["evaluations"]) == (6, 6)
  assert all(r["error"] is None for r in rows if r["series"] == "specddpm")
  before = runs_on_disk(tmp_path)
  study.run(config, str(tmp_path))
  assert runs_on_disk(tmp_path) == before


def test_a_budget_sets_the_number_of_steps(tmp_path):
  """Operations of a run and of those that it starts from are a share of the teacher's."""
  digits = "configs/digits_{}.py".format
  runs = {
    "teacher": studies.run(digits("diffusion")),
    "first": studies.run(digits("sct"), teacher="teacher", budget=0.25),
    "second": studies.run(digits("sct"), teacher="teacher", start="first", budget=1.0),
    "late": studies.run(digits("sct"), teacher="teacher", start="first", budget=0.25),
  }
  wanted = studies.build(
    "budget", runs, title="T", lead="L", x="compute", panels=("y",), changes=CHANGES[:2]
  ).study.to_dict()
  wanted["runs"] = {entry["name"]: entry for entry in wanted["runs"]}
  workdir = str(tmp_path)

  def config_of(name: str):
    config = study.run_config(wanted, workdir, 0, name)
    return study._budgeted(wanted, workdir, 0, name, config)

  def write(name: str, **cost: float):
    folder = tmp_path / "seed0" / name
    folder.mkdir(parents=True)
    summary.write(str(folder), cost, "")

  config = study.run_config(wanted, workdir, 0, "first")
  step = training.run_flops(config, experiments.build(config))
  assert step > 1e6
  write("teacher", steps=100, flops=400 * step)
  first = config_of("first")
  assert first.train.steps == 100
  assert first.init_from == str(tmp_path / "seed0" / "teacher")
  write("first", steps=100, flops=100 * step)
  second = config_of("second")
  assert second.train.steps == 300
  assert second.init_from == str(tmp_path / "seed0" / "first")
  with pytest.raises(UserError, match=r"budget=0\.25 of late leaves no step"):
    config_of("late")
  # Runs that exist keep their number.
  write("second", steps=7, flops=7 * step)
  assert config_of("second").train.steps == 7
  assert study._compute(wanted, workdir, 0, "second") == pytest.approx(107 / 400)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("train.stops=2", r"config\.study: train\.stops=2"),
    ("train.steps=many", r"config\.study: train\.steps=many"),
    ("loss=scmm", "losses: no 'scmm'"),
  ],
)
def test_mistakes_show_before_any_work(tmp_path, change, message):
  config = tiny()
  config.study.runs[-1]["set"] += (change,)
  with pytest.raises(UserError, match=message):
    study.run(config, str(tmp_path))
  assert not os.listdir(tmp_path)


def test_a_missing_config_is_named(tmp_path):
  config = tiny()
  config.study.runs[1]["config"] = "configs/none.py"
  with pytest.raises(UserError, match=r"no file configs/none\.py"):
    study.run(config, str(tmp_path))


@pytest.mark.parametrize(
  "given",
  [
    "",
    pytest.param("digits", marks=pytest.mark.slow),
    pytest.param("unet", marks=pytest.mark.slow),
    pytest.param("paper", marks=pytest.mark.slow),
    pytest.param("tiny", marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize("path", sorted(glob.glob("configs/studies/*.py")))
def test_runs_of_every_study_load(path, given, tmp_path):
  config = config_lib.load(f"{path}:{given}" if given else path, "missing")
  wanted = config.study.to_dict()
  runs = {entry["name"]: entry for entry in wanted["runs"]}
  for k, (name, entry) in enumerate(runs.items()):
    before = [*runs][:k]
    assert {entry["teacher"], entry["weights"]} <= {"", *before}, name
    loaded = study.run_config({**wanted, "runs": runs}, str(tmp_path), 1, name)
    assert loaded.seed == 1


def test_another_word_is_refused():
  with pytest.raises(
    UserError, match="vsd.py:big: variants are one of 'digits', 'unet', 'paper', 'tiny'"
  ):
    config_lib.load("configs/studies/vsd.py:big", "missing")
