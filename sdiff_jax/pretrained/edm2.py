"""Weights of EDM2's magnitude-preserving U-Net (NVlabs/edm2, arXiv:2312.02696).

Those of EpiGenomicsCode/edm2_sCM, too: TrigFlow in EDM2's layout, whose `emb_linear` holds
scale and shift of the adaptive double norm, one after the other.
"""

import re
from collections.abc import Callable

import jax
import numpy as np

from sdiff_jax import registry
from sdiff_jax.pretrained.files import state_dict, to_tensors
from sdiff_jax.types import Json, Params

# Names of this package -> names of EDM2's files, replaced in this order.
RENAMED = {
  "/net/gain": "unet.out_gain",
  "/net/out/": "unet.out_conv.",
  "/net/embedding/": "unet.emb_",
  "/net/": "unet.",
  "/logvar/": "logvar_",
  "/modulation/gain": ".emb_gain",
  "/modulation/scale/": ".emb_linear.",
  "/modulation/shift/": ".emb_shift.",
  "/attention/": ".attn_",
  "/in/": ".conv_res0.",
  "/out/": ".conv_res1.",
  "/skip/": ".conv_skip.",
  "/": ".",
}

SCALE, SHIFT = ".emb_linear.weight", ".emb_shift.weight"
# What only TrigFlow's networks have: frequencies of features of the time.
FREQUENCIES = "unet.emb_pos.freqs", "logvar_pos.freqs"

# Ends of names of 1x1 convolutions, which are matrices here.
CONVOLUTIONS = (".conv_skip.weight", ".attn_qkv.weight", ".attn_proj.weight")


def _attribute(name: str) -> Callable[[dict[str, Json]], Json]:
  return lambda settings: state_dict.setting(settings, name)


def _clip(settings: dict[str, Json]) -> float | None:
  """Returns the bound of the activations, 0 for none."""
  if any(k.endswith(".clip_act") and v is None for k, v in settings.items()):
    return 0.0
  bound = state_dict.setting(settings, "clip_act")
  return None if bound is None else float(bound)


def _head_channels(settings: dict[str, Json]) -> int | None:
  """Returns the channels of a head, from the number of heads of each block."""
  sizes = []
  for name, heads in settings.items():
    channels = settings.get(name.removesuffix("num_heads") + "out_channels")
    if name.endswith(".num_heads") and heads and channels:
      sizes.append(channels // heads)
  return min(sizes, default=None)


# Fields of the network that its tensors do not tell -> what the attributes of a pickled
# network tell, None for nothing.
UNTOLD = {
  **{
    name: _attribute(name)
    for name in (
      *("label_balance", "concat_balance", "res_balance", "attn_balance"),
      "resample_filter",
    )
  },
  "clip": _clip,
  "head_channels": _head_channels,
}


@registry.register("pretrained", "edm2", untold=UNTOLD)
def from_state_dict(tensors: dict[str, np.ndarray], like: Params) -> Params:
  """Converts the state dict of EDM2's `Precond` to parameters of `models.edm2`.

  That of a `TrigFlowPrecond` is read for process="trigflow", embedding="positional" and
  norm="double"; its log variance is one of other features, and w_phi is set to zero.

  Args:
    tensors: by their PyTorch names, `unet.*` and `logvar_*`.
    like: abstract parameters of the network; `models.edm2.build` says which fields
      make it one that EDM2 published. Tensors do not tell the fields in `UNTOLD`, which
      must be those that the file was trained with.

  Returns:
    Parameters with the structure, shapes and types of `like`.

  Raises:
    UserError: lists tensors that are missing, left over or of another shape.
  """
  first = re.compile(r"unet\.enc\.(\d+)x\d+_conv\.weight")
  height = next((int(m[1]) for m in map(first.fullmatch, tensors) if m), 0)
  if FREQUENCIES[0] not in tensors:
    return state_dict.match_params(tensors, like, _names(height), finite=False)
  unused = *FREQUENCIES, "logvar_linear.weight"
  tensors = {k: v for k, v in tensors.items() if k not in unused}
  for name in [name for name in tensors if name.endswith(SCALE)]:
    scale, shift = np.split(tensors[name], 2)
    tensors |= {name: scale, name.removesuffix(SCALE) + SHIFT: shift}
  net = {"net": like["net"]}
  net = state_dict.match_params(tensors, net, _names(height), finite=False)
  return net | {
    "logvar": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like["logvar"])
  }


def to_state_dict(params: Params, height: int) -> dict[str, np.ndarray]:
  """Returns parameters of `models.edm2` as the state dict of EDM2's `Precond`.

  This is the inverse of `from_state_dict`.

  Args:
    params: of the network.
    height: of its samples, which is part of the names.
  """
  tensors = to_tensors.from_params(params, _names(height))
  return {
    name: x[..., None, None] if name.endswith(CONVOLUTIONS) else x
    for name, x in tensors.items()
  }


def _names(height: int) -> Callable[[tuple[str, ...]], str]:
  """Returns keys of a parameter -> EDM2's name of it, for samples of a height."""

  def name_of(keys: tuple[str, ...]) -> str:
    path = "".join(f"/{key}" for key in keys)
    if path == "/net/in/weight":
      return f"unet.enc.{height}x{height}_conv.weight"
    for ours, theirs in RENAMED.items():
      path = path.replace(ours, theirs)

    def side(match: re.Match) -> str:  # level 1 of height 64 is 32x32
      size = height >> int(match[2])
      return f"{match[1]}.{size}x{size}_"

    return re.sub(r"(enc|dec)_(\d+)_", side, path)

  return name_of
