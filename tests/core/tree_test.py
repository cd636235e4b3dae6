"""Packing against fields written by hand, and the attention rule against the unpacked sequences."""

import dataclasses

import jax
import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.tree import Branch, Tree

# A scored trunk; two branches at one fork in its middle, one of them partly scored; a branch at a later fork.
FIRST = Tree(
  trunk=[10, 11, 12, 13],
  branches=(Branch(2, [20, 21, 22]), Branch(2, [30]), Branch(3, [40, 41], scored=[True, False])),
  trunk_scored=[False, False, True, True],
)
SECOND = Tree(trunk=[50, 51], branches=(Branch(2, [60]),))


def random_tree(rng: np.random.Generator) -> Tree:
  """A tree of 1 to 6 trunk tokens and 0 to 3 branches of 1 to 4 tokens."""
  size = int(rng.integers(1, 7))
  branches = tuple(
    Branch(int(rng.integers(1, size + 1)), rng.integers(0, 9, rng.integers(1, 5)).tolist())
    for _ in range(rng.integers(0, 4))
  )
  return Tree(rng.integers(0, 9, size).tolist(), branches)


def places(trees: list[Tree]) -> list[tuple[int, int | None, int]]:
  """For each token of a row (tree, branch of that tree or None, place in the trunk or branch)."""
  found = []
  for t, tree in enumerate(trees):
    found += [(t, None, j) for j in range(len(tree.trunk))]
    for b, branch in enumerate(tree.branches):
      found += [(t, b, j) for j in range(len(branch.ids))]
  return found


def sees(trees: list[Tree], query, key) -> bool:
  """The rule of the module's docstring, from the trees and not from packed fields."""
  (query_tree, query_branch, query_at), (key_tree, key_branch, key_at) = query, key
  if query_tree != key_tree:
    return False
  if query_branch == key_branch:
    return key_at <= query_at
  return key_branch is None and key_at < trees[query_tree].branches[query_branch].fork


class PackTest(absltest.TestCase):
  def test_fields_by_hand(self):
    # Fails if a branch's positions restart at 0, if its first token's parent is the row's token before it, if branches
    # are numbered anew in each tree, or if padding gets a tree, a parent or a score.
    packed = tree_lib.pack([[SECOND], [FIRST, SECOND]], 16)
    expected = {
      "token": [10, 11, 12, 13, 20, 21, 22, 30, 40, 41, 50, 51, 60, 0, 0, 0],
      "position": [0, 1, 2, 3, 2, 3, 4, 2, 3, 4, 0, 1, 2, 0, 0, 0],
      "tree": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0],
      "branch": [0, 0, 0, 0, 1, 1, 1, 2, 3, 3, 0, 0, 4, 0, 0, 0],
      "fork": [0, 0, 0, 0, 2, 2, 2, 2, 3, 3, 0, 0, 2, 0, 0, 0],
      "parent": [-1, 0, 1, 2, 1, 4, 5, 1, 2, 8, -1, 10, 11, -1, -1, -1],
      "scored": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0],
    }
    self.assertSameElements(expected, [field.name for field in dataclasses.fields(packed)])
    for name, values in expected.items():
      field = getattr(packed, name)
      self.assertEqual(field.shape, (2, 16), name)
      self.assertEqual(field.dtype, bool if name == "scored" else np.int32, name)
      self.assertEqual(field[1].tolist(), values, name)
    self.assertEqual(packed.parent[0].tolist(), [-1, 0, 1] + [-1] * 13)

  def test_fields_of_random_rows(self):
    # Fails if a field is right by the chance of where the rows above begin their trees: here they begin anywhere.
    rng = np.random.default_rng(1)
    rows = [[random_tree(rng) for _ in range(rng.integers(1, 6))] for _ in range(30)]
    packed = tree_lib.pack(rows, 90)
    for r, trees in enumerate(rows):
      found = places(trees)
      first = np.cumsum([0, *(len(tree.branches) for tree in trees)])  # branches of the row before each tree
      for at, (t, b, j) in enumerate(found):
        if b is None:
          expected = (trees[t].trunk[j], j, t + 1, 0, 0, found.index((t, None, j - 1)) if j else -1)
        else:
          branch = trees[t].branches[b]
          parent = found.index((t, b, j - 1) if j else (t, None, branch.fork - 1))
          expected = (branch.ids[j], branch.fork + j, t + 1, first[t] + b + 1, branch.fork, parent)
        got = [getattr(packed, name)[r, at] for name in ("token", "position", "tree", "branch", "fork", "parent")]
        self.assertSequenceEqual(got, expected)

  def test_counts(self):
    # Fails if unscored branch tokens count as scored, or trunk scores are forgotten.
    self.assertEqual((FIRST.num_tokens, FIRST.num_scored), (10, 2 + 3 + 1 + 1))
    self.assertEqual((SECOND.num_tokens, SECOND.num_scored), (3, 1))
    both = Tree([1, 2, 3], (Branch(1, [4]),), [False, True, False])
    self.assertEqual((both.num_tokens, both.num_scored), (4, 2))

  def test_a_full_row_fits_and_one_more_token_does_not(self):
    # Fails if the check for room is off by one in either direction.
    self.assertEqual(tree_lib.pack([[FIRST, SECOND]], 13).tree[0].tolist(), [1] * 10 + [2] * 3)
    with self.assertRaisesRegex(ValueError, "Row 1 overflows: its trees need more than 12 tokens"):
      tree_lib.pack([[], [FIRST, SECOND]], 12)


class TreeErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"trunk": []}, "at least one token"),
    ({"trunk": [1, 2], "trunk_scored": [False]}, "trunk_scored"),
    ({"trunk": [1, 2], "trunk_scored": [True, False]}, "trunk_scored"),
    ({"trunk": [1, 2], "branches": (Branch(1, [3]), Branch(0, [3]))}, "Branch 1 forks at 0, outside 1..2"),
    ({"trunk": [1, 2], "branches": (Branch(3, [3]),)}, "Branch 0 forks at 3, outside 1..2"),
    ({"trunk": [1, 2], "branches": (Branch(1, []),)}, "Branch 0 is empty"),
    ({"trunk": [1, 2], "branches": (Branch(1, [3, 4], scored=[True]),)}, "another length"),
  )
  def test_refuses(self, arguments, sentence):
    # Fails for each check that __post_init__ loses.
    with self.assertRaisesRegex(ValueError, sentence):
      Tree(**arguments)

  def test_what_was_checked_stays(self):
    # Fails if a field can be changed after the checks.
    for value, name in ((FIRST, "trunk"), (FIRST.branches[0], "fork"), (tree_lib.empty_rows(1, 1), "token")):
      with self.assertRaises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)


class FirstFitTest(parameterized.TestCase):
  @parameterized.parameters(
    ([], 8, []),
    ([8, 8], 8, [[0], [1]]),  # full rows
    ([5, 6, 3, 2], 8, [[0, 2], [1, 3]]),  # next-fit would not go back to the first row
    ([4, 5, 3], 8, [[0, 2], [1]]),  # best-fit would choose the second row
    ([1, 7, 8], 8, [[0, 1], [2]]),  # sorting by size would put 8 first
  )
  def test_rows(self, sizes, length, rows):
    # Fails if a tree goes to the last row, to the fullest row or in another order, or if an exact fit does not fit.
    self.assertEqual(tree_lib.first_fit(sizes, length), rows)

  def test_a_tree_longer_than_a_row(self):
    # Fails if the check is lost or is >=.
    with self.assertRaisesRegex(ValueError, "Tree 1 has 9 tokens, more than a row of 8"):
      tree_lib.first_fit([8, 9], 8)


class AttentionMaskTest(absltest.TestCase):
  def test_equals_the_rule_on_random_rows(self):
    # Fails if trees of one row see each other, siblings see each other, a branch sees the trunk at its fork or only
    # up to its row index, a trunk sees its branches, or padding sees anything.
    rng = np.random.default_rng(0)
    rows = [[FIRST, SECOND], [SECOND, FIRST]]
    rows += [[random_tree(rng) for _ in range(rng.integers(1, 4))] for _ in range(30)]
    length = 2 + max(sum(tree.num_tokens for tree in row) for row in rows)
    mask = np.asarray(tree_lib.attention_mask(tree_lib.pack(rows, length)))
    expected = np.zeros((len(rows), length, length), bool)
    for r, trees in enumerate(rows):
      found = places(trees)
      for q, query in enumerate(found):
        for k, key in enumerate(found):
          expected[r, q, k] = sees(trees, query, key)
    np.testing.assert_array_equal(mask, expected)

  def test_one_row_without_a_batch_axis(self):
    # Fails if the axes are counted from the front.
    packed = tree_lib.pack([[FIRST]], 12)
    row = tree_lib.PackedTrees(**{field.name: getattr(packed, field.name)[0] for field in dataclasses.fields(packed)})
    np.testing.assert_array_equal(tree_lib.attention_mask(row), tree_lib.attention_mask(packed)[0])

  def test_compiled(self):
    # Fails if packed trees cannot be handed to a compiled function, field by field.
    packed = tree_lib.pack([[FIRST]], 12)
    np.testing.assert_array_equal(jax.jit(tree_lib.attention_mask)(packed), tree_lib.attention_mask(packed))
    self.assertLen(jax.tree.leaves(packed), 7)


if __name__ == "__main__":
  absltest.main()
