"""Job `report`: one page on a run and its teacher, or on all runs inside a folder."""

import glob
import os

import ml_collections

from sdiff_jax import registry
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.reports import runs as runs_lib
from sdiff_jax.types import UserError


@registry.register("jobs", "report", needs_config=False)
def run(config: ml_collections.ConfigDict | None, workdir: str) -> str:
  """Writes report.html.

  Raises:
    UserError: there is no run in the directory.
  """
  del config
  found = glob.glob(os.path.join(workdir, "*", "config.json"))
  runs = sorted((os.path.dirname(f) for f in found), key=os.path.getctime)
  if os.path.exists(os.path.join(workdir, "config.json")):
    runs.insert(0, workdir)
    teacher = workdir_lib.parent(workdir_lib.read(workdir))
    if os.path.exists(os.path.join(teacher, "config.json")):
      runs.insert(0, teacher)
  if not runs:
    raise UserError(f"{workdir}: no run there; make one with --job=train")
  path = runs_lib.write(runs, os.path.join(workdir, "report.html"))
  print(runs_lib.table(runs_lib.rows(runs)))
  return f"report: {path}"
