"""Hypothesis strategies that damage valid inputs: cut, flip, retype, deepen, enlarge."""

import json
import os
import re
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

POSITIONS = st.integers(0, 2**16 - 1)  # of 2^16 parts of whatever is damaged
# Numbers where arithmetic goes wrong, as the bytes of headers have them.
INTEGERS = st.sampled_from(
  [*range(3), 255, 10**9, *(2**n - k for n in (15, 16, 31, 32, 48, 63) for k in (0, 1))]
)
FORMATS = st.sampled_from(["<B", "<H", ">H", "<I", ">I", "<Q", ">Q"])
# Values that no field, or not every field, is meant to have.
JUNK: tuple[Any, ...] = (
  *(None, True, False, 0, -1, 1, 2, 3, 0.5, -0.5, 1e308, -1e308, 1e-320, 7.0),
  *(2**31, 2**53 + 1, 2**63, -(2**63), 10**30, 10**6, 10**9),
  *(float("nan"), float("inf"), -float("inf")),
  *("", " ", "x", "0", "1", "nan", "None", "../../etc/passwd", "/dev/zero", "a/b"),
  *("\x00", "\ud800", "\u202e\u200b", "a\nb\rc", "\x1b[31m", "é" * 40, "%s{0}{x}"),
  *("x" * 600, "x" * 100_000, "__class__", "__reduce__", "os.system"),
  *([], {}, [[]], [{}], [None], {"": None}, {"name": None}, {"name": "x"}, [1, 2, 3]),
  *([0], [-1], [1e308], ["x"], [10**9] * 4, {"a": {"b": {"c": 1}}}),
)


def _part(position: int, size: int) -> int:
  """Returns a position in a sequence of a size."""
  return position * size >> 16


# --- bytes -----------------------------------------------------------------------------


def _cut(data: bytes, at: int, number: int, form: str) -> bytes:
  return data[: _part(at, len(data) + 1)]


def _behead(data: bytes, at: int, number: int, form: str) -> bytes:
  return data[_part(at, min(len(data), 64) + 1) :]


def _flip(data: bytes, at: int, number: int, form: str) -> bytes:
  if not data:
    return data
  i = _part(at, len(data))
  return data[:i] + bytes([data[i] ^ (1 << number % 8)]) + data[i + 1 :]


def _flip_head(data: bytes, at: int, number: int, form: str) -> bytes:
  """Flips a bit of the header, where formats have their sizes."""
  head = data[:256]
  return _flip(head, at, number, form) + data[256:]


def _overwrite(data: bytes, at: int, number: int, form: str) -> bytes:
  packed = struct.pack(form, number % 256 ** struct.calcsize(form))
  i = _part(at, len(data) + 1)
  return data[:i] + packed + data[i + len(packed) :]


def _overwrite_head(data: bytes, at: int, number: int, form: str) -> bytes:
  return _overwrite(data[:256], at, number, form) + data[256:]


def _overwrite_tail(data: bytes, at: int, number: int, form: str) -> bytes:
  """Overwrites a number at the end, where archives have their contents."""
  cut = max(len(data) - 256, 0)
  return data[:cut] + _overwrite(data[cut:], at, number, form)[: len(data) - cut]


def _insert(data: bytes, at: int, number: int, form: str) -> bytes:
  i = _part(at, len(data) + 1)
  return data[:i] + struct.pack(form, number % 256 ** struct.calcsize(form)) + data[i:]


def _remove(data: bytes, at: int, number: int, form: str) -> bytes:
  i = _part(at, len(data) + 1)
  return data[:i] + data[i + 1 + number % 64 :]


def _repeat(data: bytes, at: int, number: int, form: str) -> bytes:
  i = _part(at, len(data) + 1)
  return data[:i] + data[max(i - 1 - number % 256, 0) : i] * 8 + data[i:]


def _erase(data: bytes, at: int, number: int, form: str) -> bytes:
  i = _part(at, len(data) + 1)
  return data[:i] + bytes(len(data[i : i + 64])) + data[i + 64 :]


def _digits(data: bytes, at: int, number: int, form: str) -> bytes:
  """Replaces a number that is written in digits."""
  matches = [*re.finditer(rb"\d+", data[:65536])]
  if not matches:
    return data
  match = matches[_part(at, len(matches))]
  return data[: match.start()] + str(number).encode() + data[match.end() :]


def _longer(data: bytes, at: int, number: int, form: str) -> bytes:
  return data + data[: 1 + number % 4096]


BYTE_CHANGES: tuple[Callable, ...] = (
  *(_cut, _behead, _flip, _flip_head, _flip_head, _overwrite, _overwrite_head),
  *(_overwrite_head, _overwrite_tail, _insert, _remove, _repeat, _erase, _digits),
  _longer,
)
_CHANGES = st.lists(
  st.tuples(st.sampled_from(BYTE_CHANGES), POSITIONS, INTEGERS, FORMATS),
  min_size=1,
  max_size=3,
)


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
  """Strategy for bytes that differ from valid ones in one to three places."""
  for change, at, number, form in draw(_CHANGES):
    data = change(data, at, number, form)
  return data


# --- JSON ------------------------------------------------------------------------------


def paths(value: Any, path: tuple = ()) -> list[tuple]:
  """Returns the keys that lead to every part of a value."""
  if isinstance(value, dict):
    items: Any = value.items()
  elif isinstance(value, list):
    items = enumerate(value[:100])
  else:
    return [path]
  return [path, *(p for key, item in items for p in paths(item, (*path, key)))]


def _replaced(value: Any, path: tuple, new: Callable[[Any], Any]) -> Any:
  """Returns a value in which the part at a path is new."""
  if not path:
    return new(value)
  key, *rest = path
  copy = dict(value) if isinstance(value, dict) else list(value)
  copy[key] = _replaced(value[key], tuple(rest), new)
  return copy


def _without(value: Any, path: tuple) -> Any:
  """Returns a value without the part at a path."""
  if not path:
    return None

  def new(parent: Any) -> Any:
    if isinstance(parent, dict):
      return {k: v for k, v in parent.items() if k != path[-1]}
    return [v for k, v in enumerate(parent) if k != path[-1]]

  return _replaced(value, path[:-1], new)


def _retyped(old: Any, junk: Any) -> Any:
  """Returns the same value as another type."""
  if isinstance(old, bool | None):
    return str(old)
  if isinstance(old, int | float):
    return [str(old), [old], -old, old + 0.5, old * 10**9][hash(str(junk)) % 5]
  if isinstance(old, str):
    return [[old], {"name": old}, old + "x", old.upper(), 7][len(str(junk)) % 5]
  return {"x": old} if isinstance(old, list) else [old]


def _deeper(value: Any, depth: int) -> Any:
  for _ in range(depth):
    value = [value]
  return value


@st.composite
def damaged_value(draw: st.DrawFn, value: Any) -> Any:
  """Strategy for values of JSON, one to three parts of which are changed."""
  for _ in range(draw(st.integers(1, 3))):
    where = paths(value)
    path = where[_part(draw(POSITIONS), len(where))]
    kind = draw(
      st.sampled_from(("junk", "junk", "junk", "retype", "drop", "add", "big"))
    )
    junk = draw(st.sampled_from(JUNK))
    if kind == "junk":
      value = _replaced(value, path, lambda old, junk=junk: junk)
    elif kind == "retype":
      value = _replaced(value, path, lambda old, junk=junk: _retyped(old, junk))
    elif kind == "drop":
      value = _without(value, path)
    elif kind == "add":
      names = draw(st.sampled_from(("x", "", "name", "_class_name", "x" * 700, "\n")))

      def added(old: Any, names: str = names, junk: Any = junk) -> Any:
        if isinstance(old, dict):
          return old | {names: junk}
        return [*old, junk] if isinstance(old, list) else {names: old}

      value = _replaced(value, path, added)
    else:
      depth, count = draw(st.sampled_from(((50, 1), (5, 1), (1, 5000), (2000, 1))))

      def enlarged(old: Any, depth: int = depth, count: int = count) -> Any:
        return _deeper(old, depth) if count == 1 else [old] * count

      # json.dumps cannot nest deeper than the stack of the interpreter.
      value = _replaced(value, path, enlarged if depth < 900 else lambda old: "@deep")
  return value


@st.composite
def damaged_json(draw: st.DrawFn, data: bytes) -> bytes:
  """Strategy for the bytes of a JSON file whose value is changed."""
  value = draw(damaged_value(json.loads(data)))
  text = json.dumps(value, ensure_ascii=draw(st.booleans()))
  text = text.replace('"@deep"', "[" * 100_000 + "]" * 100_000)
  encoded = text.encode("utf-8", "surrogatepass")
  spoil = draw(st.integers(0, 15))
  if spoil == 0:
    encoded = encoded.replace(b"{", b'{"twice": 1, "twice": 2, ', 1)
  elif spoil == 1:
    encoded = b"\xef\xbb\xbf" + encoded
  elif spoil == 2:
    encoded = text.encode("utf-16", "surrogatepass")
  elif spoil == 3:
    encoded = draw(damaged_bytes(encoded))
  return encoded


# --- folders ---------------------------------------------------------------------------


def _is_json(name: str) -> bool:
  return name.endswith((".json", ".zarray", ".zgroup", ".zattrs"))


def write(folder: str, files: dict[str, bytes]) -> None:
  """Writes files below a folder, by their relative paths."""
  for name, data in files.items():
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
      file.write(data)


def _to_directory(path: str) -> None:
  os.remove(path)
  os.mkdir(path)


def _to_pipe(path: str) -> None:
  os.remove(path)
  os.mkfifo(path)


def _to_link(target: str) -> Callable[[str], None]:
  def replace(path: str) -> None:
    os.remove(path)
    os.symlink(target or os.path.basename(path), path)  # "" for a link to itself

  return replace


def _to_sparse(path: str) -> None:
  with open(path, "r+b") as file:
    file.truncate(1 << 40)


def _to_text(text: bytes) -> Callable[[str], None]:
  def replace(path: str) -> None:
    with open(path, "wb") as file:
      file.write(text)

  return replace


def _beside(name: bytes) -> Callable[[str], None]:
  def add(path: str) -> None:
    with open(os.path.join(os.path.dirname(os.fsencode(path)), name), "wb") as file:
      file.write(b"x")

  return add


FILE_CHANGES: tuple[Callable[[str], None], ...] = (
  *(os.remove, _to_directory, _to_pipe, _to_link(""), _to_link("/nothing")),
  *(_to_link("/dev/zero"), _to_link("/dev/null"), _to_link("/proc/self/mem")),
  *(
    _to_sparse,
    _to_text(b""),
    _to_text(b"\0" * 4096),
    _to_text(b"{}"),
    _to_text(b"[]"),
  ),
  *(_to_text(b"null"), _to_text(b"PK\5\6" + bytes(18)), _to_text(b"\x80\x04N.")),
  *(_beside(b"\xff\xfe.png"), _beside(b"a\nb.json"), _beside(b"x.safetensors")),
  *(_beside(b"0.npz"), _beside(b"-rf"), _beside("\u202e.png".encode())),
)


@st.composite
def damage(
  draw: st.DrawFn, files: dict[str, bytes], names: tuple[str, ...] = ()
) -> Callable[[str], None]:
  """Strategy for functions that write a damaged copy of files into an empty folder.

  Args:
    draw: of hypothesis.
    files: relative path -> content of the valid files.
    names: files to damage; () for all.
  """
  names = names or tuple(sorted(files))
  name = names[_part(draw(POSITIONS), len(names))]
  kind = draw(st.sampled_from(("content",) * 4 + ("file", "swap")))
  if kind == "content":
    strategy = damaged_bytes
    if _is_json(name) and draw(st.integers(0, 4)):
      strategy = damaged_json
    changed = files | {name: draw(strategy(files[name]))}
    return lambda folder: write(folder, changed)
  if kind == "swap":
    other = names[_part(draw(POSITIONS), len(names))]
    changed = files | {name: files[other], other: files[name]}
    return lambda folder: write(folder, changed)
  change = draw(st.sampled_from(FILE_CHANGES))

  def with_change(folder: str) -> None:
    write(folder, files)
    change(os.path.join(folder, name))

  return with_change
