"""Attention as Pallas kernels for NVIDIA GPUs: output and tangent, and the backward pass.

Arrays are [B, heads, L, size], `mask` (keys that are attended to) bool [B, Lk] or None;
log-sum-exps lse [B, heads, L, 1]. A program has one block of queries and iterates over
the keys, with the sums of `_online_softmax.update` in registers. The backward pass has
one kernel like that, for the queries, and one for the keys and values, whose programs
have one block of keys and iterate over the queries.

The kernels read and write [B, L, heads, size], the order that the arrays have in a
network: the compiler cancels the transpositions on both sides of a kernel.

It uses Pallas' Triton backend, which JAX deprecates from 0.12 on and which still works
there.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from sdiff_jax.kernels import _online_softmax
from sdiff_jax.kernels._chunked import MAX_ROW_BYTES, AttentionSpec
from sdiff_jax.kernels._pallas_tpu import cost, like
from sdiff_jax.types import Array

STAGES = 2


def _block(q: Array) -> int:
  """Returns the number of rows of a block, which registers and shared memory limit."""
  return 64 if q.shape[-1] * q.dtype.itemsize <= MAX_ROW_BYTES // 2 else 32


def _keep(
  spec: AttentionSpec,
  block: int,
  Lk: int,
  i: Array,
  j: Array,
  mask: Array | None,
  query_axis: int = 0,
) -> Array | None:
  """Returns the mask of the scores of query block i and key block j, or None."""
  shape, counts = (block, block), None
  if mask is not None:
    counts = jnp.broadcast_to(jnp.expand_dims(mask, query_axis), shape) != 0
  options = {"causal": spec.causal, "counts": counts, "query_axis": query_axis}
  return _online_softmax.kept(shape, i, j, Lk, **options)


def _kernel(
  *refs: jax.Ref, spec: AttentionSpec, Lk: int, block: int, tangent: bool, masked: bool
) -> None:
  """Computes one block of queries; refs are the inputs, then the outputs."""
  refs = list(refs)
  q_refs, k_refs, v_refs = ([refs.pop(0) for _ in range(1 + tangent)] for _ in range(3))
  mask_ref = refs.pop(0) if masked else None
  i = pl.program_id(2)
  q = [ref[...] for ref in q_refs]

  def step(j: Array, sums: tuple) -> tuple:
    here = pl.ds(j * block, block)
    k, v = ([ref[here, :] for ref in side] for side in (k_refs, v_refs))
    dqkv = (q[1], k[1], v[1]) if tangent else None
    keep = _keep(spec, block, Lk, i, j, mask_ref[here] if masked else None)
    return _online_softmax.update(sums, (q[0], k[0], v[0]), dqkv, keep, spec.scale)

  count = pl.cdiv(Lk, block)
  if spec.causal:
    count = jnp.minimum(i + 1, count)
  start = _online_softmax.start(q[0], q[0].shape[-1], tangent)
  outs = _online_softmax.finish(jax.lax.fori_loop(0, count, step, start))
  for ref, x in zip(refs, outs, strict=True):
    ref[...] = (x if ref.ndim == 2 else x.reshape(-1)).astype(ref.dtype)


def _queries_kernel(
  *refs: jax.Ref, spec: AttentionSpec, Lk: int, block: int, masked: bool
) -> None:
  """Computes the cotangent of one block of queries."""
  q_ref, g_ref, lse_ref, delta_ref, k_ref, v_ref, *mask_refs, out_ref = refs
  i, q, g = pl.program_id(2), q_ref[...], g_ref[...]
  lse, delta = lse_ref[...][:, None], delta_ref[...][:, None]

  def step(j: Array, total: Array) -> Array:
    here = pl.ds(j * block, block)
    k, v = k_ref[here, :], v_ref[here, :]
    keep = _keep(spec, block, Lk, i, j, mask_refs[0][here] if masked else None)
    _, b = _online_softmax.backward((q, g), (k, v), lse, delta, keep, spec.scale)
    return total + _online_softmax.dot(b, k, "keys", lse.dtype)

  count = pl.cdiv(Lk, block)
  if spec.causal:
    count = jnp.minimum(i + 1, count)
  total = jax.lax.fori_loop(0, count, step, jnp.zeros(q.shape, lse.dtype))
  out_ref[...] = total.astype(out_ref.dtype)


def _keys_kernel(
  *refs: jax.Ref, spec: AttentionSpec, Lk: int, block: int, masked: bool
) -> None:
  """Computes the cotangents of one block of keys and values."""
  q_ref, g_ref, lse_ref, delta_ref, k_ref, v_ref, *mask_refs, dk_ref, dv_ref = refs
  j, k, v = pl.program_id(2), k_ref[...], v_ref[...]
  mask = mask_refs[0][...] if masked else None

  def step(i: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
    here = pl.ds(i * block, block)
    q, g = q_ref[here, :], g_ref[here, :]
    lse, delta = lse_ref[here][None, :], delta_ref[here][None, :]
    keep = _keep(spec, block, Lk, i, j, mask, query_axis=1)
    p, b = _online_softmax.backward((k, v), (q, g), lse, delta, keep, spec.scale)
    return (
      totals[0] + _online_softmax.dot(b, q, "keys", lse.dtype),
      totals[1] + _online_softmax.dot(p, g, "keys", lse.dtype),
    )

  zero = jnp.zeros(k.shape, lse_ref.dtype)
  first, count = j if spec.causal else 0, q_ref.shape[0] // block
  totals = jax.lax.fori_loop(first, count, step, (zero, zero))
  for ref, x in zip((dk_ref, dv_ref), totals, strict=True):
    ref[...] = x.astype(ref.dtype)


def _whole(x: Array, block: int) -> Array:
  """Returns [B, L, heads, size], zero-padded to blocks and a power of 2."""
  (_, _, L, size), wide = x.shape, max(16, 1 << (x.shape[-1] - 1).bit_length())
  pad = ((0, 0), (0, -L % block), (0, 0), (0, wide - size))
  return jnp.pad(jnp.swapaxes(x, 1, 2), pad)


def _cut(x: Array, like: Array) -> Array:
  """Returns [B, heads, L, size] without what `_whole` added."""
  return jnp.swapaxes(x, 1, 2)[:, :, : like.shape[2], : like.shape[3]]


def _specs(x: Array, block: int | None) -> pl.BlockSpec:
  """Returns how a program sees padded rows or sums: a block of them, or all."""
  L = x.shape[1] if x.ndim == 4 else x.shape[-1]
  count = L if block is None else block

  def index(b: Array, h: Array, i: Array) -> tuple:
    at = 0 if block is None else i
    return {4: (b, at, h, 0), 3: (b, h, at), 2: (b, at)}[x.ndim]

  shapes = {
    4: (None, count, None, x.shape[-1]),
    3: (None, None, count),
    2: (None, count),
  }
  return pl.BlockSpec(shapes[x.ndim], index)


def _mask(mask: Array | None, block: int) -> list[Array]:
  if mask is None:
    return []
  return [jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % block))).astype(jnp.int32)]


def _call(
  kernel: Callable, grid: tuple, ins: list, outs: list, interpret: bool, **options
) -> list[Array]:
  """Calls a kernel; `ins` and `outs` are pairs of arrays or types and their specs."""
  row_bytes = ins[0][0].shape[-1] * ins[0][0].dtype.itemsize
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=[spec for _, spec in ins],
    out_specs=[spec for _, spec in outs],
    out_shape=[x for x, _ in outs],
    compiler_params=triton.CompilerParams(
      num_warps=4 if row_bytes <= 128 else 8, num_stages=STAGES
    ),
    interpret=interpret,
    **options,
  )(*(x for x, _ in ins))


def one_pass(
  spec: AttentionSpec,
  qkv: tuple,
  mask: Array | None,
  dqkv: tuple | None = None,
  *,
  interpret: bool = False,
) -> tuple[Array, ...]:
  """Returns (o, lse) and, given tangents of q, k and v, (do, dlse)."""
  q, tangent, block = qkv[0], dqkv is not None, _block(qkv[0])
  (B, heads, Lq, size), Lk = q.shape, qkv[1].shape[2]
  ins = []
  for n, rows in enumerate((block, None, None)):
    for arrays in (qkv, dqkv) if tangent else (qkv,):
      x = _whole(arrays[n], block)
      ins.append((x, _specs(x, rows)))
  ins += [(x, _specs(x, None)) for x in _mask(mask, block)]
  whole = ins[0][0]
  out = like(q, whole.shape, qkv[2].dtype)
  dtype = _online_softmax.accumulation_dtype(q.dtype)
  sums = like(q, (B, heads, whole.shape[1]), dtype)
  outs = [(out, _specs(out, block)), (sums, _specs(sums, block))] * (1 + tangent)
  static = {"spec": spec, "Lk": Lk, "block": block, "masked": mask is not None}
  arrays = [[x for x, _ in side] for side in (ins, outs)]
  found = _call(
    functools.partial(_kernel, tangent=tangent, **static),
    (B, heads, whole.shape[1] // block),
    ins,
    outs,
    interpret,
    cost_estimate=cost(spec, (B, heads, Lq, Lk, size), 6 if tangent else 2, *arrays),
    name="attention_jvp" if tangent else "attention",
  )
  return tuple(_cut(x, q) if x.ndim == 4 else x[:, :, :Lq, None] for x in found)


def backward(
  spec: AttentionSpec,
  qkv: tuple,
  mask: Array | None,
  o: Array,
  lse: Array,
  g: Array,
  h: Array,
  *,
  interpret: bool = False,
) -> tuple[Array, Array, Array]:
  """Returns the cotangents of q, k and v for those of o and lse, g and h."""
  (q, k, v), block = qkv, _block(qkv[0])
  (B, heads, Lq, size), Lk = q.shape, k.shape[2]
  delta = _online_softmax.delta(o, g, h)
  rows, keys = ([_whole(x, block) for x in side] for side in ((q, g), (k, v)))
  pad = ((0, 0), (0, 0), (0, -Lq % block))
  rows += [jnp.pad(x[..., 0], pad) for x in (lse, delta)]
  keys += _mask(mask, block)
  static = {"spec": spec, "Lk": Lk, "block": block, "masked": mask is not None}

  def run(kernel: Callable, ins: list, outs: list, products: int, name: str) -> list:
    outs = [(like(q, x.shape, x.dtype), _specs(x, block)) for x in outs]
    arrays = [[x for x, _ in side] for side in (ins, outs)]
    return _call(
      functools.partial(kernel, **static),
      (B, heads, outs[0][0].shape[1] // block),
      ins,
      outs,
      interpret,
      cost_estimate=cost(spec, (B, heads, Lq, Lk, size), products, *arrays),
      name=name,
    )

  def seen(rows_of: int | None, keys_of: int | None) -> list:
    pairs = ((rows, rows_of), (keys, keys_of))
    return [(x, _specs(x, count)) for side, count in pairs for x in side]

  (dq,) = run(
    _queries_kernel, seen(block, None), rows[:1], 3, "attention_backward_queries"
  )
  dk, dv = run(_keys_kernel, seen(None, block), keys[:2], 4, "attention_backward_keys")
  return _cut(dq, q), _cut(dk, k), _cut(dv, v)
