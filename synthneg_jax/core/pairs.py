"""From pits to preference pairs: which branch is chosen, which is rejected, what trunk they share,
and how sure that is.

Tokens only: a branch is a list of ids, a step a slice of a response. EOS is never added and never
stripped: a rejected prefix has none unless its pit is the last step, in which the model itself
stopped.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein
from scipy import special

from synthneg_jax.core import advantages

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Response:
  """A response of the policy with its steps. `step_ends[i]` is the exclusive end of step i in
  `ids`.
  """

  ids: Ids
  step_ends: Sequence[int]

  def prefix(self, steps: int) -> list[int]:
    """The first `steps` steps."""
    return list(self.ids[: self.step_ends[steps - 1]]) if steps else []

  def step(self, index: int) -> list[int]:
    """One step."""
    return list(self.ids[len(self.prefix(index)) : self.step_ends[index]])


@dataclasses.dataclass(frozen=True)
class Sibling(Response):
  """Another way on from the same prefix: a rollout or, from the bare problem, a trace.

  Attributes:
    correct: its verdict.
    step_logp, logp: log-probs of its first step and of all of it, nats; for choice "most_likely"
      only.
  """

  correct: bool
  step_logp: float = math.nan
  logp: float = math.nan


@dataclasses.dataclass(frozen=True)
class Count:
  """What is known of a value Q: `successes` of `rollouts` came out right. Where `exact`, their
  ratio is Q itself.
  """

  successes: int
  rollouts: int
  exact: bool = False


@dataclasses.dataclass(frozen=True)
class TokenPair:
  """trunk + chosen is preferred to trunk + rejected; `flip` is the probability that it should be
  the other way.

  The first `context` tokens of rejected are context, which no log-prob counts.
  """

  trunk: list[int]
  chosen: list[int]
  rejected: list[int]
  flip: float = 0.0
  context: int = 0


def _value(count: Count) -> float:
  return count.successes / count.rollouts


def _below(count: Count, q: float) -> float:
  """P(Q < q) after these counts, under Jeffreys' prior."""
  return float(special.betainc(count.successes + 0.5, count.rollouts - count.successes + 0.5, q))


def flip_probability(rejected: Count, other: Count) -> float:
  """P(Q_rejected > Q_other): how likely the counts make it that a pair's label is flipped. Ours.

  Q ~ Beta(c + ½, M - c + ½), Jeffreys' posterior, independent for the two; a value that is exact is
  a point. Equal counts, and equal exact values, give ½. The pit is compared with:
    shared prefix      the chosen step, by the rollouts that began with it;
    algorithm 1        the value before the pit: the chosen response is complete and carries no
                       information about the pit;
    whole responses    nothing: both verdicts are exact, so the result is 0.
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
  return (
    _below(other, _value(rejected)) if rejected.exact else 1.0 - _below(rejected, _value(other))
  )


def algorithm1(
  prompt: Ids, solution: Ids, response: Response, *, pit: int, after: Count, before: Count
) -> TokenPair:
  """(x, y, ŷ_1:c): the known solution against the prefix of a response that ends with the pit.

  The paper's practical algorithm (Algorithm 1 of https://arxiv.org/abs/2406.14532, VERIFIED
  second-hand; that the chosen is whole and the rejected a prefix without EOS is INFERRED from the
  form of the triplet).

  Args:
    prompt, solution: ids.
    response: a wrong response, or a right one with a step that made no progress.
    pit: the step to be blamed, from 0.
    after, before: what is known of Q after the pit and before it.
  """
  return TokenPair(
    list(prompt), list(solution), response.prefix(pit + 1), flip_probability(after, before)
  )


def prefix_protected(
  prompt: Ids, solution: Ids, response: Response, *, pit: int, after: Count, before: Count
) -> TokenPair:
  """Algorithm 1's pair with the steps before the pit as context: only the pit's own log-prob, log
  π(ŷ_c | x, ŷ_1:c−1), falls.

  Algorithm 1 also pushes down the good steps that lead to the pit. To reward a right prefix and to
  punish from the first error on is the idea of VPPO (https://arxiv.org/abs/2601.18984, read as an
  abstract); this form of it is ours. It lies between `algorithm1`, whose chosen response it keeps,
  and `shared_prefix`, whose rejected step it has. Arguments as `algorithm1`.
  """
  pair = algorithm1(prompt, solution, response, pit=pit, after=after, before=before)
  return dataclasses.replace(pair, context=len(response.prefix(pit)))


def arbitrary(prompt: Ids, right: Ids, wrong: Ids) -> TokenPair:
  """A right whole response against a wrong whole one: standard DPO's pair
  (https://arxiv.org/abs/2305.18290).
  """
  return TokenPair(list(prompt), list(right), list(wrong))


_FAR = (0.5, 0.4, 0.3)


def furthest(
  right: Sequence[Sequence], wrong: Sequence[Sequence], *, variant: str
) -> list[tuple[int, int]]:
  """Right and wrong responses of one problem that are far apart in edit distance, each used once.

  "DPO [Pal et al.]" of figure 5c pairs by highest edit distance (VERIFIED second-hand). How is not
  known; these are the two ways that the code of Self-Explore has (https://arxiv.org/abs/2404.10346,
  VERIFIED), d Levenshtein's distance:
    largest        each right response, in order, takes the wrong one with the largest d;
    shortest_far   the shortest wrong one with d / (|a| + |b|) > 0.5, else > 0.4, else > 0.3, else
                   none.

  Args:
    right, wrong: texts, or ids.
    variant: one of the above.

  Returns:
    (index into right, index into wrong) of each pair; ties go to the earlier wrong response.

  Raises:
    ValueError: no such variant.
  """
  if variant not in ("largest", "shortest_far"):
    raise ValueError(f"No variant {variant!r}: largest or shortest_far.")
  free, pairs = list(range(len(wrong))), []
  for r, chosen in enumerate(right):
    if variant == "largest":
      best = max(free, key=lambda w: Levenshtein.distance(chosen, wrong[w]), default=None)
    else:
      share = {
        w: Levenshtein.distance(chosen, wrong[w]) / (len(chosen) + len(wrong[w])) for w in free
      }
      far = next((found for least in _FAR if (found := [w for w in free if share[w] > least])), [])
      best = min(far, key=lambda w: len(wrong[w]), default=None)
    if best is not None:
      free.remove(best)
      pairs.append((r, best))
  return pairs


def shared_prefix(
  prompt: Ids,
  response: Response,
  pit: int,
  *,
  siblings: Sequence[Sibling],
  after: Count,
  continuation: str,
  choice: str,
  rng: np.random.Generator,
) -> TokenPair | None:
  """The pit against what came out right from the very same prefix: the pair of theorem 6.1.

  So the lecture of a co-author has it (VERIFIED), and Self-Explore
  (https://arxiv.org/abs/2404.10346). With the spurious steps of right responses too it is the
  natural reading of figure 10 (INFERRED).

  Args:
    prompt: ids of the problem.
    response: its steps before the pit become trunk.
    pit: the step that is rejected, from 0.
    siblings: all rollouts from the prefix before the pit (for pit 0: all responses to the problem).
    after: what is known of Q after the pit.
    continuation: "step" takes the chosen sibling's first step, "rollout" all of it.
    choice: which right sibling: "random"; "shortest"; "most_likely", by the tokens that are taken;
      "majority", of the first step with the most right minus wrong siblings (ours). Ties go to the
      earlier.
    rng: for "random".

  Returns:
    The pair, or None where no right sibling begins otherwise than the pit.

  Raises:
    ValueError: no such continuation or choice.
  """
  if continuation not in ("step", "rollout"):
    raise ValueError(f"No continuation {continuation!r}: step or rollout.")
  rejected = response.step(pit)
  score, counts = collections.Counter(), collections.Counter()
  for sibling in siblings:
    first = tuple(sibling.step(0))
    score[first] += sibling.correct
    counts[first] += 1
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
    lead = {first: 2 * score[first] - counts[first] for first in counts}  # right minus wrong
    chosen = max(right, key=lambda sibling: lead[tuple(sibling.step(0))])
  else:
    raise ValueError(f"No choice {choice!r}: random, shortest, most_likely or majority.")
  first = tuple(chosen.step(0))
  ids = list(first) if continuation == "step" else list(chosen.ids)
  flip = flip_probability(after, Count(score[first], counts[first]))
  return TokenPair(list(prompt) + response.prefix(pit), ids, rejected, flip)


def negatives(responses: Sequence[tuple[Ids, str]], most: int) -> list[int]:
  """The wrong responses of one problem that credit and pairs are made from: with an answer,
  distinct, the first `most`.

  Responses cut off or looping have no answer, so that their last step is no wrong answer;
  Self-Explore drops them too (https://arxiv.org/abs/2404.10346, VERIFIED). The paper keeps 8 wrong
  ones a problem (VERIFIED second-hand).

  Args:
    responses: (token ids, verdict's reason) of each response of the problem; "wrong" is wrong with
      an answer.
    most: how many are kept.

  Returns:
    Indices into `responses`, rising.
  """
  kept = {}
  for index, (ids, reason) in enumerate(responses):
    if reason == "wrong" and len(kept) < most:
      kept.setdefault(tuple(ids), index)
  return list(kept.values())


def filter_pairs(
  pairs: Sequence[TokenPair], problems: Sequence[str], *, most: int, max_flip: float
) -> tuple[list[int], dict[str, int]]:
  """The pairs that are trained on. Ours; how the paper filters and caps is not known.

  Args:
    pairs: in order of preference.
    problems: the problem of each.
    most: how many of one problem are kept.
    max_flip: pairs whose label is flipped with a higher probability are dropped.

  Returns:
    (indices into `pairs`, rising; how many were dropped, by reason: `same` where chosen and
    rejected are equal, `doubtful`, `repeated` where trunk and rejected stood before, `beyond_cap`).
  """
  kept, seen = [], set()
  per_problem, dropped = collections.Counter(), collections.Counter()
  for index, (pair, problem) in enumerate(zip(pairs, problems, strict=True)):
    key = (tuple(pair.trunk), tuple(pair.rejected))
    if pair.chosen == pair.rejected:
      dropped["same"] += 1
    elif pair.flip > max_flip:
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
