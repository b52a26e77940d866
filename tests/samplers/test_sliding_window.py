"""Windows over a mesh, previews, and by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from sdiff_jax import samplers
from sdiff_jax.contrib import parareal
from sdiff_jax.diffusion import guidance, trigflow
from sdiff_jax.distributed import sharding
from sdiff_jax.samplers import (
  _gaussian_mixture,
  autotune,
  paradigms,
  sequential,
  solvers,
)

KNOWN = _gaussian_mixture.denoiser(0.5)


def mesh(*sizes: int) -> jax.sharding.Mesh:
  devices = jax.devices()[: int(np.prod(sizes))]
  return jax.make_mesh(
    sizes, sharding.AXES, devices=devices, axis_types=(AxisType.Auto,) * 3
  )


def guided(x, t, cond):
  """A network with guidance: a linear map, whose classes differ in their mean."""

  def net(x, t, cond):
    shift = 0.1 * (1 + cond["label"]).astype(x.dtype)  # 0 without a label
    return 0.3 * x - shift[:, None]

  return trigflow.denoiser(guidance.classifier_free(net, 1.5), 0.5)(x, t, cond)


def run(name, steps, over=None, denoiser=KNOWN, **options):
  sampler = samplers.build(name, sigma_d=0.5, steps=steps, **options)

  def call(seeds):
    cond = {"label": seeds % 3}
    return samplers.sample(sampler, denoiser, seeds, (16,), cond, mesh=over)

  if over is None:
    return jax.jit(call)(np.arange(8))
  each = sharding.samples(over)
  jitted = jax.jit(call, in_shardings=each, out_shardings=each)
  text = jitted.lower(np.arange(8)).compile().as_text()
  # Rows of the network stay on their device: nothing is exchanged all to all.
  assert "all-to-all" not in text
  return jitted(np.arange(8))


@pytest.mark.parametrize(
  ("name", "denoiser", "sizes"),
  [
    pytest.param("paraddpm", KNOWN, (1, 1, 2), marks=pytest.mark.slow),
    pytest.param("paraddpm", KNOWN, (1, 2, 4), marks=pytest.mark.slow),
    pytest.param("paraddpm", KNOWN, (1, 1, 8), marks=pytest.mark.slow),
    ("paraddpm", KNOWN, (8, 1, 1)),
    pytest.param("paradpmpp3m", KNOWN, (2, 2, 2), marks=pytest.mark.slow),
    pytest.param("paraheun", KNOWN, (2, 2, 2), marks=pytest.mark.slow),
    ("specddpm", KNOWN, (2, 2, 2)),
    ("paraddim", guided, (2, 2, 2)),
  ],
)
def test_the_same_on_any_mesh(name, denoiser, sizes):
  """At a usual tolerance, slopes of small changes carry rounding on, to some 1e-5."""
  steps = 9 if name == "paraheun" else 16
  options = {"window": 8, "denoiser": denoiser}
  if name != "specddpm":  # which has no tolerance
    options["tolerance"] = 1e-3
  one, many = run(name, steps, **options), run(name, steps, mesh(*sizes), **options)
  np.testing.assert_array_equal(one.num_iterations, many.num_iterations)
  np.testing.assert_array_equal(one.num_evaluations, many.num_evaluations)
  np.testing.assert_allclose(one.x, many.x, atol=1e-5)


def test_parareal_over_devices():
  one = run("srdsddim", 16, window=4)
  many = run("srdsddim", 16, mesh(2, 1, 4), window=4)
  np.testing.assert_array_equal(one.num_iterations, many.num_iterations)
  np.testing.assert_allclose(one.x, many.x, atol=1e-5)


def test_a_window_that_does_not_divide_over_the_devices_is_refused():
  with pytest.raises(ValueError, match=r"window=6: does not divide over the 4"):
    run("paraddpm", 16, mesh(1, 1, 4), window=6)


def test_previews_are_the_rows_that_are_done():
  table = solvers.build(sigma_d=0.5, name="ddpm", steps=6)
  keys = sequential.keys_from_seeds(np.arange(2))
  x = sequential.sample_prior(table, keys, (16,))
  seen = []
  jax.jit(
    functools.partial(
      paradigms.run,
      KNOWN,
      table,
      window=4,
      tolerance=0.0,
      callback=lambda *args: seen.append([np.asarray(a) for a in args]),
    )
  )(x, keys, None)
  jax.effects_barrier()
  begins = np.array([begin for begin, _, _ in seen])
  assert np.all(begins[0] == 0)
  assert np.all(np.diff(begins, axis=0) >= 0)
  # A prefix never changes: its last state is the sequential sampler's.
  states = [x]
  for n in range(1, 6):
    columns = {k: x for k, x in table._asdict().items() if np.ndim(x)}
    head = table._replace(**{k: x[:n] for k, x in columns.items()})
    states.append(sequential.sample(KNOWN, head, x, keys, None))
  for begin, state, d in seen:
    for k in range(2):
      if begin[k] < 6:
        np.testing.assert_allclose(state[k], states[begin[k]][k], atol=1e-5)
        time = jnp.full(2, table.time[begin[k]], jnp.float32)
        expected = KNOWN(states[begin[k]], time, None)[k]
        np.testing.assert_allclose(d[k], expected, atol=1e-4)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("paraddim", marks=pytest.mark.slow),
    pytest.param("paradpmsolver", marks=pytest.mark.slow),
    "specddpm",
    "srdsddim",
  ],
)
def test_names_are_loops_and_solvers(name):
  sampler = samplers.build(name, sigma_d=0.5, steps=16, window=4)
  loops = {"para": "paradigms", "spec": "speculative", "srds": "parareal"}
  assert sampler.loop == loops[name[:4]]
  assert sampler.tableau.evaluations == 16
  found = run(name, 16, window=4)
  assert np.all(found.num_iterations > 1)
  assert np.all(np.isfinite(found.x))


def test_plain_names_run_one_row_after_the_other():
  found = run("heun", 8)
  np.testing.assert_array_equal(found.num_iterations, 15)
  np.testing.assert_array_equal(found.error, 0)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"name": "paraeuler2"}, r"name='paraeuler2': must be a solver, one of"),
    ({"window": 17}, "^window=17: must be in 1 to 16, the number"),
    ({"window": -1}, "^window=-1: must be at least 0"),
    ({"tolerance": float("nan")}, "^tolerance=nan: must be at least 0"),
    ({"update_rule": "newton"}, "^update_rule='newton': must be one of"),
    ({"name": "specddim"}, "noise in every step but the last"),
    ({"name": "srdsddpm"}, "^name: parareal needs a solver without noise"),
    ({"name": "srdsddim", "window": 15}, "^window=15: 16 solver steps"),
  ],
)
def test_mistakes_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    samplers.build(**{"sigma_d": 0.5, "name": "paraddpm", "steps": 16} | changes)


@pytest.mark.slow
def test_the_window_grows_with_what_a_call_costs(monkeypatch):
  """Where a call takes as long for any window, the widest; where time grows, few."""
  sampler = samplers.build("paraddpm", sigma_d=0.5, steps=24)
  measure = autotune.expected_iterations
  of_window = functools.cache(lambda window: measure(sampler.replace(window=window)))
  monkeypatch.setattr(
    autotune, "expected_iterations", lambda sampler: of_window(sampler.window)
  )
  free = autotune.autotune_window(sampler, lambda window: 1.0)[0]
  linear = autotune.autotune_window(sampler, lambda window: float(window))[0]
  assert free.window >= 12
  assert linear.window <= 6
  assert free.seconds == free.num_iterations < 15
  spread = autotune.autotune_window(sampler, lambda window: 1.0, multiple=8)[0]
  assert spread.window % 8 == 0
  with pytest.raises(
    ValueError, match="no window of 24 solver steps divides over 64 devices"
  ):
    autotune.autotune_window(sampler, lambda window: 1.0, multiple=64)


def test_jumps_over_a_block_are_its_rows_with_one_d():
  table = solvers.build(sigma_d=0.5, name="ddim", steps=10)
  starts = parareal.boundaries(10, 4)
  jumps = parareal.coarse_solver(table, starts)
  for n, (start, end) in enumerate(zip(starts, [*starts[1:], 10], strict=True)):
    x = 0.7
    for i in range(start, end):
      x = table.x_coef[i, 0] * x + table.denoised_coef[i, 0] * 0.3
    jump = jumps.x_coef[n, 0] * 0.7 + jumps.denoised_coef[n, 0] * 0.3
    np.testing.assert_allclose(jump, x, rtol=1e-12)


@pytest.mark.parametrize(
  ("name", "most", "window", "row"),
  [
    pytest.param(
      name,
      *sizes,
      marks=[pytest.mark.slow] * (sizes[0] != {"paraddpm": 2}.get(name, 1)),
    )
    for name in ("paraddpm", "specddpm", "paraddim")
    for sizes in ((1, 4, 3), (2, 4, 4), (3, 12, 11))
    # Which rows speculation has done after more than one pass is drawn.
    if name != "specddpm" or sizes[0] == 1
  ],
)
def test_bounded_passes_end_with_the_last_thing_that_was_seen(name, most, window, row):
  sampler = samplers.build(name, sigma_d=0.5, steps=12, window=window)
  times = jnp.asarray(sampler.tableau.time, jnp.float32)

  def told(x, time, cond):  # the first pass does one row, and corrects the others
    return jnp.repeat(time[:, None], x.shape[1], axis=1)

  bounded = sampler.replace(max_iterations=most)
  made = samplers.sample(bounded, told, np.arange(3), (2,))
  assert (made.num_iterations <= most).all()
  whole = samplers.sample(sampler, told, np.arange(3), (2,))
  if (whole.num_iterations <= most).all():
    np.testing.assert_array_equal(made.x, whole.x)
  else:
    np.testing.assert_array_equal(made.x, np.full((3, 2), times[row]))


@pytest.mark.slow
def test_bound_that_is_not_reached_changes_nothing():
  sampler = samplers.build("paraddpm", sigma_d=0.5, steps=20, window=5)
  free, bounded = (
    samplers.sample(sampler.replace(max_iterations=most), KNOWN, np.arange(3), (16,))
    for most in (0, 19)
  )
  np.testing.assert_array_equal(free.x, bounded.x)
  assert (free.num_iterations == bounded.num_iterations).all()
