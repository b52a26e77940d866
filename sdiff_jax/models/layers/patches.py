"""Patches of an image as channels of a smaller one (space to depth), and back."""

from sdiff_jax.types import Array


def split(x: Array, size: int) -> Array:
  """Returns each patch of size x size pixels as one pixel.

  Args:
    x: [B, H, W, C], H and W multiples of the size.
    size: side of a patch, pixels.

  Returns:
    [B, H / size, W / size, size * size * C]; a patch's rows are outermost, its channels
    innermost.

  Example:
    >>> import jax.numpy as jnp
    >>> split(jnp.zeros((2, 4, 6, 3)), 2).shape
    (2, 2, 3, 12)
  """
  B, H, W, C = x.shape
  x = x.reshape(B, H // size, size, W // size, size, C).swapaxes(2, 3)
  return x.reshape(B, H // size, W // size, size * size * C)


def join(x: Array, size: int) -> Array:
  """Returns the image whose patches `split` made, [B, h, w, size^2 C] -> [B, H, W, C].

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.arange(48.0).reshape(1, 4, 6, 2)
    >>> bool((join(split(x, 2), 2) == x).all())
    True
  """
  B, h, w, features = x.shape
  x = x.reshape(B, h, w, size, size, features // size**2).swapaxes(2, 3)
  return x.reshape(B, h * size, w * size, features // size**2)
