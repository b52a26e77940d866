"""Job `rollout`: runs a policy in Push-T with several samplers, in equal episodes."""

import dataclasses
import functools
import os
import time
from typing import Annotated

import ml_collections
import numpy as np

from sdiff_jax import losses, registry
from sdiff_jax.experiment import policies, sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.fields import Count, Index, Length, Range, Seed
from sdiff_jax.io import file_io, image_io, snapshot, storage
from sdiff_jax.io.progress import Progress
from sdiff_jax.policies import Policy
from sdiff_jax.policies.pusht import env
from sdiff_jax.policies.pusht import rollout as rollout_lib
from sdiff_jax.policies.pusht.env import Env
from sdiff_jax.reports import results
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.types import Json, UserError

MAX_ENV_SEED = 2**32 - 1  # of numpy's RandomState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
  """Episodes of a policy.

  Attributes:
    samplers: samplers and their numbers of steps, name/steps.
    episodes: number of episodes of each sampler.
    seed: episode k starts as Diffusion Policy's test seed + k.
    noise_seed: seed of the policy's noise.
    n_action_steps: actions that are executed before the policy observes again.
    num_timed: chunks of actions that are timed.
    num_videos: episodes shown in rollout/SAMPLER.gif.
  """

  samplers: Annotated[tuple[str, ...], Length(1, 1000)] = ("ddim/15",)
  episodes: Annotated[int, Range(1, 100_000)] = 100
  seed: Annotated[int, Range(0, MAX_ENV_SEED)] = 100_000
  noise_seed: Seed = 0
  n_action_steps: Count = 8
  num_timed: Annotated[int, Range(1, 100_000)] = 200
  num_videos: Index = 4


@registry.register(
  "jobs", "rollout", sections={"rollout": Rollout}, runtime=("rollout",)
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes rollout/results.json, and a film of some episodes of each sampler.

  Raises:
    UserError: a field does not fit, or an environment or a policy fails.
  """
  rollout = config.rollout
  _check_seeds(rollout)
  experiment, params = policies.trained(config, workdir)
  sampling.check_request(config, experiment)
  stored = workdir_lib.read(workdir)
  config = config.copy_and_resolve_references()
  config.data = stored.data  # the frame is that of the data that were trained on
  folder = os.path.join(workdir, "rollout")
  storage.makedirs(folder)
  samplers = {
    name: policies.build_sampler(config, experiment, params, name)
    for name in rollout.samplers
  }
  build = functools.partial(policies.build, config, experiment, params)
  model = losses.facts(stored.loss).title
  path = os.path.join(folder, "results.json")
  envs = [env.make() for _ in range(rollout.episodes)]
  settings = _settings(config, workdir)
  state = snapshot.Snapshot(os.path.join(folder, "partial.npz"), settings)
  rows = snapshot.unpack(state.arrays["rows"]) if state.arrays else []
  histories = [state.arrays[f"history{k}"] for k in range(len(rows))]
  for name, sampler in [*samplers.items()][len(rows) :]:
    policy = build(sampler, batch_size=rollout.episodes)
    film = os.path.join(folder, f"{name.replace('/', '_')}.gif")
    episodes = _episodes(rollout, policy, envs, name, film)
    histories.append(episodes.histories)
    rows.append(_row(model, name, episodes))
    rows[-1] |= _difference(rows[-1]["rewards"], rows[0]["rewards"])
    arrays = {f"history{k}": history for k, history in enumerate(histories)}
    arrays["rows"] = snapshot.pack(rows)
    state.save(lambda arrays=arrays: arrays, now=True)
    file_io.write_json(path, rows)  # the times follow
  single = {name: build(sampler) for name, sampler in samplers.items()}
  seconds = _seconds(single, histories, rollout.num_timed)
  for row in rows:
    row |= seconds[row["sampler"]]
  file_io.write_json(path, rows)
  state.remove()
  print(results.table(rows, results.ROLLOUT_COLUMNS))
  return f"{rollout.episodes} episodes by each of {len(rows)} samplers: {path}"


def _settings(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Json]:
  """Returns what determines the episodes."""
  settings = {name: config[name].to_dict() for name in ("rollout", "sample", "sampler")}
  return {**settings, "newest": checkpoints_lib.newest(workdir)}


def _check_seeds(rollout: ml_collections.ConfigDict) -> None:
  """Checks the seeds of the episodes and of the policy's noise.

  Raises:
    UserError: they are not integers in their range.
  """
  largest = {
    "seed": MAX_ENV_SEED - rollout.episodes + 1,
    "noise_seed": rollout_lib.max_noise_seed(rollout.episodes),
  }
  for field, most in largest.items():
    seed = rollout[field]
    if type(seed) is not int or not 0 <= seed <= most:
      raise UserError(
        f"config.rollout.{field}={seed}: must be an integer from 0 to {most} for "
        f"{rollout.episodes} episodes"
      )


def _episodes(
  rollout: ml_collections.ConfigDict,
  policy: Policy,
  envs: list[Env],
  name: str,
  film: str,
) -> rollout_lib.Episodes:
  """Returns the episodes of one sampler, and writes a film of the first few."""
  starts = np.array([env.initial(rollout.seed + k) for k in range(rollout.episodes)])

  def act(states: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, dict]:
    try:
      actions, stats = policy.many(states, seeds)
    except ValueError as error:
      raise UserError(f"sampler {name}: {error}") from error
    cost = {"passes": stats.num_iterations, "evaluations": stats.num_evaluations}
    return actions, {k: np.asarray(v) for k, v in cost.items()}

  frames = [[] for _ in envs[: rollout.num_videos]]

  def watch(episode: int) -> None:
    if episode < len(frames):
      frames[episode].append(envs[episode].render())

  with Progress(env.STEPS, label=f"rollout {name}", unit="step") as progress:
    episodes = rollout_lib.run(
      act,
      envs,
      starts,
      states=policy.num_states,
      seed=rollout.noise_seed,
      progress=progress.show,
      watch=watch,
    )
  if frames:
    image_io.save_gif(film, frames, env.RATE)
  return episodes


def _difference(rewards: list[float], first: list[float]) -> dict[str, float]:
  """Returns the mean difference to the first sampler, episode by episode."""
  gained, count = np.subtract(rewards, first), len(rewards)
  if rewards is first or count < 2:
    return {}
  error = gained.std(ddof=1) / count**0.5
  return {"difference": float(gained.mean()), "difference_error": float(error)}


def _row(model: str, sampler: str, episodes: rollout_lib.Episodes) -> dict[str, Json]:
  """Returns a row of results; see `reports.results.ROLLOUT_COLUMNS`."""
  count, cost = len(episodes.reward), episodes.cost
  return {
    "model": model,
    "sampler": sampler,
    "kind": "model",
    "episodes": count,
    "reward": float(episodes.reward.mean()),
    "error": float(episodes.reward.std(ddof=1) / count**0.5) if count > 1 else None,
    "solved": float(episodes.solved.mean()),
    "passes": float(cost["passes"].mean()),
    "most_passes": int(cost["passes"].max()),
    "evaluations": float(cost["evaluations"].mean()),
    "rewards": episodes.reward.tolist(),
  }


def _seconds(
  policies: dict[str, Policy], histories: list[np.ndarray], count: int
) -> dict[str, dict[str, float]]:
  """Returns median and 95th percentile of the seconds of a chunk for one robot.

  The policies take turns, so that other load on the machine affects all of them.

  Args:
    policies: by name.
    histories: states that were observed, [n, K, S] each.
    count: number of timed chunks.
  """
  states = np.concatenate(histories)
  states = states[np.random.default_rng(0).integers(len(states), size=count + 1)]
  times: dict[str, list[float]] = {name: [] for name in policies}
  for seed, history in enumerate(states):
    for name, policy in policies.items():
      begin = time.perf_counter()
      policy(history, seed)
      times[name].append(time.perf_counter() - begin)
  return {
    name: {
      "median": float(np.median(seconds[1:])),  # the first call warms up
      "p95": float(np.percentile(seconds[1:], 95)),
    }
    for name, seconds in times.items()
  }
