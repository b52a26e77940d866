"""Images per second of the input pipeline, against what a training step consumes.

  python benchmarks/loader.py [--rounds=7]

Each source feeds `data.batches` and `sharding.put`, as training does; the step is
the compiled teacher step of a network for images of that shape, on one batch that
stays on the device. Loader and step are timed alternately, each alone; the ratio is the
median over the rounds. "One thread" reads batches without the pipeline's threads.
Files were just written, so they are read from memory: this measures decoding, not the
disk. On an accelerator steps are faster and the loader is not: compare its column then.
"""

import argparse
import contextlib
import io
import itertools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdiff_jax import config, registry
from sdiff_jax import data as data_lib
from sdiff_jax.data import Dataset, _loading
from sdiff_jax.distributed import sharding
from sdiff_jax.training import ema, optimizers, state, step

SIGMA_D, SEED, CLASSES = 0.5, 0, 4
PREFETCHED = 8 + 2  # batches that wait in the pipeline, or are in its threads
MLP = {"name": "mlp", "width": 1024, "depth": 4}
DIT = {"name": "dit", "patch": 4, "width": 256, "depth": 4, "heads": 4, "unroll": 4}


class Case(NamedTuple):
  """A data set and a network, one line of the table."""

  title: str
  source: Dataset
  model: dict
  batch_size: int


def photo(rng: np.random.Generator, side: int) -> Image.Image:
  """Returns a random image of about the spectrum, and the file size, of a photograph.

  Noise of every octave is enlarged and added, the coarser the stronger.
  """
  pixels = np.zeros((side, side, 3), np.float32)
  for octave in range(1, side.bit_length()):
    small = rng.standard_normal((2**octave, 2**octave, 3)).astype(np.float32)
    for channel in range(3):
      layer = Image.fromarray(small[..., channel])
      layer = layer.resize((side, side), Image.Resampling.BICUBIC)
      pixels[..., channel] += 80 * 0.7**octave * np.asarray(layer)
  return Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8))


def write_jpegs(folder: pathlib.Path, count: int, side: int) -> str:
  """Writes sub-folders of JPEG files, and returns how many bytes they have."""
  rng = np.random.default_rng(0)
  for k in range(count):
    path = folder / f"class{k % CLASSES}" / f"{k}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(rng, side).save(path, quality=90)
  size = sum(path.stat().st_size for path in folder.rglob("*.jpg")) / count
  return f"{size / 1024:.1f} kB"


def write_records(folder: pathlib.Path, count: int, side: int) -> None:
  """Prepares the data set `tiny` in ArrayRecord files, as PNG, without TensorFlow.

  TensorFlow Datasets encodes arrays with TensorFlow, but stores encoded files unchanged.
  """
  import tensorflow_datasets as tfds  # slow, and needed only here

  described = {
    "image": tfds.features.Image(shape=(side, side, 3)),
    "label": tfds.features.ClassLabel(num_classes=CLASSES),
  }

  class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = tfds.features.FeaturesDict(described)
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      rng = np.random.default_rng(0)
      for k in range(count):
        file = io.BytesIO()
        photo(rng, side).save(file, "PNG")
        file.seek(0)
        yield k, {"image": file, "label": k % CLASSES}

  with contextlib.redirect_stdout(sys.stderr):  # the table alone goes to stdout
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()


def cases(folder: pathlib.Path, count: int) -> list[Case]:
  """Returns the rows, their files made."""
  build = lambda name, **fields: registry.build("data", {"name": name} | fields)  # noqa: E731
  out = [Case("`idx`, Fashion-MNIST", build("idx"), MLP, 256)]
  for side, size, batch_size in ((64, 32, 64), (256, 64, 32)):
    files = folder / f"jpeg{side}"
    weight = write_jpegs(files, count, side)
    source = build("folder", dir=str(files), image_size=size)
    title = f"`folder`, JPEG of {side} px and {weight}, to {size} px"
    out.append(Case(title, source, DIT, batch_size))
  write_records(folder / "tfds", count, 32)
  source = build("tfds", tfds_name="tiny", dir=str(folder / "tfds"))
  out.append(Case("`tfds`, PNG of 32 px in ArrayRecord", source, DIT, 64))
  return out


def teacher_step(case: Case, batch: dict) -> Callable[[int], float]:
  """Returns (count) -> seconds of so many steps."""
  given = {"shape": case.source.shape, "cond": case.source.cond}
  network = registry.build("models", case.model, **given)
  loss = config.component("losses", "diffusion").to_dict()
  loss = registry.build("losses", loss, network=network, sigma_d=SIGMA_D)
  rate = lambda n: jnp.float32(1e-4)  # noqa: E731
  moments = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "clip": 0.0}
  optimizer = optimizers.build(rate, name="adam", **moments)
  betas = ema.betas(("power/0.1",), case.batch_size)
  key = jax.random.key(0)
  current = state.create(network.init(key), optimizer, tuple(betas))
  function = jax.jit(
    step.build(loss, optimizer, ema=betas, learning_rate=rate), donate_argnums=0
  )
  compiled = function.lower(current, batch, key, None).compile()

  def run(count: int) -> float:
    nonlocal current
    begin = time.perf_counter()
    for _ in range(count):
      current, _ = compiled(current, batch, key, None)
    jax.block_until_ready(current)
    return time.perf_counter() - begin

  return run


def take(batches: Iterator, count: int) -> float:
  """Returns the seconds that so many batches take to be on the device."""
  begin = time.perf_counter()
  for batch in itertools.islice(batches, count):
    jax.block_until_ready(batch)
  return time.perf_counter() - begin


def alone(case: Case, count: int) -> float:
  """Returns the seconds that one thread takes to read so many batches."""
  begin = time.perf_counter()
  for k in range(count):
    chosen = _loading.indices(case.source.size, SEED, k, case.batch_size)
    images, _ = case.source[chosen]
    case.source.codec.encode(images, SIGMA_D)
  return time.perf_counter() - begin


def enough(run: Callable[[int], float], seconds: float) -> int:
  """Returns a count for which run(count) takes about so many seconds."""
  run(1)
  return max(1, round(seconds / run(1)))


def row(case: Case, rounds: int, over_batch: jax.sharding.NamedSharding) -> list:
  """Returns images a second of loader, one thread and step, and the ratio."""
  options = {"seed": SEED, "batch_size": case.batch_size, "sigma_d": SIGMA_D}
  read = data_lib.batches(case.source, **options)
  batches = (
    sharding.make_global_batch(batch, over_batch, case.batch_size) for batch in read
  )
  training = teacher_step(case, next(batches))
  steps = enough(training, 1.0)
  reads = enough(lambda n: alone(case, n), 1.0)
  rates = []
  for _ in range(rounds):
    take(batches, 2 * PREFETCHED)  # what was read ahead is not counted
    loader = reads / take(batches, reads)
    one = reads / alone(case, reads)  # long enough for the threads to fill up first
    rates.append((loader, one, steps / training(steps)))
  medians = [statistics.median(r) * case.batch_size for r in zip(*rates, strict=True)]
  return [*medians, statistics.median(a / c for a, _, c in rates)]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--images", type=int, default=512, help="files to make")
  args = parser.parse_args()
  over_batch = sharding.batch(sharding.make_mesh())
  with tempfile.TemporaryDirectory() as name:
    rows = cases(pathlib.Path(name), args.images)
    print("| source | loader | one thread | step | loader / step |")
    print("|---|---|---|---|---|")
    for case in rows:
      *rates, ratio = row(case, args.rounds, over_batch)
      loader, one, used = (f"{rate:,.0f}" for rate in rates)
      network = f"`{case.model['name']}`, batch {case.batch_size}: {used}"
      print(f"| {case.title} | {loader} | {one} | {network} | **{ratio:.1f}** |")


if __name__ == "__main__":
  main()
