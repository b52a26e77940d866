"""Weights of EDM2's magnitude-preserving U-Net (NVlabs/edm2, arXiv:2312.02696)."""

import re

import numpy as np

from sdiff_jax import registry
from sdiff_jax.pretrained.files import state_dict
from sdiff_jax.types import Params

# Names of this package -> names of EDM2's files, replaced in this order.
RENAMED = {
  "/net/gain": "unet.out_gain",
  "/net/out/": "unet.out_conv.",
  "/net/embedding/": "unet.emb_",
  "/net/": "unet.",
  "/logvar/": "logvar_",
  "/modulation/gain": ".emb_gain",
  "/modulation/scale/": ".emb_linear.",
  "/attention/": ".attn_",
  "/in/": ".conv_res0.",
  "/out/": ".conv_res1.",
  "/skip/": ".conv_skip.",
  "/": ".",
}


@registry.register("pretrained", "edm2")
def from_state_dict(tensors: dict[str, np.ndarray], like: Params) -> Params:
  """Converts the state dict of EDM2's `Precond` to parameters of `models.edm2`.

  Args:
    tensors: by their PyTorch names, `unet.*` and `logvar_*`.
    like: abstract parameters of the network; `models.edm2.build` says which fields
      make it one that EDM2 published.

  Returns:
    Parameters with the structure, shapes and types of `like`.

  Raises:
    UserError: lists tensors that are missing, left over or of another shape.
  """
  first = re.compile(r"unet\.enc\.(\d+)x\d+_conv\.weight")
  height = next((int(m[1]) for m in map(first.fullmatch, tensors) if m), 0)

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

  return state_dict.match_params(tensors, like, name_of)
