"""How sure a count of successes makes us of a value: intervals, and the sign of an advantage. On the host.

Here and not among the advantages, because the inverse of the incomplete beta function is scipy's alone. Counts are of
independent rollouts; all of this is ours, the paper says nothing of it.
"""

import functools

import numpy as np
from scipy import special


def value_interval(
  successes, rollouts, *, level: float = 0.95, method: str = "wilson"
) -> tuple[np.ndarray, np.ndarray]:
  """An interval for Q from c successes in M rollouts.

  Methods, z = Φ⁻¹((1 + level)/2):
    wilson  (c + z²/2 ± z √(c(M-c)/M + z²/4)) / (M + z²), the score test inverted;
    beta    the equal-tailed interval of Jeffreys' posterior Beta(c + ½, M - c + ½), with 0 for the lower end where c = 0
            and 1 for the upper where c = M.

  See "Interval Estimation for a Binomial Proportion" by Brown, Cai and DasGupta (Statistical Science 16(2), 2001), which
  recommends these two for few draws.

  Args:
    successes: [...] counts c.
    rollouts: [...] counts M; 0 gives (0, 1).
    level: in (0, 1), the coverage meant (reached on average over Q, not for every Q).
    method: one of the above.

  Returns:
    (low [...], high [...]) float64 probabilities.

  Raises:
    ValueError: no such method.
  """
  c, m = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(rollouts, np.float64))
  if method == "wilson":
    z = special.ndtri(0.5 + level / 2)
    middle = c + z**2 / 2
    half = z * np.sqrt(c * (m - c) / np.maximum(m, 1) + z**2 / 4)
    low, high = (middle - half) / (m + z**2), (middle + half) / (m + z**2)
    return np.where(c > 0, low, 0.0), np.where(c < m, high, 1.0)  # exact there, rounding apart
  if method == "beta":
    tail = (1 - level) / 2
    low = np.where(c > 0, special.betaincinv(c + 0.5, m - c + 0.5, tail), 0.0)
    return low, np.where(c < m, special.betaincinv(c + 0.5, m - c + 0.5, 1 - tail), 1.0)
  raise ValueError(f"No interval method {method!r}: wilson or beta.")


def sign_confidence(successes, rollouts, successes_before, rollouts_before) -> np.ndarray:
  """P(Q_after < Q_before): how sure the counts make us that a step's advantage is negative.

  Q_after ~ Beta(c + ½, M - c + ½) and Q_before likewise are independent posteriors under Jeffreys' prior, and
  P = ∫ p_after(q) P(Q_before > q) dq. With q = sin²θ the density becomes 2 sin^2c(θ) cos^2(M-c)(θ) / B(c + ½, M - c + ½),
  which has no poles at the ends, so that Gauss-Legendre quadrature in θ gives it to rounding error. Equal counts give ½.

  Args:
    successes, rollouts: [...] counts after the step.
    successes_before, rollouts_before: [...] counts before it; for the first step those of the bare problem.

  Returns:
    [...] float64 probabilities.
  """
  counts = np.broadcast_arrays(successes, rollouts, successes_before, rollouts_before)
  c, m, c_before, m_before = (np.asarray(column, np.float64)[..., None] for column in counts)
  most = max(float(np.max(m, initial=0.0)), float(np.max(m_before, initial=0.0)))
  node_N, weight_N = _nodes(64 + 8 * int(np.ceil(np.sqrt(most))))  # peaks are 1/√M wide
  theta_N, weight_N = np.pi / 4 * (1 + node_N), np.pi / 4 * weight_N
  sin_N, cos_N = np.sin(theta_N), np.cos(theta_N)
  log_density = np.log(2) + 2 * c * np.log(sin_N) + 2 * (m - c) * np.log(cos_N) - special.betaln(c + 0.5, m - c + 0.5)
  above = special.betaincc(c_before + 0.5, m_before - c_before + 0.5, sin_N**2)
  return np.clip(np.sum(weight_N * np.exp(log_density) * above, axis=-1), 0.0, 1.0)


_nodes = functools.lru_cache(maxsize=8)(np.polynomial.legendre.leggauss)
