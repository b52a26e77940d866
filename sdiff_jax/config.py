"""The configuration of an experiment: every field once, and its validation."""

import copy
import importlib
from collections.abc import Iterable
from typing import Any

import ml_collections

from sdiff_jax import registry
from sdiff_jax.types import UserError

# Fields that had another name in an earlier version: old -> new. The command line
# refuses the old name with the new one in the message; `read` of a work directory
# accepts it.
RENAMED = {
  "conditional": "class_conditional",
  "ema.posthoc": "ema.posthoc_std",
  "evaluate.neighbours": "evaluate.pr_num_images",
  "generate.negative": "generate.negative_prompt",
  "generate.spacing": "generate.timestep_spacing",
  "loss.segments": "loss.segment_boundaries",
  "loss.stabiliser": "loss.tangent_normalizer",
  "model.attention_at": "model.attn_resolutions",
  "optim.final": "optim.end_lr_fraction",
  "pod": "rehearse.topology",
  "rehearse.what": "rehearse.program",
  "rollout.actions": "rollout.n_action_steps",
  "rollout.filmed": "rollout.num_videos",
  "rollout.noise": "rollout.noise_seed",
  "rollout.timed": "rollout.num_timed",
  "sample.compare": "sample.compare_sequential",
  "sampler.angles": "sampler.timesteps",
  "sampler.coarse": "sampler.coarse_workdir",
  "sampler.rule": "sampler.update_rule",
  "train.accumulate": "train.grad_accum_steps",
}
# Sections that name a piece, and the package that the piece is looked up in.
PIECES = {"data": "data", "reference": "data", "model": "models", "loss": "losses"}


def component(package: str, name: str, **changed: Any) -> ml_collections.ConfigDict:
  """Returns the section of a piece: its name and every field of its `build`.

  Args:
    package: "data", "models" or "losses".
    name: file of the piece.
    **changed: fields that differ from the defaults.

  Raises:
    UserError: an unknown piece or field.
  """
  section = {"name": name} | registry.fields(package, name)
  registry.check(package, {"name": name, **changed}, package)
  return ml_collections.ConfigDict(section | changed)


def load_plugins(modules: Iterable[str]) -> None:
  """Imports modules that register pieces of their own.

  Args:
    modules: dotted names, as in `config.plugins`.

  Raises:
    UserError: there is no such module.
  """
  for name in modules:
    try:
      importlib.import_module(name)
    except ModuleNotFoundError as error:
      raise UserError(
        f"config.plugins={name!r}: {error}; install it, or add its directory to "
        "PYTHONPATH"
      ) from error


def base(plugins: tuple[str, ...] = ()) -> ml_collections.ConfigDict:
  """Returns the defaults of every field; an experiment file changes some of them.

  Args:
    plugins: modules outside this package that register pieces; they are imported here,
      and wherever the config is read again.

  Raises:
    UserError: a plugin cannot be imported.
  """
  load_plugins(plugins)
  c = ml_collections.ConfigDict()
  c.plugins = plugins  # modules that register pieces of their own
  c.job = "train"  # what is done without --job
  c.seed = 0
  c.sigma_d = 0.5  # standard deviation that the data are scaled to
  c.data = component("data", "digits")
  # What `evaluate` compares with, a section like data; without a name, data itself.
  c.reference = ml_collections.ConfigDict({"name": ""})
  c.class_conditional = True  # the network is told the classes, if the data have some
  c.model = component("models", "mlp")
  c.loss = component("losses", "diffusion")
  c.teacher = ml_collections.ConfigDict(
    {
      "workdir": "",  # trained run to start from and to distil; "" for none
      "config": "",  # config file that trains it, for the message if it is missing
    }
  )
  # The job `convert`: weights to make a work directory of, .pt, .safetensors, .npz, or
  # a .pkl of EDM or EDM2. EDM's images are data with mean 0 and std 0.5.
  c.convert = ml_collections.ConfigDict({"file": ""})
  c.train = ml_collections.ConfigDict(
    {
      "steps": 1000,
      "batch_size": 128,  # over all devices
      # Parts of a batch that go through the network one after the other; more of them
      # take less memory.
      "grad_accum_steps": 1,
      # Gradients are those of loss_scale times the loss, and divided by it: the mean
      # over a batch and all pixels is too small for float16.
      "loss_scale": 1.0,
      "flip": False,  # mirror images, left to right, with probability 1/2
      "log_every": 50,  # steps
      "sample_every": 0,  # steps between sample grids; 0 for none
      "skip_nonfinite": False,  # go on after a NaN or infinity, without that step
    }
  )
  c.optim = ml_collections.ConfigDict(
    {
      "name": "adam",  # adam, adamw or radam
      "learning_rate": 1e-3,
      "schedule": "constant",  # constant, cosine or inverse_sqrt
      "rampup_images": 0,  # linear ramp-up of the rate over so many images
      "end_lr_fraction": 0.0,  # cosine: rate at the end, as a fraction of learning_rate
      "reference_steps": 35_000,  # inverse_sqrt: constant until here
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
      "weight_decay": 0.0,  # adamw
      "clip": 0.0,  # global norm of the gradient; 0 for none
    }
  )
  c.ema = ml_collections.ConfigDict(
    # "power/sigma_rel" (EDM2), "half_life/images" or "warmup/power" (Diffusion Policy:
    # decay 1 - n^-power); the first one is sampled from.
    # The job `ema` makes another one, "power/sigma_rel", from power profiles of the
    # checkpoints that checkpoint.keep_every kept; two profiles are enough.
    {"profiles": ("power/0.05",), "posthoc_std": ""}
  )
  c.checkpoint = ml_collections.ConfigDict(
    {
      "every": 1000,  # steps
      "keep": 2,  # of the newest
      "keep_every": 0,  # keep for good those of every so many steps; 0 for none
    }
  )
  c.sampler = ml_collections.ConfigDict(
    {
      # A solver of samplers/solvers.py: heun, ddim, ddpm, dpmpp2m, ...; many steps
      # at a time with para (ParaDiGMS), spec (speculation, exact in law) or srds
      # (parareal) in front: paraddpm, paraddim, paradpmpp2m, specddpm, srdsddim, ...
      "name": "heun",
      "steps": 16,
      "timesteps": (),  # starting angle of every step, instead of the sampler's grid
      "eta": 0.0,  # ddim: share of DDPM's noise
      "temperature": 1.0,  # factor of all noise; below 1 samples keep near the modes
      "window": 0,  # rows at a time; 0 times the network, and takes the fastest
      "tolerance": 0.1,  # para, srds: 1 is a tenth of the data's standard deviation
      "update_rule": "secant",  # para: how changes carry on; or picard, linear, published
      "coarse_workdir": "",  # srds: work directory of a consistency model; "" for DDIM itself
    }
  )
  c.sample = ml_collections.ConfigDict(
    {
      "num": 64,
      "batch_size": 64,  # over all devices
      "seed": 0,  # image k is made from seed + k alone
      "guidance": 1.0,  # scale of classifier-free guidance; 1 is none
      "label": -1,  # a class for every image; -1 takes them in turn
      "compare_sequential": False,  # time a batch of the sequential sampler, and the difference
      "checkpoint": 0,  # step to sample from (see checkpoint.keep_every); 0: newest
    }
  )
  # An autoencoder in the diffusers format, a folder or hf://organisation/name: `encode`
  # makes latents by it, and samples of networks trained on latents become images.
  c.vae = ""
  c.encode = ml_collections.ConfigDict(
    {
      "scale": "scm",  # pixels in [-1, 1]; or edm2, in [0, 1] (see data/latents.py)
      "batch_size": 16,  # over the devices of a process
      "shard_size": 4096,  # images a file
    }
  )
  # The job `generate`: images by a published model. How many, seeds and guidance are
  # fields of `sample`, the solver is `sampler`.
  c.generate = ml_collections.ConfigDict(
    {
      "folder": "",  # of the diffusers format, or hf://organisation/name
      # "a cat;a dog", or a .json of COCO's captions; image k takes text k, in turns.
      "prompts": "",
      "negative_prompt": "",  # text that guidance leads away from
      "timestep_spacing": "",  # of timesteps: trailing, leading, linspace; "" for its own
      "dtype": "float32",  # of weights and hidden layers: float32, bfloat16, float16
    }
  )
  c.evaluate = ml_collections.ConfigDict(
    {
      "samplers": ("heun/16",),  # name/steps
      "folder": "evaluate",  # in the work directory, for the results
      "num": 5000,  # samples for each
      "batch_size": 512,  # over all devices
      "images": "",  # measure this .npz or folder of images instead of samples
      # The classifier of a data set (digits, fashion, or a path to an .npz), or
      # published networks: inception:PATH for FID (pytorch-fid:PATH as that package
      # resizes), dinov2:PATH for FD-DINOv2; several with commas between them.
      "features": "digits",
      # Folder of CLIP: the CLIP score of images of the job `generate`.
      "clip": "",
      # Statistics to compare with instead of images: .npz of ADM, EDM or the job
      # `statistics`, .pkl of EDM2.
      "reference": "",
      "pr_num_images": 10_000,  # images of a set for precision and recall; 0 for neither
      "latency": False,  # time images one by one as well
      "baselines": False,  # real halves and a Gaussian for each class as well
    }
  )
  # The job `demos`: an expert's episodes of Push-T, written to data.path.
  c.demos = ml_collections.ConfigDict(
    {
      "episodes": 600,  # of which those that succeed are kept, and mirrored
      "seed": 0,  # episode k is made from seed + k alone
      # What the policy sees: "block", all in the block's frame, or "keypoints".
      "view": "block",
    }
  )
  # The job `rollout`: a policy in Push-T.
  c.rollout = ml_collections.ConfigDict(
    {
      "samplers": ("ddim/15",),  # name/steps
      "episodes": 100,
      "seed": 100_000,  # episode k starts as Diffusion Policy's test seed + k
      "noise_seed": 0,  # seed of the policy's noise
      "n_action_steps": 8,  # done before the policy looks again
      "num_timed": 200,  # chunks whose making is timed
      "num_videos": 4,  # episodes shown in rollout/SAMPLER.gif
    }
  )
  # The job `study`, see reports/studies.py; filled by the files of configs/studies.
  c.study = ml_collections.ConfigDict({"name": "", "runs": ()})
  c.rehearse = ml_collections.ConfigDict(
    {
      # Devices to compile for: v5e:16x16, v5p:4x4x8, h100x64, ...; several, with commas
      # between them, for one table.
      "topology": "",
      "program": "train",  # a step of training, or "sample": a batch, or a pass of it
      "fit": True,  # try what saves memory where the step does not fit
      # Of the data, where they are not at hand: (H, W, C) and the number of labels.
      "shape": (),
      "classes": 0,
    }
  )
  # Devices along each axis; -1 takes all that are left.
  c.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "window": 1})
  return c


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks what can be checked before any work starts.

  Raises:
    UserError: one line that names field, value and remedy.
  """
  load_plugins(config.plugins)
  for section, package in PIECES.items():
    if config[section].name or section != "reference":
      registry.check(package, config[section].to_dict(), f"config.{section}")
  positive = ["sigma_d", "train.batch_size", "train.log_every", "optim.learning_rate"]
  positive += ["sample.num", "sample.batch_size", "evaluate.num", "evaluate.batch_size"]
  positive += ["train.loss_scale", "train.grad_accum_steps"]
  positive += ["encode.batch_size", "encode.shard_size"]
  positive += ["checkpoint.every", "checkpoint.keep"]
  for name in positive:
    if not _get(config, name) > 0:
      raise UserError(f"config.{name}={_get(config, name)}: must be above 0")
  not_negative = ["train.steps", "train.sample_every", "optim.clip"]
  not_negative += ["checkpoint.keep_every", "evaluate.pr_num_images"]
  for name in not_negative:
    if _get(config, name) < 0:
      raise UserError(f"config.{name}={_get(config, name)}: must not be negative")
  if not config.ema.profiles:
    raise UserError("config.ema.profiles=(): name one profile, such as 'power/0.05'")


def _get(config: ml_collections.ConfigDict, name: str) -> Any:
  for part in name.split("."):
    config = config[part]
  return config


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns {"train.steps": 1000, ...} of a nested dict."""
  out = {}
  for key, value in config.items():
    if isinstance(value, dict):
      out |= flat(value, f"{prefix}{key}.")
    else:
      out[prefix + key] = value
  return out


def with_new_names(stored: dict[str, Any]) -> dict[str, Any]:
  """Returns a stored config with its fields under their present names (`RENAMED`)."""
  stored = copy.deepcopy(stored)
  for old, new in RENAMED.items():
    section, _, field = old.rpartition(".")
    values = stored.get(section, {}) if section else stored
    if field in values:
      new_section, _, new_field = new.rpartition(".")
      target = stored.setdefault(new_section, {}) if new_section else stored
      target[new_field] = values.pop(field)
  return stored


def name_and_number(text: str, field: str) -> tuple[str, float]:
  """Splits "heun/16" into ("heun", 16.0).

  Raises:
    UserError: not of that form.
  """
  name, _, number = text.partition("/")
  try:
    return name, float(number)
  except ValueError:
    message = f"config.{field}: {text!r} is not of the form name/number"
    raise UserError(message) from None
