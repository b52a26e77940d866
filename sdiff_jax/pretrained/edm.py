"""Weights of EDM's networks DDPM++ and NCSN++ (NVlabs/edm, arXiv:2206.00364)."""

import jax
import numpy as np

from sdiff_jax import registry
from sdiff_jax.pretrained.files import state_dict
from sdiff_jax.types import Params


@registry.register("pretrained", "ddpmpp", untold={})
def from_state_dict(
  tensors: dict[str, np.ndarray],
  like: Params,
  *,
  resample_filter: tuple[float, ...] = (1, 1),
) -> Params:
  """Converts the state dict of EDM's `EDMPrecond` to parameters of `models.ddpmpp`.

  Args:
    tensors: by their PyTorch names, such as "model.enc.32x32_conv.weight".
    like: abstract parameters of the network. EDM has no w_phi; it is set to zero.
    resample_filter: field of the network; the filters of the file must be the same.

  Returns:
    Parameters with the structure, shapes and types of `like`.

  Raises:
    ValueError: the file has another resampling filter.
    UserError: lists tensors that are missing, left over or of another shape.
  """
  taps = np.outer(resample_filter, resample_filter) / np.sum(resample_filter) ** 2
  filters = {k: v for k, v in tensors.items() if k.endswith(".resample_filter")}
  for name, x in filters.items():
    if x.shape[2:] != taps.shape or not np.allclose(x, taps, atol=1e-3):
      raise ValueError(
        f"resample_filter={resample_filter}: must be the filter of the file, {name} = "
        f"{x.squeeze().tolist()}"
      )
  rest = {k: v for k, v in tensors.items() if k not in filters}
  logvar = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like["logvar"])
  net = state_dict.match_params(rest, like["net"], _name, finite=False)
  return {"net": net, "logvar": logvar}


def _name(keys: tuple[str, ...]) -> str:
  """Returns EDM's name of a parameter, "model.enc.16x16_block0.conv0.weight"."""
  keys = tuple({"kernel": "weight", "scale": "weight"}.get(k, k) for k in keys)
  if keys[0] != "embedding":
    return ".".join(("model", keys[0].replace("_", ".", 1), *keys[1:]))
  special = {"label_bias": "label.bias", "frequencies": "noise.freqs"}
  return "model.map_" + ".".join(special.get(k, k) for k in keys[1:])
