"""Time of training into a bucket, against a folder of this machine.

  python benchmarks/buckets.py [--rounds=3] [--steps=10000]
  python benchmarks/buckets.py --parts

With --parts nothing is trained: each thing that a bucket adds to a training is done a few
times, and its processor time, which other processes do not change, is counted; that of
checkpoints is the difference from a folder. "Blocking" is the time in which the loop
waits, and the requests of Python that are sent meanwhile. (Orbax's own are sent by
threads.)

Without it the digits' teacher is trained by the command line, alternately into a folder and into a
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
import time
from collections.abc import Callable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import buckets  # noqa: E402

from sdiff_jax.training import metric_writer  # noqa: E402

SECONDS = 0.03  # of a step, on two busy cores


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


class Step(NamedTuple):
  """What something took.

  Attributes:
    cpu: processor time of this process, s.
    wall: time, s.
    requests: number of requests that gcsfs sent.
  """

  cpu: float
  wall: float
  requests: int


def count_requests() -> list[str]:
  """Returns a list that gets the method of every request of gcsfs from now on."""
  import gcsfs

  requests: list[str] = []
  request = gcsfs.GCSFileSystem._request

  async def counted(self, method: str, *args, **options):
    requests.append(method)
    return await request(self, method, *args, **options)

  gcsfs.GCSFileSystem._request = counted
  return requests


def parts(bucket: str, folder: str, steps: int) -> None:
  """Prints what each thing costs that a bucket adds to a training of the digits."""
  import jax
  import jax.numpy as jnp

  from sdiff_jax import config as configs
  from sdiff_jax.experiment import build, training
  from sdiff_jax.io import lease, mirror, storage
  from sdiff_jax.training import checkpoints as checkpoints_lib

  requests: list[str] = []

  def measure(call: Callable[[], object]) -> Step:
    requests.clear()
    cpu, wall = time.process_time(), time.monotonic()
    call()
    return Step(time.process_time() - cpu, time.monotonic() - wall, len(requests))

  loading = measure(storage.filesystem)
  requests = count_requests()
  config = configs.load(str(ROOT / "configs/digits_diffusion.py"))
  experiment = build.build(config)
  trainer = training.build_trainer(config, experiment.network, None, experiment.mesh)
  state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), trainer.abstract_state())
  saving: dict[str, tuple[Step, Step]] = {}
  for place in (folder, bucket):
    with checkpoints_lib.Checkpoints(f"{place}/parts") as checkpoints:
      pairs = [
        (measure(lambda k=k: checkpoints.save(k, state)), measure(checkpoints.wait))
        for k in range(6)
      ]
    blocking, rest = ([pair[i] for pair in pairs[1:]] for i in (0, 1))
    saving[place] = median(blocking), median(rest)
  source = f"{folder}/mirror"
  pathlib.Path(source).mkdir()
  mirrored = mirror._Mirror(source, f"{bucket}/mirror")
  uploads = []
  for k in range(1, 6):  # 100 lines of metrics, three times as much for TensorBoard
    pathlib.Path(source, "metrics.jsonl").write_bytes(bytes(30_000 * k))
    pathlib.Path(source, "events").write_bytes(bytes(90_000 * k))
    uploads.append(measure(mirrored._upload))
  held = lease.Lease(f"{bucket}/.lock", "train")
  with held:

    def renew() -> None:
      held._generation = lease._write(held.path, held._holder, held._generation)

    renewals = [measure(renew) for _ in range(5)]

  seconds = steps * SECONDS
  here, there = (sum(step.cpu for step in saving[place]) for place in (folder, bucket))
  rows = {
    "import of gcsfs": (loading.cpu, 1),
    "checkpoint, more than in a folder": (
      there - here,
      steps / config.checkpoint.every,
    ),
    "upload of metrics": (median(uploads).cpu, seconds / mirror.SECONDS),
    "renewal of the lock": (median(renewals).cpu, seconds / lease.RENEWAL),
  }
  print(f"| what | CPU s each | in {steps} steps, {seconds:.0f} s | CPU s |")
  print("|---|---|---|---|")
  for name, (each, number) in rows.items():
    print(f"| {name} | {each:.4f} | {number:.0f} | {each * number:.2f} |")
  print(f"together {sum(each * number for each, number in rows.values()):.2f} CPU s")
  for place, (blocking, rest) in saving.items():
    print(
      f"a checkpoint in {place}: blocking {blocking.cpu:.3f} CPU s, {blocking.wall:.3f} s, "
      f"{blocking.requests} requests; then {rest.cpu:.3f} CPU s, {rest.wall:.3f} s, "
      f"{rest.requests} requests"
    )


def median(found: list[Step]) -> Step:
  """Returns the median of each number."""
  return Step(*(statistics.median(x) for x in zip(*found, strict=True)))


def cpu_seconds(pid: int) -> float:
  """Returns the processor time of a process, s."""
  fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=10_000)
  parser.add_argument("--parts", action="store_true")
  options = parser.parse_args()
  if options.parts:
    with buckets.bucket() as (bucket, _), tempfile.TemporaryDirectory() as folder:
      parts(bucket, folder, options.steps)
    return
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
