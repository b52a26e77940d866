"""The notebooks of examples/: their format, and that they run with tiny sizes."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys
import types

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest

from sdiff_jax.capacity import chips
from sdiff_jax.experiment import workdir as workdir_lib

FOLDER = pathlib.Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
OUTSIDE = {"jax", "numpy", "matplotlib", "optax", "IPython"}


def read(name: str) -> nbformat.NotebookNode:
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def codes(name: str) -> list[nbformat.NotebookNode]:
  return [cell for cell in read(name).cells if cell.cell_type == "code"]


@pytest.fixture
def shown(monkeypatch):
  """Replaces IPython, and returns what is displayed."""
  pages = []
  display = types.SimpleNamespace(HTML=str, display=pages.append)
  ipython = types.SimpleNamespace(display=display, get_ipython=lambda: None)
  ipython.version_info = (9, 0)  # which matplotlib asks for
  monkeypatch.setitem(sys.modules, "IPython", ipython)
  monkeypatch.setitem(sys.modules, "IPython.display", display)
  return pages


@pytest.fixture
def execute(monkeypatch):
  """Runs the cells of a notebook in one namespace, with other sizes."""
  monkeypatch.chdir(".")  # and returns afterwards
  plt.switch_backend("agg")

  def run(name: str, **sizes) -> dict:
    names = {}
    for cell in codes(name):
      exec(compile(cell.source, f"{name}:{cell.id}", "exec"), names)
      if "parameters" in cell.metadata.get("tags", ()):
        assert sizes.keys() <= names.keys()
        names.update(sizes)
    return names

  yield run
  plt.close("all")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_format(name):
  """Valid, without outputs, and with a text before every cell."""
  notebook = read(name)
  nbformat.validate(notebook)
  kinds = [cell.cell_type for cell in notebook.cells]
  assert kinds == ["markdown", *["markdown", "code"] * (len(kinds) // 2)]
  assert notebook.cells[0].source.startswith("# ")
  for cell in codes(name):
    assert not cell.outputs
    assert cell.execution_count is None
    assert len(cell.source.splitlines()) < 50
  assert [c.metadata.get("tags") for c in codes(name)].index(["parameters"]) == 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_imports(name):
  """Plain Python without magics, and imports of few packages."""
  for cell in codes(name):
    for node in ast.walk(ast.parse(cell.source)):
      if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        modules = [node.module]
      else:
        continue
      for module in modules:
        top = module.split(".")[0]
        assert top in OUTSIDE | {"sdiff_jax"} | sys.stdlib_module_names


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_first_cell_installs_what_is_missing(name, monkeypatch):
  commands = []
  monkeypatch.setattr(subprocess, "run", lambda line, **_: commands.append(line))
  monkeypatch.setattr(sys, "path", [*sys.path])
  exec(codes(name)[0].source, {})
  assert not commands  # it is installed
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  exec(codes(name)[0].source, {})
  clone, install = commands
  assert clone[:2] == ["git", "clone"]
  assert install[1:4] == ["-m", "pip", "install"]
  assert clone[-1] == install[-1] == "checkout"
  assert sys.path[-1] == os.path.abspath("checkout")


def test_all_share_the_first_cell():
  assert len({codes(name)[0].source for name in NOTEBOOKS}) == 1


@pytest.mark.slow
def test_trigflow_toy(execute, capsys):
  sizes = {"STEPS": 60, "BATCH": 64, "WIDTH": 16, "DEPTH": 1, "SAMPLES": 64}
  names = execute("trigflow_toy", **sizes, LINE=100)
  # The flow of the closed form ends in the data: within four of a component's
  # standard deviations of its mean.
  means = np.asarray(names["MEANS"])
  distance = np.linalg.norm(names["ends"][:, None] - means[None], axis=-1).min(1)
  assert distance.max() < 4 * names["STD"]
  # The library's solver with the exact denoiser ends at the same points, except near
  # the boundaries between components.
  solved = names["samples"]["exact denoiser, Heun"].x
  distance = np.linalg.norm(solved - names["ends"], axis=-1)
  assert np.median(distance) < 0.03
  error = names["error"]
  assert error[-10:].mean() < error[:10].mean()
  assert "sCD, 2 steps                    2  -" in capsys.readouterr().out
  assert len(plt.get_fignums()) == 2


@pytest.mark.slow
def test_digits_scd(execute, tmp_path, capsys):
  sizes = {"TEACHER_STEPS": 12, "SCD_STEPS": 12, "BATCH": 16, "WIDTH": 16}
  sizes |= {"DEPTH": 1, "SOLVERS": ("ddim/2",)}
  names = execute("digits_scd", **sizes, IMAGES=64, RUNS=str(tmp_path))
  out = capsys.readouterr().out
  for word in ("ddim/2", "consistency/2", "Frechet", "one half to the other"):
    assert word in out
  trained = workdir_lib.read(names["SCD"])
  assert trained.teacher.workdir == names["TEACHER"]
  assert trained.train.steps == 12
  (grids,) = (plt.figure(k).axes for k in plt.get_fignums())
  assert [ax.get_images()[0].get_array().shape for ax in grids] == [(236, 338, 3)] * 3


@pytest.mark.slow
def test_paradigms(execute, shown, capsys):
  sizes = {"STEPS": 60, "WINDOW": 12, "SEEDS": (0, 5), "TOLERANCES": (1.0, 0.0)}
  names = execute("paradigms", **sizes)
  # No step is done at first, all are at the end, and the window never moves back.
  for film in names["films"].values():
    begins = np.array([begin for begin, _ in film])
    assert np.all(begins[0] == 0)
    assert np.all(begins[-1] == 60)
    assert np.all(np.diff(begins, axis=0) >= 0)
    assert 60 / 12 <= len(film) - 1 <= 60
  strict, loose = names["films"][0.0], names["films"][1.0]
  assert len(loose) < len(strict)
  np.testing.assert_allclose(strict[-1][1], names["reference"], atol=1e-4)
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[1:]] == ["sequential", "1.0", "0.0"]
  (page,) = shown
  assert page.count("data:image/png;base64") == len(strict)


TINY = {
  "CONFIG": "configs/imagenet64_diffusion.py:S,tiny",
  "CHANGED": {"model.dtype": "bfloat16", "model.blocks": 0, "train.batch_size": 64},
  "TOPOLOGIES": "v5e:2x2",
  "INSTALL": False,
}


def test_pod_rehearsal_without_a_compiler(
  execute, shown, monkeypatch, tmp_path, capsys
):
  monkeypatch.setattr(chips, "start", lambda: None)  # these tests need what it changes
  monkeypatch.setattr(chips, "compiler", lambda pod: "")
  names = execute("pod_rehearsal", **TINY, RUNS=str(tmp_path))
  out = capsys.readouterr().out
  assert "pip install libtpu" in out.splitlines()[-1]
  assert not shown
  # Forward and backward cost 6 operations for each parameter and image; a convolution
  # costs more, at most that for each of the 64 pixels.
  each = names["flops"] / (names["program"].num_parameters * 64)
  assert 1 < each < 6 * 64
  assert f"v5e:2x2: 4 chips of 16 GB, a step in {names['least'] * 1e3:.2f} ms" in out


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs libtpu, the compiler for TPUs: pip install -e '.[test,rehearse]'",
)
def test_pod_rehearsal(execute, shown, monkeypatch, tmp_path, capsys):
  """The command runs as in a user's shell, which has none of these variables set."""
  monkeypatch.setattr(chips, "start", lambda: None)
  for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_"))]:
    monkeypatch.delenv(name)
  monkeypatch.setenv("HOME", str(tmp_path))
  execute("pod_rehearsal", **TINY, RUNS=str(tmp_path))
  assert "| v5e:2x2 | 4 | nothing |" in capsys.readouterr().out
  (page,) = shown
  assert "modeled, not measured" in page
