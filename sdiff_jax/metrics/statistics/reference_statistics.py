"""Statistics of real images that samples are compared with: files and a cache."""

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable

import numpy as np

from sdiff_jax.io import file_io
from sdiff_jax.metrics import FeatureSet, frechet
from sdiff_jax.pretrained.files import safe_pickle
from sdiff_jax.types import Json, UserError

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
    with np.load(path) as arrays:
      return FeatureSet(**arrays)
  except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
    return None


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
    raise UserError(f"{path}: {error}; no code of the file was run") from None
  except Exception as error:  # whatever a file of another format leads to
    reason = f"{type(error).__name__}: {error}"
    raise UserError(f"{path}: is damaged, or has no statistics ({reason})") from error
  if pair is None:
    names = ", ".join(sorted(map(str, entries)))
    raise UserError(f"{path}: no mu and sigma of {metric}: it has {names}")
  mean, cov = pair
  if mean.ndim != 1 or cov.shape != 2 * mean.shape or mean.dtype.kind != "f":
    raise UserError(
      f"{path}: mu {mean.shape} and sigma {cov.shape}: must be [D] and [D, D]"
    )
  return frechet.Statistics(mean.astype(np.float64), cov.astype(np.float64))


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
  with np.load(path) as arrays:
    return {k: arrays[k] for k in arrays.files if k.startswith(("mu", "sigma"))}


def _pair(
  entries: dict[str, Json], metric: str
) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns mu and sigma of a metric, or None."""
  if isinstance(entries.get(metric), dict):
    entries = entries[metric]
  for suffix in (f"_{metric}", ""):
    mean, cov = (entries.get(f"{name}{suffix}") for name in ("mu", "sigma"))
    if mean is not None and cov is not None:
      pickled = isinstance(mean, safe_pickle.Array)
      return (mean.read(), cov.read()) if pickled else (mean, cov)
  return None


def _pickled(path: str) -> dict[str, Json]:
  with open(path, "rb") as file:
    entries = safe_pickle.Unpickler(file).load()
  safe_pickle.check(isinstance(entries, dict), "no dict of metrics")
  return entries
