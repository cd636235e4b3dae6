"""Step-level credit: values from counts, Best-of-k, advantages, and their uncertainty.

A response consists of steps y_1..y_L. Q(x, y_1:i-1; y_i) is the probability that the rollout policy
reaches a right answer from the prefix that ends with y_i; V(x) is that probability from the bare
problem. Functions of arrays take one response of S steps; `vmap` them over a batch. `known_S` is
True where a step has an estimate. The last two functions run on the host, because only scipy
provides the inverse of the incomplete beta function. docs/method.md lists the sources.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special


def step_values(successes: jax.Array, rollouts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Unbiased Monte-Carlo estimate Q = c/M, the mean verdict of M rollouts from y_1:i.

  See eq. 1 of https://arxiv.org/abs/2410.08146.

  Args:
    successes: [...] counts c.
    rollouts: [...] counts M.

  Returns:
    (q [...] probabilities, 0 where M = 0; known bool [...], M > 0).
  """
  known = rollouts > 0
  return jnp.where(known, successes / jnp.maximum(rollouts, 1), 0.0), known


def best_of_k(
  successes: jax.Array, rollouts: jax.Array, k: int, *, exact: jax.Array | bool = False
) -> tuple[jax.Array, jax.Array]:
  """Unbiased estimate of Q under Best-of-k from c successes in M rollouts: 1 - C(M-c, k) / C(M, k).

  The policy draws k continuations and a verifier picks a right one if any exists, so Q^BoK =
  1 - (1 - Q)^k (https://arxiv.org/abs/2410.08146, appendix D). Substituting c/M is biased; the
  ratio of binomials is not ("Evaluating Large Language Models Trained on Code" by Chen et al.,
  https://arxiv.org/abs/2107.03374). k = 1 gives c/M.

  Args:
    successes: [...] counts c.
    rollouts: [...] counts M.
    k: >= 1, fixed at compile time.
    exact: bool [...], True where c/M equals Q (the last step, whose Q is its verdict: M = 1).

  Returns:
    (q [...] probabilities, 0 where unknown; known bool [...]: `exact` or M >= k, since no unbiased
    estimate exists for M < k).
  """
  plugin, valid = best_of_k_plugin(successes, rollouts, k)
  misses = jnp.ones(plugin.shape, plugin.dtype)
  for i in range(k):
    misses = misses * jnp.maximum(rollouts - successes - i, 0) / jnp.maximum(rollouts - i, 1)
  known = jnp.where(exact, valid, rollouts >= k)
  return jnp.where(known, jnp.where(exact, plugin, 1.0 - misses), 0.0), known


def best_of_k_plugin(
  successes: jax.Array, rollouts: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
  """Plug-in estimate of Q under Best-of-k: 1 - (1 - c/M)^k.

  Biased low for k > 1 (Jensen's inequality), but defined for M < k too; `best_of_k` is unbiased.
  Which of the two the paper uses is unknown.

  Args:
    successes: [...] counts c.
    rollouts: [...] counts M.
    k: >= 1, fixed at compile time.

  Returns:
    (q [...] probabilities, 0 where M = 0; known bool [...], M > 0).
  """
  q, known = step_values(successes, rollouts)
  return 1.0 - (1.0 - q) ** k, known


def step_advantages(q_S: jax.Array, v0: jax.Array) -> jax.Array:
  """A_i = Q(x, y_1:i-1; y_i) - Q(x, y_1:i-2; y_i-1), eq. 3 of the paper; A_1 = Q_1 - V(x).

  Dynamics are deterministic, so a state's value is Q of the step that leads to it. The advantages
  sum to Q_L - V(x).

  Args:
    q_S: [S] values after each step.
    v0: scalar V(x), the success rate from the bare problem.

  Returns:
    [S].
  """
  return q_S - values_before(q_S, v0)


def values_before(q_S: jax.Array, v0: jax.Array) -> jax.Array:
  """The value before each step [S]: V(x), then Q of the previous step."""
  return jnp.concatenate([jnp.asarray(v0, q_S.dtype)[None], q_S[:-1]])


def mean_value_by_step(q_NS: jax.Array, known_NS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean Q at each step over the responses that have the step (figure 7 of the paper).

  Shorter responses drop out of the mean instead of counting as 0 or 1.

  Args:
    q_NS: [N, S] values.
    known_NS: bool [N, S].

  Returns:
    (mean [S], 0 where no response has the step; number of responses that have it [S]).
  """
  count_S = jnp.sum(known_NS, axis=0)
  return jnp.sum(jnp.where(known_NS, q_NS, 0.0), axis=0) / jnp.maximum(count_S, 1), count_S


def value_interval(
  successes, rollouts, *, level: float = 0.95, method: str = "wilson"
) -> tuple[np.ndarray, np.ndarray]:
  """An interval for Q from c successes in M rollouts.

  Methods, with z = Φ⁻¹((1 + level)/2):
    wilson  (c + z²/2 ± z √(c(M-c)/M + z²/4)) / (M + z²), the inverted score test;
    beta    the equal-tailed interval of Jeffreys' posterior Beta(c + ½, M - c + ½), with lower end
            0 for c = 0 and upper end 1 for c = M.

  See "Interval Estimation for a Binomial Proportion" by Brown, Cai and DasGupta (Statistical
  Science 16(2), 2001), which recommends both for few draws.

  Args:
    successes: [...] counts c.
    rollouts: [...] counts M; 0 gives (0, 1).
    level: nominal coverage in (0, 1), reached on average over Q, not for every Q.
    method: one of the above.

  Returns:
    (low [...], high [...]) float64 probabilities.

  Raises:
    ValueError: unknown method.
  """
  c, m = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(rollouts, np.float64))
  if method == "wilson":
    z = special.ndtri(0.5 + level / 2)
    middle = c + z**2 / 2
    half = z * np.sqrt(c * (m - c) / np.maximum(m, 1) + z**2 / 4)
    low, high = (middle - half) / (m + z**2), (middle + half) / (m + z**2)
    # The formula gives 0 and 1 at the ends up to rounding.
    return np.where(c > 0, low, 0.0), np.where(c < m, high, 1.0)
  if method == "beta":
    tail = (1 - level) / 2
    low = np.where(c > 0, special.betaincinv(c + 0.5, m - c + 0.5, tail), 0.0)
    return low, np.where(c < m, special.betaincinv(c + 0.5, m - c + 0.5, 1 - tail), 1.0)
  raise ValueError(f"Unknown interval method {method!r}: must be wilson or beta.")


def sign_confidence(successes, rollouts, *, successes_before, rollouts_before) -> np.ndarray:
  """P(Q_after < Q_before): the posterior probability that a step's advantage is negative.

  Q_after ~ Beta(c + ½, M - c + ½) and Q_before likewise are independent posteriors under Jeffreys'
  prior, and P = ∫ p_after(q) P(Q_before > q) dq. Substituting q = sin²θ turns the density into
  2 sin^2c(θ) cos^2(M-c)(θ) / B(c + ½, M - c + ½), which has no poles at the ends, so Gauss-Legendre
  quadrature in θ is accurate to rounding error. Equal counts give ½.

  Args:
    successes, rollouts: [...] counts after the step.
    successes_before, rollouts_before: [...] counts before it; for the first step, the counts of the
      bare problem.

  Returns:
    [...] float64 probabilities.
  """
  counts = np.broadcast_arrays(successes, rollouts, successes_before, rollouts_before)
  c, m, c_before, m_before = (np.asarray(column, np.float64)[..., None] for column in counts)
  most = max(float(np.max(m, initial=0.0)), float(np.max(m_before, initial=0.0)))
  node_N, weight_N = _legendre_nodes(64 + 8 * int(np.ceil(np.sqrt(most))))  # peaks are 1/√M wide
  theta_N, weight_N = np.pi / 4 * (1 + node_N), np.pi / 4 * weight_N
  sin_N, cos_N = np.sin(theta_N), np.cos(theta_N)
  log_density = (
    np.log(2)
    + 2 * c * np.log(sin_N)
    + 2 * (m - c) * np.log(cos_N)
    - special.betaln(c + 0.5, m - c + 0.5)
  )
  above = special.betaincc(c_before + 0.5, m_before - c_before + 0.5, sin_N**2)
  return np.clip(np.sum(weight_N * np.exp(log_density) * above, axis=-1), 0.0, 1.0)


_legendre_nodes = functools.lru_cache(maxsize=8)(np.polynomial.legendre.leggauss)
