"""Trajectories of a teacher, from noise to a sample: the files of --job=trajectories.

A folder has trajectories.json, which says what they are and is written last, and .npz
files, each with the states of some trajectories at the times of one grid.
"""

import dataclasses
import hashlib
import os
from typing import Annotated, TypedDict

import msgspec
import numpy as np

from sdiff_jax.data._codecs import Codec, Decoder, NoiseSeeds
from sdiff_jax.data._dataset import Dataset, Samples
from sdiff_jax.io import array_io, bounded, records, storage
from sdiff_jax.losses.cmt import TIMES
from sdiff_jax.types import Array, CondSpec, CondSpecs, Json, UserError

ABOUT = "trajectories.json"
PATTERN = "states-*.npz"
Time = Annotated[float, msgspec.Meta(ge=0, le=1.6)]


class About(TypedDict):
  """Content of trajectories.json.

  Attributes:
    size: number of trajectories.
    grid: TrigFlow times of their states, descending to 0.
    shape: of a state.
    sigma_d: standard deviation of the data.
    noise: whether the solver added noise on the way.
    evaluations: of the teacher, for all trajectories.
    flops: floating-point operations of these evaluations.
    data: the data set of the teacher, a section of its config.
    settings: what determines the states, by the names of the job's fields.
  """

  size: records.Positive
  grid: Annotated[list[Time], msgspec.Meta(min_length=2, max_length=100_001)]
  shape: Annotated[list[records.Positive], msgspec.Meta(min_length=1, max_length=8)]
  sigma_d: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
  noise: bool
  evaluations: records.Positive
  flops: Annotated[float, msgspec.Meta(ge=0)]
  data: dict[str, Json]
  settings: dict[str, Json]


@dataclasses.dataclass(frozen=True)
class StateCodec:
  """The codec of pairs of states, which are float32 in the units of training already.

  Attributes:
    shape: (2, ...).
    sigma_d: standard deviation of the data.
  """

  shape: tuple[int, ...]
  sigma_d: float

  def encode(
    self, raw: np.ndarray, sigma_d: float, noise_seeds: NoiseSeeds | None = None
  ) -> np.ndarray:
    """Returns the states, [n, 2, ...].

    Raises:
      ValueError: they were made for another standard deviation of the data.
    """
    del noise_seeds
    if sigma_d != self.sigma_d:
      raise ValueError(
        f"sigma_d={sigma_d}: the trajectories are of data with {self.sigma_d}"
      )
    return raw

  def decode(self, x0: Array, sigma_d: float) -> Array:
    """Returns the states."""
    del sigma_d
    return x0

  def mirror(self, raw: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Raises a ValueError: the teacher's noise is not that of a mirrored image."""
    raise ValueError("flip: is for images; the states of trajectories stay as they are")

  def check_images(self, *, has_decoder: bool = False) -> None:
    """Raises a ValueError: states are not images."""
    raise ValueError("data are states of trajectories, not images")

  def to_images(
    self, x0: Array, sigma_d: float, decoder: Decoder | None = None
  ) -> Array:
    """Raises a ValueError: states are not images."""
    self.check_images()
    raise AssertionError


def about(folder: str) -> About:
  """Returns the content of trajectories.json.

  Args:
    folder: of the files.

  Raises:
    UserError: there is none, or it is damaged.
  """
  remedy = "make the trajectories by --job=trajectories"
  found = records.read(os.path.join(folder, ABOUT), About, remedy)
  if any(a <= b for a, b in zip(found["grid"], found["grid"][1:], strict=False)):
    raise UserError(f"{folder}/{ABOUT}: grid must descend; {remedy}")
  return found


def read(folder: str, cond: CondSpecs, *, to_data: bool) -> Dataset:
  """Returns the pairs of states of all trajectories, which are kept in memory.

  A sample is (x_t, x_s) [2, ...], float32, with the conditions of its trajectory and the
  condition `losses.cmt.TIMES`, the times (t, s). Each epoch has every pair once.

  Args:
    folder: that --job=trajectories wrote.
    cond: conditions of the data set of the teacher.
    to_data: whether s = 0; otherwise all pairs with s < t are samples.

  Raises:
    UserError: files are missing or damaged, or hold something else.
  """
  found = about(folder)
  paths = storage.glob(folder, PATTERN)
  shape, last = (len(found["grid"]), *found["shape"]), len(found["grid"]) - 1
  bounded.check_memory(
    found["size"] * int(np.prod(shape, dtype=object)) * 4, f"{folder}: all states"
  )
  states, conditions = _load(paths, shape, cond, folder)
  if len(states) != found["size"]:
    raise UserError(
      f"{folder} has {len(states)} of {found['size']} trajectories; the same command "
      "with --job=trajectories makes the others"
    )
  grid = np.asarray(found["grid"], np.float32)
  i, j = np.triu_indices(last + 1, 1)
  if to_data:
    i, j = i[j == last], j[j == last]

  def read_pairs(indices: np.ndarray) -> Samples:
    row, pair = np.divmod(indices, len(i))
    ends = np.stack([i[pair], j[pair]], axis=1)
    values = {name: value[row] for name, value in conditions.items()}
    return states[row[:, None], ends], values | {TIMES: grid[ends]}

  def fingerprint() -> bytes:
    sizes = [storage.version(path) for path in (os.path.join(folder, ABOUT), *paths)]
    return hashlib.sha256(repr((sizes, to_data)).encode()).digest()

  known = metadata_only(folder, cond)
  size = len(states) * len(i)
  return dataclasses.replace(known, read=read_pairs, size=size, fingerprint=fingerprint)


def metadata_only(folder: str, cond: CondSpecs) -> Dataset:
  """Returns the data set of `read` by its shapes alone, without its states."""

  def read_nothing(indices: np.ndarray) -> Samples:
    raise ValueError("states: were not read")

  found = about(folder)
  codec: Codec = StateCodec((2, *found["shape"]), found["sigma_d"])
  return Dataset(read_nothing, 0, {**cond, TIMES: CondSpec((2,), np.float32)}, codec)


def _load(
  paths: list[str], shape: tuple[int, ...], cond: CondSpecs, folder: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns states [n, N + 1, ...] and conditions of all files, in order of numbers."""
  names = ("indices", "states", *(f"cond_{name}" for name in cond))
  parts = []
  for path in paths:
    part = array_io.read_npz(path, names)
    count = len(part["indices"]) if part.get("indices", np.zeros(())).ndim else -1
    shapes = {"states": shape} | {f"cond_{k}": spec.shape for k, spec in cond.items()}
    for name, expected in shapes.items():
      array = part.get(name)
      if array is None or array.shape != (count, *expected):
        raise UserError(
          f"{path}: {name} must be [n, {', '.join(map(str, expected))}]; remove it, and "
          "--job=trajectories makes it again"
        )
    if part["states"].dtype != np.float32 or not np.isfinite(part["states"]).all():
      raise UserError(f"{path}: its states must be finite and float32; remove it")
    if part["indices"].dtype.kind != "i":
      raise UserError(f"{path}: its indices must be integers; remove it")
    for name, spec in cond.items():
      values = part[f"cond_{name}"]
      wrong = spec.num_classes and ((values < -1) | (values >= spec.num_classes)).any()
      if values.dtype != np.dtype(spec.dtype) or wrong:
        raise UserError(f"{path}: cond_{name} is none of the data set; remove it")
    parts.append(part)
  if not parts:
    raise UserError(f"{folder} has no files {PATTERN}; make them by --job=trajectories")
  joined = {name: np.concatenate([part[name] for part in parts]) for name in names}
  _, order = np.unique(joined["indices"], return_index=True)
  return joined["states"][order], {name: joined[f"cond_{name}"][order] for name in cond}
