"""The device mesh, and where arrays live on it.

Axes: `data` holds replicas of the state, `fsdp` shards it, `window` is the parallel
sampler's. The batch of a training step is spread over all three.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdiff_jax.types import Array, UserError

AXES = ("data", "fsdp", "window")
SMALLEST_SHARDED = 2**16  # elements; smaller arrays cost more to gather than to keep
TILE = 16  # rows of a tile of bfloat16 in a TPU's memory


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  window: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Returns the mesh of all devices.

  Where devices are in several slices (of TPUs, or hosts of GPUs), whose links to each
  other are slow, `data` goes over the slices as far as it can, before `fsdp` and
  `window`.

  Args:
    data: devices along `data`; -1 takes what the others leave.
    fsdp: devices along `fsdp`.
    window: devices along `window`.
    devices: the devices; by default all that there are.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes, count = [data, fsdp, window], len(devices)
  if sizes.count(-1) == 1:
    rest = -np.prod(sizes)
    sizes[sizes.index(-1)] = int(count // rest) if rest > 0 else 0
  if min(sizes) < 1 or np.prod(sizes) != count:
    wanted = " x ".join(f"{a}={n}" for a, n in zip(AXES, sizes, strict=True))
    raise UserError(f"config.mesh: {wanted} does not make the {count} devices here")
  # An axis may go along a part of one of the torus: 64 of 4 x 4 x 8, say.
  split = {"allow_split_physical_axes": True}
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if slices == 1:
    grid = mesh_utils.create_device_mesh(sizes, devices, **split)
  else:
    outside = []
    for size in sizes:
      outside.append(math.gcd(size, slices // math.prod(outside)))
    inside = [n // m for n, m in zip(sizes, outside, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(inside, outside, devices, **split)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def with_mesh(mesh: Mesh, function: Callable) -> Callable:
  """Returns the function, traced with the mesh in the context.

  Kernels read it there: XLA cannot partition them, they have to spread themselves.
  """

  @functools.wraps(function)
  def call(*args: Any, **options: Any) -> Any:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **options)

  return call


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a training batch: its leading axis over all axes."""
  return NamedSharding(mesh, P(AXES))


def samples(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of samples: over `data` and `fsdp`."""
  return NamedSharding(mesh, P(AXES[:2]))


def window(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of axes [samples, rows of a parallel sampler's window]."""
  return NamedSharding(mesh, P(AXES[:2], AXES[2]))


def map_one_per_device(mesh: Mesh, function: Callable) -> Callable:
  """Returns a function of a batch of samples, called for one on each device at a time.

  What takes much memory for an image, such as a decoder, takes it for one.

  Args:
    mesh: over whose axes `data` and `fsdp` the batch is spread.
    function: [N, ...] -> [N, ...], row by row; its N is the number of their devices.
  """
  count = mesh.shape["data"] * mesh.shape["fsdp"]
  turns = NamedSharding(mesh, P(None, AXES[:2]))

  def call(x: jax.Array) -> jax.Array:
    x = x.reshape(count, -1, *x.shape[1:]).swapaxes(0, 1)
    y = jax.lax.map(function, jax.lax.with_sharding_constraint(x, turns))
    return y.swapaxes(0, 1).reshape(-1, *y.shape[2:])

  return call


def device_put_global(tree: Any, shardings: Any) -> Any:
  """Moves arrays of numpy, the same on every process, to where they shall live.

  Unlike device_put it does not compare the processes' values, nor wait for devices.
  """
  return jax.tree.map(
    lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__),
    tree,
    shardings,
  )


def state(abstract: Any, mesh: Mesh) -> Any:
  """Returns the sharding of every array of a state.

  Arrays of 65,536 elements or more are split over `fsdp` along their largest dimension
  that it divides; the others are replicated.

  Args:
    abstract: pytree of arrays or ShapeDtypeStructs.
    mesh: the mesh.
  """
  size = mesh.shape["fsdp"]
  return jax.tree.map(lambda x: NamedSharding(mesh, _split(x, size)), abstract)


def local() -> NamedSharding:
  """Returns the sharding of rows over the devices of this process alone."""
  devices = np.asarray(jax.local_devices())
  return NamedSharding(
    Mesh(devices, AXES[:1], axis_types=(AxisType.Auto,)), P(AXES[:1])
  )


def _split(x: Any, size: int) -> P:
  """Returns how an array of a state is split over `fsdp`, an axis of that size."""
  axes = [i for i, n in enumerate(x.shape) if n % size == 0]
  if size == 1 or x.size < SMALLEST_SHARDED or not axes:
    return P()
  axis = max(axes, key=lambda i: x.shape[i])
  return P(*[None] * axis, "fsdp")


def rowwise(op: Callable[[Array, Array], Array], x: Array, weight: Array) -> Array:
  """Returns op(x, weight), every device working on its own rows of x.

  Left to itself, XLA moves the rows to where the parts of a weight are. Here the weight
  is gathered, in the type that it has, and its gradient summed by a reduce-scatter.
  Outside `with_mesh`, and for a weight that is not split, this is `op`.

  Args:
    op: maps each row of x by itself.
    x: [B, ...], B rows over all axes of the mesh.
    weight: as a state has it, up to its type.
  """
  mesh = jax.sharding.get_abstract_mesh()
  auto = mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}
  spec = _split(weight, mesh.shape["fsdp"]) if auto else P()
  if spec == P() or x.shape[0] % mesh.size:
    return op(x, weight)

  axis = len(spec) - 1

  def local(x: Array, part: Array) -> Array:
    # In rows of a TPU's tile: other reduce-scatters it makes sums of everything.
    tiles = part.reshape(math.gcd(TILE, part.size), -1)
    parts = jax.lax.all_gather(tiles, "fsdp").reshape(-1, *part.shape)
    return op(x, jnp.moveaxis(parts, 0, axis).reshape(weight.shape))

  over_rows = P(AXES)
  return jax.shard_map(
    local, in_specs=(over_rows, spec), out_specs=over_rows, check_vma=False
  )(x, weight)


def check_batch(
  count: int, sharding: NamedSharding, field: str, accumulate: int = 1
) -> None:
  """Raises a UserError if a leading axis of `count` does not divide as wanted.

  Args:
    count: rows of a batch.
    sharding: of the batch.
    field: of the config, that gives the count.
    accumulate: parts of the batch, each of which must divide (train.grad_accum_steps).
  """
  (axes,) = sharding.spec
  axes = (axes,) if isinstance(axes, str) else axes
  devices = int(np.prod([sharding.mesh.shape[a] for a in axes]))
  parts = devices * accumulate
  if count % parts:
    near = max(parts, count // parts * parts)
    times = (
      f" times config.train.grad_accum_steps={accumulate}" if accumulate > 1 else ""
    )
    raise UserError(
      f"config.{field}={count}: does not divide over {devices} devices{times}; {near} "
      "does"
    )


def check_window(window: int, mesh: Mesh) -> None:
  """Raises a UserError if a parallel sampler's window does not divide over the mesh."""
  if window % mesh.shape["window"]:
    raise UserError(
      f"config.sampler.window={window}: does not divide over "
      f"mesh.window={mesh.shape['window']}"
    )


def rows(sharding: NamedSharding, count: int) -> np.ndarray:
  """Returns which rows of a batch of `count` this process's devices hold, ascending."""
  held = sharding.addressable_devices_indices_map((count,))
  return np.unique(np.concatenate([np.arange(count)[i] for (i,) in held.values()]))


def make_global_batch(tree: Any, sharding: NamedSharding, count: int) -> Any:
  """Moves this process's `rows` of a batch to its devices.

  Args:
    tree: arrays of numpy, whose leading axis is `rows(sharding, count)`.
    sharding: of the batch.
    count: rows of the batch, over all processes.

  Returns:
    The batch, [count, ...], whose other rows are on other processes' devices.
  """
  mine = rows(sharding, count)

  def spread(x: np.ndarray) -> jax.Array:
    def shard(index: tuple[slice, ...]) -> np.ndarray:
      start, stop, _ = index[0].indices(count)
      return x[np.searchsorted(mine, start) : np.searchsorted(mine, stop)]

    return jax.make_array_from_callback((count, *x.shape[1:]), sharding, shard)

  return jax.tree.map(spread, tree)


def process_max(values: np.ndarray, mesh: Mesh) -> np.ndarray:
  """Returns the largest of the processes' values [n], each; waits for all of them."""
  mine = np.tile(values, (jax.local_device_count(), 1))
  every = make_global_batch(mine, batch(mesh), mesh.size)
  return np.asarray(jax.jit(lambda x: x.max(0), out_shardings=replicated(mesh))(every))


def all_processes(flags: np.ndarray, mesh: Mesh) -> np.ndarray:
  """Returns which of the flags [n] every process has set; waits for all processes."""
  return ~process_max(~flags, mesh)
