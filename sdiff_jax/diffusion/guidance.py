"""Classifier-free guidance as a map from network to network."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdiff_jax.diffusion.trigflow import expand
from sdiff_jax.types import Array, Cond, NetFn, PRNGKey

NO_LABEL = -1


def unlabelled(cond: Cond) -> Cond:
  """Returns the conditions with the label of no class.

  Raises:
    ValueError: there is no label.
  """
  if not cond or "label" not in cond:
    raise ValueError("guidance: needs data with classes, to compare with no class")
  return cond | {"label": jnp.full_like(cond["label"], NO_LABEL)}


def with_scale(cond: Cond, scale: Array) -> dict[str, Array]:
  """Returns conditions with the guidance scale [B], for a network that takes it.

  Example:
    >>> sorted(with_scale(None, jnp.ones(2)))
    ['guidance']
  """
  return (cond or {}) | {"guidance": scale}


def without_text(empty: Array) -> Callable[[Cond], Cond]:
  """Returns a map of conditions that puts one text [L, E] in place of each sample's.

  The text is an empty one, or a negative prompt.
  """

  def free(cond: Cond) -> Cond:
    shape = (cond or {})["text"].shape
    return (cond or {}) | {"text": jnp.broadcast_to(empty[None], shape)}

  return free


def classifier_free(
  net: NetFn, scale: Array | float, free: Callable[[Cond], Cond] = unlabelled
) -> NetFn:
  """Returns F_u + scale (F_c - F_u), both halves in one call of the network.

  Args:
    net: conditional network that knows what `free` returns, such as the label -1
      (trained with `drop_labels`); what it predicts may be F, eps, v or x0.
    scale: a scalar or one scale a sample [B]; 1 is no guidance.
    free: conditions -> those of F_u.

  Returns:
    A NetFn with the same signature (Ho & Salimans, arXiv:2207.12598, in the
    convention in which 1 is the conditional model).
  """

  def guided(x: Array, t: Array, cond: Cond) -> Array:
    # Each sample beside its twin, so that a batch over devices stays where it is.
    F = net(_pair(x, x), _pair(t, t), jax.tree.map(_pair, cond, free(cond)))
    F_c, F_u = jnp.moveaxis(F.reshape(len(x), 2, *F.shape[1:]), 1, 0)
    s = jnp.broadcast_to(jnp.asarray(scale, F.dtype), t.shape)
    return F_u + expand(s, F_u) * (F_c - F_u)

  return guided


def _pair(a: Array, b: Array) -> Array:
  return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def drop_labels(key: PRNGKey, cond: Cond, rate: float) -> Cond:
  """Replaces each label by -1 with probability `rate`, if there are labels."""
  if cond is None or rate == 0 or "label" not in cond:
    return cond
  drop = jax.random.bernoulli(key, rate, cond["label"].shape)
  return cond | {"label": jnp.where(drop, NO_LABEL, cond["label"])}


def sample_scale(key: PRNGKey, t: Array, cond: Cond, scales: tuple[float, ...]) -> Cond:
  """Returns the conditions with a guidance scale for each sample.

  Args:
    key: random key.
    t: TrigFlow times, [B].
    cond: conditions of the data.
    scales: (low, high), between which the scale is uniform; () returns `cond`.
  """
  if not scales:
    return cond
  low, high = scales
  return (cond or {}) | {
    "guidance": jax.random.uniform(key, t.shape, t.dtype, low, high)
  }


def at_sampled_scale(net: NetFn) -> NetFn:
  """Returns a network that applies guidance at the scale in its conditions.

  Conditions with a scale (see `sample_scale`) give F_u + scale (F_c - F_u), where F_u and
  F_c are not told the scale. Without one, the network is `net`.
  """

  def guided(x: Array, t: Array, cond: Cond) -> Array:
    if cond is None or "guidance" not in cond:
      return net(x, t, cond)
    rest = {k: v for k, v in cond.items() if k != "guidance"}
    return classifier_free(net, cond["guidance"])(x, t, rest)

  return guided
