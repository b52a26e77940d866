"""Files of episodes that mean harm or lie: each is refused in one line, soon."""

import json
import os
import pathlib
import pickle

import h5py
import numcodecs
import numpy as np
import pytest
import zarr

from sdiff_jax.data import trajectories
from sdiff_jax.data.episodes import kitchen, normalizer, reader, robomimic, zarr_array
from sdiff_jax.types import UserError

RNG = np.random.default_rng(0)
N = 30
ACTION = RNG.normal(size=(N, 2)).astype(np.float32)
STATE = RNG.normal(size=(N, 5)).astype(np.float32)
ENDS = np.array([10, 30])


def refuses(path, match: str) -> str:
  with pytest.raises(UserError, match=match) as error:
    reader.read(str(path), keys=("object",), absolute=False)
  line = str(error.value)
  assert "\n" not in line
  assert len(line) < 500
  return line


class Harmful:
  """An object whose pickle creates a file."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


# zarr.

CODECS = {
  "none": None,
  "blosc": numcodecs.Blosc("zstd", 5, numcodecs.Blosc.BITSHUFFLE),
  "lz4": numcodecs.LZ4(),
  "zstd": numcodecs.Zstd(),
  "gzip": numcodecs.GZip(),
  "zlib": numcodecs.Zlib(),
  "bz2": numcodecs.BZ2(),
  "lzma": numcodecs.LZMA(),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_those_that_zarr_wrote(tmp_path, codec, order):
  x = RNG.normal(size=(7, 5))
  x[3:5] = 0  # a chunk of zeros, which is not stored
  path = tmp_path / "a.zarr"
  array = zarr.create_array(
    str(path),
    shape=x.shape,
    chunks=(3, 2),
    dtype=x.dtype,
    compressors=CODECS[codec],
    zarr_format=2,
    order=order,
    fill_value=0,
  )
  array[:] = x
  np.testing.assert_array_equal(zarr_array.read(str(path)), x)


@pytest.fixture
def group(tmp_path):
  """A folder of zarr whose arrays are stored without compression."""
  path = tmp_path / "a.zarr"
  arrays = {"data/state": STATE, "data/action": ACTION, "meta/episode_ends": ENDS}
  root = zarr.open_group(str(path), mode="w", zarr_format=2)
  for name, x in arrays.items():
    options = {"shape": x.shape, "chunks": x.shape, "dtype": x.dtype}
    root.create_array(name, **options, compressors=None)[:] = x
  return path


def edit(path: pathlib.Path, **changed) -> None:
  about = json.loads((path / ".zarray").read_text())
  (path / ".zarray").write_text(json.dumps(about | changed))


def test_no_codec_is_run_that_unpickles(group, tmp_path):
  ran = tmp_path / "ran"
  array = group / "data" / "action"
  (chunk,) = (p for p in array.iterdir() if not p.name.startswith("."))
  chunk.write_bytes(pickle.dumps(Harmful(ran)))
  edit(array, filters=[{"id": "pickle"}])
  refuses(group, r"filters=\[\{'id': 'pickle'\}\] are not supported")
  edit(array, filters=None, compressor={"id": "pickle"})
  refuses(group, "compressor='pickle' is not supported; use one of blosc")
  edit(array, compressor={"id": "json2"})
  refuses(group, "compressor='json2' is not supported")
  edit(array, compressor=None, dtype="|O", filters=[{"id": "pickle"}])
  refuses(group, "dtype is '|O'")
  # Format 3, with the same codec.
  codecs = [{"name": "numcodecs.pickle", "configuration": {}}]
  (array / "zarr.json").write_text(json.dumps({"zarr_format": 3, "codecs": codecs}))
  (array / ".zarray").unlink()
  refuses(group, "has no action")
  (group / ".zgroup").unlink()
  (group / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
  refuses(group, "is of zarr's format 3; save it in format 2")
  assert not ran.exists()


@pytest.mark.parametrize(
  ("changed", "match"),
  [
    ({"shape": [10**12, 2]}, "it would|the array would expand|claims .* chunks"),
    ({"shape": [10**12, 2], "chunks": [10**12, 2]}, "the array would expand"),
    ({"shape": [2**40] * 8, "chunks": [2**40] * 8}, "would expand"),
    ({"chunks": [2**40, 2]}, "a chunk would expand"),
    ({"shape": [10**9, 2], "chunks": [1, 1]}, "it claims 2000000000 chunks"),
    ({"shape": []}, r"shape is \[\]"),
    ({"shape": [-1, 2]}, r"shape\[0\] is -1"),
    ({"chunks": [0, 2]}, r"chunks\[0\] is 0"),
    ({"chunks": [30]}, "have different lengths"),
    ({"dtype": "<U4"}, "dtype is '<U4'"),
    ({"dtype": [["a", "<f4"]]}, "dtype is"),
    ({"zarr_format": 3}, "zarr_format is 3"),
    ({"order": "X"}, "order is 'X'"),
    ({"compressor": {"id": "zlib"}}, "cannot be read"),
    ({"compressor": {"id": "gzip"}}, "cannot be read"),
    ({"compressor": {"id": "blosc"}}, "a chunk has another size"),
    ({"compressor": {"id": "lz4"}}, "a chunk has another size"),
    ({"compressor": {"id": "zstd"}}, "cannot be read"),
    ({"compressor": {"id": ["blosc"]}}, "is not supported"),
    ({"compressor": "blosc"}, "compressor is 'blosc'"),
    ({"fill_value": "x" * 10_000}, "cannot be read"),
    ({"dimension_separator": "../"}, "dimension_separator is"),
  ],
)
def test_arrays_of_zarr_that_lie_are_refused(group, changed, match):
  edit(group / "data" / "action", **changed)
  assert str(group) in refuses(group, match)


@pytest.mark.parametrize("content", ["", "[", "[]", "null", "[" * 10**5, "\0"])
def test_damaged_metadata_of_zarr_are_refused(group, content):
  (group / "data" / "action" / ".zarray").write_text(content)
  refuses(group, ".zarray")


@pytest.mark.parametrize(
  "codec", ["blosc", "lz4", "zstd", "gzip", "zlib", "bz2", "lzma"]
)
def test_chunks_that_expand_are_refused(group, codec):
  """A chunk of a gigabyte in a small file."""
  array = group / "data" / "action"
  (chunk,) = (p for p in array.iterdir() if not p.name.startswith("."))
  chunk.write_bytes(CODECS[codec].encode(bytes(2**27)))
  edit(array, compressor={"id": codec})
  refuses(group, "cannot be read|a chunk has another size")


def test_a_pipe_in_place_of_a_chunk_is_refused(group):
  array = group / "data" / "action"
  (chunk,) = (p for p in array.iterdir() if not p.name.startswith("."))
  chunk.unlink()
  os.mkfifo(chunk)
  refuses(group, "is not a regular file")


# HDF5.


@pytest.fixture
def hdf5(tmp_path):
  path = tmp_path / "a.hdf5"
  with h5py.File(path, "w") as file:
    file["data/demo_0/obs/object"] = STATE
    file["data/demo_0/actions"] = ACTION
  return path


def replaced(path, name: str, create) -> None:
  with h5py.File(path, "a") as file:
    del file[name]
    create(file, name)


def test_arrays_of_hdf5_that_lie_are_refused(hdf5, tmp_path):
  actions = "data/demo_0/actions"

  def claims(**options):
    return lambda file, name: file.create_dataset(name, **options)

  replaced(hdf5, actions, claims(shape=(10**12, 2), dtype="f4", chunks=(10, 2)))
  refuses(hdf5, "the arrays would expand")
  replaced(hdf5, actions, claims(shape=(10**12, 2), dtype="f4"))
  refuses(hdf5, "the arrays would expand")
  huge = {"shape": (30, 2), "dtype": "f4", "chunks": (2**26, 2), "maxshape": (None, 2)}
  replaced(hdf5, actions, claims(**huge, compression="gzip"))
  refuses(hdf5, "the arrays would expand")
  replaced(hdf5, actions, claims(data=np.array(["a"], "S4")))
  refuses(hdf5, "save floats")
  replaced(hdf5, actions, claims(data=np.float32(3)))
  refuses(hdf5, "save floats")
  text = h5py.string_dtype()
  replaced(hdf5, actions, claims(shape=(3,), dtype=text))
  refuses(hdf5, "save floats")
  external = [(str(tmp_path / "other"), 0, 240)]
  (tmp_path / "other").write_bytes(ACTION.tobytes())
  replaced(hdf5, actions, claims(shape=(N, 2), dtype="f4", external=external))
  refuses(hdf5, "actions is in another file")
  layout = h5py.VirtualLayout((N, 2), "f4")
  layout[:] = h5py.VirtualSource(str(tmp_path / "b.hdf5"), "x", (N, 2))
  replaced(hdf5, actions, lambda f, name: f.create_virtual_dataset(name, layout))
  refuses(hdf5, "actions is in another file")
  link = h5py.ExternalLink(str(tmp_path / "b.hdf5"), "/x")
  replaced(hdf5, actions, lambda f, name: f.__setitem__(name, link))
  refuses(hdf5, "actions is a link")
  link = h5py.SoftLink("/data/demo_0/actions")
  replaced(hdf5, actions, lambda f, name: f.__setitem__(name, link))
  refuses(hdf5, "actions is a link")
  replaced(hdf5, actions, lambda f, name: f.create_group(name))
  refuses(hdf5, "is no dataset")
  replaced(hdf5, actions, claims(data=ACTION.astype(np.float64) * 1e300))
  refuses(hdf5, "action is not finite at step 0")


def test_compressed_arrays_of_hdf5_are_read(tmp_path):
  path = tmp_path / "a.hdf5"
  with h5py.File(path, "w") as file:
    options = {"compression": "gzip", "shuffle": True, "fletcher32": True}
    file.create_dataset("data/demo_0/obs/object", data=STATE, **options)
    file.create_dataset("data/demo_0/actions", data=ACTION, compression="lzf")
  episodes = reader.read(str(path), keys=("object",), absolute=False)
  np.testing.assert_array_equal(episodes.action, ACTION)
  np.testing.assert_array_equal(episodes.observation, STATE)


def test_what_is_no_regular_file_is_refused(tmp_path):
  for name in ("a.hdf5", "a.npz"):
    os.mkfifo(tmp_path / name)
    refuses(tmp_path / name, "is not a regular file")


# Kitchen.


@pytest.fixture
def sequences(tmp_path):
  for name, width in zip(kitchen.FILES, (60, 9), strict=False):
    np.save(tmp_path / name, RNG.normal(size=(3, 8, width)))
  np.save(tmp_path / kitchen.FILES[2], np.ones((3, 8)))
  return tmp_path


@pytest.mark.parametrize(
  ("mask", "match"),
  [
    (np.full((3, 8), 2), "its values must be 0 or 1"),
    (np.full((3, 8), np.nan), "its values must be 0 or 1"),
    (np.full((3, 8), "x"), "its values must be 0 or 1"),
    (np.full((3, 8), -1), "its values must be 0 or 1"),
    (np.zeros((3, 8)), "has no step"),
    (np.eye(3, 8)[::-1], "steps behind the end"),
    (np.full((3, 8), None), "Object arrays cannot be loaded"),
  ],
)
def test_masks_of_kitchen_that_are_none_are_refused(sequences, mask, match):
  np.save(sequences / kitchen.FILES[2], mask)
  refuses(sequences, match)


def test_archives_in_place_of_arrays_are_refused(sequences):
  with open(sequences / kitchen.FILES[0], "wb") as file:
    np.savez(file, np.zeros(3))
  refuses(sequences, "a file is missing or damaged .*observations_seq.npy")


# Values and fields.


def npz(tmp_path, **changed) -> str:
  arrays = {"state": STATE, "action": ACTION, "episode_ends": ENDS} | changed
  np.savez(tmp_path / "a.npz", **arrays)
  return str(tmp_path / "a.npz")


@pytest.mark.parametrize(
  ("changed", "match"),
  [
    ({"action": ACTION.astype(np.float64) * 1e300}, "action has values above 1e.15 at"),
    ({"action": ACTION.astype(complex)}, "action is complex128"),
    ({"state": np.full((N, 5), "x")}, "observation is <U1"),
    ({"episode_ends": np.array([20, 10, 30], np.uint64)}, "integers that increase"),
    ({"episode_ends": np.array([2**63, 30], np.uint64)}, "integers that increase"),
    ({"episode_ends": np.array(["a"])}, "integers that increase"),
    ({"action": np.float32(3)}, "to the 0 steps"),
  ],
)
def test_values_without_sense_are_refused(tmp_path, changed, match):
  refuses(npz(tmp_path, **changed), match)


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"held_out": float("nan")}, "held_out=nan: must be at least 0 and below 1"),
    ({"held_out": 1.0}, "held_out=1.0: must be"),
    ({"held_out": -0.1}, "held_out=-0.1: must be"),
    ({"episodes": -1}, "episodes=-1: must be at least 0"),
    ({"episodes": 1.5}, "episodes=1.5: must be an integer"),
    ({"min_range": -1.0}, "min_range=-1.0: must be at least 0"),
    ({"min_range": float("nan")}, "min_range=nan: must be at least 0"),
    ({"std": float("nan")}, "std=nan: must be at least 0"),
    ({"std": float("inf")}, "std=inf: must be finite"),
    ({"keys": ()}, r"keys=\(\): must be a tuple of one or more"),
    (
      {"horizon": 10**5, "n_obs_steps": 10**5, "n_action_steps": 10**5},
      "horizon=1.*memory",
    ),
    ({"horizon": 10**9}, "horizon=1000000000: must be from 1"),
  ],
)
def test_fields_without_sense_are_refused(tmp_path, fields, match):
  with pytest.raises(ValueError, match=match):
    trajectories.build(path=npz(tmp_path), **fields)


@pytest.mark.parametrize(
  ("changed", "match"),
  [
    ({"action.scale": np.zeros(2, np.float32)}, "a scale is not above 0"),
    ({"action.scale": np.full(2, np.nan, np.float32)}, "must be finite floats"),
    ({"observation.centre": np.full(5, np.inf, np.float32)}, "must be finite floats"),
    ({"observation.centre": np.zeros(4, np.float32)}, "differ in shape"),
    ({"std": np.array(np.nan)}, "std=nan"),
    ({"std": np.array("x")}, "could not convert"),
    ({"steps": np.array(0)}, "steps=0"),
    ({"steps": np.array(2**40)}, "steps=1099511627776"),
    ({"shape": np.array([2**40, 2])}, "must be 1 to"),
    ({"shape": np.array([16])}, "unpack"),
    ({"shape": np.array([16, 3])}, "do not fit"),
    ({"std": None}, "it has no 'std'"),
  ],
)
def test_normalizers_without_sense_are_refused(tmp_path, changed, match):
  source = trajectories.build(path=npz(tmp_path))
  path = tmp_path / "normalizer.npz"
  normalizer.save(str(path), source.normalizer)
  with np.load(path) as stored:
    arrays = {k: x for k, x in (dict(stored) | changed).items() if x is not None}
  np.savez(path, **arrays)
  with pytest.raises(UserError, match=f"is no normalizer, or damaged .*{match}"):
    normalizer.load(str(path))


def test_names_of_observations_are_quoted_in_part(hdf5):
  with pytest.raises(UserError) as error:
    reader.read(str(hdf5), keys=("x" * 10_000,), absolute=False)
  assert len(str(error.value)) < 500
  assert robomimic.KEYS
