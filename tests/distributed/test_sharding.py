"""Meshes, the rule of sharding, and training on one mesh as on another."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from sdiff_jax.capacity import hlo
from sdiff_jax.data import class_cond
from sdiff_jax.distributed import replicas, sharding
from sdiff_jax.losses import ConsistencyOptions, diffusion, scm
from sdiff_jax.models import edm2, mlp
from sdiff_jax.training import ema, state, step


def test_mesh_takes_what_is_left():
  assert sharding.make_mesh().shape == {"data": 8, "fsdp": 1, "window": 1}
  assert sharding.make_mesh(-1, 4, 1).shape == {"data": 2, "fsdp": 4, "window": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, 16, 1), (-1, -1, 1)])
def test_mesh_that_does_not_fit(sizes):
  with pytest.raises(ValueError, match="the product must be 8, the number of devices"):
    sharding.make_mesh(*sizes)


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh of slices asks of a device."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "stand-in"
  device_kind: str = "stand-in"


@pytest.mark.parametrize(
  ("sizes", "first"),  # and the slices of the devices along each axis
  [
    ((-1, 4, 1), [[0, 0, 1, 1], [0, 0, 0, 0], [0]]),
    ((2, 8, 1), [[0, 1], [0] * 8, [0]]),
    ((4, 2, 2), [[0, 0, 1, 1], [0, 0], [0, 0]]),
    ((1, 16, 1), [[0], [0] * 8 + [1] * 8, [0]]),
  ],
)
def test_data_goes_over_slices_before_fsdp(sizes, first):
  devices = [Device(i, i % 2) for i in range(16)]
  grid = sharding.make_mesh(*sizes, devices=devices).devices
  lines = grid[:, 0, 0], grid[0, :, 0], grid[0, 0, :]
  assert [[d.slice_index for d in line] for line in lines] == first
  assert sorted(d.id for d in grid.ravel()) == [*range(16)]


def test_large_arrays_are_split_along_their_largest_divisible_axis():
  mesh = sharding.make_mesh(2, 4, 1)

  def spec(*shape):
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    return sharding.state(array, mesh).spec

  assert spec(1024, 2048) == P(None, "fsdp")
  assert spec(1023, 2046, 4) == P(None, None, "fsdp")
  assert spec(1023, 2047) == P()
  assert spec(256, 256) == P("fsdp")
  assert spec(256, 252) == P()  # few elements


def test_check_batch_names_a_size_that_fits():
  over = sharding.batch(sharding.make_mesh())
  sharding.check_batch(16, over)
  with pytest.raises(ValueError, match="^batch_size=12: .* 8 devices; 8 does"):
    sharding.check_batch(12, over)
  sharding.check_batch(48, over, 3)
  with pytest.raises(ValueError, match="grad_accum_steps=3; 24 does"):
    sharding.check_batch(40, over, 3)


def _train(mesh, steps=3, accumulate=1, dtype=None):
  """Returns state and losses after a few sCD steps on a mesh."""
  network = mlp.build(shape=(2, 2, 1), cond=class_cond(3), width=16, depth=2, unroll=1)
  loss = scm.build(
    network=replicas.network(network) if dtype else network,
    teacher=network.apply,
    sigma_d=0.5,
    options=ConsistencyOptions(warmup_steps=0),
  )
  rate = optax.constant_schedule(1e-3)
  optimizer, betas = optax.adam(rate), ema.betas(("power/0.1",), 16)
  key = jax.random.key(0)
  current = state.create(network.init(key), optimizer, tuple(betas))
  frozen = network.init(jax.random.key(1))
  function = step.build(
    loss,
    optimizer,
    ema=betas,
    learning_rate=rate,
    grad_accum_steps=accumulate,
    grad_dtype=dtype,
  )
  run = step.jitted(function, mesh, current, frozen)
  x0 = np.random.default_rng(0).standard_normal((16, 2, 2, 1), np.float32) / 2
  batch = {"x0": x0, "cond": {"label": np.arange(16, dtype=np.int32) % 3}}
  batch = sharding.make_global_batch(batch, sharding.batch(mesh), 16)
  current = jax.device_put(current, sharding.state(current, mesh))
  frozen = jax.device_put(frozen, sharding.state(frozen, mesh))
  key = jax.device_put(key, sharding.replicated(mesh))
  losses = []
  for _ in range(steps):
    current, metrics = run(current, batch, key, frozen)
    losses.append(float(metrics["loss"]))
  return jax.device_get(current), losses


@pytest.mark.parametrize(
  ("accumulate", "dtype"),
  [
    pytest.param(1, None, marks=pytest.mark.slow),
    (2, jnp.float32),
    pytest.param(2, None, marks=pytest.mark.slow),
  ],
)
def test_training_is_the_same_on_every_mesh(monkeypatch, accumulate, dtype):
  monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 0)
  one = sharding.make_mesh(devices=jax.devices()[:1])
  first, losses = _train(one, accumulate=accumulate)
  for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2))[2 * accumulate - 2 :]:
    mesh = sharding.make_mesh(*sizes)
    other, other_losses = _train(mesh, accumulate=accumulate, dtype=dtype)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    # Adam turns the rounding of a gradient near 0 into a visible part of a step.
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("preset", ["S", "XXL"])
def test_a_device_holds_its_share_of_the_state(preset):
  """Up to 64 devices; of more, several groups of 64 hold the same."""
  network = edm2.build(
    shape=(64, 64, 4), cond=class_cond(1000), sigma_d=0.5, preset=preset
  )

  def init(key):
    return state.create(network.init(key), optax.adam(1.0), ("power/0.1",))

  abstract = jax.eval_shape(init, jax.random.key(0))
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
  for fsdp in (8, 16, 32, 64):
    mesh = AbstractMesh((4, fsdp, 1), sharding.AXES)
    placed = jax.tree.map(
      lambda x, s: x.dtype.itemsize * np.prod(s.shard_shape(x.shape), dtype=int),
      abstract,
      sharding.state(abstract, mesh),
    )
    share = sum(jax.tree.leaves(placed)) * fsdp / whole
    assert 1 <= share < 1.01


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axis", [0, 1])
def test_a_layer_on_every_device_is_the_layer(monkeypatch, axis):
  """Its value, tangent and gradients, of a weight split along either axis."""
  monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 0)
  rng = np.random.default_rng(0)
  x, dx = jnp.asarray(rng.standard_normal((2, 16, 3, 8 + 16 * (1 - axis))))
  w = jnp.asarray(rng.standard_normal((x.shape[-1], 8 + 16 * axis)))

  def both(x, w):
    def layer(x):
      return jnp.sin(sharding.rowwise(jnp.matmul, x, w))

    def loss(x, w):
      y, dy = jax.jvp(
        lambda x: jnp.sin(sharding.rowwise(jnp.matmul, x, w)), (x,), (dx,)
      )
      return jnp.sum(jnp.square(y + dy))

    return layer(x), jax.grad(loss, (0, 1))(x, w)

  expected = jax.jit(both)(x, w)
  for how in (lambda f: f, jax.checkpoint):
    mesh = sharding.make_mesh(2, 4, 1)
    found = jax.jit(
      sharding.with_mesh(mesh, how(both)),
      in_shardings=(sharding.batch(mesh), sharding.state(w, mesh)),
    )(x, w)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11),
      found,
      expected,
    )


def test_weights_are_gathered_and_gradients_scattered_in_the_networks_type(monkeypatch):
  """A step of a U-Net in bfloat16: and no image leaves its device."""
  monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 256)
  network = edm2.build(
    shape=(4, 4, 4),
    cond={},
    sigma_d=0.5,
    channels=16,
    channel_mult=(1,),
    blocks=1,
    attn_resolutions=(4,),
    head_channels=8,
    dtype="bfloat16",
  )
  loss = diffusion.build(network=network, sigma_d=0.5)
  optimizer, rate = optax.sgd(1e-3), optax.constant_schedule(1e-3)
  current = jax.eval_shape(
    lambda key: state.create(network.init(key), optimizer, ()), jax.random.key(0)
  )
  batch = {"x0": jax.ShapeDtypeStruct((16, 4, 4, 4), jnp.float32), "cond": None}
  function = step.build(
    loss, optimizer, learning_rate=rate, normalize=network.normalize
  )
  run = step.jitted(function, sharding.make_mesh(2, 4, 1), current, None)
  lowered = run.lower(current, batch, jax.eval_shape(lambda: jax.random.key(0)), None)

  split = {"f32": 0, "bf16": 0}  # elements by the type that their layer computes in
  for path, leaf in jax.tree.leaves_with_path(current.params["net"]):
    wide = any(k.key in ("embedding", "modulation") for k in path)
    split["f32" if wide else "bf16"] += leaf.size if leaf.size >= 256 else 0
  assert min(split.values()) > 0

  types = r"\(tensor<([\dx]*)x(b?f\d+)>\) -> tensor<([\dx]*)x"
  whole = {}
  for line in re.sub(r"\(\{.*?\}\)", "", lowered.as_text(), flags=re.S).splitlines():
    kind = re.search(r"stablehlo\.(all_gather|reduce_scatter)", line)
    if kind:
      before, dtype, after = re.search(types, line).groups()
      sizes = [math.prod(map(int, shape.split("x"))) for shape in (before, after)]
      key = kind[1], dtype
      whole[key] = whole.get(key, 0) + max(sizes)
  kinds = ("all_gather", "reduce_scatter")
  assert whole == {(k, dtype): n for k in kinds for dtype, n in split.items()}

  # A CPU widens bfloat16, and adds nothing else but sums over replicas and of norms.
  total = hlo.total(hlo.read(lowered.compile().as_text()))
  assert {kind for kind, _ in total} == {"all-gather", "reduce-scatter", "all-reduce"}
  for kind in ("all-gather", "reduce-scatter"):
    assert sum(v[1] for (k, _), v in total.items() if k == kind) == 4 * sum(
      split.values()
    )
  reduced = sum(v[1] for (k, _), v in total.items() if k == "all-reduce")
  assert reduced < 4 * sum(split.values())


def test_gathered_weights_alone_are_gathered_again(monkeypatch):
  """By remat="weights" no layer is computed twice, by "full" all are."""
  monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 256)
  x = jnp.ones((8, 4, 4, 4))

  def counts(remat):
    network = edm2.build(
      shape=(4, 4, 4),
      cond={},
      sigma_d=0.5,
      channels=16,
      channel_mult=(1,),
      blocks=1,
      attn_resolutions=(),
      remat=remat,
    )
    params = jax.eval_shape(network.init, jax.random.key(0))

    def loss(params):
      return jnp.sum(jnp.square(network.apply(params, x, jnp.ones(8), None)))

    gradient = sharding.with_mesh(sharding.make_mesh(2, 4, 1), jax.grad(loss))
    text = jax.jit(gradient).lower(params).as_text()
    return text.count("stablehlo.all_gather"), text.count("stablehlo.convolution")

  kept, weights, full = map(counts, ("", "weights", "full"))
  assert kept[0] < weights[0] == full[0]
  assert kept[1] == weights[1] < full[1]


def test_the_state_is_donated_and_the_teacher_is_no_constant():
  mesh = sharding.make_mesh()
  network = mlp.build(shape=(8, 8, 1), cond={}, width=256, depth=2)
  loss = scm.build(network=network, teacher=network.apply, sigma_d=0.5)
  rate = optax.constant_schedule(1e-3)
  optimizer, betas = optax.sgd(rate), ema.betas(("power/0.1",), 8)
  params = network.init(jax.random.key(0))
  current = state.create(params, optimizer, tuple(betas))
  function = step.build(loss, optimizer, ema=betas, learning_rate=rate)
  batch = {"x0": jnp.zeros((8, 8, 8, 1)), "cond": None}
  closed = jax.make_jaxpr(function)(current, batch, jax.random.key(0), params)
  assert max((np.size(c) for c in closed.consts), default=0) < 1000
  frozen = jax.tree.map(jnp.copy, params)
  run = step.jitted(function, mesh, current, frozen)
  current = jax.device_put(current, sharding.state(current, mesh))
  frozen = jax.device_put(frozen, sharding.state(frozen, mesh))
  after, _ = run(
    current,
    sharding.make_global_batch(jax.device_get(batch), sharding.batch(mesh), 8),
    jax.device_put(jax.random.key(0), sharding.replicated(mesh)),
    frozen,
  )
  jax.block_until_ready(after)
  assert all(x.is_deleted() for x in jax.tree.leaves(current.params))
  assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "window": 2}])
def test_one_on_each_device_at_a_time(axes):
  """Rows come out as by one call, and the function sees one row a device."""
  mesh, seen = sharding.make_mesh(**axes), []

  def function(x):
    seen.append(len(x))
    return 2 * x.sum(axis=-1) + 1

  x = jnp.arange(24 * 3.0).reshape(24, 3)
  x = jax.device_put(x, sharding.samples(mesh))
  found = jax.jit(sharding.map_one_per_device(mesh, function))(x)
  np.testing.assert_array_equal(found, 2 * x.sum(axis=-1) + 1)
  assert set(seen) == {mesh.shape["data"] * mesh.shape["fsdp"]}


def test_arrays_are_spread_as_they_shall_live():
  mesh = sharding.make_mesh(data=4, fsdp=2)
  where = {"a": sharding.samples(mesh), "b": sharding.replicated(mesh)}
  tree = {"a": np.arange(16), "b": np.float32(3)}
  found = sharding.device_put_global(tree, where)
  jax.tree.map(np.testing.assert_array_equal, found, tree)
  assert {k: x.sharding for k, x in found.items()} == where


def test_rows_over_the_devices_of_a_process():
  local = sharding.local()
  assert local.mesh.size == jax.local_device_count()
  sharding.check_batch(16, local)
  with pytest.raises(ValueError, match="batch_size=9: does not divide"):
    sharding.check_batch(9, local)
