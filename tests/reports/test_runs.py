"""The report shows all there is, stands alone and survives missing parts."""

import base64
import html.parser
import json
import re

import numpy as np
import pytest

from sdiff_jax.io import image_io
from sdiff_jax.reports import results
from sdiff_jax.reports import runs as runs_lib
from sdiff_jax.training import metric_writer
from sdiff_jax.types import UserError

VOID = {"meta", "img", "source"}


class Page(html.parser.HTMLParser):
  """Checks that tags balance, and collects attributes, text and table rows."""

  def __init__(self, page: str):
    super().__init__()
    self.open, self.tags, self.text, self.rows = [], [], "", []
    self.feed(page)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in VOID:
      self.open.append(tag)
    if tag == "tr":
      self.rows.append([])

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if "style" not in self.open:
      self.text += data
    if self.open and self.open[-1] in ("th", "td"):
      self.rows[-1].append(data)

  def all(self, wanted):
    return [attributes for tag, attributes in self.tags if tag == wanted]


def _row(model, sampler, **values):
  row = {"model": model, "sampler": sampler, "kind": "model", "images": 5000}
  numbers = ("evaluations", "frechet", "precision", "recall")
  others = ("images_per_second", "compute", "grid")
  return row | dict.fromkeys(numbers + others) | values


TEACHER = _row(
  "teacher",
  "heun/16",
  evaluations=31,
  frechet=1.234,
  precision=0.9215,
  recall=0.5,
  images_per_second=4712.25,
  compute=1.0,
  grid="heun-16.png",
)
STUDENT = _row("sCD", "consistency/1", evaluations=1, frechet=float("nan"))
BASELINE = _row("training images", "as they are", kind="baseline", frechet=0.5)
TABLE = """\
Model            Sampler        NFE  Frechet  Precision  Recall  Images/s  Compute
---------------  -------------  ---  -------  ---------  ------  --------  -------
teacher          heun/16         31     1.23      92.2%   50.0%   4,712.2   100.0%
sCD              consistency/1    1        -          -       -         -        -
---------------  -------------  ---  -------  ---------  ------  --------  -------
training images  as they are      -     0.50          -       -         -        -"""


def _run(path, name="diffusion", velocity="data", rows=()):
  """Makes a finished run; without rows, one that only has its config."""
  path.mkdir()
  config = {
    "seed": 0,
    "loss": {"name": name, "velocity": velocity},
    "model": {"name": "unet"},
    "data": {"name": "digits"},
    "train": {"steps": 30, "batch_size": 64},
  }
  (path / "config.json").write_text(json.dumps(config))
  if not rows:
    return str(path)
  with metric_writer.Writer(path, total=30) as out:
    for step in (10, 20, 30):
      out.scalars(step, {"loss": 1 / step, "gradient_norm": 2.0 * step})
      out.image(step, "ema", np.full((4, 4, 3), step, np.uint8))
  training = {"steps": 12345, "images": 2_560_000, "seconds": 3723.4}
  training |= {"parameters": 1_284_000, "flops": None}
  (path / "training.json").write_text(json.dumps(training))
  (path / "command.txt").write_text("python -m sdiff_jax.main --job=train && echo\n")
  (path / "evaluate").mkdir()
  (path / "evaluate" / "results.json").write_text(json.dumps(rows))
  image_io.save_png(
    path / "evaluate" / "heun-16.png", np.eye(8, dtype=np.uint8)[..., None]
  )
  return str(path)


def _write(tmp_path, *runs):
  path = tmp_path / "pages" / "report.html"
  assert runs_lib.write(list(runs), str(path)) == str(path)
  return path.read_text("utf-8")


@pytest.fixture
def full(tmp_path):
  teacher = _run(tmp_path / "teacher", rows=[TEACHER, BASELINE])
  student = _run(tmp_path / "student", "scm", "teacher", rows=[STUDENT, BASELINE])
  return _write(tmp_path, teacher, student)


def test_page_is_whole_and_stands_alone(full):
  page = Page(full)
  sources = [a["src"] for a in page.all("img")] + [
    a["srcset"] for a in page.all("source")
  ]
  assert sources
  assert all(source.startswith("data:image/") for source in sources)
  assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
  assert not re.search(r"https?://|url\(|@import", full)


def test_title_names_what_was_trained_on_what(full):
  assert "<title>Trained on digits: teacher and sCD</title>" in full


def test_table_holds_models_then_baselines_once(full):
  header, *rows = Page(full).rows
  other = ("FID", "FD-DINOv2", "IS", "CLIP", "Latency")
  shown = [c[0] for c in results.default_columns() if c[0] not in other]
  assert header == shown
  assert rows == [
    ["teacher", "heun/16", "31", "1.23", "92.2%", "50.0%", "4,712.2", "100.0%"],
    ["sCD", "consistency/1", "1", "–", "–", "–", "–", "–"],
    ["Baselines"],
    ["training images", "as they are", "–", "0.50", "–", "–", "–", "–"],
  ]


def test_every_column_is_explained(full):
  page = Page(full)
  columns = results.default_columns()
  shown = [c for c in columns if c[1] in TEACHER]
  assert len(shown) == len(columns) - 5
  assert all(meaning in page.text for *_, meaning in shown)
  assert "not comparable with FID" in page.text
  assert "5,000 images for each result" in page.text


def test_grids_are_the_files_of_the_evaluation(full, tmp_path):
  png = (tmp_path / "teacher" / "evaluate" / "heun-16.png").read_bytes()
  images = [a["src"] for a in Page(full).all("img") if a["alt"] == "heun-16"]
  assert images == [f"data:image/png;base64,{base64.b64encode(png).decode()}"]
  assert "image k starts from the same noise" in full
  assert "image-rendering: pixelated" in full


def test_charts_come_for_light_and_dark(full):
  page = Page(full)
  dark = [attributes["srcset"] for attributes in page.all("source")]
  light = [a["src"] for a in page.all("img") if a["src"].startswith("data:image/svg")]
  assert [a["media"] for a in page.all("source")] == [
    "(prefers-color-scheme: dark)"
  ] * 4
  alts = [a["alt"] for a in page.all("img") if "by step" in a["alt"]]
  assert alts == ["loss by step", "gradient norm by step"] * 2

  def drawing(uri):
    return base64.b64decode(uri.partition("base64,")[2]).decode()

  for pair in zip(light, dark, strict=True):
    for uri, look in zip(pair, (runs_lib.LIGHT, runs_lib.DARK), strict=True):
      assert look[2][0] in drawing(uri)
  assert full.count("prefers-color-scheme: dark") == 4 + 1  # and the style sheet


def test_both_norms_share_a_chart(tmp_path):
  run = _run(tmp_path / "run")
  with metric_writer.Writer(run, total=2) as out:
    out.scalars(1, {"gradient_norm": 1.0, "tangent_norm": 3.0, "loss": np.nan})
    out.scalars(2, {"gradient_norm": 0.0, "tangent_norm": 4.0})
  alts = [a["alt"] for a in Page(_write(tmp_path, run)).all("img")]
  assert alts == ["gradient norm and tangent norm by step"]


def test_metrics_of_samples_have_charts(tmp_path):
  run = _run(tmp_path / "run")
  with metric_writer.Writer(run, total=2) as out:
    out.scalars(1, {"loss": 1.0})
    out.scalars(2, {"loss": 0.5, "clip_score": 21.5, "frechet": 3.0})
  alts = [a["alt"] for a in Page(_write(tmp_path, run)).all("img")]
  assert alts[0] == "loss by step"
  assert sorted(alts[1:]) == ["CLIP by step", "Frechet by step"]


def test_training_is_summed_up(full):
  text = Page(full).text
  for fact in ("unet", "12,345", "2.6\u202fM", "1:02:03", "1.3\u202fM", "ema, step 30"):
    assert fact in text
  assert "FLOPs</dt>" not in full  # null in training.json
  assert "python -m sdiff_jax.main --job=train && echo" in text
  assert '"batch_size": 64' in text


def test_training_grids_run_from_first_to_last(tmp_path):
  run = _run(tmp_path / "run")
  for step in range(0, 101, 5):
    path = tmp_path / "run" / "samples" / f"ema_{step:07d}.png"
    image_io.save_png(path, np.zeros((2, 2, 3), np.uint8))
  steps = re.findall(r"ema, step (\d+)", _write(tmp_path, run))
  assert steps == ["0", "20", "40", "60", "80", "100"]


def test_missing_parts_are_left_out(tmp_path):
  page = Page(_write(tmp_path, _run(tmp_path / "run", "scm", "data")))
  assert "Trained on digits: sCT" in page.text
  assert "Results" not in page.text
  assert "Samples" not in page.text
  assert page.all("img") == []


def test_a_grid_that_is_gone_is_left_out(tmp_path):
  run = _run(tmp_path / "run", rows=[TEACHER])
  (tmp_path / "run" / "evaluate" / "heun-16.png").unlink()
  page = Page(_write(tmp_path, run))
  assert "Samples" not in [text.strip() for text in page.text.splitlines()]
  assert page.rows[1][0] == "teacher"


def test_values_are_escaped(tmp_path):
  evil = '<script>alert("&")</script>'
  row = TEACHER | {"model": evil, "sampler": evil}
  run = _run(tmp_path / "run", name=evil, rows=[row])
  (tmp_path / "run" / "command.txt").write_text(evil)
  full = _write(tmp_path, run)
  page = Page(full)
  assert page.all("script") == []
  # title, heading, row twice, caption twice, article, command
  assert page.text.count(evil) == 8


def test_a_directory_without_a_run_is_the_users_error(tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match=r"empty: no config\.json.*--job=train"):
    runs_lib.write([str(tmp_path / "empty")], str(tmp_path / "report.html"))
  assert not (tmp_path / "report.html").exists()


def test_text_table_is_aligned():
  assert results.table([BASELINE, TEACHER, STUDENT]) == TABLE


def test_text_table_of_models_alone_has_one_rule():
  assert results.table([TEACHER]).count("\n-") == 1


def test_episodes_of_a_policy_have_a_table_and_films(tmp_path):
  run = tmp_path / "policy"
  path = _run(run)
  (run / "rollout").mkdir()
  row = {"model": "teacher", "sampler": "ddim/15", "kind": "model", "episodes": 100}
  row |= {"reward": 0.97275, "error": 0.0071, "solved": 0.62, "median": 0.0247}
  (run / "rollout" / "results.json").write_text(json.dumps([row]))
  films = [[np.zeros((8, 8, 3), np.uint8)] * n for n in (1, 3)]
  image_io.save_gif(run / "rollout" / "ddim_15.gif", films, 10)
  page = _write(tmp_path, path)
  assert "Episodes of Push-T" in page
  for cell in ("0.973", "0.007", "62%", "24.70 ms"):
    assert f"<td>{cell}</td>" in page
  assert "data:image/gif;base64," in page
  assert "Episodes of Push-T" not in _write(tmp_path, _run(tmp_path / "other"))
