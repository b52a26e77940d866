"""Small files that claim or become much, or that lead out of themselves.

Each must be read or refused within the bounds of _judge.py: 10 s, 2 GB, nothing written,
nothing executed.
"""

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import _judge
import _mutations
import _readers
import numpy as np
import pytest

Files = dict[str, bytes]
GIGABYTE = 2**30


def _deflated(size: int, wbits: int = -15) -> bytes:
  """Returns compressed zeros, without ever having them all in memory."""
  packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
  parts = [packer.compress(bytes(2**24)) for _ in range(size >> 24)]
  return b"".join([*parts, packer.flush()])


def _npy_header(shape: str, dtype: str = "|u1") -> bytes:
  text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
  text = text.ljust(117) + "\n"
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def _zip(**members: bytes) -> bytes:
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, data in members.items():
      archive.writestr(name.replace("__", "."), data)
  return file.getvalue()


def _zip_of_zeros(name: str, head: bytes, size: int) -> bytes:
  """Returns an archive whose member is a header and zeros, 1000 times as large."""
  file = io.BytesIO()
  with (
    zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
    archive.open(name, "w", force_zip64=True) as member,
  ):
    member.write(head)
    for _ in range(size >> 24):
      member.write(bytes(2**24))
  return file.getvalue()


def _png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
  def chunk(kind: bytes, data: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc

  header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
  rows = zlib.compress(bytes(min((width // 8 + 1) * height, 2**26)))
  parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks)]
  return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", rows)])


def _laughs(levels: int) -> bytes:
  """Returns a pickle of few bytes whose value has 2^levels parts."""
  value: Any = {"w": 1}
  for _ in range(levels):
    value = {"a": value, "b": value}
  return pickle.dumps({"state_dict": value})


def _nested(levels: int) -> bytes:
  """Returns a pickle of lists inside lists."""
  return b"\x80\x04" + b"]" * levels + b"a" * (levels - 1) + b"."


def _itself() -> bytes:
  """Returns a pickle of a dict that contains itself."""
  value: dict[str, Any] = {}
  value["state_dict"] = value
  return pickle.dumps(value)


def _safetensors(header: Any, size: int = 0) -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + bytes(size)


def _tensor(shape: list[int], end: int) -> dict[str, Any]:
  return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}


def _h5(write: Callable[[Any], None]) -> bytes:
  import h5py

  file = io.BytesIO()
  with h5py.File(file, "w") as handle:
    write(handle)
  return file.getvalue()


def _demo(file: Any, **changed: Any) -> None:
  """Writes one demonstration, of which some arrays are made by functions."""
  from sdiff_jax.data.episodes import robomimic

  sizes = dict(zip(robomimic.KEYS, (14, 3, 4, 2), strict=True)) | {"actions": 7}
  for name, size in sizes.items():
    path = f"data/demo_0/{'' if name == 'actions' else 'obs/'}{name}"
    if name in changed:
      changed[name](file, path)
    else:
      file[path] = np.ones((20, size))


def _claims(file: Any, path: str) -> None:
  file.create_dataset(path, shape=(2**36, 7), dtype="f8", chunks=(1024, 7))


def _external(file: Any, path: str) -> None:
  file.create_dataset(
    path, shape=(20, 7), dtype="u1", external=[("/etc/passwd", 0, 140)]
  )


def _other_file(file: Any, path: str) -> None:
  import h5py

  file[path] = h5py.ExternalLink("/proc/self/mem", "x")


def _loop(file: Any, path: str) -> None:
  import h5py

  file[path] = h5py.SoftLink(f"/{path}")


def _texts(file: Any, path: str) -> None:
  import h5py

  file.create_dataset(path, data=["x"] * 20, dtype=h5py.string_dtype())


def _virtual(file: Any, path: str) -> None:
  import h5py

  layout = h5py.VirtualLayout(shape=(20, 7), dtype="f8")
  layout[:] = h5py.VirtualSource("/nothing.h5", "x", shape=(20, 7))
  file.create_virtual_dataset(path, layout)


def _zarr(**changed: Any) -> Files:
  """Returns episodes in zarr whose array of actions is described differently."""
  files = dict(_readers.READERS["episodes zarr"].files())
  about = json.loads(files["data/action/.zarray"])
  files["data/action/.zarray"] = json.dumps(about | changed).encode()
  return files


def _with(reader: str, name: str, data: bytes) -> Files:
  return dict(_readers.READERS[reader].files()) | {name: data}


def _bloc(size: int) -> bytes:
  """Returns the header of a chunk of blosc that claims a size."""
  return struct.pack("<BBBBIII", 2, 1, 1, 4, size, size, 20) + bytes(4)


def _parquet(column: Any, **options: Any) -> bytes:
  """Returns a Parquet file with a column of images."""
  import pyarrow as pa
  from pyarrow import parquet

  file = io.BytesIO()
  parquet.write_table(pa.table({"image": column}), file, **options)
  return file.getvalue()


def _one_image_often() -> Files:
  """Returns a file of a dictionary with one value, which a million rows repeat."""
  import pyarrow as pa

  rows = np.zeros(10**6, np.int32)
  column = pa.DictionaryArray.from_arrays(rows, pa.array([bytes(2**20)]))
  return {"train.parquet": _parquet(column, compression="zstd")}


BOMBS: dict[str, tuple[str, Callable[[], Files]]] = {
  "npz: shape of 2^40": (
    "data npz",
    lambda: {"x.npz": _zip(arr_0__npy=_npy_header("(1099511627776, 1, 1, 3)"))},
  ),
  "npz: axes without elements": (
    "data npz",
    lambda: {"x.npz": _zip(arr_0__npy=_npy_header("(0, 1099511627776, 9999999, 3)"))},
  ),
  "npz: zeros": (
    "data npz",
    lambda: {
      "x.npz": _zip_of_zeros(
        "arr_0.npy", _npy_header("(1073741824, 1, 1, 1)"), GIGABYTE
      )
    },
  ),
  "npz: many members": (
    "data npz",
    lambda: {"x.npz": _zip(**{f"a{k}__npy": b"" for k in range(30_000)})},
  ),
  "npz: shape of an expression": (
    "data npz",
    lambda: {"x.npz": _zip(arr_0__npy=_npy_header("(" * 90 + "9" + ")" * 90))},
  ),
  "idx: gzip of zeros": (
    "data idx gz",
    lambda: _with(
      "data idx gz", "train-images-idx3-ubyte.gz", _deflated(2 * GIGABYTE, 31)
    ),
  ),
  "idx: sizes of 2^32": (
    "data idx",
    lambda: _with(
      "data idx",
      "train-images-idx3-ubyte",
      b"\0\0\x08\x03" + struct.pack(">III", *[2**32 - 1] * 3),
    ),
  ),
  "idx: gzip inside gzip": (
    "data idx gz",
    lambda: _with(
      "data idx gz", "train-images-idx3-ubyte.gz", gzip.compress(gzip.compress(b"x"))
    ),
  ),
  "image: 60,000 x 60,000": (
    "data folder",
    lambda: _with("data folder", "a/0.png", _png(60_000, 60_000)),
  ),
  "image: 2^31 x 1": (
    "data folder",
    lambda: _with("data folder", "a/0.png", _png(2**31 - 1, 1)),
  ),
  "image: 12,000 x 12,000": (
    "data folder",
    lambda: _with("data folder", "a/0.png", _png(12_000, 12_000)),
  ),
  "image: a text of zeros": (
    "data folder",
    lambda: _with(
      "data folder",
      "a/0.png",
      _png(8, 8, (b"zTXt", b"x\0\0" + _deflated(GIGABYTE, 15))),
    ),
  ),
  "parquet: a value in a million rows": ("data parquet", _one_image_often),
  "parquet: a page of zeros": (
    "data parquet",
    lambda: {"train.parquet": _parquet([bytes(2**29)], compression="zstd")},
  ),
  "weights: 2^60 parts": ("weights edm", lambda: {"edm.pkl": _laughs(60)}),
  "weights: lists in lists": ("weights edm", lambda: {"edm.pkl": _nested(200_000)}),
  "weights: a dict in itself": ("weights edm", lambda: {"edm.pkl": _itself()}),
  "weights: a long integer": (
    "weights edm",
    lambda: {
      "edm.pkl": b"\x80\x02\x8b" + struct.pack("<i", 2**24) + b"\1" * 2**24 + b"."
    },
  ),
  "weights: an integer in digits": (
    "weights edm",
    lambda: {"edm.pkl": b"L" + b"9" * 10**6 + b"L\n."},
  ),
  "weights: a frame of 2^62": (
    "weights edm",
    lambda: {"edm.pkl": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N."},
  ),
  "weights: a text of 2^31": (
    "weights edm",
    lambda: {"edm.pkl": b"\x80\x04X" + struct.pack("<I", 2**31 - 1) + b"x."},
  ),
  "weights: a number of the memo": (
    "weights edm",
    lambda: {"edm.pkl": b"\x80\x04Nr" + struct.pack("<I", 2**31 - 1) + b"."},
  ),
  "safetensors: a header of spaces": (
    "weights safetensors",
    lambda: {"file.safetensors": _safetensors(b"{" + b" " * 60_000_000 + b"}")},
  ),
  "safetensors: a claimed header": (
    "weights safetensors",
    lambda: {"file.safetensors": struct.pack("<Q", 2**63) + b"{}"},
  ),
  "safetensors: a claimed shape": (
    "weights safetensors",
    lambda: {"file.safetensors": _safetensors({"a": _tensor([2**40], 2**42)}, 64)},
  ),
  "safetensors: tensors in one place": (
    "weights safetensors",
    lambda: {
      "file.safetensors": _safetensors(
        {f"a{k}": _tensor([2**18], 2**20) for k in range(5000)}, 2**20
      )
    },
  ),
  "safetensors: tensors without elements": (
    "weights safetensors",
    lambda: {
      "file.safetensors": _safetensors(
        {f"a{k}": _tensor([0, 2**50], 0) for k in range(1000)}
      )
    },
  ),
  "safetensors: nesting": (
    "weights safetensors",
    lambda: {"file.safetensors": _safetensors(b"[" * 10**6)},
  ),
  "h5: a claimed shape": (
    "episodes h5",
    lambda: {"x.hdf5": _h5(lambda f: _demo(f, actions=_claims))},
  ),
  "h5: data of another file": (
    "episodes h5",
    lambda: {"x.hdf5": _h5(lambda f: _demo(f, actions=_external))},
  ),
  "h5: a link to another file": (
    "episodes h5",
    lambda: {"x.hdf5": _h5(lambda f: _demo(f, actions=_other_file))},
  ),
  "h5: a link to itself": (
    "episodes h5",
    lambda: {"x.hdf5": _h5(lambda f: _demo(f, actions=_loop))},
  ),
  "h5: texts": (
    "episodes h5",
    lambda: {"x.hdf5": _h5(lambda f: _demo(f, object=_texts))},
  ),
  "h5: a virtual array": (
    "episodes h5",
    lambda: {"x.hdf5": _h5(lambda f: _demo(f, actions=_virtual))},
  ),
  "h5: a group in place of an array": (
    "episodes h5",
    lambda: {"x.hdf5": _h5(lambda f: _demo(f, actions=lambda f, p: f.create_group(p)))},
  ),
  "h5: 50,000 demonstrations": (
    "episodes h5",
    lambda: {
      "x.hdf5": _h5(lambda f: [f.create_group(f"data/demo_{k}") for k in range(50_000)])
    },
  ),
  "zarr: a claimed shape": ("episodes zarr", lambda: _zarr(shape=[2**40, 2])),
  "zarr: a claimed chunk": (
    "episodes zarr",
    lambda: _zarr(shape=[2**40, 2], chunks=[2**40, 2]),
  ),
  "zarr: a chunk of blosc that claims 2 GB": (
    "episodes zarr",
    lambda: _zarr() | {"data/action/0.0": _bloc(2**31 - 17)},
  ),
  "zarr: a codec that runs code": (
    "episodes zarr",
    lambda: (
      _zarr(filters=[{"id": "pickle", "protocol": 4}], dtype="|O")
      | {"data/action/0.0": pickle.dumps(_readers.Canary("os"))}
    ),
  ),
  "zarr: a link out of the folder": (
    "episodes zarr",
    lambda: _zarr(dimension_separator="/../../../"),
  ),
  "latents: a claimed size": (
    "data latents",
    lambda: _with(
      "data latents",
      "latents.json",
      json.dumps(
        {"size": 10**12, "shape": [10**6, 10**6, 8], "scale": "scm"}
        | {"classes": 3, "shard_size": 5 * 10**11}
      ).encode(),
    ),
  ),
  "captions: 64 MB of nothing": (
    "captions",
    lambda: {"x.json": b"[" + b"[]," * 22_000_000 + b"[]]"},
  ),
  "tokenizer: a text of 30 MB": (
    "tokenizer",
    lambda: _with("tokenizer", "merges.txt", b"a b\n" * 8_000_000),
  ),
  "report: metrics of 24 MB": (
    "report",
    lambda: _with("report", "metrics.jsonl", b'{"step": 1}\n' * 2_000_000),
  ),
}


SLOW = {  # to make or to read
  "parquet: a page of zeros",
  "npz: zeros",
  "npz: many members",
  "idx: gzip of zeros",
  "image: a text of zeros",
  "weights: lists in lists",
  "safetensors: a header of spaces",
  "h5: 50,000 demonstrations",
  "captions: 64 MB of nothing",
  "report: metrics of 24 MB",
}


@pytest.mark.parametrize(
  "name",
  [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in BOMBS],
)
def test_bombs(name, tmp_path):
  reader, files = BOMBS[name]
  _mutations.write(str(tmp_path), files())
  _judge.judge(lambda: _readers.READERS[reader].call(str(tmp_path)), str(tmp_path))


def test_folders_that_contain_themselves(tmp_path):
  _mutations.write(str(tmp_path), _readers.READERS["data folder"].files())
  os.symlink("..", tmp_path / "a" / "up")
  os.symlink(".", tmp_path / "here")
  _judge.judge(
    lambda: _readers.READERS["data folder"].call(str(tmp_path)), str(tmp_path)
  )
