"""Chunks of actions and the observations before them, of recorded episodes."""

from typing import Annotated, Literal

import numpy as np

from sdiff_jax import registry
from sdiff_jax.data._codecs import ActionCodec
from sdiff_jax.data._dataset import Dataset, Samples
from sdiff_jax.data.episodes import normalizer as maps
from sdiff_jax.data.episodes import reader as recorded
from sdiff_jax.data.episodes import robomimic
from sdiff_jax.data.episodes.normalizer import Normalizer
from sdiff_jax.data.episodes.reader import Episodes
from sdiff_jax.fields import (
  Choices,
  Count,
  Index,
  Length,
  NotNegative,
  Path,
  Range,
  Rate,
)
from sdiff_jax.types import Array, CondSpec

MAX_BYTES = 2**35  # of the windows of all episodes


@registry.register("data", "trajectories")
def build(
  *,
  path: Path = "",
  horizon: Annotated[int, Range(1, 100_000)] = 16,
  n_obs_steps: Count = 2,
  n_action_steps: Count = 8,
  episodes: Index = 0,
  held_out: Rate = 0.0,
  observation_range: Annotated[str, Choices(maps.KINDS)] = "range",
  action_range: Annotated[str, Choices(maps.KINDS)] = "range",
  min_range: NotNegative = 1e-4,
  std: NotNegative = 0.0,
  keys: Annotated[tuple[str, ...], Length(1)] = robomimic.KEYS,
  absolute: bool = False,
  frame: Literal["block", "keypoints"] = "block",
) -> Dataset:
  """Returns windows of episodes: x0 are actions, the condition is what was observed.

  A window starts at an observation, To - 1 before it is the first that the policy is
  given, and has H actions from there; the policy executes Ta of them from the last
  observation on. Beyond an episode's ends the edge is repeated, To - 1 steps before
  and Ta - 1 after (arXiv:2303.04137).

  Args:
    path: file or folder of the episodes (see `episodes.reader.read`).
    horizon: H, number of actions that are predicted.
    n_obs_steps: To, number of observations.
    n_action_steps: Ta, number of actions that are executed.
    episodes: number of episodes to train on; 0 for all.
    held_out: fraction of the episodes that is held out.
    observation_range: how observations are normalized (see `normalizer.fit`).
    action_range: how actions are normalized; "percentile" normalizes each step of the
      chunk by itself.
    min_range: dimensions of a smaller range are centered and not scaled.
    std: root mean square of normalized actions, which x0 is scaled from to sigma_d; 0
      measures it.
    keys: names of the observations of robomimic.
    absolute: whether actions of robomimic are poses, whose rotations become matrices.
    frame: what the episodes of Push-T hold, "block" (all in the block's frame) or
      "keypoints" (see `policies.pusht.observations`): the job that makes them writes it,
      and rollouts give it to the policy. Nothing here depends on it.

  Raises:
    UserError: the episodes cannot be read or do not fit, or none is long enough.
  """
  del frame  # the episodes hold what they were written with
  if max(n_obs_steps, n_action_steps) > horizon:
    raise ValueError(
      f"horizon={horizon}: must hold n_obs_steps={n_obs_steps} and "
      f"n_action_steps={n_action_steps}"
    )
  found = recorded.read(path, keys=tuple(keys), absolute=absolute)
  _check_windows(path, found, horizon, n_obs_steps - 1, n_action_steps - 1)
  mask = recorded.split_mask(len(found.ends), held_out, episodes)
  at = windows(
    found.ends, mask, horizon, before=n_obs_steps - 1, after=n_action_steps - 1
  )
  if not len(at):
    raise ValueError(_too_long(path, found, horizon))
  observation = maps.fit(found.observation, observation_range, min_range)
  # Chunks differ from the actions in frames, and by their percentiles.
  per_step = found.frame is not None or action_range == "percentile"
  everything = chunks(found, at, n_obs_steps) if per_step else found.action
  action = maps.fit(everything, action_range, min_range)
  rms = np.sqrt(np.mean(maps.normalize(action, everything) ** 2, dtype=np.float64))
  shape = (horizon, found.action.shape[1])
  fitted = Normalizer(observation, action, n_obs_steps, shape, std or float(rms) or 1.0)
  maps.check(fitted)

  def read(indices: np.ndarray) -> Samples:
    rows = at[indices]
    seen = found.observation[rows[:, :n_obs_steps]]
    return chunks(found, rows, n_obs_steps), {"observation": observed(fitted, seen)}

  return Dataset(read, len(at), _cond(fitted), ActionCodec(fitted))


def _check_windows(
  path: str, found: Episodes, horizon: int, before: int, after: int
) -> None:
  """Checks how many windows there are, before memory is allocated for them.

  Raises:
    ValueError: there is none, or they need too much memory.
  """
  lengths = np.diff(found.ends, prepend=0).tolist()
  count = sum(max(0, n - horizon + 1 + before + after) for n in lengths)
  if not count:
    raise ValueError(_too_long(path, found, horizon))
  size = count * horizon * (8 + 4 * found.action.shape[1])
  if size > MAX_BYTES:
    raise ValueError(
      f"horizon={horizon}: the windows of all episodes would need {size} bytes of memory"
    )


def _too_long(path: str, found: Episodes, horizon: int) -> str:
  longest = np.diff(found.ends, prepend=0).max()
  return f"horizon={horizon}: no episode of {path} is so long; the longest has {longest} steps"


def observation_cond(width: int) -> dict[str, CondSpec]:
  """Returns the condition of a policy: `width` normalized numbers, {} for 0.

  Example:
    >>> observation_cond(4)["observation"].shape
    (4,)
  """
  return {"observation": CondSpec((width,), np.float32)} if width else {}


def _cond(fitted: Normalizer) -> dict[str, CondSpec]:
  return observation_cond(fitted.steps * len(fitted.observation.centre))


def metadata_only(fitted: Normalizer) -> Dataset:
  """Returns a data set of known shapes and scales, without its episodes."""

  def read(indices: np.ndarray) -> Samples:
    raise ValueError("path: the episodes are not here; the policy can only be sampled")

  return Dataset(read, 0, _cond(fitted), ActionCodec(fitted))


def windows(
  ends: np.ndarray, mask: np.ndarray, horizon: int, *, before: int, after: int
) -> np.ndarray:
  """Returns the steps of every window, int [windows, horizon], edges repeated.

  Args:
    ends: of the episodes, int [E].
    mask: which of them to take, bool [E].
    horizon: steps of a window.
    before: steps that a window may begin before its episode.
    after: steps that it may end after it.
  """
  out = [np.empty((0, horizon), np.int64)]
  starts = np.concatenate([[0], ends[:-1]])
  for start, end in zip(starts[mask].tolist(), ends[mask].tolist(), strict=True):
    first = np.arange(start - before, end - horizon + after + 1)
    at = first[:, None] + np.arange(horizon)
    out.append(np.clip(at, start, end - 1))
  return np.concatenate(out)


def chunks(found: Episodes, at: np.ndarray, n_obs_steps: int) -> np.ndarray:
  """Returns actions [n, H, Da] of windows, in the frame of the last observation."""
  actions = found.action[at]
  if found.frame is None:
    return actions
  return into_frame(found.frame[at[:, n_obs_steps - 1]], actions)


def into_frame(frame: np.ndarray, actions: np.ndarray) -> np.ndarray:
  """Returns R (a - o) of actions [n, H, Da] and frames (R, o) [n, Da, Da + 1]."""
  R, o = frame[..., :-1], frame[..., -1]
  return (actions - o[:, None]) @ R.swapaxes(-1, -2)


def out_of_frame(frame: np.ndarray, actions: np.ndarray) -> np.ndarray:
  """Returns R^T a + o, the inverse of `into_frame`; R is a rotation."""
  R, o = frame[..., :-1], frame[..., -1]
  return actions @ R + o[:, None]


def observed(fitted: Normalizer, observations: Array) -> Array:
  """Returns the condition "observation" [n, To Do] of observations [n, To, Do]."""
  normal = maps.normalize(fitted.observation, observations)
  return normal.reshape(len(normal), -1)


def actions(fitted: Normalizer, x0: Array, sigma_d: float) -> Array:
  """Returns actions [n, H, Da], in the data's units, of samples x0."""
  return ActionCodec(fitted).decode(x0, sigma_d)
