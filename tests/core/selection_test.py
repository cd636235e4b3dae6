"""Selected responses: right ones, distinct ones, those of high advantage."""

import math
import time

import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import selection

RESPONSES = [
  ([1, 2], False),
  ([1, 3], True),
  ([1, 3], True),
  ((1, 2), True),
  ([1, 3, 2], True),
  ([9], False),
  ((1, 3), True),
  ([4], True),
]


class KeepRightTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, []), (1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (4, [1, 3, 4, 7]), (99, [1, 3, 4, 7])
  )
  def test_by_hand(self, most, expected):
    # Fails if wrong ones are kept, if repeats are kept or count, if a wrong one hides an equal
    # right one, if a list and a tuple of the same ids differ, if the last are kept instead of the
    # first, or if `most` is off by one.
    self.assertEqual(selection.keep_right(RESPONSES, most), expected)

  def test_none(self):
    # Fails if no response, or none that is right, raises.
    self.assertEqual(selection.keep_right([], 4), [])
    self.assertEqual(selection.keep_right([([1], False)], 4), [])


def plain_distance(a: str, b: str) -> float:
  """Levenshtein's distance over the longer length, by dynamic programming."""
  row = np.arange(len(b) + 1, dtype=np.float64)
  for i, left in enumerate(a, 1):
    before, row = row, np.full(len(b) + 1, float(i))
    for j, right in enumerate(b, 1):
      row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (left != right))
  return row[-1] / max(len(a), len(b), 1)


def random_texts(seed: int, num: int) -> list[str]:
  rng = np.random.default_rng(seed)
  return ["".join(rng.choice(list("abc"), rng.integers(1, 9))) for _ in range(num)]


class EquationKeyTest(parameterized.TestCase):
  @parameterized.parameters(
    ("She sold 48/2 = <<48/2=24>>24 in May,\nso 48+24 = << 48 + 24 = 72 >>72.", "48/2=24|48+24=72"),
    ("First 100 x 2 = 200.\nThen (200 - 50) ÷ 3 = 50", "100*2=200|(200-50)/3=50"),
    ("It costs $1,200 + $300 = $1,500, that is 2 × 3 = 6.", "1200+300=1500|2*3=6"),
    ("2 + 3 = 5 = 10 / 2. 50% * 8 = 4", "2+3=5=10/2|50%*8=4"),
    ("so 1.5 * 2 = 3.0. Next", "1.5*2=3.0"),
    ("0 - 5 = -5", "0-5=-5"),
    ("x = 5, and there are 3 apples.", ""),
    ("", ""),
  )
  def test_by_hand(self, text, key):
    # Fails if annotations and prose are both read, if spaces or the final point stay, if a chain of
    # equations is cut, if the lone x is taken for a product, or if an equation runs over a line's
    # end.
    self.assertEqual(selection.equation_key(text), key)

  def test_order_and_words(self):
    # Fails if words enter the key or the order of equations is lost.
    first = selection.equation_key("Add: 2 + 3 = 5. Twice: 5 * 2 = 10.")
    self.assertEqual(first, selection.equation_key("We have 2+3=5 apples, and 5*2=10 pears"))
    self.assertNotEqual(first, selection.equation_key("5 * 2 = 10, 2 + 3 = 5"))

  @parameterized.parameters(
    ("1 + 1 and 2 + 2 = 4", "2+2=4"),
    ("(3 + 4) * 2 = 14 apples = 9 - 5", "(3+4)*2=14"),
    ("4 = 4 = 4, 5.", "4=4=4"),
    ("a1 + 2 = 3; 12 + 3 = 15", "1+2=3|12+3=15"),
    ("2 + 3 = about 5", ""),
    ("-3 + 5 = 2", "-3+5=2"),
    ("3.5.6 + 1 = 2", "3.5.6+1=2"),
    ("2 x 3 = 6 and y x 3 apples", "2*3=6"),
    ("1,5 + 1,000,000 = 3", "1,5+1000000=3"),
    ("$2x + 3 = 7$, so $2x = 4$", ""),
    (r"$2 \times 3 \cdot 4 = 24$", "2*3*4=24"),
    ("5 − 3 = 2 and 6 – 4 = 2", "5-3=2|6-4=2"),
    (r"2^3 = 8, \frac{1}{2} 4 = 2, y -3 = 4", "4=2"),
    ("- 5 * 3 = 15", "5*3=15"),
  )
  def test_prose(self, text, key):
    # Fails if a chain starts within a number, after a sign of its own, or at the second of two
    # terms; if words may interrupt a chain; if any comma is dropped; or if a variable's product
    # counts.
    self.assertEqual(selection.equation_key(text), key)

  @parameterized.parameters(
    "1+", "(", "1 ", "1", "1,1", "-", "1=", " ", "1 x ", "<<", "<<1", "$(1 "
  )
  def test_time_is_linear(self, piece):
    # Fails if a run of characters is read again from each of its positions: 200,000 of them would
    # take minutes, not 0.1 s. (A bound of seconds on a slow machine, far from both.)
    start = time.process_time()
    selection.equation_key(piece * (200_000 // len(piece)))
    self.assertLess(time.process_time() - start, 10.0)


class EquationKeyDeduplicationTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if the last of a key is kept, if texts without equations are taken for one another, or
    # if words make a difference.
    texts = ["2 + 3 = 5", "so 2+3=5!", "no sums", "3 + 2 = 5", "none here", "again 3+2=5"]
    self.assertEqual(selection.deduplicate_by_equation_key(texts), [0, 2, 3, 4])
    self.assertEqual(selection.deduplicate_by_equation_key([]), [])


class EditDistanceTest(parameterized.TestCase):
  @parameterized.parameters((0.0, [0, 2, 3]), (0.25, [0, 3]), (0.24, [0, 2, 3]), (0.99, [0, 3]))
  def test_by_hand(self, threshold, expected):
    # Fails if > is >=, if distances are not over the longer length, or if the last of near texts is
    # kept.
    self.assertEqual(
      selection.deduplicate_by_edit_distance(["abcd", "abcd", "abcx", "wyz"], threshold), expected
    )

  @parameterized.parameters(0.0, 0.2, 0.5, 0.8)
  def test_equals_a_loop(self, threshold):
    # Fails if texts are compared with dropped ones too, or only with the last one kept.
    texts, expected = random_texts(0, 40), []
    for index, text in enumerate(texts):
      if not [other for other in expected if plain_distance(text, texts[other]) <= threshold]:
        expected.append(index)
    self.assertEqual(selection.deduplicate_by_edit_distance(texts, threshold), expected)

  def test_none(self):
    # Fails if no text raises, or if two empty ones are 0/0.
    self.assertEqual(selection.deduplicate_by_edit_distance([], 0.5), [])
    self.assertEqual(selection.deduplicate_by_edit_distance(["", "", "a"], 0.5), [0, 2])


class MostDiverseTest(parameterized.TestCase):
  @parameterized.parameters((0, []), (1, [0]), (2, [0, 3]), (3, [0, 3, 2]), (9, [0, 3, 2]))
  def test_by_hand(self, n, expected):
    # Fails if the sum or the furthest chosen text counts, if repeats fill up, or if `n` is off by
    # one.
    self.assertEqual(selection.most_diverse(["abcd", "abcd", "abxx", "wyz"], n), expected)
    self.assertEqual(selection.most_diverse([], n), [])

  def test_equals_a_loop(self):
    # Fails if the nearest distance is not kept up to date, or if ties go to a later text.
    texts, expected = random_texts(1, 25), [0]
    while len(expected) < 10:
      nearest = [min(plain_distance(text, texts[other]) for other in expected) for text in texts]
      expected.append(nearest.index(max(nearest)))
    self.assertEqual(selection.most_diverse(texts, 10), expected)


class AdvantageFilterTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.0, [0, 1, 2, 4, 5]), (0.5, [0, 2, 4]), (0.6, [2, 4]), (0.8, [4]), (1.0, [])
  )
  def test_by_hand(self, share, expected):
    # Fails if the top is dropped, if NaN is kept or counts, if the earlier of equals go first, if
    # the number is rounded up, or if indices come back in another order.
    lows = [-0.5, -0.9, -0.2, math.nan, 0.1, -0.5]
    self.assertEqual(selection.advantage_filter(lows, share), expected)

  def test_the_later_of_equals_go(self):
    # Fails if of equals the earlier are dropped, the first apart or not.
    self.assertEqual(selection.advantage_filter([0.1, -0.5, -0.5, -0.5, -0.5], 0.6), [0, 1])
    self.assertEqual(selection.advantage_filter([-0.5] * 4, 0.5), [0, 1])
    self.assertLen(selection.advantage_filter([0.5] * 100, 0.29), 71)  # 0.29 * 100 < 29

  def test_half_by_default(self):
    # Fails for another default: every response above the median stays.
    lows = np.random.default_rng(0).permutation(101) / 101 - 1.0
    kept = selection.advantage_filter(list(lows))
    self.assertEqual(kept, np.flatnonzero(lows >= np.median(lows)).tolist())


class StepMaskTest(parameterized.TestCase):
  @parameterized.parameters(
    ("positive", [True, True, False, False, False, True, False]),
    ("before_negative", [True, True, True, False, False, False, False]),
  )
  def test_by_hand(self, rule, mask):
    # Fails if rules are told apart by identity, if A = 0 counts as positive or negative, if an
    # unknown step is cloned or stops the cloning, if a good step after a bad one comes back, or if
    # a step's end is off by one.
    rule = "".join(
      rule
    )  # equal to the rule's name, and not the same object, as names from a file are
    self.assertEqual(
      selection.step_mask([0.5, 0.0, -0.25, 0.125, math.nan], [2, 3, 5, 6, 7], rule=rule), mask
    )

  def test_without_a_bad_step(self):
    # Fails if no bad step cuts the response, or if an unknown one does.
    self.assertEqual(
      selection.step_mask([0.0, math.nan], [1, 3], rule="before_negative"), [True] * 3
    )
    self.assertEqual(selection.step_mask([], [], rule="before_negative"), [])

  def test_refuses(self):
    # Fails if an unknown rule falls through, or steps and ends of unequal number are cut to the
    # shorter.
    for rule in ("negative", "a", "zero"):
      with self.assertRaisesRegex(ValueError, f"Unknown rule '{rule}': must be positive"):
        selection.step_mask([0.5], [2], rule=rule)
    for rule in ("positive", "before_negative"):
      with self.assertRaises(ValueError):
        selection.step_mask([0.5], [2, 3], rule=rule)


class SpuriousStepsTest(parameterized.TestCase):
  @parameterized.parameters((0.9, [1, 4]), (0.6, [1, 3, 4]), (0.9999, [1]))
  def test_by_hand(self, confidence, expected):
    # Fails if the sign alone decides (step 3: 9 to 7 of 10), if an unknown step or the one after it
    # counts (5 and 6), or if the confidence is that of a gain.
    successes, rollouts = [10, 1, 9, 7, 1, 0, 0, 8], [10, 10, 10, 10, 10, 0, 10, 10]
    self.assertEqual(
      selection.spurious_steps(successes, rollouts, (5, 10), confidence=confidence), expected
    )

  def test_the_first_step_is_held_against_the_start(self):
    # Fails if the first step has no baseline, the last step's, or its own.
    self.assertEqual(selection.spurious_steps([0, 10], [10, 10], (9, 10)), [0])
    self.assertEqual(selection.spurious_steps([0, 0], [10, 10], (0, 10)), [])
    self.assertEqual(selection.spurious_steps([0], [10], (0, 0)), [])
    self.assertEqual(selection.spurious_steps([], [], (9, 10)), [])

  def test_no_success_is_known_too(self):
    # Fails if counts without a success are taken for none: 0 of 1000 after 0 of 10 is a step back,
    # sure to 0.936.
    self.assertEqual(selection.spurious_steps([0], [1000], (0, 10)), [0])

  def test_default_confidence(self):
    # Fails for another default than 0.9: 6 against 3 of 8 is sure to 0.936, 5 against 3 to 0.84.
    self.assertEqual(selection.spurious_steps([3], [8], (6, 8)), [0])
    self.assertEqual(selection.spurious_steps([3], [8], (5, 8)), [])

  def test_refuses_unequal_columns(self):
    # Fails if counts of unequal number are cut to the shorter.
    with self.assertRaises(ValueError):
      selection.spurious_steps([1, 2], [3], (0, 1))

  def test_settings_go_by_name(self):
    # Fails if a confidence or a rule can be passed positionally.
    with self.assertRaises(TypeError):
      selection.spurious_steps([1], [3], (0, 1), 0.9)
    with self.assertRaises(TypeError):
      selection.step_mask([0.5], [2], "positive")


if __name__ == "__main__":
  absltest.main()
