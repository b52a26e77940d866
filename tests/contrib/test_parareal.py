"""Parareal against the sequential loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax import samplers
from sdiff_jax.contrib import parareal
from sdiff_jax.samplers import _gaussian_mixture, sequential, solvers


def run(blocks, tolerance, steps=36, coarse=None, name="ddim", coarse_table=None):
  table = solvers.build(sigma_d=0.5, name=name, steps=steps)
  keys = sequential.keys_from_seeds(np.arange(3))
  x = sequential.sample_prior(table, keys, (16,))
  denoiser = _gaussian_mixture.denoiser(0.5)
  alone = jax.jit(functools.partial(sequential.sample, denoiser, table))(x, keys, None)
  options = {"coarse_denoiser": coarse, "window": blocks, "tolerance": tolerance}
  options["coarse_tableau"] = coarse_table
  call = jax.jit(lambda x: parareal.run(denoiser, table, x, keys, None, **options))
  return table, x, np.asarray(alone), call(x)


@pytest.mark.parametrize("blocks", [1, 6, 8, 36])
def test_ends_where_the_sequential_loop_does(blocks):
  table, _, alone, found = run(blocks, 0.0)
  np.testing.assert_allclose(found.x, alone, atol=2e-6)
  sweeps = found.num_evaluations / table.evaluations
  assert np.all(sweeps <= blocks)
  size = -(-table.evaluations // blocks)
  np.testing.assert_array_equal(found.num_iterations, blocks + sweeps * (size + blocks))


def test_a_tolerance_is_kept_in_fewer_sweeps():
  table, _, alone, found = run(6, 1e-2)
  assert np.all(found.num_evaluations < 6 * table.evaluations)
  assert np.all(found.error <= 1e-2)
  np.testing.assert_allclose(found.x, alone, atol=5e-3)


def test_a_coarse_denoiser_that_knows_the_end_needs_one_sweep():
  """One Gaussian: its trajectories are known, and d = f jumps almost to them."""
  std, sigma_d = 0.5, 0.5

  def denoiser(x, t, cond):
    c, s = jnp.cos(t)[:, None], sigma_d * jnp.sin(t)[:, None]
    return c * std**2 / ((c * std) ** 2 + s**2) * x

  table = solvers.build(sigma_d=sigma_d, name="ddim", steps=36)
  keys = sequential.keys_from_seeds(np.arange(3))
  x = sequential.sample_prior(table, keys, (16,))
  alone = sequential.sample(denoiser, table, x, keys, None)

  def run_with(coarse):
    options = {"window": 6, "tolerance": 0.1, "coarse_denoiser": coarse}
    return parareal.run(denoiser, table, x, keys, None, **options)

  exact = run_with(lambda x, t, cond: x)
  rough = run_with(lambda x, t, cond: 0 * x)
  for found in (exact, rough):
    np.testing.assert_allclose(found.x, alone, atol=2e-2)
  assert np.all(exact.num_iterations <= rough.num_iterations)


def coarser(name, every, steps=36, fine="ddim"):
  """Returns a solver at every k-th time of a finer one's grid."""
  starts = solvers.build(sigma_d=0.5, name=fine, steps=steps).time
  steps_of = starts[::2] if fine == "heun" else starts
  angles = tuple(steps_of[::every].tolist())
  return solvers.build(sigma_d=0.5, name=name, steps=len(angles), timesteps=angles)


@pytest.mark.parametrize(
  ("name", "blocks", "coarse_table"),
  [
    ("ddim", 6, coarser("heun", 6)),
    ("ddim", 6, coarser("ddim", 2)),
    ("heun", 6, coarser("ddim", 6, fine="heun")),
    ("heun", 6, coarser("heun", 6, fine="heun")),
  ],
)
def test_any_two_solvers_end_where_the_slow_one_does(name, blocks, coarse_table):
  table, _, alone, found = run(blocks, 0.0, name=name, coarse_table=coarse_table)
  np.testing.assert_allclose(found.x, alone, atol=2e-6)
  sweeps = found.num_evaluations / table.evaluations
  swept, size = coarse_table.evaluations, -(-table.evaluations // blocks)
  np.testing.assert_array_equal(found.num_iterations, swept + sweeps * (size + swept))


def test_a_better_coarse_solver_needs_fewer_sweeps():
  rough = run(6, 1e-2)[-1]
  better = run(6, 1e-2, coarse_table=coarser("ddim", 2))[-1]
  assert better.num_evaluations.mean() < rough.num_evaluations.mean()


def test_refusals():
  table = solvers.build(sigma_d=0.5, name="ddpm", steps=9)
  with pytest.raises(ValueError, match="^name: parareal needs a solver without noise"):
    parareal.check(table)
  with pytest.raises(ValueError, match="^tolerance=nan"):
    samplers.build("srdsddim", sigma_d=0.5, steps=9, tolerance=float("nan"))
  with pytest.raises(ValueError, match="^window=8: 10 solver steps .* use 3"):
    parareal.boundaries(10, 8)
  other = coarser("ddim", 6, steps=33)
  with pytest.raises(ValueError, match="^coarse_tableau: its blocks start at other"):
    run(6, 0.1, coarse_table=other)
  with pytest.raises(ValueError, match="keeps no history from step to step"):
    run(6, 0.1, name="dpmpp2m", coarse_table=coarser("ddim", 6))
  with pytest.raises(ValueError, match="^coarse_tableau: needed"):
    run(6, 0.1, name="heun")
