"""Tokens of layouts, against counts by hand."""

from absl.testing import absltest

from benchmarks import tree_depth
from synthneg_jax.core.tree import Branch
from synthneg_jax.data.records import Pair


def pair(trunk, chosen, rejected, context=0) -> Pair:
  fields = {name: "" for name in Pair.__dataclass_fields__}
  return Pair(
    **fields
    | {"trunk": trunk, "chosen": chosen, "rejected": rejected, "context": context, "id": "p"}
  )


class TreeDepthTest(absltest.TestCase):
  def test_solutions(self):
    # Fails if what two branches share is counted twice in the deep tree, or once at one fork.
    branches = [Branch(2, ids) for ids in ((3, 4, 5), (3, 4, 6), (7,))]
    self.assertEqual(tree_depth.tokens([1, 2], branches), (5 + 5 + 3, 2 + 7, 2 + 2 + 1 + 1 + 1))

  def test_pairs_at_different_steps(self):
    # Fails if the prompt counts once a trunk in the deep tree, or if a token that one pair scores
    # is shared with one that is context to another.
    pairs = [pair([1, 2], [3, 4], [5]), pair([1, 2, 5], [6], [7]), pair([1, 2, 5], [6], [8])]
    separate = 4 + 3 + 2 * (4 + 4)
    by_fork = (2 + 3) + (3 + 3)
    deep = 2 + 2 + 1 + (1 + 3)
    self.assertEqual(tree_depth.pair_tokens([1, 2], pairs), (separate, by_fork, deep))

  def test_table(self):
    # Fails if the share is of another column.
    self.assertIn(
      "| x | 30 | 20 | 15 | 25% |", tree_depth.table([("x", [(10, 8, 6), (20, 12, 9)])])
    )


if __name__ == "__main__":
  absltest.main()
