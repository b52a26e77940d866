"""Nothing that a file says is executed: canaries for every reader of foreign files.

Three canaries are planted: a program `gs` on the PATH, which Pillow starts for EPS files;
a module in the current folder, which an import would run; and pickles that call the
program. Each leaves a trace when it is run.
"""

import io
import json
import pathlib
import pickle
import subprocess
import zipfile

import numpy as np
import pytest

from sdiff_jax.data import folder, npz, parquet, tfds
from sdiff_jax.data.episodes import normalizer, reader
from sdiff_jax.io import array_io, image_io, resumable
from sdiff_jax.io.snapshot import Snapshot
from sdiff_jax.metrics.features import classifier
from sdiff_jax.metrics.statistics import reference_statistics
from sdiff_jax.pretrained import diffusion_policy, lerobot
from sdiff_jax.pretrained.files import state_dict
from sdiff_jax.types import UserError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
REFUSED = (UserError, ValueError, OSError, ImportError)


class Harmful:
  """An object whose pickle starts the program `gs`."""

  def __reduce__(self):
    return subprocess.call, (["gs"],)


@pytest.fixture
def trace(tmp_path, monkeypatch):
  """Plants the canaries; the path that each of them creates."""
  trace = tmp_path / "trace"
  program = tmp_path / "bin" / "gs"
  program.parent.mkdir()
  program.write_text(f"#!/bin/sh\ntouch {trace}\n")
  program.chmod(0o755)
  monkeypatch.setenv("PATH", str(program.parent), prepend=":")
  (tmp_path / "canary.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  return trace


def npy() -> bytes:
  """Returns an .npy file of an object that means harm."""
  buffer = io.BytesIO()
  np.save(buffer, np.array([Harmful()], object), allow_pickle=True)
  return buffer.getvalue()


def archive(*names: str) -> bytes:
  """Returns an .npz file with such objects."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as file:
    for name in names:
      file.writestr(f"{name}.npy", npy())
  return buffer.getvalue()


def torch_zip() -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as file:
    file.writestr("archive/data.pkl", pickle.dumps({"w": Harmful()}))
  return buffer.getvalue()


PICKLE = pickle.dumps({"fid": Harmful(), "w": Harmful()})
CLASSIC = pickle.dumps(Harmful(), 0)
NAMES = ("arr_0", "images", "mu", "sigma", "action", "state", "episode_ends", "scale")
ARCHIVE = archive(*NAMES)

FILES = {  # name of the file -> its content, and the readers that are to refuse it
  "image.png": (EPS, [image_io.about, folder.decode]),
  "image.webp": (EPS, [folder.decode]),
  "image.jpg": (EPS, [folder.decode]),
  "data.npz": (ARCHIVE, [array_io.read_npz, lambda path: npz.build(path=path)]),
  "array.npy": (npy(), [array_io.read_npy]),
  "mu.npz": (ARCHIVE, [lambda path: reference_statistics.read(path, "fid")]),
  "mu.pkl": (PICKLE, [lambda path: reference_statistics.read(path, "fid")]),
  "features.npz": (ARCHIVE, [classifier.load]),
  "normalizer.npz": (ARCHIVE, [normalizer.load]),
  "weights.npz": (ARCHIVE, [state_dict.read, diffusion_policy.load]),
  "weights.pt": (torch_zip(), [state_dict.read, diffusion_policy.load]),
  "weights.pkl": (PICKLE, [state_dict.read]),
  "classic.pkl": (CLASSIC, [state_dict.read]),
  "weights.safetensors": (PICKLE, [state_dict.read]),
  "episodes.npz": (
    ARCHIVE,
    [lambda path: reader.read(path, keys=("object",), absolute=False)],
  ),
}


def refuses(read, path, trace: pathlib.Path) -> None:
  with pytest.raises(REFUSED):
    read(str(path))
  assert not trace.exists()


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_without_running_them(tmp_path, trace, name):
  content, readers = FILES[name]
  (tmp_path / name).write_bytes(content)
  for read in readers:
    refuses(read, tmp_path / name, trace)


def test_the_canaries_live(tmp_path, trace):
  """Without our readers each of them leaves its trace."""
  pickle.loads(PICKLE)
  assert trace.exists()
  trace.unlink()
  __import__("canary")
  assert trace.exists()
  trace.unlink()
  subprocess.call(["gs"])
  assert trace.exists()


def test_folders_of_images_run_nothing(tmp_path, trace):
  path = tmp_path / "images"
  path.mkdir()
  for suffix in ("png", "jpg", "webp"):
    (path / f"a.{suffix}").write_bytes(EPS)
    refuses(lambda p: folder.build(dir=p), path, trace)
    refuses(folder.side, path, trace)
    (path / f"a.{suffix}").unlink()


def test_folders_of_tensorflow_datasets_run_nothing(tmp_path, trace):
  path = tmp_path / "tiny" / "1.0.0"
  path.mkdir(parents=True)
  (path / "dataset_info.json").write_text('{"name": "tiny", "version": "1.0.0"}')
  (path / "features.json").write_text('{"pythonClassName": "canary.Image"}')
  refuses(lambda p: tfds.build(tfds_name="tiny", dir=p), tmp_path, trace)


def test_parquet_files_run_nothing(tmp_path, trace):
  """pyarrow before 14.0.1 called the pickle of such a type."""
  import pyarrow as pa
  from pyarrow import parquet as pq

  kind = {b"ARROW:extension:name": b"arrow.py_extension_type"}
  kind[b"ARROW:extension:metadata"] = CLASSIC
  image = pa.field("image", pa.binary(), metadata=kind)
  table = pa.table([pa.array([EPS])], schema=pa.schema([image]))
  pq.write_table(table, tmp_path / "train.parquet")
  refuses(lambda p: parquet.build(dir=p), tmp_path, trace)


@pytest.mark.parametrize("key", ["filters", "compressor"])
def test_folders_of_zarr_run_nothing(tmp_path, trace, key):
  path = tmp_path / "replay.zarr"
  array = path / "data" / "action"
  array.mkdir(parents=True)
  (path / ".zgroup").write_text('{"zarr_format": 2}')
  codec = {"id": "pickle"}
  about = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "<f4"}
  about |= {"compressor": None, "filters": None, "fill_value": 0, "order": "C"}
  about[key] = [codec] if key == "filters" else codec
  (array / ".zarray").write_text(json.dumps(about))
  (array / "0").write_bytes(PICKLE)
  refuses(lambda p: reader.read(p, keys=(), absolute=False), path, trace)


def test_folders_of_episodes_run_nothing(tmp_path, trace):
  for name in ("observations_seq", "actions_seq", "existence_mask"):
    (tmp_path / f"{name}.npy").write_bytes(npy())
  refuses(lambda p: reader.read(p, keys=(), absolute=False), tmp_path, trace)


def test_folders_of_lerobot_run_nothing(tmp_path, trace):
  (tmp_path / "config.json").write_bytes(PICKLE)
  (tmp_path / "model.safetensors").write_bytes(PICKLE)
  refuses(lerobot.load, tmp_path, trace)


def test_parts_of_an_output_and_states_run_nothing(tmp_path, trace):
  (tmp_path / "parts").mkdir()
  (tmp_path / "parts" / "a.npz").write_bytes(ARCHIVE)
  output = resumable.Output(str(tmp_path / "parts"), "samples")
  assert [*output.read_parts(["images"])] == []
  (tmp_path / "state.npz").write_bytes(archive("settings"))
  assert Snapshot(str(tmp_path / "state.npz"), {}).arrays == {}
  assert not trace.exists()
