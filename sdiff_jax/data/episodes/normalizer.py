"""Normalizers: affine maps of observations and actions to a common range."""

from typing import NamedTuple

import numpy as np

from sdiff_jax.io import array_io, bounded, file_io
from sdiff_jax.types import Array, UserError

KINDS = ("range", "percentile", "position", "max_abs", "none")
MAX_SIZE = 2**20  # of the axes of observations and actions
PERCENTILES = (0.3, 99.7)


class Affine(NamedTuple):
  """The map x -> (x - centre) / scale of the last axes; float32 arrays of one shape."""

  centre: np.ndarray
  scale: np.ndarray


class Normalizer(NamedTuple):
  """The statistics of the training data that a policy needs.

  Attributes:
    observation: map of one observation, [Do].
    action: map of an action [Da], or of the actions of a chunk [H, Da].
    steps: To, number of observations that the policy is conditioned on.
    shape: (H, Da), steps and dimensions of a chunk of actions.
    std: root mean square of the normalized actions; that of x0 is sigma_d.
  """

  observation: Affine
  action: Affine
  steps: int
  shape: tuple[int, int]
  std: float


def normalize(affine: Affine, x: Array) -> Array:
  """Returns (x - centre) / scale, [..., *centre.shape]."""
  centre, scale = (_wide(a, x) for a in affine)
  return (x - centre) / scale


def denormalize(affine: Affine, y: Array) -> Array:
  """Returns y scale + centre, the inverse of `normalize`."""
  centre, scale = (_wide(a, y) for a in affine)
  return y * scale + centre


def _wide(a: np.ndarray, x: Array) -> np.ndarray:
  return a.astype(x.dtype).reshape((1,) * (x.ndim - a.ndim) + a.shape)


def fit(values: np.ndarray, kind: str, min_range: float = 1e-4) -> Affine:
  """Returns the affine map of a kind that fits values.

  Args:
    values: float32 [N, ...].
    kind: "range": minimum and maximum of each dimension become -1 and 1; "percentile":
      the same with PERCENTILES; "position": the range of the first three dimensions alone;
      "max_abs": the largest |value| becomes 1; "none": the identity.
    min_range: dimensions of a smaller range are centered and not scaled.

  Raises:
    ValueError: an unknown kind.

  Example:
    >>> fit(np.array([[0.0], [4.0]]), "range")
    Affine(centre=array([2.], dtype=float32), scale=array([2.], dtype=float32))
  """
  shape = values.shape[1:]
  centre, scale = np.zeros(shape, np.float32), np.ones(shape, np.float32)
  if kind == "max_abs":
    scale *= np.abs(values).max() or 1
  elif kind in ("range", "percentile", "position"):
    if kind == "percentile":
      low, high = np.percentile(values, PERCENTILES, axis=0)
    else:
      low, high = values.min(axis=0), values.max(axis=0)
    centre += (low + high) / 2
    scale = np.where(high - low < min_range, 1, (high - low) / 2).astype(np.float32)
    if kind == "position":
      centre[..., 3:], scale[..., 3:] = 0, 1
  elif kind != "none":
    raise ValueError(f"kind={kind!r}: use one of {', '.join(KINDS)}")
  return Affine(centre, scale)


def allclose(one: Normalizer, two: Normalizer) -> bool:
  """Returns whether two normalizers agree in shapes, and in values to 0.001."""
  flat = [[*n.observation, *n.action, n.steps, n.shape, n.std] for n in (one, two)]
  return all(
    np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-3, atol=1e-3)
    for a, b in zip(*flat, strict=True)
  )


def save(path: str, normalizer: Normalizer) -> None:
  """Writes a normalizer as .npz."""
  flat = normalizer._asdict()
  for name in ("observation", "action"):
    centre, scale = flat.pop(name)
    flat |= {f"{name}.centre": centre, f"{name}.scale": scale}
  file_io.write_npz(path, **flat)


def load(path: str) -> Normalizer:
  """Returns the normalizer of a file that `save` wrote.

  Raises:
    UserError: the file is damaged or of another format.
  """
  try:
    arrays = array_io.read_npz(path)
    maps = [
      Affine(arrays[f"{name}.centre"], arrays[f"{name}.scale"])
      for name in ("observation", "action")
    ]
    H, Da = arrays["shape"].tolist()
    normalizer = Normalizer(*maps, int(arrays["steps"]), (H, Da), float(arrays["std"]))
    check(normalizer)
  except (UserError, ValueError, KeyError, TypeError, OverflowError) as error:
    reason = f"it has no {error}" if isinstance(error, KeyError) else error
    raise UserError(
      f"{path} is no normalizer, or damaged ({bounded.short(reason)})"
    ) from error
  return normalizer


def check(normalizer: Normalizer) -> None:
  """Checks shapes, types and values of a normalizer.

  Raises:
    ValueError: the message starts with the name of the field.
  """
  steps, shape = normalizer.steps, normalizer.shape
  sizes = (steps, *shape)
  if not all(isinstance(n, int) and 1 <= n <= MAX_SIZE for n in sizes):
    raise ValueError(f"steps={steps}, shape={shape}: must be 1 to {MAX_SIZE}")
  if not 0 < normalizer.std < np.inf:
    raise ValueError(f"std={normalizer.std}: must be above 0 and finite")
  action, observation = normalizer.action.centre, normalizer.observation.centre
  if action.shape not in ((shape[1],), shape) or observation.ndim != 1:
    raise ValueError(
      f"shape={shape}: maps of actions {action.shape} and of observations "
      f"{observation.shape} do not fit"
    )
  for name in ("observation", "action"):
    affine = getattr(normalizer, name)
    if affine.centre.shape != affine.scale.shape:
      raise ValueError(f"{name}: centre and scale differ in shape")
    for x in affine:
      if x.dtype.kind != "f" or not np.isfinite(x).all():
        raise ValueError(f"{name}: is {x.dtype} and must be finite floats")
    if (affine.scale <= 0).any():
      raise ValueError(f"{name}: a scale is not above 0")
