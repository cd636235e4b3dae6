"""Which responses are kept: the right, the different, those of high advantage."""

import math

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
  @parameterized.parameters((0, []), (1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (4, [1, 3, 4, 7]), (99, [1, 3, 4, 7]))
  def test_by_hand(self, most, expected):
    # Fails if wrong ones are kept, if repeats are kept or count, if a wrong one hides an equal right one, if a list and
    # a tuple of the same ids differ, if the last are kept instead of the first, or if `most` is off by one.
    self.assertEqual(selection.keep_right(RESPONSES, most), expected)

  def test_none(self):
    # Fails if no response, or none that is right, raises.
    self.assertEqual(selection.keep_right([], 4), [])
    self.assertEqual(selection.keep_right([([1], False)], 4), [])


def plain_distance(a: str, b: str) -> float:
  """Levenshtein's distance over the longer length, by the textbook's table."""
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
    # Fails if annotations and prose are both read, if spaces or the final point stay, if a chain of equations is cut, if
    # the lone x is taken for a product, or if an equation runs over a line's end.
    self.assertEqual(selection.equation_key(text), key)

  def test_order_and_words(self):
    # Fails if words enter the key or the order of equations is lost.
    first = selection.equation_key("Add: 2 + 3 = 5. Twice: 5 * 2 = 10.")
    self.assertEqual(first, selection.equation_key("We have 2+3=5 apples, and 5*2=10 pears"))
    self.assertNotEqual(first, selection.equation_key("5 * 2 = 10, 2 + 3 = 5"))


class EditDistanceTest(parameterized.TestCase):
  @parameterized.parameters((0.0, [0, 2, 3]), (0.25, [0, 3]), (0.24, [0, 2, 3]), (0.99, [0, 3]))
  def test_by_hand(self, threshold, expected):
    # Fails if > is >=, if distances are not over the longer length, or if the last of near texts is kept.
    self.assertEqual(selection.deduplicate_by_edit_distance(["abcd", "abcd", "abcx", "wyz"], threshold), expected)

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
    # Fails if the sum or the furthest chosen text counts, if repeats fill up, or if `n` is off by one.
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
  @parameterized.parameters((0.0, [0, 1, 2, 4, 5]), (0.5, [0, 2, 4]), (0.6, [2, 4]), (0.8, [4]), (1.0, []))
  def test_by_hand(self, share, expected):
    # Fails if the top is dropped, if NaN is kept or counts, if the earlier of equals go first, if the number is rounded up,
    # or if indices come back in another order.
    lows = [-0.5, -0.9, -0.2, math.nan, 0.1, -0.5]
    self.assertEqual(selection.advantage_filter(lows, share), expected)

  def test_half_by_default(self):
    # Fails for another default: every response above the median stays.
    lows = np.random.default_rng(0).permutation(101) / 101 - 1.0
    kept = selection.advantage_filter(list(lows))
    self.assertEqual(kept, np.flatnonzero(lows >= np.median(lows)).tolist())


if __name__ == "__main__":
  absltest.main()
