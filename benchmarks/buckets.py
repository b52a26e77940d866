"""Time of training into a bucket, against a folder of this machine.

  python benchmarks/buckets.py [--rounds=3] [--steps=10000]

The digits' teacher is trained by the command line, alternately into a folder and into a
bucket of `gcp-storage-emulator` on this machine, with the config's own checkpoints. Times
are those of training.json's steps (`seconds` of the last line of metrics, without start
and compilation); the ratio is the median over the rounds. The emulator is a single thread
of Python and takes processor time from the training, which Google's servers would not;
its processor seconds are shown. "Longest step" is the longest time between two steps, which
a step that waited for a save would lengthen.
"""

import argparse
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import buckets  # noqa: E402

from sdiff_jax.training import metric_writer  # noqa: E402


class Cost(NamedTuple):
  """What a run took.

  Attributes:
    seconds: of all steps.
    cpu: processor time of the whole process, s.
    worst: longest step, s.
  """

  seconds: float
  cpu: float
  worst: float


def train(workdir: str, steps: int) -> Cost:
  """Trains in a process of its own."""
  command = [sys.executable, "-m", "sdiff_jax.main", f"--workdir={workdir}"]
  command += ["--config=configs/digits_diffusion.py", f"--config.train.steps={steps}"]
  command += ["--config.train.sample_every=0"]
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  lines = metric_writer.read_metrics(workdir)
  worst = max((line["step_seconds_worst"] for line in lines[1:]), default=0.0)
  return Cost(lines[-1]["seconds"], cpu, worst)


def cpu_seconds(pid: int) -> float:
  """Returns the processor time of a process, s."""
  fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=10_000)
  options = parser.parse_args()
  ratios = []
  print(
    "| round | folder: s, CPU s, longest step | bucket: the same | emulator, CPU s |"
  )
  print("|---|---|---|---|")
  with buckets.bucket() as (bucket, pid), tempfile.TemporaryDirectory() as folder:
    train(f"{folder}/compiled", 100)
    for k in range(options.rounds):
      before = cpu_seconds(pid)
      runs = [f"{folder}/{k}", f"{bucket}/{k}"]
      costs = {
        run: train(run, options.steps) for run in (runs if k % 2 else runs[::-1])
      }
      here, there = (costs[run] for run in runs)
      ratios.append([there.seconds / here.seconds, there.cpu / here.cpu])
      cells = [", ".join(f"{x:.2f}" for x in cost) for cost in (here, there)]
      print(
        f"| {k} | {cells[0]} | {cells[1]} | {cpu_seconds(pid) - before:.1f} |",
        flush=True,
      )
  wall, cpu = (statistics.median(r) for r in zip(*ratios, strict=True))
  print(f"median ratio of seconds {wall:.3f}, of CPU seconds {cpu:.3f}")


if __name__ == "__main__":
  main()
