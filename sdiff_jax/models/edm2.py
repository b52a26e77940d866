"""EDM2's magnitude-preserving U-Net (arXiv:2312.02696, config G) for TrigFlow."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.fields import (
  Choices,
  DType,
  Fraction,
  Index,
  NotNegative,
  Positive,
  Range,
  Rate,
  Size,
)
from sdiff_jax.models.layers import (
  common,
  conditioning,
  edm2_blocks,
  linen,
  patches,
  resampling,
)
from sdiff_jax.models.layers import magnitude_preserving as mp
from sdiff_jax.models.layers.conditioning import Conditions
from sdiff_jax.types import Array, Cond, CondSpecs, Network

# Number of channels of the published sizes, which differ in nothing else.
PRESETS = {"XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}


class UNet(nn.Module):
  """EDM2's inner network of x [B, H, W, C], time [B] and cond -> [B, H, W, C]."""

  patch: int
  channels: int
  channel_mult: tuple[int, ...]
  blocks: int
  attn_resolutions: tuple[int, ...]
  head_channels: int
  embedding: str
  conditions: Conditions
  norm: str
  dropout: float
  dropout_resolution: int
  clip: float
  noise_features: int
  emb_width: int
  label_balance: float
  concat_balance: float
  res_balance: float
  attn_balance: float
  taps: tuple[float, ...]
  block: type[nn.Module]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, t: Array, cond: Cond, *, deterministic: bool) -> Array:
    sizes = [self.channels * m for m in self.channel_mult]
    x = patches.split(x, self.patch)
    height, out_channels = x.shape[1], x.shape[-1]
    embedding = conditioning.EDM2Embedding(
      self.noise_features,
      self.emb_width,
      self.embedding,
      self.conditions,
      self.label_balance,
      name="embedding",
    )
    emb = embedding(t, cond)

    def make(level: int, part: str, name: str, features: int, **options) -> nn.Module:
      resolution = height >> level
      attends = name == "in0" or (
        "block" in name and resolution in self.attn_resolutions
      )
      return self.block(
        features,
        encoder=part == "enc",
        resample={"down": "halve", "up": "double"}.get(name, ""),
        heads=features // self.head_channels if attends else 0,
        norm=self.norm,
        dropout=self.dropout if resolution <= self.dropout_resolution else 0.0,
        deterministic=deterministic,
        clip=self.clip,
        res_balance=self.res_balance,
        attn_balance=self.attn_balance,
        concat_balance=self.concat_balance,
        taps=self.taps,
        dtype=self.dtype,
        name=f"{part}_{level}_{name}",
      )

    # All blocks are made before the first one runs: they are modulated together.
    encoder, decoder = [], []
    for level, size in enumerate(sizes):
      if level:
        encoder.append(make(level, "enc", "down", sizes[level - 1]))
      encoder += [make(level, "enc", f"block{i}", size) for i in range(self.blocks)]
    for level, size in reversed([*enumerate(sizes)]):
      first = ("up",) if level < len(sizes) - 1 else ("in0", "in1")
      wide = sizes[level + 1] if level < len(sizes) - 1 else size
      decoder += [make(level, "dec", name, wide) for name in first]
      decoder += [make(level, "dec", f"block{i}", size) for i in range(self.blocks + 1)]
    vectors = edm2_blocks.vectors([b.modulation for b in (*encoder, *decoder)], emb)

    # A channel of ones replaces biases.
    h = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1).astype(self.dtype)
    h = mp.Conv(sizes[0], self.dtype, name="in")(h)
    skips = [h]
    for block in encoder:
      h = block(h, vectors.pop(0))
      skips.append(h)
    for block in decoder:
      skip = skips.pop() if "block" in block.name else None
      h = block(h, vectors.pop(0), skip)
    gain = self.param("gain", nn.initializers.zeros, ())
    h = common.to_accumulation_dtype(mp.Conv(out_channels, self.dtype, name="out")(h))
    return patches.join(h * gain, self.patch)


class LogVar(nn.Module):
  """w = -u of EDM2's log variance u(c_noise): features and a linear layer, [B] -> [B]."""

  features: int = 128

  @nn.compact
  def __call__(self, c_noise: Array) -> Array:
    x = mp.Fourier(self.features, name="fourier")(c_noise)
    return -mp.Linear(1, name="linear")(x)[:, 0]


@registry.register(
  "models",
  "edm2",
  sample_ndim=3,
  minimal={
    "shape": (4, 6, 2),
    "channels": 16,
    "channel_mult": (1,),
    "blocks": 1,
    "head_channels": 16,
  },
  tiny={
    "channels": 8,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attn_resolutions": (4,),
    "head_channels": 8,
    "dropout_resolution": 4,
  },
  without_remat=lambda fields: {"remat": ""},
)
def build(
  *,
  shape: tuple[int, ...],
  cond: CondSpecs,
  sigma_d: Positive,
  preset: Annotated[str, Choices(PRESETS)] = "S",
  channels: Annotated[int, Range(0, 65_536)] = 0,
  patch: Size = 1,
  channel_mult: common.Multipliers = (1, 2, 3, 4),
  blocks: Annotated[int, Range(0, 1000)] = 3,
  attn_resolutions: common.Heights = (16, 8),
  head_channels: Size = 64,
  process: common.Process = "trigflow",
  embedding: common.TimeEmbedding = "positional",
  norm: common.Norm = "double",
  dropout: Rate = 0.0,
  dropout_resolution: Index = 16,
  clip: NotNegative = 256.0,
  noise_mult: Annotated[int, Range(0, 64)] = 0,
  emb_mult: Annotated[int, Range(0, 64)] = 0,
  label_balance: Fraction = 0.5,
  concat_balance: Fraction = 0.5,
  res_balance: Fraction = 0.3,
  attn_balance: Fraction = 0.3,
  resample_filter: resampling.Taps = (1, 1),
  logvar_channels: Size = 128,
  guidance: bool = False,
  remat: common.Remat = "",
  dtype: DType = "float32",
) -> Network:
  """Returns the U-Net as a Network: by default as sCM trains it (arXiv:2410.11081).

  A published EDM2 network is process="edm", embedding="fourier", norm="single", and
  dropout_resolution at least its height.

  Args:
    shape: (H, W, C) of one sample, H and W divisible by patch * 2^(levels - 1).
    cond: conditions of one sample by name, as the data set declares them.
    sigma_d: standard deviation of the data.
    preset: XS, S, M, L, XL or XXL: 128, 192, 256, 320, 384 or 448 channels.
    channels: number of channels at the full resolution; 0 for that of the preset.
    patch: side of the squares of pixels (pixels) that are one pixel of the network, whose
      full resolution is (H / patch, W / patch). 2 makes a network for small images
      several times as fast.
    channel_mult: multiplier of the channels of each level, from the highest
      resolution.
    blocks: number of residual blocks of each level.
    attn_resolutions: heights (pixels) of the levels with attention.
    head_channels: number of channels of an attention head; a block with fewer channels
      has no attention.
    process: "trigflow": F is the network; "edm": F = -raw(x, ln(sigma_d tan t) / 4).
    embedding: features of the time, "positional" (slow in t) or "fourier" (EDM2's).
    norm: "double" (adaptive double norm) or "single" (EDM2's own modulation).
    dropout: dropout rate inside the blocks.
    dropout_resolution: largest height (pixels) with dropout.
    clip: bound on the magnitude of the output of a block; 0 for none.
    noise_mult: number of features of the time as a multiple of channels; 0 for that of
      the highest resolution.
    emb_mult: width of the embedding as a multiple of channels; 0 for the widest level.
    label_balance: weight of the class beside the time, in [0, 1].
    concat_balance: weight of a skip connection beside the main path, in [0, 1].
    res_balance: weight of a residual branch beside the main path, in [0, 1].
    attn_balance: weight of attention beside the main path, in [0, 1].
    resample_filter: coefficients of the filter for resampling, along one axis.
    logvar_channels: number of features of EDM2's log variance, for process="edm".
    guidance: whether the scale of classifier-free guidance is an input.
    remat: what a block recomputes in the backward pass: "" nothing, "weights" what it
      gathers from other devices, "dots" everything
      but matrix products and convolutions, "full" everything.
    dtype: dtype of the hidden layers; parameters and the embedding are float32.

  Raises:
    ValueError: an unknown option, or sizes that do not divide.

  Example:
    >>> import jax
    >>> options = {"channels": 8, "channel_mult": (1,), "blocks": 1, "attn_resolutions": ()}
    >>> network = build(shape=(4, 4, 1), cond={}, sigma_d=0.5, **options)
    >>> params = jax.eval_shape(network.init, jax.random.key(0))
    >>> sorted(params)
    ['logvar', 'net']
  """
  channels = channels or PRESETS[preset]
  smallest = patch * 2 ** (len(channel_mult) - 1)
  if len(shape) != 3 or shape[0] % smallest or shape[1] % smallest:
    raise ValueError(
      f"patch={patch}, channel_mult={channel_mult}: {smallest} must divide height and "
      f"width of {shape}"
    )
  for width in (channels * m for m in channel_mult):
    if width % 2 or width % max(width // head_channels, 1):
      raise ValueError(
        f"channels={channels}: {width} must be even and divide into heads of "
        f"about head_channels={head_channels}"
      )
  balances = {"label_balance": label_balance, "concat_balance": concat_balance}
  balances |= {"res_balance": res_balance, "attn_balance": attn_balance}
  resampling.check_filter(resample_filter)
  conditions = conditioning.conditions(cond, guidance=guidance)
  module = UNet(
    patch=patch,
    channels=channels,
    channel_mult=tuple(channel_mult),
    blocks=blocks,
    attn_resolutions=tuple(attn_resolutions),
    head_channels=head_channels,
    embedding=embedding,
    conditions=conditions,
    norm=norm,
    dropout=dropout,
    dropout_resolution=dropout_resolution,
    clip=float(clip),
    noise_features=channels * (noise_mult or channel_mult[0]),
    emb_width=channels * (emb_mult or max(channel_mult)),
    taps=tuple(resample_filter),
    block=common.remat(edm2_blocks.Block, remat),
    dtype=jnp.dtype(dtype),
    **balances,
  )
  edm = process == "edm"
  net = linen.as_network(
    module,
    shape=shape,
    conditions=conditions,
    head=LogVar(logvar_channels) if edm else common.LogVar(),
  )._replace(normalize=mp.normalize_weights)
  return linen.trigflow_from_edm(net, sigma_d) if edm else net
