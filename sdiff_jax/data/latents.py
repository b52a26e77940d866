"""Latents of images: what an autoencoder's encoder made of them, in .npy files."""

import bisect
import glob
import os

import numpy as np

from sdiff_jax.data.pipeline import Source, checked
from sdiff_jax.interfaces import UserError

# Mean and standard deviation of every channel of latents of ImageNet 512 x 512 by
# Stable Diffusion's autoencoder (sd-vae-ft-mse), without its factor 0.18215. They
# belong to encoders that were given other pixels, so latents of one are none of the
# other's.
SCALES = {
  # Pixels in [-1, 1], as the autoencoder was trained (arXiv:2410.11081, appendix G).
  "scm": ((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)),
  # Pixels in [0, 1], as EDM2 encodes.
  "edm2": ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)),
}


def build(*, dir: str = "", scale: str = "scm") -> Source:
  """Returns latents; a batch draws each anew, mean + std eps of its image's posterior.

  Args:
    dir: folder with moments*.npy, float16 or float32 [n, H, W, 2C], means before
      standard deviations, and labels.npy, integers, one for each row of the sorted
      files. They are read where they lie, row by row.
    scale: what latents are scaled by to standard deviation sigma_d: "scm", for an
      encoder of pixels in [-1, 1], or "edm2", of pixels in [0, 1].

  Raises:
    UserError: files are missing, damaged or of another form, or the scale is unknown.
  """
  if scale not in SCALES:
    raise UserError(f"config.data.scale={scale!r}: take one of {', '.join(SCALES)}")
  paths = sorted(glob.glob(os.path.join(glob.escape(dir), "moments*.npy")))
  if not dir or not paths:
    raise UserError(
      f"config.data.dir={dir!r} has no moments*.npy: name a folder of latents, means "
      "and standard deviations [n, H, W, 2C], with labels.npy"
    )
  shards = [_load(path) for path in paths]
  shape = shards[0].shape[1:]
  for path, shard in zip(paths, shards, strict=True):
    if shard.shape[1:] != shape or shard.ndim != 4 or shard.dtype.kind != "f":
      raise UserError(
        f"{path}: {shard.dtype} {shard.shape}; save floats [n, H, W, 2C], as in the "
        f"other files {shape}"
      )
  if shape[-1] != 2 * len(SCALES[scale][0]):
    raise UserError(
      f"{paths[0]}: {shape[-1]} channels; save the means and the standard deviations "
      f"of {len(SCALES[scale][0])}"
    )
  ends = np.cumsum([len(shard) for shard in shards]).tolist()
  labels = _labels(os.path.join(dir, "labels.npy"), ends[-1])

  def row(k: int) -> np.ndarray:
    i = bisect.bisect_right(ends, k)
    return shards[i][k - ends[i]]  # from its end

  def take(chosen: np.ndarray) -> tuple[np.ndarray, dict]:
    moments = np.stack([row(k) for k in chosen.tolist()])
    return moments.astype(np.float32), {"label": labels[chosen]}

  shape = (*shape[:2], shape[2] // 2)
  classes = int(labels.max()) + 1
  return checked(Source(take, ends[-1], shape, classes, *SCALES[scale], latent=True))


def _load(path: str) -> np.ndarray:
  try:
    return np.load(path, mmap_mode="r")
  except FileNotFoundError:
    raise UserError(f"{path} does not exist: save a label for each latent") from None
  except (ValueError, OSError, EOFError) as error:
    raise UserError(f"{path} is no .npy, or damaged ({error})") from error


def _labels(path: str, size: int) -> np.ndarray:
  labels = np.array(_load(path))
  fits = labels.shape == (size,) and size and labels.dtype.kind in "iu"
  if not fits or labels.min() < 0:
    raise UserError(
      f"{path}: {labels.dtype} {labels.shape}; save integers from 0, one for each of "
      f"the {size} latents"
    )
  return labels.astype(np.int32)
