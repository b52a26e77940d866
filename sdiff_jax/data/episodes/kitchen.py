"""Episodes of Franka Kitchen: three .npy files, or .mjl logs of relay policy learning."""

import glob
import os

import numpy as np

from sdiff_jax.io import array_io, bounded
from sdiff_jax.types import UserError

FILES = ("observations_seq.npy", "actions_seq.npy", "existence_mask.npy")
SKIP = 40  # number of steps of a log for one step of an episode
ROBOT, OBJECTS, GOAL = 9, 21, 30


def read(path: str) -> dict[str, np.ndarray]:
  """Returns observation [N, 60], action [N, 9] and episode_ends [E] of a folder.

  Args:
    path: with observations_seq.npy [E, T, 60], actions_seq.npy [E, T, 9] and
      existence_mask.npy [E, T], 1 where there is a step; or with TASK/*.mjl.

  Raises:
    UserError: files are missing, damaged or of another format.
  """
  logs = sorted(glob.glob(os.path.join(glob.escape(path), "*", "*.mjl")))
  if logs:
    pairs = [_log(file) for file in logs]
  elif os.path.exists(os.path.join(path, FILES[0])):
    pairs = _sequences(path)
  else:
    raise UserError(
      f"{path}: has no .zgroup, no {FILES[0]} and no */*.mjl; name a folder of episodes"
    )
  if not pairs:
    raise UserError(f"{path}: {FILES[2]} has no step")
  observations, actions = zip(*pairs, strict=True)
  return {
    "observation": np.concatenate(observations),
    "action": np.concatenate(actions),
    "episode_ends": np.cumsum([len(x) for x in actions]),
  }


def _sequences(path: str) -> list[tuple[np.ndarray, np.ndarray]]:
  try:
    observation, action, mask = (
      array_io.read_npy(os.path.join(path, name)) for name in FILES
    )
  except UserError as error:
    raise UserError(f"{path}: a file is missing or damaged ({error})") from error
  valid = observation.ndim == action.ndim == 3 and mask.ndim == 2 and mask.size
  if not valid or not observation.shape[:2] == action.shape[:2] == mask.shape:
    shapes = ", ".join(
      f"{name} {x.shape}"
      for name, x in zip(FILES, (observation, action, mask), strict=True)
    )
    raise UserError(f"{path}: {shapes}; save [E, T, 60], [E, T, 9] and [E, T]")
  if mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
    raise UserError(f"{path}: {FILES[2]} is {mask.dtype}; its values must be 0 or 1")
  mask = mask.astype(bool)
  if (mask[:, 1:] & ~mask[:, :-1]).any():
    raise UserError(f"{path}: {FILES[2]} has steps behind the end of an episode")
  lengths = mask.sum(axis=1)
  return [
    (observation[i, :n], action[i, :n]) for i, n in enumerate(lengths.tolist()) if n
  ]


def _log(path: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns observations [n, 60] and actions [n, 9] of a log of MuJoCo.

  The file holds seven int32 (positions, velocities, controls, mocap bodies, sensors, user data, length
  of the name), the name, then records of float32: the time, and all of these.
  """
  try:
    with bounded.open_regular(path) as file:
      size = bounded.stored_size(file)
      bounded.check_memory(size, path)
      data = file.read(size)
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}; download it again") from error
  sizes = np.frombuffer(data[:28].ljust(28, b"\0"), "<i4").astype(int)
  nq, nv, nu, mocap, sensors, user, name = sizes.tolist()
  body = data[28 + max(name, 0) :]
  record = 1 + nq + nv + nu + 7 * mocap + sensors + user
  if (
    sizes.min() < 0
    or nq < ROBOT + OBJECTS
    or not nu
    or not body
    or len(body) % (4 * record)
  ):
    raise UserError(
      f"{path}: is damaged, or not a log of Franka Kitchen; download it again"
    )
  steps = np.frombuffer(body, "<f4").reshape(-1, record)[::SKIP]
  q, start = steps[:, 1 : 1 + nq], 1 + nq + nv
  goal = np.zeros((len(q), GOAL), np.float32)
  observation = np.concatenate([q[:, :ROBOT], q[:, -OBJECTS:], goal], axis=1)
  return observation, steps[:, start : start + nu]
