"""VSD: whose gradients go where, and that it finds the data's distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_forms import Gaussian, random_params

from sdiff_jax.data import class_cond
from sdiff_jax.diffusion import guidance, trigflow
from sdiff_jax.losses import ConsistencyOptions, scm, vsd
from sdiff_jax.models import mlp
from sdiff_jax.types import Network

SIGMA_D = 0.5
START = float(np.arctan(80 / SIGMA_D))
TRUTH = Gaussian(0.4, 0.3, SIGMA_D)
STEP = jnp.int32(0)


def teacher(frozen, x, t, cond):
  return frozen * TRUTH.diffusion_net(x, t)


def apply(params, x, t, cond, *, key=None):
  """A consistency model of a Gaussian at the start, a diffusion model elsewhere."""
  own = Gaussian(params["net"]["mean"], jnp.exp(params["net"]["log_std"]), SIGMA_D)
  at_start = trigflow.expand(t > START - 1e-4, x)
  return jnp.where(at_start, own.consistency_net(x, t), own.diffusion_net(x, t))


GAUSSIAN = Network(
  init=lambda key: {
    "net": {"mean": jnp.float32(-0.2), "log_std": jnp.float32(-0.3)},
    "logvar": jnp.float32(0.0),
  },
  apply=apply,
  logvar=lambda params, t: params["logvar"] * jnp.ones_like(t),
)
BATCH = {"x0": jnp.zeros((256, 1)), "cond": None}


def test_alone_it_finds_the_distribution():
  """A Gaussian student with a Gaussian fake reaches the teacher's mean and std."""
  loss = vsd.build(
    network=GAUSSIAN,
    teacher=teacher,
    sigma_d=SIGMA_D,
    consistency=False,
    options=ConsistencyOptions(adaptive_weight=False),
  )
  optimizer = optax.adam(optax.cosine_decay_schedule(0.01, 1500))

  @jax.jit
  def train(params):
    def body(carry, i):
      params, state = carry
      key = jax.random.fold_in(jax.random.key(0), i)
      grads = jax.grad(lambda p: loss(p, BATCH, key, STEP, 1.0)[0])(params)
      updates, state = optimizer.update(grads, state)
      return (optax.apply_updates(params, updates), state), None

    with jax.numpy_dtype_promotion("standard"):
      start = (params, optimizer.init(params))
      return jax.lax.scan(body, start, jnp.arange(1500))[0][0]

  end = train(vsd.init_extra_params(GAUSSIAN.init(None)))
  for found in (end["net"], end["fake"]["net"]):
    assert float(found["mean"]) == pytest.approx(0.4, abs=0.02)
    assert float(jnp.exp(found["log_std"])) == pytest.approx(0.3, abs=0.02)


@pytest.fixture
def case():
  network = mlp.build(shape=(3,), cond=class_cond(2), guidance=True, width=8, depth=1)
  rng = np.random.default_rng(0)
  params = vsd.init_extra_params(random_params(network, dtype="float32"))
  params["fake"] = jax.tree.map(lambda p: p + 0.1, params["fake"])

  def teacher(frozen, x, t, cond):
    shift = 0.3 * trigflow.expand(cond["label"].astype(x.dtype), x)
    return frozen * jnp.sin(2 * x) + shift

  batch = {
    "x0": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
    "cond": {"label": jnp.arange(8) % 2},
  }
  options = {"network": network, "teacher": teacher, "sigma_d": SIGMA_D}
  options["options"] = ConsistencyOptions(guidance=(1.0, 2.0), warmup_steps=0)
  return options, params, batch


def gradient(loss, params, batch):
  return jax.jit(jax.grad(lambda p: value(loss, p, batch)))(params)


def value(loss, params, batch):
  return loss(params, batch, jax.random.key(3), STEP, jnp.float32(0.7))[0]


def test_each_part_moves_its_own_network(case, monkeypatch):
  """By hand: the student along F_teacher - F_fake, the fake as a diffusion model."""
  options, params, batch = case
  calls = []
  real = vsd._noisy

  def spy(*args, **more):
    calls.append((args[1], *real(*args, **more)))
    return calls[-1][1:]

  monkeypatch.setattr(vsd, "_noisy", spy)
  scales = []
  sample_scale = guidance.sample_scale
  monkeypatch.setattr(
    guidance,
    "sample_scale",
    lambda *args: scales.append(sample_scale(*args)) or scales[-1],
  )
  loss = vsd.build(**options, consistency=False)
  found = gradient(loss, params, batch)

  @jax.jit
  def parts(params):
    del calls[:], scales[:]
    value(loss, params, batch)
    return calls, scales[0]

  ((made, z, t_fake, x_fake), (_, _, t, xt)), cond = parts(params)
  apply = options["network"].apply

  def of_fake(net):
    F = apply(params | {"net": net}, x_fake / SIGMA_D, t_fake, cond)
    return jnp.mean((F - trigflow.velocity(made, z, t_fake) / SIGMA_D) ** 2)

  close(found["fake"]["net"], jax.jit(jax.grad(of_fake))(params["fake"]["net"]))

  def guided(label):
    return options["teacher"](0.7, xt / SIGMA_D, t, {"label": label})

  s = cond["guidance"][:, None]
  F_u, F_c = guided(jnp.full(8, -1)), guided(batch["cond"]["label"])
  theirs = F_u + s * (F_c - F_u)
  direction = theirs - apply(params["fake"], xt / SIGMA_D, t, cond)
  w = options["network"].logvar(params["fake"], t)
  assert jnp.std(direction) > 0.05

  # The start's noise, from the sample that it made, is not needed: f of it is `made`.
  key_start = jax.random.split(jax.random.key(3), 6)[2]
  z0 = SIGMA_D * jax.random.normal(key_start, (8, 3))
  start = jnp.full(8, START, jnp.float32)

  def sample(net):
    F = apply(params | {"net": net}, z0 / SIGMA_D, start, cond)
    return trigflow.denoise(z0, F, start, SIGMA_D)

  sampled, back = jax.vjp(jax.jit(sample), params["net"])
  np.testing.assert_allclose(sampled, made, rtol=1e-5, atol=1e-6)
  (by_hand,) = back(2 * jnp.exp(w)[:, None] / (8 * 3) * direction)
  close(found["net"], by_hand)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(found["logvar"]))
  assert any(np.any(leaf) for leaf in jax.tree.leaves(found["fake"]["logvar"]))


def close(found, wanted):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.max(jnp.abs(b))) + 1e-8)


@pytest.mark.slow
def test_with_distillation_it_is_the_sum(case):
  options, params, batch = case
  both, alone = (vsd.build(**options, consistency=c) for c in (True, False))
  distill = scm.build(**options)
  key = jax.random.split(jax.random.key(3), 6)[0]
  frozen = jnp.float32(0.7)
  of_scd = jax.jit(jax.grad(lambda p: distill(p, batch, key, STEP, frozen)[0]))
  expected = of_scd(params)
  total = jax.tree.map(jnp.add, gradient(alone, params, batch), expected)
  close(gradient(both, params, batch), total)
