"""The trace viewer: writes traces, credit, rollouts and pairs of a run to report/traces.html."""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from synthneg_jax.core import advantages
from synthneg_jax.data.credited_traces import (
  CreditedTrace,
  CreditedTraces,
  first_pits,
  spurious_steps,
)
from synthneg_jax.data.records import Pair, Problem, Shards, Trace
from synthneg_jax.data.token_text import TokenText
from synthneg_jax.decoding.policy import load_token_text, resolve
from synthneg_jax.pipeline import pair_logprobs
from synthneg_jax.pipeline import traces as traces_lib
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.report import viewer_page
from synthneg_jax.runtime import distributed, manifest

LABELS = {
  "base": "base model",
  "sft": "SFT",
  "rft": "RFT",
  "dpo": "DPO, arbitrary pairs",
  "step_dpo": "per-step DPO",
}


def token_text(experiment: Experiment) -> TokenText:
  """The text of this run's tokens.

  Raises:
    UserError: neither the SFT policy nor the base model has a tokenizer.
  """
  folder = experiment.workdir / "sft" / "policy"
  if not folder.exists():  # only the base model has been evaluated
    folder = resolve(experiment.config.model.path, weights=False)
  return load_token_text(folder)[1]


class _Labelled(NamedTuple):
  """A credited trace with the pit (wrong) or spurious step (right), from 0; -1 for none."""

  credited: CreditedTrace
  pit: int
  spurious: int


class _Records:
  """The records of a run's finished stages, and the views that the page shows.

  Attributes:
    sources: labels of the sets of traces: samples, and each method's test.
    methods: the method of each source that is a test, by index.
    problems: problems by id.
    groups: (index of the source, trace) by problem.
    text: text of the run's tokens; None without sources.
  """

  def __init__(self, experiment: Experiment):
    self._config, config, workdir = experiment.config, experiment.config, experiment.workdir

    def done(name):
      return manifest.figures(workdir, name) is not None

    self.sources, self.methods, self.problems = [], {}, {}
    self.groups = collections.defaultdict(list)
    sources = [("SFT, samples", "sample", "train")]
    for method in config.evaluate.methods:
      sources.append((f"{LABELS.get(method, method)}, test", f"evaluate/{method}", "test"))
    for label, stage, split in sources:
      if done(stage):
        if split == "test":
          self.methods[len(self.sources)] = stage.rpartition("/")[2]
        self.problems = experiment.problems(split) | self.problems
        for trace in Shards(workdir / stage / "traces", Trace).read():
          self.groups[trace.problem_id].append((len(self.sources), trace))
        self.sources.append(label)
    self._credited, self._labelled = None, {}
    if done("credit"):
      self._credited = CreditedTraces.load(workdir, config.credit.best_of, self.problems)
      self._labelled = self._labels()
    self._pairs = collections.defaultdict(list)
    for stage in ("dpo", "step_dpo"):
      if done(f"pairs/{stage}"):
        margins = pair_logprobs.read(experiment, stage)
        for pair in Shards(workdir / "pairs" / stage / "pairs", Pair).read():
          self._pairs[pair.trace_id].append((stage, pair, margins.get(pair.id)))
    self.text = token_text(experiment) if self.sources else None

  def _labels(self) -> dict[str, _Labelled]:
    pairs, wrong, right = self._config.pairs, self._credited.wrong, self._credited.right
    labelled = {}
    for credited, pit in zip(wrong, first_pits(wrong, pairs), strict=True):
      labelled[credited.trace.id] = _Labelled(credited, pit, -1)
    for credited, step in zip(right, spurious_steps(right, pairs.spurious_below), strict=True):
      labelled[credited.trace.id] = _Labelled(credited, -1, step)
    return labelled

  def _shown_problems(self) -> list[str]:
    """Ids of the problems to show: all, or evenly spaced ones with at most max_traces traces."""
    ids, most = list(self.groups), self._config.report.max_traces
    total = sum(map(len, self.groups.values()))
    if total <= most:
      return ids
    shown = traces_lib.evenly_spaced(ids, max(1, len(ids) * most // total))
    while len(shown) > 1 and sum(len(self.groups[key]) for key in shown) > most:
      shown.pop()
    return shown

  def views(self) -> Iterator[viewer_page.ProblemView]:
    """The problems to show, with their traces."""
    for key in self._shown_problems():
      problem: Problem = self.problems[key]
      group = self.groups[key]
      samples = [trace for source, trace in group if source not in self.methods]
      right, value = sum(trace.correct for trace in samples), None
      labelled = [self._labelled[trace.id] for _, trace in group if trace.id in self._labelled]
      if labelled:
        value = labelled[0].credited.v0
      elif samples and self._config.credit.best_of == 1:
        value = right / len(samples)
      yield viewer_page.ProblemView(
        key,
        problem.prompt,
        problem.answer,
        problem.solution,
        value,
        right,
        len(samples),
        [self._view(source, trace) for source, trace in group],
      )

  def _view(self, source: int, trace: Trace) -> viewer_page.TraceView:
    labelled = self._labelled.get(trace.id)
    name = trace.id
    if source in self.methods:  # all methods' test traces have the same ids
      name = f"{trace.id}@{self.methods[source]}"
    steps = zip([0, *trace.step_ends], trace.step_ends, strict=False)
    return viewer_page.TraceView(
      id=name,
      source=source,
      steps=[self.text.text(trace.ids[start:end]) for start, end in steps],
      reason=trace.reason,
      extracted=trace.extracted,
      finish_reason=trace.finish_reason,
      credit=self._credit(labelled.credited) if labelled else None,
      pit=labelled.pit if labelled else -1,
      spurious=labelled.spurious if labelled else -1,
      pairs=[self._pair(trace, *pair) for pair in self._pairs.get(trace.id, ())],
    )

  def _credit(self, credited: CreditedTrace) -> list[viewer_page.Credit]:
    steps = []
    for s, estimate in enumerate(credited.estimates):
      interval = None
      if estimate.rollouts:
        low, high = advantages.value_interval(estimate.successes, estimate.rollouts)
        interval = float(low), float(high)
      steps.append(
        viewer_page.Credit(
          rollouts=estimate.rollouts,
          successes=estimate.successes,
          interval=interval,
          q=float(credited.q[s]) if credited.known[s] else None,
          advantage=float(credited.advantage[s]) if credited.advantage_known[s] else None,
          exact=estimate.exact,
          drawn=self._rollouts(estimate.samples_at),
        )
      )
    return steps

  def _rollouts(self, holder: str) -> Sequence[viewer_page.Rollout]:
    """The report.max_rollouts most frequent distinct rollouts of an estimate."""
    counts = collections.Counter()
    for sample in self._credited.estimates[holder].samples:
      counts[tuple(sample["ids"]), sample["correct"], sample["reason"]] += 1
    return [
      viewer_page.Rollout(self.text.text(ids), right, reason, count)
      for (ids, right, reason), count in counts.most_common(self._config.report.max_rollouts)
    ]

  def _pair(
    self, trace: Trace, stage: str, pair: Pair, margin: pair_logprobs.Margin | None
  ) -> viewer_page.PairView:
    before = trace.step_ends[pair.pit - 1] if pair.pit > 0 else 0
    shared = pair.pair_mode in ("shared_prefix", "positives_too", "random_step")
    return viewer_page.PairView(
      stage=stage,
      mode=pair.pair_mode,
      pit=pair.pit,
      trunk=self.text.text(trace.ids[:before]) if shared else "",
      chosen=self.text.text(pair.chosen),
      rejected=self.text.text(pair.rejected),
      p_flipped=pair.p_flipped,
      chosen_logp=margin.chosen if margin else None,
      rejected_logp=margin.rejected if margin else None,
    )


def run(experiment: Experiment) -> dict:
  """Writes report/traces.html from the stages that are done.

  It is rewritten each time, by the first process.

  Raises:
    UserError: the traces' tokenizer is missing, or a file of a finished stage is missing or broken.
  """
  if not distributed.is_primary():
    return {}
  records, config = _Records(experiment), experiment.config
  path = viewer_page.write(
    viewer_page.Viewer(
      title=f"Learning from wrong solutions: {config.task.name}",
      sources=records.sources,
      tested=list(records.methods),
      compared=[source for source, method in records.methods.items() if method != "base"],
      problems=records.views(),
      total=sum(map(len, records.groups.values())),
      best_of=config.credit.best_of,
      num_rollouts=config.credit.num_rollouts,
      max_rollouts=config.report.max_rollouts,
      pit_rule=config.pairs.pit_rule,
    ),
    experiment.workdir / "report",
  )
  return {"path": str(path)}
