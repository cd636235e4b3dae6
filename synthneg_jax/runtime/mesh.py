"""The device mesh, and the one table that says which array dimension lies on which of its axes."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from synthneg_jax.runtime.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter, a row of a batch or a lane of the engine -> mesh axis or axes.
RULES = {
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  "norm": None,
  "rows": ("data", "fsdp"),
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """A mesh over all devices; one of the sizes may be -1 and takes what is left.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) == 1:
    known = math.prod(size for size in sizes if size != -1)
    sizes[sizes.index(-1)] = len(devices) // known if known and len(devices) % known == 0 else 0
  if math.prod(sizes) != len(devices) or min(sizes) < 1:
    raise UserError(f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} do not fit {len(devices)} device(s).")
  return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(*logical_axes: str | None) -> PartitionSpec:
  """The partition of an array whose dimensions have these logical names (None: not split)."""
  return PartitionSpec(*(RULES[name] if name else None for name in logical_axes))


def shardings(mesh: Mesh, logical_axes):
  """A tree of tuples of logical names becomes a tree of NamedShardings."""
  return jax.tree.map(
    lambda names: NamedSharding(mesh, spec(*names)), logical_axes, is_leaf=lambda leaf: isinstance(leaf, tuple)
  )


def rows(mesh: Mesh) -> NamedSharding:
  """The sharding of anything whose first dimension is rows of a batch or lanes of the engine."""
  return NamedSharding(mesh, spec("rows"))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of anything that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def row_shards(mesh: Mesh) -> int:
  """Into how many parts rows are split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]
