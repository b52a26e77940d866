"""Job `encode`: encodes the images of config.data as latents, and captions as text.

Each process writes its own files with its own devices. Files are written atomically and
finished ones are not written again, so that the job resumes where it was stopped.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import Dataset, _text_table, latents
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.fields import Count, Range
from sdiff_jax.io import file_io, records, resumable, storage
from sdiff_jax.io.progress import Progress
from sdiff_jax.io.snapshot import Snapshot
from sdiff_jax.pretrained.diffusers import loading, text_encoding
from sdiff_jax.pretrained.diffusers.text_encoding import TextEncoders
from sdiff_jax.pretrained.diffusers.vae import Autoencoder
from sdiff_jax.types import Array, Json, Params, UserError

# (uint8 images [n, H, W, C]) -> means and standard deviations, float32 [n, h, w, 2C]
Encode = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
  """How images become latents.

  Attributes:
    scale: "scm" for pixels in [-1, 1], "edm2" for pixels in [0, 1], "vae" for the factor
      of the autoencoder, which its networks are trained on, "pixels" for images as they
      are, without an autoencoder (see data/latents.py).
    batch_size: images of a batch, over the devices of a process.
    shard_size: number of images in a file.
    captions: "encoded" stores what the text encoders make of them; "tokens" stores tokens,
      which are encoded when they are read.
  """

  scale: latents.Scale = "scm"
  batch_size: Count = 16
  shard_size: Annotated[int, Range(1, 10_000_000)] = 4096
  captions: Literal["encoded", "tokens"] = "encoded"


@registry.register(
  "jobs",
  "encode",
  sections={"encode": Encoding},
  runtime=("encode",),
  creates_workdir=True,
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes latents.json and files of records, which the data set `latents` reads.

  Raises:
    UserError: a field is invalid, or the directory holds other latents.
  """
  section = config.encode
  source = registry.build("data", config.data.to_dict(), "config.data")
  experiments.check_images(source)
  mesh, local = experiments.mesh(config), sharding.local()
  with config_errors("config.encode"):
    sharding.check_batch(section.batch_size, local)
  vae, params = _autoencoder(config)
  captions, encoders = _captions(config, source)
  about = _about(config, source, vae, len(captions), encoders)
  files = latents.paths(workdir, about)
  _claim(workdir, about)
  if encoders is not None:
    _write_texts(workdir, captions, encoders, section)
  mine = range(jax.process_index(), len(files), jax.process_count())
  missing = [k for k in mine if not storage.exists(files[k])]
  encode: Encode = lambda images: images  # noqa: E731
  if vae is not None:
    encode = _encoder(vae, params, latents.VAE_MIN_PIXEL[section.scale], local)
  rows = {k: _rows(source, k, section.shard_size) for k in mine}
  num_encoded = sum(len(rows[k]) for k in missing)
  total, active = sum(map(len, rows.values())), jax.process_index() == 0
  start = time.perf_counter()
  with Progress(
    total, label="encode", unit="image", initial=total - num_encoded, active=active
  ) as progress:
    for k in missing:
      partial = os.path.join(workdir, f"encode-{k}.partial.npz")
      snapshot = Snapshot(partial, {**about, "file": k})
      moments, cond = _shard(
        source, encode, rows[k], section.batch_size, progress, snapshot
      )
      if captions:
        texts = [*map(_normalized, source.captions(np.array(rows[k])))]
        cond = {latents.CAPTION: np.searchsorted(captions, texts)}
      latents.write(files[k], moments, cond)
      snapshot.remove()
  sharding.all_processes(np.ones(1, bool), mesh)
  rate = num_encoded / (time.perf_counter() - start)
  speed = f" ({rate:.4g} images/s per process)" if num_encoded else ""
  return f"encoded {source.size} images in {len(files)} files{speed}: {workdir}"


def _autoencoder(
  config: ml_collections.ConfigDict,
) -> tuple[Autoencoder | None, Params]:
  """Returns the autoencoder and its weights, None for images that are not encoded.

  Raises:
    UserError: there is none, or there is one for images that are not encoded.
  """
  if config.encode.scale == latents.PIXELS:
    if config.vae:
      raise UserError(
        f"config.vae={config.vae}: leave it empty for config.encode.scale='pixels'"
      )
    return None, None
  if not config.vae:
    raise UserError("config.vae is empty: name the folder of an autoencoder")
  return loading.autoencoder(config.vae)


def _normalized(text: str) -> str:
  """Returns a caption without spaces at its ends, of which several are one."""
  return " ".join(text.split())


def _captions(
  config: ml_collections.ConfigDict, source: Dataset
) -> tuple[list[str], TextEncoders | None]:
  """Returns the different captions, sorted, and the encoders of texts.

  Returns:
    [] and None for images without captions.

  Raises:
    UserError: there is no text encoder for the captions, or it is not needed.
  """
  folder = config.text_encoder
  if source.captions is None:
    if folder:
      raise UserError(
        f"config.text_encoder={folder}: config.data has no captions; use the data set "
        "captions, or leave it empty"
      )
    return [], None
  if not folder:
    raise UserError(
      "config.text_encoder is empty: name a folder in the diffusers format, whose text "
      "encoders encode the captions of config.data"
    )
  texts = {_normalized(text) for text in source.captions(np.arange(source.size))}
  encoders = text_encoding.load(folder, config.encode.batch_size)
  if config.encode.captions == "encoded":
    encoders.encode(encoders.tokenize([""]))  # reads the weights before any work
  return sorted(texts | {""}), encoders


def _write_texts(
  workdir: str,
  captions: list[str],
  encoders: TextEncoders,
  section: ml_collections.ConfigDict,
) -> None:
  """Writes the files of the captions that are missing, those of this process.

  Raises:
    UserError: a file could not be written, or a caption is not finite in float16.
  """
  size = section.shard_size
  files = _text_table.paths(workdir, len(captions), size)
  for k in range(jax.process_index(), len(files), jax.process_count()):
    if not storage.exists(files[k]):
      tokens = encoders.tokenize(captions[k * size : (k + 1) * size])
      if section.captions == "tokens":
        _text_table.write(files[k], tokens)
        continue
      texts = encoders.encode(tokens)
      halves = {name: x.astype(_text_table.FLOAT) for name, x in texts.items()}
      if not all(np.isfinite(x).all() for x in halves.values()):
        raise UserError("the text encoder returned values that float16 does not hold")
      _text_table.write(files[k], halves)


def _about(
  config: ml_collections.ConfigDict,
  source: Dataset,
  vae: Autoencoder | None,
  texts: int,
  encoders: TextEncoders | None,
) -> dict[str, Json]:
  """Returns the content of latents.json.

  Raises:
    UserError: the factor of the autoencoder does not divide the sides of the images.
  """
  height, width, channels = source.shape
  if vae is not None and (height % vae.factor or width % vae.factor):
    raise UserError(
      f"config.data: images of {height} x {width}; {vae.factor}, the autoencoder's "
      "factor, must divide their sides"
    )
  shape = [height, width, channels]
  if vae is not None:
    shape = [height // vae.factor, width // vae.factor, 2 * vae.channels]
  about = {
    "size": source.size,
    "shape": shape,
    "classes": source.num_classes,
    "scale": config.encode.scale,
    "shard_size": config.encode.shard_size,
    "vae": config.vae,
    "data": config.data.to_dict(),
  }
  if vae is not None and config.encode.scale == "vae":
    about["moments"] = [vae.shift, 1 / vae.scaling]
  if encoders is not None:
    about |= {"texts": texts, "text_encoder": config.text_encoder}
    if config.encode.captions == "tokens":
      about["tokens"] = {k: x.shape[1:] for k, x in encoders.tokenize([""]).items()}
    else:
      about["text"] = encoders.shapes
  return file_io.as_json(about)


def _claim(workdir: str, about: dict[str, Json]) -> None:
  """Writes latents.json, or checks that the file that exists has the same content."""
  path = os.path.join(workdir, latents.ABOUT)
  if storage.lexists(path):
    stored = records.read(path, dict[str, Json], "choose another --workdir")
    if different := resumable.differences(stored, about):
      raise UserError(
        f"{workdir} holds other latents: {', '.join(different)}; choose another "
        "--workdir, or use the same values"
      )
    return
  if jax.process_index() == 0:
    file_io.write_json(path, about)


def _encoder(
  vae: Autoencoder, params: Params, low: float, local: jax.sharding.NamedSharding
) -> Encode:
  """Returns the encoder of pixels in [low, 1], on this process's devices."""
  everywhere = sharding.replicated(local.mesh)
  params = jax.device_put(params, everywhere)

  @functools.partial(jax.jit, in_shardings=(everywhere, local), out_shardings=local)
  @functools.partial(sharding.with_mesh, local.mesh)
  def encode(params: Params, images: Array) -> Array:
    images = jnp.broadcast_to(
      images, (*images.shape[:3], 3)
    )  # gray images have one channel
    x = images.astype(jnp.float32) * ((1 - low) / 255) + low
    return jnp.concatenate(vae.encode(params, x), axis=-1)

  return lambda images: np.asarray(encode(params, jax.device_put(images, local)))


def _rows(source: Dataset, k: int, shard_size: int) -> range:
  """Returns the indices of the images of file k."""
  return range(k * shard_size, min((k + 1) * shard_size, source.size))


def _shard(
  source: Dataset,
  encode: Encode,
  rows: range,
  batch_size: int,
  progress: Progress,
  snapshot: Snapshot,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns moments and conditions of images, encoded a full batch at a time."""
  # Those that an earlier run has encoded come first.
  stored = dict(snapshot.arrays)
  moments = [stored.pop("moments")] if stored else []
  conds = [stored] if moments else []
  progress.add(sum(map(len, moments)))

  def arrays() -> dict[str, np.ndarray]:
    joined = {name: np.concatenate([c[name] for c in conds]) for name in conds[0]}
    return {"moments": np.concatenate(moments), **joined}

  for first in range(sum(map(len, moments)), len(rows), batch_size):
    indices = np.array(rows[first : first + batch_size])
    filled = np.resize(indices, batch_size)
    images, cond = source[filled]
    encoded = encode(images)[: len(indices)]
    pixels = encoded.dtype == np.uint8
    moments.append(encoded if pixels else encoded.astype(latents.MOMENTS))
    conds.append({name: x[: len(indices)] for name, x in cond.items()})
    progress.add(len(indices))
    if not np.isfinite(moments[-1]).all():
      raise UserError("the autoencoder returned latents that are not finite in float16")
    snapshot.save(arrays)
  joined = arrays()
  return joined.pop("moments"), joined
