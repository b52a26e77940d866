"""Stage `sampler`: Stable Diffusion 2's U-Net and ParaDDPM-1000 with it."""

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp

from h100_stages.shared import (
  ROOT,
  Case,
  Stage,
  bars,
  compare_with_torch,
  load,
  median_seconds,
  run_cases,
)
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import programs
from sdiff_jax.pretrained.diffusers import loading
from sdiff_jax.training import flops as flops_lib


def sampler(stage: Stage, data: pathlib.Path) -> None:
  """Times the U-Net of Stable Diffusion 2 and iterations of ParaDDPM-1000."""
  del data
  folder = ROOT / "configs" / "published" / "stable_diffusion2"
  batches, windows, steps = (1, 2, 16, 48), (16, 32, 48, 80), 1000
  if stage.tiny:
    folder = ROOT / "tests" / "fixtures" / "tiny-sd2"
    batches, windows, steps = (1, 2), (4,), 8
  compare_with_torch(
    stage, "diffusers_unet.py", "diffusers calls", str(folder), *batches
  )
  model = loading.abstract(loading.configs(str(folder)), dtype="bfloat16")
  unet, length = model.unet, model.text_encoder.length

  def call(params: Any, x: Any, t: Any, text: Any) -> Any:
    return unet.apply(params, x, t, {"text": text})

  def arguments(n: int) -> tuple[Any, ...]:
    shapes = (n, *unet.shape), (n,), (n, length, unet.text)
    x, t, text = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return model.params["unet"], x, t, text

  cases = [
    Case(
      f"call batch {n}",
      lambda n=n: jax.jit(call).lower(*arguments(n)),
      lambda n=n: flops_lib.count_flops(call, *arguments(n)),
      n,
      lambda program, arrays: median_seconds(lambda: program(*arrays)),
    )
    for n in batches
  ]
  for window in windows:
    config = load("stable_diffusion2", "ddpm")
    config.generate.update(folder=str(folder), dtype="bfloat16")
    # Every change is below this tolerance: an iteration advances by a whole window.
    config.sampler.update(steps=steps, window=window, tolerance=1e6)
    config.sample.batch_size = jax.device_count()
    program = programs.build(config, sharding.make_mesh())
    cases.append(
      Case(
        f"ParaDDPM-{steps} window {window}",
        program.lower,
        lambda program=program: program.flops(False),
        window,
        iteration_seconds,
      )
    )
  run_cases(stage, cases)
  rows = {k: v for k, v in stage.results.items() if "samples_per_second" in v}
  for row in rows.values():
    row["ms_per_sample"] = 1e3 / row["samples_per_second"]
  bars(stage, "ms per evaluation", rows, "ms_per_sample")


def iteration_seconds(program: jax.stages.Compiled, arrays: Any) -> float:
  """Returns the seconds of a parallel iteration: of a whole sample over their number."""
  _, samples = program(*arrays)
  iterations = int(jnp.max(samples.num_iterations))
  begin = time.perf_counter()
  jax.block_until_ready(program(*arrays))
  return (time.perf_counter() - begin) / iterations
