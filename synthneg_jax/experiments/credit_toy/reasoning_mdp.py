"""A reasoning task small enough that the value of every prefix can be computed exactly.

The task is ours. A response to problem x consists of L steps, each one of n actions. At a critical
step, only one action, which depends on x, stays on track; at an irrelevant step, every action does.
The last step is the answer: on track, one answer is right; off track, each is right with
probability `luck`, drawn once per response, so that the verdict is a function of the response. A
right response may therefore contain a wrong step, and in a wrong one only the answer may be wrong.

Prefixes are integers: 0 is the empty prefix, and appending action a to prefix p gives n·p + a, so
the prefix before p is p // n. A policy is a list of L arrays of probabilities by problem, prefix
and action, [X, n^i, n] for step i, or [X, 1, n] if the policy depends only on problem and step.
Shape letters: X problems, L steps, A actions, P prefixes, N responses.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

ANY = -1
Policy = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class ReasoningMDP:
  """The problems and their verdicts.

  Attributes:
    num_actions: n.
    required_XL: int, the only action that stays on track at each step of problem x, ANY at
      irrelevant steps; the right answer at the last step.
    right_XN: bool [X, n^L], the verdict on every response.
  """

  num_actions: int
  required_XL: np.ndarray
  right_XN: np.ndarray

  @property
  def num_problems(self) -> int:
    """X."""
    return self.required_XL.shape[0]

  @property
  def num_steps(self) -> int:
    """L, the number of steps of a response."""
    return self.required_XL.shape[1]

  def prefix(self, response_N: np.ndarray, steps: int) -> np.ndarray:
    """The prefixes formed by the first `steps` steps of responses, int [...]."""
    return response_N // self.num_actions ** (self.num_steps - steps)

  def actions(self, response_N: np.ndarray) -> np.ndarray:
    """The steps of responses, int [..., L]."""
    power_L = self.num_actions ** np.arange(self.num_steps)[::-1]
    return response_N[..., None] // power_L % self.num_actions


def make(
  required_XL: np.ndarray, num_actions: int, *, luck: float, rng: np.random.Generator
) -> ReasoningMDP:
  """Computes the verdicts of the task with the given required actions.

  Args:
    required_XL: as in `ReasoningMDP`.
    num_actions: n.
    luck: the probability that an answer off track is right.
    rng: draws the lucky responses.
  """
  problems, steps = required_XL.shape
  on_track_XP = np.ones((problems, 1), bool)
  for step in range(steps):
    before_XP = on_track_XP
    required_X1 = required_XL[:, step, None]
    allowed_XA = (required_X1 == np.arange(num_actions)) | (required_X1 == ANY)
    on_track_XP = (before_XP[:, :, None] & allowed_XA[:, None, :]).reshape(problems, -1)
  off_track_XN = ~np.repeat(before_XP, num_actions, axis=1)
  lucky_XN = off_track_XN & (rng.random(on_track_XP.shape) < luck)
  return ReasoningMDP(num_actions, required_XL, on_track_XP | lucky_XN)


def draw(
  rng: np.random.Generator,
  *,
  problems: int = 16,
  steps: int = 6,
  critical: Sequence[int] = (1, 3),
  num_actions: int = 4,
  luck: float = 0.05,
) -> ReasoningMDP:
  """A task whose required actions and answers are drawn uniformly for each problem."""
  required_XL = np.full((problems, steps), ANY)
  decisive = [*critical, steps - 1]  # the last step is the answer
  required_XL[:, decisive] = rng.integers(num_actions, size=(problems, len(decisive)))
  return make(required_XL, num_actions, luck=luck, rng=rng)


def reference_logits(
  mdp: ReasoningMDP, rng: np.random.Generator, *, skill: float = 2.0, spread: float = 1.0
) -> np.ndarray:
  """Logits of an imperfect policy: normal noise, plus `skill` for required actions; nats [L, X, A].

  With these defaults and those of `draw`, .2 to .4 of its responses are right.
  """
  right_XLA = mdp.required_XL[:, :, None] == np.arange(mdp.num_actions)
  return np.swapaxes(skill * right_XLA + spread * rng.normal(size=right_XLA.shape), 0, 1)


def values(mdp: ReasoningMDP, policy: Policy) -> list[np.ndarray]:
  """Exact values of all prefixes by backward recursion:  v(p) = Σ_a π(a | p) v(n·p + a).

  Returns:
    L + 1 arrays; the i-th, [X, n^i], holds the values of the prefixes of i steps. The first is
    V(x), the last holds the verdicts. Transitions are deterministic, so entry n·p + a is also
    Q(x, p; a).
  """
  value = [mdp.right_XN.astype(np.float64)]
  for policy_XPA in reversed(policy):
    value.append(
      np.sum(policy_XPA * value[-1].reshape(mdp.num_problems, -1, mdp.num_actions), axis=-1)
    )
  return value[::-1]


def mean_return(mdp: ReasoningMDP, policy: Policy) -> float:
  """The exact probability that a response is right, averaged over problems."""
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
  """Samples completions of prefixes.

  Args:
    mdp: the task.
    policy: what the actions are sampled from.
    x_N: int [...], problems.
    prefix_N: int [...], one prefix of `steps` steps for each.
    steps: the length of the prefixes; 0 samples whole responses.
    rng: draws the actions.

  Returns:
    int [...], whole responses.
  """
  x_N, prefix_N = np.broadcast_arrays(x_N, prefix_N)
  for policy_XPA in policy[steps:]:
    row_N = prefix_N if policy_XPA.shape[1] > 1 else 0
    # Without the last bound: the last action absorbs the rounding error of the sum.
    bound_NA = np.cumsum(policy_XPA[x_N, row_N], axis=-1)[..., :-1]
    action_N = np.sum(rng.random(x_N.shape)[..., None] >= bound_NA, axis=-1)
    prefix_N = mdp.num_actions * prefix_N + action_N
  return prefix_N
