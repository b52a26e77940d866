"""Resampling of images by a factor of 2 with a filter, as in EDM and EDM2."""

from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.fields import Length, Range
from sdiff_jax.types import Array

# Coefficients of a filter along one axis.
Taps = Annotated[tuple[float, ...], Range(-1e6, 1e6), Length(2, 64)]


def resample(
  x: Array, taps: tuple[float, ...], *, up: bool = False, pad: int | None = None
) -> Array:
  """Returns x with every channel filtered and its height and width doubled or halved.

  Args:
    x: images, [B, H, W, C].
    taps: coefficients of the filter along one axis, an even number of them; they are
      normalized to a sum of 1.
    up: whether to double height and width instead of halving them.
    pad: zeros around an image that is halved; None for as many as halve it exactly.

  Returns:
    [B, 2H, 2W, C] or [B, H/2, W/2, C].

  Example:
    >>> resample(jnp.ones((1, 4, 4, 3)), (1, 1)).shape
    (1, 2, 2, 3)
  """
  width, channels = len(taps), x.shape[-1]
  row = np.asarray(taps, np.float64) / np.sum(taps)
  row = row[::-1] if up else row  # PyTorch's transposed convolution
  kernel = np.outer(row, row) * (4 if up else 1)
  kernel = jnp.asarray(kernel, x.dtype)[:, :, None, None].repeat(channels, -1)
  around = width // 2 if up else (width - 1) // 2 if pad is None else pad
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(1, 1) if up else (2, 2),
    padding=[(around, around)] * 2,
    lhs_dilation=(2, 2) if up else None,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=channels,
  )


def check_filter(resample_filter: Sequence[float]) -> None:
  """Checks the coefficients of a filter along one axis.

  Args:
    resample_filter: the coefficients.

  Raises:
    ValueError: their number is odd, or their sum is 0.

  Example:
    >>> check_filter((1, 3, 3, 1))
  """
  if len(resample_filter) % 2 or not sum(resample_filter):
    raise ValueError(
      f"resample_filter={tuple(resample_filter)}: must have an even length and a sum "
      "other than 0"
    )
