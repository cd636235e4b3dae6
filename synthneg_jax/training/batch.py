"""A training batch: rows of packed trees, their scored tokens, and pairs of branches."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from synthneg_jax.core import tree as tree_lib


@dataclasses.dataclass(frozen=True)
class PairInTree:
  """Branch numbers of a pair in its tree, with the reference's summed log-probs in nats."""

  chosen: int
  rejected: int
  ref_chosen: float = 0.0
  ref_rejected: float = 0.0


@dataclasses.dataclass(frozen=True)
class Example:
  """A tree and the pairs among its branches; SFT and RFT have no pairs."""

  tree: tree_lib.Tree
  pairs: tuple[PairInTree, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """R rows of T tokens.

  Attributes:
    trees: fields [R, T].
    scored_at: int32 [R, S], row indices of the scored tokens, padded with -1. Logits are computed
      only at their parents.
    advantage: float32 [R, S], of the scored tokens' steps, padded with 0.
    branch_end: int32 [R, B], row indices of the branches' last tokens, padded with -1.
    chosen, rejected: int32 [R, P], indices into `branch_end`, padded with -1.
    ref_chosen, ref_rejected: float32 [R, P], summed log-probs under the reference, nats.
    num_scored: float32 [], number of scored tokens over all rows, devices and accumulation steps; a
      shared token counts once per branch.
    num_pairs: float32 [], number of pairs, likewise.
  """

  trees: tree_lib.PackedTrees
  scored_at: jax.Array
  advantage: jax.Array
  branch_end: jax.Array
  chosen: jax.Array
  rejected: jax.Array
  ref_chosen: jax.Array
  ref_rejected: jax.Array
  num_scored: jax.Array
  num_pairs: jax.Array


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of a compiled program: rows; tokens, scored tokens, pairs and branches per row."""

  rows: int
  length: int
  scored: int
  pairs: int
  branches: int

  def rounded(self) -> "Shape":
    """The counts per row, rounded up: data of the same kind then rarely need another program."""

    def up(count: int, unit: int) -> int:
      return -(-count // unit) * unit

    return dataclasses.replace(
      self,
      scored=min(up(self.scored, max(self.length // 16, 1)), self.length),
      pairs=up(self.pairs, 4),
      branches=up(self.branches, 8),
    )


def assign_rows(examples: Sequence[Example], length: int) -> list[list[int]]:
  """Packs the examples' trees into rows of `length` tokens by first fit."""
  return tree_lib.first_fit([example.tree.num_tokens for example in examples], length)


def measure(examples: Sequence[Example], length: int) -> Shape:
  """The smallest shape that holds these examples as one batch."""
  rows = assign_rows(examples, length)

  def max_per_row(count):
    """The maximum over rows of `count` summed over the row's examples."""
    return max((sum(count(examples[i]) for i in row) for row in rows), default=0)

  return Shape(
    rows=max(len(rows), 1),
    length=length,
    scored=max(max_per_row(lambda example: example.tree.num_scored), 1),
    pairs=max_per_row(lambda example: len(example.pairs)),
    branches=max_per_row(lambda example: example.tree.num_branches),
  )


def build(examples: Sequence[Example], shape: Shape) -> Batch:
  """Packs examples into a batch of numpy arrays of the given shape.

  Raises:
    ValueError: the shape is too small.
  """
  rows = assign_rows(examples, shape.length)
  if len(rows) > shape.rows:
    raise ValueError(f"{len(examples)} examples need {len(rows)} rows; the shape has {shape.rows}.")
  rows = rows + [[]] * (shape.rows - len(rows))
  trees = tree_lib.pack([[examples[i].tree for i in row] for row in rows], shape.length)
  batch = Batch(
    trees,
    scored_at=np.full((shape.rows, shape.scored), -1, np.int32),
    advantage=np.zeros((shape.rows, shape.scored), np.float32),
    branch_end=np.full((shape.rows, shape.branches), -1, np.int32),
    chosen=np.full((shape.rows, shape.pairs), -1, np.int32),
    rejected=np.full((shape.rows, shape.pairs), -1, np.int32),
    ref_chosen=np.zeros((shape.rows, shape.pairs), np.float32),
    ref_rejected=np.zeros((shape.rows, shape.pairs), np.float32),
    num_scored=None,
    num_pairs=None,
  )
  num_scored = 0
  for r, row in enumerate(rows):
    scored_at = np.flatnonzero(trees.scored[r])
    batch.scored_at[r, : len(scored_at)] = scored_at
    start, scored, number, p = 0, 0, 0, 0
    for index in row:
      tree = examples[index].tree
      end = scored + tree.num_scored
      batch.advantage[r, scored:end] = tree.layout.advantage[tree.layout.scored]
      batch.branch_end[r, number : number + tree.num_branches] = start + tree.layout.end
      for pair in examples[index].pairs:
        batch.chosen[r, p], batch.rejected[r, p] = number + pair.chosen, number + pair.rejected
        batch.ref_chosen[r, p], batch.ref_rejected[r, p] = pair.ref_chosen, pair.ref_rejected
        p += 1
      start, scored, number = start + tree.num_tokens, end, number + tree.num_branches
    leave = trees.leave[r, scored_at]
    num_scored += int(tree_lib.sees(batch.branch_end[r], scored_at, leave).sum())
  return dataclasses.replace(
    batch,
    num_scored=np.float32(max(num_scored, 1)),
    num_pairs=np.float32(max(sum(len(example.pairs) for example in examples), 1)),
  )
