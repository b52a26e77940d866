"""Attention over blocks of queries and keys in plain JAX, in O(L) memory.

Arrays are [B, heads, L, size], `mask` (keys that are attended to) bool [B, Lk] or None;
log-sum-exps lse [B, heads, L, 1]. `lax.scan` iterates over the blocks, so that one block
of scores exists at a time.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdiff_jax.kernels import _online_softmax
from sdiff_jax.types import Array

LANES = 128  # of a register of a TPU; blocks are multiples of it
# Of a query of the kernels for GPUs: 1,024 would exceed shared memory.
MAX_ROW_BYTES = 512
GPU_TYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


class AttentionSpec(NamedTuple):
  """Static parameters of attention.

  Attributes:
    causal: whether query i attends to keys 0 to i only.
    scale: factor of the scores.
    block_q: largest number of queries of a block.
    block_k: largest number of keys of a block.
  """

  causal: bool
  scale: float
  block_q: int
  block_k: int


def gpu_supports(q: Array) -> bool:
  """Returns whether the kernels for GPUs, slow to import, support such queries."""
  return q.dtype in GPU_TYPES and q.shape[-1] * q.dtype.itemsize <= MAX_ROW_BYTES


def _even(L: int, block: int) -> int:
  """Returns the smallest block size with the same number of blocks."""
  return -(-L // -(-L // block))


def _blocks(x: Array, block: int) -> Array:
  """Splits [B, heads, L, n], zero-padded, into [L / block, B, heads, block, n]."""
  B, heads, L, n = x.shape
  count = -(-L // block)
  x = jnp.pad(x, ((0, 0), (0, 0), (0, count * block - L), (0, 0)))
  return jnp.moveaxis(x.reshape(B, heads, count, block, n), 2, 0)


def _join(x: Array, L: int) -> Array:
  """Joins blocks [count, B, heads, block, n] to [B, heads, L, n]."""
  x = jnp.moveaxis(x, 0, 2)
  return x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :L]


def _keep(
  spec: AttentionSpec, Lk: int, i: Array, j: Array, mask: Array | None
) -> Array | None:
  """Returns the mask of the scores of block (i, j), [B or 1, 1, block_q, block_k]."""
  keys = j * spec.block_k + jnp.arange(spec.block_k)[None, :]
  queries = i * spec.block_q + jnp.arange(spec.block_q)[:, None]
  keep = jnp.broadcast_to(keys < Lk, (spec.block_q, spec.block_k))
  if spec.causal:
    keep &= keys <= queries
  keep = keep[None, None]
  if mask is not None:
    keep &= mask
  elif not spec.causal and Lk % spec.block_k == 0:
    return None
  return keep


def _map_blocks(
  spec: AttentionSpec,
  per_query: tuple,
  per_key: tuple,
  mask: Array | None,
  body: Callable,
) -> tuple[Array, ...]:
  """Calls body(query arrays, loop over keys) for each block of queries.

  The loop is (step, sums) -> sums, with step(sums, key arrays, keep) -> sums.
  """
  Lq, Lk = per_query[0].shape[2], per_key[0].shape[2]
  spec = spec._replace(block_q=_even(Lq, spec.block_q), block_k=_even(Lk, spec.block_k))
  query_blocks = [_blocks(x, spec.block_q) for x in per_query]
  key_blocks = [_blocks(x, spec.block_k) for x in per_key]
  if mask is not None:
    mask = jnp.moveaxis(_blocks(mask[:, None, :, None], spec.block_k), -2, -1)
  indices_q = jnp.arange(len(query_blocks[0]))
  indices_k = jnp.arange(len(key_blocks[0]))

  def one(inputs: tuple) -> tuple[Array, ...]:
    i, queries = inputs

    def over_keys(step: Callable, sums: tuple) -> tuple:
      def scan_step(sums: tuple, inputs: tuple) -> tuple:
        j, keys, block = inputs
        return step(sums, keys, _keep(spec, Lk, i, j, block)), None

      return jax.lax.scan(scan_step, sums, (indices_k, key_blocks, mask))[0]

    return body(queries, over_keys)

  outs = jax.lax.map(one, (indices_q, query_blocks))
  return tuple(_join(x, Lq) for x in outs)


def one_pass(
  spec: AttentionSpec, qkv: tuple, mask: Array | None, dqkv: tuple | None = None
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
      return _online_softmax.update(sums, (q, k, v), directions, keep, spec.scale)

    sums = over_keys(step, _online_softmax.start(q, v.shape[-1], tangent))
    # o and do have the type of the values, log-sum-exps keep theirs.
    return tuple(
      x.astype(v.dtype) if n % 2 == 0 else x
      for n, x in enumerate(_online_softmax.finish(sums))
    )

  return _map_blocks(spec, per_query, per_key, mask, body)


def tangent(
  spec: AttentionSpec,
  qkv: tuple,
  mask: Array | None,
  o: Array,
  lse: Array,
  dqkv: tuple,
) -> tuple[Array, Array]:
  """Returns (do, dlse) at known o and lse, linear in the tangents of q, k and v.

    do = sum p (dv + ds v) - dlse o,   dlse = sum p ds,   p = e^(s - lse)

  The transposed loop recomputes each block, as the backward pass of FlashAttention.
  """
  dtype = lse.dtype
  # Cotangents are accumulated over blocks in float32; products within a block are not.
  directions = [x.astype(dtype) for x in dqkv]
  narrow = qkv[0].dtype

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def block(queries: tuple, keys: tuple, keep: Array | None) -> tuple:
    (q, lse, dq), (k, v, dk, dv) = queries, keys
    dq, dk, dv = (x.astype(narrow) for x in (dq, dk, dv))
    p = jnp.exp(_online_softmax.scores(q, k, keep, spec.scale) - lse)
    if keep is not None:
      p = jnp.where(keep, p, 0)
    ds = _online_softmax.dot(dq, k, "size", narrow) + _online_softmax.dot(
      q, dk, "size", narrow
    )
    r = p * (ds.astype(dtype) * spec.scale)
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
  return _map_blocks(spec, (q, o, lse, dq), (k, v, dk, dv), mask, body)


def backward(
  spec: AttentionSpec,
  qkv: tuple,
  mask: Array | None,
  o: Array,
  lse: Array,
  g: Array,
  h: Array,
) -> tuple[Array, Array, Array]:
  """Returns the cotangents of q, k and v for those of o and lse, g and h."""

  def linear(*dqkv: Array) -> tuple[Array, Array]:
    return tangent(spec, qkv, mask, o, lse, dqkv)

  return jax.linear_transpose(linear, *qkv)((g, h))
