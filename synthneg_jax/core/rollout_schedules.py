"""Where the next rollouts of a response go: everywhere, or only where its first pit is in doubt.

A schedule is a function of the counts so far, so that a run that was killed, or that draws in other
batches, asks for the same rollouts. Functions are for one response of S steps, the last of which is
exact and is never rolled out.

What all but `every` rest on: a step is dead if no continuation comes out right. All steps after a
dead one are dead, and a success after step j says that every step up to j is alive: where the dead
part begins is one threshold.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

Counts = Sequence[int]


def every(successes: Counts, rollouts: Counts, num_rollouts: int) -> list[int]:
  """`num_rollouts` after every step.

  Args:
    successes, rollouts: counts after each step but the last.
    num_rollouts: R, most rollouts after a step.

  Returns:
    How many more rollouts are wanted after each of these steps, now; all 0 when the response is
    done with.
  """
  return [max(num_rollouts - m, 0) for m in rollouts]


def until_first_zero(successes: Counts, rollouts: Counts, num_rollouts: int) -> list[int]:
  """R rollouts step by step from the left, up to the first after which none came out right.

  As Self-Explore walks (https://arxiv.org/abs/2404.10346, VERIFIED). Arguments and result as in
  `every`.
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
  """R rollouts after the middle of the steps in doubt, again and again: OmegaPRM's search for the
  first error.

  See "Improve Mathematical Reasoning in Language Models by Automated Process Supervision" by Luo et
  al. (https://arxiv.org/abs/2406.06592). Arguments and result as in `every`.
  """
  more = [0] * len(rollouts)
  alive, dead = -1, len(rollouts)  # the last step, wrong, is dead
  while dead - alive > 1:
    middle = (alive + dead) // 2
    if rollouts[middle] < num_rollouts:
      more[middle] = num_rollouts - rollouts[middle]
      break
    alive, dead = (middle, dead) if successes[middle] else (alive, middle)
  return more


def pit_posterior(successes: Counts, rollouts: Counts, num_rollouts: int) -> np.ndarray:
  """P(the dead part begins at step i | counts), for i = 0..S-1, of a wrong response.

  Every step is as likely as another at first; an alive step has Q ~ Beta(1, 1), so that none of M
  comes out right with probability 1/(M + 1); a dead one has Q = 0. None of R settles it, as it does
  for `until_first_zero`, unless a later step had a success. Ours.

  Args:
    successes, rollouts: counts after each step but the last.
    num_rollouts: R.

  Returns:
    float64 [S].
  """
  m = np.asarray(rollouts, np.float64)
  lucky = np.asarray(successes) > 0
  alive_at = np.flatnonzero(lucky).max(initial=-1)  # nothing up to here is dead
  settled = (m >= num_rollouts) & (np.arange(m.size) > alive_at)
  none = np.where(
    lucky, 1.0, np.where(settled, 0.0, 1.0 / (m + 1))
  )  # a success is as likely wherever the pit lies later
  weight = np.concatenate([[1.0], np.cumprod(none)])
  weight[: alive_at + 1] = 0.0
  return weight / weight.sum()


def adaptive(
  successes: Counts, rollouts: Counts, num_rollouts: int, *, batch: int = 2
) -> list[int]:
  """A few rollouts at a time after the step that tells most about where the dead part begins.

  Each time the step is taken whose next `batch` rollouts leave the least expected entropy of
  `pit_posterior`, until one step has it with probability R/(R + 1), which is what none of R says of
  a single step. Ours. Arguments and result as in `every`.
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
    none = (
      0.0 if m + n == num_rollouts else (m + 1) / (m + n + 1)
    )  # of n more, given that the step is alive
    rest = posterior[step + 1 :]
    failed = np.concatenate([posterior[: step + 1], rest * none])
    expected = rest.sum() * (1 - none) * _entropy(rest) + failed.sum() * _entropy(failed)
    if expected < least:
      best, least = step, expected
  if best >= 0:
    more[best] = min(batch, num_rollouts - rollouts[best])
  return more


def _entropy(weight_S: np.ndarray) -> float:
  """Of weights that need not sum to 1, nats; 0 where all are 0."""
  total = weight_S.sum()
  return float(special.entr(weight_S / total).sum()) if total > 0 else 0.0


SCHEDULES: dict[str, Callable[[Counts, Counts, int], list[int]]] = {
  "all": every,
  "until_first_zero": until_first_zero,
  "bisect": bisect,
  "adaptive": adaptive,
}
