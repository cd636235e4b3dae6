"""Stage pairs: from traces and their credit to preference pairs, which stage dpo trains on.

Two variants, each a stage of its own: pairs/dpo (whole responses, by pairs.outcome_mode) and
pairs/step_dpo (by pairs.pair_mode). What the modes mean is in core/pairs.py and docs/method.md.
"""

import collections
import functools
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

WHOLE_MODES = ("arbitrary", "furthest")
# by the leaf of section `pairs` that holds their mode
VARIANTS = {"dpo": "outcome_mode", "step_dpo": "pair_mode"}
_PITS = ("pairs.pit_rule", "pairs.drop_ratio", "pairs.min_before", "pairs.order", "credit.best_of")
_SIBLINGS = ("pairs.continuation", "pairs.choice")
_READS = {  # leaves that a mode depends on, besides those of all modes
  "arbitrary": (),
  "furthest": ("pairs.furthest",),
  "algorithm1": _PITS,
  "prefix_protected": _PITS,
  "shared_prefix": (*_PITS, *_SIBLINGS),
  "positives_too": (*_PITS, *_SIBLINGS, "pairs.spurious_below", "pairs.right_fraction"),
  "random_step": (*_SIBLINGS, "pairs.order"),
}


# modes that choose y
_KNOWN_SOLUTION = {"algorithm1": core.algorithm1, "prefix_protected": core.prefix_protected}


class Candidate(NamedTuple):
  """A pair before filtering: the blamed trace and step (-1: the whole response, or no pit), and the
  pair if there is one.
  """

  trace: Trace
  step: int
  pair: core.TokenPair | None


class Builder:
  """Builds pairs from the records of earlier stages.

  Attributes:
    problems: by id.
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
    """Prompt ids of a problem."""
    return train_policy.prompt_ids(self._experiment, self._tokenizer, self.problems[problem_id])

  def candidates(self, mode: str) -> list[Candidate]:
    """Every pair of a mode, before filtering, and the traces that gave none."""
    if mode == "arbitrary":
      return [self._arbitrary(credited.trace) for credited in self.credited.wrong]
    if mode == "furthest":
      return self._furthest()
    return [self._at_step(trace, step, mode) for trace, step in self._blamed(mode)]

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
      kept = selection.keep_right(
        [(trace.ids, trace.correct) for trace in group], self._section.max_per_problem
      )
      right = ([solution] if solution else []) + [group[index].ids for index in kept]
      for r, w in core.furthest(
        right, [trace.ids for trace in wrong], variant=self._section.furthest
      ):
        candidates.append(
          Candidate(wrong[w], -1, core.arbitrary(self.prompt(key), right[r], wrong[w].ids))
        )
    return candidates

  def _blamed(self, mode: str) -> list[tuple[Trace, int]]:
    """Which step of which trace is rejected.

    The pit of each wrong trace, or a step of it drawn at random (random_step, a control of ours);
    with positives_too also the spurious step of each right trace.
    """
    wrong, right = self.credited.wrong, self.credited.right
    if mode == "random_step":
      return [(credited.trace, self._random_step(credited.trace)) for credited in wrong]
    blamed = [
      (each.trace, step) for each, step in zip(wrong, first_pits(wrong, self._section), strict=True)
    ]
    if mode == "positives_too":
      spurious = spurious_steps(right, self._section.spurious_below)
      blamed += [
        (each.trace, step) for each, step in zip(right, spurious, strict=True) if step >= 0
      ]
    return blamed

  def _random_step(self, trace: Trace) -> int:
    seed = int(keys.draw_key(self._experiment.config.seed, "random step", 0, trace.id, "", 0)[0])
    return int(np.random.default_rng(seed).integers(len(trace.step_ends)))

  def _at_step(self, trace: Trace, step: int, mode: str) -> Candidate:
    if step < 0:
      return Candidate(trace, step, None)
    prompt, response = self.prompt(trace.problem_id), core.Response(trace.ids, trace.step_ends)
    after = self.credited.count(trace, step + 1)
    if mode in _KNOWN_SOLUTION:
      solution, before = self._solution(trace.problem_id), self.credited.count(trace, step)
      make = _KNOWN_SOLUTION[mode]
      pair = (
        make(prompt, solution, response, pit=step, after=after, before=before) if solution else None
      )
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
    """What candidates are sorted by, lowest first, before pairs.max_per_problem cuts; equal for
    pairs of whole responses.
    """
    trace, step = candidate.trace, candidate.step
    if step < 0 or self._section.order == "sampled":
      return 0.0
    if self._section.order == "likeliest":
      return -float(np.mean(trace.logps))
    after, before = self.credited.count(trace, step + 1), self.credited.count(trace, step)
    return after.successes / after.rollouts - before.successes / before.rollouts

  def _siblings(self, trace: Trace, num_steps: int) -> list[core.Sibling]:
    """The rollouts from the first `num_steps` steps of a trace; for 0, the problem's traces."""
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
        f"pairs.choice='most_likely' needs log-probs of rollouts, and those of {holder.key} came "
        "from credit.endpoint without any; choose another pairs.choice."
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
  """All pairs of a mode, filtered.

  Args:
    experiment: with stages synthesize, sft, sample and credit done.
    mode: as pairs.pair_mode.

  Returns:
    (pairs; figures: pairs, problems, `dropped` by reason (docs/data.md), and of per-step pairs the
    pits by step, the mean probability that a label is flipped, and how many pairs come from right
    traces).
  """
  section = experiment.config.pairs
  builder = Builder(experiment)
  candidates = builder.candidates(mode)
  found = [candidate for candidate in candidates if candidate.pair]
  without_pit = 0 if mode in WHOLE_MODES else sum(candidate.step < 0 for candidate in candidates)
  dropped = {
    "without_pit": without_pit,
    "without_alternative": len(candidates) - len(found) - without_pit,
  }
  pairs, too_long = [], 0
  length = train_policy.longest_tree(experiment.config, experiment.config.dpo)
  preferred = sorted(found, key=builder.rank)
  kept, filtered = core.filter_pairs(
    [candidate.pair for candidate in preferred],
    [candidate.trace.problem_id for candidate in preferred],
    most=section.max_per_problem,
    max_flip=section.max_flip,
  )
  within = {(preferred[index].trace.id, preferred[index].step) for index in kept}
  in_budget = _in_budget(
    experiment, mode, [each for each in found if (each.trace.id, each.step) in within]
  )
  beyond = {"beyond_budget": len(kept) - len(in_budget)} if section.max_pairs else {}
  for trace, step, made in in_budget:
    branches = (made.trunk, made.chosen, made.rejected)
    pair = Pair(
      f"{trace.id}/{mode}/{step}",
      trace.problem_id,
      trace.id,
      *branches,
      mode,
      step,
      made.flip,
      made.context,
    )
    if pair_trees.num_tokens(pair) > length:
      too_long += 1
    else:
      pairs.append(pair)
  figures = {
    "pairs": len(pairs),
    "problems": len({pair.problem_id for pair in pairs}),
    "dropped": {**dropped, **filtered, **beyond, "too_long": too_long},
  }
  return pairs, figures | _step_figures(
    pairs, {candidate.trace.id for candidate in found if candidate.trace.correct}
  )


def _in_budget(
  experiment: Experiment, mode: str, candidates: Sequence[Candidate]
) -> list[Candidate]:
  """At most pairs.max_pairs of them, in their order, drawn by a hash of their traces, so that fewer
  are among more.

  In mode positives_too with pairs.right_fraction, that share of the budget comes from right traces,
  the rest from wrong ones.

  Raises:
    UserError: too few of one kind for that share.
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
    wanted, taken = {True: num_right, False: section.max_pairs - num_right}, []
    for right, count in wanted.items():
      of_kind = [candidate for candidate in drawn if candidate.trace.correct == right]
      if len(of_kind) < count:
        raise UserError(
          f"pairs.right_fraction={section.right_fraction} of pairs.max_pairs={section.max_pairs} "
          f"asks for {count} pairs from {'right' if right else 'wrong'} traces, and there are "
          f"{len(of_kind)}."
        )
      taken += of_kind[:count]
  else:
    taken = drawn[: section.max_pairs]
  kept = {(candidate.trace.id, candidate.step) for candidate in taken}
  return [candidate for candidate in candidates if (candidate.trace.id, candidate.step) in kept]


def _step_figures(pairs: Sequence[Pair], right_traces: set[str]) -> dict:
  where = collections.Counter(pair.pit for pair in pairs if pair.pit >= 0)
  if not where:
    return {}
  return {
    "pits_by_step": {str(step): where[step] for step in sorted(where)},
    "mean_flip": round(float(np.mean([pair.flip for pair in pairs])), 4),
    "from_right_traces": len({pair.trace_id for pair in pairs} & right_traces),
  }


def run(experiment: Experiment) -> dict:
  """Writes pairs/dpo/ and pairs/step_dpo/."""
  results = {name: variant(experiment, name) for name in VARIANTS}
  return {name: figures for name, figures in results.items() if figures}


def variant(experiment: Experiment, name: str) -> dict:
  """Writes pairs/<name>/pairs/: those of pairs.outcome_mode where the name is "dpo", else those of
  pairs.pair_mode.

  Raises:
    UserError: there is no pair.
  """
  leaf = VARIANTS.get(name, "pair_mode")
  mode = experiment.config.pairs[leaf]
  stage = experiment.stage(
    f"pairs/{name}",
    [
      "task",
      "model",
      "dpo.row_length",
      f"pairs.{leaf}",
      "pairs.max_per_problem",
      "pairs.max_pairs",
      "pairs.max_flip",
      *_READS[mode],
    ],
    ["synthesize", "sft", "sample", "credit"],
  )
  if stage.done:
    return {}
  pairs, figures = build(experiment, mode)
  if not pairs:
    raise UserError(
      f"Stage pairs/{name} found no pair ({figures}): more traces (sample.num_traces), more "
      "rollouts (credit.num_rollouts), another pairs.pit_rule or a longer dpo.row_length may give "
      "some."
    )
  shards = Shards(stage.folder / "pairs", Pair)
  shards.write_shared(pairs)
  return stage.finish(figures, shards.files())
