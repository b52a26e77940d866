"""What clients get: images as PNG, npz or JSON, actions, and errors."""

import base64
import io
from typing import NamedTuple

import msgspec
import numpy as np

from sdiff_jax.io import image_io
from sdiff_jax.serving.batcher import Answer
from sdiff_jax.serving.lanes import Rows
from sdiff_jax.serving.requests import Refused
from sdiff_jax.types import Json

TYPES = {"png": "image/png", "npz": "application/octet-stream"}
JSON = "application/json"


class Content(NamedTuple):
  """A response.

  Attributes:
    body: its bytes.
    media_type: their type.
    headers: further headers.
  """

  body: bytes
  media_type: str
  headers: dict[str, str]


def check_finite(rows: Rows, what: str) -> None:
  """Checks that the outputs of a request are finite, which pixels do not show.

  Args:
    rows: outputs of a lane, with "finite" bool [n].
    what: "images" or "actions".

  Raises:
    Refused: they are not; the status is 500.

  Example:
    >>> check_finite({"finite": np.array([True])}, "images")
  """
  bad = int((~rows["finite"]).sum())
  if bad:
    raise Refused(
      f"{bad} of {len(rows['finite'])} {what} are not finite: the network's weights or "
      "its dtype are at fault, or too much guidance; nothing is answered in their place",
      500,
      "not_finite",
    )


def of_images(
  answer: Answer, seeds: np.ndarray, labels: np.ndarray, form: str
) -> Content:
  """Returns the response to a request for images.

  Args:
    answer: of the lane.
    seeds: of the images, [n].
    labels: their classes, [n]; 0 without classes.
    form: "png", "npz" or "json".
  """
  rows = answer.rows
  headers = {
    "Server-Timing": f"queue;dur={1e3 * answer.waited:.2f}, "
    f"batch;dur={1e3 * answer.seconds:.2f}",
    "X-Batch": str(answer.batch),
    "X-Evaluations": _mean(rows["evaluations"]),
    "X-Passes": _mean(rows["passes"]),
  }
  if form == "png":
    return Content(image_io.png(rows["images"][0]), TYPES[form], headers)
  if form == "npz":
    np.savez(buffer := io.BytesIO(), arr_0=rows["images"], arr_1=labels)
    return Content(buffer.getvalue(), TYPES[form], headers)
  images = [
    {
      "seed": seed,
      "label": label,
      "evaluations": evaluations,
      "passes": passes,
      "png": base64.b64encode(image_io.png(image)).decode(),
    }
    for image, seed, label, evaluations, passes in zip(
      rows["images"],
      seeds.tolist(),
      labels.tolist(),
      rows["evaluations"].tolist(),
      rows["passes"].tolist(),
      strict=True,
    )
  ]
  return Content(encode({"images": images, **cost(answer)}), JSON, headers)


def _mean(counts: np.ndarray) -> str:
  return f"{sum(counts.tolist()) / len(counts):.4g}"


def of_actions(answer: Answer) -> Content:
  """Returns the response to a request for actions of one robot.

  Args:
    answer: of the lane.
  """
  rows = answer.rows
  body = {
    "actions": rows["actions"][0].tolist(),
    "passes": int(rows["passes"][0]),
    "evaluations": int(rows["evaluations"][0]),
    **cost(answer),
  }
  return Content(encode(body), JSON, {})


def cost(answer: Answer) -> dict[str, float]:
  """Returns what JSON says of the cost of a request.

  Args:
    answer: of the lane.
  """
  return {
    "waited_ms": 1e3 * answer.waited,
    "batch_ms": 1e3 * answer.seconds,
    "batch": answer.batch,
  }


def error(message: str, kind: str) -> bytes:
  """Returns the body of an error.

  Args:
    message: for people.
    kind: one word for programs.

  Example:
    >>> error("seed: is missing", "invalid")
    b'{"error":{"kind":"invalid","message":"seed: is missing"}}'
  """
  return encode({"error": {"kind": kind, "message": message}})


def encode(value: Json) -> bytes:
  """Returns a value as JSON.

  Args:
    value: of dicts, lists, texts and numbers.

  Example:
    >>> encode({"a": 1})
    b'{"a":1}'
  """
  return msgspec.json.encode(value)
