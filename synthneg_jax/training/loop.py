"""The train loop: the only one, for pretraining, SFT, RFT and every preference loss."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from synthneg_jax.models.adapter import Adapter
from synthneg_jax.models.decoder import Model, Params
from synthneg_jax.runtime import checkpoints, device_mesh, distributed
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.runtime.event_files import Histogram
from synthneg_jax.runtime.metrics import Metrics
from synthneg_jax.runtime.progress import Progress
from synthneg_jax.runtime.throughput import Meter, Profiler
from synthneg_jax.training import objectives
from synthneg_jax.training import optimizer as optimizer_lib
from synthneg_jax.training import step as step_lib
from synthneg_jax.training.batches import Batches


def _fetch(metrics) -> tuple[dict[str, float], dict[str, Histogram]]:
  """(averages, histograms), each by name, once the step that made them is done."""
  averages, histograms = {}, {}
  for name, (total, count) in jax.device_get(metrics).items():
    if name.startswith(objectives.HISTOGRAM):
      histograms[name] = objectives.EDGES[name], total.tolist()
    else:
      averages[name] = float(total) / max(float(count), 1.0)
  return averages, histograms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What one training is: all that `fit` reads and does not change.

  Attributes:
    name: for progress lines and messages.
    section: the config's section with `optimizer`, `save_every_steps`, `max_to_keep` and
      `max_to_keep_best`.
    model: what is trained: the policy's architecture, or an adapter of it.
    objective: as training/objectives.py makes them.
    batches: the data, a function of the step.
    mesh: where it runs.
    folder: takes checkpoints/ and metrics.jsonl (loss and its companions, averages over one step's
      batch).
    resumable: whether checkpoints are written and read. Without them a run that was stopped starts
      over.
    check_start: called with the metrics of step 0, which are computed before any update; may raise.
      None for no check.
    after_step: called after each update with (updates so far, current parameters), to measure them;
      a resumed run does not repeat calls of earlier steps. The next update consumes the parameters,
      so copy what you keep. Layers that are unrolled are unstacked, as `Model.hidden` takes them
      too. None for nothing.
    open_metrics: the first step -> what takes the metrics; None for metrics.jsonl alone.
  """

  name: str
  section: Any
  model: Model | Adapter
  objective: Callable
  batches: Batches
  mesh: Mesh
  folder: epath.Path
  resumable: bool = True
  check_start: Callable[[dict[str, float]], None] | None = None
  after_step: Callable[[int, Params], None] | None = None
  open_metrics: Callable[[int], Metrics] | None = None


def fit(run: Run, params: Params, frozen=()) -> tuple[Params, dict[str, float]]:
  """Trains to the end of the batches, from the newest checkpoint in the run's folder if there is
  one.

  Args:
    run: what is trained, on what, and where.
    params: where training starts, stacked; consumed (donated).
    frozen: parameters that the objective takes after the trained ones and the batch, and that stay
      as they are.

  Returns:
    (trained parameters, stacked; the last step's metrics, with what all steps cost where
    `open_metrics` measures it).

  Raises:
    UserError: the loss or the gradient is not finite; names the step, the examples and the last
      checkpoint. Or the disk is full, or the newest checkpoint is of another model.
    Stopped: SIGTERM came; where the run is resumable, the state after the last step is saved.
  """
  section, batches, folder = run.section, run.batches, run.folder
  folder.mkdir(parents=True, exist_ok=True)
  optimizer = optimizer_lib.make_optimizer(section.optimizer, batches.num_steps)
  shardings = step_lib.state_shardings(run.model, optimizer, run.mesh)
  saved_shardings = step_lib.state_shardings(run.model, optimizer, run.mesh, stacked=True)
  relayouts = saved_shardings != shardings  # layers are stacked on disk, unstacked in the step
  stack = step_lib.make_relayout(saved_shardings) if relayouts else None

  def stacked(state):
    return stack(state) if relayouts else state

  checkpointer, state = None, None
  if run.resumable:
    checkpointer = checkpoints.TrainCheckpoints(
      folder / "checkpoints",
      section.max_to_keep,
      section.save_every_steps,
      section.max_to_keep_best,
    )
    abstract = jax.eval_shape(
      step_lib.make_init(optimizer, saved_shardings), run.model.abstract_params()
    )
    state = checkpointer.restore(abstract, saved_shardings)
  if state is None:
    state = step_lib.make_init(optimizer, shardings)(params)
  elif relayouts:
    state = step_lib.make_relayout(shardings)(state)
  del params
  first_step = int(state["step"])
  if first_step:
    logging.info("%s: going on from step %d.", run.name, first_step)
  step_fn = step_lib.make_step(
    run.objective,
    optimizer,
    shardings,
    mesh=run.mesh,
    accumulate=batches.rows.microbatches,
    frozen=jax.tree.map(lambda leaf: leaf.sharding, frozen),
  )
  batch_shardings = step_lib.batch_shardings(run.mesh)
  open_metrics = run.open_metrics or functools.partial(Metrics, None, folder, folder)
  lines = open_metrics(first_step)
  profiler = Profiler(lines.profile_steps, folder / "profile", first_step, batches.num_steps)
  rates = (
    optimizer_lib.learning_rates(section.optimizer, batches.num_steps) if lines.measured else ()
  )
  averages, losses = {}, []  # of the last step; since the last checkpoint

  def report(step, metrics, progress):
    new_averages, histograms = _fetch(metrics)
    averages.update(new_averages)
    if not all(math.isfinite(value) for value in averages.values()):
      raise UserError(
        f"{run.name}: step {step} is not finite ({averages}); its examples were "
        f"{', '.join(batches.keys(step)[:8])} …; "
        + (
          f"the last good checkpoint is in {folder / 'checkpoints'}."
          if run.resumable
          else "no checkpoint was kept."
        )
      )
    if step == 0 and run.check_start is not None:
      run.check_start(averages)
    cost = {}
    if lines.measured:
      cost = {"learning_rate": float(rates[step])} | meter.step(
        batches.num_tokens(step), batches.num_places(step)
      )
    lines.write(step, averages | cost, histograms)
    losses.append(next(value for key, value in averages.items() if key.startswith("loss")))
    progress.update(1, loss=losses[-1])

  def save(step, state):
    checkpointer.save(step, state, sum(losses) / len(losses))
    losses.clear()
    lines.keep()

  logging.info(
    "%s: %d steps of %s rows of %d tokens in %d microbatch(es), %.0f %% full.",
    run.name,
    batches.num_steps,
    " or ".join(map(str, batches.rows.counts)),
    batches.rows.length,
    batches.rows.microbatches,
    100 * batches.packing_efficiency,
  )
  previous, meter = None, Meter()
  remaining = Progress(run.name, batches.num_steps - first_step, "steps")
  with contextlib.ExitStack() as closers, remaining as progress:
    for part in (checkpointer, lines, profiler):
      if part is not None:
        closers.enter_context(contextlib.closing(part))  # a save is waited for on errors, too
    for step in range(first_step, batches.num_steps):
      batch = device_mesh.place(batches.build(step), batch_shardings)
      with profiler.before(step):
        state, metrics = step_fn(state, batch, *frozen)
      profiler.after(step, state)
      if previous is not None:  # step N is dispatched before the figures of N - 1 are fetched
        report(*previous, progress)
      previous, done = (step, metrics), step + 1
      if run.after_step is not None:
        run.after_step(done, state["params"])
      stopping = distributed.stopping()
      due = checkpointer is not None and (stopping or checkpointer.due(done))
      if due and done < batches.num_steps:  # the last state is not saved: the policy is
        report(*previous, progress)  # only a state whose step was finite is saved
        previous = None
        save(done, stacked(state))
      if stopping and done < batches.num_steps:
        raise distributed.Stopped  # once the checkpointer is closed, everything is written
    if previous is not None:
      report(*previous, progress)
  cost = meter.total() if lines.measured else {}
  return stacked(state)["params"], averages | cost
