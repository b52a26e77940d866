"""The README is short, its code runs, and the files that it names exist."""

import pathlib
import re

import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
DOCUMENTS = sorted(
  path
  for path in [
    *ROOT.glob("*.md"),
    *ROOT.glob("*/README.md"),
    *ROOT.glob("docs/**/*.md"),
  ]
  if path.name != "CHANGELOG.md"  # which names what is no more
)


def test_it_is_short():
  assert len(TEXT.splitlines()) <= 150


def test_the_python_example_runs():
  (example,) = BLOCKS
  assert len(example.strip().splitlines()) <= 6
  names = {"net": lambda x, t, cond: jnp.zeros_like(x)}
  exec(example, names)
  out = names["out"]
  assert out.x.shape == (64, 8, 8, 1)
  assert (out.num_iterations < 50).all()
  assert (out.num_evaluations >= 50).all()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(path):
  text = path.read_text("utf-8")
  links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
  for link in links:
    target = (path.parent / link).resolve().relative_to(ROOT)
    # The site adds pages of the API and the notebooks.
    added = re.match(r"docs/(api/\w+\.md|examples/\w+\.ipynb)", str(target))
    assert added or (ROOT / target).exists(), link
  for name in re.findall(r"(?:configs|benchmarks|third_party)/[\w/]+\.\w+", text):
    assert (ROOT / name).exists() or name == "configs/X.py", name


def test_every_config_is_in_the_table_of_configs():
  table = (ROOT / "configs" / "README.md").read_text("utf-8")
  names = re.findall(r"`([\w*/]+\.py)", table)
  for path in (ROOT / "configs").rglob("*.py"):
    relative = path.relative_to(ROOT / "configs")
    assert any(relative.match(name) for name in names), relative
