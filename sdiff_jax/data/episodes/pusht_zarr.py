"""Episodes of PushT as Diffusion Policy stores them: a folder in zarr's format 2."""

import os

import numpy as np

from sdiff_jax.data.episodes import zarr_array
from sdiff_jax.io import bounded
from sdiff_jax.types import UserError

GROUP, GROUP_3 = ".zgroup", "zarr.json"  # files of a folder in format 2 and in format 3
NAMES = {
  "data/keypoint": "keypoint",
  "data/state": "observation",
  "data/action": "action",
  "meta/episode_ends": "episode_ends",
}


def is_group(path: str) -> bool:
  """Returns whether a folder is one of zarr."""
  return any(os.path.lexists(os.path.join(path, name)) for name in (GROUP, GROUP_3))


def read(path: str) -> dict[str, np.ndarray]:
  """Returns observation [N, 20], action [N, 2] and episode_ends [E] of a folder.

  An observation is the block's nine keypoints and the agent's position, in pixels; the
  action is the target of the agent (arXiv:2303.04137, section 5.3).

  Args:
    path: with data/keypoint [N, 9, 2], data/state [N, 5], data/action [N, 2] and
      meta/episode_ends [E]; without keypoints the state is the observation.

  Raises:
    UserError: arrays are missing, damaged or of another format.
  """
  if not os.path.lexists(os.path.join(path, GROUP)):
    raise UserError(f"{path}: is of zarr's format 3; save it in format 2")
  arrays = {}
  for name, new in NAMES.items():
    folder = os.path.join(path, name)
    if not zarr_array.exists(folder):
      continue
    try:
      arrays[new] = zarr_array.read(folder)
    except UserError:
      raise
    except ImportError:
      raise UserError(
        f"{path}: needs the package numcodecs: pip install 'sdiff_jax[robotics]'"
      ) from None
    except Exception as error:  # a damaged chunk raises errors of its compressor
      reason = bounded.short(error)
      raise UserError(
        f"{folder}: cannot be read ({reason}); download it again"
      ) from error
  keypoint = arrays.pop("keypoint", None)
  if keypoint is not None and "observation" in arrays:
    state = arrays["observation"]
    if len(keypoint) != len(state) or keypoint.ndim < 2 or state.ndim != 2:
      raise UserError(
        f"{path}: data/keypoint {keypoint.shape} and data/state {state.shape} differ in "
        "length"
      )
    parts = [keypoint.reshape(len(state), -1), state[:, :2]]
    arrays["observation"] = np.concatenate(parts, axis=1)
  return arrays
