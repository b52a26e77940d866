"""Checkpoints of DiT and of SiT as their authors publish them.

They hold a state dict, or one of training: `args` beside the tensors of `ema`. Their
network is that of dit_transformer.py with other names; times are embedded at slightly
other frequencies. SiT predicts the velocity x0 - eps of x = t x0 + (1 - t) eps.
"""

import math
import os
from collections.abc import Callable

import numpy as np

from sdiff_jax.pretrained.diffusers import dit_transformer, networks, scheduler
from sdiff_jax.pretrained.diffusers.flow_schedule import FlowSchedule
from sdiff_jax.pretrained.diffusers.model import Model
from sdiff_jax.pretrained.diffusers.networks import Predictor
from sdiff_jax.pretrained.diffusers.scheduler import Schedule
from sdiff_jax.pretrained.files import config_fields, state_dict
from sdiff_jax.types import Array, Cond, Json, Params, PyTree, UserError

KINDS = ("DiT", "SiT")
XL = 1152  # width of the largest networks, whose heads have 72 channels, others 64
EPS = 1e-6  # of all norms
# Names of their files -> names in the diffusers format: of layers, of those of a block,
# and of the embeddings, of which each block has its own there.
LAYERS = {
  "x_embedder.proj": "pos_embed.proj",
  "final_layer.adaLN_modulation.1": "proj_out_1",
  "final_layer.linear": "proj_out_2",
}
OF_BLOCK = {
  "attn.proj": "attn1.to_out.0",
  "mlp.fc1": "ff.net.0.proj",
  "mlp.fc2": "ff.net.2",
  "adaLN_modulation.1": "norm1.linear",
}
EMBEDDINGS = {
  "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
  "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
  "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
POSITIONS = "pos_embed"  # fixed
VP = {"_class_name": "DDIMScheduler", "clip_sample": False}
VP |= {"timestep_spacing": "linspace"}


def load(
  path: str,
  *,
  dtype: str = "float32",
  remat: str = "",
  place: Callable[[Params], PyTree] | None = None,
) -> Model:
  """Returns the model of a checkpoint, without an autoencoder.

  Args:
    path: of the file.
    dtype: of the hidden layers and of the weights.
    remat: see `loading.load`.
    place: see `loading.load`.

  Raises:
    UserError: the file is missing or damaged, or holds another network; or it tells
      neither by `args` nor by its name whether it is of DiT or of SiT.
  """
  tensors, settings = state_dict.read_with_settings(path)
  tensors = {networks.present_name(name): x for name, x in tensors.items()}
  name = str(settings.get("args.model") or os.path.basename(path))
  if not name.startswith(KINDS):
    raise UserError(
      f"{path}: does not tell whether it is of DiT or of SiT; name it DiT-... or SiT-..."
    )
  try:
    c = config_fields.validated_config(
      _fields(tensors, path), dit_transformer.FIELDS, {}
    )
    unet = dit_transformer.predictor(c, 0.0, dtype=dtype, remat=remat)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
  params = networks.load_state_dict(
    _renamed(tensors, c["num_layers"]), unet.init, dtype=dtype, path=path, place=place
  )
  schedule: Schedule | FlowSchedule = scheduler.from_config(VP)
  if name.startswith("SiT"):
    unet, schedule = _flow(unet), _linear_path()
  return Model(unet, None, {}, {"unet": params}, {}, schedule)


def _fields(tensors: dict[str, np.ndarray], path: str) -> dict[str, Json]:
  """Returns the sizes of the network, which its tensors tell."""
  first, table = "x_embedder.proj.weight", "y_embedder.embedding_table.weight"
  last = "final_layer.linear.weight"
  for name, rank in {first: 4, table: 2, last: 2, POSITIONS: 3}.items():
    if name not in tensors or tensors[name].ndim != rank or not tensors[name].size:
      raise UserError(
        f"{path}: holds no network of DiT or SiT: there is no {name} of {rank} axes"
      )
  width, channels, patch, _ = tensors[first].shape
  indices = [k.split(".")[1] for k in tensors if k.startswith("blocks.")]
  size = 72 if width == XL else 64
  return {
    "num_attention_heads": max(width // size, 1),
    "attention_head_dim": width // max(width // size, 1),
    "in_channels": channels,
    "out_channels": tensors[last].shape[0] // patch**2,
    "num_layers": 1 + max((int(i) for i in indices if i.isdecimal()), default=0),
    "sample_size": math.isqrt(tensors[POSITIONS].shape[1]) * patch,
    "patch_size": patch,
    "num_embeds_ada_norm": len(tensors[table]) - 1,
    "norm_eps": EPS,
  }


def _renamed(tensors: dict[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
  """Returns the tensors by their names in the diffusers format.

  Queries, keys and values, which are one layer, become three.
  """
  found = {}
  for name, x in tensors.items():
    layer, _, end = name.rpartition(".")
    if name == POSITIONS:
      continue
    if layer in EMBEDDINGS:
      for i in range(depth):
        found[f"transformer_blocks.{i}.{EMBEDDINGS[layer]}.{end}"] = x
      continue
    if not layer.startswith("blocks."):
      found[f"{LAYERS.get(layer, layer)}.{end}"] = x
      continue
    _, i, rest = layer.split(".", 2) if layer.count(".") > 1 else ("", layer, "")
    start = f"transformer_blocks.{i}"
    if rest != "attn.qkv" or len(x) % 3:
      found[f"{start}.{OF_BLOCK.get(rest, rest)}.{end}"] = x
      continue
    for part, own in zip(np.split(x, 3), ("to_q", "to_k", "to_v"), strict=True):
      found[f"{start}.attn1.{own}.{end}"] = part
  return found


def _flow(unet: Predictor) -> Predictor:
  """Returns the network of eps - x0 at sigma = 1 - t, from that of SiT."""

  def apply(params: Params, x: Array, time: Array, cond: Cond) -> Array:
    return -unet.apply(params, x, 1 - time, cond)

  return unet._replace(apply=apply)


def _linear_path() -> FlowSchedule:
  """Returns the process of SiT, in equal steps of t."""
  return FlowSchedule(train_steps=1, smallest=1e-3, spacing="trailing")
