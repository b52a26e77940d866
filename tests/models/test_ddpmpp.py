"""DDPM++ and NCSN++ against EDM's numbers, and their double norm in float64."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import central, random_params

from sdiff_jax.data import class_cond
from sdiff_jax.diffusion import trigflow
from sdiff_jax.models import ddpmpp
from sdiff_jax.models.layers import linen
from sdiff_jax.pretrained import edm
from sdiff_jax.pretrained.files import state_dict as state_dict_lib
from sdiff_jax.types import UserError

SIGMA_D = 0.5
LABELS = np.array([1, 3, 0, -1])  # of edm_ddpmpp; the third is a mixture there
RENAMED = {
  "channels": "model_channels",
  "emb_mult": "channel_mult_emb",
  "noise_mult": "channel_mult_noise",
  "blocks": "num_blocks",
  "attn_resolutions": "attn_resolutions",
  "augment": "augment_dim",
  "embedding": "embedding_type",
  "encoder": "encoder_type",
  "decoder": "decoder_type",
}
SMALL = {"channels": 8, "channel_mult": (1, 2), "blocks": 0, "attn_resolutions": ()}
SMALL |= {"shape": (4, 4, 3), "cond": {}, "sigma_d": SIGMA_D}
x64 = pytest.mark.usefixtures("x64")
# Compiled once for one call: the time is the compiler's.
quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def options(arrays: dict) -> dict:
  """Returns the fields of the network of a fixture."""
  cfg = json.loads(str(arrays["meta"]))["cfg"]
  cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items()}
  out = {ours: cfg[theirs] for ours, theirs in RENAMED.items()}
  out |= {k: cfg[k] for k in ("channel_mult", "resample_filter")}
  side, colors = cfg["img_resolution"], cfg["img_channels"]
  out |= {"shape": (side, side, colors), "cond": class_cond(cfg["label_dim"])}
  return out | {"sigma_d": SIGMA_D, "norm": "single"}


def state_dict(arrays: dict) -> dict[str, np.ndarray]:
  return {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}


def load(arrays: dict, dtype: str) -> tuple:
  """Returns the inner network of a fixture and its parameters."""
  given = options(arrays)
  net = ddpmpp.build(**given, dtype=dtype)
  with jax.numpy_dtype_promotion("standard"):  # init under x64 mixes types
    like = jax.eval_shape(net.init, jax.random.key(0))
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), like)
  taps = given["resample_filter"]
  tensors = state_dict(arrays)
  return net, edm.from_state_dict(tensors, like, resample_filter=taps)


def inputs(arrays: dict, dtype: str) -> dict:
  """Returns the inputs by name, images as NHWC."""
  names = ("x", "x_in", "dx", "cot", "sigma", "noise_labels", "dnoise", "dsigma")
  out = {k: jnp.asarray(arrays[k], dtype) for k in names}
  out = {k: jnp.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in out.items()}
  cond = {}
  if "labels" in arrays:
    cond["label"] = jnp.asarray(LABELS)
  if "augment_labels" in arrays:
    cond["augment"] = jnp.asarray(arrays["augment_labels"], dtype)
  return out | {"cond": cond}


def denoised(net, params, x, sigma, cond):
  """D(x, sigma) of EDM, through the TrigFlow form of its network."""
  t = jnp.arctan(sigma / SIGMA_D)
  apply = functools.partial(linen.trigflow_from_edm(net, SIGMA_D).apply, params)
  xt = jnp.cos(trigflow.expand(t, x)) * x
  return trigflow.denoiser(apply, SIGMA_D)(xt, t, cond)


def with_mixture(params: dict, mixture: np.ndarray) -> dict:
  """Returns parameters for which label 0 is a mixture of labels."""
  embedding = params["net"]["embedding"]
  kernel = embedding["label"]["kernel"]
  row = jnp.asarray(mixture, kernel.dtype) @ kernel
  label = {"kernel": kernel.at[0].set(row)}
  return params | {"net": params["net"] | {"embedding": embedding | {"label": label}}}


def everything(arrays: dict, dtype: str) -> dict:
  """Returns F, D, their derivatives, and the gradients, by the fixture's names."""
  net, params = load(arrays, dtype)
  given = inputs(arrays, dtype)
  cond = given.pop("cond")

  def mixed(params):
    return with_mixture(params, arrays["labels"][2]) if "labels" in arrays else params

  @quickly
  def run(params, a):
    def F_at(x, c, params):
      return net.apply(mixed(params), x, c, cond)

    def D_at(x, sigma):
      return denoised(net, mixed(params), x, sigma, cond)

    F = functools.partial(F_at, params=params)
    at, along = (a["x_in"], a["noise_labels"]), (a["dx"], a["dnoise"])
    none = jax.tree.map(jnp.zeros_like, along)
    out, pull = jax.vjp(F_at, *at, params)
    grads = pull(a["cot"])
    _, push = jax.linearize(F, *at)
    D, D_jvp = jax.jvp(D_at, (a["x"], a["sigma"]), (a["dx"], a["dsigma"]))
    return {
      "F": out,
      "D": D,
      "F_jvp": push(*along),
      "F_jvp_x": push(along[0], none[1]),
      "F_jvp_t": push(none[0], along[1]),
      "D_jvp": D_jvp,
      "grad_x": grads[0],
      "grad_noise": grads[1],
    }, grads[2]["net"]

  found, by_weight = run(params, given)
  found = {k: np.asarray(v) for k, v in found.items()}
  found = {k: np.moveaxis(v, -1, 1) if v.ndim == 4 else v for k, v in found.items()}
  paths = jax.tree_util.tree_leaves_with_path(by_weight)
  names = {edm._name(tuple(k.key for k in path)): leaf for path, leaf in paths}
  # In PyTorch's layout, whose transposition undoes itself.
  for name, gradient in names.items():
    wanted = arrays.get(f"ref64/gradw/{name}")
    if wanted is not None:
      g = np.asarray(gradient)
      g = np.moveaxis(g, (-1, -2), (0, 1)) if g.ndim > 1 else g
      found[f"gradw/{name}"] = g.reshape(wanted.shape)
  return found


@pytest.mark.parametrize(
  ("name", "dtype", "limit"),
  [
    pytest.param("edm_ddpmpp", "float64", 1e-6, marks=pytest.mark.slow),
    pytest.param("edm_ncsnpp", "float64", 1e-6, marks=pytest.mark.slow),
    ("edm_ncsnpp", "float32", 1e-4),
    pytest.param("edm_ddpmpp", "float32", 1e-4, marks=pytest.mark.slow),
    pytest.param("edm_ddpmpp_uncond_aug", "float32", 1e-4, marks=pytest.mark.slow),
    pytest.param("edm_ddpmpp_uncond_aug", "float64", 1e-6, marks=pytest.mark.slow),
  ],
)
@x64
def test_numbers_of_edm(fixture, name, dtype, limit):
  """Outputs, tangents and gradients, relative to the largest of each."""
  arrays = fixture(name)
  found = everything(arrays, dtype)
  wanted = {k[6:]: v for k, v in arrays.items() if k.startswith("ref64/")}
  wanted.pop("D_nolabel", None)
  assert found.keys() == wanted.keys()
  largest = max(np.abs(v).max() for k, v in wanted.items() if k.startswith("gradw"))
  for key, value in wanted.items():
    floor = 1e-2 * largest if key.startswith("gradw") else 0
    error = np.abs(found[key] - value).max() / max(np.abs(value).max(), floor)
    assert error < limit, (key, error)


@functools.cache
def small(**fields):
  return ddpmpp.build(**SMALL | fields)


@pytest.mark.parametrize(
  "process", [pytest.param("trigflow", marks=pytest.mark.slow), "edm"]
)
@x64
def test_tangent_is_that_of_central_differences(process):
  """Through the double norm, and through the map of times inside the wrapper."""
  net = small(process=process, dtype="float64")
  params = random_params(net)
  rng = np.random.default_rng(0)
  x, dx = jnp.asarray(rng.normal(size=(2, 2, *SMALL["shape"])))
  t, dt = jnp.asarray([0.4, 1.3]), jnp.asarray([0.7, -0.2])

  def F(x, t):
    return net.apply(params, x, t, None)

  _, tangent = quickly(lambda: jax.jvp(F, (x, t), (dx, dt)))()
  expected = central(quickly(F), (x, t), (dx, dt))
  size = np.abs(expected).max()
  assert size > 0.1
  np.testing.assert_allclose(tangent, expected, rtol=1e-6, atol=1e-7 * size)


@pytest.mark.parametrize(
  ("fields", "count"),
  [
    pytest.param({"norm": "single", "augment": 9}, 55_733_891, marks=pytest.mark.slow),
    pytest.param({"norm": "single"}, 55_732_739, marks=pytest.mark.slow),
    ({}, 60_049_667),
  ],
)
def test_parameters_of_cifar10(fields, count):
  """EDM's network for CIFAR-10 has 55.7 million."""
  net = ddpmpp.build(shape=(32, 32, 3), cond={}, sigma_d=SIGMA_D, **fields)
  shapes = jax.eval_shape(net.init, jax.random.key(0))["net"]
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_filters():
  """A box halves by means and doubles by copies; the wider filter keeps lines."""
  x = jnp.arange(4 * 6 * 2, dtype=jnp.float32).reshape(1, 4, 6, 2)
  means = x.reshape(1, 2, 2, 3, 2, 2).mean((2, 4))
  np.testing.assert_allclose(ddpmpp.resample(x, (1, 1)), means)
  copies = x.repeat(2, 1).repeat(2, 2)
  np.testing.assert_allclose(ddpmpp.resample(x, (1, 1), up=True), copies)
  wide = ddpmpp.resample(x, (1, 3, 3, 1), up=True)[:, 2:-2, 2:-2]
  rows, columns = np.mgrid[0.75:2.5:0.5, 0.75:4.5:0.5]
  line = (rows * 12 + columns * 2)[None, :, :, None] + np.array([0.0, 1.0])
  np.testing.assert_allclose(wide, line, rtol=1e-5)


def test_skips_of_the_decoder_add_images():
  """Without the last layer's image only the low resolution is left, as copies."""
  net = small(decoder="skip", encoder="skip")
  params = random_params(net, dtype="float32")
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *SMALL["shape"])), "float32")
  F = quickly(lambda params: net.apply(params, x, jnp.ones(1), None))
  last = params["net"]["dec_4x4_aux_conv"]
  without = jax.tree.map(jnp.zeros_like, last)
  coarse = F(params | {"net": params["net"] | {"dec_4x4_aux_conv": without}})
  np.testing.assert_allclose(coarse, coarse[:, ::2, ::2].repeat(2, 1).repeat(2, 2))
  assert jnp.std(coarse) > 0.1
  assert jnp.std(F(params) - coarse) > 0.1
  skip = jax.tree.map(jnp.zeros_like, params["net"]["enc_2x2_aux_skip"])
  moved = F(params | {"net": params["net"] | {"enc_2x2_aux_skip": skip}})
  assert jnp.std(F(params) - moved) > 0.01


def test_what_does_not_fit_is_listed(fixture):
  arrays = fixture("edm_ddpmpp_uncond_aug")
  net = ddpmpp.build(**options(arrays))
  like = jax.eval_shape(net.init, jax.random.key(0))
  tensors = state_dict(arrays)
  tensors["model.more"] = np.zeros(3)
  tensors["model.map_layer1.bias"] = np.zeros(5)
  del tensors["model.enc.16x16_conv.weight"]
  with pytest.raises(UserError, match="the tensors do not fit the network") as error:
    edm.from_state_dict(tensors, like)
  assert str(error.value).endswith(
    "missing: model.enc.16x16_conv.weight; left over: model.more; "
    "of another shape: model.map_layer1.bias (5,) for (16,)"
  )
  with pytest.raises(
    ValueError, match=r"resample_filter=\(1, 3, 3, 1\): must be the filter of the file"
  ):
    edm.from_state_dict(tensors, like, resample_filter=(1, 3, 3, 1))
  with pytest.raises(UserError, match=r"missing: .* and \d+ more; left over"):
    state_dict_lib.match_params({"other": np.zeros(2)}, like["net"], edm._name)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"process": "vp"}, r"process='vp': must be one of trigflow, edm"),
    ({"norm": "scale"}, r"norm='scale': must be one of double"),
    ({"encoder": "none"}, r"encoder='none'"),
    ({"channels": 6}, r"channels=6: must be a multiple of 4"),
    ({"channels": 48}, r"channels=48: must be a multiple of 4, and of 32"),
    ({"shape": (5, 4, 3)}, r"channel_mult=\(1, 2\): 2 must divide"),
    ({"resample_filter": (1, 2, 1)}, r"resample_filter=\(1, 2, 1\): must have an even"),
  ],
)
def test_impossible_networks(fields, message):
  with pytest.raises(ValueError, match=message):
    ddpmpp.build(**SMALL | fields)
