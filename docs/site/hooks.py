"""Adds to the site: an API page for each package, from the tree, and the notebooks."""

import importlib.util
import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[2] / "sdiff_jax"
# What users call comes first. Jobs and the experiment layer are the command line's.
PACKAGES = (
  "diffusion",
  "losses",
  "samplers",
  "models",
  "training",
  "data",
  "metrics",
  "policies",
  "pretrained",
  "capacity",
  "kernels",
  "distributed",
  "contrib",
  "io",
  "types",
  "fields",
  "registry",
  "config",
  "defaults",
  "renamed",
)


def modules(name: str) -> list[str]:
  """Returns the dotted names of the public modules of a package, or of one module."""
  path = ROOT / name
  if not path.is_dir():
    return [f"sdiff_jax.{name}"]
  files = [p for p in path.rglob("*.py") if p.name != "__init__.py"]
  parts = [p.relative_to(ROOT.parent).with_suffix("").parts for p in files]
  public = sorted(p for p in parts if not any(part.startswith("_") for part in p))
  return [f"sdiff_jax.{name}", *(".".join(p) for p in public)]


def page(name: str) -> str:
  """Returns the Markdown of a package's page."""
  blocks = [f"# {name}"]
  for module in modules(name):
    package = importlib.util.find_spec(module).submodule_search_locations is not None
    own = "" if not package else "    options: {show_root_toc_entry: false}\n"
    blocks.append(f"::: {module}\n{own}")
  return "\n\n".join(blocks)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Adds the pages to the navigation, below "API"."""
  entry = next(item for item in config.nav if "API" in item)
  entry["API"] = ["api/index.md", *(f"api/{name}.md" for name in PACKAGES)]
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the generated pages and the notebooks to the site."""
  for name in PACKAGES:
    files.append(File.generated(config, f"api/{name}.md", content=page(name)))
  root, site = ROOT.parent, config.site_dir
  for path in sorted((root / "examples").glob("*.ipynb")):
    files.append(
      File(f"examples/{path.name}", str(root), site, use_directory_urls=False)
    )
  return files


def on_page_markdown(markdown: str, **kwargs: object) -> str:
  """Includes files, and keeps the numbers of "0.320 ± 0.008" on one line.

  A line `<!-- file: docs/extend/huber.py -->` becomes the code of that file.
  """
  del kwargs
  included = re.sub(r"<!-- file: (\S+) -->", _file, markdown)
  return included.replace(" ± ", "\u00a0±\u00a0")


def _file(match: re.Match[str]) -> str:
  path = ROOT.parent / match[1]
  return f'```python title="{path.name}"\n{path.read_text("utf-8")}```'
