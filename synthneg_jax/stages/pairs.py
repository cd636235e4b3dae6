"""From estimates to pairs, and from pairs to trees: what stage dpo trains on."""

import collections
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from synthneg_jax.core import advantages
from synthneg_jax.core import pairs as core
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.runtime import keys
from synthneg_jax.runtime.records import Pair, Problem, Shards, StepEstimate, Trace
from synthneg_jax.stages import traces as traces_lib
from synthneg_jax.stages import training
from synthneg_jax.stages.policies import Policy
from synthneg_jax.stages.run import Run
from synthneg_jax.tasks import prompts
from synthneg_jax.tasks.token_text import step_ends
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
  successes, rollouts = np.zeros((len(traces), width), np.int32), np.zeros((len(traces), width), np.int32)
  exact = np.full((len(traces), width), -1, np.int32)
  for n, trace in enumerate(traces):
    for step in range(len(trace.step_ends)):
      estimate = estimates[f"{trace.id}/{step}"]
      successes[n, step], rollouts[n, step] = estimate.successes, estimate.rollouts
      if estimate.exact:
        exact[n, step] = int(estimate.correct)
  q = np.asarray(advantages.best_of_k(jnp.asarray(successes), jnp.asarray(rollouts), k))
  q = np.where(exact >= 0, exact, q).astype(np.float32)
  known = (exact >= 0) | (rollouts >= k)
  counts = np.array([v0_of[trace.problem_id] for trace in traces], np.int32)
  v0 = np.asarray(
    advantages.best_of_k(jnp.asarray(counts[:, 0]), jnp.asarray(counts[:, 1]), min(k, int(counts[:, 1].min())))
  )
  return q, known, v0


def pits(q, known, v0, section) -> np.ndarray:
  """The pit of each trace by the config's rule; int [N], -1 for none."""
  rule = lambda q_S, known_S, v: advantages.first_pit(
    q_S, known_S, v, rule=section.pit_rule, drop_ratio=section.drop_ratio, min_before=section.min_before
  )
  return np.asarray(jax.jit(jax.vmap(rule))(q, known, v0))


class _Source:
  """The records of earlier stages, indexed for pair building."""

  def __init__(self, run_: Run, policy: Policy):
    self.run, self.policy = run_, policy
    self.problems = run_.problems("train")
    self.groups = traces_lib.by_problem(Shards(run_.workdir / "sample" / "traces", Trace).read())
    self.estimates = Shards(run_.workdir / "credit" / "estimates", StepEstimate).read_dict()
    credited = dict.fromkeys(estimate.trace_id for estimate in self.estimates.values())
    traces = {trace.id: trace for group in self.groups.values() for trace in group}
    self.wrong = [traces[key] for key in credited if not traces[key].correct]
    self.v0 = {key: (sum(t.correct for t in group), len(group)) for key, group in self.groups.items()}
    self._prompts = {}

  def prompt(self, problem: Problem) -> list[int]:
    if problem.id not in self._prompts:
      self._prompts[problem.id] = training.prompt_ids(self.run, self.policy, problem)
    return self._prompts[problem.id]

  def response(self, ids: Sequence[int]) -> core.Response:
    return core.Response(ids, step_ends(ids, self.policy.token_text, self.run.config.task.step_delimiter))

  def after(self, trace: Trace, steps: int) -> list[tuple[core.Response, bool]]:
    """Every rollout from the first `steps` steps of a trace, with its verdict; from none, the problem's traces."""
    if steps == 0:
      return [(core.Response(t.ids, t.step_ends), t.correct) for t in self.groups[trace.problem_id]]
    holder = self.estimates[self.estimates[f"{trace.id}/{steps - 1}"].samples_at]
    return [(self.response(sample["ids"]), sample["correct"]) for sample in holder.samples if sample["ids"]]


def _pair(source: _Source, trace: Trace, pit: int, mode: str) -> core.TokenPair | None:
  section = source.run.config.pairs
  problem = source.problems[trace.problem_id]
  prompt, wrong = source.prompt(problem), core.Response(trace.ids, trace.step_ends)
  if mode == "shared_prefix":
    after = source.after(trace, pit)
    seed = int(keys.draw_key(source.run.config.seed, "pairs", 0, trace.id, "", pit)[0])
    return core.shared_prefix(
      prompt,
      wrong,
      pit,
      [response for response, correct in after if correct],
      [(response.step(0), correct) for response, correct in after],
      continuation=section.continuation,
      choice=section.choice,
      rng=np.random.default_rng(seed),
    )
  if not problem.solution:
    return None
  solution = prompts.encode_solution(source.policy.tokenizer, problem.solution)
  if mode == "algorithm1":
    return core.algorithm1(prompt, solution, wrong, pit)
  return core.arbitrary(prompt, solution, wrong)


def build(run_: Run, policy: Policy, mode: str) -> tuple[list[Pair], dict]:
  """All pairs of a mode, at most pairs.max_per_problem a problem, none twice.

  Args:
    run_: the run.
    policy: π_sft, for its tokenizer.
    mode: algorithm1, shared_prefix or arbitrary.

  Returns:
    (pairs, figures: how many wrong traces had no pit, how many pits no alternative, where the pits lie).
  """
  section = run_.config.pairs
  source = _Source(run_, policy)
  if not source.wrong:
    return [], {"pairs": 0}
  if mode == "arbitrary":
    found = np.full(len(source.wrong), -1)
  else:
    found = pits(*values(source.wrong, source.estimates, source.v0, run_.config.credit.best_of), section)
  pairs, seen, per_problem, counts = [], set(), collections.Counter(), collections.Counter()
  for trace, pit in zip(source.wrong, found.tolist(), strict=True):
    if mode != "arbitrary" and pit < 0:
      counts["without_pit"] += 1
      continue
    pair = _pair(source, trace, pit, mode)
    if pair is None:
      counts["without_alternative"] += 1
      continue
    key = (tuple(pair.trunk), tuple(pair.rejected))
    if key in seen or pair.chosen == pair.rejected or per_problem[trace.problem_id] >= section.max_per_problem:
      counts["duplicate_or_beyond_cap"] += 1
      continue
    seen.add(key)
    per_problem[trace.problem_id] += 1
    pairs.append(
      Pair(f"{trace.id}/{mode}/{pit}", trace.problem_id, trace.id, pair.trunk, pair.chosen, pair.rejected, mode, pit)
    )
  where = collections.Counter(pair.pit for pair in pairs if pair.pit >= 0)
  figures = {"pairs": len(pairs), "problems": len(per_problem), **counts}
  if where:
    figures["pits_by_step"] = {str(step): where[step] for step in sorted(where)}
  return pairs, figures


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
