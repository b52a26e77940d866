"""The changelog names every renamed field, and modules and functions that exist."""

import importlib
import importlib.util
import pathlib
import re

from sdiff_jax import renamed

TEXT = (pathlib.Path(__file__).parents[2] / "CHANGELOG.md").read_text("utf-8")


def table(title: str) -> list[tuple[str, str]]:
  """Returns (old, new) of the table below a title, as they are written."""
  section = TEXT.split(f"### {title}\n")[1].split("\n### ")[0].split("\n## ")[0]
  return re.findall(r"^\| `([^`]+)` \| (.+) \|$", section, re.MULTILINE)


def test_every_renamed_field_is_listed():
  fields = {old: new.split("`")[1] for old, new in table("Config fields")}
  assert fields == {old: field.name for old, field in renamed.RENAMED.items()}


def test_the_new_modules_exist():
  for old, new in table("Modules"):
    for name in re.findall("`([^`]+)`", new):
      assert importlib.util.find_spec(f"sdiff_jax.{name}"), f"{old} -> {name}"


def test_the_new_functions_exist():
  for old, new in table("Public functions and classes"):
    name = new.strip("`")
    if not re.fullmatch(r"[\w.]+", name):
      continue  # a call that replaces the function
    value, parts = importlib.import_module("sdiff_jax"), name.split(".")
    for k, part in enumerate(parts):
      if not hasattr(value, part):
        importlib.import_module("sdiff_jax." + ".".join(parts[: k + 1]))
      value = getattr(value, part)
    assert value is not None, f"{old} -> {name}"


def test_versions():
  assert re.findall(r"^## \[(.+?)\]", TEXT, re.MULTILINE) == ["Unreleased", "0.1.0"]
