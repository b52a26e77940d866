"""Job `report`: writes a page on a run and its teacher, or on all runs in a folder."""

import os
import sys

import ml_collections

from sdiff_jax import config as configs
from sdiff_jax import registry
from sdiff_jax.io import storage
from sdiff_jax.reports import loading, results
from sdiff_jax.reports import runs as runs_lib
from sdiff_jax.types import Json, UserError


@registry.register("jobs", "report", needs_config=False, shares_workdir=True)
def run(config: ml_collections.ConfigDict | None, workdir: str) -> str:
  """Writes report.html, and prints its table.

  Runs and files that cannot be read are named on stderr and on the page, and the others
  are shown.

  Raises:
    UserError: there is no run in the directory.
  """
  del config
  faults: list[str] = []
  directories = _directories(workdir)
  if not directories:
    raise UserError(f"{workdir}: has no run; train one with --job=train")
  for (
    directory
  ) in directories:  # whose metrics may be registered by modules of their own
    plugins = _config(directory).get("plugins", ())
    loading.tolerant(faults, None, configs.load_plugins, plugins)
  runs = [loading.tolerant(faults, None, loading.load, d) for d in directories]
  runs = [run for run in runs if run]
  path = os.path.join(workdir, "report.html")
  faults = runs_lib.write_page(runs, path, faults)
  for fault in faults:
    print(f"not shown: {fault}", file=sys.stderr)
  print(results.table(results.distinct([row for run in runs for row in run.rows])))
  hidden = f" ({len(faults)} files cannot be read)" if faults else ""
  return f"report: {path}{hidden}"


def _directories(workdir: str) -> list[str]:
  """Returns the work directories to report on: teacher, run, runs below, oldest first.

  Args:
    workdir: a run, a folder of runs, or both.
  """
  names = storage.listdir(workdir) if storage.isdir(workdir) else []
  runs = [os.path.join(workdir, name) for name in names]
  runs = sorted(filter(_is_run, runs), key=storage.created)
  if not _is_run(workdir):
    return runs
  teacher = loading.parent(_config(workdir))
  return [*filter(_is_run, [teacher]), workdir, *runs]


def _config(directory: str) -> loading.Config | dict[str, Json]:
  """Returns what a report needs of a config, {} if it is damaged (`load` says so)."""
  path = os.path.join(directory, loading.CONFIG)
  return loading.tolerant([], {}, loading.read_config, path)


def _is_run(directory: str) -> bool:
  return bool(directory) and storage.lexists(os.path.join(directory, loading.CONFIG))
