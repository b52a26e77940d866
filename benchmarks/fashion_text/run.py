"""A model of diffusers, distilled to a few steps and sampled by diffusers again.

  python benchmarks/fashion_text/run.py --torch=PYTHON-WITH-TORCH-AND-DIFFUSERS

Everything is in runs/fashion_text; what is there is not made again, so the same command
resumes. Needs `apt-get install dataset-fashion-mnist`. With --short, 20 steps of each run
and 100 samples, in runs/fashion_text_short, show in minutes that all parts work together;
its distances say nothing.

1. Writes Fashion-MNIST with captions, and a text-to-image model of random weights in the
   diffusers format; encodes the data.
2. Trains that model, and writes it as a folder of diffusers, `published`.
3. Distills `published` (nothing else is known of the teacher), and exports the student.
4. Samples the student by diffusers in 1, 2 and 4 steps and measures those images; in two
   steps also with a second timestep that is better than LCMScheduler's own.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

import model
import numpy as np

from sdiff_jax.experiment import variants

HERE = pathlib.Path(__file__).parent
STEPS = ("1", "2", "4", "999,580")  # numbers of steps, and timesteps of two


class Size(NamedTuple):
  """How much is done.

  Attributes:
    word: variant of the config files.
    images: number of images that are trained on.
    samples: number of images that are measured.
  """

  word: str
  images: int
  samples: int

  @property
  def root(self) -> pathlib.Path:
    """Returns the folder of everything, as the config files name it."""
    return pathlib.Path(variants.workdir(f"fashion_text.py:{self.word}"))


FULL, SHORT = Size("", 60_000, 5000), Size("short", 256, 100)


def job(size: Size, config: str, workdir: str, name: str, *args: str) -> None:
  file = f"{HERE / config}.py" + (f":{size.word}" if size.word else "")
  command = [sys.executable, "-m", "sdiff_jax.main", f"--config={file}"]
  command += [f"--workdir={size.root / workdir}", f"--job={name}", *args]
  subprocess.run(command, check=True)


def make_model_and_data(size: Size) -> None:
  if not (size.root / "images" / "train.tar").exists():
    model.write_images(size.root / "images", size.images)
  if not (size.root / "start" / "model_index.json").exists():
    model.write_model(size.root / "start")
  job(size, "encode", "data", "encode")


def train(size: Size, config: str, folder: pathlib.Path) -> None:
  """Trains, evaluates and exports a run, unless the folder of its export exists."""
  if not (folder / "README.md").exists():
    job(size, config, config, "train")
    job(size, config, config, "evaluate")
    export = ("--config.export.format=diffusers", f"--config.export.folder={folder}")
    job(size, config, config, "export", *export)


def frechet(size: Size, config: str) -> dict[str, float]:
  """Returns sampler -> Frechet distance of the samples of a run."""
  rows = json.loads((size.root / config / "evaluate" / "results.json").read_text())
  return {row["sampler"]: row["frechet"] for row in rows}


def by_diffusers(size: Size, torch: str, folder: pathlib.Path, steps: str) -> float:
  """Returns the Frechet distance of images that diffusers makes of a folder."""
  prompts = size.root / "prompts.txt"
  rng = np.random.default_rng(1)
  texts = [form.format(name) for form in model.FORMS for name in model.NAMES]
  drawn = [texts[k] for k in rng.permutation(size.samples) % len(texts)]
  prompts.write_text("\n".join(drawn), "utf-8")
  out = size.root / f"diffusers_{steps}.npz"
  if not out.exists():
    script = HERE.parents[1] / "third_party" / "diffusers_text_images.py"
    command = [torch, str(script), str(folder), str(prompts), str(out), steps]
    subprocess.run(command, check=True)
  part = f"diffusers_{steps}"
  images = ("--config.evaluate.samplers=()", f"--config.evaluate.images={out}")
  folder_of = f"--config.evaluate.folder={part}"
  job(size, "student", "student", "evaluate", *images, folder_of)
  (row,) = json.loads((size.root / "student" / part / "images.json").read_text())
  return row["frechet"]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--torch", default="", help="a Python with torch and diffusers")
  parser.add_argument("--short", action="store_true", help="a few steps of everything")
  args = parser.parse_args()
  size = SHORT if args.short else FULL
  distilled = size.root / "distilled"
  make_model_and_data(size)
  train(size, "diffusion", size.root / "published")
  train(size, "student", distilled)
  teacher = frechet(size, "diffusion")["heun/16"]
  print(f"teacher, 31 evaluations: {teacher:.3f}")
  for sampler, value in frechet(size, "student").items():
    print(f"{sampler}: {value:.3f}, {value / teacher:.2f} times the teacher's")
  for steps in STEPS if args.torch else ():
    value = by_diffusers(size, args.torch, distilled, steps)
    print(f"{steps} steps by diffusers: {value:.3f}, {value / teacher:.2f} times")


if __name__ == "__main__":
  main()
