"""Checkpoints of a running training, and policies at rest, both through orbax."""

import hashlib
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from synthneg_jax.runtime.errors import UserError


class TrainCheckpoints:
  """The checkpoints of one training: train state, and the step, which is the data position."""

  def __init__(self, folder: epath.PathLike, keep: int, every_steps: int):
    self._every_steps = every_steps
    self._folder = epath.Path(folder)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._manager = ocp.CheckpointManager(self._folder.absolute(), options=options)

  def restore(self, abstract_state, shardings):
    """The newest state that can be read, laid out by `shardings`; None where there is none.

    A checkpoint that cannot be read is passed over for the one before, and said.
    """
    target = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_state, shardings
    )
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        return self._manager.restore(step, args=ocp.args.StandardRestore(target))
      except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
        logging.warning("Checkpoint %s/%d cannot be read (%s); trying the one before.", self._folder, step, error)
        self._manager.delete(step)
    return None

  def due(self, step: int) -> bool:
    """True after every `every_steps`-th step."""
    return bool(self._every_steps) and step % self._every_steps == 0

  def save(self, step: int, state) -> None:
    """Saves in the background what training goes on from after `step` steps."""
    self._manager.save(step, args=ocp.args.StandardSave(state))

  def close(self):
    self._manager.close()


def save_params(folder: epath.PathLike, params) -> None:
  """Writes parameters under folder/params; a killed call leaves nothing under that name."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(epath.Path(folder).absolute() / "params", params, force=True)


def load_params(folder: epath.PathLike, abstract_params, shardings):
  """Reads what `save_params` wrote into the given layout.

  Raises:
    UserError: the folder is not there, or holds other parameters.
  """
  path = epath.Path(folder).absolute() / "params"
  if not path.exists():
    raise UserError(f"{path} is not there: the policy's weights are missing.")
  target = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_params, shardings
  )
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(path, target)
  except (ValueError, KeyError, OSError) as error:
    first_line = str(error).strip().splitlines()[0][:300]
    raise UserError(f"{path} does not hold the weights of this model: {first_line}") from error


def fingerprint(params) -> str:
  """A hash of the parameters' bits: the same on every mesh and host, another after any change.

  Each leaf gives the sum of a hash of each element's bits and place in 32-bit wrap-around arithmetic, computed where the
  leaf lies; the sums of all leaves, with their names, are hashed.
  """

  def checksum(leaf):
    bits = jax.lax.bitcast_convert_type(leaf, {2: np.uint16, 4: np.uint32, 8: np.uint32}[leaf.dtype.itemsize])
    bits = bits.astype(np.uint32).reshape(-1)
    mixed = bits ^ (jax.lax.iota(np.uint32, bits.size) * np.uint32(0x9E3779B1))
    for factor in (0x85EBCA6B, 0xC2B2AE35):  # MurmurHash3's last steps: one to one, and every bit reaches every other
      mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(factor)
    return jax.numpy.sum(mixed ^ (mixed >> np.uint32(16)), dtype=np.uint32)

  sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(checksum, tree))(params))
  digest = hashlib.sha256()
  for path, value in jax.tree_util.tree_leaves_with_path(sums):
    digest.update(f"{jax.tree_util.keystr(path)}={int(value)};".encode())
  return digest.hexdigest()[:16]
