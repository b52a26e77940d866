"""A model of diffusers, distilled to a few steps and sampled by diffusers again.

  python benchmarks/fashion_text/run.py --torch=PYTHON-WITH-TORCH-AND-DIFFUSERS

Everything is in runs/fashion_text; what is there is not made again, so the same command
resumes. Needs `apt-get install dataset-fashion-mnist`.

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

import model
import numpy as np

HERE = pathlib.Path(__file__).parent
ROOT = pathlib.Path("runs/fashion_text")
STEPS = ("1", "2", "4", "999,580")  # numbers of steps, and timesteps of two
NUM = 5000  # images that are measured


def job(config: str, workdir: str, name: str, *args: str) -> None:
  command = [sys.executable, "-m", "sdiff_jax.main", f"--config={HERE / config}.py"]
  command += [f"--workdir={ROOT / workdir}", f"--job={name}", *args]
  subprocess.run(command, check=True)


def make_model_and_data() -> None:
  if not (ROOT / "images" / "train.tar").exists():
    model.write_images(ROOT / "images")
  if not (ROOT / "start" / "model_index.json").exists():
    model.write_model(ROOT / "start")
  job("encode", "data", "encode")


def train(config: str, folder: pathlib.Path) -> None:
  """Trains, evaluates and exports a run, unless the folder of its export exists."""
  if not (folder / "README.md").exists():
    job(config, config, "train")
    job(config, config, "evaluate")
    export = ("--config.export.format=diffusers", f"--config.export.folder={folder}")
    job(config, config, "export", *export)


def frechet(config: str) -> dict[str, float]:
  """Returns sampler -> Frechet distance of the samples of a run."""
  rows = json.loads((ROOT / config / "evaluate" / "results.json").read_text())
  return {row["sampler"]: row["frechet"] for row in rows}


def by_diffusers(torch: str, folder: pathlib.Path, steps: str) -> float:
  """Returns the Frechet distance of images that diffusers makes of a folder."""
  prompts = ROOT / "prompts.txt"
  rng = np.random.default_rng(1)
  texts = [form.format(name) for form in model.FORMS for name in model.NAMES]
  drawn = [texts[k] for k in rng.permutation(NUM) % len(texts)]
  prompts.write_text("\n".join(drawn), "utf-8")
  out = ROOT / f"diffusers_{steps}.npz"
  if not out.exists():
    script = "third_party/diffusers_text_images.py"
    command = [torch, script, str(folder), str(prompts), str(out), steps]
    subprocess.run(command, check=True)
  part = f"diffusers_{steps}"
  images = ("--config.evaluate.samplers=()", f"--config.evaluate.images={out}")
  job("student", "student", "evaluate", *images, f"--config.evaluate.folder={part}")
  (row,) = json.loads((ROOT / "student" / part / "images.json").read_text())
  return row["frechet"]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--torch", default="", help="a Python with torch and diffusers")
  args = parser.parse_args()
  distilled = ROOT / "distilled"
  make_model_and_data()
  train("diffusion", ROOT / "published")
  train("student", distilled)
  teacher = frechet("diffusion")["heun/16"]
  print(f"teacher, 31 evaluations: {teacher:.3f}")
  for sampler, value in frechet("student").items():
    print(f"{sampler}: {value:.3f}, {value / teacher:.2f} times the teacher's")
  for steps in STEPS if args.torch else ():
    value = by_diffusers(args.torch, distilled, steps)
    print(f"{steps} steps by diffusers: {value:.3f}, {value / teacher:.2f} times")


if __name__ == "__main__":
  main()
