"""How layers are arranged while programs run: the one place that decides it, for training and for
decoding.

Canonical parameters (checkpoints, export, sharding rules) are stacked, {"ends": ..., "layers":
{name: [Y, ...]}}. A scan reads them like this (`scan_layers`: TPU, deep models). Unrolled layers
(CPU) are kept unstacked, a tuple of Y trees: slices of a stack, and in training a stack of the
slices' gradients, would be copied at every step.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from synthneg_jax.models.config import ModelConfig


def unrolls(config: ModelConfig) -> bool:
  """Whether programs of this model unroll the loop over layers, and so want them unstacked."""
  return not config.scan_layers


def _has_layers(node) -> bool:
  return isinstance(node, dict) and "layers" in node


def _map_layers(fn, tree):
  """Applies fn to "layers" of every dict that has them: of parameters, and of what looks like them,
  such as moments.
  """

  def apply(node):
    return {**node, "layers": fn(node["layers"])} if _has_layers(node) else node

  return jax.tree.map(apply, tree, is_leaf=_has_layers)


def unstack(tree):
  """The same tree with a tuple of single layers in place of each stack; unstacked layers stay as
  they are.
  """

  def split(layers):
    leaves, treedef = jax.tree.flatten(layers)
    count = leaves[0].shape[0]
    columns = [
      lax.split(leaf, (1,) * count) for leaf in leaves
    ]  # its gradient is one concatenation
    return tuple(
      treedef.unflatten([lax.squeeze(column[i], (0,)) for column in columns]) for i in range(count)
    )

  return tree if is_unstacked(tree) else _map_layers(split, tree)


def stack(tree):
  """The inverse of `unstack`; stacked layers stay as they are."""

  def join(layers):
    if not isinstance(layers, tuple):
      return layers
    return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

  return _map_layers(join, tree)


def unstacked_shardings(tree, count: int):
  """The shardings of `count` unstacked layers, from those of stacked ones."""

  def of_layer(sharding):
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

  return _map_layers(lambda layers: (jax.tree.map(of_layer, layers),) * count, tree)


def is_unstacked(tree) -> bool:
  """Whether a tree's layers are unstacked, whatever its leaves are."""
  nodes = [node for node in jax.tree.leaves(tree, is_leaf=_has_layers) if _has_layers(node)]
  return any(isinstance(node["layers"], tuple) for node in nodes)


def like(template, tree):
  """A tree whose layers are stacked or unstacked as those of the template are."""
  return unstack(tree) if is_unstacked(template) else stack(tree)
