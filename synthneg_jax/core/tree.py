"""The token tree: one trunk of tokens and the branches that fork off it.

Every piece of work of the method is a tree: the traces of a problem hang on its prompt, the rollouts of a step hang on
the trace's prefix, a pair is two branches. The trunk is computed once however many branches hang on it, several trees
pack into one row, and a packed tree has the log-probabilities of its unpacked sequences, by two rules:

  attention   query q sees key k  iff  tree_q = tree_k ≠ 0  and
              (branch_k = branch_q and position_k <= position_q  or  branch_k = 0 and position_k < fork_q)
  prediction  a token is predicted by the hidden state of its `parent`: the token before it, and for a branch's first
              token the trunk's token fork - 1, which all branches at that fork share with the trunk's own next token.

Depth is one: a branch that is to be continued becomes trunk. `position` is the place in the unpacked sequence, and it,
never the place in the row, drives rotary embeddings, masks and windows.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Branch:
  """Tokens that continue the first `fork` tokens of a trunk.

  Attributes:
    fork: how many trunk tokens this branch sees; 1 <= fork <= len(trunk).
    ids: int [L], L >= 1.
    scored: bool [L], which tokens count in a loss; None means all.
  """

  fork: int
  ids: Sequence[int]
  scored: Sequence[bool] | None = None


@dataclasses.dataclass(frozen=True)
class Tree:
  """A trunk with its branches, on the host, before packing.

  Attributes:
    trunk: int [C], C >= 1.
    branches: the branches, in the order in which a row numbers them.
    trunk_scored: bool [C], which trunk tokens count in a loss (never the first: nothing predicts it); None means none.

  Raises:
    ValueError: a fork outside 1..len(trunk), an empty branch, masks of another length, or a scored first token.
  """

  trunk: Sequence[int]
  branches: tuple[Branch, ...] = ()
  trunk_scored: Sequence[bool] | None = None

  def __post_init__(self):
    if len(self.trunk) < 1:
      raise ValueError("A trunk needs at least one token.")
    if self.trunk_scored is not None and (len(self.trunk_scored) != len(self.trunk) or self.trunk_scored[0]):
      raise ValueError("trunk_scored must have the trunk's length and leave its first token unscored.")
    for number, branch in enumerate(self.branches):
      if not 1 <= branch.fork <= len(self.trunk):
        raise ValueError(f"Branch {number} forks at {branch.fork}, outside 1..{len(self.trunk)}.")
      if len(branch.ids) < 1 or (branch.scored is not None and len(branch.scored) != len(branch.ids)):
        raise ValueError(f"Branch {number} is empty, or its scored mask has another length.")

  @property
  def num_tokens(self) -> int:
    """Tokens that the tree takes in a row."""
    return len(self.trunk) + sum(len(branch.ids) for branch in self.branches)

  @property
  def num_scored(self) -> int:
    """Tokens of the tree that count in a loss."""
    total = 0 if self.trunk_scored is None else int(np.sum(self.trunk_scored))
    for branch in self.branches:
      total += len(branch.ids) if branch.scored is None else int(np.sum(branch.scored))
    return total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTrees:
  """Rows of packed trees; every field has shape [..., T].

  Attributes:
    token: int32, the token id (0 where there is none).
    position: int32, place in the unpacked sequence: j in a trunk, fork + j in a branch.
    tree: int32, number of the tree in its row from 1; 0 is padding.
    branch: int32, number of the branch in its row from 1, unique over the row's trees; 0 is a trunk.
    fork: int32, how many trunk tokens a branch token sees; in a trunk 0.
    parent: int32, row index whose hidden state predicts this token; -1 where nothing does.
    scored: bool, True where the token counts in a loss.
  """

  token: jax.Array
  position: jax.Array
  tree: jax.Array
  branch: jax.Array
  fork: jax.Array
  parent: jax.Array
  scored: jax.Array


def empty_rows(num_rows: int, length: int) -> PackedTrees:
  """[num_rows, length] of padding, as numpy arrays."""

  def zeros():
    return np.zeros((num_rows, length), np.int32)

  return PackedTrees(
    token=zeros(),
    position=zeros(),
    tree=zeros(),
    branch=zeros(),
    fork=zeros(),
    parent=np.full((num_rows, length), -1, np.int32),
    scored=np.zeros((num_rows, length), bool),
  )


def pack(rows: Sequence[Sequence[Tree]], length: int) -> PackedTrees:
  """Lays each row's trees one after another.

  Args:
    rows: for each row its trees; branches are numbered from 1 in the order of trees and of each tree's branches.
    length: T, tokens in a row.

  Returns:
    PackedTrees of numpy arrays [len(rows), length].

  Raises:
    ValueError: a row's trees need more than `length` tokens.
  """
  out = empty_rows(len(rows), length)
  for r, trees in enumerate(rows):
    at, number = 0, 0
    for t, tree in enumerate(trees, start=1):
      if at + tree.num_tokens > length:
        raise ValueError(f"Row {r} overflows: its trees need more than {length} tokens.")
      start, size = at, len(tree.trunk)
      trunk = slice(start, start + size)
      out.token[r, trunk] = tree.trunk
      out.position[r, trunk] = np.arange(size)
      out.parent[r, trunk] = np.arange(start - 1, start + size - 1)
      out.parent[r, start] = -1
      if tree.trunk_scored is not None:
        out.scored[r, trunk] = tree.trunk_scored
      at += size
      for branch in tree.branches:
        number += 1
        size = len(branch.ids)
        part = slice(at, at + size)
        out.token[r, part] = branch.ids
        out.position[r, part] = branch.fork + np.arange(size)
        out.branch[r, part] = number
        out.fork[r, part] = branch.fork
        out.parent[r, part] = np.arange(at - 1, at + size - 1)
        out.parent[r, at] = start + branch.fork - 1
        out.scored[r, part] = True if branch.scored is None else branch.scored
        at += size
      out.tree[r, start:at] = t
  return out


def first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
  """Assigns trees to rows: each goes, in the given order, to the first row with room.

  Args:
    sizes: tokens of each tree.
    length: tokens in a row.

  Returns:
    For each row the indices of its trees.

  Raises:
    ValueError: a tree is longer than a row.
  """
  rows, room = [], []
  for index, size in enumerate(sizes):
    if size > length:
      raise ValueError(f"Tree {index} has {size} tokens, more than a row of {length}.")
    row = next((r for r, free in enumerate(room) if free >= size), None)
    if row is None:
      row = len(rows)
      rows.append([])
      room.append(length)
    rows[row].append(index)
    room[row] -= size
  return rows


def attention_mask(trees: PackedTrees, window: int = 0) -> jax.Array:
  """The attention rule for rows of packed trees.

  Args:
    trees: fields [..., T].
    window: how many of the last positions a query sees, its own included; 0 for all.

  Returns:
    bool [..., T, T]; True where the query (second to last axis) sees the key (last axis). Padding sees nothing.
  """

  def query(field):
    return field[..., :, None]

  def key(field):
    return field[..., None, :]

  same_tree = (query(trees.tree) == key(trees.tree)) & (query(trees.tree) != 0)
  same_branch = (query(trees.branch) == key(trees.branch)) & (key(trees.position) <= query(trees.position))
  before_fork = (key(trees.branch) == 0) & (key(trees.position) < query(trees.fork))
  seen = same_tree & (same_branch | before_fork)
  return seen & (query(trees.position) - key(trees.position) < window) if window else seen
