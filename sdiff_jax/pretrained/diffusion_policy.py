"""Diffusion Policy's U-Net and policies (real-stanford/diffusion_policy)."""

import sys
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import trajectories
from sdiff_jax.data.episodes.normalizer import Affine, Normalizer
from sdiff_jax.models import unet1d
from sdiff_jax.models.layers import common
from sdiff_jax.pretrained.diffusers import networks
from sdiff_jax.pretrained.diffusers import scheduler as scheduler_lib
from sdiff_jax.pretrained.diffusers.networks import Predictor
from sdiff_jax.pretrained.diffusers.scheduler import Schedule
from sdiff_jax.pretrained.files import state_dict
from sdiff_jax.types import Array, Cond, CondSpecs, Json, Params, PRNGKey, UserError

# The noise scheduler of its configs, which its files do not hold.
SCHEDULER = {
  "_class_name": "DDPMScheduler",
  "num_train_timesteps": 100,
  "beta_schedule": "squaredcos_cap_v2",
  "beta_start": 0.0001,
  "beta_end": 0.02,
  "prediction_type": "epsilon",
  "clip_sample": True,
  "clip_sample_range": 1.0,
}


class PretrainedPolicy(NamedTuple):
  """A policy and everything that is needed to run it.

  Attributes:
    fields: config fields of `models.unet1d`, by name.
    network: predicts the noise, (params, x [B, H, Da], timestep [B], cond).
    params: its parameters.
    normalizer: of observations and actions.
    schedule: the diffusion process and its solver.
    num_steps: number of solver steps.
    n_action_steps: Ta, actions of a chunk that are executed, from the last observation
      on.
  """

  fields: dict[str, Json]
  network: Predictor
  params: Params
  normalizer: Normalizer
  schedule: Schedule
  num_steps: int
  n_action_steps: int


@registry.register("pretrained", "unet1d", untold={"groups": lambda settings: None})
def from_state_dict(tensors: dict[str, np.ndarray], like: Params) -> Params:
  """Converts the state dict of a `ConditionalUnet1D` to parameters of `models.unet1d`.

  Args:
    tensors: by their PyTorch names, those of the U-Net alone or of a whole policy of
      Diffusion Policy or LeRobot.
    like: abstract parameters of the network. The files have no w_phi; it is set to
      zero.

  Returns:
    Parameters with the structure, shapes and types of `like`.

  Raises:
    UserError: lists tensors that are missing, left over or of another shape.
  """
  logvar = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like["logvar"])
  net = state_dict.match_params(
    unet_tensors(tensors), like["net"], networks.to_state_dict, finite=False
  )
  return {"net": net, "logvar": logvar}


def unet_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the tensors of a policy's U-Net under the names of Diffusion Policy.

  Args:
    tensors: of the U-Net alone, or of a policy of Diffusion Policy or LeRobot. Averaged
      tensors (`ema_model.*`) are preferred.
  """
  for prefix in ("ema_model.model.", "diffusion.unet.", "model."):
    unet = {
      name.removeprefix(prefix): x
      for name, x in tensors.items()
      if name.startswith(prefix)
    }
    if unet:
      break
  else:
    unet = tensors
  renamed = {}
  for name, x in unet.items():
    name = name.replace(".conv1.", ".blocks.0.").replace(".conv2.", ".blocks.1.")
    parts = name.split(".")
    if parts[0] in ("down_modules", "up_modules") and parts[2] == "2":
      name = ".".join((*parts[:3], "conv", parts[-1]))
    renamed[name] = x
  return renamed


def predictor(
  *,
  shape: tuple[int, int],
  cond: CondSpecs,
  channels: tuple[int, ...] = (256, 512, 1024),
  embed: int = 256,
  kernel: int = 5,
  groups: int = 8,
  scale: bool = True,
  dtype: str = "float32",
) -> Predictor:
  """Returns the U-Net as a predictor of the noise at a timestep.

  Args:
    shape: (H, Da), of a chunk of actions.
    cond: what a sample is conditioned on, by name.
    channels: see `models.unet1d.build`, as for all arguments below.
    embed: features of the embedded timestep.
    kernel: size of the convolutions, in steps of the chunk.
    groups: of the norms.
    scale: whether the condition scales features as well.
    dtype: of the hidden layers.

  Raises:
    ValueError: sizes that do not fit one another.
  """
  module = unet1d.module(shape, cond, channels, embed, kernel, groups, scale, dtype)
  specs = {name: spec.batch(1) for name, spec in cond.items()}

  def init(key: PRNGKey) -> Params:
    x, time = jnp.zeros((1, *shape), jnp.float32), jnp.zeros((1,), jnp.float32)
    values = {name: jnp.zeros(s.shape, s.dtype) for name, s in specs.items()}
    return module.init(key, x, time, values)["params"]

  def apply(params: Params, x: Array, time: Array, cond: Cond) -> Array:
    return common.to_accumulation_dtype(module.apply({"params": params}, x, time, cond))

  return Predictor(init, apply, shape, None)


def load(
  path: str,
  *,
  horizon: int = 16,
  n_action_steps: int = 8,
  groups: int = 8,
  scheduler: Mapping[str, Json] | None = None,
  dtype: str = "float32",
) -> PretrainedPolicy:
  """Reads a policy of low-dimensional observations.

  The file does not tell horizon, n_action_steps, groups and scheduler; what they are
  assumed to be is printed on stderr.

  Args:
    path: of a .safetensors, .npz or .pt file with the tensors `model.*` and
      `normalizer.params_dict.*`, or `ema_model.*`, which are preferred. All other sizes
      follow from the shapes of the tensors.
    horizon: H, steps of a chunk of actions.
    n_action_steps: Ta, actions of a chunk that are executed.
    groups: of the norms, `n_groups` of its constructor.
    scheduler: fields of the noise scheduler, in place of those in `SCHEDULER`.
    dtype: of the hidden layers and of the weights.

  Raises:
    UserError: the file is missing or damaged, or does not hold such a policy.
    ValueError: a field of the scheduler does not fit; the message starts with the field.
  """
  fields_of_scheduler = SCHEDULER | dict(scheduler or {})
  schedule = scheduler_lib.from_config(fields_of_scheduler)
  tensors = state_dict.read(path)
  affines = [_affine(path, tensors, name) for name in ("obs", "action")]
  unet = unet_tensors(tensors)
  try:
    channels, level = [], 0
    while (key := f"down_modules.{level}.0.blocks.0.block.0.weight") in unet:
      channels.append(len(unet[key]))
      level, kernel = level + 1, unet[key].shape[-1]
    embed = len(unet["diffusion_step_encoder.3.bias"])
    film = unet["down_modules.0.0.cond_encoder.1.weight"]
    Da, Do = len(unet["final_conv.1.bias"]), film.shape[1] - embed
    n_obs_steps, remainder = divmod(Do, len(affines[0].centre))
    if remainder or not n_obs_steps or not channels:
      raise ValueError(
        f"a condition of size {Do} is not a multiple of the size of an observation, "
        f"{len(affines[0].centre)}"
      )
    fields = {"channels": tuple(channels), "embed": embed, "kernel": kernel}
    fields |= {"groups": groups, "scale": len(film) == 2 * channels[0]}
    net = predictor(
      shape=(horizon, Da), cond=trajectories.observation_cond(Do), **fields, dtype=dtype
    )
  except (KeyError, ValueError) as error:
    raise UserError(f"{path}: is no U-Net of Diffusion Policy ({error})") from error
  params = networks.load_state_dict(unet, net.init, dtype=dtype, path=path)
  print(
    f"{path}: assumed horizon={horizon}, n_action_steps={n_action_steps}, groups={groups}, "
    f"and {len(schedule.abar)} timesteps of {fields_of_scheduler['_class_name']} with "
    f"beta_schedule={fields_of_scheduler['beta_schedule']}, which the file does not tell",
    file=sys.stderr,
  )
  return PretrainedPolicy(
    fields=fields,
    network=net,
    params=params,
    normalizer=Normalizer(*affines, n_obs_steps, (horizon, Da), std=1.0),
    schedule=schedule,
    num_steps=len(schedule.abar),
    n_action_steps=n_action_steps,
  )


def _affine(path: str, tensors: dict[str, np.ndarray], name: str) -> Affine:
  """Returns the map x scale + offset of a normalizer as an Affine.

  Raises:
    UserError: the file has no such normalizer.
  """
  keys = [f"normalizer.params_dict.{name}.{k}" for k in ("scale", "offset")]
  for prefix in ("", "ema_model."):
    if all(prefix + k in tensors for k in keys):
      scale, offset = (np.float32(tensors[prefix + k]) for k in keys)
      return Affine(-offset / scale, 1 / scale)
  raise UserError(
    f"{path}: has no {' and '.join(keys)}; export the normalizer with the weights"
  )
