"""Job `rollout`: a policy acts in Push-T, by several samplers, in the same episodes."""

import functools
import json
import os
import time
from typing import Any

import ml_collections
import numpy as np
import tqdm

from sdiff_jax import registry
from sdiff_jax.experiment import sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.io import file_io, image_io
from sdiff_jax.policies import policy as policies
from sdiff_jax.policies.policy import Policy
from sdiff_jax.policies.pusht import env
from sdiff_jax.policies.pusht import rollout as rollout_lib
from sdiff_jax.reports import runs
from sdiff_jax.types import UserError

DEFAULTS = {
  "rollout": {
    "samplers": ("ddim/15",),  # name/steps
    "episodes": 100,
    "seed": 100_000,  # episode k starts as Diffusion Policy's test seed + k
    "noise_seed": 0,  # seed of the policy's noise
    "n_action_steps": 8,  # executed before the policy observes again
    "num_timed": 200,  # chunks of actions that are timed
    "num_videos": 4,  # episodes shown in rollout/SAMPLER.gif
  }
}


@registry.register("jobs", "rollout", defaults=DEFAULTS, runtime=("rollout",))
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes rollout/results.json, and a film of some episodes of each sampler.

  Raises:
    UserError: a field does not fit, or an environment or a policy fails.
  """
  rollout = config.rollout
  if rollout.episodes < 1 or rollout.num_timed < 1:
    raise UserError("config.rollout.episodes and rollout.num_timed: must be above 0")
  experiment, params = workdir_lib.trained(config, workdir)
  if experiment.dataset.normaliser is None:
    raise UserError(f"{workdir} holds no policy: its data are images")
  folder = os.path.join(workdir, "rollout")
  os.makedirs(folder, exist_ok=True)
  plans = {
    name: sampling.with_window(
      config, experiment, sampling.plan(config, name), params, 1
    )
    for name in rollout.samplers
  }
  build = functools.partial(Policy, config, experiment, params)
  model = runs.title(workdir_lib.read(workdir).loss.to_dict())
  path = os.path.join(folder, "results.json")
  envs = [env.make() for _ in range(rollout.episodes)]
  rows, histories = [], []
  for name, plan in plans.items():
    act = build(plan, batch_size=rollout.episodes)
    film = os.path.join(folder, f"{name.replace('/', '_')}.gif")
    made = _episodes(rollout, act, envs, name, film)
    histories.append(made.histories)
    rows.append(_row(model, name, made))
    rows[-1] |= _difference(rows[-1]["rewards"], rows[0]["rewards"])
    file_io.write_text(path, json.dumps(rows, indent=2))  # times are to come
  seconds = _seconds(
    {n: build(p) for n, p in plans.items()}, histories, rollout.num_timed
  )
  for row in rows:
    row |= seconds[row["sampler"]]
  file_io.write_text(path, json.dumps(rows, indent=2))
  print(runs.table(rows, runs.ROLLOUT_COLUMNS))
  return f"{rollout.episodes} episodes by each of {len(rows)} samplers: {path}"


def _episodes(
  rollout: ml_collections.ConfigDict,
  act: Policy,
  envs: list[Any],
  name: str,
  film: str,
) -> rollout_lib.Episodes:
  """Returns the episodes of one sampler, and writes a film of the first few."""
  starts = np.array([env.initial(rollout.seed + k) for k in range(rollout.episodes)])

  def do(states: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, dict]:
    actions, result = act.many(states, seeds)
    took = {"passes": result.passes, "evaluations": result.evaluations}
    return actions, {k: np.asarray(v) for k, v in took.items()}

  shown = [[] for _ in envs[: rollout.num_videos]]

  def watch(episode: int) -> None:
    if episode < len(shown):
      shown[episode].append(envs[episode].render())

  with tqdm.tqdm(total=env.STEPS, unit="step", desc=name, disable=None) as bar:
    made = rollout_lib.run(
      do,
      envs,
      starts,
      states=act.states,
      seed=rollout.noise_seed,
      progress=lambda step: bar.update(step - bar.n),
      watch=watch,
    )
  if shown:
    image_io.save_gif(film, shown, env.RATE)
  return made


def _difference(rewards: list[float], first: list[float]) -> dict[str, float]:
  """Returns the mean difference to the first sampler, episode by episode."""
  gained, count = np.subtract(rewards, first), len(rewards)
  if rewards is first or count < 2:
    return {}
  error = gained.std(ddof=1) / count**0.5
  return {"difference": float(gained.mean()), "difference_error": float(error)}


def _row(model: str, sampler: str, made: rollout_lib.Episodes) -> dict[str, Any]:
  """Returns a row of results; see reports.runs.ROLLOUT_COLUMNS."""
  count = len(made.reward)
  return {
    "model": model,
    "sampler": sampler,
    "kind": "model",
    "episodes": count,
    "reward": float(made.reward.mean()),
    "error": float(made.reward.std(ddof=1) / count**0.5) if count > 1 else None,
    "solved": float(made.solved.mean()),
    "passes": float(made.took["passes"].mean()),
    "most_passes": int(made.took["passes"].max()),
    "evaluations": float(made.took["evaluations"].mean()),
    "rewards": made.reward.tolist(),
  }


def _seconds(
  policies: dict[str, policies.Policy], histories: list[np.ndarray], count: int
) -> dict[str, dict[str, float]]:
  """Returns median and 95th percentile of the time of a chunk for one robot, by name.

  The policies take turns, so that what else the machine does falls on all of them.
  """
  seen = np.concatenate(histories)
  seen = seen[np.random.default_rng(0).integers(len(seen), size=count + 1)]
  took: dict[str, list[float]] = {name: [] for name in policies}
  for seed, states in enumerate(seen):
    for name, act in policies.items():
      begin = time.perf_counter()
      act(states, seed)
      took[name].append(time.perf_counter() - begin)
  return {
    name: {
      "median": float(np.median(times[1:])),  # the first one warms up
      "p95": float(np.percentile(times[1:], 95)),
    }
    for name, times in took.items()
  }
