"""Pairs of every mode by hand: which branch is chosen, which rejected, what trunk they share."""

import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import pairs
from synthneg_jax.core.pairs import Response, TokenPair

EOS = 2
PROMPT = (90, 91)
SOLUTION = [50, 51, EOS]
# Three steps: [10, 11], [12] and [13, 14, EOS].
WRONG = Response((10, 11, 12, 13, 14, EOS), (2, 3, 6))
# Right rollouts from the prefix [10, 11]: first steps [12] (the pit itself), [20, 21], [22] and [20, 21] again.
SAME = Response([12, 30, EOS], [1, 3])
LONG = Response([20, 21, 31, 32, EOS], [2, 5])
SHORT = Response([22, EOS], [1, 2])
AGAIN = Response([20, 21, EOS], [2, 3])


def shared(pit=1, right=(SAME, LONG, SHORT, AGAIN), firsts=(), continuation="step", choice="random", seed=0):
  return pairs.shared_prefix(
    PROMPT, WRONG, pit, right, firsts, continuation=continuation, choice=choice, rng=np.random.default_rng(seed)
  )


class ResponseTest(absltest.TestCase):
  def test_prefix_and_step(self):
    # Fails if an end is taken as inclusive, if prefix counts from 1, or if a step starts at the step before it.
    self.assertEqual(
      [WRONG.prefix(steps) for steps in range(4)], [[], [10, 11], [10, 11, 12], [10, 11, 12, 13, 14, EOS]]
    )
    self.assertEqual([WRONG.step(index) for index in range(3)], [[10, 11], [12], [13, 14, EOS]])


class WholeResponseTest(parameterized.TestCase):
  @parameterized.parameters((0, [10, 11]), (1, [10, 11, 12]), (2, [10, 11, 12, 13, 14, EOS]))
  def test_algorithm1(self, pit, rejected):
    # Fails if the pit itself is cut off, if the whole wrong response is rejected (EOS and what follows the pit), if the
    # chosen loses its EOS, or if steps before the pit become trunk.
    self.assertEqual(pairs.algorithm1(PROMPT, SOLUTION, WRONG, pit), TokenPair([90, 91], SOLUTION, rejected))
    if pit < 2:
      self.assertNotIn(EOS, rejected)

  def test_arbitrary(self):
    # Fails if either response is cut.
    self.assertEqual(pairs.arbitrary(PROMPT, SOLUTION, WRONG), TokenPair([90, 91], SOLUTION, list(WRONG.ids)))


class SharedPrefixTest(parameterized.TestCase):
  def test_pit_in_the_middle(self):
    # Fails if the trunk lacks the steps before the pit or holds the pit, or if the rejected is more than the pit.
    pair = shared(choice="shortest")
    self.assertEqual(pair, TokenPair([90, 91, 10, 11], [22], [12]))

  def test_pit_at_the_start(self):
    # Fails if step -1 is sliced from the end: the trunk is the bare prompt.
    pair = shared(pit=0, right=(Response([40, 41, EOS], [2, 3]),), continuation="rollout")
    self.assertEqual(pair, TokenPair([90, 91], [40, 41, EOS], [10, 11]))

  def test_pit_at_the_end(self):
    # Fails if the last step's EOS is dropped: there the step is the rest of the response.
    self.assertEqual(shared(pit=2, right=(LONG,)), TokenPair([90, 91, 10, 11, 12], [20, 21], [13, 14, EOS]))

  @parameterized.parameters(("step", [20, 21]), ("rollout", [20, 21, 31, 32, EOS]))
  def test_continuation(self, continuation, chosen):
    # Fails if a step takes the whole rollout or the other way round, or if a rollout loses its EOS.
    self.assertEqual(shared(right=(SAME, LONG), continuation=continuation).chosen, chosen)

  def test_shortest(self):
    # Fails if the shortest first step is taken instead of the shortest rollout, or the last of equals.
    other = Response([23, 33, 34, EOS], [1, 4])
    self.assertEqual(shared(right=(SAME, other, AGAIN), choice="shortest").chosen, [20, 21])
    twin = Response([24, 25, EOS], [2, 3])
    self.assertEqual(shared(right=(twin, AGAIN), choice="shortest").chosen, [24, 25])

  @parameterized.parameters(
    # [20, 21]: two right, three wrong; [22]: one right. A count of right ones alone would take [20, 21].
    ([([20, 21], True)] * 2 + [([20, 21], False)] * 3 + [([22], True)], [22]),
    ([([20, 21], True)] * 2 + [([22], True)], [20, 21]),
    # The pit's own step has the most votes and is no alternative.
    ([([12], True)] * 5 + [([22], True)] + [([20, 21], False)], [22]),
  )
  def test_majority(self, firsts, chosen):
    # Fails if wrong rollouts do not count against their step, or if the pit's own step can win.
    self.assertEqual(shared(firsts=firsts, choice="majority").chosen, chosen)

  def test_random(self):
    # Fails if the generator is not used (one choice only), if a seed does not fix the choice, or if SAME can be drawn.
    drawn = [tuple(shared(seed=seed, continuation="rollout").chosen) for seed in range(40)]
    self.assertEqual(set(drawn), {tuple(r.ids) for r in (LONG, SHORT, AGAIN)})
    self.assertEqual(drawn, [tuple(shared(seed=seed, continuation="rollout").chosen) for seed in range(40)])

  @parameterized.product(continuation=("step", "rollout"), choice=("random", "shortest", "majority"))
  def test_chosen_never_starts_as_the_rejected_does(self, continuation, choice):
    # Fails if rollouts that begin with the pit are not left out, or are compared as tuple against list.
    for seed in range(5):
      pair = shared(right=(SAME, SAME, AGAIN), seed=seed, continuation=continuation, choice=choice)
      self.assertEqual(pair.chosen[:2], [20, 21])
      self.assertNotEqual(pair.chosen, pair.rejected)

  @parameterized.parameters(((),), ((SAME, SAME),))
  def test_none_without_alternative(self, right):
    # Fails if an empty choice raises or gives a pair of equals.
    self.assertIsNone(shared(right=right))

  def test_refuses(self):
    # Fails if an unknown name falls through to one of the others.
    with self.assertRaisesRegex(ValueError, "No choice 'longest': random, shortest or majority"):
      shared(choice="longest")
    with self.assertRaisesRegex(ValueError, "No continuation 'all': step or rollout"):
      shared(continuation="all")


if __name__ == "__main__":
  absltest.main()
