"""Job `report`: writes a page on a run and its teacher, or on all runs in a folder."""

import glob
import os

import ml_collections

from sdiff_jax import config as configs
from sdiff_jax import registry
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.io import records
from sdiff_jax.reports import runs as runs_lib
from sdiff_jax.types import UserError


@registry.register("jobs", "report", needs_config=False, shares_workdir=True)
def run(config: ml_collections.ConfigDict | None, workdir: str) -> str:
  """Writes report.html, and prints its table.

  Raises:
    UserError: there is no run in the directory.
  """
  del config
  files = glob.glob(os.path.join(workdir, "*", "config.json"))
  runs = sorted((os.path.dirname(f) for f in files), key=os.path.getctime)
  if os.path.exists(os.path.join(workdir, "config.json")):
    runs.insert(0, workdir)
    teacher = workdir_lib.parent(workdir_lib.read(workdir))
    if os.path.exists(os.path.join(teacher, "config.json")):
      runs.insert(0, teacher)
  if not runs:
    raise UserError(f"{workdir}: has no run; train one with --job=train")
  for directory in runs:  # whose metrics may be registered by modules of their own
    stored = records.read_json(os.path.join(directory, "config.json"))
    configs.load_plugins(stored.get("plugins", ()))
  path = runs_lib.write(runs, os.path.join(workdir, "report.html"))
  print(runs_lib.table(runs_lib.rows(runs)))
  return f"report: {path}"
