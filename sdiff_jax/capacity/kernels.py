"""Operations and memory traffic of each kernel of a compiled program, from its HLO text.

A kernel is an instruction that runs on the device as a whole: a fusion, a matrix product,
a convolution, a copy. It reads its operands from memory once and writes its results once;
an operand of which it takes a slice counts as that slice, and so does a result that it
updates in place. Arrays that stay in the memory of a TPU's core, S(1), count nothing.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sdiff_jax.capacity import hlo

INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\](\{[^{}]*\})?")
NAME = re.compile(r"%([\w.\-]+)")
ORIGIN = re.compile(r'op_name="([^"]*)"')
KINDS = ("convolution", "product", "custom", "memory")
ON_CHIP = "S(1)"  # the memory space of a TPU's core
# Instructions that run nothing: they name, group or reinterpret arrays.
NO_KERNEL = frozenset(
  {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"),
  }
)
SLICES = ("dynamic-slice", "slice", "gather")
CONTROL = ("while", "conditional", "call", "async-start")
CUDNN = "__cudnn$conv"
CUSTOM = re.compile(r'custom_call_target="(__gpu\$xla\.gpu\.triton|tpu_custom_call)"')
# Which of its operands, or -1 for the result, is the output of a convolution, and which
# its kernel, by what a call computes.
CUDNN_ROLES = {"Forward": (-1, 1), "BackwardInput": (0, 1), "BackwardFilter": (1, -1)}


class Kernel(NamedTuple):
  """One kernel of a program.

  Attributes:
    kind: "convolution", "product" (of matrices), "custom" (a kernel of Pallas) or
      "memory" (none of them).
    flops: operations of its convolutions and products, see `with_custom`.
    bytes: that it reads from memory and writes to it.
    calls: how often one run of the program executes it.
    origin: where it comes from, JAX's path of function names.
  """

  kind: str
  flops: float
  bytes: int
  calls: int
  origin: str


class Instruction(NamedTuple):
  """An instruction of a computation; `arrays` are its results as (bits, shape, place)."""

  name: str
  opcode: str
  arrays: tuple[tuple[int, tuple[int, ...], str], ...]
  operands: tuple[str, ...]
  text: str
  is_root: bool

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the first result."""
    return self.arrays[0][1] if self.arrays else ()

  @property
  def bytes(self) -> int:
    """Bytes of the results that are in the device's memory."""
    return sum(
      math.prod(shape) * bits // 8
      for bits, shape, place in self.arrays
      if ON_CHIP not in place
    )


Computation = dict[str, Instruction]


def read(text: str) -> list[Kernel]:
  """Returns the kernels of a program, those of a loop's body once with its trip count.

  Collectives are not among them, see `hlo.read`.

  Args:
    text: `compiled.as_text()`, with compiled a `jax.stages.Compiled`.
  """
  blocks, entry = hlo.computations(text)
  parsed = {name: _parse(lines) for name, lines in blocks.items()}
  kernels = []

  def walk(name: str, calls: int) -> None:
    block = parsed.get(name, {})
    for instruction in block.values():
      if instruction.opcode in CONTROL:
        trips = 1
        if instruction.opcode == "while":
          trips = hlo.trip_count(instruction.text, blocks)
        for called in _called(instruction):
          walk(called, calls * trips)
      elif _is_kernel(instruction):
        kernels.append(_kernel(instruction, block, parsed, calls))

  walk(entry, 1)
  return kernels


def flops(kernels: list[Kernel]) -> float:
  """Returns the operations of one run of a program."""
  return sum(k.calls * k.flops for k in kernels)


def traffic(kernels: list[Kernel]) -> int:
  """Returns the bytes that one run of a program reads and writes."""
  return sum(k.calls * k.bytes for k in kernels)


def launches(kernels: list[Kernel]) -> int:
  """Returns the number of kernels that one run of a program starts."""
  return sum(k.calls for k in kernels)


def with_custom(kernels: list[Kernel], operations: float) -> list[Kernel]:
  """Returns kernels among which those of Pallas have their operations, too.

  A program's text does not tell them; they are what the other kernels leave of all.

  Args:
    kernels: of a program.
    operations: of the program, on one device.
  """
  custom = [k for k in kernels if k.kind == "custom"]
  left = operations - flops(kernels)
  if not custom or left <= 0:
    return kernels
  share = left / launches(custom)
  return [k._replace(flops=share) if k.kind == "custom" else k for k in kernels]


def distinct(kernels: list[Kernel]) -> list[Kernel]:
  """Returns each different kernel once, with the sum of its calls."""
  calls: dict[Kernel, int] = {}
  for kernel in kernels:
    once = kernel._replace(calls=1)
    calls[once] = calls.get(once, 0) + kernel.calls
  return [kernel._replace(calls=n) for kernel, n in calls.items()]


def _parse(lines: list[str]) -> Computation:
  """Returns the instructions of a computation by their names."""
  block = {}
  for line in lines:
    if (match := INSTRUCTION.match(line)) is None:
      continue
    root, name, result, opcode, rest = match.groups()
    arrays = tuple(
      (hlo.bits(dtype), tuple(int(n) for n in shape.split(",") if n), place or "")
      for dtype, shape, place in ARRAY.findall(result)
    )
    operands = tuple(NAME.findall(_arguments(rest)))
    block[name] = Instruction(name, opcode, arrays, operands, rest, bool(root))
  return block


def _arguments(rest: str) -> str:
  """Returns what stands between the parentheses of an instruction."""
  depth = 1
  for i, character in enumerate(rest):
    depth += (character == "(") - (character == ")")
    if depth == 0:
      return rest[:i]
  return rest


def _called(instruction: Instruction) -> Iterator[str]:
  """Yields the computations that an instruction runs as kernels of their own."""
  for how, name in hlo.CALLED.findall(instruction.text):
    if how in ("body", "calls", "to_apply"):
      yield name
  if branches := re.search(r"branch_computations=\{(.*?)\}", instruction.text):
    yield max(branches[1].split(", "), key=len).removeprefix("%")


def _is_kernel(instruction: Instruction) -> bool:
  opcode = instruction.opcode
  is_collective = re.match(hlo.KINDS, opcode)
  return not (opcode in NO_KERNEL or opcode.endswith("-done") or is_collective)


def _kernel(
  instruction: Instruction,
  block: Computation,
  parsed: dict[str, Computation],
  calls: int,
) -> Kernel:
  """Returns the kernel of an instruction of `block`."""
  inside = _inside(instruction, parsed)
  products = [(i, b) for b in inside for i in b.values()] or [(instruction, block)]
  counted = [_operations(i, b) for i, b in products]
  kinds = {kind for kind, count in counted if count}
  kind = "convolution" if "convolution" in kinds else "product" if kinds else "memory"
  if CUSTOM.search(instruction.text):
    kind = "custom"
  origin = ORIGIN.search(instruction.text)
  return Kernel(
    kind,
    float(sum(count for _, count in counted)),
    _traffic(instruction, block, parsed),
    calls,
    origin[1] if origin else "",
  )


def _inside(
  instruction: Instruction, parsed: dict[str, Computation]
) -> list[Computation]:
  """Returns the computation of a fusion, and those of the fusions in it."""
  called = re.search(r"calls=%?([\w.\-]+)", instruction.text)
  if instruction.opcode != "fusion" or not called:
    return []
  block = parsed.get(called[1], {})
  return [block, *(b for i in block.values() for b in _inside(i, parsed))]


def _traffic(
  instruction: Instruction, block: Computation, parsed: dict[str, Computation]
) -> int:
  """Returns the bytes that a kernel reads and writes."""
  operands = [block[name] for name in instruction.operands if name in block]
  inside = next(iter(_inside(instruction, parsed)), {})
  whole = [operand.bytes for operand in operands]
  if instruction.opcode in SLICES:
    return 2 * instruction.bytes
  if instruction.opcode == "dynamic-update-slice":
    return 2 * whole[1]
  result = instruction.bytes
  needed = _needed(inside, parsed)
  for i, number in _parameters(inside):
    if number >= len(whole) or not whole[number]:
      continue
    in_place = [
      u
      for u in inside.values()
      if u.opcode == "dynamic-update-slice" and u.operands[0] == i.name
    ]
    if in_place:
      updates = sum(inside[u.operands[1]].bytes for u in in_place)
      result += updates - len(in_place) * whole[number]
    whole[number] *= min(needed[i.name], 1.0)
  return int(sum(whole)) + max(result, 0)


def _needed(block: Computation, parsed: dict[str, Computation]) -> dict[str, float]:
  """Returns the fraction of each array of a fusion that its results depend on.

  A slice needs a part of its operand, and an update in place none of the array that it
  updates, also in a fusion inside of the fusion, such as that of one block's weights out
  of all; everything else needs of its operands what is needed of it.
  """
  needed = dict.fromkeys(block, 0.0)
  for instruction in reversed(block.values()):
    if instruction.is_root:
      needed[instruction.name] = 1.0
    fraction = min(needed[instruction.name], 1.0)
    inner = next(iter(_inside(instruction, parsed)), {})
    of_inner = _needed(inner, parsed)
    shares = {number: of_inner[p.name] for p, number in _parameters(inner)}
    for i, name in enumerate(instruction.operands):
      if name not in block:
        continue
      if i == 0 and instruction.opcode in SLICES:
        size = math.prod(block[name].shape) or 1
        needed[name] += fraction * math.prod(instruction.shape) / size
      elif i in shares:
        needed[name] += fraction * min(shares[i], 1.0)
      elif i > 0 or instruction.opcode != "dynamic-update-slice":
        needed[name] += fraction
  return needed


def _parameters(block: Computation) -> Iterator[tuple[Instruction, int]]:
  """Yields the parameters of a computation with their numbers."""
  for instruction in block.values():
    if instruction.opcode == "parameter":
      yield instruction, int(_arguments(instruction.text))


def _operations(instruction: Instruction, block: Computation) -> tuple[str, float]:
  """Returns the kind and the operations of a product or a convolution, else 0."""
  of_operands = [block[n].shape for n in instruction.operands if n in block]
  if instruction.opcode == "dot" or "__cublas$" in instruction.text:
    dims = re.search(
      r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.text
    )
    sizes = [
      of_operands[0][int(n)] for n in re.findall(r"\d+", dims[1] if dims else "")
    ]
    return "product", 2.0 * math.prod(instruction.shape) * math.prod(sizes)
  if instruction.opcode == "convolution":
    return _convolution(instruction, of_operands)
  if CUDNN in instruction.text:
    return "convolution", _cudnn(instruction, of_operands)
  return "memory", 0.0


def _labels(text: str) -> tuple[str, str, str]:
  """Returns the labels of the axes of input, kernel and output of a convolution."""
  return re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text).groups()


def _cudnn(instruction: Instruction, of_operands: list[tuple[int, ...]]) -> float:
  """Returns the operations of a call of cuDNN, whose labels are those of the forward."""
  role = next((r for r in CUDNN_ROLES if f"{CUDNN}{r}" in instruction.text), "Forward")
  output, kernel = (
    instruction.shape if at < 0 else of_operands[at] for at in CUDNN_ROLES[role]
  )
  labels = _labels(instruction.text)[1]
  taps = math.prod(n for n, label in zip(kernel, labels, strict=True) if label != "o")
  return 2.0 * math.prod(output) * taps


def _convolution(
  instruction: Instruction, of_operands: list[tuple[int, ...]]
) -> tuple[str, float]:
  """Returns the kind and the operations of XLA's convolution, without its padding.

  On a TPU every product of matrices is one; without a window it is called a product.
  """
  inputs, kernel, outputs = _labels(instruction.text)
  x, w = of_operands[:2]
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _window(instruction.text)))
  count = 2.0 * w[kernel.index("i")]
  count *= math.prod(
    n for n, label in zip(instruction.shape, outputs, strict=True) if label in "bf"
  )
  sizes = [label for label in outputs if label.isdigit()]
  for label in sizes:
    count *= _taps(
      x[inputs.index(label)],
      w[kernel.index(label)],
      instruction.shape[outputs.index(label)],
      {k: v.split("x")[int(label)] for k, v in window.items()},
    )
  spatial = window.get("size", "1").split("x")
  is_product = not sizes or all(n == "1" for n in spatial) or "lhs_dilate" in window
  return "product" if is_product else "convolution", count


def _window(text: str) -> str:
  window = re.search(r"window=\{(.*?)\}", text)
  return window[1] if window else ""


def _taps(x: int, w: int, out: int, window: dict[str, str]) -> int:
  """Returns the number of products along an axis, without those of the padding."""
  low = int(window.get("pad", "0_0").partition("_")[0])
  stride, dilation, base = (
    int(window.get(name, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate")
  )
  at = np.arange(out)[:, None] * stride + np.arange(w) * dilation - low
  inside = (at >= 0) & (at <= (x - 1) * base) & (at % base == 0)
  return int(inside.sum())
