"""Values and advantages against exact binomials and plain-python loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import advantages

# Every (successes, rollouts) with 0 <= c <= M <= 12, M >= 1.
COUNTS = np.array([(c, m) for m in range(1, 13) for c in range(m + 1)], np.int32)


class BestOfKTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()

    def estimate(k):
      return np.asarray(
        advantages.best_of_k(jnp.asarray(COUNTS[:, 0]), jnp.asarray(COUNTS[:, 1]), k)[0]
      )

    cls.of_k = {
      k: dict(zip(map(tuple, COUNTS.tolist()), estimate(k), strict=True)) for k in range(1, 13)
    }

  def test_equals_exact_binomials(self):
    # Fails for any off-by-one in the product's factors or in their number, and for c/M put into 1 -
    # (1 - q)^k.
    for k, values in self.of_k.items():
      for (c, m), value in values.items():
        if k <= m:
          self.assertAlmostEqual(
            value, 1.0 - math.comb(m - c, k) / math.comb(m, k), delta=1e-6, msg=f"{c=} {m=} {k=}"
          )

  def test_is_unbiased(self):
    # Fails for every other estimate: over c ~ Binomial(M, q) it averages to 1 - (1 - q)^k, summed
    # exactly.
    for m in (1, 5, 10, 12):
      for k in range(1, m + 1):
        for q in (0.0, 0.03, 0.3, 0.5, 0.9, 1.0):
          mean = sum(
            math.comb(m, c) * q**c * (1.0 - q) ** (m - c) * float(self.of_k[k][c, m])
            for c in range(m + 1)
          )
          self.assertAlmostEqual(mean, 1.0 - (1.0 - q) ** k, delta=1e-6, msg=f"{m=} {k=} {q=}")

  def test_k_of_1_is_the_rate(self):
    # Fails if the first factor is skipped.
    for (c, m), value in self.of_k[1].items():
      self.assertAlmostEqual(value, c / m, delta=1e-6)

  def test_refuses_fewer_rollouts_than_k(self):
    # Fails if M < k counts as known, M = k does not, the counts must be flat, or an unknown step
    # has another value than 0 (0/0 would spread NaN).
    q, known = advantages.best_of_k(
      jnp.asarray([[0, 2], [1, 0], [2, 1]]), jnp.asarray([[4, 4], [4, 0], [2, 1]]), 2
    )
    np.testing.assert_allclose(q, [[0.0, 1 - 1 / 6], [0.5, 0.0], [1.0, 0.0]], atol=1e-6)
    np.testing.assert_array_equal(known, [[True, True], [True, False], [True, False]])

  def test_exact_values_need_no_rollouts(self):
    # Fails if an exact value is refused for its few counts or estimated from them (2 of 4 at k = 2
    # would give 5/6), or if `exact` without any count is known.
    c, m = jnp.asarray([1, 0, 2, 2, 0]), jnp.asarray([1, 1, 4, 4, 0])
    q, known = jax.jit(advantages.best_of_k, static_argnums=2)(
      c, m, 2, exact=jnp.asarray([True, True, True, False, True])
    )
    np.testing.assert_allclose(q, [1.0, 0.0, 0.75, 5 / 6, 0.0], atol=1e-6)
    np.testing.assert_array_equal(known, [True, True, True, True, False])

  def test_exactness_goes_by_name(self):
    # Fails if `exact` can be passed positionally, where it is easily mistaken for another argument.
    with self.assertRaises(TypeError):
      advantages.best_of_k(jnp.zeros(2), jnp.ones(2), 1, True)


class BestOfKPluginTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 5, 12)
  def test_equals_numpy(self, k):
    # Fails if the unbiased ratio is returned, if (c/M)^k is (all k right), or if M < k is treated
    # apart.
    c, m = COUNTS.astype(np.float64).T
    with jax.enable_x64(True):
      got, known = jax.jit(advantages.best_of_k_plugin, static_argnums=2)(c, m, k)
    self.assertTrue(np.all(known))
    np.testing.assert_allclose(
      got, 1.0 - np.prod([(m - c) / m] * k, axis=0), rtol=1e-12, atol=1e-15
    )

  def test_bias(self):
    # Fails if the estimate is not the biased one: it never exceeds the unbiased, and k = 1 agrees.
    c, m = jnp.asarray(COUNTS[:, 0]), jnp.asarray(COUNTS[:, 1])
    enough = np.asarray(m >= 3)
    gap = np.asarray(advantages.best_of_k(c, m, 3)[0] - advantages.best_of_k_plugin(c, m, 3)[0])[
      enough
    ]
    self.assertGreater(gap.min(), -1e-6)
    self.assertGreater(gap.max(), 0.05)
    np.testing.assert_allclose(
      advantages.best_of_k_plugin(c, m, 1)[0], advantages.best_of_k(c, m, 1)[0], atol=1e-6
    )

  def test_no_rollouts(self):
    # Fails if 0/0 spreads, or if nothing known gives 1 or counts as known.
    q, known = advantages.best_of_k_plugin(jnp.asarray(0), jnp.asarray(0), 5)
    self.assertEqual((float(q), bool(known)), (0.0, False))


class StepValuesTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if c and M are swapped, if no rollouts count as known or give 0/0, or if a zero of
    # many is unknown.
    q, known = jax.jit(advantages.step_values)(
      jnp.asarray([[1, 0], [0, 5]]), jnp.asarray([[4, 8], [0, 5]])
    )
    np.testing.assert_array_equal(q, [[0.25, 0.0], [0.0, 1.0]])
    np.testing.assert_array_equal(known, [[True, True], [False, True]])
    self.assertEqual((q.dtype, known.dtype), (jnp.float32, bool))

  def test_equals_numpy(self):
    # Fails if the division is narrowed.
    c, m = COUNTS.astype(np.float64).T
    with jax.enable_x64(True):
      np.testing.assert_allclose(advantages.step_values(c, m)[0], c / m, rtol=1e-15)


class StepAdvantagesTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if the value before is taken from the step after, or the first baseline is not v0.
    got = advantages.step_advantages(jnp.asarray([0.5, 0.75, 0.0]), jnp.asarray(0.25))
    np.testing.assert_array_equal(got, [0.25, 0.25, -0.75])

  def test_telescopes(self):
    # Fails if any step's baseline is not the value of the step before: the sum would not be Q_L -
    # V(x).
    rng = np.random.default_rng(0)
    q, v0 = jnp.asarray(rng.random((20, 7)), jnp.float32), jnp.asarray(rng.random(20), jnp.float32)
    gained = jax.vmap(advantages.step_advantages)(q, v0)
    np.testing.assert_allclose(jnp.cumsum(gained, axis=1), q - v0[:, None], atol=1e-6)


class MeanValueByStepTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if unknown values enter the sum or the count, or if a step that nobody has gives 0/0.
    q = jnp.asarray([[0.5, 1.0, 9.0], [0.25, 9.0, 9.0], [0.0, 0.5, 9.0]])
    known = jnp.asarray([[True, True, False], [True, False, False], [True, True, False]])
    mean, count = advantages.mean_value_by_step(q, known)
    np.testing.assert_array_equal(mean, [0.25, 0.75, 0.0])
    np.testing.assert_array_equal(count, [3, 2, 0])


if __name__ == "__main__":
  absltest.main()
