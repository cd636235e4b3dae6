"""Step-level credit: values from counts, Best-of-k, advantages, and the first pit of a wrong response.

A response is steps y_1..y_L; Q(x, y_1:i-1; y_i) is the probability that the rollout policy finishes right from the
prefix that ends in y_i, and V(x) that it does from the bare problem. Functions are written for one response of S steps
and are meant to be `vmap`ed; `known_S` says which steps have an estimate, and no rule ever picks an unknown step.
"""

import jax
import jax.numpy as jnp


def best_of_k(successes: jax.Array, rollouts: jax.Array, k: int) -> jax.Array:
  """Unbiased estimate of Q under Best-of-k from c successes in M rollouts: 1 - C(M-c, k) / C(M, k).

  The policy draws k continuations and a verifier picks a right one if there is any, so Q^BoK = 1 - (1 - Q)^k
  (the paper takes k = 5, section 6.1 of https://arxiv.org/abs/2406.14532 as read second-hand; the formula is stated in
  https://arxiv.org/abs/2410.08146, appendix D). Putting c/M into it is biased; the ratio of binomials is not
  ("Evaluating Large Language Models Trained on Code" by Chen et al., https://arxiv.org/abs/2107.03374). k = 1 gives c/M.

  Args:
    successes: [...] counts c.
    rollouts: [...] counts M. Where M < k no unbiased estimate exists; the caller must treat that step as unknown.
    k: >= 1, fixed at compile time.

  Returns:
    [...] probabilities.
  """
  misses = jnp.ones(successes.shape, jnp.float32)
  for i in range(k):
    misses = misses * jnp.maximum(rollouts - successes - i, 0) / jnp.maximum(rollouts - i, 1)
  return 1.0 - misses


def best_of_k_plugin(successes: jax.Array, rollouts: jax.Array, k: int) -> jax.Array:
  """Plug-in estimate of Q under Best-of-k: 1 - (1 - c/M)^k.

  Biased low for k > 1 (by Jensen's inequality), but defined for M < k too; `best_of_k` is the unbiased one. Which of the
  two the paper takes is not known.

  Args:
    successes: [...] counts c.
    rollouts: [...] counts M.
    k: >= 1, fixed at compile time.

  Returns:
    [...] probabilities, 0 where M = 0.
  """
  q, _ = step_values(successes, rollouts)
  return 1.0 - (1.0 - q) ** k


def step_values(successes: jax.Array, rollouts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Monte-Carlo estimate Q = c/M, and where there is one.

  Q(x, y_1:i-1; y_i) is the mean of the verdicts of rollouts from y_1:i (eq. 1 of https://arxiv.org/abs/2410.08146,
  VERIFIED; the same in the paper as read second-hand).

  Args:
    successes: [...] counts c.
    rollouts: [...] counts M.

  Returns:
    (q [...] probabilities, 0 where M = 0; known bool [...], M > 0).
  """
  known = rollouts > 0
  return jnp.where(known, successes / jnp.maximum(rollouts, 1), 0.0), known


def step_advantages(q_S: jax.Array, v0: jax.Array) -> jax.Array:
  """A_i = Q(x, y_1:i-1; y_i) - Q(x, y_1:i-2; y_i-1), with V(x) before the first step (eq. 3 of the paper).

  The value of a state is Q of the step before, because the dynamics are deterministic; that V(x) is the first baseline
  is our choice. The advantages sum to Q_L - V(x).

  Args:
    q_S: [S] values after each step.
    v0: scalar, success rate from the bare problem.

  Returns:
    [S].
  """
  return q_S - _before(q_S, v0)


def _before(q_S, v0):
  return jnp.concatenate([jnp.asarray(v0, q_S.dtype)[None], q_S[:-1]])


def first_pit(
  q_S: jax.Array, known_S: jax.Array, v0: jax.Array, *, rule: str, drop_ratio: float = 0.34, min_before: float = 0.25
) -> jax.Array:
  """The step of a wrong response that is to be blamed.

  Rules:
    lowest_value      the first step with the lowest Q (the paper's Algorithm 1, as read second-hand);
    first_zero        the first step with Q = 0 (Self-Explore, https://arxiv.org/abs/2404.10346);
    least_advantage   the first step with the lowest A (https://arxiv.org/abs/2410.08146, appendix A);
    relative_drop     the first step with Q <= drop_ratio · Q before and Q before >= min_before (ours).

  In a response whose last step is wrong Q_L = 0, so lowest_value and first_zero agree where all steps are known.

  Args:
    q_S: [S] values; whatever stands at unknown steps is ignored.
    known_S: bool [S].
    v0: scalar, value of the bare problem.
    rule: one of the above, fixed at compile time.
    drop_ratio, min_before: of relative_drop.

  Returns:
    int32 scalar, the step from 0, or -1 where the rule finds none.

  Raises:
    ValueError: no such rule.
  """
  before_S = _before(q_S, v0)
  before_known_S = jnp.concatenate([jnp.ones(1, bool), known_S[:-1]])
  far = jnp.asarray(2.0, q_S.dtype)  # above every value and advantage
  if rule == "lowest_value":
    return jnp.where(jnp.any(known_S), jnp.argmin(jnp.where(known_S, q_S, far)), -1).astype(jnp.int32)
  if rule == "first_zero":
    found_S = known_S & (q_S <= 0)
  elif rule == "least_advantage":
    both_S = known_S & before_known_S
    return jnp.where(jnp.any(both_S), jnp.argmin(jnp.where(both_S, q_S - before_S, far)), -1).astype(jnp.int32)
  elif rule == "relative_drop":
    found_S = known_S & before_known_S & (q_S <= drop_ratio * before_S) & (before_S >= min_before)
  else:
    raise ValueError(f"No pit rule {rule!r}: lowest_value, first_zero, least_advantage or relative_drop.")
  return jnp.where(jnp.any(found_S), jnp.argmax(found_S), -1).astype(jnp.int32)


def mean_value_by_step(q_NS: jax.Array, known_NS: jax.Array):
  """Mean Q at each step over the responses that have it (figure 7's axes).

  Args:
    q_NS: [N, S] values.
    known_NS: bool [N, S].

  Returns:
    (mean [S], 0 where no response has the step; how many have it [S]).
  """
  count_S = jnp.sum(known_NS, axis=0)
  return jnp.sum(jnp.where(known_NS, q_NS, 0.0), axis=0) / jnp.maximum(count_S, 1), count_S
