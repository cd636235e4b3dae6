"""The examples of each batch, and the fields of a batch by hand."""

import collections
import dataclasses

import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core.geometry import RowOptions, Rows
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training import batches as batches_lib
from synthneg_jax.training.batch import Example, PairInTree, Shape
from synthneg_jax.training.batches import Batches, Schedule
from tests import tiny_model

# 7 tokens: trunk 1 2 3, branches 4 5 | 6 | 6 7, the 7 unscored; two pairs share the rejected
# branch.
A = Example(
  Tree([1, 2, 3], (Branch(2, [4, 5]), Branch(3, [6], branches=(Branch(4, [7], scored=[False]),)))),
  (PairInTree(0, 1, -1.5, -2.5), PairInTree(2, 1, -3.5, -2.5)),
)
B = Example(Tree([8, 9], (Branch(1, [10]),)))  # 3 tokens, no pair
# 5 tokens
C = Example(Tree([11], (Branch(1, [12]), Branch(1, [13, 14, 15]))), (PairInTree(1, 0, -4.5, -5.5),))


def plan(weights, batch_size, num_epochs, seed):
  """The steps of these weights."""
  return batches_lib.plan(
    weights, Schedule(batch_size=batch_size, num_epochs=num_epochs, seed=seed)
  )


class PlanTest(parameterized.TestCase):
  @parameterized.product(seed=(0, 1), num_epochs=(1, 3), batch_size=(4, 5, 64))
  def test_each_example_comes_once_an_epoch_and_batches_are_as_full_as_order_allows(
    self, seed, num_epochs, batch_size
  ):
    # Fails if an example is lost or doubled between batches or epochs, if a batch weighs more than
    # batch_size, if one is closed although the next example fits, or if epochs end batches.
    weights = np.random.default_rng(0).integers(1, 5, 23).tolist()
    steps = plan(weights, batch_size, num_epochs, seed)
    flat = [index for step in steps for index in step]
    for epoch in range(num_epochs):
      self.assertCountEqual(flat[23 * epoch : 23 * (epoch + 1)], range(23))
    for step, following in zip(steps, [*steps[1:], None], strict=True):
      weight = sum(weights[i] for i in step)
      self.assertLessEqual(weight, batch_size)
      if following:
        self.assertGreater(weight + weights[following[0]], batch_size)

  def test_is_a_function_of_the_seed(self):
    # Fails if numpy's global state or the order of calls enters, if the seed does not, or if all
    # epochs have one order.
    first = plan([1] * 20, 20, 2, 3)
    np.random.seed(5)
    plan([1] * 20, 20, 2, 4)
    self.assertEqual(plan([1] * 20, 20, 2, 3), first)
    self.assertNotEqual(plan([1] * 20, 20, 2, 4), first)
    self.assertNotEqual(first[0], first[1])
    self.assertNotEqual(first[0], list(range(20)))

  def test_a_curriculum_keeps_its_order(self):
    # Fails if examples are shuffled although there is no seed, in the first epoch or a later one.
    steps = batches_lib.plan([1] * 5, Schedule(batch_size=3, num_epochs=2, seed=None))
    self.assertEqual(steps, [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4]])

  @parameterized.parameters((0.25, 2), (0.5, 4), (1.5, 12), (2.0, 16), (2.75, 22))
  def test_fractional_epochs(self, num_epochs, size):
    # Fails if the fraction is rounded up to an epoch, dropped, or repeats examples within an epoch.
    flat = [index for step in plan([1] * 8, 3, num_epochs, 0) for index in step]
    self.assertLen(flat, size)
    counts = collections.Counter(flat)
    self.assertContainsSubset({counts[i] for i in range(8)}, {int(num_epochs), int(num_epochs) + 1})
    self.assertEqual(flat, [i for step in plan([1] * 8, 3, 3, 0) for i in step][:size])

  def test_refuses(self):
    # Fails if a check is lost: an empty batch would train on nothing, a heavy example never fit.
    with self.assertRaisesRegex(UserError, "Nothing to train on"):
      plan([], 4, 1, 0)
    with self.assertRaisesRegex(UserError, "has 5 solutions or pairs, more than batch_size=4"):
      plan([1, 5, 2], 4, 1, 0)
    with self.assertRaisesRegex(UserError, "num_epochs=0.1 selects none of the 3 example"):
      plan([1, 1, 1], 4, 0.1, 0)
    with self.assertRaisesRegex(UserError, "num_epochs=0 "):
      plan([1, 1, 1], 4, 0, 0)
    self.assertEqual(plan([4], 4, 1, 0), [[0]])


class BatchesTest(parameterized.TestCase):
  def make(
    self,
    examples=(A, B, C) * 3,
    batch_size=3,
    num_epochs=2,
    max_steps=0,
    row_length=8,
    row_shards=2,
  ):
    return Batches(
      examples,
      [f"p{i}" for i in range(len(examples))],
      schedule=Schedule(batch_size=batch_size, num_epochs=num_epochs, max_steps=max_steps),
      row_options=RowOptions(row_length, row_shards, microbatches=1),
    )

  def test_chosen_rows(self):
    # Fails if examples change steps with the geometry, if a step's batch has other rows than the
    # geometry says or loses tokens, if trees are not placed by decreasing size, if fullness is of
    # something else, or if a settled geometry is not taken.
    given, chosen = self.make(), self.make(row_length=0, row_shards=1)
    self.assertEqual((chosen.rows.by_size, given.rows.by_size), (True, False))
    for step in range(chosen.num_steps):
      self.assertCountEqual(chosen.keys(step), given.keys(step))
      batch = chosen.build(step)
      self.assertEqual(batch.trees.token.size, chosen.capacity(step))
      self.assertIn(batch.trees.token.shape[0], chosen.rows.counts)
      self.assertEqual(int((batch.trees.token > 0).sum()), given.num_tokens(step))
      sizes = [chosen._examples[i].tree.num_tokens for i in chosen._steps[step]]
      self.assertEqual(sizes, sorted(sizes, reverse=True))
    steps = range(chosen.num_steps)
    self.assertAlmostEqual(
      chosen.packing_efficiency,
      sum(map(chosen.num_tokens, steps)) / sum(map(chosen.capacity, steps)),
    )
    settled = Batches(
      (A, B, C),
      ["a", "b", "c"],
      schedule=Schedule(batch_size=4, num_epochs=1),
      row_options=RowOptions(shards=2),
      choose_once=lambda choose: Rows(9, (1, 3), 2, by_size=True),
    )
    self.assertEqual((settled.rows.length, settled.rows.counts), (9, (4,)))

  def test_one_shape_holds_all_steps(self):
    # Fails if the shape is the first step's, the smallest, or not rounded up to whole shards of
    # rows; build raises or gives another shape then.
    batches = self.make(row_shards=4)
    widest = collections.Counter()
    for step in range(batches.num_steps):
      batch = batches.build(step)
      rows, length, shape = batches.shape.rows, batches.shape.length, batches.shape
      self.assertEqual(batch.trees.token.shape, (rows, length))
      self.assertEqual(batch.scored_at.shape, (rows, shape.scored))
      for field in (batch.chosen, batch.rejected, batch.ref_chosen, batch.ref_rejected):
        self.assertEqual(field.shape, (rows, shape.pairs))
      used = {
        "rows": int((batch.trees.token.max(1) > 0).sum()),
        "scored": int((batch.scored_at >= 0).sum(1).max()),
        "pairs": int((batch.chosen >= 0).sum(1).max()),
        "branches": int((batch.branch_end >= 0).sum(1).max()),
      }
      widest = collections.Counter({name: max(widest[name], count) for name, count in used.items()})
    self.assertEqual(
      batches.shape,
      Shape(
        -(-widest["rows"] // 4) * 4, 8, widest["scored"], widest["pairs"], widest["branches"]
      ).rounded(),
    )

  def test_fill(self):
    # Fails if padding rows or the ends of rows do not count as empty, or if steps are left out.
    batches = self.make()
    full = np.mean([batches.build(step).trees.token > 0 for step in range(batches.num_steps)])
    self.assertAlmostEqual(batches.packing_efficiency, full)
    self.assertBetween(full, 0.1, 0.9)

  def test_weights_and_keys(self):
    # Fails if an example with pairs weighs its branches, one without pairs nothing, or keys are
    # another step's.
    batches = self.make((A, B, C), batch_size=3, num_epochs=1)  # weights 2, 1, 1
    self.assertEqual(batches.num_steps, 2)
    self.assertEqual(sorted(len(batches.keys(step)) for step in range(2)), [1, 2])
    of = {"p0": A, "p1": B, "p2": C}
    for step in range(2):
      tokens = sorted(t for key in batches.keys(step) for t in of[key].tree.layout.token.tolist())
      batch = batches.build(step)
      self.assertEqual(sorted(batch.trees.token[batch.trees.token > 0].tolist()), tokens)
    self.assertEqual(self.make((B,) * 8, batch_size=4, num_epochs=1).num_steps, 2)
    two_branches = Example(Tree([1], (Branch(1, [2]), Branch(1, [3]))))
    self.assertEqual(self.make((two_branches,) * 8, batch_size=4, num_epochs=1).num_steps, 4)

  def test_max_steps(self):
    # Fails if the bound is not applied, or 0 bounds.
    self.assertGreater(self.make().num_steps, 3)
    self.assertEqual(self.make(max_steps=3).num_steps, 3)
    self.assertEqual(self.make(max_steps=1000).num_steps, self.make().num_steps)

  def test_an_example_longer_than_a_row(self):
    # Fails if it is found only when rows are packed, without its name, or if a full row is refused.
    with self.assertRaisesRegex(UserError, "p0: its tree has 7 tokens, more than row_length=6"):
      self.make(row_length=6)
    self.make(row_length=7)


class BuildTest(absltest.TestCase):
  def test_fields_by_hand(self):
    # Fails if branch numbers do not continue from tree to tree, if padding of pairs is not -1,
    # if an example without branches or pairs shifts the others, if scored_at holds parents,
    # unscored tokens or other rows' indices, or if a token that two branches share counts once in
    # num_scored.
    batch = batch_lib.build([A, C, B], Shape(rows=3, length=11, scored=6, pairs=2, branches=4))
    # Row 0: A then B (they fit), row 1: C, row 2: padding.
    self.assertEqual(
      batch.trees.token.tolist(),
      [[1, 2, 3, 6, 7, 4, 5, 8, 9, 10, 0], [11, 12, 13, 14, 15] + [0] * 6, [0] * 11],
    )
    self.assertEqual(batch.branch_end.tolist(), [[6, 3, 4, 9], [1, 4, -1, -1], [-1] * 4])
    self.assertEqual(
      batch.scored_at.tolist(), [[3, 5, 6, 9, -1, -1], [1, 2, 3, 4, -1, -1], [-1] * 6]
    )
    self.assertEqual(batch.chosen.tolist(), [[0, 2], [1, -1], [-1, -1]])
    self.assertEqual(batch.rejected.tolist(), [[1, 1], [0, -1], [-1, -1]])
    self.assertEqual(batch.ref_chosen.tolist(), [[-1.5, -3.5], [-4.5, 0.0], [0.0, 0.0]])
    self.assertEqual(batch.ref_rejected.tolist(), [[-2.5, -2.5], [-5.5, 0.0], [0.0, 0.0]])
    self.assertEqual((float(batch.num_scored), float(batch.num_pairs)), (9.0, 3.0))
    self.assertEqual((batch.num_scored.dtype, batch.num_scored.shape), (np.float32, ()))

  def test_numbers_go_on_over_trees_with_pairs(self):
    # Fails if the second tree's pairs count its branches from 0 again.
    batch = batch_lib.build([C, A, C], Shape(rows=1, length=17, scored=12, pairs=4, branches=7))
    self.assertEqual(
      (batch.chosen[0].tolist(), batch.rejected[0].tolist()), ([1, 2, 4, 6], [0, 3, 3, 5])
    )

  def test_measure(self):
    # Fails if a size is that of another row or a sum over rows, or if none or no scored token gives
    # a size of 0, which no program takes.
    self.assertEqual(batch_lib.measure([A, C, B], 11), Shape(2, 11, 4, 2, 4))
    self.assertEqual(batch_lib.measure([A, C, B], 7), Shape(3, 7, 4, 2, 3))
    self.assertEqual(batch_lib.measure([], 7), Shape(1, 7, 1, 0, 0))

  def test_rounded(self):
    # Fails if a count is rounded down or beyond the row, or if data of one kind need many programs.
    self.assertEqual(Shape(3, 320, 141, 5, 9).rounded(), Shape(3, 320, 160, 8, 16))
    self.assertEqual(Shape(3, 320, 319, 4, 8).rounded(), Shape(3, 320, 320, 4, 8))
    self.assertEqual(Shape(1, 7, 4, 0, 0).rounded(), Shape(1, 7, 4, 0, 0))
    self.assertLen({Shape(1, 320, scored, 0, 1).rounded() for scored in range(1, 321)}, 16)

  def test_too_small_a_shape(self):
    # Fails if rows beyond the shape are dropped in silence.
    with self.assertRaisesRegex(ValueError, "2 examples need 2 rows; the shape has 1"):
      batch_lib.build([A, C], Shape(rows=1, length=7, scored=6, pairs=2, branches=4))

  def test_counts_of_nothing_are_one(self):
    # Fails if a batch without pairs or scored tokens divides by zero.
    batch = batch_lib.build([], Shape(rows=1, length=4, scored=1, pairs=0, branches=0))
    self.assertEqual((float(batch.num_scored), float(batch.num_pairs)), (1.0, 1.0))


class IdsTest(absltest.TestCase):
  def test_ids_beyond_the_embedding(self):
    # Fails if a training runs on ids that have no row: a lookup clamps them without a word.
    trees = [Tree([1, 2], (Branch(2, [3]),)), Tree([1, 2], (Branch(2, [3, 31]),))]
    planned = Batches(
      [Example(tree) for tree in trees],
      ["a", "b"],
      schedule=Schedule(batch_size=1, num_epochs=1),
      row_options=RowOptions(length=8),
    )
    planned.check_ids(dataclasses.replace(tiny_model.CONFIG, vocab_size=32))
    with self.assertRaisesRegex(UserError, "b: its text holds token id 31.*embedding has 31 rows"):
      planned.check_ids(tiny_model.CONFIG)


if __name__ == "__main__":
  absltest.main()
