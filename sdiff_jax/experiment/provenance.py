"""What a run was made with besides its config: versions of libraries, and its data.

Both stand in the work directory. A change of the versions is a warning. A change of the
data is a mistake, unless the same data only lie elsewhere.
"""

import hashlib
import os
import sys
from collections.abc import Mapping
from typing import TypedDict

import jax
import numpy as np

from sdiff_jax.data import Dataset
from sdiff_jax.distributed import executables, processes
from sdiff_jax.io import file_io, records, resumable, storage
from sdiff_jax.types import Json, UserError

VERSIONS = "versions.json"
DATA = "data.json"
LIBRARIES = (*executables.COMPILERS, "orbax-checkpoint")
PATHS = ("data.dir", "data.path")  # fields that say where data are
NUM_HASHED = 64  # samples by which data are recognized


class Fingerprint(TypedDict):
  """Content of data.json.

  Attributes:
    fingerprint: of the data, in hexadecimal digits.
  """

  fingerprint: str


def versions() -> dict[str, str]:
  """Returns the versions of the libraries that are installed, and of this package."""
  return {"sdiff_jax": processes.code_version()} | executables.versions(LIBRARIES)


def note_versions(workdir: str) -> None:
  """Writes versions.json; says on stderr what has changed since the last start.

  Raises:
    UserError: the file is damaged.
  """
  if jax.process_index():
    return
  path, current = os.path.join(workdir, VERSIONS), versions()
  if storage.lexists(path):
    stored = records.read(path, dict[str, str], "remove it")
    if changed := resumable.differences(stored, current):
      print(
        f"{workdir}: versions have changed since its last start: {', '.join(changed)}; "
        "numbers may differ by rounding",
        file=sys.stderr,
      )
    if stored == current:
      return
  file_io.write_json(path, current)


def fingerprint(dataset: Dataset) -> str:
  """Returns a digest of the content of a data set, wherever its files are.

  It is that of NUM_HASHED samples, evenly spaced, and of size and shape.

  Example:
    >>> from sdiff_jax.data import digits
    >>> fingerprint(digits.build()) == fingerprint(digits.build())
    True
  """
  digest = hashlib.sha256(repr((dataset.size, dataset.shape)).encode())
  count = min(NUM_HASHED, dataset.size)
  raw, cond = dataset[np.linspace(0, dataset.size - 1, count).astype(int)]
  for name, x in sorted({"": raw, **cond}.items()):
    digest.update(repr((name, x.shape, x.dtype.str)).encode())
    digest.update(np.ascontiguousarray(x).data)
  return digest.hexdigest()


def note_data(config: Mapping[str, Json], workdir: str, dataset: Dataset) -> None:
  """Writes data.json, for data that have a path, unless it is there."""
  path = os.path.join(workdir, DATA)
  known = any(config["data"].get(name.partition(".")[2]) for name in PATHS)
  if known and dataset.size and not storage.lexists(path):
    file_io.write_json(path, {"fingerprint": fingerprint(dataset)})


def changes(
  stored: Mapping[str, Json],
  current: Mapping[str, Json],
  workdir: str,
  dataset: Dataset,
) -> list[str]:
  """Returns the fields that make another experiment of a run, with their values.

  Training may go on for more steps, and the same data may lie elsewhere.

  Args:
    stored: fields of the run, flat.
    current: fields of this command, flat.
    workdir: of the run.
    dataset: of this command.

  Raises:
    UserError: more steps would change those that are made, or the data in another place
      are others.
  """
  kept = dict(current)
  if _number(current) > _number(stored):
    if current.get("optim.schedule") == "cosine":
      raise UserError(
        f"config.train.steps={_number(current)}: the learning rate of optim.schedule="
        f"cosine depends on it, and {workdir} was trained for {_number(stored)}; use "
        "another --workdir"
      )
    kept["train.steps"] = stored["train.steps"]
  moved = [name for name in PATHS if stored.get(name) != current.get(name)]
  if moved and _data_are_the_same(workdir, dataset):
    kept |= {name: stored[name] for name in moved if name in stored}
  return resumable.differences(stored, kept)


def _number(fields: Mapping[str, Json]) -> int:
  """Returns the number of training steps."""
  return int(fields.get("train.steps") or 0)


def _data_are_the_same(workdir: str, dataset: Dataset) -> bool:
  """Returns whether a data set has the content that a run was trained on."""
  path = os.path.join(workdir, DATA)
  if not storage.lexists(path) or not dataset.size:
    return False
  stored = records.read(path, Fingerprint, "remove it")
  return stored["fingerprint"] == fingerprint(dataset)
