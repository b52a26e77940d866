"""Timing of PyTorch programs, case by case, under a limit of time.

What torch_networks.py and diffusers_unet.py share. Progress goes to stderr; the last
line of stdout is a JSON list with one row for each case.
"""

import gc
import json
import os
import statistics
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

WARM_UPS, REPEATS = 3, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a CPU the scripts are only rehearsed, and the C++ compiler would take minutes.
COMPILE = {"dynamic": False, "backend": "inductor" if DEVICE == "cuda" else "aot_eager"}
Row = dict[str, Any]


class Case(NamedTuple):
  """A program to time: its name, batch size, and what builds it.

  `build` returns a function without arguments, whose first call compiles.
  """

  name: str
  batch: int
  build: Callable[[], Callable[[], Any]]
  facts: Mapping[str, Any] = types.MappingProxyType({})


def synchronize() -> None:
  """Waits for the device."""
  if DEVICE == "cuda":
    torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any]) -> float:
  """Returns the time of one call on the device."""
  if DEVICE == "cpu":
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)
  first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
  first.record()
  call()
  last.record()
  torch.cuda.synchronize()
  return first.elapsed_time(last)


def measure(case: Case) -> Row:
  """Returns the row of a case, with the field `error` in place of times if it fails."""
  row: Row = {"name": case.name, "batch": case.batch, **case.facts}
  try:
    if DEVICE == "cuda":
      torch.cuda.empty_cache()
      torch.cuda.reset_peak_memory_stats()
    call = case.build()
    begin = time.monotonic()
    call()
    synchronize()
    compile_seconds = time.monotonic() - begin
    for _ in range(WARM_UPS):
      call()
    synchronize()
    ms = statistics.median(milliseconds(call) for _ in range(REPEATS))
    row["ms"], row["samples_per_second"] = ms, 1e3 * case.batch / ms
    row["compile_seconds"] = compile_seconds
    if DEVICE == "cuda":
      row["gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
  except Exception as error:
    row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
  return row


def run(cases: Iterator[Case], seconds: float) -> None:
  """Times cases and prints their rows as JSON.

  No case starts after `seconds`. A case that is still running then, in a compiler for
  example, is given up: it becomes a row with an error, and the process ends.
  """
  deadline = time.monotonic() + seconds
  rows: list[Row] = []
  current: list[Row] = []
  lock = threading.Lock()

  def finish() -> None:
    with lock:
      print(json.dumps(rows + [row | {"error": "out of time"} for row in current]))
      sys.stdout.flush()
      os._exit(0)  # also ends a compiler that still runs

  timer = threading.Timer(seconds, finish)
  timer.daemon = True
  timer.start()
  for case in cases:
    with lock:
      current[:] = [{"name": case.name, "batch": case.batch}]
    if time.monotonic() > deadline:
      row = current[0] | {"error": "not started: out of time"}
    else:
      row = measure(case)
    # Memory of a case, and programs compiled for it, must not count for the next one.
    torch._dynamo.reset()
    gc.collect()
    with lock:
      current.clear()
      rows.append(row)
    print(json.dumps(row), file=sys.stderr, flush=True)
  timer.cancel()
  finish()
