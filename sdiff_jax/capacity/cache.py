"""Cache of the facts of compiled programs, ~/.cache/sdiff_jax/rehearsals.

A program is identified by its StableHLO text, that is by what is compiled. Lowering
costs seconds (10 s of CPU time for the step of the smallest EDM2 network, half of what
a run that hits the cache costs), compilation minutes.
"""

import hashlib
import os
import pathlib

import jax
import jaxlib

from sdiff_jax.capacity import chips
from sdiff_jax.io import file_io, records
from sdiff_jax.training import flops
from sdiff_jax.types import Json, UserError

FOLDER = "~/.cache/sdiff_jax/rehearsals"


def key(lowered: jax.stages.Lowered, pod: str, level: str) -> str:
  """Returns the name of a program's facts.

  Args:
    lowered: the program.
    pod: name of the topology that it is compiled for.
    level: optimization level of the compiler.
  """
  digest = hashlib.sha256(lowered.as_text().encode())
  # The modules that derive facts from the compiled program and count operations.
  sources = sorted(pathlib.Path(__file__).parent.glob("*.py"))
  for source in (*sources, pathlib.Path(flops.__file__)):
    digest.update(source.read_bytes())
  for text in (pod, level, jax.__version__, jaxlib.__version__, chips.compiler(pod)):
    digest.update(b"\0" + text.encode())
  return digest.hexdigest()[:24]


def _path(name: str) -> str:
  return os.path.join(os.path.expanduser(FOLDER), f"{name}.json")


def load(name: str) -> dict[str, Json] | None:
  """Returns the facts that are stored under a key, or None."""
  try:
    return records.read(_path(name), dict[str, Json])
  except UserError:  # there is no such file, or it is damaged
    return None


def save(name: str, facts: dict[str, Json]) -> None:
  """Stores the facts of a program under a key."""
  file_io.write_json(_path(name), facts)
