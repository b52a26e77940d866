"""The examples in docstrings run."""

import doctest
import importlib
import pathlib

import pytest

import sdiff_jax

ROOT = pathlib.Path(sdiff_jax.__file__).parent
WITH_EXAMPLES = sorted(
  path.relative_to(ROOT.parent).with_suffix("")
  for path in ROOT.rglob("*.py")
  if ">>>" in path.read_text("utf-8")
)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=str)
def test_examples_run(path):
  parts = path.parts[:-1] if path.name == "__init__" else path.parts
  module = importlib.import_module(".".join(parts))
  options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
  result = doctest.testmod(module, optionflags=options)
  assert result.attempted
  assert not result.failed
