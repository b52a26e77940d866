"""The MLP, with and without what stabilizes the tangent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import central, random_params
from small_networks import build, close, inputs

from sdiff_jax.models import mlp

# The MLP without one of what stabilizes the tangent.
PLAIN = ({"process": "edm"}, {"embedding": "fourier"}, {"norm": "single"})
x64 = pytest.mark.usefixtures("x64")


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
