"""Attention of every implementation, and its derivatives, against jax.jvp of plain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sdiff_jax.distributed import sharding
from sdiff_jax.kernels import _chunked, _pallas_gpu, _pallas_tpu, _primitives
from sdiff_jax.kernels.attention import attention

TWINS = ("chunked", "interpret")
twins = pytest.mark.parametrize("impl", TWINS)
BLOCKS = {"block_q": 128, "block_k": 128}


def arrays(seed=0, B=2, Lq=150, Lk=200, heads=2, size=24, dtype="float32"):
  """Returns q, k, v and a direction for each."""
  rng = np.random.default_rng(seed)
  shapes = [(B, L, heads, size) for L in (Lq, Lk, Lk)]
  both = [[jnp.asarray(rng.normal(size=s), dtype) for s in shapes] for _ in range(2)]
  return tuple(map(tuple, both))


def function(impl: str, **options):
  return functools.partial(attention, impl=impl, **BLOCKS, **options)


def close(found, expected, tolerance=1e-5):
  """Checks arrays to a tolerance relative to the largest value of each."""
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    size = np.abs(b).max()
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (size or 1))


def plain_in_float64(qkv, dqkv, **options):
  """Returns output and tangent of plain attention."""
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (qkv, dqkv))
    return jvp("plain", **options)(*wide)


def jvp(impl: str, **options):
  return jax.jit(functools.partial(jax.jvp, function(impl, **options)))


@st.composite
def cases(draw):
  """Draws sizes, masks and a scale; a row may meet no key at all."""
  heads, size = draw(st.sampled_from([(1, 8), (2, 24), (1, 64), (1, 72)]))
  Lq, Lk = draw(st.integers(1, 200)), draw(st.integers(1, 300))
  options = {"causal": draw(st.booleans()), "scale": draw(st.floats(0.05, 1.0))}
  seed = draw(st.integers(0, 2**16))
  if draw(st.booleans()):
    rng = np.random.default_rng(seed)
    options["key_mask"] = jnp.asarray(rng.random((2, Lk)) < draw(st.floats(0, 1)))
  return {"seed": seed, "Lq": Lq, "Lk": Lk, "heads": heads, "size": size}, options


@twins
@given(case=cases(), dtype=st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=4)
def test_output_and_tangent(impl, case, dtype):
  sizes, options = case
  qkv, dqkv = arrays(dtype=dtype, **sizes)
  found = jvp(impl, **options)(qkv, dqkv)
  assert {x.dtype for x in found} == {jnp.dtype(dtype)}
  tolerance = 1e-5 if dtype == "float32" else 2e-2
  close(found, plain_in_float64(qkv, dqkv, **options), tolerance)


def test_the_chunked_twin_is_as_wide_as_its_input(x64):
  qkv, dqkv = arrays(dtype="float64")
  expected = jvp("plain", causal=True)(qkv, dqkv)
  close(jvp("chunked", causal=True)(qkv, dqkv), expected, 1e-13)


def test_plain_attention_is_the_standard_one():
  qkv, _ = arrays(Lq=5, Lk=5)
  mask = jnp.array([[True, True, False, True, False], [True] * 5])
  for causal in (False, True):
    expected = jax.nn.dot_product_attention(
      *qkv, is_causal=causal, mask=mask[:, None, None, :], scale=0.3
    )
    close(attention(*qkv, causal=causal, key_mask=mask, scale=0.3), expected, 1e-6)


@twins
def test_constants_in_a_row_of_scores_do_not_count(impl):
  """k + c moves row i by scale q_i c, the same for all keys; so does dk + c."""
  (q, k, v), (dq, dk, dv) = arrays()
  call = jvp(impl)
  c = jnp.full_like(k[:, :1], 2)
  expected = call((q, k, v), (dq, dk, dv))
  close(call((q, k + c, v), (dq, dk + c, dv)), expected, 5e-5)


@twins
def test_rows_without_keys_are_zero(impl):
  qkv, dqkv = arrays()
  mask = jnp.zeros((2, 200), bool).at[1].set(True)
  for x in jvp(impl, key_mask=mask)(qkv, dqkv):
    np.testing.assert_array_equal(x[0], 0)
    assert jnp.min(jnp.max(jnp.abs(x[1]), -1)) > 0


def scm(call, p, t, weight=0.0):
  """Returns the gradient of a loss of the output and of its tangent, held constant.

  With a weight, gradients go through that fraction of the tangent.
  """

  def loss(p):
    F, J = jax.jvp(call, p, t)
    # Of terms of one sign: rounding is small against their sum.
    return jnp.sum(1 - jnp.cos(F + jax.lax.stop_gradient(J) + weight * J))

  return jax.value_and_grad(loss)(p)


def total(call):
  return lambda p: jnp.sum(jnp.sin(call(*p)))


def chain(call, remat):
  """Returns attention of attention of attention, in a loop."""

  def run(q, k, v):
    def body(h, _):
      return h + call(h, k, v * h.mean()), None

    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    return jax.lax.scan(body, q, None, length=2)[0]

  return run


TRANSFORMED = {
  "gradient": lambda f, p, t: jax.grad(total(f))(p),
  "gradient under remat": lambda f, p, t: jax.grad(jax.checkpoint(total(f)))(p),
  "gradient along q alone": lambda f, p, t: jax.grad(
    jax.checkpoint(lambda q: total(f)((q, *p[1:])))
  )(p[0]),
  "linearize": lambda f, p, t: jax.linearize(f, *p)[1](*t),
  "sCM": scm,
  "sCM under remat": lambda f, p, t: scm(jax.checkpoint(f), p, t),
  "gradient of the tangent": functools.partial(scm, weight=1.0),
  "sCM of a loop under remat": lambda f, p, t: scm(chain(f, True), p, t),
  "gradient of a loop under remat": lambda f, p, t: jax.grad(total(chain(f, True)))(p),
  "jvp of jvp": lambda f, p, t: jax.jvp(lambda *p: jax.jvp(f, p, t)[1], p, t),
  "jvp of gradient": lambda f, p, t: jax.jvp(jax.grad(total(f)), (p,), (t,)),
  "vmap": lambda f, p, t: jax.vmap(f, (0, None, 0))(*stacked(p)),
  "gradient of vmap": lambda f, p, t: jax.grad(total(jax.vmap(f, (0, None, 0))))(
    stacked(p)
  ),
  "vmap of sCM": lambda f, p, t: jax.vmap(
    lambda q, v: scm(f, (q, p[1], v), t), in_axes=1
  )(*(jnp.stack([x, 2 * x], 1) for x in (p[0], p[2]))),
}


def stacked(p):
  return jnp.stack([p[0], 2 * p[0]]), p[1], jnp.stack([p[2], 2 * p[2]])


QUICK = ("sCM", "sCM under remat", "gradient", "gradient of the tangent", "jvp of jvp")


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in TRANSFORMED],
)
def test_transformations(name):
  """Every one gives what it gives for plain attention."""
  p, t = arrays(B=1, Lq=136, Lk=136, size=8)

  @functools.partial(jax.jit, static_argnums=0)
  def found(impl):
    return TRANSFORMED[name](function(impl, causal=True), p, t)

  close(found("chunked"), found("plain"))


@pytest.mark.parametrize(
  "name", [pytest.param("gradient under remat", marks=pytest.mark.slow), "sCM"]
)
def test_transformations_of_the_kernel(name):
  p, t = arrays(B=1, Lq=136, Lk=136, size=8)
  found, expected = (
    jax.jit(functools.partial(TRANSFORMED[name], function(impl)))(p, t)
    for impl in ("interpret", "plain")
  )
  close(found, expected)


def kernels(work, *args) -> dict[str, int]:
  """Returns how often each kernel stands in a program, its loops' bodies once."""
  text = str(jax.make_jaxpr(work)(*args))
  names = ("attention", "attention_jvp", "attention_linear", "attention_backward")
  return {name: text.count(f"= {name}[") for name in names}


def test_the_tangent_costs_one_pass():
  """Output and tangent stay one kernel, alone and in the step of sCM."""
  p, t = arrays(B=1)
  call = function("chunked")
  alone = kernels(lambda p, t: jax.jvp(call, p, t), p, t)
  assert {name: n for name, n in alone.items() if n} == {"attention_jvp": 1}
  step = kernels(lambda p, t: scm(call, p, t), p, t)
  expected = {"attention_jvp": 1, "attention_backward": 1}
  assert {name: n for name, n in step.items() if n} == expected
  gradient = kernels(lambda p: jax.grad(total(call))(p), p)
  assert (gradient["attention"], gradient["attention_jvp"]) == (1, 0)
  # What is computed again for the backward pass has no tangent.
  remat = kernels(lambda p, t: scm(jax.checkpoint(call), p, t), p, t)
  assert (remat["attention"], remat["attention_jvp"]) == (1, 1)


@pytest.mark.parametrize(
  "work",
  [
    pytest.param("jvp", marks=pytest.mark.slow),
    pytest.param("gradient", marks=pytest.mark.slow),
    "sCM",
  ],
)
def test_shard_map(work):
  """Batch and heads on four devices, outside and inside the derivative."""
  mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  spec = P("a", None, "b", None)
  p, t = arrays(Lq=136, Lk=136, size=8)
  works = TRANSFORMED | {"jvp": lambda f, p, t: jax.jvp(f, p, t)}
  expected = jax.jit(functools.partial(works[work], function("plain")))(p, t)
  inner = jax.shard_map(
    function("chunked"), mesh=mesh, in_specs=(spec,) * 3, out_specs=spec
  )
  close(jax.jit(functools.partial(works[work], inner))(p, t), expected)


def test_keys_that_all_devices_share():
  mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))
  (q, k, v), _ = arrays(size=8)
  sharded = jax.shard_map(
    function("chunked"), mesh=mesh, in_specs=(P("a"), P(), P()), out_specs=P("a")
  )
  found = sharded(q, k[:1], v[:1])
  close(found, attention(q, *(jnp.repeat(x[:1], 2, 0) for x in (k, v)), impl="plain"))


def test_the_kernel_spreads_itself_over_the_mesh_in_the_context():
  """Each device runs it on its own rows and heads."""
  mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  p, t = arrays(Lq=136, Lk=136, size=8)
  mask = jnp.arange(136)[None] < jnp.array([[100], [136]])
  on_mesh = jax.device_put((p, t), NamedSharding(mesh, P("a", None, "b")))
  work = functools.partial(jax.jvp, function("interpret", key_mask=mask))
  found = jax.jit(sharding.with_mesh(mesh, work))
  assert "manual_computation" in found.lower(*on_mesh).as_text()
  close(found(*on_mesh), jvp("plain", key_mask=mask)(p, t))


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_triton_kernel_interpreted(masked):
  qkv, dqkv = (
    tuple(jnp.swapaxes(x, 1, 2) for x in xs) for xs in arrays(Lq=100, Lk=130)
  )
  mask = jnp.asarray(np.random.default_rng(0).random((2, 130)) < 0.6)
  mask = mask if masked else None
  shape = _chunked.AttentionSpec(not masked, 0.3, 128, 128)
  for tangents in (None, dqkv):
    found = _pallas_gpu.one_pass(shape, qkv, mask, tangents, interpret=True)
    close(found, _chunked.one_pass(shape, qkv, mask, tangents))


@pytest.mark.parametrize("module", [_pallas_gpu, _pallas_tpu])
@pytest.mark.parametrize("causal", [False, True])
def test_the_backward_kernels_interpreted(module, causal):
  """For cotangents of the output and of the log-sum-exps, against plain attention."""
  rng = np.random.default_rng(1)
  q, k, v, g = (
    jnp.asarray(rng.normal(size=(1, 1, L, 24)), jnp.float32) for L in (70, 140, 140, 70)
  )
  h = jnp.asarray(rng.normal(size=(1, 1, 70, 1)), jnp.float32)
  mask = None if causal else jnp.asarray(rng.random((1, 140)) < 0.6)

  def plain(q, k, v):
    s = 0.3 * jnp.einsum("bhid,bhjd->bhij", q, k)
    s = jnp.where(jnp.tril(jnp.ones((70, 140), bool)) if causal else mask, s, -jnp.inf)
    o = jnp.einsum("bhij,bhjd->bhid", jax.nn.softmax(s), v)
    return o, jax.nn.logsumexp(s, -1, keepdims=True)

  (o, lse), back = jax.vjp(plain, q, k, v)
  shape = _chunked.AttentionSpec(causal, 0.3, 128, 128)
  found = module.backward(shape, (q, k, v), mask, o, lse, g, h, interpret=True)
  close(found, back((g, h)))


def absent_gpu():
  """Tells JAX, from 0.12 on, which GPU a kernel is lowered for."""
  device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
  kind = {"axis_types": (jax.sharding.AxisType.Explicit,), "abstract_device": device}
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), **kind))


@pytest.mark.parametrize(
  ("dtype", "size", "count"),
  [("float32", 128, 3), ("bfloat16", 64, 3), ("float32", 160, 0), ("float64", 8, 0)],
)
def test_gpus_take_their_kernels_where_they_have_room(dtype, size, count):
  """Lowered for an absent GPU, the step of sCM has three kernels, or none."""
  with jax.enable_x64(dtype == "float64"):
    x = jax.ShapeDtypeStruct((1, 128, 2, size), dtype)
    step = jax.jit(functools.partial(scm, functools.partial(attention, impl="fused")))
    with absent_gpu():
      lowered = step.trace((x,) * 3, (x,) * 3).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("gpu.triton") == count


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"q": (2, 4, 8)}, r"q is \(2, 4, 8\): must be \[B, L, heads, size\]"),
    ({"k": (2, 5, 3, 8)}, r"k is \(2, 5, 3, 8\): must be \[2, L, 2, 8\] as q"),
    ({"v": (2, 6, 2, 8)}, r"v is \(2, 6, 2, 8\): must be \(2, 5, 2, 8\) as k"),
    ({"k": "bfloat16"}, r"k is bfloat16: q, k and v must share one floating type"),
    ({"q": "int32"}, r"q is int32: q, k and v must share"),
    ({"key_mask": (2, 4)}, r"key_mask is bool \(2, 4\): must be bool \(2, 5\)"),
    ({"impl": "flash"}, r"impl='flash': must be one of auto, plain, fused"),
    ({"block_k": 100}, r"block_k=100: must be a multiple of 128"),
    ({"scale": float("nan")}, r"scale=nan: must be finite"),
  ],
)
def test_what_does_not_fit_is_named(change, message):
  arguments = {name: jnp.zeros((2, 5, 2, 8)) for name in "qkv"}
  for name, value in change.items():
    if isinstance(value, tuple):
      value = jnp.zeros(value, bool if name == "key_mask" else jnp.float32)
    elif name in "qkv":
      value = arguments[name].astype(value)
    arguments[name] = value
  with pytest.raises(ValueError, match=message):
    attention(**arguments)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_few_scores_are_held(platform):
  """Attention of itself is plain attention where that holds little, not on GPUs."""
  p, _ = arrays(size=16)
  lowered = jax.jit(attention).trace(*p).lower(lowering_platforms=(platform,))
  assert ("x150x200xf32" in lowered.as_text()) == (platform != "cuda")


def test_very_few_and_many_scores():
  p, _ = arrays(Lq=50, Lk=80)
  assert kernels(attention, *p)["attention"] == 0
  long = tuple(jax.ShapeDtypeStruct((1, 1024, 1, 8), jnp.float32) for _ in range(3))
  assert kernels(attention, *long)["attention"] == 1
  assert _primitives.forward_p.name == "attention"
