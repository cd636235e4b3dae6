"""Tests of the search for overlaps with test problems."""

import time

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from synthneg_jax.data import decontamination


def naive(train, test, n):
  """Oracle with sets of tuples: (training index, first shared n-gram, share)."""

  def runs(text):
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]

  train, test = [[decontamination.words(text) for text in texts] for texts in (train, test)]
  known = {run for text in test for run in runs(text)}
  found = []
  for index, text in enumerate(train):
    shared = [run for run in runs(text) if run in known]
    if shared:
      found.append((index, " ".join(shared[0]), len(shared) / len(runs(text))))
    elif 0 < len(text) < n and text in test:
      found.append((index, " ".join(text), 1.0))
  return found


class OverlapsTest(parameterized.TestCase):
  # Fails if n-grams cross texts, an unknown word matches, a short text is missed or found inside a
  # longer one, the share is wrong, or the named test problem lacks the words.
  @settings(max_examples=300, deadline=None, database=None)
  @given(st.data(), st.integers(1, 4))
  def test_against_sets_of_tuples(self, data, n):
    texts = st.lists(st.lists(st.sampled_from("abcde"), max_size=8).map(" ".join), max_size=6)
    train, test = data.draw(texts), data.draw(texts)
    found = decontamination.overlaps(train, test, n)
    self.assertEqual([(o.index, o.words, o.share) for o in found], naive(train, test, n))
    for overlap in found:
      self.assertIn(f" {overlap.words} ", f" {test[overlap.test_index]} ")

  # Fails if case, punctuation, layout or LaTeX markup hides an overlap, or splits numbers.
  @parameterized.parameters(
    ("Ann has 3 cats, and $\\frac{1}{2}$ of them sleep.",
    "ann HAS 3\ncats and \\(\\frac 1 2\\) of them: SLEEP", True),
    ("Ann has 3 cats, and $\\frac{1}{2}$ of them sleep.",
    "Ann has 4 cats, and $\\frac{1}{2}$ of them sleep.", False),
    ("\u00e9t\u00e9 a b c d e f g h i", "\u00c9T\u00c9 a b c d e f g h i", True),
  )  # fmt: skip
  def test_words(self, train, test, expected):
    self.assertEqual(bool(decontamination.overlaps([train], [test], 9)), expected)

  # Fails if empty lists or texts without words raise or overlap each other.
  @parameterized.parameters(([], []), (["a b"], []), ([], ["a b"]), (["", "?!"], ["", "..."]))
  def test_nothing_to_compare(self, train, test):
    self.assertEqual(decontamination.overlaps(train, test, 13), [])

  # Fails if an instruction shared by the test problems counts as an overlap, or hides one.
  def test_shared_instruction(self):
    ask = (
      "solve this problem step by step and put the answer on a line of its own {} remember to "
      "be brief"
    )
    test = [ask.format(f"t{i}a t{i}b t{i}c") for i in range(8)]
    train = [ask.format("u v w"), ask.format("t3a t3b t3c"), "t5b t5c remember to be brief x"]
    found = decontamination.overlaps(train, test, 5)
    self.assertEqual([(o.index, o.test_index) for o in found], [(1, 3), (2, 5)])
    self.assertLen(
      decontamination.overlaps(train, test[:4], 5), 2
    )  # four texts are too few to tell

  # Fails if indices are wrong beyond the first chunk.
  def test_many_texts(self):
    words = [f"w{i}" for i in range(50)]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, size=20)) for _ in range(40_000)]
    planted = {7: 3, 16_384: 1, 39_999: 0}
    test = [" ".join(rng.choice(words, size=40)) for _ in range(50)]
    for place, source in planted.items():
      texts[place] = "x " + " ".join(test[source].split()[5:18]) + " y"
    start = time.process_time()
    found = decontamination.overlaps(texts, test, 13)
    self.assertLess(time.process_time() - start, 8.0)  # seconds; a quarter of one was measured
    self.assertEqual({o.index: o.test_index for o in found}, planted)
    self.assertEqual({o.share for o in found}, {1 / 3})


if __name__ == "__main__":
  absltest.main()
