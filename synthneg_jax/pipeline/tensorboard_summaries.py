"""What the stages sample and credit put on TensorBoard: traces as text, Q by step as images, and
histograms.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from synthneg_jax.data.credited_traces import CreditedTraces, first_pits
from synthneg_jax.data.records import Problem, Trace
from synthneg_jax.pipeline import evaluate
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.report import figures
from synthneg_jax.runtime import distributed
from synthneg_jax.runtime.event_files import EventFile, Histogram

_SHARES = np.linspace(0.0, 1.0, 21)


def _histogram(values, edges) -> Histogram:
  counts = np.bincount(
    np.searchsorted(edges, np.asarray(values), side="right"), minlength=len(edges) + 1
  )
  return edges, counts


def _spread(traces: Sequence, count: int) -> list:
  """At most `count` of them at even distances."""
  return [traces[int(place)] for place in np.linspace(0, len(traces) - 1, min(count, len(traces)))]


def _text(trace: Trace, problem: Problem) -> str:
  """A trace as Markdown, with model output indented as code so that its markup is not rendered."""

  def indented(text):
    return "".join(f"    {line}\n" for line in text.split("\n"))

  said = "no answer" if trace.extracted is None else f"answer `{trace.extracted.replace('`', '')}`"
  return (
    f"{trace.id}: **{trace.reason}**, {said}, {len(trace.step_ends)} steps\n\n"
    f"{indented(problem.prompt)}\n---\n\n{indented(trace.text)}"
  )


def sampled(
  experiment: Experiment,
  folder: epath.Path,
  problems: Mapping[str, Problem],
  traces: Sequence[Trace],
) -> None:
  """Writes report.num_traces traces as text, and how long all are; the first process alone, if the
  config asks for it.

  Raises:
    UserError: the event file cannot be written.
  """
  if not (experiment.config.metrics.tensorboard and distributed.first()):
    return
  file = EventFile(folder)
  shown = _spread(traces, experiment.config.report.num_traces)
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
  """Writes Q by step of report.num_traces wrong traces as images beside their text, and histograms
  of Q and advantage.

  Args:
    experiment: with the config.
    folder: takes the event file.
    problems: by id.
    credited_traces: of stage credit.

  Raises:
    UserError: the event file cannot be written.
  """
  wrong = credited_traces.wrong
  if not (experiment.config.metrics.tensorboard and distributed.first() and wrong):
    return
  pits = dict(
    zip((each.trace.id for each in wrong), first_pits(wrong, experiment.config.pairs), strict=True)
  )
  images, texts = {}, {}
  for n, each in enumerate(_spread(wrong, experiment.config.report.num_traces)):
    figure = figures.step_values(
      [float(q) if known else None for q, known in zip(each.q, each.known, strict=True)],
      [
        evaluate.wilson(step.successes, step.rollouts) if step.rollouts else None
        for step in each.estimates
      ],
      each.v0,
      pits[each.trace.id],
    )
    images[f"step_q/{n}"] = figures.png(figure, 100)
    texts[f"step_q/{n}"] = _text(each.trace, problems[each.trace.problem_id])
  file = EventFile(folder)
  file.write(
    0,
    images=images,
    texts=texts,
    histograms={
      "q/per_step": _histogram(np.concatenate([each.q[each.known] for each in wrong]), _SHARES),
      "advantage/per_step": _histogram(
        np.concatenate([each.advantage[each.advantage_known] for each in wrong]),
        np.linspace(-1.0, 1.0, 41),
      ),
    },
  )
  file.close()
