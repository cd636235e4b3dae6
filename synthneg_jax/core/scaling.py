"""Test error against data size: power-law fits and efficiency factors, on the host."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def power_law_fit(sizes, errors) -> tuple[float, float]:
  """error ≈ b · size^(-a), by least squares of log error on log size.

  Args:
    sizes: [D] numbers of problems, at least two of them different.
    errors: [D] test errors in (0, 1].

  Returns:
    (exponent a, positive if the error falls; coefficient b, the error at size 1).

  Raises:
    ValueError: fewer than two different sizes, or a size or error that is not positive.
  """
  sizes, errors = _positive(sizes), _positive(errors)
  x = np.log(sizes) - np.mean(np.log(sizes))
  if np.unique(sizes).size < 2:
    raise ValueError("A power law needs at least two different sizes.")
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
  """How many times the method's data the baseline needs for its error e: D_base(e) / D_method.

  D_base(e) is the smallest size at which the baseline reaches e, interpolated linearly in log-log
  axes. Where the baseline's error rises, its running minimum is used, which favours the baseline.
  Beyond its ends the curve is extrapolated with the exponent of `power_law_fit`; if that is not
  positive, the factor is inf below the curve and 0 above it. The "8x" of
  https://arxiv.org/abs/2406.14532 is such a factor.

  Args:
    sizes: [D] numbers of problems, ascending, at least two.
    baseline_errors: [D] the baseline's test errors in (0, 1].
    size: number of problems the method was trained on.
    method_error: its test error in (0, 1].

  Returns:
    (factor, whether it was extrapolated).

  Raises:
    ValueError: sizes that do not ascend, or a size or error that is not positive.
  """
  if np.any(np.diff(sizes) <= 0):
    raise ValueError(f"Sizes must be ascending: {list(sizes)}.")
  exponent, _ = power_law_fit(sizes, baseline_errors)
  x, y = np.log(_positive(sizes)), np.minimum.accumulate(np.log(_positive(baseline_errors)))
  goal, own = float(np.log(_positive(method_error))), float(np.log(_positive(size)))
  above, below = goal > y[0], goal < y[-1]
  if not (above or below):
    last = int(np.argmax(y <= goal))  # the first point that reaches the goal
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
  """An `efficiency_factor` with its bootstrap interval and the share of extrapolated draws."""

  factor: float
  extrapolated: bool
  low: float
  high: float
  extrapolated_share: float


class Baseline(NamedTuple):
  """The method that others are compared with.

  Attributes:
    sizes: [D] numbers of training problems, ascending.
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
  """`efficiency_factor` of mean errors, with a bootstrap over training seeds and test problems.

  Each draw resamples the N problems, jointly for both methods and all sizes (they share the test
  set), and the seeds, independently per size and method. A mean error of 0 counts as half a mistake
  of one seed. With few seeds the percentile interval is too narrow, as in every bootstrap.

  Args:
    baseline: its sizes and mistakes.
    size: number of problems the method was trained on.
    method_wrong_SN: bool [S', N], on the same problems in the same order.
    draws: number of bootstrap draws.
    level: of the interval, in (0, 1).
    seed: of the draws.

  Returns:
    Efficiency; an end of the interval may be inf.
  """
  baseline_DSN = np.asarray(baseline.wrong_DSN, np.float64)
  method_SN = np.asarray(method_wrong_SN, np.float64)
  D, S, N = baseline_DSN.shape
  rng = np.random.default_rng(seed)

  def factor_of_errors(baseline_DS, method_S):
    baseline_D = np.maximum(baseline_DS.mean(1), 0.5 / (N * S))
    method = max(float(method_S.mean()), 0.5 / (N * len(method_S)))
    return efficiency_factor(baseline.sizes, baseline_D, size=size, method_error=method)

  factor, extrapolated = factor_of_errors(baseline_DSN.mean(2), method_SN.mean(1))
  factors, extrapolations = [], []
  for _ in range(draws):
    share_N = rng.multinomial(N, np.full(N, 1 / N)) / N
    baseline_DS = np.take_along_axis(baseline_DSN @ share_N, rng.integers(0, S, (D, S)), axis=1)
    method_S = (method_SN @ share_N)[rng.integers(0, len(method_SN), len(method_SN))]
    drawn_factor, is_extrapolated = factor_of_errors(baseline_DS, method_S)
    factors.append(drawn_factor)
    extrapolations.append(is_extrapolated)
  # "lower" and "higher" do not interpolate, since factors may be inf.
  low = np.quantile(factors, (1 - level) / 2, method="lower")
  high = np.quantile(factors, (1 + level) / 2, method="higher")
  return Efficiency(
    factor=factor,
    extrapolated=extrapolated,
    low=float(low),
    high=float(high),
    extrapolated_share=float(np.mean(extrapolations)),
  )
