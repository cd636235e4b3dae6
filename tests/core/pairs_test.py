"""Pairs of every mode by hand: chosen, rejected, trunk and P(flipped)."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from synthneg_jax.core import pairs
from synthneg_jax.core.pairs import Count, Response, Sibling, TokenPair

EOS = 2
PROMPT = (90, 91)
SOLUTION = [50, 51, EOS]
# Three steps: [10, 11], [12] and [13, 14, EOS].
WRONG = Response((10, 11, 12, 13, 14, EOS), (2, 3, 6))
# Rollouts from the prefix [10, 11]: first steps [12] (the pit itself), [20, 21], [22] and [20, 21]
# again.
SAME = Sibling([12, 30, EOS], [1, 3], True, step_logp=-0.1, logp=-0.2)
LONG = Sibling([20, 21, 31, 32, EOS], [2, 5], True, step_logp=-1.0, logp=-5.0)
SHORT = Sibling([22, EOS], [1, 2], True, step_logp=-2.0, logp=-2.5)
AGAIN = Sibling([20, 21, EOS], [2, 3], True, step_logp=-1.5, logp=-3.0)
FAILED = Sibling([22, 33, EOS], [1, 3], False, step_logp=-0.5, logp=-0.6)
ZERO = Count(0, 1, exact=True)


def sibling(first, correct=True) -> Sibling:
  """A rollout whose first step is `first`."""
  return Sibling([*first, 70, EOS], [len(first), len(first) + 2], correct)


def named(name: str) -> str:
  """An equal string that is another object, so that comparing with `is` fails."""
  return "".join(name)


def shared(
  pit=1,
  siblings=(SAME, LONG, SHORT, AGAIN),
  after=ZERO,
  continuation="step",
  choice="random",
  seed=0,
):
  return pairs.shared_prefix(
    PROMPT,
    WRONG,
    pit,
    siblings=siblings,
    after=after,
    rule=pairs.ChosenRule(named(continuation), named(choice), np.random.default_rng(seed)),
  )


class ResponseTest(absltest.TestCase):
  def test_prefix_and_step(self):
    # Fails if an end is taken as inclusive, if prefix counts from 1, or if a step starts at the
    # step before it.
    self.assertEqual(
      [WRONG.prefix(steps) for steps in range(4)],
      [[], [10, 11], [10, 11, 12], [10, 11, 12, 13, 14, EOS]],
    )
    self.assertEqual([WRONG.step(index) for index in range(3)], [[10, 11], [12], [13, 14, EOS]])

  def test_cannot_be_changed(self):
    # Fails if what a pair was made from can be edited later.
    for value, name in (
      (WRONG, "ids"),
      (SAME, "correct"),
      (ZERO, "exact"),
      (TokenPair([1], [2], [3]), "flip"),
    ):
      with self.assertRaises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)


class FlipProbabilityTest(parameterized.TestCase):
  @parameterized.parameters((0, 6, 3, 6), (2, 6, 2, 6), (5, 5, 0, 3), (1, 1, 4, 10), (0, 0, 2, 3))
  def test_counts_equal_monte_carlo(self, c, m, c_other, m_other):
    # Fails if the two are swapped, for another prior than Jeffreys', or if counts are taken for
    # values.
    rng = np.random.default_rng(0)

    def draw(c, m):
      return rng.beta(c + 0.5, m - c + 0.5, 400_000)

    expected = np.mean(draw(c, m) > draw(c_other, m_other))
    self.assertAlmostEqual(
      pairs.flip_probability(Count(c, m), Count(c_other, m_other)), expected, delta=4e-3
    )

  def test_equal_counts_say_nothing(self):
    # Fails if a tie of counts leans to either side.
    self.assertAlmostEqual(pairs.flip_probability(Count(3, 8), Count(3, 8)), 0.5, delta=1e-9)

  @parameterized.parameters((0, 1), (1, 1), (1, 4), (3, 4))
  def test_one_exact_value(self, c, m):
    # Fails if an exact value is treated as a sample, or if the posterior's wrong tail is taken.
    posterior = stats.beta(2 + 0.5, 7 - 2 + 0.5)
    exact = Count(c, m, exact=True)
    self.assertAlmostEqual(
      pairs.flip_probability(exact, Count(2, 7)), posterior.cdf(c / m), delta=1e-12
    )
    self.assertAlmostEqual(
      pairs.flip_probability(Count(2, 7), exact), posterior.sf(c / m), delta=1e-12
    )

  @parameterized.parameters(
    (0, 1, 1, 1, 0.0), (1, 1, 0, 1, 1.0), (0, 1, 0, 1, 0.5), (1, 2, 1, 3, 1.0), (1, 2, 2, 4, 0.5)
  )
  def test_two_exact_values(self, c, m, c_other, m_other, expected):
    # Fails if equal exact values count as flipped or as kept, or if successes are compared without
    # their rollouts.
    got = pairs.flip_probability(Count(c, m, exact=True), Count(c_other, m_other, exact=True))
    self.assertEqual((got, type(got)), (expected, float))


class WholeResponseTest(parameterized.TestCase):
  @parameterized.parameters((0, [10, 11]), (1, [10, 11, 12]), (2, [10, 11, 12, 13, 14, EOS]))
  def test_algorithm1(self, pit, rejected):
    # Fails if the pit itself is cut off, if the whole wrong response is rejected (EOS and what
    # follows the pit), if the chosen loses its EOS, if steps before the pit become trunk, or if the
    # flip is that of other counts.
    after, before = Count(0, 8), Count(3, 8)
    got = pairs.algorithm1(PROMPT, SOLUTION, WRONG, pit=pit, after=after, before=before)
    self.assertEqual(
      got, TokenPair([90, 91], SOLUTION, rejected, pairs.flip_probability(after, before))
    )
    self.assertBetween(got.p_flipped, 0.001, 0.1)
    if pit < 2:
      self.assertNotIn(EOS, rejected)

  @parameterized.parameters((0, 0), (1, 2), (2, 3))
  def test_prefix_protected(self, pit, context):
    # Fails if the pit is context, too, a step before it is not, or the pair is otherwise not
    # algorithm 1's.
    after, before = Count(0, 8), Count(3, 8)
    got = pairs.prefix_protected(PROMPT, SOLUTION, WRONG, pit=pit, after=after, before=before)
    plain = pairs.algorithm1(PROMPT, SOLUTION, WRONG, pit=pit, after=after, before=before)
    self.assertEqual(got, dataclasses.replace(plain, context=context))

  def test_arbitrary(self):
    # Fails if either response is cut, or if verdicts, which are exact, leave a doubt.
    self.assertEqual(
      pairs.arbitrary(PROMPT, tuple(SOLUTION), WRONG.ids),
      TokenPair([90, 91], SOLUTION, list(WRONG.ids), 0.0),
    )


class FurthestTest(parameterized.TestCase):
  def test_largest(self):
    # Fails if the nearest is taken, if a wrong response is used twice, if the distance is divided
    # by lengths (the second would take "zz"), if ties go to the later, or if right responses beyond
    # the wrong ones are paired.
    wrong = ["abcx", "zz", "abcdzzzz", "abcdzzzz"]
    self.assertEqual(pairs.furthest(["abcd"], wrong, variant="largest"), [(0, 1)])
    self.assertEqual(
      pairs.furthest(["abcd"], ["vwxyz", "vwxyzuv"], variant=named("largest")), [(0, 1)]
    )
    self.assertEqual(
      pairs.furthest(["abcd", "abcdabcd", "abcd", "abcd", "abcd"], wrong, variant="largest"),
      [(0, 1), (1, 0), (2, 2), (3, 3)],
    )

  def test_shortest_far(self):
    # Fails if the furthest is taken, if d is divided by the longer length, if > is >= (d/(a+b) =
    # 4/8 in "wxyz"), if a lower bound is tried while a higher has a hit, if a wrong one is used
    # twice, or if one below 0.3 is taken.
    right = ["abcd"] * 4
    wrong = ["wxyz", "abcdabc", "vwxyz", "abcx"]
    self.assertEqual(pairs.furthest(right, wrong, variant="shortest_far"), [(0, 2), (1, 0)])
    # d/(a+b): 5/9 and 6/10 are far; the shorter wins. 3/11 is never far.
    self.assertEqual(
      pairs.furthest(["abcd"], ["uvwxyz", "vwxyz"], variant="shortest_far"), [(0, 1)]
    )
    self.assertEqual(pairs.furthest(["abcd"], ["abcdabc"], variant="shortest_far"), [])
    # 4/9 is beyond the second bound, 3/8, though shorter, beyond the third only; 0.3 exactly is
    # not.
    self.assertEqual(pairs.furthest(["abcd"], ["axyz", "avwxy"], variant="shortest_far"), [(0, 1)])
    self.assertEqual(pairs.furthest(["abcd"], ["axyz"], variant="shortest_far"), [(0, 0)])
    self.assertEqual(pairs.furthest(["abcde"], ["abxyz"], variant="shortest_far"), [])

  def test_ties_and_nothing(self):
    # Fails if ties go to the later, or if nothing raises.
    self.assertEqual(pairs.furthest(["ab"], ["xyz", "uvw"], variant="shortest_far"), [(0, 0)])
    for variant in ("largest", "shortest_far"):
      self.assertEqual(pairs.furthest([], ["a"], variant=variant), [])
      self.assertEqual(pairs.furthest(["a"], [], variant=variant), [])

  def test_ids(self):
    # Fails if only texts are taken.
    self.assertEqual(pairs.furthest([[1, 2]], [[1, 2, 3], [4, 5, 6]], variant="largest"), [(0, 1)])

  def test_refuses(self):
    # Fails if an unknown name falls through.
    with self.assertRaisesRegex(
      ValueError, "Unknown variant 'far': must be largest or shortest_far"
    ):
      pairs.furthest([], [], variant="far")


class SharedPrefixTest(parameterized.TestCase):
  def test_pit_in_the_middle(self):
    # Fails if the trunk lacks the steps before the pit or holds the pit, or if the rejected is more
    # than the pit.
    pair = shared(choice="shortest")
    self.assertEqual((pair.trunk, pair.chosen, pair.rejected), ([90, 91, 10, 11], [22], [12]))

  def test_pit_at_the_start(self):
    # Fails if step -1 is sliced from the end: the trunk is the bare prompt.
    pair = shared(pit=0, siblings=(Sibling([40, 41, EOS], [2, 3], True),), continuation="rollout")
    self.assertEqual((pair.trunk, pair.chosen, pair.rejected), ([90, 91], [40, 41, EOS], [10, 11]))

  def test_pit_at_the_end(self):
    # Fails if the last step's EOS is dropped: there the step is the rest of the response.
    pair = shared(pit=2, siblings=(LONG,))
    self.assertEqual(
      (pair.trunk, pair.chosen, pair.rejected), ([90, 91, 10, 11, 12], [20, 21], [13, 14, EOS])
    )

  @parameterized.parameters(("step", [20, 21]), ("rollout", [20, 21, 31, 32, EOS]))
  def test_continuation(self, continuation, chosen):
    # Fails if a step takes the whole rollout or the other way round, or if a rollout loses its EOS.
    self.assertEqual(shared(siblings=(SAME, LONG), continuation=continuation).chosen, chosen)

  def test_shortest(self):
    # Fails if the shortest first step is taken instead of the shortest rollout, the last of equals,
    # or a wrong one.
    other = Sibling([23, 33, 34, EOS], [1, 4], True)
    self.assertEqual(shared(siblings=(SAME, other, AGAIN), choice="shortest").chosen, [20, 21])
    twin = Sibling([24, 25, EOS], [2, 3], True)
    self.assertEqual(shared(siblings=(twin, AGAIN), choice="shortest").chosen, [24, 25])
    self.assertEqual(
      shared(siblings=(Sibling([29], [1], False), AGAIN), choice="shortest").chosen, [20, 21]
    )

  @parameterized.parameters(("step", [20, 21]), ("rollout", [22, EOS]))
  def test_most_likely(self, continuation, chosen):
    # Fails if the likelihood of other tokens than the taken ones decides, the least likely wins, or
    # a wrong or equal one.
    siblings = (SAME, FAILED, LONG, SHORT, AGAIN)
    self.assertEqual(
      shared(siblings=siblings, choice="most_likely", continuation=continuation).chosen, chosen
    )

  @parameterized.parameters(
    # [20, 21]: two right, three wrong; [22]: one right. A count of right ones alone would take [20,
    # 21].
    ([([20, 21], True)] * 2 + [([20, 21], False)] * 3 + [([22], True)], [22]),
    # A rate of right ones would take [22].
    ([([20, 21], True)] * 3 + [([20, 21], False)] + [([22], True)], [20, 21]),
    # A right one that weighs more than a wrong one would take [20, 21], and so would three right
    # ones.
    ([([20, 21], True)] * 3 + [([20, 21], False)] * 3 + [([22], True)], [22]),
    # The pit's own step has the most votes and is no alternative.
    ([([12], True)] * 5 + [([22], True)] + [([20, 21], False)], [22]),
    # Ties go to the earlier.
    ([([23], True), ([22], True)], [23]),
  )
  def test_majority(self, firsts, chosen):
    # Fails if wrong rollouts do not count against their step, or if the pit's own step can win.
    self.assertEqual(
      shared(siblings=[sibling(*first) for first in firsts], choice="majority").chosen, chosen
    )

  def test_random(self):
    # Fails if the generator is not used (one choice only), if a seed does not fix the choice, or if
    # the pit's own step or a wrong rollout can be drawn.
    siblings = (SAME, LONG, FAILED, SHORT, AGAIN)

    def draw(seed):
      return tuple(shared(siblings=siblings, seed=seed, continuation="rollout").chosen)

    drawn = [draw(seed) for seed in range(40)]
    self.assertEqual(set(drawn), {tuple(r.ids) for r in (LONG, SHORT, AGAIN)})
    self.assertEqual(drawn, [draw(seed) for seed in range(40)])

  @parameterized.parameters("step", "rollout")
  def test_flip(self, continuation):
    # Fails if the chosen step's counts leave out wrong siblings or those of its other rollouts, or
    # if `after` is not used.
    firsts = [([20, 21], True)] * 2 + [([20, 21], False)] + [([12], True), ([22], False)]
    siblings = [sibling(*first) for first in firsts]
    got = shared(siblings=siblings, after=Count(1, 9), continuation=continuation).p_flipped
    self.assertEqual(got, pairs.flip_probability(Count(1, 9), Count(2, 3)))
    self.assertEqual(shared(siblings=siblings).p_flipped, 0.0)

  @parameterized.product(
    continuation=("step", "rollout"),
    choice=("random", "shortest", "most_likely", "majority"),
    seed=(0, 1, 2),
  )
  def test_chosen_never_starts_as_the_rejected_does(self, continuation, choice, seed):
    # Fails if rollouts that begin with the pit are not left out, or are compared as tuple against
    # list.
    pair = shared(siblings=(SAME, SAME, AGAIN), seed=seed, continuation=continuation, choice=choice)
    self.assertEqual(pair.chosen[:2], [20, 21])

  @parameterized.parameters(((),), ((SAME, SAME),), ((FAILED,),))
  def test_none_without_alternative(self, siblings):
    # Fails if an empty choice raises, gives a pair of equals, or a wrong rollout is chosen.
    self.assertIsNone(shared(siblings=siblings))

  def test_refuses(self):
    # Fails if an unknown name falls through to one of the others.
    for choice in ("longest", "a", "tallest"):
      with self.assertRaisesRegex(
        ValueError, f"Unknown choice '{choice}': must be random, shortest, most_likely or majority"
      ):
        shared(choice=choice)
    with self.assertRaisesRegex(ValueError, "Unknown continuation 'all': must be step"):
      shared(continuation="all")


class FiltersTest(parameterized.TestCase):
  RESPONSES = (
    ([1], "wrong"),
    ([1], "right"),
    ([2], "truncated"),
    ((1,), "wrong"),
    ([3], "wrong"),
    ([4], "no_answer"),
    ([6], "wrong unit"),
    ([5], "wrong"),
  )

  @parameterized.parameters((0, []), (1, [0]), (2, [0, 4]), (3, [0, 4, 7]), (9, [0, 4, 7]))
  def test_negatives(self, most, expected):
    # Fails if right ones or ones without an answer are kept, if repeats are kept or count, if the
    # later of equals is kept, or if `most` is off by one.
    self.assertEqual(
      pairs.negatives([(ids, named(reason)) for ids, reason in self.RESPONSES], most), expected
    )

  def test_filter_pairs(self):
    # Fails if a reason is lost or its check inverted, if a dropped pair counts for the cap or hides
    # a later one, or if pairs of two problems count as one.
    made = [
      (TokenPair([1], [2], [2]), "a"),
      (TokenPair([1], [2], [3], p_flipped=0.25), "a"),
      (TokenPair([1], [2], [3], p_flipped=0.2), "a"),
      (TokenPair([1], [9], [3]), "a"),
      (TokenPair([4], [9], [3]), "a"),
      (TokenPair([4], [9], [5]), "a"),
      (TokenPair([4], [9], [6]), "b"),
      (TokenPair([4], [9], [5]), "b"),
    ]
    kept, dropped = pairs.filter_pairs(*zip(*made, strict=True), most=2, max_flip=0.2)
    self.assertEqual(kept, [2, 4, 6, 7])
    self.assertEqual(dropped, {"same": 1, "doubtful": 1, "repeated": 1, "beyond_cap": 1})
    self.assertEqual(pairs.filter_pairs([], [], most=2, max_flip=1.0), ([], {}))
    self.assertEqual(
      pairs.filter_pairs(*zip(*made[1:3], strict=True), most=2, max_flip=0.25),
      ([0], {"repeated": 1}),
    )

  def test_settings_go_by_name(self):
    # Fails if a setting can be passed positionally, where it may be mistaken for its neighbour.
    with self.assertRaises(TypeError):
      pairs.filter_pairs([], [], 2, 1.0)
    with self.assertRaises(TypeError):
      pairs.furthest([], [], "largest")
    with self.assertRaises(TypeError):
      pairs.algorithm1(PROMPT, SOLUTION, WRONG, 0, ZERO, ZERO)

  def test_filter_refuses_unequal_columns(self):
    # Fails if pairs and problems of unequal number are cut to the shorter.
    with self.assertRaises(ValueError):
      pairs.filter_pairs([TokenPair([1], [2], [3])], ["a", "b"], most=2, max_flip=1.0)


if __name__ == "__main__":
  absltest.main()
