"""Job `demos`: makes episodes of Push-T by a scripted expert, the data of a policy.

Episode k depends on seed + k alone. Every third episode starts with the block near its
goal, where precision matters most and other episodes seldom are. Finished episodes are
stored in the folder PATH.parts and joined into one file at the end, so that the job
resumes where it was stopped.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import signal
import threading
from typing import Annotated

import ml_collections
import numpy as np

from sdiff_jax import registry
from sdiff_jax.distributed import signals
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.fields import Range, Seed
from sdiff_jax.io import array_io, file_io, lock, storage
from sdiff_jax.io.progress import Progress
from sdiff_jax.policies.policy import View
from sdiff_jax.policies.pusht import env, expert, observations
from sdiff_jax.policies.pusht.env import Env
from sdiff_jax.types import UserError

QUIET = "ignore::UserWarning:multiprocessing.resource_tracker"
NEAR = 3  # one episode in so many starts near the goal
_envs: list[Env] = []  # of a worker process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demos:
  """Episodes of a scripted expert.

  Attributes:
    episodes: number of episodes; those that succeed are kept and mirrored.
    seed: episode k depends on seed + k alone.
  """

  episodes: Annotated[int, Range(1, 1_000_000)] = 600
  seed: Seed = 0


@registry.register("jobs", "demos", sections={"demos": Demos}, runtime=("demos",))
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes the episodes that succeeded to config.data.path.

  The file holds the arrays state float32 [N, 5] (pixels and radians, before each
  action), action float32 [N, 2] (pixels), observation float32 [N, Do] and
  frame float32 [N, 2, 3] (see `policies.pusht.observations`), episode_ends int
  [episodes] and seeds int. The second half of the episodes is the mirror image of the
  first half.

  Args:
    config: demos, and the fields path and frame of data.
    workdir: is not used.

  Returns:
    The last line of the output.

  Raises:
    UserError: a field is invalid, or no episode succeeded.
  """
  del workdir
  if config.data.name != "trajectories":
    raise UserError(f"config.data.name={config.data.name!r}: must be trajectories")
  path, demos = config.data.path, config.demos
  with config_errors("config.data"):
    view = observations.lookup(config.data.frame)
  if not path.endswith(".npz"):
    raise UserError(f"config.data.path={path!r}: name the .npz file to write")
  if storage.exists(path):
    return f"the episodes are there already; remove the file to make others: {path}"
  folder = f"{path}.parts"
  with workdir_lib.errors(folder), lock.locked(folder, "demos"):
    seeds = range(demos.seed, demos.seed + demos.episodes)
    missing = [s for s in seeds if not storage.exists(_part(folder, s))]
    _make(folder, missing, demos.episodes)
    kept = _join(folder, seeds, path, view)
    storage.rmtree(folder)
  return f"kept {kept} of {demos.episodes} episodes, those that succeeded: {path}"


def start(seed: int) -> np.ndarray:
  """Returns the first state of an episode, float64 [5]."""
  return env.near_goal(seed) if seed % NEAR == 0 else env.initial(seed)


def _make(folder: str, seeds: list[int], total: int) -> None:
  """Makes the episodes of `seeds`, one process for each core."""
  spawn = multiprocessing.get_context(
    "spawn"
  )  # JAX has threads, which a fork would copy
  done = total - len(seeds)
  # After a kill multiprocessing removes its semaphores, with a warning that is no news.
  warnings = [os.environ.get("PYTHONWARNINGS"), QUIET]
  os.environ["PYTHONWARNINGS"] = ",".join(filter(None, warnings))
  with (
    Progress(total, label="demos", unit="episode", initial=done) as progress,
    concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn, _start) as pool,
  ):
    for episode in concurrent.futures.as_completed(
      [pool.submit(_episode, folder, seed) for seed in seeds]
    ):
      episode.result()
      progress.add()


def _start() -> None:
  """Makes a worker process end with the job, and not by the signals that the job gets."""
  for number in signals.SIGNALS:
    signal.signal(number, signal.SIG_IGN)

  def wait() -> None:
    multiprocessing.parent_process().join()
    os._exit(signals.STOPPED)

  threading.Thread(target=wait, daemon=True).start()


def _episode(folder: str, seed: int) -> None:
  """Makes one episode and writes it atomically."""
  if not _envs:
    _envs.extend([env.make(), env.make()])
  episode = expert.demonstrate(*_envs, start(seed), seed)
  file_io.write_npz(_part(folder, seed), **episode._asdict())


def _part(folder: str, seed: int) -> str:
  return os.path.join(folder, f"{seed:08d}.npz")


def _join(folder: str, seeds: range, path: str, view: View) -> int:
  """Writes the episodes that succeeded to one file; returns their number."""
  parts = {}
  for seed in seeds:
    part = array_io.read_npz(_part(folder, seed))
    if part["solved"]:
      parts[seed] = part["state"], part["action"]
  if not parts:
    raise UserError(f"{folder}: no episode succeeded; increase config.demos.episodes")
  joined = (np.concatenate(a) for a in zip(*parts.values(), strict=True))
  states, actions = (a.astype(np.float32) for a in joined)
  ends = np.cumsum([len(action) for _, action in parts.values()])
  # The mirror image of an episode is another episode of the same task.
  image = (np.asarray(a) for a in observations.mirror(states, actions))
  states, actions = (
    np.concatenate([a, b]) for a, b in zip((states, actions), image, strict=True)
  )
  ends = np.concatenate([ends, ends + ends[-1]])
  first = np.zeros(len(states), bool)
  first[np.append(0, ends[:-1])] = True
  before = np.where(first[:, None], states, np.roll(states, 1, axis=0))
  arrays = {"state": states, "action": actions, "episode_ends": ends}
  arrays["observation"] = np.asarray(view.observe(states, before))
  if view.frame:
    arrays["frame"] = np.asarray(view.frame(states))
  file_io.write_npz(path, **arrays, seeds=np.array([*parts]))
  return len(parts)
