"""The contract of every network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import central, random_params
from small_networks import (
  CASES,
  COND,
  GUIDED,
  B,
  build,
  close,
  gradient,
  inputs,
  native,
)

from sdiff_jax import registry
from sdiff_jax.types import CondSpec

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


DROPOUT = [name for name in CASES if "dropout" in registry.fields("models", name)]
x64 = pytest.mark.usefixtures("x64")


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


@pytest.mark.parametrize(
  "name", [name for name in CASES if "remat" in registry.fields("models", name)]
)
def test_an_unknown_way_to_recompute_is_refused_at_once(name):
  ways = "'', weights, dots, full"
  with pytest.raises(ValueError, match=f"remat='half': must be one of {ways}"):
    build(name, remat="half")
