"""Attention as a Pallas kernel for TPU: output and tangent in one pass over keys.

Arrays are [B, heads, L, size], `mask` (keys that are attended to) bool [B, Lk] or None;
log-sum-exps lse [B, heads, L, 1]. The last axis of the grid iterates over blocks of keys;
the sums of `_online_softmax.update` stay in VMEM. Tangents are packed beside the primal
values, [q | dq], so that heads of size 64 fill the 128 lanes of a register without
padding.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sdiff_jax.kernels import _online_softmax
from sdiff_jax.kernels._chunked import LANES, AttentionSpec
from sdiff_jax.types import Array


def _kernel(
  *refs: jax.Ref, spec: AttentionSpec, size: int, Lk: int, tangent: bool, masked: bool
) -> None:
  """Computes a block of queries and keys; refs are inputs, outputs, then sums."""
  q_ref, k_ref, v_ref, *refs = refs
  mask_ref = refs.pop(0) if masked else None
  o_ref, stats_ref, *sums_refs = refs
  i, j = pl.program_id(2), pl.program_id(3)

  def split(ref: jax.Ref) -> tuple[Array, Array | None]:
    x = ref[0, 0]
    return (x[:, :size], x[:, size:]) if tangent else (x, None)

  def store(sums: tuple[Array, ...]) -> None:
    for ref, x in zip(sums_refs, sums, strict=True):
      ref[...] = x

  @pl.when(j == 0)
  def _() -> None:
    store(_online_softmax.start(split(q_ref)[0], size, tangent))

  def accumulate() -> None:
    pairs = [split(ref) for ref in (q_ref, k_ref, v_ref)]
    qkv = tuple(x for x, _ in pairs)
    dqkv = tuple(dx for _, dx in pairs) if tangent else None
    keep = None
    block = (spec.block_q, spec.block_k)
    keys = j * spec.block_k + jax.lax.broadcasted_iota(jnp.int32, block, 1)
    if Lk % spec.block_k:
      keep = keys < Lk
    if spec.causal:
      queries = i * spec.block_q + jax.lax.broadcasted_iota(jnp.int32, block, 0)
      before = keys <= queries
      keep = before if keep is None else keep & before
    if masked:
      counts = jnp.broadcast_to(mask_ref[0], block) != 0
      keep = counts if keep is None else keep & counts
    store(
      _online_softmax.update(
        tuple(r[...] for r in sums_refs), qkv, dqkv, keep, spec.scale
      )
    )

  if spec.causal:
    pl.when(j * spec.block_k < (i + 1) * spec.block_q)(accumulate)
  else:
    accumulate()

  @pl.when(j == pl.num_programs(3) - 1)
  def _() -> None:
    o, lse, *rest = _online_softmax.finish(tuple(r[...] for r in sums_refs))
    if tangent:
      do, dlse = rest
      o = jnp.concatenate([o, do], -1)
      lse = jnp.concatenate([lse, dlse], -1)
    o_ref[0, 0] = o.astype(o_ref.dtype)
    columns = jnp.pad(lse, ((0, 0), (0, LANES - lse.shape[-1])))
    stats_ref[0, 0] = columns.T[: lse.shape[-1]]


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def one_pass(
  spec: AttentionSpec,
  qkv: tuple,
  mask: Array | None,
  dqkv: tuple | None = None,
  *,
  interpret: bool = False,
) -> tuple[Array, ...]:
  """Returns (o, lse) and, given tangents of q, k and v, (do, dlse)."""
  tangent, masked = dqkv is not None, mask is not None
  (B, heads, Lq, size), Lk = qkv[0].shape, qkv[1].shape[2]
  spec = spec._replace(
    block_q=min(spec.block_q, _round_up(Lq, LANES)),
    block_k=min(spec.block_k, _round_up(Lk, LANES)),
  )
  whole_q, whole_k = _round_up(Lq, spec.block_q), _round_up(Lk, spec.block_k)
  wide_size = _round_up(size, LANES // 2 if tangent else 1)
  sides = 2 if tangent else 1

  def packed(x: Array, dx: Array | None, whole: int) -> Array:
    pad = ((0, 0), (0, 0), (0, whole - x.shape[2]), (0, wide_size - size))
    parts = [jnp.pad(a, pad) for a in (x, dx) if a is not None]
    return jnp.concatenate(parts, -1)

  operands = [
    packed(x, dx, whole)
    for x, dx, whole in zip(
      qkv, dqkv or (None,) * 3, (whole_q, whole_k, whole_k), strict=True
    )
  ]
  width = sides * wide_size
  q_spec = pl.BlockSpec((1, 1, spec.block_q, width), lambda b, h, i, j: (b, h, i, 0))
  k_spec = pl.BlockSpec((1, 1, spec.block_k, width), lambda b, h, i, j: (b, h, j, 0))
  in_specs = [q_spec, k_spec, k_spec]
  if masked:
    row = jnp.pad(mask, ((0, 0), (0, whole_k - Lk))).astype(jnp.int32)
    operands.append(row[:, None])
    in_specs.append(pl.BlockSpec((1, 1, spec.block_k), lambda b, h, i, j: (b, 0, j)))
  dtype = _online_softmax.accumulation_dtype(qkv[0].dtype)
  column = pltpu.VMEM((spec.block_q, 1), dtype)
  matrix = pltpu.VMEM((spec.block_q, wide_size), dtype)
  out_shape = (
    like(qkv[0], (B, heads, whole_q, width), qkv[2].dtype),
    like(qkv[0], (B, heads, sides, whole_q), dtype),
  )
  out, stats = pl.pallas_call(
    functools.partial(
      _kernel, spec=spec, size=wide_size, Lk=Lk, tangent=tangent, masked=masked
    ),
    grid=(B, heads, whole_q // spec.block_q, whole_k // spec.block_k),
    in_specs=in_specs,
    out_specs=(
      q_spec,
      pl.BlockSpec((1, 1, sides, spec.block_q), lambda b, h, i, j: (b, h, 0, i)),
    ),
    out_shape=out_shape,
    scratch_shapes=[column, column, matrix, *((column, matrix) if tangent else ())],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
    ),
    cost_estimate=cost(spec, (B, heads, Lq, Lk, size), tangent, operands, out_shape),
    interpret=interpret,
    name="attention_jvp" if tangent else "attention",
  )(*operands)
  parts = [
    (out[:, :, :Lq, n * wide_size : n * wide_size + size], stats[:, :, n, :Lq, None])
    for n in range(sides)
  ]
  return tuple(x for part in parts for x in part)


def like(x: Array, shape: tuple, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
  """Returns the type of an output that varies over the same shard_map axes as x."""
  axes = jax.typeof(x).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def cost(
  spec: AttentionSpec, sizes: tuple, tangent: bool, operands: list, outs: tuple
) -> pl.CostEstimate:
  """Returns the cost of 2 matrix products, 6 with the tangent; half of it if causal."""
  B, heads, Lq, Lk, size = sizes
  scores = B * heads * Lq * Lk // (2 if spec.causal else 1)
  moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *outs))
  return pl.CostEstimate(
    flops=(12 if tangent else 4) * scores * size,
    transcendentals=scores,
    bytes_accessed=moved,
  )
