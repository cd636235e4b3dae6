"""The train loop of pretraining, SFT, RFT and every preference loss."""

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
  """Waits for a step's metrics and returns (averages, histograms), each by name."""
  averages, histograms = {}, {}
  for name, (total, count) in jax.device_get(metrics).items():
    if name.startswith(objectives.HISTOGRAM):
      histograms[name] = objectives.EDGES[name], total.tolist()
    else:
      averages[name] = float(total) / max(float(count), 1.0)
  return averages, histograms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """The immutable inputs of a training run.

  Attributes:
    name: for progress lines and messages.
    section: the config's section with `optimizer`, `save_every_steps`, `max_to_keep` and
      `max_to_keep_best`.
    model: what is trained: the policy's architecture, or an adapter of it.
    objective: from training/objectives.py.
    batches: the data, a function of the step.
    mesh: of the devices.
    folder: receives checkpoints/ and metrics.jsonl (averages over each step's batch).
    resumable: whether checkpoints are written and read; if not, a stopped run starts over.
    check_start: called with the metrics of step 0, which precede any update; may raise.
    after_step: called after each update with (number of updates, current parameters). A resumed run
      does not repeat calls. The next update donates the parameters, so copy what you keep. Unrolled
      layers are unstacked, which `Model.hidden` accepts too.
    open_metrics: called with the first step, returns the metrics writer; None for metrics.jsonl
      only.
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
  """Trains on all batches, resuming from the newest checkpoint in the run's folder if any.

  Args:
    run: what is trained, on what data and devices.
    params: initial parameters, stacked; donated.
    frozen: untrained parameters that the objective takes after the batch.

  Returns:
    (trained parameters, stacked; the last step's metrics, with the cost of all steps if
    `open_metrics` measures it).

  Raises:
    UserError: the loss or the gradient is not finite (names the step, the examples and the last
      checkpoint), the disk is full, or the newest checkpoint is of another model.
    Stopped: on SIGTERM, after saving the state if the run is resumable.
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
    logging.info("%s: resuming from step %d.", run.name, first_step)
  step_fn = step_lib.make_step(
    run.objective,
    optimizer,
    shardings,
    mesh=run.mesh,
    num_microbatches=batches.rows.microbatches,
    frozen=jax.tree.map(lambda leaf: leaf.sharding, frozen),
  )
  batch_shardings = step_lib.batch_shardings(run.mesh)
  open_metrics = run.open_metrics or functools.partial(Metrics, None, folder, folder)
  writer = open_metrics(first_step)
  profiler = Profiler(writer.profile_steps, folder / "profile", first_step, batches.num_steps)
  rates = (
    optimizer_lib.learning_rates(section.optimizer, batches.num_steps) if writer.measured else ()
  )
  averages, losses = {}, []  # metrics of the last step; losses since the last checkpoint

  def report(step, metrics, progress):
    new_averages, histograms = _fetch(metrics)
    averages.update(new_averages)
    if not all(math.isfinite(value) for value in averages.values()):
      checkpoint = "no checkpoint was kept."
      if run.resumable:
        checkpoint = f"the last good checkpoint is in {folder / 'checkpoints'}."
      raise UserError(
        f"{run.name}: the loss or gradient of step {step} is not finite ({averages}); its examples "
        f"were {', '.join(batches.keys(step)[:8])} …; {checkpoint}"
      )
    if step == 0 and run.check_start is not None:
      run.check_start(averages)
    cost = {}
    if writer.measured:
      cost = {"learning_rate": float(rates[step])} | meter.step(
        batches.num_tokens(step), batches.capacity(step)
      )
    writer.write(step, averages | cost, histograms)
    losses.append(next(value for key, value in averages.items() if key.startswith("loss")))
    progress.update(1, loss=losses[-1])

  def save(step, state):
    checkpointer.save(step, state, sum(losses) / len(losses))
    losses.clear()
    writer.save()

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
    for part in (checkpointer, writer, profiler):
      if part is not None:
        closers.enter_context(contextlib.closing(part))  # waits for a save, also after an error
    for step in range(first_step, batches.num_steps):
      batch = device_mesh.place(batches.build(step), batch_shardings)
      with profiler.before(step):
        state, metrics = step_fn(state, batch, *frozen)
      profiler.after(step, state)
      if previous is not None:  # fetch the metrics of step N - 1 after dispatching step N
        report(*previous, progress)
      previous, done = (step, metrics), step + 1
      if run.after_step is not None:
        run.after_step(done, state["params"])
      stopping = distributed.stopping()
      due = checkpointer is not None and (stopping or checkpointer.due(done))
      if due and done < batches.num_steps:  # instead of the last state, the policy is saved
        report(*previous, progress)  # raises before saving if the step is not finite
        previous = None
        save(done, stacked(state))
      if stopping and done < batches.num_steps:
        raise distributed.Stopped  # closing the checkpointer completes the save
    if previous is not None:
      report(*previous, progress)
  cost = meter.total() if writer.measured else {}
  return stacked(state)["params"], averages | cost
