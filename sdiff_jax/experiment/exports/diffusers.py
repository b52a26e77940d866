"""Format `diffusers`: a folder that diffusers loads and samples in a few steps."""

import math
import os
import re

from sdiff_jax import losses, registry
from sdiff_jax.diffusion import trigflow
from sdiff_jax.experiment.exports import Run, Written
from sdiff_jax.io import file_io
from sdiff_jax.pretrained.diffusers import (
  consistency,
  fit,
  hub,
  loading,
  saving,
  scheduler,
  trigflow_network,
)
from sdiff_jax.pretrained.diffusers.saving import Part
from sdiff_jax.types import Json, UserError

STEPS = (1, 2, 4)
# Pipelines that replace their scheduler -> those that do the same by any scheduler.
PIPELINES = {"DDIMPipeline": "DDPMPipeline"}
# Pipelines that round sizes to those of published models, unless they are told not to.
SANA, SPRINT = "SanaPipeline", "SanaSprintPipeline"
OWN_SIZES = ("PixArtAlphaPipeline", "PixArtSigmaPipeline", SANA, SPRINT)


@registry.register("experiment.exports", "diffusers")
def write(run: Run, folder: str) -> Written:
  """Writes the network in the place of the one that it was distilled from.

  Autoencoder, text encoders and tokenizers are copies of the published folder's. The
  scheduler of a consistency model makes the steps of the sampler `consistency`; a
  diffusion model keeps that of the folder.

  Args:
    run: the run, whose network is `pretrained`.
    folder: where.

  Raises:
    UserError: the network is none of diffusers', or the published folder is missing.
  """
  if run.stored.model.name != "pretrained":
    raise UserError(
      f"config.export.format='diffusers': the run has the network "
      f"{run.stored.model.name!r}, which diffusers does not have; it has those of runs "
      "with model='pretrained'. Use the format 'stablehlo'"
    )
  facts = losses.facts(run.stored.loss)
  if trigflow.END_TIME in facts.cond:
    raise UserError(
      "config.export.format='diffusers': the run is a flow map, whose end time the "
      "network of the folder does not take; use the format 'stablehlo'"
    )
  source = hub.local(run.config.model.folder)
  configs = loading.configs(source)
  index, parts = saving.read(source)
  name = next(part for part in fit.PREDICTORS if part in parts)
  pipeline = str(index.get("_class_name", "DiffusionPipeline"))
  configs[name] = _network_config(run, configs, name, pipeline)
  shapes = saving.shapes(parts[name].folder)
  parts[name] = saving.network(configs[name], run.merged["net"], shapes=shapes)
  usage = _call(parts, pipeline, steps="")
  if facts.family == "consistency":
    pipeline = PIPELINES.get(pipeline, pipeline)
    if pipeline == SANA and configs[name].get("guidance_embeds"):
      pipeline, configs["scheduler"] = SPRINT, consistency.SCM
    process = consistency.scheduler_config(configs["scheduler"])
    parts["scheduler"], configs["scheduler"] = saving.scheduler(process), process
    scale = 5.0 if run.config.model.guidance else 1.0
    steps = f"num_inference_steps=2, guidance_scale={scale}"
    usage = _call(parts, pipeline, steps=steps)
    usage += _steps(times(run, configs), process["_class_name"], scale != 1)
  saving.save(folder, index | {"_class_name": pipeline}, parts)
  fields = {"library_name": "diffusers", "license": _license(source)}
  if run.config.model.folder.startswith(hub.HUB):
    fields["base_model"] = run.config.model.folder.removeprefix(hub.HUB)
  return Written("a folder of diffusers", usage, fields)


def _network_config(
  run: Run, configs: dict[str, dict[str, Json]], name: str, pipeline: str
) -> dict[str, Json]:
  """Returns the config.json of the network of a run.

  Args:
    run: the run.
    configs: of the published folder.
    name: of the network's part.
    pipeline: of the published folder.

  Raises:
    UserError: diffusers has no such network, or gives it other times.
  """
  model = run.config.model
  changes = {"guidance": model.guidance, "qk_norm": model.qk_norm}
  config = trigflow_network.student_config(configs[name], **changes)
  if config.get("guidance_proj"):
    raise UserError(
      "config.export.format='diffusers': the guidance scale is an input of the run's "
      "network, which diffusers' one does not have; use the format 'stablehlo'"
    )
  scale, whole = model.time_scale, 1.0
  if pipeline == SANA and config.get("guidance_embeds"):  # becomes that of SANA-Sprint
    whole = 1 / scheduler.from_config(configs["scheduler"]).train_steps
  elif pipeline == SANA:
    config["timestep_scale"] = scale * config.get("timestep_scale", 1.0)
    return config
  if not math.isclose(scale, whole, rel_tol=1e-6):
    raise UserError(
      f"config.export.format='diffusers': the run has model.time_scale={scale:g}, and the "
      f"pipeline gives its network times that need {whole:g}; use the format 'stablehlo'"
    )
  return config


def times(
  run: Run, configs: dict[str, dict[str, Json]]
) -> dict[int, tuple[float, ...]]:
  """Returns number of steps -> TrigFlow times at which the steps of diffusers start.

  Args:
    run: the run.
    configs: of the folder, see `loading.configs`.
  """
  model = loading.abstract(configs)
  model = loading.with_shape(model, run.experiment.dataset.shape)
  scaling = 1.0 if model.vae is None else model.vae.scaling
  data_std = run.experiment.dataset.codec.std[0] * scaling
  return {steps: consistency.times(model.schedule, steps, data_std) for steps in STEPS}


def _license(folder: str) -> str:
  """Returns the license that the card of a folder names, "" for none."""
  path = os.path.join(folder, "README.md")
  text = file_io.read_text(path) if os.path.exists(path) else ""
  header = text.split("---")[1] if text.startswith("---") else ""
  found = re.search(r"^license: *(\S+)", header, re.MULTILINE)
  return found[1] if found else ""


def _call(parts: dict[str, Part], pipeline: str, *, steps: str) -> str:
  """Returns a program that samples the folder, Markdown.

  Args:
    parts: of the folder.
    pipeline: its class.
    steps: arguments for the number of steps, and for guidance.
  """
  given, loaded, after = ["batch_size=4", steps.split(", ")[0]], '"."', ""
  if any(name in parts for name in fit.ENCODERS):
    given = ['"a prompt"', steps]
    if "vae" not in parts:  # pipelines from texts have one, which latents do not need
      loaded, after = '".", vae=None', "\nimages = (images / 2 + 0.5).clamp(0, 1)"
      given.append('output_type="latent"')
  elif "transformer" in parts:
    given = ["class_labels=[0]", steps]
  if pipeline in OWN_SIZES:
    given.append("use_resolution_binning=False")
  return f"""```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({loaded}, torch_dtype=torch.float32)
images = pipe({", ".join(filter(None, given))}).images{after}
```
"""


def _steps(grids: dict[int, tuple[float, ...]], class_name: str, guided: bool) -> str:
  """Returns which steps are made.

  Args:
    grids: number of steps -> times of its steps.
    class_name: name of its class.
    guided: whether the guidance scale is an input of the network.
  """
  text = "with the guidance scale as an input of the network"
  if not guided:
    text = "without guidance: what guidance the model has is in its weights"
  if class_name == consistency.SCM["_class_name"]:
    text += ". In 1 or 4 steps, pass intermediate_timesteps=None"
  lines = [
    f"* {steps}: `--config.sampler.name=consistency --config.sampler.steps={steps} "
    f'--config.sampler.timesteps="{grid}"`'
    for steps, grid in grids.items()
  ]
  rows = "\n".join(lines)
  return f"""
In 1, 2 or 4 steps, {text}. A step
of {class_name} jumps to data and adds fresh noise. The same steps by sdiff_jax:

{rows}
"""
