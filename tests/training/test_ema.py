"""Averages against the closed forms and numbers of EDM2."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sdiff_jax.training import ema


def width(gamma):
  """Relative width of the weights t^gamma on [0, 1]."""
  return np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def averages(profile: str, batch_size: int, params: jax.Array) -> jax.Array:
  """Returns the average after each row of params [N, D], from a start at 0."""
  betas = ema.betas((profile,), batch_size)

  @jax.jit
  def run(params):
    def row(average, inputs):
      n, p = inputs
      average = ema.update(average, {"p": p}, n, betas)
      return average, average[profile]["p"]

    start = {profile: {"p": jnp.zeros_like(params[0])}}
    return jax.lax.scan(row, start, (jnp.arange(1, len(params) + 1), params))[1]

  return run(params)


def weights(profile: str, batch_size: int, steps: int) -> np.ndarray:
  """Returns the weight of each update in the last average, [N]."""
  one_hot = jnp.eye(steps, dtype=jnp.float32)
  return np.asarray(averages(profile, batch_size, one_hot)[-1], np.float64)


@hypothesis.given(sigma_rel=st.floats(0.003, 0.279))
def test_power_exponent_inverts_the_width(sigma_rel):
  assert width(ema.power_exponent(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


def test_power_exponent_of_edm2(fixture):
  phema = fixture("phema")
  found = [ema.power_exponent(s) for s in phema["std"]]
  np.testing.assert_allclose(found, phema["exp"], rtol=1e-8)
  back = [ema.power_exponent(s) for s in phema["exp_to_std_out"]]
  np.testing.assert_allclose(back, phema["exp_to_std_in"], rtol=1e-8)


def test_power_betas_of_edm2(fixture):
  phema = fixture("phema")
  n = phema["beta_t_next"] / phema["beta_t_delta"]
  found = [ema.power(s)(n) for s in phema["std"]]
  np.testing.assert_allclose(found, phema["beta"], rtol=1e-8)


@pytest.mark.parametrize(("column", "sigma_rel"), [(0, 0.05), (1, 0.1)])
def test_power_averages_of_edm2(fixture, column, sigma_rel):
  phema = fixture("phema")
  theta = jnp.asarray(phema["theta"], jnp.float32)[:, None]
  found = averages(f"power/{sigma_rel}", 1, theta)[49::50, 0]
  expected = phema["ema_snapshots_every50"][:, column]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2])
def test_power_profile_has_its_width(sigma_rel):
  """The weights' standard deviation over their length is sigma_rel."""
  n = 2000
  w = weights(f"power/{sigma_rel}", 8, n)
  assert w.sum() == pytest.approx(1, rel=1e-4)
  t = np.arange(1, n + 1) / n
  mean = (w * t).sum()
  gamma = ema.power_exponent(sigma_rel)
  assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)
  assert np.sqrt((w * (t - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-2)


def test_half_life_halves_the_weight():
  """Updates that lie the half-life apart, late in the run, weigh as 1 to 2."""
  w = weights("half_life/400", 8, 2000)
  np.testing.assert_allclose(w[1500:1900] / w[1550:1950], 0.5, rtol=1e-4)


def test_half_life_grows_with_the_images_seen():
  """Early on it is a twentieth of the images seen, n batches."""
  beta = ema.half_life(400.0, 8)
  n = jnp.array([1.0, 10.0, 500.0, 999.0])
  np.testing.assert_allclose(beta(n), 0.5 ** (1 / (0.05 * n)), rtol=1e-6)
  np.testing.assert_allclose(beta(jnp.array([1000.0, 1e6])), 0.5 ** (8 / 400))


@pytest.mark.parametrize("profile", ["power/0.05", "half_life/1000"])
def test_a_constant_is_its_own_average(profile):
  """The start at 0 is forgotten by a power profile at the first update."""
  found = averages(profile, 8, jnp.full((300, 1), 3.0))[-1, 0]
  assert found == pytest.approx(3, rel=1e-5)


def test_profiles_do_not_mix():
  profiles = ("power/0.05", "half_life/1000")
  betas = ema.betas(profiles, 8)
  params = {"w": jnp.ones(2), "b": jnp.full(1, 5.0)}
  start = {p: jax.tree.map(jnp.zeros_like, params) for p in profiles}
  new = ema.update(start, params, jnp.int32(7), betas)
  for p in profiles:
    share = 1 - betas[p](jnp.float32(7))
    expected = jax.tree.map(lambda x, share=share: share * x, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), new[p], expected)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.28, 0.5])
def test_impossible_widths_are_refused(sigma_rel):
  with pytest.raises(ValueError, match=r"the width must be in \(0, 0.28\)"):
    ema.betas((f"power/{sigma_rel}",), 8)


@pytest.mark.parametrize(
  ("profile", "message"),
  [
    ("uniform/3", "'uniform/3': must be power/sigma_rel, half_life/images or"),
    ("power", "'power' is not of the form name/number"),
    ("power/x", "'power/x' is not of the form name/number"),
    ("half_life/1/2", "'half_life/1/2' is not of the form name/number"),
  ],
)
def test_unknown_profiles_are_refused(profile, message):
  with pytest.raises(ValueError, match=f"^profiles: {message}"):
    ema.betas((profile,), 8)


def test_warmup_is_as_published():
  """0, 0, 1 - 2^-p, 1 - 3^-p, ...: the decays of its first updates; 0.9999 at most."""
  beta = ema.warmup(0.75)
  found = [float(beta(jnp.float32(n))) for n in (1, 2, 3, 4, 11, 1e7)]
  wanted = [0, 0, 1 - 2**-0.75, 1 - 3**-0.75, 1 - 10**-0.75, 0.9999]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  with pytest.raises(
    ValueError, match="profiles: 'warmup/0': power=0.0: must be above 0"
  ):
    ema.betas(("warmup/0",), 8)


def test_a_half_life_is_above_zero():
  with pytest.raises(ValueError, match="images=-1.0: a half-life must be above 0"):
    ema.betas(("half_life/-1",), 8)


# Averages of another width, afterwards.


def profile(steps: np.ndarray, gamma: float, t: float) -> np.ndarray:
  """Weight of each of the updates `steps` in the average at t, a power profile."""
  share = np.clip(np.stack([steps, steps - 1]) / t, 0, 1) ** (gamma + 1)
  return share[0] - share[1]


@pytest.mark.parametrize("column", range(3))
def test_posthoc_weights_of_edm2(fixture, column):
  phema = fixture("phema")
  step, sigma_rel = phema["out_ofs"][column], phema["out_std"][column]
  w, _ = ema.posthoc(phema["in_ofs"], phema["in_std"], step, sigma_rel)
  np.testing.assert_allclose(w, phema["coef"][:, column], rtol=1e-6, atol=1e-12)


def test_posthoc_average_of_edm2(fixture):
  phema = fixture("phema")
  steps, widths = np.tile(np.arange(50, 401, 50), 2), np.repeat([0.05, 0.1], 8)
  w, left = ema.posthoc(steps, widths, 400, 0.08)
  np.testing.assert_allclose(w, phema["posthoc_coef_400_0.08"][:, 0], atol=1e-9)
  value = w @ phema["ema_snapshots_every50"].T.ravel()
  np.testing.assert_allclose(value, phema["posthoc_value"], rtol=1e-8)
  assert left < 0.011
  # The average itself, of all 400 values.
  true = profile(np.arange(1, 401), ema.power_exponent(0.08), 400) @ phema["theta"]
  assert value == pytest.approx(true, rel=1e-3)


def test_a_stored_average_is_found_again():
  steps, widths = np.tile([30, 60, 90], 2), np.repeat([0.05, 0.1], 3)
  w, left = ema.posthoc(steps, widths, 60, 0.1)
  np.testing.assert_allclose(w, [0, 0, 0, 0, 1, 0], atol=1e-9)
  assert left < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.05, 0.08, 0.12, 0.15])
def test_posthoc_profiles_have_their_width(sigma_rel):
  """Mean and width of the weights that all updates get are the closed forms'."""
  n, count = 2000, 40
  updates = np.arange(1, n + 1)
  stored = np.repeat(np.arange(1, count + 1) * n // count, 2)
  widths = np.tile([0.04, 0.16], count)
  w, left = ema.posthoc(stored, widths, n, sigma_rel)
  gammas = [ema.power_exponent(s) for s in widths]
  total = sum(
    k * profile(updates, g, t) for k, g, t in zip(w, gammas, stored, strict=True)
  )
  t = (updates - 0.5) / n
  mean, gamma = (total * t).sum(), ema.power_exponent(sigma_rel)
  assert total.sum() == pytest.approx(1, rel=1e-9)
  assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)
  spread = np.sqrt((total * (t - mean) ** 2).sum())
  assert spread == pytest.approx(sigma_rel, rel=1e-3)
  assert left < 5e-3


def test_more_snapshots_come_closer_to_the_true_average():
  """Of a random walk, whose averages `update` made."""
  rng = np.random.default_rng(0)
  theta = np.cumsum(rng.normal(size=(400, 16)), 0).astype(np.float32)
  wanted = averages("power/0.1", 1, jnp.asarray(theta))[-1]
  kept = {s: averages(f"power/{s}", 1, jnp.asarray(theta)) for s in (0.05, 0.15)}
  errors = []
  for every in (200, 50, 10):
    at = np.arange(every, 401, every)
    steps, widths = np.tile(at, 2), np.repeat([*kept], len(at))
    w, _ = ema.posthoc(steps, widths, 400, 0.1)
    parts = np.concatenate([kept[s][at - 1] for s in kept]).astype(np.float64)
    errors.append(np.abs(w @ parts - wanted).max() / np.abs(wanted).max())
  assert errors[0] > errors[1] > errors[2]
  assert errors[2] < 1e-3
