"""The models of the job `serve`: runs, and models in the diffusers format, compiled."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sdiff_jax import config as configs
from sdiff_jax import losses, samplers
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import (
  conditions,
  pipelines,
  policies,
  published_model,
  sampling,
  text_to_image,
)
from sdiff_jax.experiment import serving_programs as programs_lib
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.experiment.pipelines import Inputs, Pipeline
from sdiff_jax.experiment.serving_programs import GUIDANCE, Plan, Program
from sdiff_jax.policies import Policy
from sdiff_jax.pretrained.diffusers import model as model_lib
from sdiff_jax.pretrained.diffusers.loading import Model as LoadedModel
from sdiff_jax.samplers import Sampler
from sdiff_jax.serving.lanes import Rows
from sdiff_jax.serving.models import Key, Model
from sdiff_jax.types import Cond, Denoiser, Params, UserError

# With 32, since 64 clients that wait for each other come in two halves.
BATCH_SIZES = (1, 4, 16, 32, 64)


class Choice(NamedTuple):
  """What is compiled of each model.

  Attributes:
    samplers: "name/steps" each; () for those of a run's config.
    live: "name/steps" of the parallel sampler whose passes can be watched; "" for none.
    live_window: its window, if the run's config has none.
    batch_sizes: samples of a batch on each device.
    max_passes: bounds of the passes of a policy's parallel sampler, beside none.
  """

  samplers: tuple[str, ...] = ()
  live: str = ""
  live_window: int = 16
  batch_sizes: tuple[int, ...] = BATCH_SIZES
  max_passes: tuple[int, ...] = ()


def of_run(
  config: ml_collections.ConfigDict, workdir: str, name: str, choice: Choice
) -> Model:
  """Returns the model of a trained run: images, or a policy's actions.

  Args:
    config: of the run, with the mesh of this machine.
    workdir: of the run.
    name: how requests call it.
    choice: what is compiled.

  Raises:
    UserError: the run has no checkpoint, or a sampler does not fit.
  """
  experiment, params = workdir_lib.trained(config, workdir)
  facts = losses.facts(config.loss)
  if experiment.dataset.normalizer is not None:
    return _policy(config, experiment, params, name, choice)
  live = choice.live if facts.family == "diffusion" else ""
  pipeline = sampling.pipeline(config, experiment)
  guided = _with_guidance(experiment, pipeline)
  if experiment.guidance_input:
    variants = {True: guided}
  elif config.loss.get("label_dropout", 0) and experiment.num_classes:
    variants = {False: pipeline, True: guided}
  else:
    variants = {False: pipeline}
  rows = functools.partial(_rows_of_run, experiment)
  plans: dict[Key, Plan] = {}
  watched = None
  for text, sizes in _ladders(choice, pipeline, _samplers(config), live).items():
    sampler = sampling.build_sampler(config, text)
    sampler = _with_window(sampler, pipeline, params, sizes, text == live, choice)
    plans |= programs_lib.plans(_key(text), sampler, variants, params, rows, sizes)
    if text == live and pipeline.mesh.size == 1:
      watched = programs_lib.live(_key(text), sampler, variants, params, rows)
  return Model(
    name=name,
    title=facts.title,
    makes="images",
    lanes=programs_lib.compiled(name, plans),
    rows=rows,
    num_classes=experiment.num_classes,
    label_name=next(
      (k for k, c in experiment.dataset.cond.items() if c.num_classes), ""
    ),
    shape=sampling.image_shape(experiment),
    live=watched,
  )


def of_diffusers(config: ml_collections.ConfigDict, name: str, choice: Choice) -> Model:
  """Returns a pretrained model in the diffusers format, of texts, classes or neither.

  Args:
    config: of the job `generate`.
    name: how requests call it.
    choice: what is compiled.

  Raises:
    UserError: the folder or a field does not fit.
  """
  if config.generate.image:
    raise UserError(
      f"config.generate.image={config.generate.image}: the service makes images from "
      "noise alone; leave it out, or use --job=generate"
    )
  model, sampler = published_model.from_config(config)
  mesh = experiments.mesh(config)
  where = sharding.state(model.params, mesh)
  params = sharding.device_put_global(model.params, where)
  if config.generate.scan_blocks:
    params = model_lib.stacked(model, params)
  has_text, fixed = model.text_encoder is not None, {}
  if has_text:
    negative = [config.generate.negative_prompt]
    fixed = conditions.tokens(model, negative, "negative_")
  rows = functools.partial(_rows_of_diffusers, model)
  plain = text_to_image.pipeline(model, sampler, mesh)
  plans: dict[Key, Plan] = {}
  watched = None
  for text, sizes in _ladders(
    choice, plain, _samplers(config)[:1], choice.live
  ).items():
    planned, sampler = published_model.with_sampler(_switched(config, text), model)
    variants = {False: text_to_image.pipeline(planned, sampler, mesh)}
    if has_text or model.unet.classes:
      guided = text_to_image.pipeline(planned, sampler, mesh, guidance_scale=None)
      variants[True] = guided
    is_live = text == choice.live
    sampler = _with_window(sampler, variants[False], params, sizes, is_live, choice)
    plans |= programs_lib.plans(
      _key(text), sampler, variants, params, rows, sizes, fixed
    )
    if text == choice.live and mesh.size == 1:
      watched = programs_lib.live(_key(text), sampler, variants, params, rows, fixed)
  return Model(
    name=name,
    title="diffusers",
    makes="images",
    lanes=programs_lib.compiled(name, plans),
    rows=rows,
    takes_prompt=has_text,
    num_classes=model.unet.classes,
    shape=jax.eval_shape(
      lambda x: plain.decode(None, params, x), jnp.zeros((1, *plain.shape))
    ).shape[1:],
    live=watched,
  )


def _policy(
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  params: Params,
  name: str,
  choice: Choice,
) -> Model:
  """Returns the model of a policy, with bounds of the passes of parallel samplers."""
  plans: dict[Key, Plan] = {}
  rest = policies.rest(config)
  shape = (experiment.dataset.normalizer.steps + 1, len(rest))
  example = _rows_of_policy(np.zeros(1, np.int32), np.broadcast_to(rest, (1, *shape)))
  for text in choice.samplers or _samplers(config)[:1]:
    sampler = policies.build_sampler(config, experiment, params, text)
    bounds = [0]
    if sampler.takes("max_iterations"):
      bounds += [b for b in choice.max_passes if b < sampler.num_steps]
    for bound in bounds:
      build = functools.partial(
        policies.build, config, experiment, params, sampler, max_iterations=bound
      )
      programs = {
        size: functools.partial(_policy_program, build, size)
        for size in choice.batch_sizes
      }
      plans[_key(text)._replace(max_passes=bound)] = Plan(programs, example)
  return Model(
    name=name,
    title=losses.facts(config.loss).title,
    makes="actions",
    lanes=programs_lib.compiled(name, plans),
    rows=_rows_of_policy,
    shape=shape,
  )


def _policy_program(build: Callable[..., Policy], size: int) -> Program:
  return functools.partial(_act, build(batch_size=size))


def _act(policy: Policy, rows: Rows) -> Rows:
  """Returns the actions of a policy, and which of them are finite."""
  actions, stats = policy.unchecked(rows["states"], rows["seeds"])
  finite = np.isfinite(actions).all(axis=tuple(range(1, actions.ndim)))
  return {"actions": actions, "finite": finite, **programs_lib.cost(stats)}


def _rows_of_policy(seeds: np.ndarray, states: np.ndarray) -> Rows:
  return {"seeds": seeds, "states": np.float32(states)}


def _rows_of_run(
  experiment: Experiment,
  seeds: np.ndarray,
  labels: np.ndarray | None = None,
  prompts: Sequence[str] | None = None,
  guidance: float | None = None,
) -> Rows:
  """Returns the inputs of a lane; without labels, those of the job `sample`."""
  del prompts
  rows = experiment.dataset.conditions(seeds)
  for name, spec in experiment.dataset.cond.items():
    if spec.num_classes and labels is not None:
      shape = (-1,) + (1,) * len(spec.shape)
      rows[name] = np.broadcast_to(
        labels.astype(spec.dtype).reshape(shape), rows[name].shape
      )
  return {"seeds": seeds, **rows, **_scale(guidance, len(seeds))}


def _rows_of_diffusers(
  model: LoadedModel,
  seeds: np.ndarray,
  labels: np.ndarray | None = None,
  prompts: Sequence[str] | None = None,
  guidance: float | None = None,
) -> Rows:
  """Returns the inputs of a lane; without labels, all classes in turn."""
  rows = {"seeds": seeds}
  if model.unet.classes:
    rows |= conditions.of_classes(
      seeds % model.unet.classes if labels is None else labels
    ).rows(np.arange(len(seeds)))
  if model.text_encoder is not None:
    rows |= conditions.tokens(model, [*(prompts or [""] * len(seeds))])
  return rows | _scale(guidance, len(seeds))


def _scale(guidance: float | None, count: int) -> Rows:
  return {} if guidance is None else {GUIDANCE: np.full(count, guidance, np.float32)}


def _samplers(config: ml_collections.ConfigDict) -> list[str]:
  """Returns the samplers that a run's config names: its own, then those evaluated."""
  own = f"{config.sampler.name}/{config.sampler.steps}"
  return [own, *config.evaluate.samplers]


def _both(live: str) -> list[str]:
  """Returns a parallel sampler and the sequential one of the same steps."""
  if not live:
    return []
  name, steps = _key(live)[:2]
  with config_errors("config.serve"):
    if not samplers.takes(name, "callback"):
      raise ValueError(f"live={live!r}: its passes cannot be watched; try paraddim/64")
    return [live, f"{samplers.solver_of(name)}/{steps}"]


def _key(text: str) -> Key:
  name, number = configs.name_and_number(text, "serve.samplers")
  return Key(name, int(number))


def _switched(
  config: ml_collections.ConfigDict, text: str
) -> ml_collections.ConfigDict:
  """Returns the config with another sampler."""
  config, (name, steps) = config.copy_and_resolve_references(), _key(text)[:2]
  if name != config.sampler.name:
    sampling.switch(config, name)
  config.sampler.steps = steps
  return config


def _ladders(
  choice: Choice, pipeline: Pipeline, of_config: list[str], live: str
) -> dict[str, list[int]]:
  """Returns each sampler with its batch sizes over all devices.

  Samplers that are named, or else the first one of the config, have all of the sizes.
  The others, which the page compares, have the smallest one.
  """
  shards = pipeline.mesh.shape["data"] * pipeline.mesh.shape["fsdp"]
  sizes = [size * shards for size in sorted({*choice.batch_sizes})]
  ladders = dict.fromkeys(choice.samplers or of_config[:1], sizes)
  others = [] if choice.samplers else of_config
  return ladders | {
    text: sizes[:1] for text in (*others, *_both(live)) if text not in ladders
  }


def _with_window(
  sampler: Sampler,
  pipeline: Pipeline,
  params: Params,
  sizes: list[int],
  is_live: bool,
  choice: Choice,
) -> Sampler:
  """Returns a sampler with its window, by timings if it has none and is not live."""
  if is_live and not sampler.window:
    return sampler.replace(window=min(choice.live_window, sampler.num_steps))
  shape = (sizes[0], *pipeline.shape)
  return pipelines.with_window(
    pipeline.mesh, sampler, pipeline.placeholder, params, shape
  )


def _with_guidance(experiment: Experiment, pipeline: Pipeline) -> Pipeline:
  """Returns the pipeline whose inputs have a guidance scale for each sample."""

  def denoiser(params: Params, inputs: Inputs) -> tuple[Denoiser, Cond]:
    return sampling.denoiser(experiment, params, None), inputs

  def inputs(batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    scale = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
    return pipeline.inputs(batch_size) | {GUIDANCE: scale}

  over_samples = sharding.samples(pipeline.mesh)
  return dataclasses.replace(
    pipeline,
    denoiser=denoiser,
    inputs=inputs,
    input_shardings={**pipeline.input_shardings, GUIDANCE: over_samples},
  )
