"""Measurements on a machine with one GPU, prepared so that a short loan is enough.

  python benchmarks/h100.py --stage=train --out=runs/h100 [--data=PATH]
  python benchmarks/h100.py --stage=step --out=runs/h100
  python benchmarks/h100.py --stage=sampler --out=runs/h100
  python benchmarks/h100.py --stage=calibrate --out=runs/h100
  python benchmarks/h100.py --stage=attention --out=runs/h100

Every stage writes STAGE.json and its pictures into --out. A call stops after --seconds;
the same command then resumes, and a finished stage is skipped unless --force is given.
--tiny rehearses a stage on a CPU in seconds. Only this repository and JAX are needed;
PyTorch and diffusers are timed beside ours where they can be imported.

  train      trains a teacher on Fashion-MNIST, distills it with sCD, and measures both
  step       times training steps of EDM2-S and of DiT-XL/2 against the peak FLOP/s
  sampler    times the U-Net of Stable Diffusion 2 and iterations of ParaDDPM-1000
  calibrate  measures the constants of the model of time (memory, launches, products), and
             steps and calls of EDM2 that it has to predict, then each of its convolutions
  attention  checks and times attention with a tangent (see benchmarks/attention.py)
"""

import argparse
import importlib
import json
import os
import pathlib
import shutil
import sys
import time

# Other processes (PyTorch's) use the same GPU before JAX does.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import jax
from h100_stages.shared import OutOfTime, Stage

from sdiff_jax.io import file_io

FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")


STAGES = ("train", "step", "sampler", "calibrate", "attention")


def data_folder(given: str, tiny: bool) -> pathlib.Path | None:
  """Returns the .npz or the folder of Fashion-MNIST, None where there is neither."""
  path = pathlib.Path(given) if given else FASHION
  return path if tiny or path.exists() else None


def run_stage(name: str, options: argparse.Namespace) -> str:
  """Runs a stage until it is finished or out of time, and returns a line about it."""
  out = options.out.resolve()
  final = out / f"{name}.json"
  if final.exists() and not options.force:
    return f"{name}: finished before, see {final}; --force measures again"
  if not options.tiny and jax.default_backend() != "gpu":
    return f"{name}: not run: no GPU"
  data = data_folder(options.data, options.tiny)
  if name == "train" and data is None:
    return f"{name}: not run: no Fashion-MNIST in {options.data or FASHION}; see --data"
  out.mkdir(parents=True, exist_ok=True)
  if options.force:
    (out / f"{name}.partial.json").unlink(missing_ok=True)
    for folder in ("teacher", "scd", "step") if name == "train" else ():
      shutil.rmtree(out / folder, ignore_errors=True)
  if not options.tiny:
    jax.config.update("jax_compilation_cache_dir", str(out / "xla"))
  stage = Stage(name, out, options.seconds, options.tiny, options.only)
  machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
  begin = time.monotonic()
  try:
    module = importlib.import_module(f"h100_stages.{name}")
    getattr(module, name)(stage, data or FASHION)
  except OutOfTime as error:
    return f"{name}: out of time at {error}; the same command resumes"
  if options.only:
    return f"{name}: measured what --only names, see {stage.path}"
  file_io.write_text(final, json.dumps(machine | stage.results, indent=2))
  stage.path.unlink(missing_ok=True)
  return f"{name}: finished in {time.monotonic() - begin:.0f} s, see {final}"


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--stage", choices=[*STAGES, "all"], required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--data", default="", help=".npz or IDX folder of Fashion-MNIST")
  parser.add_argument("--seconds", type=float, default=240, help="of this call")
  parser.add_argument("--only", default="", help="regular expression of names of cases")
  parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU")
  parser.add_argument("--force", action="store_true", help="measure again")
  options = parser.parse_args(arguments)
  for name in STAGES if options.stage == "all" else (options.stage,):
    print(run_stage(name, options), flush=True)


if __name__ == "__main__":
  main()
