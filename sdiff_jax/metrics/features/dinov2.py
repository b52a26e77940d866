"""Features of FD-DINOv2: the class token of a self-supervised vision transformer."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import registry
from sdiff_jax.kernels.attention import attention
from sdiff_jax.metrics.features import _resize as resize
from sdiff_jax.metrics.features._base import FeatureNetwork
from sdiff_jax.models.layers.normalization import LayerNorm
from sdiff_jax.pretrained.diffusers import networks
from sdiff_jax.pretrained.files import state_dict
from sdiff_jax.types import Array, Params, UserError

SIDE, PATCH = 224, 14
GRID = SIDE // PATCH
HEAD = 64  # channels of an attention head, in every model size
OFFSET = 0.1  # added to the number of patches when position embeddings are resized
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Norm = functools.partial(LayerNorm, epsilon=1e-6, dtype=jnp.float32)
# Names of transformers -> names of torch hub.
RENAMED = {
  "embeddings.cls_token": "cls_token",
  "embeddings.mask_token": "mask_token",
  "embeddings.position_embeddings": "pos_embed",
  "embeddings.patch_embeddings.projection": "patch_embed.proj",
  "encoder.layer": "blocks",
  "attention.output.dense": "attn.proj",
  "layer_scale1.lambda1": "ls1.gamma",
  "layer_scale2.lambda1": "ls2.gamma",
  "mlp.weights_in": "mlp.w12",
  "mlp.weights_out": "mlp.w3",
  "layernorm": "norm",
}


class Block(nn.Module):
  """Transformer block with LayerScale, pre-norm; [B, L, C] -> [B, L, C]."""

  gated: bool
  hidden: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    B, L, C = x.shape
    qkv = nn.Dense(3 * C, name="attn.qkv")(Norm(name="norm1")(x))
    q, k, v = jnp.split(qkv.reshape(B, L, 3 * C // HEAD, HEAD), 3, axis=2)
    h = nn.Dense(C, name="attn.proj")(attention(q, k, v).reshape(x.shape))
    x += h * _gain(self, "ls1.gamma", C)
    h = Norm(name="norm2")(x)
    if self.gated:
      gate, h = jnp.split(nn.Dense(2 * self.hidden, name="mlp.w12")(h), 2, axis=-1)
      h = nn.Dense(C, name="mlp.w3")(nn.silu(gate) * h)
    else:
      h = nn.gelu(nn.Dense(self.hidden, name="mlp.fc1")(h), approximate=False)
      h = nn.Dense(C, name="mlp.fc2")(h)
    return x + h * _gain(self, "ls2.gamma", C)


def _gain(module: nn.Module, name: str, width: int) -> Array:
  return module.param(name, nn.initializers.ones, (width,)).reshape(1, 1, -1)


class Transformer(nn.Module):
  """Maps normalized pixels [B, 224, 224, 3] to the normalized class token, [B, C]."""

  width: int
  depth: int
  gated: bool
  hidden: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    side, zeros = (PATCH, PATCH), nn.initializers.zeros
    x = nn.Conv(self.width, side, side, "VALID", name="patch_embed.proj")(x)
    x = x.reshape(len(x), GRID**2, self.width)
    x += self.param("pos_embed", zeros, (GRID**2, self.width))[None]
    class_token = self.param("cls_token", zeros, (self.width,))
    class_token = jnp.broadcast_to(class_token, (len(x), 1, self.width))
    x = jnp.concatenate([class_token, x], axis=1)
    for i in range(self.depth):
      x = Block(self.gated, self.hidden, name=f"blocks.{i}")(x)
    return Norm(name="norm")(x[:, 0])


def pixels(images: Array) -> Array:
  """Preprocesses images as EDM2's evaluation does, to float32 [B, 224, 224, 3].

  Bicubic resizing with antialiasing and without rounding, then normalization by
  ImageNet's mean and standard deviation. dgm-eval, which introduced the metric, resizes
  with Pillow, which rounds to integers.
  """
  if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
    raise ValueError(
      f"DINOv2 takes images uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}"
    )
  x = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
  x = resize.bicubic(x, SIDE, SIDE) / 255
  mean, std = (jnp.array(v, jnp.float32).reshape(1, 1, 1, 3) for v in (MEAN, STD))
  return (x - mean) / std


@registry.register(
  "metrics.features",
  "dinov2",
  columns={
    "fd_dinov2": (
      "FD-DINOv2",
      "{:.1f}",
      "Frechet distance to real images in features of DINOv2, lower is better",
    )
  },
)
def load(path: str) -> FeatureNetwork:
  """Returns the network of a file of weights; its size is read off them.

  Positions were trained at 37 x 37 patches and are resized to 16 x 16 as torch hub's
  code does. Grey images become RGB ones of equal channels.

  Args:
    path: dinov2_vit{s,b,l,g}14_pretrain.pth of torch hub, or transformers'
      model.safetensors. FD-DINOv2 is measured in those of ViT-L, 1024 features.

  Raises:
    UserError: the file is missing or damaged, or holds another network.

  Reference: Oquab et al., arXiv:2304.07193; Stein et al., arXiv:2306.04675.
  """
  tensors = _hub_names(state_dict.read(path))
  tensors.pop("mask_token", None)
  if "cls_token" not in tensors or tensors.get("pos_embed", np.zeros(0)).ndim != 3:
    raise UserError(
      f"{path} holds no DINOv2: there are no cls_token and pos_embed of torch hub, nor "
      "the same of transformers"
    )
  net = _of(tensors)

  def init(key: Array) -> Params:
    return net.init(key, jnp.zeros((1, SIDE, SIDE, 3)))["params"]

  def apply(params: Params, images: Array) -> Array:
    with jax.default_matmul_precision("highest"):
      return net.apply({"params": params}, pixels(images))

  place = positions(tensors["pos_embed"])
  first = tensors["cls_token"].reshape(-1) + place[0]
  tensors |= {"cls_token": first, "pos_embed": place[1:].T}
  params = networks.load_state_dict(
    tensors, init, dtype="float32", path=path, network="DINOv2"
  )
  return FeatureNetwork("fd_dinov2", apply, params)


def positions(trained: np.ndarray) -> np.ndarray:
  """Returns the embeddings of class token and 16 x 16 patches, float32 [257, C].

  Args:
    trained: of the class token and n x n patches, [1, 1 + n^2, C].
  """
  first, rest = trained[0, :1], trained[0, 1:]
  side = round(len(rest) ** 0.5)
  if side == GRID:
    return trained[0]
  matrix = resize.torch_bicubic(GRID, side, (GRID + OFFSET) / side)
  grid = rest.reshape(side, side, -1)
  grid = np.einsum("hH,wW,HWc->hwc", matrix, matrix, grid, optimize=True)
  return np.concatenate([first, grid.reshape(GRID**2, -1)])


def _of(tensors: dict[str, np.ndarray]) -> Transformer:
  """Returns the network whose tensors these are, by their names and shapes."""
  blocks = {int(n) for k in tensors for n in re.findall(r"^blocks\.(\d+)\.", k)}
  gated = "blocks.0.mlp.w3.weight" in tensors
  last = tensors.get(f"blocks.0.mlp.{'w3' if gated else 'fc2'}.weight")
  width = tensors["cls_token"].size
  hidden = 4 * width if last is None else last.shape[-1]
  return Transformer(width, max(blocks, default=-1) + 1, gated, hidden)


def _hub_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns tensors of transformers under the names of torch hub."""
  out = {}
  for name, x in tensors.items():
    for theirs, ours in RENAMED.items():
      name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.|$)", rf"\g<1>{ours}", name)
    out[name] = x
  for name in [k for k in out if ".attention.attention.query." in k]:
    kinds = [name.replace("query", kind) for kind in ("query", "key", "value")]
    if all(kind in out for kind in kinds):
      joined = np.concatenate([out.pop(kind) for kind in kinds])
      out[name.replace("attention.attention.query", "attn.qkv")] = joined
  return out
