"""From estimates to pairs, and from pairs to trees: what stage dpo trains on."""

import collections
import functools
from collections.abc import Sequence

import jax
import numpy as np

from synthneg_jax.core import advantages, selection
from synthneg_jax.core import pairs as core
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.data import prompts, steps
from synthneg_jax.data.records import Pair, Shards, StepEstimate, Trace
from synthneg_jax.decoding.policy import Policy
from synthneg_jax.pipeline import traces as traces_lib
from synthneg_jax.pipeline import train_policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import keys
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training import reference
from synthneg_jax.training.batch import Example, PairInTree


def values(traces: Sequence[Trace], estimates: dict[str, StepEstimate], v0_of: dict[str, tuple[int, int]], k: int):
  """Q under Best-of-k of every step of every trace, padded to the longest.

  Args:
    traces: with estimates.
    estimates: by key.
    v0_of: (successes, samples) of each problem's bare prompt.
    k: of Best-of-k.

  Returns:
    (q float32 [N, S], known bool [N, S], v0 float32 [N]).
  """
  width = max(len(trace.step_ends) for trace in traces)
  successes, rollouts = np.zeros((2, len(traces), width), np.int32)
  exact = np.zeros((len(traces), width), bool)
  for n, trace in enumerate(traces):
    for step in range(len(trace.step_ends)):
      count = _count(estimates[f"{trace.id}/{step}"])
      successes[n, step], rollouts[n, step], exact[n, step] = count.successes, count.rollouts, count.exact
  q, known = jax.jit(advantages.best_of_k, static_argnums=2)(successes, rollouts, k, exact=exact)
  counts = np.array([v0_of[trace.problem_id] for trace in traces], np.int32)
  v0, v0_known = advantages.best_of_k(counts[:, 0], counts[:, 1], k)
  assert np.all(v0_known)  # config.check_values: sample.num_traces >= k
  return np.asarray(q), np.asarray(known), np.asarray(v0)


def _count(estimate: StepEstimate) -> core.Count:
  if estimate.exact:
    return core.Count(int(estimate.correct), 1, exact=True)
  return core.Count(estimate.successes, estimate.rollouts)


def pits(q, known, v0, section) -> np.ndarray:
  """The pit of each trace by the config's rule; int [N], -1 for none."""
  rule = lambda q_S, known_S, v: advantages.first_pit(
    q_S, known_S, v, rule=section.pit_rule, drop_ratio=section.drop_ratio, min_before=section.min_before
  )
  return np.asarray(jax.jit(jax.vmap(rule))(q, known, v0))


class Source:
  """The records of earlier stages, indexed for pair building."""

  def __init__(self, experiment: Experiment, policy: Policy):
    self.run, self.policy = experiment, policy
    self.problems = experiment.problems("train")
    self.groups = traces_lib.by_problem(Shards(experiment.workdir / "sample" / "traces", Trace).read(), self.problems)
    self.estimates = Shards(experiment.workdir / "credit" / "estimates", StepEstimate).read_dict()
    with_credit = {estimate.trace_id for estimate in self.estimates.values()}
    credited = [trace for group in self.groups.values() for trace in group if trace.id in with_credit]
    self.wrong = [trace for trace in credited if not trace.correct]
    self.right = [trace for trace in credited if trace.correct]
    self.v0 = {key: (sum(t.correct for t in group), len(group)) for key, group in self.groups.items()}
    self.prompt = functools.cache(lambda key: train_policy.prompt_ids(experiment, policy, self.problems[key]))

  def solution(self, problem_id: str) -> list[int] | None:
    """The teacher's ids, if it wrote any."""
    text = self.problems[problem_id].solution
    return prompts.encode_solution(self.policy.tokenizer, text) if text else None

  def steps(self, ids: Sequence[int]) -> list[int]:
    """Where each step of a response ends: offsets into its ids, the last their number."""
    return steps.ends(ids, self.policy.token_text, self.run.config.task)

  def count(self, trace: Trace, steps: int) -> core.Count:
    """What is known of Q after the first `steps` steps of a trace."""
    return _count(self.estimates[f"{trace.id}/{steps - 1}"]) if steps else core.Count(*self.v0[trace.problem_id])

  def siblings(self, trace: Trace, steps: int) -> list[core.Sibling]:
    """Every rollout from the first `steps` steps of a trace; from none, the problem's traces."""
    if steps == 0:
      return [
        core.Sibling(t.ids, t.step_ends, t.correct, sum(t.logps[: t.step_ends[0]]), sum(t.logps))
        for t in self.groups[trace.problem_id]
        if t.ids
      ]
    holder = self.estimates[self.estimates[f"{trace.id}/{steps - 1}"].samples_at]
    if self.run.config.pairs.choice == "most_likely" and any(sample["logp"] is None for sample in holder.samples):
      raise UserError(
        f"pairs.choice='most_likely' needs the log-probs of rollouts, and those of {holder.key} came from credit.endpoint "
        "without any; take another choice."
      )
    return [
      core.Sibling(sample["ids"], self.steps(sample["ids"]), sample["correct"], sample["step_logp"], sample["logp"])
      for sample in holder.samples
      if sample["ids"]
    ]


def _whole(source: Source, mode: str) -> list[tuple[Trace, int, core.TokenPair | None]]:
  """Pairs of whole responses, each with the wrong trace."""
  made = []
  if mode == "arbitrary":
    for trace in source.wrong:
      solution = source.solution(trace.problem_id)
      pair = core.arbitrary(source.prompt(trace.problem_id), solution, trace.ids) if solution else None
      made.append((trace, -1, pair))
    return made
  section = source.run.config.pairs
  for key, wrong in traces_lib.by_problem(source.wrong).items():
    solution, group = source.solution(key), source.groups[key]
    kept = selection.keep_right([(trace.ids, trace.correct) for trace in group], section.max_per_problem)
    right = ([solution] if solution else []) + [group[index].ids for index in kept]
    for r, w in core.furthest(right, [trace.ids for trace in wrong], variant=section.furthest):
      made.append((wrong[w], -1, core.arbitrary(source.prompt(key), right[r], wrong[w].ids)))
  return made


def _at_step(source: Source, trace: Trace, step: int, mode: str) -> core.TokenPair | None:
  """The pair that rejects one step of a trace."""
  section = source.run.config.pairs
  prompt, response = source.prompt(trace.problem_id), core.Response(trace.ids, trace.step_ends)
  after = source.count(trace, step + 1)
  if mode == "algorithm1":
    solution = source.solution(trace.problem_id)
    before = source.count(trace, step)
    return core.algorithm1(prompt, solution, response, pit=step, after=after, before=before) if solution else None
  seed = int(keys.draw_key(source.run.config.seed, "pairs", 0, trace.id, "", step)[0])
  return core.shared_prefix(
    prompt,
    response,
    step,
    siblings=source.siblings(trace, step),
    after=after,
    continuation=section.continuation,
    choice=section.choice,
    rng=np.random.default_rng(seed),
  )


def _by_step(source: Source, mode: str) -> list[tuple[Trace, int, core.TokenPair | None]]:
  """Pairs at the pit of each wrong trace, or at a step of it drawn at random (random_step, a control of ours).

  In mode positives_too also at the spurious step of each right trace.
  """
  section, k = source.run.config.pairs, source.run.config.credit.best_of
  blamed = []
  if mode == "random_step":
    for trace in source.wrong:
      seed = int(keys.draw_key(source.run.config.seed, "random step", 0, trace.id, "", 0)[0])
      blamed.append((trace, int(np.random.default_rng(seed).integers(len(trace.step_ends)))))
  elif source.wrong:
    known = values(source.wrong, source.estimates, source.v0, k)
    blamed += zip(source.wrong, pits(*known, section).tolist(), strict=True)
  if mode == "positives_too" and source.right:
    rule = functools.partial(advantages.spurious_step, below=section.spurious_below)
    found = jax.jit(jax.vmap(rule))(*values(source.right, source.estimates, source.v0, k))
    blamed += [(trace, step) for trace, step in zip(source.right, found.tolist(), strict=True) if step >= 0]
  return [(trace, step, _at_step(source, trace, step, mode) if step >= 0 else None) for trace, step in blamed]


def build(experiment: Experiment, policy: Policy, mode: str) -> tuple[list[Pair], dict]:
  """All pairs of a mode, filtered.

  Args:
    experiment: the run.
    policy: π_sft, for its tokenizer.
    mode: as pairs.pair_mode.

  Returns:
    (pairs; figures: how many traces had no pit, how many no alternative, what was dropped, where the pits lie, and the
    mean probability that a label is flipped).
  """
  section = experiment.config.pairs
  source = Source(experiment, policy)
  whole = mode in ("arbitrary", "furthest")
  made = _whole(source, mode) if whole else _by_step(source, mode)
  found = [(trace, step, pair) for trace, step, pair in made if pair]
  without_pit = 0 if whole else sum(step < 0 for _, step, _ in made)
  kept, dropped = core.filter_pairs(
    [pair for _, _, pair in found],
    [trace.problem_id for trace, _, _ in found],
    most=section.max_per_problem,
    max_flip=section.max_flip,
  )
  pairs = []
  for trace, step, pair in map(found.__getitem__, kept):
    branches = (pair.trunk, pair.chosen, pair.rejected)
    pairs.append(Pair(f"{trace.id}/{mode}/{step}", trace.problem_id, trace.id, *branches, mode, step, pair.flip))
  figures = {
    "pairs": len(pairs),
    "problems": len({pair.problem_id for pair in pairs}),
    "without_pit": without_pit,
    "without_alternative": len(made) - len(found) - without_pit,
    **dropped,
  }
  where = collections.Counter(pair.pit for pair in pairs if pair.pit >= 0)
  if where:
    figures["pits_by_step"] = {str(step): where[step] for step in sorted(where)}
    figures["mean_flip"] = round(float(np.mean([pair.flip for pair in pairs])), 4)
    figures["from_right_traces"] = len({pair.trace_id for pair in pairs} & {trace.id for trace in source.right})
  return pairs, figures


def sampler_gap(experiment: Experiment, policy: Policy, pairs: Sequence[Pair], store: reference.Store) -> float:
  """The largest difference between sampler and trainer over the rejected tokens' log-probs under π_sft, nats.

  Both passes are of one model; what lies between them is rounding, or a defect.
  """
  traces = {trace.id: trace for trace in Shards(experiment.workdir / "sample" / "traces", Trace).read()}
  problems, largest = experiment.problems("train"), 0.0
  prompt_size = functools.cache(lambda key: len(train_policy.prompt_ids(experiment, policy, problems[key])))
  for pair in pairs:
    key = reference.branch_key(pair.trunk, len(pair.trunk), pair.rejected)
    if key in store:  # not where the pair was too long
      start = len(pair.trunk) - prompt_size(pair.problem_id)
      drawn = traces[pair.trace_id].logps[start : start + len(pair.rejected)]
      largest = max(largest, float(np.max(np.abs(store[key] - np.asarray(drawn)))))
  return largest


def trees(
  pairs: Sequence[Pair], most_branches: int, length: int
) -> tuple[list[Tree], list[list[tuple[int, int]]], list[str], int]:
  """Pairs of one trunk share a tree; a branch that several pairs share stands once.

  Args:
    pairs: any.
    most_branches: branches that a tree holds at most; beyond them another tree repeats trunk and chosen.
    length: tokens that a tree holds at most; a pair that does not fit a tree alone is left out.

  Returns:
    (trees, for each tree its pairs as (chosen, rejected) branch numbers from 0, names, how many pairs were left out).
  """
  groups = {}
  for pair in pairs:
    groups.setdefault(tuple(pair.trunk), []).append(pair)
  out_trees, out_pairs, names, dropped = [], [], [], 0
  for trunk, group in groups.items():
    parts = []  # for each tree: number of each branch, pairs of numbers
    for pair in group:
      wanted = [tuple(pair.chosen), tuple(pair.rejected)]
      size = lambda branches, trunk=trunk: len(trunk) + sum(map(len, branches))
      if size(wanted) > length:
        dropped += 1
        continue
      together = {*parts[-1][0], *wanted} if parts else set()
      if not parts or len(together) > most_branches or size(together) > length:
        parts.append(({}, []))
      number_of, numbered = parts[-1]
      numbered.append(tuple(number_of.setdefault(ids, len(number_of)) for ids in wanted))
    for number_of, numbered in parts:
      out_trees.append(Tree(trunk, tuple(Branch(len(trunk), ids) for ids in number_of)))
      out_pairs.append(numbered)
      names.append(group[0].id)
  return out_trees, out_pairs, names, dropped


def examples(out_trees, out_pairs, store: reference.Store) -> list[Example]:
  """Trees with their pairs, reference log-probs filled in."""

  def reference_sum(tree: Tree, number: int) -> float:
    branch = tree.branches[number]
    return float(np.sum(store[reference.branch_key(tree.trunk, branch.fork, branch.ids)], dtype=np.float64))

  return [
    Example(
      tree,
      tuple(
        PairInTree(chosen, rejected, reference_sum(tree, chosen), reference_sum(tree, rejected))
        for chosen, rejected in numbered
      ),
    )
    for tree, numbered in zip(out_trees, out_pairs, strict=True)
  ]
