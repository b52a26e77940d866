"""Readers of episodes, sequences of observations and actions, in several formats.

The format of this project is an .npz with `action` float [N, Da], `episode_ends` int [E], one
past the last step of each episode, and `observation` [N, Do] or, instead of it, `state`.
"""

import os
from typing import NamedTuple

import numpy as np

from sdiff_jax.data.episodes import kitchen, pusht_zarr, robomimic
from sdiff_jax.io import array_io, downloads, storage
from sdiff_jax.types import UserError

MAX_VALUE = 1e15  # of observations and actions; squares of larger ones overflow
SEED = 42  # seed of Diffusion Policy's choice of episodes


class Episodes(NamedTuple):
  """E episodes with N steps in total.

  Attributes:
    observation: float32 [N, Do].
    action: float32 [N, Da].
    ends: one past the last step of each episode, int64 [E], increasing to N.
    frame: coordinate frames of the actions, float32 [N, Da, Da + 1]: a rotation R and an
      origin o, in which an action a is R (a - o); None for the frame of the data.
  """

  observation: np.ndarray
  action: np.ndarray
  ends: np.ndarray
  frame: np.ndarray | None = None


def read(path: str, *, keys: tuple[str, ...], absolute: bool) -> Episodes:
  """Returns the episodes of a file or folder, of the format that it has.

  Args:
    path: .npz, .hdf5 of robomimic, a .zarr folder of Diffusion Policy, or a folder of
      Franka Kitchen's .npy files or .mjl logs.
    keys: names of the observations of robomimic.
    absolute: see `robomimic.read`.

  Raises:
    ValueError: the path is empty or does not exist.
    UserError: the file is damaged or of another format.
  """
  if not path:
    raise ValueError("path='': name a file or folder of episodes")
  if not storage.lexists(path):
    raise ValueError(f"path={path!r}: does not exist")
  path = downloads.local(path)
  if os.path.isdir(path):
    if pusht_zarr.is_group(path):
      arrays = pusht_zarr.read(path)
    else:
      arrays = kitchen.read(path)
  elif path.endswith((".hdf5", ".h5")):
    arrays = robomimic.read(path, keys=keys, absolute=absolute)
  else:
    arrays = _npz(path)
  return _checked(path, arrays)


def _npz(path: str) -> dict[str, np.ndarray]:
  names = ("observation", "state", "action", "episode_ends", "frame")
  arrays = array_io.read_npz(path, names)
  if "state" in arrays:
    arrays.setdefault("observation", arrays.pop("state"))
  return arrays


def _checked(path: str, members: dict[str, np.ndarray]) -> Episodes:
  """Returns the arrays as episodes.

  Raises:
    UserError: they are missing, or their shapes do not agree.
  """
  missing = {"observation", "action", "episode_ends"} - members.keys()
  if missing:
    raise UserError(
      f"{path} has no {' and no '.join(sorted(missing))}: save action [N, Da], "
      "observation (or state) [N, Do] and episode_ends [E]"
    )
  ends, action = members["episode_ends"], members["action"]
  N = len(action) if action.ndim else 0
  if ends.dtype.kind == "u" and ends.size and ends.max() < 2**63:
    ends = ends.astype(np.int64)  # differences of unsigned integers wrap around
  rising = (
    ends.ndim == 1
    and ends.dtype.kind in "if"
    and len(ends)
    and (np.diff(ends, prepend=0) > 0).all()
  )
  if not rising or ends.dtype.kind != "i" or ends[-1] != N:
    raise UserError(
      f"{path}: episode_ends {ends.dtype} {ends.shape} must be integers that increase "
      f"from above 0 to the {N} steps of action"
    )
  Da = action.shape[-1] if action.ndim else 0
  shapes = {"observation": (N, None), "action": (N, Da), "frame": (N, Da, Da + 1)}
  arrays = {}
  for name, shape in shapes.items():
    if name not in members:
      continue
    x = members[name]
    fits = len(x.shape) == len(shape) and x.dtype.kind == "f" and x.size
    if not fits or any(n not in (m, None) for m, n in zip(x.shape, shape, strict=True)):
      expected = ", ".join("D" if n is None else str(n) for n in shape)
      raise UserError(
        f"{path}: {name} is {x.dtype} {x.shape}; save floats [{expected}]"
      )
    if not np.isfinite(x).all():
      row = int(np.argwhere(~np.isfinite(x))[0, 0])
      raise UserError(f"{path}: {name} is not finite at step {row}; remove its episode")
    if np.abs(x).max() > MAX_VALUE:
      row = int(np.argwhere(np.abs(x) > MAX_VALUE)[0, 0])
      raise UserError(
        f"{path}: {name} has values above {MAX_VALUE:g} at step {row}; remove its episode"
      )
    arrays[name] = x.astype(np.float32)
  return Episodes(ends=ends.astype(np.int64), **arrays)


def split_mask(count: int, held_out: float, most: int) -> np.ndarray:
  """Returns which of `count` episodes to train on, bool [count].

  A fraction is held out, and a subset of the others may be used; both are drawn with
  SEED as in Diffusion Policy.

  Args:
    count: number of episodes.
    held_out: fraction of the episodes that is held out, at least one; 0 for none.
    most: largest number of episodes to train on; 0 for all.

  Example:
    >>> split_mask(4, 0.25, 0).sum()
    np.int64(3)
  """
  mask = np.ones(count, bool)
  if held_out > 0:
    number = min(max(1, round(count * held_out)), count - 1)
    mask[np.random.default_rng(SEED).choice(count, number, replace=False)] = False
  if 0 < most < mask.sum():
    left = np.flatnonzero(mask)
    taken = np.random.default_rng(SEED).choice(len(left), most, replace=False)
    mask = np.isin(np.arange(count), left[taken])
  return mask
