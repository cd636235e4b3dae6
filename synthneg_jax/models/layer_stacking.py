"""Converts between stacked and unstacked layers, for training and decoding.

Checkpoints, exports and sharding rules use stacked parameters, {"ends": ..., "layers": {name: [Y,
...]}}, and a scan reads them as they are (`scan_layers`: TPU, deep models). Unrolled layers (CPU)
are kept unstacked, as a tuple of Y trees, because slicing a stack, and stacking the gradients of
its slices, would copy them at every step.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from synthneg_jax.models.config import ModelConfig


def unrolls(config: ModelConfig) -> bool:
  """Whether programs of this model unroll the loop over layers and take them unstacked."""
  return not config.scan_layers


def _has_layers(node) -> bool:
  return isinstance(node, dict) and "layers" in node


def _map_layers(fn, tree):
  """Applies fn to "layers" in parameters and in trees of the same form, such as Adam's moments."""

  def apply(node):
    return {**node, "layers": fn(node["layers"])} if _has_layers(node) else node

  return jax.tree.map(apply, tree, is_leaf=_has_layers)


def unstack(tree):
  """Replaces each stack by a tuple of single layers; unstacked layers are unchanged."""

  def split(layers):
    leaves, treedef = jax.tree.flatten(layers)
    count = leaves[0].shape[0]
    slices = [lax.split(leaf, (1,) * count) for leaf in leaves]  # its gradient is one concatenation
    return tuple(
      treedef.unflatten([lax.squeeze(parts[i], (0,)) for parts in slices]) for i in range(count)
    )

  return tree if is_unstacked(tree) else _map_layers(split, tree)


def stack(tree):
  """The inverse of `unstack`; stacked layers are unchanged."""

  def join(layers):
    if not isinstance(layers, tuple):
      return layers
    return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

  return _map_layers(join, tree)


def unstacked_shardings(tree, count: int):
  """The shardings of `count` unstacked layers, given those of stacked layers."""

  def drop_layer_axis(sharding):
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

  return _map_layers(lambda layers: (jax.tree.map(drop_layer_axis, layers),) * count, tree)


def is_unstacked(tree) -> bool:
  """Whether a tree's layers are unstacked."""
  nodes = [node for node in jax.tree.leaves(tree, is_leaf=_has_layers) if _has_layers(node)]
  return any(isinstance(node["layers"], tuple) for node in nodes)


def like(template, tree):
  """Stacks or unstacks the layers of `tree` to match the template."""
  return unstack(tree) if is_unstacked(template) else stack(tree)
