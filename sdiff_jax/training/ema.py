"""Averages of the parameters: several at once, and others from those, afterwards."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import config as configs
from sdiff_jax.types import Array, Params, UserError

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


def warmup(power: float) -> Callable[[Array], Array]:
  """Returns n -> min(1 - (n - 1)^-power, 0.9999), and 0 at n = 1 (Diffusion Policy).

  Raises:
    ValueError: power is not above 0.
  """
  if not power > 0:
    raise ValueError(f"ema: warmup/{power}: must be above 0")
  return lambda n: jnp.minimum(1 - jnp.maximum(n - 1, 1.0) ** -power, 0.9999)


def betas(profiles: tuple[str, ...], batch_size: int) -> dict[str, Callable]:
  """Returns profile -> (n -> beta_n) of the words that config.ema.profiles knows.

  Raises:
    UserError: another form.
    ValueError: a width out of range.
  """
  out = {}
  for profile in profiles:
    name, value = configs.name_and_number(profile, "ema.profiles")
    if name == "half_life":
      out[profile] = half_life(value, batch_size)
    elif name in ("power", "warmup"):
      out[profile] = {"power": power, "warmup": warmup}[name](value)
    else:
      raise UserError(
        f"config.ema.profiles: {profile!r} is neither power/sigma_rel nor "
        "half_life/images nor warmup/power"
      )
  return out


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


def posthoc(
  steps: np.ndarray, sigma_rels: np.ndarray, step: float, sigma_rel: float
) -> tuple[np.ndarray, float]:
  """Returns weights w of stored power averages that make another one of them.

  They minimise |sum_i w_i p_i - p|^2 over profiles p_i(u) = (gamma_i + 1) u^gamma_i /
  t_i^(gamma_i + 1) on [0, t_i] (arXiv:2312.02696, algorithm 3), and are then divided
  by their sum, as EDM2 does. The averages of `update` are these profiles, integrated
  over each step.

  Args:
    steps: t_i, updates that each average has seen, above 0, [N].
    sigma_rels: width of each profile, [N].
    step: t, updates of the wanted average.
    sigma_rel: its width.

  Returns:
    w, float64 [N], and the distance |sum_i w_i p_i - p| / |p| that is left.

  Raises:
    ValueError: a width out of range.
  """
  t = np.asarray([*steps, step], np.float64)
  gamma = np.asarray([power_exponent(s) for s in (*sigma_rels, sigma_rel)])
  late, exponent = t[:, None] >= t, gamma[:, None]
  # int_0^min p_i p_j: the ratio of the steps to the power of the later one's gamma.
  ratio = np.minimum(t[:, None], t) / np.maximum(t[:, None], t)
  products = (exponent + 1) * (gamma + 1) / (exponent + gamma + 1)
  products *= ratio ** np.where(late, exponent, gamma) / np.maximum(t[:, None], t)
  inner, wanted = products[:-1, :-1], products[:-1, -1]
  scale = 1 / np.sqrt(np.diag(inner))  # profiles of norm 1, which conditions better
  solved = np.linalg.lstsq(inner * scale[:, None] * scale, wanted * scale, rcond=1e-15)
  w = solved[0] * scale
  w /= w.sum()
  left = products[-1, -1] - 2 * w @ wanted + w @ inner @ w
  return w, float(np.sqrt(max(left, 0) / products[-1, -1]))
