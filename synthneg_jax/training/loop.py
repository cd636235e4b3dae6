"""The train loop: the only one, for pretraining, SFT, RFT and every preference loss."""

import contextlib
import json
import math

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import checkpoints
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.runtime.progress import Progress
from synthneg_jax.training import optimizer as optimizer_lib
from synthneg_jax.training import step as step_lib
from synthneg_jax.training.batches import Batches


def _averages(metrics) -> dict[str, float]:
  return {name: float(total) / max(float(count), 1.0) for name, (total, count) in jax.device_get(metrics).items()}


class _MetricsFile:
  """One JSON line a step. What a killed run wrote beyond its last checkpoint is dropped."""

  def __init__(self, path: epath.Path, first_step: int):
    lines = path.read_text().splitlines(keepends=True) if path.exists() and first_step else []
    path.write_text("".join(line for line in lines[:first_step] if line.endswith("\n")))
    self._file = path.open("a")

  def write(self, step: int, averages: dict[str, float]):
    self._file.write(json.dumps({"step": step, **averages}) + "\n")
    self._file.flush()

  def close(self):
    self._file.close()


def fit(
  name: str, config, model: Model, params, objective, batches: Batches, mesh: Mesh, folder: epath.Path, check_start=None
):
  """Trains to the end of `batches`, from the newest checkpoint in `folder` if there is one.

  Args:
    name: for progress lines.
    config: the config's section with `optimizer`, `accumulate`, `save_every_steps` and `keep_checkpoints`.
    model: the policy's architecture.
    params: where training starts; consumed (donated).
    objective: as training/objectives.py makes them.
    batches: the data, a function of the step.
    mesh: where it runs.
    folder: takes checkpoints/ and metrics.jsonl (loss and its companions, averages over one step's batch).
    check_start: called with the metrics of step 0, before anything was updated; may raise.

  Returns:
    (trained parameters, the last step's metrics).

  Raises:
    UserError: the loss or the gradient is not finite; names the step, the examples and the last checkpoint.
  """
  folder.mkdir(parents=True, exist_ok=True)
  optimizer = optimizer_lib.make_optimizer(config.optimizer, batches.num_steps)
  shardings = step_lib.state_shardings(model, optimizer, mesh)
  keeper = checkpoints.TrainCheckpoints(folder / "checkpoints", config.keep_checkpoints, config.save_every_steps)
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
  run = step_lib.make_step(objective, optimizer, shardings, mesh, config.accumulate)
  layout = step_lib.batch_shardings(mesh)
  lines = _MetricsFile(folder / "metrics.jsonl", first_step)
  averages = {}

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
    progress.update(1, loss=next(value for key, value in averages.items() if key.startswith("loss")))

  logging.info("%s: %d steps, %s, %.0f %% full.", name, batches.num_steps, batches.shape, 100 * batches.fill)
  previous = None
  left = Progress(name, batches.num_steps - first_step, "steps")
  with contextlib.closing(keeper), contextlib.closing(lines), left as progress:  # a save is waited for on errors, too
    for step in range(first_step, batches.num_steps):
      state, metrics = run(state, jax.device_put(batches.build(step), layout))
      if previous is not None:  # step N is dispatched before the figures of N - 1 are fetched
        report(*previous, progress)
      previous = (step, metrics)
      if keeper.due(step + 1) and step + 1 < batches.num_steps:  # the last state is not kept here: the policy is
        report(*previous, progress)  # only a state whose step was finite is kept
        previous = None
        keeper.save(step + 1, to_keep(state))
    if previous is not None:
      report(*previous, progress)
  return to_keep(state)["params"], averages
