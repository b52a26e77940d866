"""Policies of others: a folder of LeRobot, or a file of Diffusion Policy's weights."""

import json
import os
from typing import Any, NamedTuple

import numpy as np

from sdiff_jax.data.normalizer import Affine, Normalizer
from sdiff_jax.models import unet1d
from sdiff_jax.pretrained import config_fields, state_dict
from sdiff_jax.pretrained.diffusers import networks
from sdiff_jax.pretrained.diffusers import scheduler as scheduler_lib
from sdiff_jax.pretrained.diffusers.networks import Predictor
from sdiff_jax.pretrained.diffusers.scheduler import Schedule
from sdiff_jax.types import Params, UserError

DEFAULTS = {  # of LeRobot
  "n_obs_steps": 2,
  "horizon": 16,
  "n_action_steps": 8,
  "input_features": {},
  "output_features": {},
  "normalization_mapping": {"STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
  "down_dims": (512, 1024, 2048),
  "kernel_size": 5,
  "n_groups": 8,
  "diffusion_step_embed_dim": 128,
  "use_film_scale_modulation": True,
  "noise_scheduler_type": "DDPM",
  "num_train_timesteps": 100,
  "beta_schedule": "squaredcos_cap_v2",
  "beta_start": 0.0001,
  "beta_end": 0.02,
  "prediction_type": "epsilon",
  "clip_sample": True,
  "clip_sample_range": 1.0,
  "num_inference_steps": None,
}
SUPPORTED_VALUES = {"type": ("diffusion",)}
# Of images, of training, and of where it runs.
IGNORED_FIELDS = {"vision_backbone", "resize_shape", "crop_ratio", "crop_shape"}
IGNORED_FIELDS |= {"crop_is_random", "pretrained_backbone_weights", "use_group_norm"}
IGNORED_FIELDS |= {
  "spatial_softmax_num_keypoints",
  "use_separate_rgb_encoder_per_camera",
}
IGNORED_FIELDS |= {
  "do_mask_loss_for_padding",
  "drop_n_last_frames",
  "gradient_checkpointing",
}
IGNORED_FIELDS |= {"compile_model", "compile_mode", "policy_action_contract", "device"}
IGNORED_FIELDS |= {"use_amp", "use_peft", "push_to_hub", "repo_id", "private", "tags"}
IGNORED_FIELDS |= {"license", "pretrained_path", "pretrained_revision"}
IGNORED_FIELDS |= {
  f"optimizer_{name}" for name in ("lr", "betas", "eps", "weight_decay")
}
IGNORED_FIELDS |= {"scheduler_name", "scheduler_warmup_steps"}
SCHEDULER = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
SCHEDULER += ("prediction_type", "clip_sample", "clip_sample_range")
# feature -> its type in normalization_mapping
TYPES = {
  "observation.state": "STATE",
  "observation.environment_state": "ENV",
  "action": "ACTION",
}
OBSERVATIONS = [*TYPES][:2]
KINDS = {"MIN_MAX": ("min", "max"), "MEAN_STD": ("mean", "std")}
LEAST = 1e-8  # LeRobot's, added to standard deviations


class PretrainedPolicy(NamedTuple):
  """A policy and what it takes to run it.

  Attributes:
    fields: of `unet1d.build`.
    network: predicts the noise, (params, x [B, H, Da], timestep [B], cond).
    params: its parameters.
    normaliser: of observations and actions.
    schedule: the process, and how it is solved.
    steps: of the solver.
    executed: Ta, actions that are executed of a chunk, from the last observation on.
  """

  fields: dict[str, Any]
  network: Predictor
  params: Params
  normaliser: Normalizer
  schedule: Schedule
  steps: int
  executed: int


def load(
  path: str, *, horizon: int = 16, n_action_steps: int = 8, dtype: str = "float32"
) -> PretrainedPolicy:
  """Returns a policy of low-dimensional observations.

  Args:
    path: a folder of LeRobot, with config.json and model.safetensors, whose buffers
      normalise, or *_normalizer_processor.safetensors, which do so later. Or a file of
      Diffusion Policy, .safetensors, .npz or .pt, with the tensors `model.*` and
      `normalizer.params_dict.*`; `ema_model.*`, averaged, are taken before them.
    horizon: H, steps of a chunk; a folder tells its own.
    n_action_steps: Ta, actions that are executed; a folder tells its own.
    dtype: of the hidden layers and of the weights.

  Raises:
    UserError: files are missing or damaged, or a list of what does not fit.
  """
  if os.path.isdir(path):
    return _lerobot(path, dtype)
  return _file(path, horizon, n_action_steps, dtype)


def _lerobot(path: str, dtype: str) -> PretrainedPolicy:
  file = os.path.join(path, "config.json")
  try:
    with open(file, encoding="utf-8") as opened:
      c = config_fields.validated_config(
        json.load(opened), DEFAULTS, SUPPORTED_VALUES, IGNORED_FIELDS
      )
    widths = _widths(c)
    scheduler = {k: c[k] for k in SCHEDULER}
    scheduler["_class_name"] = f"{c['noise_scheduler_type']}Scheduler"
    schedule = scheduler_lib.from_config(scheduler)
    H, To, (Da,) = (
      c["horizon"],
      c["n_obs_steps"],
      c["output_features"]["action"]["shape"],
    )
    sizes = {
      "channels": tuple(c["down_dims"]),
      "embed": c["diffusion_step_embed_dim"],
      "kernel": c["kernel_size"],
      "groups": c["n_groups"],
      "scale": c["use_film_scale_modulation"],
    }
    seen = To * sum(widths.values())
    net = unet1d.predictor(shape=(H, Da), observation=seen, **sizes, dtype=dtype)
  except OSError as error:
    raise UserError(f"{file}: {error.strerror}") from None
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{file}: {error}") from error
  file = os.path.join(path, "model.safetensors")
  if not os.path.exists(file):
    raise UserError(f"{path} has no model.safetensors")
  tensors = state_dict.read(file)
  stats, modes = _statistics(path, tensors), c["normalization_mapping"]
  *seen, action = (
    _map(path, stats, modes, name, width)
    for name, width in (widths | {"action": Da}).items()
  )
  seen = Affine(*map(np.concatenate, zip(*seen, strict=True)))
  fitted = Normalizer(seen, action, To, (H, Da), std=1.0)
  params = networks.load_state_dict(
    unet1d.from_policy(tensors),
    net.init,
    dtype=dtype,
    what=os.path.join(path, "config.json"),
  )
  steps = c["num_inference_steps"] or c["num_train_timesteps"]
  return PretrainedPolicy(
    sizes, net, params, fitted, schedule, steps, c["n_action_steps"]
  )


def _widths(c: dict[str, Any]) -> dict[str, int]:
  """Returns the numbers of each observation.

  Raises:
    ValueError: there are images, or there is no action.
  """
  other = sorted(c["input_features"].keys() - {*OBSERVATIONS})
  if other or "observation.state" not in c["input_features"]:
    raise ValueError(
      f"input_features {', '.join(sorted(c['input_features'])) or 'are none'}: takes "
      f"{' and '.join(OBSERVATIONS)} alone, no images"
    )
  if "action" not in c["output_features"]:
    raise ValueError("output_features: no action")
  names = [name for name in OBSERVATIONS if name in c["input_features"]]
  return {name: int(np.prod(c["input_features"][name]["shape"])) for name in names}


def _statistics(path: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns statistics by feature and kind, such as "observation.state.min"."""
  out = {}
  for file in sorted(os.listdir(path)):
    if file.endswith("normalizer_processor.safetensors"):
      out |= state_dict.read(os.path.join(path, file))
  for name, x in tensors.items():
    module, _, rest = name.partition(".buffer_")
    if module in ("normalize_inputs", "unnormalize_outputs"):
      out[rest.replace("observation_", "observation.")] = x
  return out


def _map(
  path: str, stats: dict[str, np.ndarray], modes: dict[str, str], name: str, width: int
) -> Affine:
  """Returns the affine map of a feature.

  Raises:
    UserError: its statistics are missing or do not fit, or it has another mode.
  """
  mode = modes.get(TYPES[name], "IDENTITY")
  if mode == "IDENTITY":
    return Affine(np.zeros(width, np.float32), np.ones(width, np.float32))
  if mode not in KINDS:
    raise UserError(
      f"{path}/config.json: normalization_mapping {TYPES[name]}={mode!r}: take "
      f"{', '.join(KINDS)} or IDENTITY"
    )
  keys = [f"{name}.{kind}" for kind in KINDS[mode]]
  if not all(k in stats and stats[k].size == width for k in keys):
    raise UserError(f"{path} has no statistics {' and '.join(keys)} of {width} numbers")
  low, high = (np.float32(stats[k]).ravel() for k in keys)
  if mode == "MEAN_STD":
    return Affine(low, high + np.float32(LEAST))
  # Least and largest to -1 and 1; what never changes to -1.
  half = np.where(high > low, (high - low) / 2, np.float32(1))
  return Affine(low + half, half)


def _file(file: str, horizon: int, n_action_steps: int, dtype: str) -> PretrainedPolicy:
  """Returns the policy of a state dict, whose tensors tell most sizes."""
  tensors = state_dict.read(file)
  maps = [_linear(file, tensors, name) for name in ("obs", "action")]
  found = unet1d.from_policy(tensors)
  try:
    channels, level = [], 0
    while (key := f"down_modules.{level}.0.blocks.0.block.0.weight") in found:
      channels.append(len(found[key]))
      level, kernel = level + 1, found[key].shape[-1]
    embed = len(found["diffusion_step_encoder.3.bias"])
    film = found["down_modules.0.0.cond_encoder.1.weight"]
    Da, seen = len(found["final_conv.1.bias"]), film.shape[1] - embed
    To, rest = divmod(seen, len(maps[0].centre))
    if rest or not To or not channels:
      raise ValueError(
        f"a condition of {seen} numbers is no multiple of observations of "
        f"{len(maps[0].centre)}"
      )
    sizes = {"channels": tuple(channels), "embed": embed, "kernel": kernel}
    sizes |= {"groups": unet1d.GROUPS, "scale": len(film) == 2 * channels[0]}
    net = unet1d.predictor(shape=(horizon, Da), observation=seen, **sizes, dtype=dtype)
  except (KeyError, ValueError) as error:
    raise UserError(f"{file} is no U-Net of Diffusion Policy ({error})") from error
  params = networks.load_state_dict(found, net.init, dtype=dtype, what=file)
  c = {k: DEFAULTS[k] for k in SCHEDULER} | {"_class_name": "DDPMScheduler"}
  fitted = Normalizer(*maps, To, (horizon, Da), std=1.0)
  return PretrainedPolicy(
    sizes, net, params, fitted, scheduler_lib.from_config(c), 100, n_action_steps
  )


def _linear(file: str, tensors: dict[str, np.ndarray], name: str) -> Affine:
  """Returns the map x scale + offset that a file has as an Affine.

  Raises:
    UserError: it has none.
  """
  keys = [f"normalizer.params_dict.{name}.{k}" for k in ("scale", "offset")]
  for prefix in ("", "ema_model."):
    if all(prefix + k in tensors for k in keys):
      scale, offset = (np.float32(tensors[prefix + k]) for k in keys)
      return Affine(-offset / scale, 1 / scale)
  raise UserError(f"{file} has no {' and '.join(keys)}: export them with the weights")
