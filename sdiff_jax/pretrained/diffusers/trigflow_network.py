"""Networks of the diffusers format as TrigFlow networks, and their config files.

The change of variables needs the unit in which the network takes its data: pixels in
[-1, 1], or latents (z - shift) scaling of its autoencoder. The data of a run are
(raw - mean) sigma_d / std, so they are those of the network up to a factor.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdiff_jax.diffusion import parameterizations
from sdiff_jax.diffusion.trigflow import END_TIME
from sdiff_jax.io import file_io
from sdiff_jax.models.pretrained import ANY, Pretrained
from sdiff_jax.pretrained.diffusers import (
  block_loop,
  fit,
  hub,
  loading,
  sana_transformer,
  unet,
  vae,
)
from sdiff_jax.pretrained.diffusers import weights as weights_lib
from sdiff_jax.pretrained.diffusers.flow_schedule import FlowSchedule
from sdiff_jax.pretrained.diffusers.scheduler import Schedule
from sdiff_jax.types import Array, Cond, Json, NetFn, Params, PyTree

FLUX = "FluxTransformer2DModel"  # has the scale as an input, or was trained without
GUIDANCE = 3.5  # of a network that takes the scale as an input, as Flux is sampled
ROOT = ("model_index.json", "config.json", "scheduler_config.json")
SUFFIXES = (".json", ".txt")  # of config files and vocabularies of a part
WEIGHTS = ".index.json"  # the end of the lists of shards


def network(
  folder: str,
  *,
  mean: Sequence[float],
  std: Sequence[float],
  latents: bool,
  dtype: str = "float32",
  remat: str = "",
  guidance: bool = False,
  end_time: bool = False,
  qk_norm: bool = False,
  time_scale: float = 1.0,
  scan_blocks: bool = False,
) -> Pretrained:
  """Returns the network of a folder as a TrigFlow network, without its weights.

  Args:
    folder: in the diffusers format; only its config files are read.
    mean: of the raw data, one number or one a channel; they are pixels in [-1, 1], or
      latents as the encoder makes them.
    std: what they are divided by.
    latents: whether the raw data are latents.
    dtype: of the hidden layers.
    remat: as in `loading.load`.
    guidance: whether the guidance scale is an input (see `student_config`).
    end_time: whether the network is a flow map.
    qk_norm: whether its queries and keys are normalized.
    time_scale: factor of the timestep before its embedding.
    scan_blocks: whether alike blocks run in a loop over their weights, which are stacked
      in the program (see `block_loop`).

  Raises:
    UserError: a file is missing or does not fit.
    ValueError: the data are in another unit than those of the network, or it cannot have
      such inputs.
  """
  configs = loading.configs(folder)
  needed = {
    name: student_config(config, guidance=guidance, end_time=end_time, qk_norm=qk_norm)
    for name, config in configs.items()
    if name in fit.PREDICTORS
  }
  needed["scheduler"] = configs["scheduler"]
  model = loading.abstract(needed, dtype=dtype, remat=remat)
  predictor = model.unet
  lacks = {
    "guidance scale": guidance and not predictor.guided,
    "end time of a flow map": end_time and not predictor.end_time,
    "norm of queries and keys": qk_norm and not _has_norm(needed),
  }
  for name, is_missing in lacks.items():
    if is_missing:
      raise ValueError(f"folder={folder}: its network has no place for the {name}")
  coder = _autoencoder(configs["vae"]) if "vae" in configs else None
  data_std = _data_std(folder, coder, mean, std, latents=latents)
  timestep_of = timestep(model.schedule, data_std)

  def inputs(x: Array, t: Array, cond: Cond) -> Cond:
    """Returns the conditions with what the data do not tell."""
    given = dict(cond or {})
    if predictor.guided:
      scale = jnp.full(t.shape, GUIDANCE, t.dtype)
      given["distilled_guidance"] = given["guidance"] if guidance else scale
    if predictor.end_time:
      given[END_TIME] = time_scale * timestep_of(given[END_TIME])
    if predictor.masked:  # data hold it as a number
      given["mask"] = given["mask"] > 0
    if predictor.sized:
      sides = [side * (coder.factor if coder else 1) for side in x.shape[1:3]]
      ids = jnp.asarray([*sides, 0, 0, *sides], t.dtype)
      given["time_ids"] = jnp.broadcast_to(ids[None], (len(x), len(ids)))
    return given

  def apply(params: Params, x: Array, t: Array, cond: Cond) -> Array:
    if scan_blocks:
      params = block_loop.stacked(params, predictor.lists)

    def predict(x: Array, time: Array, cond: Cond) -> Array:
      return predictor.apply(params, x, time_scale * time, cond)

    net = trigflow(predict, model.schedule, data_std)
    return net(x, t, inputs(x, t, cond))

  sizes = {"text": predictor.text, "pooled": predictor.pooled}
  cond = {name: size for name, size in sizes.items() if size is not None}
  if predictor.masked:
    cond["mask"] = ANY
  channels, classes = predictor.shape[-1], predictor.classes
  return Pretrained(predictor.init, apply, channels, cond, classes)


def student_config(
  config: dict[str, Json],
  *,
  guidance: bool = False,
  end_time: bool = False,
  qk_norm: bool = False,
) -> dict[str, Json]:
  """Returns the config.json of a network with further inputs, which start without effect.

  A norm of queries and keys is no input, and has an effect. A U-Net with text gets the
  layer `cond_proj` of latent consistency models, and SANA the embedder of SANA-Sprint,
  which diffusers knows; other transformers get `cond_proj`, too, and flow maps `end_proj`.
  Networks that take the scale already, such as Flux, stay as they are.

  Args:
    config: of the network in the folder.
    guidance: whether the guidance scale is an input.
    end_time: whether the network is a flow map.
    qk_norm: whether queries and keys are normalized, of Stable Diffusion 3.
  """
  name, changed = str(config.get("_class_name")), dict(config)
  fields = loading.NETWORKS[name].FIELDS if name in loading.NETWORKS else {}
  if guidance and name == "UNet2DConditionModel":
    features = config.get("time_cond_proj_dim") or unet.GUIDANCE_FEATURES
    changed["time_cond_proj_dim"] = features
  for field in ("guidance_embeds", "guidance_proj"):
    if guidance and field in fields and name != FLUX:
      changed[field] = True
  if end_time and "end_time" in fields:
    changed["end_time"] = True
  if qk_norm and name == "SD3Transformer2DModel":
    changed["qk_norm"] = "rms_norm"
  return changed


def _autoencoder(config: dict[str, Json]) -> vae.Autoencoder:
  """Returns the autoencoder of a config.json, whichever class it names."""
  module: Any = loading.NETWORKS.get(str(config.get("_class_name")), vae)
  coder: vae.Autoencoder = module.from_config(config)
  return coder


def _has_norm(configs: dict[str, dict[str, Json]]) -> bool:
  """Returns whether the network of configs normalizes queries and keys."""
  return any(config.get("qk_norm") for config in configs.values())


def _data_std(
  folder: str,
  coder: vae.Autoencoder | None,
  mean: Sequence[float],
  std: Sequence[float],
  *,
  latents: bool,
) -> float:
  """Returns the standard deviation of the data in the unit of the network."""
  shift, unit = 0.0, 1.0
  if latents != (coder is not None):
    kinds = ("latents", "pixels") if coder is not None else ("pixels", "latents")
    raise ValueError(
      f"folder={folder}: its network is trained on {kinds[0]}, and the data are {kinds[1]}"
    )
  if coder is not None:
    shift, unit = coder.shift, 1 / coder.scaling
  same = np.allclose(mean, shift, atol=1e-6) and np.allclose(std, std[0], rtol=1e-6)
  if not same:
    raise ValueError(
      f"folder={folder}: its network takes (x - {shift:g}) / {unit:.6g}, and the data are "
      "scaled by other means, or by another factor in every channel; "
      + ("encode them with scale='vae'" if latents else "use mean=(0.0,)")
    )
  return float(std[0]) / unit


def parameters(
  folder: str,
  *,
  guidance: bool = False,
  place: Callable[[Params], PyTree] | None = None,
) -> Params:
  """Returns the weights of the network of a folder in float32, {"net": ...}.

  Args:
    folder: in the diffusers format, or hf://organization/name.
    guidance: whether they are for a network with the guidance scale as an input.
    place: shapes of the parameters -> their shardings; None for the host.

  Raises:
    UserError: a file is missing or damaged.
  """
  local = hub.local(folder)
  names = [name for name in fit.PREDICTORS if name in loading.configs(local)]
  part = os.path.join(local, names[0])
  part = part if os.path.isdir(part) else local
  net = loading.network(part)
  params = weights_lib.parameters(part, net, place=place)
  return {"net": sana_transformer.guided(params) if guidance else params}


def copy_configs(folder: str, target: str) -> None:
  """Copies the config files and vocabularies of the parts of a folder.

  Args:
    folder: in the diffusers format, or hf://organization/name.
    target: of the copy, which is read like the folder but has no weights.

  Raises:
    UserError: a file is missing or damaged.
  """
  local = hub.local(folder, weights=False)
  for part in ("", *loading.INDEX):
    source = os.path.join(local, part)
    for name in sorted(os.listdir(source)) if os.path.isdir(source) else ():
      is_config = name in ROOT if not part else name.endswith(SUFFIXES)
      if is_config and not name.endswith(WEIGHTS):
        content = file_io.read_bytes(os.path.join(source, name))
        file_io.write_bytes(os.path.join(target, part, name), content)


def trigflow(
  predict: Callable[[Array, Array, Cond], Array],
  schedule: Schedule | FlowSchedule,
  data_std: float,
) -> NetFn:
  """Returns a network as a TrigFlow network, by the exact change of variables.

  What belongs to the sampler and not to the network is left out: the clip of x0, and the
  shift of the levels of rectified flow.

  Args:
    predict: (x [N, ...], timestep [N], cond) -> prediction [N, ...].
    schedule: the process.
    data_std: standard deviation of the data in the unit of the network.

  Example:
    >>> from sdiff_jax.pretrained.diffusers import flow_scheduler
    >>> flow = flow_scheduler.from_config({})
    >>> net = trigflow(lambda x, time, cond: -x, flow, 1.0)
    >>> net(jnp.ones((1, 2)), jnp.zeros(1), None).tolist()
    [[0.0, 0.0]]
  """
  if isinstance(schedule, FlowSchedule):
    steps = schedule.train_steps
    return parameterizations.trigflow_from_flow(predict, steps, data_std)
  abar = schedule.abar
  return parameterizations.trigflow_from_vp(predict, schedule.kind, abar, data_std)


def timestep(
  schedule: Schedule | FlowSchedule, data_std: float
) -> Callable[[Array], Array]:
  """Returns TrigFlow time [B] -> the timestep that a network is given there, [B].

  Args:
    schedule: the process.
    data_std: standard deviation of the data in the unit of the network.
  """
  if isinstance(schedule, FlowSchedule):
    return parameterizations.timestep_of_flow(schedule.train_steps, data_std)
  return parameterizations.timestep_of_vp(schedule.abar, data_std)
