"""Exponential moving averages of the parameters, several at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.interfaces import Array, Params

RAMPUP = 0.05  # a half-life is at most this share of the images seen (EDM)


def power_exponent(sigma_rel: float) -> float:
  """Returns gamma of the power profile whose relative width is sigma_rel.

  sigma_rel = (gamma+1)^{1/2} (gamma+2)^{-1} (gamma+3)^{-1/2}
  (arXiv:2312.02696, eq. 126).

  Raises:
    ValueError: sigma_rel outside (0, 0.28).
  """
  if not 0 < sigma_rel < 0.28:
    raise ValueError(f"ema: power/{sigma_rel}: the width must be in (0, 0.28)")
  roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
  return float(roots.real.max())


def power(sigma_rel: float) -> Callable[[Array], Array]:
  """Returns n -> beta_n = (1 - 1/n)^(gamma + 1), n = 1 first (eq. 127)."""
  gamma = power_exponent(sigma_rel)
  return lambda n: (1 - 1 / n) ** (gamma + 1)


def half_life(images: float, batch_size: int) -> Callable[[Array], Array]:
  """Returns n -> 0.5^(batch_size / h), h = min(images, 0.05 images seen).

  Raises:
    ValueError: images is not above 0.
  """
  if not images > 0:
    raise ValueError(f"ema: half_life/{images}: must be above 0")

  def beta(n: Array) -> Array:
    return 0.5 ** (batch_size / jnp.minimum(images, RAMPUP * n * batch_size))

  return beta


def betas(profiles: tuple[str, ...], batch_size: int) -> dict[str, Callable]:
  """Returns profile -> (n -> beta_n) of "power/sigma_rel" and "half_life/images".

  Raises:
    ValueError: another form, or a width out of range.
  """
  out = {}
  for profile in profiles:
    name, _, number = profile.partition("/")
    if name not in ("power", "half_life") or not _is_number(number):
      raise ValueError(
        f"config.ema.profiles: {profile!r} is neither power/sigma_rel nor "
        "half_life/images"
      )
    value = float(number)
    out[profile] = power(value) if name == "power" else half_life(value, batch_size)
  return out


def _is_number(text: str) -> bool:
  try:
    float(text)
  except ValueError:
    return False
  return True


def update(
  averages: dict[str, Params], params: Params, n: Array, betas: dict[str, Callable]
) -> dict[str, Params]:
  """Returns beta_n average + (1 - beta_n) params of every profile.

  Args:
    averages: profile -> average.
    params: parameters after the update.
    n: number of the update, from 1.
    betas: profile -> (n -> beta_n).
  """
  n = n.astype(jnp.float32)

  def mix(beta: Array) -> Callable[[Array, Array], Array]:
    return lambda a, p: beta * a + (1 - beta) * p

  return {k: jax.tree.map(mix(betas[k](n)), averages[k], params) for k in averages}
