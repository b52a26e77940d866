"""Job `demos`: makes episodes of Push-T by a scripted expert, the data of a policy.

Episode k is made from seed + k alone; every third starts with the block near its
goal, where a policy needs it most and the others seldom are. Episodes are kept in
PATH.parts as they are made, and joined when all are there.
"""

import concurrent.futures
import multiprocessing
import os
import shutil

import ml_collections
import numpy as np
import tqdm

from sdiff_jax import registry
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.policies.pusht import env, expert, observations
from sdiff_jax.policies.pusht.env import Env
from sdiff_jax.types import UserError

NEAR = 3  # every so many-th episode starts near the goal
_envs: list[Env] = []  # of a worker process


DEFAULTS = {
  "demos": {
    "episodes": 600,  # those that succeed are kept, and mirrored
    "seed": 0,  # episode k is made from seed + k alone
    # What the policy sees: "block", all in the block's frame, or "keypoints".
    "view": "block",
  }
}


@registry.register("jobs", "demos", defaults=DEFAULTS, runtime=("demos",))
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes the episodes that succeeded to config.data.path.

  Its arrays: state [N, 5], before each action, action [N, 2], observation [N, Do] and
  frame [N, 2, 3] (see `robotics.frames`), episode_ends [episodes], and the seeds. The
  second half of the episodes is the mirror image of the first.

  Raises:
    UserError: a field does not fit, or no episode succeeded.
  """
  del workdir
  path, demos = config.data.path, config.demos
  if demos.view not in observations.VIEWS:
    raise UserError(
      f"config.demos.view={demos.view!r}: take one of {[*observations.VIEWS]}"
    )
  if not path.endswith(".npz"):
    raise UserError(f"config.data.path={path!r}: name the .npz file to write")
  if os.path.exists(path):
    return f"the episodes are there already; remove the file for others: {path}"
  folder = f"{path}.parts"
  with workdir_lib.errors(folder):
    os.makedirs(folder, exist_ok=True)
    seeds = range(demos.seed, demos.seed + demos.episodes)
    missing = [s for s in seeds if not os.path.exists(_part(folder, s))]
    _make(folder, missing, demos.episodes)
    kept = _join(folder, seeds, path, demos.view)
  shutil.rmtree(folder)
  return f"kept {kept} of {demos.episodes} episodes, those that succeeded: {path}"


def start(seed: int) -> np.ndarray:
  """Returns the first state of an episode, float64 [5]."""
  return env.near_goal(seed) if seed % NEAR == 0 else env.initial(seed)


def _make(folder: str, seeds: list[int], total: int) -> None:
  """Makes episodes on all cores."""
  spawn = multiprocessing.get_context("spawn")  # JAX has threads, so no fork
  with (
    tqdm.tqdm(total=total, initial=total - len(seeds), unit="episode") as bar,
    concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool,
  ):
    for done in concurrent.futures.as_completed(
      [pool.submit(_episode, folder, seed) for seed in seeds]
    ):
      done.result()
      bar.update()


def _episode(folder: str, seed: int) -> None:
  """Makes one episode and writes it, whole or not at all."""
  if not _envs:
    _envs.extend([env.make(), env.make()])
  episode = expert.demonstrate(*_envs, start(seed), seed)
  path = _part(folder, seed)
  with open(f"{path}.tmp", "wb") as file:
    np.savez(file, **episode._asdict())
  os.replace(f"{path}.tmp", path)


def _part(folder: str, seed: int) -> str:
  return os.path.join(folder, f"{seed:08d}.npz")


def _join(folder: str, seeds: range, path: str, view: str) -> int:
  """Writes the episodes that succeeded to one file, and returns their number."""
  parts = {}
  for seed in seeds:
    with np.load(_part(folder, seed)) as part:
      if part["solved"]:
        parts[seed] = part["state"], part["action"]
  if not parts:
    raise UserError(f"{folder}: no episode succeeded; take more, config.demos.episodes")
  joined = (np.concatenate(a) for a in zip(*parts.values(), strict=True))
  states, actions = (a.astype(np.float32) for a in joined)
  ends = np.cumsum([len(action) for _, action in parts.values()])
  # Each episode shows the same task a second time, in its mirror.
  image = (np.asarray(a) for a in observations.mirror(states, actions))
  states, actions = (
    np.concatenate([a, b]) for a, b in zip((states, actions), image, strict=True)
  )
  ends = np.concatenate([ends, ends + ends[-1]])
  first = np.zeros(len(states), bool)
  first[np.append(0, ends[:-1])] = True
  before = np.where(first[:, None], states, np.roll(states, 1, axis=0))
  arrays = {"state": states, "action": actions, "episode_ends": ends}
  _, observe, frame, _ = observations.VIEWS[view]
  arrays["observation"] = np.asarray(observe(states, before))
  if frame:
    arrays["frame"] = np.asarray(frame(states))
  with open(f"{path}.tmp", "wb") as file:
    np.savez(file, **arrays, seeds=np.array([*parts]))
  os.replace(f"{path}.tmp", path)
  return len(parts)
