"""The gain of more chips, modeled from counted operations; nothing is measured.

  python benchmarks/scaling.py [--out=scaling.md] [--chip=v5p]

Three tables in Markdown: operations of a step of sCD and of its teacher; the time of a
step of each size of network on 8 to 512 chips, and up to which number more chips are
worthwhile; and the speed-up of a window of ParaDiGMS on 1, 4 and 8 chips. Operations are
those of the lowered steps. Bytes are those of programs that --job=rehearse compiled (the
commands are given at the constants). The formulas are in sdiff_jax/capacity/roofline.py.
"""

import argparse
import itertools
import math
import pathlib
import sys

import jax

from sdiff_jax import config as config_lib
from sdiff_jax import samplers
from sdiff_jax.capacity import chips as chips_lib
from sdiff_jax.capacity import roofline
from sdiff_jax.capacity.hlo import Collective
from sdiff_jax.capacity.kernels import Kernel
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import programs
from sdiff_jax.samplers import autotune

SIZES = {"S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}  # channels
CHIPS = (8, 16, 32, 64, 128, 256, 512)
PAYS = 1.5  # a doubling of chips is worthwhile while a step becomes so much faster
BATCH = 2048
# Bytes of memory traffic of an image in a step, and bytes that are stored for its
# backward pass, for each channel of the first level: those of XXL, compiled by
#   --job=rehearse --config=configs/imagenet512_scd.py:XXL --config.rehearse.topology=v5p:4x4x8
#   --config.model.dtype=bfloat16 --config.model.remat=
TRAFFIC, KEPT = 3.2e7, 1.4e6
# Copies of the parameters in float32 that a chip holds (parameters, two moments, EMA,
# teacher, gradient), and reads or writes in a step.
HELD, TOUCHED = 6, 12

WINDOWS = (10, 20, 40, 48, 80, 160)
STEPS = 1000  # of DDPM
# Of EDM2-S, 64 x 64 x 3, in an iteration on v5e:2x4, compiled by
#   --job=rehearse --config=configs/imagenet64_diffusion.py:S --config.rehearse.topology=v5e:2x4
#   --config.rehearse.program=sample --config.sampler.name=paraddpm
#   --config.sampler.steps=1000 --config.sampler.window=80 (and 8)
#   --config.sample.batch_size=1 --config.mesh.data=1 --config.mesh.window=8
#   --config.model.dtype=bfloat16
# operations and bytes of memory traffic of a solver step, bytes of it for any number of
# steps, and bytes that a chip sends.
STEP_FLOPS, STEP_TRAFFIC, WEIGHTS, SENT = 1.93e11, 1.01e9, 3.54e9, 1.51e6
# Stable Diffusion 2, DDPM-1000 (arXiv:2305.16317): iterations at a window of 48; speed-up
# over sequential sampling on A100s, by GPUs and window, read off a figure (+-0.05).
PUBLISHED = "44 iterations at a window of 48; 0.72x on 1 A100 at windows of 10 to 20, "
PUBLISHED += (
  "1.3x on 2 at 35, 2.3x on 4 at 50 to 60, 3.2x on 8 at 80 to 112, 2.9x at 160"
)


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def counted(kind: str, size: str, guidance: bool = True) -> tuple[float, int]:
  """Returns operations of a step of a batch of 8 for each image, and parameters."""
  file = f"configs/imagenet512_{kind}.py:{size}"
  config = config_lib.load(file, f"run this in the repository, which has {file}")
  config.train.batch_size = 8
  config.model.dtype = "bfloat16"
  if not guidance:
    config.loss.guidance = ()
    config.model.guidance = False
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  program = programs.build(config, mesh)
  say(f"{kind} {size}")
  return program.flops(False) / 8, program.num_parameters


def operations() -> tuple[str, dict]:
  """Returns a table, and (kind, size) -> (operations an image, parameters)."""
  lines = [
    "| size | parameters, M | teacher, GFLOP an image | sCD / teacher | guided |"
  ]
  lines += ["|---|---|---|---|---|"]
  found = {}
  for size in SIZES:
    teacher, plain = counted("diffusion", size), counted("scd", size, False)
    guided = found["scd", size] = counted("scd", size)
    found["diffusion", size] = teacher
    ratios = plain[0] / teacher[0], guided[0] / teacher[0]
    row = (size, f"{teacher[1] / 1e6:.1f}", f"{teacher[0] / 1e9:.1f}")
    lines.append(f"| {' | '.join(row)} | {ratios[0]:.3f} | {ratios[1]:.3f} |")
    say(lines[-1])
  return "\n".join(lines), found


def step(chip: chips_lib.Chip, chips: int, ops: float, count: int, width: int):
  """Returns the modeled time of a step of BATCH images, and the parts it needs.

  The state on every chip, and the gradients' sum over all of them, in float32. Where
  activations do not fit, the batch comes in parts, whose gradients are added up.
  """
  images, state = BATCH / chips, 4 * count
  room = chip.memory - HELD * state
  if room <= 0:
    return None
  parts = 2 ** max(math.ceil(math.log2(images * width * KEPT / room)), 0)
  if parts > images:
    return None
  sums = [Collective("all-reduce", "f32", state, chips, 1, False)]
  memory = images * width * TRAFFIC + TOUCHED * state
  return modeled(chip, chips, ops * images, memory, sums), parts


def modeled(
  chip: chips_lib.Chip, chips: int, ops: float, memory: float, sums: list[Collective]
) -> float:
  """Returns the seconds of a program as if it were one kernel, at the peak rates."""
  pod = chips_lib.Pod("", "", chips)
  kernel = Kernel("product", ops, int(memory), 1, "")
  return roofline.time(
    chip, pod, chips_lib.IDEAL, kernels=[kernel], collectives=sums
  ).estimate


def training(name: str, found: dict) -> str:
  """Returns a table of sCD's steps; in each cell ms, and parts."""
  chip = chips_lib.CHIPS[name]
  lines = [f"| size | {' | '.join(map(str, CHIPS))} | pays up to |"]
  lines += ["|---" * (len(CHIPS) + 2) + "|"]
  for size, width in SIZES.items():
    ops, count = found["scd", size]
    times = [step(chip, n, ops, count, width) for n in CHIPS]
    row = [
      "does not fit"
      if t is None
      else f"{t[0] * 1e3:.0f}" + (f" ({t[1]} parts)" if t[1] > 1 else "")
      for t in times
    ]
    known = [(n, t[0]) for n, t in zip(CHIPS, times, strict=True) if t]
    pays = known[0][0] if known else "-"
    for (_, before), (n, after) in itertools.pairwise(known):
      if before / after < PAYS:
        break
      pays = n
    lines.append(f"| {size} | {' | '.join(row)} | {pays} |")
  return "\n".join(lines)


def iteration(chip: chips_lib.Chip, chips: int, window: int) -> float:
  """Returns the modeled seconds of an iteration over a window of solver steps."""
  each = math.ceil(window / chips)
  edges = [Collective("collective-permute", "f32", SENT, chips, 1, False)]
  return modeled(
    chip,
    chips,
    each * STEP_FLOPS,
    WEIGHTS + each * STEP_TRAFFIC,
    edges if chips > 1 else [],
  )


def windows(name: str) -> str:
  """Returns a table of windows: iterations, and modeled speed-ups."""
  chip = chips_lib.CHIPS[name]
  alone = iteration(chip, 1, 1)
  lines = ["| window | iterations, published | secant | 1 chip | 4 chips | 8 chips |"]
  lines += ["|---" * 6 + "|"]
  for window in WINDOWS:
    sampler = samplers.build("paraddpm", sigma_d=0.5, steps=STEPS, window=window)
    counts = [
      autotune.expected_iterations(sampler.replace(update_rule=r))
      for r in ("published", "secant")
    ]
    cells = []
    for chips in (1, 4, 8):
      time = iteration(chip, chips, window)
      cells.append("; ".join(f"{STEPS * alone / (n * time):.2g}x" for n in counts))
    numbers = " | ".join(f"{n:.1f}" for n in counts)
    lines.append(f"| {window} | {numbers} | {' | '.join(cells)} |")
    say(lines[-1])
  return "\n".join(lines)


PAGE = """# The gain of more chips: modeled, not measured

`{command}`

max(F / peak, M / memory rate) + R / link rate, with F operations, M bytes of memory traffic
and R bytes sent, of one chip, at the rates of its data sheet.

## Operations of a step of sCD, divided by those of its teacher's

{operations}

Without rematerialization. Guided: the teacher is evaluated with and without the label, as
in configs/imagenet512_scd.py.

## A step of guided sCD, batch {batch}, on {chip}: ms

{training}

Every chip holds the whole state, {held} float32 arrays for each parameter, and the
gradients are summed in float32: R = 2 (n - 1) / n times 4 P bytes. M is {traffic:.3g}
bytes for each image and channel of the first level and {touched} passes over the state.
In parts: activations ({kept:.3g} bytes for each image and channel) would not fit at
once. More chips are worthwhile up to the number whose doubling makes a step less
than {pays} times as fast.

## A window of ParaDiGMS, DDPM-{steps}, EDM2-S, batch 1, on v5e: speed-up

{windows}

Over sequential sampling on one chip, with the iterations of the published rule; of the
secant rule.  Iterations are those of a mixture of
Gaussians in 16 dimensions at tolerance 0.1. The latency of messages is left out. A single
evaluation is bound by memory: each call reads {weights:.3g} bytes for weights, which it
normalizes and casts to bfloat16 again. Doing that once before the loop would make the
first evaluation cheaper, and the speed-ups smaller. Published for another network:
{published}.
"""


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", default="", help="file; none prints")
  parser.add_argument("--chip", default="v5p", choices=[*chips_lib.CHIPS])
  args = parser.parse_args()
  chips_lib.start()
  table, found = operations()
  text = PAGE.format(
    command=" ".join(["python", *sys.argv]),
    operations=table,
    batch=BATCH,
    chip=args.chip,
    training=training(args.chip, found),
    held=HELD,
    traffic=TRAFFIC,
    touched=TOUCHED,
    kept=KEPT,
    pays=PAYS,
    steps=STEPS,
    weights=WEIGHTS,
    windows=windows("v5e"),
    published=PUBLISHED,
  )
  if args.out:
    pathlib.Path(args.out).write_text(text, "utf-8")
  else:
    print(text)


if __name__ == "__main__":
  main()
