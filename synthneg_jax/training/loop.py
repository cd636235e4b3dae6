"""The train loop: the only one, for pretraining, SFT, RFT and every preference loss."""

import contextlib
import functools
import math
from collections.abc import Callable

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from synthneg_jax.models.adapter import Adapter
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import checkpoints, device_mesh, processes
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
  open_metrics: Callable[[int], Metrics] | None = None,
):
  """Trains to the end of `batches`, from the newest checkpoint in `folder` if there is one.

  Args:
    name: for progress lines.
    config: the config's section with `optimizer`, `grad_accum_steps`, `save_every_steps` and `max_to_keep`.
    model: what is trained: the policy's architecture, or an adapter of it.
    params: where training starts; consumed (donated).
    objective: as training/objectives.py makes them.
    batches: the data, a function of the step.
    mesh: where it runs.
    folder: takes checkpoints/ and metrics.jsonl (loss and its companions, averages over one step's batch).
    check_start: called with the metrics of step 0, before anything was updated; may raise.
    frozen: parameters that the objective takes after the trained ones and the batch, and that stay as they are.
    open_metrics: the first step -> what takes the metrics; None for metrics.jsonl alone.

  Returns:
    (trained parameters, the last step's metrics, with what all steps cost where `open_metrics` measures it).

  Raises:
    UserError: the loss or the gradient is not finite; names the step, the examples and the last checkpoint. Or the disk
      is full, or the newest checkpoint is of another model.
    Stopped: SIGTERM came; the state after the last step is saved.
  """
  folder.mkdir(parents=True, exist_ok=True)
  optimizer = optimizer_lib.make_optimizer(config.optimizer, batches.num_steps)
  shardings = step_lib.state_shardings(model, optimizer, mesh)
  keeper = checkpoints.TrainCheckpoints(
    folder / "checkpoints", config.max_to_keep, config.save_every_steps, config.max_to_keep_best
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
    objective, optimizer, shardings, mesh, config.grad_accum_steps, jax.tree.map(lambda leaf: leaf.sharding, frozen)
  )
  layout = step_lib.batch_shardings(mesh)
  lines = (open_metrics or functools.partial(Metrics, None, folder, folder))(first_step)
  profiler = Profiler(lines.profile_steps, folder / "profile", first_step, batches.num_steps)
  rates = optimizer_lib.learning_rates(config.optimizer, batches.num_steps) if lines.measured else ()
  averages, losses = {}, []  # of the last step; since the last checkpoint

  def report(step, metrics, progress):
    found, histograms = _fetch(metrics)
    averages.update(found)
    if not all(math.isfinite(value) for value in averages.values()):
      raise UserError(
        f"{name}: step {step} is not finite ({averages}); its examples were {', '.join(batches.keys(step)[:8])} …; "
        f"the last good checkpoint is in {folder / 'checkpoints'}."
      )
    if step == 0 and check_start is not None:
      check_start(averages)
    cost = {}
    if lines.measured:
      cost = {"learning_rate": float(rates[step])} | meter.step(batches.num_tokens(step), batches.num_places)
    lines.write(step, averages | cost, histograms)
    losses.append(next(value for key, value in averages.items() if key.startswith("loss")))
    progress.update(1, loss=losses[-1])

  def keep(step, state):
    keeper.save(step, state, sum(losses) / len(losses))
    losses.clear()
    lines.keep()

  logging.info("%s: %d steps, %s, %.0f %% full.", name, batches.num_steps, batches.shape, 100 * batches.fill)
  previous, meter = None, Meter()
  left = Progress(name, batches.num_steps - first_step, "steps")
  ends = (contextlib.closing(part) for part in (keeper, lines, profiler))  # a save is waited for on errors, too
  with contextlib.ExitStack() as stack, left as progress:
    for part in ends:
      stack.enter_context(part)
    for step in range(first_step, batches.num_steps):
      batch = device_mesh.place(batches.build(step), layout)
      with profiler.before(step):
        state, metrics = run(state, batch, *frozen)
      profiler.after(step, state)
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
  cost = meter.total() if lines.measured else {}
  return to_keep(state)["params"], averages | cost
