"""The token tree: tokens that share beginnings, of any depth.

Every workload of the method is a tree: traces branch from a prompt, rollouts branch from the
prefixes of a trace, and a pair is two branches. A shared beginning is computed once, several trees
pack into one row, and a packed tree has the log-probabilities of its unpacked sequences. A tree
lies in its row in preorder: a run of tokens, then the branches that leave it in decreasing order of
their forks, each followed by its own branches. Two integers per token define the rest:

  attention   query q sees key k  iff  k <= q < leave[k], where `leave` is the row index after the
              last token that continues k. This covers causality, siblings, other trees in the row,
              and padding, which sees only itself.
  prediction  a token is predicted by the hidden state of its `parent`, the token before it on its
              path. All branches at a fork share their parent with the next token of the run.

`position` is the index in the unpacked sequence; rotary embeddings and windows use it, not the
index in the row. A branch is identified by its last token and consists of the tokens which that
token sees.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Branch:
  """Tokens that continue the first `fork` tokens of a path; the path up to their end is a sequence
  of its own.

  Attributes:
    fork: how many tokens of the path that it leaves this branch continues. It leaves a run of
      tokens (the trunk, or another branch's own) behind one of them.
    ids: int [L], L >= 1.
    scored: bool [L], which tokens count in a loss; None means all.
    branches: those that leave this branch's own tokens.
    advantage: float [L], of the step that each token belongs to; None means 0.
  """

  fork: int
  ids: Sequence[int]
  scored: Sequence[bool] | None = None
  branches: tuple["Branch", ...] = ()
  advantage: Sequence[float] | None = None


class Layout(NamedTuple):
  """A tree's n tokens as they lie in a row that begins with it: numpy arrays [n], fields as in
  `PackedTrees`.

  Attributes:
    advantage: float [n], of the token's step.
    end: int [branches], the last token of each branch, by its number.
  """

  token: np.ndarray
  position: np.ndarray
  leave: np.ndarray
  parent: np.ndarray
  scored: np.ndarray
  advantage: np.ndarray
  end: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tree:
  """A trunk with its branches, on the host, before packing.

  Branches are numbered from 0 as they are listed, each before its own.

  Attributes:
    trunk: int [C], C >= 1; never scored.
    branches: those that leave the trunk.

  Raises:
    ValueError: a fork outside of the run that a branch leaves, an empty branch, or a mask or
      advantages of another length.
  """

  trunk: Sequence[int]
  branches: tuple[Branch, ...] = ()

  def __post_init__(self):
    if len(self.trunk) < 1:
      raise ValueError("A trunk needs at least one token.")
    for number, (branch, left) in enumerate(_below(self._root)):
      if not left.fork < branch.fork <= left.fork + len(left.ids):
        raise ValueError(
          f"Branch {number} forks at {branch.fork}, outside "
          f"{left.fork + 1}..{left.fork + len(left.ids)}."
        )
      if len(branch.ids) < 1 or (
        branch.scored is not None and len(branch.scored) != len(branch.ids)
      ):
        raise ValueError(f"Branch {number} is empty, or its scored mask has another length.")
      if branch.advantage is not None and len(branch.advantage) != len(branch.ids):
        raise ValueError(
          f"Branch {number} has {len(branch.ids)} tokens and {len(branch.advantage)} advantages."
        )

  @property
  def _root(self) -> Branch:
    """The trunk as a branch that continues nothing."""
    return Branch(0, self.trunk, scored=(False,) * len(self.trunk), branches=self.branches)

  @functools.cached_property
  def num_branches(self) -> int:
    """Branches of any depth."""
    return sum(1 for _ in _below(self._root))

  @functools.cached_property
  def num_tokens(self) -> int:
    """Tokens that the tree takes in a row."""
    return len(self.trunk) + sum(len(branch.ids) for branch, _ in _below(self._root))

  @property
  def num_scored(self) -> int:
    """Tokens of the row that count in a loss, each once."""
    return int(np.sum(self.layout.scored))

  @functools.cached_property
  def layout(self) -> Layout:
    """The tree in preorder."""
    size = self.num_tokens
    integers = (np.zeros(size, np.int32) for _ in range(4))
    out = Layout(
      *integers, np.zeros(size, bool), np.zeros(size, np.float32), np.zeros(self.num_branches, int)
    )

    def lay(run: Branch, number: int, at: int, path: np.ndarray) -> int:
      """Lays a run and all that leaves it from row index `at` on; `path` has the row indices before
      it. Returns the end.
      """
      own = np.arange(at, at + len(run.ids))
      path = np.concatenate([path[: run.fork], own])
      out.token[own], out.position[own] = run.ids, run.fork + np.arange(len(own))
      out.parent[own] = np.concatenate([[-1], path])[run.fork : -1]
      out.leave[own] = end = at + len(own)
      out.scored[own] = True if run.scored is None else run.scored
      out.advantage[own] = 0.0 if run.advantage is None else run.advantage
      if number >= 0:
        out.end[number] = own[-1]
      sizes = [1 + sum(1 for _ in _below(branch)) for branch in run.branches]
      numbered = zip(run.branches, number + 1 + np.cumsum([0, *sizes]), strict=False)
      for branch, its_number in sorted(numbered, key=lambda pair: -pair[0].fork):
        end = lay(branch, its_number, end, path)
        out.leave[at : at + branch.fork - run.fork] = end
      return end

    lay(self._root, -1, 0, np.zeros(0, int))
    return out

  def path(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a branch's sequence lies in `layout`: (its tokens in the trunk, those behind it)."""
    index = np.arange(self.num_tokens)
    (path,) = np.nonzero(sees(self.layout.end[number : number + 1], index, self.layout.leave)[0])
    return path[path < len(self.trunk)], path[path >= len(self.trunk)]


def _below(run: Branch) -> Iterator[tuple[Branch, Branch]]:
  """(branch, the run it leaves) for every branch below a run, parents before children."""
  waiting = [(branch, run) for branch in reversed(run.branches)]
  while waiting:
    branch, left = waiting.pop()
    yield branch, left
    waiting += [(child, branch) for child in reversed(branch.branches)]


def sharing(trunk: Sequence[int], branches: Sequence[Branch]) -> Tree:
  """The tree of these branches in which beginnings that they have in common stand once.

  Every branch keeps its sequence, which of its tokens are scored and their advantages; a beginning
  is in common where all three agree. At least its last token stays its own. Branches of branches
  are left as they are, and numbers are not kept.
  """
  root = _Shared(0, [(token, False, 0.0) for token in trunk], [])
  for branch in branches:
    left, fork, size = root, branch.fork, len(branch.ids)
    scored = [True] * size if branch.scored is None else [bool(mark) for mark in branch.scored]
    advantage = (
      [0.0] * size if branch.advantage is None else [float(value) for value in branch.advantage]
    )
    tokens = list(zip(branch.ids, scored, advantage, strict=True))
    while True:
      sizes = [run.common(fork, tokens[:-1]) for run in left.branches]
      size = max(sizes, default=0)
      if not size:
        break
      left, fork, tokens = left.branches[sizes.index(size)], fork + size, tokens[size:]
    left.branches.append(_Shared(fork, tokens, [], branch.branches))
  return Tree(trunk, tuple(run.frozen() for run in root.branches))


@dataclasses.dataclass
class _Shared:
  """A branch that grows branches; its tokens as (id, scored, advantage)."""

  fork: int
  tokens: list[tuple[int, bool, float]]
  branches: list["_Shared"]
  given: tuple[Branch, ...] = ()

  def common(self, fork: int, tokens: list[tuple[int, bool, float]]) -> int:
    """How many tokens it has in common with what leaves at a fork."""
    if fork != self.fork:
      return 0
    pairs = enumerate(zip(tokens, self.tokens, strict=False))
    return next((n for n, (one, own) in pairs if one != own), min(len(tokens), len(self.tokens)))

  def frozen(self) -> Branch:
    """The branch with those that it grew and those that it was given."""
    ids, scored, advantage = map(list, zip(*self.tokens, strict=True))
    branches = (*self.given, *(run.frozen() for run in self.branches))
    return Branch(self.fork, ids, scored, branches, advantage if any(advantage) else None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTrees:
  """Rows of packed trees; every field has shape [..., T].

  Attributes:
    token: int32, the token id (0 where there is none).
    position: int32, place in the unpacked sequence.
    leave: int32, the row index just past all tokens that continue this one.
    parent: int32, row index whose hidden state predicts this token; -1 where nothing does.
    scored: bool, True where the token counts in a loss.
  """

  token: jax.Array
  position: jax.Array
  leave: jax.Array
  parent: jax.Array
  scored: jax.Array


def empty_rows(num_rows: int, length: int) -> PackedTrees:
  """[num_rows, length] of padding, as numpy arrays."""
  shape = num_rows, length
  return PackedTrees(
    token=np.zeros(shape, np.int32),
    position=np.zeros(shape, np.int32),
    leave=np.broadcast_to(np.arange(1, length + 1, dtype=np.int32), shape).copy(),
    parent=np.full(shape, -1, np.int32),
    scored=np.zeros(shape, bool),
  )


def pack(rows: Sequence[Sequence[Tree]], length: int) -> PackedTrees:
  """Lays each row's trees one after another.

  Args:
    rows: for each row its trees.
    length: T, tokens in a row.

  Returns:
    PackedTrees of numpy arrays [len(rows), length].

  Raises:
    ValueError: a row's trees need more than `length` tokens.
  """
  out = empty_rows(len(rows), length)
  for r, trees in enumerate(rows):
    at = 0
    for tree in trees:
      if at + tree.num_tokens > length:
        raise ValueError(f"Row {r} overflows: its trees need more than {length} tokens.")
      layout, part = tree.layout, slice(at, at + tree.num_tokens)
      out.token[r, part], out.position[r, part], out.scored[r, part] = (
        layout.token,
        layout.position,
        layout.scored,
      )
      out.leave[r, part] = at + layout.leave
      out.parent[r, part] = np.where(layout.parent < 0, -1, at + layout.parent)
      at += tree.num_tokens
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


def sees(query, key, leave):
  """The attention rule: bool [..., Q, K], True where row indices query [..., Q] see key [..., K],
  of that `leave`.
  """
  query = query[..., :, None]
  return (key[..., None, :] <= query) & (query < leave[..., None, :])


class Queries(NamedTuple):
  """Where queries stand, int32 [..., Q]: row index and position."""

  index: jax.Array
  position: jax.Array


class Keys(NamedTuple):
  """Where keys stand, int32 [..., K]: row index, position, and the row index from which on no query
  sees them.
  """

  index: jax.Array
  position: jax.Array
  leave: jax.Array


def attention_mask(queries: Queries, keys: Keys, window: int | jax.Array = 0) -> jax.Array:
  """The attention rule with a window.

  Args:
    queries, keys: where they stand.
    window: how many of the last positions a query sees, its own included; 0 for all. A traced
      scalar is never 0.

  Returns:
    bool [..., Q, K]; True where the query sees the key.
  """
  seen = sees(queries.index, keys.index, keys.leave)
  if isinstance(window, int) and not window:
    return seen
  return seen & (queries.position[..., :, None] - keys.position[..., None, :] < window)


def keys_of(trees: PackedTrees) -> Keys:
  """The rows' tokens as keys [..., T]."""
  index = jnp.broadcast_to(jnp.arange(trees.leave.shape[-1], dtype=jnp.int32), trees.leave.shape)
  return Keys(index, trees.position, trees.leave)
