"""Data sets and episodes: valid files, and the calls that read them."""

import functools
import gzip
import io
import json
import os
import pathlib
import struct
import tarfile
from collections.abc import Callable
from typing import Any

import _valid_files as valid
import numpy as np
from PIL import Image

from sdiff_jax import registry
from sdiff_jax.data import Dataset, class_cond, teacher_trajectories


def _folder() -> valid.Files:
  images = valid.images()
  exif = Image.Exif()
  exif[0x0112] = 6
  return {
    "a/0.png": valid.picture(images[0], "PNG"),
    "a/1.jpg": valid.picture(images[1], "JPEG", exif=exif),
    "b/2.webp": valid.picture(images[2], "WEBP"),
    "b/4.png": valid.picture(valid.images(channels=1)[4], "PNG"),
  }


def _edm_folder() -> valid.Files:
  images = valid.images()
  files = {f"00000/img{k}.png": valid.picture(x, "PNG") for k, x in enumerate(images)}
  labels = [[name, k % 3] for k, name in enumerate(files)]
  return files | {"dataset.json": json.dumps({"labels": labels}).encode()}


def _idx(array: np.ndarray) -> bytes:
  sizes = struct.pack(f">{array.ndim}I", *array.shape)
  return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def _idx_files(packed: bool) -> valid.Files:
  arrays = {
    "train-images-idx3-ubyte": _idx(valid.images(channels=1)[..., 0]),
    "train-labels-idx1-ubyte": _idx(np.arange(6, dtype=np.uint8)),
  }
  if packed:
    return {f"{k}.gz": gzip.compress(v, mtime=0) for k, v in arrays.items()}
  return arrays


def _take(kind: str, field: str, name: str = "", **options: Any) -> Callable:
  """Returns what builds a data set and takes its first and last samples."""

  def call(folder: str) -> None:
    path = os.path.join(folder, name) if name else folder
    section = {"name": kind, field: path, **options}
    dataset = registry.build("data", section, "config.data")
    _samples(dataset)

  return call


def _samples(dataset: Dataset) -> None:
  size = dataset.size
  samples, _ = dataset[np.unique([0, size // 2, size - 1])]
  seeds = np.arange(len(samples))
  np.asarray(dataset.codec.encode(samples, 0.5, noise_seeds=seeds))


def _write_latents(folder: str) -> None:
  from sdiff_jax.data import latents

  about = {"size": 7, "shape": [4, 6, 8], "scale": "scm", "classes": 3, "shard_size": 4}
  pathlib.Path(folder, "latents.json").write_text(json.dumps(about))
  moments = np.abs(valid.rng().standard_normal((7, 4, 6, 8))).astype(np.float16)
  for k, path in enumerate(latents.paths(folder, about)):
    rows = slice(4 * k, 4 * k + 4)
    latents.write(path, moments[rows], {"label": np.arange(7)[rows] % 3})


def _write_text_latents(folder: str, *, tokens: bool = False) -> None:
  """Writes latents with the numbers of their captions, and the captions."""
  from sdiff_jax.data import _text_table, latents

  about = {"size": 7, "shape": [4, 6, 8], "scale": "vae", "classes": 0, "shard_size": 4}
  about |= {"texts": 3, "moments": [0.0, 5.0]}
  about |= {"tokens": {"tokens": [5]}} if tokens else {"text": {"text": [5, 2]}}
  pathlib.Path(folder, "latents.json").write_text(json.dumps(about))
  moments = np.abs(valid.rng().standard_normal((7, 4, 6, 8))).astype(np.float16)
  for k, path in enumerate(latents.paths(folder, about)):
    rows = slice(4 * k, 4 * k + 4)
    latents.write(path, moments[rows], {"caption": np.arange(7)[rows] % 3})
  texts = {"text": valid.rng().standard_normal((3, 5, 2))}
  texts = {"tokens": np.arange(15).reshape(3, 5)} if tokens else texts
  _text_table.write(*_text_table.paths(folder, 3, 4), texts)


def _tars() -> valid.Files:
  """Returns a tar of images with classes."""
  tar = io.BytesIO()
  with tarfile.open(fileobj=tar, mode="w") as archive:
    for k, image in enumerate(valid.images(3)):
      for name, data in (
        (f"{k}.png", valid.picture(image, "PNG")),
        (f"{k}.cls", b"%d" % k),
      ):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
  return {"a.tar": tar.getvalue()}


def _parquet() -> valid.Files:
  """Returns two files of images with classes, in groups of two rows."""
  import pyarrow as pa
  from pyarrow import parquet

  def packed(rows: range, **options: Any) -> bytes:
    images = [
      {"bytes": valid.picture(valid.images()[k], "PNG"), "path": f"{k}.png"}
      for k in rows
    ]
    table = pa.table({"image": images, "label": [k % 3 for k in rows]})
    file = io.BytesIO()
    parquet.write_table(table, file, row_group_size=2, **options)
    return file.getvalue()

  return {
    "train-0.parquet": packed(range(4)),
    "train-1.parquet": packed(range(4, 6), compression="zstd", use_dictionary=False),
  }


def _captioned() -> valid.Files:
  """Returns images with a list of captions, and the same in a tar."""
  images = {k: v for k, v in _folder().items() if k.endswith(".png")}
  names = [f"{k}.png" for k in range(len(images))]
  files = dict(zip(names, images.values(), strict=True))
  lines = [json.dumps({"file_name": name, "text": "a cat"}) for name in names]
  tar = io.BytesIO()
  with tarfile.open(fileobj=tar, mode="w") as archive:
    for name, data in (*files.items(), *((f"{n[:-4]}.txt", b"a dog") for n in names)):
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  return files | {"m.jsonl": "\n".join(lines).encode(), "x.tar": tar.getvalue()}


def _trajectories() -> valid.Files:
  about = {"size": 3, "grid": [1.5, 0.5, 0.0], "shape": [2, 4], "sigma_d": 0.5}
  about |= {"noise": False, "evaluations": 6, "flops": 60.0, "data": {}, "settings": {}}
  arrays = {"states": valid.rng().standard_normal((3, 3, 2, 4)).astype(np.float32)}
  arrays |= {"indices": np.arange(3), "cond_label": np.arange(3, dtype=np.int32)}
  files = {"trajectories.json": json.dumps(about).encode()}
  return files | {"states-00000000-p0.npz": valid.npz(**arrays)}


def _read_trajectories(folder: str) -> None:
  dataset = teacher_trajectories.read(folder, class_cond(3), to_data=False)
  dataset.codec.encode(dataset[np.array([0, dataset.size - 1])][0], 0.5)


def _write_tfds(folder: str) -> None:
  import tensorflow_datasets as tfds

  class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
      features = {
        "image": tfds.features.Image(shape=(8, 8, 3)),
        "label": tfds.features.ClassLabel(num_classes=3),
      }
      described = tfds.features.FeaturesDict(features)
      return tfds.core.DatasetInfo(builder=self, features=described)

    def _split_generators(self, manager: Any) -> Any:
      return {"train": self._generate_examples()}

    def _generate_examples(self) -> Any:
      for k, image in enumerate(valid.images(4)):
        file = io.BytesIO(valid.picture(image, "PNG"))
        yield k, {"image": file, "label": k % 3}

  Tiny(data_dir=folder, file_format="array_record").download_and_prepare()


def _episodes() -> dict[str, np.ndarray]:
  rng = valid.rng()
  return {
    "state": rng.normal(size=(60, 5)).astype(np.float32),
    "action": rng.normal(size=(60, 2)).astype(np.float32),
    "episode_ends": np.array([20, 40, 60]),
  }


def _write_h5(folder: str) -> None:
  import h5py

  from sdiff_jax.data.episodes import robomimic

  sizes = dict(zip(robomimic.KEYS, (14, 3, 4, 2), strict=True))
  with h5py.File(os.path.join(folder, "x.hdf5"), "w") as file:
    for k in range(2):
      for name, d in sizes.items():
        values = valid.rng().normal(size=(20, d))
        packed = {"compression": "gzip"} if k else {}
        file.create_dataset(f"data/demo_{k}/obs/{name}", data=values, **packed)
      file[f"data/demo_{k}/actions"] = valid.rng().normal(size=(20, 7))


def _write_zarr(folder: str) -> None:
  import numcodecs
  import zarr

  episodes = _episodes()
  arrays = {"data/keypoint": valid.rng().normal(size=(60, 9, 2)).astype(np.float32)}
  arrays |= {"data/state": episodes["state"], "data/action": episodes["action"]}
  arrays |= {"meta/episode_ends": episodes["episode_ends"]}
  group = zarr.open_group(folder, mode="a", zarr_format=2)
  blosc = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.SHUFFLE)
  for name, x in arrays.items():
    chunks = (25, *x.shape[1:])
    options = {"chunks": chunks, "dtype": x.dtype, "compressors": blosc}
    group.create_array(name, shape=x.shape, **options)[:] = x


def _kitchen() -> valid.Files:
  rng, T = valid.rng(), 20
  mask = np.ones((3, T), np.float32)
  mask[1, 17:] = 0
  return {
    "observations_seq.npy": valid.npy(rng.normal(size=(3, T, 60))),
    "actions_seq.npy": valid.npy(rng.normal(size=(3, T, 9))),
    "existence_mask.npy": valid.npy(mask),
  }


def _logs() -> valid.Files:
  sizes = (30, 29, 9, 1, 2, 3)
  records = valid.rng().normal(size=(1000, 1 + sum(sizes) + 6)).astype("<f4")
  log = struct.pack("<7i", *sizes, 4) + b"name" + records.tobytes()
  return {"a_task/1.mjl": log, "b_task/2.mjl": log}


READERS: dict[str, valid.Reader] = {
  "data npz": valid.Reader(
    lambda: {"x.npz": valid.npz(arr_0=valid.images(), arr_1=np.arange(6))},
    _take("npz", "path", "x.npz"),
    8,
  ),
  "data shards": valid.Reader(_tars, _take("shards", "dir", image_size=8)),
  "data parquet": valid.Reader(_parquet, _take("parquet", "dir", image_size=8), 8),
  "data npz in parts": valid.Reader(
    lambda: {
      "x/0.npz": valid.npz(images=valid.images()[:4]),
      "x/1.npz": valid.npz(images=valid.images()[4:]),
      "x/index.npz": valid.npz(
        names=["0.npz", "1.npz"],
        shard=np.arange(6) // 4,
        row=np.arange(6) % 4,
        labels=np.arange(6),
        shape=valid.images().shape[1:],
      ),
    },
    _take("npz", "path", "x"),
  ),
  "data npz compressed": valid.Reader(
    lambda: {"x.npz": valid.npz(True, images=valid.images(), labels=np.arange(6))},
    _take("npz", "path", "x.npz"),
  ),
  "data idx": valid.Reader(lambda: _idx_files(False), _take("idx", "dir"), 8),
  "data idx gz": valid.Reader(lambda: _idx_files(True), _take("idx", "dir"), 6),
  "data folder": valid.Reader(_folder, _take("folder", "dir", image_size=8), 12),
  "data folder dataset.json": valid.Reader(
    _edm_folder, _take("folder", "dir", image_size=8), 8
  ),
  "data latents": valid.Reader(
    lambda: valid.stored(_write_latents), _take("latents", "dir", scale="scm"), 8
  ),
  "data latents with texts": valid.Reader(
    lambda: valid.stored(_write_text_latents), _take("latents", "dir", scale="vae"), 8
  ),
  "data latents with tokens": valid.Reader(
    lambda: valid.stored(functools.partial(_write_text_latents, tokens=True)),
    _take("latents", "dir", scale="vae"),
    8,
  ),
  "data captions": valid.Reader(_captioned, _take("captions", "dir", image_size=8), 8),
  "data teacher_trajectories": valid.Reader(_trajectories, _read_trajectories, 8),
  "data tfds": valid.Reader(
    lambda: valid.stored(_write_tfds), _take("tfds", "dir", tfds_name="tiny"), 4
  ),
  "episodes npz": valid.Reader(
    lambda: {"x.npz": valid.npz(**_episodes())},
    _take("trajectories", "path", "x.npz"),
    6,
  ),
  "episodes h5": valid.Reader(
    lambda: valid.stored(_write_h5), _take("trajectories", "path", "x.hdf5"), 6
  ),
  "episodes zarr": valid.Reader(
    lambda: valid.stored(_write_zarr), _take("trajectories", "path"), 6
  ),
  "episodes kitchen": valid.Reader(_kitchen, _take("trajectories", "path"), 4),
  "episodes logs": valid.Reader(_logs, _take("trajectories", "path"), 4),
}
