"""Diffusion Policy's U-Net over the steps of a chunk of actions (arXiv:2303.04137).

The names of the parameters are those of its files.
"""

import functools
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion import noise_schedules
from sdiff_jax.fields import DType, Length, Positive, Range, Size
from sdiff_jax.models.layers import common, conditioning, linen
from sdiff_jax.models.layers.conditioning import Conditions
from sdiff_jax.models.layers.normalization import GroupNorm
from sdiff_jax.types import Array, Cond, CondSpecs, Network

GROUPS = 8  # number of groups of the last norm; the others have a field
STEPS = 100  # number of timesteps of DDPM, with the cosine schedule


class ConvBlock(nn.Module):
  """mish(norm(conv(x))), [B, H, C] -> [B, H, features]."""

  features: int
  kernel: int
  groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = _conv(self.features, self.kernel, self.dtype, name="block.0")(x)
    norm = GroupNorm(self.groups, epsilon=1e-5, dtype=self.dtype, name="block.1")
    return jax.nn.mish(norm(x))


class Residual(nn.Module):
  """x + block(s block(x) + b), where s and b are linear in mish(cond) (FiLM).

  [B, H, C] -> [B, H, features]; cond is [B, E]. Without `scale` s is 1.
  """

  features: int
  kernel: int
  groups: int
  scale: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, cond: Array) -> Array:
    block = functools.partial(
      ConvBlock, self.features, self.kernel, self.groups, self.dtype
    )
    h = block(name="blocks.0")(x)
    width = self.features * (2 if self.scale else 1)
    dense = nn.Dense(width, dtype=self.dtype, name="cond_encoder.1")
    film = dense(jax.nn.mish(cond))[:, None]
    if self.scale:
      s, b = jnp.split(film, 2, axis=-1)
      h = s * h + b
    else:
      h += film
    h = block(name="blocks.1")(h)
    if x.shape[-1] != self.features:
      x = _conv(self.features, 1, self.dtype, name="residual_conv")(x)
    return x + h


class Unet1d(nn.Module):
  """Prediction of (x [B, H, Da], time [B], cond) -> [B, H, Da].

  `channels` are those of each level, from the highest resolution.
  """

  channels: tuple[int, ...]
  embed: int
  kernel: int
  groups: int
  scale: bool
  conditions: Conditions
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Array, time: Array, cond: Cond, *, deterministic: bool = True
  ) -> Array:
    del deterministic  # there is no dropout
    emb = self._embed(time, cond)

    def block(features: int, name: str, x: Array) -> Array:
      sizes = features, self.kernel, self.groups, self.scale, self.dtype
      return Residual(*sizes, name=name)(x, emb)

    h, skips = x.astype(self.dtype), []
    for i, width in enumerate(self.channels):
      h = block(width, f"down_modules.{i}.0", h)
      h = block(width, f"down_modules.{i}.1", h)
      skips.append(h)
      if i < len(self.channels) - 1:
        down = functools.partial(_conv, stride=2, name=f"down_modules.{i}.2.conv")
        h = down(width, 3, self.dtype)(h)
    for i in range(2):
      h = block(self.channels[-1], f"mid_modules.{i}", h)
    for i, width in enumerate(reversed(self.channels[:-1])):
      h = jnp.concatenate([h, skips.pop()], axis=-1)
      h = block(width, f"up_modules.{i}.0", h)
      h = block(width, f"up_modules.{i}.1", h)
      h = _double(width, self.dtype, name=f"up_modules.{i}.2.conv")(h)
    sizes = self.channels[0], self.kernel, GROUPS, self.dtype
    h = ConvBlock(*sizes, name="final_conv.0")(h)
    zeros = nn.initializers.zeros
    out = functools.partial(_conv, name="final_conv.1", kernel_init=zeros)
    return out(x.shape[-1], 1, self.dtype)(h)

  def _embed(self, time: Array, cond: Cond) -> Array:
    """Returns the embedding of the time and the conditions, [B, E]."""
    emb = common.positional(time, self.embed)
    emb = jnp.roll(emb, self.embed // 2, axis=-1)  # sines first
    emb = nn.Dense(4 * self.embed, name="diffusion_step_encoder.1")(emb)
    emb = nn.Dense(self.embed, name="diffusion_step_encoder.3")(jax.nn.mish(emb))
    return conditioning.append(emb, cond, self.conditions).astype(self.dtype)


def _conv(
  features: int, kernel: int, dtype: jnp.dtype, stride: int = 1, **options: object
) -> nn.Conv:
  return nn.Conv(
    features, (kernel,), (stride,), padding=kernel // 2, dtype=dtype, **options
  )


def _double(features: int, dtype: jnp.dtype, **options: object) -> nn.ConvTranspose:
  """Returns PyTorch's transposed convolution of kernel 4, stride 2 and padding 1."""
  sizes = {"kernel_size": (4,), "strides": (2,), "padding": ((2, 2),)}
  return nn.ConvTranspose(
    features, **sizes, transpose_kernel=True, dtype=dtype, **options
  )


@registry.register(
  "models",
  "unet1d",
  sample_ndim=2,
  minimal={"shape": (4, 3), "channels": (8, 16), "embed": 8, "kernel": 3},
)
def build(
  *,
  shape: tuple[int, ...],
  sigma_d: Positive,
  cond: CondSpecs,
  channels: Annotated[tuple[int, ...], Range(1, 65_536), Length(1, 8)] = (
    256,
    512,
    1024,
  ),
  embed: Annotated[int, Range(4, 65_536)] = 256,
  kernel: Annotated[int, Range(1, 1001)] = 5,
  groups: Size = 8,
  scale: bool = True,
  process: Literal["trigflow", "ddpm"] = "trigflow",
  dtype: DType = "float32",
) -> Network:
  """Returns the U-Net as a Network.

  Args:
    shape: (H, Da), steps and dimensions of a chunk of actions.
    sigma_d: standard deviation of the data.
    cond: conditions of one sample by name, as the data set declares them.
    channels: number of channels of each level; H halves from one to the next.
    embed: width of the embedding of the time, even.
    kernel: number of steps that a convolution spans, odd.
    groups: number of groups of the norms.
    scale: whether conditions scale features (FiLM) instead of only shifting them.
    process: "trigflow": the U-Net is F; "ddpm": the U-Net predicts the noise at the
      timesteps of the published policy, and F is its exact change of variables.
    dtype: dtype of the hidden layers; parameters are float32.

  Raises:
    ValueError: an unknown process, or sizes that do not divide.

  Example:
    >>> import jax
    >>> options = {"channels": (8, 16), "groups": 4, "embed": 8}
    >>> network = build(shape=(8, 2), cond={}, sigma_d=0.5, **options)
    >>> params = jax.eval_shape(network.init, jax.random.key(0))
    >>> sorted(params)
    ['logvar', 'net']
  """
  net = linen.as_network(
    module(shape, cond, channels, embed, kernel, groups, scale, dtype),
    shape=shape,
    conditions=conditioning.conditions(cond),
  )
  return linen.trigflow_from_ddpm(net, sigma_d, noise()) if process == "ddpm" else net


def noise() -> np.ndarray:
  """Returns alpha^2 at the timesteps of process="ddpm", float64 [100]."""
  return noise_schedules.alphas_cumprod("cosine", STEPS)


def module(
  shape: tuple[int, ...],
  cond: CondSpecs,
  channels: tuple[int, ...],
  embed: int,
  kernel: int,
  groups: int,
  scale: bool,
  dtype: str,
) -> Unet1d:
  """Returns the module; see `build`.

  Raises:
    ValueError: sizes that do not divide.
  """
  factor = 2 ** (len(channels) - 1)
  if len(shape) != 2 or shape[0] % factor:
    raise ValueError(
      f"channels={tuple(channels)}: {factor} must divide the steps of {shape}; "
      "samples must be chunks of actions (H, Da)"
    )
  if groups < 1 or any(c % groups for c in channels) or channels[0] % GROUPS:
    raise ValueError(
      f"groups={groups}: must divide channels={tuple(channels)}, and "
      f"{GROUPS} must divide the first of them"
    )
  if kernel % 2 == 0 or embed % 2:
    raise ValueError(f"kernel={kernel}, embed={embed}: must be odd and even")
  conditions = conditioning.conditions(cond)
  sizes = tuple(channels), embed, kernel, groups
  return Unet1d(*sizes, scale, conditions, jnp.dtype(dtype))
