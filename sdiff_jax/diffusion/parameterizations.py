"""Denoisers made of what a network predicts: noise, v, data or a flow's velocity.

A TrigFlow network's is `trigflow.denoiser`; networks of EDM have D(x, sigma) already.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from sdiff_jax.diffusion.trigflow import expand
from sdiff_jax.types import Array, Cond, Denoiser

# time [N] -> alpha, sigma, [N] each
LevelFn = Callable[[Array], tuple[Array, Array]]
PARAMETERIZATIONS: dict[str, Callable[..., Array]] = {
  # what is predicted -> (prediction, x, alpha, sigma) -> d
  "x0": lambda y, x, alpha, sigma: y,
  "eps": lambda y, x, alpha, sigma: (x - sigma * y) / alpha,
  "v": lambda y, x, alpha, sigma: alpha * x - sigma * y,  # y = alpha eps - sigma x0
  "flow": lambda y, x, alpha, sigma: x - sigma * y,  # y = eps - x0
}


def vp(abar: np.ndarray) -> LevelFn:
  """Returns the levels of a discrete process, ln(alpha / sigma) linear in between.

  Args:
    abar: alpha^2 at each timestep, float64 [T] (see `paths.alphas_cumprod`).
  """
  log_snr = np.log(abar / (1 - abar)) / 2

  def level(time: Array) -> tuple[Array, Array]:
    steps = jnp.arange(len(abar), dtype=time.dtype)
    at = jnp.interp(time, steps, jnp.asarray(log_snr, time.dtype))
    return (1 + jnp.exp(-2 * at)) ** -0.5, (1 + jnp.exp(2 * at)) ** -0.5

  return level


def flow(time: Array) -> tuple[Array, Array]:
  """Returns the levels of rectified flow, 1 - t and t."""
  return 1 - time, time


def denoiser(
  predict: Callable[..., Array],
  kind: str,
  level: LevelFn,
  *,
  clip: float = 0.0,
  quantile: float = 0.0,
  excess: Callable[[Array], Array] | None = None,
) -> Denoiser:
  """Returns the denoiser of a network.

  Args:
    predict: (x [N, ...], time [N], cond) -> prediction [N, ...].
    kind: of the prediction, a key of KINDS.
    level: of the process.
    clip: d is clipped to [-clip, clip]; 0 for not.
    quantile: with clip, d is clipped to the sample's quantile of |d|, if that is
      larger, and scaled back to clip (dynamic thresholding, arXiv:2205.11487, section
      2.3); 0 for a fixed range.
    excess: time [N] -> w [N]: what the clip took off is taken off w times more; None
      for not (see `schedules.denoiser`).

  Raises:
    ValueError: another kind, or a quantile without a clip.
  """
  if kind not in PARAMETERIZATIONS:
    raise ValueError(f"kind={kind!r}: take one of {[*PARAMETERIZATIONS]}")
  if quantile and not clip:
    raise ValueError(f"quantile={quantile}: give the range that it scales to, clip")

  def denoise(x: Array, time: Array, cond: Cond) -> Array:
    alpha, sigma = (expand(v, x) for v in level(time))
    d = PARAMETERIZATIONS[kind](predict(x, time, cond), x, alpha, sigma)
    if quantile:
      most = jnp.quantile(jnp.abs(d).reshape(len(d), -1), quantile, axis=1)
      most = expand(jnp.maximum(most, clip), d)
      return jnp.clip(d, -most, most) * (clip / most)
    if not clip:
      return d
    clipped = jnp.clip(d, -clip, clip)
    if excess is None:
      return clipped
    return clipped + expand(excess(time), d) * (clipped - d)

  return denoise
