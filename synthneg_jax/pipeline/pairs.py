"""Stage pairs: builds preference pairs for stage dpo from traces and their credit.

Each of its two variants is a stage: pairs/dpo (whole responses, pairs.outcome_mode) and
pairs/step_dpo (pairs.pair_mode). core/pairs.py and docs/method.md define the modes.
"""

import collections
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from synthneg_jax.core import pairs as core
from synthneg_jax.core import selection
from synthneg_jax.data import prompts, steps
from synthneg_jax.data.credited_traces import CreditedTraces, by_problem, first_pits, spurious_steps
from synthneg_jax.data.records import Pair, Shards, Trace
from synthneg_jax.decoding.policy import load_token_text
from synthneg_jax.pipeline import train_policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import keys
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training import pair_trees

_WHOLE_MODES = ("arbitrary", "furthest")
VARIANTS = {"dpo": "outcome_mode", "step_dpo": "pair_mode"}  # the leaf that holds the mode
_PITS = ("pairs.pit_rule", "pairs.drop_ratio", "pairs.min_before", "pairs.order", "credit.best_of")
_SIBLINGS = ("pairs.continuation", "pairs.choice")
_LEAVES = {  # config leaves that a mode reads, besides those that all modes read
  "arbitrary": (),
  "furthest": ("pairs.furthest",),
  "algorithm1": _PITS,
  "prefix_protected": _PITS,
  "shared_prefix": (*_PITS, *_SIBLINGS),
  "positives_too": (*_PITS, *_SIBLINGS, "pairs.spurious_below", "pairs.right_fraction"),
  "random_step": (*_SIBLINGS, "pairs.order"),
}
# modes whose chosen branch is the known solution
_KNOWN_SOLUTION = {"algorithm1": core.algorithm1, "prefix_protected": core.prefix_protected}


class Candidate(NamedTuple):
  """A trace, its rejected step, and their pair if one can be built.

  Attributes:
    trace: the trace that the rejected branch comes from.
    step: the rejected step, from 0; -1 for a whole response and for a trace without a pit.
    pair: None if no pair could be built.
  """

  trace: Trace
  step: int
  pair: core.TokenPair | None

  @property
  def key(self) -> tuple[str, int]:
    """Unique key within a mode."""
    return self.trace.id, self.step


class Builder:
  """Builds pairs from the records of earlier stages.

  Attributes:
    problems: problems by id.
    credited: traces with their credit.
  """

  def __init__(self, experiment: Experiment):
    self._experiment, self._section = experiment, experiment.config.pairs
    self.problems = experiment.problems("train")
    self.credited = CreditedTraces.load(
      experiment.workdir, experiment.config.credit.best_of, self.problems
    )
    self._tokenizer, self._token_text = load_token_text(experiment.workdir / "sft" / "policy")

  @functools.cache  # noqa: B019  one builder per stage
  def prompt(self, problem_id: str) -> list[int]:
    """The token ids of a problem's prompt."""
    return train_policy.prompt_ids(self._experiment, self._tokenizer, self.problems[problem_id])

  def candidates(self, mode: str) -> list[Candidate]:
    """All candidates of a mode, before filtering."""
    if mode == "arbitrary":
      return [self._arbitrary(credited.trace) for credited in self.credited.wrong]
    if mode == "furthest":
      return self._furthest()
    return [self._at_step(trace, step, mode) for trace, step in self._rejected_steps(mode)]

  def _solution(self, problem_id: str) -> list[int] | None:
    text = self.problems[problem_id].solution
    return prompts.encode_solution(self._tokenizer, text) if text else None

  def _arbitrary(self, trace: Trace) -> Candidate:
    solution = self._solution(trace.problem_id)
    pair = core.arbitrary(self.prompt(trace.problem_id), solution, trace.ids) if solution else None
    return Candidate(trace, -1, pair)

  def _furthest(self) -> list[Candidate]:
    candidates = []
    for key, wrong in by_problem(credited.trace for credited in self.credited.wrong).items():
      solution, group = self._solution(key), self.credited.groups[key]
      right = [solution] if solution else []
      for index in selection.keep_right(
        [(trace.ids, trace.correct) for trace in group], self._section.max_per_problem
      ):
        right.append(group[index].ids)
      matches = core.furthest(right, [t.ids for t in wrong], variant=self._section.furthest)
      for r, w in matches:
        pair = core.arbitrary(self.prompt(key), right[r], wrong[w].ids)
        candidates.append(Candidate(wrong[w], -1, pair))
    return candidates

  def _rejected_steps(self, mode: str) -> list[tuple[Trace, int]]:
    """The step to reject in each trace, -1 for none.

    This is the pit of each wrong trace, or in mode random_step, a control, one of its steps at
    random. Mode positives_too adds the spurious step of each right trace that has one.
    """
    wrong, right = self.credited.wrong, self.credited.right
    if mode == "random_step":
      return [(credited.trace, self._random_step(credited.trace)) for credited in wrong]
    pits = first_pits(wrong, self._section)
    rejected = [(credited.trace, step) for credited, step in zip(wrong, pits, strict=True)]
    if mode == "positives_too":
      spurious = spurious_steps(right, self._section.spurious_below)
      for credited, step in zip(right, spurious, strict=True):
        if step >= 0:
          rejected.append((credited.trace, step))
    return rejected

  def _random_step(self, trace: Trace) -> int:
    seed = int(keys.draw_key(self._experiment.config.seed, "random step", 0, trace.id, "", 0)[0])
    return int(np.random.default_rng(seed).integers(len(trace.step_ends)))

  def _at_step(self, trace: Trace, step: int, mode: str) -> Candidate:
    if step < 0:
      return Candidate(trace, step, None)
    prompt, response = self.prompt(trace.problem_id), core.Response(trace.ids, trace.step_ends)
    after = self.credited.count(trace, step + 1)
    if mode in _KNOWN_SOLUTION:
      solution = self._solution(trace.problem_id)
      if not solution:
        return Candidate(trace, step, None)
      before = self.credited.count(trace, step)
      pair = _KNOWN_SOLUTION[mode](prompt, solution, response, pit=step, after=after, before=before)
      return Candidate(trace, step, pair)
    seed = int(keys.draw_key(self._experiment.config.seed, "pairs", 0, trace.id, "", step)[0])
    pair = core.shared_prefix(
      prompt,
      response,
      step,
      siblings=self._siblings(trace, step),
      after=after,
      rule=core.ChosenRule(
        self._section.continuation, self._section.choice, np.random.default_rng(seed)
      ),
    )
    return Candidate(trace, step, pair)

  def rank(self, candidate: Candidate) -> float:
    """Sort key by pairs.order; pairs.max_per_problem keeps the lowest. 0 for whole responses."""
    trace, step = candidate.trace, candidate.step
    if step < 0 or self._section.order == "sampled":
      return 0.0
    if self._section.order == "likeliest":
      return -float(np.mean(trace.logps))
    after, before = self.credited.count(trace, step + 1), self.credited.count(trace, step)
    if not after.rollouts or not before.rollouts:
      return math.inf  # unknown: a random step of a sparse schedule
    return after.successes / after.rollouts - before.successes / before.rollouts

  def _siblings(self, trace: Trace, num_steps: int) -> list[core.Sibling]:
    """The rollouts after the first `num_steps` steps of a trace; for 0, the problem's traces."""
    if num_steps == 0:
      return [
        core.Sibling(t.ids, t.step_ends, t.correct, sum(t.logps[: t.step_ends[0]]), sum(t.logps))
        for t in self.credited.groups[trace.problem_id]
        if t.ids
      ]
    estimates = self.credited.estimates
    holder = estimates[estimates[f"{trace.id}/{num_steps - 1}"].samples_at]
    if self._section.choice == "most_likely" and any(
      sample["logp"] is None for sample in holder.samples
    ):
      raise UserError(
        "pairs.choice='most_likely' needs log-probs of rollouts, but credit.endpoint returned none "
        f"for those of {holder.key}; choose another pairs.choice."
      )
    task = self._experiment.config.task
    return [
      core.Sibling(
        sample["ids"],
        steps.ends(sample["ids"], self._token_text, task),
        sample["correct"],
        sample["step_logp"],
        sample["logp"],
      )
      for sample in holder.samples
      if sample["ids"]
    ]


def build(experiment: Experiment, mode: str) -> tuple[list[Pair], dict]:
  """Builds and filters all pairs of a mode.

  Args:
    experiment: stages synthesize, sft, sample and credit are done.
    mode: a value of pairs.pair_mode or pairs.outcome_mode.

  Returns:
    (pairs; figures: number of pairs and of problems, `dropped` by reason (docs/data.md), and for
    per-step pairs the pits by step, the mean probability of a flipped label, and the number of
    right traces).

  Raises:
    UserError: too few pairs of one kind for pairs.right_fraction, or rollouts without the log-probs
      that pairs.choice needs.
  """
  section = experiment.config.pairs
  builder = Builder(experiment)
  candidates = builder.candidates(mode)
  paired = [candidate for candidate in candidates if candidate.pair]
  without_pit = 0 if mode in _WHOLE_MODES else sum(candidate.step < 0 for candidate in candidates)
  dropped = {
    "without_pit": without_pit,
    "without_alternative": len(candidates) - len(paired) - without_pit,
  }
  ranked = sorted(paired, key=builder.rank)
  kept, filtered = core.filter_pairs(
    [candidate.pair for candidate in ranked],
    [candidate.trace.problem_id for candidate in ranked],
    most=section.max_per_problem,
    max_flip=section.max_flip,
  )
  kept_keys = {ranked[index].key for index in kept}
  in_budget = _in_budget(experiment, mode, [c for c in paired if c.key in kept_keys])
  dropped |= filtered
  if section.max_pairs:
    dropped["beyond_budget"] = len(kept) - len(in_budget)
  records = [_record(candidate, mode) for candidate in in_budget]
  length = train_policy.longest_tree(experiment.config, experiment.config.dpo)
  pairs = [pair for pair in records if pair_trees.num_tokens(pair) <= length]
  dropped["too_long"] = len(records) - len(pairs)
  figures = {
    "pairs": len(pairs),
    "problems": len({pair.problem_id for pair in pairs}),
    "dropped": dropped,
  }
  right_traces = {candidate.trace.id for candidate in paired if candidate.trace.correct}
  return pairs, figures | _step_figures(pairs, right_traces)


def _record(candidate: Candidate, mode: str) -> Pair:
  trace, step, pair = candidate
  return Pair(
    id=f"{trace.id}/{mode}/{step}",
    problem_id=trace.problem_id,
    trace_id=trace.id,
    trunk=pair.trunk,
    chosen=pair.chosen,
    rejected=pair.rejected,
    pair_mode=mode,
    pit=step,
    p_flipped=pair.p_flipped,
    context=pair.context,
  )


def _in_budget(
  experiment: Experiment, mode: str, candidates: Sequence[Candidate]
) -> list[Candidate]:
  """Samples at most pairs.max_pairs candidates and keeps their order.

  A hash of trace and step decides, so a smaller budget yields a subset of a larger one. In mode
  positives_too with pairs.right_fraction, that fraction of the budget comes from right traces and
  the rest from wrong ones.

  Raises:
    UserError: too few candidates of one kind for that fraction.
  """
  section = experiment.config.pairs
  if not section.max_pairs:
    return list(candidates)

  def draw(candidate: Candidate) -> bytes:
    trace, step = candidate.trace, candidate.step
    return keys.draw_key(experiment.config.seed, "budget", 0, trace.id, "", step).tobytes()

  drawn = sorted(candidates, key=draw)
  if mode == "positives_too" and section.right_fraction >= 0:
    num_right = round(section.right_fraction * section.max_pairs)
    quotas, taken = {True: num_right, False: section.max_pairs - num_right}, []
    for right, quota in quotas.items():
      matching = [candidate for candidate in drawn if candidate.trace.correct == right]
      if len(matching) < quota:
        raise UserError(
          f"pairs.right_fraction={section.right_fraction} of pairs.max_pairs={section.max_pairs} "
          f"asks for {quota} pairs from {'right' if right else 'wrong'} traces, but only "
          f"{len(matching)} exist."
        )
      taken += matching[:quota]
  else:
    taken = drawn[: section.max_pairs]
  kept = {candidate.key for candidate in taken}
  return [candidate for candidate in candidates if candidate.key in kept]


def _step_figures(pairs: Sequence[Pair], right_traces: set[str]) -> dict:
  pits = collections.Counter(pair.pit for pair in pairs if pair.pit >= 0)
  if not pits:
    return {}
  return {
    "pits_by_step": {str(step): pits[step] for step in sorted(pits)},
    "mean_flip": round(float(np.mean([pair.p_flipped for pair in pairs])), 4),
    "from_right_traces": len({pair.trace_id for pair in pairs} & right_traces),
  }


def run(experiment: Experiment) -> dict:
  """Writes pairs/dpo/ and pairs/step_dpo/."""
  results = {name: variant(experiment, name) for name in VARIANTS}
  return {name: figures for name, figures in results.items() if figures}


def variant(experiment: Experiment, name: str) -> dict:
  """Writes pairs/<name>/pairs/, by pairs.outcome_mode for name "dpo", else by pairs.pair_mode.

  Raises:
    UserError: no pairs result, or as `build`.
  """
  leaf = VARIANTS.get(name, "pair_mode")
  mode = experiment.config.pairs[leaf]
  limits = ["pairs.max_per_problem", "pairs.max_pairs", "pairs.max_flip"]
  leaves = ["task", "model", "dpo.row_length", f"pairs.{leaf}", *limits, *_LEAVES[mode]]
  stage = experiment.stage(f"pairs/{name}", leaves, ["synthesize", "sft", "sample", "credit"])
  if stage.done:
    return {}
  pairs, figures = build(experiment, mode)
  if not pairs:
    raise UserError(
      f"Stage pairs/{name} found no pairs ({figures}). Try more traces (sample.num_traces), more "
      "rollouts (credit.num_rollouts), another pairs.pit_rule or a longer dpo.row_length."
    )
  shards = Shards(stage.folder / "pairs", Pair)
  shards.write_replicated(pairs)
  return stage.finish(figures, shards.files())
