"""What figures need beyond test errors, measured in a run folder: likelihoods under the base, Q by step under each policy."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.rollouts.engine import Trunk
from synthneg_jax.runtime import keys
from synthneg_jax.runtime.progress import Progress
from synthneg_jax.runtime.records import Problem, Shards, Trace
from synthneg_jax.stages import traces as traces_lib
from synthneg_jax.stages import training
from synthneg_jax.stages.policies import Policy
from synthneg_jax.stages.run import Run, sampling
from synthneg_jax.tasks import prompts
from synthneg_jax.training import reference

_MOST_RESPONSES = 4000  # responses scored of each kind


def likelihoods(run_: Run) -> dict[str, list[float]]:
  """Negative log-likelihood a token, under the base model, of D_syn's solutions and of π_sft's right samples: figure 3.

  The figure's axis may be a sum (UNKNOWN); a mean is ours, since lengths differ. One right sample of each problem that has
  one, and the teacher's solution of the same problems, so that both are of the same problems.

  Returns:
    {"D_syn": nats a token of each solution, "D_plus": the same of each right sample}, in one order of problems.
  """
  policy, problems = run_.base(), run_.problems("train")
  groups = traces_lib.by_problem(Shards(run_.workdir / "sample" / "traces", Trace).read(), problems)
  right = {key: next((t.ids for t in group if t.correct), None) for key, group in groups.items()}
  kept = [key for key, ids in right.items() if ids and problems[key].solution][:_MOST_RESPONSES]
  trees = []
  for key in kept:
    trunk = training.prompt_ids(run_, policy, problems[key])
    solution = prompts.encode_solution(policy.tokenizer, problems[key].solution)
    trees.append(Tree(trunk, tuple(Branch(len(trunk), ids) for ids in (solution, right[key]))))
  store = reference.Store(run_.workdir / "measures" / f"likelihoods-{policy.fingerprint}.npz")
  section = run_.config.sft
  reference.score(policy.model, policy.params, trees, section.row_length, run_.mesh, store, section.logit_chunk)
  cost = lambda tree, n: (
    -float(
      np.mean(store[reference.branch_key(tree.trunk, tree.branches[n].fork, tree.branches[n].ids)], dtype=np.float64)
    )
  )
  return {name: [round(cost(tree, n), 5) for tree in trees] for n, name in enumerate(("D_syn", "D_plus"))}


@dataclasses.dataclass(frozen=True)
class Beginnings:
  """Prefixes of one solution, of which Q is asked.

  Attributes:
    problem: that it solves.
    ids: the solution, or as much of it as is needed.
    ends: tokens of each prefix; 0 for the bare problem.
  """

  problem: Problem
  ids: Sequence[int]
  ends: Sequence[int]


def values(run_: Run, policy: Policy, asked: Sequence[Beginnings], count: int, purpose: str) -> list[np.ndarray]:
  """Q under a policy: of each prefix of each solution, the share of `count` rollouts at credit.temperature that come out right.

  Args:
    run_: for the config.
    policy: that finishes the solutions.
    asked: solutions with their prefixes.
    count: rollouts a prefix.
    purpose: of the draws' keys; another one gives other draws.
  """
  section, trunks = run_.config.credit, []
  for one in asked:
    prompt = training.prompt_ids(run_, policy, one.problem)
    draws = [
      keys.draw_key(run_.config.seed, purpose, 0, one.problem.id, keys.hash_ids(one.ids[:end]), k)
      for end in one.ends
      for k in range(count)
    ]
    forks = [len(prompt) + end for end in one.ends for _ in range(count)]
    trunks.append(Trunk(prompt + list(one.ids[: max(one.ends)]), forks, np.stack(draws)))
  engine = run_.engine(policy, lanes=section.lanes, slots=section.slots)
  longest = max(len(trunk.ids) for trunk in trunks)
  found = [np.zeros(0)] * len(asked)
  with Progress(f"values {purpose}", len(asked), "solutions") as progress:
    for index, made in engine.run(policy.params, trunks, sampling(section), longest):
      one = asked[index]
      begun = [list(one.ids[:end]) for end in one.ends for _ in range(count)]
      texts = [policy.token_text.text(ids + each.ids.tolist()) for ids, each in zip(begun, made, strict=True)]
      verdicts = traces_lib.verdicts(run_, texts, [one.problem.answer] * len(texts), [each.finish for each in made])
      found[index] = np.reshape([verdict.correct for verdict in verdicts], (len(one.ends), count)).mean(axis=1)
      progress.update()
  return found


def _sampled(run_: Run, policy: Policy, folder: str, problems: Sequence[Problem]) -> list[Trace]:
  """One sample of each problem at credit.temperature, in the order of their ids."""
  prompt = lambda problem: training.prompt_ids(run_, policy, problem)
  trunks = [traces_lib.trunk(run_, prompt(problem), problem, f"values of {folder}", 1) for problem in problems]
  made = [
    (problems[i], 0, one[0])
    for i, one in run_.engine(policy, slots=1).run(policy.params, trunks, sampling(run_.config.credit))
  ]
  return sorted(traces_lib.traces_of(run_, policy, "values", made), key=lambda trace: trace.problem_id)


def held_out(run_: Run, folders: Sequence[str], problems: Sequence[Problem], count: int) -> dict[str, dict]:
  """Q of policies on problems that none was trained on: by step of their own samples, and at π_sft's critical steps.

  Figure 7's Q is of unknown policy and problems. By step: a policy's own samples, its own rollouts. Critical: the prefixes
  before the pits (first lowest Q) of π_sft's wrong samples, from which each policy finishes; drawn afresh for π_sft, too,
  since the pits were found by draws of its own. The last step's Q is its verdict. All ours.

  Args:
    run_: of the run folder.
    folders: stages of the policies; "sft" is done in any case.
    problems: held out.
    count: rollouts a prefix.

  Returns:
    by folder: {"start": mean V; "mean": Q after step 1, 2, ...; "responses": that have the step; "critical": Q at each of
    π_sft's critical prefixes, in one order}.
  """
  by_id, made, critical = {problem.id: problem for problem in problems}, {}, []
  for folder in dict.fromkeys(["sft", *folders]):
    policy = run_.policy(folder)
    traces = [trace for trace in _sampled(run_, policy, folder, problems) if trace.step_ends]
    asked = [Beginnings(by_id[t.problem_id], t.ids, [0, *t.step_ends[:-1]]) for t in traces]
    found = values(run_, policy, asked, count, f"values by {folder}")
    q = np.full((len(traces), 1 + max(len(trace.step_ends) for trace in traces)), np.nan)
    for row, trace, of_trace in zip(q, traces, found, strict=True):
      row[: len(of_trace) + 1] = [*of_trace, trace.correct]
    if folder == "sft":
      for row, trace in zip(q, traces, strict=True):
        if trace.reason == "wrong":
          pit = int(np.nanargmin(row[1:]))
          critical.append(Beginnings(by_id[trace.problem_id], trace.ids, [0 if pit == 0 else trace.step_ends[pit - 1]]))
    made[folder] = {
      "start": round(float(np.nanmean(q[:, 0])), 5),
      "mean": np.nanmean(q[:, 1:], axis=0).round(5).tolist(),
      "responses": np.isfinite(q[:, 1:]).sum(axis=0).tolist(),
      "critical": [
        round(float(one[0]), 4) for one in values(run_, policy, critical, count, "values at critical steps")
      ],
    }
  return made
