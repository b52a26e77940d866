"""Attention as Pallas kernels for TPU: output and tangent, and the backward pass.

Arrays are [B, heads, L, size], `mask` (keys that are attended to) bool [B, Lk] or None;
log-sum-exps lse [B, heads, L, 1]. The last axis of the grid iterates over blocks of keys;
the sums of `_online_softmax.update` stay in VMEM. Tangents are packed beside the primal
values, [q | dq], so that heads of size 64 fill the 128 lanes of a register without
padding; so are [q | g] and [k | v] in the backward pass. Its two kernels have keys as
rows of the scores and queries as columns, where log-sum-exps are rows.
"""

import functools
import math
from collections.abc import Callable, Sequence

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
    block = (spec.block_q, spec.block_k)
    counts = jnp.broadcast_to(mask_ref[0], block) != 0 if masked else None
    keep = _online_softmax.kept(block, i, j, Lk, causal=spec.causal, counts=counts)
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


def _with_blocks(spec: AttentionSpec, Lq: int, Lk: int) -> AttentionSpec:
  """Returns the parameters with blocks that are not larger than the arrays."""
  return spec._replace(
    block_q=min(spec.block_q, _round_up(Lq, LANES)),
    block_k=min(spec.block_k, _round_up(Lk, LANES)),
  )


def _packed(arrays: Sequence[Array], whole: int, wide_size: int) -> Array:
  """Returns arrays [B, heads, L, size], zero-padded, side by side along the last axis."""
  L, size = arrays[0].shape[2:]
  pad = ((0, 0), (0, 0), (0, whole - L), (0, wide_size - size))
  return jnp.concatenate([jnp.pad(x, pad) for x in arrays], -1)


def _mask_row(mask: Array, whole: int) -> Array:
  """Returns the mask of keys, int32 [B, 1, whole]."""
  pad = ((0, 0), (0, whole - mask.shape[1]))
  return jnp.pad(mask, pad).astype(jnp.int32)[:, None]


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
  spec = _with_blocks(spec, Lq, Lk)
  whole_q, whole_k = _round_up(Lq, spec.block_q), _round_up(Lk, spec.block_k)
  wide_size = _round_up(size, LANES // 2 if tangent else 1)
  sides = 2 if tangent else 1
  operands = [
    _packed(arrays, whole, wide_size)
    for *arrays, whole in zip(
      *((qkv, dqkv) if tangent else (qkv,)), (whole_q, whole_k, whole_k), strict=True
    )
  ]
  width = sides * wide_size
  q_spec = pl.BlockSpec((1, 1, spec.block_q, width), lambda b, h, i, j: (b, h, i, 0))
  k_spec = pl.BlockSpec((1, 1, spec.block_k, width), lambda b, h, i, j: (b, h, j, 0))
  in_specs = [q_spec, k_spec, k_spec]
  if masked:
    operands.append(_mask_row(mask, whole_k))
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
    cost_estimate=cost(
      spec, (B, heads, Lq, Lk, size), 6 if tangent else 2, operands, out_shape
    ),
    interpret=interpret,
    name="attention_jvp" if tangent else "attention",
  )(*operands)
  parts = [
    (out[:, :, :Lq, n * wide_size : n * wide_size + size], stats[:, :, n, :Lq, None])
    for n in range(sides)
  ]
  return tuple(x for part in parts for x in part)


def _backward_kernel(
  *refs: jax.Ref, spec: AttentionSpec, size: int, Lk: int, masked: bool, queries: bool
) -> None:
  """Adds a block's part to the cotangent of its queries, or of its keys and values.

  The last axis of the grid iterates over the blocks that are summed.
  """
  qg_ref, kv_ref, stats_ref, *refs = refs
  mask_ref = refs.pop(0) if masked else None
  out_ref, sum_ref = refs
  own, other = pl.program_id(2), pl.program_id(3)
  i, j = (own, other) if queries else (other, own)

  @pl.when(other == 0)
  def _() -> None:
    sum_ref[...] = jnp.zeros_like(sum_ref)

  def accumulate() -> None:
    q, g = qg_ref[0, 0, :, :size], qg_ref[0, 0, :, size:]
    k, v = kv_ref[0, 0, :, :size], kv_ref[0, 0, :, size:]
    shape = (spec.block_k, spec.block_q)
    counts = jnp.broadcast_to(mask_ref[0], shape[::-1]).T != 0 if masked else None
    keep = _online_softmax.kept(
      shape, i, j, Lk, causal=spec.causal, counts=counts, query_axis=1
    )
    lse, delta = stats_ref[0, 0, :1], stats_ref[0, 0, 1:]
    p, b = _online_softmax.backward((k, v), (q, g), lse, delta, keep, spec.scale)
    if queries:
      dims = (((0,), (0,)), ((), ()))
      sum_ref[...] += jax.lax.dot_general(b, k, dims, preferred_element_type=lse.dtype)
    else:
      sum_ref[:, :size] += _online_softmax.dot(b, q, "keys", lse.dtype)
      sum_ref[:, size:] += _online_softmax.dot(p, g, "keys", lse.dtype)

  if spec.causal:
    pl.when(j * spec.block_k < (i + 1) * spec.block_q)(accumulate)
  else:
    accumulate()

  @pl.when(other == pl.num_programs(3) - 1)
  def _() -> None:
    out_ref[0, 0] = sum_ref[...].astype(out_ref.dtype)


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
  q, k, v = qkv
  (B, heads, Lq, size), Lk = q.shape, k.shape[2]
  spec = _with_blocks(spec, Lq, Lk)
  whole_q, whole_k = _round_up(Lq, spec.block_q), _round_up(Lk, spec.block_k)
  wide_size = _round_up(size, LANES // 2)
  stats = jnp.concatenate([lse, _online_softmax.delta(o, g, h)], -1)
  stats = jnp.pad(stats, ((0, 0), (0, 0), (0, whole_q - Lq), (0, 0)))
  operands = [
    _packed((q, g), whole_q, wide_size),
    _packed((k, v), whole_k, wide_size),
    jnp.swapaxes(stats, 2, 3),
  ]
  if mask is not None:
    operands.append(_mask_row(mask, whole_k))

  def run(queries: bool) -> Array:
    def at(index: Callable) -> Callable:
      return lambda b, h, own, other: index(
        b, h, *((own, other)[:: 1 if queries else -1])
      )

    width = 2 * wide_size
    specs = [
      pl.BlockSpec((1, 1, spec.block_q, width), at(lambda b, h, i, j: (b, h, i, 0))),
      pl.BlockSpec((1, 1, spec.block_k, width), at(lambda b, h, i, j: (b, h, j, 0))),
      pl.BlockSpec((1, 1, 2, spec.block_q), at(lambda b, h, i, j: (b, h, 0, i))),
      pl.BlockSpec((1, 1, spec.block_k), at(lambda b, h, i, j: (b, 0, j))),
    ][: len(operands)]
    counts = whole_q // spec.block_q, whole_k // spec.block_k
    block, sides = (spec.block_q, 1) if queries else (spec.block_k, 2)
    whole = whole_q if queries else whole_k
    out = like(q, (B, heads, whole, sides * wide_size), q.dtype)
    return pl.pallas_call(
      functools.partial(
        _backward_kernel,
        spec=spec,
        size=wide_size,
        Lk=Lk,
        masked=mask is not None,
        queries=queries,
      ),
      grid=(B, heads, *(counts if queries else counts[::-1])),
      in_specs=specs,
      out_specs=pl.BlockSpec(
        (1, 1, block, sides * wide_size), lambda b, h, own, other: (b, h, own, 0)
      ),
      out_shape=out,
      scratch_shapes=[pltpu.VMEM((block, sides * wide_size), lse.dtype)],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
      ),
      cost_estimate=cost(
        spec, (B, heads, Lq, Lk, size), 3 if queries else 4, operands, [out]
      ),
      interpret=interpret,
      name="attention_backward_queries" if queries else "attention_backward_keys",
    )(*operands)

  dkv = run(False)[:, :, :Lk]
  dk, dv = (dkv[..., n * wide_size : n * wide_size + size] for n in range(2))
  return run(True)[:, :, :Lq, :size], dk, dv


def like(x: Array, shape: tuple, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
  """Returns the type of an output that varies over the same shard_map axes as x."""
  axes = jax.typeof(x).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def cost(
  spec: AttentionSpec, sizes: tuple, products: int, operands: list, outs: list | tuple
) -> pl.CostEstimate:
  """Returns the cost of products of Lq x Lk x size; half of them if causal."""
  B, heads, Lq, Lk, size = sizes
  scores = B * heads * Lq * Lk // (2 if spec.causal else 1)
  moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *outs))
  return pl.CostEstimate(
    flops=2 * products * scores * size,
    transcendentals=scores,
    bytes_accessed=moved,
  )
