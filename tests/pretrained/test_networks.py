"""Networks of the diffusers format against the numbers of those who made it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES

from sdiff_jax.distributed import sharding
from sdiff_jax.pretrained.diffusers import (
  clip_text,
  loading,
  unet2d,
  unet2d_condition,
  vae,
  weights,
)

SD2, CHURCH = FIXTURES / "tiny-sd2", FIXTURES / "tiny-ddpm-church"
# Compiled once for one call: the time is the compiler's.
quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@pytest.fixture
def peer(fixture):
  """Returns the arrays of a fixture, images as NHWC."""

  def load(name: str) -> dict:
    arrays = fixture("diffusers_networks").items()
    found = {k.removeprefix(f"{name}/"): v for k, v in arrays if k.startswith(name)}
    return {k: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in found.items()}

  return load


@functools.cache
def load(folder, dtype: str = "float32", remat: str = "") -> tuple:
  network = loading.network(str(folder), dtype=dtype, remat=remat)
  return network, weights.parameters(str(folder), network, dtype=dtype)


def error(found, wanted) -> float:
  found = np.asarray(found, np.float64)
  assert found.shape == wanted.shape
  return np.abs(found - wanted).max() / np.abs(wanted).max()


def predict(folder, arrays: dict, dtype: str = "float32", **fields):
  """Returns the prediction of a U-Net on its fixture."""
  net, params = load(folder, dtype, **fields)
  wide = "float64" if dtype == "float64" else "float32"
  x, time = (jnp.asarray(arrays[k], wide) for k in ("sample", "timestep"))
  text = arrays.get("encoder_hidden_states")
  cond = None if text is None else {"text": jnp.asarray(text, wide)}
  out = quickly(net.apply)(params, x, time, cond)
  assert out.dtype == wide
  return out


WITH_TEXT = (SD2 / "unet", "tiny_sd2_unet")
WITHOUT_TEXT = (CHURCH / "unet", "unet2d_ddpm_church_like")


@pytest.mark.parametrize(("folder", "name"), [WITH_TEXT, WITHOUT_TEXT])
def test_unet(peer, folder, name):
  """DDPM's file has the names of attention of 2022."""
  arrays = peer(name)
  assert error(predict(folder, arrays), arrays["output"]) < 1e-5


@pytest.mark.parametrize(
  ("folder", "name"),
  [WITH_TEXT, pytest.param(*WITHOUT_TEXT, marks=pytest.mark.slow)],
)
def test_unet_in_half_precision(peer, folder, name):
  """Its blocks recomputed, too, which changes no names."""
  arrays = peer(name)
  _, params = load(folder, "bfloat16")
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  found = error(predict(folder, arrays, "bfloat16", remat="full"), arrays["output"])
  assert 1e-4 < found < 0.05


@pytest.mark.usefixtures("x64")
def test_unet_in_double_precision(peer):
  """As near as the fixture, which was made in float32."""
  arrays = peer("tiny_sd2_unet")
  with jax.numpy_dtype_promotion("standard"):  # init under x64 mixes types
    found = predict(SD2 / "unet", arrays, "float64")
  assert error(found, arrays["output"]) < 2e-6


@pytest.mark.parametrize("folder", ["vae", "vae_legacy_keys"])
def test_vae(peer, folder):
  arrays = peer("tiny_sd2_vae")
  net, params = load(SD2 / folder)
  mean, std = quickly(net.encode)(params, jnp.asarray(arrays["image"]))
  assert error(mean, arrays["enc_mean"]) < 1e-5
  assert error(2 * jnp.log(std), arrays["enc_logvar"]) < 1e-5
  images = quickly(net.decode)(params, jnp.asarray(arrays["latent"]))
  assert error(images, arrays["decoded"]) < 1e-5
  assert (net.factor, net.channels, net.scaling) == (2, 4, 0.18215)


@pytest.mark.parametrize("folder", ["text_encoder", "text_encoder_transformers5"])
def test_text_encoder(peer, folder):
  arrays = peer("tiny_sd2_text")
  net, params = load(SD2 / folder)
  ids = jnp.asarray(arrays["input_ids"], jnp.int32)
  text = quickly(net.apply)(params, ids)
  assert error(text.hidden, arrays["last_hidden_state"]) < 1e-5
  assert error(text.pooled, arrays["pooler_output"]) < 1e-5
  before = quickly(net.apply)(params, ids[:, :-1])  # causal
  np.testing.assert_allclose(before.hidden, text.hidden[:, :-1], atol=1e-5)


def test_layers_of_the_text_encoder(peer):
  """With one block less it returns the norm of the last but one hidden state."""
  arrays = peer("tiny_sd2_text")
  config = json.loads((SD2 / "text_encoder" / "config.json").read_text())
  _, params = load(SD2 / "text_encoder")
  net = clip_text.from_config(config | {"num_hidden_layers": 2})
  text = quickly(net.apply)(params, jnp.asarray(arrays["input_ids"], jnp.int32))
  h = arrays["hidden_penultimate"]
  h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
  norm = params["final_layer_norm"]
  assert error(text.hidden, h * norm["scale"] + norm["bias"]) < 1e-5


def test_end_of_a_text():
  """The first token of that id, or the largest where a config of 2022 says 2."""
  ids = jnp.array([[0, 5, 9, 9, 1], [0, 7, 2, 3, 9]])
  small = {"vocab_size": 10, "hidden_size": 4, "intermediate_size": 4}
  small |= {"num_hidden_layers": 1, "num_attention_heads": 1}
  for end, at in ((9, [2, 4]), (2, [2, 4])):
    net = clip_text.from_config(small | {"eos_token_id": end})
    text = quickly(net.apply)(quickly(net.init)(jax.random.key(0)), ids)
    np.testing.assert_array_equal(
      text.pooled, text.hidden[jnp.arange(2), jnp.array(at)]
    )


LEVELS = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4


@pytest.mark.parametrize(
  ("module", "config", "millions"),
  [
    pytest.param(
      unet2d_condition,
      {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024},
      865.911,
      marks=pytest.mark.slow,
    ),
    (
      vae,
      {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": LEVELS[0],
        "up_block_types": LEVELS[1],
      },
      83.654,
    ),
    (
      clip_text,
      {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
      },
      340.388,
    ),
    (
      unet2d,
      {
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
        "attention_head_dim": None,
      },
      113.673,
    ),
    (
      unet2d,
      {
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"] + ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2 + ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": None,
      },
      35.746,
    ),
  ],
  ids=["stable diffusion 2", "its vae", "its text encoder", "church", "cifar-10"],
)
def test_parameters_of_published_networks(module, config, millions):
  shapes = jax.eval_shape(module.from_config(config).init, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count / 1e6 == pytest.approx(millions, abs=5e-4)


@pytest.mark.parametrize(
  "remat",
  [
    pytest.param("", marks=pytest.mark.slow),
    pytest.param("dots", marks=pytest.mark.slow),
    "full",
  ],
)
def test_blocks_are_recomputed_if_asked(remat):
  """Resnets, transformers and self-attention; the encoder and the decoder; texts."""
  counts = []
  for folder, function, *shapes in (
    (SD2 / "unet", "apply", (1, 8, 8, 4), (1,), (1, 3, 24)),
    (SD2 / "vae", "encode", (1, 8, 8, 3)),
    (SD2 / "vae", "decode", (1, 4, 4, 4)),
    (SD2 / "text_encoder", "apply", (1, 12)),
  ):
    net = loading.network(str(folder), remat=remat)
    params = jax.eval_shape(net.init, jax.random.key(0))
    dtype = jnp.int32 if folder.name == "text_encoder" else jnp.float32
    x, *rest = (jax.ShapeDtypeStruct(s, dtype) for s in shapes)
    rest = [rest[0], {"text": rest[1]}] if rest else []
    jaxpr = jax.make_jaxpr(getattr(net, function))(params, x, *rest)
    counts.append(sum("remat" in str(e.primitive) for e in jaxpr.eqns))
  assert counts == ([12, 4, 6, 3] if remat else [0, 0, 0, 0])


def test_weights_are_sharded():
  """By the rule of a training state; small arrays stay whole."""
  config = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}
  net = unet2d_condition.from_config(config)
  shapes = jax.eval_shape(net.init, jax.random.key(0))
  placed = sharding.state(shapes, sharding.make_mesh(data=1, fsdp=8))
  pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True)
  held = sum(np.prod(where.shard_shape(x.shape)) for x, where in pairs)
  assert 1 / 8 <= held / 865.911e6 < 0.2


@pytest.mark.slow
def test_stable_diffusion_2_at_its_size():
  """The prediction of 768 x 768, by shapes alone."""
  config = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}
  net = unet2d_condition.from_config(config | {"sample_size": 96}, dtype="bfloat16")
  params = jax.eval_shape(net.init, jax.random.key(0))
  x = jax.ShapeDtypeStruct((2, *net.shape), jnp.float32)
  text = jax.ShapeDtypeStruct((2, 77, 1024), jnp.float32)
  time = jax.ShapeDtypeStruct((2,), jnp.float32)
  out = jax.eval_shape(net.apply, params, x, time, {"text": text})
  assert (out.shape, out.dtype) == ((2, 96, 96, 4), jnp.float32)


TINY = {"block_out_channels": [8, 16], "norm_num_groups": 4}
BOTH = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}


@pytest.mark.parametrize(
  ("module", "config", "message"),
  [
    (
      unet2d,
      TINY | BOTH | {"more": 1, "act_fn": "gelu", "depth": 2, "class_embed_type": "x"},
      "unknown fields: depth, more; values not supported: act_fn='gelu', "
      "class_embed_type='x'",
    ),
    (
      unet2d,
      TINY,
      r"down_block_types=\[.*\]: must be 2 of DownBlock2D, AttnDownBlock2D,",
    ),
    (
      unet2d_condition,
      TINY | BOTH | {"down_block_types": ["AttnDownBlock2D"] * 2},
      "must be 2 of DownBlock2D, CrossAttnDownBlock2D",
    ),
    (unet2d, TINY | BOTH | {"norm_num_groups": 3}, "norm_num_groups=3, and the heads"),
    (
      unet2d_condition,
      TINY | BOTH | {"attention_head_dim": [1, 2, 3]},
      r"attention_head_dim=\[1, 2, 3\]: must have 2 values",
    ),
    (
      unet2d_condition,
      TINY | BOTH | {"cross_attention_dim": [8, 8]},
      r"cross_attention_dim=\[8, 8\]: must be one number",
    ),
    (vae, {"block_out_channels": [8, 8]}, "down_block_types=.* for each of"),
    (vae, {"block_out_channels": [8]}, "norm_num_groups=32: must divide"),
    (
      clip_text,
      {"hidden_act": "relu"},
      "hidden_act='relu': must be one of gelu, quick",
    ),
    (clip_text, {"hidden_size": 513}, "num_attention_heads=8: must divide"),
  ],
)
def test_configs_that_do_not_fit(module, config, message):
  with pytest.raises(ValueError, match=message):
    module.from_config(config)


def test_inputs_that_do_not_fit():
  net, params = load(CHURCH / "unet")
  with pytest.raises(ValueError, match="4 must divide height and width"):
    net.apply(params, jnp.zeros((1, 6, 8, 3)), jnp.zeros(1), None)
  net, params = load(SD2 / "vae")
  with pytest.raises(ValueError, match="2 must divide their sides"):
    net.encode(params, jnp.zeros((1, 5, 8, 3)))
  net, params = load(SD2 / "text_encoder")
  with pytest.raises(ValueError, match="texts of 13 tokens, at most 12 fit"):
    net.apply(params, jnp.zeros((1, 13), jnp.int32))
