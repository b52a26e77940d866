"""Compiled programs in files, so that the devices of a pod do not wait for the compiler.

A file is a line of JSON, `Header`, and JAX's own bytes. JAX has no other API for them than
`jax.experimental.serialize_executable`. Those bytes contain a pickle, which can run any
code: load only files that you have made.
"""

import functools
import hashlib
import importlib.metadata
import json
import re
from typing import TypedDict

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from sdiff_jax.io import file_io, records
from sdiff_jax.types import UserError

# What decides how a program is compiled, if it is installed.
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt")
MAX_BYTES = 2**34
_NAME = re.compile(r"@([\w.$-]+)")
# Name and rest of each function; its end is the only brace at this depth.
_FUNCTION = re.compile(r"func\.func \w+ @([\w.$-]+)(.*?)\n  \}", re.DOTALL)


class Header(TypedDict):
  """What a compiled program was made from.

  Attributes:
    versions: of JAX and of the compilers.
    program: digest of the lowered program.
    payload: digest of the bytes that follow.
  """

  versions: dict[str, str]
  program: str
  payload: str


def versions(libraries: tuple[str, ...] = COMPILERS) -> dict[str, str]:
  """Returns the versions of those libraries that are installed.

  Example:
    >>> sorted(versions(("jax", "no-such-library")))
    ['jax']
  """
  found = {}
  for name in libraries:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def fingerprint(text: str) -> str:
  """Returns a digest of a lowered program, whatever its functions are called.

  JAX writes a function that is called twice once or twice, with running numbers in its
  name, which depends on what the process has traced before. So a call counts as the
  digest of what it calls.

  Args:
    text: the program, `lowered.as_text()`.

  Example:
    >>> text = '''module {
    ...   func.func public @main() {
    ...     call @f()
    ...   }
    ...   func.func private @f() {
    ...     return
    ...   }
    ... }'''
    >>> fingerprint(text) == fingerprint(text.replace("@f", "@f_17"))
    True
    >>> fingerprint(text) == fingerprint(text.replace("return", "other"))
    False
  """
  bodies = dict(_FUNCTION.findall(text))

  @functools.cache
  def of(name: str) -> str:
    return _digest(called(bodies[name]).encode())

  def called(body: str) -> str:
    return _NAME.sub(lambda m: of(m[1]) if m[1] in bodies else m[0], body)

  return _digest((text.partition("func.func")[0] + of("main")).encode())


def save(path: str, lowered: jax.stages.Lowered) -> None:
  """Compiles a program and writes it.

  Args:
    path: of the file, in a folder or in a bucket.
    lowered: the program, for devices that may be absent.
  """
  # What comes from JAX's cache of compiled programs cannot be serialized again.
  cached = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  try:
    payload, _, _ = serialize_executable.serialize(lowered.compile())
  finally:
    jax.config.update("jax_enable_compilation_cache", cached)
    compilation_cache.reset_cache()
  header: Header = {
    "versions": versions(),
    "program": fingerprint(lowered.as_text()),
    "payload": _digest(payload),
  }
  file_io.write_bytes(path, json.dumps(header).encode() + b"\n" + payload)


def load(path: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """Returns the compiled program of a file, without compiling.

  Args:
    path: of the file.
    lowered: the program for the devices of this process.

  Returns:
    What `lowered.compile()` would return.

  Raises:
    UserError: the file is damaged, or it was made from another program or with another
      version of JAX or of the compiler.
  """
  remedy = "make it again by a rehearsal"
  line, _, payload = file_io.read_bytes(path, remedy, MAX_BYTES).partition(b"\n")
  header = records.decode(line, Header, path, remedy)
  for name, version in versions().items():
    if (made := header["versions"].get(name)) != version:
      raise UserError(f"{path}: made with {name} {made}, here is {version}; {remedy}")
  if header["program"] != fingerprint(lowered.as_text()):
    raise UserError(
      f"{path}: another program; network, loss, optimizer, batch size and mesh must be "
      f"those of the rehearsal; {remedy}"
    )
  if header["payload"] != _digest(payload):
    raise UserError(f"{path}: damaged; {remedy}")
  return serialize_executable.deserialize_and_load(
    payload, lowered.in_tree, lowered.out_tree
  )


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()
