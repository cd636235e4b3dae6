"""Sums with counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from synthneg_jax.core import masked_stats


class TotalTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if masked values enter the sum (0 · inf would be NaN), count, or are replaced by
    # anything but 0, or if a mean is taken.
    values = jnp.asarray([[1.0, 2.0, jnp.inf], [4.0, -jnp.inf, 8.0]])
    mask = jnp.asarray([[True, False, False], [True, False, True]])
    total, count = jax.jit(masked_stats.total)(values, mask)
    self.assertEqual((float(total), int(count)), (13.0, 3))
    self.assertEqual((total.dtype, count.dtype), (jnp.float32, jnp.int32))

  def test_mask_of_rows(self):
    # Fails if a mask over whole rows is counted once for each row instead of once for
    # each value.
    total, count = masked_stats.total(jnp.ones((2, 3)), jnp.asarray([[True], [False]]))
    self.assertEqual((float(total), int(count)), (3.0, 3))

  def test_nothing(self):
    # Fails if nothing gives anything but 0 of 0.
    np.testing.assert_array_equal(masked_stats.total(jnp.ones(2), jnp.zeros(2, bool)), [0, 0])


class HistogramTest(absltest.TestCase):
  def test_as_numpy(self):
    # Fails if a value on an edge falls into the bucket below, if what lies beyond the ends is lost
    # or put inside, or if masked values count.
    edges = (-1.0, 0.0, 0.5, 2.0)
    values = np.concatenate(
      [np.random.default_rng(0).normal(size=(40, 5)), [[-1.0, 0.0, 0.5, 2.0, np.inf]]]
    )
    mask = np.random.default_rng(1).random(values.shape) < 0.7
    mask[-1] = [True, True, True, True, False]
    counts = jax.jit(lambda v, m: masked_stats.histogram(v, m, edges))(
      jnp.asarray(values, jnp.float32), mask
    )
    expected, _ = np.histogram(values[mask], [-1e9, *edges, 1e9])
    np.testing.assert_array_equal(counts, expected)
    self.assertEqual(counts.dtype, jnp.int32)


if __name__ == "__main__":
  absltest.main()
