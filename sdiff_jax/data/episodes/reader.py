"""Episodes: observations and actions of consecutive times, in several file formats.

Our own is an .npz with `action` float [N, Da], `episode_ends` int [E], where each
episode ends (past its last row), and `observation` [N, Do] or, instead of it, `state`.
"""

import os
import zipfile
from typing import NamedTuple

import numpy as np

from sdiff_jax.data.episodes import kitchen, pusht_zarr, robomimic
from sdiff_jax.types import UserError

SEED = 42  # of the episodes that Diffusion Policy holds out, and of those it takes


class Episodes(NamedTuple):
  """E episodes of N steps in all.

  Attributes:
    observation: float32 [N, Do].
    action: float32 [N, Da].
    ends: one past the last step of each episode, int64 [E], rising to N.
    frame: None, or frames that actions are told in, float32 [N, Da, Da + 1]: rotation
      R, and behind it origin o. From a step with it, the action a is R (a - o).
  """

  observation: np.ndarray
  action: np.ndarray
  ends: np.ndarray
  frame: np.ndarray | None = None


def read(path: str, *, keys: tuple[str, ...], absolute: bool) -> Episodes:
  """Returns the episodes of a file or folder, by its form.

  Args:
    path: .npz, .hdf5 of robomimic, a .zarr folder of Diffusion Policy, or a folder of
      Franka Kitchen's .npy files or .mjl logs.
    keys: observations of robomimic.
    absolute: see `robomimic.read`.

  Raises:
    UserError: nothing is there, or it is damaged, or of another form.
  """
  if not path:
    raise ValueError("path='': name a file or folder of episodes")
  if not os.path.exists(path):
    raise ValueError(f"path={path!r}: does not exist")
  if os.path.isdir(path):
    if os.path.exists(os.path.join(path, ".zgroup")):
      found = pusht_zarr.read(path)
    else:
      found = kitchen.read(path)
  elif path.endswith((".hdf5", ".h5")):
    found = robomimic.read(path, keys=keys, absolute=absolute)
  else:
    found = _npz(path)
  return _checked(path, found)


def _npz(path: str) -> dict[str, np.ndarray]:
  try:
    with np.load(path) as arrays:
      wanted = ("observation", "state", "action", "episode_ends", "frame")
      found = {k: arrays[k] for k in wanted if k in arrays}
  except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
    raise UserError(f"{path} is no .npz, or damaged ({error})") from error
  if "state" in found:
    found.setdefault("observation", found.pop("state"))
  return found


def _checked(path: str, found: dict[str, np.ndarray]) -> Episodes:
  """Returns the arrays as episodes, once they fit."""
  missing = {"observation", "action", "episode_ends"} - found.keys()
  if missing:
    raise UserError(
      f"{path} has no {' and no '.join(sorted(missing))}: save action [N, Da], "
      "observation (or state) [N, Do] and episode_ends [E]"
    )
  ends = found["episode_ends"]
  N = len(found["action"])
  rising = ends.ndim == 1 and len(ends) and (np.diff(ends, prepend=0) > 0).all()
  if not rising or ends.dtype.kind not in "iu" or ends[-1] != N:
    raise UserError(
      f"{path}: episode_ends {ends.dtype} {ends.shape} must be whole numbers that rise "
      f"from above 0 to the {N} steps of action"
    )
  Da = found["action"].shape[-1] if found["action"].ndim else 0
  shapes = {"observation": (N, None), "action": (N, Da), "frame": (N, Da, Da + 1)}
  arrays = {}
  for name, shape in shapes.items():
    if name not in found:
      continue
    x = found[name]
    fits = len(x.shape) == len(shape) and x.dtype.kind == "f" and x.size
    if not fits or any(n not in (m, None) for m, n in zip(x.shape, shape, strict=True)):
      wanted = ", ".join("D" if n is None else str(n) for n in shape)
      raise UserError(f"{path}: {name} is {x.dtype} {x.shape}; save floats [{wanted}]")
    if not np.isfinite(x).all():
      row = int(np.argwhere(~np.isfinite(x))[0, 0])
      raise UserError(f"{path}: {name} is not finite at step {row}; remove its episode")
    arrays[name] = x.astype(np.float32)
  return Episodes(ends=ends.astype(np.int64), **arrays)


def split_mask(count: int, held_out: float, most: int) -> np.ndarray:
  """Returns which of `count` episodes to train on, bool [count].

  A share is held out, and of the rest some are taken, both drawn with SEED as
  Diffusion Policy draws them.

  Args:
    count: episodes.
    held_out: fraction of them that is held out, at least one; 0 for none.
    most: episodes to take of the others; 0 for all.
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
