"""The transformer `dit`: patches, positions, attention, and decoupled blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import random_params
from small_networks import build, close, gradient, inputs
from trained_maps import rms

from sdiff_jax.diffusion.trigflow import END_TIME
from sdiff_jax.models import dit
from sdiff_jax.types import CondSpec


def test_patches_return_to_their_places():
  """Without attention a pixel reaches its own patch and no other."""
  net = build("dit")
  params = random_params(net, dtype="float32")
  out = params["net"]["blocks"]["attention"]["out"]
  out |= jax.tree.map(jnp.zeros_like, out)
  x, t, cond, _ = inputs("dit")
  jacobian = jax.jacfwd(lambda y: net.apply(params, x.at[0].set(y), t, cond)[0])(x[0])
  reach = np.any(jacobian != 0, axis=(2, 5))  # [H, W, H, W]
  row, col = np.mgrid[:4, :6] // 2
  same = (row[..., None, None] == row) & (col[..., None, None] == col)
  np.testing.assert_array_equal(reach, same)


def test_fused_attention_changes_nothing():
  """Neither F and its tangent, nor the gradient of a loss of both, under remat."""
  x, t, cond, along = inputs("dit")
  params = random_params(build("dit"), dtype="float32")
  plain, fused = (build("dit", attention=name) for name in ("plain", "fused"))
  both = [
    jax.jit(functools.partial(jax.jvp, functools.partial(net.apply, params, cond=cond)))
    for net in (plain, fused)
  ]
  jax.tree.map(close, both[1]((x, t), along), both[0]((x, t), along))
  found = gradient("dit", attention="fused", remat="full")
  jax.tree.map(lambda a, b: close(a, b, 2e-4), found, gradient("dit"))


def test_positions_differ():
  p = dit.positions(5, 7, 16)
  assert (p.shape, p.dtype) == ((35, 16), np.float32)
  gaps = np.linalg.norm(p[:, None] - p[None], axis=-1)
  assert (gaps + np.eye(35)).min() > 0.1
  # The distance of two patches depends on how far apart they are alone.
  grid = p.reshape(5, 7, 16)
  for step in (grid[1:] - grid[:-1], grid[:, 1:] - grid[:, :-1]):
    lengths = np.linalg.norm(step, axis=-1)
    close(lengths, lengths[0, 0])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"shape": (4, 5, 1)}, r"patch=2: must divide .* of \(4, 5, 1\)"),
    ({"shape": (4, 4)}, r"patch=2: must divide height and width"),
    ({"width": 18, "heads": 3}, r"width=18: must be a multiple of 4"),
    ({"width": 16, "heads": 3}, r"width=16: .* heads=3"),
    ({"attention": "flash"}, r"attention='flash': must be one of auto, plain"),
  ],
)
def test_sizes_that_do_not_divide(options, message):
  with pytest.raises(ValueError, match=message):
    dit.build(**{"shape": (4, 4, 1), "cond": {}} | options)


def test_the_last_blocks_of_a_decoupled_transformer_see_the_end_time_alone():
  """Decoupled MeanFlow: a velocity network's weights, and its output at s = t."""
  shape, end_time = (4, 4, 2), {END_TIME: CondSpec((), np.float32)}
  label = {"label": CondSpec((), np.int32, num_classes=3)}
  sizes = {"shape": shape, "width": 16, "depth": 3, "heads": 2}
  plain = dit.build(cond=label, **sizes)
  decoupled = dit.build(cond=label | end_time, decoder_blocks=1, **sizes)
  params = random_params(plain, dtype="float32")
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
    jnp.shape, jax.eval_shape(decoupled.init, jax.random.key(0))
  )
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32)
  t, label = jnp.array([0.4, 1.3]), jnp.array([0, 2])

  @jax.jit
  def both(params, t, s):
    cond = {"label": label}
    timed = decoupled.apply(params, x, t, {**cond, END_TIME: s})
    return timed, plain.apply(params, x, t, cond)

  np.testing.assert_array_equal(*both(params, t, t))
  outputs = [both(params, *times)[0] for times in ((t, t), (t, 0 * t), (0 * t, t))]
  assert min(rms(outputs[0] - other) for other in outputs[1:]) > 1e-3
  # Without the blocks of the encoder nothing sees t.
  blocks = params["net"]["blocks"]
  for name in ("attention", "mlp"):
    out = blocks[name]["out"]
    blocks[name]["out"] = jax.tree.map(lambda p: p.at[:2].set(0), out)
  np.testing.assert_array_equal(both(params, t, t)[0], both(params, 0 * t, t)[0])
  assert rms(both(params, t, t)[0] - both(params, t, 0 * t)[0]) > 1e-3


@pytest.mark.parametrize(
  ("cond", "blocks", "message"),
  [
    (
      {END_TIME: CondSpec((), np.float32)},
      4,
      "decoder_blocks=4: must be at most depth=3",
    ),
    ({}, 1, "decoder_blocks=1: needs the condition 'end_time'"),
  ],
)
def test_decoder_blocks_need_an_end_time(cond, blocks, message):
  with pytest.raises(ValueError, match=message):
    dit.build(shape=(4, 4, 1), cond=cond, depth=3, decoder_blocks=blocks)
