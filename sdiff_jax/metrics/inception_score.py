"""Inception score: how sure a classifier is of each image, and how diverse of all."""

from typing import NamedTuple

import numpy as np

SPLITS = 10


class Sums(NamedTuple):
  """What part of a set of images adds to its score; parts add up field by field.

  Attributes:
    count: images in each split, float64 [SPLITS].
    information: sum over them of sum_y p(y|x) log p(y|x), [SPLITS].
    classes: sum over them of p(y|x), [SPLITS, K].
  """

  count: np.ndarray
  information: np.ndarray
  classes: np.ndarray


def splits(size: int) -> np.ndarray:
  """Returns which of SPLITS equal runs each of `size` images is in, int [size]."""
  ends = np.arange(1, SPLITS + 1) * size // SPLITS
  return np.searchsorted(ends, np.arange(size), side="right")


def sums(logits: np.ndarray, split: np.ndarray) -> Sums:
  """Returns the sums of images with logits [n, K], in splits int [n]."""
  x = logits.astype(np.float64)
  x -= x.max(axis=1, keepdims=True)
  log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
  p = np.exp(log_p)
  member = (split == np.arange(SPLITS)[:, None]).astype(np.float64)
  return Sums(member.sum(1), member @ (p * log_p).sum(1), member @ p)


def merged(a: Sums, b: Sums) -> Sums:
  """Returns the sums of two parts together."""
  return Sums(*(x + y for x, y in zip(a, b, strict=True)))


def score(whole: Sums) -> float:
  """Returns the mean over the splits of exp(E_x KL(p(y|x) || p(y))).

  Reference: Salimans et al., arXiv:1606.03498, section 4.
  """
  some = whole.count > 0
  count, p = whole.count[some], whole.classes[some] / whole.count[some][:, None]
  log_p = np.log(np.maximum(p, np.finfo(np.float64).tiny))
  divergence = whole.information[some] / count - (p * log_p).sum(1)
  return float(np.exp(divergence).mean())
