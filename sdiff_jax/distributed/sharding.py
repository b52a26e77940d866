"""The device mesh, and the shardings of arrays on it.

The mesh has three axes: the state is replicated along `data` and sharded along `fsdp`;
parallel samplers shard their window along `window`. The batch of a training step is
sharded along all three.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdiff_jax.types import Array, PyTree

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")
AXES = ("data", "fsdp", "window")
SMALLEST_SHARDED = 2**16  # elements; smaller arrays cost more to gather than to keep
TILE = 16  # rows of a bfloat16 tile in the memory of a TPU


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  window: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Returns the mesh of all devices.

  If the devices are in several slices (of TPUs, or hosts of GPUs) with slow links
  between them, `data` extends over the slices as far as possible, before `fsdp` and
  `window`. `jax.make_mesh` does not place axes over slices, which is why this uses
  `jax.experimental.mesh_utils`.

  Args:
    data: devices along `data`; -1 for all that the other axes leave.
    fsdp: devices along `fsdp`.
    window: devices along `window`.
    devices: the devices; all by default.

  Returns:
    A mesh with axes of the sizes (data, fsdp, window).

  Raises:
    ValueError: the product of the sizes is not the number of devices.

  Example:
    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'window': 1}
  """
  devices = jax.devices() if devices is None else devices
  sizes, count = [data, fsdp, window], len(devices)
  if sizes.count(-1) == 1:
    rest = -np.prod(sizes)
    sizes[sizes.index(-1)] = int(count // rest) if rest > 0 else 0
  if min(sizes) < 1 or np.prod(sizes) != count:
    shape = ", ".join(f"{a}={n}" for a, n in zip(AXES, sizes, strict=True))
    raise ValueError(f"{shape}: the product must be {count}, the number of devices")
  # A mesh axis may cover part of an axis of the torus, such as 64 of 4 x 4 x 8 chips.
  split = {"allow_split_physical_axes": True}
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if slices == 1:
    grid = mesh_utils.create_device_mesh(sizes, devices, **split)
  else:
    outside: list[int] = []
    for size in sizes:
      outside.append(math.gcd(size, slices // math.prod(outside)))
    inside = [n // m for n, m in zip(sizes, outside, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(inside, outside, devices, **split)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def with_mesh(
  mesh: Mesh, function: Callable[Arguments, Value]
) -> Callable[Arguments, Value]:
  """Returns the function, traced with the mesh as the ambient abstract mesh.

  Attention kernels read it to shard themselves, since XLA cannot partition them, and
  `rowwise` does.
  """

  @functools.wraps(function)
  def call(*args: Arguments.args, **options: Arguments.kwargs) -> Value:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **options)

  return call


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that are replicated on all devices."""
  return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a training batch: axis 0 along all mesh axes."""
  return NamedSharding(mesh, P(AXES))


def samples(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of samples: axis 0 along `data` and `fsdp`."""
  return NamedSharding(mesh, P(AXES[:2]))


def window(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of the axes [samples, window] of a parallel sampler."""
  return NamedSharding(mesh, P(AXES[:2], AXES[2]))


def map_one_per_device(
  mesh: Mesh, function: Callable[[Array], Array]
) -> Callable[[Array], Array]:
  """Maps a function over a batch with one sample per device at a time.

  This bounds the memory of functions that need much for each image, such as decoders.

  Args:
    mesh: the batch is sharded along its axes `data` and `fsdp`.
    function: [N, ...] -> [N, ...], sample by sample, with N the number of devices along
      these axes.

  Returns:
    A function [B, ...] -> [B, ...] with B a multiple of N.
  """
  count = mesh.shape["data"] * mesh.shape["fsdp"]
  rounds = NamedSharding(mesh, P(None, AXES[:2]))

  def call(x: jax.Array) -> jax.Array:
    x = x.reshape(count, -1, *x.shape[1:]).swapaxes(0, 1)
    y = jax.lax.map(function, jax.lax.with_sharding_constraint(x, rounds))
    return y.swapaxes(0, 1).reshape(-1, *y.shape[2:])

  return call


def device_put_global(tree: PyTree, shardings: PyTree) -> PyTree:
  """Puts NumPy arrays, which are equal on all processes, on the devices.

  Unlike `jax.device_put` this neither compares the values of the processes nor waits
  for the devices.

  Args:
    tree: pytree of NumPy arrays.
    shardings: pytree of their shardings.
  """
  return jax.tree.map(
    lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__),
    tree,
    shardings,
  )


def state(abstract: PyTree, mesh: Mesh) -> PyTree:
  """Returns the sharding of every array of a training state.

  Arrays of 65,536 elements or more are sharded along `fsdp`, on their largest dimension
  that its size divides; the others are replicated.

  Args:
    abstract: pytree of arrays or ShapeDtypeStructs.
    mesh: the mesh.
  """
  size = mesh.shape["fsdp"]
  return jax.tree.map(lambda x: NamedSharding(mesh, _split(x, size)), abstract)


def abstract_state(abstract: PyTree, mesh: Mesh) -> PyTree:
  """Returns shapes and types of a state with its shardings on the mesh (see `state`)."""

  def with_sharding(x: jax.Array, s: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

  return jax.tree.map(with_sharding, abstract, state(abstract, mesh))


def local() -> NamedSharding:
  """Returns the sharding of axis 0 over the devices of this process alone."""
  devices = np.asarray(jax.local_devices())
  return NamedSharding(
    Mesh(devices, AXES[:1], axis_types=(AxisType.Auto,)), P(AXES[:1])
  )


def _split(x: jax.Array | jax.ShapeDtypeStruct, size: int) -> P:
  """Returns how an array of a state is sharded along `fsdp`, an axis of that size."""
  axes = [i for i, n in enumerate(x.shape) if n % size == 0]
  if size == 1 or x.size < SMALLEST_SHARDED or not axes:
    return P()
  axis = max(axes, key=lambda i: x.shape[i])
  return P(*[None] * axis, "fsdp")


def rowwise(op: Callable[[PyTree, Array], Array], x: PyTree, weight: Array) -> Array:
  """Returns op(x, weight), computed by every device on its own rows of x.

  By itself XLA moves the rows to the shards of a weight. Here the weight is gathered, in
  its own dtype, and its gradient is summed by a reduce-scatter. Outside of `with_mesh`,
  and for a weight that is not sharded, this is `op`.

  This is the one place where a network depends on its caller: it reads the ambient mesh.

  Args:
    op: (x [B, ...], weight) -> [B, ...], row by row.
    x: [B, ...], or several, their rows sharded along all axes of the mesh.
    weight: with the shape that it has in the training state, in any dtype.

  Returns:
    [B, ...].
  """
  mesh = jax.sharding.get_abstract_mesh()
  # Inside of `replicas` the other axes are manual.
  axes = tuple(
    a
    for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if t == AxisType.Auto
  )
  on_mesh = mesh.axis_names == AXES and "fsdp" in axes
  spec = _split(weight, mesh.shape["fsdp"]) if on_mesh else P()
  rows = jax.tree.leaves(x)[0].shape[0]
  if spec == P() or rows % math.prod(mesh.shape[a] for a in axes):
    return op(x, weight)

  axis = len(spec) - 1

  def local(x: PyTree, part: Array) -> Array:
    # In rows of a TPU tile: for other shapes XLA replaces the reduce-scatter by an
    # all-reduce.
    tiles = part.reshape(math.gcd(TILE, part.size), -1)
    parts = jax.lax.all_gather(tiles, "fsdp").reshape(-1, *part.shape)
    return op(x, jnp.moveaxis(parts, 0, axis).reshape(weight.shape))

  over_rows = P(axes)
  return jax.shard_map(
    local,
    axis_names=set(axes),
    in_specs=(over_rows, spec),
    out_specs=over_rows,
    check_vma=False,
  )(x, weight)


def check_batch(
  batch_size: int,
  sharding: NamedSharding,
  grad_accum_steps: int = 1,
  name: str = "batch_size",
) -> None:
  """Checks that a batch divides evenly over the devices.

  Args:
    batch_size: samples of a batch.
    sharding: of axis 0 of the batch.
    grad_accum_steps: parts of the batch, each of which must divide evenly.
    name: of the argument `batch_size`, for the message.

  Raises:
    ValueError: the batch does not divide; the message names the nearest size that does.
  """
  (axes,) = sharding.spec
  axes = (axes,) if isinstance(axes, str) else axes
  devices = int(np.prod([sharding.mesh.shape[a] for a in axes]))
  divisor = devices * grad_accum_steps
  if batch_size % divisor:
    nearest = max(divisor, batch_size // divisor * divisor)
    times = (
      f" times grad_accum_steps={grad_accum_steps}" if grad_accum_steps > 1 else ""
    )
    raise ValueError(
      f"{name}={batch_size}: does not divide over {devices} devices{times}; {nearest} "
      "does"
    )


def check_window(window: int, mesh: Mesh) -> None:
  """Checks that the window of a parallel sampler divides evenly over the mesh.

  Raises:
    ValueError: it does not.
  """
  if window % mesh.shape["window"]:
    raise ValueError(
      f"window={window}: does not divide over the {mesh.shape['window']} devices along "
      "the mesh axis `window`"
    )


def rows(sharding: NamedSharding, count: int) -> np.ndarray:
  """Returns the indices of a batch of `count` on this process's devices, ascending."""
  slices = sharding.addressable_devices_indices_map((count,))
  return np.unique(np.concatenate([np.arange(count)[i] for (i,) in slices.values()]))


def make_global_batch(tree: PyTree, sharding: NamedSharding, count: int) -> PyTree:
  """Puts this process's `rows` of a batch on its devices.

  `jax.make_array_from_process_local_data` takes local data in the order of the shards;
  the rows here are ascending, however the mesh orders its devices.

  Args:
    tree: pytree of NumPy arrays with axis 0 for `rows(sharding, count)`.
    sharding: of axis 0 of the batch.
    count: size of the batch, over all processes.

  Returns:
    The batch, [count, ...]; its other rows are on the devices of other processes.
  """
  local_rows = rows(sharding, count)

  def global_array(x: np.ndarray) -> jax.Array:
    def shard(index: tuple[slice, ...]) -> np.ndarray:
      start, stop, _ = index[0].indices(count)
      return x[np.searchsorted(local_rows, start) : np.searchsorted(local_rows, stop)]

    return jax.make_array_from_callback((count, *x.shape[1:]), sharding, shard)

  return jax.tree.map(global_array, tree)


def process_max(values: np.ndarray, mesh: Mesh) -> np.ndarray:
  """Returns the maximum of values [n] over all processes; waits for all of them."""
  local_values = np.tile(values, (jax.local_device_count(), 1))
  everywhere = make_global_batch(local_values, batch(mesh), mesh.size)
  return np.asarray(
    jax.jit(lambda x: x.max(0), out_shardings=replicated(mesh))(everywhere)
  )


def all_processes(flags: np.ndarray, mesh: Mesh) -> np.ndarray:
  """Returns the flags [n] that are set on all processes; waits for all of them."""
  return ~process_max(~flags, mesh)
