"""Stage `attention`: is attention with a tangent right, and how fast is it?"""

import importlib
import pathlib

from h100_stages.shared import Stage, bars


def attention(stage: Stage, data: pathlib.Path) -> None:
  """Checks attention against float64 and times it."""
  del data
  bench = importlib.import_module("attention")
  lengths = (64,) if stage.tiny else (1024, 4096, 16384)
  checked = ((32, {"causal": True}),) if stage.tiny else bench.CHECKED
  stage.measure("errors", lambda: {"rows": list(bench.errors(checked))})
  repeats = 2 if stage.tiny else 20
  for length in lengths:
    stage.measure(
      f"{length} tokens",
      lambda length=length: {"rows": [*bench.times([length], repeats)]},
    )
  rows = {
    f"{row['work']}, {row['implementation']}, {row['length']}": row
    for length in lengths
    for row in stage.results[f"{length} tokens"].get("rows", [])
    if "median_ms" in row
  }
  bars(stage, "median ms", rows, "median_ms")
