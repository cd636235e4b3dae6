"""Trees of random shape, and the plain sequences that they stand for."""

import numpy as np

from synthneg_jax.core.tree import Branch, Tree


def _branches(
  rng: np.random.Generator, fork: int, size: int, depth: int, high: int
) -> tuple[Branch, ...]:
  """0 to 3 branches that leave a run of `size` tokens behind the first `fork` of its path, at most
  `depth` deep.
  """
  found = []
  for _ in range(rng.integers(0, 4) if depth else 0):
    at, length = fork + int(rng.integers(1, size + 1)), int(rng.integers(1, 5))
    scored = None if rng.random() < 0.5 else (rng.random(length) < 0.6).tolist()
    below = _branches(rng, at, length, depth - 1, high)
    found.append(Branch(at, rng.integers(2, high, length).tolist(), scored, below))
  return tuple(found)


def draw(rng: np.random.Generator, depth: int | None = None, high: int = 30) -> Tree:
  """A tree of 1 to 6 trunk tokens whose branches are at most `depth` deep (drawn from 1 to 6), ids
  from 2 to high - 1.
  """
  size, depth = int(rng.integers(1, 7)), depth or int(rng.integers(1, 7))
  return Tree(rng.integers(2, high, size).tolist(), _branches(rng, 0, size, depth, high))


def of_depth(rng: np.random.Generator, depth: int, *, high: int = 30, most: int = 40) -> Tree:
  """A tree drawn until it is exactly so deep and has at most so many tokens."""
  while True:
    tree = draw(rng, depth, high)
    if _depth(tree.branches) == depth and tree.num_tokens <= most:
      return tree


def _depth(branches) -> int:
  return max((1 + _depth(branch.branches) for branch in branches), default=0)


def sequences(tree: Tree) -> list[tuple[list[int], list[bool]]]:
  """(ids, which are scored) of each branch's whole path, by its number."""
  found = []

  def walk(branches, ids, scored):
    for branch in branches:
      its_ids = ids[: branch.fork] + list(branch.ids)
      its_scored = scored[: branch.fork] + list(
        branch.scored or [branch.scored is None] * len(branch.ids)
      )
      found.append((its_ids, its_scored))
      walk(branch.branches, its_ids, its_scored)

  walk(tree.branches, list(tree.trunk), [False] * len(tree.trunk))
  return found
