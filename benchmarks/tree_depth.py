"""Tokens that token trees save over separate sequences, and what depth adds, for a finished run.

    python -m benchmarks.tree_depth --config=arithmetic --workdir=DIR

Counts tokens only: nothing is trained, and rows are not packed. Rows of stages that the run has not
finished are left out.
"""

import os
from collections.abc import Iterable, Sequence

from absl import flags

from synthneg_jax.core.tree import Branch, Tree, merge_prefixes
from synthneg_jax.data.credited_traces import by_problem
from synthneg_jax.data.records import Pair, Shards, StepEstimate, Trace
from synthneg_jax.pipeline import train_policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import startup


def tokens(trunk: Sequence[int], branches: Sequence[Branch]) -> tuple[int, int, int]:
  """(tokens of separate sequences, of one trunk with a branch each, of the deepest tree)."""
  separate = sum(branch.fork + len(branch.ids) for branch in branches)
  return (
    separate,
    Tree(trunk, tuple(branches)).num_tokens,
    merge_prefixes(trunk, branches).num_tokens,
  )


def pair_tokens(prompt: Sequence[int], pairs: Sequence[Pair]) -> tuple[int, int, int]:
  """As `tokens`, for the pairs of one problem; the second layout has a tree for each trunk."""
  by_trunk, all_branches = {}, {}
  for pair in pairs:
    prefix = tuple(pair.trunk[len(prompt) :])
    for ids, context in ((pair.chosen, 0), (pair.rejected, pair.context)):
      scored = (False,) * (len(prefix) + context) + (True,) * (len(ids) - context)
      by_trunk.setdefault(tuple(pair.trunk), set()).add((tuple(ids), context))
      all_branches[(*prefix, *ids), scored] = Branch(len(prompt), (*prefix, *ids), scored)
  separate = sum(2 * len(pair.trunk) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
  by_fork = sum(
    len(trunk) + sum(len(ids) for ids, _ in branches) for trunk, branches in by_trunk.items()
  )
  return separate, by_fork, merge_prefixes(prompt, list(all_branches.values())).num_tokens


def table(rows: Iterable[tuple[str, Sequence[tuple[int, int, int]]]]) -> str:
  """The sums of each row as Markdown."""
  lines = ["| what | sequences | one fork | any depth | depth saves |", "|---|---|---|---|---|"]
  for name, counts in rows:
    separate, one_fork, deep = map(sum, zip(*counts, strict=True))
    lines.append(f"| {name} | {separate:,} | {one_fork:,} | {deep:,} | {1 - deep / one_fork:.0%} |")
  return "\n".join(lines)


def main() -> None:
  experiment = Experiment.open(flags.FLAGS.config, flags.FLAGS.workdir)
  problems, workdir = experiment.problems("train"), experiment.workdir
  tokenizer = experiment.policy("sft").tokenizer
  prompts = {
    key: train_policy.prompt_ids(experiment, tokenizer, problem)
    for key, problem in problems.items()
  }

  def traces(kept) -> list[tuple[int, int, int]]:
    groups = by_problem(filter(kept, Shards(workdir / "sample" / "traces", Trace).read()), problems)
    counts = []
    for key, group in groups.items():
      distinct = dict.fromkeys(tuple(trace.ids) for trace in group)
      counts.append(tokens(prompts[key], [Branch(len(prompts[key]), ids) for ids in distinct]))
    return counts

  rows = [
    ("all samples of a problem", traces(lambda trace: True)),
    ("RFT: right samples of a problem", traces(lambda trace: trace.correct)),
  ]
  if (workdir / "credit" / "manifest.json").exists():
    estimates = Shards(workdir / "credit" / "estimates", StepEstimate).read()
    credited = {estimate.trace_id for estimate in estimates}
    kept = traces(lambda trace: trace.id in credited)
    rows.append(("credit: traces whose steps get rollouts", kept))
  if (workdir / "pairs" / "step_dpo" / "manifest.json").exists():
    pairs = {}
    for pair in Shards(workdir / "pairs" / "step_dpo" / "pairs", Pair).read():
      pairs.setdefault(pair.problem_id, []).append(pair)
    counts = [pair_tokens(prompts[key], group) for key, group in pairs.items()]
    rows.append(("per-step pairs", counts))
  print(table(rows))


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  startup.define_flags()
  startup.run(main)
