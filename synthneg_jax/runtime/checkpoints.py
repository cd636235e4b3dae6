"""Checkpoints of a running training, and policies at rest, both through orbax."""

import contextlib
import hashlib
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from synthneg_jax.runtime import distributed
from synthneg_jax.runtime.errors import UserError, writing


class TrainCheckpoints:
  """The checkpoints of one training: train state, and the step, which is the data position.

  The newest `keep` stay, and besides them the `max_to_keep_best` with the lowest loss. All
  processes call every method.
  """

  def __init__(
    self, folder: epath.PathLike, keep: int, every_steps: int, max_to_keep_best: int = 0
  ):
    self._every_steps, self._folder = every_steps, epath.Path(folder)
    self._unreadable = set()
    kept = [preservation_policy.LatestN(keep)]
    if max_to_keep_best:

      def loss(metrics):
        return metrics["loss"]

      kept.append(preservation_policy.BestN(get_metric_fn=loss, reverse=True, n=max_to_keep_best))
    self._options = ocp.CheckpointManagerOptions(
      create=True,
      best_fn=(lambda metrics: metrics["loss"]) if max_to_keep_best else None,
      best_mode="min",
      preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
    )
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    """The manager of what the folder holds now."""
    if self._options.best_fn is not None:
      self._mend_metrics()
    with writing(self._folder):
      return ocp.CheckpointManager(
        self._folder.absolute(),
        options=self._options,
        item_handlers=ocp.StandardCheckpointHandler(),
      )

  def _mend_metrics(self) -> None:
    """Has a checkpoint whose loss cannot be read count as the worst; it would keep all others from
    being opened.
    """
    if distributed.first() and self._folder.exists():
      for path in self._folder.glob("*/metrics/metrics"):
        try:
          json.loads(path.read_text())
        except ValueError:
          logging.warning(
            "The loss in %s cannot be read; the checkpoint counts as the worst.", path
          )
          with writing(path):
            path.write_text(json.dumps({"loss": float("inf")}))
    distributed.barrier()

  def restore(self, abstract_state, shardings):
    """The newest state that can be read, laid out by `shardings`; None where there is none.

    A checkpoint that cannot be read is passed over for the one before, and said. It stays where it
    is, for what keeps it from being read may pass; only a state that is saved anew at its step
    takes its place. Where none can be read, all are moved to the folder's neighbour
    NAME.unreadable, out of the way of a training that starts anew.

    Raises:
      UserError: a checkpoint is whole, but of another model or optimizer.
    """
    target = _abstract(abstract_state, shardings)
    for step in sorted(self._manager.all_steps(), reverse=True):
      state, problem = None, ""
      try:
        self._refuse_other(step, target)
        state = self._manager.restore(step, args=ocp.args.StandardRestore(target))
      except _UNREADABLE as error:
        problem = _first_line(error) or type(error).__name__
      problem = next(
        filter(None, distributed.gather(problem)), ""
      )  # what one cannot read, none takes
      if not problem:
        return state
      logging.warning(
        "Checkpoint %s/%d cannot be read (%s); trying the one before.", self._folder, step, problem
      )
      self._unreadable.add(step)
    if self._unreadable:
      self._set_aside()
    return None

  def _set_aside(self) -> None:
    """Moves all checkpoints out of the folder: beside new ones they would count as the newest, or
    stand in their way.
    """
    self._manager.close()
    aside = self._folder.parent / f"{self._folder.name}.unreadable"
    if distributed.first():
      with writing(aside):
        aside.mkdir(parents=True, exist_ok=True)
        for step in sorted(self._unreadable):
          if (aside / str(step)).exists():
            (aside / str(step)).rmtree()
          (self._folder / str(step)).rename(aside / str(step))
    distributed.barrier()
    logging.warning(
      "No checkpoint of %s can be read; they are kept in %s, and the training starts from step 0.",
      self._folder,
      aside,
    )
    self._unreadable.clear()
    self._manager = self._open()

  def _refuse_other(self, step: int, target) -> None:
    def shapes(tree):
      return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
      }

    found, wanted = shapes(self._manager.item_metadata(step)), shapes(target)
    if not found:
      raise ValueError("its list of arrays is missing")
    for name in sorted(set(found) ^ set(wanted)) + [
      name for name in wanted if found.get(name) != wanted[name]
    ]:
      raise UserError(
        f"{self._folder / str(step)} is a checkpoint of another model: {name} has shape "
        f"{found.get(name, 'none')} there, {wanted.get(name, 'none')} here; take another "
        f"--workdir, or delete {self._folder}."
      )

  def due(self, step: int) -> bool:
    """True after every `every_steps`-th step."""
    return bool(self._every_steps) and step % self._every_steps == 0

  def save(self, step: int, state, loss: float) -> None:
    """Saves in the background what training goes on from after `step` steps.

    Args:
      step: done so far.
      state: of the training.
      loss: mean over the steps since the checkpoint before, by which the best are known.

    Raises:
      UserError: this state, or the one before, cannot be written; older checkpoints stay.
    """
    with self._said():
      if step in self._unreadable:
        if step in self._manager.all_steps():
          self._manager.delete(step)
        self._unreadable.remove(step)
      self._manager.save(
        step, args=ocp.args.StandardSave(state), metrics={"loss": loss}, force=True
      )

  def close(self):
    """Waits for the last save.

    Raises:
      UserError: it cannot be written.
    """
    with self._said():
      self._manager.close()

  @contextlib.contextmanager
  def _said(self):
    try:
      yield
    except _UNREADABLE as error:
      raise UserError(
        f"A checkpoint in {self._folder} cannot be written ({_first_line(error)}); those written "
        "before are kept."
      ) from error


_UNREADABLE = (
  ValueError,
  OSError,
  KeyError,
  json.JSONDecodeError,
)  # what orbax makes of broken files and full disks


def _first_line(error: BaseException) -> str:
  return next(iter(str(error).strip().splitlines()), "")[:300]


def _abstract(tree, shardings):
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    shardings,
  )


def save_params(folder: epath.PathLike, params) -> None:
  """Writes parameters under folder/params; a killed call leaves nothing under that name.

  Raises:
    UserError: they cannot be written.
  """
  path = epath.Path(folder).absolute() / "params"
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, params, force=True)
  except (ValueError, OSError) as error:
    raise UserError(f"{path} cannot be written ({_first_line(error)}).") from error


def load_params(folder: epath.PathLike, abstract_params, shardings):
  """Reads what `save_params` wrote into the given layout.

  Raises:
    UserError: the folder is not there, or holds other parameters.
  """
  path = epath.Path(folder).absolute() / "params"
  if not path.exists():
    raise UserError(f"{path} is not there: the policy's weights are missing.")
  target = _abstract(abstract_params, shardings)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(path, target)
  except _UNREADABLE as error:
    raise UserError(
      f"{path} does not hold the weights of this model: {_first_line(error)}"
    ) from error


def fingerprint(params) -> str:
  """A hash of the parameters' bits: the same on every mesh and host, another after any change.

  Each leaf gives the sum of a hash of each element's bits and place in 32-bit wrap-around
  arithmetic, computed where the leaf lies; the sums of all leaves, with their names, are hashed.
  """

  def checksum(leaf):
    bits = jax.lax.bitcast_convert_type(
      leaf, {2: np.uint16, 4: np.uint32, 8: np.uint32}[leaf.dtype.itemsize]
    )
    bits = bits.astype(np.uint32).reshape(-1)
    mixed = bits ^ (jax.lax.iota(np.uint32, bits.size) * np.uint32(0x9E3779B1))
    for factor in (
      0x85EBCA6B,
      0xC2B2AE35,
    ):  # MurmurHash3's last steps: one to one, and every bit reaches every other
      mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(factor)
    return jax.numpy.sum(mixed ^ (mixed >> np.uint32(16)), dtype=np.uint32)

  sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(checksum, tree))(params))
  digest = hashlib.sha256()
  for path, value in jax.tree_util.tree_leaves_with_path(sums):
    digest.update(f"{jax.tree_util.keystr(path)}={int(value)};".encode())
  return digest.hexdigest()[:16]
