"""TrigFlow's identities, and other parametrisations against Gaussian data."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import MIXTURE, MIXTURE_F, MIXTURE_T, MIXTURE_X, Gaussian, central
from hypothesis import strategies as st

from sdiff_jax.diffusion import trigflow

SIGMA_D = 0.6
GAUSSIAN = Gaussian(np.array([[0.3, -1.0, 0.0]]), np.array([[0.2, 0.6, 1.5]]), SIGMA_D)

pytestmark = pytest.mark.usefixtures("x64")
seeds = hypothesis.given(seed=st.integers(0, 10**6))
# x64 holds for all examples alike.
settings = hypothesis.settings(
  max_examples=25,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def draw(seed: int, batch: int = 5, ends: tuple[float, float] = (0.0, np.pi / 2)):
  """Returns x0, z [B, 3] and angles between the ends, in float64."""
  rng = np.random.default_rng(seed)
  x0, z = rng.normal(size=(2, batch, 3))
  return jnp.asarray(x0), jnp.asarray(z), jnp.asarray(rng.uniform(*ends, batch))


def close(a, b, tolerance=1e-12):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@settings
@seeds
def test_velocity_is_the_derivative_of_perturb(seed):
  x0, z, t = draw(seed)
  xt, v = jax.jvp(lambda t: trigflow.perturb(x0, z, t), (t,), (jnp.ones_like(t),))
  close(v, trigflow.velocity(x0, z, t))
  c, s = np.cos(t)[:, None], np.sin(t)[:, None]
  close(xt, c * x0 + s * z)


@settings
@seeds
def test_rotate_is_exact_and_composes_for_fixed_data_and_noise(seed):
  x0, z, t = draw(seed)
  s, u = draw(seed + 1)[2], draw(seed + 2)[2]
  xt, F = trigflow.perturb(x0, z, t), trigflow.velocity(x0, z, t) / SIGMA_D
  xs = trigflow.rotate(xt, F, t, s, SIGMA_D)
  close(xs, trigflow.perturb(x0, z, s))
  F_s = trigflow.velocity(x0, z, s) / SIGMA_D
  close(trigflow.rotate(xs, F_s, s, u, SIGMA_D), trigflow.rotate(xt, F, t, u, SIGMA_D))
  close(trigflow.denoise(xt, F, t, SIGMA_D), x0)


@settings
@seeds
def test_denoise_at_zero_is_the_identity_for_any_network(seed):
  xt, F, t = draw(seed)
  out = trigflow.denoise(xt, 1e6 * F, 0 * t, SIGMA_D)
  np.testing.assert_array_equal(out, xt)


def test_denoiser_of_the_best_network_is_the_posterior_mean():
  x0, z, t = draw(0)
  xt = trigflow.perturb(x0, z, t)
  d = trigflow.denoiser(GAUSSIAN.diffusion_net, SIGMA_D)(xt, t, None)
  close(d, GAUSSIAN.posterior(xt, t)[0])


@settings
@seeds
def test_processes_are_rescalings(seed):
  x0, eps, alpha = draw(seed, ends=(0.01, 2))
  sigma = draw(seed + 1, ends=(0, 3))[2]
  t = trigflow.angle(alpha, sigma, SIGMA_D)
  x = alpha[:, None] * x0 + sigma[:, None] * eps
  xt = trigflow.perturb(x0, SIGMA_D * eps, t)
  close(trigflow.from_process(x, alpha, sigma, SIGMA_D), xt)
  close(trigflow.to_process(xt, alpha, sigma, SIGMA_D), x)
  close(SIGMA_D * jnp.tan(t) * alpha, sigma)


def test_angle_of_pure_noise_and_of_pure_data():
  one, zero = jnp.ones(1), jnp.zeros(1)
  close(trigflow.angle(zero, one, SIGMA_D), np.pi / 2)
  close(trigflow.angle(one, zero, SIGMA_D), 0)


@settings
@seeds
def test_edm_preconditioning_is_trigonometry(seed):
  """c_in x = x_t / sigma_d, c_skip = cos^2 t, c_out = sigma_d sin t."""
  x, _, sigma = draw(seed, ends=(0.002, 80))
  t = trigflow.angle(jnp.ones_like(sigma), sigma, SIGMA_D)
  both = sigma**2 + SIGMA_D**2
  xt = trigflow.from_process(x, jnp.ones_like(sigma), sigma, SIGMA_D)
  close(xt / SIGMA_D, x / jnp.sqrt(both)[:, None])
  close(jnp.cos(t) ** 2, SIGMA_D**2 / both)
  close(SIGMA_D * jnp.sin(t), sigma * SIGMA_D / jnp.sqrt(both))


# The closed forms themselves: sections 6.2.1 and 6.2.2 of the reference.


def test_gaussian_value_of_the_reference():
  data = Gaussian(jnp.array(0.0), jnp.array(0.9), 0.5)
  f = data.consistency(jnp.array(0.8), jnp.array(1.4))
  assert float(f) == pytest.approx(1.3955539361, abs=1e-10)


def test_data_as_wide_as_the_noise_do_not_move():
  """s = sigma_d, m = 0: f* = x, F_diffusion = 0, F_consistency = -x tan(t/2)."""
  data = Gaussian(jnp.zeros((1, 1)), jnp.full((1, 1), SIGMA_D), SIGMA_D)
  x, _, t = draw(0, ends=(0.1, 1.5))
  close(data.consistency(x, t), x)
  close(data.diffusion_net(x, t), 0)
  close(data.consistency_net(x, t), -x * jnp.tan(t / 2)[:, None])


def test_gaussian_flow_follows_its_velocity():
  x, _, t = draw(0)
  u = draw(1)[2]
  xu, v = jax.jvp(lambda u: GAUSSIAN.flow(x, t, u), (u,), (jnp.ones_like(u),))
  close(v, GAUSSIAN.velocity(xu, u))
  close(GAUSSIAN.flow(x, t, 0 * t), GAUSSIAN.consistency(x, t))
  f = trigflow.denoiser(GAUSSIAN.consistency_net, SIGMA_D)(x, t, None)
  close(f, GAUSSIAN.consistency(x, t), 1e-10)


def test_mixture_of_the_reference():
  """The listed values; f* is constant along the mixture's velocity."""
  found = MIXTURE.consistency(MIXTURE_X, MIXTURE_T)
  np.testing.assert_allclose(found, MIXTURE_F, atol=1e-10)
  x, t = jnp.asarray(MIXTURE_X), jnp.asarray(MIXTURE_T)
  slope = central(MIXTURE.consistency, (x, t), (MIXTURE.velocity(x, t), 1 + 0 * t))
  np.testing.assert_allclose(slope, 0, atol=1e-8)


# Networks of other parametrisations that predict the posterior mean of GAUSSIAN.


def posterior(x, alpha, sigma):
  """Means of x0 and eps given x = alpha x0 + sigma eps; free of 0/0."""
  alpha, sigma = alpha[:, None], sigma[:, None]
  score = (x - alpha * GAUSSIAN.mean) / ((alpha * GAUSSIAN.std) ** 2 + sigma**2)
  return GAUSSIAN.mean + alpha * GAUSSIAN.std**2 * score, sigma * score


def edm_raw(x, c_noise, cond):
  sigma = jnp.exp(4 * c_noise)
  root = jnp.sqrt(sigma**2 + SIGMA_D**2)
  c_skip, c_out = (SIGMA_D / root) ** 2, sigma * SIGMA_D / root
  x = x * root[:, None]
  d, _ = posterior(x, jnp.ones_like(sigma), sigma)
  return (d - c_skip[:, None] * x) / c_out[:, None]


def vp_time(alpha):
  return 4 - 2 * alpha  # any map that raw can undo


def vp_raw(prediction):
  def raw(x, time, cond):
    alpha = (4 - time) / 2
    sigma = jnp.sqrt((1 - alpha) * (1 + alpha))
    x0, eps = posterior(x, alpha, sigma)
    v = alpha[:, None] * eps - sigma[:, None] * x0
    return {"eps": eps, "x0": x0, "v": v}[prediction]

  return raw


def flow_raw(x, u, cond):
  x0, eps = posterior(x, 1 - u, u)
  return eps - x0


def vp(prediction):
  return trigflow.from_vp(vp_raw(prediction), prediction, vp_time, SIGMA_D)


WRAPPED = {
  "edm": trigflow.from_edm(edm_raw, SIGMA_D),
  "flow": trigflow.from_flow(flow_raw, SIGMA_D),
  **{f"vp {p}": vp(p) for p in ("eps", "v", "x0")},
}


@pytest.mark.parametrize("name", WRAPPED)
@settings
@seeds
def test_wrappers_give_the_closed_form(name, seed):
  x, _, t = draw(seed, ends=(0.2, 1.4))
  close(WRAPPED[name](x, t, None), GAUSSIAN.diffusion_net(x, t))


@pytest.mark.parametrize(
  ("name", "t"),
  [
    ("flow", 0.0),
    ("flow", np.pi / 2),
    ("vp v", 0.0),
    ("vp v", np.pi / 2),
    ("vp eps", 0.0),
    ("vp x0", np.pi / 2),
  ],
)
def test_wrappers_hold_at_the_ends(name, t):
  x = draw(0)[0]
  t = jnp.full(5, t)
  close(WRAPPED[name](x, t, None), GAUSSIAN.diffusion_net(x, t))


@pytest.mark.parametrize("name", WRAPPED)
def test_jvp_of_wrappers_is_complete(name):
  """The wrapper's own scalings and time map are inside the derivative."""

  def net(x, t):
    return WRAPPED[name](x, t, None)

  x, dx, t = draw(0, ends=(0.3, 1.3))
  at, along = (x, t), (dx, jnp.ones_like(t))
  _, derivative = jax.jvp(net, at, along)
  close(derivative, central(net, at, along), 1e-7)
  close(derivative, jax.jvp(GAUSSIAN.diffusion_net, at, along)[1], 1e-9)


@settings
@seeds
def test_flow_of_unit_data_is_the_formula_of_rcm(seed):
  """sigma_d = 1: ((1 - 2u) x' + (1 - 2u + 2u^2) v) / sqrt(u^2 + (1 - u)^2)."""
  x, v, t = draw(seed)
  seen = []

  def raw(x, u, cond):
    seen.append((x, u[:, None]))
    return v

  F = trigflow.from_flow(raw, 1.0)(x, t, None)
  ((x_flow, u),) = seen
  close(u[:, 0], jnp.sin(t) / (jnp.sin(t) + jnp.cos(t)))
  close(x_flow, x * jnp.sqrt(u**2 + (1 - u) ** 2))
  expected = (1 - 2 * u) * x_flow + (1 - 2 * u + 2 * u**2) * v
  close(F, expected / jnp.sqrt(u**2 + (1 - u) ** 2))


@settings
@seeds
def test_weighted_loss_of_edm_is_that_of_the_velocity(seed):
  """(sigma^2 + sigma_d^2) / (sigma sigma_d)^2 |D - x0|^2 = |F - v/sigma_d|^2."""
  x0, z, t = draw(seed, ends=(0.1, 1.5))
  F = draw(seed + 1)[0]
  sigma = SIGMA_D * jnp.tan(t)[:, None]
  d = trigflow.denoise(trigflow.perturb(x0, z, t), F, t, SIGMA_D)
  edm = (sigma**2 + SIGMA_D**2) / (sigma * SIGMA_D) ** 2 * (d - x0) ** 2
  close(edm, (F - trigflow.velocity(x0, z, t) / SIGMA_D) ** 2, 1e-10)


def test_wrappers_pass_the_condition_on():
  def raw(x, time, cond):
    return x * cond["label"].astype(x.dtype)[:, None]

  x, _, t = draw(0, ends=(0.3, 1.3))
  for net in (
    trigflow.from_edm(raw, SIGMA_D),
    trigflow.from_flow(raw, SIGMA_D),
    trigflow.from_vp(raw, "v", vp_time, SIGMA_D),
  ):
    one, two = (net(x, t, {"label": jnp.full(5, k, jnp.int32)}) for k in (1, 2))
    assert not np.allclose(one, two)


def test_unknown_prediction_is_refused():
  with pytest.raises(ValueError, match="prediction='score': take 'eps', 'v' or 'x0'"):
    trigflow.from_vp(vp_raw("eps"), "score", vp_time, SIGMA_D)
