"""Packing against fields written by hand; the attention rule against unpacked paths."""

import dataclasses

import jax
import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.tree import Branch, Tree
from tests import random_trees

# Two branches at one fork in the trunk's middle; a later one, partly scored, with a branch of its
# own.
FIRST = Tree(
  trunk=[10, 11, 12, 13],
  branches=(
    Branch(2, [20, 21, 22]),
    Branch(2, [30]),
    Branch(3, [40, 41], scored=[True, False], branches=(Branch(4, [70, 71]),)),
  ),
)
SECOND = Tree(trunk=[50, 51], branches=(Branch(2, [60]),))


class PackTest(absltest.TestCase):
  def test_fields_by_hand(self):
    # Fails if branches do not follow in falling order of fork, each before its own siblings' but
    # behind its own; if a branch's positions restart at 0, if its first token's parent is the row's
    # token before it, if `leave` counts from the tree, or if padding gets a parent or a score.
    packed = tree_lib.pack([[SECOND], [FIRST, SECOND]], 18)
    expected = {
      "token": [10, 11, 12, 13, 40, 41, 70, 71, 20, 21, 22, 30, 50, 51, 60, 0, 0, 0],
      "position": [0, 1, 2, 3, 3, 4, 4, 5, 2, 3, 4, 2, 0, 1, 2, 0, 0, 0],
      "leave": [12, 12, 8, 4, 8, 6, 8, 8, 11, 11, 11, 12, 15, 15, 15, 16, 17, 18],
      "parent": [-1, 0, 1, 2, 2, 4, 4, 6, 1, 8, 9, 1, -1, 12, 13, -1, -1, -1],
      "scored": [0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0],
    }
    self.assertSameElements(expected, [field.name for field in dataclasses.fields(packed)])
    for name, values in expected.items():
      field = getattr(packed, name)
      self.assertEqual(field.shape, (2, 18), name)
      self.assertEqual(field.dtype, bool if name == "scored" else np.int32, name)
      self.assertEqual(field[1].tolist(), values, name)
    self.assertEqual(packed.parent[0].tolist(), [-1, 0, 1] + [-1] * 15)
    self.assertEqual(FIRST.layout.end.tolist(), [10, 11, 5, 7])

  def test_sequences_of_random_trees(self):
    # Fails if a branch is numbered in the order of the row, if its last token sees another branch
    # or not all of its own path, if a position or a parent is not the one of its sequence, or if a
    # scored mask goes to another branch.
    rng = np.random.default_rng(1)
    for _ in range(60):
      tree = random_trees.draw(rng)
      layout = tree.layout
      self.assertEqual(tree.num_tokens, len(layout.token))
      sequences = random_trees.sequences(tree)
      self.assertEqual(tree.num_branches, len(sequences))
      for number, (ids, scored) in enumerate(sequences):
        before, own = tree.path(number)
        path = np.concatenate([before, own])
        self.assertEqual(layout.token[path].tolist(), ids)
        self.assertEqual(layout.scored[path].tolist(), scored)
        self.assertEqual(layout.position[path].tolist(), list(range(len(ids))))
        self.assertEqual(layout.parent[path].tolist(), [-1, *path[:-1]])
        self.assertEqual(len(before), np.sum(path < len(tree.trunk)))

  def test_counts(self):
    # Fails if unscored branch tokens count as scored, or branches of branches are forgotten.
    self.assertEqual(
      (FIRST.num_tokens, FIRST.num_scored, FIRST.num_branches), (12, 3 + 1 + 1 + 2, 4)
    )
    self.assertEqual((SECOND.num_tokens, SECOND.num_scored, SECOND.num_branches), (3, 1, 1))

  def test_one_branch_may_stand_twice(self):
    # Fails if branches are identified by content instead of position.
    twin = Branch(1, [7, 8])
    tree = Tree([1, 2], (twin, twin))
    self.assertEqual(tree.layout.token.tolist(), [1, 2, 7, 8, 7, 8])
    self.assertEqual(tree.layout.end.tolist(), [3, 5])

  def test_a_full_row_fits_and_one_more_token_does_not(self):
    # Fails if the check of a row's length is off by one in either direction.
    self.assertEqual(tree_lib.pack([[FIRST, SECOND]], 15).token[0, -3:].tolist(), [50, 51, 60])
    with self.assertRaisesRegex(ValueError, "Row 1 overflows: its trees need more than 14 tokens"):
      tree_lib.pack([[], [FIRST, SECOND]], 14)


class TreeErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"trunk": []}, "at least one token"),
    (
      {"trunk": [1, 2], "branches": (Branch(1, [3]), Branch(0, [3]))},
      "Branch 1 forks at 0, outside 1..2",
    ),
    ({"trunk": [1, 2], "branches": (Branch(3, [3]),)}, "Branch 0 forks at 3, outside 1..2"),
    (
      {"trunk": [1, 2], "branches": (Branch(1, [3], branches=(Branch(1, [4]),)),)},
      "Branch 1 forks at 1, outside 2..2",
    ),
    (
      {"trunk": [1, 2], "branches": (Branch(2, [3, 3], branches=(Branch(5, [4]),)),)},
      "Branch 1 forks at 5, outside 3..4",
    ),
    ({"trunk": [1, 2], "branches": (Branch(1, []),)}, "Branch 0 is empty"),
    ({"trunk": [1, 2], "branches": (Branch(1, [3, 4], scored=[True]),)}, "another length"),
  )
  def test_refuses(self, arguments, sentence):
    # Fails for each check that __post_init__ loses.
    with self.assertRaisesRegex(ValueError, sentence):
      Tree(**arguments)

  def test_what_was_checked_stays(self):
    # Fails if a field can be changed after the checks.
    for value, name in (
      (FIRST, "trunk"),
      (FIRST.branches[0], "fork"),
      (tree_lib.empty_rows(1, 1), "token"),
    ):
      with self.assertRaises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)


class SharingTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if a beginning is shared across another scored mask, if a sequence that is another's
    # beginning, or another's twin, is lost, if a branch leaves at the wrong fork, or if only the
    # first level is shared.
    ids = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 9, 4], [5, 6], [5, 6, 7, 8], [8, 8]]
    unscored = Branch(2, [5, 6, 3], scored=[False, True, True])
    tree = tree_lib.merge_prefixes([1, 2], [*(Branch(2, part) for part in ids), unscored])
    found = random_trees.sequences(tree)
    expected = [([1, 2, *part], [False] * 2 + [True] * len(part)) for part in ids]
    self.assertCountEqual(found, [*expected, ([1, 2, 5, 6, 3], [False] * 3 + [True] * 2)])
    self.assertEqual(tree.num_tokens, 2 + 4 + 1 + 1 + 1 + 1 + 2 + 3)

  def test_branches_of_branches_are_kept(self):
    # Fails if a beginning is shared beyond a branch of its own.
    branches = [Branch(1, [2, 3, 5]), Branch(1, [2, 3, 4], branches=(Branch(2, [9]),))]
    tree = tree_lib.merge_prefixes([1], branches)
    before = random_trees.sequences(Tree([1], tuple(branches)))
    self.assertCountEqual(random_trees.sequences(tree), before)

  def test_random_branches(self):
    # Fails if a sequence changes, or nothing is shared. Ids of 2 to 3 only, so that most beginnings
    # are in common.
    rng = np.random.default_rng(0)
    for _ in range(50):
      tree = random_trees.draw(rng, depth=1, high=4)
      shared = tree_lib.merge_prefixes(tree.trunk, tree.branches)
      self.assertCountEqual(random_trees.sequences(shared), random_trees.sequences(tree))
      self.assertLessEqual(shared.num_tokens, tree.num_tokens)


class FirstFitTest(parameterized.TestCase):
  @parameterized.parameters(
    ([], 8, []),
    ([8, 8], 8, [[0], [1]]),  # full rows
    ([5, 6, 3, 2], 8, [[0, 2], [1, 3]]),  # next-fit would not go back to the first row
    ([4, 5, 3], 8, [[0, 2], [1]]),  # best-fit would choose the second row
    ([1, 7, 8], 8, [[0, 1], [2]]),  # sorting by size would put 8 first
  )
  def test_rows(self, sizes, length, rows):
    # Fails if a tree goes to the last row, to the fullest row or in another order, or if an exact
    # fit does not fit.
    self.assertEqual(tree_lib.first_fit(sizes, length), rows)

  def test_a_tree_longer_than_a_row(self):
    # Fails if the check is lost or is >=.
    with self.assertRaisesRegex(ValueError, "Tree 1 has 9 tokens, more than a row of 8"):
      tree_lib.first_fit([8, 9], 8)


def row_mask(packed, window=0):
  keys = tree_lib.row_keys(packed)
  return tree_lib.attention_mask(tree_lib.Queries(keys.index, keys.position), keys, window)


class AttentionMaskTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 4)
  def test_equals_the_paths_on_random_rows(self, window):
    # Fails if trees of one row see each other, siblings see each other, a branch sees its path
    # beyond its fork or not up to it, a token sees what continues it, padding sees anything but
    # itself, or a window counts row indices.
    rng = np.random.default_rng(0)
    rows = [[FIRST, SECOND], [SECOND, FIRST]]
    rows += [[random_trees.draw(rng) for _ in range(rng.integers(1, 4))] for _ in range(30)]
    length = 2 + max(sum(tree.num_tokens for tree in row) for row in rows)
    packed = tree_lib.pack(rows, length)
    mask = np.asarray(row_mask(packed, window))
    for r in range(len(rows)):
      for q in range(length):
        path = [q]  # from the query up through its parents
        while packed.parent[r, path[-1]] >= 0:
          path.append(int(packed.parent[r, path[-1]]))
        self.assertEqual(
          np.flatnonzero(mask[r, q]).tolist(), sorted(path[:window] if window else path)
        )

  def test_one_row_without_a_batch_axis(self):
    # Fails if the axes are counted from the front.
    packed = tree_lib.pack([[FIRST]], 14)
    row = tree_lib.PackedTrees(
      **{field.name: getattr(packed, field.name)[0] for field in dataclasses.fields(packed)}
    )
    np.testing.assert_array_equal(row_mask(row), row_mask(packed)[0])

  def test_compiled(self):
    # Fails if packed trees cannot be handed to a compiled function, field by field.
    packed = tree_lib.pack([[FIRST]], 14)
    np.testing.assert_array_equal(jax.jit(row_mask)(packed), row_mask(packed))
    self.assertLen(jax.tree.leaves(packed), 5)


if __name__ == "__main__":
  absltest.main()
