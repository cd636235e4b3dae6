"""Which self-generated responses become training data: D⁺, the right ones."""

from collections.abc import Sequence


def keep_right(responses: Sequence[tuple[Sequence[int], bool]], most: int) -> list[int]:
  """D⁺ of one problem: the first `most` right responses that differ from one another token by token.

  Sampling order is random already, so the first are a random choice. That D⁺ holds right responses to D_syn's problems
  is the paper's (section 5 of https://arxiv.org/abs/2406.14532); how many a problem is not known, and is ours to choose.

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
