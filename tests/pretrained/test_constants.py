"""Constants of published constructors that tensors do not tell."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES

from sdiff_jax.data import class_cond
from sdiff_jax.diffusion import trigflow
from sdiff_jax.models import edm2
from sdiff_jax.pretrained import edm2 as edm2_weights
from sdiff_jax.pretrained.files import state_dict
from sdiff_jax.types import UserError

with np.load(FIXTURES / "edm2_constants.npz") as arrays:
  PEER = dict(arrays)
CONFIGS = json.loads(str(PEER["configs"]))
FIELDS = {  # of the constructors of EDM2 -> of the network
  "model_channels": "channels",
  "channel_mult": "channel_mult",
  "num_blocks": "blocks",
  "attn_resolutions": "attn_resolutions",
  "channels_per_head": "head_channels",
  "clip_act": "clip",
  "channel_mult_noise": "noise_mult",
  "channel_mult_emb": "emb_mult",
  **{
    name: name
    for name in (
      *("label_balance", "concat_balance", "res_balance", "attn_balance"),
      *("resample_filter", "logvar_channels"),
    )
  },
}


def tensors_of(name: str) -> dict[str, np.ndarray]:
  common = {k[2:]: v for k, v in PEER.items() if k.startswith("w/")}
  prefix = f"{name}/w/"
  own = {k.removeprefix(prefix): v for k, v in PEER.items() if k.startswith(prefix)}
  return common | own


def network_of(config: dict):
  fields = {FIELDS[k]: v for k, v in config.items() if k in FIELDS}
  fields = {k: 0 if v is None else v for k, v in fields.items()}
  return edm2.build(
    shape=(8, 8, 2),
    cond=class_cond(3),
    sigma_d=0.5,
    process="edm",
    embedding="fourier",
    norm="single",
    **fields,
  )


def distance(name: str, config: dict) -> float:
  """Returns how far D is from the peer's run, relative to its largest value."""
  network = network_of(config)
  like = jax.eval_shape(network.init, jax.random.key(0))
  params = edm2_weights.from_state_dict(tensors_of(name), like)
  x = jnp.asarray(np.moveaxis(PEER["x"], 1, -1))
  t = jnp.arctan(jnp.asarray(PEER["sigma"]) / 0.5)
  xt = trigflow.expand(jnp.cos(t), x) * x
  cond = {"label": jnp.asarray(PEER["labels"], jnp.int32)}
  F = jax.jit(network.apply)(params, xt / 0.5, t, cond)
  D = np.moveaxis(np.asarray(trigflow.denoise(xt, F, t, 0.5)), -1, 1)
  wanted = PEER[f"{name}/logvar"]
  np.testing.assert_allclose(-network.logvar(params, t), wanted, rtol=1e-4, atol=1e-5)
  return np.abs(D - PEER[f"{name}/D"]).max() / np.abs(PEER[f"{name}/D"]).max()


QUICK = ("default", "attn_balance", "multipliers", "logvar_channels")


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in CONFIGS],
)
def test_edm2(name):
  """Each constant is a field; with its default the network is another one."""
  assert distance(name, CONFIGS[name]) < 3e-5
  if name not in ("default", "no_clip", "multipliers", "logvar_channels"):
    assert distance(name, CONFIGS["default"]) > 1e-3


def test_constants_out_of_range():
  for fields, message in (
    ({"label_balance": 1.5}, "^label_balance=1.5: must be from 0 to 1"),
    ({"attn_balance": float("nan")}, "^attn_balance=nan: must be"),
    ({"resample_filter": (1, 2, 1)}, "^resample_filter=.*: must have an even length"),
    ({"resample_filter": (1, -1)}, "^resample_filter=.* a sum other than 0"),
  ):
    with pytest.raises(ValueError, match=message):
      network_of(CONFIGS["default"] | fields)


SETTINGS = {
  "sigma_data": 0.5,
  "unet.label_balance": 0.2,
  "unet.concat_balance": 0.5,
  "unet.enc.8x8_block0.res_balance": 0.6,
  "unet.dec.8x8_in0.res_balance": 0.6,
  "unet.dec.8x8_in0.num_heads": 3,
  "unet.dec.8x8_in0.out_channels": 200,
  "unet.dec.8x8_in1.num_heads": 0,
  "unet.dec.8x8_in1.out_channels": 200,
  "unet.enc.4x4_block0.num_heads": 2,
  "unet.enc.4x4_block0.out_channels": 128,
  "unet.enc.8x8_block0.clip_act": None,
  "unet.enc.8x8_block0.resample_filter": [1, 3, 3, 1],
}


def test_what_pickled_networks_tell():
  told = {name: find(SETTINGS) for name, find in edm2_weights.UNTOLD.items()}
  assert told == {
    "label_balance": 0.2,
    "concat_balance": 0.5,
    "res_balance": 0.6,
    "attn_balance": None,
    "resample_filter": (1, 3, 3, 1),
    "clip": 0.0,
    "head_channels": 64,
  }
  assert {find({}) for find in edm2_weights.UNTOLD.values()} == {None}
  with pytest.raises(UserError, match=r"res_balance: modules of the file differ .*0.3"):
    state_dict.setting(SETTINGS | {"x.res_balance": 0.3}, "res_balance")


def test_settings_of_a_pickled_network():
  """Attributes of modules in EDM's format; no other file has any."""
  folder = FIXTURES / "weights"
  tensors, settings = state_dict.read_with_settings(str(folder / "edm.pkl"))
  assert settings["enc.8x8_conv.training"] is False
  assert tensors.keys() == state_dict.read(str(folder / "edm.pkl")).keys()
  assert state_dict.setting(settings, "training") is False
  assert state_dict.read_with_settings(str(folder / "zip.pt"))[1] == {}
