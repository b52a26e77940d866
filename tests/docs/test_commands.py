"""The commands of the documents parse: their configs, jobs and fields exist."""

import pathlib
import re
import shlex

import pytest

from sdiff_jax import main, registry

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
PAGES += [ROOT / "configs" / "README.md"]
# What stands for something of the reader's.
PLACEHOLDERS = ("mine.py", "config.py", "configs/FILE", "--config=FILE", "configs/X.py")


def commands() -> list[str]:
  """Returns the command lines of all pages, without what they leave open."""
  found = set()
  for path in PAGES:
    text = path.read_text("utf-8").replace("\\\n", " ")
    for line in re.findall(r"python -m sdiff_jax\.main( [^\n`]+)", text):
      command = re.sub(r"\s+#.*| \[.*?\]|\s*&$", "", line).strip()
      if command != "--help" and not any(name in command for name in PLACEHOLDERS):
        found.add(command)
  return sorted(found)


@pytest.mark.parametrize("command", commands())
def test_it_parses(command, monkeypatch, request):
  monkeypatch.chdir(ROOT)
  if "gs://" in command:  # an emulator answers, which has no such run
    request.getfixturevalue("bucket")
  parsed = main.parse(["main", *shlex.split(command)])
  job = registry.lookup("jobs", parsed.job)
  assert parsed.config is not None or not job.facts.get("needs_config", True)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_fields_exist(path):
  """Fields that a text names, such as `sampler.tolerance` or --config.mesh.fsdp."""
  base = main.configs.base()
  text = path.read_text("utf-8")
  names = re.findall(r"--config\.([a-z_]+\.\w+)", text)
  sections = "|".join(name for name, value in base.items() if hasattr(value, "keys"))
  names += re.findall(rf"`((?:{sections})\.[a-z_]+)`", text)
  for name in names:
    section, field = name.split(".")
    if section in base and section not in ("data", "model", "loss"):
      assert field in base[section], name


def test_there_are_commands():
  assert len(commands()) >= 15
