"""Names, shapes and types that every module shares.

Glossary (the papers' symbols, spelled the same everywhere):

  x0       data, [B, ...], scaled to standard deviation sigma_d
  z        Gaussian noise of standard deviation sigma_d, [B, ...]
  t        TrigFlow time in [0, pi/2], [B]; 0 is data, pi/2 is noise
  xt       cos(t) x0 + sin(t) z, [B, ...]
  F        raw network output, [B, ...]; sigma_d F estimates the velocity
  v        velocity dx_t/dt, [B, ...]
  f        consistency function cos(t) xt - sin(t) sigma_d F, [B, ...]
  d        estimate of x0 by a denoiser, [B, ...]: the same formula as f
  g        tangent cos(t) df/dt, [B, ...]
  r        warm-up of the tangent, a scalar in [0, 1]
  w        adaptive log weight w_phi(t), [B]
  sigma_d  standard deviation of the data
  cond     conditions of the samples: None, or a dict of arrays with leading [B]. Which
           ones there are is declared by the data set (`Dataset.cond`, see CondSpec)
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import numpy.typing as npt

Array = jax.Array
PRNGKey = jax.Array
PyTree = Any  # dicts, tuples and lists, nested, with arrays or their shapes as leaves
Params = PyTree
Batch = dict[str, PyTree]  # {"x0": float32 [B, ...], "cond": Cond}
Metrics = dict[str, Array]  # name -> scalar
Json = Any  # what JSON can hold: dicts, lists, strings, numbers, booleans and None
Cond = dict[str, Array] | None


class CondSpec(NamedTuple):
  """What one condition of a sample is.

  Example:
    >>> CondSpec((), np.int32, num_classes=10).batch(4)
    ShapeDtypeStruct(shape=(4,), dtype=int32)

  Attributes:
    shape: of one sample's value, without the batch axis.
    dtype: of the values.
    num_classes: number of classes of a categorical condition, whose values are
      integers from 0 to num_classes - 1, and -1 for "no class"; 0 for others.
  """

  shape: tuple[int, ...]
  dtype: npt.DTypeLike
  num_classes: int = 0

  def batch(self, batch_size: int) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of the values of a batch, [batch_size, *shape]."""
    return jax.ShapeDtypeStruct((batch_size, *self.shape), np.dtype(self.dtype))


CondSpecs = Mapping[str, CondSpec]  # name of a condition -> what it is


MAX_MESSAGE = 480  # characters; with "error: " before it, a line has fewer than 500


class UserError(Exception):
  """A mistake of the user: one line that names the field or file and the remedy.

  A message of more than 480 characters, which repeats what a file or a command holds,
  is shortened in its middle: its beginning names the field, and its end the remedy.
  """

  def __init__(self, message: object):
    """Stores the message as one line of bounded length.

    Args:
      message: a text, or another error, whose text is the message.
    """
    line = " ".join(str(message).splitlines())
    if len(line) > MAX_MESSAGE:
      line = f"{line[: MAX_MESSAGE * 2 // 3]} ... {line[5 - MAX_MESSAGE // 3 :]}"
    super().__init__(line)


class NetFn(Protocol):
  """A TrigFlow network with its parameters bound."""

  def __call__(self, x: Array, t: Array, cond: Cond) -> Array:
    """Returns F, [B, ...].

    Args:
      x: xt / sigma_d, [B, ...].
      t: TrigFlow times, float32 [B].
      cond: conditions, None or arrays with leading [B].
    """
    ...


class Network(NamedTuple):
  """What losses and jobs know of a model: pure functions of its parameters.

  Attributes:
    init: (key) -> params.
    apply: (params, x [B, ...], t [B], cond, *, key=None) -> F [B, ...], in
      float32 or wider; dropout is on if, and only if, a key is given.
    logvar: (params, t [B]) -> w_phi(t) [B]. It is separate from `apply`, so that no
      jvp of the network runs through it.
    normalize: (params) -> params whose weights have the norms that the network
      prescribes; applied after every update.
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
      step: int32 scalar, number of completed steps.
      frozen: parameters of the teacher, or None.
    """
    ...


# (x [N, ...], time [N], cond) -> d [N, ...], an estimate of x0: what samplers know of a
# model, whatever its parameterization.
Denoiser = Callable[[Array, Array, Cond], Array]
