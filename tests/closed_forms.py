"""Data whose TrigFlow is known in closed form, and central differences."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from sdiff_jax.diffusion.trigflow import expand
from sdiff_jax.types import Array, Cond, Network


class Gaussian(NamedTuple):
  """N(mean, std^2) of independent dimensions; mean and std are [1, D], or [] .

  x_t is N(mean cos t, V(t)), V = std^2 cos^2 t + sigma_d^2 sin^2 t.
  """

  mean: Array
  std: Array
  sigma_d: float

  def moments(self, x: Array, t: Array) -> tuple[Array, ...]:
    """Returns cos t, sin t, the standard score of x at t and the root of V(t)."""
    c, s = jnp.cos(expand(t, x)), jnp.sin(expand(t, x))
    root = jnp.sqrt((self.std * c) ** 2 + (self.sigma_d * s) ** 2)
    return c, s, (x - self.mean * c) / root, root

  def velocity(self, x: Array, t: Array) -> Array:
    """The probability flow dx/dt."""
    c, s, score, root = self.moments(x, t)
    return -self.mean * s + s * c * (self.sigma_d**2 - self.std**2) / root * score

  def posterior(self, x: Array, t: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of x0 given x_t = x."""
    c, s, score, root = self.moments(x, t)
    mean = self.mean + self.std**2 * c / root * score
    return mean, self.std * self.sigma_d * s / root

  def flow(self, x: Array, t: Array, u: Array) -> Array:
    """The probability flow's map from angle t to angle u."""
    c, _, _, root = self.moments(x, u)
    return self.mean * c + root * self.moments(x, t)[2]

  def consistency(self, x: Array, t: Array, cond: Cond = None) -> Array:
    """f*, the flow's map to angle 0; as a Denoiser."""
    return self.mean + self.std * self.moments(x, t)[2]

  def diffusion_net(self, x: Array, t: Array, cond: Cond = None) -> Array:
    """F of the best diffusion model; as a NetFn."""
    return self.velocity(x * self.sigma_d, t) / self.sigma_d

  def consistency_net(self, x: Array, t: Array, cond: Cond = None) -> Array:
    """F of the true consistency model, for t > 0; as a NetFn."""
    xt = x * self.sigma_d
    c, s, _, _ = self.moments(xt, t)
    return (c * xt - self.consistency(xt, t)) / (self.sigma_d * s)

  def flow_map_net(self, x: Array, t: Array, cond: Cond) -> Array:
    """F of the true flow map to cond["end_time"] <= t; as a NetFn."""
    xt, u = x * self.sigma_d, cond["end_time"]
    # Where both times are equal the quotient is 0 / 0, and its limit is the velocity.
    equal = expand(t == u, xt)
    step = jnp.where(equal, 1.0, expand(t - u, xt))
    state = self.flow(xt, t, u)
    quotient = (jnp.cos(step) * xt - state) / (self.sigma_d * jnp.sin(step))
    return jnp.where(equal, self.diffusion_net(x, t), quotient)


class Mixture(NamedTuple):
  """Mixture of 1-D normals; weights, means and stds are [1, K], x is [B, 1]."""

  weights: np.ndarray
  means: np.ndarray
  stds: np.ndarray
  sigma_d: float

  def velocity(self, x: Array, t: Array) -> Array:
    """The probability flow dx/dt: the components', by their responsibilities."""
    parts = Gaussian(jnp.asarray(self.means), jnp.asarray(self.stds), self.sigma_d)
    wide = jnp.broadcast_to(x, (x.shape[0], self.means.size))
    _, _, score, root = parts.moments(wide, t)
    share = jax.nn.softmax(jnp.log(self.weights / root) - score**2 / 2)
    return jnp.sum(share * parts.velocity(wide, t), -1, keepdims=True)

  def cdf(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """P(x_t <= x), [B, 1], in float64."""
    c, s = np.cos(t)[:, None], np.sin(t)[:, None]
    root = np.hypot(self.stds * c, self.sigma_d * s)
    return np.sum(self.weights * ndtr((x - self.means * c) / root), 1, keepdims=True)

  def consistency(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """f*: the flow's map to angle 0."""
    return self.flow(x, t, np.zeros_like(np.asarray(t, np.float64)))

  def flow(self, x: np.ndarray, t: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The map from angle t to u: monotone in 1-D, so it keeps quantiles; by bisection."""
    x, t, u = (np.asarray(a, np.float64) for a in (x, t, u))
    rank = self.cdf(x, t)
    low, high = np.full_like(x, -10.0), np.full_like(x, 10.0)
    for _ in range(60):
      middle = (low + high) / 2
      below = self.cdf(middle, u) < rank
      low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low

  def sample(self, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws float32 [size, 1]."""
    k = rng.choice(self.means.size, size, p=self.weights[0])
    x = self.means[0, k] + self.stds[0, k] * rng.standard_normal(size)
    return x[:, None].astype(np.float32)


# The mixture, and values of its f*, of the reference: section 6.2, item 2.
MIXTURE = Mixture(
  np.array([[0.3, 0.7]]), np.array([[-0.6, 0.4]]), np.array([[0.1, 0.15]]), 0.5
)
MIXTURE_X = np.array([[0.3], [-0.2], [0.05]])
MIXTURE_T = np.array([1.1, 1.5, 0.6])
MIXTURE_F = np.array([[0.4228594993], [0.1618759339], [0.2557306378]])


def central(f: Callable, primals: tuple, tangents: tuple, h: float = 1e-5) -> Array:
  """Returns the central difference of f along the tangents."""
  ahead, behind = (
    f(*(p + sign * h * d for p, d in zip(primals, tangents, strict=True)))
    for sign in (1, -1)
  )
  return (ahead - behind) / (2 * h)


def random_params(net: Network, seed: int = 0, dtype: str = "float64") -> dict:
  """Returns random parameters of a network, none of its layers zero, its gains 1."""
  with jax.numpy_dtype_promotion("standard"):  # init under x64 mixes types
    shapes = jax.eval_shape(net.init, jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape) if p.shape else 1, dtype),
    shapes,
  )


def run_recurrence(tableau, x, denoiser: Callable, noise=None, noise_before=None):
  """Returns the last state of a solver's recurrence, in numpy and float64.

  Args:
    tableau: the solver.
    x: the first state.
    denoiser: (x, time) -> d.
    noise: of unit variance, one for each step; None for a solver without.
    noise_before: of unit variance, one for each step; None for a solver without.
  """
  previous, history = np.zeros_like(x), [np.zeros_like(x)] * tableau.history
  for i, time in enumerate(tableau.time):
    if noise_before is not None:
      x = x + tableau.noise_before[i] * noise_before[i]
    history = [denoiser(x, time), *history[:-1]]
    new = tableau.x_coef[i, 0] * x + tableau.x_coef[i, 1] * previous
    for coefficient, d in zip(tableau.denoised_coef[i], history, strict=True):
      new = new + coefficient * d
    if tableau.noise_coef[i]:
      new = new + tableau.noise_coef[i] * noise[i]
    x, previous = new, x
  return x


def mixture_mean(mixture: dict, x, alpha: float, sigma: float) -> np.ndarray:
  """Returns E[x0 | x], [S, D], for x = alpha x0 + sigma eps, in numpy and float64.

  Args:
    mixture: of normals, {"means": [K, D], "stds": [K], "weights": [K]}.
    x: [S, D].
    alpha: signal coefficient.
    sigma: standard deviation of the noise.
  """
  means, stds = mixture["means"], mixture["stds"][:, None, None]
  var = (alpha * stds) ** 2 + sigma**2
  residual = np.asarray(x)[None] - alpha * means[:, None]
  log_weight = -0.5 * np.sum(residual**2 / var + np.log(var), -1)
  log_weight += np.log(mixture["weights"])[:, None]
  weight = np.exp(log_weight - log_weight.max(0))
  mean = means[:, None] + alpha * stds**2 / var * residual
  return np.einsum("ks,ksd->sd", weight / weight.sum(0), mean)


def one_at_a_time(denoiser):
  """Returns a denoiser that calls another for each sample alone.

  A compiler may round the rows of a matrix product differently in batches of other
  sizes; of one size they are equal to the bit in a sequential and in a parallel sampler.
  """

  def call(x, time, cond):
    def alone(row):
      return jax.tree.map(lambda a: a[None], row)

    return jax.lax.map(lambda row: denoiser(*alone(row))[0], (x, time, cond))

  return call
