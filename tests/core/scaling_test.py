"""Exact power laws, curves with known crossings, and the coverage of the bootstrap."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import scaling
from synthneg_jax.core.scaling import Baseline

SIZES = np.array([1000.0, 2000.0, 4000.0, 8000.0])


class PowerLawFitTest(parameterized.TestCase):
  @parameterized.parameters((0.05, 0.9), (0.15, 2.0), (-0.1, 0.2), (0.0, 0.3))
  def test_exact(self, exponent, coefficient):
    # Fails if the exponent's sign is flipped, if the coefficient is its log, or if an axis is not
    # logarithmic.
    got = scaling.power_law_fit(SIZES, coefficient * SIZES**-exponent)
    np.testing.assert_allclose(got, (exponent, coefficient), rtol=1e-9, atol=1e-12)

  def test_equals_polyfit(self):
    # Fails for another fit than least squares of log error on log size, first against last point
    # for one.
    errors = np.random.default_rng(0).uniform(0.1, 0.9, 4)
    slope, intercept = np.polyfit(np.log(SIZES), np.log(errors), 1)
    np.testing.assert_allclose(
      scaling.power_law_fit(SIZES, errors), (-slope, np.exp(intercept)), rtol=1e-9
    )

  @parameterized.parameters(
    ([5.0, 5.0], [0.1, 0.2]),
    ([6.0, 6.0, 6.0], [0.5, 0.4, 0.3]),
    ([1.0, 2.0], [0.1, 0.0]),
    ([0.0, 2.0], [0.1, 0.2]),
    ([-1.0, 2.0], [0.1, 0.2]),
  )
  def test_refuses(self, sizes, errors):
    # Fails if a line through one size, or the log of 0 or less, goes out as inf or NaN.
    with self.assertRaises(ValueError):
      scaling.power_law_fit(sizes, errors)


class EfficiencyFactorTest(parameterized.TestCase):
  @parameterized.parameters(0.25, 0.5, 1.0, 2.0, 3.7, 8.0, 64.0)
  def test_on_a_power_law(self, factor):
    # Fails if the ratio is inverted, if interpolation is linear in either axis, or if extrapolation
    # takes a wrong end.
    errors = 2.0 * SIZES**-0.15
    size = 1000.0
    got, extrapolated = scaling.efficiency_factor(
      SIZES, errors, size=size, method_error=float(2.0 * (factor * size) ** -0.15)
    )
    self.assertAlmostEqual(got / factor, 1.0, delta=1e-9)
    if factor not in (1.0, 8.0):  # at an end itself rounding decides
      self.assertEqual(extrapolated, factor < 1 or factor > 8)

  @parameterized.parameters((0.8, 1.0), (0.4, 2.0), (0.4 / 2**0.25, 4 * 2**0.25), (0.2, 8.0))
  def test_where_the_curve_rises(self, error, factor):
    # Fails if a rise is crossed, or if a level reached twice gives the later size: the lowest so
    # far are .8, .4, .4, .2, so that .4 is reached first at 2000, and errors below it between 4000
    # and 8000.
    got, extrapolated = scaling.efficiency_factor(
      SIZES, [0.8, 0.4, 0.6, 0.2], size=1000.0, method_error=error
    )
    self.assertAlmostEqual(got, factor, delta=1e-9)
    self.assertFalse(extrapolated)

  def test_by_hand_beyond_the_ends(self):
    # Fails if extrapolation does not start at the curve's own end: exponent 1, half the last error
    # takes twice its size.
    errors = [0.8, 0.4, 0.2, 0.1]
    self.assertEqual(
      [
        round(v, 9)
        for v in scaling.efficiency_factor(SIZES, errors, size=2000.0, method_error=0.05)
      ],
      [8.0, True],
    )
    np.testing.assert_allclose(
      scaling.efficiency_factor(SIZES, errors, size=2000.0, method_error=1.0),
      (0.4, True),
      rtol=1e-9,
    )
    bent = [0.8, 0.4, 0.2, 0.15]
    exponent, _ = scaling.power_law_fit(SIZES, bent)
    for error, expected in ((0.05, 4 * 3 ** (1 / exponent)), (1.0, 0.5 * 0.8 ** (1 / exponent))):
      np.testing.assert_allclose(
        scaling.efficiency_factor(SIZES, bent, size=2000.0, method_error=error),
        (expected, True),
        rtol=1e-9,
      )

  def test_baseline_that_does_not_fall(self):
    # Fails if a factor is made up from an exponent that is 0 or negative.
    self.assertEqual(
      scaling.efficiency_factor(SIZES, [0.2, 0.3, 0.4, 0.5], size=1000.0, method_error=0.1),
      (np.inf, True),
    )
    self.assertEqual(
      scaling.efficiency_factor(SIZES, [0.2, 0.3, 0.4, 0.5], size=1000.0, method_error=0.3),
      (0.0, True),
    )
    self.assertEqual(
      scaling.efficiency_factor(SIZES, [1.0] * 4, size=1000.0, method_error=0.5), (np.inf, True)
    )

  def test_refuses(self):
    # Fails if sizes out of order, or one size twice, are interpolated, or an error of 0 gives inf
    # without a word.
    for sizes in ([2.0, 1.0, 3.0], [1.0, 1.0, 3.0]):
      with self.assertRaisesRegex(ValueError, "Sizes must be ascending"):
        scaling.efficiency_factor(sizes, [0.3, 0.2, 0.1], size=1.0, method_error=0.1)
    with self.assertRaisesRegex(ValueError, "Not positive"):
      scaling.efficiency_factor([1.0, 2.0], [0.2, 0.1], size=1.0, method_error=0.0)


class BootstrapEfficiencyTest(absltest.TestCase):
  def data(self, seed: int, problems: int = 400):
    """Baseline error 4 · size^-0.3; the method at 1000 problems equals the baseline at 4000."""
    rng = np.random.default_rng(seed)
    hardness = rng.random(problems)  # shared, so that errors are correlated as on one test set

    def wrong(error, seeds):
      return rng.normal(hardness, 0.05, (seeds, problems)) < error

    errors = 4.0 * SIZES**-0.3
    return np.stack([wrong(error, 3) for error in errors]), wrong(errors[2], 4)

  def test_factor_is_of_the_mean_errors(self):
    # Fails if seeds and problems are mixed up, if the point is taken from the draws, or if the
    # draws are not reproducible.
    baseline, method = self.data(0)
    got = scaling.bootstrap_efficiency(Baseline(SIZES, baseline), 1000.0, method, draws=50)
    expected = scaling.efficiency_factor(
      SIZES, baseline.mean((1, 2)), size=1000.0, method_error=float(method.mean())
    )
    np.testing.assert_allclose((got.factor, got.extrapolated), expected, rtol=1e-12)
    self.assertEqual(
      got, scaling.bootstrap_efficiency(Baseline(SIZES, baseline), 1000.0, method, draws=50)
    )
    self.assertLess(got.low, got.high)

  def test_covers(self):
    # Fails if the interval is far too narrow (nothing resampled) or is not about the factor.
    hits = 0
    for seed in range(20):
      baseline, method = self.data(seed)
      got = scaling.bootstrap_efficiency(
        Baseline(SIZES, baseline), 1000.0, method, draws=200, level=0.9, seed=seed
      )
      hits += got.low <= 4.0 <= got.high
      self.assertLess(got.high / got.low, 4.0)
    self.assertGreaterEqual(hits, 14)

  def test_problems_are_shared(self):
    # Fails if methods draw problems apart: a method equal to the baseline at 2000, one seed, has
    # factor 2 in every draw.
    baseline = self.data(0)[0][:, :1]
    got = scaling.bootstrap_efficiency(Baseline(SIZES, baseline), 1000.0, baseline[1], draws=100)
    np.testing.assert_allclose((got.low, got.high), (2.0, 2.0), rtol=1e-9)

  def test_seeds_are_drawn(self):
    # Fails if only problems are resampled: here seeds differ and problems do not.
    baseline = np.zeros((4, 2, 8), bool)
    for size, wrong in enumerate((8, 6, 4, 2)):
      baseline[size] = np.arange(8) < wrong
    method = np.stack([np.ones(8, bool), np.zeros(8, bool)])
    got = scaling.bootstrap_efficiency(Baseline(SIZES, baseline), 1000.0, method, draws=200)
    self.assertGreater(got.high / got.low, 10.0)
    self.assertBetween(got.extrapolated_share, 0.1, 0.9)

  def test_no_mistakes_count_as_half_a_mistake_of_one_seed(self):
    # Fails if the floor is that of all seeds or problems alone, or the other's: 1/36 of 18 answers,
    # 1/48 of 24.
    baseline = np.arange(6) < np.array([6, 4, 2, 0])[:, None, None]
    got = scaling.bootstrap_efficiency(
      Baseline(SIZES, np.repeat(baseline, 3, axis=1)), 1000.0, np.zeros((4, 6), bool), draws=3
    )
    expected = scaling.efficiency_factor(
      SIZES, [1.0, 2 / 3, 1 / 3, 1 / 36], size=1000.0, method_error=1 / 48
    )
    np.testing.assert_allclose((got.factor, got.extrapolated), expected, rtol=1e-12)

  def test_interval_is_of_the_level(self):
    # Fails for other quantiles, or if shares of problems do not sum to 1. On three problems that
    # are all alike two seeds of the method, one right and one wrong, have the error 1 in a quarter
    # of the draws, 1/2 in half of them and 0, counted as 1/12, in a quarter. The baseline falls to
    # 0, counted as 1/6.
    baseline = np.repeat(np.array([1, 1, 1, 0], bool), 3).reshape(4, 1, 3)
    method = np.repeat([[True], [False]], 3, axis=1)

    def factor(error):
      return scaling.efficiency_factor(
        SIZES, [1.0, 1.0, 1.0, 1 / 6], size=1000.0, method_error=error
      )[0]

    def interval(level):
      return scaling.bootstrap_efficiency(Baseline(SIZES, baseline), 1000.0, method, level=level)

    for level, ends in ((0.4, (factor(0.5), factor(0.5))), (0.6, (factor(1.0), factor(1 / 12)))):
      got = interval(level)
      np.testing.assert_allclose((got.low, got.high), ends, rtol=1e-9)
      self.assertBetween(got.extrapolated_share, 0.2, 0.3)
    self.assertEqual(
      interval(0.95), scaling.bootstrap_efficiency(Baseline(SIZES, baseline), 1000.0, method)
    )
    self.assertEqual(
      got,
      scaling.bootstrap_efficiency(
        Baseline(SIZES, baseline), 1000.0, method, level=0.6, draws=1000, seed=0
      ),
    )

  def test_seeds_of_the_baseline_are_drawn_alike(self):
    # Fails if a seed is drawn more often than another. The method's error is half a mistake, 1/2;
    # the baseline's at 2000 is 1 in a quarter of the draws (and the method's is never reached), 1/2
    # in half of them and 1/4 in a quarter.
    baseline = np.array([[[True], [True]], [[True], [False]]])
    for level, ends in ((0.4, (2.0, 2.0)), (0.6, (2.0**0.5, np.inf))):
      got = scaling.bootstrap_efficiency(
        Baseline([1000.0, 2000.0], baseline), 1000.0, np.array([[False]]), level=level
      )
      np.testing.assert_allclose((got.low, got.high), ends, rtol=1e-9)
      self.assertBetween(got.extrapolated_share, 0.2, 0.3)

  def test_settings_go_by_name(self):
    # Fails if draws, level and seed can be passed positionally.
    with self.assertRaises(TypeError):
      scaling.bootstrap_efficiency(Baseline(SIZES, np.ones((4, 1, 1))), 1000.0, np.ones((1, 1)), 10)

  def test_cannot_be_changed(self):
    # Fails if a result can be edited.
    with self.assertRaises(dataclasses.FrozenInstanceError):
      scaling.Efficiency(1.0, False, 1.0, 1.0, 0.0).factor = 2.0


if __name__ == "__main__":
  absltest.main()
