"""How layers lie while programs run: the one place that says it, for training and for decoding.

Canonical parameters (checkpoints, export, sharding rules) are stacked, {"ends": ..., "layers": {name: [Y, ...]}}. A scan
reads them so (`scan_layers`: TPU, deep models). Unrolled layers (CPU) are kept apart, a tuple of Y trees: slices of a
stack, and in training a stack of the slices' gradients, would be copied at every step.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from synthneg_jax.models.config import ModelConfig


def unrolls(config: ModelConfig) -> bool:
  """Whether programs of this model take its layers apart."""
  return not config.scan_layers


def _each_params(fn, tree):
  """fn of every dict with "layers" in a tree: of parameters, and of what looks like them, such as moments."""
  holds = lambda node: isinstance(node, dict) and "layers" in node
  return jax.tree.map(lambda node: {**node, "layers": fn(node["layers"])} if holds(node) else node, tree, is_leaf=holds)


def apart(tree):
  """The same with layers apart; what is apart already stays."""

  def split(layers):
    leaves, treedef = jax.tree.flatten(layers)
    count = leaves[0].shape[0]
    columns = [lax.split(leaf, (1,) * count) for leaf in leaves]  # its gradient is one concatenation
    return tuple(treedef.unflatten([lax.squeeze(column[i], (0,)) for column in columns]) for i in range(count))

  return tree if is_apart(tree) else _each_params(split, tree)


def stacked(tree):
  """The same with layers stacked: the inverse of `apart`."""
  stack = lambda layers: jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
  return _each_params(lambda layers: stack(layers) if isinstance(layers, tuple) else layers, tree)


def shardings_apart(tree, count: int):
  """Shardings of stacked layers become those of `count` layers apart."""
  of_layer = lambda sharding: NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
  return _each_params(lambda layers: (jax.tree.map(of_layer, layers),) * count, tree)


def is_apart(tree) -> bool:
  """Whether a tree's layers are apart, whatever its leaves are."""
  found = []
  _each_params(lambda layers: found.append(isinstance(layers, tuple)), tree)
  return any(found)


def like(template, tree):
  """A tree whose layers lie as those of the template."""
  return apart(tree) if is_apart(template) else stacked(tree)
