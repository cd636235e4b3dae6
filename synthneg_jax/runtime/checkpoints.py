"""Training checkpoints and saved policies, both through orbax."""

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
  """The checkpoints of one training run: train state, and the step, which is the data position.

  The newest `keep` are retained, plus the `max_to_keep_best` with the lowest loss. Every process
  must call every method.
  """

  def __init__(
    self, folder: epath.PathLike, keep: int, every_steps: int, max_to_keep_best: int = 0
  ):
    self._every_steps, self._folder = every_steps, epath.Path(folder)
    self._unreadable = set()
    kept = [preservation_policy.LatestN(keep)]
    if max_to_keep_best:
      kept.append(preservation_policy.BestN(get_metric_fn=_loss, reverse=True, n=max_to_keep_best))
    self._options = ocp.CheckpointManagerOptions(
      create=True,
      best_fn=_loss if max_to_keep_best else None,
      best_mode="min",
      preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
    )
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    """Opens a manager for the folder's current contents."""
    if self._options.best_fn is not None:
      self._repair_metrics()
    with writing(self._folder):
      return ocp.CheckpointManager(
        self._folder.absolute(),
        options=self._options,
        item_handlers=ocp.StandardCheckpointHandler(),
      )

  def _repair_metrics(self) -> None:
    """Replaces unreadable losses by infinity; orbax would refuse to open any checkpoint."""
    if distributed.is_primary() and self._folder.exists():
      for path in self._folder.glob("*/metrics/metrics"):
        try:
          json.loads(path.read_text())
        except ValueError:
          logging.warning(
            "The loss in %s cannot be read; this checkpoint counts as the worst.", path
          )
          with writing(path):
            path.write_text(json.dumps({"loss": float("inf")}))
    distributed.barrier()

  def restore(self, abstract_state, shardings):
    """Returns the newest readable state, laid out by `shardings`; None if no state is readable.

    An unreadable checkpoint is skipped with a warning in favour of the previous one. It stays in
    place, since the cause may be temporary, until a new state is saved at its step. If no
    checkpoint is readable, all are moved to the sibling folder NAME.unreadable, so that they do not
    interfere with a training that restarts from step 0.

    Raises:
      UserError: a checkpoint is intact but belongs to another model or optimizer.
    """
    target = _abstract(abstract_state, shardings)
    for step in sorted(self._manager.all_steps(), reverse=True):
      state, problem = None, ""
      try:
        self._check_shapes(step, target)
        state = self._manager.restore(step, args=ocp.args.StandardRestore(target))
      except _UNREADABLE as error:
        problem = _first_line(error) or type(error).__name__
      # If one process cannot read a checkpoint, no process uses it.
      problem = next(filter(None, distributed.gather(problem)), "")
      if not problem:
        return state
      logging.warning(
        "Checkpoint %s/%d cannot be read (%s); trying the previous one.",
        self._folder,
        step,
        problem,
      )
      self._unreadable.add(step)
    if self._unreadable:
      self._set_aside()
    return None

  def _set_aside(self) -> None:
    """Moves all checkpoints out of the folder, where they would be taken for the newest ones."""
    self._manager.close()
    aside = self._folder.parent / f"{self._folder.name}.unreadable"
    if distributed.is_primary():
      with writing(aside):
        aside.mkdir(parents=True, exist_ok=True)
        for step in sorted(self._unreadable):
          if (aside / str(step)).exists():
            (aside / str(step)).rmtree()
          (self._folder / str(step)).rename(aside / str(step))
    distributed.barrier()
    logging.warning(
      "No checkpoint of %s can be read; they were moved to %s, and training starts from step 0.",
      self._folder,
      aside,
    )
    self._unreadable.clear()
    self._manager = self._open()

  def _check_shapes(self, step: int, target) -> None:
    """Raises UserError if the checkpoint's arrays differ from the target's in name or shape."""

    def shapes(tree):
      return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
      }

    saved, expected = shapes(self._manager.item_metadata(step)), shapes(target)
    if not saved:
      raise ValueError("its list of arrays is missing")
    for name in sorted(saved.keys() ^ expected.keys()) + list(expected):
      if saved.get(name) != expected.get(name):
        raise UserError(
          f"{self._folder / str(step)} is a checkpoint of another model: {name} has shape "
          f"{saved.get(name, 'none')} in the checkpoint and {expected.get(name, 'none')} in this "
          f"model; use another --workdir, or delete {self._folder}."
        )

  def due(self, step: int) -> bool:
    """True after every `every_steps`-th step."""
    return bool(self._every_steps) and step % self._every_steps == 0

  def save(self, step: int, state, loss: float) -> None:
    """Saves in the background the state from which training resumes after `step` steps.

    Args:
      step: number of completed steps.
      state: train state.
      loss: mean over the steps since the previous checkpoint; ranks checkpoints.

    Raises:
      UserError: this state, or the previous one, cannot be written; older checkpoints remain.
    """
    with self._write_errors():
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
      UserError: the last state cannot be written.
    """
    with self._write_errors():
      self._manager.close()

  @contextlib.contextmanager
  def _write_errors(self):
    try:
      yield
    except _UNREADABLE as error:
      raise UserError(
        f"A checkpoint in {self._folder} cannot be written ({_first_line(error)}); earlier "
        "checkpoints are kept."
      ) from error


# Raised by orbax for broken files and full disks; ValueError includes json.JSONDecodeError.
_UNREADABLE = (ValueError, OSError, KeyError)


def _loss(metrics: dict[str, float]) -> float:
  return metrics["loss"]


def _first_line(error: BaseException) -> str:
  return next(iter(str(error).strip().splitlines()), "")[:300]


def _abstract(tree, shardings):
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    shardings,
  )


def save_params(folder: epath.PathLike, params) -> None:
  """Writes parameters to folder/params; a killed call leaves nothing under that name.

  Raises:
    UserError: the parameters cannot be written.
  """
  path = epath.Path(folder).absolute() / "params"
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, params, force=True)
  except (ValueError, OSError) as error:
    raise UserError(f"{path} cannot be written ({_first_line(error)}).") from error


def load_params(folder: epath.PathLike, abstract_params, shardings):
  """Loads parameters written by `save_params` into the given shardings.

  Raises:
    UserError: the folder is missing, or holds other parameters.
  """
  path = epath.Path(folder).absolute() / "params"
  if not path.exists():
    raise UserError(f"{path} does not exist: the policy's weights are missing.")
  target = _abstract(abstract_params, shardings)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(path, target)
  except _UNREADABLE as error:
    raise UserError(
      f"{path} does not hold the weights of this model: {_first_line(error)}"
    ) from error


def fingerprint(params) -> str:
  """A hash of the parameters' bits: equal on every mesh and host, different after any change.

  For each leaf, hashes of every element's bits and index are summed in wrap-around 32-bit
  arithmetic on the leaf's own devices; then the leaf names and sums are hashed.
  """
  digest = hashlib.sha256()
  for path, value in jax.tree_util.tree_leaves_with_path(jax.device_get(_checksums(params))):
    digest.update(f"{jax.tree_util.keystr(path)}={int(value)};".encode())
  return digest.hexdigest()[:16]


@jax.jit
def _checksums(params):
  """For each leaf, the sum of hashes of its elements' bits and indices, uint32 []."""

  def checksum(leaf):
    bits = jax.lax.bitcast_convert_type(
      leaf, {2: np.uint16, 4: np.uint32, 8: np.uint32}[leaf.dtype.itemsize]
    )
    bits = bits.astype(np.uint32).reshape(-1)
    mixed = bits ^ (jax.lax.iota(np.uint32, bits.size) * np.uint32(0x9E3779B1))
    # MurmurHash3's finaliser: bijective, and every input bit affects every output bit.
    for factor in (0x85EBCA6B, 0xC2B2AE35):
      mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(factor)
    return jax.numpy.sum(mixed ^ (mixed >> np.uint32(16)), dtype=np.uint32)

  return jax.tree.map(checksum, params)
