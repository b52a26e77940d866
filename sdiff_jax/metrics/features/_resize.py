"""How other people's networks get images of one size: their resampling, exactly.

Each is linear and separable, so it is a matrix for the rows and one for the columns.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.types import Array


def tensorflow_bilinear(out: int, size: int) -> np.ndarray:
  """Returns ResizeBilinear of TensorFlow 1, float32 [out, size].

  Point i is read at i size / out, so images move by half a pixel; nothing is averaged
  where they shrink. The graph of Inception that FID was published with has it inside.
  """
  return _bilinear(np.arange(out) * (size / out), size)


def torch_bilinear(out: int, size: int) -> np.ndarray:
  """Returns PyTorch's bilinear interpolation (align_corners=False), [out, size]."""
  return _bilinear(((np.arange(out) + 0.5) * (size / out) - 0.5).clip(0), size)


def torch_bicubic(out: int, size: int, scale: float) -> np.ndarray:
  """Returns PyTorch's bicubic interpolation by a scale factor, float32 [out, size].

  Keys' kernel with a = -0.75; points beyond an edge are those at the edge.
  """
  at = (np.arange(out) + 0.5) / scale - 0.5
  a, taps = -0.75, np.floor(at).astype(int)[:, None] + np.arange(-1, 3)
  d = np.abs(at[:, None] - taps)
  near = ((a + 2) * d - (a + 3)) * d**2 + 1
  far = a * (((d - 5) * d + 8) * d - 4)
  matrix = np.zeros((out, size))
  rows = np.arange(out)[:, None]
  np.add.at(matrix, (rows, taps.clip(0, size - 1)), np.where(d <= 1, near, far))
  return matrix.astype(np.float32)


def _bilinear(at: np.ndarray, size: int) -> np.ndarray:
  low = np.floor(at).astype(int)
  matrix, rows = np.zeros((len(at), size)), np.arange(len(at))
  np.add.at(matrix, (rows, low), 1 - (at - low))
  np.add.at(matrix, (rows, np.minimum(low + 1, size - 1)), at - low)
  return matrix.astype(np.float32)


def apply(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
  """Returns rows x columns^T of every channel, [B, H, W, C] -> [B, h, w, C]."""
  x = jnp.einsum("hH,bHWc->bhWc", rows.astype(x.dtype), x)
  return jnp.einsum("wW,bhWc->bhwc", columns.astype(x.dtype), x)


def bicubic(x: Array, height: int, width: int) -> Array:
  """Returns images [B, height, width, C], by Keys' kernel with a = -0.5.

  Wider where images shrink, so that they are averaged: PyTorch's bicubic with
  antialias.
  """
  shape = (x.shape[0], height, width, x.shape[-1])
  return jax.image.resize(x, shape, "cubic", precision="highest")


def pillow_bicubic(x: Array, height: int, width: int) -> Array:
  """Returns what Pillow makes of uint8 images, [B, height, width, C], in float32.

  Rows are resized first, then columns, each rounded to whole numbers from 0 to 255.
  Pillow's own sums are of whole numbers, so a pixel may differ by one.
  """
  x = x.astype(jnp.float32)
  for h, w in ((x.shape[1], width), (height, width)):
    x = jnp.clip(jnp.floor(bicubic(x, h, w) + 0.5), 0, 255)
  return x
