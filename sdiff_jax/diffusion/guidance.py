"""Classifier-free guidance as a map from network to network."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from sdiff_jax.diffusion.trigflow import expand
from sdiff_jax.types import Array, Cond, NetFn, PRNGKey

NO_LABEL = -1


def empty_name(name: str) -> str:
  """Returns the name of the condition that holds what stands for no `name`.

  Args:
    name: of a condition without classes, such as "text".

  Example:
    >>> empty_name("text")
    'empty_text'
  """
  return f"empty_{name}"


def is_empty_name(name: str) -> bool:
  """Returns whether a condition holds what stands for the lack of another one.

  Networks do not take such conditions; `unlabeled` and `drop_labels` use them.

  Args:
    name: of a condition.

  Example:
    >>> is_empty_name("empty_text"), is_empty_name("text")
    (True, False)
  """
  return name.startswith(empty_name(""))


def unlabeled(cond: Cond) -> Cond:
  """Returns the conditions with what stands for no class and for no text.

  The label becomes -1, and every condition X for which there is one "empty_X", such as
  the embedding of the empty caption, becomes that.

  Args:
    cond: conditions by name, with "label" [B], or others beside their empty ones.

  Raises:
    ValueError: there is neither.

  Example:
    >>> unlabeled({"label": jnp.array([3, 7])})["label"].tolist()
    [-1, -1]
    >>> text = {"text": jnp.ones((1, 2)), "empty_text": jnp.zeros((1, 2))}
    >>> unlabeled(text)["text"].tolist()
    [[0.0, 0.0]]
  """
  free = _free(cond)
  if not free:
    raise ValueError("guidance: needs data with classes or texts, to compare with none")
  return (cond or {}) | free


def _free(cond: Cond) -> dict[str, Array]:
  """Returns the conditions that can be left out -> what stands for their lack."""
  given = cond or {}
  free = {k: given[empty_name(k)] for k in given if empty_name(k) in given}
  if "label" in given:
    free["label"] = jnp.full_like(given["label"], NO_LABEL)
  return free


def with_scale(cond: Cond, scale: Array) -> dict[str, Array]:
  """Returns conditions with the guidance scale [B], for a network that takes it.

  Args:
    cond: conditions by name, each [B, ...].
    scale: of classifier-free guidance, [B].

  Example:
    >>> sorted(with_scale(None, jnp.ones(2)))
    ['guidance']
  """
  return (cond or {}) | {"guidance": scale}


def without_text(empty: Mapping[str, Array]) -> Callable[[Cond], Cond]:
  """Returns a map of conditions that gives all samples the same text, or no class.

  Args:
    empty: what the empty text or a negative prompt is encoded as, by name, such as
      "text" [L, E] and "pooled" [P]; or "label" [].

  Returns:
    Conditions with "text" [B, L, E], ... -> the same with `empty`.

  Example:
    >>> free = without_text({"text": jnp.zeros((4, 8))})
    >>> free({"text": jnp.ones((2, 4, 8))})["text"].shape
    (2, 4, 8)
  """

  def free(cond: Cond) -> Cond:
    shapes = {name: x.shape for name, x in (cond or {}).items()}
    return (cond or {}) | {
      name: jnp.broadcast_to(x[None], shapes[name]) for name, x in empty.items()
    }

  return free


def classifier_free(
  net: NetFn, scale: Array | float, free: Callable[[Cond], Cond] = unlabeled
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

  Example:
    >>> def net(x, t, cond):
    ...   return x * (1 + cond["label"].astype(x.dtype))[:, None]
    >>> guided = classifier_free(net, 2.0)
    >>> guided(jnp.ones((1, 2)), jnp.ones(1), {"label": jnp.array([1])}).tolist()
    [[4.0, 4.0]]
  """

  def guided(x: Array, t: Array, cond: Cond) -> Array:
    # Each sample beside its twin, so that a batch over devices stays where it is.
    F = net(_pair(x, x), _pair(t, t), jax.tree.map(_pair, cond, free(cond)))
    F_c, F_u = jnp.moveaxis(F.reshape(x.shape[0], 2, *F.shape[1:]), 1, 0)
    s = jnp.broadcast_to(jnp.asarray(scale, F.dtype), t.shape)
    return F_u + expand(s, F_u) * (F_c - F_u)

  return guided


def autoguided(net: NetFn, weak: NetFn, scale: float) -> NetFn:
  """Returns F_weak + scale (F - F_weak) (Karras et al., arXiv:2406.02507).

  Args:
    net: the network to guide.
    weak: a worse one of the same data: smaller, or less trained.
    scale: of the guidance; 1 is none.

  Example:
    >>> guided = autoguided(lambda x, t, cond: 2 * x, lambda x, t, cond: x, 3.0)
    >>> guided(jnp.ones(2), jnp.ones(2), None).tolist()
    [4.0, 4.0]
  """

  def guided(x: Array, t: Array, cond: Cond) -> Array:
    from_weak = weak(x, t, cond)
    return from_weak + scale * (net(x, t, cond) - from_weak)

  return guided


def _pair(a: Array, b: Array) -> Array:
  return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def drop_labels(key: PRNGKey, cond: Cond, rate: float) -> Cond:
  """Returns the conditions of `unlabeled` for each sample with probability `rate`.

  Args:
    key: random key.
    cond: conditions by name; those that cannot be left out are returned unchanged.
    rate: probability, in [0, 1].

  Example:
    >>> cond = {"label": jnp.array([3, 7])}
    >>> drop_labels(jax.random.key(0), cond, 1.0)["label"].tolist()
    [-1, -1]
  """
  free = _free(cond)
  if cond is None or rate == 0 or not free:
    return cond
  drop = jax.random.bernoulli(key, rate, next(iter(free.values())).shape[:1])
  return cond | {
    name: jnp.where(expand(drop, cond[name]), without, cond[name])
    for name, without in free.items()
  }


def sample_scale(key: PRNGKey, t: Array, cond: Cond, scales: tuple[float, ...]) -> Cond:
  """Returns the conditions with a guidance scale for each sample.

  Args:
    key: random key.
    t: TrigFlow times, [B].
    cond: conditions of the data.
    scales: (low, high), between which the scale is uniform; () returns `cond`.

  Example:
    >>> cond = sample_scale(jax.random.key(0), jnp.ones(3), {}, (1.0, 2.0))
    >>> cond["guidance"].shape
    (3,)
  """
  if not scales:
    return cond
  low, high = scales
  return (cond or {}) | {
    "guidance": jax.random.uniform(key, t.shape, t.dtype, low, high)
  }


def at_sampled_scale(net: NetFn, free: Callable[[Cond], Cond] = unlabeled) -> NetFn:
  """Returns a network that applies guidance at the scale in its conditions.

  Conditions with a scale (see `sample_scale`) give F_u + scale (F_c - F_u), where F_u and
  F_c are not told the scale. Without one, the network is `net`.

  Args:
    net: conditional network that knows what `free` returns, such as the label -1.
    free: conditions -> those of F_u.

  Example:
    >>> net = at_sampled_scale(lambda x, t, cond: x)
    >>> net(jnp.ones((1, 2)), jnp.ones(1), None).tolist()
    [[1.0, 1.0]]
  """

  def guided(x: Array, t: Array, cond: Cond) -> Array:
    if cond is None or "guidance" not in cond:
      return net(x, t, cond)
    rest = {k: v for k, v in cond.items() if k != "guidance"}
    return classifier_free(net, cond["guidance"], free)(x, t, rest)

  return guided
