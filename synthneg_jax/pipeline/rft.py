"""Stage rft: fine-tunes on π_sft's own responses.

rft.keep selects the responses: right ones (RFT, https://arxiv.org/abs/2308.01825) or by advantage.
rft.objective=advantage_weighted is equation 4 of the paper: each step of right and wrong traces is
weighted by exp(A/β). The theorem's expectation is over π_sft's own responses; ours are the traces
with credit: distinct, sampled at sample.temperature, with at most credit.max_right_per_problem
right ones per problem.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from synthneg_jax.core import selection
from synthneg_jax.core.tree import Branch
from synthneg_jax.data import prompts
from synthneg_jax.data.credited_traces import CreditedTrace, CreditedTraces, by_problem
from synthneg_jax.data.records import Shards, Trace
from synthneg_jax.models.decoder import Model
from synthneg_jax.pipeline import train_policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import keys
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training import objectives


class _Clone(NamedTuple):
  """A trace to train on.

  Attributes:
    trace: the record.
    scored: True for tokens that are scored; None for all.
    advantage: each token's step advantage, for rft.objective=advantage_weighted.
  """

  trace: Trace
  scored: Sequence[bool] | None = None
  advantage: Sequence[float] | None = None


def _is_spurious(credited: CreditedTrace, start: tuple[int, int]) -> bool:
  """Whether rollout counts show that a step of a right trace lowers Q.

  Args:
    credited: a right trace.
    start: (right, all) samples of its problem.
  """
  counts = [
    (0, 0) if estimate.exact else (estimate.successes, estimate.rollouts)
    for estimate in credited.estimates
  ]
  return bool(selection.spurious_steps(*zip(*counts, strict=True), start))


def _token_advantages(credited: CreditedTrace) -> list[float]:
  """The advantage of each token's step; -inf if unknown."""
  advantage = np.where(credited.advantage_known, credited.advantage, -np.inf)
  return np.repeat(advantage, np.diff([0, *credited.trace.step_ends])).tolist()


def _distinct(clones: Sequence[_Clone], section) -> list[_Clone]:
  """Applies rft.deduplicate and rft.max_per_problem to one problem's traces."""
  texts, most = [clone.trace.text for clone in clones], section.max_per_problem
  if section.deduplicate == "equations":
    kept = selection.deduplicate_by_equation_key(texts)
  elif section.deduplicate == "edit_distance":
    kept = selection.deduplicate_by_edit_distance(texts, section.near_duplicate)
  elif section.deduplicate == "most_diverse":
    kept = sorted(selection.most_diverse(texts, most))
  else:
    kept = range(len(texts))
  return [clones[i] for i in kept[:most]]


def _chosen(
  experiment: Experiment, groups: Mapping[str, Sequence[Trace]]
) -> dict[str, list[_Clone]]:
  """The traces to train on, by problem."""
  section, chosen = experiment.config.rft, {key: [] for key in groups}
  if section.keep == "right":
    for key, group in groups.items():
      kept = selection.keep_right([(trace.ids, trace.correct) for trace in group], len(group))
      chosen[key] = _distinct([_Clone(group[i]) for i in kept], section)
    return chosen
  credit = CreditedTraces.load(experiment.workdir, experiment.config.credit.best_of, groups)
  if section.keep in ("spurious", "clean"):
    for credited in credit.right:
      key = credited.trace.problem_id
      if _is_spurious(credited, credit.start[key]) == (section.keep == "spurious"):
        chosen[key].append(_Clone(credited.trace))
    return {key: _distinct(clones, section) for key, clones in chosen.items()}
  lowest = [
    float(credited.advantage.min()) if credited.known.all() else np.nan
    for credited in credit.traces
  ]
  for i in selection.advantage_filter(lowest, section.drop_fraction):
    credited, scored, advantage = credit.traces[i], None, None
    trace = credited.trace
    if section.objective == "advantage_weighted":
      advantage = _token_advantages(credited)
    if section.loss_mask != "whole":
      scored = selection.step_mask(
        credited.advantage.tolist(), trace.step_ends, rule=section.loss_mask
      )
      if not any(scored):
        continue
    chosen[trace.problem_id].append(_Clone(trace, scored, advantage))
  return {key: _distinct(clones, section) for key, clones in chosen.items()}


def _subsample(chosen: dict[str, list[_Clone]], most: int, seed: int) -> dict[str, list[_Clone]]:
  """Keeps at most `most` traces in all; 0 keeps all.

  A hash of the trace id decides, so a smaller limit yields a subset of a larger one.
  """
  if not most:
    return chosen
  draws = []
  for clones in chosen.values():
    for clone in clones:
      draws.append((keys.draw_key(seed, "rft", 0, clone.trace.id, "", 0).tobytes(), clone.trace.id))
  kept = {trace_id for _, trace_id in sorted(draws)[:most]}
  return {
    key: [clone for clone in clones if clone.trace.id in kept] for key, clones in chosen.items()
  }


def _branches(
  chosen: Mapping[str, list[_Clone]],
  solutions: Mapping[str, Sequence[int]],
  fork: Callable[[str], int],
) -> dict[str, list[Branch]]:
  """Branches to train on by problem: the chosen traces, then the teacher's solution, if any.

  Args:
    chosen: traces by problem.
    solutions: token ids of the teacher's solutions by problem.
    fork: returns the length of a problem's trunk.
  """
  branches = {
    key: [
      Branch(fork(key), tuple(trace.ids), scored, advantage=advantage)
      for trace, scored, advantage in clones
    ]
    for key, clones in chosen.items()
  }
  for key, ids in solutions.items():
    branches[key].append(Branch(fork(key), tuple(ids)))
  return branches


def _objective(model: Model, section):
  """The training objective of rft.objective."""
  if section.objective == "advantage_weighted":
    return objectives.make_advantage_weighted(
      model, beta=section.advantage_beta, max_weight=section.max_weight, chunk=section.logit_chunk
    )
  return objectives.make_sft(model, section.logit_chunk)


def run(experiment: Experiment, name: str = "rft") -> dict:
  """Writes <name>/policy/ and <name>/metrics.jsonl.

  By default training starts from the base model, as in RFT.

  Raises:
    UserError: nothing to train on.
  """
  section = experiment.config.rft
  reads_base, by_credit = section.start == "base", section.keep != "right"
  needs = ["synthesize", "sft", "sample"] + ["credit"] * by_credit
  sections = ["task", "model", "rft"] + ["credit"] * by_credit
  stage = experiment.stage(name, sections, needs, reads_base=reads_base)
  if stage.done:
    return {}
  policy = experiment.base() if reads_base else experiment.policy("sft")
  problems = experiment.problems("train")
  groups = by_problem(Shards(experiment.workdir / "sample" / "traces", Trace).read(), problems)
  chosen = _subsample(_chosen(experiment, groups), section.max_solutions, experiment.config.seed)

  @functools.cache
  def trunk(key: str) -> list[int]:
    return train_policy.prompt_ids(experiment, policy.tokenizer, problems[key])

  solutions = {}
  if section.with_teacher:
    for key in chosen:
      if text := problems[key].solution:
        solutions[key] = prompts.encode_solution(policy.tokenizer, text)
  branches = _branches(chosen, solutions, lambda key: len(trunk(key)))
  if not any(branches.values()):
    raise UserError(
      f"Stage {name} has no response to train on: rft.keep={section.keep!r} selects no sample."
    )
  trees = train_policy.branch_trees(
    {key: trunk(key) for key in branches},
    branches,
    max_branches=min(section.max_branches_per_tree, section.batch_size),
    max_tokens=train_policy.longest_tree(experiment.config, section),
  )
  training = train_policy.make_run(
    experiment,
    stage,
    section,
    model=policy.model,
    objective=_objective(policy.model, section),
    trees=trees,
  )
  identity, figures = train_policy.train(experiment, policy, training)
  counts = {
    "solutions": sum(map(len, branches.values())),
    "problems": sum(map(bool, branches.values())),
    "wrong": sum(not clone.trace.correct for clones in chosen.values() for clone in clones),
    "too_long": trees.dropped,
  }
  return stage.finish({**counts, **figures}, identity=identity)
