"""Intervals of means over runs, by hand."""

import numpy as np
from absl.testing import absltest

from synthneg_jax.core import statistics


class MeanIntervalTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if the deviation is the population's, the quantile normal, or the axis another.
    mean, low, high = statistics.mean_interval([1.0, 2.0, 3.0])
    self.assertEqual((mean, round(high - mean, 4), round(mean - low, 4)), (2.0, 2.4841, 2.4841))
    self.assertEqual(
      [row[0] for row in statistics.mean_interval(np.arange(6.0).reshape(2, 3), axis=1)], [1.0, 4.0]
    )


if __name__ == "__main__":
  absltest.main()
