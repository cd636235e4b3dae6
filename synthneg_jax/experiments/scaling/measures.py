"""Measures of a run folder beyond test errors: likelihoods, Q by step, many samples, compute."""

import collections
import dataclasses
import functools
import json
from collections.abc import Sequence

import numpy as np

from synthneg_jax.core import advantages
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.data import prompts
from synthneg_jax.data.credited_traces import CreditedTraces, by_problem, first_pits
from synthneg_jax.data.records import Pair, Problem, Shards, Trace
from synthneg_jax.decoding.engine import Trunk, Work
from synthneg_jax.decoding.policy import Policy
from synthneg_jax.experiments.scaling import methods
from synthneg_jax.pipeline import traces as traces_lib
from synthneg_jax.pipeline import train_policy
from synthneg_jax.pipeline.experiment import Experiment, sampling
from synthneg_jax.preflight import cost_model
from synthneg_jax.runtime import config_schema, keys, manifest
from synthneg_jax.runtime.progress import Progress
from synthneg_jax.tasks import generated
from synthneg_jax.training import reference

_MAX_RESPONSES = 4000  # scored responses of each kind


def likelihoods(experiment: Experiment) -> dict[str, list[float]]:
  """Negative log-likelihood per token under the base model: figure 3.

  Compares the teacher's solutions with one right sample of π_sft, for every problem that has one.
  The figure's axis may be a sum (UNKNOWN); the mean over tokens is ours, since lengths differ.

  Returns:
    {"D_syn": nats per token of each solution, "D_plus": of each right sample}, in the same order of
    problems.
  """
  policy, problems = experiment.base(), experiment.problems("train")
  groups = by_problem(Shards(experiment.workdir / "sample" / "traces", Trace).read(), problems)
  right = {key: next((t.ids for t in group if t.correct), None) for key, group in groups.items()}
  kept = [key for key, ids in right.items() if ids and problems[key].solution][:_MAX_RESPONSES]
  trees = []
  for key in kept:
    trunk = train_policy.prompt_ids(experiment, policy.tokenizer, problems[key])
    solution = prompts.encode_solution(policy.tokenizer, problems[key].solution)
    trees.append(Tree(trunk, tuple(Branch(len(trunk), ids) for ids in (solution, right[key]))))
  store = reference.Store(experiment.workdir / "measures" / f"likelihoods-{policy.fingerprint}.npz")
  section = experiment.config.sft
  packing = reference.Packing(experiment.mesh, section.row_length, section.logit_chunk)
  reference.score(policy.model, policy.params, trees, store=store, packing=packing)

  def nll(tree: Tree, branch: Branch) -> float:
    logp_S = store[reference.branch_key(tree.trunk, branch.fork, branch.ids)]
    return round(-float(np.mean(logp_S, dtype=np.float64)), 5)

  return {
    name: [nll(tree, tree.branches[n]) for tree in trees]
    for n, name in enumerate(("D_syn", "D_plus"))
  }


@dataclasses.dataclass(frozen=True)
class Prefixes:
  """Prefixes of one solution at which to estimate Q.

  Attributes:
    problem: of the solution.
    ids: the solution, at least up to the longest prefix.
    ends: tokens of each prefix; 0 for the bare problem.
  """

  problem: Problem
  ids: Sequence[int]
  ends: Sequence[int]


def values(
  experiment: Experiment,
  policy: Policy,
  solutions: Sequence[Prefixes],
  *,
  count: int,
  purpose: str,
) -> list[np.ndarray]:
  """Q of a policy at prefixes of solutions, by rollouts at credit.temperature.

  Args:
    experiment: provides the config.
    policy: samples the rollouts.
    solutions: with their prefixes.
    count: rollouts per prefix.
    purpose: of the random keys; different purposes give different draws.

  Returns:
    For each solution, the fraction of right rollouts from each prefix.
  """
  section, trunks = experiment.config.credit, []
  for solution in solutions:
    problem = solution.problem
    prompt = train_policy.prompt_ids(experiment, policy.tokenizer, problem)
    draws, forks = [], []
    for end in solution.ends:
      prefix_hash = keys.hash_ids(solution.ids[:end])
      for k in range(count):
        draws.append(keys.draw_key(experiment.config.seed, purpose, 0, problem.id, prefix_hash, k))
        forks.append(len(prompt) + end)
    trunks.append(Trunk(prompt + list(solution.ids[: max(solution.ends)]), forks, np.stack(draws)))
  longest = max(len(trunk.ids) for trunk in trunks)

  def work() -> Work:
    sizes = [
      [len(solution.ids) - end for end in solution.ends for _ in range(count)]
      for solution in solutions
    ]
    return Work(sizes=sizes, longest=longest)

  engine = experiment.engine(policy, work, lanes=section.lanes, slots=section.slots)
  q = [np.zeros(0)] * len(solutions)
  with Progress(f"values {purpose}", len(solutions), "solutions") as progress:
    for index, rollouts in engine.run(policy.params, trunks, sampling(section), longest=longest):
      solution = solutions[index]
      prefixes = [list(solution.ids[:end]) for end in solution.ends for _ in range(count)]
      texts = [
        policy.token_text.text(prefix + rollout.ids.tolist())
        for prefix, rollout in zip(prefixes, rollouts, strict=True)
      ]
      verdicts = traces_lib.verdicts(
        experiment,
        policy,
        texts,
        [solution.problem] * len(texts),
        [rollout.finish_reason for rollout in rollouts],
      )
      right = np.reshape([verdict.correct for verdict in verdicts], (len(solution.ends), count))
      q[index] = right.mean(axis=1)
      progress.update()
  return q


def _sampled(
  experiment: Experiment, policy: Policy, problems: Sequence[Problem], *, count: int, purpose: str
) -> list[Trace]:
  """Samples of each problem at credit.temperature, sorted by problem id, then by index."""
  trunk_ids = [
    train_policy.prompt_ids(experiment, policy.tokenizer, problem) for problem in problems
  ]
  trunks = [
    traces_lib.response_trunk(experiment, prompt, problem, purpose, count)
    for prompt, problem in zip(trunk_ids, problems, strict=True)
  ]
  c = experiment.config.engine
  request = traces_lib.Request(
    label="values", purpose=purpose, count=count, sampling=sampling(experiment.config.credit)
  )
  engine = experiment.engine(
    policy,
    lambda: traces_lib.expected_work(experiment, policy, problems, request),
    lanes=c.lanes,
    slots=min(count, c.slots),
  )
  samples = [
    (problems[i], number, sample)
    for i, completions in engine.run(policy.params, trunks, request.sampling)
    for number, sample in enumerate(completions)
  ]
  return sorted(
    traces_lib.to_records(experiment, policy, "values", samples),
    key=lambda trace: (trace.problem_id, trace.index),
  )


def _majority_right(traces: Sequence[Trace]) -> bool:
  """Whether the most frequent answer is right; ties go to the first, no answer is wrong."""
  answers = collections.Counter(trace.extracted for trace in traces if trace.extracted)
  best = answers.most_common(1)[0][0] if answers else None
  return best is not None and next(trace.correct for trace in traces if trace.extracted == best)


def _majority_at(groups: Sequence[Sequence[Trace]], k: int) -> float:
  """Fraction of right majorities over disjoint runs of k consecutive traces of each group."""
  right = [_majority_right(group[i : i + k]) for group in groups for i in range(0, len(group), k)]
  return float(np.mean(right))


def many_samples(
  experiment: Experiment, folders: Sequence[str], problems: Sequence[Problem], count: int
) -> dict[str, dict]:
  """Errors with k samples per held-out problem, for k = 1, 2, 4, ... up to `count`.

  pass@k is the unbiased estimate from all samples (https://arxiv.org/abs/2107.03374). majority@k is
  the most frequent answer of k samples, averaged over consecutive groups of k. Both are errors, as
  fractions of problems, at credit.temperature.

  Args:
    experiment: of the run folder.
    folders: stages of the policies.
    problems: held out.
    count: samples per problem, a power of two.

  Returns:
    By folder: {"k": [1, 2, ...], "pass": error for each k, "majority": error for each k}.
  """
  ks, errors = [1 << i for i in range(count.bit_length())], {}
  for folder in folders:
    policy = experiment.policy(folder)
    groups = by_problem(
      _sampled(experiment, policy, problems, count=count, purpose=f"samples of {folder}")
    )
    right_N = np.array([sum(trace.correct for trace in group) for group in groups.values()])
    errors[folder] = {
      "k": ks,
      "pass": [round(float(1 - advantages.best_of_k(right_N, count, k)[0].mean()), 5) for k in ks],
      "majority": [round(1 - _majority_at(list(groups.values()), k), 5) for k in ks],
    }
  return errors


def _tokens_trained(folder) -> int:
  """Non-padding tokens of a training stage, from its metrics."""
  rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return round(sum(row["run/step_s"] * row["run/tokens_per_s"] for row in rows))


def compute(experiment: Experiment, path: Sequence[str]) -> dict[str, float]:
  """FLOPs of the stages that a policy depends on: 6 N per trained token, 2 N per read or drawn one.

  N counts the parameters of all matrices; attention scores and norms are excluded. Trained tokens
  exclude padding. Drawn tokens are those of traces and rollouts. Each prompt is read once for all
  its samples, each trace once for the rollouts of all its prefixes, and each DPO pair once by the
  reference. The base model and the teacher are free.

  Args:
    experiment: of the run folder, with the stages done.
    path: names of the stages, such as Method.path.

  Returns:
    {stage: operations}.
  """
  policy, operations = experiment.base(), {}
  model, section = policy.model.config, experiment.config.dpo
  matrices = cost_model.matrix_params(model) + model.d_model * model.vocab_size
  problems = experiment.problems("train").values()
  prompt_tokens = sum(
    len(train_policy.prompt_ids(experiment, policy.tokenizer, problem)) for problem in problems
  )
  for name in path:
    if name == "sample":
      tokens = prompt_tokens + manifest.figures(experiment.workdir, name)["tokens"]
    elif name == "credit":
      credit, sample = (
        manifest.figures(experiment.workdir, stage) for stage in ("credit", "sample")
      )
      read = prompt_tokens / len(problems) + sample["tokens"] / sample["traces"]
      tokens = credit["rollout_tokens"] + credit["traces"] * read
    elif name == "synthesize" or "pairs/" in name:
      continue
    else:
      trained = _tokens_trained(experiment.workdir / name)
      tokens = 3 * trained + (trained / section.num_epochs if name.startswith("dpo/") else 0)
    operations[name] = round(2.0 * matrices * tokens)
  return operations


def true_pits(experiment: Experiment, folder: str) -> dict[str, dict[str, float]]:
  """Accuracy of estimated pits and pair labels, for tasks whose truth is known exactly.

  Args:
    experiment: of a run folder with credit, whose task has a `truth` (tasks/generated.py).
    folder: of the stage with the per-step pairs.

  Returns:
    "pits": for each pit rule, the fraction of wrong traces with credit whose pit is the first step
    after which a right answer is impossible. "distance": for the config's rule, fractions by
    estimated minus true step. "labels": fractions of pairs that are "right" (a right answer is
    possible after the chosen step but not after the rejected one), "flipped" (the reverse) and
    "neither".
  """
  policy, truth = experiment.policy("sft"), generated.TASKS[experiment.config.task.name].truth
  problems = experiment.problems("train")
  wrong = CreditedTraces.load(experiment.workdir, experiment.config.credit.best_of, problems).wrong

  def lines(ids: Sequence[int]) -> list[str]:
    return [line for line in policy.token_text.text(list(ids)).split("\n") if line.strip()]

  puzzles = {key: truth.read(problem.prompt) for key, problem in problems.items()}
  truth_N = np.array(
    [
      truth.true_pit(puzzles[credited.trace.problem_id], lines(credited.trace.ids))
      for credited in wrong
    ]
  )
  pits, distance = {}, {}
  for rule in config_schema.LEAVES["pairs.pit_rule"].choices:
    section = methods.with_leaves(experiment.config, {"pairs.pit_rule": rule}).pairs
    pit_N = np.array(first_pits(wrong, section))
    pits[rule] = round(float(np.mean(pit_N == truth_N)), 5)
    if rule == experiment.config.pairs.pit_rule:
      differences, counts = np.unique((pit_N - truth_N)[pit_N >= 0], return_counts=True)
      for difference, count in zip(differences, counts, strict=True):
        distance[str(difference)] = round(float(count / len(pit_N)), 5)
  prompt_size = functools.cache(
    lambda key: len(train_policy.prompt_ids(experiment, policy.tokenizer, problems[key]))
  )

  def label(pair: Pair) -> str:
    puzzle, before = puzzles[pair.problem_id], lines(pair.trunk[prompt_size(pair.problem_id) :])
    if truth.true_pit(puzzle, before) >= 0:
      return "neither"
    chosen, rejected = (
      truth.is_open(puzzle, [*before, lines(ids)[0]]) for ids in (pair.chosen, pair.rejected)
    )
    if chosen == rejected:
      return "neither"
    return "right" if chosen else "flipped"

  labels = [label(pair) for pair in Shards(experiment.workdir / folder / "pairs", Pair).read()]
  fractions = {
    name: round(labels.count(name) / len(labels), 5) for name in ("right", "flipped", "neither")
  }
  return {"pits": pits, "distance": distance, "labels": fractions}


def _valued(
  experiment: Experiment, policy: Policy, folder: str, *, problems: Sequence[Problem], count: int
) -> tuple[list[Trace], np.ndarray]:
  """One sample of each problem by a policy, with its own Q; samples without a step are excluded.

  Returns:
    (N traces; Q [N, 1 + S] of the bare problem and after each step, where the last step's Q is the
    verdict and Q beyond a trace's end is NaN).
  """
  by_id = {problem.id: problem for problem in problems}
  sampled = _sampled(experiment, policy, problems, count=1, purpose=f"values of {folder}")
  traces = [trace for trace in sampled if trace.step_ends]
  solutions = [
    Prefixes(by_id[trace.problem_id], trace.ids, [0, *trace.step_ends[:-1]]) for trace in traces
  ]
  estimates = values(experiment, policy, solutions, count=count, purpose=f"values by {folder}")
  q = np.full((len(traces), 1 + max(len(trace.step_ends) for trace in traces)), np.nan)
  for row, trace, estimate in zip(q, traces, estimates, strict=True):
    row[: len(estimate) + 1] = [*estimate, trace.correct]
  return traces, q


def _before_pits(
  traces: Sequence[Trace], q: np.ndarray, problems: Sequence[Problem]
) -> list[Prefixes]:
  """The prefixes before the pits (first lowest Q) of wrong traces."""
  by_id, prefixes = {problem.id: problem for problem in problems}, []
  for row, trace in zip(q, traces, strict=True):
    if trace.reason == "wrong":
      pit = int(np.nanargmin(row[1:]))
      end = 0 if pit == 0 else trace.step_ends[pit - 1]
      prefixes.append(Prefixes(by_id[trace.problem_id], trace.ids, [end]))
  return prefixes


def _critical(
  experiment: Experiment, policy: Policy, prefixes: Sequence[Prefixes], count: int
) -> list[float]:
  """Q of a policy from each prefix, by rollouts independent of those that determined the pits."""
  estimates = values(experiment, policy, prefixes, count=count, purpose="values at critical steps")
  return [round(float(q[0]), 4) for q in estimates]


def critical(
  experiment: Experiment, folders: Sequence[str], problems: Sequence[Problem], count: int
) -> dict[str, list]:
  """Q of policies before the pits of π_sft's wrong samples, by folder, as in `held_out`."""
  policy = experiment.policy("sft")
  prefixes = _before_pits(
    *_valued(experiment, policy, "sft", problems=problems, count=count), problems
  )
  return {
    folder: _critical(experiment, experiment.policy(folder), prefixes, count) for folder in folders
  }


def held_out(
  experiment: Experiment, folders: Sequence[str], problems: Sequence[Problem], count: int
) -> dict[str, dict]:
  """Q of policies on held-out problems, by step and at π_sft's critical steps.

  The paper does not say whose Q figure 7 shows, nor on which problems; the following is ours. By
  step: Q of a policy along its own samples, from its own rollouts; the last step's Q is the
  verdict. Critical: Q of each policy from the prefixes before the pits (first lowest Q) of π_sft's
  wrong samples. For π_sft, too, these use new rollouts, because its first ones determined the pits.

  Args:
    experiment: of the run folder.
    folders: stages of the policies; "sft" is always included.
    problems: held out.
    count: rollouts per prefix.

  Returns:
    By folder: {"start": mean V; "mean": Q after step 1, 2, ...; "responses": number that have the
    step; "critical": Q at each of π_sft's critical prefixes, in the same order}.
  """
  results, prefixes = {}, []
  for folder in dict.fromkeys(["sft", *folders]):
    policy = experiment.policy(folder)
    traces, q = _valued(experiment, policy, folder, problems=problems, count=count)
    if folder == "sft":
      prefixes = _before_pits(traces, q, problems)
    results[folder] = {
      "start": round(float(np.nanmean(q[:, 0])), 5),
      "mean": np.nanmean(q[:, 1:], axis=0).round(5).tolist(),
      "responses": np.isfinite(q[:, 1:]).sum(axis=0).tolist(),
      "critical": _critical(experiment, policy, prefixes, count),
    }
  return results


def shifts(experiment: Experiment, folders: Sequence[str], credit: str) -> dict[str, dict]:
  """Log-ratios of policies to π_sft on steps of credited traces, against the steps' advantages.

  Theorem 6.1's optimum has log π/π_sft = A/β + c(prefix). So log-ratios and advantages are taken
  relative to their means over the distinct steps from the same prefix (at least two). Ours.

  Args:
    experiment: of the run folder.
    folders: stages of the policies.
    credit: subfolder of the run folder with the credit; "" for the run folder itself.

  Returns:
    By folder: "slope" (nats per unit of advantage, least squares through the origin; the theorem's
    1/β), "correlation", "middles" and "mean" (mean advantage and log-ratio of buckets by advantage,
    both relative to the mean at their prefix), "good" and "bad" (mean log-ratio, nats, of steps
    with A > 0 and with A < 0), "steps".
  """
  problems, start = experiment.problems("train"), experiment.policy("sft")
  workdir = experiment.workdir / credit if credit else experiment.workdir
  traces = CreditedTraces.load(workdir, experiment.config.credit.best_of, problems).traces
  trees = []
  for credited in traces:
    problem = problems[credited.trace.problem_id]
    trunk = train_policy.prompt_ids(experiment, start.tokenizer, problem)
    trees.append(Tree(trunk, (Branch(len(trunk), credited.trace.ids),)))
  section = experiment.config.sft
  packing = reference.Packing(experiment.mesh, section.row_length, section.logit_chunk)

  def scored(policy: Policy) -> list[np.ndarray]:
    store = reference.Store(experiment.workdir / "measures" / f"steps-{policy.fingerprint}.npz")
    reference.score(policy.model, policy.params, trees, store=store, packing=packing)
    return [
      store[reference.branch_key(tree.trunk, len(tree.trunk), tree.branches[0].ids)]
      for tree in trees
    ]

  before, results = scored(start), {}
  for folder in folders:
    after, at_prefix = scored(experiment.policy(folder)), {}
    for credited, old_T, new_T in zip(traces, before, after, strict=True):
      trace, begin = credited.trace, 0
      for step, end in enumerate(trace.step_ends):
        if credited.advantage_known[step]:
          steps = at_prefix.setdefault((trace.problem_id, tuple(trace.ids[:begin])), {})
          ratio = float(np.sum(new_T[begin:end] - old_T[begin:end], dtype=np.float64))
          steps[tuple(trace.ids[begin:end])] = (float(credited.advantage[step]), ratio)
        begin = end
    groups = [np.array(list(steps.values())) for steps in at_prefix.values()]
    raw = np.concatenate(groups)
    advantage, ratio = np.concatenate(
      [group - group.mean(axis=0) for group in groups if len(group) > 1]
    ).T
    edges = np.linspace(-0.75, 0.75, 7)
    bucket = np.digitize(advantage, edges)
    results[folder] = {
      "slope": round(float(advantage @ ratio / (advantage @ advantage)), 4),
      "correlation": round(float(np.corrcoef(advantage, ratio)[0, 1]), 4),
      "middles": [round(float(advantage[bucket == b].mean()), 4) for b in np.unique(bucket)],
      "mean": [round(float(ratio[bucket == b].mean()), 4) for b in np.unique(bucket)],
      "good": round(float(raw[raw[:, 0] > 0, 1].mean()), 4),
      "bad": round(float(raw[raw[:, 0] < 0, 1].mean()), 4),
      "steps": len(advantage),
    }
  return results
