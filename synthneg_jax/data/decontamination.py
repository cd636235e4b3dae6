"""Decontamination: finds training problems that share a run of words with a test problem.

The rule is ours. A training problem is contaminated if it shares an n-gram of
words with a test problem, 13 by default, as is common for language-model training data. Words are
runs of letters and digits, lowercased, so layout, punctuation and LaTeX markup do not matter
(`\\frac{1}{2}` is frac, 1, 2). A shorter text is contaminated only if it equals a test problem word
for word. An n-gram that more than half of the test problems share is an instruction ("Solve the
following problem step by step ...") and is ignored. Only problems are compared, not solutions.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"[^\W_]+")
_MIN_TESTS = 8  # with fewer test texts, a shared n-gram is not taken for an instruction
_CHUNK = 1 << 14  # training texts held as word numbers at once


@dataclasses.dataclass(frozen=True)
class Overlap:
  """Evidence that a training problem is contaminated.

  Attributes:
    index: of the training problem.
    test_index: of a test problem that it overlaps.
    words: the first shared n-gram; the whole text if it is shorter.
    share: fraction of the training problem's n-grams that occur in test problems, in (0, 1].
  """

  index: int
  test_index: int
  words: str
  share: float


def words(text: str) -> list[str]:
  """The words of a text, lowercased."""
  return _WORD.findall(text.lower())


class _EncodedTexts:
  """Texts as one array of word numbers; 0 for a word that occurs in no test problem."""

  def __init__(self, texts: Sequence[str], numbers: dict[str, int], grow: bool):
    self.words = [words(text) for text in texts]
    if grow:
      for word in itertools.chain.from_iterable(self.words):
        numbers.setdefault(word, len(numbers) + 1)
    flat = [numbers.get(word, 0) for text in self.words for word in text]
    self.flat = np.array(flat, np.uint64)
    lengths = np.array([len(text) for text in self.words], np.int64)
    self.starts = np.cumsum(lengths) - lengths
    self.text = np.repeat(np.arange(len(lengths)), lengths)

  def windows(self, n: int) -> np.ndarray:
    """Starts of the n-grams that lie within one text and hold known words only."""
    count = len(self.flat) - n + 1
    if count <= 0:
      return np.zeros(0, np.int64)
    unknown = np.concatenate([[0], np.cumsum(self.flat == 0)])
    whole = (self.text[:count] == self.text[n - 1 :]) & (unknown[n:] == unknown[:count])
    return np.flatnonzero(whole)

  def hashes(self, at: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Hashes of the n-grams at `at`: word numbers times random factors, summed modulo 2^64."""
    total = np.zeros(len(at), np.uint64)
    for offset, factor in enumerate(factors):
      total += self.flat[at + offset] * factor
    return total


class _Index:
  """The n-grams of all test texts."""

  def __init__(self, test: Sequence[str], n: int):
    self._n, self._numbers = n, {}
    self._test = _EncodedTexts(test, self._numbers, grow=True)
    random = np.random.default_rng(0).integers(1, 1 << 63, size=n, dtype=np.uint64)
    self._factors = random * np.uint64(2) + np.uint64(1)
    windows = self._test.windows(n)
    hashes, first, count = np.unique(
      self._test.hashes(windows, self._factors), return_index=True, return_counts=True
    )
    specific = np.flatnonzero((count <= len(test) / 2) | (len(test) < _MIN_TESTS))
    self._hashes, self._windows = hashes[specific], windows[first[specific]]
    self._short = {}  # words of each text with fewer than n words -> its index
    for index, text in enumerate(self._test.words):
      if 0 < len(text) < n:
        self._short.setdefault(tuple(text), index)

  def overlaps(self, texts: Sequence[str], first_index: int) -> list[Overlap]:
    """Overlaps of training texts, numbered from `first_index`."""
    n, train = self._n, _EncodedTexts(texts, self._numbers, grow=False)
    at, test_at = self._matches(train)
    overlaps = []
    matched, first, counts = np.unique(train.text[at], return_index=True, return_counts=True)
    row_of = {int(text): row for row, text in enumerate(matched)}
    for index, text in enumerate(train.words):
      if index in row_of:
        row = row_of[index]
        match = first[row]
        begin = int(at[match] - train.starts[index])
        ngram, test_index = text[begin : begin + n], int(self._test.text[test_at[match]])
        share = int(counts[row]) / (len(text) - n + 1)
        overlaps.append(Overlap(first_index + index, test_index, " ".join(ngram), share))
      elif tuple(text) in self._short:
        overlaps.append(Overlap(first_index + index, self._short[tuple(text)], " ".join(text), 1.0))
    return overlaps

  def _matches(self, train: _EncodedTexts) -> tuple[np.ndarray, np.ndarray]:
    """Starts of the training n-grams that occur in a test text, and where they start there."""
    at = train.windows(self._n)
    if not len(self._hashes):
      return at[:0], at[:0]
    hashes = train.hashes(at, self._factors)
    rank = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
    hit = self._hashes[rank] == hashes
    at, test_at = at[hit], self._windows[rank[hit]]
    for offset in range(self._n):  # equal hashes do not prove equal words
      same = train.flat[at + offset] == self._test.flat[test_at + offset]
      at, test_at = at[same], test_at[same]
    return at, test_at


def overlaps(train: Sequence[str], test: Sequence[str], n: int = 13) -> list[Overlap]:
  """Finds the training texts that overlap a test text, in order.

  Linear in the number of words. Hash matches are verified word by word, so there are no false
  positives.

  Args:
    train: texts.
    test: texts.
    n: length of an n-gram in words, at least 1.
  """
  index = _Index(test, n)
  result = []
  for start in range(0, len(train), _CHUNK):
    result += index.overlaps(train[start : start + _CHUNK], start)
  return result
