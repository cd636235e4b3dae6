"""Preference pairs as token trees: pairs of one trunk share a tree, and a branch that several pairs
share stands once.
"""

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
    trees: one or several per trunk.
    pairs: for each tree, its pairs as (chosen, rejected) branch numbers from 0.
    names: for each tree, the id of its first pair.
  """

  trees: list[Tree]
  pairs: list[list[tuple[int, int]]]
  names: list[str]


def num_tokens(pair: Pair) -> int:
  """Tokens of the smallest tree that holds the pair."""
  return len(pair.trunk) + len(pair.chosen) + len(pair.rejected)


def build(pairs: Sequence[Pair], *, max_branches: int, length: int) -> PairTrees:
  """Lays pairs out as trees.

  Args:
    pairs: each of at most `length` tokens (`num_tokens`).
    max_branches: branches that a tree holds, at most; further pairs go to another tree that repeats
      trunk and chosen.
    length: tokens that a tree holds, at most.

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
    parts = []  # for each tree: number of each branch, pairs of numbers
    for pair in group:
      # ids, and how many are not scored
      wanted = [(tuple(pair.chosen), 0), (tuple(pair.rejected), pair.context)]
      together = {*parts[-1][0], *wanted} if parts else set()
      if (
        not parts
        or len(together) > max_branches
        or len(trunk) + sum(len(ids) for ids, _ in together) > length
      ):
        parts.append(({}, []))
      number_of, numbered = parts[-1]
      numbered.append(tuple(number_of.setdefault(branch, len(number_of)) for branch in wanted))
    for number_of, numbered in parts:
      result.trees.append(Tree(trunk, tuple(_branch(len(trunk), *branch) for branch in number_of)))
      result.pairs.append(numbered)
      result.names.append(group[0].id)
  return result


def _branch(fork: int, ids: tuple[int, ...], context: int) -> Branch:
  """A branch whose first `context` tokens are not scored."""
  return Branch(fork, ids, tuple(i >= context for i in range(len(ids))) if context else None)


def examples(pair_trees: PairTrees, store: reference.Store) -> list[Example]:
  """What the preference objective trains on: the trees with their pairs and the summed reference
  log-probs of branches.

  Only scored tokens are in the sums.
  """

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
