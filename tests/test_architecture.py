"""The layers: a module imports only from layers before its own."""

import ast
import pathlib
import re

import pytest

import sdiff_jax
from sdiff_jax import registry

ROOT = pathlib.Path(sdiff_jax.__file__).parent
LAYERS = (
  {"types", "fields", "registry", "io", "defaults", "renamed"},
  {"config", "diffusion", "distributed"},
  {"losses", "kernels", "samplers", "contrib"},
  {"models", "data"},
  {"pretrained"},
  {"metrics", "training", "reports", "capacity", "serving"},
  {"experiment", "policies"},
  {"jobs"},
  {"main"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# What only some may import.
ALONE = {
  "orbax": {"training/checkpoints.py"},
  "tensorboardX": {"training/metric_writer.py"},
  "starlette": {"serving"},
  "uvicorn": {"serving/server.py"},
  "prometheus_client": {"serving"},
  "flax": {"models", "metrics/features", "pretrained/diffusers"},
}
# JAX's compatibility promise excludes these modules, so few files import them.
UNSTABLE = ("jax._src", "jax.experimental", "jax.extend", "jax.interpreters")
UNSTABLE_IMPORTS = {
  # Processes that stop together have no other API yet.
  "distributed/processes.py": ("jax.experimental.multihost_utils",),
  # Nor have meshes of several slices,
  "distributed/sharding.py": ("jax.experimental.mesh_utils",),
  # devices that this machine does not have,
  "capacity/chips.py": ("jax.experimental.topologies",),
  # compiled programs in files,
  "distributed/executables.py": (
    "jax.experimental.serialize_executable",
    "jax.experimental.compilation_cache",
  ),
  # the order of an array's axes in memory,
  "kernels/layout.py": ("jax.experimental.layout",),
  # kernels,
  "kernels/_pallas_gpu.py": ("jax.experimental.pallas",),
  "kernels/_pallas_tpu.py": ("jax.experimental.pallas",),
  # and primitives; the reason for each module is in the file.
  "kernels/_primitives.py": ("jax.extend.core", "jax.interpreters"),
  "kernels/cpu.py": (
    "jax.extend.core",
    "jax.interpreters",
    "jax.experimental.xla_metadata",
  ),
}
# What believes or runs what a file says, and the files that check it first.
READERS = {
  r"\bnp\.(load|fromfile|memmap|loadtxt|genfromtxt)\(": set(),
  r"\bImage\.open\(": {"io/image_io.py"},
  r"\bpickle\.(load|loads|Unpickler|_Unpickler)\b": {"pretrained/files/safe_pickle.py"},
  r"\bdeserialize_and_load\(": {"distributed/executables.py"},
  r"\bgzip\.(open|decompress|GzipFile)\(": set(),
  r"\bzlib\.(decompress|decompressobj)\(": {"io/bounded.py"},
  r"\bZipFile\(": {"io/array_io.py"},
  r"\bh5py\.File\(": {"data/episodes/robomimic.py"},
  r"\bzarr\.open|\bsafetensors\.numpy": set(),
  r"(?<![\w.])(eval|exec)\(": set(),
}
FILES = sorted(p for p in ROOT.rglob("*.py") if p.name != "__init__.py")


def imports(path: pathlib.Path) -> set[str]:
  """Returns the dotted names that a file imports, at any depth."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def of(path: pathlib.Path) -> str:
  """Returns the package or module below sdiff_jax that a file belongs to."""
  return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
  mine = of(path)
  for name in imports(path):
    parts = name.split(".")
    if parts[0] != "sdiff_jax" or parts[1] == mine:
      continue
    assert LEVEL[parts[1]] <= LEVEL[mine], f"{mine} imports {name}"
    if mine in ("losses", "samplers"):
      assert parts[1] not in ("models", "config"), f"{mine} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_outside_packages_stay_where_they_belong(path):
  inside = str(path.relative_to(ROOT))
  for name in imports(path):
    top = name.split(".")[0]
    assert top not in ("tensorflow", "torch")
    if name.startswith(UNSTABLE):
      allowed = UNSTABLE_IMPORTS.get(inside, ())
      assert name.startswith(tuple(allowed)), f"{inside} imports {name}"
    if top in ALONE:
      assert inside.startswith(tuple(ALONE[top])), f"{inside} imports {name}"
    if of(path) in ("losses", "samplers"):
      assert top not in ("flax", "optax", "orbax")


# Who sees config objects: the command line, and what builds an experiment from one.
CONFIG = {"main", "config", "defaults", "experiment", "jobs"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_config_ends_at_the_door(path):
  """Below the experiment layer there are no config objects, and no names of fields."""
  if of(path) in CONFIG:
    return
  assert not {n for n in imports(path) if n.startswith("ml_collections")}
  assert "sdiff_jax.config" not in imports(path)
  for text in messages(path):
    assert not re.search(r"\bconfig\.(?!json|py\b)[a-z]", text), text


def messages(path: pathlib.Path) -> list[str]:
  """Returns the string literals of a file, without docstrings."""
  tree = ast.parse(path.read_text("utf-8"))
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
  docs = {
    id(node.body[0].value)
    for node in ast.walk(tree)
    if isinstance(node, documented) and ast.get_docstring(node) is not None
  }
  return [
    node.value
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant)
    and isinstance(node.value, str)
    and id(node) not in docs
  ]


def test_jobs_are_jobs_alone():
  """Every module of jobs/ registers one job, and nothing imports it but by name."""
  modules = {p.stem for p in (ROOT / "jobs").glob("*.py")} - {"__init__"}
  assert modules == set(registry.names("jobs"))
  for path in FILES:
    assert not {n for n in imports(path) if n.startswith("sdiff_jax.jobs")}, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are(path):
  text = path.read_text("utf-8")
  assert len(text.splitlines()) <= 400
  assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("pattern", READERS)
def test_what_a_file_says_is_checked_where_it_is_read(pattern):
  code = {path: path.read_text("utf-8") for path in FILES}
  using = {
    p.relative_to(ROOT).as_posix() for p, t in code.items() if re.search(pattern, t)
  }
  assert using == READERS[pattern]


def test_every_module_has_a_layer():
  assert {of(p) for p in FILES} <= LEVEL.keys()


def test_the_mesh_is_made_in_one_place():
  makers = [p.name for p in FILES if re.search(r"\bMesh\(", p.read_text("utf-8"))]
  assert set(makers) == {"sharding.py"}
