"""Intervals against their equations and coverage; sign confidence against Monte Carlo."""

import math

import numpy as np
from absl.testing import absltest, parameterized
from scipy import integrate, stats

from synthneg_jax.core import advantages

COUNTS = np.array([(c, m) for m in range(1, 21) for c in range(m + 1)])


class ValueIntervalTest(parameterized.TestCase):
  @parameterized.parameters(0.5, 0.9, 0.95)
  def test_wilson_inverts_the_score_test(self, level):
    # Fails for any wrong term of the formula or for z of one tail: at both ends (c/M - q)² = z² q(1
    # - q)/M.
    c, m = COUNTS.T
    z = stats.norm.ppf(0.5 + level / 2)
    low, high = advantages.value_interval(c, m, level=level)
    for end in (low, high):
      np.testing.assert_allclose(
        (c / m - end) ** 2, z**2 * end * (1 - end) / m, rtol=1e-9, atol=1e-14
      )
    self.assertTrue(np.all((low <= c / m) & (c / m <= high) & (low < high)))

  @parameterized.parameters(0.5, 0.95)
  def test_beta_leaves_equal_tails(self, level):
    # Fails for another prior than Jeffreys', for a tail of 1 - level on each side, or for open ends
    # at c = 0 and c = M.
    c, m = COUNTS.T
    low, high = advantages.value_interval(c, m, level=level, method="beta")
    posterior = stats.beta(c + 0.5, m - c + 0.5)
    np.testing.assert_allclose(posterior.cdf(low), np.where(c > 0, (1 - level) / 2, 0.0), rtol=1e-9)
    np.testing.assert_allclose(posterior.sf(high), np.where(c < m, (1 - level) / 2, 0.0), rtol=1e-9)

  def test_golden(self):
    # Fails if the oracles are changed along with the subject: 2 of 10 at 95 %, Wilson's from the
    # literature.
    np.testing.assert_allclose(advantages.value_interval(2, 10), (0.05668, 0.50984), atol=1e-5)

  @parameterized.parameters("wilson", "beta")
  def test_ends_are_exact(self, method):
    # Fails if rounding puts an end that is 0 or 1 a little aside of it (the lower at 0.56, by
    # itself), or if another end is used.
    for level in (0.5, 0.56, 0.9, 0.95, 0.99):
      c, m = COUNTS.T
      low, high = advantages.value_interval(
        c, m, level=level, method="".join(method)
      )  # equal, not identical
      np.testing.assert_array_equal(low == 0.0, c == 0)
      np.testing.assert_array_equal(high == 1.0, c == m)

  @parameterized.parameters("wilson", "beta")
  def test_covers(self, method):
    # Fails if the level is another's (0.9 for 0.95): coverage averaged over Q, summed exactly over
    # c.
    m = 20
    low, high = advantages.value_interval(np.arange(m + 1), m, method=method)
    q = (np.arange(1000)[:, None] + 0.5) / 1000
    covered = np.sum(stats.binom.pmf(np.arange(m + 1), m, q) * ((low <= q) & (q <= high)), axis=1)
    self.assertBetween(covered.mean(), 0.94, 0.965)

  @parameterized.parameters("wilson", "beta")
  def test_no_rollouts(self, method):
    # Fails if no rollouts give NaN, a warning of one on the way, or less than the whole range.
    with np.errstate(all="raise"):
      low, high = advantages.value_interval([[0]], [[0]], method=method)
    np.testing.assert_allclose((low, high), ([[0.0]], [[1.0]]), atol=1e-15)

  def test_settings_go_by_name(self):
    # Fails if the level can be passed positionally, as a third count.
    with self.assertRaises(TypeError):
      advantages.value_interval(1, 2, 0.5)

  def test_unknown_method(self):
    # Fails if an unknown method falls through to one of the others.
    for method in ("wald", "agresti", "zero"):
      with self.assertRaisesRegex(
        ValueError, f"Unknown interval method '{method}': must be wilson or beta"
      ):
        advantages.value_interval(1, 2, method=method)


class SignConfidenceTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, 10, 7, 10), (3, 8, 4, 10), (5, 5, 0, 4), (9, 20, 10, 20), (0, 0, 1, 3), (1, 1000, 9, 1000)
  )
  def test_equals_monte_carlo(self, c, m, c_before, m_before):
    # Fails if after and before are swapped, if the prior is not Jeffreys', or if the density's
    # Jacobian is lost.
    rng, draws = np.random.default_rng(0), 400_000
    after = rng.beta(c + 0.5, m - c + 0.5, draws)
    rate = np.mean(after < rng.beta(c_before + 0.5, m_before - c_before + 0.5, draws))
    got = float(
      advantages.sign_confidence(c, m, successes_before=c_before, rollouts_before=m_before)
    )
    self.assertAlmostEqual(got, rate, delta=4.5 * math.sqrt(max(got * (1 - got), 1e-6) / draws))

  @parameterized.parameters((2, 5, 3, 7), (0, 4, 1, 4), (12, 30, 20, 30))
  def test_equals_adaptive_quadrature(self, c, m, c_before, m_before):
    # Fails if the nodes are too few, or on an error below Monte Carlo's.
    after, before = (
      stats.beta(c + 0.5, m - c + 0.5),
      stats.beta(c_before + 0.5, m_before - c_before + 0.5),
    )
    area, _ = integrate.quad(lambda q: before.pdf(q) * after.cdf(q), 0, 1, epsabs=1e-12, limit=500)
    self.assertAlmostEqual(
      float(advantages.sign_confidence(c, m, successes_before=c_before, rollouts_before=m_before)),
      area,
      delta=1e-8,
    )

  def test_symmetry(self):
    # Fails if after and before are treated unlike each other, or with too few nodes for many
    # rollouts.
    rng = np.random.default_rng(0)
    m, m_before = rng.integers(0, 2000, (2, 50))
    c, c_before = rng.integers(0, m + 1), rng.integers(0, m_before + 1)
    forward = advantages.sign_confidence(c, m, successes_before=c_before, rollouts_before=m_before)
    np.testing.assert_allclose(
      forward
      + advantages.sign_confidence(c_before, m_before, successes_before=c, rollouts_before=m),
      1.0,
      atol=1e-9,
    )
    np.testing.assert_allclose(
      advantages.sign_confidence(c, m, successes_before=c, rollouts_before=m), 0.5, atol=1e-9
    )

  def test_nothing_known(self):
    # Fails if no rollouts at all leave no nodes to sum over.
    self.assertAlmostEqual(
      float(advantages.sign_confidence(0, 0, successes_before=0, rollouts_before=0)),
      0.5,
      delta=1e-9,
    )

  def test_shapes(self):
    # Fails if counts must have one shape, or if a batch is summed.
    got = advantages.sign_confidence(
      np.zeros((3, 1), int), 10, successes_before=np.array([0, 9]), rollouts_before=10
    )
    self.assertEqual(got.shape, (3, 2))
    np.testing.assert_array_equal(got[:, 1] > 0.99, True)

  def test_is_a_probability(self):
    # Fails if rounding takes what is certain beyond 1: without the bound it does for some of these.
    m = np.arange(0, 3000, 7)
    self.assertEqual(
      float(np.max(advantages.sign_confidence(0, m, successes_before=m, rollouts_before=m))), 1.0
    )


if __name__ == "__main__":
  absltest.main()
