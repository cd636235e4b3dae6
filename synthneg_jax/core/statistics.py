"""Confidence intervals of means over runs."""

import numpy as np
from scipy import stats


def mean_interval(value_RN: np.ndarray, axis: int = 0) -> list:
  """Means over runs with 95 % intervals by Student's t.

  Args:
    value_RN: one row per run along `axis`; at least two runs.
    axis: the axis of runs.

  Returns:
    [mean, low, high], or a nested list of these, rounded to four decimals.
  """
  value_RN = np.moveaxis(np.asarray(value_RN, np.float64), axis, 0)
  runs = value_RN.shape[0]
  half_N = stats.t.ppf(0.975, runs - 1) * value_RN.std(axis=0, ddof=1) / np.sqrt(runs)
  mean_N = value_RN.mean(axis=0)
  return np.stack([mean_N, mean_N - half_N, mean_N + half_N], axis=-1).round(4).tolist()
