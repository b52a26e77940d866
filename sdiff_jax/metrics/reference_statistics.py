"""What samples are measured against: statistics of real images, from files or kept."""

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from sdiff_jax.metrics import frechet, inception_score, precision_recall
from sdiff_jax.metrics.streaming import StreamingMoments
from sdiff_jax.pretrained.files import safe_pickle
from sdiff_jax.types import UserError

FOLDER = os.path.expanduser("~/.cache/sdiff_jax/references")
NEIGHBOUR = 3  # sets the radii of precision and recall


class Reference(NamedTuple):
  """Features of real images.

  Attributes:
    mean: of the features, float64 [D].
    cov: their covariance, float64 [D, D].
    features: of some images, float32 [N, D], for precision and recall; N may be 0.
  """

  mean: np.ndarray
  cov: np.ndarray
  features: np.ndarray


def of(summary: StreamingMoments) -> Reference:
  """Returns the reference of a summary of real images."""
  return Reference(*frechet.estimated(summary.moments), np.concatenate(summary.kept))


def cached(
  key: Iterable[bytes],
  make: Callable[[], Reference],
  agreed: Callable[[bool], bool] = bool,
) -> Reference:
  """Returns `make()`, or what it returned when the key was last seen.

  Args:
    key: what the reference depends on: data, features.
    make: computes it.
    agreed: whether it is known here -> whether it is known to all processes.
  """
  digest = hashlib.sha256(b"\0".join(key)).hexdigest()[:16]
  path = os.path.join(FOLDER, f"{digest}.npz")
  known = _kept(path)
  if agreed(known is not None):
    return known
  made = make()
  os.makedirs(FOLDER, exist_ok=True)
  whole = f"{path}.{os.getpid()}.npz"
  np.savez(whole, **made._asdict())
  os.replace(whole, path)
  return made


def _kept(path: str) -> Reference | None:
  try:
    with np.load(path) as arrays:
      return Reference(**arrays)
  except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
    return None


def read(path: str, metric: str) -> frechet.Statistics:
  """Returns the statistics of a file, in float64.

  An .npz has mu and sigma, as those of ADM (VIRTUAL_*.npz) and EDM, for any metric, or
  mu_METRIC and sigma_METRIC; a .pkl of EDM2 has them for each of its metrics. No code
  that a pickle names is run.

  Args:
    path: of the file.
    metric: "fid", "fd_dinov2" or "frechet".

  Raises:
    UserError: the file is missing or damaged, or has no statistics of the metric.
  """
  try:
    found = _pickled(path) if path.endswith(".pkl") else _arrays(path)
    pair = _pair(found, metric)
  except FileNotFoundError:
    raise UserError(f"config.evaluate.reference={path!r}: no such file") from None
  except safe_pickle.Refused as error:
    raise UserError(f"{path}: {error}; nothing of it was run") from None
  except Exception as error:  # whatever a file of another kind leads to
    reason = f"{type(error).__name__}: {error}"
    raise UserError(f"{path} is damaged, or has no statistics ({reason})") from error
  if pair is None:
    has = ", ".join(sorted(map(str, found)))
    raise UserError(f"{path} has no mu and sigma of {metric}: it has {has}")
  mean, cov = pair
  if mean.ndim != 1 or cov.shape != 2 * mean.shape or mean.dtype.kind != "f":
    raise UserError(
      f"{path}: mu {mean.shape} and sigma {cov.shape}: save [D] and [D, D]"
    )
  return frechet.Statistics(mean.astype(np.float64), cov.astype(np.float64))


def save(path: str, found: dict[str, frechet.Statistics]) -> None:
  """Writes the statistics of metrics to an .npz that ADM's and EDM's code reads, too.

  Of one metric as mu and sigma, of several FID's so and the others' with their name.
  """
  arrays = {}
  for metric, (mean, cov) in found.items():
    end = "" if metric == "fid" or len(found) == 1 else f"_{metric}"
    arrays |= {f"mu{end}": mean, f"sigma{end}": cov}
  np.savez(path, **arrays)


def measure(
  metric: str, samples: StreamingMoments, real: Reference
) -> dict[str, float]:
  """Returns the Frechet distance by its name, and Inception score, precision, recall.

  The score is there where the network has classes, precision and recall where features
  of both sets were kept.

  Raises:
    UserError: there are too few images.
  """
  known = frechet.Statistics(real.mean, real.cov)
  if samples.moments.count < 2:
    raise UserError("config.evaluate: one image has no covariance; take more")
  out = {metric: frechet.distance(frechet.estimated(samples.moments), known)}
  if samples.scores is not None:
    out["inception_score"] = inception_score.score(samples.scores)
  fake = np.concatenate(samples.kept)
  if len(fake) and len(real.features):
    if min(len(fake), len(real.features)) <= NEIGHBOUR:
      raise UserError(
        f"config.evaluate.pr_num_images: {len(fake)} samples and {len(real.features)} "
        f"real images are too few for precision and recall; {NEIGHBOUR + 1} at least, "
        "or set it to 0"
      )
    both = precision_recall.precision_recall(real.features, fake, NEIGHBOUR)
    out |= zip(("precision", "recall"), both, strict=True)
  return out


def _arrays(path: str) -> dict[str, np.ndarray]:
  with np.load(path) as arrays:
    return {k: arrays[k] for k in arrays.files if k.startswith(("mu", "sigma"))}


def _pair(found: dict[str, Any], metric: str) -> tuple[np.ndarray, np.ndarray] | None:
  if isinstance(found.get(metric), dict):
    found = found[metric]
  for end in (f"_{metric}", ""):
    mean, cov = (found.get(f"{name}{end}") for name in ("mu", "sigma"))
    if mean is not None and cov is not None:
      pickled = isinstance(mean, safe_pickle.Array)
      return (mean.read(), cov.read()) if pickled else (mean, cov)
  return None


def _pickled(path: str) -> dict[str, Any]:
  with open(path, "rb") as file:
    found = safe_pickle.Unpickler(file).load()
  safe_pickle.check(isinstance(found, dict), "no dict of metrics")
  return found
