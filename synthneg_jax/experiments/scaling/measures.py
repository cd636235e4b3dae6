"""What figures need beyond test errors, from a run folder: likelihoods under the base, Q by step,
many samples, compute.
"""

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

_MOST_RESPONSES = 4000  # responses scored of each kind


def likelihoods(experiment: Experiment) -> dict[str, list[float]]:
  """Negative log-likelihood a token, under the base model, of D_syn's solutions and of π_sft's
  right samples: figure 3.

  The figure's axis may be a sum (UNKNOWN); a mean is ours, since lengths differ. One right sample
  of each problem that has one, and the teacher's solution of the same problems, so that both are of
  the same problems.

  Returns:
    {"D_syn": nats a token of each solution, "D_plus": the same of each right sample}, in one order
    of problems.
  """
  policy, problems = experiment.base(), experiment.problems("train")
  groups = by_problem(Shards(experiment.workdir / "sample" / "traces", Trace).read(), problems)
  right = {key: next((t.ids for t in group if t.correct), None) for key, group in groups.items()}
  kept = [key for key, ids in right.items() if ids and problems[key].solution][:_MOST_RESPONSES]
  trees = []
  for key in kept:
    trunk = train_policy.prompt_ids(experiment, policy.tokenizer, problems[key])
    solution = prompts.encode_solution(policy.tokenizer, problems[key].solution)
    trees.append(Tree(trunk, tuple(Branch(len(trunk), ids) for ids in (solution, right[key]))))
  store = reference.Store(experiment.workdir / "measures" / f"likelihoods-{policy.fingerprint}.npz")
  section = experiment.config.sft
  packing = reference.Packing(experiment.mesh, section.row_length, section.logit_chunk)
  reference.score(policy.model, policy.params, trees, store=store, packing=packing)

  def cost(tree: Tree, branch: Branch) -> float:
    logp_S = store[reference.branch_key(tree.trunk, branch.fork, branch.ids)]
    return round(-float(np.mean(logp_S, dtype=np.float64)), 5)

  return {
    name: [cost(tree, tree.branches[n]) for tree in trees]
    for n, name in enumerate(("D_syn", "D_plus"))
  }


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


def values(
  experiment: Experiment, policy: Policy, asked: Sequence[Beginnings], *, count: int, purpose: str
) -> list[np.ndarray]:
  """Q under a policy: of each prefix of each solution, the share of `count` rollouts at
  credit.temperature that come out right.

  Args:
    experiment: for the config.
    policy: that finishes the solutions.
    asked: solutions with their prefixes.
    count: rollouts a prefix.
    purpose: of the draws' keys; another one gives other draws.
  """
  section, trunks = experiment.config.credit, []
  for one in asked:
    prompt = train_policy.prompt_ids(experiment, policy.tokenizer, one.problem)
    draws = [
      keys.draw_key(
        experiment.config.seed, purpose, 0, one.problem.id, keys.hash_ids(one.ids[:end]), k
      )
      for end in one.ends
      for k in range(count)
    ]
    forks = [len(prompt) + end for end in one.ends for _ in range(count)]
    trunks.append(Trunk(prompt + list(one.ids[: max(one.ends)]), forks, np.stack(draws)))
  longest = max(len(trunk.ids) for trunk in trunks)

  def work() -> Work:
    return Work(
      sizes=[[len(one.ids) - end for end in one.ends for _ in range(count)] for one in asked],
      longest=longest,
    )

  engine = experiment.engine(policy, work, lanes=section.lanes, slots=section.slots)
  found = [np.zeros(0)] * len(asked)
  with Progress(f"values {purpose}", len(asked), "solutions") as progress:
    for index, made in engine.run(policy.params, trunks, sampling(section), longest=longest):
      one = asked[index]
      begun = [list(one.ids[:end]) for end in one.ends for _ in range(count)]
      texts = [
        policy.token_text.text(ids + each.ids.tolist())
        for ids, each in zip(begun, made, strict=True)
      ]
      verdicts = traces_lib.verdicts(
        experiment, policy, texts, [one.problem] * len(texts), [each.finish for each in made]
      )
      found[index] = np.reshape(
        [verdict.correct for verdict in verdicts], (len(one.ends), count)
      ).mean(axis=1)
      progress.update()
  return found


def _sampled(
  experiment: Experiment, policy: Policy, problems: Sequence[Problem], *, count: int, purpose: str
) -> list[Trace]:
  """Samples of each problem at credit.temperature, in the order of their problems' ids, then as
  they were drawn.
  """
  trunk_ids = [
    train_policy.prompt_ids(experiment, policy.tokenizer, problem) for problem in problems
  ]
  trunks = [
    traces_lib.trunk(experiment, prompt, problem, purpose, count)
    for prompt, problem in zip(trunk_ids, problems, strict=True)
  ]
  c = experiment.config.engine
  request = traces_lib.Request(
    label="values", purpose=purpose, count=count, sampling=sampling(experiment.config.credit)
  )
  engine = experiment.engine(
    policy,
    lambda: traces_lib.work(experiment, policy, problems, request),
    lanes=c.lanes,
    slots=min(count, c.slots),
  )
  made = [
    (problems[i], number, one)
    for i, several in engine.run(policy.params, trunks, request.sampling)
    for number, one in enumerate(several)
  ]
  return sorted(
    traces_lib.traces_of(experiment, policy, "values", made),
    key=lambda trace: (trace.problem_id, trace.index),
  )


def _most_frequent(traces: Sequence[Trace]) -> bool:
  """Whether the answer that most of the traces state is right; of equals the one that was stated
  first; none is wrong.
  """
  answers = collections.Counter(trace.extracted for trace in traces if trace.extracted)
  best = answers.most_common(1)[0][0] if answers else None
  return best is not None and next(trace.correct for trace in traces if trace.extracted == best)


def _majority_at(groups: Sequence[Sequence[Trace]], k: int) -> float:
  """Share of right majorities among all runs of k consecutive traces of each group, none counted
  twice.
  """
  return float(
    np.mean([_most_frequent(group[i : i + k]) for group in groups for i in range(0, len(group), k)])
  )


def many_samples(
  experiment: Experiment, folders: Sequence[str], problems: Sequence[Problem], count: int
) -> dict[str, dict]:
  """What k samples of a policy are worth on problems that it was not trained on, for k = 1, 2, 4,
  ... up to `count`.

  pass@k is the unbiased estimate from all samples (https://arxiv.org/abs/2107.03374); majority@k is
  the most frequent answer of k samples, the mean over consecutive groups of k. Both as errors,
  shares of problems, at credit.temperature.

  Args:
    experiment: of the run folder.
    folders: stages of the policies.
    problems: held out.
    count: samples a problem, a power of two.

  Returns:
    by folder: {"k": [1, 2, ...], "pass": error for each k, "majority": the same}.
  """
  ks, found = [1 << i for i in range(count.bit_length())], {}
  for folder in folders:
    policy = experiment.policy(folder)
    groups = by_problem(
      _sampled(experiment, policy, problems, count=count, purpose=f"samples of {folder}")
    )
    right_N = np.array([sum(trace.correct for trace in group) for group in groups.values()])
    found[folder] = {
      "k": ks,
      "pass": [round(float(1 - advantages.best_of_k(right_N, count, k)[0].mean()), 5) for k in ks],
      "majority": [round(1 - _majority_at(list(groups.values()), k), 5) for k in ks],
    }
  return found


def _tokens_trained(folder) -> int:
  """Non-padding tokens that a training stage went through, from its metrics."""
  rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return round(sum(row["run/step_s"] * row["run/tokens_per_s"] for row in rows))


def compute(experiment: Experiment, path: Sequence[str]) -> dict[str, float]:
  """Floating-point operations of the stages that a policy rests on: 6 N a token trained, 2 N a
  token read or drawn.

  N are the parameters of all matrices (attention's scores and the norms are left out). Trained
  tokens are the packed rows' without padding; drawn ones those that were kept or rolled out; each
  prompt is read once for all its samples, each trace once for the rollouts of all its prefixes, and
  each DPO pair once by the reference. The base model and the teacher are free.

  Args:
    experiment: of the run folder, where the stages are done.
    path: names of the stages, such as Method.path.

  Returns:
    {stage: operations}.
  """
  policy, found = experiment.base(), {}
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
    found[name] = round(2.0 * matrices * tokens)
  return found


def true_pits(experiment: Experiment, folder: str) -> dict[str, dict[str, float]]:
  """Estimated pits and the labels of pairs against the truth, which some generated tasks know
  exactly.

  Args:
    experiment: of a run folder with credit, whose task has a `truth` (tasks/generated.py).
    folder: of the stage that made the per-step pairs.

  Returns:
    "pits": for each pit rule the share of wrong traces with credit whose pit is the first step
    after which they cannot come out right; "distance": for the config's rule, shares by estimated
    minus true step; "labels": of pairs, shares "right" (the chosen step keeps a right end possible,
    the rejected one does not), "flipped" (the other way round) and "neither".
  """
  policy, truth = experiment.policy("sft"), generated.TASKS[experiment.config.task.name].truth
  problems = experiment.problems("train")
  wrong = CreditedTraces.load(experiment.workdir, experiment.config.credit.best_of, problems).wrong

  def lines(ids: Sequence[int]) -> list[str]:
    return [line for line in policy.token_text.text(list(ids)).split("\n") if line.strip()]

  puzzles = {key: truth.read(problem.prompt) for key, problem in problems.items()}
  truth_N = np.array(
    [truth.true_pit(puzzles[each.trace.problem_id], lines(each.trace.ids)) for each in wrong]
  )
  found = {"pits": {}, "distance": {}, "labels": collections.Counter(right=0, flipped=0, neither=0)}
  for rule in config_schema.LEAVES["pairs.pit_rule"].choices:
    section = methods.with_leaves(experiment.config, {"pairs.pit_rule": rule}).pairs
    pit_N = np.array(first_pits(wrong, section))
    found["pits"][rule] = round(float(np.mean(pit_N == truth_N)), 5)
    if rule == experiment.config.pairs.pit_rule:
      away, counts = np.unique((pit_N - truth_N)[pit_N >= 0], return_counts=True)
      found["distance"] = {
        str(n): round(float(count / len(pit_N)), 5) for n, count in zip(away, counts, strict=True)
      }
  prompt_size = functools.cache(
    lambda key: len(train_policy.prompt_ids(experiment, policy.tokenizer, problems[key]))
  )
  pairs = list(Shards(experiment.workdir / folder / "pairs", Pair).read())
  for pair in pairs:
    puzzle, before = puzzles[pair.problem_id], lines(pair.trunk[prompt_size(pair.problem_id) :])
    if truth.true_pit(puzzle, before) >= 0:
      found["labels"]["neither"] += 1
      continue
    chosen, rejected = (
      truth.is_open(puzzle, [*before, lines(ids)[0]]) for ids in (pair.chosen, pair.rejected)
    )
    found["labels"]["neither" if chosen == rejected else "right" if chosen else "flipped"] += 1
  found["labels"] = {name: round(count / len(pairs), 5) for name, count in found["labels"].items()}
  return found


def _valued(
  experiment: Experiment, policy: Policy, folder: str, problems: Sequence[Problem], count: int
) -> tuple[list[Trace], np.ndarray]:
  """One sample of each problem by the policy of a stage, those without a step left out, with the
  policy's own Q.

  Returns:
    (N traces; Q [N, 1 + S] of the bare problem and after each step, NaN beyond a trace's end; the
    last is its verdict).
  """
  by_id = {problem.id: problem for problem in problems}
  sampled = _sampled(experiment, policy, problems, count=1, purpose=f"values of {folder}")
  traces = [trace for trace in sampled if trace.step_ends]
  asked = [Beginnings(by_id[t.problem_id], t.ids, [0, *t.step_ends[:-1]]) for t in traces]
  found = values(experiment, policy, asked, count=count, purpose=f"values by {folder}")
  q = np.full((len(traces), 1 + max(len(trace.step_ends) for trace in traces)), np.nan)
  for row, trace, of_trace in zip(q, traces, found, strict=True):
    row[: len(of_trace) + 1] = [*of_trace, trace.correct]
  return traces, q


def _before_pits(
  traces: Sequence[Trace], q: np.ndarray, problems: Sequence[Problem]
) -> list[Beginnings]:
  """The prefixes before the pits (first lowest Q) of wrong traces."""
  by_id, found = {problem.id: problem for problem in problems}, []
  for row, trace in zip(q, traces, strict=True):
    if trace.reason == "wrong":
      pit = int(np.nanargmin(row[1:]))
      found.append(
        Beginnings(
          by_id[trace.problem_id], trace.ids, [0 if pit == 0 else trace.step_ends[pit - 1]]
        )
      )
  return found


def _critical(
  experiment: Experiment, policy: Policy, prefixes: Sequence[Beginnings], count: int
) -> list[float]:
  """Q of a policy from each prefix, by rollouts that drew no pit."""
  found = values(experiment, policy, prefixes, count=count, purpose="values at critical steps")
  return [round(float(one[0]), 4) for one in found]


def critical(
  experiment: Experiment, folders: Sequence[str], problems: Sequence[Problem], count: int
) -> dict[str, list]:
  """Q of policies before the pits of π_sft's wrong samples, as `held_out` has it: by folder, in one
  order of prefixes.
  """
  policy = experiment.policy("sft")
  prefixes = _before_pits(*_valued(experiment, policy, "sft", problems, count), problems)
  return {
    folder: _critical(experiment, experiment.policy(folder), prefixes, count) for folder in folders
  }


def held_out(
  experiment: Experiment, folders: Sequence[str], problems: Sequence[Problem], count: int
) -> dict[str, dict]:
  """Q of policies on problems that none was trained on: by step of their own samples, and at
  π_sft's critical steps.

  Figure 7's Q is of unknown policy and problems. By step: a policy's own samples, its own rollouts.
  Critical: the prefixes before the pits (first lowest Q) of π_sft's wrong samples, from which each
  policy finishes; drawn afresh for π_sft, too, since the pits were found by draws of its own. The
  last step's Q is its verdict. All ours.

  Args:
    experiment: of the run folder.
    folders: stages of the policies; "sft" is done in any case.
    problems: held out.
    count: rollouts a prefix.

  Returns:
    by folder: {"start": mean V; "mean": Q after step 1, 2, ...; "responses": that have the step;
    "critical": Q at each of π_sft's critical prefixes, in one order}.
  """
  made, prefixes = {}, []
  for folder in dict.fromkeys(["sft", *folders]):
    policy = experiment.policy(folder)
    traces, q = _valued(experiment, policy, folder, problems, count)
    if folder == "sft":
      prefixes = _before_pits(traces, q, problems)
    made[folder] = {
      "start": round(float(np.nanmean(q[:, 0])), 5),
      "mean": np.nanmean(q[:, 1:], axis=0).round(5).tolist(),
      "responses": np.isfinite(q[:, 1:]).sum(axis=0).tolist(),
      "critical": _critical(experiment, policy, prefixes, count),
    }
  return made


def shifts(experiment: Experiment, folders: Sequence[str], credit: str) -> dict[str, dict]:
  """How far policies moved the steps of credited traces from π_sft, against the advantages of the
  steps.

  Theorem 6.1's optimum has log π/π_sft = A/β + c(prefix). So steps that leave one prefix are
  compared: each with its log-ratio and its advantage less the mean of the distinct steps seen there
  (at least two). Ours.

  Args:
    experiment: of the run folder.
    folders: stages of the policies.
    credit: folder, in the run folder, of the stages with the credit that is asked for; "" for the
      run folder itself.

  Returns:
    by folder: "slope" (nats per unit of advantage, least squares through the origin; the theorem's
    1/β), "correlation", "middles" and "mean" (mean advantage and log-ratio of buckets by advantage,
    both less the mean at their prefix), "good" and "bad" (mean log-ratio, nats, of steps with A > 0
    and A < 0), "steps".
  """
  problems, start = experiment.problems("train"), experiment.policy("sft")
  workdir = experiment.workdir / credit if credit else experiment.workdir
  traces = CreditedTraces.load(workdir, experiment.config.credit.best_of, problems).traces
  trees = []
  for each in traces:
    trunk = train_policy.prompt_ids(experiment, start.tokenizer, problems[each.trace.problem_id])
    trees.append(Tree(trunk, (Branch(len(trunk), each.trace.ids),)))
  section = experiment.config.sft
  packing = reference.Packing(experiment.mesh, section.row_length, section.logit_chunk)

  def scored(policy: Policy) -> list[np.ndarray]:
    store = reference.Store(experiment.workdir / "measures" / f"steps-{policy.fingerprint}.npz")
    reference.score(policy.model, policy.params, trees, store=store, packing=packing)
    return [
      store[reference.branch_key(tree.trunk, len(tree.trunk), tree.branches[0].ids)]
      for tree in trees
    ]

  before = scored(start)
  found = {}
  for folder in folders:
    after, at_prefix = scored(experiment.policy(folder)), {}
    for each, old_T, new_T in zip(traces, before, after, strict=True):
      begin = 0
      for step, end in enumerate(each.trace.step_ends):
        if each.advantage_known[step]:
          prefix = (each.trace.problem_id, tuple(each.trace.ids[:begin]))
          ratio = float(np.sum(new_T[begin:end] - old_T[begin:end], dtype=np.float64))
          at_prefix.setdefault(prefix, {})[tuple(each.trace.ids[begin:end])] = (
            float(each.advantage[step]),
            ratio,
          )
        begin = end
    groups = [np.array(list(steps.values())) for steps in at_prefix.values()]
    raw = np.concatenate(groups)
    advantage, ratio = np.concatenate(
      [group - group.mean(axis=0) for group in groups if len(group) > 1]
    ).T
    edges = np.linspace(-0.75, 0.75, 7)
    bucket = np.digitize(advantage, edges)
    found[folder] = {
      "slope": round(float(advantage @ ratio / (advantage @ advantage)), 4),
      "correlation": round(float(np.corrcoef(advantage, ratio)[0, 1]), 4),
      "middles": [round(float(advantage[bucket == b].mean()), 4) for b in np.unique(bucket)],
      "mean": [round(float(ratio[bucket == b].mean()), 4) for b in np.unique(bucket)],
      "good": round(float(raw[raw[:, 0] > 0, 1].mean()), 4),
      "bad": round(float(raw[raw[:, 0] < 0, 1].mean()), 4),
      "steps": len(advantage),
    }
  return found
