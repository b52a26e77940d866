"""The contract of every network, and the layers that they share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import central, random_params
from trained_maps import rms

from sdiff_jax import registry
from sdiff_jax.diffusion.trigflow import END_TIME
from sdiff_jax.models import dit, mlp
from sdiff_jax.models.layers import common as common_lib
from sdiff_jax.types import CondSpec


def case(name: str) -> dict:
  """Returns the arguments of build that the network registers as `minimal`."""
  fields = registry.lookup("models", name).facts["minimal"]
  needs_sigma_d = "sigma_d" in registry.required("models", name)
  return {"sigma_d": 0.5} | fields if needs_sigma_d else dict(fields)


CASES = {  # a published network is tested in tests/pretrained/test_trigflow_network.py
  name: case(name) for name in registry.names("models") if name != "pretrained"
}
# A condition of every kind, which every network embeds.
COND = {
  "label": CondSpec((), np.int32, num_classes=3),
  "angle": CondSpec((), np.float32),
  "observation": CondSpec((5,), np.float32),
  "mask": CondSpec((2, 3), np.bool_),
}
B = 4
# Ways to compute the same: fields of some networks, most of which compile for long.
QUICK_WAYS = [("dit", "full"), ("mlp", 2)]
WAYS = [
  pytest.param(
    name,
    {field: value},
    marks=[pytest.mark.slow] * ((name, value) not in QUICK_WAYS),
  )
  for name in CASES
  for field, value in (("unroll", 2), ("remat", "dots"), ("remat", "full"))
  if field in registry.fields("models", name)
]
models = pytest.mark.parametrize("name", CASES)


def mostly_slow(*default: str, names=tuple(CASES)):
  """Parametrizes by network; those that are not named here are slow to compile."""
  slow = [pytest.param(n, marks=pytest.mark.slow) for n in names if n not in default]
  return pytest.mark.parametrize("name", [*default, *slow])


# What the cases are conditioned on, by the number of axes of a sample: action chunks,
# images, or either of them.
NATIVE = {2: ("observation",), 3: ("label",), None: ("label", "observation")}


def native(name: str) -> tuple[str, ...]:
  return NATIVE[registry.lookup("models", name).facts.get("sample_ndim")]


GUIDED = [name for name in CASES if "guidance" in registry.fields("models", name)]
DROPOUT = [name for name in CASES if "dropout" in registry.fields("models", name)]
x64 = pytest.mark.usefixtures("x64")


@functools.cache
def build(name: str, **options):
  """Returns a small network, compiled once, all of whose options are on."""
  given = {"guidance": True} if name in GUIDED else {}
  names = options.get("cond", native(name))
  options |= {"cond": {k: COND[k] for k in names}}
  net = registry.lookup("models", name).build(**CASES[name] | given | options)
  return net._replace(apply=jax.jit(net.apply), init=jax.jit(net.init))


def inputs(name: str, dtype: str = "float32"):
  """Returns x, t, cond and a direction (dx, dt)."""
  rng = np.random.default_rng(0)
  x, dx = (
    jnp.asarray(rng.normal(size=(B, *CASES[name]["shape"])), dtype) for _ in range(2)
  )
  t, dt, guidance = (jnp.asarray(rng.uniform(0.1, 1.5, B), dtype) for _ in range(3))
  cond = {"label": jnp.array([0, 1, 2, -1]), "guidance": guidance}
  cond["observation"] = jnp.asarray(rng.normal(size=(B, 5)), dtype)
  cond["angle"] = jnp.asarray(rng.uniform(0.1, 1.5, B), dtype)
  cond["mask"] = jnp.asarray(rng.random((B, 2, 3)) < 0.5)
  return x, t, cond, (dx, dt)


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@mostly_slow("dit", "mlp")
def test_output_is_like_the_input_in_float32(name):
  x, t, cond, _ = inputs(name)
  params = build(name).init(jax.random.key(0))
  for dtype in ("float32", "bfloat16"):
    net = build(name, dtype=dtype)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    assert shapes == jax.eval_shape(lambda: params)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    F = net.apply(params, x, t, cond)
    assert (F.shape, F.dtype) == (x.shape, jnp.float32)
    np.testing.assert_array_equal(F, 0)  # f starts as cos(t) x_t
    w = net.logvar(params, t)
    assert (w.shape, w.dtype) == ((B,), jnp.float32)
    np.testing.assert_array_equal(w, 0)


@mostly_slow("dit", "mlp")
def test_plain_networks_need_no_condition(name):
  none = {"guidance": False} if name in GUIDED else {}
  net = build(name, cond=(), **none)
  x, t, _, _ = inputs(name)
  F = net.apply(random_params(net, dtype="float32"), x, t, None)
  assert F.shape == x.shape
  assert jnp.std(F) > 0.1


@mostly_slow("dit", "mlp")
@x64
def test_jvp_is_the_derivative(name):
  net = build(name, dtype="float64")
  params = random_params(net)
  x, t, cond, along = inputs(name, "float64")

  def F(x, t):
    return net.apply(params, x, t, cond)

  out, derivative = jax.jvp(F, (x, t), along)
  assert out.dtype == jnp.float64
  expected = central(F, (x, t), along)
  size = np.abs(expected).max()
  assert size > 0.1
  np.testing.assert_allclose(derivative, expected, rtol=1e-6, atol=1e-7 * size)


@functools.cache
def gradient(name: str, **options) -> dict:
  """Returns the gradient of |F|^2 + |tangent|^2: reverse over forward mode."""
  net = build(name, **options)
  x, t, cond, along = inputs(name)

  @jax.jit
  @jax.grad
  def of_value(params):
    F, J = jax.jvp(lambda x, t: net.apply(params, x, t, cond), (x, t), along)
    return jnp.mean(F**2) + jnp.mean(J**2)

  return of_value(random_params(net, dtype="float32"))["net"]


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_loops_and_remat_change_no_gradient(name, options):
  expected, found = gradient(name), gradient(name, **options)
  jax.tree.map(lambda a, b: close(a, b, 2e-4), found, expected)
  for leaf in jax.tree.leaves(expected):
    assert jnp.any(leaf != 0)


@models
def test_samples_do_not_meet(name):
  """Sample 2 is the same among others."""
  net = build(name)
  params = random_params(net, dtype="float32")
  x, t, cond, _ = inputs(name)
  order = np.array([3, 3, 2, 1])
  others = jax.tree.map(lambda a: a[order], (x, t, cond))
  F, among = net.apply(params, x, t, cond), net.apply(params, *others)
  close(among, F[order])
  assert jnp.max(jnp.abs(among[0] - F[0])) > 0.01


@models
def test_all_inputs_count(name):
  net = build(name)
  params = random_params(net, dtype="float32")
  x, t, cond, _ = inputs(name)
  F = net.apply(params, x, t, cond)
  moved = [
    (x + 0.1, t, cond),
    (x, t + 0.1, cond),
  ]
  changes = {"label": (cond["label"] + 2) % 3, "observation": cond["observation"] + 0.5}
  moved += [(x, t, cond | {k: changes[k]}) for k in native(name)]
  if name in GUIDED:
    moved.append((x, t, cond | {"guidance": cond["guidance"] + 0.5}))
  for arguments in moved:
    apart = jnp.max(jnp.abs(net.apply(params, *arguments) - F), range(1, x.ndim))
    assert apart.min() > 1e-3


@mostly_slow("dit", "mlp")
def test_conditions_of_every_kind_count(name):
  net = build(name, cond=tuple(COND))
  params = random_params(net, dtype="float32")
  x, t, cond, _ = inputs(name)
  F = net.apply(params, x, t, cond)
  changes = {"label": (cond["label"] + 2) % 3, "observation": cond["observation"] + 0.5}
  changes |= {"angle": cond["angle"] + 0.5, "mask": ~cond["mask"]}
  for changed, value in changes.items():
    apart = jnp.abs(net.apply(params, x, t, cond | {changed: value}) - F)
    assert jnp.max(apart, range(1, x.ndim)).min() > 1e-3
  with pytest.raises(ValueError, match="cond: has no 'mask'"):
    net.apply(params, x, t, {k: v for k, v in cond.items() if k != "mask"})


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    (CondSpec((), np.int32), "cond: 'c' is int32 .*; networks embed floats"),
    (CondSpec((3,), np.int32), "cond: 'c' is int32 .*; networks embed floats"),
    (CondSpec((2,), np.int32, 3), "cond: 'c' has classes, but is int32"),
    (CondSpec((), np.float32, 3), "cond: 'c' has classes, but is float32"),
  ],
)
@models
def test_a_condition_that_cannot_be_embedded_is_refused(name, spec, message):
  with pytest.raises(ValueError, match=message):
    registry.lookup("models", name).build(**CASES[name], cond={"c": spec})
  time = {"time": CondSpec((), np.float32)}
  with pytest.raises(ValueError, match="cond: 'time' is the name of a layer"):
    registry.lookup("models", name).build(**CASES[name], cond=time)


def leaf_of(params: dict, name: str) -> list:
  """Returns the keys of the one layer of a name."""
  paths = jax.tree_util.tree_flatten_with_path(params)[0]
  (found,) = [path for path, _ in paths if any(k.key == name for k in path)]
  return [k.key for k in found]


def without(params: dict, name: str) -> dict:
  """Returns params with the layer's one array at zero."""
  *path, last = leaf_of(params, name)
  params = jax.tree.map(lambda p: p, params)
  at = functools.reduce(dict.__getitem__, path, params)
  at[last] = jnp.zeros_like(at[last])
  return params


@mostly_slow("dit", "mlp", names=[n for n in CASES if "label" in native(n)])
def test_no_label_adds_nothing(name):
  net = build(name)
  params = random_params(net, dtype="float32")
  x, t, cond, _ = inputs(name)
  unlabeled = net.apply(params, x, t, cond | {"label": jnp.full(B, -1)})
  np.testing.assert_array_equal(
    unlabeled, net.apply(without(params, "label"), x, t, cond)
  )


@mostly_slow("dit", "mlp", names=GUIDED)
def test_guidance_starts_without_effect(name):
  """So a student that takes it starts as its teacher, which does not."""
  net, teacher = build(name), build(name, guidance=False)
  start = net.init(jax.random.key(0))
  path = leaf_of(start, "guidance")
  np.testing.assert_array_equal(functools.reduce(dict.__getitem__, path, start), 0)
  params = without(random_params(net, dtype="float32"), "guidance")
  x, t, cond, _ = inputs(name)
  F = net.apply(params, x, t, cond)
  np.testing.assert_array_equal(
    F, net.apply(params, x, t, cond | {"guidance": cond["guidance"] + 1})
  )
  functools.reduce(dict.__getitem__, path[:-2], params).pop("guidance")
  shapes = jax.eval_shape(teacher.init, jax.random.key(0))
  assert jax.tree.structure(params) == jax.tree.structure(shapes)
  np.testing.assert_array_equal(F, teacher.apply(params, x, t, cond))


@mostly_slow("dit", "mlp")
def test_bfloat16_is_close(name):
  """F to 2 % and its tangent to 6 %, in root mean square."""
  x, t, cond, along = inputs(name)
  params = random_params(build(name), dtype="float32")

  @functools.partial(jax.jit, static_argnums=0)
  def both(apply):
    return jax.jvp(lambda x, t: apply(params, x, t, cond), (x, t), along)

  exact = both(build(name).apply)
  rough = both(build(name, dtype="bfloat16").apply)
  for a, b, tolerance in zip(rough, exact, (0.02, 0.06), strict=True):
    assert 1e-4 < jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(b**2)) < tolerance


@mostly_slow("dit", "mlp", names=DROPOUT)
def test_dropout_is_on_with_a_key_alone(name):
  net, plain = build(name, dropout=0.5), build(name)
  params = random_params(net, dtype="float32")
  x, t, cond, _ = inputs(name)
  one, again, two = (
    net.apply(params, x, t, cond, key=jax.random.key(k)) for k in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  assert jnp.max(jnp.abs(one - two)) > 1e-2
  F = plain.apply(params, x, t, cond)
  close(net.apply(params, x, t, cond), F)
  assert jnp.max(jnp.abs(one - F)) > 1e-2


@mostly_slow("dit", "mlp")
def test_init_depends_on_the_key_alone(name):
  net = build(name)
  one, again, two = (net.init(jax.random.key(k)) for k in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, again)
  same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), one, two)
  assert not all(jax.tree.leaves(same["net"]))


@models
def test_logvar_is_apart(name):
  """It depends on its own parameters and t, and the network on neither of them."""
  net = build(name)
  one, two = (random_params(net, k, "float32") for k in (0, 1))
  x, t, cond, _ = inputs(name)
  w, w_two = net.logvar(one, t), net.logvar(two, t)
  assert jnp.std(w) > 0.1
  assert jnp.max(jnp.abs(w - w_two)) > 0.1
  mixed = {"net": one["net"], "logvar": two["logvar"]}
  np.testing.assert_array_equal(net.logvar(mixed, t), w_two)
  np.testing.assert_array_equal(
    net.apply(mixed, x, t, cond), net.apply(one, x, t, cond)
  )


@mostly_slow("edm2", "mlp")
def test_tangents_are_finite_at_zero(name):
  """At x = 0 the derivative of |x| is none; at both ends of t as well."""
  net = build(name)
  x, _, cond, along = inputs(name)
  t = jnp.array([0.0, np.pi / 2, 0.0, np.pi / 2])

  @jax.jit
  def derivatives(params):
    def value(params):
      F, J = jax.jvp(lambda x, t: net.apply(params, x, t, cond), (0 * x, t), along)
      return jnp.sum(F**2), J

    return jax.grad(value, has_aux=True)(params)

  for params in (net.init(jax.random.key(0)), random_params(net, dtype="float32")):
    for leaf in jax.tree.leaves(derivatives(params)):
      assert jnp.all(jnp.isfinite(leaf))


# The transformer.


def test_patches_return_to_their_places():
  """Without attention a pixel reaches its own patch and no other."""
  net = build("dit")
  params = random_params(net, dtype="float32")
  out = params["net"]["blocks"]["attention"]["out"]
  out |= jax.tree.map(jnp.zeros_like, out)
  x, t, cond, _ = inputs("dit")
  jacobian = jax.jacfwd(lambda y: net.apply(params, x.at[0].set(y), t, cond)[0])(x[0])
  reach = np.any(jacobian != 0, axis=(2, 5))  # [H, W, H, W]
  row, col = np.mgrid[:4, :6] // 2
  same = (row[..., None, None] == row) & (col[..., None, None] == col)
  np.testing.assert_array_equal(reach, same)


def test_fused_attention_changes_nothing():
  """Neither F and its tangent, nor the gradient of a loss of both, under remat."""
  x, t, cond, along = inputs("dit")
  params = random_params(build("dit"), dtype="float32")
  plain, fused = (build("dit", attention=name) for name in ("plain", "fused"))
  both = [
    jax.jit(functools.partial(jax.jvp, functools.partial(net.apply, params, cond=cond)))
    for net in (plain, fused)
  ]
  jax.tree.map(close, both[1]((x, t), along), both[0]((x, t), along))
  found = gradient("dit", attention="fused", remat="full")
  jax.tree.map(lambda a, b: close(a, b, 2e-4), found, gradient("dit"))


def test_positions_differ():
  p = dit.positions(5, 7, 16)
  assert (p.shape, p.dtype) == ((35, 16), np.float32)
  gaps = np.linalg.norm(p[:, None] - p[None], axis=-1)
  assert (gaps + np.eye(35)).min() > 0.1
  # The distance of two patches depends on how far apart they are alone.
  grid = p.reshape(5, 7, 16)
  for step in (grid[1:] - grid[:-1], grid[:, 1:] - grid[:, :-1]):
    lengths = np.linalg.norm(step, axis=-1)
    close(lengths, lengths[0, 0])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"shape": (4, 5, 1)}, r"patch=2: must divide .* of \(4, 5, 1\)"),
    ({"shape": (4, 4)}, r"patch=2: must divide height and width"),
    ({"width": 18, "heads": 3}, r"width=18: must be a multiple of 4"),
    ({"width": 16, "heads": 3}, r"width=16: .* heads=3"),
    ({"attention": "flash"}, r"attention='flash': must be one of auto, plain"),
  ],
)
def test_sizes_that_do_not_divide(options, message):
  with pytest.raises(ValueError, match=message):
    dit.build(**{"shape": (4, 4, 1), "cond": {}} | options)


# Layers.


@x64
def test_embedding_of_the_angle_is_slow():
  """Frequencies fall from 1 to 1e-4, so |d/dt| <= 1: nothing explodes in dF/dt."""
  t = jnp.linspace(0, np.pi / 2, 50)
  value, slope = jax.jvp(
    lambda t: common_lib.positional(t, 16), (t,), (jnp.ones_like(t),)
  )
  assert value.shape == (50, 16)
  assert jnp.max(jnp.abs(slope)) <= 1
  close(slope[0, 8:], 10_000.0 ** (-np.arange(8) / 7))
  close(value[:, :8] ** 2 + value[:, 8:] ** 2, 1)


def test_norms():
  rng = np.random.default_rng(0)
  x = jnp.asarray(5 + 3 * rng.normal(size=(4, 64)), jnp.float32)
  close(common_lib.rms_norm(x), x / np.sqrt(np.mean(np.square(x), 1, keepdims=True)))
  centred = np.asarray(x) - np.mean(x, 1, keepdims=True)
  close(common_lib.layer_norm(x), centred / np.std(x, 1, keepdims=True))
  assert common_lib.rms_norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_adaptive_double_norm():
  """norm(x) pnorm(s(emb)) + pnorm(b(emb)), for tokens and for vectors."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
  emb = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
  norm = common_lib.AdaptiveDoubleNorm(jnp.dtype("float32"))
  params = norm.init(jax.random.key(0), x, emb)
  scale, shift = (
    common_lib.rms_norm(emb @ p["kernel"] + p["bias"][None])[:, None]
    for p in (params["params"][k] for k in ("scale", "shift"))
  )
  y = norm.apply(params, x, emb)
  close(y, common_lib.layer_norm(x) * scale + shift)
  close(norm.apply(params, x[:, 2], emb), y[:, 2])
  assert jnp.min(jnp.mean(scale**2, -1)) > 0.9


def test_adaptive_norm_without_the_second_norm():
  """norm(x) (1 + s(emb)) + b(emb), of the same parameters."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
  emb = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
  norm = common_lib.AdaptiveNorm(jnp.dtype("float32"))
  double = common_lib.AdaptiveDoubleNorm(jnp.dtype("float32"))
  params = norm.init(jax.random.key(0), x, emb)
  assert jax.tree.all(
    jax.tree.map(jnp.array_equal, params, double.init(jax.random.key(0), x, emb))
  )
  scale, shift = (
    (emb @ p["kernel"] + p["bias"][None])[:, None]
    for p in (params["params"][k] for k in ("scale", "shift"))
  )
  close(norm.apply(params, x, emb), common_lib.layer_norm(x) * (1 + scale) + shift)


@x64
def test_fourier_features_are_fast():
  """cos and sin of 2 pi 16 n t with normal n, one draw for all."""
  t = jnp.linspace(0, np.pi / 2, 50)
  value, slope = jax.jvp(
    lambda t: common_lib.fourier(t, 512), (t,), (jnp.ones_like(t),)
  )
  cos, sin = np.split(value, 2, axis=1)
  close(cos**2 + sin**2, 1)
  frequencies = slope[0, 256:]  # those of the sines, at 0
  angles = t[:, None] * frequencies[None]
  close(cos, np.cos(angles))
  close(sin, np.sin(angles))
  assert np.std(frequencies) == pytest.approx(2 * np.pi * 16, rel=0.15)
  assert abs(np.mean(frequencies)) < 20
  np.testing.assert_array_equal(common_lib.fourier(t, 512), value)


# The MLP without one of what stabilizes the tangent.
PLAIN = ({"process": "edm"}, {"embedding": "fourier"}, {"norm": "single"})


@pytest.mark.parametrize("options", PLAIN)
@x64
def test_every_mlp_has_a_derivative(options):
  net = build("mlp", dtype="float64", sigma_d=0.5, **options)
  x, t, cond, along = inputs("mlp", "float64")
  params = random_params(net)

  def F(x, t):
    return net.apply(params, x, t, cond)

  expected = central(F, (x, t), along, 1e-7 if "embedding" in options else 1e-5)
  np.testing.assert_allclose(jax.jvp(F, (x, t), along)[1], expected, rtol=1e-4)
  assert jnp.std(F(x, t)) > 0.01
  single = "AdaptiveNorm_0" in params["net"]["blocks"]
  assert single == ("norm" in options)


@x64
def test_the_mlp_of_edms_time():
  """F = -raw(x, ln(sigma_d tan t) / 4), and w of the same time."""
  net = build("mlp", process="edm", sigma_d=0.5, dtype="float64")
  raw = build("mlp", dtype="float64")
  x, t, cond, _ = inputs("mlp", "float64")
  params = random_params(raw)
  c_noise = jnp.log(0.5 * jnp.tan(t)) / 4
  close(net.apply(params, x, t, cond), -raw.apply(params, x, c_noise, cond), 1e-12)
  close(net.logvar(params, t), raw.logvar(params, c_noise), 1e-12)


@pytest.mark.parametrize(
  ("options", "known"),
  [
    ({"process": "vp"}, "process='vp': must be one of trigflow, edm"),
    ({"embedding": "rope"}, "embedding='rope': must be one of positional, fourier"),
    ({"norm": "scale"}, "norm='scale': must be one of double, single"),
  ],
)
def test_unknown_names_of_the_mlp(options, known):
  with pytest.raises(ValueError, match=rf"^{known}"):
    mlp.build(shape=(2,), cond={}, **options)


def test_the_mlps_parameters_keep_their_names():
  """A run that was trained before can be read."""
  shapes = jax.eval_shape(build("mlp").init, jax.random.key(0))["net"]
  assert {*shapes["blocks"]} == {"AdaptiveDoubleNorm_0", "Dense_0", "Dense_1"}
  assert {"in", "out_norm", "gain", "shift", "blocks"} < {*shapes}


def test_wide_keeps_what_is_wide():
  for narrow in ("bfloat16", "float16"):
    assert common_lib.to_accumulation_dtype(jnp.zeros(2, narrow)).dtype == jnp.float32
  assert common_lib.to_accumulation_dtype(jnp.zeros(2)).dtype == jnp.float32


@pytest.mark.parametrize(
  "name", [name for name in CASES if "remat" in registry.fields("models", name)]
)
def test_an_unknown_way_to_recompute_is_refused_at_once(name):
  ways = "'', weights, dots, full"
  with pytest.raises(ValueError, match=f"remat='half': must be one of {ways}"):
    build(name, remat="half")


def test_the_last_blocks_of_a_decoupled_transformer_see_the_end_time_alone():
  """Decoupled MeanFlow: a velocity network's weights, and its output at s = t."""
  shape, end_time = (4, 4, 2), {END_TIME: CondSpec((), np.float32)}
  label = {"label": CondSpec((), np.int32, num_classes=3)}
  sizes = {"shape": shape, "width": 16, "depth": 3, "heads": 2}
  plain = dit.build(cond=label, **sizes)
  decoupled = dit.build(cond=label | end_time, decoder_blocks=1, **sizes)
  params = random_params(plain, dtype="float32")
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
    jnp.shape, jax.eval_shape(decoupled.init, jax.random.key(0))
  )
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32)
  t, label = jnp.array([0.4, 1.3]), jnp.array([0, 2])

  @jax.jit
  def both(params, t, s):
    cond = {"label": label}
    timed = decoupled.apply(params, x, t, {**cond, END_TIME: s})
    return timed, plain.apply(params, x, t, cond)

  np.testing.assert_array_equal(*both(params, t, t))
  outputs = [both(params, *times)[0] for times in ((t, t), (t, 0 * t), (0 * t, t))]
  assert min(rms(outputs[0] - other) for other in outputs[1:]) > 1e-3
  # Without the blocks of the encoder nothing sees t.
  blocks = params["net"]["blocks"]
  for name in ("attention", "mlp"):
    out = blocks[name]["out"]
    blocks[name]["out"] = jax.tree.map(lambda p: p.at[:2].set(0), out)
  np.testing.assert_array_equal(both(params, t, t)[0], both(params, 0 * t, t)[0])
  assert rms(both(params, t, t)[0] - both(params, t, 0 * t)[0]) > 1e-3


@pytest.mark.parametrize(
  ("cond", "blocks", "message"),
  [
    (
      {END_TIME: CondSpec((), np.float32)},
      4,
      "decoder_blocks=4: must be at most depth=3",
    ),
    ({}, 1, "decoder_blocks=1: needs the condition 'end_time'"),
  ],
)
def test_decoder_blocks_need_an_end_time(cond, blocks, message):
  with pytest.raises(ValueError, match=message):
    dit.build(shape=(4, 4, 1), cond=cond, depth=3, decoder_blocks=blocks)
