"""The trainer: a step from Python, initial weights, and its state on a mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdiff_jax.distributed import sharding
from sdiff_jax.losses import diffusion, scm
from sdiff_jax.training import ema, trainer
from sdiff_jax.types import Network

PROFILE = "power/0.1"


def apply(params, x, t, cond, *, key=None):
  return params["net"]["w"] * x + params["net"]["b"] * jnp.cos(t)[:, None]


LINEAR = Network(
  init=lambda key: {
    "net": {"w": jax.random.normal(key), "b": jnp.float32(0.0)},
    "logvar": jnp.float32(0.0),
  },
  apply=apply,
  logvar=lambda params, t: params["logvar"] * t,
)
X0 = np.linspace(-1, 1, 8, dtype="float32")[:, None] * np.ones(2, "float32")
BATCH = {"x0": jnp.asarray(X0), "cond": None}


def build(mesh=None, loss=None, **options):
  loss = loss or diffusion.build(network=LINEAR, sigma_d=0.5, adaptive_weight=False)
  decays = ema.betas((PROFILE,), 8)
  return trainer.Trainer(
    loss, LINEAR, optax.adam(0.01), ema=decays, mesh=mesh, **options
  )


def test_fit_lowers_the_loss_and_counts():
  of = build(learning_rate=optax.constant_schedule(0.01))
  state, log = of.fit(
    of.init(jax.random.key(0)), itertools.repeat(BATCH), jax.random.key(1), steps=300
  )
  assert int(state.step) == 300
  assert log["mse"].shape == (300,)
  assert np.mean(log["mse"][-50:]) < 0.8 * np.mean(log["mse"][:50])
  np.testing.assert_allclose(log["learning_rate"], 0.01)
  assert not np.array_equal(state.ema[PROFILE]["net"]["w"], state.params["net"]["w"])


def test_the_step_is_the_same_on_a_mesh_and_inside_a_scan():
  key = jax.random.key(1)
  ends = []
  for mesh in (None, sharding.make_mesh(data=4, fsdp=2, window=1)):
    of = build(mesh)
    state = of.init(jax.random.key(0))
    batch = BATCH
    if mesh is not None:
      batch = {"x0": jax.device_put(BATCH["x0"], sharding.batch(mesh)), "cond": None}
    for _ in range(3):
      state, _ = of.step(state, batch, key)
    ends.append(state)
  of = build()

  @jax.jit
  def scan(state):
    return jax.lax.scan(lambda s, _: of.update(s, BATCH, key, None), state, length=3)[0]

  ends.append(scan(of.init(jax.random.key(0))))
  for end in ends[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), end, ends[0]
    )


def test_the_step_is_compiled_once():
  traces = []
  plain = diffusion.build(network=LINEAR, sigma_d=0.5)

  def loss(*args):
    traces.append(1)
    return plain(*args)

  of = build(loss=loss)
  state = of.init(jax.random.key(0))
  for _ in range(3):
    state, _ = of.step(state, BATCH, jax.random.key(1))
  assert len(traces) == 1


def test_a_student_is_distilled_from_python():
  """The teacher's parameters are the argument `frozen`."""
  of = build(
    loss=scm.build(network=LINEAR, sigma_d=0.5, teacher=LINEAR.apply),
  )
  teacher = LINEAR.init(jax.random.key(3))
  state = of.init(jax.random.key(0), init_from=teacher)
  np.testing.assert_array_equal(state.params["net"]["w"], teacher["net"]["w"])
  state, metrics = of.step(state, BATCH, jax.random.key(1), teacher)
  assert np.isfinite(metrics["tangent_norm"])
  np.testing.assert_array_equal(teacher["net"]["b"], 0)  # it is not donated


def test_initial_weights_are_copied_where_both_have_them():
  source = {"net": {"w": jnp.float32(3.0)}, "logvar": jnp.float32(7.0), "fake": {}}
  state = build().init(jax.random.key(0), source)
  assert float(state.params["net"]["w"]) == 3
  assert float(state.params["net"]["b"]) == 0
  assert float(state.params["logvar"]) == 0  # it weights another loss
  assert float(state.ema[PROFILE]["net"]["w"]) == 3


@pytest.mark.parametrize(
  ("net", "message"),
  [
    ({"w": jnp.ones(2)}, r"^init_from: another network: \['w'\] has shape \(2,\)"),
    ({"u": jnp.float32(1)}, r"^init_from: another network: this one has no \['u'\]"),
  ],
)
def test_weights_of_another_network_are_refused(net, message):
  with pytest.raises(ValueError, match=message):
    build().init(jax.random.key(0), {"net": net})
