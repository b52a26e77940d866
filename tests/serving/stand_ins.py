"""Models of NumPy alone: an image's pixels are its seed, class and guidance."""

import time

import numpy as np

from sdiff_jax.serving.lanes import Lane
from sdiff_jax.serving.models import Key, Live, Model

SIZE = 8  # of the images
STEPS, WINDOW = 8, 4


def pixels(seed: int, label: int, guidance: float = 1.0) -> np.ndarray:
  """Returns the image of a seed, uint8 [8, 8, 1]; seed 666 is not finite."""
  image = np.full((SIZE, SIZE, 1), seed % 251, np.uint8)
  image[0, 0], image[0, 1] = label, round(10 * guidance)
  return image


def draw(rows):
  guidance = rows.get("guidance", np.ones(len(rows["seeds"])))
  images = [
    pixels(*row) for row in zip(rows["seeds"], rows["label"], guidance, strict=True)
  ]
  ones = np.ones(len(images), np.int32)
  finite = rows["seeds"] != 666
  return {
    "images": np.stack(images),
    "finite": finite,
    "passes": ones,
    "evaluations": 2 * ones,
  }


def image_rows(seeds, labels=None, prompts=None, guidance=None):
  given = {} if guidance is None else {"guidance": np.full(len(seeds), guidance)}
  labels = seeds % 10 if labels is None else labels
  return {"seeds": seeds, "label": np.asarray(labels, np.int32), **given}


def watch(window, rows, listener):
  """Each pass finishes half of the window, at least one step."""
  begin, passes = 0, 0
  while begin < STEPS:
    listener(np.array([begin]), np.full((1, SIZE, SIZE, 1), 10 * begin, np.float32))
    begin, passes = begin + max(window // 2, 1), passes + 1
  return draw(rows) | {"passes": np.array([passes]), "evaluations": np.array([8])}


def images(name="digits", function=draw, seconds=1e-4) -> Model:
  """Returns a model of images, with guidance and a sampler to be watched."""
  keys = [Key(n, s, g) for n, s in (("heun", 16), ("ddim", 8)) for g in (False, True)]
  keys += [Key("paraddim", STEPS, g) for g in (False, True)]
  sizes = (1, 4, 16)
  lanes = {
    k: Lane(
      f"{name} {k.sampler}",
      dict.fromkeys(sizes, function),
      dict.fromkeys(sizes, seconds),
    )
    for k in keys
  }
  live = Live(
    key=Key("paraddim", STEPS),
    sequential=Key("ddim", STEPS),
    window=WINDOW,
    evaluations=STEPS,
    watch=watch,
    pictures=lambda d: d.astype(np.uint8),
  )
  return Model(
    name=name,
    title="teacher",
    makes="images",
    lanes=lanes,
    rows=image_rows,
    num_classes=10,
    shape=(SIZE, SIZE, 1),
    live=live,
  )


def policy(pass_seconds=0.01) -> Model:
  """Returns a policy of two states of three numbers: the action is the last state."""

  def act(passes):
    def program(rows):
      time.sleep(passes * pass_seconds)
      count = np.full(len(rows["seeds"]), passes, np.int32)
      finite = rows["seeds"] != 666
      actions = rows["states"][:, -1:] + passes
      return {
        "actions": actions,
        "finite": finite,
        "passes": count,
        "evaluations": count,
      }

    return program

  lanes = {
    Key("paraddpm", 32, max_passes=bound): Lane(
      f"policy {passes}", {1: act(passes)}, {1: passes * pass_seconds}
    )
    for bound, passes in ((0, 32), (4, 4), (16, 16))
  }
  return Model(
    name="robot",
    title="teacher",
    makes="actions",
    lanes=lanes,
    rows=lambda seeds, states: {"seeds": seeds, "states": np.float32(states)},
    shape=(2, 3),
  )
