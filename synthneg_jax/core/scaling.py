"""Error against the amount of data: the power law, and how many times the data another method would
need. On the host.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def power_law_fit(sizes, errors) -> tuple[float, float]:
  """error ≈ b · size^(-a), by least squares of log error on log size.

  The paper's exponents lie between 0.05 and 0.15 (VERIFIED, second-hand); that they were fitted so
  is INFERRED.

  Args:
    sizes: [D] numbers of problems, at least two different.
    errors: [D] test errors in (0, 1].

  Returns:
    (exponent a, positive where the error falls; coefficient b, the error at size 1).

  Raises:
    ValueError: fewer than two different sizes, or a size or error that is not positive.
  """
  sizes, errors = _positive(sizes), _positive(errors)
  x = np.log(sizes) - np.mean(np.log(sizes))
  if not np.any(x):
    raise ValueError("A power law needs two different sizes.")
  slope = np.sum(x * np.log(errors)) / np.sum(x * x)
  return float(-slope), float(np.exp(np.mean(np.log(errors)) - slope * np.mean(np.log(sizes))))


def _positive(values) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if not np.all(values > 0):
    raise ValueError(f"Not positive: {values.tolist()}.")
  return values


def efficiency_factor(
  sizes, baseline_errors, *, size: float, method_error: float
) -> tuple[float, bool]:
  """How many times the data the baseline needs for a method's error: D_base(e) / D_method, e the
  method's error.

  D_base(e) is the smallest size at which the baseline reaches e, on its curve drawn straight
  between points in log-log axes; where the curve rises, the lowest error so far is kept, which
  favours the baseline. Beyond the curve's ends it goes on with the exponent of `power_law_fit`, and
  the factor is called extrapolated; if that exponent is not positive the factor is inf below the
  curve and 0 above it. "8x" in https://arxiv.org/abs/2406.14532 is such a factor (VERIFIED); the
  interpolation is ours.

  Args:
    sizes: [D] numbers of problems, rising, at least two.
    baseline_errors: [D] the baseline's test errors in (0, 1].
    size: number of problems that the method had.
    method_error: its test error in (0, 1].

  Returns:
    (factor, whether it was extrapolated).

  Raises:
    ValueError: sizes that do not rise, or a size or error that is not positive.
  """
  if np.any(np.diff(sizes) <= 0):
    raise ValueError(f"Sizes must rise: {list(sizes)}.")
  exponent, _ = power_law_fit(sizes, baseline_errors)
  x, y = np.log(_positive(sizes)), np.minimum.accumulate(np.log(_positive(baseline_errors)))
  goal, own = float(np.log(_positive(method_error))), float(np.log(_positive(size)))
  above, below = goal > y[0], goal < y[-1]
  if not (above or below):
    last = int(np.argmax(y <= goal))  # the first point that reaches it
    if not last:
      return float(np.exp(x[0] - own)), False
    share = (y[last - 1] - goal) / (y[last - 1] - y[last])
    return float(np.exp(x[last - 1] + share * (x[last] - x[last - 1]) - own)), False
  if exponent <= 0:
    return (np.inf if below else 0.0), True
  end = -1 if below else 0
  with np.errstate(over="ignore"):
    return float(np.exp(x[end] + (y[end] - goal) / exponent - own)), True


@dataclasses.dataclass(frozen=True)
class Efficiency:
  """A factor of `efficiency_factor` with its bootstrap interval, and the share of draws that had to
  extrapolate.
  """

  factor: float
  extrapolated: bool
  low: float
  high: float
  extrapolated_share: float


class Baseline(NamedTuple):
  """The method that others are compared with.

  Attributes:
    sizes: [D] numbers of problems that it was trained on, rising.
    wrong_DSN: bool [D, S, N], whether training seed s at size d is wrong on test problem n.
  """

  sizes: Sequence[float]
  wrong_DSN: np.ndarray


def bootstrap_efficiency(
  baseline: Baseline,
  size: float,
  method_wrong_SN,
  *,
  draws: int = 1000,
  level: float = 0.95,
  seed: int = 0,
) -> Efficiency:
  """`efficiency_factor` of mean errors, with a percentile bootstrap over training seeds and test
  problems.

  Each draw takes N problems with replacement, the same for both methods and all sizes (they share
  the test set), and seeds with replacement, for each size and method apart. A mean error of 0
  counts as half a mistake of one seed. Few seeds make the interval too narrow, as in every
  bootstrap. Ours.

  Args:
    baseline: its sizes and mistakes.
    size: number of problems that the method had.
    method_wrong_SN: bool [S', N], the same problems in the same order.
    draws: bootstrap draws.
    level: of the interval, in (0, 1).
    seed: of the draws.

  Returns:
    Efficiency; an end of the interval may be inf.
  """
  baseline_DSN, method_SN = (
    np.asarray(baseline.wrong_DSN, np.float64),
    np.asarray(method_wrong_SN, np.float64),
  )
  D, S, N = baseline_DSN.shape
  rng = np.random.default_rng(seed)

  def factor_of(baseline_DS, method_S):
    floors = 0.5 / (N * S), 0.5 / (N * len(method_S))
    baseline_D, method = (
      np.maximum(baseline_DS.mean(1), floors[0]),
      max(float(method_S.mean()), floors[1]),
    )
    return efficiency_factor(baseline.sizes, baseline_D, size=size, method_error=method)

  factor, extrapolated = factor_of(baseline_DSN.mean(2), method_SN.mean(1))
  factors, beyond = [], []
  for _ in range(draws):
    share_N = rng.multinomial(N, np.full(N, 1 / N)) / N
    baseline_DS = np.take_along_axis(baseline_DSN @ share_N, rng.integers(0, S, (D, S)), axis=1)
    method_S = (method_SN @ share_N)[rng.integers(0, len(method_SN), len(method_SN))]
    drawn, out = factor_of(baseline_DS, method_S)
    factors.append(drawn)
    beyond.append(out)
  low = np.quantile(
    factors, (1 - level) / 2, method="lower"
  )  # no arithmetic between draws: some may be inf
  high = np.quantile(factors, (1 + level) / 2, method="higher")
  return Efficiency(factor, extrapolated, float(low), float(high), float(np.mean(beyond)))
