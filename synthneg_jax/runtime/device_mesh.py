"""The device mesh, and the table that maps array dimensions to mesh axes."""

import functools
import math
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from synthneg_jax.runtime import distributed
from synthneg_jax.runtime.errors import UserError

# A slice is a set of chips with fast links. Slices are connected by the data-centre network, which
# only carries gradients.
AXES = ("slice", "data", "fsdp", "tensor")

# Logical axis of a parameter, batch row or engine lane -> mesh axis or axes.
RULES = {
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  "norm": None,
  "rows": ("slice", "data", "fsdp"),
}


MEMORY_FRACTION = 0.8  # fraction of a device's memory that work is fitted to


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, slices: int = 1, devices=None
) -> Mesh:
  """A mesh over all devices; one size other than `slices` may be -1, and takes the rest.

  Raises:
    UserError: the product of the sizes is not the number of devices, or the devices are not in
      `slices` slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [slices, data, fsdp, tensor]
  if sizes[1:].count(-1) == 1:
    known = math.prod(size for size in sizes if size != -1)
    sizes[sizes.index(-1)] = len(devices) // known if known > 0 and len(devices) % known == 0 else 0
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    across = "" if slices == 1 else f"mesh.slices={slices}, "
    raise UserError(
      f"{across}mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} do not fit {len(devices)} "
      "device(s)."
    )
  return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(sizes: Sequence[int], devices) -> np.ndarray:
  """Devices as an array of these sizes; on TPU, mesh neighbours are torus neighbours."""
  if devices[0].platform != "tpu":
    return np.asarray(devices).reshape(sizes)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices != sizes[0]:
    raise UserError(
      f"mesh.slices={sizes[0]}, but the {len(devices)} devices are in {slices} slice(s)."
    )
  if slices > 1:
    return mesh_utils.create_hybrid_device_mesh(
      (1, *sizes[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
  return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def spec(*logical_axes: str | None) -> PartitionSpec:
  """The partition of an array whose dimensions have these logical names (None: not split)."""
  return PartitionSpec(*(RULES[name] if name else None for name in logical_axes))


def _mesh_axes(logical: str | None) -> tuple[str, ...]:
  axes = RULES[logical] if logical else None
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


def check(name: str, shape: Sequence[int], logical_axes: Sequence[str | None], mesh: Mesh) -> None:
  """Checks that `RULES` can split an array over the mesh.

  Raises:
    UserError: two dimensions map to one mesh axis, or a size is not a multiple of its mesh axes.
  """
  taken = {}
  for dimension, (size, logical) in enumerate(zip(shape, logical_axes, strict=True)):
    axes = _mesh_axes(logical)
    for axis in axes:
      if axis in taken:
        first = taken[axis]
        raise UserError(
          f"{name}: dimensions {first} ({logical_axes[first]}={shape[first]}) and {dimension} "
          f"({logical}={size}) are both split over the mesh axis {axis}."
        )
      taken[axis] = dimension
    parts = {axis: mesh.shape[axis] for axis in axes if mesh.shape[axis] > 1}
    total = math.prod(parts.values())
    if size % total:
      by = " x ".join(f"{axis}={parts[axis]}" for axis in parts) + (
        f" = {total}" if len(parts) > 1 else ""
      )
      raise UserError(f"{name}: dimension {logical}={size} does not divide by {by}.")


def check_tree(arrays, logical_axes, mesh: Mesh, prefix: str = "") -> None:
  """Applies `check` to every array in a tree; its path is its name.

  Args:
    arrays: a tree of arrays, possibly abstract.
    logical_axes: the same tree with a tuple of logical names for each array.
    mesh: over which the arrays are split.
    prefix: of the names in messages.
  """
  names = jax.tree.leaves(logical_axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
  for (path, leaf), axes in zip(jax.tree_util.tree_leaves_with_path(arrays), names, strict=True):
    check(prefix + jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape, axes, mesh)


def shardings(mesh: Mesh, logical_axes):
  """Converts a tree of tuples of logical names to a tree of NamedShardings."""
  return jax.tree.map(
    lambda names: NamedSharding(mesh, spec(*names)),
    logical_axes,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )


def rows(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays whose first dimension is batch rows or engine lanes."""
  return NamedSharding(mesh, spec("rows"))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays that every device holds in full."""
  return NamedSharding(mesh, PartitionSpec())


def decoding(mesh: Mesh) -> Mesh:
  """The same devices with fsdp merged into data, so that parameters are split over tensor only.

  Every token reads all parameters; if they were split over fsdp, they would be gathered for every
  token. Rows stay on the same devices.
  """
  sizes = dict(mesh.shape)
  sizes["data"], sizes["fsdp"] = sizes["data"] * sizes["fsdp"], 1
  return Mesh(
    mesh.devices.reshape(tuple(sizes.values())), mesh.axis_names, axis_types=mesh.axis_types
  )


def place(tree, shardings):
  """Places arrays that every process holds in full; each process sends its devices their parts.

  Args:
    tree: of arrays.
    shardings: a tree of shardings, or a prefix of `tree`.
  """

  def put(sharding, value):
    if sharding.is_fully_addressable or isinstance(value, jax.Array):
      return jax.device_put(value, sharding)
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)

  return jax.tree.map(
    lambda sharding, part: jax.tree.map(functools.partial(put, sharding), part), shardings, tree
  )


def from_first(
  shape: Sequence[int],
  dtype,
  sharding: NamedSharding,
  read: Callable[[slice], np.ndarray],
  *,
  rows: int,
) -> jax.Array:
  """Places an array that only process 0 can read; every process must call this function.

  The array is sent part by part: each part is summed, as integers, over all devices, of which one
  has the data and the others zeros. So each device holds one whole part at a time.

  Args:
    shape, dtype, sharding: of the array.
    read: maps a slice of the first dimension to that part; called in process 0, in order.
    rows: size of a part along the first dimension, which must be a multiple of it.
  """
  mesh, size = sharding.mesh, np.dtype(dtype).itemsize
  bits, part_shape = np.dtype(f"uint{8 * size}"), (rows, *shape[1:])
  sender = next(
    number for number, device in enumerate(mesh.devices.flat) if device.process_index == 0
  )
  on_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

  @functools.partial(jax.jit, out_shardings=sharding, donate_argnums=0)
  def put(array, part, start):
    part = jax.lax.bitcast_convert_type(part.sum(0, dtype=bits), dtype)
    return jax.lax.dynamic_update_slice_in_dim(array, part, start, 0)

  array = jax.jit(lambda: jax.numpy.zeros(shape, dtype), out_shardings=sharding)()
  for start in range(0, shape[0], rows):
    value = read(slice(start, start + rows)).view(bits) if distributed.is_primary() else None
    distributed.barrier()  # waits for process 0's read; collectives have time limits

    def part(index, value=value):
      return (
        value[None]
        if index[0].start in (sender, None) and value is not None
        else np.zeros((1, *part_shape), bits)
      )

    parts = jax.make_array_from_callback((mesh.size, *part_shape), on_each, part)
    array = put(array, parts, np.int32(start))
  return array


def connect(mesh: Mesh) -> None:
  """Runs one collective over all devices and along each axis; every process must call it.

  The first collective opens connections. For CPU processes gloo allows 30 s for this, which is less
  than the difference that processes may have in compiling their first programs. An unreachable
  machine fails here, at once.
  """
  for axes in (mesh.axis_names, *((axis,) for axis in mesh.axis_names if mesh.shape[axis] > 1)):
    ones = np.ones(math.prod(mesh.shape[axis] for axis in axes), np.float32)
    split = place(ones, NamedSharding(mesh, PartitionSpec(axes)))
    jax.block_until_ready(jax.jit(jax.numpy.sum, out_shardings=replicated(mesh))(split))


def whole(x: jax.Array) -> np.ndarray:
  """Gathers an array to the host, wherever its parts are; every process must call it."""
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x))


def row_shards(mesh: Mesh | AbstractMesh) -> int:
  """The number of parts into which rows are split."""
  return math.prod(mesh.shape[axis] for axis in _mesh_axes("rows"))


def parts(logical: str) -> int:
  """The number of parts into which the mesh of `under` splits this dimension; 1 without a mesh."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape.get(axis, 1) for axis in _mesh_axes(logical))


def under(mesh: Mesh, fn: Callable) -> Callable:
  """Returns fn, traced with the mesh known to functions such as `split_rows`."""

  @functools.wraps(fn)
  def traced(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args)

  return traced


def memory() -> float:
  """Bytes available on each local device; on CPU, devices share half the host's memory."""
  device = jax.local_devices()[0]
  if limit := (device.memory_stats() or {}).get("bytes_limit"):
    return MEMORY_FRACTION * limit
  return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()


def runs_on(maker: str) -> bool:
  """Whether the program being traced targets devices of this maker, "TPU" or "NVIDIA".

  The devices are those of the mesh of `under`; without a mesh, the default device.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  return device.device_kind.startswith(maker)


def on_each_device(
  fn: Callable, logical_axes: Sequence[tuple[str | None, ...]], out_axes: tuple[str | None, ...]
) -> Callable:
  """Makes every device run fn on its own parts of the arguments; outside `under`, returns fn.

  Args:
    fn: a function of arrays that needs no data from other devices.
    logical_axes: of each argument.
    out_axes: of the result.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return fn
  return jax.shard_map(
    fn,
    in_specs=tuple(spec(*axes) for axes in logical_axes),
    out_specs=spec(*out_axes),
    check_vma=False,
  )


def split_as(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
  """Constrains the sharding of an array and its gradient to these logical axes.

  A parameter is then gathered where it is used, and its gradient is reduce-scattered to the
  parameter's sharding. Outside `under` this does nothing.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def split_rows(x: jax.Array) -> jax.Array:
  """Constrains the first dimension (rows, lanes, or their tokens) to be split as rows are.

  Otherwise the compiler may keep the parameters split and gather the activations of all rows on
  every device. Outside `under` this does nothing.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(RULES["rows"], *others))
