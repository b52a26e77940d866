"""Features of FID: Inception-v3 of 2015, the network that the metric is defined by."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import registry
from sdiff_jax.metrics.features import _resize as resize
from sdiff_jax.metrics.features._base import FeatureNetwork
from sdiff_jax.pretrained.diffusers import networks
from sdiff_jax.pretrained.files import state_dict
from sdiff_jax.types import Array, Params

SIDE, WIDTH, CLASSES = 299, 2048, 1008
EPS = 1e-3
# Branches of a block, by name: (channels, height and width of the kernel) of every
# layer, with stride 2 where a third number says so.
Branches = dict[str, tuple[tuple[int, ...], ...]]


def _pooled(channels: int) -> Branches:
  return {"branch_pool": ((channels, 1, 1),)}


def _fives(pool: int) -> Branches:
  return {
    "branch1x1": ((64, 1, 1),),
    "branch5x5": ((48, 1, 1), (64, 5, 5)),
    "branch3x3dbl": ((64, 1, 1), (96, 3, 3), (96, 3, 3)),
  } | _pooled(pool)


def _sevens(c: int) -> Branches:
  tall, wide = (c, 7, 1), (c, 1, 7)
  return {
    "branch1x1": ((192, 1, 1),),
    "branch7x7": ((c, 1, 1), wide, (192, 7, 1)),
    "branch7x7dbl": ((c, 1, 1), tall, wide, tall, (192, 1, 7)),
  } | _pooled(192)


BLOCKS: dict[str, Branches] = {
  "Mixed_5b": _fives(32),
  "Mixed_5c": _fives(64),
  "Mixed_5d": _fives(64),
  "Mixed_6a": {
    "branch3x3": ((384, 3, 3, 2),),
    "branch3x3dbl": ((64, 1, 1), (96, 3, 3), (96, 3, 3, 2)),
  },
  "Mixed_6b": _sevens(128),
  "Mixed_6c": _sevens(160),
  "Mixed_6d": _sevens(160),
  "Mixed_6e": _sevens(192),
  "Mixed_7a": {
    "branch3x3": ((192, 1, 1), (320, 3, 3, 2)),
    "branch7x7x3": ((192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)),
  },
}
STEM = (  # channels, side of the kernel, stride, padding; None is a pooling by 2
  ("Conv2d_1a_3x3", 32, 3, 2, "VALID"),
  ("Conv2d_2a_3x3", 32, 3, 1, "VALID"),
  ("Conv2d_2b_3x3", 64, 3, 1, "SAME"),
  None,
  ("Conv2d_3b_1x1", 80, 1, 1, "VALID"),
  ("Conv2d_4a_3x3", 192, 3, 1, "VALID"),
  None,
)


class Norm(nn.Module):
  """Batch norm by the averages of training."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    starts = {"scale": ones, "bias": zeros, "running_mean": zeros, "running_var": ones}
    p = {k: self.param(k, v, x.shape[-1:]) for k, v in starts.items()}
    scale = p["scale"] * jax.lax.rsqrt(p["running_var"] + EPS)
    shift = p["bias"] - p["running_mean"] * scale
    return x * scale.reshape(1, 1, 1, -1) + shift.reshape(1, 1, 1, -1)


class Conv(nn.Module):
  """relu(norm(conv(x)))."""

  channels: int
  kernel: tuple[int, int]
  stride: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    strides = (self.stride, self.stride)
    conv = nn.Conv(
      self.channels, self.kernel, strides, self.padding, use_bias=False, name="conv"
    )
    return nn.relu(Norm(name="bn")(conv(x)))


class Mixed(nn.Module):
  """Branches side by side; those that halve the sides have a pooling beside them."""

  branches: Branches

  @nn.compact
  def __call__(self, x: Array) -> Array:
    out = []
    for name, layers in self.branches.items():
      h = _average(x) if name == "branch_pool" else x
      for i, (channels, height, width, *stride) in enumerate(layers, 1):
        number = f"_{i}" if len(layers) > 1 else ""
        valid = ("VALID",) if stride else ()
        layer = Conv(channels, (height, width), *stride, *valid, name=name + number)
        h = layer(h)
      out.append(h)
    if "branch_pool" not in self.branches:
      out.append(_largest(x, 2))
    return jnp.concatenate(out, axis=-1)


class Split(nn.Module):
  """The last two blocks, in which layers part in two.

  The second pools by maxima, the first by averages: a slip of the graph that the
  weights were trained in, and that FID has kept.
  """

  pool: Callable[[Array], Array]

  @nn.compact
  def __call__(self, x: Array) -> Array:
    def both(h: Array, name: str) -> list[Array]:
      sides = {"a": (1, 3), "b": (3, 1)}
      return [Conv(384, side, name=name + end)(h) for end, side in sides.items()]

    three = Conv(384, (1, 1), name="branch3x3_1")(x)
    double = Conv(448, (1, 1), name="branch3x3dbl_1")(x)
    double = Conv(384, (3, 3), name="branch3x3dbl_2")(double)
    out = [Conv(320, (1, 1), name="branch1x1")(x), *both(three, "branch3x3_2")]
    out += both(double, "branch3x3dbl_3")
    out += [Conv(192, (1, 1), name="branch_pool")(self.pool(x))]
    return jnp.concatenate(out, axis=-1)


class Inception(nn.Module):
  """Images in about [-1, 1], [B, 299, 299, 3], to (features [B, 2048], logits)."""

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, Array]:
    for layer in STEM:
      if layer is None:
        x = _largest(x, 2)
      else:
        name, channels, side, stride, padding = layer
        x = Conv(channels, (side, side), stride, padding, name=name)(x)
    for name, branches in BLOCKS.items():
      x = Mixed(branches, name=name)(x)
    x = Split(_average, name="Mixed_7b")(x)
    x = Split(functools.partial(_largest, stride=1), name="Mixed_7c")(x)
    x = x.mean(axis=(1, 2))
    return x, nn.Dense(CLASSES, name="fc")(x)


def _largest(x: Array, stride: int) -> Array:
  """Returns maxima of 3 x 3 pixels; of stride 1 with what there is at the edges."""
  padding = "SAME" if stride == 1 else "VALID"
  return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _average(x: Array) -> Array:
  """Returns means of 3 x 3 pixels; at the edges, of those that there are."""
  return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def original(images: Array) -> Array:
  """Returns the pixels as the network's first graph makes them, [B, 299, 299, 3].

  TensorFlow 1's resizing and (x - 128) / 128: what FID was published with, and the
  numbers and reference statistics of ADM, EDM and EDM2.
  """
  x = _resized(images, resize.tensorflow_bilinear)
  return (x - 128) / 128


def pytorch_fid(images: Array) -> Array:
  """Returns the pixels as the package pytorch-fid makes them, [B, 299, 299, 3].

  PyTorch's bilinear resizing and 2 x / 255 - 1. Features differ by about 1 % from
  `original`'s, so the two kinds of FID are not comparable.
  """
  return 2 * _resized(images, resize.torch_bilinear) / 255 - 1


def _resized(images: Array, matrix: Callable[[int, int], np.ndarray]) -> Array:
  if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
    raise ValueError(
      f"Inception takes images uint8 [N, H, W, 3], got {images.dtype} "
      f"{list(images.shape)}"
    )
  x = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
  return resize.apply(x, *(matrix(SIDE, n) for n in images.shape[1:3]))


FID_COLUMN = {
  "fid": (
    "FID",
    "{:.2f}",
    "Frechet distance to real images in features of Inception-v3, lower is better",
  )
}


@registry.register("metrics.features", "pytorch-fid", columns=FID_COLUMN)
def load_pytorch_fid(path: str) -> FeatureNetwork:
  """Returns the network with the resizing of the package pytorch-fid; see `load`."""
  return load(path, pytorch_fid)


@registry.register("metrics.features", "inception", columns=FID_COLUMN)
def load(path: str, pixels: Callable[[Array], Array] = original) -> FeatureNetwork:
  """Returns the network of a file of weights.

  Grey images become RGB ones of equal channels.

  Args:
    path: pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or its tensors in
      .safetensors or .npz.
    pixels: `original` or `pytorch_fid`.

  Returns:
    The network to pool3, 2048 features; its head leaves out the bias, as ADM and
    torch-fidelity do.

  Raises:
    UserError: the file is missing or damaged, or holds another network.

  Reference: Szegedy et al., arXiv:1512.00567; Heusel et al., arXiv:1706.08500.
  """
  net = Inception()

  def init(key: Array) -> Params:
    return net.init(key, jnp.zeros((1, SIDE, SIDE, 3)))["params"]

  def apply(params: Params, images: Array) -> Array:
    with jax.default_matmul_precision("highest"):
      return net.apply({"params": params}, pixels(images))[0]

  tensors = state_dict.read(path)
  tensors = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
  what = "FID's Inception-v3"
  params = networks.load_state_dict(
    tensors, init, dtype="float32", path=path, network=what
  )
  return FeatureNetwork("fid", apply, params, params["fc"]["kernel"])
