"""From pits to preference pairs: which branch is chosen, which is rejected, and what trunk they share.

Tokens only: a branch is a list of ids, a step a slice of a response. EOS is never added and never stripped: a rejected
prefix has none unless its pit is the last step, in which the model itself stopped.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Response:
  """A response of the policy with its steps. `step_ends[i]` is the exclusive end of step i in `ids`."""

  ids: Ids
  step_ends: Sequence[int]

  def prefix(self, steps: int) -> list[int]:
    """The first `steps` steps."""
    return list(self.ids[: self.step_ends[steps - 1]]) if steps else []

  def step(self, index: int) -> list[int]:
    """One step."""
    return list(self.ids[len(self.prefix(index)) : self.step_ends[index]])


@dataclasses.dataclass(frozen=True)
class TokenPair:
  """trunk + chosen is preferred to trunk + rejected."""

  trunk: list[int]
  chosen: list[int]
  rejected: list[int]


def algorithm1(prompt: Ids, solution: Ids, wrong: Response, pit: int) -> TokenPair:
  """(x, y, ŷ_1:c): the known solution against the wrong response's prefix that ends with the pit.

  The paper's practical algorithm (Algorithm 1 of https://arxiv.org/abs/2406.14532, as read second-hand; that the chosen
  is whole and the rejected a prefix without EOS is inferred from the form of the triplet).
  """
  return TokenPair(list(prompt), list(solution), wrong.prefix(pit + 1))


def arbitrary(prompt: Ids, solution: Ids, wrong: Response) -> TokenPair:
  """A right whole response against a wrong whole one: standard DPO's pair (https://arxiv.org/abs/2305.18290)."""
  return TokenPair(list(prompt), list(solution), list(wrong.ids))


def shared_prefix(
  prompt: Ids,
  wrong: Response,
  pit: int,
  right: Sequence[Response],
  all_first_steps: Sequence[tuple[Ids, bool]],
  *,
  continuation: str,
  choice: str,
  rng: np.random.Generator,
) -> TokenPair | None:
  """The pit against what came out right from the very same prefix: the pair of theorem 6.1.

  Args:
    prompt: ids of the problem.
    wrong: the wrong response; its steps before the pit become trunk.
    pit: the step that is rejected, from 0.
    right: right rollouts from the prefix before the pit (for pit 0: right responses to the problem).
    all_first_steps: first step and verdict of every rollout from that prefix, right or wrong; for choice "majority".
    continuation: "step" takes the chosen rollout's first step, "rollout" all of it.
    choice: which right rollout: "random", "shortest", or "majority" (the first step with the most right minus wrong
      rollouts; ours).
    rng: for "random".

  Returns:
    The pair, or None where no right rollout begins otherwise than the pit.

  Raises:
    ValueError: no such continuation or choice.
  """
  rejected = wrong.step(pit)
  others = [response for response in right if response.step(0) != rejected]
  if not others:
    return None
  if choice == "random":
    chosen = others[rng.integers(len(others))]
  elif choice == "shortest":
    chosen = min(others, key=lambda response: len(response.ids))
  elif choice == "majority":
    score = collections.Counter()
    for step, correct in all_first_steps:
      score[tuple(step)] += 1 if correct else -1
    chosen = max(others, key=lambda response: score[tuple(response.step(0))])
  else:
    raise ValueError(f"No choice {choice!r}: random, shortest or majority.")
  if continuation not in ("step", "rollout"):
    raise ValueError(f"No continuation {continuation!r}: step or rollout.")
  ids = chosen.step(0) if continuation == "step" else list(chosen.ids)
  return TokenPair(list(prompt) + wrong.prefix(pit), ids, rejected)
