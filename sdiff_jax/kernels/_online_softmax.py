"""Online softmax: one block of attention, for all kernels and the chunked version.

Scores of a block are s = scale q k^T. Softmax over all keys is accumulated block by block
with a running maximum m of the scores, and sums that are rescaled by e^(m_old - m_new)
when it changes (arXiv:2205.14135). Its jvp needs two more sums (arXiv:2410.11081, F):

  l = sum e^(s - m)           O = sum e^(s - m) v
  mu = sum e^(s - m) ds       C = sum e^(s - m) (dv + ds v),   ds = scale (dq k + q dk)

  o = O / l     do = C / l - (mu / l) o     lse = m + ln l     dlse = mu / l

Reverse mode needs no running maximum, since lse is known. For cotangents g of o and h of
lse,

  p = e^(s - lse)     b = p (g v - g o + h)
  q_bar = scale b k   k_bar = scale b q   v_bar = p g

Arrays are q [..., Lq, size], k and v [..., Lk, size], sums and maxima over keys
[..., Lq, 1] in float32 or wider; `keep` is a boolean mask of the scores, or None.
"""

import jax
import jax.numpy as jnp

from sdiff_jax.types import Array

LOWEST = -1e30  # score of a masked key; finite, to avoid inf - inf


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """Returns the type of scores and sums: float32, or the type itself if wider."""
  return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def dot(a: Array, b: Array, over: str, dtype: jnp.dtype) -> Array:
  """Returns a b^T, a sum over the "size", or a b, a sum over the "keys"."""
  last = b.ndim - 1 if over == "size" else b.ndim - 2
  batch = tuple(range(a.ndim - 2))
  dims = (((a.ndim - 1,), (last,)), (batch, batch))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)


def scores(q: Array, k: Array, keep: Array | None, scale: float) -> Array:
  """Returns scale q k^T, LOWEST where `keep` is False, [..., Lq, Lk]."""
  s = dot(q, k, "size", accumulation_dtype(q.dtype)) * scale
  return s if keep is None else jnp.where(keep, s, LOWEST)


def start(q: Array, size: int, tangent: bool) -> tuple[Array, ...]:
  """Returns the initial sums, (m, l, O) and, with a tangent, (mu, C)."""
  dtype = accumulation_dtype(q.dtype)
  column, row = (*q.shape[:-1], 1), (*q.shape[:-1], size)
  like = jnp.zeros_like
  zero = like(q, dtype, shape=column)
  sums = (jnp.full_like(zero, LOWEST), zero, like(q, dtype, shape=row))
  return (*sums, zero, like(q, dtype, shape=row)) if tangent else sums


def update(
  sums: tuple[Array, ...],
  qkv: tuple[Array, Array, Array],
  dqkv: tuple[Array, Array, Array] | None,
  keep: Array | None,
  scale: float,
) -> tuple[Array, ...]:
  """Returns the sums after one more block of keys.

  Args:
    sums: as `start` returns them.
    qkv: queries, and keys and values of the block.
    dqkv: their tangents, or None.
    keep: mask of the scores of the block, or None.
    scale: factor of the scores.
  """
  q, k, v = qkv
  m, l, O, *tangent = sums
  dtype = m.dtype
  s = scores(q, k, keep, scale)
  m_new = jnp.maximum(m, jnp.max(s, -1, keepdims=True))
  p = jnp.exp(s - m_new)
  if keep is not None:  # s = m for a query all of whose keys are masked
    p = jnp.where(keep, p, 0)
  a = jnp.exp(m - m_new)
  weights = p.astype(v.dtype)
  l = a * l + jnp.sum(p, -1, keepdims=True)
  O = a * O + dot(weights, v, "keys", dtype)
  if dqkv is None:
    return m_new, l, O
  dq, dk, dv = dqkv
  mu, C = tangent
  ds = (dot(dq, k, "size", dtype) + dot(q, dk, "size", dtype)) * scale
  r = p * ds
  mu = a * mu + jnp.sum(r, -1, keepdims=True)
  C = a * C + dot(weights, dv, "keys", dtype) + dot(r.astype(v.dtype), v, "keys", dtype)
  return m_new, l, O, mu, C


def finish(sums: tuple[Array, ...]) -> tuple[Array, ...]:
  """Returns (o, lse) and, with a tangent, (do, dlse); 0 for queries without keys."""
  m, l, O, *tangent = sums
  l = jnp.where(l == 0, 1, l)
  o, lse = O / l, m + jnp.log(l)
  if not tangent:
    return o, lse
  mu, C = tangent
  return o, lse, C / l - (mu / l) * o, mu / l


def kept(
  shape: tuple[int, int],
  i: Array,
  j: Array,
  Lk: int,
  *,
  causal: bool,
  counts: Array | None = None,
  query_axis: int = 0,
) -> Array | None:
  """Returns the mask of the scores of a block of queries and one of keys, or None.

  Args:
    shape: of the scores.
    i: number of the block of queries.
    j: number of the block of keys.
    Lk: number of keys; those above are padding.
    causal: whether a query sees no later keys.
    counts: mask of the keys, of `shape`; None for all keys.
    query_axis: 0 for queries as rows, 1 for keys as rows.
  """
  block_q, block_k = shape[query_axis], shape[1 - query_axis]
  keys = j * block_k + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
  keep = keys < Lk if Lk % block_k else None
  if causal:
    queries = i * block_q + jax.lax.broadcasted_iota(jnp.int32, shape, query_axis)
    before = keys <= queries
    keep = before if keep is None else keep & before
  if counts is not None:
    keep = counts if keep is None else keep & counts
  return keep


def delta(o: Array, g: Array, h: Array) -> Array:
  """Returns g o - h of each query, [..., Lq, 1], of `backward`."""
  product = g.astype(h.dtype) * o.astype(h.dtype)
  return jnp.sum(product, -1, keepdims=True) - h


def backward(
  rows: tuple[Array, Array],
  columns: tuple[Array, Array],
  lse: Array,
  delta: Array,
  keep: Array | None,
  scale: float,
) -> tuple[Array, Array]:
  """Returns (p, scale b) of a block, of rows x columns, in the type of the operands.

  Args:
    rows: (q, g) for queries as rows, or (k, v) for keys as rows.
    columns: the other of the two.
    lse: log-sum-exps of the queries, [..., Lq, 1], or [..., 1, Lq] for keys as rows.
    delta: that of `delta`, of the same shape.
    keep: mask of the scores, or None.
    scale: factor of the scores.
  """
  p = jnp.exp(scores(rows[0], columns[0], keep, scale) - lse)
  if keep is not None:  # s = lse for a query all of whose keys are masked
    p = jnp.where(keep, p, 0)
  b = p * (dot(rows[1], columns[1], "size", lse.dtype) - delta)
  return p.astype(rows[0].dtype), (b * scale).astype(rows[0].dtype)
