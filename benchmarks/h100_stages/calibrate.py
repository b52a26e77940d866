"""Stage `calibrate`: constants of the model of time, and programs that it predicts.

Efficiencies of memory, launches and products are measured alone; that of convolutions is
fitted on the teacher's step of EDM2-S at batch 32. All other steps and calls are held out:
the model is accepted if each is within 15% of what was measured. The distinct convolutions
of that step are timed alone at the end, which shows how far the fit is from them.
"""

import collections
import functools
import gzip
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from h100_stages.shared import (
  PEAK,
  Case,
  Result,
  Stage,
  cost,
  kernels_file,
  load,
  median_seconds,
  random_arrays,
  run_cases,
)
from h100_stages.step import step_case
from sdiff_jax.capacity import chips, roofline
from sdiff_jax.capacity import kernels as kernels_lib
from sdiff_jax.capacity.kernels import Kernel
from sdiff_jax.models import edm2
from sdiff_jax.training import flops as flops_lib
from sdiff_jax.types import CondSpec

CHIP = chips.CHIPS["h100"]
SMALL = {"channels": 8, "channel_mult": (1,), "blocks": 1, "head_channels": 8}


def calibrate(stage: Stage, data: pathlib.Path) -> None:
  """Measures the constants of the model of time, and steps that it has to predict."""
  del data
  constants(stage)
  cases = [*steps(stage), *calls(stage)]
  run_cases(stage, cases)
  if all("ms" in stage.results.get(case.name, {}) for case in cases):
    stage.measure("model", lambda: predicted(stage, [case.name for case in cases]))
  convolutions(stage)


def constants(stage: Stage) -> None:
  """Measures memory, launches and products."""
  size = 1_000 if stage.tiny else 1_000_000_000

  def copy() -> Result:
    x, add = jnp.ones(size, jnp.float32), jax.jit(lambda x: x + 1)
    seconds = median_seconds(lambda: add(x))
    return {"gigabytes_per_second": 8 * size / seconds / 1e9}

  def launch() -> Result:
    def chain(x: jax.Array, number: int) -> jax.Array:
      for _ in range(number):
        x = jax.lax.optimization_barrier(x + 1)
      return x

    x, seconds = jnp.ones(128), {}
    for number in (10, 510):
      call = jax.jit(functools.partial(chain, number=number))
      seconds[number] = median_seconds(lambda call=call: call(x), 50)
    return {"microseconds": 1e6 * (seconds[510] - seconds[10]) / 500}

  def product(n: int, k: int) -> Result:
    a = random_arrays(jax.ShapeDtypeStruct((n, k), jnp.bfloat16))
    gram = jax.jit(lambda a: a @ a.T)
    seconds = median_seconds(lambda: gram(a), 20)
    return cost(seconds, 2 * n * n * k, n)

  stage.measure("copy", copy)
  stage.measure("launch", launch)
  for n, k in ((64, 64),) if stage.tiny else ((8192, 8192), (4096, 4096), (8192, 512)):
    stage.measure(f"product {n} x {k}", functools.partial(product, n, k))


def steps(stage: Stage) -> Iterator[Case]:
  """Yields training steps of EDM2; the first one is that of the fit."""
  sizes = [("S", "diffusion", n) for n in (32, 8, 64)]
  sizes += [("S", "scd", 16), ("M", "diffusion", 16)]
  for preset, loss, batch_size in sizes[:2] if stage.tiny else sizes:
    config = load(f"imagenet512_{loss}", f"{preset},tiny" if stage.tiny else preset)
    config.model.dtype = "bfloat16"
    config.train.batch_size = batch_size
    if stage.tiny:
      config.model.update(SMALL, attn_resolutions=())
    yield step_case(stage, f"EDM2-{preset} {loss} batch {batch_size}", config)


def network_call(stage: Stage) -> tuple[Callable[..., Any], Any]:
  """Returns an evaluation of EDM2-S, (params, x, t, label) -> F, and shapes of params."""
  options = SMALL if stage.tiny else {}
  network = edm2.build(
    shape=(64, 64, 4),
    cond={"label": CondSpec((), np.int32, num_classes=1000)},
    sigma_d=0.5,
    preset="S",
    dtype="bfloat16",
    **options,
  )

  def call(params: Any, x: Any, t: Any, label: Any) -> Any:
    return network.apply(params, x, t, {"label": label})

  return call, jax.eval_shape(network.init, jax.random.key(0))


def rows_of(n: int) -> list[jax.ShapeDtypeStruct]:
  """Returns the shapes of n rows: x, t and label."""
  shapes = ((n, 64, 64, 4), jnp.float32), ((n,), jnp.float32), ((n,), jnp.int32)
  return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def calls(stage: Stage) -> Iterator[Case]:
  """Yields evaluations of EDM2-S."""
  call, params = network_call(stage)
  for n in (1,) if stage.tiny else (1, 8, 48):
    rows = rows_of(n)
    yield Case(
      f"EDM2-S call batch {n}",
      lambda rows=rows: jax.jit(call).lower(params, *rows),
      lambda rows=rows: flops_lib.count_flops(call, params, *rows),
      n,
      lambda program, arrays: median_seconds(lambda: program(*arrays)),
    )


def convolutions(stage: Stage) -> None:
  """Times each distinct convolution of a training step of EDM2-S alone.

  They are read from the gradient, so that those to inputs and to filters are there too.
  """
  call, params = network_call(stage)
  square = lambda *args: jnp.sum(jnp.square(call(*args)))  # noqa: E731
  jaxpr = jax.make_jaxpr(jax.grad(square))(params, *rows_of(1 if stage.tiny else 32))
  found: dict[str, Any] = {}
  number: collections.Counter[str] = collections.Counter()
  for equation in within(jaxpr.jaxpr, "conv_general_dilated"):
    key = f"{[v.aval for v in equation.invars]} {equation.params}"
    found[key] = equation
    number[key] += 1

  def time(equation: Any, times: int) -> Result:
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    run = jax.jit(lambda *args: equation.primitive.bind(*args, **equation.params))
    arrays = random_arrays(shapes)
    seconds = median_seconds(lambda: run(*arrays))
    operands = [list(s.shape) for s in shapes]
    flops = flops_lib.count_flops(run, *shapes)
    return cost(seconds, flops, shapes[0].shape[0]) | {"of": operands, "times": times}

  rows = [
    stage.measure(f"convolution {k}", functools.partial(time, found[key], number[key]))
    for k, key in enumerate(found)
  ]
  rows = [row for row in rows if "ms" in row]
  seconds = sum(row["times"] * row["ms"] for row in rows) / 1e3
  tflop = sum(row["times"] * row["tflop"] for row in rows)
  whole = {"fraction_of_peak": tflop * 1e12 / seconds / PEAK, "ms": 1e3 * seconds}
  stage.measure("convolutions alone", lambda: whole)


def within(jaxpr: Any, name: str) -> Iterator[Any]:
  """Yields the equations of a primitive in a program and in its parts."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == name:
      yield equation
    for part in jax.tree.leaves(equation.params):
      part = getattr(part, "jaxpr", part)
      if hasattr(part, "eqns"):
        yield from within(part, name)


def predicted(stage: Stage, names: list[str]) -> Result:
  """Returns measured and modeled times; convolutions are fitted on the first program."""
  programs = {}
  for name in names:
    with gzip.open(f"{kernels_file(stage, name)}.hlo.txt.gz", "rt") as file:
      programs[name] = kernels_lib.read(file.read())
  of = stage.results
  product = max(r["fraction_of_peak"] for n, r in of.items() if n.startswith("product"))
  base = chips.Efficiency(
    launch=of["launch"]["microseconds"] / 1e6,
    memory=of["copy"]["gigabytes_per_second"] * 1e9 / CHIP.memory_rate,
    convolution=product,
    product=product,
    source="this stage",
  )
  efficiency = fitted(base, programs[names[0]], of[names[0]]["ms"] / 1e3)
  rows = {}
  for name in names:
    measured = of[name]["ms"]
    modeled = 1e3 * modeled_seconds(efficiency, programs[name])
    rows[name] = {
      "measured_ms": measured,
      "modeled_ms": modeled,
      "ideal_ms": 1e3 * modeled_seconds(chips.IDEAL, programs[name]),
      "held_out": name != names[0],
      "within_15_percent": abs(modeled / measured - 1) <= 0.15,
    }
  return {"efficiency": efficiency._asdict(), "rows": rows}


def fitted(
  base: chips.Efficiency, kernels: list[Kernel], seconds: float
) -> chips.Efficiency:
  """Returns the efficiency whose convolutions make the modeled time the measured one.

  It is between 1% and 100%, and the nearest of these where no value between them does.
  """
  low, high = 0.01, 1.0
  for _ in range(40):
    middle = (low * high) ** 0.5
    slow = modeled_seconds(base._replace(convolution=middle), kernels) > seconds
    low, high = (middle, high) if slow else (low, middle)
  return base._replace(convolution=high)


def modeled_seconds(efficiency: chips.Efficiency, kernels: list[Kernel]) -> float:
  pod = chips.parse("h100x1")
  return roofline.time(CHIP, pod, efficiency, kernels=kernels, collectives=[]).estimate
