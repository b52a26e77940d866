"""CLIP score: agreement of images with the texts that they were generated from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sdiff_jax import registry
from sdiff_jax.metrics._metric import FeatureSet, Metric
from sdiff_jax.metrics.features import FeatureNetwork


class Sums(NamedTuple):
  """Sums over a part of a set of images.

  Attributes:
    count: number of images.
    total: sum of 100 max(cos, 0).
  """

  count: int
  total: float


def sums(images: np.ndarray, texts: np.ndarray) -> Sums:
  """Returns the sums of a batch of images and their texts.

  Args:
    images: embeddings of length 1, [N, E].
    texts: embeddings of length 1, [N, E].

  Raises:
    ValueError: their shapes differ.
  """
  if images.shape != texts.shape:
    raise ValueError(
      f"texts: must have the shape {images.shape} of images, got {texts.shape}"
    )
  cos = (images * texts).sum(1, dtype=np.float64)
  return Sums(len(images), 100 * np.maximum(cos, 0).sum())


def merged(a: Sums, b: Sums) -> Sums:
  """Returns the sums of two parts together."""
  return Sums(a.count + b.count, a.total + b.total)


def score(whole: Sums) -> float:
  """Returns the mean of 100 max(cos, 0) over pairs of an image and its text.

  Reference: Hessel et al., arXiv:2104.08718, with 100 for their 2.5.
  """
  return float(whole.total / whole.count)


@registry.register(
  "metrics",
  "clip_score",
  columns={
    "clip_score": (
      "CLIP",
      "{:.2f}",
      "CLIP score, the mean of 100 max(cos, 0) over images and their texts, higher is "
      "better",
    )
  },
)
def build(
  *, network: FeatureNetwork, prompts: Sequence[str] | None = None
) -> Metric | None:
  """Returns the CLIP score of images with prompts, by a network that embeds texts.

  Args:
    network: its `text` embeds the prompts.
    prompts: text of each image, N of them; None if the images have none.
  """
  if network.text is None or prompts is None:
    return None
  texts = network.text(prompts)

  def update(features: np.ndarray, indices: np.ndarray, size: int) -> Sums:
    del size
    return sums(features, texts[indices])

  def compute(
    samples: FeatureSet, real: FeatureSet | None, totals: Sums
  ) -> dict[str, float]:
    del samples, real
    return {"clip_score": score(totals)}

  return Metric(compute, update=update, merge=merged)
