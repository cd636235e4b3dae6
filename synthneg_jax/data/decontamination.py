"""Training problems that a test problem shines through: the same run of words in both.

The rule is ours (what the paper did is not known): a training problem goes if it shares `n` words in a row with a test
problem, 13 by default, as is common for language models' training data. Words are runs of letters and digits, case aside,
so that layout, punctuation and LaTeX's signs do not matter (`\\frac{1}{2}` is frac, 1, 2). A text of fewer words counts
only if its words are all those of a test problem. Problems are compared, solutions are not.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"[^\W_]+")
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
    look = (lambda word: numbers.setdefault(word, len(numbers) + 1)) if grow else (lambda word: numbers.get(word, 0))
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


def overlaps(train: Sequence[str], test: Sequence[str], n: int = 13) -> list[Overlap]:
  """The training texts that overlap a test text, in order.

  Linear in the number of words; what the hash finds is checked word by word, so that no text goes by accident.

  Args:
    train: texts.
    test: texts.
    n: words in a row, at least 1.
  """
  numbers, found = {}, []
  known = _Numbers(test, numbers, grow=True)
  factors = np.random.default_rng(0).integers(1, 1 << 63, size=n, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
  places = known.windows(n)
  hashes, first = np.unique(known.hashes(places, factors), return_index=True)
  places = places[first]
  whole = {tuple(text): index for index, text in reversed(list(enumerate(known.words))) if 0 < len(text) < n}
  for start in range(0, len(train), _CHUNK):
    found += _in_chunk(train[start : start + _CHUNK], start, n, numbers, known, hashes, places, factors, whole)
  return found


def _in_chunk(texts, start, n, numbers, known, hashes, places, factors, whole) -> list[Overlap]:
  """Overlaps of some training texts, the first of them number `start`."""
  chunk = _Numbers(texts, numbers, grow=False)
  at = chunk.windows(n)
  rank = np.minimum(np.searchsorted(hashes, mine := chunk.hashes(at, factors)), max(len(hashes) - 1, 0))
  hit = hashes[rank] == mine if len(hashes) else np.zeros(len(at), bool)
  at, there = at[hit], places[rank[hit]] if len(hashes) else places
  for offset in range(n):
    same = chunk.flat[at + offset] == known.flat[there + offset]
    at, there = at[same], there[same]
  found = []
  of_text, first, count = np.unique(chunk.text[at], return_index=True, return_counts=True)
  shared = {int(text): (int(i), int(c)) for text, i, c in zip(of_text, first, count, strict=True)}
  for index, text in enumerate(chunk.words):
    if index in shared:
      i, c = shared[index]
      begin = int(at[i] - chunk.starts[index])
      run, of_test = text[begin : begin + n], int(known.text[there[i]])
      found.append(Overlap(start + index, of_test, " ".join(run), c / (len(text) - n + 1)))
    elif tuple(text) in whole:  # it is shorter than n
      found.append(Overlap(start + index, whole[tuple(text)], " ".join(text), 1.0))
  return found
