"""Output that is written in parts, so that an interrupted job resumes.

The parts of one output lie in a folder of their own, beside a file of the settings
that determine them. A job that finds parts of other settings refuses to mix them.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from sdiff_jax.io import array_io, file_io, records, storage
from sdiff_jax.types import Json, UserError


def flatten(nested: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
  """Returns {"train.steps": 1000, ...} of nested mappings.

  `flax.traverse_util.flatten_dict` does the same; the package io depends on NumPy and
  Pillow alone.
  """
  flat: dict[str, Json] = {}
  for key, value in nested.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def differences(stored: Mapping[str, Json], current: Mapping[str, Json]) -> list[str]:
  """Returns "field (value there, value now)" for each field that differs.

  Args:
    stored: settings that were written earlier, nested or flat.
    current: settings of this run.
  """
  stored, current = flatten(stored), flatten(current)
  return [
    f"{k} ({_short(stored.get(k))} there, {_short(current.get(k))} now)"
    for k in sorted(stored.keys() | current.keys())
    if stored.get(k) != current.get(k)
  ]


def _short(value: Json) -> str:
  return records.shortened(str(value), records.MAX_QUOTED)


class _Settings(TypedDict):
  """Settings that jobs read; the others are compared alone.

  Attributes:
    window: number of solver steps that a parallel sampler evaluates at a time.
  """

  window: NotRequired[records.Count]


@dataclasses.dataclass(frozen=True)
class Output:
  """Parts of an output and the settings that determine them.

  Attributes:
    folder: directory of the parts.
    contents: what the parts are, for messages: "samples", "latents", ...
    settings_file: name of the file of settings, inside the folder.
    pattern: glob pattern of the parts.
  """

  folder: str
  contents: str
  settings_file: str = "settings.json"
  pattern: str = "*.npz"

  def parts(self) -> list[str]:
    """Returns the paths of the parts that exist, sorted."""
    return storage.glob(self.folder, self.pattern)

  def settings(self) -> dict[str, Json] | None:
    """Returns the stored settings, None if there are neither settings nor parts.

    Raises:
      UserError: there are parts, and the file of settings is missing or damaged.
    """
    path = os.path.join(self.folder, self.settings_file)
    if not storage.lexists(path) and not self.parts():
      return None
    remedy = f"remove {self.folder}, or use another directory"
    return records.read(path, _Settings, remedy)

  def claim(self, settings: Mapping[str, Json], write: bool = True) -> None:
    """Stores the settings, or checks that the existing parts were made with the same.

    Args:
      settings: what determines the parts; compared as JSON.
      write: whether this process writes the file; of several processes one does.

    Raises:
      UserError: there are parts of other settings; the message lists the differences.
    """
    settings = file_io.as_json(settings)
    if self.parts():
      if different := differences(self.settings() or {}, settings):
        raise UserError(
          f"{self.folder} holds parts of other {self.contents}: "
          f"{', '.join(different)}; remove it, or use the same values"
        )
    elif write:
      file_io.write_json(os.path.join(self.folder, self.settings_file), settings)

  def write_part(self, name: str, **arrays: np.ndarray) -> None:
    """Writes one part, an .npz file, atomically."""
    file_io.write_npz(os.path.join(self.folder, name), **arrays)

  def read_parts(
    self, names: Sequence[str]
  ) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields the path and the named arrays of each part.

    A part that cannot be read is reported on stderr and removed, so that the job makes
    it again.
    """
    for path in self.parts():
      try:
        part = array_io.read_npz(path, names)
        arrays = {name: part[name] for name in names}
      except (UserError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        print(f"{path} is damaged, making it again: {reason}", file=sys.stderr)
        storage.remove(path)
        continue
      yield path, arrays

  def remove(self) -> None:
    """Removes the folder with all parts."""
    storage.rmtree(self.folder)
