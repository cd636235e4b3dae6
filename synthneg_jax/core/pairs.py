"""Builds preference pairs from pits: the chosen and rejected branch, their trunk, and P(flipped).

Everything is token ids: a branch is a list of ids, a step a slice of a response. EOS is never added
or stripped, so a rejected prefix ends with EOS only if its pit is the last step. docs/method.md
lists the sources.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein
from scipy import special

from synthneg_jax.core import advantages

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Response:
  """A response of the policy; `step_ends[i]` is the exclusive end of step i in `ids`."""

  ids: Ids
  step_ends: Sequence[int]

  def prefix(self, steps: int) -> list[int]:
    """The first `steps` steps."""
    return list(self.ids[: self.step_ends[steps - 1]]) if steps else []

  def step(self, index: int) -> list[int]:
    """The ids of one step."""
    return list(self.ids[len(self.prefix(index)) : self.step_ends[index]])


@dataclasses.dataclass(frozen=True)
class Sibling(Response):
  """Another continuation of the same prefix: a rollout or, from the bare problem, a trace.

  Attributes:
    correct: its verdict.
    step_logp: log-prob of its first step, nats; only for choice "most_likely".
    logp: log-prob of the whole continuation, nats; only for choice "most_likely".
  """

  correct: bool
  step_logp: float = math.nan
  logp: float = math.nan


@dataclasses.dataclass(frozen=True)
class Count:
  """The rollouts that estimate a value Q; if `exact`, successes / rollouts equals Q."""

  successes: int
  rollouts: int
  exact: bool = False


@dataclasses.dataclass(frozen=True)
class TokenPair:
  """trunk + chosen is preferred to trunk + rejected.

  Attributes:
    trunk, chosen, rejected: token ids.
    p_flipped: probability that the order should be reversed.
    context: number of leading tokens of `rejected` that are not scored.
  """

  trunk: list[int]
  chosen: list[int]
  rejected: list[int]
  p_flipped: float = 0.0
  context: int = 0


def _value(count: Count) -> float:
  return count.successes / count.rollouts


def _below(count: Count, q: float) -> float:
  """P(Q < q) given the counts, under Jeffreys' prior."""
  return float(special.betainc(count.successes + 0.5, count.rollouts - count.successes + 0.5, q))


def flip_probability(rejected: Count, other: Count) -> float:
  """P(Q_rejected > Q_other): the posterior probability that a pair's label is flipped.

  Q ~ Beta(c + ½, M - c + ½), Jeffreys' posterior, independently for both; an exact value is a point
  mass. Equal counts and equal exact values give ½. `other` depends on the pair:
    shared prefix      the chosen step, estimated by the rollouts that begin with it;
    algorithm 1        the value before the pit, since the chosen response is complete and carries
                       no information about the pit;
    whole responses    none: both verdicts are exact, so the probability is 0.
  """
  if not (rejected.exact or other.exact):
    return 1.0 - float(
      advantages.sign_confidence(
        rejected.successes,
        rejected.rollouts,
        successes_before=other.successes,
        rollouts_before=other.rollouts,
      )
    )
  if rejected.exact and other.exact:
    return float(np.heaviside(_value(rejected) - _value(other), 0.5))
  if rejected.exact:
    return _below(other, _value(rejected))
  return 1.0 - _below(rejected, _value(other))


def algorithm1(
  prompt: Ids, solution: Ids, response: Response, *, pit: int, after: Count, before: Count
) -> TokenPair:
  """(x, y, ŷ_1:c): the known solution against the prefix of a response that ends with the pit.

  Algorithm 1 of https://arxiv.org/abs/2406.14532. The chosen response is whole; the rejected prefix
  has no EOS.

  Args:
    prompt, solution: ids.
    response: a wrong response, or a right one with a step that made no progress.
    pit: index of the blamed step, from 0.
    after, before: counts of the rollouts from after and before the pit.
  """
  return TokenPair(
    list(prompt), list(solution), response.prefix(pit + 1), flip_probability(after, before)
  )


def prefix_protected(
  prompt: Ids, solution: Ids, response: Response, *, pit: int, after: Count, before: Count
) -> TokenPair:
  """Algorithm 1's pair, scoring only the pit of the rejected prefix: log π(ŷ_c | x, ŷ_1:c−1).

  Algorithm 1 also lowers the probability of the good steps before the pit; here they are unscored
  context. The chosen response is that of `algorithm1`, the scored rejected step that of
  `shared_prefix`. Inspired by VPPO (https://arxiv.org/abs/2601.18984), which penalises from the
  first error on. Arguments as in `algorithm1`.
  """
  pair = algorithm1(prompt, solution, response, pit=pit, after=after, before=before)
  return dataclasses.replace(pair, context=len(response.prefix(pit)))


def arbitrary(prompt: Ids, right: Ids, wrong: Ids) -> TokenPair:
  """A whole right response against a whole wrong one, as in DPO (arXiv 2305.18290)."""
  return TokenPair(list(prompt), list(right), list(wrong))


_MIN_DISTANCES = (0.5, 0.4, 0.3)


def furthest(
  right: Sequence[Sequence], wrong: Sequence[Sequence], *, variant: str
) -> list[tuple[int, int]]:
  """Pairs right and wrong responses of one problem by edit distance, using each at most once.

  The baseline "DPO [Pal et al.]" of the paper's figure 5c pairs by highest edit distance, without
  details. The variants are those in the code of Self-Explore (https://arxiv.org/abs/2404.10346).
  Each right response, in order, takes, with d Levenshtein's distance,
    largest        the wrong response with the largest d;
    shortest_far   the shortest wrong response with d / (|a| + |b|) > 0.5, else > 0.4, else > 0.3,
                   else none.

  Args:
    right, wrong: texts, or ids.
    variant: one of the above.

  Returns:
    (index into right, index into wrong) of each pair; ties go to the earlier wrong response.

  Raises:
    ValueError: unknown variant.
  """
  if variant not in ("largest", "shortest_far"):
    raise ValueError(f"Unknown variant {variant!r}: must be largest or shortest_far.")

  def normalised_distance(r: int, w: int) -> float:
    return Levenshtein.distance(right[r], wrong[w]) / (len(right[r]) + len(wrong[w]))

  free, pairs = list(range(len(wrong))), []
  for r, chosen in enumerate(right):
    if variant == "largest":
      best = max(free, key=lambda w: Levenshtein.distance(chosen, wrong[w]), default=None)
    else:
      distance = {w: normalised_distance(r, w) for w in free}
      far = []
      for threshold in _MIN_DISTANCES:
        far = far or [w for w in free if distance[w] > threshold]
      best = min(far, key=lambda w: len(wrong[w]), default=None)
    if best is not None:
      free.remove(best)
      pairs.append((r, best))
  return pairs


class ChosenRule(NamedTuple):
  """How `shared_prefix` takes the chosen branch from the right siblings.

  Attributes:
    continuation: "step" for the sibling's first step, "rollout" for all of it.
    choice: which sibling: "random"; "shortest"; "most_likely", by the tokens that are taken;
      "majority", whose first step has the most right minus wrong siblings. Ties go to the earlier.
    rng: for "random".
  """

  continuation: str
  choice: str
  rng: np.random.Generator


def shared_prefix(
  prompt: Ids,
  response: Response,
  pit: int,
  *,
  siblings: Sequence[Sibling],
  after: Count,
  rule: ChosenRule,
) -> TokenPair | None:
  """The pit against a right continuation of the same prefix: the pair of theorem 6.1.

  Self-Explore (https://arxiv.org/abs/2404.10346) uses the same form. Applied to the spurious steps
  of right responses too, it gives the pairs of figure 10.

  Args:
    prompt: ids of the problem.
    response: its steps before the pit become part of the trunk.
    pit: index of the rejected step, from 0.
    siblings: all rollouts from the prefix before the pit (for pit 0, all responses to the problem).
    after: counts of the rollouts from after the pit.
    rule: how the chosen branch is taken.

  Returns:
    The pair, or None if every right sibling begins with the pit itself.

  Raises:
    ValueError: unknown continuation or choice.
  """
  continuation, choice, rng = rule
  if continuation not in ("step", "rollout"):
    raise ValueError(f"Unknown continuation {continuation!r}: must be step or rollout.")
  rejected = response.step(pit)
  num_right, num_siblings = collections.Counter(), collections.Counter()
  for sibling in siblings:
    first = tuple(sibling.step(0))
    num_right[first] += sibling.correct
    num_siblings[first] += 1
  right = [sibling for sibling in siblings if sibling.correct and sibling.step(0) != rejected]
  if not right:
    return None
  if choice == "random":
    chosen = right[rng.integers(len(right))]
  elif choice == "shortest":
    chosen = min(right, key=lambda sibling: len(sibling.ids))
  elif choice == "most_likely":
    chosen = max(
      right, key=lambda sibling: sibling.step_logp if continuation == "step" else sibling.logp
    )
  elif choice == "majority":
    # right minus wrong
    lead = {first: 2 * num_right[first] - count for first, count in num_siblings.items()}
    chosen = max(right, key=lambda sibling: lead[tuple(sibling.step(0))])
  else:
    raise ValueError(
      f"Unknown choice {choice!r}: must be random, shortest, most_likely or majority."
    )
  first = tuple(chosen.step(0))
  ids = list(first) if continuation == "step" else list(chosen.ids)
  flip = flip_probability(after, Count(num_right[first], num_siblings[first]))
  return TokenPair(list(prompt) + response.prefix(pit), ids, rejected, flip)


def negatives(responses: Sequence[tuple[Ids, str]], most: int) -> list[int]:
  """The wrong responses of one problem to use for credit and pairs: the first `most` distinct ones.

  Only responses with an answer count: the last step of a truncated or looping response is not a
  wrong answer. Self-Explore drops these too (https://arxiv.org/abs/2404.10346).

  Args:
    responses: (token ids, reason of the verdict) of each response of the problem; the reason
      "wrong" means an answer that is wrong.
    most: maximum number to keep.

  Returns:
    Ascending indices into `responses`.
  """
  kept = {}
  for index, (ids, reason) in enumerate(responses):
    if reason == "wrong" and len(kept) < most:
      kept.setdefault(tuple(ids), index)
  return list(kept.values())


def filter_pairs(
  pairs: Sequence[TokenPair], problems: Sequence[str], *, most: int, max_flip: float
) -> tuple[list[int], dict[str, int]]:
  """Drops uncertain and duplicate pairs and caps the pairs of a problem.

  Args:
    pairs: in order of preference.
    problems: the problem of each pair.
    most: maximum number of pairs per problem.
    max_flip: pairs with a higher probability of a flipped label are dropped.

  Returns:
    (ascending indices into `pairs`; numbers of dropped pairs by reason: `same`: chosen equals
    rejected; `doubtful`: flip > max_flip; `repeated`: trunk and rejected of an earlier pair;
    `beyond_cap`).
  """
  kept, seen = [], set()
  per_problem, dropped = collections.Counter(), collections.Counter()
  for index, (pair, problem) in enumerate(zip(pairs, problems, strict=True)):
    key = (tuple(pair.trunk), tuple(pair.rejected))
    if pair.chosen == pair.rejected:
      dropped["same"] += 1
    elif pair.p_flipped > max_flip:
      dropped["doubtful"] += 1
    elif key in seen:
      dropped["repeated"] += 1
    elif per_problem[problem] >= most:
      dropped["beyond_cap"] += 1
    else:
      seen.add(key)
      per_problem[problem] += 1
      kept.append(index)
  return kept, dict(dropped)
