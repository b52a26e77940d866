"""TrigFlow in EDM2's layout: names and halves of the modulation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.models import edm2 as model
from sdiff_jax.models.layers import edm2_blocks
from sdiff_jax.pretrained import edm2
from sdiff_jax.types import CondSpec, UserError

SIZES = {"channels": 8, "channel_mult": (1, 2), "blocks": 1, "head_channels": 8}
SIZES |= {"attn_resolutions": ()}  # and so only the innermost block attends
COND = {"label": CondSpec((), np.int32, 3)}


@pytest.fixture(scope="module")
def like():
  net = model.build(shape=(8, 8, 3), cond=COND, sigma_d=0.5, **SIZES)
  return jax.eval_shape(net.init, jax.random.key(0))


@pytest.fixture(scope="module")
def tensors(like) -> dict[str, np.ndarray]:
  """Returns random weights under the names of that project, without our reader."""
  rng = np.random.default_rng(0)

  def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)

  found = {"unet.out_gain": normal(), "unet.out_conv.weight": normal(3, 8, 3, 3)}
  found |= {"unet.emb_noise.weight": normal(16, 8)}
  found |= {
    "unet.emb_label.weight": normal(16, 3),
    "logvar_linear.weight": normal(1, 128),
  }
  found |= {"unet.emb_pos.freqs": normal(4), "logvar_pos.freqs": normal(64)}
  found["unet.enc.8x8_conv.weight"] = normal(8, 4, 3, 3)
  blocks = {  # name -> channels in and out; those of 4 x 4 in0 attend
    **{"enc.8x8_block0": (8, 8), "enc.4x4_down": (8, 8), "enc.4x4_block0": (8, 16)},
    **{"dec.4x4_in0": (16, 16), "dec.4x4_in1": (16, 16), "dec.4x4_block0": (32, 16)},
    **{"dec.4x4_block1": (24, 16), "dec.8x8_up": (16, 16), "dec.8x8_block0": (24, 8)},
    "dec.8x8_block1": (16, 8),
  }
  for name, (before, after) in blocks.items():
    first = after if name.startswith("enc") else before
    parts = {
      "conv_res0": normal(after, first, 3, 3),
      "emb_linear": normal(2 * after, 16),
    }
    parts |= {"conv_res1": normal(after, after, 3, 3)}
    if before != after:
      parts["conv_skip"] = normal(after, before, 1, 1)
    if name == "dec.4x4_in0":
      parts["attn_qkv"] = normal(3 * after, after, 1, 1)
      parts["attn_proj"] = normal(after, after, 1, 1)
    found |= {f"unet.{name}.{k}.weight": v for k, v in parts.items()}
  return found


def test_modulation(like, tensors):
  """The first half of emb_linear is the scale, the second the shift, as their code has it."""
  params = edm2.from_state_dict(tensors, like)
  assert not any(np.any(x) for x in jax.tree.leaves(params["logvar"]))
  part = params["net"]["enc_1_block0"]["modulation"]
  rng = np.random.default_rng(1)
  y, emb = rng.standard_normal((2, 4, 4, 16)), rng.standard_normal((2, 16))
  y, emb = (v.astype(np.float32) for v in (y, emb))

  def modulated(module: edm2_blocks.Modulation) -> jax.Array:
    return module(jnp.asarray(y), *edm2_blocks.vectors([module], jnp.asarray(emb)))

  module = edm2_blocks.Modulation(features=16, norm="double")
  found = nn.apply(modulated, module)({"params": part})

  def unit(x: np.ndarray) -> np.ndarray:
    return x / (1e-4 + np.sqrt(np.mean(x**2, -1, keepdims=True)))

  w = tensors["unet.enc.4x4_block0.emb_linear.weight"]
  scale, shift = np.split(emb @ unit(w).T / w.shape[1] ** 0.5, 2, axis=1)
  wanted = unit(y) * unit(scale)[:, None, None] + unit(shift)[:, None, None]
  np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_segments_are_refused(like, tensors):
  """Multistep students have one more layer."""
  more = tensors | {"unet.emb_t_k.weight": np.zeros((16, 8), np.float32)}
  with pytest.raises(UserError, match="left over: unet.emb_t_k.weight"):
    edm2.from_state_dict(more, like)
