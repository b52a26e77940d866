"""Averages of the parameters during training, and post-hoc averages from stored ones."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.types import Array, Params, PyTree

RAMPUP = 0.05  # a half-life is at most this fraction of the images seen (EDM)


def parse_profile(profile: str) -> tuple[str, float]:
  """Splits the name of a profile, "power/0.05", into its kind and its number.

  Args:
    profile: name of the average.

  Raises:
    ValueError: the name is not of that form.

  Example:
    >>> parse_profile("power/0.05")
    ('power', 0.05)
  """
  kind, _, number = profile.partition("/")
  try:
    return kind, float(number)
  except ValueError:
    message = f"profiles: {profile!r} is not of the form name/number"
    raise ValueError(message) from None


def power_exponent(sigma_rel: float) -> float:
  """Returns gamma of the power profile whose relative width is sigma_rel.

  sigma_rel = (gamma+1)^{1/2} (gamma+2)^{-1} (gamma+3)^{-1/2}
  (arXiv:2312.02696, eq. 126).

  Args:
    sigma_rel: relative width of the profile.

  Raises:
    ValueError: sigma_rel is outside (0, 0.28).

  Example:
    >>> round(power_exponent(0.05), 2)
    16.97
  """
  if not 0 < sigma_rel < 0.28:
    raise ValueError(f"sigma_rel={sigma_rel}: the width must be in (0, 0.28)")
  roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
  return float(roots.real.max())


def power(sigma_rel: float) -> Callable[[Array], Array]:
  """Returns n -> beta_n = (1 - 1/n)^(gamma + 1), with n = 1 first (eq. 127).

  Args:
    sigma_rel: relative width of the profile, in (0, 0.28).

  Example:
    >>> power(0.1)(1.0)
    0.0
  """
  gamma = power_exponent(sigma_rel)
  return lambda n: (1 - 1 / n) ** (gamma + 1)


def half_life(images: float, batch_size: int) -> Callable[[Array], Array]:
  """Returns n -> 0.5^(batch_size / h), h = min(images, 0.05 images seen).

  Args:
    images: half-life in images.
    batch_size: images of a step.

  Raises:
    ValueError: `images` is not above 0.

  Example:
    >>> round(float(half_life(1000, batch_size=10)(1e6)), 4)
    0.9931
  """
  if not 0 < images < np.inf:
    raise ValueError(f"images={images}: a half-life must be above 0 and finite")

  def beta(n: Array) -> Array:
    return 0.5 ** (batch_size / jnp.minimum(images, RAMPUP * n * batch_size))

  return beta


def warmup(power: float) -> Callable[[Array], Array]:
  """Returns n -> min(1 - (n - 1)^-power, 0.9999), and 0 at n = 1 (Diffusion Policy).

  Args:
    power: exponent of the decay.

  Raises:
    ValueError: `power` is not above 0.

  Example:
    >>> round(float(warmup(0.75)(3.0)), 4)
    0.4054
  """
  if not 0 < power < np.inf:
    raise ValueError(f"power={power}: must be above 0 and finite")
  return lambda n: jnp.minimum(1 - jnp.maximum(n - 1, 1.0) ** -power, 0.9999)


def betas(
  profiles: Sequence[str], batch_size: int
) -> dict[str, Callable[[Array], Array]]:
  """Returns profile -> (n -> beta_n), the decay of its average at update n = 1, 2, ...

  Args:
    profiles: names of averages: "power/sigma_rel" (EDM2, see `power`),
      "half_life/images" (see `half_life`), "warmup/power" (see `warmup`).
    batch_size: images of a step.

  Raises:
    ValueError: a name is unknown, or its number is out of range.

  Example:
    >>> sorted(betas(("power/0.1", "half_life/1000"), batch_size=8))
    ['half_life/1000', 'power/0.1']
  """
  decays = {}
  for profile in profiles:
    if profile in decays:
      raise ValueError(f"profiles: {profile!r} is named twice")
    kind, number = parse_profile(profile)
    try:
      if kind == "half_life":
        decays[profile] = half_life(number, batch_size)
      elif kind in ("power", "warmup"):
        decays[profile] = {"power": power, "warmup": warmup}[kind](number)
      else:
        raise ValueError("must be power/sigma_rel, half_life/images or warmup/power")
    except ValueError as error:
      raise ValueError(f"profiles: {profile!r}: {error}") from error
  return decays


def update(
  averages: dict[str, Params],
  params: Params,
  n: Array,
  betas: Mapping[str, Callable[[Array], Array]],
  trainable: PyTree = None,
) -> dict[str, Params]:
  """Returns beta_n average + (1 - beta_n) params of every profile.

  Args:
    averages: profile -> average.
    params: parameters after the update.
    n: number of the update, from 1.
    betas: profile -> (n -> beta_n).
    trainable: which parameters are trained; the average of the others is what they are.
      None for all.

  Example:
    >>> averages = {"a": {"w": jnp.zeros(1)}}
    >>> new = update(averages, {"w": jnp.ones(1)}, jnp.int32(4), {"a": lambda n: 1 / n})
    >>> new["a"]["w"].tolist()
    [0.75]
  """
  n = n.astype(jnp.float32)

  def mix(beta: Array) -> Callable[..., Array]:
    return lambda a, p, trained=True: beta * a + (1 - beta) * p if trained else p

  others = () if trainable is None else (trainable,)
  return {
    k: jax.tree.map(mix(betas[k](n)), averages[k], params, *others) for k in averages
  }


def posthoc(
  steps: np.ndarray, sigma_rels: np.ndarray, step: float, sigma_rel: float
) -> tuple[np.ndarray, float]:
  """Returns weights w of stored power averages whose sum is a power average too.

  They minimize |sum_i w_i p_i - p|^2 over profiles p_i(u) = (gamma_i + 1) u^gamma_i /
  t_i^(gamma_i + 1) on [0, t_i] (arXiv:2312.02696, algorithm 3), and are then divided
  by their sum, as EDM2 does. The averages of `update` are these profiles, integrated
  over each step.

  Args:
    steps: number t_i of updates of each average, above 0, [N].
    sigma_rels: relative width of each profile, [N].
    step: number t of updates of the average to compute.
    sigma_rel: relative width of its profile.

  Returns:
    w, float64 [N], and the remaining distance |sum_i w_i p_i - p| / |p|.

  Raises:
    ValueError: a width is out of range.

  Example:
    >>> w, distance = posthoc(np.array([100.0]), np.array([0.1]), 100.0, 0.1)
    >>> w.tolist(), distance
    ([1.0], 0.0)
  """
  t = np.asarray([*steps, step], np.float64)
  gamma = np.asarray([power_exponent(s) for s in (*sigma_rels, sigma_rel)])
  late, exponent = t[:, None] >= t, gamma[:, None]
  # int_0^min p_i p_j has the ratio of the steps to the power of the later one's gamma.
  ratio = np.minimum(t[:, None], t) / np.maximum(t[:, None], t)
  products = (exponent + 1) * (gamma + 1) / (exponent + gamma + 1)
  products *= ratio ** np.where(late, exponent, gamma) / np.maximum(t[:, None], t)
  inner, target = products[:-1, :-1], products[:-1, -1]
  scale = 1 / np.sqrt(np.diag(inner))  # profiles of norm 1, for better conditioning
  solution = np.linalg.lstsq(
    inner * scale[:, None] * scale, target * scale, rcond=1e-15
  )
  w = solution[0] * scale
  w /= w.sum()
  remaining = products[-1, -1] - 2 * w @ target + w @ inner @ w
  return w, float(np.sqrt(max(remaining, 0) / products[-1, -1]))
