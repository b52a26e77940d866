"""A network: a few convolutions that are scaled and shifted by an embedding."""

import flax.linen as nn
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.models.layers import conditioning, linen


class ConvNet(nn.Module):
  """F(x, t, cond) of images, [B, H, W, C] -> [B, H, W, C]."""

  width: int
  depth: int
  conditions: tuple

  @nn.compact
  def __call__(self, x, t, cond, *, deterministic):
    del deterministic  # there is no dropout
    # One vector for the time and all conditions that the data set declares.
    embed = conditioning.Embedding(self.width, self.conditions, jnp.float32)
    embedding = embed(t, cond)
    h = nn.Conv(self.width, (3, 3))(x)
    for _ in range(self.depth):
      scale, shift = nn.Dense(2 * self.width)(embedding)[:, None, None].reshape(
        2, len(x), 1, 1, self.width
      )
      y = nn.LayerNorm()(h) * (1 + scale) + shift
      h = h + nn.Conv(self.width, (3, 3))(nn.silu(y))
    return nn.Conv(x.shape[-1], (3, 3), kernel_init=nn.initializers.zeros)(h)


@registry.register("models", "convnet")
def build(*, shape, cond, width=32, depth=2):
  """Returns the network.

  Args:
    shape: of one sample, (H, W, C), supplied by the caller.
    cond: conditions by name, `CondSpec`s, supplied by the caller.
    width: channels; from here on the config's fields.
    depth: number of residual blocks.
  """
  conditions = conditioning.conditions(cond)
  module = ConvNet(width, depth, conditions)
  return linen.as_network(module, shape=shape, conditions=conditions)
