"""TensorBoard summaries of the stages sample and credit: traces, Q by step, and histograms."""

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from synthneg_jax.data.credited_traces import CreditedTraces, first_pits
from synthneg_jax.data.records import Problem, Trace
from synthneg_jax.pipeline import evaluate
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.pipeline.traces import evenly_spaced
from synthneg_jax.report import figures
from synthneg_jax.runtime import distributed
from synthneg_jax.runtime.event_files import EventFile, Histogram

_Q_EDGES = np.linspace(0.0, 1.0, 21)


def _histogram(values, edges) -> Histogram:
  counts = np.bincount(
    np.searchsorted(edges, np.asarray(values), side="right"), minlength=len(edges) + 1
  )
  return edges, counts


def _text(trace: Trace, problem: Problem) -> str:
  """A trace as Markdown; prompt and response are code blocks, so their markup is not rendered."""

  def indented(text):
    return "".join(f"    {line}\n" for line in text.split("\n"))

  answer = "no answer"
  if trace.extracted is not None:
    answer = f"answer `{trace.extracted.replace('`', '')}`"
  return (
    f"{trace.id}: **{trace.reason}**, {answer}, {len(trace.step_ends)} steps\n\n"
    f"{indented(problem.prompt)}\n---\n\n{indented(trace.text)}"
  )


def sampled(
  experiment: Experiment,
  folder: epath.Path,
  problems: Mapping[str, Problem],
  traces: Sequence[Trace],
) -> None:
  """Writes report.num_traces traces as text, and histograms of their lengths.

  Only the first process writes, and only with metrics.tensorboard.

  Args:
    experiment: gives the config.
    folder: receives the event file.
    problems: problems by id.
    traces: all traces.

  Raises:
    UserError: the event file cannot be written.
  """
  if not (experiment.config.metrics.tensorboard and distributed.is_primary()):
    return
  file = EventFile(folder)
  shown = evenly_spaced(traces, experiment.config.report.num_traces)
  edges = np.linspace(0, experiment.config.engine.max_new_tokens + 1, 33)
  file.write(
    0,
    texts={
      f"traces/{n}": _text(trace, problems[trace.problem_id]) for n, trace in enumerate(shown)
    },
    histograms={
      "traces/tokens": _histogram([len(trace.ids) for trace in traces], edges),
      "traces/steps": _histogram([len(trace.step_ends) for trace in traces], np.arange(0.5, 40)),
    },
  )
  file.close()


def credited(
  experiment: Experiment,
  folder: epath.Path,
  problems: Mapping[str, Problem],
  credited_traces: CreditedTraces,
) -> None:
  """Writes report.num_traces wrong traces with images of Q by step, and histograms of credit.

  Only the first process writes, and only with metrics.tensorboard.

  Args:
    experiment: gives the config.
    folder: receives the event file.
    problems: problems by id.
    credited_traces: the traces of stage credit.

  Raises:
    UserError: the event file cannot be written.
  """
  wrong = credited_traces.wrong
  if not (experiment.config.metrics.tensorboard and distributed.is_primary() and wrong):
    return
  with_pits = list(zip(wrong, first_pits(wrong, experiment.config.pairs), strict=True))
  images, texts = {}, {}
  for n, (shown, pit) in enumerate(evenly_spaced(with_pits, experiment.config.report.num_traces)):
    figure = figures.step_values(
      [float(q) if known else None for q, known in zip(shown.q, shown.known, strict=True)],
      [
        evaluate.wilson(step.successes, step.rollouts) if step.rollouts else None
        for step in shown.estimates
      ],
      shown.v0,
      pit,
    )
    images[f"step_q/{n}"] = figures.png(figure, 100)
    texts[f"step_q/{n}"] = _text(shown.trace, problems[shown.trace.problem_id])
  q = np.concatenate([t.q[t.known] for t in wrong])
  advantage = np.concatenate([t.advantage[t.advantage_known] for t in wrong])
  file = EventFile(folder)
  file.write(
    0,
    images=images,
    texts=texts,
    histograms={
      "q/per_step": _histogram(q, _Q_EDGES),
      "advantage/per_step": _histogram(advantage, np.linspace(-1.0, 1.0, 41)),
    },
  )
  file.close()
