"""Preference pairs as token trees: pairs of one trunk share a tree and its common branches."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.data.records import Pair
from synthneg_jax.training import reference
from synthneg_jax.training.batch import Example, PairInTree


class PairTrees(NamedTuple):
  """Trees with their pairs.

  Attributes:
    trees: one or more per trunk.
    pairs: each tree's pairs as (chosen, rejected) branch numbers from 0.
    names: the id of each tree's first pair.
  """

  trees: list[Tree]
  pairs: list[list[tuple[int, int]]]
  names: list[str]


def num_tokens(pair: Pair) -> int:
  """Tokens of a tree that contains only this pair."""
  return len(pair.trunk) + len(pair.chosen) + len(pair.rejected)


def build(pairs: Sequence[Pair], *, max_branches: int, max_pairs: int, length: int) -> PairTrees:
  """Arranges pairs in trees.

  Args:
    pairs: each of at most `length` tokens (`num_tokens`).
    max_branches: maximum branches of a tree; further pairs go to another tree, which repeats the
      trunk and the chosen branch.
    max_pairs: maximum pairs of a tree, likewise.
    length: maximum tokens of a tree.

  Raises:
    ValueError: a pair is longer than `length`.
  """
  groups = {}
  for pair in pairs:
    if num_tokens(pair) > length:
      raise ValueError(f"Pair {pair.id} has {num_tokens(pair)} tokens, more than {length}.")
    groups.setdefault(tuple(pair.trunk), []).append(pair)
  result = PairTrees([], [], [])
  for trunk, group in groups.items():
    drafts = []  # for each tree: {branch: its number}, pairs of numbers
    for pair in group:
      # (ids, number of unscored leading tokens)
      branches = [(tuple(pair.chosen), 0), (tuple(pair.rejected), pair.context)]
      together = {*drafts[-1][0], *branches} if drafts else set()
      if (
        not drafts
        or len(together) > max_branches
        or len(drafts[-1][1]) >= max_pairs
        or len(trunk) + sum(len(ids) for ids, _ in together) > length
      ):
        drafts.append(({}, []))
      numbers, tree_pairs = drafts[-1]
      tree_pairs.append(tuple(numbers.setdefault(branch, len(numbers)) for branch in branches))
    for numbers, tree_pairs in drafts:
      result.trees.append(Tree(trunk, tuple(_branch(len(trunk), *branch) for branch in numbers)))
      result.pairs.append(tree_pairs)
      result.names.append(group[0].id)
  return result


def _branch(fork: int, ids: tuple[int, ...], context: int) -> Branch:
  """A branch whose first `context` tokens are not scored."""
  return Branch(fork, ids, tuple(i >= context for i in range(len(ids))) if context else None)


def examples(pair_trees: PairTrees, store: reference.Store) -> list[Example]:
  """Examples of the preference objective, with reference log-probs summed over scored tokens."""
  result = []
  for tree, numbered in zip(pair_trees.trees, pair_trees.pairs, strict=True):
    scored = [tree.layout.scored[tree.path(number)[1]] for number in range(tree.num_branches)]
    keys = reference.branch_keys(tree)
    sums = [
      float(np.sum(store[key][own], dtype=np.float64))
      for key, own in zip(keys, scored, strict=True)
    ]
    in_tree = [PairInTree(c, r, sums[c], sums[r]) for c, r in numbered]
    result.append(Example(tree, tuple(in_tree)))
  return result
