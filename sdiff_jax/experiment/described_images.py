"""Images in a folder as PNGs, each of which says what determined it and what it cost."""

import os
import sys
from typing import NamedTuple, NotRequired, TypedDict

from sdiff_jax import renamed
from sdiff_jax.data import folder
from sdiff_jax.io import image_io, records, resumable, storage
from sdiff_jax.samplers import Sampler
from sdiff_jax.types import Json, UserError

MAX_IMAGES = 1_000_000
# Names of earlier versions, in their images -> present names.
RENAMED = {"passes": "num_iterations", "evaluations": "num_evaluations"}
# What a PNG says of its image; None where there is none.
Description = dict[str, Json] | None


# What a PNG says of the cost of its image, beside what determines the image.
Cost = TypedDict(
  "Cost",
  {
    "sampler.window": records.Count,
    "seconds": records.Seconds,  # of the batch
    "batch": records.Positive,  # number of its images
    "num_iterations": NotRequired[float],
    "num_evaluations": NotRequired[float],
    "error": NotRequired[float],
  },
)


class Images(NamedTuple):
  """The images of a job.

  Attributes:
    folder: where they lie.
    settings: what determines each image: prompt, seed and fields of the config.
  """

  folder: str
  settings: list[dict[str, Json]]

  def path(self, k: int) -> str:
    """Returns the path of image k."""
    return os.path.join(self.folder, f"{k:05d}.png")

  def descriptions(self) -> list[Description]:
    """Returns what the existing images say of themselves, None for the others.

    Raises:
      UserError: an image was made with other settings.
    """
    descriptions = [_description(self.path(k)) for k in range(len(self.settings))]
    for k, (stored, settings) in enumerate(
      zip(descriptions, self.settings, strict=True)
    ):
      if stored is None:
        continue
      of_settings = {name: stored.get(name) for name in settings}
      if different := resumable.differences(of_settings, settings):
        raise UserError(
          f"{self.path(k)} was made with other settings: {', '.join(different)}; use "
          "another --workdir, or the same values"
        )
    return descriptions


def _description(path: str) -> Description:
  """Returns what a PNG says of its image, None where there is no image of this job."""
  if not storage.exists(path):
    return None
  try:
    text = image_io.about(path)
    stored = records.decode(text, dict[str, Json], path, any_number=True)
    names = {old: new.name for old, new in renamed.RENAMED.items()} | RENAMED
    stored = {names.get(name, name): value for name, value in stored.items()}
    if "sampler.window" not in stored:
      return None
    return records.check(stored, Cost, path)
  except (*folder.UNREADABLE, UserError) as error:
    print(f"{path} is damaged, making it again: {error}", file=sys.stderr)
    return None


def stored_window(
  sampler: Sampler, descriptions: list[Description], folder: str
) -> Sampler:
  """Returns the sampler with the window of the existing images.

  Args:
    sampler: with any window, or with none yet.
    descriptions: of the images.
    folder: where they lie.

  Raises:
    UserError: they were made with another window than the sampler's.
  """
  windows = {stored["sampler.window"] for stored in descriptions if stored}
  if not sampler.is_parallel or not windows:
    return sampler
  if not sampler.window:
    return sampler.replace(window=windows.pop())
  if other := windows - {sampler.window}:
    raise UserError(
      f"{folder} holds images of config.sampler.window={other.pop()}, not "
      f"{sampler.window}; use another --workdir, or the same value"
    )
  return sampler


def check_paths(workdir: str, num: int) -> None:
  """Checks that nothing is in the way of the files that a job writes.

  Args:
    workdir: with the folder images, or without.
    num: number of images.

  Raises:
    UserError: there are too many images, a file has the name of the folder of images, or
      a folder that of a file.
  """
  if num > MAX_IMAGES:
    raise UserError(f"config.sample.num={num}: must be at most {MAX_IMAGES}")
  folder = os.path.join(workdir, "images")
  if storage.lexists(folder) and not storage.isdir(folder):
    raise UserError(f"{folder} is no folder: move it, or use another --workdir")
  names = [os.path.join("images", f"{k:05d}.png") for k in range(num)]
  if not storage.isdir(folder):
    names = []
  for name in ("images.json", "images.png", *names):
    path = os.path.join(workdir, name)
    if storage.lexists(path) and not storage.isfile(path):
      raise UserError(f"{path} is no regular file: move it, or use another --workdir")
