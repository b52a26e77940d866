"""State of a computation on disk, so that an interrupted job resumes from it."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sdiff_jax.io import array_io, file_io, records, storage
from sdiff_jax.types import Json, UserError

SECONDS = 20.0  # at least, between two saves
FRACTION = 0.05  # of the time, at most, is spent on saving
SETTINGS = "settings"  # name of an array of the file


def pack(value: Json) -> np.ndarray:
  """Returns a JSON value as an array, for a state."""
  return np.frombuffer(json.dumps(value).encode(), np.uint8)


def unpack(array: np.ndarray) -> Json:
  """Returns the JSON value that `pack` turned into an array.

  Raises:
    UserError: the array is none of `pack`.
  """
  return records.decode(array.tobytes(), Any, "the state", any_number=True)


class Snapshot:
  """The newest state of one computation, an .npz file.

  A file that is damaged, or was written with other settings, counts as none: the
  computation starts again, and replaces it.

  Attributes:
    arrays: the state that an earlier run saved; {} if there is none.
  """

  def __init__(self, path: str, settings: Mapping[str, Json], *, write: bool = True):
    """Reads the file.

    Args:
      path: of the file.
      settings: what determines the computation; compared as JSON.
      write: whether this process writes the file; of several processes one does.
    """
    self._path, self._write = path, write
    self._settings = json.dumps(file_io.as_json(dict(settings)), sort_keys=True)
    self._due = time.monotonic() + SECONDS
    self.arrays = self._read()

  def _read(self) -> dict[str, np.ndarray]:
    if not storage.isfile(self._path):
      return {}
    try:
      arrays = array_io.read_npz(self._path)
      settings = arrays.pop(SETTINGS).tobytes().decode()
    except (UserError, KeyError, ValueError):
      return {}
    return arrays if settings == self._described(arrays) else {}

  def _described(self, arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the settings with a digest of the arrays, so that no edited file is used."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
      digest.update(f"{name} {array.dtype} {array.shape}".encode())
      digest.update(np.ascontiguousarray(array).data)
    return f"{self._settings} {digest.hexdigest()}"

  def save(
    self, state: Callable[[], Mapping[str, np.ndarray]], *, now: bool = False
  ) -> None:
    """Writes the state if the last save was long enough ago.

    Args:
      state: returns the state; called only if it is written.
      now: whether to write it in any case.
    """
    if not self._write or (not now and time.monotonic() < self._due):
      return
    begin = time.monotonic()
    arrays = {name: np.asarray(array) for name, array in state().items()}
    settings = np.frombuffer(self._described(arrays).encode(), np.uint8)
    file_io.write_npz(self._path, **{SETTINGS: settings, **arrays})
    end = time.monotonic()
    self._due = end + max(SECONDS, (end - begin) / FRACTION)

  def remove(self) -> None:
    """Removes the file; the computation is complete."""
    self.arrays = {}
    if self._write and storage.exists(self._path):
      storage.remove(self._path)
