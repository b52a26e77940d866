"""A report shows what can be read, and names the rest with the reason."""

import json
import os
import shutil

import numpy as np
import pytest

from sdiff_jax.io import image_io
from sdiff_jax.jobs import report
from sdiff_jax.training import metric_writer
from sdiff_jax.types import UserError

ROW = {"model": "teacher", "sampler": "heun/16", "kind": "model", "images": 500}
ROW |= {"evaluations": 31.0, "frechet": 1.234, "grid": "heun-16.png"}
CONFIG = {
  "loss": {"name": "diffusion"},
  "model": {"name": "mlp"},
  "data": {"name": "digits"},
  "train": {"steps": 30, "batch_size": 64},
  "teacher": {"workdir": ""},
  "init_from": "",
}
COST = {"steps": 30, "images": 1920, "seconds": 3.5, "parameters": 12, "flops": 1e9}
DEEP = b"[" * 50_000
MANY = json.dumps(CONFIG | {"more": ["x" * 100] * 200_000}).encode()


def write(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  run = tmp_path_factory.mktemp("whole") / "run"
  write(run / "config.json", CONFIG)
  write(run / "training.json", COST)
  write(run / "command.txt", b"python -m sdiff_jax.main --job=train\n")
  write(run / "evaluate" / "results.json", [ROW])
  image = np.eye(8, dtype=np.uint8)[..., None]
  image_io.save_png(run / "evaluate" / "heun-16.png", image)
  with metric_writer.Writer(run, total=30) as out:
    for step in (10, 20, 30):
      out.scalars(step, {"loss": 1 / step, "seconds": step / 10})
      out.image(step, "grid", np.full((4, 4, 3), step, np.uint8))
  return run


@pytest.fixture
def run(whole, tmp_path):
  return shutil.copytree(whole, tmp_path / "run")


def page_of(folder, capsys):
  line = report.run(None, str(folder))
  page = (folder / "report.html").read_text("utf-8")
  assert line.startswith(f"report: {folder / 'report.html'}")
  printed = capsys.readouterr()
  faults = printed.err.splitlines()
  assert all(f.startswith("not shown: ") and len(f) < 500 for f in faults)
  assert (f" ({len(faults)} files" in line) == bool(faults)
  return page, faults, printed.out


CONFIGS = {
  "cut": json.dumps(CONFIG).encode()[:60],
  "not utf8": json.dumps(CONFIG).encode("utf-16"),
  "empty": b"",
  "empty dict": {},
  "list": [],
  "null": None,
  "number": 3,
  "huge": MANY,
  "deep": DEEP,
  "section is number": CONFIG | {"model": 3},
  "data without name": CONFIG | {"data": {}},
  "loss gone": {k: v for k, v in CONFIG.items() if k != "loss"},
  "name is list": CONFIG | {"loss": {"name": []}},
  "batch is text": CONFIG | {"train": {"batch_size": "x"}},
  "plugins is number": CONFIG | {"plugins": 3},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_damaged_config_leaves_the_rest_of_the_report(run, kind, capsys):
  write(run / "config.json", CONFIGS[kind])
  page, faults, table = page_of(run, capsys)
  assert "heun/16" in table
  assert "1.23" in page
  assert str(run / "config.json") in "".join(faults)
  assert "Not shown" in page


PARTS = {
  "training.json": {
    "cut": b'{"steps": 3',
    "list": [1],
    "empty": b"",
    "text values": COST | {"seconds": "x"},
    "negative": COST | {"steps": -1},
    "nan": b'{"steps": 3, "seconds": NaN}',
    "infinite": b'{"steps": 3, "seconds": Infinity}',
    "long": COST | {"seconds": 1e300},
    "huge int": b'{"steps": %s}' % (b"9" * 5000),
  },
  "metrics.jsonl": {
    "no dict": b"[]\n[]\n",
    "no step": b'{"loss": 1}\n',
    "step text": b'{"step": "a", "loss": 1}\n',
    "loss list": b'{"step": 1, "loss": [1]}\n',
    "deep": DEEP + b"\n",
    "huge int": b'{"step": 1, "loss": %s}\n' % (b"9" * 5000),
    "binary": os.urandom(1000).replace(b"\n", b"") + b"\n\n",
  },
  "evaluate/results.json": {
    "cut": json.dumps([ROW]).encode()[:-9],
    "null": None,
    "no kind": [{k: v for k, v in ROW.items() if k != "kind"}],
    "grid number": [ROW | {"grid": 3}],
    "grid elsewhere": [ROW | {"grid": "../../secret.png"}],
    "metric text": [ROW | {"frechet": "x"}],
    "images negative": [ROW | {"images": -3}],
    "rows are numbers": [1, 2],
  },
  "command.txt": {"binary": b"\xff\xfe\x00"},
}
CASES = [(name, kind) for name, kinds in PARTS.items() for kind in kinds]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_damaged_file_leaves_the_rest_of_the_report(run, name, kind, capsys):
  write(run / name, PARTS[name][kind])
  page, faults, _ = page_of(run, capsys)
  (fault,) = faults
  assert str(run / name) in fault
  assert "Trained on digits: teacher" in page
  shown = {"training.json": "1.9\u202fk", "metrics.jsonl": "loss by step"}
  shown |= {"evaluate/results.json": "1.23", "command.txt": "--job=train"}
  for other, text in shown.items():
    assert (text in page) == (other != name)


def test_folders_pipes_and_devices_in_place_of_files(run, capsys):
  for name in "training.json", "metrics.jsonl", "command.txt":
    (run / name).unlink()
  (run / "training.json").mkdir()
  os.mkfifo(run / "metrics.jsonl")
  (run / "command.txt").symlink_to("/dev/zero")
  (run / "evaluate" / "heun-16.png").unlink()
  (run / "evaluate" / "heun-16.png").mkdir()
  os.mkfifo(run / "samples" / "a_1.png")
  _, faults, table = page_of(run, capsys)
  assert "heun/16" in table
  reasons = ("a directory", "a named pipe", "a device", "a directory", "a named pipe")
  assert len(faults) == 5
  for reason in reasons:
    assert any(f"is {reason}, not a regular file" in fault for fault in faults)


def test_a_report_on_many_runs_names_those_that_cannot_be_read(whole, tmp_path, capsys):
  folder = tmp_path / "runs [1] *"
  names = [
    "good",
    "<script>alert(1)</script>".replace("/", "-"),
    "b[a]d",
    "cut",
    "gone",
  ]
  for name in names:
    shutil.copytree(whole, folder / name)
  write(folder / "b[a]d" / "config.json", b"\xff")
  write(folder / "cut" / "config.json", b"{")
  (folder / "gone" / "config.json").unlink()
  (folder / "gone" / "config.json").symlink_to("nowhere")
  (folder / "no run").mkdir()
  (folder / "file").write_text("x")
  page, faults, _ = page_of(folder, capsys)
  assert len(faults) == 3
  assert "<script>" not in page
  assert "&lt;script&gt;alert" in page
  for name in "b[a]d", "cut", "gone":
    assert sum(str(folder / name / "config.json") in fault for fault in faults) == 1


def test_values_at_the_ends_of_their_ranges_are_drawn(run, capsys):
  lines = [{"step": 2**63, "loss": 1e308}, {"step": 0, "loss": -1e308}]
  lines += [{"step": 5, "loss": 1e-320, "gradient_norm": 1e300}] * 2
  write(run / "metrics.jsonl", "\n".join(map(json.dumps, lines)).encode())
  write(run / "training.json", COST | {"flops": 1e308, "images": 2**63})
  values = {"images_per_second": 1e30, "frechet": -1e30, "compute": 1e30}
  write(run / "evaluate" / "results.json", [ROW | values])
  page, faults, _ = page_of(run, capsys)
  assert faults == []
  assert "loss by step" in page


def test_a_name_that_is_not_utf8_and_control_characters(whole, tmp_path, capsys):
  folder = tmp_path / "runs"
  shutil.copytree(whole, folder / os.fsdecode(b"\xff\xfe"))
  shutil.copytree(whole, folder / "line\nbreak")
  results = folder / "line\nbreak" / "evaluate" / "results.json"
  write(results, [ROW | {"model": "red \x1b[31m"}])
  _, faults, table = page_of(folder, capsys)
  assert faults == []
  assert "\x1b" not in table


def test_a_teacher_that_cannot_be_read_is_named(run, tmp_path, capsys):
  write(tmp_path / "teacher" / "config.json", b"{")
  teacher = {"workdir": str(tmp_path / "teacher")}
  loss = {"name": "scm", "velocity": "teacher"}
  write(run / "config.json", CONFIG | {"teacher": teacher, "loss": loss})
  page, faults, _ = page_of(run, capsys)
  assert "Trained on digits: teacher and sCD" in page
  (fault,) = faults
  assert fault.startswith(f"not shown: {tmp_path / 'teacher' / 'config.json'} is not")


def test_a_folder_without_a_run_is_refused(tmp_path):
  (tmp_path / "a").mkdir()
  for folder in tmp_path, tmp_path / "a", tmp_path / "nothing":
    with pytest.raises(UserError, match="has no run; train one"):
      report.run(None, str(folder))
  assert not (tmp_path / "report.html").exists()
