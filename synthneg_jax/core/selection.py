"""Which self-generated responses become training data: D⁺, those that differ, those of high
advantage; spurious steps.
"""

import math
import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from synthneg_jax.core.advantages import sign_confidence


def keep_right(responses: Sequence[tuple[Sequence[int], bool]], most: int) -> list[int]:
  """D⁺ of one problem: the first `most` right responses that differ from one another token by
  token.

  Sampling order is random already, so the first are a random choice. That D⁺ holds right responses
  to D_syn's problems is the paper's (section 5 of https://arxiv.org/abs/2406.14532); how many a
  problem is not known, and is ours to choose.

  Args:
    responses: (token ids, verdict) of each response of the problem.
    most: how many are kept.

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
# Possessive, so that no run of characters is read twice; groups are atomic instead, (?>...), since
# Python before 3.11.5 has possessive ones wrong (https://github.com/python/cpython/issues/106052).
_NUMBER = r"[-($]*+\d++(?>(?:[.,]\d++)*)%?+\)*+"
_SIDE = rf"{_NUMBER}(?>(?:[ \t]*+[-+*/][ \t]*+{_NUMBER})*)"
_CHAIN = re.compile(rf"(?<![-($\d])(?<!\d[.,]){_SIDE}(?>(?:[ \t]*+=[ \t]*+{_SIDE})*)")


def equation_key(text: str) -> str:
  """What a solution computes: its equations in order, without spaces, joined by "|".

  Responses of one key are the same solution in other words. Keys are those of RFT
  (https://arxiv.org/abs/2308.01825, whose code keeps one response a key; VERIFIED), made from
  GSM8K's calculator annotations <<48/2=24>>. Where a text has none, equations between numbers are
  read from its prose (ours); there × and x count as *, ÷ as /, and $ and the commas within numbers
  are dropped.

  Returns:
    The key; "" where there is no equation, which says nothing about two texts being alike.
  """
  found = _ANNOTATION.findall(text)
  if not found:
    chains = _CHAIN.findall(_TIMES.sub("*", text).replace("÷", "/"))
    found = [re.sub(r"\$|,(?=\d{3})", "", chain) for chain in chains if "=" in chain]
  return "|".join(re.sub(r"\s", "", equation) for equation in found)


def deduplicate_by_equation_key(texts: Sequence[str]) -> list[int]:
  """The first text of each `equation_key`, and every text that has none.

  RFT keeps one response a key (https://arxiv.org/abs/2308.01825, VERIFIED), of equals the one
  furthest from the others; that it is the first here is ours.

  Args:
    texts: in order of preference.

  Returns:
    Indices into `texts`, rising.
  """
  kept, seen = [], set()
  for index, text in enumerate(texts):
    key = equation_key(text)
    if not key or key not in seen:
      seen.add(key)
      kept.append(index)
  return kept


def deduplicate_by_edit_distance(texts: Sequence[str], threshold: float) -> list[int]:
  """Texts that are far from every one kept before them: d(a, b) / max(|a|, |b|) > threshold, d
  Levenshtein's distance.

  That the paper drops near repeats by edit distance is VERIFIED (a co-author's lecture); how it
  normalises and where it cuts is not known, and both are ours.

  Args:
    texts: in order of preference.
    threshold: in [0, 1); 0 drops exact repeats only.

  Returns:
    Indices into `texts`, rising.
  """
  kept = []
  for index, text in enumerate(texts):
    if all(Levenshtein.normalized_distance(text, texts[other]) > threshold for other in kept):
      kept.append(index)
  return kept


def most_diverse(texts: Sequence[str], n: int) -> list[int]:
  """Greedy max-min choice: the first text, then again and again the one whose nearest chosen text
  is furthest away.

  Distances as in `deduplicate_by_edit_distance`; ties go to the earlier text. To draw 2n and keep
  the n most diverse is the other way that a co-author's lecture names (VERIFIED); that it is greedy
  max-min is ours.

  Args:
    texts: in any order.
    n: how many at most. Exact repeats are never chosen, so that there may be fewer.

  Returns:
    Indices into `texts`, in the order of choice.
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
  """Advantage-filtered RFT: drops the responses whose min_i A_i is among the lowest `bottom_share`
  of all.

  Figure 11 of https://arxiv.org/abs/2406.14532 drops the bottom half of right and wrong responses
  (VERIFIED, its caption). That all problems are ranked together is INFERRED; that exactly ⌊share ·
  N⌋ are dropped, of equal ones the later first, is ours: with few rollouts a step many are equal.

  Args:
    min_advantages: the lowest advantage of each response; NaN where none of its steps has one.
    bottom_share: in [0, 1].

  Returns:
    Indices of the responses kept, rising. Those with NaN are never kept, and do not count in N.
  """
  ranked = sorted(
    (i for i, low in enumerate(min_advantages) if not math.isnan(low)),
    key=lambda i: (min_advantages[i], -i),
  )
  return sorted(ranked[math.floor(bottom_share * len(ranked)) :])


def step_mask(advantages: Sequence[float], step_ends: Sequence[int], *, rule: str) -> list[bool]:
  """Advantage-filtered RFT step by step: which tokens of a response, right or wrong, are cloned.

  Rules, A_i the advantage of step i:
    positive          the steps with A_i > 0, and no others (VERIFIED: a co-author's lecture);
    before_negative   all steps before the first with A_i < 0 (ours).

  Args:
    advantages: of each step; NaN where it is unknown, which is neither > 0 nor < 0.
    step_ends: exclusive end of each step in the response's ids.
    rule: one of the above.

  Returns:
    For each token of the response whether it is scored; what `tree.Branch.scored` takes.

  Raises:
    ValueError: no such rule.
  """
  if rule == "positive":
    kept = [advantage > 0 for advantage in advantages]
  elif rule == "before_negative":
    first = next((i for i, advantage in enumerate(advantages) if advantage < 0), len(advantages))
    kept = [i < first for i in range(len(advantages))]
  else:
    raise ValueError(f"No rule {rule!r}: positive or before_negative.")
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
  """The steps of a right response that its counts call a step back: P(Q_i < Q_i-1) >= confidence.

  The paper counts spurious steps in right responses by a heuristic that is not known; this one is
  ours. Going by the sign of A_i alone would count noise: with few rollouts half of the steps that
  change nothing have A_i < 0.

  Args:
    successes, rollouts: counts after each step; a step without rollouts is unknown, so leave out or
      give 0 to the last, whose value is its verdict.
    start: (successes, rollouts) from the bare problem, before the first step.
    confidence: in (0.5, 1).

  Returns:
    Indices of those steps, rising.
  """
  after = list(zip(successes, rollouts, strict=True))
  known = [
    i
    for i, (now, before) in enumerate(zip(after, [start, *after], strict=False))
    if now[1] and before[1]
  ]

  def steps_back(i: int) -> bool:
    before = after[i - 1] if i else start
    return (
      sign_confidence(*after[i], successes_before=before[0], rollouts_before=before[1])
      >= confidence
    )

  return [i for i in known if steps_back(i)]
