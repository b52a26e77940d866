"""The documentation site builds without a warning, offline, and covers the package."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Read through the command line: its interface is the config.
NOT_IN_THE_API = {"serving", "jobs", "experiment", "reports", "main"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
  """Builds the site, warnings as errors."""
  folder = tmp_path_factory.mktemp("site")
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
  build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert build.returncode == 0, build.stderr
  return folder


def pages(site: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in site.rglob("*.html") if p.name != "404.html")


def test_every_page_of_the_sources_is_built(site):
  sources = {p.relative_to(DOCS).with_suffix("") for p in DOCS.rglob("*.md")}
  built = {p.relative_to(site).with_suffix("") for p in pages(site)}
  assert sources <= built


def test_included_files_are_shown(site):
  for page in pages(site):
    html = page.read_text("utf-8")
    assert "8&lt;--" not in html
    assert "<!-- file:" not in html
  assert "registry.register" in re.sub("<.*?>", "", (site / "extend.html").read_text())


def test_nothing_is_loaded_from_the_network(site):
  for page in pages(site):
    html = page.read_text("utf-8")
    loaded = re.findall(r"<(?:script|img|iframe)[^>]*?src=\"?([^\s\">]+)", html)
    loaded += re.findall(r"<link[^>]*?rel=\"?stylesheet\"?[^>]*?>", html)
    outside = [name for name in loaded if re.search(r"(https?:)?//", name)]
    assert not outside, f"{page.name} loads {outside}"


def test_links_to_pages_and_anchors_are_there(site):
  """`mkdocs --strict` checks links of Markdown; this checks those of the HTML."""
  ids = {
    p: set(re.findall(r'\bid="?([^\s">]+)', p.read_text("utf-8"))) for p in pages(site)
  }
  for page in pages(site):
    text = page.read_text("utf-8")
    for link in re.findall(r'<a[^>]*?href="?([^\s">]+)', text):
      name, _, anchor = link.partition("#")
      if ":" in name or name.startswith("/"):
        continue
      target = (page.parent / name).resolve() if name else page
      assert target.exists(), f"{page.name}: {link}"
      if anchor and target in ids:
        assert anchor in ids[target], f"{page.name}: {link}"


def test_the_api_has_every_package_and_module(site):
  path = DOCS / "site" / "hooks.py"
  spec = importlib.util.spec_from_file_location("hooks", path)
  api = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(api)
  package = ROOT / "sdiff_jax"
  entries = [p for p in package.iterdir() if p.is_dir() or p.suffix == ".py"]
  top = {p.stem for p in entries if not p.name.startswith("_")}
  assert set(api.PACKAGES) == top - NOT_IN_THE_API
  for name in api.PACKAGES:
    html = (site / "api" / f"{name}.html").read_text("utf-8")
    for module in api.modules(name):
      assert f'id="{module}"' in html or f"id={module}" in html, module
