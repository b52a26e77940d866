"""Collective operations of a compiled program, parsed from its HLO text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = "all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter"
OPERATION = re.compile(rf" = (.*?) ({KINDS})(-start)?\(")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"(calls|to_apply|body|condition)=%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# A send of XLA's runtime for several slices.
MEGASCALE = re.compile(
  r" = \(([a-z]+\d+\w*|pred)\[([\d,]*)\].*? send\(.*_xla_megascale_target=\"\{([\d,]+)\}.*"
  r"_xla_megascale_transfer_type=\"(\w+)\""
)


class Collective(NamedTuple):
  """A collective operation of a program.

  Attributes:
    kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all" or
      "collective-permute".
    dtype: of its arrays, XLA's name: "f32", "bf16", ...
    bytes: of the whole arrays, that is after a gather and before a scatter.
    group_size: number of devices that communicate with each other.
    calls: how often one run of the program executes it. A loop of unknown length counts
      as one iteration.
    in_loop: whether it is inside a loop.
    between_slices: whether a network between slices carries it.
  """

  kind: str
  dtype: str
  bytes: int
  group_size: int
  calls: int
  in_loop: bool
  between_slices: bool = False

  @property
  def ring_bytes(self) -> float:
    """Bytes that a device sends in one call: n (k-1)/k, twice that for all-reduce."""
    if self.kind == "collective-permute":
      return float(self.bytes)
    rounds = 2 if self.kind == "all-reduce" else 1
    return rounds * self.bytes * (self.group_size - 1) / self.group_size


def read(text: str) -> list[Collective]:
  """Returns the collectives of a program.

  Args:
    text: `compiled.as_text()`, with compiled a `jax.stages.Compiled`.
  """
  blocks, entry = computations(text)
  devices = re.search(r"num_partitions=(\d+)", text)
  collectives, chains = [], set()

  def walk(name: str, calls: int, in_loop: bool) -> None:
    for line in blocks.get(name, ()):
      # A TPU's asynchronous collective is listed in several computations.
      chain = re.search(r'chain_id="(\d+)"', line)
      if chain is None or chain[1] not in chains:
        group = _group(line, int(devices[1]) if devices else 1)
        for kind, dtype, size in _arrays(line, name, group):
          collectives.append(Collective(kind, dtype, size, group, calls, in_loop))
          chains.update(chain.groups() if chain else ())
        collectives.extend(_between_slices(line, calls, in_loop))
      trips = trip_count(line, blocks) if "body=" in line else 1
      for how, called in CALLED.findall(line):
        walk(called, calls * trips, in_loop or how in ("body", "condition"))
      if branches := re.search(r"branch_computations=\{(.*?)\}", line):
        for called in branches[1].split(", "):
          walk(called.removeprefix("%"), calls, in_loop)

  walk(entry, 1, False)
  return collectives


def total(collectives: list[Collective]) -> dict[tuple[str, str], tuple]:
  """Returns (kind, dtype) -> calls, bytes and ring bytes of one run of a program."""
  sums = {}
  for c in sorted(collectives):
    old = sums.get((c.kind, c.dtype), (0, 0, 0.0))
    new = (c.calls, c.calls * c.bytes, c.calls * c.ring_bytes)
    sums[c.kind, c.dtype] = tuple(a + b for a, b in zip(old, new, strict=True))
  return sums


def computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns computation -> its lines, and the name of the entry computation."""
  blocks, lines, entry = {}, [], ""
  for line in text.splitlines():
    if not line.startswith(" ") and (head := COMPUTATION.match(line)):
      lines = blocks[head[2]] = []
      entry = head[2] if head[1] else entry
    else:
      lines.append(line)
  return blocks, entry


def trip_count(line: str, blocks: dict[str, list[str]]) -> int:
  """Returns the trip count of a `while`, as annotated or from `i < constant`."""
  if annotation := TRIPS.search(line):
    return int(annotation[1])
  condition = blocks.get(re.search(r"condition=%?([\w.\-]+)", line)[1], ())
  ends = re.findall(r" = s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
  counts = any("ROOT" in line and "direction=LT" in line for line in condition)
  return int(ends[0]) if counts and len(ends) == 1 else 1


def _arrays(line: str, inside: str, group: int) -> Iterator[tuple[str, str, int]]:
  """Yields kind, dtype and bytes of the whole arrays of the collective in a line."""
  operation = OPERATION.search(line)
  if operation is None:
    return
  result, kind, start = operation.groups()
  arrays = re.findall(r"([a-z]+\d+\w*|pred)\[([\d,]*)\]", result)
  if start and kind != "all-reduce":  # (operands, results, contexts)
    arrays = [
      (dtype, sizes) for dtype, sizes in arrays if (dtype, sizes) != ("u32", "")
    ]
    arrays = arrays[len(arrays) // 2 :]
  # A TPU's reduce-scatter is a fusion of an all-reduce and a slice.
  scatters = inside.startswith("all-reduce-scatter")
  sizes = {}
  for dtype, shape in arrays:
    count = math.prod(int(n) for n in shape.split(",") if n)
    sizes[dtype] = sizes.get(dtype, 0) + count * bits(dtype) // 8
  for dtype, size in sizes.items():
    if kind == "reduce-scatter":
      size *= group
    yield "reduce-scatter" if scatters else kind, dtype, size


def _between_slices(line: str, calls: int, in_loop: bool) -> Iterator[Collective]:
  """Yields the collective between slices of a TPU that sends to the host stand for."""
  if not (found := MEGASCALE.search(line)):
    return
  dtype, shape, slices, kind = found.groups()
  size = math.prod(int(n) for n in shape.split(",") if n) * bits(dtype) // 8
  kind, group = kind.lower().replace("_", "-"), len(slices.split(","))
  if kind in ("all-gather",):
    size *= group
  yield Collective(kind, dtype, size, group, calls, in_loop, between_slices=True)


def bits(dtype: str) -> int:
  """Returns the bits of an element of one of XLA's types."""
  return 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])


def _group(line: str, devices: int) -> int:
  """Returns the group size of a collective, in any of XLA's three notations."""
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return len(listed[1].split(","))
  if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
    return int(counted[1])
  if named := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[n]) for n in re.findall(r"'(\w+)'", named[2]))
  return devices
