"""The policy of a trained work directory."""

import functools

import ml_collections
import numpy as np

from sdiff_jax.experiment import pipelines, sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.policies import Policy
from sdiff_jax.policies import policy as policy_lib
from sdiff_jax.policies.pusht import observations
from sdiff_jax.samplers import Sampler
from sdiff_jax.types import Params, UserError


def load(
  workdir: str,
  *,
  sampler: str = "",
  batch_size: int = 1,
  max_iterations: int = 0,
  seconds: float = 0.0,
  config: ml_collections.ConfigDict | None = None,
) -> Policy:
  """Returns the policy of a work directory.

  Args:
    workdir: of the run.
    sampler: "name/steps", such as "paraddpm/100"; "" for that of the config.
    batch_size: robots at a time.
    max_iterations: largest number of sequential calls of the network; 0 for any.
    seconds: largest time of a call of the policy; 0 for any.
    config: how to sample; None for what the run was trained with.

  Raises:
    UserError: there is no such policy, or a field does not fit.
    ValueError: the sampler cannot stop after so few iterations.
  """
  config = config or workdir_lib.read(workdir)
  experiment, params = trained(config, workdir)
  built = build_sampler(config, experiment, params, sampler or None, batch_size)
  return build(
    config,
    experiment,
    params,
    built,
    batch_size=batch_size,
    max_iterations=max_iterations,
    seconds=seconds,
  )


def trained(
  config: ml_collections.ConfigDict, workdir: str
) -> tuple[Experiment, Params]:
  """Returns the experiment of a policy's work directory and its parameters.

  Raises:
    UserError: the work directory has no config or no checkpoint, or is no policy's.
  """
  experiment, params = workdir_lib.trained(config, workdir)
  if experiment.dataset.normalizer is None:
    raise UserError(f"{workdir} holds no policy: its data are images")
  return experiment, params


def build_sampler(
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  params: Params,
  name_and_steps: str | None,
  batch_size: int = 1,
) -> Sampler:
  """Returns a sampler of the config with its window, by timings if it has none.

  Args:
    config: the config.
    experiment: of the policy.
    params: of the network.
    name_and_steps: "name/steps"; None for those of config.sampler.
    batch_size: robots at a time.
  """
  sampler = sampling.build_sampler(config, name_and_steps, strict=False)
  denoise = sampling.placeholder(experiment, config.sample.guidance)
  shape = (batch_size, *experiment.dataset.shape)
  return pipelines.with_window(experiment.mesh, sampler, denoise, params, shape)


def rest(config: ml_collections.ConfigDict) -> np.ndarray:
  """Returns a state to time a policy with, [S]; its length is that of all states."""
  with config_errors("config.data"):
    return observations.lookup(config.data.frame).rest


def build(
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  params: Params,
  sampler: Sampler,
  *,
  batch_size: int = 1,
  max_iterations: int = 0,
  seconds: float = 0.0,
) -> Policy:
  """Returns the policy of an experiment.

  Args:
    config: rollout.n_action_steps, sample.guidance, and the frame of the data that the
      policy was trained on.
    experiment: of the policy.
    params: of the network.
    sampler: with its window.
    batch_size: robots at a time.
    max_iterations: see `load`.
    seconds: see `load`.

  Raises:
    UserError: a field does not fit the policy.
    ValueError: the sampler cannot stop after so few iterations.
  """
  scale = config.sample.guidance
  normalizer = experiment.dataset.normalizer
  n_action_steps = config.rollout.n_action_steps
  with config_errors("config.rollout"):
    policy_lib.check_action_steps(n_action_steps, normalizer)
  with config_errors("config.data"):
    view = observations.lookup(config.data.frame)
    policy_lib.check_view(view, normalizer)
  return Policy(
    functools.partial(sampling.denoiser, experiment, guidance_scale=scale),
    params,
    sampler,
    normalizer,
    view,
    sigma_d=experiment.sigma_d,
    n_action_steps=n_action_steps,
    batch_size=batch_size,
    max_iterations=max_iterations,
    seconds=seconds,
  )
