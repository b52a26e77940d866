"""A small network that each loss trains is the map that is known: minutes of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import MIXTURE, Gaussian
from trained_maps import rms, train

from sdiff_jax import losses, registry
from sdiff_jax.diffusion import trigflow
from sdiff_jax.models import mlp

SIGMA_D = 0.5
BATCH, TESTED = 512, 2000
GAUSSIAN = Gaussian(jnp.float32(0.0), jnp.float32(0.9), SIGMA_D)
TEACHER, DATA = {"velocity": "teacher"}, {"velocity": "data"}
PLAIN = {"warmup_steps": 300, "adaptive_weight": False}
# One dimension has noise of the velocity in every direction that there is: normalized
# tangents and weights by the error then regress on a median instead of the mean. FACM from
# data clips its tangents without an option, and is left out: 0.34 sigma_d here.
RAW = {**PLAIN, "tangent_normalizer": "none"}
AVERAGE = {"p_std": 1.6, "diffusion_fraction": 0.5, "weight_power": 0.0}
# A trajectory of 16 steps is a solver's error away from the map (0.06 and 0.14 sigma_d).
FINE = {"adaptive_weight": False, "steps": 64}
# Losses with two times, and with the end time 0 alone.
FLOW_MAPS = {
  "flow map, distilled": ("flow_map", PLAIN | TEACHER),
  "flow map, from data": ("flow_map", RAW | DATA),
  "MeanFlow": ("meanflow", AVERAGE),
  "iMF": ("meanflow", AVERAGE | {"improved": True}),
  "LMD": ("lagrangian", TEACHER),
  "LSD": ("lagrangian", DATA),
  "CMT of two times": ("cmt", FINE | {"flow_map": True}),
}
TO_DATA = {
  "sCD": ("scm", PLAIN | TEACHER),
  "sCT": ("scm", {**PLAIN, "c": 10.0, **DATA}),
  "FACM": ("facm", TEACHER),
  "CMT": ("cmt", FINE),
}
# A critic or a fake network learns beside the student.
MATCHED = {
  "sCD + VSD": ("vsd", PLAIN),
  "rCM": ("rcm", PLAIN),
}
METHODS = FLOW_MAPS | TO_DATA | MATCHED
STEPS = {"rCM": 30_000}  # the student is trained in every fifth one


def trained(name: str, velocity, draw):
  """Returns the map (xt, t, s) -> state at s of a network that a loss trains."""
  loss_name, fields = METHODS[name]
  section = {"name": loss_name, **registry.fields("losses", loss_name), **fields}
  facts = losses.facts(section)
  net = mlp.build(shape=(1,), width=64, depth=3, cond=facts.cond)

  def teacher(frozen, x, t, cond):
    return velocity(x * SIGMA_D, t) / SIGMA_D

  loss = registry.build(
    "losses",
    section,
    "loss",
    network=net,
    sigma_d=SIGMA_D,
    teacher=teacher if facts.needs_teacher else None,
  )
  # The network whose turn it is not stays as it is without momentum alone.
  options = {"b1": 0.0 if name in MATCHED else 0.9, "steps": STEPS.get(name, 6000)}
  options["init_extra_params"] = facts.init_extra_params
  params = train(loss, net, draw, batch=BATCH, **options)

  def flow(xt, t, s):
    cond = trigflow.with_end_time(None, s) if facts.cond else None
    return trigflow.rotate(xt, net.apply(params, xt / SIGMA_D, t, cond), t, s, SIGMA_D)

  return flow


def times(name: str):
  """Returns random times t, and s <= t or 0, [TESTED] each."""
  rng = np.random.default_rng(0)
  t = rng.uniform(0.05, 1.5, TESTED)
  s = t * rng.uniform(0.0, 1.0, TESTED) if name in FLOW_MAPS else 0 * t
  return jnp.asarray(t, jnp.float32), jnp.asarray(s, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_map_of_a_gaussian(name):
  flow = trained(
    name,
    GAUSSIAN.velocity,
    lambda key: 0.9 * jax.random.normal(key, (BATCH, 1)),
  )
  t, s = times(name)
  x0 = 0.9 * jnp.asarray(np.random.default_rng(1).normal(size=(TESTED, 1)), jnp.float32)
  xt = GAUSSIAN.flow(x0, 0 * t, t)
  error = rms(flow(xt, t, s) - GAUSSIAN.flow(xt, t, s)) / SIGMA_D
  print(f"{name}: {error:.4f} sigma_d")
  assert error <= 0.02


@pytest.mark.slow
# sCT is left out: single draws of the velocity between two modes are too noisy for it in as
# many steps, 0.03 to 0.09 in three runs with the same network, with and without c.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "sCT"])
def test_the_map_of_a_mixture(name):
  means, stds, weights = (
    jnp.asarray(a[0], jnp.float32)
    for a in (MIXTURE.means, MIXTURE.stds, MIXTURE.weights)
  )

  def draw(key):
    key_k, key_z = jax.random.split(key)
    k = jax.random.categorical(key_k, jnp.log(weights), shape=(BATCH, 1))
    return means[k] + stds[k] * jax.random.normal(key_z, (BATCH, 1))

  flow = trained(name, MIXTURE.velocity, draw)
  t, s = times(name)
  x0 = MIXTURE.sample(np.random.default_rng(1), TESTED)
  z = SIGMA_D * np.random.default_rng(2).normal(size=x0.shape).astype(np.float32)
  xt = trigflow.perturb(jnp.asarray(x0), jnp.asarray(z), t)
  truth = MIXTURE.flow(np.asarray(xt), np.asarray(t), np.asarray(s))
  error = rms(flow(xt, t, s) - truth)
  print(f"{name}: {error:.4f}")
  assert error <= 0.03
