"""Denoisers and TrigFlow networks from what a network predicts: eps, v, x0 or a flow.

`trigflow.denoiser` is that of a TrigFlow network; networks of EDM are denoisers D(x,
sigma) already.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from sdiff_jax.diffusion import noise_schedules, trigflow
from sdiff_jax.diffusion.trigflow import expand
from sdiff_jax.types import Array, Cond, Denoiser, NetFn

# time [N] -> (alpha [N], sigma [N])
LevelFn = Callable[[Array], tuple[Array, Array]]
# (x [N, ...], time [N], cond) -> prediction [N, ...]: a network in its own process.
PredictFn = Callable[[Array, Array, Cond], Array]
# What a network predicts -> (prediction, x, alpha, sigma) -> estimate of x0.
PARAMETERIZATIONS: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
  "x0": lambda y, x, alpha, sigma: y,
  "eps": lambda y, x, alpha, sigma: (x - sigma * y) / alpha,
  "v": lambda y, x, alpha, sigma: alpha * x - sigma * y,  # y = alpha eps - sigma x0
  "flow": lambda y, x, alpha, sigma: x - sigma * y,  # y = eps - x0
}


def vp(abar: np.ndarray) -> LevelFn:
  """Returns the noise levels of a discrete variance-preserving process.

  Between timesteps, ln(alpha / sigma) is linear in time.

  Args:
    abar: alpha^2 at each timestep, float64 [T] (see `noise_schedules.alphas_cumprod`).

  Returns:
    time [N] -> (alpha [N], sigma [N]).

  Example:
    >>> alpha, sigma = vp(np.array([0.9, 0.5]))(jnp.array([1.0]))
    >>> alpha.round(3), sigma.round(3)
    (Array([0.707], dtype=float32), Array([0.707], dtype=float32))
  """
  log_snr = noise_schedules.log_snr(abar)

  def level(time: Array) -> tuple[Array, Array]:
    steps = jnp.arange(len(abar), dtype=time.dtype)
    at = jnp.interp(time, steps, jnp.asarray(log_snr, time.dtype))
    return (1 + jnp.exp(-2 * at)) ** -0.5, (1 + jnp.exp(2 * at)) ** -0.5

  return level


def vp_by_sigma(abar: np.ndarray) -> LevelFn:
  """Returns the noise levels of a discrete variance-preserving process, as Euler's.

  Between timesteps, sigma / alpha is linear in time (see
  `noise_schedules.vp_by_sigma`).

  Args:
    abar: alpha^2 at each training timestep, all above 0, float64 [T].

  Returns:
    time [N] -> (alpha [N], sigma [N]).

  Example:
    >>> alpha, sigma = vp_by_sigma(np.array([0.9, 0.5]))(jnp.array([0.5]))
    >>> (sigma / alpha).round(4)
    Array([0.6667], dtype=float32)
  """
  ratios = (1 / abar - 1) ** 0.5

  def level(time: Array) -> tuple[Array, Array]:
    steps = jnp.arange(len(abar), dtype=time.dtype)
    ratio = jnp.interp(time, steps, jnp.asarray(ratios, time.dtype))
    alpha = (1 + ratio**2) ** -0.5
    return alpha, ratio * alpha

  return level


def flow(time: Array) -> tuple[Array, Array]:
  """Returns the noise levels of rectified flow, alpha = 1 - t and sigma = t.

  Args:
    time: in [0, 1], [N].

  Returns:
    alpha [N] and sigma [N].

  Example:
    >>> velocity = lambda x, time, cond: 2 * x
    >>> denoise = denoiser(velocity, "flow", flow)
    >>> denoise(jnp.ones((1, 2)), jnp.array([0.25]), None)
    Array([[0.5, 0.5]], dtype=float32)
  """
  return 1 - time, time


def denoiser(
  predict: PredictFn,
  kind: str,
  level: LevelFn,
  *,
  clip: float = 0.0,
  quantile: float = 0.0,
  largest: float = np.inf,
  excess: Callable[[Array], Array] | None = None,
) -> Denoiser:
  """Returns the denoiser of a network.

  Args:
    predict: (x [N, ...], time [N], cond) -> prediction [N, ...].
    kind: what the network predicts, a key of `PARAMETERIZATIONS`.
    level: the noise levels of the process.
    clip: the estimate of x0 is clipped to [-clip, clip]; 0 for no clipping.
    quantile: with `clip`, each sample is clipped to this quantile of its |x0|, if that
      is larger than `clip`, and scaled back to `clip` (dynamic thresholding,
      arXiv:2205.11487, section 2.3); 0 for a fixed range.
    largest: the largest range of dynamic thresholding.
    excess: time [N] -> weight [N] by which the clipped part is subtracted once more;
      None for 0 (see `pretrained.diffusers.scheduler.denoiser`).

  Raises:
    ValueError: an unknown kind, or a quantile without a clip.

  Example:
    >>> predict = lambda x, time, cond: 4 * x  # of x0
    >>> x, time = jnp.array([[0.1, 0.2, 0.5]]), jnp.array([0.5])
    >>> denoiser(predict, "x0", flow, clip=1.0)(x, time, None)
    Array([[0.4, 0.8, 1. ]], dtype=float32)
    >>> denoiser(predict, "x0", flow, clip=1.0, quantile=1.0)(x, time, None)
    Array([[0.2, 0.4, 1. ]], dtype=float32)
  """
  if kind not in PARAMETERIZATIONS:
    raise ValueError(f"kind={kind!r}: must be one of {', '.join(PARAMETERIZATIONS)}")
  if quantile and not clip:
    raise ValueError(f"quantile={quantile}: needs clip, the range that it scales to")

  def denoise(x: Array, time: Array, cond: Cond) -> Array:
    alpha, sigma = (expand(v, x) for v in level(time))
    d = PARAMETERIZATIONS[kind](predict(x, time, cond), x, alpha, sigma)
    if not clip:
      return d
    if quantile:
      limit = jnp.quantile(jnp.abs(d).reshape(len(d), -1), quantile, axis=1)
      limit = expand(jnp.clip(limit, clip, largest), d)
      clipped = jnp.clip(d, -limit, limit) * (clip / limit)
    else:
      clipped = jnp.clip(d, -clip, clip)
    if excess is None:
      return clipped
    return clipped + expand(excess(time), d) * (clipped - d)

  return denoise


def timestep_of_vp(abar: np.ndarray, data_std: float) -> Callable[[Array], Array]:
  """Returns the timestep of a discrete variance-preserving process at a TrigFlow time.

  It is linear in t between timesteps, and that of the first or last one beyond them.

  Args:
    abar: alpha^2 at each timestep, float64 [T].
    data_std: standard deviation of the data in the unit of the process.

  Returns:
    t [B] -> timestep [B].

  Example:
    >>> timestep = timestep_of_vp(np.array([0.8, 0.5, 0.2]), data_std=1.0)
    >>> [round(float(s), 3) for s in timestep(jnp.array([0.0, jnp.pi / 4, 1.5]))]
    [0.0, 1.0, 2.0]
  """
  angles = _angles(abar, data_std)

  def timestep(t: Array) -> Array:
    steps = jnp.arange(len(angles), dtype=t.dtype)
    return jnp.interp(t, jnp.asarray(angles, t.dtype), steps)

  return timestep


def timestep_of_flow(train_steps: int, data_std: float) -> Callable[[Array], Array]:
  """Returns the timestep T u of rectified flow at a TrigFlow time.

  Args:
    train_steps: T, the timestep of pure noise.
    data_std: standard deviation of the data in the unit of the flow.

  Returns:
    t [B] -> timestep [B].

  Example:
    >>> round(float(timestep_of_flow(1000, data_std=1.0)(jnp.float32(jnp.pi / 4))))
    500
  """

  def timestep(t: Array) -> Array:
    noise = data_std * jnp.sin(t)
    return train_steps * noise / (jnp.cos(t) + noise)

  return timestep


def _angles(abar: np.ndarray, data_std: float) -> np.ndarray:
  """Returns arctan(sigma / (data_std alpha)) of a process, float64 [T]."""
  return np.arctan2((1 - abar) ** 0.5, data_std * abar**0.5)


def trigflow_from_vp(
  predict: PredictFn, kind: str, abar: np.ndarray, data_std: float
) -> NetFn:
  """Returns the TrigFlow network of a discrete variance-preserving process.

  With x' = alpha x0' + sigma eps, x0' of standard deviation s, the time is
  t = arctan(sigma / (s alpha)) and F = (cos t x_t - x0) / (sigma_d sin t) (see
  `trigflow.from_vp`); sigma_d of the TrigFlow process cancels out. Between timesteps the
  timestep is linear in t, which is finite at a zero terminal SNR too. Beyond the first
  and the last one F is that of the first and of the last, since the network was trained
  at no other noise level, and takes pure noise at the last.

  Args:
    predict: the network; its time is the timestep, which need not be whole.
    kind: what it predicts: "eps", "v" or "x0".
    abar: alpha^2 at each timestep, float64 [T].
    data_std: standard deviation s of the data in the unit of the network.

  Returns:
    An exact NetFn. The timestep is a function of t inside it, so a jvp is complete.

  Example:
    >>> predict = lambda x, time, cond: x * expand(time, x)
    >>> net = trigflow_from_vp(predict, "eps", np.array([0.8, 0.5, 0.2]), data_std=1.0)
    >>> F = net(jnp.ones((1, 2)), jnp.array([jnp.pi / 4]), None)  # timestep 1
    >>> round(float(F[0, 0]), 4)
    0.4142
  """
  angles, timestep = _angles(abar, data_std), timestep_of_vp(abar, data_std)

  def net(x: Array, t: Array, cond: Cond) -> Array:
    t = jnp.clip(t, float(angles[0]), float(angles[-1]))
    time = timestep(t)

    def raw(x: Array, t: Array, cond: Cond) -> Array:
      del t  # which is alpha
      return predict(x, time, cond)

    return trigflow.from_vp(raw, kind, lambda alpha: alpha, data_std)(x, t, cond)

  return net


def trigflow_from_flow(predict: PredictFn, train_steps: int, data_std: float) -> NetFn:
  """Returns the TrigFlow network of rectified flow, x' = (1 - u) x0' + u eps.

  A shift of the noise levels only changes which u are trained and sampled, not the
  network. With x0' of standard deviation s, u = s tan t / (1 + s tan t); see
  `trigflow.from_flow`, which is exact and finite for all t in [0, pi/2].

  Args:
    predict: the network of eps - x0'; its time is the timestep T u.
    train_steps: T, the timestep of pure noise.
    data_std: standard deviation s of the data in the unit of the network.

  Example:
    >>> net = trigflow_from_flow(lambda x, time, cond: -x, 1000, data_std=1.0)
    >>> net(jnp.ones((1, 2)), jnp.zeros(1), None).tolist()
    [[0.0, 0.0]]
  """

  def raw(x: Array, t: Array, cond: Cond) -> Array:
    return predict(x, train_steps * t, cond)  # where t is u

  return trigflow.from_flow(raw, data_std)
