"""CHORDS against the sequential loop, and against its definition in plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax import samplers
from sdiff_jax.contrib import chords
from sdiff_jax.samplers import _gaussian_mixture, paradigms, sequential, solvers

TABLE = solvers.build(sigma_d=0.5, name="ddim", steps=50)
DENOISER = _gaussian_mixture.denoiser(0.5)


def noise(count: int = 2):
  keys = sequential.keys_from_seeds(np.arange(count))
  return keys, sequential.sample_prior(TABLE, keys, (16,))


def test_all_ends_against_plain_loops():
  """The definition, core by core and pass by pass, in float64 but for the denoiser."""
  keys, x = noise()
  denoise = jax.jit(lambda x, time: DENOISER(x, time, None))
  a, b = TABLE.x_coef[:, 0], TABLE.denoised_coef[:, 0]

  def at(x, i: int):
    return np.asarray(denoise(jnp.asarray(x, jnp.float32), jnp.full(2, TABLE.time[i])))

  def coarse(x, d, i: int, j: int):
    for k in range(i, j):
      x = a[k] * x + b[k] * d
    return x

  first = chords.STARTS[4]
  cores, ends = [[0, np.asarray(x), None]], []  # step, x, where it began
  for _ in range(50):
    values = [at(core[1], core[0]) for core in cores]
    before = [(core[0], core[1], d) for core, d in zip(cores, values, strict=True)]
    for k, (i, state, d) in enumerate(before):
      began = cores[k][2] or (i, state, d)
      new = a[i] * state + b[i] * d
      if k and before[k - 1][0] == began[0]:
        left = coarse(*before[k - 1][1:], began[0], i + 1)
        new = new + left - coarse(*began[1:], began[0], i + 1)
        began = None
      cores[k] = [i + 1, new, began]
    if len(cores) < len(first) and len(before) == len(cores):
      i, j = first[len(cores) - 1 : len(cores) + 1]
      cores.append([j, coarse(*before[-1][1:], i, j), None])
    if cores[-1][0] == 50:
      ends.append(cores.pop()[1])
      first = first[: len(cores)]
  for count, wanted in enumerate(ends, 1):
    options = {"window": 4, "tolerance": 0.0, "max_ends": count}
    call = functools.partial(chords.run, DENOISER, TABLE, **options)
    found = jax.jit(lambda x, call=call: call(x=x, keys=keys, cond=None))(x)
    np.testing.assert_allclose(found.x, wanted, atol=2e-5)
  assert len(ends) == 4


def test_at_tolerance_0_core_0_is_the_sequential_sampler():
  keys, x = noise()
  run = functools.partial(chords.run, window=4, tolerance=0.0)

  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  def both(x):
    args = DENOISER, TABLE, x, keys, None
    return sequential.sample(*args), run(*args)

  one, many = both(x)
  np.testing.assert_array_equal(many.x, one)
  assert many.num_iterations.tolist() == [50, 50]
  # Cores start at 0, 8, 16 and 32 of 50, and take all the steps from there.
  assert many.num_evaluations.tolist() == [50 + 42 + 34 + 18] * 2


def test_a_tolerance_is_kept_in_fewer_passes():
  keys, x = noise()
  run = functools.partial(chords.run, DENOISER, TABLE, window=8, tolerance=0.3)
  found = jax.jit(lambda x: run(x=x, keys=keys, cond=None))(x)
  assert (found.error <= 0.3).all()
  assert (found.num_iterations < 50).all()
  assert paradigms.TOLERANCE_UNIT == chords.TOLERANCE_UNIT


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"name": "chordsddpm"}, "^name: chords needs a solver without noise"),
    ({"name": "chordsdpmpp2m"}, "^name: chords needs a solver without noise"),
    ({"window": 3}, "^window=3: must be one of 1, 2, 4, 8 cores"),
    ({"window": 8, "steps": 20}, "^window=8: too many cores for 20 solver steps"),
  ],
)
def test_what_does_not_fit(fields, message):
  with pytest.raises(ValueError, match=message):
    samplers.build(**{"name": "chordsddim", "sigma_d": 0.5, "steps": 50} | fields)
