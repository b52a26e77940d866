"""Folders of LeRobot's diffusion policies (huggingface/lerobot)."""

import os
from typing import Annotated

import numpy as np
from msgspec import Meta

from sdiff_jax.data import trajectories
from sdiff_jax.data.episodes import normalizer as normalizer_lib
from sdiff_jax.data.episodes.normalizer import Affine, Normalizer
from sdiff_jax.pretrained.diffusers import betas, networks, scheduler_fields
from sdiff_jax.pretrained.diffusers import scheduler as scheduler_lib
from sdiff_jax.pretrained.diffusion_policy import (
  PretrainedPolicy,
  predictor,
  unet_tensors,
)
from sdiff_jax.pretrained.files import config_fields, state_dict
from sdiff_jax.pretrained.files.config_fields import (
  Channels,
  ChannelsOfLevels,
  Field,
)
from sdiff_jax.types import Json, UserError

Steps = Annotated[int, Meta(ge=1, le=10_000)]  # of a chunk of actions
FIELDS = {  # of LeRobot's DiffusionConfig
  "n_obs_steps": Field(2, Annotated[int, Meta(ge=1, le=1000)]),
  "horizon": Field(16, Steps),
  "n_action_steps": Field(8, Steps),
  "input_features": Field({}, dict),
  "output_features": Field({}, dict),
  "normalization_mapping": Field({"STATE": "MIN_MAX", "ACTION": "MIN_MAX"}, dict),
  "down_dims": Field((512, 1024, 2048), ChannelsOfLevels),
  "kernel_size": Field(5, Annotated[int, Meta(ge=1, le=99)]),
  "n_groups": Field(8, Channels),
  "diffusion_step_embed_dim": Field(128, Channels),
  "use_film_scale_modulation": Field(True, bool),
  "noise_scheduler_type": Field("DDPM", str),
  "num_inference_steps": Field(None, betas.Timesteps | None),
  **{name: scheduler_fields.FIELDS[name] for name in ("beta_start", "beta_end")},
  "num_train_timesteps": Field(100, betas.Timesteps),
  "beta_schedule": scheduler_fields.FIELDS["beta_schedule"]._replace(
    default="squaredcos_cap_v2"
  ),
  "prediction_type": scheduler_fields.FIELDS["prediction_type"],
  **scheduler_fields.CLIP,
}
Size = Annotated[int, Meta(ge=1, le=10_000)]  # of an observation or an action
Shape = Annotated[list[Size], Meta(min_length=1, max_length=1)]
FEATURE_FIELDS = {"shape": Field(None, Shape), "type": Field("", str)}
SUPPORTED_VALUES = {"type": ("diffusion",)}
# Fields of image encoders, of training and of the machine: unused here.
IGNORED_FIELDS = {
  *("vision_backbone", "resize_shape", "crop_ratio", "crop_shape", "crop_is_random"),
  *("pretrained_backbone_weights", "use_group_norm", "spatial_softmax_num_keypoints"),
  *("use_separate_rgb_encoder_per_camera", "do_mask_loss_for_padding"),
  *("drop_n_last_frames", "gradient_checkpointing", "compile_model", "compile_mode"),
  *("policy_action_contract", "device", "use_amp", "use_peft", "push_to_hub"),
  *("repo_id", "private", "tags", "license", "pretrained_path", "pretrained_revision"),
  *("optimizer_lr", "optimizer_betas", "optimizer_eps", "optimizer_weight_decay"),
  *("scheduler_name", "scheduler_warmup_steps"),
}
SCHEDULER_FIELDS = (
  *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end"),
  *("prediction_type", "clip_sample", "clip_sample_range"),
)
FEATURE_TYPES = {  # feature -> its key in normalization_mapping
  "observation.state": "STATE",
  "observation.environment_state": "ENV",
  "action": "ACTION",
}
OBSERVATIONS = ("observation.state", "observation.environment_state")
STATISTICS = {"MIN_MAX": ("min", "max"), "MEAN_STD": ("mean", "std")}
STD_EPSILON = 1e-8  # that LeRobot adds to standard deviations


def load(path: str, *, dtype: str = "float32") -> PretrainedPolicy:
  """Reads a policy of low-dimensional observations.

  Args:
    path: of a folder with config.json and model.safetensors. The statistics of the
      normalizer are buffers of the model (older versions) or in
      *_normalizer_processor.safetensors.
    dtype: of the hidden layers and of the weights.

  Raises:
    UserError: a file is missing or damaged, or lists all fields that are not supported.
  """
  file = os.path.join(path, "config.json")
  config = config_fields.read_config(file)
  try:
    c = config_fields.validated_config(config, FIELDS, SUPPORTED_VALUES, IGNORED_FIELDS)
    sizes, Da = _observation_sizes(c), _size(c["output_features"], "action")
    schedule = scheduler_lib.from_config(
      {k: c[k] for k in SCHEDULER_FIELDS}
      | {"_class_name": f"{c['noise_scheduler_type']}Scheduler"}
    )
    shape, n_obs_steps = (c["horizon"], Da), c["n_obs_steps"]
    fields = {
      "channels": tuple(c["down_dims"]),
      "embed": c["diffusion_step_embed_dim"],
      "kernel": c["kernel_size"],
      "groups": c["n_groups"],
      "scale": c["use_film_scale_modulation"],
    }
    Do = n_obs_steps * sum(sizes.values())
    net = predictor(
      shape=shape, cond=trajectories.observation_cond(Do), **fields, dtype=dtype
    )
    largest = c["horizon"] - n_obs_steps + 1
    if c["n_action_steps"] > largest:
      raise ValueError(
        f"n_action_steps={c['n_action_steps']}: must be at most horizon - n_obs_steps + 1 "
        f"= {largest}"
      )
  except ValueError as error:
    raise UserError(f"{file}: {error}") from error
  weights = os.path.join(path, "model.safetensors")
  if not os.path.exists(weights):
    raise UserError(f"{path}: has no model.safetensors")
  tensors = state_dict.read(weights)
  stats, modes = _statistics(path, tensors), c["normalization_mapping"]
  *observations, action = (
    _affine(path, stats, modes, name, size)
    for name, size in (sizes | {"action": Da}).items()
  )
  observation = Affine(*map(np.concatenate, zip(*observations, strict=True)))
  normalizer = Normalizer(observation, action, n_obs_steps, shape, std=1.0)
  try:
    normalizer_lib.check(normalizer)
  except ValueError as error:
    raise UserError(f"{path}: the statistics do not fit: {error}") from error
  unet = unet_tensors(tensors)
  return PretrainedPolicy(
    fields=fields,
    network=net,
    params=networks.load_state_dict(unet, net.init, dtype=dtype, path=weights),
    normalizer=normalizer,
    schedule=schedule,
    num_steps=c["num_inference_steps"] or c["num_train_timesteps"],
    n_action_steps=c["n_action_steps"],
  )


def _observation_sizes(c: dict[str, Json]) -> dict[str, int]:
  """Returns the size of each part of an observation, by its feature.

  Raises:
    ValueError: there are images, or there is no action.
  """
  unsupported = sorted(c["input_features"].keys() - {*OBSERVATIONS})
  if unsupported or "observation.state" not in c["input_features"]:
    names = config_fields.quoted(", ".join(sorted(c["input_features"])), str, 150)
    raise ValueError(
      f"input_features {names or 'are empty'}: must be "
      f"observation.state and optionally observation.environment_state, no images"
    )
  if "action" not in c["output_features"]:
    raise ValueError("output_features: no action")
  names = [name for name in OBSERVATIONS if name in c["input_features"]]
  return {name: _size(c["input_features"], name) for name in names}


def _size(features: dict[str, Json], name: str) -> int:
  """Returns the size of a feature, whose shape has one number.

  Raises:
    ValueError: it has another shape, or fields of other types.
  """
  feature = features[name]
  if not isinstance(feature, dict):
    raise ValueError(f"{name}={config_fields.quoted(feature)}: must be a mapping")
  try:
    c = config_fields.validated_config(feature, FEATURE_FIELDS, {}, required=["shape"])
  except ValueError as error:
    raise ValueError(f"{name}.{error}") from error
  return c["shape"][0]


def _statistics(path: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns statistics by feature and kind, such as "observation.state.min"."""
  statistics = {}
  for file in sorted(os.listdir(path)):
    if file.endswith("normalizer_processor.safetensors"):
      statistics |= state_dict.read(os.path.join(path, file))
  for name, x in tensors.items():
    module, _, rest = name.partition(".buffer_")
    if module in ("normalize_inputs", "unnormalize_outputs"):
      statistics[rest.replace("observation_", "observation.")] = x
  return statistics


def _affine(
  path: str, stats: dict[str, np.ndarray], modes: dict[str, str], name: str, size: int
) -> Affine:
  """Returns the affine map of a feature.

  Raises:
    UserError: its statistics are missing or do not fit, or its mode is unknown.
  """
  mode = modes.get(FEATURE_TYPES[name], "IDENTITY")
  mode = mode if isinstance(mode, str) else config_fields.quoted(mode)
  if mode == "IDENTITY":
    return Affine(np.zeros(size, np.float32), np.ones(size, np.float32))
  if mode not in STATISTICS:
    raise UserError(
      f"{path}/config.json: normalization_mapping {FEATURE_TYPES[name]}="
      f"{config_fields.quoted(mode)}: must "
      f"be one of {', '.join(STATISTICS)}, IDENTITY"
    )
  keys = [f"{name}.{kind}" for kind in STATISTICS[mode]]
  if not all(k in stats and stats[k].size == size for k in keys):
    raise UserError(f"{path}: has no statistics {' and '.join(keys)} of size {size}")
  low, high = (np.float32(stats[k]).ravel() for k in keys)
  if not np.isfinite([low, high]).all():
    raise UserError(f"{path}: the statistics {' and '.join(keys)} must be finite")
  wrong = (high < 0) if mode == "MEAN_STD" else (high < low)
  if wrong.any():
    words = "is negative" if mode == "MEAN_STD" else f"is below {keys[0]}"
    raise UserError(f"{path}: the statistic {keys[1]} {words}")
  if mode == "MEAN_STD":
    return Affine(low, high + np.float32(STD_EPSILON))
  # The range [min, max] is mapped to [-1, 1]; a constant is mapped to -1.
  half = np.where(high > low, (high - low) / 2, np.float32(1))
  return Affine(low + half, half)
