"""Distributions of training times, time grids of samplers, the warm-up."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.special import ndtr

from sdiff_jax.diffusion import time_grids


@pytest.mark.parametrize(
  ("p_mean", "p_std", "sigma_d"), [(-1.0, 1.4, 0.5), (0.4, 0.7, 1.0)]
)
def test_log_normal_law(key, p_mean, p_std, sigma_d):
  """ln(sigma_d tan t) is N(p_mean, p_std^2): moments, and Kolmogorov's distance."""
  n = 100_000
  t = time_grids.log_normal(key, n, p_mean=p_mean, p_std=p_std, sigma_d=sigma_d)
  assert t.dtype == jnp.float32
  t = np.asarray(t, np.float64)
  assert 0 < t.min() < t.max() < np.pi / 2
  tau = np.sort(np.log(sigma_d * np.tan(t)))
  assert tau.mean() == pytest.approx(p_mean, abs=4 * p_std / n**0.5)
  assert tau.std() == pytest.approx(p_std, abs=4 * p_std / (2 * n) ** 0.5)
  steps = np.arange(n) / n
  assert np.abs(ndtr((tau - p_mean) / p_std) - steps).max() < 2 / n**0.5


@hypothesis.given(k=st.floats(0.1, 10))
def test_log_normal_scales_with_the_data(k):
  """sigma_d -> k sigma_d with p_mean -> p_mean + ln k leaves the times alone."""
  key = jax.random.key(0)
  t = time_grids.log_normal(key, 9, p_mean=-1.0, p_std=1.4, sigma_d=0.5)
  scaled = time_grids.log_normal(
    key, 9, p_mean=-1.0 + np.log(k), p_std=1.4, sigma_d=0.5 * float(k)
  )
  np.testing.assert_allclose(t, scaled, rtol=1e-5)


def test_warmup_rises_to_one_and_stays():
  steps = jnp.arange(0, 12, 2)
  r = [float(time_grids.warmup(n, 8)) for n in steps]
  np.testing.assert_allclose(r, [0, 0.25, 0.5, 0.75, 1, 1])
  assert time_grids.warmup(jnp.int32(0), 0) == 1


def test_karras_of_edm():
  """EDM's 18 levels to four digits, and the formula in sigma^(1/7)."""
  known = [80, 57.59, 40.79, 28.37, 19.35, 12.91, 8.401, 5.315, 3.257]
  known += [1.923, 1.088, 0.5853, 0.2964, 0.1395, 0.05995, 0.02293, 0.007531, 0.002]
  sigmas = time_grids.karras(18)
  assert sigmas.dtype == np.float64
  np.testing.assert_allclose(sigmas, [*known, 0], rtol=4e-4)
  np.testing.assert_allclose(np.diff(sigmas[:-1] ** (1 / 7), 2), 0, atol=1e-12)


@hypothesis.given(
  steps=st.integers(2, 70), low=st.floats(1e-3, 1), high=st.floats(2, 900)
)
def test_karras_ends(steps, low, high):
  sigmas = time_grids.karras(steps, sigma_min=low, sigma_max=high, rho=5.0)
  assert sigmas.shape == (steps + 1,)
  assert np.all(np.diff(sigmas) < 0)
  np.testing.assert_allclose(sigmas[[0, -2, -1]], [high, low, 0])


def test_one_step_goes_from_the_most_noise_to_none():
  np.testing.assert_allclose(time_grids.karras(1), [80, 0])
  np.testing.assert_allclose(time_grids.karras_timesteps(1, 0.5), [np.arctan(160), 0])


def test_karras_timesteps_are_those_of_the_levels():
  angles = time_grids.karras_timesteps(9, 0.7)
  np.testing.assert_allclose(0.7 * np.tan(angles), time_grids.karras(9), rtol=1e-9)


def test_consistency_timesteps_of_the_paper():
  np.testing.assert_allclose(
    time_grids.consistency_timesteps(1, 0.5), [1.56455, 0], atol=1e-5
  )
  two = time_grids.consistency_timesteps(2, 0.5)
  np.testing.assert_allclose(two, [1.56455, 1.1, 0], atol=1e-5)
  four = time_grids.consistency_timesteps(4, 1.0)
  np.testing.assert_allclose(four, np.arctan(80) * np.array([4, 3, 2, 1, 0]) / 4)


def test_given_timesteps():
  angles = time_grids.from_list((np.pi / 2, 1.1, 0.3))
  assert angles.dtype == np.float64
  np.testing.assert_array_equal(angles, [np.pi / 2, 1.1, 0.3, 0])


@pytest.mark.parametrize("angles", [(1.6, 1.0), (1.0, 1.2), (1.0, 1.0), (1.0, 0.0)])
def test_given_timesteps_must_fall(angles):
  with pytest.raises(ValueError, match="must decrease, in"):
    time_grids.from_list(angles)


def test_the_rounded_pi_half_is_taken_as_pi_half():
  np.testing.assert_array_equal(
    time_grids.from_list((1.5708, 1.1)), [np.pi / 2, 1.1, 0]
  )
  with pytest.raises(ValueError, match="must decrease"):
    time_grids.from_list((float("nan"), 1.1))
