"""Names, shapes and types that every module shares.

Glossary (the papers' symbols, spelled the same everywhere):

  x0       data, [B, ...], scaled to standard deviation sigma_d
  z        Gaussian noise of standard deviation sigma_d, [B, ...]
  t        angle in [0, pi/2], [B]; 0 is data, pi/2 is noise
  xt       cos(t) x0 + sin(t) z, [B, ...]
  F        raw network output, [B, ...]; sigma_d F estimates the velocity
  v        velocity dx_t/dt, [B, ...]
  f        consistency function cos(t) xt - sin(t) sigma_d F, [B, ...]
  d        estimate of x0 by a denoiser, [B, ...]: the same formula as f
  g        tangent cos(t) df/dt, [B, ...]
  r        warm-up of the tangent, a scalar in [0, 1]
  w        adaptive log weight w_phi(t), [B]
  sigma_d  standard deviation of the data
  cond     the network's conditions: None or a dict of arrays with leading [B]
             label     int32, -1 stands for "no label"
             guidance  float32 scale of classifier-free guidance
             observation  float32 [B, Do], normalised: what a policy has observed
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
PRNGKey = jax.Array
Params = Any
Batch = dict[str, Any]  # {"x0": float32 [B, ...], "cond": Cond}
Cond = dict[str, Array] | None


class UserError(Exception):
  """A mistake of the user's: one line that names field, value and remedy."""


class NetFn(Protocol):
  """A TrigFlow network with its parameters bound."""

  def __call__(self, x: Array, t: Array, cond: Cond) -> Array:
    """Returns F, [B, ...].

    Args:
      x: xt / sigma_d, [B, ...].
      t: TrigFlow times, float32 [B].
      cond: None or arrays with leading [B].
    """
    ...


class Network(NamedTuple):
  """What losses and jobs know of a model.

  Attributes:
    init: (key) -> params.
    apply: (params, x [B, ...], t [B], cond, *, key=None) -> F [B, ...], in
      float32 or wider; dropout is on if, and only if, a key is given.
    logvar: (params, t [B]) -> w_phi(t) [B]; apart from apply, so that no jvp of
      the network runs through it.
    normalize: (params) -> params, with the norms that the network prescribes to its
      weights; applied after every update.
  """

  init: Callable[[PRNGKey], Params]
  apply: Callable[..., Array]
  logvar: Callable[[Params, Array], Array]
  normalize: Callable[[Params], Params] = lambda params: params


class LossFn(Protocol):
  """A pure training objective."""

  def __call__(
    self, params: Params, batch: Batch, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, dict[str, Array]]:
    """Returns a scalar and a dict of scalars to log.

    Args:
      params: parameters of the student.
      batch: {"x0": [B, ...], "cond": Cond}.
      key: random key of this step.
      step: int32 scalar, the number of steps taken before.
      frozen: parameters of the teacher, or None.
    """
    ...


# (x [N, ...], time [N], cond) -> d [N, ...]: what samplers know of a model,
# whatever its parametrisation.
Denoiser = Callable[[Array, Array, Cond], Array]
