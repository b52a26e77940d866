"""Diffusion Policy's U-Net against the numbers of those who made it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import random_params

from sdiff_jax.data import trajectories
from sdiff_jax.diffusion import noise_schedules, parameterizations, trigflow
from sdiff_jax.models import unet1d
from sdiff_jax.pretrained import diffusion_policy
from sdiff_jax.pretrained.diffusers import networks, scheduler
from sdiff_jax.pretrained.files import state_dict
from sdiff_jax.samplers import sequential
from sdiff_jax.types import UserError

NAMES = (
  "dp_unet1d",
  pytest.param("dp_unet1d_nofilmscale_nocond", marks=pytest.mark.slow),
)
SCHEDULE = {
  "_class_name": "DDPMScheduler",
  "num_train_timesteps": 100,
  "beta_schedule": "squaredcos_cap_v2",
}
x64 = pytest.mark.usefixtures("x64")


@pytest.fixture
def peer(fixture):
  """Returns a peer's U-Net: fields, tensors and numbers."""

  def load(name: str) -> tuple[dict, dict, dict]:
    arrays = fixture(name)
    cfg = json.loads(str(arrays.pop("meta")))["cfg"]
    names = {
      "diffusion_step_embed_dim": "embed",
      "down_dims": "channels",
      "kernel_size": "kernel",
      "n_groups": "groups",
      "cond_predict_scale": "scale",
      "global_cond_dim": "observation",
    }
    fields = {names[k]: v for k, v in cfg.items() if k != "input_dim"}
    fields["channels"] = tuple(fields["channels"])
    fields["cond"] = trajectories.observation_cond(fields.pop("observation", 0))
    fields["shape"] = arrays["sample"].shape[1:]
    tensors = {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}
    return fields, tensors, arrays

  return load


def build(fields: dict, tensors: dict, dtype: str):
  """Returns (x, time, cond) -> noise, in a type."""
  net = diffusion_policy.predictor(**fields, dtype=dtype)
  like = jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)),
    jax.eval_shape(net.init, jax.random.key(0)),
  )
  params = state_dict.match_params(
    diffusion_policy.unet_tensors(tensors), like, networks.to_state_dict
  )
  return functools.partial(jax.jit(net.apply), params)


def condition(arrays: dict, dtype: str):
  seen = arrays.get("global_cond")
  return None if seen is None else {"observation": jnp.asarray(seen, dtype)}


def error(found, wanted) -> float:
  found = np.asarray(found, np.float64)
  assert found.shape == wanted.shape
  return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
  ("dtype", "bound"),
  [pytest.param("float32", 5e-6, marks=pytest.mark.slow), ("float64", 2e-6)],
)
def test_equals_its_peer(peer, name, dtype, bound):
  """The fixture was made in float32; with it the derivative in the actions."""
  with jax.enable_x64(dtype == "float64"):
    fields, tensors, arrays = peer(name)
    predict, cond = build(fields, tensors, dtype), condition(arrays, dtype)
    x, dx, time = (
      jnp.asarray(arrays[k], dtype) for k in ("sample", "dsample", "timestep")
    )
    out, along = jax.jvp(lambda x: predict(x, time, cond), (x,), (dx,))
    assert out.dtype == dtype
    assert error(out, arrays["output"]) < bound
    assert error(along, arrays["jvp_sample"]) < bound
    for t, wanted in ((7, "output_scalar_t7"), (99, "output_t99")):
      found = predict(x, jnp.full(len(x), float(t), dtype), cond)
      assert error(found, arrays[wanted]) < bound


def test_chain_of_ddpm(peer):
  """100 steps with the noise of the peer, x0 clipped."""
  fields, tensors, arrays = peer("dp_unet1d")
  predict, cond = build(fields, tensors, "float32"), condition(arrays, "float32")
  schedule = scheduler.from_config(SCHEDULE)
  table = scheduler.tableau(schedule, 100)
  denoiser = scheduler.denoiser(predict, schedule, table)
  x = jnp.asarray(arrays["sample"])
  for i in range(100):
    a, b = float(table.x_coef[i, 0]), float(table.denoised_coef[i, 0])
    s, time = float(table.noise_coef[i]), float(table.time[i])
    d = denoiser(x, jnp.full(len(x), time), cond)
    z = arrays["noise"][i] if i < 99 else 0 * arrays["noise"][0]
    x = a * x + b * d + s * jnp.asarray(z)
    if (i + 1) % 10 == 0:
      assert error(x, arrays["ddpm100_every10"][(i + 1) // 10]) < 1e-4
  assert error(x, arrays["ddpm100_final"]) < 1e-4


@pytest.mark.slow
def test_chain_of_ddim(peer):
  fields, tensors, arrays = peer("dp_unet1d")
  predict, cond = build(fields, tensors, "float32"), condition(arrays, "float32")
  schedule = scheduler.from_config(SCHEDULE | {"_class_name": "DDIMScheduler"})
  table = scheduler.tableau(schedule, 15)
  np.testing.assert_array_equal(table.time, arrays["ddim15_timesteps"])
  denoiser = scheduler.denoiser(predict, schedule, table)
  keys = sequential.keys_from_seeds(np.arange(4))
  x = sequential.sample(denoiser, table, jnp.asarray(arrays["sample"]), keys, cond)
  assert error(x, arrays["ddim15_final"]) < 1e-4


@x64
@pytest.mark.parametrize("sigma_d", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_change_of_variables_is_exact(peer, sigma_d):
  """The denoiser of F is that of the noise at every timestep; its jvp is whole."""
  fields, tensors, arrays = peer("dp_unet1d")
  predict, cond = build(fields, tensors, "float64"), condition(arrays, "float64")
  net = unet1d.build(**fields, sigma_d=sigma_d, process="ddpm", dtype="float64")
  like = jax.eval_shape(net.init, jax.random.key(0))
  wide = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float64), like)
  params = diffusion_policy.from_state_dict(tensors, wide)
  abar = noise_schedules.alphas_cumprod("cosine", 100)
  n = np.array([0, 31, 70, 98])
  alpha, sigma = (jnp.asarray(a[n] ** 0.5) for a in (abar, 1 - abar))
  x = jnp.asarray(arrays["sample"], "float64")
  denoiser = parameterizations.denoiser(predict, "eps", parameterizations.vp(abar))
  wanted = denoiser(x, jnp.asarray(n, "float64"), cond)
  t = trigflow.angle(alpha, sigma, sigma_d)
  xt = trigflow.from_process(x, alpha, sigma, sigma_d)
  apply = functools.partial(jax.jit(net.apply), params)
  found = trigflow.denoiser(apply, sigma_d)(xt, t, cond)
  np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
  ("do", "da", "millions"),
  [
    (20, 2, 65.783),
    pytest.param(23, 7, 65.878, marks=pytest.mark.slow),
    pytest.param(60, 9, 66.943, marks=pytest.mark.slow),
  ],
)
def test_parameters_of_published_policies(do, da, millions):
  """Of PushT, Square and Kitchen, with two observations each; counted by hand, too."""

  def block(inner, outer):
    convs = 5 * inner * outer + 5 * outer * outer + 6 * outer  # with norms
    film = (256 + 2 * do + 1) * 2 * outer
    return convs + film + (inner * outer + outer if inner != outer else 0)

  levels = [(da, 256), (256, 512), (512, 1024)]
  count = 2 * 256 * 1024 + 1024 + 256
  count += sum(block(i, o) + block(o, o) for i, o in levels) + 2 * block(1024, 1024)
  count += sum(3 * c * c + c for c in (256, 512))
  count += sum(block(2 * o, i) + block(i, i) + 4 * i * i + i for i, o in levels[1:])
  count += 5 * 256**2 + 3 * 256 + 256 * da + da
  net = diffusion_policy.predictor(
    shape=(16, da), cond=trajectories.observation_cond(2 * do)
  )
  shapes = jax.eval_shape(net.init, jax.random.key(0))
  assert sum(p.size for p in jax.tree.leaves(shapes)) == count
  assert count / 1e6 == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize(
  "prefix", ["", "model.", "ema_model.model.", "diffusion.unet."]
)
def test_names_of_others(peer, prefix):
  """Diffusion Policy's and LeRobot's, with what else is in their files."""
  fields, tensors, _ = peer("dp_unet1d")
  net = unet1d.build(**fields, sigma_d=1.0)
  like = jax.eval_shape(net.init, jax.random.key(0))
  wanted = diffusion_policy.from_state_dict(tensors, like)
  file = {}
  for name, x in tensors.items():
    if prefix == "diffusion.unet.":
      name = name.replace("blocks.0.block", "conv1.block")
      name = name.replace("blocks.1.block", "conv2.block").replace(".2.conv.", ".2.")
    file[prefix + name] = x
  if prefix:
    file["normalizer.params_dict.obs.scale"] = np.ones(20)
  if prefix.startswith("ema"):
    file |= {f"model.{name}": 0 * x for name, x in tensors.items()}
  jax.tree.map(
    np.testing.assert_array_equal, diffusion_policy.from_state_dict(file, like), wanted
  )


def test_files_that_do_not_fit(peer):
  fields, tensors, _ = peer("dp_unet1d")
  net = unet1d.build(**fields | {"embed": 16}, sigma_d=1.0)
  like = jax.eval_shape(net.init, jax.random.key(0))
  tensors.pop("final_conv.1.bias")
  with pytest.raises(
    UserError, match=r"missing: final_conv.1.bias; .*of another shape"
  ):
    diffusion_policy.from_state_dict(tensors | {"more": np.zeros(2)}, like)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"shape": (10, 2)}, r"4 must divide the steps of \(10, 2\)"),
    ({"shape": (8, 8, 3)}, r"must be chunks of actions \(H, Da\)"),
    ({"channels": (16, 20)}, "groups=8: must divide channels=.16, 20"),
    ({"channels": (12, 24), "groups": 4}, "and 8 must divide the first of them"),
    ({"kernel": 4}, "kernel=4, embed=256: must be odd and even"),
    ({"process": "vp"}, "process='vp': must be one of trigflow, ddpm"),
  ],
)
def test_sizes_that_do_not_fit(fields, message):
  with pytest.raises(ValueError, match=message):
    unet1d.build(**{"shape": (16, 2), "sigma_d": 1.0, "cond": {}} | fields)


@x64
def test_jvp_of_the_change_of_variables():
  """dF/dt through timestep and scales, against differences between two timesteps."""
  net = unet1d.build(
    shape=(4, 2),
    cond={},
    sigma_d=0.7,
    channels=(8, 16),
    embed=8,
    process="ddpm",
    dtype="float64",
  )
  params = random_params(net)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)))
  t = jnp.array([0.4, 0.9, 1.3])

  @jax.jit
  def F(t):
    return net.apply(params, x, t, None)

  _, found = jax.jvp(F, (t,), (jnp.ones(3),))
  wanted = (F(t + 1e-6) - F(t - 1e-6)) / 2e-6
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
