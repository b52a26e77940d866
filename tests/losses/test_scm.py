"""The consistency objective: its tangent against derivatives of f, its gradient."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian, central, random_params
from hypothesis import strategies as st

from sdiff_jax import losses
from sdiff_jax.data import class_cond
from sdiff_jax.diffusion import trigflow
from sdiff_jax.losses import ConsistencyOptions, _weighting, scm
from sdiff_jax.models import mlp
from sdiff_jax.types import Network

SIGMA_D = 0.6
SHAPE = (2, 3)
D = 6
x64 = pytest.mark.usefixtures("x64")


def states(seed: int = 0, batch: int = 5):
  """Returns float64 x_t, v [B, *SHAPE] and t [B] with both ends well inside."""
  rng = np.random.default_rng(seed)
  xt, v = rng.normal(size=(2, batch, *SHAPE))
  return jnp.asarray(xt), jnp.asarray(rng.uniform(0.1, 1.5, batch)), jnp.asarray(v)


@functools.cache
def network(dtype: str = "float64", num_classes: int = 0, **options):
  """Returns a small MLP and parameters without a zero layer."""
  options |= {"cond": class_cond(num_classes), "dtype": dtype}
  net = mlp.build(shape=SHAPE, width=16, depth=2, **options)
  # Compiled once, where loops inside would be for every call.
  return net._replace(apply=jax.jit(net.apply)), random_params(net, dtype=dtype)


def bound(**options):
  net, params = network(num_classes=0, **options)
  return functools.partial(net.apply, params)


def column(a, x):
  return trigflow.expand(a, x)


# The tangent.


@x64
@pytest.mark.parametrize("cond", [pytest.param(None, marks=pytest.mark.slow), "label"])
def test_tangent_is_the_derivative_of_f_along_the_trajectory(cond):
  xt, t, v = states()
  net, params = network(num_classes=3 if cond else 0)
  cond = {"label": jnp.array([0, 1, 2, -1, 1])} if cond else None
  net = functools.partial(net.apply, params)
  F, g = scm.tangent(net, xt, t, v, cond, sigma_d=SIGMA_D)

  def f(xt, t):
    return trigflow.denoise(xt, net(xt / SIGMA_D, t, cond), t, SIGMA_D)

  slope = central(f, (xt, t), (v, jnp.ones_like(t)))
  expected = column(jnp.cos(t), xt) * slope
  assert jnp.min(jnp.sqrt(jnp.mean(expected**2, (1, 2)))) > 0.1
  np.testing.assert_allclose(g, expected, rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(F, net(xt / SIGMA_D, t, cond), rtol=1e-12)


@x64
def test_parts_are_the_terms_of_the_tangent():
  xt, t, v = states()
  net = bound()
  parts = scm.tangent_terms(net, xt, t, v, None, sigma_d=SIGMA_D)
  _, g = scm.tangent(net, xt, t, v, None, sigma_d=SIGMA_D)
  np.testing.assert_allclose(sum(parts.values()), g, rtol=1e-6, atol=1e-9)
  c, s = column(jnp.cos(t), xt), column(jnp.sin(t), xt)
  F = net(xt / SIGMA_D, t, None)
  np.testing.assert_allclose(parts["velocity"], -(c**2) * (SIGMA_D * F - v), rtol=1e-9)
  np.testing.assert_allclose(parts["state"], -c * s * xt, rtol=1e-12)

  def f(xt, t):
    return SIGMA_D * net(xt / SIGMA_D, t, None)

  for name, along in (
    ("grad_x", (v, jnp.zeros_like(t))),
    ("d_t", (jnp.zeros_like(xt), jnp.ones_like(t))),
  ):
    slope = -c * s * central(f, (xt, t), along)
    assert jnp.sqrt(jnp.mean(slope**2)) > 0.01
    np.testing.assert_allclose(parts[name], slope, rtol=1e-6, atol=1e-7)


@x64
def test_warmup_takes_the_network_derivative_out():
  """g is affine in r; at 0 it is -cos^2 t (sigma_d F - v)."""
  xt, t, v = states()
  net = bound()
  tangent = functools.partial(scm.tangent, net, xt, t, v, None, sigma_d=SIGMA_D)
  F, start = tangent(r=0.0)
  matching = -(column(jnp.cos(t), xt) ** 2) * (SIGMA_D * F - v)
  np.testing.assert_allclose(start, matching, rtol=1e-12)
  end, half = tangent(r=1.0)[1], tangent(r=0.5)[1]
  np.testing.assert_allclose(half, (start + end) / 2, rtol=1e-12)
  assert not np.allclose(start, end, atol=0.1)


@x64
def test_tangent_vanishes_at_the_true_consistency_function():
  rng = np.random.default_rng(0)
  mean, std = rng.normal(size=(1, *SHAPE)), rng.uniform(0.1, 2, (1, *SHAPE))
  truth = Gaussian(jnp.asarray(mean), jnp.asarray(std), SIGMA_D)
  xt, t, _ = states(batch=200)
  v = truth.velocity(xt, t)
  _, g = scm.tangent(truth.consistency_net, xt, t, v, None, sigma_d=SIGMA_D)
  np.testing.assert_allclose(g, 0, atol=1e-10)
  # A network that is off by 1 % is seen.
  _, g = scm.tangent(
    lambda x, t, cond: 1.01 * truth.consistency_net(x, t),
    *(xt, t, v, None),
    sigma_d=SIGMA_D,
  )
  assert jnp.sqrt(jnp.mean(g**2)) > 1e-3


@x64
def test_training_tangent_is_the_distillation_tangent_on_average():
  """E over x0 given x_t of g(data velocity) = g(velocity of the flow)."""
  data = Gaussian(jnp.full((1, *SHAPE), 0.3), jnp.full((1, *SHAPE), 0.8), SIGMA_D)
  net = bound()
  xt, t, _ = states()
  mean, std = data.posterior(xt, t)
  c, s = column(jnp.cos(t), xt), column(jnp.sin(t), xt)
  nodes, weights = np.polynomial.hermite_e.hermegauss(9)

  def at(node):
    """One node for every dimension at once: g is affine in each."""
    x0 = mean + std * node
    v = trigflow.velocity(x0, (xt - c * x0) / s, t)
    return scm.tangent(net, xt, t, v, None, sigma_d=SIGMA_D)[1]

  total = sum(w * at(node) for node, w in zip(nodes, weights, strict=True))
  v = data.velocity(xt, t)
  _, expected = scm.tangent(net, xt, t, v, None, sigma_d=SIGMA_D)
  np.testing.assert_allclose(total / weights.sum(), expected, rtol=1e-10, atol=1e-10)
  assert not np.allclose(at(1.0), expected, atol=0.1)


@x64
@hypothesis.settings(
  max_examples=10,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(k=st.floats(0.01, 100))
def test_tangent_scales_with_the_data(k):
  """x, v and sigma_d times k is g times k."""
  xt, t, v = states()
  net = bound()
  F, g = scm.tangent(net, xt, t, v, None, sigma_d=SIGMA_D)
  F_k, g_k = scm.tangent(net, k * xt, t, k * v, None, sigma_d=float(k) * SIGMA_D)
  np.testing.assert_allclose(F_k, F, rtol=1e-9)
  np.testing.assert_allclose(g_k, k * g, rtol=1e-9, atol=1e-9 * k)


@x64
def test_dropout_has_one_mask_for_the_network_and_its_tangent():
  xt, t, v = states()
  net, params = network(num_classes=0, dropout=0.4)

  def f(seed, xt, t):
    F = net.apply(params, xt / SIGMA_D, t, None, key=jax.random.key(seed))
    return trigflow.denoise(xt, F, t, SIGMA_D)

  dropped = functools.partial(net.apply, params, key=jax.random.key(3))
  _, g = scm.tangent(dropped, xt, t, v, None, sigma_d=SIGMA_D)
  slope = central(functools.partial(f, 3), (xt, t), (v, jnp.ones_like(t)))
  np.testing.assert_allclose(g, column(jnp.cos(t), xt) * slope, rtol=1e-6, atol=1e-7)
  other = central(functools.partial(f, 4), (xt, t), (v, jnp.ones_like(t)))
  assert not np.allclose(slope, other, atol=0.01)


# Normalizers of the tangent.


@pytest.mark.parametrize("name", losses.TANGENT_NORMALIZERS)
def test_normalizers(name):
  rng = np.random.default_rng(0)
  scale = 10.0 ** rng.uniform(-3, 3, (7, 1, 1))
  g = (scale * rng.normal(size=(7, *SHAPE))).astype(np.float32)
  t = rng.uniform(0.1, 1.5, 7).astype(np.float32)
  c = 0.3
  flat, cos = g.reshape(7, -1), np.cos(t)[:, None, None]
  length = np.linalg.norm(flat, axis=1)[:, None, None]
  expected = {
    "rms": g / (length / D**0.5 + c),
    "l2": g / (length + c),
    "clip": np.clip(g / cos, -1, 1) * cos,
    "none": g,
  }[name]
  found = losses.normalize_tangent(jnp.asarray(g), jnp.asarray(t), normalizer=name, c=c)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_normalizers_allow_a_zero_tangent():
  for name in losses.TANGENT_NORMALIZERS:
    g = losses.normalize_tangent(jnp.zeros((2, 3)), jnp.ones(2), normalizer=name)
    np.testing.assert_array_equal(g, 0)


# The loss.


def teacher(frozen, x, t, cond):
  """A closed-form teacher with one parameter, and labels where there are any."""
  shift = 0.0
  if cond is not None:
    shift = 0.3 * column(cond["label"].astype(x.dtype), x)
  return frozen * jnp.sin(2 * x) * column(jnp.cos(t), x) + shift


FROZEN = jnp.float32(0.7)
BATCH = {
  "x0": jnp.asarray(np.random.default_rng(1).normal(size=(8, *SHAPE)), jnp.float32),
  "cond": None,
}


@pytest.fixture
def seen(monkeypatch):
  """Collects the arguments of every call of `tangent`."""
  calls, real = [], scm.tangent

  def spy(net, xt, t, v, cond, **options):
    calls.append({"xt": xt, "t": t, "v": v, "cond": cond} | options)
    return real(net, xt, t, v, cond, **options)

  monkeypatch.setattr(scm, "tangent", spy)
  return calls


# A network of one number, for what does not depend on the network.
LINEAR = Network(
  init=lambda key: jnp.float32(0.5),
  apply=lambda params, x, t, cond, *, key=None: params * x,
  logvar=lambda params, t: params * t,
)


def build(net=LINEAR, teacher=teacher, velocity="teacher", **options):
  return scm.build(
    network=net,
    teacher=teacher,
    sigma_d=SIGMA_D,
    velocity=velocity,
    options=ConsistencyOptions(**{"c": 0.3, "warmup_steps": 0} | options),
  )


def run(loss, params=FROZEN, step: int = 0, batch=BATCH):
  return loss(params, batch, jax.random.key(5), jnp.int32(step), FROZEN)


def oracle(params, call, tangent_normalizer, c=0.3):
  """Returns the normalized tangent of a call, by central differences in float64."""
  with jax.enable_x64(True):
    wide = mlp.build(shape=SHAPE, cond={}, width=16, depth=2, dtype="float64")
    params = jax.tree.map(lambda p: jnp.asarray(p, "float64"), params)
    xt, t, v = (jnp.asarray(np.asarray(call[k], "float64")) for k in ("xt", "t", "v"))

    def F(x, t):
      return wide.apply(params, x, t, None)

    at, along = (xt / SIGMA_D, t), (v / SIGMA_D, jnp.ones_like(t))
    cos, sin = column(jnp.cos(t), xt), column(jnp.sin(t), xt)
    slope = xt + SIGMA_D * central(F, at, along)
    g = -(cos**2) * (SIGMA_D * F(*at) - v) - float(call["r"]) * cos * sin * slope
    g = losses.normalize_tangent(g, t, normalizer=tangent_normalizer, c=c)
    g = np.asarray(g)
  return g


@pytest.mark.parametrize(
  ("velocity", "tangent_normalizer", "adaptive"),
  [("teacher", "rms", True), ("data", "none", False), ("teacher", "clip", True)],
)
def test_value_and_gradient_of_the_loss(
  seen, key, velocity, tangent_normalizer, adaptive
):
  """e^w/D |g|^2 - w, and -2 e^w/D g dF/dparams: none through F^- or the tangent."""
  net, params = network("float32", num_classes=0)
  loss = build(
    net,
    velocity=velocity,
    tangent_normalizer=tangent_normalizer,
    adaptive_weight=adaptive,
  )
  of_loss = jax.value_and_grad(loss, has_aux=True)
  (value, aux), grads = of_loss(params, BATCH, key, jnp.int32(0), FROZEN)
  (call,) = seen
  g = jnp.asarray(oracle(params, call, tangent_normalizer), jnp.float32)
  w, back_w = jax.vjp(lambda p: net.logvar(p, call["t"]), params)
  assert jnp.std(w) > 0.1
  w_or_0 = w if adaptive else jnp.zeros_like(w)
  mse = jnp.mean(g**2, (1, 2))
  expected = jnp.mean(jnp.exp(w_or_0) * mse - w_or_0)
  assert float(value) == pytest.approx(float(expected), rel=1e-4)
  assert float(aux["mse"]) == pytest.approx(float(jnp.mean(mse)), rel=1e-4)

  _, back_F = jax.vjp(
    lambda p: net.apply(p, call["xt"] / SIGMA_D, call["t"], None), params
  )
  by_hand = back_F(-2 * column(jnp.exp(w_or_0), g) / (8 * D) * g)[0]
  if adaptive:
    by_hand["logvar"] = back_w((jnp.exp(w) * mse - 1) / 8)[0]["logvar"]
  leaves = jax.tree.leaves(grads), jax.tree.leaves(by_hand)
  for found, wanted in zip(*leaves, strict=True):
    size = float(jnp.max(jnp.abs(wanted)))
    np.testing.assert_allclose(found, wanted, atol=1e-4 * size + 1e-9)
  assert jnp.max(jnp.abs(by_hand["net"]["shift"]["kernel"])) > 1e-3


def test_no_gradient_reaches_the_teacher(key):
  """Not even where teacher and student share their parameters."""
  net, params = network("float32", num_classes=0)
  loss = build(net, teacher=net.apply)

  def value(student, frozen):
    return loss(student, BATCH, key, jnp.int32(0), frozen)[0]

  student, frozen = jax.grad(value, (0, 1))(params, params)
  for leaf in jax.tree.leaves(frozen):
    np.testing.assert_array_equal(leaf, 0)
  shared = jax.grad(lambda p: value(p, p))(params)
  jax.tree.map(np.testing.assert_array_equal, shared, student)
  assert jnp.max(jnp.abs(student["net"]["shift"]["kernel"])) > 0


def test_velocities_are_those_of_data_and_teacher(seen, monkeypatch):
  drawn, real = [], trigflow.perturb

  def perturb(*args):
    drawn.append(args)
    return real(*args)

  monkeypatch.setattr(trigflow, "perturb", perturb)
  run(build(velocity="teacher"))
  run(build(velocity="data"))
  distill, train = seen
  x0, z, t = drawn[0]
  np.testing.assert_array_equal(x0, BATCH["x0"])
  assert np.std(z) == pytest.approx(SIGMA_D, rel=0.3)
  np.testing.assert_allclose(distill["xt"], real(x0, z, t), rtol=1e-6)
  F = teacher(FROZEN, distill["xt"] / SIGMA_D, t, None)
  np.testing.assert_allclose(distill["v"], SIGMA_D * F, rtol=1e-5, atol=1e-6)
  x0, z, t = drawn[1]
  c, s = column(jnp.cos(t), z), column(jnp.sin(t), z)
  np.testing.assert_allclose(train["v"], c * z - s * x0, rtol=1e-5, atol=1e-6)


def test_warmup_follows_the_step(seen):
  loss = build(warmup_steps=10)
  for step in (0, 4, 25):
    run(loss, step=step)
  np.testing.assert_allclose([c["r"] for c in seen], [0, 0.4, 1], rtol=1e-6)


def test_angles_are_log_normal(seen):
  batch = {"x0": jnp.zeros((4000, *SHAPE)), "cond": None}
  run(build(p_mean=-0.5, p_std=0.4), batch=batch)
  tau = np.log(SIGMA_D * np.tan(seen[0]["t"]))
  assert tau.mean() == pytest.approx(-0.5, abs=0.03)
  assert tau.std() == pytest.approx(0.4, abs=0.03)


def test_guidance_is_distilled_over_its_range(seen):
  """The student is told the scale s and follows F_u + s (F_c - F_u)."""
  label = jnp.arange(200) % 4
  rng = np.random.default_rng(0)
  x0 = jnp.asarray(rng.normal(size=(200, *SHAPE)), jnp.float32)
  run(build(guidance=(1.0, 2.5)), batch={"x0": x0, "cond": {"label": label}})
  (call,) = seen
  s = call["cond"]["guidance"]
  assert 1 <= s.min() < 1.1
  assert 2.4 < s.max() <= 2.5
  assert s.dtype == jnp.float32
  np.testing.assert_array_equal(call["cond"]["label"], label)
  x, t = call["xt"] / SIGMA_D, call["t"]
  F_c = teacher(FROZEN, x, t, {"label": label})
  F_u = teacher(FROZEN, x, t, {"label": jnp.full(200, -1)})
  v = SIGMA_D * (F_u + column(s, x) * (F_c - F_u))
  np.testing.assert_allclose(call["v"], v, rtol=1e-4, atol=1e-5)


def test_dropout_is_on_in_training():
  """The same parameters and step cost another value without dropout."""
  net, params = network("float32", num_classes=0, dropout=0.5)
  without, _ = network("float32", num_classes=0)
  dropped, kept = (run(build(n), params)[0] for n in (net, without))
  assert abs(float(dropped - kept)) > 1e-3


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"velocity": "both"}, r"^velocity='both': must be one of teacher, data"),
    (
      {"tangent_normalizer": "tanh"},
      r"^tangent_normalizer='tanh': must be one of rms, l2",
    ),
    ({"teacher": None}, r"^velocity='teacher': needs a teacher"),
    (
      {"velocity": "data", "guidance": (1.0, 2.0)},
      r"^guidance=\(1\.0, 2\.0\): only velocity='teacher' can",
    ),
  ],
)
def test_mistakes_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    build(**options)


# The adaptive weight.


@hypothesis.given(seed=st.integers(0, 10**6))
def test_best_weight_is_the_inverse_of_the_mean_square(seed):
  """At e^w = 1 / E[mse] the derivative in w is 0, and the loss is 1 + ln E[mse]."""
  rng = np.random.default_rng(seed)
  error = jnp.asarray(rng.normal(size=(16, 3)) * rng.uniform(0.1, 10), jnp.float32)

  def value(w):
    return jnp.mean(_weighting.adaptive(error, jnp.full(16, w))[0])

  mean = float(jnp.mean(error**2))
  best = -np.log(mean)
  loss, slope = jax.value_and_grad(value)(jnp.float32(best))
  assert float(slope) == pytest.approx(0, abs=1e-4)
  assert float(loss) == pytest.approx(1 + np.log(mean), abs=1e-4)
  assert value(jnp.float32(best + 0.1)) > loss < value(jnp.float32(best - 0.1))


def test_without_a_weight_the_loss_is_the_mean_square():
  error = jnp.arange(24.0).reshape(2, 3, 4)
  loss, mse = _weighting.adaptive(error, None)
  np.testing.assert_allclose(loss, np.mean(np.square(error), (1, 2)))
  np.testing.assert_array_equal(loss, mse)
  half = _weighting.adaptive(error.astype(jnp.float16) * 100, jnp.zeros(2))
  assert half[0].dtype == jnp.float32
  np.testing.assert_allclose(half[1], 1e4 * mse, rtol=1e-2)
