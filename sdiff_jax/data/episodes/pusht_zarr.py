"""Episodes of PushT as Diffusion Policy stores them: a folder in zarr's format 2."""

import numpy as np

from sdiff_jax.types import UserError


def read(path: str) -> dict[str, np.ndarray]:
  """Returns observation [N, 20], action [N, 2] and episode_ends [E] of a folder.

  An observation is the block's nine keypoints and the agent's position, in pixels; the
  action is the target of the agent (arXiv:2303.04137, section 5.3).

  Args:
    path: with data/keypoint [N, 9, 2], data/state [N, 5], data/action [N, 2] and
      meta/episode_ends [E]; without keypoints the state is the observation.

  Raises:
    UserError: arrays are missing or damaged, or zarr is not installed.
  """
  try:
    import zarr  # slow to import, and needed only here
  except ImportError:
    raise UserError(
      f"{path}: needs the package zarr: pip install 'sdiff_jax[robotics]'"
    ) from None
  try:
    group = zarr.open_group(path, mode="r")
    names = {"data/keypoint": "keypoint", "data/state": "observation"}
    names |= {"data/action": "action", "meta/episode_ends": "episode_ends"}
    arrays = {new: np.asarray(group[k][:]) for k, new in names.items() if k in group}
  except Exception as error:  # a damaged chunk raises errors of its compressor
    raise UserError(f"{path}: cannot be read ({error}); download it again") from error
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
