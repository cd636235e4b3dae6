"""The trace viewer of a run: gathers traces, credit, rollouts and pairs, and has them written as
report/traces.html.
"""

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

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
  """The bytes of this run's tokens.

  Raises:
    UserError: neither the SFT policy nor the base model has a tokenizer.
  """
  folder = experiment.workdir / "sft" / "policy"
  if not folder.exists():  # the base model may have been tested first
    folder = resolve(experiment.config.model.path, weights=False)
  return load_token_text(folder)[1]


class _Blame(NamedTuple):
  """A credited trace with the step it is blamed for: the pit of a wrong trace, the spurious step of
  a right one; else -1.
  """

  credited: CreditedTrace
  pit: int
  spurious: int


class _Run:
  """The records of a run, as far as its stages are done, and what the page shows of them."""

  def __init__(self, experiment: Experiment):
    self.run, config, workdir = experiment, experiment.config, experiment.workdir

    def done(name):
      return manifest.figures(workdir, name) is not None

    self.sources, self.problems, self.groups = [], {}, collections.defaultdict(list)
    self.methods = {}  # of each source that is one policy's answers to the test problems
    wanted = [("SFT, samples", "sample", "train")]
    wanted += [
      (f"{LABELS.get(m, m)}, test", f"evaluate/{m}", "test") for m in config.evaluate.methods
    ]
    for label, stage, split in wanted:
      if done(stage):
        if split == "test":
          self.methods[len(self.sources)] = stage.rpartition("/")[2]
        self.problems = experiment.problems(split) | self.problems
        for trace in Shards(workdir / stage / "traces", Trace).read():
          self.groups[trace.problem_id].append((len(self.sources), trace))
        self.sources.append(label)
    self.credited, self.known = None, {}
    if done("credit"):
      self.credited = CreditedTraces.load(workdir, config.credit.best_of, self.problems)
      self.known = self._blamed()
    self.pairs = collections.defaultdict(list)
    for stage in ("dpo", "step_dpo"):
      if done(f"pairs/{stage}"):
        moved = pair_logprobs.read(experiment, stage)
        for pair in Shards(workdir / "pairs" / stage / "pairs", Pair).read():
          self.pairs[pair.trace_id].append((stage, pair, moved.get(pair.id)))
    self.text = token_text(experiment) if self.sources else None

  @functools.cached_property
  def value_of(self) -> dict[str, tuple[int, int]]:
    """(right, all) samples of each problem."""
    samples = {
      key: [t for source, t in group if source not in self.methods]
      for key, group in self.groups.items()
    }
    return {
      key: (sum(trace.correct for trace in group), len(group)) for key, group in samples.items()
    }

  def _blamed(self) -> dict[str, _Blame]:
    pairs, wrong, right = self.run.config.pairs, self.credited.wrong, self.credited.right
    blamed = [
      _Blame(each, pit, -1) for each, pit in zip(wrong, first_pits(wrong, pairs), strict=True)
    ]
    spurious = spurious_steps(right, pairs.spurious_below)
    blamed += [_Blame(each, -1, step) for each, step in zip(right, spurious, strict=True)]
    return {blame.credited.trace.id: blame for blame in blamed}

  def chosen(self) -> list[str]:
    """Ids of the problems that are shown: all, or whole ones at even distances so that max_traces
    are not exceeded.
    """
    ids, most = list(self.groups), self.run.config.report.max_traces
    total = sum(map(len, self.groups.values()))
    if total <= most:
      return ids
    count = max(1, len(ids) * most // total)
    picked = [ids[int(place)] for place in np.linspace(0, len(ids) - 1, count)]
    while len(picked) > 1 and sum(len(self.groups[key]) for key in picked) > most:
      picked.pop()
    return picked

  def views(self) -> Iterator[viewer_page.ProblemView]:
    for key in self.chosen():
      problem: Problem = self.problems[key]
      known = [self.known[trace.id] for _, trace in self.groups[key] if trace.id in self.known]
      right, samples = self.value_of[key]
      value = (
        known[0].credited.v0
        if known
        else right / samples
        if samples and self.run.config.credit.best_of == 1
        else None
      )
      shown = [self._view(source, trace) for source, trace in self.groups[key]]
      yield viewer_page.ProblemView(
        key, problem.prompt, problem.answer, problem.solution, value, right, samples, shown
      )

  def _view(self, source: int, trace: Trace) -> viewer_page.TraceView:
    known = self.known.get(trace.id)
    return viewer_page.TraceView(
      id=f"{trace.id}@{self.methods[source]}"
      if source in self.methods
      else trace.id,  # methods share their records' ids
      source=source,
      steps=[
        self.text.text(trace.ids[a:b])
        for a, b in zip([0, *trace.step_ends], trace.step_ends, strict=False)
      ],
      reason=trace.reason,
      extracted=trace.extracted,
      finish=trace.finish,
      credit=self._credit(known.credited) if known else None,
      pit=known.pit if known else -1,
      spurious=known.spurious if known else -1,
      pairs=[self._pair(trace, *made) for made in self.pairs.get(trace.id, ())],
    )

  def _credit(self, credited: CreditedTrace) -> list[viewer_page.Credit]:
    steps = []
    for s, estimate in enumerate(credited.estimates):
      count = (estimate.successes, estimate.rollouts)
      steps.append(
        viewer_page.Credit(
          rollouts=estimate.rollouts,
          successes=estimate.successes,
          interval=tuple(map(float, advantages.value_interval(*count)))
          if estimate.rollouts
          else None,
          q=float(credited.q[s]) if credited.known[s] else None,
          advantage=float(credited.advantage[s]) if credited.advantage_known[s] else None,
          exact=estimate.exact,
          drawn=self._drawn(estimate.samples_at),
        )
      )
    return steps

  def _drawn(self, holder: str) -> Sequence[viewer_page.Rollout]:
    """The rollouts of an estimate, equal ones once, the most frequent first, as many as the config
    has kept.
    """
    times = collections.Counter()
    for sample in self.credited.estimates[holder].samples:
      times[tuple(sample["ids"]), sample["correct"], sample["reason"]] += 1
    kept = times.most_common(self.run.config.report.max_rollouts)
    return [
      viewer_page.Rollout(self.text.text(ids), right, reason, n) for (ids, right, reason), n in kept
    ]

  def _pair(
    self, trace: Trace, stage: str, pair: Pair, moved: pair_logprobs.Margin | None
  ) -> viewer_page.PairView:
    before = trace.step_ends[pair.pit - 1] if pair.pit > 0 else 0
    shared = pair.pair_mode in ("shared_prefix", "positives_too")
    return viewer_page.PairView(
      stage=stage,
      mode=pair.pair_mode,
      pit=pair.pit,
      trunk=self.text.text(trace.ids[:before]) if shared else "",
      chosen=self.text.text(pair.chosen),
      rejected=self.text.text(pair.rejected),
      flip=pair.flip,
      chosen_logp=moved.chosen if moved else None,
      rejected_logp=moved.rejected if moved else None,
    )


def run(experiment: Experiment) -> dict:
  """Writes report/traces.html from whatever traces there are. It is always made again. Of several
  processes the first makes it alone.

  Raises:
    UserError: the traces' tokenizer is missing, or a file of a finished stage is missing or broken.
  """
  if not distributed.first():
    return {}
  made, config = _Run(experiment), experiment.config
  path = viewer_page.write(
    viewer_page.Viewer(
      title=f"Learning from wrong solutions: {config.task.name}",
      sources=made.sources,
      tested=list(made.methods),
      compared=[source for source, method in made.methods.items() if method != "base"],
      problems=made.views(),
      total=sum(map(len, made.groups.values())),
      best_of=config.credit.best_of,
      num_rollouts=config.credit.num_rollouts,
      max_rollouts=config.report.max_rollouts,
      pit_rule=config.pairs.pit_rule,
    ),
    experiment.workdir / "report",
  )
  return {"path": str(path)}
