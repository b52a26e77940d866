"""Points of a study as curves and a table."""

import numpy as np
import pytest

from sdiff_jax.experiment import studies as configs
from sdiff_jax.reports import studies

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


def test_points_in_time_are_those_of_a_sampler():
  """Seeds take different seconds; the point is at their median."""
  rows = [
    {"series": "a", "sampler": f"heun/{n}", "seconds": n * seconds, "y": n + seed}
    for n in (8, 4)
    for seed, seconds in enumerate((0.1, 0.5, 0.11))
  ]
  found = studies.curves(rows, "seconds", "y")["a"]
  np.testing.assert_allclose(found.x, [0.44, 0.88])
  np.testing.assert_allclose(found.mean, [5, 9])
  assert (found.seeds, found.names) == (3, ("heun/4", "heun/8"))
  lines = studies.table(rows, "seconds", ("y",))
  assert lines[1][:2] == ["a, heun/4", "0.44"]
  (axes,) = studies.draw(rows, "seconds", ("y",), "").axes
  assert [text.get_text() for text in axes.texts] == ["4", "8"]


def test_a_panel_may_have_its_own_horizontal_axis():
  rows = [*ROWS, *({"series": "b", "other": x, "y": 3 * x} for x in (1.0, 4.0))]
  panels = ("y", "y", "y", ("other", "y"))
  figure = studies.draw(rows, "at", panels, "")
  *_, last = figure.axes
  assert [axes.get_xlabel() for axes in figure.axes] == ["at", "at", "at", "other"]
  (line,) = last.lines
  np.testing.assert_allclose(line.get_ydata(), [3, 12])
  # One series has one color, in a panel that lacks another one too.
  assert line.get_color() == figure.axes[0].lines[1].get_color()
  assert figure.get_size_inches()[1] == pytest.approx(6.8)
  first, second = studies.tables(rows, "at", ("y", ("other", "y")))
  assert (first[0][1], second[0][1]) == ("at", "other")
  assert second[1:] == [["b", "1", "3", "1"], ["b", "4", "12", "1"]]


def test_a_panel_may_show_some_of_the_points():
  rows = [row | {"seeds": float(row["seed"])} for row in ROWS]
  rows.append({"series": "t", "seed": 0, "at": 1.0, "y": 9.0})  # has no such key
  found = studies.curves(rows, "at", "y@seeds=2")
  np.testing.assert_allclose(found["b"].mean, [4, 6])
  np.testing.assert_allclose(found["t"].mean, [9])
  assert found["b"].seeds == 1
  (axes,) = studies.draw(rows, "at", ("y@seeds=2",), "").axes
  assert (axes.get_ylabel(), axes.get_title()) == ("y", "seeds = 2")
  head, *lines = studies.table(rows, "at", ("y@seeds=0", "y@seeds=2"))
  assert head[2:4] == ["y, seeds=0", "y, seeds=2"]
  assert ["b", "1", "2", "4", "1"] in lines


def test_a_ratio_has_a_line_at_1():
  rows = [{"series": "a", "seed": 0, "at": 1.0, "ratio": 2.0}]
  (axes,) = studies.draw(rows, "at", ("ratio",), "").axes
  np.testing.assert_allclose(axes.lines[-1].get_ydata(), [1, 1])


def test_many_series_differ_in_color_or_marker():
  rows = [{"series": f"s{k}", "seed": 0, "at": 1.0, "y": 1.0} for k in range(25)]
  (axes,) = studies.draw(rows, "at", ("y",), "").axes
  styles = {(line.get_color(), line.get_marker()) for line in axes.lines}
  assert len(styles) == 25


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
  # One series has one color everywhere.
  colors = [[line.get_color() for line in axes.lines] for axes in figure.axes]
  assert colors[0] == colors[1]
  for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
    assert studies.picture(figure, kind).startswith(start)


def test_a_study_is_a_config():
  runs = {"t": configs.run("configs/digits_diffusion.py", "train.steps=4")}
  c = configs.build("x", runs, title="T", lead="L", x="step", panels=("frechet",))
  assert c.study.runs[0]["set"] == ("train.steps=4",)
  assert c.job == "study"
