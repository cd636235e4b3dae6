"""Training problems that a test problem shines through: the same run of words in both.

The rule is ours (what the paper did is not known): a training problem goes if it shares `n` words
in a row with a test problem, 13 by default, as is common for language models' training data. Words
are runs of letters and digits, case aside, so that layout, punctuation and LaTeX's signs do not
matter (`\\frac{1}{2}` is frac, 1, 2). A text of fewer words counts only if its words are all those
of a test problem. A run that more than half of the test problems have is an instruction ("Solve the
following problem step by step ...") and does not count. Problems are compared, solutions are not.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"[^\W_]+")
_FEWEST = 8  # test texts from which on a run that more than half of them have is an instruction
_CHUNK = 1 << 14  # texts whose words are held as numbers at once


@dataclasses.dataclass(frozen=True)
class Overlap:
  """Why a training problem goes.

  Attributes:
    index: of the training problem.
    test_index: of a test problem that it overlaps.
    words: the first run of words in both; the whole text where it is shorter.
    share: of the training problem's runs of n words, how many stand in test problems, in (0, 1].
  """

  index: int
  test_index: int
  words: str
  share: float


def words(text: str) -> list[str]:
  """The words that overlaps are made of."""
  return _WORD.findall(text.lower())


class _Numbers:
  """Texts as one array of word numbers; 0 for a word that no test problem has."""

  def __init__(self, texts: Sequence[str], numbers: dict[str, int], grow: bool):
    self.words = [words(text) for text in texts]
    look = (
      (lambda word: numbers.setdefault(word, len(numbers) + 1))
      if grow
      else (lambda word: numbers.get(word, 0))
    )
    self.flat = np.array([look(word) for text in self.words for word in text], np.uint64)
    lengths = np.array([len(text) for text in self.words], np.int64)
    self.starts = np.cumsum(lengths) - lengths
    self.text = np.repeat(np.arange(len(lengths)), lengths)

  def windows(self, n: int) -> np.ndarray:
    """Where n words in a row lie in one text and are all known."""
    count = len(self.flat) - n + 1
    if count <= 0:
      return np.zeros(0, np.int64)
    unknown = np.concatenate([[0], np.cumsum(self.flat == 0)])
    whole = (self.text[:count] == self.text[n - 1 :]) & (unknown[n:] == unknown[:count])
    return np.flatnonzero(whole)

  def hashes(self, at: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """A number for each window: the sum of its words' numbers times random factors, modulo 2^64."""
    total = np.zeros(len(at), np.uint64)
    for offset, factor in enumerate(factors):
      total += self.flat[at + offset] * factor
    return total


class _Index:
  """The runs of n words of all test texts, for training texts to be looked up in."""

  def __init__(self, test: Sequence[str], n: int):
    self._n, self._numbers = n, {}
    self._test = _Numbers(test, self._numbers, grow=True)
    random = np.random.default_rng(0).integers(1, 1 << 63, size=n, dtype=np.uint64)
    self._factors = random * np.uint64(2) + np.uint64(1)
    windows = self._test.windows(n)
    hashes, first, count = np.unique(
      self._test.hashes(windows, self._factors), return_index=True, return_counts=True
    )
    own = np.flatnonzero((count <= len(test) / 2) | (len(test) < _FEWEST))
    self._hashes, self._windows = hashes[own], windows[first[own]]
    self._short = {}  # whole texts of fewer than n words, by their words
    for index, text in enumerate(self._test.words):
      if 0 < len(text) < n:
        self._short.setdefault(tuple(text), index)

  def overlaps(self, texts: Sequence[str], first_index: int) -> list[Overlap]:
    """Overlaps of some training texts, the first of them number `first_index`."""
    n, train = self._n, _Numbers(texts, self._numbers, grow=False)
    at, test_at = self._matches(train)
    overlaps = []
    of_text, first, count = np.unique(train.text[at], return_index=True, return_counts=True)
    shared = {int(text): (int(i), int(c)) for text, i, c in zip(of_text, first, count, strict=True)}
    for index, text in enumerate(train.words):
      if index in shared:
        i, c = shared[index]
        begin = int(at[i] - train.starts[index])
        run, test_index = text[begin : begin + n], int(self._test.text[test_at[i]])
        overlaps.append(
          Overlap(first_index + index, test_index, " ".join(run), c / (len(text) - n + 1))
        )
      elif tuple(text) in self._short:
        overlaps.append(Overlap(first_index + index, self._short[tuple(text)], " ".join(text), 1.0))
    return overlaps

  def _matches(self, train: _Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Where windows of training texts begin that equal one of a test text, and where the latter
    begins.
    """
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
  """The training texts that overlap a test text, in order.

  Linear in the number of words. Matches of hashes are checked word by word, so no training text
  goes by accident.

  Args:
    train: texts.
    test: texts.
    n: words in a row, at least 1.
  """
  index = _Index(test, n)
  found = []
  for start in range(0, len(train), _CHUNK):
    found += index.overlaps(train[start : start + _CHUNK], start)
  return found
