"""Episodes of robomimic, of low-dimensional observations, in its .hdf5 files."""

import math
from typing import Any

import numpy as np

from sdiff_jax.io import bounded
from sdiff_jax.types import UserError

FILTERS = {1, 2, 3, 32000}  # gzip, shuffle, checksum, lzf: those that h5py brings along

# Observations of the tasks Square, ToolHang, Can and Lift: 14 + 3 + 4 + 2 numbers.
KEYS = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


def read(path: str, *, keys: tuple[str, ...], absolute: bool) -> dict[str, np.ndarray]:
  """Returns observation [N, Do], action [N, Da] and episode_ends [E] of a file.

  Args:
    path: with data/demo_0, data/demo_1, ..., each of obs/KEY [n, ...] and actions
      [n, 7] of one arm, [n, 14] of two.
    keys: names of the observations, which are concatenated in this order.
    absolute: whether actions are poses; their rotation vectors then become two rows of
      the rotation matrix: position 3, rotation 6, gripper 1 numbers.

  Raises:
    UserError: data are missing, damaged or of another format, or h5py is not installed.
  """
  try:
    import h5py  # needed only here
  except ImportError:
    raise UserError(
      f"{path}: needs the package h5py: pip install 'sdiff_jax[robotics]'"
    ) from None
  observations, actions = [], []
  try:
    with bounded.open_regular(path) as raw:
      budget = _Budget(bounded.stored_size(raw))
    with h5py.File(path, "r") as file:
      data = _member(file, "data", h5py.Group)
      for k in range(len(data)):
        demo = _member(data, f"demo_{k}", h5py.Group)
        obs = _member(demo, "obs", h5py.Group)
        parts = [_array(obs, key, budget) for key in keys]
        observations.append(np.concatenate(parts, axis=-1))
        actions.append(_array(demo, "actions", budget))
        if len(observations[-1]) != len(actions[-1]):
          lengths = f"{len(parts[0])} observations, {len(actions[-1])} actions"
          raise ValueError(f"demo_{k}: {lengths}")
    action = np.concatenate(actions)
    if absolute:
      action = with_matrices(action)
    observation = np.concatenate(observations)
  except UserError:
    raise
  except Exception as error:  # damaged files raise many errors of HDF5
    reason, names = bounded.short(error), bounded.short(", ".join(keys), 80)
    raise UserError(
      f"{path}: is damaged, or not a robomimic file with obs of {names} ({reason})"
    ) from error
  ends = np.cumsum([len(x) for x in actions])
  return {"observation": observation, "action": action, "episode_ends": ends}


class _Budget:
  """Number of bytes that the arrays of a file may still have."""

  def __init__(self, stored: int):
    self._stored, self._total = stored, 0

  def add(self, size: int) -> None:
    """Counts `size` bytes."""
    self._total += size
    bounded.check_expansion(self._total, self._stored, "the arrays")


def _member(group: Any, name: str, kind: type) -> Any:
  """Returns a group or an array inside a group of the same file.

  Raises:
    KeyError: there is none.
    ValueError: it is a link, which may lead to another file, or of another kind.
  """
  import h5py

  link = group.get(name, getlink=True)
  if link is None:
    raise KeyError(f"no {group.name}/{name}")
  if not isinstance(link, h5py.HardLink):
    raise ValueError(f"{group.name}/{name} is a link")
  member = group[name]
  if not isinstance(member, kind):
    raise ValueError(f"{group.name}/{name} is no {kind.__name__.lower()}")
  return member


def _array(group: Any, name: str, budget: _Budget) -> np.ndarray:
  """Returns an array of a group as float32, after checking its size."""
  import h5py

  stored = _member(group, name, h5py.Dataset)
  label = f"{group.name}/{name}"
  if stored.is_virtual or stored.external is not None:
    raise ValueError(f"{label} is in another file")
  if stored.dtype.kind not in "fiu" or stored.dtype.itemsize > 8 or not stored.shape:
    raise ValueError(f"{label} is {stored.dtype} {stored.shape}; save floats [n, D]")
  settings = stored.id.get_create_plist()
  filters = {settings.get_filter(i)[0] for i in range(settings.get_nfilters())}
  if not filters <= FILTERS:
    raise ValueError(f"{label} has the filters {sorted(filters)}, not gzip or lzf")
  budget.add(math.prod(stored.shape) * max(stored.dtype.itemsize, 4))
  budget.add(math.prod(stored.chunks or ()) * stored.dtype.itemsize)
  with np.errstate(over="ignore"):  # infinity is refused by the reader
    return np.asarray(stored[()], np.float32)


def with_matrices(action: np.ndarray) -> np.ndarray:
  """Returns [N, 10 k] of poses [N, 7 k]: the first two rows for a rotation vector.

  Rows of the matrix are continuous in the rotation (Zhou et al., arXiv:1812.07035).

  Raises:
    ValueError: the number of dimensions is not a multiple of 7.
  """
  N, D = action.shape
  if D % 7:
    raise ValueError(f"actions of {D} numbers: poses have 7 numbers for each arm")
  arms = action.reshape(N, -1, 7)
  rows = rotation(arms[..., 3:6])[..., :2, :].reshape(*arms.shape[:2], 6)
  return np.concatenate([arms[..., :3], rows, arms[..., 6:]], -1).reshape(N, -1)


def rotation(vector: np.ndarray) -> np.ndarray:
  """Returns matrices exp([v]x), [..., 3, 3], of rotation vectors v [..., 3], radians.

  Rodrigues: I + sin a [u]x + (1 - cos a) [u]x^2, a = |v|, u = v / a.
  """
  angle = np.linalg.norm(vector, axis=-1)[..., None, None]
  x, y, z = np.moveaxis(vector, -1, 0)
  o = np.zeros_like(x)
  rows = [np.stack(r, -1) for r in ((o, -z, y), (z, o, -x), (-y, x, o))]
  cross = np.stack(rows, -2)
  # sin(a) / a and (1 - cos a) / a^2, finite at a = 0.
  first = np.sinc(angle / np.pi)
  second = np.sinc(angle / (2 * np.pi)) ** 2 / 2
  return np.eye(3, dtype=vector.dtype) + first * cross + second * cross @ cross
