"""Fashion-MNIST over several seeds: teacher, sCD and sCT, and the cost of sCD.

  python benchmarks/fashion.py [--seeds=3] [--folder=runs/fashion] [--docs=docs]

Trains, and measures against the test images, whatever does not exist yet: the same
command resumes after a stop. Prints mean and standard deviation of every result, the
ratios of the students to their teacher, and that ratio against the training compute;
writes fashion.png (samples) and fashion_curve.png into --docs.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
from demo import spread
from matplotlib.figure import Figure
from PIL import Image

RUNS = {"teacher": "diffusion", "scd": "scd", "sct": "sct"}


def run(folder: pathlib.Path, name: str, seed: int, *args: str) -> None:
  """Runs a job of one of the configs on FOLDER/NAME."""
  command = [sys.executable, "-m", "sdiff_jax.main", f"--workdir={folder / name}"]
  command += [f"--config=configs/fashion_{RUNS[name]}.py", f"--config.seed={seed}"]
  if name != "teacher":
    field = "init_from" if name == "sct" else "teacher.workdir"
    command.append(f"--config.{field}={folder / 'teacher'}")
  subprocess.run([*command, *args], check=True)


def rows_of(
  folder: pathlib.Path, name: str, seed: int, checkpoint: int = 0
) -> list[dict]:
  """Returns the measured results of a run; trains and evaluates it if necessary."""
  part = f"evaluate_{checkpoint}" if checkpoint else "evaluate"
  results = folder / name / part / "results.json"
  if not results.exists():
    if not (folder / name / "training.json").exists():
      run(folder, name, seed)
    step = f"--config.sample.checkpoint={checkpoint}"
    run(folder, name, seed, "--job=evaluate", step)
  return json.loads(results.read_text())


def curve_of(folder: pathlib.Path, seed: int) -> list[dict]:
  """Returns the results of the stored checkpoints of sCD, and of its end."""
  steps = sorted(
    int(f.name) for f in (folder / "scd" / "checkpoints").iterdir() if f.name.isdigit()
  )
  rows = [row for step in steps[:-1] for row in rows_of(folder, "scd", seed, step)]
  return rows + rows_of(folder, "scd", seed)


def of_seed(root: pathlib.Path, seed: int) -> dict:
  """Returns all results of one seed, and its curve."""
  folder, begin = root / f"seed{seed}", time.perf_counter()
  rows = [row for name in RUNS for row in rows_of(folder, name, seed)]
  by_name = {(row["model"], row["sampler"]): row for row in rows}
  curve = curve_of(folder, seed)
  print(f"seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)
  return {"rows": by_name, "curve": curve}


def training_minutes(root: pathlib.Path, seed: int) -> list[float]:
  paths = [root / f"seed{seed}" / name / "training.json" for name in RUNS]
  return [json.loads(path.read_text())["seconds"] / 60 for path in paths]


def print_rows(seeds: list[dict]) -> None:
  print("\n| model | sampler | NFE | Frechet | precision | recall | compute |")
  print("|---|---|---|---|---|---|---|")
  for key, row in seeds[0]["rows"].items():
    every = [seed["rows"][key] for seed in seeds]
    numbers = ("frechet", "precision", "recall")
    cells = [spread([r[c] for r in every]) for c in numbers]
    compute = "-" if row["compute"] is None else f"{row['compute']:.2f}"
    print(
      "|",
      " | ".join(
        [
          *key,
          f"{row['evaluations']:g}" if row["evaluations"] else "-",
          *cells,
          compute,
        ]
      ),
      "|",
    )


def ratios(seeds: list[dict]) -> dict[tuple[str, float], list[float]]:
  """Returns (sampler, compute) -> the distance over the teacher's, for each seed."""
  found: dict[tuple[str, float], list[float]] = {}
  for seed in seeds:
    teacher = seed["rows"]["teacher", "heun/16"]["frechet"]
    for row in seed["curve"]:
      key = (row["sampler"], round(row["compute"], 3))
      found.setdefault(key, []).append(row["frechet"] / teacher)
  return found


def print_ratios(seeds: list[dict]) -> None:
  print("\n| student | sampler | distance / teacher's, by seed |\n|---|---|---|")
  for (model, sampler), row in seeds[0]["rows"].items():
    if row["kind"] == "model" and model != "teacher":
      every = [
        seed["rows"][model, sampler]["frechet"]
        / seed["rows"]["teacher", "heun/16"]["frechet"]
        for seed in seeds
      ]
      print(f"| {model} | {sampler} |", ", ".join(f"{r:.2f}" for r in every), "|")
  print("\n| sCD's training compute / teacher's | 1 step | 2 steps |\n|---|---|---|")
  found = ratios(seeds)
  for compute in sorted({compute for _, compute in found}):
    cells = [spread(found[f"consistency/{k}", compute], 2) for k in (1, 2)]
    print(f"| {compute:.2f} |", " | ".join(cells), "|")


def draw_curve(seeds: list[dict], path: pathlib.Path) -> None:
  figure = Figure(figsize=(5, 3.2), layout="constrained", facecolor="white")
  axes, found = figure.subplots(), ratios(seeds)
  for k in (1, 2):
    points = sorted((c, r) for (s, c), r in found.items() if s == f"consistency/{k}")
    x = [c for c, _ in points]
    low, mean, high = ([f(r) for _, r in points] for f in (np.min, np.mean, np.max))
    (line,) = axes.plot(x, mean, marker="o", label=f"sCD, {k} step{'s' * (k > 1)}")
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
  axes.axhline(1, color="0.4", linewidth=1, label="teacher, 31 evaluations")
  axes.axvline(0.2, color="0.7", linewidth=1, linestyle=":")
  axes.set(xlabel="training FLOPs / the teacher's", yscale="log")
  axes.set(ylabel="Frechet distance / the teacher's")
  ticks = (1, 1.5, 2, 3, 5)
  axes.set_yticks(ticks, [f"{t:g}" for t in ticks], minor=False)
  axes.minorticks_off()
  axes.legend(frameon=False, fontsize=8)
  figure.savefig(path, dpi=130)


def draw_samples(folder: pathlib.Path, path: pathlib.Path) -> None:
  """Draws the same noise through the teacher and through its students."""
  panels = (
    ("teacher, 31 evaluations", "teacher/evaluate/heun-16.png"),
    ("sCD, 1 evaluation", "scd/evaluate/consistency-1.png"),
    ("sCD, 2 evaluations", "scd/evaluate/consistency-2.png"),
  )
  figure = Figure(figsize=(10.5, 2.4), layout="constrained", facecolor="white")
  axes = figure.subplots(1, len(panels))
  for ax, (title, name) in zip(axes, panels, strict=True):
    grid = np.asarray(Image.open(folder / name))
    ax.imshow(grid[: len(grid) * 6 // 10], cmap="gray", interpolation="nearest")
    ax.set_title(title, fontsize=10)
    ax.axis("off")
  figure.savefig(path, dpi=140)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--folder", type=pathlib.Path, default="runs/fashion")
  parser.add_argument("--docs", type=pathlib.Path, default="docs")
  args = parser.parse_args()
  seeds = [of_seed(args.folder, seed) for seed in range(args.seeds)]
  print_rows(seeds)
  print_ratios(seeds)
  print("\nminutes of training, teacher, sCD, sCT:")
  for seed in range(args.seeds):
    print(", ".join(f"{m:.1f}" for m in training_minutes(args.folder, seed)))
  draw_curve(seeds, args.docs / "fashion_curve.png")
  draw_samples(args.folder / "seed0", args.docs / "fashion.png")


if __name__ == "__main__":
  main()
