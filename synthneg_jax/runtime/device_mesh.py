"""The device mesh, and the one table that says which array dimension lies on which of its axes."""

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

# A slice is a set of chips with fast links; slices are joined by the data-centre network, over
# which only gradients go.
AXES = ("slice", "data", "fsdp", "tensor")

# Logical axis of a parameter, a row of a batch or a lane of the engine -> mesh axis or axes.
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


SPENT = 0.8  # share of a device's memory that work is fitted to


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, slices: int = 1, devices=None
) -> Mesh:
  """A mesh over all devices; one of the sizes but `slices` may be -1 and takes what is left.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or the devices are not in that
      many slices.
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
  """Devices as an array of these sizes; on TPU, mesh neighbours are neighbours in the torus."""
  if devices[0].platform != "tpu":
    return np.asarray(devices).reshape(sizes)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices != sizes[0]:
    raise UserError(
      f"mesh.slices={sizes[0]}, but the {len(devices)} devices lie in {slices} slice(s)."
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
  """Refuses an array that the mesh cannot hold by the rules.

  Raises:
    UserError: two dimensions lie on one mesh axis, or a dimension does not divide by its mesh axes.
  """
  taken = {}
  for place, (size, logical) in enumerate(zip(shape, logical_axes, strict=True)):
    axes = _mesh_axes(logical)
    for axis in axes:
      if axis in taken:
        first = taken[axis]
        raise UserError(
          f"{name}: dimensions {first} ({logical_axes[first]}={shape[first]}) and {place} "
          f"({logical}={size}) both lie on the mesh axis {axis}."
        )
      taken[axis] = place
    parts = {axis: mesh.shape[axis] for axis in axes if mesh.shape[axis] > 1}
    total = math.prod(parts.values())
    if size % total:
      by = " x ".join(f"{axis}={parts[axis]}" for axis in parts) + (
        f" = {total}" if len(parts) > 1 else ""
      )
      raise UserError(f"{name}: dimension {logical}={size} does not divide by {by}.")


def check_tree(arrays, logical_axes, mesh: Mesh, prefix: str = "") -> None:
  """`check` of every array in a tree; its path is its name.

  Args:
    arrays: anything with shapes; abstract arrays will do.
    logical_axes: the same tree with a tuple of logical names for each array.
    mesh: where they are to go.
    prefix: stands before the names.
  """
  names = jax.tree.leaves(logical_axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
  for (path, leaf), axes in zip(jax.tree_util.tree_leaves_with_path(arrays), names, strict=True):
    check(prefix + jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape, axes, mesh)


def shardings(mesh: Mesh, logical_axes):
  """A tree of tuples of logical names becomes a tree of NamedShardings."""
  return jax.tree.map(
    lambda names: NamedSharding(mesh, spec(*names)),
    logical_axes,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )


def rows(mesh: Mesh) -> NamedSharding:
  """The sharding of anything whose first dimension is rows of a batch or lanes of the engine."""
  return NamedSharding(mesh, spec("rows"))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of anything that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def decoding(mesh: Mesh) -> Mesh:
  """The same devices, with fsdp counted to data: parameters are split over tensor only.

  Every token reads all parameters, so that to split them over fsdp would be to gather them for
  every token. Rows are split as before, each on the same device.
  """
  sizes = dict(mesh.shape)
  sizes["data"], sizes["fsdp"] = sizes["data"] * sizes["fsdp"], 1
  return Mesh(
    mesh.devices.reshape(tuple(sizes.values())), mesh.axis_names, axis_types=mesh.axis_types
  )


def place(tree, shardings):
  """Arrays that every process has whole, laid out; each process sends its devices their own part.

  Args:
    tree: of arrays.
    shardings: a tree of shardings, or a prefix of one.
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
  """An array that process 0 alone can read, laid out like any other; every process calls it.

  Each part passes through every device whole: as bits, which all but one device have as zeros, and
  which are summed.

  Args:
    shape, dtype, sharding: of the array.
    read: a slice of the first dimension -> that part; called in process 0, in order.
    rows: of the first dimension, which it divides, in a part.
  """
  mesh, size = sharding.mesh, np.dtype(dtype).itemsize
  bits, part_shape = np.dtype(f"uint{8 * size}"), (rows, *shape[1:])
  sender = next(at for at, device in enumerate(mesh.devices.flat) if device.process_index == 0)
  on_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

  @functools.partial(jax.jit, out_shardings=sharding, donate_argnums=0)
  def put(array, part, start):
    part = jax.lax.bitcast_convert_type(part.sum(0, dtype=bits), dtype)
    return jax.lax.dynamic_update_slice_in_dim(array, part, start, 0)

  array = jax.jit(lambda: jax.numpy.zeros(shape, dtype), out_shardings=sharding)()
  for start in range(0, shape[0], rows):
    value = read(slice(start, start + rows)).view(bits) if distributed.first() else None
    distributed.barrier()  # however long process 0 reads: devices' own waits have limits

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
  """Has all devices, and those along each axis, meet once; every process calls it, when all are
  there.

  Connections are made at the first meeting, and gloo, which CPU processes meet by, gives it 30 s:
  less than one process may take longer than another over its first program. A machine that cannot
  be reached shows at once.
  """
  for axes in (mesh.axis_names, *((axis,) for axis in mesh.axis_names if mesh.shape[axis] > 1)):
    ones = np.ones(math.prod(mesh.shape[axis] for axis in axes), np.float32)
    split = place(ones, NamedSharding(mesh, PartitionSpec(axes)))
    jax.block_until_ready(jax.jit(jax.numpy.sum, out_shardings=replicated(mesh))(split))


def whole(x: jax.Array) -> np.ndarray:
  """An array on the host, whole, wherever its parts lie; every process calls it."""
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x))


def row_shards(mesh: Mesh | AbstractMesh) -> int:
  """Into how many parts rows are split."""
  return math.prod(mesh.shape[axis] for axis in _mesh_axes("rows"))


def parts(logical: str) -> int:
  """Into how many parts the mesh of `under` splits a dimension of this name; 1 without one."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape.get(axis, 1) for axis in _mesh_axes(logical))


def under(mesh: Mesh, fn: Callable) -> Callable:
  """fn, traced so that `split_rows` in it knows the mesh."""

  @functools.wraps(fn)
  def traced(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args)

  return traced


def memory() -> float:
  """Bytes that work may take on each device of this process: of its own memory, or of a share of
  half the host's.
  """
  device = jax.local_devices()[0]
  if limit := (device.memory_stats() or {}).get("bytes_limit"):
    return SPENT * limit
  return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()


def runs_on(maker: str) -> bool:
  """Whether the program that is being traced is for devices whose kind begins so, "TPU" or
  "NVIDIA".

  They are those of the mesh of `under`; without one, the default device.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  return device.device_kind.startswith(maker)


def on_each_device(
  fn: Callable, logical_axes: Sequence[tuple[str | None, ...]], out_axes: tuple[str | None, ...]
) -> Callable:
  """fn of arrays, run by every device on its own parts of them; outside of `under` it is fn itself.

  Args:
    fn: must need nothing of other devices' parts.
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
  """Tells the compiler that an array, and its gradient, is split as these names say, rather than to
  let it guess.

  Of a parameter: it is gathered where it is used, and what its gradient's parts on the rows'
  devices sum to is scattered to where the parameter lies. Outside of `under` it does nothing.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def split_rows(x: jax.Array) -> jax.Array:
  """Tells the compiler that the first dimension is rows, lanes, or their tokens one after another:
  split as rows are.

  Without it the compiler may leave the parameters split as they lie and gather the activations of
  all rows on every device instead. Outside of `under` it does nothing.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(RULES["rows"], *others))
