"""The token tree: sequences that share prefixes, of any depth.

Every workload of the method is a tree: traces branch from a prompt, rollouts branch from the
prefixes of a trace, and a pair is two branches. A shared prefix is computed once, several trees
pack into one row, and a packed tree has the log-probabilities of its unpacked sequences. A row
holds a tree in preorder: a run of tokens, then the branches that leave it in decreasing order of
their forks, each followed by its own branches. Two integers per token define the rest:

  attention   query q sees key k  iff  k <= q < leave[k], where `leave` is the row index after the
              last token that continues k. This covers causality, siblings, other trees in the row,
              and padding, which sees only itself.
  prediction  a token is predicted by the hidden state of its `parent`, the token before it on its
              path. All branches at a fork share their parent with the next token of the run.

`position` is the index in the unpacked sequence, which rotary embeddings and windows use. A branch
is identified by its last token and consists of the tokens which that token sees.
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
  """Tokens that continue the first `fork` tokens of a path.

  Attributes:
    fork: number of tokens of the parent's path that precede this branch. It is after one of the
      parent's own tokens (of the trunk or a branch).
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
  """A tree's n tokens at the start of a row: numpy arrays [n], with the fields of `PackedTrees`.

  Attributes:
    advantage: float [n], of the token's step.
    end: int [branches], row index of each branch's last token.
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

  Branches are numbered from 0 in preorder, as listed.

  Attributes:
    trunk: int [C], C >= 1; never scored.
    branches: those that leave the trunk.

  Raises:
    ValueError: an empty trunk or branch, a fork outside its parent's own tokens, or a mask or
      advantages of another length than the ids.
  """

  trunk: Sequence[int]
  branches: tuple[Branch, ...] = ()

  def __post_init__(self):
    if len(self.trunk) < 1:
      raise ValueError("A trunk needs at least one token.")
    for number, (branch, parent) in enumerate(_descendants(self._root)):
      first, last = parent.fork + 1, parent.fork + len(parent.ids)
      if not first <= branch.fork <= last:
        raise ValueError(f"Branch {number} forks at {branch.fork}, outside {first}..{last}.")
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
    """The trunk as a branch."""
    return Branch(0, self.trunk, scored=(False,) * len(self.trunk), branches=self.branches)

  @functools.cached_property
  def num_branches(self) -> int:
    """Number of branches at any depth."""
    return sum(1 for _ in _descendants(self._root))

  @functools.cached_property
  def num_tokens(self) -> int:
    """Number of tokens that the tree takes in a row."""
    return len(self.trunk) + sum(len(branch.ids) for branch, _ in _descendants(self._root))

  @property
  def num_scored(self) -> int:
    """Number of scored tokens; a shared one counts once."""
    return int(np.sum(self.layout.scored))

  @functools.cached_property
  def layout(self) -> Layout:
    """The tree in preorder."""
    size = self.num_tokens
    integers = (np.zeros(size, np.int32) for _ in range(4))
    out = Layout(
      *integers, np.zeros(size, bool), np.zeros(size, np.float32), np.zeros(self.num_branches, int)
    )

    def place(run: Branch, number: int, *, at: int, path: np.ndarray) -> int:
      """Places a run and its descendants from row index `at` on, and returns their end.

      `path` holds the row indices of the parent's path.
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
      numbers, next_number = [], number + 1
      for branch in run.branches:
        numbers.append(next_number)
        next_number += 1 + sum(1 for _ in _descendants(branch))
      numbered = zip(run.branches, numbers, strict=True)
      for branch, branch_number in sorted(numbered, key=lambda pair: -pair[0].fork):
        end = place(branch, branch_number, at=end, path=path)
        out.leave[at : at + branch.fork - run.fork] = end
      return end

    place(self._root, -1, at=0, path=np.zeros(0, int))
    return out

  def path(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a branch's sequence in `layout`: (tokens of the trunk, tokens after it)."""
    index = np.arange(self.num_tokens)
    (path,) = np.nonzero(sees(self.layout.end[number : number + 1], index, self.layout.leave)[0])
    return path[path < len(self.trunk)], path[path >= len(self.trunk)]


def _descendants(run: Branch) -> Iterator[tuple[Branch, Branch]]:
  """(branch, its parent) for every branch below a run, in preorder."""
  stack = [(branch, run) for branch in reversed(run.branches)]
  while stack:
    branch, parent = stack.pop()
    yield branch, parent
    stack += [(child, branch) for child in reversed(branch.branches)]


def merge_prefixes(trunk: Sequence[int], branches: Sequence[Branch]) -> Tree:
  """The tree of these branches in which each common prefix is stored once.

  Tokens are common if id, scored flag and advantage agree. Every branch keeps its sequence and at
  least its last token of its own. Branches of branches are kept unmerged; numbers may change.
  """
  root = _PrefixNode(0, [(token, False, 0.0) for token in trunk], [])
  for branch in branches:
    parent, fork, size = root, branch.fork, len(branch.ids)
    scored = [True] * size if branch.scored is None else map(bool, branch.scored)
    advantage = [0.0] * size if branch.advantage is None else map(float, branch.advantage)
    tokens = list(zip(branch.ids, scored, advantage, strict=True))
    own = min((child.fork for child in branch.branches), default=fork + size) - 1  # stays its own
    while True:
      shared = tokens[: own - fork]
      sizes = [child.common(fork, shared) for child in parent.children]
      size = max(sizes, default=0)
      if not size:
        break
      parent, fork, tokens = parent.children[sizes.index(size)], fork + size, tokens[size:]
    parent.children.append(_PrefixNode(fork, tokens, [], branch.branches))
  return Tree(trunk, tuple(node.to_branch() for node in root.children))


@dataclasses.dataclass
class _PrefixNode:
  """A mutable branch with merged children.

  Attributes:
    fork: as in `Branch`.
    tokens: (id, scored, advantage) of each token.
    children: branches that were merged into this one.
    kept: branches of the original branch, unmerged.
  """

  fork: int
  tokens: list[tuple[int, bool, float]]
  children: list["_PrefixNode"]
  kept: tuple[Branch, ...] = ()

  def common(self, fork: int, tokens: list[tuple[int, bool, float]]) -> int:
    """Length of the common prefix with tokens that leave at `fork`."""
    if fork != self.fork:
      return 0
    size = min(len(tokens), len(self.tokens))
    return next((n for n in range(size) if tokens[n] != self.tokens[n]), size)

  def to_branch(self) -> Branch:
    """The branch with its kept and its merged branches."""
    ids, scored, advantage = map(list, zip(*self.tokens, strict=True))
    branches = (*self.kept, *(child.to_branch() for child in self.children))
    return Branch(self.fork, ids, scored, branches, advantage if any(advantage) else None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTrees:
  """Rows of packed trees; every field has shape [..., T].

  Attributes:
    token: int32, the token id; 0 for padding.
    position: int32, index in the unpacked sequence.
    leave: int32, the row index after all tokens that continue this one.
    parent: int32, row index whose hidden state predicts this token; -1 for none.
    scored: bool, True where the token counts in a loss.
  """

  token: jax.Array
  position: jax.Array
  leave: jax.Array
  parent: jax.Array
  scored: jax.Array


def empty_rows(num_rows: int, length: int) -> PackedTrees:
  """Rows of padding, numpy arrays [num_rows, length]."""
  shape = num_rows, length
  return PackedTrees(
    token=np.zeros(shape, np.int32),
    position=np.zeros(shape, np.int32),
    leave=np.broadcast_to(np.arange(1, length + 1, dtype=np.int32), shape).copy(),
    parent=np.full(shape, -1, np.int32),
    scored=np.zeros(shape, bool),
  )


def pack(rows: Sequence[Sequence[Tree]], length: int) -> PackedTrees:
  """Packs each row's trees one after another.

  Args:
    rows: the trees of each row.
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
      for name in ("token", "position", "scored"):
        getattr(out, name)[r, part] = getattr(layout, name)
      out.leave[r, part] = at + layout.leave
      out.parent[r, part] = np.where(layout.parent < 0, -1, at + layout.parent)
      at += tree.num_tokens
  return out


def first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
  """First-fit packing: assigns each tree, in the given order, to the first row with enough space.

  Args:
    sizes: tokens of each tree.
    length: tokens in a row.

  Returns:
    The indices of each row's trees.

  Raises:
    ValueError: a tree is longer than a row.
  """
  rows, free = [], []
  for index, size in enumerate(sizes):
    if size > length:
      raise ValueError(f"Tree {index} has {size} tokens, more than a row of {length}.")
    row = next((r for r, tokens in enumerate(free) if tokens >= size), None)
    if row is None:
      row = len(rows)
      rows.append([])
      free.append(length)
    rows[row].append(index)
    free[row] -= size
  return rows


def sees(query, key, leave):
  """The attention rule k <= q < leave[k], bool [..., Q, K].

  Args:
    query: int [..., Q], row indices.
    key, leave: int [..., K], row indices and their `leave`.
  """
  query = query[..., :, None]
  return (key[..., None, :] <= query) & (query < leave[..., None, :])


class Queries(NamedTuple):
  """Row indices and positions of queries, int32 [..., Q]."""

  index: jax.Array
  position: jax.Array


class Keys(NamedTuple):
  """Row indices, positions and `leave` of keys, int32 [..., K]."""

  index: jax.Array
  position: jax.Array
  leave: jax.Array


def attention_mask(queries: Queries, keys: Keys, window: int | jax.Array = 0) -> jax.Array:
  """The attention rule with a sliding window.

  Args:
    queries, keys: their row indices and positions.
    window: number of last positions that a query sees, including its own; 0 for all. A traced
      scalar must not be 0.

  Returns:
    bool [..., Q, K]; True where the query sees the key.
  """
  seen = sees(queries.index, keys.index, keys.leave)
  if isinstance(window, int) and not window:
    return seen
  return seen & (queries.position[..., :, None] - keys.position[..., None, :] < window)


def row_keys(trees: PackedTrees) -> Keys:
  """The rows' tokens as keys [..., T]."""
  index = jnp.broadcast_to(jnp.arange(trees.leave.shape[-1], dtype=jnp.int32), trees.leave.shape)
  return Keys(index, trees.position, trees.leave)
