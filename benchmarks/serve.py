"""Load on the job `serve`: images lost or wrong, throughput, and latency.

  python benchmarks/serve.py --runs=runs/demo

serves the run `teacher` and `scd` of a folder on a free port of this machine, and asks with
64 clients for 5,000 images, one a request, then with 1 and with 8 clients. Each image is
compared with the one of `samplers.sample` for its seed. The throughput of the sampler alone,
in batches of the ladder's top, is measured before and after, on the idle machine.
"""

import argparse
import asyncio
import io
import json
import re
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
from PIL import Image

from sdiff_jax import samplers
from sdiff_jax.experiment import sampling
from sdiff_jax.experiment import workdir as workdir_lib

TOP = 64  # of the default ladder


def main() -> None:
  """Runs the benchmark and prints its figures."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--runs", default="runs/demo", help="folder of the runs")
  parser.add_argument("--requests", type=int, default=5000)
  parser.add_argument("--clients", type=int, default=64)
  options = parser.parse_args()
  command = [sys.executable, "-m", "sdiff_jax.main", f"--workdir={options.runs}"]
  command += ["--job=serve", "--config=configs/digits_scd.py", "--config.serve.port=0"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    line = process.stdout.readline()
    try:
      port = int(re.search(r":(\d+)/", line)[1])
      for name, sampler in (("scd", "consistency/2"), ("teacher", "heun/16")):
        report(f"{options.runs}/{name}", name, sampler, port, options)
    finally:
      process.terminate()
  print(f"the service ended with code {process.returncode}")


def report(workdir: str, name: str, sampler: str, port: int, options) -> None:
  """Prints the figures of one run."""
  batch, wanted = direct(workdir, sampler, options.requests)
  before = alone(batch)
  load, answers = asyncio.run(ask(port, name, options.requests, options.clients))
  after = alone(batch)
  lone, few = [], []
  for _ in range(3):  # in turns, so that other load on the machine affects both
    lone += asyncio.run(ask(port, name, 100, 1))[1]
    few += asyncio.run(ask(port, name, 400, 8))[1]
  print(f"{name}, {sampler}:")
  lost = options.requests - len(answers)
  levels = [abs(a.image.astype(int) - wanted[a.seed]).max() for a in answers]
  rounded, wrong = levels.count(1), sum(level > 1 for level in levels)
  print(
    f"  {options.requests} requests of {options.clients} clients: {lost} lost,", end=" "
  )
  print(f"{wrong} wrong ({rounded} differ by one level of 255 in a pixel),", end=" ")
  print(f"{options.requests / load:,.0f} images/s")
  ratio = options.requests / load / statistics.mean((before, after))
  print(
    f"  sampler alone, batches of {TOP}: {before:,.0f} and {after:,.0f} images/s",
    end="",
  )
  print(f"; the service has {ratio:.0%} of it")
  times = {1: lone, 8: few, options.clients: answers}
  for clients, of in times.items():
    ms = 1e3 * np.array([a.seconds for a in of])
    p50, p95, p99 = np.percentile(ms, (50, 95, 99))
    print(
      f"  {clients} clients: median {p50:.2f} ms, p95 {p95:.2f} ms, p99 {p99:.2f} ms"
    )
  p95 = np.percentile([a.seconds for a in few], 95)
  print(
    f"  p95 of 8 clients / median of one: {p95 / np.median([a.seconds for a in lone]):.2f}"
  )


def direct(workdir: str, name: str, count: int):
  """Returns a function seeds -> images, and the images of all seeds by it."""
  config = workdir_lib.read(workdir)
  experiment, params = workdir_lib.trained(config, workdir)
  sampler = sampling.build_sampler(config, name)

  @jax.jit
  def generate(params, seeds, cond):
    net = sampling.denoiser(experiment, params)
    out = samplers.sample(sampler, net, seeds, experiment.dataset.shape, cond)
    return sampling.decode(experiment, None, out.x)

  def batch(seeds):
    cond = experiment.dataset.conditions(seeds)
    return np.asarray(generate(params, seeds, cond))

  seeds = np.arange(-(-count // TOP) * TOP, dtype=np.int32)
  images = [batch(part) for part in seeds.reshape(-1, TOP)]
  return batch, np.concatenate(images)


def alone(batch, seconds: float = 2.0) -> float:
  """Returns images a second in batches of the ladder's top."""
  begin, count = time.perf_counter(), 0
  while time.perf_counter() - begin < seconds:
    batch(np.arange(TOP, dtype=np.int32))
    count += TOP
  return count / (time.perf_counter() - begin)


class Answer:
  """A seed, its image and the time of its request."""

  def __init__(self, seed: int, content: bytes, seconds: float):
    self.seed, self.seconds = seed, seconds
    image = np.asarray(Image.open(io.BytesIO(content)))
    self.image = image[..., None] if image.ndim == 2 else image


async def ask(port: int, model: str, count: int, clients: int):
  """Asks for images 0 to count; returns the seconds in all, and the answers."""
  seeds, found = iter(range(count)), []

  async def client() -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for seed in seeds:
      body = json.dumps({"model": model, "seed": seed}).encode()
      head = "POST /v1/images HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: "
      head += f"application/json\r\nContent-Length: {len(body)}\r\n\r\n"
      begin = time.perf_counter()
      writer.write(head.encode() + body)
      headers = (await reader.readuntil(b"\r\n\r\n")).lower()
      length = int(re.search(rb"content-length: (\d+)", headers)[1])
      content = await reader.readexactly(length)
      if b" 200 " in headers[:20]:
        found.append((seed, content, time.perf_counter() - begin))
    writer.close()
    await writer.wait_closed()

  begin = time.perf_counter()
  await asyncio.gather(*(client() for _ in range(clients)))
  seconds = time.perf_counter() - begin
  return seconds, [Answer(*row) for row in found]


if __name__ == "__main__":
  main()
