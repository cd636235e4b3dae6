"""The train loop: the only one, for pretraining, SFT, RFT and every preference loss."""

import contextlib
import json
import math
import os

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from synthneg_jax.models.adapter import Adapter
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import checkpoints, processes
from synthneg_jax.runtime import mesh as mesh_lib
from synthneg_jax.runtime.errors import UserError, writing
from synthneg_jax.runtime.progress import Progress
from synthneg_jax.training import optimizer as optimizer_lib
from synthneg_jax.training import step as step_lib
from synthneg_jax.training.batches import Batches


def _averages(metrics) -> dict[str, float]:
  return {name: float(total) / max(float(count), 1.0) for name, (total, count) in jax.device_get(metrics).items()}


class _MetricsFile:
  """One JSON line a step, written by the first process. A step that is done again, after a kill, takes its line's place.

  On a local disk each line is there at once; elsewhere, where files cannot be added to, with each checkpoint.
  """

  def __init__(self, path: epath.Path, first_step: int):
    text = path.read_text() if path.exists() and first_step else ""
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    self._lines = {json.loads(line)["step"]: line for line in whole}
    self._path, self._file = path, None
    self.keep()
    if processes.first() and "://" not in os.fspath(path):
      self._file = path.open("a")

  def write(self, step: int, averages: dict[str, float]):
    self._lines[step] = json.dumps({"step": step, **averages}) + "\n"
    if self._file is not None:
      with writing(self._path):
        self._file.write(self._lines[step])
        self._file.flush()

  def keep(self):
    """Everything up to here is on disk when it returns."""
    if processes.first() and self._file is None:
      with writing(self._path):
        temporary = self._path.parent / f"{self._path.name}.tmp"
        temporary.write_text("".join(self._lines[step] for step in sorted(self._lines)))
        temporary.replace(self._path)

  def close(self):
    if self._file is not None:
      with contextlib.suppress(OSError):  # of a full disk, which was said before
        self._file.close()
      self._file = None
    with contextlib.suppress(UserError):
      self.keep()


def fit(
  name: str,
  config,
  model: Model | Adapter,
  params,
  objective,
  batches: Batches,
  mesh: Mesh,
  folder: epath.Path,
  check_start=None,
  frozen=(),
):
  """Trains to the end of `batches`, from the newest checkpoint in `folder` if there is one.

  Args:
    name: for progress lines.
    config: the config's section with `optimizer`, `accumulate`, `save_every_steps` and `keep_checkpoints`.
    model: what is trained: the policy's architecture, or an adapter of it.
    params: where training starts; consumed (donated).
    objective: as training/objectives.py makes them.
    batches: the data, a function of the step.
    mesh: where it runs.
    folder: takes checkpoints/ and metrics.jsonl (loss and its companions, averages over one step's batch).
    check_start: called with the metrics of step 0, before anything was updated; may raise.
    frozen: parameters that the objective takes after the trained ones and the batch, and that stay as they are.

  Returns:
    (trained parameters, the last step's metrics).

  Raises:
    UserError: the loss or the gradient is not finite; names the step, the examples and the last checkpoint. Or the disk
      is full, or the newest checkpoint is of another model.
    Stopped: SIGTERM came; the state after the last step is saved.
  """
  folder.mkdir(parents=True, exist_ok=True)
  optimizer = optimizer_lib.make_optimizer(config.optimizer, batches.num_steps)
  shardings = step_lib.state_shardings(model, optimizer, mesh)
  keeper = checkpoints.TrainCheckpoints(
    folder / "checkpoints", config.keep_checkpoints, config.save_every_steps, config.keep_best
  )
  kept = step_lib.state_shardings(model, optimizer, mesh, stacked=True)
  abstract = jax.eval_shape(step_lib.make_init(optimizer, kept), model.abstract_params())
  to_keep = step_lib.make_relayout(kept) if kept != shardings else lambda state: state
  state = keeper.restore(abstract, kept)
  if state is None:
    state = step_lib.make_init(optimizer, shardings)(params)
  elif kept != shardings:
    state = step_lib.make_relayout(shardings)(state)
  del params
  first_step = int(state["step"])
  if first_step:
    logging.info("%s: going on from step %d.", name, first_step)
  run = step_lib.make_step(
    objective, optimizer, shardings, mesh, config.accumulate, jax.tree.map(lambda leaf: leaf.sharding, frozen)
  )
  layout = step_lib.batch_shardings(mesh)
  lines = _MetricsFile(folder / "metrics.jsonl", first_step)
  averages, losses = {}, []  # of the last step; since the last checkpoint

  def report(step, metrics, progress):
    averages.update(_averages(metrics))
    if not all(math.isfinite(value) for value in averages.values()):
      raise UserError(
        f"{name}: step {step} is not finite ({averages}); its examples were {', '.join(batches.keys(step)[:8])} …; "
        f"the last good checkpoint is in {folder / 'checkpoints'}."
      )
    if step == 0 and check_start is not None:
      check_start(averages)
    lines.write(step, averages)
    losses.append(next(value for key, value in averages.items() if key.startswith("loss")))
    progress.update(1, loss=losses[-1])

  def keep(step, state):
    keeper.save(step, state, sum(losses) / len(losses))
    losses.clear()
    lines.keep()

  logging.info("%s: %d steps, %s, %.0f %% full.", name, batches.num_steps, batches.shape, 100 * batches.fill)
  previous = None
  left = Progress(name, batches.num_steps - first_step, "steps")
  with contextlib.closing(keeper), contextlib.closing(lines), left as progress:  # a save is waited for on errors, too
    for step in range(first_step, batches.num_steps):
      state, metrics = run(state, mesh_lib.place(batches.build(step), layout), *frozen)
      if previous is not None:  # step N is dispatched before the figures of N - 1 are fetched
        report(*previous, progress)
      previous, done = (step, metrics), step + 1
      stopping = processes.stopping()
      if (stopping or keeper.due(done)) and done < batches.num_steps:  # the last state is not kept: the policy is
        report(*previous, progress)  # only a state whose step was finite is kept
        previous = None
        keep(done, to_keep(state))
        if stopping:
          raise processes.Stopped  # once the keeper is closed, everything is written
    if previous is not None:
      report(*previous, progress)
  return to_keep(state)["params"], averages
