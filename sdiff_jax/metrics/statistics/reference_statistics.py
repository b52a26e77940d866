"""Statistics of real images that samples are compared with: files and a cache."""

import hashlib
import os
from collections.abc import Callable, Iterable

import numpy as np

from sdiff_jax.io import array_io, bounded, file_io, storage
from sdiff_jax.metrics import FeatureSet, frechet
from sdiff_jax.pretrained.files import safe_pickle
from sdiff_jax.types import Json, UserError

TOLERANCE = 1e-5  # relative to the largest variance, of a covariance in float32
FOLDER = os.path.expanduser("~/.cache/sdiff_jax/references")


def cached(
  key: Iterable[bytes],
  compute: Callable[[], FeatureSet],
  agree: Callable[[bool], bool] = bool,
) -> FeatureSet:
  """Returns `compute()`, or its value of an earlier call with the same key.

  Args:
    key: everything that the value depends on: data and features.
    compute: returns real images in the features of a network.
    agree: whether this process has the value -> whether all processes have it.
  """
  digest = hashlib.sha256(b"\0".join(key)).hexdigest()[:16]
  path = os.path.join(FOLDER, f"{digest}.npz")
  stored = _read_cache(path)
  if agree(stored is not None):
    return stored
  value = compute()
  file_io.write_npz(path, **value._asdict())
  return value


def _read_cache(path: str) -> FeatureSet | None:
  try:
    arrays = array_io.read_npz(path)
    value = FeatureSet(**arrays)
  except (UserError, TypeError):
    return None
  return value if all(np.isfinite(x).all() for x in value) else None


def read(path: str, metric: str) -> frechet.Statistics:
  """Returns mean and covariance of the features of a metric from a file, in float64.

  Args:
    path: of an .npz with mu and sigma, as those of ADM (VIRTUAL_*.npz) and EDM, which
      are used for any metric, or with mu_METRIC and sigma_METRIC; or of a .pkl of EDM2,
      which has them for each of its metrics. No code that a pickle names is run.
    metric: "fid", "fd_dinov2" or "frechet", the key of a feature network.

  Raises:
    UserError: the file is missing or damaged, or has no statistics of the metric.
  """
  try:
    entries = _pickled(path) if path.endswith(".pkl") else _arrays(path)
    pair = _pair(entries, metric)
  except FileNotFoundError:
    raise UserError(f"{path}: no such file") from None
  except safe_pickle.Refused as error:
    reason = bounded.short(error)
    raise UserError(f"{path}: {reason}; no code of the file was run") from None
  except UserError:
    raise
  except Exception as error:  # whatever a file of another format leads to
    reason = f"{type(error).__name__}: {bounded.short(error)}"
    raise UserError(f"{path}: is damaged, or has no statistics ({reason})") from error
  if pair is None:
    names = bounded.short(", ".join(sorted(map(str, entries)))) or "nothing"
    raise UserError(f"{path}: no mu and sigma of {metric}: it has {names}")
  try:
    return checked(*pair)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from None


def checked(mean: np.ndarray, cov: np.ndarray) -> frechet.Statistics:
  """Returns statistics in float64, after checking that they are a mean and a covariance.

  Args:
    mean: float [D].
    cov: float [D, D].

  Raises:
    ValueError: the shapes or types are others, values are not finite, or the matrix is no
      covariance: not symmetric, or with |c_ij| > sqrt(c_ii c_jj).
  """
  mean, cov = np.asarray(mean), np.asarray(cov)
  if mean.ndim != 1 or cov.shape != 2 * mean.shape or not mean.size:
    raise ValueError(f"mu {mean.shape} and sigma {cov.shape}: must be [D] and [D, D]")
  for name, x in (("mu", mean), ("sigma", cov)):
    if x.dtype.kind != "f" or x.dtype.itemsize < 4:
      raise ValueError(f"{name} is {x.dtype}: must be real floats of 32 or 64 bits")
    if not np.isfinite(x).all():
      raise ValueError(f"{name} is not finite; compute the statistics again")
  mean, cov = mean.astype(np.float64), cov.astype(np.float64)
  variance = np.diagonal(cov)
  if variance.min() < 0:
    raise ValueError(f"sigma has the variance {variance.min():g} on its diagonal")
  largest = max(variance.max(), 1e-300)
  if np.abs(cov - cov.T).max() > TOLERANCE * largest:
    raise ValueError("sigma is not symmetric; it is no covariance")
  deviation = np.sqrt(variance)
  if (np.abs(cov) - np.outer(deviation, deviation)).max() > TOLERANCE * largest:
    raise ValueError("sigma has correlations beyond 1; it is no covariance")
  return frechet.Statistics(mean, cov)


def save(path: str, statistics: dict[str, frechet.Statistics]) -> None:
  """Writes the statistics of metrics to an .npz, which ADM's and EDM's code can read.

  With one metric the keys are mu and sigma. With several, FID uses these and each other
  metric mu_METRIC and sigma_METRIC.

  Args:
    path: of the file.
    statistics: by the key of the feature network.
  """
  arrays = {}
  for metric, (mean, cov) in statistics.items():
    suffix = "" if metric == "fid" or len(statistics) == 1 else f"_{metric}"
    arrays |= {f"mu{suffix}": mean, f"sigma{suffix}": cov}
  file_io.write_npz(path, **arrays)


def _arrays(path: str) -> dict[str, np.ndarray]:
  if not storage.lexists(path):
    raise FileNotFoundError(path)
  names = [k for k in array_io.npz_headers(path) if k.startswith(("mu", "sigma"))]
  return array_io.read_npz(path, names)


def _pair(
  entries: dict[str, Json], metric: str
) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns mu and sigma of a metric, or None."""
  if isinstance(entries.get(metric), dict):
    entries = entries[metric]
  for suffix in (f"_{metric}", ""):
    mean, cov = (entries.get(f"{name}{suffix}") for name in ("mu", "sigma"))
    if mean is not None and cov is not None:
      return _array(mean), _array(cov)
  return None


def _array(value: Json) -> np.ndarray:
  value = value.read() if isinstance(value, safe_pickle.Array) else value
  safe_pickle.check(isinstance(value, np.ndarray), "mu or sigma that is no array")
  return value


def _pickled(path: str) -> dict[str, Json]:
  with bounded.open_regular(path) as file:
    entries = safe_pickle.Unpickler(file).load()
  safe_pickle.check(isinstance(entries, dict), "no dict of metrics")
  return entries
