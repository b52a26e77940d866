"""Files of weights by PyTorch and EDM, and pickles that mean harm."""

import io
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest

from sdiff_jax.pretrained.files import safe_pickle, state_dict
from sdiff_jax.types import UserError

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "weights"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"ctorch.storage\n_load_from_bytes\n"


@pytest.mark.parametrize("name", ["zip.pt", "old.pt", "file.safetensors", "edm.pkl"])
def test_every_form_holds_the_same(name):
  """float16, bfloat16, strides, scalars, buffers; no buffer that is not saved."""
  expected = state_dict.read(str(FOLDER / "expected.npz"))
  found = state_dict.read(str(FOLDER / name))
  assert found.keys() == expected.keys()
  for key, value in found.items():
    np.testing.assert_array_equal(value.astype(expected[key].dtype), expected[key])
  assert found["brain"].dtype.name == "bfloat16"
  assert found["enc.8x8_conv.narrow"].dtype == np.float16


def legacy(object_pickle: bytes, numel: int = 4) -> bytes:
  """Returns a file of PyTorch's older form, with one storage "0" of floats."""
  parts = [safe_pickle.MAGIC, 1001, {"little_endian": True}]
  data = b"".join(pickle.dumps(part, 2) for part in parts) + object_pickle
  data += pickle.dumps(["0"], 2) + struct.pack("<q", numel)
  return data + np.arange(numel, dtype=np.float32).tobytes()


def storage(numel: int = 4) -> bytes:
  """Returns opcodes that put storage "0" on the stack."""
  text = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuI"
  return text + b"%d\nNtQ" % numel


def tensor(offset: int, size: tuple, stride: tuple, numel: int = 4) -> bytes:
  """Returns a file with {"w": a view of the storage}."""
  ints = "".join(f"I{n}\n" for n in size)
  strides = "".join(f"I{n}\n" for n in stride)
  view = f"I{offset}\n({ints}t({strides}tI00\nNt".encode()
  return legacy(b"}X\x01\0\0\0w" + TENSOR + b"(" + storage(numel) + view + b"Rs.")


def read(data: bytes, tmp_path: pathlib.Path) -> dict:
  path = tmp_path / "file.pkl"
  path.write_bytes(data)
  return state_dict.read(str(path))


def test_views_of_a_storage(tmp_path):
  found = read(tensor(1, (3,), (1,)), tmp_path)["w"]
  np.testing.assert_array_equal(found, [1, 2, 3])
  found = read(tensor(0, (2, 2), (1, 2)), tmp_path)["w"]
  np.testing.assert_array_equal(found, [[0, 2], [1, 3]])
  assert read(tensor(0, (0, 3), (3, 1)), tmp_path)["w"].shape == (0, 3)


@pytest.mark.parametrize(
  ("offset", "size", "stride", "message"),
  [
    (2, (3,), (1,), "larger than its storage"),
    (0, (2,), (4,), "larger than its storage"),
    (0, (9,), (0,), "larger than its storage"),
    (-1, (2,), (1,), "negative size"),
    (3, (2,), (-1,), "negative size"),
    (0, (2, 2), (1,), "two ranks"),
  ],
)
def test_a_tensor_stays_inside_its_storage(tmp_path, offset, size, stride, message):
  with pytest.raises(UserError, match=message):
    read(tensor(offset, size, stride), tmp_path)


def test_a_storage_is_no_larger_than_its_file(tmp_path):
  with pytest.raises(UserError, match="a storage larger than the file"):
    read(tensor(0, (1,), (1,), numel=10**15), tmp_path)


RUN = b"cposix\nsystem\n(X\x0d\0\0\0touch was_runtR."  # os.system("touch was_run")
HARM = {
  "a function": RUN,
  "a built-in": b"cbuiltins\neval\n(X\x05\0\0\x001 + 1tR.",
  "an attribute": b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
  "an instance": b"(X\x01\0\0\x00aios\nsystem\n.",
  "an extension": b"\x82\x01.",
  "in a storage": STORAGE + b"(" + pickle.dumps(legacy(RUN), 3)[2:-1] + b"tR.",
  "in a storage's head": STORAGE + b"(" + pickle.dumps(RUN, 3)[2:-1] + b"tR.",
  "a changed function": TENSOR + b"(N}X\x0c\0\0\0__defaults__)stb.",
  "a changed class": b"ccollections\nOrderedDict\n(N}X\x01\0\0\0xNstb.",
  "a changed tuple": b"ctorch\nSize\n(N}X\x01\0\0\0xNstb.",
}


@pytest.mark.parametrize("name", HARM)
def test_harm_is_refused(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  before = dict(vars(safe_pickle._Dict)), safe_pickle._tensor.__defaults__
  with pytest.raises(UserError) as error:
    read(HARM[name], tmp_path)
  assert "\n" not in str(error.value)
  assert "holds no tensors" not in str(error.value)  # it was not read to its end
  assert not (tmp_path / "was_run").exists()
  assert before == (dict(vars(safe_pickle._Dict)), safe_pickle._tensor.__defaults__)


def test_a_pickle_by_torch_that_means_harm(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="posix.system, which is no tensor.* was run"):
    state_dict.read(str(FOLDER / "malicious.pkl"))
  assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
  "data", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({"a": 1}), b"PK\x03\x04"]
)
def test_other_files_are_refused_in_one_line(data, tmp_path):
  with pytest.raises(UserError, match="holds no tensors|damaged, or no file") as error:
    read(data, tmp_path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["zip.pt", "old.pt", "file.safetensors", "edm.pkl"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_short_files_are_refused(name, share, tmp_path):
  data = (FOLDER / name).read_bytes()
  path = tmp_path / name
  path.write_bytes(data[: int(share * len(data))])
  with pytest.raises(UserError, match="damaged, or no file"):
    state_dict.read(str(path))


def test_a_missing_file():
  with pytest.raises(UserError, match="gone.pt: no such file"):
    state_dict.read("gone.pt")


def test_an_archive_of_other_bytes(tmp_path):
  """What is not little-endian is refused, not misread."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(FOLDER / "zip.pt") as old, zipfile.ZipFile(buffer, "w") as new:
    for name in old.namelist():
      changed = name.endswith("byteorder")
      new.writestr(name, b"big" if changed else old.read(name))
  with pytest.raises(UserError, match="big-endian bytes"):
    read(buffer.getvalue(), tmp_path)
