"""Files of weights by PyTorch and EDM, and pickles that mean harm."""

import io
import json
import os
import pathlib
import pickle
import struct
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as original

from sdiff_jax.pretrained.files import safe_pickle, stand_ins, state_dict
from sdiff_jax.types import UserError

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "weights"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
HEAD = (safe_pickle.MAGIC, 1001, {"little_endian": True})
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
  data = b"".join(pickle.dumps(part, 2) for part in HEAD) + object_pickle
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
  before = dict(vars(stand_ins.Dict)), stand_ins._tensor.__defaults__
  with pytest.raises(UserError) as error:
    read(HARM[name], tmp_path)
  assert "\n" not in str(error.value)
  assert "holds no tensors" not in str(error.value)  # it was not read to its end
  assert not (tmp_path / "was_run").exists()
  assert before == (dict(vars(stand_ins.Dict)), stand_ins._tensor.__defaults__)


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


def refuses(
  data: bytes, tmp_path, match: str, name: str = "file.pkl", trace: bool = True
) -> str:
  """Checks that a file is refused in one short line, with little memory and time."""
  path = tmp_path / name
  path.write_bytes(data)
  if trace:  # it makes Python several times slower
    tracemalloc.start()
  begin = time.monotonic()
  try:
    with pytest.raises(UserError, match=match) as error:
      state_dict.read(str(path))
    peak = tracemalloc.get_traced_memory()[1] if trace else 0
  finally:
    tracemalloc.stop()
  assert peak < 2**26 + 8 * len(data)
  assert time.monotonic() - begin < 10
  line = str(error.value)
  assert line.startswith(str(path))
  assert "\n" not in line
  assert len(line) < 500
  return line


def text(value: str) -> bytes:
  return b"X" + struct.pack("<L", len(value)) + value.encode()


def doubled(first: bytes, pair: bytes, times: int = 60) -> bytes:
  """Returns opcodes that nest a value in pairs of itself: 2^times leaves."""
  return first + b"".join(b"q\x01h\x01" + pair for _ in range(times))


MODULE = b"ctorch.nn.modules.container\nSequential\n"


def test_a_name_of_two_billion_costs_no_memory(tmp_path):
  refuses(b"}r\xff\xff\xff\x7f.", tmp_path, "holds no tensors")
  refuses(b"}p4000000000\n.", tmp_path, "holds no tensors")


def test_keys_whose_hash_takes_for_ever_are_refused(tmp_path):
  nested = doubled(b")", b"\x86")
  refuses(b"}" + nested + b"Ns.", tmp_path, "a key that is no text")
  refuses(b"}(" + nested + b"Nu.", tmp_path, "a key that is no text")
  refuses(b"(" + nested + b"Nd.", tmp_path, "a key that is no text")
  refuses(b"\x8f(" + nested + b"\x90.", tmp_path, "a key that is no text")
  refuses(b"(" + nested + b"\x91.", tmp_path, "an instruction")
  pairs = b"ccollections\nOrderedDict\n(]" + nested + b"N\x86atR."
  refuses(pairs, tmp_path, "a key that is no text")
  elements = b"cbuiltins\nset\n(]" + nested + b"atR."
  refuses(elements, tmp_path, "a key that is no text")
  size = b"}ctorch\nSize\n(]" + nested + b"atRNs."
  refuses(size, tmp_path, "a size of something else than integers")
  pid = b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + nested + b"X\0\0\0\0I4\nNtQ."
  data = b"".join(pickle.dumps(x, 2) for x in HEAD)
  refuses(data + pid, tmp_path, "a reference to no storage")


def test_a_billion_modules_are_refused(tmp_path):
  state = b"}" + text("_modules") + b"}" + text("a") + b"h\x01s" + text("b") + b"h\x01s"
  data = MODULE + b")R" + b"q\x01" + b"0"
  for _ in range(60):
    data += MODULE + b")R" + state + b"sb" + b"q\x01" + b"0"
  refuses(data + b"h\x01.", tmp_path, "more than 16384 modules")


def test_a_module_inside_itself_and_a_chain_of_modules(tmp_path):
  chain = MODULE + b")Rq\x010"
  for _ in range(5000):
    inner = b"}" + text("_modules") + b"}" + text("a") + b"h\x01ss"
    chain += MODULE + b")R" + inner + b"bq\x010"
  refuses(chain + b"h\x01.", tmp_path, "names of modules|Recursion|damaged")
  itself = MODULE + b")Rq\x01}" + text("_modules") + b"}" + text("a") + b"h\x01ssb."
  refuses(itself, tmp_path, "a module inside itself")


def test_many_views_of_one_storage_are_refused(tmp_path):
  numel, views = 2**18, 2000
  body = b"}" + storage(numel) + b"q\x010"
  ints = f"I{numel}\n".encode()
  view = TENSOR + b"(h\x01I0\n(" + ints + b"t(I1\ntI00\nNtR"
  body += b"".join(text(f"w{k}") + view + b"s" for k in range(views))
  refuses(legacy(body + b".", numel), tmp_path, "far more content than the file")


def test_storages_together_are_no_larger_than_their_file(tmp_path):
  body = b"}"
  for k in range(500):
    one = storage(2**18).replace(b"X\x01\0\0\x000", text(f"{k:05d}"))
    body += text(f"w{k}") + one + b"s"
  padding = bytes(2**20)
  refuses(legacy(body + b".") + padding, tmp_path, "a storage larger than the file")


def test_endless_programs_are_refused(tmp_path):
  refuses(b"N0" * 2**20 + b".", tmp_path, "a pickle of more than", trace=False)
  copies = b"](" + b"N" * 10**5 + b"eq\x010" + b"ctorch\nSize\n(h\x01tR0" * 10**3
  refuses(copies + b".", tmp_path, "a size of|far more content")
  numbers = b"](" + b"K\1" * 10**5 + b"eq\x010" + b"ctorch\nSize\n(h\x01tR0" * 10**3
  refuses(numbers + b".", tmp_path, "far more content")


def test_lengths_beyond_the_end_are_refused(tmp_path):
  for opcode, kind in ((b"X", "<L"), (b"B", "<L"), (b"\x8b", "<l"), (b"T", "<l")):
    refuses(opcode + struct.pack(kind, 2**31 - 1) + b".", tmp_path, "damaged")
  for opcode in (b"\x8d", b"\x8e", b"\x96"):
    refuses(opcode + struct.pack("<Q", 2**40) + b".", tmp_path, "damaged")


def test_nested_pickles_are_bounded(tmp_path):
  """The same 1 MB, loaded a thousand times, and pickles within pickles."""
  inner = legacy(storage(2**18) + b".", 2**18)
  call = STORAGE + b"(h\x01tR"
  data = b"B" + struct.pack("<L", len(inner)) + inner + b"q\x010]"
  assert refuses(data + call + b"a.", tmp_path, "holds no tensors")
  refuses(data + (call + b"a") * 1000 + b".", tmp_path, "far more content")
  for _ in range(3):
    inner = b"B" + struct.pack("<L", len(inner)) + inner + b"q\x010" + call + b"."
    inner = legacy(inner)
  refuses(inner, tmp_path, "a storage of another form|damaged")


def safetensors(header: dict | bytes, data: bytes = b"", length: int = -1) -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text) if length < 0 else length) + text + data


def entry(begin: int, end: int, shape: tuple = (1,), dtype: str = "F32") -> dict:
  return {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, end]}


def test_safetensors_are_those_of_the_original_reader(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {
    "w": rng.standard_normal((3, 4)).astype(np.float32),
    "half": rng.standard_normal(5).astype(np.float16),
    "brain": rng.standard_normal(5).astype(ml_dtypes.bfloat16),
    "small": rng.standard_normal(5).astype(ml_dtypes.float8_e4m3fn),
    "wide": rng.standard_normal(5).astype(ml_dtypes.float8_e5m2),
    "double": rng.standard_normal(2),
    "flags": np.array([True, False]),
    "ints": np.arange(6, dtype=np.int64).reshape(2, 3),
    "none": np.zeros((0, 3), np.float32),
    "scalar": np.array(2, np.float32),
  }
  path = tmp_path / "a.safetensors"
  original.save_file(tensors, path, {"format": "pt"})
  read = state_dict.read(str(path))
  assert read.keys() == tensors.keys()
  for name, x in read.items():
    assert x.dtype == tensors[name].dtype
    assert x.shape == tensors[name].shape
    assert x.tobytes() == tensors[name].tobytes()


BAD_SAFETENSORS = {
  "one place": {f"w{k}": entry(0, 4) for k in range(1000)},
  "overlap": {"a": entry(0, 4), "b": entry(2, 6)},
  "hole": {"a": entry(0, 4), "b": entry(8, 12)},
  "beyond": {"a": entry(0, 4 * 10**12, (10**12,))},
  "other shape": {"a": entry(0, 4, (2,))},
  "negative": {"a": entry(0, 4, (-1,))},
  "backwards": {"a": entry(4, 0, (1,))},
  "huge axis": {"a": entry(0, 0, (0, 2**50)), "b": entry(0, 4)},
  "long name": {"w" * 100_000: entry(0, 4)},
  "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
  "list": [1, 2],
  "text": b'{"a": ',
  "deep": b"[" * 100_000,
  "no text": b"\xff\xfe\xff",
  "more data": {"a": entry(0, 2, (1,), "F16")},
}


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_safetensors_that_lie_are_refused(name, tmp_path):
  data = safetensors(BAD_SAFETENSORS[name], bytes(4))
  refuses(data, tmp_path, "is damaged, or no file of weights", "a.safetensors")


def test_a_header_longer_than_its_file(tmp_path):
  data = safetensors({"a": entry(0, 4)}, bytes(4), 2**62)
  refuses(data, tmp_path, "the header is said to have", "a.safetensors")


def test_types_that_are_not_read_are_named(tmp_path):
  data = safetensors({"a": entry(0, 4, (8,), "F4")}, bytes(4))
  line = refuses(data, tmp_path, "the tensor a has the type F4", "a.safetensors")
  assert "damaged" not in line


def test_what_is_no_regular_file_is_refused(tmp_path):
  os.mkfifo(tmp_path / "a.safetensors")
  (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
  for path, match in (
    (tmp_path / "a.safetensors", "not a regular file"),
    ("/dev/zero", "not a regular file"),
    (tmp_path / "loop.pt", "symbolic links"),
    (tmp_path, "Is a directory"),
  ):
    with pytest.raises(UserError, match=match):
      state_dict.read(str(path))


def test_weights_that_are_not_finite_are_named():
  like = {"a": np.zeros(3, np.float32), "b": np.zeros(2, np.float16)}
  tensors = {"a": np.array([0, np.nan, 1.0]), "b": np.array([1e6, 0])}
  with pytest.raises(UserError, match="not finite: a, b"):
    state_dict.match_params(tensors, like, lambda keys: keys[0])
  tensors = {"a": np.zeros(3), "b": np.zeros(2, complex)}
  with pytest.raises(UserError, match="of another type: b complex128"):
    state_dict.match_params(tensors, like, lambda keys: keys[0])


def test_settings_of_pickled_modules_are_read():
  """Numbers that modules have as attributes, beside their tensors."""
  tensors, settings = state_dict.read_with_settings(str(FOLDER / "edm.pkl"))
  assert tensors.keys() == state_dict.read(str(FOLDER / "edm.pkl")).keys()
  assert settings["enc.8x8_conv.training"] is False
  assert state_dict.setting(settings, "training") is False
  for name in ("zip.pt", "old.pt", "file.safetensors", "expected.npz"):
    assert state_dict.read_with_settings(str(FOLDER / name))[1] == {}
