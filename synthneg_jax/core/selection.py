"""Selects training data from sampled responses: D⁺, deduplication, advantage filters.

docs/method.md lists the sources.
"""

import math
import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from synthneg_jax.core.advantages import sign_confidence


def keep_right(responses: Sequence[tuple[Sequence[int], bool]], most: int) -> list[int]:
  """D⁺ of one problem: the first `most` right responses with distinct token sequences.

  Responses are in sampling order, so the first ones are a random sample. See section 5 of
  https://arxiv.org/abs/2406.14532.

  Args:
    responses: (token ids, verdict) of each response of the problem.
    most: maximum number to keep.

  Returns:
    Indices into `responses`.
  """
  kept, seen = [], set()
  for index, (ids, correct) in enumerate(responses):
    if correct and len(kept) < most and tuple(ids) not in seen:
      seen.add(tuple(ids))
      kept.append(index)
  return kept


_ANNOTATION = re.compile(r"<<([^<>\n]*)>>")
_TIMES = re.compile(r"(?<=[\d)%])[ \t]*[x×][ \t]*(?=[\d($])")
# Possessive quantifiers avoid backtracking. Groups are atomic, (?>...), instead of possessive,
# because of a bug before Python 3.11.5 (https://github.com/python/cpython/issues/106052).
_NUMBER = r"[-($]*+\d++(?>(?:[.,]\d++)*)%?+\)*+"
_SIDE = rf"{_NUMBER}(?>(?:[ \t]*+[-+*/][ \t]*+{_NUMBER})*)"
_CHAIN = re.compile(rf"(?<![-($\d])(?<!\d[.,]){_SIDE}(?>(?:[ \t]*+=[ \t]*+{_SIDE})*)")
_SIGNS = {"\\times": "*", "\\cdot": "*", "\\div": "/", "÷": "/", "−": "-", "–": "-"}
_SIGN = re.compile("|".join(map(re.escape, _SIGNS)))
_GOES_ON = re.compile(  # the rest of a side that a chain begins within: "2x + ", "x^"
  r"(?:[\w)}$%][ \t]*[-+*/]|[\^=]|\\[A-Za-z]+)[ \t{(]*\Z"
)


def _is_whole(text: str, chain: re.Match) -> bool:
  """Whether an equation does not begin within a side: 3 = 7 within 2x + 3 = 7."""
  before = text[max(0, chain.start() - 20) : chain.start()]
  minus = chain.group().startswith("-") and re.search(r"[\w)}][ \t]*\Z", before)
  return not minus and _GOES_ON.search(before) is None


def equation_key(text: str) -> str:
  """What a solution computes: its equations in order, without spaces, joined by "|".

  Responses with equal keys are rewordings of one solution. As in RFT
  (https://arxiv.org/abs/2308.01825), keys are GSM8K's calculator annotations <<48/2=24>>. If a text
  has none, they are the equations between numbers in its prose, with × and x read as *, ÷ as /, and
  without $ and digit-group commas.

  Returns:
    The key; "" for a text without equations, which does not identify a solution.
  """
  equations = _ANNOTATION.findall(text)
  if not equations:
    text = _TIMES.sub("*", _SIGN.sub(lambda sign: _SIGNS[sign.group()], text))
    chains = [chain.group() for chain in _CHAIN.finditer(text) if _is_whole(text, chain)]
    equations = [re.sub(r"\$|,(?=\d{3})", "", chain) for chain in chains if "=" in chain]
  return "|".join(re.sub(r"\s", "", equation) for equation in equations)


def deduplicate_by_equation_key(texts: Sequence[str]) -> list[int]:
  """The first text of each `equation_key`, and every text that has none.

  RFT (https://arxiv.org/abs/2308.01825) also keeps one response per key, but the one furthest from
  the others.

  Args:
    texts: in order of preference.

  Returns:
    Ascending indices into `texts`.
  """
  kept, seen = [], set()
  for index, text in enumerate(texts):
    key = equation_key(text)
    if not key or key not in seen:
      seen.add(key)
      kept.append(index)
  return kept


def deduplicate_by_edit_distance(texts: Sequence[str], threshold: float) -> list[int]:
  """Texts whose distance d(a, b) / max(|a|, |b|) to every text kept before exceeds the threshold.

  d is Levenshtein's distance. The paper's authors deduplicate by edit distance too; their
  normalisation and threshold are unknown.

  Args:
    texts: in order of preference.
    threshold: in [0, 1); 0 drops exact repeats only.

  Returns:
    Ascending indices into `texts`.
  """
  kept = []
  for index, text in enumerate(texts):
    if all(Levenshtein.normalized_distance(text, texts[other]) > threshold for other in kept):
      kept.append(index)
  return kept


def most_diverse(texts: Sequence[str], n: int) -> list[int]:
  """Greedy max-min selection: the first text, then repeatedly the one furthest from all selected.

  Distances are those of `deduplicate_by_edit_distance`; ties go to the earlier text.

  Args:
    texts: in any order.
    n: maximum number of texts; fewer are selected if only exact repeats remain.

  Returns:
    Indices into `texts`, in order of selection.
  """
  nearest = [math.inf] * len(texts)
  chosen = []
  while len(chosen) < min(n, len(texts)):
    best = max(range(len(texts)), key=nearest.__getitem__)
    if nearest[best] <= 0:
      break
    chosen.append(best)
    nearest = [
      min(before, Levenshtein.normalized_distance(text, texts[best]))
      for before, text in zip(nearest, texts, strict=True)
    ]
  return chosen


def advantage_filter(min_advantages: Sequence[float], bottom_share: float = 0.5) -> list[int]:
  """Advantage-filtered RFT: drops the ⌊bottom_share · N⌋ responses with the lowest min_i A_i.

  Figure 11 of https://arxiv.org/abs/2406.14532 drops the bottom half of right and wrong responses.
  All problems are ranked together. Ties, which are frequent with few rollouts per step, drop the
  later response first.

  Args:
    min_advantages: the lowest advantage of each response; NaN if none of its steps has one.
    bottom_share: in [0, 1].

  Returns:
    Ascending indices of the kept responses. Responses with NaN are dropped and do not count in N.
  """
  ranked = sorted(
    (i for i, low in enumerate(min_advantages) if not math.isnan(low)),
    key=lambda i: (min_advantages[i], -i),
  )
  return sorted(ranked[math.floor(bottom_share * len(ranked) + 1e-9) :])


def step_mask(advantages: Sequence[float], step_ends: Sequence[int], *, rule: str) -> list[bool]:
  """Step-wise advantage-filtered RFT: which tokens of a right or wrong response are cloned.

  Rules, with A_i the advantage of step i:
    positive          the steps with A_i > 0;
    before_negative   all steps before the first with A_i < 0.

  Args:
    advantages: of each step; NaN if unknown, which is neither > 0 nor < 0.
    step_ends: exclusive end of each step in the response's ids.
    rule: one of the above.

  Returns:
    Whether each token of the response is scored, for `tree.Branch.scored`.

  Raises:
    ValueError: unknown rule.
  """
  if rule == "positive":
    kept = [advantage > 0 for advantage in advantages]
  elif rule == "before_negative":
    first = next((i for i, advantage in enumerate(advantages) if advantage < 0), len(advantages))
    kept = [i < first for i in range(len(advantages))]
  else:
    raise ValueError(f"Unknown rule {rule!r}: must be positive or before_negative.")
  mask, start = [], 0
  for keep, end in zip(kept, step_ends, strict=True):
    mask += [keep] * (end - start)
    start = end
  return mask


def spurious_steps(
  successes: Sequence[int],
  rollouts: Sequence[int],
  start: tuple[int, int],
  *,
  confidence: float = 0.9,
) -> list[int]:
  """The steps of a right response that lower the value: P(Q_i < Q_i-1) >= confidence.

  The sign of A_i alone would count noise: with few rollouts, half of the steps that change nothing
  have A_i < 0.

  Args:
    successes, rollouts: counts after each step; 0 rollouts mean unknown. Omit the last step, whose
      value is its verdict, or give it 0 rollouts.
    start: (successes, rollouts) from the bare problem, before the first step.
    confidence: in (0.5, 1).

  Returns:
    Ascending indices of those steps.
  """
  spurious, (c_before, m_before) = [], start
  for step, (c, m) in enumerate(zip(successes, rollouts, strict=True)):
    if m and m_before:
      p = sign_confidence(c, m, successes_before=c_before, rollouts_before=m_before)
      if p >= confidence:
        spurious.append(step)
    c_before, m_before = c, m
  return spurious
