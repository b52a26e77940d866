"""EDM2's U-Net against numbers of the published code, and what training keeps true."""

import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_forms import central, random_params

from sdiff_jax.data import class_cond
from sdiff_jax.diffusion import trigflow
from sdiff_jax.losses import diffusion, scm
from sdiff_jax.models import edm2
from sdiff_jax.models.layers import edm2_blocks, patches
from sdiff_jax.models.layers import magnitude_preserving as mp
from sdiff_jax.pretrained import edm2 as edm2_weights
from sdiff_jax.training import ema, state, step
from sdiff_jax.types import UserError

SIGMA_D = 0.5
RAW = {"process": "edm", "embedding": "fourier", "norm": "single"}
SMALL = {
  "shape": (8, 8, 2),
  "cond": class_cond(3),
  "sigma_d": SIGMA_D,
  "channels": 16,
  "channel_mult": (1, 2),
  "blocks": 1,
  "attn_resolutions": (4,),
  "head_channels": 16,
}
ONE_LEVEL = {"channel_mult": (1,), "attn_resolutions": ()}
PEERS = ("edm2_cond", "edm2_heads64", "edm2_no_attention")
peers = pytest.mark.parametrize("name", PEERS)


def mostly_slow(default: str):
  """Parametrizes by fixture; all but one compile for long."""
  return pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n != default)) for n in PEERS],
  )


x64 = pytest.mark.usefixtures("x64")


@functools.cache
def small(**options):
  """Returns a small network with its apply compiled."""
  net = edm2.build(**SMALL | options)
  return net._replace(apply=jax.jit(net.apply), init=jax.jit(net.init))


def like(net):
  with jax.numpy_dtype_promotion("standard"):  # init under x64 mixes types
    return jax.eval_shape(net.init, jax.random.key(0))


# Numbers of the published code.


def peer(arrays: dict, dtype: str) -> tuple:
  """Returns the network of a fixture and its parameters."""
  cfg = json.loads(str(arrays["meta"]))["cfg"]
  fields = {
    "shape": (cfg["img_resolution"],) * 2 + (cfg["img_channels"],),
    "cond": class_cond(cfg["label_dim"]),
    "channels": cfg["model_channels"],
    "channel_mult": cfg["channel_mult"],
    "blocks": cfg["num_blocks"],
    "attn_resolutions": cfg["attn_resolutions"],
    "head_channels": cfg.get("channels_per_head", 64),
    "clip": cfg.get("clip_act", 256.0),
  }
  net = edm2.build(**fields, **RAW, sigma_d=SIGMA_D, dtype=dtype)
  template = like(net)
  if "logvar_channels" in cfg:  # not a field of ours: its shapes as they are
    head = edm2.LogVar(cfg["logvar_channels"])
    shapes = jax.eval_shape(head.init, jax.random.key(0), jnp.ones(1, "float32"))
    template["logvar"] = shapes["params"]
    net = net._replace(
      logvar=lambda params, t: head.apply(
        {"params": params["logvar"]}, jnp.log(SIGMA_D * jnp.tan(t)) / 4
      )
    )
  tensors = {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}
  params = edm2_weights.from_state_dict(tensors, template)
  return net, jax.tree.map(lambda p: jnp.asarray(p, dtype), params)


def from_peer(arrays: dict, dtype: str) -> dict:
  """Returns the arrays of a fixture, images as [B, H, W, C]."""
  others = ("w/", "ref64/gradw", "forced/", "meta", "ref64/logvar")
  return {
    k: jnp.asarray(np.moveaxis(v, 1, -1) if v.ndim == 4 else v, dtype)
    for k, v in arrays.items()
    if not k.startswith(others)
  }


def functions(net, params, cond):
  """Returns the raw network of (x, c_noise) and the denoiser of (x, sigma)."""
  F = jax.jit(lambda x, t: net.apply(params, x, t, cond))

  def angle(sigma):
    return jnp.arctan(sigma / SIGMA_D)

  def raw(x, c_noise):
    return -F(x, angle(jnp.exp(4 * c_noise)))

  def denoiser(x, sigma):
    t = angle(sigma)
    xt = trigflow.expand(jnp.cos(t), x) * x
    return trigflow.denoise(xt, F(xt / SIGMA_D, t), t, SIGMA_D)

  return raw, denoiser


def apart(found, expected):
  """Returns the largest difference of a sample, relative to its largest value."""
  axes = tuple(range(1, expected.ndim))
  difference = np.max(np.abs(np.asarray(found, np.float64) - expected), axes)
  return np.max(difference / np.max(np.abs(expected), axes))


def derivatives(arrays: dict, dtype: str) -> dict:
  """Returns how far every output and derivative is from the fixture's."""
  net, params = peer(arrays, dtype)
  a = from_peer(arrays, dtype)
  cond = {"label": a["labels"]} if "labels" in a else None
  raw, denoiser = functions(net, params, cond)
  x, c, dx, dc = (a[k] for k in ("x_in", "noise_labels", "dx", "dnoise"))
  F, both = jax.jvp(raw, (x, c), (dx, dc))
  D, along = jax.jvp(denoiser, (a["x"], a["sigma"]), (dx, a["dsigma"]))
  found = {
    "F": F,
    "F_jvp": both,
    "F_jvp_x": jax.jvp(raw, (x, c), (dx, 0 * dc))[1],
    "F_jvp_t": jax.jvp(raw, (x, c), (0 * dx, dc))[1],
    "D": D,
    "D_jvp": along,
  }
  return {k: apart(v, a[f"ref64/{k}"]) for k, v in found.items()}


@mostly_slow("edm2_cond")
@x64
def test_outputs_and_tangents_in_float64(name, fixture):
  """Of the raw network and of the denoiser; references are rounded to float32."""
  for key, distance in derivatives(fixture(name), "float64").items():
    assert distance < 1e-6, key


@pytest.mark.slow
def test_outputs_and_tangents_in_float32(fixture):
  for key, distance in derivatives(fixture("edm2_cond"), "float32").items():
    assert distance < (1e-4 if "jvp" in key else 2e-5), key


@mostly_slow("edm2_heads64")
@x64
def test_gradients(name, fixture):
  arrays = fixture(name)
  net, params = peer(arrays, "float64")
  a = from_peer(arrays, "float64")
  cond = {"label": a["labels"]} if "labels" in a else None

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1, 2))
  def gradients(params, x, c):
    raw, _ = functions(net, params, cond)
    return jnp.sum(raw(x, c) * a["cot"])

  of_params, of_x, of_c = gradients(params, a["x_in"], a["noise_labels"])
  assert apart(of_x, a["ref64/grad_x"]) < 1e-6
  np.testing.assert_allclose(of_c, a["ref64/grad_noise"], rtol=1e-6)
  # The peer's, as if they were parameters: zeros for those that the file leaves out.
  names = [k.removeprefix("w/") for k in arrays if k.startswith("w/")]
  tensors = {
    k: arrays.get(f"ref64/gradw/{k}", np.full_like(arrays[f"w/{k}"], np.nan))
    for k in names
  }
  expected = edm2_weights.from_state_dict(tensors, jax.eval_shape(lambda: params))
  largest = max(
    np.nanmax(np.abs(e), initial=0) for e in jax.tree.leaves(expected["net"])
  )
  compared = 0
  for found, given in zip(*map(jax.tree.leaves, (of_params, expected)), strict=True):
    if not np.any(np.isnan(given)):
      scale = max(np.max(np.abs(given)), 1e-5 * largest)
      assert np.max(np.abs(found - given)) < 1e-6 * scale
      compared += 1
  assert compared == sum(k.startswith("ref64/gradw/") for k in arrays)


@mostly_slow("edm2_heads64")
@x64
def test_log_variance(name, fixture):
  """w_phi = -u(ln(sigma) / 4)."""
  arrays = fixture(name)
  net, params = peer(arrays, "float64")
  t = jnp.arctan(jnp.asarray(arrays["sigma"], "float64") / SIGMA_D)
  w = net.logvar(params, t)
  np.testing.assert_allclose(w, -arrays["ref64/logvar"][:, 0, 0, 0], rtol=2e-6)


@x64
def test_integer_labels_and_no_label(fixture):
  arrays = fixture("edm2_cond")
  net, params = peer(arrays, "float64")
  a = from_peer(arrays, "float64")
  _, denoiser = functions(net, params, {"label": jnp.full(4, -1)})
  assert apart(denoiser(a["x"], a["sigma"]), a["ref64/D_nolabel"]) < 1e-6
  # Rows of the fixture: classes 4 and 0, a soft one, none.
  raw, _ = functions(net, params, {"label": jnp.array([4, 0, 1, -1])})
  F = raw(a["x_in"], a["noise_labels"])
  rows = np.array([0, 1, 3])
  assert apart(F[rows], a["ref64/F"][rows]) < 1e-6
  assert apart(F[2:3], a["ref64/F"][2:3]) > 1e-2


@peers
def test_forced_normalization(name, fixture):
  """What a step of training writes back into the weights."""
  arrays = fixture(name)
  forced = [k for k in arrays if k.startswith("forced/")]
  assert forced
  for key in forced:
    w = np.asarray(arrays[key.replace("forced", "w")], np.float32)
    found = np.moveaxis(mp.normalize_weight(jnp.asarray(np.moveaxis(w, 0, -1))), -1, 0)
    np.testing.assert_allclose(found, arrays[key], rtol=1e-6, atol=1e-7)


@peers
def test_the_state_dict_comes_back_to_the_bit(name, fixture):
  arrays = fixture(name)
  _, params = peer(arrays, "float32")
  height = json.loads(str(arrays["meta"]))["cfg"]["img_resolution"]
  found = edm2_weights.to_state_dict(params, height)
  expected = {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}
  assert {k: x.shape for k, x in found.items()} == {
    k: x.shape for k, x in expected.items()
  }
  for key, x in found.items():
    np.testing.assert_array_equal(x, expected[key])


def test_parameters_of_another_network_are_listed(fixture):
  arrays = fixture("edm2_cond")
  net, _ = peer(arrays, "float32")
  tensors = {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}
  gain, added = tensors.pop("unet.out_gain"), {"unet.other.weight": np.zeros((2, 2))}
  tensors["unet.emb_label.weight"] = np.zeros((32, 7))
  with pytest.raises(UserError) as error:
    edm2_weights.from_state_dict(tensors | added, like(net))
  for part in (
    "missing: unet.out_gain",
    "left over: unet.other.weight",
    "of another shape: unet.emb_label.weight (7, 32) for (5, 32)",
  ):
    assert part in str(error.value)
  assert str(error.value).count(";") == 2
  assert "\n" not in str(error.value)
  assert gain.shape == ()


# Sizes.


def parameters(**options) -> int:
  """Returns the number of trained parameters of a network for ImageNet-512."""
  fields = {"shape": (64, 64, 4), "cond": class_cond(1000), "sigma_d": SIGMA_D}
  net = jax.tree_util.tree_leaves_with_path(like(edm2.build(**fields | options))["net"])
  return sum(math.prod(p.shape) for k, p in net if k[-1].key not in ("freqs", "phases"))


@pytest.mark.parametrize(
  ("preset", "published", "counted", "double"),
  [
    ("S", 280.2e6, 280_212_709, 293_926_081),
    ("M", 497.8e6, 497_807_653, 522_187_009),
    ("L", 777.6e6, 777_497_957, 815_590_721),
    ("XL", 1119.4e6, 1_119_283_621, 1_174_137_217),
    ("XXL", 1523.4e6, 1_523_164_645, 1_597_826_497),
  ],
)
@pytest.mark.slow  # those of S are in test_paper.py, too
def test_published_sizes(preset, published, counted, double):
  """arXiv:2410.11081, tables 4 and 5; the double norm adds 4.9 %."""
  assert parameters(preset=preset, embedding="fourier", norm="single") == counted
  assert counted == pytest.approx(published, rel=2e-4)
  assert parameters(preset=preset) == double


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"preset": "XXS"}, r"preset='XXS': must be one of XS, S, M, L, XL, XXL"),
    ({"process": "vp"}, r"process='vp': must be one of trigflow, edm"),
    (
      {"embedding": "rope"},
      r"embedding='rope': must be one of positional, fourier",
    ),
    ({"norm": "layer"}, r"norm='layer': must be one of double, single"),
    ({"shape": (8, 9, 1)}, r"channel_mult=\(1, 2\): 2 must divide .* of \(8, 9, 1\)"),
    ({"shape": (8, 8)}, r"channel_mult=\(1, 2\): 2 must divide"),
    ({"channels": 25}, r"channels=25: 25 must be even"),
    ({"channels": 50}, r"channels=50: 50 .* head_channels=16"),
  ],
)
def test_fields_that_do_not_fit(options, message):
  with pytest.raises(ValueError, match=message):
    edm2.build(**SMALL | options)


# Layers.


def test_magnitudes_are_kept():
  """Unit variance in, unit variance out (section 2.3 of the EDM2 paper)."""
  rng = np.random.default_rng(0)
  x, y = jnp.asarray(rng.standard_normal((2, 8, 16, 16, 64)), jnp.float32)
  for out in (
    mp.silu(x),
    mp.add(x, y, 0.3),
    mp.concatenate(x, y[..., :16], 0.5),
    mp.pixel_norm(3 * x),
    mp.Linear(64).apply(mp.Linear(64).init(jax.random.key(0), x), x),
  ):
    assert float(jnp.mean(out**2)) == pytest.approx(1, abs=0.02)
  conv = mp.Conv(64, jnp.dtype("float32"))
  out = conv.apply(conv.init(jax.random.key(0), x), x)[:, 1:-1, 1:-1]
  assert float(jnp.mean(out**2)) == pytest.approx(1, abs=0.02)
  # Both sides of a concatenation weigh alike, however many channels they have.
  joined = mp.concatenate(x, y[..., :16], 0.5)
  sides = [float(jnp.sum(part**2)) for part in jnp.split(joined, [64], -1)]
  assert sides[0] == pytest.approx(sides[1], rel=0.02)


def test_patches_are_pixels_of_a_smaller_network(key):
  """patch=2 is the network of (H/2, W/2, 4C) between `patches.split` and `join`."""
  options = ONE_LEVEL | {"channels": 8}
  net = small(**options, patch=2)
  inner = small(**options | {"shape": (4, 4, 8)})
  params = random_params(inner, dtype="float32")
  x, t = jax.random.normal(key, (3, 8, 8, 2)), jnp.array([0.1, 0.8, 1.5])
  cond = {"label": jnp.array([0, 2, 1])}
  expected = patches.join(inner.apply(params, patches.split(x, 2), t, cond), 2)
  got = net.apply(params, x, t, cond)
  assert float(jnp.std(got)) > 0.01
  np.testing.assert_array_equal(got, expected)
  # A patch of the image is one pixel, with its rows outermost.
  image = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
  np.testing.assert_array_equal(
    patches.split(image, 2)[1, 1, 2], image[1, 2:4, 4:6].ravel()
  )


def test_resampling():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 6, 2)), jnp.float32)
  corners = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
  np.testing.assert_allclose(
    edm2_blocks.halve(x), sum(corners) / 4, rtol=1e-6, atol=1e-6
  )
  twice = edm2_blocks.double(x)
  for i in (0, 1):
    for j in (0, 1):
      np.testing.assert_array_equal(twice[:, i::2, j::2], x)


def test_vectors_of_zeros_have_derivatives():
  """Of first and second order, where the root of a sum of squares has none."""
  first = jax.jacfwd(mp.pixel_norm)
  J, H = (jax.jit(f)(jnp.zeros(8)) for f in (first, jax.jacrev(first)))
  np.testing.assert_allclose(J, np.eye(8) / 1e-4, rtol=2e-3)
  assert jnp.all(jnp.isfinite(H))
  zero = jnp.zeros((3, 4))
  np.testing.assert_array_equal(mp.normalize_weight(zero), 0)


def test_modulations_are_computed_together_as_alone():
  """In the order of the blocks, whatever their widths."""
  emb = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6)), jnp.float32)
  widths = (4, 8, 4)

  class Modulations(nn.Module):
    @nn.compact
    def __call__(self, *which):
      made = [edm2_blocks.Modulation(widths[i], "double", name=f"{i}") for i in which]
      return edm2_blocks.vectors(made, emb)

  together, params = Modulations().init_with_output(jax.random.key(1), 0, 1, 2)
  for i in range(3):
    alone = Modulations().apply(params, i)
    np.testing.assert_allclose(together[i], alone[0], rtol=1e-5, atol=1e-6)


def test_gradients_leave_the_norm_alone():
  """They are at right angles to the weight, since the layer normalizes it."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
  layer = mp.Linear(4)
  params = layer.init(jax.random.key(0), x)
  grads = jax.grad(lambda p: jnp.sum(jnp.sin(layer.apply(p, x))))(params)
  w, g = params["params"]["weight"], grads["params"]["weight"]
  along = jnp.sum(w * g, 0) / jnp.linalg.norm(w, axis=0) / jnp.linalg.norm(g, axis=0)
  assert jnp.max(jnp.abs(along)) < 1e-3


# Training.


@pytest.mark.slow
@x64
def test_tangent_of_the_consistency_function():
  """g = cos t df/dt along the flow, by central differences."""
  net = small(dtype="float64")
  params = random_params(net)
  rng = np.random.default_rng(0)
  xt, v = jnp.asarray(SIGMA_D * rng.standard_normal((2, 3, 8, 8, 2)))
  t = jnp.array([0.3, 0.9, 1.4])
  cond = {"label": jnp.array([0, 2, -1])}
  bound = functools.partial(net.apply, params)
  _, g = scm.tangent(bound, xt, t, v, cond, sigma_d=SIGMA_D)

  def f(xt, t):
    return trigflow.denoise(xt, bound(xt / SIGMA_D, t, cond), t, SIGMA_D)

  expected = central(f, (xt, t), (v, jnp.ones_like(t)), 1e-6)
  expected *= trigflow.expand(jnp.cos(t), xt)
  assert apart(g, expected) < 1e-7


def weights(params):
  """Returns name -> normalized weight of a network."""
  leaves = jax.tree_util.tree_leaves_with_path(params["net"])
  return {
    jax.tree_util.keystr(k): np.asarray(w) for k, w in leaves if k[-1].key == "weight"
  }


@pytest.mark.slow
def test_every_update_keeps_the_norms():
  """Of each output's weights: r / (r + 1e-4), r = 1 + O(rate) after Adam."""
  net = small(**ONE_LEVEL)
  loss = diffusion.build(network=net, sigma_d=SIGMA_D)
  rate, betas = (lambda n: jnp.float32(0.01)), ema.betas(("power/0.1",), 2)
  optimizer = optax.adam(rate)
  start = state.create(net.init(jax.random.key(0)), optimizer, tuple(betas))
  batch = {
    "x0": 0.5 * jax.random.normal(jax.random.key(1), (2, 8, 8, 2)),
    "cond": {"label": jnp.array([0, 1])},
  }
  run = jax.jit(
    step.build(loss, optimizer, ema=betas, learning_rate=rate, normalize=net.normalize)
  )
  current = start
  for _ in range(3):
    current, metrics = run(current, batch, jax.random.key(2), None)
    assert metrics["skipped"] == 0
  before, after = weights(start.params), weights(current.params)
  assert len(after) == 28
  for name, w in after.items():
    assert np.any(w != before[name]), name
    # A draw of few normal numbers is further from 1 than what Adam made.
    for stored, tolerance in ((before[name], 2e-3), (w, 3e-5)):
      rms = np.sqrt(np.mean(np.square(stored, dtype="float64"), (*range(w.ndim - 1),)))
      np.testing.assert_allclose(rms, 1 - 1e-4, atol=tolerance, err_msg=name)
  # What has no norm to keep is left as the optimizer made it.
  assert 0 < abs(float(current.params["net"]["gain"])) < 0.05


def test_frequencies_are_not_trained():
  net = small(**ONE_LEVEL, embedding="fourier", norm="single")
  params = random_params(net, dtype="float32")
  x = jnp.ones((2, 8, 8, 2))
  t, cond = jnp.array([0.5, 1.0]), {"label": jnp.array([0, 1])}
  grads = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, x, t, cond) ** 2)))(params)
  embedding = grads["net"]["embedding"]
  for name in ("freqs", "phases"):
    np.testing.assert_array_equal(embedding["fourier"][name], 0)
  assert jnp.any(embedding["noise"]["weight"] != 0)


def test_tangents_at_zero_features():
  """Weights of zero make every feature zero, and no derivative NaN."""
  net = small(**ONE_LEVEL)
  params = jax.tree.map(jnp.zeros_like, random_params(net, dtype="float32"))
  params["net"]["gain"] += 1
  x, t = jnp.zeros((2, 8, 8, 2)), jnp.array([0.0, 1.0])
  cond = {"label": jnp.array([0, -1])}

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def both(params):
    bound = lambda x, t: net.apply(params, x, t, cond)  # noqa: E731
    F, J = jax.jvp(bound, (x, t), (x + 1, t + 1))
    return jnp.sum(F), J

  (_, J), grads = both(params)
  for leaf in jax.tree.leaves((J, grads)):
    assert jnp.all(jnp.isfinite(leaf))


@pytest.mark.parametrize("largest", [2, 4, 8])
def test_dropout_at_low_resolutions_alone(largest):
  """Blocks that see dropout are those of at most so many rows."""
  net = edm2.build(**SMALL | {"dropout": 0.5, "dropout_resolution": largest})
  params = like(net)
  x = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)
  t = jax.ShapeDtypeStruct((1,), jnp.float32)
  cond = {"label": jax.ShapeDtypeStruct((1,), jnp.int32)}
  key = jax.eval_shape(lambda: jax.random.key(0))
  text = str(
    jax.make_jaxpr(lambda p, x, t, c, k: net.apply(p, x, t, c, key=k))(
      params, x, t, cond, key
    )
  )
  shapes = {f"bool[1,{s},{s}," for s in (4, 8) if f"bool[1,{s},{s}," in text}
  assert shapes == {f"bool[1,{s},{s}," for s in (4, 8) if s <= largest}
