"""Stage rft: finetuning on π_sft's own responses: right ones (RFT,
https://arxiv.org/abs/2308.01825), or by advantage.

With rft.objective=advantage_weighted it is equation 4 of the paper: right and wrong traces alike,
each step weighted by exp(A/β). The theorem's objective is an expectation over π_sft's own
responses; the traces here are those with credit, distinct, drawn at sample.temperature, and as many
right ones as credit.max_right_per_problem asks for.
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
from synthneg_jax.training import loop, objectives


class _Clone(NamedTuple):
  """A trace to be trained on.

  Attributes:
    trace: the record.
    scored: which of its tokens are scored; None for all.
    advantage: of each token's step, for rft.objective=advantage_weighted.
  """

  trace: Trace
  scored: Sequence[bool] | None = None
  advantage: Sequence[float] | None = None


def _is_spurious(credited: CreditedTrace, start: tuple[int, int]) -> bool:
  """Whether the counts call a step of a right trace a step back."""
  counted = [
    (0, 0) if each.exact else (each.successes, each.rollouts) for each in credited.estimates
  ]
  return bool(selection.spurious_steps(*zip(*counted, strict=True), start))


def _token_advantages(credited: CreditedTrace) -> list[float]:
  """The advantage of each token's step; -inf where it is unknown."""
  known = np.where(credited.advantage_known, credited.advantage, -np.inf)
  return np.repeat(known, np.diff([0, *credited.trace.step_ends])).tolist()


def _distinct(clones: Sequence[_Clone], section) -> list[_Clone]:
  """The clones of one problem that rft.deduplicate keeps, at most rft.max_per_problem."""
  texts, most = [clone.trace.text for clone in clones], section.max_per_problem
  rules = {
    "none": lambda: range(len(texts)),
    "equations": lambda: selection.deduplicate_by_equation_key(texts),
    "edit_distance": lambda: selection.deduplicate_by_edit_distance(texts, section.near_duplicate),
    "most_diverse": lambda: sorted(selection.most_diverse(texts, most)),
  }
  return [clones[i] for i in rules[section.deduplicate]()][:most]


def _chosen(
  experiment: Experiment, groups: Mapping[str, Sequence[Trace]]
) -> dict[str, list[_Clone]]:
  """The traces to be cloned, by problem."""
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
    return {key: _distinct(traces, section) for key, traces in chosen.items()}
  lowest = [float(each.advantage.min()) if each.known.all() else np.nan for each in credit.traces]
  for i in selection.advantage_filter(lowest, section.drop_fraction):
    trace, mask, advantage = credit.traces[i].trace, None, None
    if section.objective == "advantage_weighted":
      advantage = _token_advantages(credit.traces[i])
    if section.loss_mask != "whole":
      mask = selection.step_mask(
        credit.traces[i].advantage.tolist(), trace.step_ends, rule=section.loss_mask
      )
      if not any(mask):
        continue
    chosen[trace.problem_id].append(_Clone(trace, mask, advantage))
  return {key: _distinct(traces, section) for key, traces in chosen.items()}


def _at_most(chosen: dict[str, list[_Clone]], most: int, seed: int) -> dict[str, list[_Clone]]:
  """At most this many of all, drawn by a hash of their ids, so that fewer are among more; 0 for
  all.
  """
  if not most:
    return chosen
  every = [
    (keys.draw_key(seed, "rft", 0, clone.trace.id, "", 0).tobytes(), clone.trace.id)
    for of in chosen.values()
    for clone in of
  ]
  kept = {name for _, name in sorted(every)[:most]}
  return {
    key: [clone for clone in of_problem if clone.trace.id in kept]
    for key, of_problem in chosen.items()
  }


def _branches(
  chosen: Mapping[str, list[_Clone]],
  solutions: Mapping[str, Sequence[int]],
  fork: Callable[[str], int],
) -> dict[str, list[Branch]]:
  """By problem the branches to be cloned: the chosen traces, then the teacher's solution where
  there is one.
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
  """What rft.objective names."""
  if section.objective == "advantage_weighted":
    return objectives.make_advantage_weighted(
      model, beta=section.advantage_beta, max_weight=section.max_weight, chunk=section.logit_chunk
    )
  return objectives.make_sft(model, section.logit_chunk)


def run(experiment: Experiment, name: str = "rft") -> dict:
  """Writes <name>/policy/ and <name>/metrics.jsonl. Training starts from the base model by default,
  as in RFT's own recipe.

  Raises:
    UserError: rft.keep leaves nothing to train on, and no solution of a teacher is added.
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
  chosen = _at_most(_chosen(experiment, groups), section.max_solutions, experiment.config.seed)
  trunk = functools.cache(
    lambda key: train_policy.prompt_ids(experiment, policy.tokenizer, problems[key])
  )
  solutions = {}
  if section.with_teacher:
    texts = {key: problems[key].solution for key in chosen if problems[key].solution}
    solutions = {
      key: prompts.encode_solution(policy.tokenizer, text) for key, text in texts.items()
    }
  branches = _branches(chosen, solutions, lambda key: len(trunk(key)))
  if not any(branches.values()):
    raise UserError(
      f"Stage {name} has no response to train on: rft.keep={section.keep!r} left "
      "none of the samples."
    )
  examples, names, dropped = train_policy.branch_trees(
    {key: trunk(key) for key in branches},
    branches,
    max_branches=min(section.max_branches_per_tree, section.batch_size),
    max_tokens=train_policy.longest_tree(experiment.config, section),
  )
  plan = train_policy.plan(experiment, stage, section, policy.model, examples=examples, names=names)
  training = loop.Run(
    name=name,
    section=section,
    model=policy.model,
    objective=_objective(policy.model, section),
    batches=plan,
    mesh=experiment.mesh,
    folder=stage.folder,
  )
  identity, figures = train_policy.train(experiment, policy, training)
  counts = {
    "solutions": sum(map(len, branches.values())),
    "problems": sum(map(bool, branches.values())),
    "wrong": sum(not clone.trace.correct for of_problem in chosen.values() for clone in of_problem),
  }
  return stage.finish({**counts, "too_long": dropped, **figures}, identity=identity)
