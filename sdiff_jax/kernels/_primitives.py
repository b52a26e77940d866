"""Fused attention as JAX primitives, with the rules of JAX's transformations.

There are four primitives:

  forward   q, k, v -> o, lse
  both      q, k, v and tangents dq, dk, dv -> o, lse, do, dlse in one pass over the keys
  linear    the derivative of one of them at known q, k, v, o, lse
  backward  the transpose of the derivative of `forward`: cotangents of o and lse ->
            those of q, k, v

The jvp of `forward` is `both`. Reverse mode evaluates the known part, o and lse, and
transposes what is linear in the unknown tangents: `both` is split into `forward` and
`linear`, whose transpose is `backward`, that of FlashAttention. In the gradient of a
loss that contains a jvp (sCM), all six inputs of `both` are known, so it stays one
kernel; its tangent is a constant of the loss, so that `backward` is the only derivative
of it. A loss that trains through its tangent needs the transpose of the derivative of
`both` too, which is a loop in plain JAX, as are derivatives of `backward`.

Arrays are [B, heads, L, size], log-sum-exps lse [B, heads, L, 1].

This file and cpu.py use JAX's unstable extension APIs, whose changes between versions they
have to follow (setup.py has an upper bound for JAX):

  jax.extend.core               Primitive, and equations that partial evaluation splits
  jax.interpreters.ad           jvp and transpose rules of the primitives
  jax.interpreters.batching     vmap rules
  jax.interpreters.mlir         lowering by an ordinary JAX function
  jax.interpreters.partial_eval the split of `both` under grad and remat, and removal of
                                tangents that nobody uses

The stable alternative does not do the same. A `custom_vjp` function refuses `jax.jvp`.
A `custom_jvp` function over `custom_vjp` kernels has a jvp, and a gradient of a loss that
contains one, but its own reverse mode has to transpose the tangent of its rule, and a
kernel has no transpose: the rule must compute tangents by `linear` instead of `both`.
Every jvp would then read the keys twice, once in the kernel and once in plain JAX, which
costs the fused jvp (sCM's inner loop) its speed.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir, partial_eval
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sdiff_jax.kernels import _chunked, _online_softmax
from sdiff_jax.kernels._chunked import AttentionSpec
from sdiff_jax.types import Array, PyTree


def attend(spec: AttentionSpec, impl: str, qkv: tuple, mask: Array | None) -> Array:
  """Returns softmax(scale q k^T) v, [B, heads, Lq, size].

  Args:
    spec: causal mask, scale and block sizes.
    impl: "fused", "chunked" or "interpret".
    qkv: q [B, heads, Lq, size], k and v [B, heads, Lk, size].
    mask: True for keys that are attended to, bool [B, Lk]; or None.
  """
  operands = _with_common_axes(*qkv) if mask is None else _with_common_axes(*qkv, mask)
  return forward_p.bind(*operands, spec=spec, impl=impl)[0]


def _with_common_axes(*arrays: Array) -> list[Array]:
  """Returns the arrays, varying over the same axes of a surrounding shard_map."""
  varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
  every = frozenset().union(*varying)
  return [
    jax.lax.pcast(x, tuple(every - mine), to="varying") if every - mine else x
    for x, mine in zip(arrays, varying, strict=True)
  ]


def _evaluate(*args: Array, spec: AttentionSpec, impl: str, tangent: bool) -> tuple:
  (q, k, v, *dqkv), mask = _parts(args)
  rest = (tuple(dqkv),) if tangent else ()
  return _run("one_pass", (q, k, v), mask, *rest, spec=spec, impl=impl)


def _backward(*args: Array, spec: AttentionSpec, impl: str) -> tuple:
  (q, k, v, *rest), mask = _parts(args)
  return _run("backward", (q, k, v), mask, *rest, spec=spec, impl=impl)


def _run(method: str, *args: PyTree, spec: AttentionSpec, impl: str) -> tuple:
  """Calls the function of this name of the module that implements it."""
  chunked = functools.partial(getattr(_chunked, method), spec)
  if impl == "chunked":
    return chunked(*args)
  # Pallas is slow to import.
  from sdiff_jax.kernels import _pallas_gpu, _pallas_tpu

  interpret = impl == "interpret"
  on_tpu = _on_each_device(
    functools.partial(getattr(_pallas_tpu, method), spec, interpret=interpret)
  )
  if interpret:
    return on_tpu(*args)
  kernels = {"tpu": on_tpu}
  if _chunked.gpu_supports(args[0][0]):
    on_gpu = functools.partial(getattr(_pallas_gpu, method), spec)
    kernels["cuda"] = _on_each_device(on_gpu)
  # By the platform that the program is compiled for, which need not be this one.
  return jax.lax.platform_dependent(*args, **kernels, default=chunked)


def _on_each_device(kernel: Callable) -> Callable:
  """Returns the kernel under shard_map, since XLA cannot partition it.

  B, and then heads, are sharded over the axes of the context's mesh (jax.set_mesh) that
  divide them, in the order of the mesh.
  """

  def call(qkv: tuple, mask: Array | None, *rest: PyTree) -> tuple:
    mesh = jax.sharding.get_abstract_mesh()
    axes = [
      a
      for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True)
      if t == AxisType.Auto
    ]
    batch, heads = [], []
    for axis in axes:
      for names, n in ((batch, qkv[0].shape[0]), (heads, qkv[0].shape[1])):
        parts = mesh.shape[axis]
        for name in names:
          parts *= mesh.shape[name]
        if n % parts == 0:
          names.append(axis)
          break
    if not axes:
      return kernel(qkv, mask, *rest)
    partition = P(tuple(batch), tuple(heads))
    return jax.shard_map(
      kernel,
      axis_names=set(axes),
      in_specs=(partition, P(tuple(batch)), *(partition for _ in rest)),
      out_specs=partition,
      check_vma=False,
    )(qkv, mask, *rest)

  return call


def _parts(args: tuple) -> tuple[list[Array], Array | None]:
  """Returns the other operands, and the mask if there is one."""
  masks = [x for x in args if x.dtype == bool]
  return [x for x in args if x.dtype != bool], masks[0] if masks else None


def _primitive(name: str, evaluate: Callable, types: Callable) -> core.Primitive:
  """Returns a primitive with rules for evaluation, abstract values and vmap.

  Args:
    name: shown in jaxprs.
    evaluate: (arrays, parameters) -> arrays, each with leading B.
    types: the same for abstract values.
  """
  primitive = core.Primitive(name)
  primitive.multiple_results = True
  primitive.def_impl(evaluate)
  primitive.def_abstract_eval(types)
  mlir.register_lowering(primitive, mlir.lower_fun(evaluate, multiple_results=True))

  def mapped(args: tuple, dims: tuple, **params) -> tuple:
    count = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)

    def merged(x: Array, d: int | None) -> Array:
      if d is None:
        x = jnp.broadcast_to(x[None], (count, *x.shape))
      else:
        x = jnp.moveaxis(x, d, 0)
      return x.reshape(-1, *x.shape[2:])

    outs = primitive.bind(*map(merged, args, dims), **params)
    return [x.reshape(count, -1, *x.shape[1:]) for x in outs], [0] * len(outs)

  batching.primitive_batchers[primitive] = mapped
  return primitive


def _sums(q, *_, **__) -> list:
  o = q.update(weak_type=False)
  return [
    o,
    o.update(
      shape=(*q.shape[:-1], 1), dtype=_online_softmax.accumulation_dtype(q.dtype)
    ),
  ]


forward_p = _primitive("attention", functools.partial(_evaluate, tangent=False), _sums)
both_p = _primitive(
  "attention_jvp",
  functools.partial(_evaluate, tangent=True),
  lambda *args, **params: _sums(*args) * 2,
)
# Its operands are q, k, v, o, lse and what else `function` reads, then the `count`
# tangents in which it is linear. Partial evaluation does not split it.
linear_p = _primitive(
  "attention_linear",
  lambda *args, function, transposed, count: function(*args),
  _sums,
)
# Its operands are q, k, v, the mask if any, o, lse and their cotangents.
backward_p = _primitive(
  "attention_backward",
  _backward,
  lambda *args, **params: [x.update(weak_type=False) for x in args[:3]],
)


def _tangent(spec: AttentionSpec, *args: Array) -> tuple:
  """Returns (do, dlse) from q, k, v, o, lse, the mask if any, and dq, dk, dv."""
  (q, k, v, o, lse, *dqkv), mask = _parts(args)
  return _chunked.tangent(spec, (q, k, v), mask, o, lse, tuple(dqkv))


def _tangent_transposed(
  spec: AttentionSpec, impl: str, constants: tuple, types: list, cts: list
) -> list:
  q, k, v, o, lse, *mask = constants
  return backward_p.bind(q, k, v, *mask, o, lse, *cts, spec=spec, impl=impl)


def _second(spec: AttentionSpec, *args: Array) -> tuple:
  """Returns the jvp of `_tangent`; the last 8 arguments are the tangents."""
  primals, dots = args[:-8], args[-8:]
  return _jvp(functools.partial(_tangent, spec), primals, dots)[1]


def _second_transposed(
  spec: AttentionSpec, impl: str, constants: tuple, types: list, cts: list
) -> tuple:
  apply = functools.partial(_second, spec, *constants)
  return jax.linear_transpose(apply, *types)(tuple(cts))


def _jvp(function: Callable, primals: tuple, dots: Sequence[Array]) -> tuple:
  """Returns the jvp of a function; the mask, if there is one, has no tangent."""
  _, mask = _parts(primals)
  at = next((i for i, x in enumerate(primals) if x is mask), None)

  def apply(*arrays: Array) -> tuple:
    args = list(arrays)
    if at is not None:
      args.insert(at, mask)
    return tuple(function(*args))

  return jax.jvp(apply, tuple(_parts(primals)[0]), tuple(dots))


def _dots(primals: tuple, tangents: tuple) -> list[Array]:
  return [
    ad.instantiate_zeros(t)
    for x, t in zip(primals, tangents, strict=True)
    if x.dtype != bool
  ]


def _linear_jvp(primals: tuple, tangents: tuple, *, function, **_) -> tuple:
  return _jvp(function, primals, _dots(primals, tangents))


def _backward_jvp(
  primals: tuple, tangents: tuple, *, spec: AttentionSpec, impl: str
) -> tuple:
  plain = functools.partial(_backward, spec=spec, impl="chunked")
  return _jvp(plain, primals, _dots(primals, tangents))


def _linear_transpose(cts: list, *args, function, transposed, count) -> list:
  constants, directions = args[:-count], args[-count:]
  unknown = [ad.is_undefined_primal(x) for x in directions]
  types = [x.aval if u else x for x, u in zip(directions, unknown, strict=True)]
  back = transposed(constants, types, list(map(ad.instantiate_zeros, cts)))
  return [None] * len(constants) + [
    x if u else None for x, u in zip(back, unknown, strict=True)
  ]


ad.primitive_jvps[linear_p] = _linear_jvp
ad.primitive_transposes[linear_p] = _linear_transpose
ad.primitive_jvps[backward_p] = _backward_jvp


def _linear(
  order: int, spec: AttentionSpec, impl: str, args: list, directions: list
) -> list:
  """Returns the first or the second derivative along directions."""
  function, transposed = {
    1: (_tangent, _tangent_transposed),
    2: (_second, _second_transposed),
  }[order]
  return linear_p.bind(
    *args,
    *directions,
    function=functools.partial(function, spec),
    transposed=functools.partial(transposed, spec, impl),
    count=len(directions),
  )


def _forward_jvp(primals: tuple, tangents: tuple, **params) -> tuple:
  dqkv = map(ad.instantiate_zeros, tangents[:3])
  outs = both_p.bind(*primals, *dqkv, **params)
  return outs[:2], outs[2:]


def _both_jvp(
  primals: tuple, tangents: tuple, *, spec: AttentionSpec, impl: str
) -> tuple:
  outs = both_p.bind(*primals, spec=spec, impl=impl)
  operands = [
    *primals[:3],
    *outs[:2],
    *primals[3:],
  ]  # q, k, v, o, lse, (mask), dq, dk, dv
  dots = [ad.instantiate_zeros(x) for x in (*tangents[:3], *tangents[-3:])]
  first = _linear(1, spec, impl, operands[:-3], dots[:3])
  # Dead code if the tangent is under stop_gradient.
  second = _linear(2, spec, impl, operands, [*dots[:3], *first, *dots[3:]])
  return outs, [*first, *second]


ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[both_p] = _both_jvp


def _partial_eval(trace, *tracers, spec: AttentionSpec, impl: str) -> list:
  """Splits `both` if q, k, v are known and their tangents are not (grad)."""
  known = [x.is_known() for x in tracers]
  params = {"spec": spec, "impl": impl}
  if all(known) or not all(known[:-3]):
    return trace.default_process_primitive(both_p, tracers, params)
  with core.set_current_trace(trace):
    o, lse = forward_p.bind(*tracers[:-3], **params)
    operands = [*tracers[:3], o, lse, *tracers[3:-3]]
    return [o, lse, *_linear(1, spec, impl, operands, tracers[-3:])]


def _equation(eqn: core.JaxprEqn) -> core.JaxprEqn:
  """Returns the equation of `forward` for the first two results of a `both`."""
  return core.new_jaxpr_eqn(
    eqn.invars[:-3],
    eqn.outvars[:2],
    forward_p,
    eqn.params,
    eqn.effects,
    eqn.source_info,
    eqn.ctx,
  )


def _partial_eval_equation(saveable, unknown: list, instantiated: list, eqn) -> tuple:
  """Splits an equation under remat, where all results are recomputed."""
  residuals = [
    x
    for x, is_instantiated in zip(eqn.invars, instantiated, strict=True)
    if not is_instantiated and not isinstance(x, core.Literal)
  ]
  if not any(unknown):
    known, out = eqn, [False] * 4
  elif not any(unknown[:-3]):
    known, out = _equation(eqn), [False, False, True, True]
  else:
    known, out = None, [True] * 4
  return known, eqn, out, [True] * 4, residuals


def _dead_code(used: list, *rest) -> tuple:
  """Replaces a `both` by `forward` if its tangents are not used."""
  eqn = rest[-1]  # JAX 0.12 passes which inputs are live before it
  if any(used[2:]):
    return [True] * len(eqn.invars), eqn
  if any(used):
    return [True] * (len(eqn.invars) - 3) + [False] * 3, _equation(eqn)
  return [False] * len(eqn.invars), None


partial_eval.custom_partial_eval_rules[both_p] = _partial_eval
partial_eval.partial_eval_jaxpr_custom_rules[both_p] = _partial_eval_equation
partial_eval.dce_rules[both_p] = _dead_code
