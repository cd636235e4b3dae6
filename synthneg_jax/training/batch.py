"""A training batch: rows of packed trees, the tokens that are scored, and pairs of branches."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from synthneg_jax.core import tree as tree_lib


@dataclasses.dataclass(frozen=True)
class PairInTree:
  """Two branches of one tree, by their numbers in it from 0, with the reference's summed log-probs
  in nats.
  """

  chosen: int
  rejected: int
  ref_chosen: float = 0.0
  ref_rejected: float = 0.0


@dataclasses.dataclass(frozen=True)
class Example:
  """What one problem brings to a batch: a tree and the pairs among its branches (none for SFT and
  RFT).
  """

  tree: tree_lib.Tree
  pairs: tuple[PairInTree, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """R rows of T tokens.

  Attributes:
    trees: fields [R, T].
    scored_at: int32 [R, S], row indices of the scored tokens, -1 beyond them; logits exist at their
      parents only.
    advantage: float32 [R, S], of the scored tokens' steps; 0 beyond them.
    branch_end: int32 [R, B], row indices of the branches' last tokens, -1 beyond them.
    chosen, rejected: int32 [R, P], the pairs' places in `branch_end`; -1 where there is no pair.
    ref_chosen, ref_rejected: float32 [R, P], summed log-probs under the reference, nats.
    num_scored: float32 [], scored tokens of the whole batch's branches, over all rows, devices and
      accumulation steps; a token that branches share counts in each of them.
    num_pairs: float32 [], pairs of the whole batch.
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
  """The sizes that one compiled program takes: rows, tokens a row, scored tokens a row, pairs and
  branches a row.
  """

  rows: int
  length: int
  scored: int
  pairs: int
  branches: int


def assign_rows(examples: Sequence[Example], length: int) -> list[list[int]]:
  """First-fit of the examples' trees into rows of `length` tokens."""
  return tree_lib.first_fit([example.tree.num_tokens for example in examples], length)


def measure(examples: Sequence[Example], length: int) -> Shape:
  """The smallest shape that holds these examples as one batch."""
  rows = assign_rows(examples, length)

  def widest(count):
    """The most that a row holds of what `count` counts in an example."""
    return max((sum(count(examples[i]) for i in row) for row in rows), default=0)

  return Shape(
    rows=max(len(rows), 1),
    length=length,
    scored=max(widest(lambda example: example.tree.num_scored), 1),
    pairs=widest(lambda example: len(example.pairs)),
    branches=widest(lambda example: example.tree.num_branches),
  )


def build(examples: Sequence[Example], shape: Shape) -> Batch:
  """Packs examples into a batch of numpy arrays of the given shape.

  Raises:
    ValueError: the shape is too small for them.
  """
  rows = assign_rows(examples, shape.length)
  if len(rows) > shape.rows:
    raise ValueError(f"{len(examples)} examples need {len(rows)} rows; the shape has {shape.rows}.")
  rows = rows + [[]] * (shape.rows - len(rows))
  trees = tree_lib.pack([[examples[i].tree for i in row] for row in rows], shape.length)
  scored_at = np.full((shape.rows, shape.scored), -1, np.int32)
  advantage = np.zeros((shape.rows, shape.scored), np.float32)
  branch_end = np.full((shape.rows, shape.branches), -1, np.int32)
  chosen = np.full((shape.rows, shape.pairs), -1, np.int32)
  rejected = np.full((shape.rows, shape.pairs), -1, np.int32)
  ref_chosen = np.zeros((shape.rows, shape.pairs), np.float32)
  ref_rejected = np.zeros((shape.rows, shape.pairs), np.float32)
  num_scored = 0
  for r, row in enumerate(rows):
    at = np.flatnonzero(trees.scored[r])
    scored_at[r, : len(at)] = at
    layouts = [examples[i].tree.layout for i in row]
    if layouts:
      advantage[r, : len(at)] = np.concatenate(
        [layout.advantage[layout.scored] for layout in layouts]
      )
    start, number, p = 0, 0, 0
    for index in row:
      tree = examples[index].tree
      branch_end[r, number : number + tree.num_branches] = start + tree.layout.end
      for pair in examples[index].pairs:
        chosen[r, p], rejected[r, p] = number + pair.chosen, number + pair.rejected
        ref_chosen[r, p], ref_rejected[r, p] = pair.ref_chosen, pair.ref_rejected
        p += 1
      start, number = start + tree.num_tokens, number + tree.num_branches
    num_scored += int(tree_lib.sees(branch_end[r], at, trees.leave[r, at]).sum())
  return Batch(
    trees,
    scored_at,
    advantage,
    branch_end,
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    num_scored=np.float32(max(num_scored, 1)),
    num_pairs=np.float32(max(sum(len(example.pairs) for example in examples), 1)),
  )
