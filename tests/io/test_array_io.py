"""Arrays in files: what is read equals what NumPy reads; what lies is refused."""

import io
import os
import pathlib
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from sdiff_jax.io import array_io
from sdiff_jax.types import UserError

RNG = np.random.default_rng(0)
ARRAYS = {
  "floats": RNG.standard_normal((3, 4)),
  "columns": np.asfortranarray(RNG.standard_normal((5, 2)).astype(np.float32)),
  "half": RNG.standard_normal(3).astype(np.float16),
  "scalar": np.float32(3),
  "text": np.array(["a", "\N{GREEK SMALL LETTER BETA}"]),
  "flags": np.array([True, False]),
  "big_endian": np.arange(4, dtype=">i4"),
  "complex": np.array([1 + 2j]),
  "none": np.zeros((0, 3)),
}


def same(a: np.ndarray, b: np.ndarray) -> None:
  assert a.dtype == b.dtype
  assert a.flags.writeable
  np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_reads(tmp_path, save):
  path = tmp_path / "a.npz"
  save(path, **ARRAYS)
  arrays = array_io.read_npz(path)
  assert arrays.keys() == ARRAYS.keys()
  with np.load(path) as expected:
    for name, array in arrays.items():
      same(array, expected[name])
  assert array_io.read_npz(path, ("half", "other")).keys() == {"half"}
  headers = array_io.npz_headers(path)
  assert headers["floats"].shape == (3, 4)
  for name, array in ARRAYS.items():
    np.save(tmp_path / "a.npy", array)
    same(array_io.read_npy(tmp_path / "a.npy"), np.load(tmp_path / "a.npy")), name


def npy(shape: tuple, data: bytes = b"", descr: str = "'<f8'", size: int = 0) -> bytes:
  """Returns an .npy file with a header of our choice."""
  header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
  text = header.encode().ljust(size) + b"\n"
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def archive(members: dict[str, bytes] | list, **options) -> bytes:
  buffer = io.BytesIO()
  pairs = members.items() if isinstance(members, dict) else members
  with zipfile.ZipFile(buffer, "w", **options) as file:
    for name, data in pairs:
      file.writestr(name, data)
  return buffer.getvalue()


class Harmful:
  """An object whose pickle creates a file."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def objects(path: pathlib.Path) -> bytes:
  return npy((1,), pickle.dumps(np.array([Harmful(path)], object)), "'|O'")


BAD = {
  "terabytes": (npy((10**12,)), "is said to have 8000000000000 bytes"),
  "more than there is": (npy((3,), b"\0" * 16), "is said to have 24 bytes"),
  "less than there is": (npy((1,), b"\0" * 16), "is said to have 8 bytes"),
  "huge axes": (npy((2**62, 2**62, 0)), "without elements has the shape"),
  "negative": (npy((-1,), b"\0" * 8), "shape"),
  "fields": (npy((1,), b"\0" * 8, "[('a', '<f8')]"), "not supported"),
  "part of an array": (npy((1,), b"\0" * 16, "('<f8', (2,))"), "damaged"),
  "deep": (npy("(" * 5000 + ")" * 5000), "damaged"),
  "long header": (npy((1,), b"\0" * 8, size=20_000), "damaged"),
  "version": (b"\x93NUMPY\x03\x00" + npy((1,), b"\0" * 8)[8:], "version"),
  "version 99": (b"\x93NUMPY\x63\x00" + npy((1,), b"\0" * 8)[8:], "version"),
  "text": (b"no array", "no array of NumPy"),
  "empty": (b"", "no array of NumPy"),
  "no end of a bracket": (
    b"\x93NUMPY\x01\x00\x10\x00{'shape': (1L, 2\n",
    "the header of an array is damaged",
  ),
  "half a header": (npy((1,))[:30], "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_arrays_that_lie_are_refused(tmp_path, name):
  data, message = BAD[name]
  (tmp_path / "a.npy").write_bytes(data)
  (tmp_path / "a.npz").write_bytes(archive({"x.npy": data}))
  tracemalloc.start()
  for read, path in ((array_io.read_npy, "a.npy"), (array_io.read_npz, "a.npz")):
    with pytest.raises(UserError, match=message) as error:
      read(tmp_path / path)
    line = str(error.value)
    assert line.startswith(str(tmp_path / path))
    assert "\n" not in line
    assert len(line) < 500
  assert tracemalloc.get_traced_memory()[1] < 2**24
  tracemalloc.stop()


def test_objects_are_refused_and_not_unpickled(tmp_path):
  ran = tmp_path / "ran"
  (tmp_path / "a.npy").write_bytes(objects(ran))
  (tmp_path / "a.npz").write_bytes(archive({"x.npy": objects(ran)}))
  for read, path in ((array_io.read_npy, "a.npy"), (array_io.read_npz, "a.npz")):
    with pytest.raises(UserError, match="Object arrays cannot be loaded"):
      read(tmp_path / path)
  assert not ran.exists()


def test_archives_that_lie_are_refused(tmp_path):
  good = npy((2,), b"\0" * 16)
  path = tmp_path / "a.npz"

  def refuses(data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
      array_io.read_npz(path)
    assert str(error.value).startswith(f"{path} is no .npz, or damaged")
    assert len(str(error.value)) < 500

  refuses(archive({"x": good}), "'x', which is no array")
  refuses(archive({"x.txt": b"text"}), "'x.txt', which is no array")
  refuses(archive({"x" * 5000 + ".txt": b"text"}), "which is no array")
  with pytest.warns(UserWarning, match="Duplicate name"):
    twice = archive([("x.npy", good), ("x.npy", good)])
  refuses(twice, "two members have the same name")
  refuses(archive({"x.npy": good}, compression=zipfile.ZIP_BZIP2), "another method")
  encrypted = bytearray(archive({"x.npy": good}))
  encrypted[6] |= 1
  encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
  refuses(bytes(encrypted), "encrypted")
  zeros = npy((2**26,), bytes(2**29))
  refuses(archive({"x.npy": zeros}, compression=zipfile.ZIP_DEFLATED), "would expand")
  # A thousand members in one place.
  whole = archive({f"{k}.npy": good for k in range(3)})
  first = whole.index(b"PK\1\2")
  entry = whole[first : whole.index(b"PK\1\2", first + 4)]
  names = [entry.replace(b"0.npy", b"%05d.npy" % k, 1) for k in range(1000)]
  directory = b"".join(names)
  end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1000, 1000, len(directory), first, 0)
  refuses(whole[:first] + directory + end, "damaged")
  huge = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, 2**31, 0, 0)
  refuses(whole[:first] + huge, "table of contents")


def test_a_sparse_file_is_no_array_of_its_size(tmp_path):
  path = tmp_path / "a.npy"
  data = npy((10**12,))
  path.write_bytes(data)
  os.truncate(path, len(data) + 8 * 10**12)
  with pytest.raises(UserError, match="is said to have 8000000000000 bytes"):
    array_io.read_npy(path)


def test_what_is_no_regular_file_is_refused(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "loop").symlink_to(tmp_path / "loop")
  for path, message in (
    (tmp_path / "pipe", "is not a regular file"),
    ("/dev/zero", "is not a regular file"),
    (tmp_path / "loop", "symbolic links"),
    (tmp_path, "Is a directory"),
    (tmp_path / "none", "does not exist"),
  ):
    for read in (array_io.read_npy, array_io.read_npz):
      with pytest.raises(UserError, match=message) as error:
        read(path)
      assert str(error.value).startswith(str(path))
