"""Attention over blocks of queries and keys in plain JAX, in O(L) memory.

Arrays are [B, heads, L, size], `mask` (which keys count) bool [B, Lk] or None; log-sums
lse [B, heads, L, 1]. `lax.scan` walks over the blocks, so that one block of scores
exists at a time.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdiff_jax.kernels import _online_softmax
from sdiff_jax.types import Array


class AttentionSpec(NamedTuple):
  """What is known before any array.

  Attributes:
    causal: whether query i meets the keys 0 to i alone.
    scale: factor of the scores.
    block_q: queries of a block, at most.
    block_k: keys of a block, at most.
  """

  causal: bool
  scale: float
  block_q: int
  block_k: int


def _even(L: int, block: int) -> int:
  """Returns the smallest block that makes no more of them."""
  return -(-L // -(-L // block))


def _blocks(x: Array, block: int) -> Array:
  """Returns [B, heads, L, n] as [L / block, B, heads, block, n], zeros at the end."""
  B, heads, L, n = x.shape
  count = -(-L // block)
  x = jnp.pad(x, ((0, 0), (0, 0), (0, count * block - L), (0, 0)))
  return jnp.moveaxis(x.reshape(B, heads, count, block, n), 2, 0)


def _whole(x: Array, L: int) -> Array:
  """Returns blocks [count, B, heads, block, n] as [B, heads, L, n]."""
  x = jnp.moveaxis(x, 0, 2)
  return x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :L]


def _keep(
  shape: AttentionSpec, Lk: int, i: Array, j: Array, mask: Array | None
) -> Array | None:
  """Returns which scores of block (i, j) count, [B or 1, 1, block_q, block_k]."""
  keys = j * shape.block_k + jnp.arange(shape.block_k)[None, :]
  queries = i * shape.block_q + jnp.arange(shape.block_q)[:, None]
  keep = jnp.broadcast_to(keys < Lk, (shape.block_q, shape.block_k))
  if shape.causal:
    keep &= keys <= queries
  keep = keep[None, None]
  if mask is not None:
    keep &= mask
  elif not shape.causal and Lk % shape.block_k == 0:
    return None
  return keep


def _walk(
  shape: AttentionSpec,
  per_query: tuple,
  per_key: tuple,
  mask: Array | None,
  body: Callable,
) -> tuple[Array, ...]:
  """Calls body(query arrays, loop over keys) for each block of queries.

  The loop is (step, sums) -> sums, with step(sums, key arrays, keep) -> sums.
  """
  Lq, Lk = per_query[0].shape[2], per_key[0].shape[2]
  shape = shape._replace(
    block_q=_even(Lq, shape.block_q), block_k=_even(Lk, shape.block_k)
  )
  rows = [_blocks(x, shape.block_q) for x in per_query]
  columns = [_blocks(x, shape.block_k) for x in per_key]
  if mask is not None:
    mask = jnp.moveaxis(_blocks(mask[:, None, :, None], shape.block_k), -2, -1)
  number_q, number_k = jnp.arange(len(rows[0])), jnp.arange(len(columns[0]))

  def one(inputs: tuple) -> tuple[Array, ...]:
    i, queries = inputs

    def over_keys(step: Callable, sums: tuple) -> tuple:
      def turn(sums: tuple, inputs: tuple) -> tuple:
        j, keys, block = inputs
        return step(sums, keys, _keep(shape, Lk, i, j, block)), None

      return jax.lax.scan(turn, sums, (number_k, columns, mask))[0]

    return body(queries, over_keys)

  outs = jax.lax.map(one, (number_q, rows))
  return tuple(_whole(x, Lq) for x in outs)


def one_pass(
  shape: AttentionSpec, qkv: tuple, mask: Array | None, dqkv: tuple | None = None
) -> tuple[Array, ...]:
  """Returns (o, lse) and, given tangents of q, k and v, (do, dlse)."""
  tangent = dqkv is not None
  q, k, v = qkv
  per_query, per_key = ((q, dqkv[0]), (k, v, *dqkv[1:])) if tangent else ((q,), (k, v))

  def body(queries: tuple, over_keys: Callable) -> tuple:
    q, *dq = queries

    def step(sums: tuple, keys: tuple, keep: Array | None) -> tuple:
      k, v, *dkv = keys
      directions = (*dq, *dkv) if tangent else None
      return _online_softmax.update(sums, (q, k, v), directions, keep, shape.scale)

    sums = over_keys(step, _online_softmax.start(q, v.shape[-1], tangent))
    # o and do in the type of the values, log-sums as they are
    return tuple(
      x.astype(v.dtype) if n % 2 == 0 else x
      for n, x in enumerate(_online_softmax.finish(sums))
    )

  return _walk(shape, per_query, per_key, mask, body)


def tangent(
  shape: AttentionSpec,
  qkv: tuple,
  mask: Array | None,
  o: Array,
  lse: Array,
  dqkv: tuple,
) -> tuple[Array, Array]:
  """Returns (do, dlse) at known o and lse: linear in the tangents of q, k and v.

  do = sum p (dv + ds v) - dlse o, dlse = sum p ds, p = e^(s - lse). Each block is
  recomputed in the transposed loop, which is the backward pass of FlashAttention.
  """
  dtype = lse.dtype
  # Sums over blocks of what flows back are wide, products within a block are not.
  directions = [x.astype(dtype) for x in dqkv]
  narrow = qkv[0].dtype

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def block(queries: tuple, keys: tuple, keep: Array | None) -> tuple:
    (q, lse, dq), (k, v, dk, dv) = queries, keys
    dq, dk, dv = (x.astype(narrow) for x in (dq, dk, dv))
    p = jnp.exp(_online_softmax.scores(q, k, keep, shape.scale) - lse)
    if keep is not None:
      p = jnp.where(keep, p, 0)
    ds = _online_softmax.dot(dq, k, "size", narrow) + _online_softmax.dot(
      q, dk, "size", narrow
    )
    r = p * (ds.astype(dtype) * shape.scale)
    C = _online_softmax.dot(p.astype(narrow), dv, "keys", narrow)
    C += _online_softmax.dot(r.astype(narrow), v, "keys", narrow)
    return jnp.sum(r, -1, keepdims=True), C.astype(dtype)

  def body(queries: tuple, over_keys: Callable) -> tuple:
    q, o, lse, dq = queries

    def step(sums: tuple, keys: tuple, keep: Array | None) -> tuple:
      mu, C = block((q, lse, dq), keys, keep)
      return sums[0] + mu, sums[1] + C

    mu, C = over_keys(step, (jnp.zeros_like(lse), jnp.zeros_like(o, dtype)))
    return (C - mu * o.astype(dtype)).astype(o.dtype), mu

  q, k, v = qkv
  dq, dk, dv = directions
  return _walk(shape, (q, o, lse, dq), (k, v, dk, dv), mask, body)
