"""Where metrics and sample images go: JSON lines, TensorBoard, a progress bar."""

import json
import math
import os
import pathlib
import sys
import time

import numpy as np
import tensorboardX
import tqdm
from PIL import Image, PngImagePlugin

METRICS = "metrics.jsonl"
GAP = 2  # pixels between the cells of a grid
GAP_COLOUR = 128  # mid-grey: visible on light and on dark pages
ABOUT = "Description"  # a keyword of the PNG standard
CELL = 32  # pixels; smaller images are enlarged to at least this side
PLAIN_SECONDS = 10.0  # between two progress lines when there is no terminal


class Writer:
  """Writes what a training run reports, as a context manager.

  A run that starts again at step `start` first drops what an earlier, killed run
  wrote after its last checkpoint, so that every step appears once. Values must be on
  the host already: the writer never waits for a device.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    total: int,
    start: int = 0,
    unit: str = "images",
    active: bool = True,
  ):
    """Notes where and what to write; files are opened on entering.

    Args:
      workdir: directory of the run, made if missing.
      total: steps of the whole run.
      start: steps that earlier runs finished and saved.
      unit: what the rate in the progress bar counts.
      active: False on all processes but the first of a pod: nothing is written.
    """
    self._workdir = pathlib.Path(workdir)
    self._total = total
    self._start = start
    self._unit = unit
    self._active = active

  def __enter__(self) -> "Writer":
    if not self._active:
      return self
    self._workdir.mkdir(parents=True, exist_ok=True)
    first = self._start + 1 if self._start else 0  # of the steps this run will write
    path = self._workdir / METRICS
    _keep_before(path, first)
    self._lines = path.open("a", encoding="utf-8", buffering=1)
    self._board = tensorboardX.SummaryWriter(
      str(self._workdir / "tensorboard"),
      purge_step=first,
      max_queue=0,  # no limit: a full disk ends its thread, and a full queue blocks
      filename_suffix=f".{self._start}",
    )
    self._bar = tqdm.tqdm(
      total=self._total,
      initial=self._start,
      disable=not sys.stderr.isatty(),
      dynamic_ncols=True,
      bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps"
      "{postfix}, {remaining} left",
    )
    self._began = None
    self._printed = -math.inf
    return self

  def __exit__(self, *exception) -> None:
    if self._active:
      self._bar.close()
      self._board.close()
      self._lines.close()

  def scalars(self, step: int, values: dict) -> None:
    """Appends one line {"step": step, name: number, ...}; NaN and inf become null."""
    if not self._active:
      return
    numbers = {name: _finite(value) for name, value in values.items()}
    self._lines.write(json.dumps({"step": int(step), **numbers}) + "\n")
    for name, number in numbers.items():
      if number is not None:
        self._board.add_scalar(name, number, step)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes uint8 [H, W, C] to samples/<name>_<step>.png and to TensorBoard."""
    if not self._active:
      return
    save_png(self._workdir / "samples" / f"{name}_{step:07d}.png", image)
    self._board.add_image(name, image, step, dataformats="HWC")

  def progress(self, step: int, *, images_per_second: float, loss: float) -> None:
    """Moves the bar to `step`; without a terminal, prints a line now and then."""
    if not self._active:
      return
    numbers = f"{images_per_second:,.0f} {self._unit}/s, loss {loss:.4g}"
    if not self._bar.disable:
      self._bar.set_postfix_str(numbers, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = time.monotonic()
    if self._began is None:
      self._began = (step, now)
    if now - self._printed < PLAIN_SECONDS and step < self._total:
      return
    self._printed = now
    steps, seconds = step - self._began[0], now - self._began[1]
    left = ""  # unknown at the first call
    if steps > 0:
      remaining = seconds / steps * (self._total - step)
      left = f", {tqdm.tqdm.format_interval(remaining)} left"
    # print and not logging: it shows whatever the verbosity of the logs.
    print(f"step {step}/{self._total}, {numbers}{left}", file=sys.stderr, flush=True)


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
  """Returns the lines of a run's metrics.jsonl, [] if it has none."""
  path = pathlib.Path(workdir) / METRICS
  rows = []
  for line in path.read_text("utf-8").splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue  # a killed run leaves half a line behind
  return rows


def grid(
  images: np.ndarray, columns: int | None = None, scale: int | None = None
) -> np.ndarray:
  """Tiles images row by row into one picture.

  Args:
    images: uint8 [N, H, W, C] with C = 1 or 3.
    columns: images in a row; as square a grid as possible by default.
    scale: whole factor of enlargement; by default cells get sides of 32 or more.

  Returns:
    uint8 [H', W', 3], with gaps of two pixels between the cells.
  """
  count, height, width, _ = images.shape
  columns = columns or math.ceil(math.sqrt(count))
  scale = scale or math.ceil(CELL / min(height, width))
  rows = math.ceil(count / columns)
  images = np.broadcast_to(images, (count, height, width, 3))
  images = images.repeat(scale, axis=1).repeat(scale, axis=2)
  pitch_y, pitch_x = height * scale + GAP, width * scale + GAP
  canvas = np.full((rows * pitch_y, columns * pitch_x, 3), GAP_COLOUR, np.uint8)
  for k, image in enumerate(images):
    y, x = k // columns * pitch_y, k % columns * pitch_x
    canvas[y : y + height * scale, x : x + width * scale] = image
  return canvas[:-GAP, :-GAP]


def save_png(path: str | os.PathLike, image: np.ndarray, about: str = "") -> None:
  """Writes uint8 [H, W, C], C = 1 or 3, as a PNG, whole or not at all.

  Args:
    path: its directory is made if needed.
    image: the pixels.
    about: a text that is kept inside the file (see `about`); "" for none.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if image.shape[-1] == 1:
    image = image[..., 0]
  texts = PngImagePlugin.PngInfo()
  if about:
    texts.add_text(ABOUT, about)
  temporary = path.with_name(path.name + ".tmp")
  Image.fromarray(image).save(temporary, format="PNG", pnginfo=texts)
  os.replace(temporary, path)


def about(path: str | os.PathLike) -> str:
  """Returns the text inside a PNG, "" where there is none.

  Raises:
    OSError: the file cannot be read, or is no image.
  """
  with Image.open(path) as opened:
    return opened.info.get(ABOUT, "")


def save_gif(
  path: str | os.PathLike, films: list[list[np.ndarray]], rate: float
) -> None:
  """Writes films, side by side, as one animation; those that end early stand still.

  Args:
    path: of the file.
    films: pictures of each film, uint8 [H, W, 3].
    rate: pictures a second.
  """
  pictures = [
    Image.fromarray(grid(np.stack([film[min(k, len(film) - 1)] for film in films])))
    for k in range(max(map(len, films)))
  ]
  first, *others = pictures
  first.save(path, save_all=True, append_images=others, duration=1000 / rate, loop=0)


def save_text(path: str | os.PathLike, text: str) -> None:
  """Writes a file at one stroke: a kill or a full disk leaves the old one whole."""
  temporary = pathlib.Path(f"{path}.tmp")
  temporary.write_text(text, "utf-8")
  os.replace(temporary, path)


def _finite(value) -> float | None:
  """Returns a numpy, JAX or Python scalar as a float; None, JSON's null, if not
  finite."""
  number = float(value)
  return number if math.isfinite(number) else None


def _keep_before(path: pathlib.Path, first: int) -> None:
  """Drops, at one stroke, the lines of steps >= first and a truncated last line."""
  if not path.exists():
    return
  kept = [row for row in read_metrics(path.parent) if row["step"] < first]
  save_text(path, "".join(json.dumps(row) + "\n" for row in kept))
