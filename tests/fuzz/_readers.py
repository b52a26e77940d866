"""Everything that the package reads from disks: valid inputs, and the calls.

A reader has files, by their paths below a folder, and a call with that folder.
"""

import functools
import gzip
import io
import json
import os
import pathlib
import pickle
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sdiff_jax import config as configs
from sdiff_jax import registry
from sdiff_jax.data import Dataset, class_cond, teacher_trajectories
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import training
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.io import resumable
from sdiff_jax.metrics.features import classifier
from sdiff_jax.metrics.statistics import reference_statistics
from sdiff_jax.pretrained import diffusion_policy, lerobot
from sdiff_jax.pretrained.diffusers import (
  dit_checkpoint,
  json_tokenizer,
  loading,
  lora_file,
  networks,
  prompts,
  tokenizer,
)
from sdiff_jax.pretrained.files import sharded, state_dict
from sdiff_jax.reports import loading as loading_of_runs
from sdiff_jax.reports import results
from sdiff_jax.training import checkpoints, metric_writer

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
Files = dict[str, bytes]


class Reader(NamedTuple):
  """Something that reads files.

  Attributes:
    files: returns the valid files.
    call: reads the files of a folder.
    share: number of inputs in relation to other readers; less for slow ones.
    names: files to damage; () for all.
  """

  files: Callable[[], Files]
  call: Callable[[str], Any]
  share: int = 4
  names: tuple[str, ...] = ()


class Canary:
  """An object whose pickle creates a file when it is loaded."""

  def __init__(self, module: str):
    self._module = module

  def __reduce__(self) -> tuple:
    command = f"touch {tempfile.gettempdir()}/canary"
    return (os.system if self._module == "os" else eval), (
      command if self._module == "os" else f"__import__('os').system({command!r})",
    )


# --- arrays and images -----------------------------------------------------------------


def _npz(compressed: bool = False, **arrays: Any) -> bytes:
  file = io.BytesIO()
  (np.savez_compressed if compressed else np.savez)(file, **arrays)
  return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def _rng() -> np.random.Generator:
  return np.random.default_rng(0)


def _images(n: int = 6, side: int = 8, channels: int = 3) -> np.ndarray:
  return _rng().integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def _picture(array: np.ndarray, form: str, **options: Any) -> bytes:
  file = io.BytesIO()
  Image.fromarray(array.squeeze()).save(file, form, **options)
  return file.getvalue()


def _folder() -> Files:
  images = _images()
  exif = Image.Exif()
  exif[0x0112] = 6
  return {
    "a/0.png": _picture(images[0], "PNG"),
    "a/1.jpg": _picture(images[1], "JPEG", exif=exif),
    "b/2.webp": _picture(images[2], "WEBP"),
    "b/4.png": _picture(_images(channels=1)[4], "PNG"),
  }


def _edm_folder() -> Files:
  images = _images()
  files = {f"00000/img{k}.png": _picture(x, "PNG") for k, x in enumerate(images)}
  labels = [[name, k % 3] for k, name in enumerate(files)]
  return files | {"dataset.json": json.dumps({"labels": labels}).encode()}


def _idx(array: np.ndarray) -> bytes:
  sizes = struct.pack(f">{array.ndim}I", *array.shape)
  return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def _idx_files(packed: bool) -> Files:
  arrays = {
    "train-images-idx3-ubyte": _idx(_images(channels=1)[..., 0]),
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


@functools.cache
def _stored(make: Callable[[str], None]) -> Files:
  """Returns the files that a function writes into a folder."""
  with tempfile.TemporaryDirectory() as folder:
    make(folder)
    root = pathlib.Path(folder)
    return {
      str(path.relative_to(root)): path.read_bytes()
      for path in sorted(root.rglob("*"))
      if path.is_file()
    }


def _write_latents(folder: str) -> None:
  from sdiff_jax.data import latents

  about = {"size": 7, "shape": [4, 6, 8], "scale": "scm", "classes": 3, "shard_size": 4}
  pathlib.Path(folder, "latents.json").write_text(json.dumps(about))
  moments = np.abs(_rng().standard_normal((7, 4, 6, 8))).astype(np.float16)
  for k, path in enumerate(latents.paths(folder, about)):
    rows = slice(4 * k, 4 * k + 4)
    latents.write(path, moments[rows], {"label": np.arange(7)[rows] % 3})


def _write_text_latents(folder: str) -> None:
  """Writes latents with the numbers of their captions, and the captions."""
  from sdiff_jax.data import _text_table, latents

  about = {"size": 7, "shape": [4, 6, 8], "scale": "vae", "classes": 0, "shard_size": 4}
  about |= {"texts": 3, "text": {"text": [5, 2]}, "moments": [0.0, 5.0]}
  pathlib.Path(folder, "latents.json").write_text(json.dumps(about))
  moments = np.abs(_rng().standard_normal((7, 4, 6, 8))).astype(np.float16)
  for k, path in enumerate(latents.paths(folder, about)):
    rows = slice(4 * k, 4 * k + 4)
    latents.write(path, moments[rows], {"caption": np.arange(7)[rows] % 3})
  texts = {"text": _rng().standard_normal((3, 5, 2))}
  _text_table.write(*_text_table.paths(folder, 3, 4), texts)


def _tars() -> Files:
  """Returns a tar of images with classes."""
  tar = io.BytesIO()
  with tarfile.open(fileobj=tar, mode="w") as archive:
    for k, image in enumerate(_images(3)):
      for name, data in ((f"{k}.png", _picture(image, "PNG")), (f"{k}.cls", b"%d" % k)):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
  return {"a.tar": tar.getvalue()}


def _parquet() -> Files:
  """Returns two files of images with classes, in groups of two rows."""
  import pyarrow as pa
  from pyarrow import parquet

  def packed(rows: range, **options: Any) -> bytes:
    images = [
      {"bytes": _picture(_images()[k], "PNG"), "path": f"{k}.png"} for k in rows
    ]
    table = pa.table({"image": images, "label": [k % 3 for k in rows]})
    file = io.BytesIO()
    parquet.write_table(table, file, row_group_size=2, **options)
    return file.getvalue()

  return {
    "train-0.parquet": packed(range(4)),
    "train-1.parquet": packed(range(4, 6), compression="zstd", use_dictionary=False),
  }


def _captioned() -> Files:
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


def _trajectories() -> Files:
  about = {"size": 3, "grid": [1.5, 0.5, 0.0], "shape": [2, 4], "sigma_d": 0.5}
  about |= {"noise": False, "evaluations": 6, "flops": 60.0, "data": {}, "settings": {}}
  arrays = {"states": _rng().standard_normal((3, 3, 2, 4)).astype(np.float32)}
  arrays |= {"indices": np.arange(3), "cond_label": np.arange(3, dtype=np.int32)}
  files = {"trajectories.json": json.dumps(about).encode()}
  return files | {"states-00000000-p0.npz": _npz(**arrays)}


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
      for k, image in enumerate(_images(4)):
        file = io.BytesIO(_picture(image, "PNG"))
        yield k, {"image": file, "label": k % 3}

  Tiny(data_dir=folder, file_format="array_record").download_and_prepare()


# --- episodes --------------------------------------------------------------------------


def _episodes() -> dict[str, np.ndarray]:
  rng = _rng()
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
        values = _rng().normal(size=(20, d))
        packed = {"compression": "gzip"} if k else {}
        file.create_dataset(f"data/demo_{k}/obs/{name}", data=values, **packed)
      file[f"data/demo_{k}/actions"] = _rng().normal(size=(20, 7))


def _write_zarr(folder: str) -> None:
  import numcodecs
  import zarr

  episodes = _episodes()
  arrays = {"data/keypoint": _rng().normal(size=(60, 9, 2)).astype(np.float32)}
  arrays |= {"data/state": episodes["state"], "data/action": episodes["action"]}
  arrays |= {"meta/episode_ends": episodes["episode_ends"]}
  group = zarr.open_group(folder, mode="a", zarr_format=2)
  blosc = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.SHUFFLE)
  for name, x in arrays.items():
    chunks = (25, *x.shape[1:])
    options = {"chunks": chunks, "dtype": x.dtype, "compressors": blosc}
    group.create_array(name, shape=x.shape, **options)[:] = x


def _kitchen() -> Files:
  rng, T = _rng(), 20
  mask = np.ones((3, T), np.float32)
  mask[1, 17:] = 0
  return {
    "observations_seq.npy": _npy(rng.normal(size=(3, T, 60))),
    "actions_seq.npy": _npy(rng.normal(size=(3, T, 9))),
    "existence_mask.npy": _npy(mask),
  }


def _logs() -> Files:
  sizes = (30, 29, 9, 1, 2, 3)
  records = _rng().normal(size=(1000, 1 + sum(sizes) + 6)).astype("<f4")
  log = struct.pack("<7i", *sizes, 4) + b"name" + records.tobytes()
  return {"a_task/1.mjl": log, "b_task/2.mjl": log}


# --- weights ---------------------------------------------------------------------------


def _fixture(*names: str) -> Callable[[], Files]:
  def files() -> Files:
    return {pathlib.Path(name).name: (FIXTURES / name).read_bytes() for name in names}

  return files


def _tree(name: str, *without: str) -> Callable[[], Files]:
  def files() -> Files:
    root = FIXTURES / name
    return {
      str(path.relative_to(root)): path.read_bytes()
      for path in sorted(root.rglob("*"))
      if path.is_file() and not any(part in str(path) for part in without)
    }

  return files


def _tensors(name: str) -> Callable[[str], Any]:
  return lambda folder: state_dict.read(os.path.join(folder, name))


def _shards() -> Files:
  """Returns an index and two files of weights."""
  files = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
  index = {"metadata": {"total_size": 40}, "weight_map": {"a": files[0], "b": files[1]}}
  return {
    "model.safetensors.index.json": json.dumps(index).encode(),
    files[0]: _safetensors({"a": np.ones((3, 2))}),
    files[1]: _safetensors({"b": np.zeros(4)}),
  }


def _read_shards(folder: str) -> None:
  tensors = sharded.stored(os.path.join(folder, "model.safetensors.index.json"))
  like = {name: np.zeros(x.shape[::-1]) for name, x in tensors.items()}
  state_dict.match_params(tensors, like, lambda keys: keys[0])


@functools.cache
def _unet() -> Any:
  net = loading.network(str(FIXTURES / "tiny-sd2" / "unet"))
  return networks.abstract_params(net.init, dtype="float32")


def _read_lora(folder: str) -> None:
  lora_file.load(os.path.join(folder, lora_file.FILE), _unet(), part="unet")


def _flow_scheduler() -> Files:
  config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
  config |= {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
  config |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}
  return {"scheduler_config.json": json.dumps(config).encode()}


def _canaries() -> Files:
  """Returns files of weights that carry code."""
  files = {
    f"{protocol}.pkl": pickle.dumps({"ema": Canary("os")}, protocol)
    for protocol in range(6)
  }
  files["eval.pkl"] = pickle.dumps({"state_dict": Canary("eval")})
  inside = io.BytesIO()
  with zipfile.ZipFile(inside, "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({"w": Canary("os")}))
    archive.writestr("archive/version", "3")
  objects = np.array([Canary("os")], dtype=object)
  array = io.BytesIO()
  np.save(array, objects, allow_pickle=True)
  archive_of_objects = io.BytesIO()
  with zipfile.ZipFile(archive_of_objects, "w") as archive:
    archive.writestr("arr_0.npy", array.getvalue())
  files |= {"zip.pt": inside.getvalue(), "objects.npz": archive_of_objects.getvalue()}
  return files


def _all_weights(folder: str) -> None:
  """Reads all files of a folder as weights, and raises the last error."""
  from sdiff_jax.types import UserError

  last: UserError | None = None
  for name in sorted(os.listdir(folder)):
    try:
      state_dict.read(os.path.join(folder, name))
    except UserError as error:
      last = error
  if last is not None:
    raise last


def _lerobot() -> Files:
  with np.load(FIXTURES / "dp_unet1d.npz") as arrays:
    tensors = {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}
  named = {}
  for name, x in tensors.items():
    name = name.replace("blocks.0.block", "conv1.block")
    name = name.replace("blocks.1.block", "conv2.block").replace(".2.conv.", ".2.")
    named[f"diffusion.unet.{name}"] = x
  for kind, size in (("min", -1.0), ("max", 1.0)):
    for feature, n in (("observation_state", 4), ("observation_environment_state", 16)):
      named[f"normalize_inputs.buffer_{feature}.{kind}"] = np.full(n, size, np.float32)
    named[f"unnormalize_outputs.buffer_action.{kind}"] = np.full(2, size, np.float32)
  config = {
    "type": "diffusion",
    "n_obs_steps": 2,
    "horizon": 16,
    "n_action_steps": 8,
    "input_features": {
      "observation.state": {"type": "STATE", "shape": [4]},
      "observation.environment_state": {"type": "ENV", "shape": [16]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [2]}},
    "normalization_mapping": dict.fromkeys(("STATE", "ENV", "ACTION"), "MIN_MAX"),
    "down_dims": [16, 32, 48],
    "diffusion_step_embed_dim": 32,
    "noise_scheduler_type": "DDIM",
    "num_inference_steps": 10,
  }
  return {
    "model.safetensors": _safetensors(named),
    "config.json": json.dumps(config).encode(),
  }


def _safetensors(tensors: dict[str, np.ndarray]) -> bytes:
  header, data = {}, b""
  for name, x in tensors.items():
    x = np.ascontiguousarray(x, np.float32)
    offsets = [len(data), len(data) + x.nbytes]
    header[name] = {"dtype": "F32", "shape": [*x.shape], "data_offsets": offsets}
    data += x.tobytes()
  text = json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + data


def _policy() -> Files:
  with np.load(FIXTURES / "dp_unet1d.npz") as arrays:
    tensors = {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}
  file = {f"ema_model.model.{k}": v for k, v in tensors.items()}
  for name, n in (("obs", 20), ("action", 2)):
    head = f"ema_model.normalizer.params_dict.{name}"
    file |= {f"{head}.scale": np.ones(n), f"{head}.offset": np.zeros(n)}
  return {"policy.safetensors": _safetensors(file)}


# --- work directories ------------------------------------------------------------------


@functools.cache
def _run() -> Files:
  config = json.dumps(configs.base().to_dict()).encode()
  metrics = [{"step": k, "loss": 1 / k, "gradient_norm": 1.0} for k in (1, 2, 3)]
  row = {"model": "teacher", "sampler": "heun/16", "kind": "model", "images": 5000}
  row |= {"evaluations": 31, "frechet": 1.2, "precision": 0.9, "recall": 0.5}
  row |= {"images_per_second": 4712.25, "compute": 1.0, "grid": "heun-16.png"}
  training = {
    "steps": 3,
    "images": 48,
    "seconds": 2.5,
    "parameters": 1000,
    "flops": 1e9,
  }
  return {
    "config.json": config,
    "metrics.jsonl": "".join(json.dumps(m) + "\n" for m in metrics).encode(),
    "training.json": json.dumps(training).encode(),
    "evaluate/results.json": json.dumps([row]).encode(),
    "rollout/results.json": json.dumps([]).encode(),
    "command.txt": b"python -m sdiff_jax.main --config=configs/digits_diffusion.py\n",
  }


def _read_run(folder: str) -> None:
  """Reads everything of a work directory that does not need a checkpoint."""
  config = workdir_lib.read(folder)
  configs.validate(config)
  workdir_lib.stored_normalizer(folder)


def _write_checkpoint(folder: str) -> None:
  """Writes a work directory with random weights, as the job `convert` does."""
  import jax

  config = configs.base()
  config.model.update(width=16, depth=1)
  experiment = experiments.build(config)
  params = experiment.network.init(jax.random.key(0))
  training.save_initial(config, experiment, folder, params)


def _trained(folder: str) -> None:
  workdir_lib.trained(workdir_lib.read(folder), folder)


def _report(folder: str) -> None:
  """Reads a run as a report does: what is damaged is named, the rest is shown."""
  run = loading_of_runs.load(folder)
  results.table(results.distinct(run.rows))


def _settings(folder: str) -> None:
  output = resumable.Output(folder, "samples")
  output.claim({"steps": 3, "name": "x"}, write=False)


def _statistics(name: str) -> Callable[[str], Any]:
  return lambda folder: reference_statistics.read(os.path.join(folder, name), "fid")


def _edm2_statistics() -> Files:
  mean, cov = np.arange(4.0), np.eye(4)
  return {"x.pkl": pickle.dumps({"fid": {"mu": mean, "sigma": cov}})}


def _normalizer(folder: str) -> None:
  workdir_lib.stored_normalizer(folder)


def _normalizer_files() -> Files:
  maps = {
    f"{name}.{part}": np.ones(n, np.float32)
    for name, n in (("observation", 4), ("action", 2))
    for part in ("centre", "scale")
  }
  numbers = {"steps": np.array(2), "shape": np.array([16, 2]), "std": np.array(1.0)}
  return {"normalizer.npz": _npz(**maps, **numbers)}


def _captions() -> Files:
  annotations = [{"image_id": k, "id": k, "caption": f"a cat {k}"} for k in range(3)]
  return {"x.json": json.dumps({"annotations": annotations}).encode()}


def _checkpoints(folder: str) -> None:
  checkpoints.newest(folder)
  metric_writer.read_metrics(folder)


SD2 = ("safetensors", "legacy", "transformers5", "expected")
READERS: dict[str, Reader] = {
  "data npz": Reader(
    lambda: {"x.npz": _npz(arr_0=_images(), arr_1=np.arange(6))},
    _take("npz", "path", "x.npz"),
    8,
  ),
  "data shards": Reader(_tars, _take("shards", "dir", image_size=8)),
  "data parquet": Reader(_parquet, _take("parquet", "dir", image_size=8), 8),
  "data npz in parts": Reader(
    lambda: {
      "x/0.npz": _npz(images=_images()[:4]),
      "x/1.npz": _npz(images=_images()[4:]),
      "x/index.npz": _npz(
        names=["0.npz", "1.npz"],
        shard=np.arange(6) // 4,
        row=np.arange(6) % 4,
        labels=np.arange(6),
        shape=_images().shape[1:],
      ),
    },
    _take("npz", "path", "x"),
  ),
  "data npz compressed": Reader(
    lambda: {"x.npz": _npz(True, images=_images(), labels=np.arange(6))},
    _take("npz", "path", "x.npz"),
  ),
  "data idx": Reader(lambda: _idx_files(False), _take("idx", "dir"), 8),
  "data idx gz": Reader(lambda: _idx_files(True), _take("idx", "dir"), 6),
  "data folder": Reader(_folder, _take("folder", "dir", image_size=8), 12),
  "data folder dataset.json": Reader(
    _edm_folder, _take("folder", "dir", image_size=8), 8
  ),
  "data latents": Reader(
    lambda: _stored(_write_latents), _take("latents", "dir", scale="scm"), 8
  ),
  "data latents with texts": Reader(
    lambda: _stored(_write_text_latents), _take("latents", "dir", scale="vae"), 8
  ),
  "data captions": Reader(_captioned, _take("captions", "dir", image_size=8), 8),
  "data teacher_trajectories": Reader(_trajectories, _read_trajectories, 8),
  "data tfds": Reader(
    lambda: _stored(_write_tfds), _take("tfds", "dir", tfds_name="tiny"), 4
  ),
  "episodes npz": Reader(
    lambda: {"x.npz": _npz(**_episodes())}, _take("trajectories", "path", "x.npz"), 6
  ),
  "episodes h5": Reader(
    lambda: _stored(_write_h5), _take("trajectories", "path", "x.hdf5"), 6
  ),
  "episodes zarr": Reader(
    lambda: _stored(_write_zarr), _take("trajectories", "path"), 6
  ),
  "episodes kitchen": Reader(_kitchen, _take("trajectories", "path"), 4),
  "episodes logs": Reader(_logs, _take("trajectories", "path"), 4),
  "weights safetensors": Reader(
    _fixture("weights/file.safetensors"), _tensors("file.safetensors"), 10
  ),
  "weights old pt": Reader(_fixture("weights/old.pt"), _tensors("old.pt"), 10),
  "weights zip pt": Reader(_fixture("weights/zip.pt"), _tensors("zip.pt"), 10),
  "weights edm": Reader(_fixture("weights/edm.pkl"), _tensors("edm.pkl"), 10),
  "weights dit": Reader(
    _fixture("weights/dit.pt"),
    lambda folder: dit_checkpoint.load(os.path.join(folder, "dit.pt")),
    3,
  ),
  "weights npz": Reader(
    lambda: {"x.npz": _npz(a=np.ones((3, 2)), b=np.zeros(4))}, _tensors("x.npz"), 6
  ),
  "weights shards": Reader(_shards, _read_shards, 10),
  "weights lora": Reader(_fixture(f"tiny-lora/{lora_file.FILE}"), _read_lora, 4),
  "weights canaries": Reader(_canaries, _all_weights, 6),
  "lerobot": Reader(_lerobot, lerobot.load, 3),
  "lerobot config": Reader(_lerobot, lerobot.load, 3, ("config.json",)),
  "diffusion policy": Reader(
    _policy,
    lambda folder: diffusion_policy.load(os.path.join(folder, "policy.safetensors")),
    2,
  ),
  "diffusers configs": Reader(
    _tree("tiny-sd2", *SD2),
    lambda folder: loading.abstract(loading.configs(folder)),
    2,
    (
      *("model_index.json", "unet/config.json", "vae/config.json"),
      *("text_encoder/config.json", "scheduler/scheduler_config.json"),
    ),
  ),
  "diffusers sd3 configs": Reader(
    _tree("tiny-sd3", "safetensors", "expected"),
    lambda folder: loading.abstract(loading.configs(folder)),
    1,
    (
      *("model_index.json", "transformer/config.json", "vae/config.json"),
      *("text_encoder_2/config.json", "text_encoder_3/config.json"),
    ),
  ),
  "diffusers sdxl configs": Reader(
    _tree("tiny-sdxl", "safetensors", "expected"),
    lambda folder: loading.abstract(loading.configs(folder)),
    1,
    ("model_index.json", "unet/config.json", "text_encoder_2/config.json"),
  ),
  "diffusers sana configs": Reader(
    _tree("tiny-sana", "safetensors", "expected"),
    lambda folder: loading.abstract(loading.configs(folder)),
    1,
    (
      *("model_index.json", "transformer/config.json", "vae/config.json"),
      *("text_encoder/config.json", "scheduler/scheduler_config.json"),
    ),
  ),
  "diffusers flux": Reader(_tree("tiny-flux", "expected"), loading.load, 1),
  "t5 tokenizer": Reader(
    _tree("tiny-flux/tokenizer_2"), lambda folder: json_tokenizer.load(folder, 8), 4
  ),
  "diffusers church": Reader(_tree("tiny-ddpm-church", "expected"), loading.load, 1),
  "autoencoder": Reader(_tree("tiny-sd2/vae"), loading.autoencoder, 1),
  "scheduler": Reader(
    _fixture("tiny-sd2/scheduler/scheduler_config.json"), loading.schedule, 8
  ),
  "flow scheduler": Reader(_flow_scheduler, loading.schedule, 6),
  "tokenizer": Reader(_tree("tiny-sd2/tokenizer"), tokenizer.load, 8),
  "captions": Reader(
    _captions, lambda folder: prompts.read(os.path.join(folder, "x.json")), 4
  ),
  "work directory": Reader(_run, _read_run, 10, ("config.json",)),
  "checkpoint": Reader(lambda: _stored(_write_checkpoint), _trained, 1),
  "report": Reader(_run, _report, 10),
  "metrics": Reader(_run, _checkpoints, 2, ("metrics.jsonl",)),
  "settings": Reader(
    lambda: {
      "settings.json": json.dumps({"steps": 3, "name": "x"}).encode(),
      "0.npz": b"",
    },
    _settings,
    4,
  ),
  "normalizer": Reader(_normalizer_files, _normalizer, 6),
  "statistics npz": Reader(
    lambda: {"x.npz": _npz(mu=np.arange(4.0), sigma=np.eye(4))}, _statistics("x.npz"), 6
  ),
  "statistics pkl": Reader(_edm2_statistics, _statistics("x.pkl"), 6),
  "classifier": Reader(
    lambda: {
      "x.npz": (pathlib.Path(classifier.__file__).with_name("digits.npz").read_bytes())
    },
    lambda folder: classifier.load(os.path.join(folder, "x.npz")),
    2,
  ),
}
