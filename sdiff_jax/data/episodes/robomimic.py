"""Episodes of robomimic, of low-dimensional observations, in its .hdf5 files."""

import numpy as np

from sdiff_jax.types import UserError

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
    with h5py.File(path) as file:
      for k in range(len(file["data"])):
        demo = file[f"data/demo_{k}"]
        parts = [np.asarray(demo["obs"][key], np.float32) for key in keys]
        observations.append(np.concatenate(parts, axis=-1))
        actions.append(np.asarray(demo["actions"], np.float32))
        if len(observations[-1]) != len(actions[-1]):
          lengths = f"{len(parts[0])} observations, {len(actions[-1])} actions"
          raise ValueError(f"demo_{k}: {lengths}")
    action = np.concatenate(actions)
    if absolute:
      action = with_matrices(action)
    observation = np.concatenate(observations)
  except (OSError, KeyError, ValueError, TypeError) as error:
    raise UserError(
      f"{path}: is damaged, or not a robomimic file with obs of {', '.join(keys)} ({error})"
    ) from error
  ends = np.cumsum([len(x) for x in actions])
  return {"observation": observation, "action": action, "episode_ends": ends}


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
