"""Quality of the demo over several seeds, with its baselines.

  python benchmarks/demo.py [--seeds=3] [--folder=runs/demo] [--picture=FILE.png]

Runs `make demo` once for each seed (finished runs are reused), prints mean and standard
deviation of every result, and the ratios by which the distilled model is judged.
"""

import argparse
import json
import pathlib
import subprocess
import time

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

RUNS = ("teacher", "scd", "sct")


def rows_of(folder: pathlib.Path, seed: int) -> dict[tuple[str, str], dict]:
  """Returns the measured results of one seed; runs the demo if they do not exist."""
  runs = folder / f"seed{seed}"
  if not (runs / "report.html").exists():
    begin = time.perf_counter()
    subprocess.run(["make", "demo", f"RUNS={runs}", f"SEED={seed}"], check=True)
    print(f"seed {seed}: {time.perf_counter() - begin:.0f} s")
  rows = []
  for run in RUNS:
    rows += json.loads((runs / run / "evaluate" / "results.json").read_text())
  return {(row["model"], row["sampler"]): row for row in rows}


def picture(runs: pathlib.Path, path: pathlib.Path) -> None:
  """Draws the same seeds from the teacher and from its distillation."""
  panels = (
    ("teacher, 31 evaluations", "teacher/evaluate/heun-16.png"),
    ("sCD, 1 evaluation", "scd/evaluate/consistency-1.png"),
    ("sCD, 2 evaluations", "scd/evaluate/consistency-2.png"),
  )
  figure = Figure(figsize=(9, 1.75), layout="constrained", facecolor="white")
  axes = figure.subplots(1, len(panels))
  for ax, (title, name) in zip(axes, panels, strict=True):
    grid = np.asarray(Image.open(runs / name))
    ax.imshow(grid[: 5 * 34 - 2], interpolation="nearest")
    ax.set_title(title, fontsize=10)
    ax.axis("off")
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)


def spread(values: list[float], digits: int = 3) -> str:
  return f"{np.mean(values):.{digits}f} +- {np.std(values, ddof=1):.{digits}f}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--folder", type=pathlib.Path, default="runs/demo")
  parser.add_argument("--picture", type=pathlib.Path, help="draw samples to this PNG")
  args = parser.parse_args()
  seeds = [rows_of(args.folder, seed) for seed in range(args.seeds)]
  print("\n| model | sampler | NFE | Frechet | precision | recall | compute |")
  print("|---|---|---|---|---|---|---|")
  for key, row in seeds[0].items():
    all_seeds = [rows[key] for rows in seeds]
    columns = [spread([r[c] for r in all_seeds]) for c in ("frechet", "precision")]
    columns.append(spread([r["recall"] for r in all_seeds]))
    compute = f"{row['compute']:.2f}" if row["compute"] is not None else "-"
    cells = [
      *key,
      f"{row['evaluations']:g}" if row["evaluations"] else "-",
      *columns,
      compute,
    ]
    print("|", " | ".join(cells), "|")
  naive = "teacher as 1-step consistency model"
  print(f"\n| seed | sCD | / teacher | / Gaussian | {naive} / |")
  print("|---|---|---|---|---|")
  for seed, rows in enumerate(seeds):
    teacher = rows["teacher", "heun/16"]["frechet"]
    gaussian = rows["Gaussian per class", "full covariance"]["frechet"]
    naive = rows["teacher", "consistency/1"]["frechet"]
    for steps in (1, 2):
      mine = rows["sCD", f"consistency/{steps}"]["frechet"]
      ratios = [mine / teacher, mine / gaussian, naive / mine]
      print(f"| {seed} | {steps} step |", " | ".join(f"{r:.2f}" for r in ratios), "|")
  if args.picture:
    picture(args.folder / "seed0", args.picture)


if __name__ == "__main__":
  main()
