"""Codecs: maps from the raw samples of a data set to x0, and back."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from sdiff_jax.data.episodes import normalizer as normalizer_lib
from sdiff_jax.data.episodes.normalizer import Normalizer
from sdiff_jax.types import Array

# Entropy of a numpy generator, one for each sample of a batch.
NoiseSeeds = Sequence[tuple[int, ...]]
# Latents [n, h, w, c] -> pixel values [n, H, W, C]: an autoencoder's decoder.
Decoder = Callable[[Array], Array]


class Codec(Protocol):
  """The map between raw samples, as a data set reads them, and x0.

  Attributes:
    shape: of x0 of one sample.
  """

  @property
  def shape(self) -> tuple[int, ...]: ...

  def encode(
    self, raw: np.ndarray, sigma_d: float, noise_seeds: NoiseSeeds | None = None
  ) -> np.ndarray:
    """Returns x0, float32 [n, *shape].

    Args:
      raw: raw samples, [n, ...].
      sigma_d: standard deviation of x0.
      noise_seeds: seeds of the noise of an encoding that is random; others ignore it.
    """
    ...

  def decode(self, x0: Array, sigma_d: float) -> Array:
    """Returns raw samples of x0 [n, *shape]: the inverse of `encode`."""
    ...

  def mirror(self, raw: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns raw samples, those where `mask` [n] holds mirrored left to right.

    Raises:
      ValueError: such samples have no mirror image.
    """
    ...

  def check_images(self, *, has_decoder: bool = False) -> None:
    """Raises a ValueError if x0 cannot become images.

    Args:
      has_decoder: whether there is the decoder of an autoencoder.
    """
    ...

  def to_images(
    self, x0: Array, sigma_d: float, decoder: Decoder | None = None
  ) -> Array:
    """Returns images uint8 [n, H, W, C] of x0.

    Raises:
      ValueError: see `check_images`.
    """
    ...


def to_uint8(values: Array, min_value: float = -1.0) -> Array:
  """Returns uint8 images of values in [min_value, 1], rounded and clipped.

  Args:
    values: any shape.
    min_value: value of black.

  Example:
    >>> to_uint8(np.array([-1.0, 0.0, 1.0, 2.0])).tolist()
    [0, 128, 255, 255]
  """
  levels = (values - min_value) * (255 / (1 - min_value))
  return jnp.clip(jnp.round(levels), 0, 255).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class PixelCodec:
  """x0 = (x - mean) sigma_d / std, where x are pixels scaled to [-1, 1].

  Attributes:
    shape: (H, W, C) of an image.
    mean: mean of the pixels in [-1, 1], one number or one for each channel.
    std: their standard deviation.
  """

  shape: tuple[int, ...]
  mean: tuple[float, ...] = (0.0,)
  std: tuple[float, ...] = (0.5,)

  def __post_init__(self) -> None:
    """Raises a ValueError unless mean and std fit the images."""
    _check_moments(self.shape, self.mean, self.std)

  def encode(
    self, raw: np.ndarray, sigma_d: float, noise_seeds: NoiseSeeds | None = None
  ) -> np.ndarray:
    """Returns x0 float32 [n, H, W, C] of images uint8 [n, H, W, C].

    Example:
      >>> PixelCodec((1, 1, 1)).encode(np.full((1, 1, 1, 1), 255, np.uint8), 0.5)
      array([[[[1.]]]], dtype=float32)
    """
    del noise_seeds
    mean, scale = _affine(self.shape, self.mean, self.std, sigma_d)
    return (raw.astype(np.float32) / 127.5 - 1 - mean) * scale

  def decode(self, x0: Array, sigma_d: float) -> Array:
    """Returns images uint8 [n, H, W, C] of x0, clipped."""
    mean, scale = _affine(self.shape, self.mean, self.std, sigma_d)
    return to_uint8(x0 / scale + mean)

  def mirror(self, raw: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns images, those where `mask` [n] holds mirrored left to right."""
    return _mirror(raw, mask)

  def check_images(self, *, has_decoder: bool = False) -> None:
    """Returns: pixels are images."""

  def to_images(
    self, x0: Array, sigma_d: float, decoder: Decoder | None = None
  ) -> Array:
    """Returns images uint8 [n, H, W, C] of x0, clipped."""
    del decoder
    return self.decode(x0, sigma_d)


@dataclasses.dataclass(frozen=True)
class LatentCodec:
  """x0 = (z - mean) sigma_d / std, where z is drawn from an image's posterior.

  A raw sample holds means and standard deviations of the posterior, float32
  [h, w, 2c], as the encoder of an autoencoder returns them.

  Attributes:
    shape: (h, w, c) of the latents of an image.
    mean: mean of the latents, one number or one for each channel.
    std: their standard deviation.
    vae_min_pixel: lowest pixel of the images that the autoencoder was trained on; the
      highest is 1.
  """

  shape: tuple[int, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  vae_min_pixel: float = -1.0

  def __post_init__(self) -> None:
    """Raises a ValueError unless mean and std fit the latents."""
    _check_moments(self.shape, self.mean, self.std)

  def encode(
    self, raw: np.ndarray, sigma_d: float, noise_seeds: NoiseSeeds | None = None
  ) -> np.ndarray:
    """Returns x0 float32 [n, h, w, c] of z = mean + std eps, drawn from posteriors.

    Args:
      raw: means and standard deviations, float32 [n, h, w, 2c].
      sigma_d: standard deviation of x0.
      noise_seeds: seed of eps of each sample.

    Raises:
      ValueError: there are no seeds.
    """
    if noise_seeds is None:
      raise ValueError("noise_seeds=None: latents are drawn at random; give n seeds")
    mean, scale = _affine(self.shape, self.mean, self.std, sigma_d)
    return (sample_posterior(raw, noise_seeds) - mean) * scale

  def decode(self, x0: Array, sigma_d: float) -> Array:
    """Returns latents z float32 [n, h, w, c] of x0."""
    mean, scale = _affine(self.shape, self.mean, self.std, sigma_d)
    return x0 / scale + mean

  def mirror(self, raw: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns posteriors, those where `mask` [n] holds mirrored left to right."""
    return _mirror(raw, mask)

  def check_images(self, *, has_decoder: bool = False) -> None:
    """Raises a ValueError unless there is a decoder."""
    if not has_decoder:
      raise ValueError(
        "data are latents: images of them need their autoencoder (vae); name its "
        "folder, or a data set of images"
      )

  def to_images(
    self, x0: Array, sigma_d: float, decoder: Decoder | None = None
  ) -> Array:
    """Returns images uint8 [n, H, W, C] of x0, by the autoencoder's decoder.

    Raises:
      ValueError: there is no decoder.
    """
    self.check_images(has_decoder=decoder is not None)
    assert decoder is not None
    return to_uint8(decoder(self.decode(x0, sigma_d)), self.vae_min_pixel)


def sample_posterior(moments: np.ndarray, seeds: NoiseSeeds) -> np.ndarray:
  """Returns latents mean + std eps, float32 [n, h, w, c].

  Example:
    >>> sample_posterior(np.zeros((1, 1, 1, 2), np.float32), [(0, 1)])
    array([[[[0.]]]], dtype=float32)

  Args:
    moments: means and standard deviations, float32 [n, h, w, 2c].
    seeds: seed of eps of each sample.
  """
  mean, std = np.split(moments, 2, axis=-1)
  eps = [
    np.random.default_rng(seed).standard_normal(mean.shape[1:], np.float32)
    for seed in seeds
  ]
  return mean + std * np.stack(eps)


@dataclasses.dataclass(frozen=True)
class ActionCodec:
  """x0 = normalize(actions) sigma_d / std, for chunks of a robot's actions.

  Attributes:
    normalizer: affine maps of observations and actions, and the root mean square of
      the normalized actions.
  """

  normalizer: Normalizer

  @property
  def shape(self) -> tuple[int, ...]:
    """(H, Da): steps and dimensions of a chunk."""
    return self.normalizer.shape

  def encode(
    self, raw: np.ndarray, sigma_d: float, noise_seeds: NoiseSeeds | None = None
  ) -> np.ndarray:
    """Returns x0 float32 [n, H, Da] of actions [n, H, Da] in the data's units."""
    del noise_seeds
    scale = np.float32(sigma_d) / np.float32(self.normalizer.std)
    return normalizer_lib.normalize(self.normalizer.action, raw) * scale

  def decode(self, x0: Array, sigma_d: float) -> Array:
    """Returns actions [n, H, Da], in the data's units, of x0."""
    scale = self.normalizer.std / sigma_d
    return normalizer_lib.denormalize(self.normalizer.action, x0 * scale)

  def mirror(self, raw: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Raises a ValueError: trajectories have no mirror image."""
    raise ValueError("flip: is for images; the data are trajectories")

  def check_images(self, *, has_decoder: bool = False) -> None:
    """Raises a ValueError: actions are not images."""
    raise ValueError(
      "data are trajectories, not images: policies are evaluated by --job=rollout"
    )

  def to_images(
    self, x0: Array, sigma_d: float, decoder: Decoder | None = None
  ) -> Array:
    """Raises a ValueError: actions are not images."""
    self.check_images()
    raise AssertionError


def _check_moments(
  shape: tuple[int, ...], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
  channels = shape[-1]
  for name, values in (("mean", mean), ("std", std)):
    if not isinstance(values, tuple | list) or not all(
      isinstance(value, int | float | np.number) and math.isfinite(value)
      for value in values
    ):
      raise ValueError(f"{name}={values}: must be a tuple of finite numbers")
    if len(values) not in (1, channels):
      raise ValueError(
        f"{name}={values}: the images have {channels} channel(s); give one number for "
        "all, or one for each channel"
      )
  if min(std) <= 0:
    raise ValueError(f"std={std}: must be above 0")
  if min(std) < 1e-6 or max(std) > 1e6 or max(map(abs, mean)) > 1e6:
    raise ValueError(
      f"mean={mean}, std={std}: are beyond the range of pixels or latents"
    )


def _affine(
  shape: tuple[int, ...],
  mean: tuple[float, ...],
  std: tuple[float, ...],
  sigma_d: float,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean and sigma_d / std, which broadcast against a batch of samples."""
  ones = (1,) * len(shape)
  mean_, std_ = (np.float32(a).reshape(*ones, -1) for a in (mean, std))
  return mean_, np.float32(sigma_d) / std_


def _mirror(raw: np.ndarray, mask: np.ndarray) -> np.ndarray:
  return np.where(mask[:, None, None, None], raw[:, :, ::-1], raw)
