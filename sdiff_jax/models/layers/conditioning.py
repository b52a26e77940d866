"""Embeddings of the time and of a network's conditions, by their specs.

A condition is embedded by what it is (`CondSpec`), under the name that its data set gave
it: a categorical one through a table of its classes, in which -1 stands for no class; a
scalar through positional features and a linear layer that starts at zero; an array
through a linear layer of its numbers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.models.layers import common
from sdiff_jax.models.layers import magnitude_preserving as mp
from sdiff_jax.types import Array, Cond, CondSpec, CondSpecs

# The conditions of a network, in the order in which they are embedded.
Conditions = tuple[tuple[str, CondSpec], ...]

GUIDANCE = "guidance"  # the scale of classifier-free guidance, as an input
CATEGORICAL, SCALAR, ARRAY = range(3)
# Names of other layers of the embeddings, which no condition can have.
RESERVED = {"time", "out", "noise", "fourier", "frequencies", "layer0", "layer1"}

xavier_dense = nn.initializers.xavier_uniform()


def kind_of(name: str, spec: CondSpec) -> int:
  """Returns how a condition is embedded: CATEGORICAL, SCALAR or ARRAY.

  Example:
    >>> kind_of("angle", CondSpec((), np.float32)) == SCALAR
    True

  Raises:
    ValueError: it is none of these.
  """
  dtype = np.dtype(spec.dtype)
  if spec.num_classes:
    if spec.shape or dtype.kind not in "iu":
      raise ValueError(
        f"cond: {name!r} has classes, but is {dtype} {spec.shape}; use an integer for "
        "each sample"
      )
    return CATEGORICAL
  if not (jnp.issubdtype(dtype, jnp.floating) or dtype.kind == "b"):
    raise ValueError(
      f"cond: {name!r} is {dtype} {spec.shape}; networks embed floats, booleans, and "
      "integers with num_classes"
    )
  return ARRAY if spec.shape else SCALAR


def conditions(cond: CondSpecs, *, guidance: bool = False) -> Conditions:
  """Returns the conditions of a network, in the order in which they are embedded.

  Example:
    >>> specs = {"state": CondSpec((3,), "float32"), "class": CondSpec((), "int32", 2)}
    >>> [name for name, _ in conditions(specs, guidance=True)]
    ['class', 'guidance', 'state']

  Args:
    cond: conditions of the data set.
    guidance: whether the network takes the scale of classifier-free guidance as well.

  Raises:
    ValueError: a condition cannot be embedded, or has the name of another layer.
  """
  specs = dict(cond)
  if guidance:
    specs[GUIDANCE] = CondSpec((), np.float32)
  for name in specs.keys() & RESERVED:
    raise ValueError(f"cond: {name!r} is the name of a layer; use another name")
  return tuple(sorted(specs.items(), key=lambda item: kind_of(*item)))


def value_of(cond: Cond, name: str) -> Array:
  """Returns the values of a condition.

  Raises:
    ValueError: they are missing.
  """
  if cond is None or name not in cond:
    raise ValueError(f"cond: has no {name!r}, which the network is conditioned on")
  return cond[name]


def class_weights(classes: Array, num_classes: int, dtype: jnp.dtype) -> Array:
  """Returns num_classes^0.5 times the weights of the classes, [B, num_classes].

  Example:
    >>> class_weights(jnp.array([1, -1]), 4, jnp.float32).tolist()
    [[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]

  Args:
    classes: class of each sample, -1 for none, int [B], or weights of the classes,
      float [B, num_classes].
    num_classes: number of classes.
    dtype: dtype of the result, if `classes` are integers.
  """
  if jnp.issubdtype(classes.dtype, jnp.integer):
    classes = jax.nn.one_hot(classes, num_classes, dtype=dtype)
  return classes * num_classes**0.5


def linear_from_zero(width: int, name: str) -> nn.Dense:
  """Returns a linear layer that starts at zero: what it is added to starts without it.

  A student with a further input so starts as its teacher without that input.
  """
  zeros = nn.initializers.zeros
  return common.Dense(width, use_bias=False, kernel_init=zeros, name=name)


def _numbers(value: Array, dtype: jnp.dtype) -> Array:
  """Returns an array condition [B, ...] as float [B, N]."""
  flat = value.reshape(value.shape[0], -1)
  return flat.astype(dtype) if flat.dtype == bool else flat


def _scalar_features(value: Array, width: int, dtype: jnp.dtype) -> Array:
  """Returns positional features [B, width] of a scalar condition [B]."""
  return common.positional(value.astype(dtype) if value.dtype == bool else value, width)


def embed(
  name: str, spec: CondSpec, value: Array, width: int, dtype: jnp.dtype
) -> Array:
  """Returns the embedding of a condition, [B, width]; creates the layer `name`.

  Args:
    name: name of the condition.
    spec: what it is.
    value: values, [B, *spec.shape].
    width: features of the embedding.
    dtype: dtype of the embedding.
  """
  kind = kind_of(name, spec)
  if kind == CATEGORICAL:
    weights = class_weights(value, spec.num_classes, dtype)
    return common.Dense(width, use_bias=False, name=name)(weights)
  if kind == SCALAR:
    return linear_from_zero(width, name)(_scalar_features(value, width, dtype))
  return common.Dense(width, name=name)(_numbers(value, dtype))


class Embedding(nn.Module):
  """Embeds the time and conditions as [B, width], by the layers of `embed`.

  The time enters as it is, c_noise(t) = t, by features of the `kind` "positional" or
  "fourier".
  """

  width: int
  conditions: Conditions
  dtype: jnp.dtype
  kind: str = "positional"

  @nn.compact
  def __call__(self, t: Array, cond: Cond) -> Array:
    features = common.fourier if self.kind == "fourier" else common.positional
    emb = common.Dense(self.width, name="time")(features(t, self.width))
    for name, spec in self.conditions:
      emb += embed(name, spec, value_of(cond, name), self.width, emb.dtype)
    emb = common.Dense(self.width, name="out")(nn.silu(emb))
    return nn.silu(emb).astype(self.dtype)


class EDM2Embedding(nn.Module):
  """EDM2's magnitude-preserving embedding, in float32 or wider, [B, width].

  Classes enter as in EDM2. Scalars and arrays, which EDM2 does not have, enter through
  linear layers that start at zero, and so have no norm to keep. `balance` is the weight
  of a class beside what precedes it.
  """

  features: int
  width: int
  kind: str
  conditions: Conditions
  balance: float = 0.5

  @nn.compact
  def __call__(self, t: Array, cond: Cond) -> Array:
    if self.kind == "fourier":
      features = mp.Fourier(self.features, name="fourier")(t)
    else:
      features = common.positional(t, self.features) * 2**0.5
    emb = mp.Linear(self.width, name="noise")(features)
    for name, spec in self.conditions:
      value, kind = value_of(cond, name), kind_of(name, spec)
      if kind == CATEGORICAL:
        weights = class_weights(value, spec.num_classes, emb.dtype)
        emb = mp.add(emb, mp.Linear(self.width, name=name)(weights), self.balance)
      elif kind == SCALAR:
        features = _scalar_features(value, self.features, emb.dtype)
        features *= (2 / self.features) ** 0.5
        emb += linear_from_zero(self.width, name)(features)
      else:
        emb += linear_from_zero(self.width, name)(_numbers(value, emb.dtype))
    return mp.silu(emb)


class EDMEmbedding(nn.Module):
  """The embedding of EDM's DDPM++ and NCSN++, [B, width].

  Classes and augmentation labels enter as in EDM, and add nothing where they are
  absent; scalars and arrays by the layers of `embed`.
  """

  features: int
  width: int
  kind: str
  conditions: Conditions
  augment: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, t: Array, cond: Cond) -> Array:
    size = self.features
    if self.kind == "positional":
      waves = common.positional(t, size)
    else:
      normal = nn.initializers.normal(common.FOURIER_SCALE)
      # A constant among the parameters, since a published network brings its own.
      rows = jax.lax.stop_gradient(self.param("frequencies", normal, (size // 2,)))
      phases = 2 * np.pi * t[:, None] * rows[None]
      waves = jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=-1)
    emb = jnp.roll(waves, size // 2, axis=-1)  # sines first
    classes = [c for c in self.conditions if kind_of(*c) == CATEGORICAL]
    for name, spec in classes:
      weights = class_weights(value_of(cond, name), spec.num_classes, emb.dtype)
      emb += self._dense(size, use_bias=False, name=name)(weights)
      bias = self.param(f"{name}_bias", nn.initializers.zeros, (size,))
      emb += bias[None].astype(emb.dtype)
    if self.augment:
      zeros = jnp.zeros((t.shape[0], self.augment), emb.dtype)
      emb += self._dense(size, use_bias=False, name="augment")(
        (cond or {}).get("augment", zeros)
      )
    for name, spec in self.conditions[len(classes) :]:
      emb += embed(name, spec, value_of(cond, name), size, emb.dtype)
    emb = nn.silu(self._dense(self.width, name="layer0")(emb))
    emb = nn.silu(self._dense(self.width, name="layer1")(emb))
    return emb.astype(self.dtype)

  def _dense(self, width: int, **options: object) -> nn.Dense:
    return common.Dense(width, kernel_init=xavier_dense, **options)


def append(emb: Array, cond: Cond, conditions: Conditions) -> Array:
  """Returns the embedding of the time with conditions, as Diffusion Policy has them.

  Arrays are concatenated; classes and scalars, which Diffusion Policy does not have, are
  added first by the layers of `embed`.

  Args:
    emb: embedding of the time, [B, E].
    cond: conditions.
    conditions: what they are.

  Returns:
    [B, E + numbers of all arrays].
  """
  width = emb.shape[-1]
  for name, spec in conditions:
    value = value_of(cond, name)
    if kind_of(name, spec) == ARRAY:
      emb = jnp.concatenate(
        [emb, _numbers(value, emb.dtype).astype(emb.dtype)], axis=-1
      )
    else:
      emb += embed(name, spec, value, width, emb.dtype)
  return emb
