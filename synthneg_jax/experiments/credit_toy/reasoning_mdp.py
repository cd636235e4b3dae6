"""A reasoning task so small that the value of every prefix is known exactly. Ours; the paper has no
such task.

A problem is a number x, a response L steps, each one of n actions. At a critical step one action
alone, which depends on the problem, keeps the response on track; at an irrelevant step any action
does. The last step is the answer: on track one action is right, off track any answer is right with
probability `luck`, drawn once for every response, so that a verdict is a fact of the response. So a
right response may hold a wrong step, and a wrong one may go wrong in its answer alone.

Prefixes are numbers: 0 is the empty one, and action a after prefix p gives n·p + a, so that p // n
is the prefix before it. A policy is a list of L arrays of probabilities, that of step i [X, n^i,
n], by problem, prefix and action; or [X, 1, n], where the policy looks at the problem and the step
alone. Shape letters: X problems, L steps, A actions, N traces.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

ANY = -1
Policy = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class ReasoningMDP:
  """The problems.

  Attributes:
    num_actions: n.
    keep_XL: int, the action that keeps problem x on track at each step, ANY at an irrelevant one;
      last the right answer.
    right_XN: bool [X, n^L], the verdict on every response.
  """

  num_actions: int
  keep_XL: np.ndarray
  right_XN: np.ndarray

  @property
  def num_problems(self) -> int:
    """X."""
    return self.keep_XL.shape[0]

  @property
  def num_steps(self) -> int:
    """L, steps of a response."""
    return self.keep_XL.shape[1]

  def prefix(self, response_N: np.ndarray, steps: int) -> np.ndarray:
    """The first `steps` steps of responses, as a number."""
    return response_N // self.num_actions ** (self.num_steps - steps)

  def actions(self, response_N: np.ndarray) -> np.ndarray:
    """The steps of responses, int [..., L]."""
    power_L = self.num_actions ** np.arange(self.num_steps)[::-1]
    return response_N[..., None] // power_L % self.num_actions


def make(
  keep_XL: np.ndarray, num_actions: int, *, luck: float, rng: np.random.Generator
) -> ReasoningMDP:
  """The task with the given right actions.

  Args:
    keep_XL: as in `ReasoningMDP`.
    num_actions: n.
    luck: probability that an answer off track is right.
    rng: draws the lucky responses.
  """
  problems, steps = keep_XL.shape
  on_XP = np.ones((problems, 1), bool)
  for step in range(steps):
    before_XP = on_XP
    keeps_XA = (keep_XL[:, step, None] == np.arange(num_actions)) | (keep_XL[:, step, None] == ANY)
    on_XP = (before_XP[:, :, None] & keeps_XA[:, None, :]).reshape(problems, -1)
  lucky_XN = ~np.repeat(before_XP, num_actions, axis=1) & (rng.random(on_XP.shape) < luck)
  return ReasoningMDP(num_actions, keep_XL, on_XP | lucky_XN)


def draw(
  rng: np.random.Generator,
  *,
  problems: int = 16,
  steps: int = 6,
  critical: Sequence[int] = (1, 3),
  num_actions: int = 4,
  luck: float = 0.05,
) -> ReasoningMDP:
  """A task whose right actions at the critical steps and the answer are drawn uniformly, problem by
  problem.
  """
  keep_XL = np.full((problems, steps), ANY)
  decisive = [*critical, steps - 1]
  keep_XL[:, decisive] = rng.integers(num_actions, size=(problems, len(decisive)))
  return make(keep_XL, num_actions, luck=luck, rng=rng)


def reference_logits(
  mdp: ReasoningMDP, rng: np.random.Generator, skill: float = 2.0, spread: float = 1.0
) -> np.ndarray:
  """Logits of an imperfect policy: normal noise, and `skill` more for the right action; in nats,
  [L, X, A].

  With the defaults here and in `draw` the policy finishes right on .2 to .4 of the problems.
  """
  right_XLA = mdp.keep_XL[:, :, None] == np.arange(mdp.num_actions)
  return np.swapaxes(skill * right_XLA + spread * rng.normal(size=right_XLA.shape), 0, 1)


def values(mdp: ReasoningMDP, policy: Policy) -> list[np.ndarray]:
  """The probability of finishing right from every prefix, by backward recursion: v(p) = Σ_a π(a |
  p) v(n·p + a).

  Returns:
    L + 1 arrays, the i-th [X, n^i] over the prefixes of i steps: first V(x), last the verdicts.
    What stands at n·p + a is Q(x, p; a), since the next prefix is certain.
  """
  value = [mdp.right_XN.astype(np.float64)]
  for policy_XPA in reversed(policy):
    value.append(
      np.sum(policy_XPA * value[-1].reshape(mdp.num_problems, -1, mdp.num_actions), axis=-1)
    )
  return value[::-1]


def mean_return(mdp: ReasoningMDP, policy: Policy) -> float:
  """The policy's share of right responses, exact; problems weigh alike."""
  return float(values(mdp, policy)[0].mean())


def sample(
  mdp: ReasoningMDP,
  policy: Policy,
  x_N: np.ndarray,
  *,
  prefix_N: np.ndarray,
  steps: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Continues prefixes up to the answer.

  Args:
    mdp, policy: the task and who answers it.
    x_N: int [...], problems.
    prefix_N: int [...], prefixes of `steps` steps each.
    steps: how many steps they have; 0 samples whole responses.
    rng: draws the actions.

  Returns:
    int [...], responses.
  """
  x_N, prefix_N = np.broadcast_arrays(x_N, prefix_N)
  for policy_XPA in policy[steps:]:
    row_N = prefix_N if policy_XPA.shape[1] > 1 else 0
    below_NA = np.cumsum(policy_XPA[x_N, row_N], axis=-1)[
      ..., :-1
    ]  # the last action takes what rounding leaves
    prefix_N = mdp.num_actions * prefix_N + np.sum(
      rng.random(x_N.shape)[..., None] >= below_NA, axis=-1
    )
  return prefix_N
