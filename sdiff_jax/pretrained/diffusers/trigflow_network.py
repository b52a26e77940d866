"""Networks of the diffusers format as TrigFlow networks, and their config files.

The change of variables needs the unit in which the network takes its data: pixels in
[-1, 1], or latents (z - shift) scaling of its autoencoder. The data of a run are
(raw - mean) sigma_d / std, so they are those of the network up to a factor.
"""

import functools
import os
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from sdiff_jax.io import file_io
from sdiff_jax.models.pretrained import Pretrained
from sdiff_jax.pretrained.diffusers import fit, hub, loading, scheduler, vae
from sdiff_jax.pretrained.diffusers import weights as weights_lib
from sdiff_jax.types import Array, Cond, Json, Params, PyTree

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

  Raises:
    UserError: a file is missing or does not fit.
    ValueError: the data are in another unit than those of the network.
  """
  configs = loading.configs(folder)
  needed = {k: v for k, v in configs.items() if k in (*fit.PREDICTORS, "scheduler")}
  model = loading.abstract(needed, dtype=dtype, remat=remat)
  predictor = model.unet
  data_std = _data_std(folder, configs.get("vae"), mean, std, latents=latents)

  def apply(params: Params, x: Array, t: Array, cond: Cond) -> Array:
    if predictor.guided:
      scale = jnp.full(t.shape, GUIDANCE, t.dtype)
      cond = (cond or {}) | {"distilled_guidance": scale}
    predict = functools.partial(predictor.apply, params)
    return scheduler.trigflow(predict, model.schedule, data_std)(x, t, cond)

  sizes = {"text": predictor.text, "pooled": predictor.pooled}
  cond = {name: size for name, size in sizes.items() if size is not None}
  channels, classes = predictor.shape[-1], predictor.classes
  return Pretrained(predictor.init, apply, channels, cond, classes)


def _data_std(
  folder: str,
  autoencoder: dict[str, Json] | None,
  mean: Sequence[float],
  std: Sequence[float],
  *,
  latents: bool,
) -> float:
  """Returns the standard deviation of the data in the unit of the network."""
  shift, unit = 0.0, 1.0
  if latents != (autoencoder is not None):
    kinds = ("latents", "pixels") if autoencoder is not None else ("pixels", "latents")
    raise ValueError(
      f"folder={folder}: its network is trained on {kinds[0]}, and the data are {kinds[1]}"
    )
  if autoencoder is not None:
    coder = vae.from_config(autoencoder)
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
  folder: str, *, place: Callable[[Params], PyTree] | None = None
) -> Params:
  """Returns the weights of the network of a folder in float32, {"net": ...}.

  Args:
    folder: in the diffusers format, or hf://organization/name.
    place: shapes of the parameters -> their shardings; None for the host.

  Raises:
    UserError: a file is missing or damaged.
  """
  local = hub.local(folder)
  names = [name for name in fit.PREDICTORS if name in loading.configs(local)]
  part = os.path.join(local, names[0])
  part = part if os.path.isdir(part) else local
  net = loading.network(part)
  return {"net": weights_lib.parameters(part, net, place=place)}


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
