"""Points of a study as curves and a table."""

import numpy as np

from sdiff_jax import studies

ROWS = [
  {"series": s, "seed": seed, "at": x, "y": (1 + k) * x + seed, "z": None}
  for k, s in enumerate(("a", "b"))
  for x in (2.0, 1.0)
  for seed in (0, 1, 2)
]


def test_curves_have_mean_and_range_over_seeds():
  found = studies.curves(ROWS, "at", "y")
  assert list(found) == ["a", "b"]
  b = found["b"]
  np.testing.assert_array_equal(b.x, [1, 2])
  np.testing.assert_allclose(b.mean, [3, 5])
  np.testing.assert_allclose(b.low, [2, 4])
  np.testing.assert_allclose(b.high, [4, 6])
  np.testing.assert_allclose(b.std, np.std([0, 1, 2]))
  assert b.seeds == 3
  assert studies.curves(ROWS, "at", "z") == {}


def test_table_has_a_line_for_each_point():
  extra = {"series": "c", "seed": 0, "at": 1.0, "z": 7.0}
  head, *lines = studies.table([*ROWS, extra], "at", ("y", "z"))
  assert head == ["", "at", "y", "z", "seeds"]
  assert ["a", "1", "2 ± 0.82", "-", "3"] in lines
  assert ["c", "1", "-", "7", "1"] in lines
  assert len(lines) == 5


def test_figure_has_a_panel_for_each_key():
  figure = studies.draw(ROWS, "at", ("y", "y"), "x")
  first, _ = figure.axes
  assert first.get_xscale() == "log"
  assert [len(axes.lines) for axes in figure.axes] == [2, 2]
  np.testing.assert_allclose(first.lines[1].get_ydata(), [3, 5])
  # One series has one colour everywhere.
  colours = [[line.get_color() for line in axes.lines] for axes in figure.axes]
  assert colours[0] == colours[1]
  for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
    assert studies.picture(figure, kind).startswith(start)


def test_a_study_is_a_config():
  runs = {"t": studies.run("configs/digits_diffusion.py", "train.steps=4")}
  c = studies.build("x", runs, title="T", lead="L", x="step", panels=("frechet",))
  assert c.study.runs[0]["set"] == ("train.steps=4",)
  assert c.job == "study"
