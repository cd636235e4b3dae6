"""Where the next rollouts of a response go: everywhere, or only where its first pit is uncertain.

A schedule is a function of the counts so far, so a resumed run, or one with other batches, requests
the same rollouts. Functions take one response of S steps; the last step is exact and gets none.

All schedules but `every` search one threshold. A step is dead if no continuation is right; all
steps after a dead one are dead, and a success after step j shows that steps 0..j are alive.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

Counts = Sequence[int]


def every(successes: Counts, rollouts: Counts, num_rollouts: int) -> list[int]:
  """`num_rollouts` after every step.

  Args:
    successes, rollouts: counts after each step but the last.
    num_rollouts: R, maximum rollouts after a step.

  Returns:
    The number of rollouts to draw next after each of these steps; all 0 if no more are needed.
  """
  return [max(num_rollouts - m, 0) for m in rollouts]


def until_first_zero(successes: Counts, rollouts: Counts, num_rollouts: int) -> list[int]:
  """R rollouts after each step from the left, up to the first step without a success.

  The scan of Self-Explore (https://arxiv.org/abs/2404.10346). Arguments and result as in `every`.
  """
  more = [0] * len(rollouts)
  for step, (c, m) in enumerate(zip(successes, rollouts, strict=True)):
    if m < num_rollouts:
      more[step] = num_rollouts - m
      break
    if c == 0:
      break
  return more


def bisect(successes: Counts, rollouts: Counts, num_rollouts: int) -> list[int]:
  """R rollouts after the middle undecided step, repeatedly: OmegaPRM's search for the first error.

  See "Improve Mathematical Reasoning in Language Models by Automated Process Supervision" by Luo et
  al. (https://arxiv.org/abs/2406.06592). Arguments and result as in `every`.
  """
  more = [0] * len(rollouts)
  alive, dead = -1, len(rollouts)  # the last step is wrong, hence dead
  while dead - alive > 1:
    middle = (alive + dead) // 2
    if rollouts[middle] < num_rollouts:
      more[middle] = num_rollouts - rollouts[middle]
      break
    if successes[middle]:
      alive = middle
    else:
      dead = middle
  return more


def pit_posterior(successes: Counts, rollouts: Counts, num_rollouts: int) -> np.ndarray:
  """P(step i is the first dead one | counts), i = 0..S-1, for a wrong response.

  The prior over steps is uniform. An alive step has Q ~ Beta(1, 1), so M rollouts all fail with
  probability 1/(M + 1); a dead step has Q = 0. R failures count as certain, as in
  `until_first_zero`, unless a later step has a success.

  Args:
    successes, rollouts: counts after each step but the last.
    num_rollouts: R.

  Returns:
    float64 [S].
  """
  m = np.asarray(rollouts, np.float64)
  has_success = np.asarray(successes) > 0
  last_alive = np.flatnonzero(has_success).max(initial=-1)
  certain = (m >= num_rollouts) & (np.arange(m.size) > last_alive)
  # Likelihood of a step's counts if it is alive; the factor of a success is the same for every i.
  likelihood = np.where(has_success, 1.0, np.where(certain, 0.0, 1.0 / (m + 1)))
  weight = np.concatenate([[1.0], np.cumprod(likelihood)])
  weight[: last_alive + 1] = 0.0
  return weight / weight.sum()


def adaptive(
  successes: Counts, rollouts: Counts, num_rollouts: int, *, batch: int = 2
) -> list[int]:
  """`batch` rollouts at a time after the step that is most informative about the first dead step.

  That step minimises the expected entropy of `pit_posterior`. The search ends when one step has
  probability R/(R + 1), the certainty that R failures give about a single step. Arguments and
  result as in `every`.
  """
  more = [0] * len(rollouts)
  posterior = pit_posterior(successes, rollouts, num_rollouts)
  if posterior.max() >= num_rollouts / (num_rollouts + 1):
    return more
  best, least = -1, np.inf
  for step, (c, m) in enumerate(zip(successes, rollouts, strict=True)):
    if c or m >= num_rollouts or not posterior[: step + 1].any():
      continue
    n = min(batch, num_rollouts - m)
    # P(n more rollouts all fail | the step is alive)
    all_fail = 0.0 if m + n == num_rollouts else (m + 1) / (m + n + 1)
    rest = posterior[step + 1 :]
    failed = np.concatenate([posterior[: step + 1], rest * all_fail])
    expected = rest.sum() * (1 - all_fail) * _entropy(rest) + failed.sum() * _entropy(failed)
    if expected < least:
      best, least = step, expected
  if best >= 0:
    more[best] = min(batch, num_rollouts - rollouts[best])
  return more


def _entropy(weight_S: np.ndarray) -> float:
  """Entropy of normalised weights, nats; 0 if all weights are 0."""
  total = weight_S.sum()
  return float(special.entr(weight_S / total).sum()) if total > 0 else 0.0


SCHEDULES: dict[str, Callable[[Counts, Counts, int], list[int]]] = {
  "all": every,
  "until_first_zero": until_first_zero,
  "bisect": bisect,
  "adaptive": adaptive,
}
