"""Attention in O(L) memory that has forward-mode, reverse-mode and mixed derivatives.

Other fused kernels are `custom_vjp` functions, which refuse `jax.jvp`; continuous-time
consistency models need the gradient of a loss that contains a jvp.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from sdiff_jax.kernels import _online_softmax, _primitives
from sdiff_jax.kernels._chunked import LANES, AttentionSpec, gpu_supports
from sdiff_jax.types import Array

IMPLS = ("auto", "plain", "fused", "chunked", "interpret")
MAX_PLAIN_SCORES = 512 * 512  # of a head, for which impl="auto" is "plain"
MIN_FUSED = 64  # tokens, from which on impl="auto" is "fused" on GPUs
_COUNTED = contextvars.ContextVar("counted", default=False)


def attention(
  q: Array,
  k: Array,
  v: Array,
  *,
  causal: bool = False,
  key_mask: Array | None = None,
  scale: float | None = None,
  impl: str = "auto",
  block_q: int = 512,
  block_k: int = 512,
) -> Array:
  """Returns softmax(scale q k^T) v, [B, Lq, heads, size].

  Scores and sums are computed in float32 or wider. It composes with jit, grad, jvp, the
  gradient of a loss that contains a jvp, vmap, remat and shard_map. The output of a query
  without keys is 0.

  Args:
    q: queries, [B, Lq, heads, size], of a floating type; kernels support bfloat16,
      float16 and float32.
    k: keys, [B, Lk, heads, size].
    v: values, [B, Lk, heads, size].
    causal: whether query i attends to keys 0 to i only.
    key_mask: True for keys that are attended to, bool [B, Lk]; None for all keys.
    scale: factor of the scores; None for size^-0.5.
    impl: "plain" stores all scores, [B, heads, Lq, Lk]; "chunked" stores one block of
      them at a time; "fused" is a Pallas kernel on TPUs and, from Ampere on and up to
      size 256 (128 in float32), on NVIDIA GPUs, and "chunked" elsewhere; "auto" is
      "plain" up to MAX_PLAIN_SCORES scores, on GPUs with fewer than MIN_FUSED tokens,
      else "fused". "interpret" runs the TPU kernels on any machine, slowly.
    block_q: largest number of queries of a block, a multiple of 128. The GPU kernel has
      its own block size.
    block_k: largest number of keys of a block, a multiple of 128.

  Returns:
    [B, Lq, heads, size], in the type of v.

  Raises:
    ValueError: a shape, type or name that does not fit; the message starts with the
      argument.

  Source: arXiv:2410.11081, appendix F; arXiv:2205.14135.

  Example:
    >>> q = k = v = jnp.ones((1, 4, 2, 8))
    >>> out, tangent = jax.jvp(lambda q: attention(q, k, v), (q,), (q,))
    >>> out.shape, tangent.shape
    ((1, 4, 2, 8), (1, 4, 2, 8))
  """
  _check(q, k, v, key_mask, impl, block_q, block_k)
  scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
  if not math.isfinite(scale):
    raise ValueError(f"scale={scale}: must be finite")
  if impl == "auto":
    impl = "plain" if q.shape[1] * k.shape[1] <= MAX_PLAIN_SCORES else "fused"
    if impl == "plain" and _fused_on_gpus(q, k):

      def attend(impl: str, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        options = {"causal": causal, "key_mask": mask, "scale": scale}
        return attention(q, k, v, impl=impl, **options)

      cuda, default = (functools.partial(attend, i) for i in ("fused", "plain"))
      return jax.lax.platform_dependent(q, k, v, key_mask, cuda=cuda, default=default)
  if impl == "plain" or _COUNTED.get():
    return _plain(q, k, v, causal, key_mask, scale)
  spec = AttentionSpec(causal, scale, block_q, block_k)
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  o = _primitives.attend(spec, impl, (q, k, v), key_mask)
  return jnp.swapaxes(o, 1, 2)


@contextlib.contextmanager
def counted() -> Iterator[None]:
  """Makes attention that is traced inside store all scores, whatever its `impl`.

  For programs that are counted and not run: what a loop or a kernel computes, no compiler
  tells.

  Example:
    >>> q = jnp.ones((1, 1024, 1, 8))
    >>> with counted():
    ...   jaxpr = jax.make_jaxpr(attention)(q, q, q)
    >>> "1024,1024" in str(jaxpr)
    True
  """
  token = _COUNTED.set(True)
  try:
    yield
  finally:
    _COUNTED.reset(token)


def _fused_on_gpus(q: Array, k: Array) -> bool:
  """Returns whether impl="auto" is "fused" on GPUs where it is "plain" elsewhere."""
  tokens = min(q.shape[1], k.shape[1])
  return tokens >= MIN_FUSED and gpu_supports(q) and not _COUNTED.get()


def _check(q, k, v, key_mask, impl, block_q, block_k) -> None:
  """Checks the arguments of `attention`.

  Raises:
    ValueError: an argument does not fit; the message starts with its name.
  """
  if impl not in IMPLS:
    raise ValueError(f"impl={impl!r}: must be one of {', '.join(IMPLS)}")
  for name, block in (("block_q", block_q), ("block_k", block_k)):
    if block < LANES or block % LANES:
      raise ValueError(f"{name}={block}: must be a multiple of {LANES}")
  for name, x in (("q", q), ("k", k), ("v", v)):
    if x.ndim != 4 or not x.size:
      raise ValueError(f"{name} is {x.shape}: must be [B, L, heads, size]")
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != q.dtype:
      raise ValueError(f"{name} is {x.dtype}: q, k and v must share one floating type")
  B, _, heads, size = q.shape
  if (k.shape[0], *k.shape[2:]) != (B, heads, size):
    raise ValueError(f"k is {k.shape}: must be [{B}, L, {heads}, {size}] as q")
  if v.shape != k.shape:
    raise ValueError(f"v is {v.shape}: must be {k.shape} as k")
  if key_mask is not None and (key_mask.shape, key_mask.dtype) != (k.shape[:2], bool):
    raise ValueError(
      f"key_mask is {key_mask.dtype} {key_mask.shape}: must be bool {k.shape[:2]}"
    )


def _plain(
  q: Array,
  k: Array,
  v: Array,
  causal: bool,
  key_mask: Array | None,
  scale: float,
) -> Array:
  """Returns attention that stores all scores.

  Not `jax.nn.dot_product_attention`, whose output for queries without keys is the mean
  of the values instead of 0, and which computes in float32 at most.
  """
  dtype = _online_softmax.accumulation_dtype(q.dtype)
  scores = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=dtype) * scale
  keep = None
  if causal:
    keep = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
  if key_mask is not None:
    mask = key_mask[:, None, None, :]
    keep = mask if keep is None else keep & mask
  if keep is None:
    weights = jax.nn.softmax(scores)
  else:
    # The output of a query without keys is 0, and so is its derivative.
    weights = jax.nn.softmax(jnp.where(keep, scores, _online_softmax.LOWEST))
    weights = jnp.where(keep, weights, 0)
  return jnp.einsum("bhlm,bmhd->blhd", weights.astype(v.dtype), v)
