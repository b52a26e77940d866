"""Low-rank adapters of the weights of a network (LoRA, arXiv:2106.09685).

The parameters of a network with adapters are {"net": W, "lora": {... {"a": A, "b": B}}},
and it computes with W + (alpha / rank) A B, so derivatives of any kind pass through it.
W is frozen: its gradient is zero, and the optimizer has no state for it.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.types import Array, Cond, Network, Params, PRNGKey, PyTree

NET, LORA = "net", "lora"
A, B = "a", "b"
WEIGHTS = ("kernel", "weight")  # names of leaves that adapters may be added to
STACKED = "blocks"  # our networks' loop over blocks, whose weights have a first axis


def init(key: PRNGKey, net: Params, *, rank: int, targets: str) -> Params:
  """Returns adapters whose product is zero: A is normal of variance 1 / in, B is zero.

  A weight [in, out] has A [in, rank] and B [rank, out]; that of a convolution,
  [h, w, in, out], has A [h, w, in, rank]; and one of several heads, [in, heads, size],
  has B [rank, heads, size]. Weights of blocks in a loop have one more axis, of blocks.

  Args:
    key: random key.
    net: parameters of the network, nested dicts.
    rank: of the products.
    targets: regular expression, found in the names "down/attn/to_q/kernel" of the
      weights that get adapters.

  Raises:
    ValueError: no weight has such a name, or it is no regular expression.

  Example:
    >>> net = {"to_q": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    >>> adapters = init(jax.random.key(0), net, rank=1, targets="to_q")
    >>> jax.tree.map(jnp.shape, adapters)
    {'to_q': {'kernel': {'a': (3, 1), 'b': (1, 2)}}}
  """
  adapters: Params = {}
  try:
    pattern = re.compile(targets)
  except re.error as error:
    raise ValueError(f"targets={targets!r}: no regular expression: {error}") from None
  for i, (path, w) in enumerate(_weights(net)):
    if not pattern.search("/".join(path)):
      continue
    loop = w.shape[: STACKED in path]
    rows, columns = _shapes(w.shape[len(loop) :])
    shape = (*loop, *rows, rank)
    normal = jax.random.normal(jax.random.fold_in(key, i), shape, w.dtype)
    pair = {
      A: normal * float(np.prod(rows)) ** -0.5,
      B: jnp.zeros((*loop, rank, *columns), w.dtype),
    }
    inner = adapters
    for k in path[:-1]:
      inner = inner.setdefault(k, {})
    inner[path[-1]] = pair
  if not adapters:
    names = ["/".join(path) for path, _ in _weights(net)]
    raise ValueError(
      f"targets={targets!r}: no weight has such a name; one is {names[0] if names else ''}"
    )
  return adapters


def merge(net: Params, adapters: Params, scale: float) -> Params:
  """Returns the parameters W + scale A B.

  Args:
    net: parameters of the network.
    adapters: of some of its weights.
    scale: alpha / rank.

  Example:
    >>> adapters = {"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
    >>> merge({"kernel": jnp.ones((3, 2)), "bias": 0}, adapters, 0.5)["kernel"][0]
    Array([1.5, 1.5], dtype=float32)
  """
  return _merge(net, adapters, scale, product=_product)


def _merge(
  net: Params,
  adapters: Params,
  scale: float,
  product: Callable[[Array, Array], Array],
) -> Params:
  merged = dict(net)
  for name, inner in adapters.items():
    of_inner = jax.vmap(product) if name == STACKED else product
    if A in inner and not isinstance(inner[A], Mapping):
      w, change = net[name], of_inner(inner[A], inner[B])
      merged[name] = w + (scale * change).astype(w.dtype)
    else:
      merged[name] = _merge(net[name], inner, scale, of_inner)
  return merged


def _product(a: Array, b: Array) -> Array:
  return jnp.tensordot(a, b, 1, precision="highest")


def with_adapters(
  network: Network, *, rank: int, scale: float, targets: str
) -> Network:
  """Returns the network with adapters, whose own weights are frozen.

  Args:
    network: whose parameters are {"net": ..., ...}.
    rank: of the adapters.
    scale: alpha / rank, by which the products are multiplied.
    targets: see `init`.
  """

  def initial(key: PRNGKey) -> Params:
    params = network.init(key)
    adapters = init(jax.random.fold_in(key, 1), params[NET], rank=rank, targets=targets)
    return params | {LORA: adapters}

  def apply(
    params: Params, x: Array, t: Array, cond: Cond, *, key: PRNGKey | None = None
  ) -> Array:
    return network.apply(merged(params, scale), x, t, cond, key=key)

  return network._replace(init=initial, apply=apply, normalize=lambda params: params)


def merged(params: Params, scale: float) -> Params:
  """Returns the parameters of a network with adapters as those of one without.

  Args:
    params: {"net": ..., "lora": ..., ...}.
    scale: alpha / rank.
  """
  rest = {k: v for k, v in params.items() if k != LORA}
  net = jax.lax.stop_gradient(params[NET])
  return rest | {NET: merge(net, params[LORA], scale)}


def trainable(params: PyTree) -> PyTree:
  """Returns which parameters are trained: all but those beside adapters.

  Args:
    params: nested dicts; also of a network and of a copy of it, as VSD has them.

  Example:
    >>> trainable({"net": {"w": 1}, "lora": {"w": {"a": 1}}, "logvar": 1})
    {'net': {'w': False}, 'lora': {'w': {'a': True}}, 'logvar': True}
  """
  if not isinstance(params, Mapping):
    return jax.tree.map(lambda _: True, params)
  frozen = {NET} & params.keys() if LORA in params else set()
  return {
    k: jax.tree.map(lambda _: False, v) if k in frozen else trainable(v)
    for k, v in params.items()
  }


def _weights(
  net: Params, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Array]]:
  """Yields keys and values of the weights of a network that may get adapters."""
  for name, value in net.items():
    if isinstance(value, Mapping):
      yield from _weights(value, (*path, name))
    elif name in WEIGHTS and value.ndim > 1:
      yield (*path, name), value


def _shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the shapes of rows and columns of a weight."""
  split = 1 if len(shape) == 3 else len(shape) - 1
  return shape[:split], shape[split:]
