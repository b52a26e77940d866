"""Blocks in a loop over stacked weights are those of a folder, one after another."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES
from jax.sharding import PartitionSpec as P

from sdiff_jax.distributed import sharding
from sdiff_jax.pretrained.diffusers import block_loop, loading
from sdiff_jax.pretrained.diffusers import model as model_lib

# Compiled once for one call: the time is the compiler's.
quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
# Folder, part, changed fields of its config, and the stacks of its blocks.
PARTS = {
  "flux": (
    ("tiny-flux", "transformer", {"num_layers": 3, "num_single_layers": 2}),
    ["single_transformer_blocks.0-1", "transformer_blocks.0-2"],
  ),
  # Dual attention in the first blocks, and no text in the last.
  "sd3": (
    ("tiny-sd3", "transformer", {"num_layers": 4, "dual_attention_layers": [0]}),
    ["transformer_blocks.1-2"],
  ),
  "pixart": (("tiny-pixart", "transformer", {}), ["transformer_blocks.0-1"]),
  "sana": (("tiny-sana", "transformer", {}), ["transformer_blocks.0-1"]),
  "dit": (("tiny-dit", "transformer", {"num_layers": 3}), ["transformer_blocks.0-2"]),
  "t5": (("tiny-flux", "text_encoder_2", {}), ["encoder.block.0-1"]),
  "clip": (("tiny-sd2", "text_encoder", {}), ["encoder.layers.0-2"]),
  "gemma": (("tiny-sana", "text_encoder", {}), ["layers.0-1"]),
}


def build(folder: str, part: str, changes: dict, dtype: str = "float32", **options):
  config = json.loads((FIXTURES / folder / part / "config.json").read_text()) | changes
  return loading._network_from_config(
    config, part, dtype=dtype, remat=options.get("remat", "")
  )


def random_params(network, dtype: str = "float32"):
  """Returns weights of which none is zero."""
  like = jax.eval_shape(network.init, jax.random.key(0))
  draw = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(0.2 * draw.standard_normal(x.shape), dtype), like
  )


def abstract_stacks(network):
  return block_loop.stacked(
    jax.eval_shape(network.init, jax.random.key(0)), network.lists
  )


def inputs(network, dtype: str = "float32") -> tuple:
  """Returns arguments of `apply` after the parameters."""
  draw = np.random.default_rng(1)
  normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), dtype)  # noqa: E731
  if not hasattr(network, "shape"):
    return (jnp.asarray(draw.integers(0, network.vocabulary, (2, 5)), jnp.int32),)
  cond = {"text": normal(2, 5, network.text or 1), "mask": jnp.ones((2, 5), bool)}
  cond |= {"pooled": normal(2, network.pooled or 1), "label": jnp.array([1, 0])}
  cond |= {"distilled_guidance": jnp.full(2, 3.0, dtype), "time_ids": normal(2, 6)}
  side = 2 * network.patch
  return normal(2, side, side, network.shape[-1]), jnp.full(2, 500.0, dtype), cond


def stacks(params) -> list[str]:
  return sorted(key for key in params if block_loop.STACK.fullmatch(key))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name == "t5" else pytest.mark.slow) for name in PARTS
  ],
)
def test_a_loop_is_the_same_function(name):
  """Value, tangent in the weights and gradient, in float64; the names come back."""
  part, wanted = PARTS[name]
  with jax.numpy_dtype_promotion("standard"):  # init under x64 mixes types
    network = build(*part, dtype="float64")
    params = random_params(network, "float64")
    loop = block_loop.stacked(params, network.lists)
    assert stacks(loop) == wanted
    args = inputs(network, "float64")

    @quickly
    def run(p):
      def square(p):
        out = jax.tree.leaves(network.apply(p, *args))
        return sum(jnp.mean(x**2) for x in out), out

      outs = jax.jvp(lambda p: square(p)[1], (p,), (p,))
      return outs, jax.grad(lambda p: square(p)[0])(p)

    (out, gradient), (of_loop, back) = run(params), run(loop)
    back = block_loop.unstacked(back)
  for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(of_loop), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-10)
  assert jax.tree.structure(back) == jax.tree.structure(gradient)
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(back), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-11 * largest)


def program(network) -> str:
  """Returns the program of a network with stacks."""
  return str(jax.make_jaxpr(network.apply)(abstract_stacks(network), *inputs(network)))


def test_a_program_does_not_grow_with_the_depth():
  """Its blocks are recomputed where that is asked."""
  lengths = []
  for depth in (2, 3):
    changes = {"num_layers": depth, "num_single_layers": depth}
    network = build("tiny-flux", "transformer", changes, remat="full")
    lengths.append(program(network).count("\n"))
  assert lengths[0] == lengths[1]
  assert program(network).count("remat") >= 2


def test_sdxl_loops_over_the_blocks_of_each_level():
  """Those of a U-Net are deeper in the tree."""
  network = build("tiny-sdxl", "unet", {"transformer_layers_per_block": [1, 3]})
  loop = abstract_stacks(network)
  inside = {k: stacks(v) for k, v in loop.items() if ".attentions." in k}
  assert sorted({*map(tuple, inside.values())}) == [("transformer_blocks.0-2",)]
  assert program(network).count("scan") == sum(map(bool, inside.values()))


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "sana", "dit"])
def test_narrow_types_stay(name):
  """What a block of bfloat16 returns is what the next one takes."""
  part, wanted = PARTS[name]
  network = build(*part, dtype="bfloat16")
  loop = abstract_stacks(network)
  assert stacks(loop) == wanted
  shapes = jax.eval_shape(network.apply, loop, *inputs(network))
  assert shapes.dtype == jnp.float32


def test_a_stack_has_the_sharding_of_its_weights():
  mesh = sharding.make_mesh(data=1, fsdp=8)
  blocks = {f"blocks.{i}": {"kernel": jnp.full((256, 512), i)} for i in range(3)}
  placed = jax.device_put(blocks, sharding.state(blocks, mesh))
  kernel = block_loop.stacked(placed, ("blocks",))["blocks.0-2"]["kernel"]
  assert kernel.sharding.spec == P(None, None, "fsdp")
  np.testing.assert_array_equal(kernel[:, 0, 0], [0, 1, 2])
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed
  )
  shape = block_loop.stacked(shapes, ("blocks",))["blocks.0-2"]["kernel"]
  assert (shape.shape, shape.sharding) == (kernel.shape, kernel.sharding)


def test_a_model_is_stacked_as_a_whole():
  """The network and its text encoders, without the decoder; nothing is lost."""
  model = loading.abstract(loading.configs(str(FIXTURES / "tiny-flux")))
  loop = model_lib.stacked(model, model.params)
  assert stacks(loop["text_encoder_2"]) == ["encoder.block.0-1"]
  assert jax.tree.structure(loop["vae"]) == jax.tree.structure(model.params["vae"])
  counts = [
    sum(math.prod(x.shape) for x in jax.tree.leaves(p)) for p in (loop, model.params)
  ]
  assert counts[0] == counts[1]
