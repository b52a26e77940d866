"""Attention as a Pallas kernel for NVIDIA GPUs: output and tangent in one pass.

Arrays are [B, heads, L, size], `mask` (keys that are attended to) bool [B, Lk] or None;
log-sum-exps lse [B, heads, L, 1]. A program has one block of queries and iterates over
the keys, with the sums of `_online_softmax.update` in registers.

It uses Pallas' Triton backend, which JAX deprecates from 0.12 on and which still works
there.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from sdiff_jax.kernels import _online_softmax
from sdiff_jax.kernels._chunked import AttentionSpec
from sdiff_jax.kernels._pallas_tpu import cost, like
from sdiff_jax.types import Array

BLOCK = 64  # limited by registers, so not the block size of the other kernels
WARPS, STAGES = 4, 2
TYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
MAX_QUERY_BYTES = 256  # 512 would exceed shared memory


def supports(q: Array) -> bool:
  """Returns whether the kernel supports the type and the size of the queries."""
  return q.dtype in TYPES and q.shape[-1] * q.dtype.itemsize <= MAX_QUERY_BYTES


def _kernel(
  *refs: jax.Ref, spec: AttentionSpec, Lk: int, tangent: bool, masked: bool
) -> None:
  """Computes one block of queries; refs are the inputs, then the outputs."""
  refs = list(refs)
  q_refs, k_refs, v_refs = ([refs.pop(0) for _ in range(1 + tangent)] for _ in range(3))
  mask_ref = refs.pop(0) if masked else None
  i, block = pl.program_id(2), (BLOCK, BLOCK)
  q = [ref[0, 0] for ref in q_refs]

  def step(j: Array, sums: tuple) -> tuple:
    here = pl.ds(j * BLOCK, BLOCK)
    k, v = ([ref[0, 0, here, :] for ref in side] for side in (k_refs, v_refs))
    dqkv = (q[1], k[1], v[1]) if tangent else None
    keys = j * BLOCK + jax.lax.broadcasted_iota(jnp.int32, block, 1)
    keep = keys < Lk if Lk % BLOCK else None
    if spec.causal:
      queries = i * BLOCK + jax.lax.broadcasted_iota(jnp.int32, block, 0)
      keep = keys <= queries if keep is None else keep & (keys <= queries)
    if masked:
      counts = jnp.broadcast_to(mask_ref[0, here][None, :], block) != 0
      keep = counts if keep is None else keep & counts
    return _online_softmax.update(sums, (q[0], k[0], v[0]), dqkv, keep, spec.scale)

  count = pl.cdiv(Lk, BLOCK)
  if spec.causal:
    count = jnp.minimum(i + 1, count)
  start = _online_softmax.start(q[0], q[0].shape[-1], tangent)
  outs = _online_softmax.finish(jax.lax.fori_loop(0, count, step, start))
  for ref, x in zip(refs, outs, strict=True):
    x = x.astype(ref.dtype)
    if ref.ndim == 3:  # a log-sum-exp
      ref[0, 0] = x[:, 0] if x.ndim == 2 else x
    else:
      ref[0, 0] = x


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
  whole_q, whole_k = pl.cdiv(Lq, BLOCK) * BLOCK, pl.cdiv(Lk, BLOCK) * BLOCK
  wide_size = max(16, 1 << (size - 1).bit_length())

  def whole(x: Array, L: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, L - x.shape[2]), (0, wide_size - size)))

  row = pl.BlockSpec((1, 1, BLOCK, wide_size), lambda b, h, i: (b, h, i, 0))
  column = pl.BlockSpec((1, 1, whole_k, wide_size), lambda b, h, i: (b, h, 0, 0))
  operands, in_specs = [], []
  for n, (L, block_spec) in enumerate(
    ((whole_q, row), (whole_k, column), (whole_k, column))
  ):
    for arrays in (qkv, dqkv) if tangent else (qkv,):
      operands.append(whole(arrays[n], L))
      in_specs.append(block_spec)
  if masked:
    operands.append(jnp.pad(mask, ((0, 0), (0, whole_k - Lk))).astype(jnp.int32))
    in_specs.append(pl.BlockSpec((1, whole_k), lambda b, h, i: (b, 0)))
  out_shape = [
    like(qkv[0], (B, heads, whole_q, wide_size), qkv[2].dtype),
    like(qkv[0], (B, heads, whole_q), _online_softmax.accumulation_dtype(qkv[0].dtype)),
  ] * (1 + tangent)
  log_sum = pl.BlockSpec((1, 1, BLOCK), lambda b, h, i: (b, h, i))
  outs = pl.pallas_call(
    functools.partial(_kernel, spec=spec, Lk=Lk, tangent=tangent, masked=masked),
    grid=(B, heads, whole_q // BLOCK),
    in_specs=in_specs,
    out_specs=[row, log_sum] * (1 + tangent),
    out_shape=out_shape,
    compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
    cost_estimate=cost(spec, (B, heads, Lq, Lk, size), tangent, operands, out_shape),
    interpret=interpret,
    name="attention_jvp" if tangent else "attention",
  )(*operands)
  return tuple(x[:, :, :Lq, :size] if x.ndim == 4 else x[:, :, :Lq, None] for x in outs)
