"""Attention with a tangent: is it right, how fast is it, how much memory does it take?

  python benchmarks/attention.py [--lengths=1024,4096,16384] [--repeats=20]
  python benchmarks/attention.py --step        # an sCD step of a transformer on CPU
  python benchmarks/attention.py --topologies  # compiled for absent TPUs
  python benchmarks/attention.py --topologies=h100

The first checks every implementation that runs here against plain attention in float64,
then times, at 8 heads of 64 in bfloat16, the output with its tangent (jax.jvp) and the
gradient of a loss whose tangent is under stop_gradient (sCM). Memory is that of the
compiled program's temporaries. `--step` compares a whole step, paired and interleaved.
`--topologies` needs libtpu, and no TPU; for the H100 jax[cuda12], no GPU, and
CUDA_VISIBLE_DEVICES=-1 JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the environment.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.capacity.chips import H100
from sdiff_jax.kernels.attention import attention

HEADS, SIZE = 8, 64
IMPLS = ("plain", "chunked", "fused")


def jvp(impl: str, **options) -> Callable:
  """Returns (q, k, v, dq, dk, dv) -> output and tangent."""

  def call(*args: jax.Array) -> tuple:
    return jax.jvp(
      lambda *qkv: attention(*qkv, impl=impl, **options), args[:3], args[3:]
    )

  return call


def scm(impl: str, **options) -> Callable:
  """Returns the same -> gradient of a loss that holds a tangent as a constant."""

  def call(*args: jax.Array) -> tuple:
    def loss(*qkv: jax.Array) -> jax.Array:
      o, do = jvp(impl, **options)(*qkv, *args[3:])
      error = o - jax.lax.stop_gradient(o - do)
      return jnp.mean(jnp.square(error.astype(jnp.float32)))

    return jax.grad(loss, (0, 1, 2))(*args[:3])

  return call


WORK = {"output and tangent": jvp, "sCM gradient": scm}


def arrays(L: int, dtype: str, heads: int = HEADS) -> list:
  rng = np.random.default_rng(0)
  return [rng.standard_normal((1, L, heads, SIZE)).astype(dtype) for _ in range(6)]


def first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


CHECKED = ((300, {"causal": True}), (1024, {}))  # lengths and options of `errors`


def errors(cases: tuple = CHECKED) -> Iterator[dict]:
  """Yields the largest errors against plain attention in float64.

  Args:
    cases: lengths, and options of `attention`.

  Yields:
    work, length, implementation, dtype and `errors`, one for each output relative to
    its largest value; or `error`, where an implementation does not run here.
  """
  for (name, work), (L, options) in itertools.product(WORK.items(), cases):
    wide = arrays(L, "float64", 2)
    with jax.enable_x64(True):
      truth = jax.tree.leaves(jax.jit(work("plain", **options))(*wide))
      truth = [np.asarray(x) for x in truth]
    for impl, dtype in itertools.product(IMPLS, ("float32", "bfloat16")):
      row = {"work": name, "length": L, "implementation": impl, "dtype": dtype}
      try:
        inputs = [jnp.asarray(x, dtype) for x in wide]
        outputs = jax.tree.leaves(jax.jit(work(impl, **options))(*inputs))
        row["errors"] = [
          float(np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max())
          for x, y in zip(outputs, truth, strict=True)
        ]
      except Exception as error:
        row["error"] = first_line(error)
      yield row


def check() -> None:
  """Prints the largest errors, relative to the largest value."""
  print("largest error against plain attention in float64, L = 300 and 1024")
  for row in errors():
    text = row.get("error") or " ".join(f"{e:.1e}" for e in row["errors"])
    print(
      f"  {row['work']:20} L={row['length']:<5} {row['implementation']:8} "
      f"{row['dtype']:9} {text}",
      flush=True,
    )


def compiled(work: Callable, args: list) -> tuple[Callable, float]:
  """Returns the compiled function and its temporaries in MB."""
  program = jax.jit(work).lower(*args).compile()
  return program, program.memory_analysis().temp_size_in_bytes / 1e6


def seconds(program: Callable, args: list) -> float:
  start = time.perf_counter()
  jax.block_until_ready(program(*args))
  return time.perf_counter() - start


def times(lengths: list[int], repeats: int) -> Iterator[dict]:
  """Yields medians of interleaved runs.

  Args:
    lengths: numbers of tokens.
    repeats: runs of each program.

  Yields:
    work, length, implementation, `median_ms`, `least_ms` and `temporaries_mb`; or
    `error`, where an implementation does not run here.
  """
  for (name, work), L in itertools.product(WORK.items(), lengths):
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in arrays(L, "float32")]
    programs, failed = {}, {}
    for impl in IMPLS:
      try:
        program, memory = compiled(work(impl), inputs)
        seconds(program, inputs)
        programs[impl] = program, memory
      except Exception as error:
        failed[impl] = first_line(error)
    measured = {impl: [] for impl in programs}
    for _ in range(repeats):
      for impl, (program, _) in programs.items():
        measured[impl].append(seconds(program, inputs) * 1e3)
    for impl in IMPLS:
      row = {"work": name, "length": L, "implementation": impl}
      if impl in failed:
        yield row | {"error": failed[impl]}
        continue
      yield row | {
        "median_ms": statistics.median(measured[impl]),
        "least_ms": min(measured[impl]),
        "temporaries_mb": programs[impl][1],
      }


def table(lengths: list[int], repeats: int) -> None:
  """Prints medians of interleaved runs."""
  print(f"\n{HEADS} heads of {SIZE}, bfloat16, batch 1, {jax.devices()[0].device_kind}")
  print("| work | L | implementation | median ms | least ms | temporaries MB |")
  print("|---|---|---|---|---|---|")
  for row in times(lengths, repeats):
    cells = row.get("error", "") + " | |"
    if "error" not in row:
      cells = f"{row['median_ms']:.3f} | {row['least_ms']:.3f} | "
      cells += f"{row['temporaries_mb']:.1f}"
    line = f"| {row['work']} | {row['length']} | {row['implementation']} | {cells} |"
    print(line, flush=True)


def whole_step(pairs: int) -> None:
  """Prints memory and paired times of an sCD step with plain and chunked attention."""
  from sdiff_jax import registry
  from sdiff_jax.models import dit

  def program(impl: str) -> tuple:
    network = dit.build(
      shape=(64, 64, 4), cond={}, patch=1, width=128, depth=2, heads=2, attention=impl
    )
    given = {"network": network, "teacher": network.apply, "sigma_d": 0.5}
    loss = registry.build("losses", {"name": "scm"}, **given)
    params = jax.jit(network.init)(jax.random.key(0))
    x0 = jax.random.normal(jax.random.key(1), (1, 64, 64, 4))

    def value(params, frozen, key):
      batch = {"x0": x0, "cond": None}
      return loss(params, batch, key, jnp.int32(0), frozen)[0]

    args = (params, params, jax.random.key(2))
    run = jax.jit(jax.value_and_grad(value)).lower(*args).compile()
    return run, args

  programs = {impl: program(impl) for impl in ("plain", "chunked")}
  for run, args in programs.values():
    seconds(run, args)
  taken = {impl: [] for impl in programs}
  for _ in range(pairs):
    for impl, (run, args) in programs.items():
      taken[impl].append(seconds(run, args))
  peak = {
    impl: run.memory_analysis().temp_size_in_bytes / 1e6
    for impl, (run, _) in programs.items()
  }
  print(
    "sCD step, 4,096 tokens, width 128, 2 blocks of 2 heads of 64, float32, batch 1"
  )
  for impl in programs:
    middle = statistics.median(taken[impl])
    print(f"  {impl:8} temporaries {peak[impl]:7.1f} MB  median {middle:6.3f} s")
  ratios = [c / p for c, p in zip(taken["chunked"], taken["plain"], strict=True)]
  print(
    f"  chunked / plain: memory {peak['chunked'] / peak['plain']:.3f}, "
    f"time {statistics.median(ratios):.3f} (median of {pairs} pairs)"
  )


TPUS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def topologies(kind: str) -> None:
  """Prints memory and FLOPs of programs compiled for one chip of each kind."""
  chips = {chip: ("plain",) * (chip == "v5e:2x2") + ("fused",) for chip in TPUS}
  if kind == "h100":
    chips = {kind: ("plain", "chunked", "fused")}
  print("| chip | work | L | implementation | temporaries MB | GFLOP |")
  print("|---|---|---|---|---|---|")
  for chip, impls in chips.items():
    for L, (name, work), impl in itertools.product((4096, 16384), WORK.items(), impls):
      try:
        x = jax.ShapeDtypeStruct(
          (1, L, HEADS, SIZE), jnp.bfloat16, sharding=one_device(chip)
        )
        program, memory = compiled(work(impl), [x] * 6)
        flops = (program.cost_analysis() or {}).get("flops", math.nan) / 1e9
        text = f"{memory:.1f} | {flops:.0f} |"
      except Exception as error:
        text = f"{first_line(error)} | |"
      print(f"| {chip} | {name} | {L} | {impl} | {text}", flush=True)


def one_device(chip: str) -> jax.sharding.Sharding:
  from jax.experimental import topologies as known

  if chip == "h100":
    options = {"platform": "cuda", "topology_name": "", "topology": "1x1x1"}
    found = known.get_topology_desc(target_config=H100, **options)
  else:
    found = known.get_topology_desc(platform="tpu", topology_name=chip)
  return jax.sharding.SingleDeviceSharding(found.devices[0])


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--lengths", default="1024,4096,16384")
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--step", action="store_true")
  parser.add_argument("--topologies", nargs="?", const="tpu", choices=["tpu", "h100"])
  chosen = parser.parse_args()
  if chosen.step:
    whole_step(chosen.repeats)
  elif chosen.topologies:
    topologies(chosen.topologies)
  else:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    check()
    table([int(L) for L in chosen.lengths.split(",")], chosen.repeats)


if __name__ == "__main__":
  main()
