"""The sequential loop against EDM's sampler, the sCM scheduler, exact distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian

from sdiff_jax.diffusion import guidance, noise_schedules, time_grids, trigflow
from sdiff_jax.samplers import sequential, solvers

SIGMA_D = 0.5


def mixture(data: dict, shift: float = 0.0):
  """Returns the denoiser of the fixture's mixture of normals on EDM's process."""
  means, stds, weights = (jnp.asarray(data[k]) for k in ("means", "stds", "weights"))
  means = means[None] + shift

  def denoiser(x, sigma, cond):
    var = stds[None] ** 2 + sigma[:, None] ** 2
    gap = x[:, None] - means
    log = jnp.log(weights)[None] - jnp.sum(gap**2, -1) / (2 * var)
    share = jax.nn.softmax(log - x.shape[-1] / 2 * jnp.log(var))
    gain = (stds[None] ** 2 / var)[..., None]
    return jnp.sum(share[..., None] * (means + gain * gap), 1)

  return denoiser


def as_net(denoiser):
  """Returns the NetFn whose TrigFlow denoiser is a denoiser of EDM's process."""

  def net(x, t, cond):
    c, s = (trigflow.expand(a, x) for a in (jnp.cos(t), jnp.sin(t)))
    xt = SIGMA_D * x
    return (c * xt - denoiser(xt / c, SIGMA_D * jnp.tan(t), cond)) / (SIGMA_D * s)

  return net


@pytest.fixture
def edm(fixture, x64):
  return fixture("edm_heun")


def sample(denoiser, table, x, cond=None):
  return sequential.sample(
    denoiser, table, x, sequential.keys_from_seeds(np.arange(len(x))), cond
  )


@pytest.mark.parametrize(("case", "steps"), [("edm1_18", 18), ("edm2_32", 32)])
def test_heun_of_edm(edm, case, steps):
  table = solvers.from_schedule("heun", noise_schedules.edm(time_grids.karras(steps)))
  x = table.init_std * jnp.asarray(edm["latents"])
  found = sample(mixture(edm), table, x)
  np.testing.assert_allclose(found, edm[f"{case}/final"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("case", "steps"), [("edm1_18", 18), ("edm2_32", 32)])
def test_heun_of_edm_on_trigflow(edm, case, steps):
  table = solvers.build(sigma_d=SIGMA_D, name="heun", steps=steps)
  x = table.init_std * jnp.asarray(edm["latents"])
  found = sample(trigflow.denoiser(as_net(mixture(edm)), SIGMA_D), table, x)
  np.testing.assert_allclose(found, edm[f"{case}/final"], rtol=1e-9, atol=1e-9)


def test_guided_heun_of_edm2(edm):
  """Guidance of networks is guidance of denoisers: F is affine in d."""
  with_label, without = as_net(mixture(edm)), as_net(mixture(edm, 0.2))

  def net(x, t, cond):
    labelled = (cond["label"] >= 0)[:, None]
    return jnp.where(labelled, with_label(x, t, None), without(x, t, None))

  table = solvers.build(sigma_d=SIGMA_D, name="heun", steps=16)
  x = table.init_std * jnp.asarray(edm["latents"])
  guided = trigflow.denoiser(guidance.classifier_free(net, 1.7), SIGMA_D)
  found = sample(guided, table, x, {"label": jnp.zeros(len(x), jnp.int32)})
  np.testing.assert_allclose(found, edm["edm2_guided/final"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
  ("case", "sigma_d"),
  [
    ("N1", 0.5),
    ("N2_default", 0.5),
    ("N4", 0.5),
    ("custom3_sd1", 1.0),
    ("N2_paper_max", 0.5),
  ],
)
def test_consistency_sampling_of_diffusers(fixture, monkeypatch, case, sigma_d):
  """SCMScheduler's model_outputs are sigma_d F, its noises of unit variance.

  It draws noise at t = 0 too, times sin 0.
  """
  data = fixture("scm_scheduler")
  data = {k.split("/")[1]: v for k, v in data.items() if k.startswith(f"{case}/")}
  noises, outputs = (jnp.asarray(data[k]) for k in ("noises", "model_outputs"))
  monkeypatch.setattr(sequential, "noise", lambda keys, i, shape: noises[i])
  angles = data["timesteps"].astype(np.float64)
  schedule = noise_schedules.trigflow(angles, sigma_d)
  table = solvers.from_schedule("consistency", schedule)

  def denoiser(x, t, cond):
    row = jnp.argmin(jnp.abs(jnp.asarray(table.time, t.dtype) - t[0]))
    return trigflow.denoise(x, outputs[row] / sigma_d, t, sigma_d)

  state = jnp.asarray(data["sample"])
  for k in range(table.evaluations):
    columns = {n: v[: k + 1] for n, v in table._asdict().items() if np.ndim(v)}
    part = table._replace(**columns)
    found = sample(denoiser, part, state)
    np.testing.assert_allclose(found, data["prev_samples"][k], atol=2e-6)
  np.testing.assert_allclose(found, data["pred_x0"][-1], atol=2e-6)


def test_consistency_sampling_has_the_distribution_of_the_data():
  """Monte Carlo of the loop, noise included; `test_solvers` has it exactly."""
  gaussian = Gaussian(jnp.array([[0.3]]), jnp.array([[0.2]]), SIGMA_D)
  n = 40_000
  keys = sequential.keys_from_seeds(np.arange(n))
  angles = (np.pi / 2, 1.3, 0.8, 0.3)
  table = solvers.build(sigma_d=SIGMA_D, name="consistency", steps=1, timesteps=angles)
  x = sequential.sample_prior(table, keys, (1,))
  assert float(jnp.std(x)) == pytest.approx(SIGMA_D, rel=0.02)
  x0 = np.asarray(sequential.sample(gaussian.consistency, table, x, keys, None))
  assert x0.mean() == pytest.approx(0.3, abs=4 * 0.2 / n**0.5)
  assert x0.std() == pytest.approx(0.2, rel=4 / (2 * n) ** 0.5)
  # Fresh noise: what starts far out does not end far out.
  assert abs(np.corrcoef(x[:, 0], x0[:, 0])[0, 1]) < 0.999


def test_noise_of_steps_and_samples_is_independent():
  keys = sequential.keys_from_seeds(np.arange(300))
  steps = [sequential.noise(keys, i, (40,)) for i in (-1, 0, 1)]
  steps += [sequential.noise_before(keys, i, (40,)) for i in (0, 1)]
  steps = np.stack(steps)
  correlation = np.corrcoef(steps.reshape(5, -1))
  np.testing.assert_allclose(correlation, np.eye(5), atol=4 / 12_000**0.5)
  across = np.corrcoef(steps[0])[np.triu_indices(300, 1)]
  assert across.std() == pytest.approx(1 / 40**0.5, rel=0.05)
  assert steps.std() == pytest.approx(1, abs=0.02)


def test_heun_through_the_wrapper_is_edms():
  """The inner network of a Gaussian's D, on both processes over one grid, in float32."""
  mean, std = np.array([[0.3, -0.2]]), np.array([[0.7, 0.1]])

  def D(x, sigma, cond=None):
    var = sigma[:, None] ** 2
    return (std**2 * x + var * mean) / (std**2 + var)

  def raw(x_in, c_noise, cond):
    """(D - c_skip x) / c_out, of EDM's table 1."""
    sigma = jnp.exp(4 * c_noise)
    total = jnp.sqrt(sigma**2 + SIGMA_D**2)[:, None]
    x = x_in * total
    skip, out = SIGMA_D**2 / total**2, sigma[:, None] * SIGMA_D / total
    return (D(x, sigma) - skip * x) / out

  sigmas = time_grids.karras(18)
  at_sigma = solvers.from_schedule("heun", noise_schedules.edm(sigmas, SIGMA_D))
  schedule = noise_schedules.trigflow(np.arctan(sigmas / SIGMA_D), SIGMA_D)
  at_angle = solvers.from_schedule("heun", schedule)
  z = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
  mean, std = jnp.float32(mean), jnp.float32(std)
  expected = sample(D, at_sigma, jnp.float32(80 * z))
  denoiser = trigflow.denoiser(trigflow.from_edm(raw, SIGMA_D), SIGMA_D)
  start = jnp.float32(80 * z * np.cos(np.arctan(80 / SIGMA_D)))
  found = sample(denoiser, at_angle, start)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert np.std(expected, 0)[0] > 0.3


def test_a_sample_depends_on_its_own_key_alone():
  """Sample 3 of five is, bit for bit, the sample of its seed drawn alone."""
  table = solvers.build(sigma_d=SIGMA_D, name="consistency", steps=4)

  def denoiser(x, t, cond):
    t = trigflow.expand(t, x)
    return 0.5 * x * (1 - 0.2 * t) + 0.1 * jnp.abs(x)

  def draw(seeds):
    keys = sequential.keys_from_seeds(np.array(seeds))
    x = sequential.sample_prior(table, keys, (2, 3))
    return np.asarray(sequential.sample(denoiser, table, x, keys, None))

  five, one = draw([11, 5, 7, 42, 0]), draw([42])
  np.testing.assert_array_equal(five[3], one[0])
  assert len(np.unique(five[:, 0, 0])) == 5


def test_condition_and_time_reach_the_denoiser():
  """d = label at the first angle, and twice it after: a sum that shows both."""
  table = solvers.build(sigma_d=SIGMA_D, name="ddim", steps=2, timesteps=(1.5, 0.5))
  label = jnp.arange(4)

  def denoiser(x, t, cond):
    scale = jnp.where(t > 1, 1.0, 2.0) * cond["label"].astype(x.dtype)
    return scale[:, None] * jnp.ones_like(x)

  x = sample(denoiser, table, jnp.zeros((4, 1)), {"label": label})
  # The last step of ddim goes to d itself.
  np.testing.assert_allclose(x[:, 0], 2.0 * np.arange(4), rtol=1e-5)
