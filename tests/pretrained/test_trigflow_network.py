"""Networks of the diffusers format as TrigFlow networks, and as teachers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian
from conftest import FIXTURES

from sdiff_jax.diffusion import guidance, noise_schedules, parameterizations, trigflow
from sdiff_jax.diffusion.trigflow import expand
from sdiff_jax.losses import scm
from sdiff_jax.pretrained.diffusers import loading, scheduler, trigflow_network
from sdiff_jax.samplers import sequential, solvers

SD2, CHURCH = FIXTURES / "tiny-sd2", FIXTURES / "tiny-ddpm-church"
SD3, FLUX, DIT = (FIXTURES / f"tiny-{name}" for name in ("sd3", "flux", "dit"))
FOLDERS = {"sd2": SD2, "church": CHURCH, "sd3": SD3, "flux": FLUX, "dit": DIT}
FOLDERS |= {name: FIXTURES / f"tiny-{name}" for name in ("sdxl", "sana")}
PIXELS = {"mean": (0.0,), "std": (0.5,), "latents": False}
ZERO_SNR = noise_schedules.rescale_zero_terminal_snr(
  noise_schedules.alphas_cumprod("scaled_linear", 1000, start=0.00085, end=0.012)
)
quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def unit_of(folder) -> dict:
  """Returns the data of a folder's own unit: pixels, or latents of its autoencoder."""
  config = loading.configs(str(folder)).get("vae")
  if config is None:
    return PIXELS
  shift, scaling = config.get("shift_factor") or 0.0, config["scaling_factor"]
  return {"mean": (shift,), "std": (1 / scaling,), "latents": True}


# Predictions of data N(mean, std^2), which are exact at every noise level.
def exact(kind, level, mean, std):
  def predict(x, time, cond):
    alpha, sigma = (expand(a, x) for a in level(time))
    variance = (alpha * std) ** 2 + sigma**2
    x0 = mean + alpha * std**2 / variance * (x - alpha * mean)
    eps = (x - alpha * x0) / sigma
    return {
      "x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0
    }[kind]  # fmt: skip

  return predict


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("data_std", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_networks_of_gaussian_data(kind, data_std):
  """F of the best network of any process is that of the best TrigFlow network."""
  rng, sigma_d = np.random.default_rng(0), 0.3
  mean, std = (jnp.asarray(rng.random((1, 4)) + 0.1) for _ in range(2))
  abar = ZERO_SNR if kind in ("v", "x0") else ZERO_SNR[:-1]
  angles = np.arctan2((1 - abar) ** 0.5, data_std * abar**0.5)
  if kind == "flow":
    level = lambda time: parameterizations.flow(time / 1000)  # noqa: E731
    predict = exact(kind, level, mean, std)
    net = parameterizations.trigflow_from_flow(predict, 1000, data_std)
    t = jnp.asarray(rng.uniform(0.01, np.pi / 2, 64))
  else:

    def level(time):
      t = jnp.interp(time, jnp.arange(len(abar), dtype=time.dtype), angles)
      scale = jnp.hypot(jnp.cos(t), data_std * jnp.sin(t))
      return jnp.cos(t) / scale, data_std * jnp.sin(t) / scale

    predict = exact(kind, level, mean, std)
    net = parameterizations.trigflow_from_vp(predict, kind, abar, data_std)
    t = jnp.asarray(rng.uniform(angles[0], angles[-1], 64))
    t = t.at[0].set(angles[0]).at[1].set(angles[-1])
  x = jnp.asarray(rng.normal(size=(64, 4)))
  unit = sigma_d / data_std  # of the data here, over that of the network
  wanted = Gaussian(mean * unit, std * unit, sigma_d).diffusion_net(x, t)
  np.testing.assert_allclose(net(x, t, None), wanted, rtol=1e-9, atol=1e-10)


@functools.cache
def double(name: str):
  """Returns the TrigFlow network of a folder in float64, its parameters and inputs."""
  folder = FOLDERS[name]
  source = trigflow_network.network(str(folder), dtype="float64", **unit_of(folder))
  params = trigflow_network.parameters(str(folder))["net"]
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  rng = np.random.default_rng(0)
  x, v = (jnp.asarray(rng.normal(size=(2, 8, 8, source.channels))) for _ in range(2))
  shapes = {"text": (2, 5), "pooled": (2,), "mask": (2,)}
  cond = {
    k: jnp.asarray(rng.normal(size=(*shapes[k], n or 5)))
    for k, n in source.cond.items()
  }
  if source.classes:
    cond["label"] = jnp.array([1, -1], jnp.int32)
  return functools.partial(source.apply, params), x, v, cond


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  "name",
  [
    "dit",
    *(pytest.param(n, marks=pytest.mark.slow) for n in FOLDERS if n != "dit"),
  ],
)
def test_the_tangent_is_exact(name):
  """Along the state and the time, against central differences in float64."""
  net, x, v, cond = double(name)
  t, h = jnp.array([0.3, 1.2]), 1e-6
  # cos(t) df/dt with f(s) = cos(s) x_s - sin(s) F(x_s, s), sigma_d = 1.

  @quickly
  def f(s):
    xs = x + expand(s - t, x) * v
    return trigflow.denoise(xs, net(xs, s, cond), s, 1.0)

  _, g = quickly(lambda: scm.tangent(net, x, t, v, cond, sigma_d=1.0))()
  wanted = expand(jnp.cos(t), x) * (f(t + h) - f(t - h)) / (2 * h)
  assert jnp.abs(g - wanted).max() < 1e-6 * jnp.abs(wanted).max()
  # The time alone matters, and the random weights see it.
  moved = net(x, t + 0.05, cond) - net(x, t, cond)
  assert jnp.abs(moved).max() > 1e-3


@pytest.mark.parametrize(
  ("name", "file"),
  [
    ("sd2", "expected_text_to_image"),
    pytest.param("sd3", "expected", marks=pytest.mark.slow),
  ],
)
def test_sampling_is_that_of_the_pipeline(name, file):
  """DDIM of the TrigFlow network at the timesteps of diffusers ends at its latents."""
  folder = str(FOLDERS[name])
  with np.load(f"{folder}/{file}.npz") as stored:
    arrays = dict(stored)
  meta, model = json.loads(str(arrays["meta"])), loading.load(folder)
  source = trigflow_network.network(folder, **unit_of(folder))
  params = trigflow_network.parameters(folder)["net"]
  steps = meta.get("steps", 10)
  table = scheduler.tableau(model.schedule, steps)
  # In the unit of the network data have std 1, and so has the state at its angle.
  if name == "sd2":  # whose last step ends at the first timestep
    abar = model.schedule.abar[np.append(table.time.astype(int), 0)]
    times = np.arccos(abar**0.5)
  else:
    times = np.append(np.arctan2(table.time, 1 - table.time), 0.0)
  schedule = noise_schedules.trigflow(times, sigma_d=1.0)
  prompts = [meta["prompt"], meta["negative_prompt"]]
  ids = {k: jnp.asarray(model.tokenizers[k].encode(prompts)) for k in model.tokenizers}
  texts = jax.jit(lambda ids: model.encode(model.params, ids))(ids)
  cond, empty = ({k: v[i] for k, v in texts.items()} for i in range(2))
  net = guidance.classifier_free(
    functools.partial(source.apply, params),
    meta["guidance_scale"],
    guidance.without_text(empty),
  )
  x = jnp.asarray(np.moveaxis(arrays["latents_in"], 1, -1))
  cond = {k: v[None] for k, v in cond.items()}

  @quickly
  def run(x, cond):
    denoise, table = trigflow.denoiser(net, 1.0), solvers.ddim.ddim(schedule)
    return sequential.sample(
      denoise, table, x, sequential.keys_from_seeds(np.arange(1)), cond
    )

  wanted = np.moveaxis(arrays["latents_out"], 1, -1)
  assert np.abs(run(x, cond) - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize(
  "name", ["church", pytest.param("sd2", marks=pytest.mark.slow)]
)
def test_one_step_is_the_prediction_of_the_data(name):
  """At pure noise the consistency function is x0 of the last timestep."""
  folder = str(FOLDERS[name])
  model, unit = loading.load(folder), unit_of(folder)
  source = trigflow_network.network(folder, **unit)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 16, 16, source.channels)), jnp.float32)
  cond = {k: jnp.ones((2, 3, n)) for k, n in source.cond.items()}
  data_std, abar = (0.5, 1.0)[name == "sd2"], model.schedule.abar[-1:]
  alpha, sigma = abar**0.5, (1 - abar) ** 0.5
  t = jnp.asarray(np.arctan2(sigma, data_std * alpha).repeat(2), jnp.float32)
  predict = functools.partial(model.unet.apply, model.params["unet"])

  @quickly
  def both(x):
    xt = data_std * x
    net = functools.partial(source.apply, model.params["unet"])
    ours = trigflow.denoise(xt, net(x, t, cond), t, data_std)
    own = trigflow.to_process(xt, alpha.repeat(2), sigma.repeat(2), data_std)

    def level(_):
      return tuple(jnp.asarray(a.repeat(2), own.dtype) for a in (alpha, sigma))

    denoise = parameterizations.denoiser(predict, model.schedule.kind, level)
    return ours, denoise(own, jnp.full(2, 999.0), cond)

  ours, wanted = both(x)
  np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-3 * jnp.abs(wanted).max())
