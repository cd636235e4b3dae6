"""Values, advantages and pits against exact binomials and plain-python loops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import advantages

RULES = ("lowest_value", "first_zero", "first_dead", "least_advantage", "relative_drop")
# Every (successes, rollouts) with 0 <= c <= M <= 12, M >= 1.
COUNTS = np.array([(c, m) for m in range(1, 13) for c in range(m + 1)], np.int32)


def loop_pit(q, known, v0, rule, drop_ratio=0.34, min_before=0.25) -> int:
  """The rules of the docstring, step by step, in float32 as the subject computes."""
  best, best_value = -1, None
  for step in range(len(q)):
    if not known[step]:
      continue
    now, before = np.float32(q[step]), np.float32(v0 if step == 0 else q[step - 1])
    before_known = step == 0 or known[step - 1]
    if rule == "first_zero" and now == 0:
      return step
    if rule == "first_dead" and not any(known[later] and q[later] > 0 for later in range(step, len(q))):
      return step
    if rule == "relative_drop" and before_known and before >= np.float32(min_before):
      if now <= np.float32(drop_ratio) * before:
        return step
    if rule == "lowest_value" and (best < 0 or now < best_value):
      best, best_value = step, now
    if rule == "least_advantage" and before_known and (best < 0 or now - before < best_value):
      best, best_value = step, now - before
  return best


@functools.partial(jax.jit, static_argnames="rule")
def pits(q_NS, known_NS, v0_N, rule):
  return jax.vmap(functools.partial(advantages.first_pit, rule=rule))(q_NS, known_NS, v0_N)


def random_cases(num: int, steps: int):
  """Values on a coarse grid, so that ties and zeros abound; a third of the steps unknown; some rows wholly unknown."""
  rng = np.random.default_rng(0)
  q = (rng.integers(0, 6, (num, steps)) / 5.0).astype(np.float32)
  known = rng.random((num, steps)) < rng.choice([0.0, 0.3, 0.7, 1.0], (num, 1), p=[0.05, 0.2, 0.35, 0.4])
  return q, known, (rng.integers(0, 6, num) / 5.0).astype(np.float32)


class BestOfKTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    estimate = lambda k: np.asarray(advantages.best_of_k(jnp.asarray(COUNTS[:, 0]), jnp.asarray(COUNTS[:, 1]), k)[0])
    cls.of_k = {k: dict(zip(map(tuple, COUNTS.tolist()), estimate(k), strict=True)) for k in range(1, 13)}

  def test_equals_exact_binomials(self):
    # Fails for any off-by-one in the product's factors or in their number, and for c/M put into 1 - (1 - q)^k.
    for k, values in self.of_k.items():
      for (c, m), value in values.items():
        if k <= m:
          self.assertAlmostEqual(value, 1.0 - math.comb(m - c, k) / math.comb(m, k), delta=1e-6, msg=f"{c=} {m=} {k=}")

  def test_is_unbiased(self):
    # Fails for every other estimate: over c ~ Binomial(M, q) it averages to 1 - (1 - q)^k, summed exactly.
    for m in (1, 5, 10, 12):
      for k in range(1, m + 1):
        for q in (0.0, 0.03, 0.3, 0.5, 0.9, 1.0):
          mean = sum(math.comb(m, c) * q**c * (1.0 - q) ** (m - c) * float(self.of_k[k][c, m]) for c in range(m + 1))
          self.assertAlmostEqual(mean, 1.0 - (1.0 - q) ** k, delta=1e-6, msg=f"{m=} {k=} {q=}")

  def test_k_of_1_is_the_rate(self):
    # Fails if the first factor is skipped.
    for (c, m), value in self.of_k[1].items():
      self.assertAlmostEqual(value, c / m, delta=1e-6)

  def test_refuses_fewer_rollouts_than_k(self):
    # Fails if M < k counts as known, M = k does not, the counts must be flat, or an unknown step has another value than 0
    # (0/0 would spread NaN).
    q, known = advantages.best_of_k(jnp.asarray([[0, 2], [1, 0], [2, 1]]), jnp.asarray([[4, 4], [4, 0], [2, 1]]), 2)
    np.testing.assert_allclose(q, [[0.0, 1 - 1 / 6], [0.5, 0.0], [1.0, 0.0]], atol=1e-6)
    np.testing.assert_array_equal(known, [[True, True], [True, False], [True, False]])

  def test_exact_values_need_no_rollouts(self):
    # Fails if an exact value is refused for its few counts or estimated from them (2 of 4 at k = 2 would give 5/6), or if
    # `exact` without any count is known.
    c, m = jnp.asarray([1, 0, 2, 2, 0]), jnp.asarray([1, 1, 4, 4, 0])
    q, known = jax.jit(advantages.best_of_k, static_argnums=2)(
      c, m, 2, exact=jnp.asarray([True, True, True, False, True])
    )
    np.testing.assert_allclose(q, [1.0, 0.0, 0.75, 5 / 6, 0.0], atol=1e-6)
    np.testing.assert_array_equal(known, [True, True, True, True, False])


class BestOfKPluginTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 5, 12)
  def test_equals_numpy(self, k):
    # Fails if the unbiased ratio is returned, if (c/M)^k is (all k right), or if M < k is treated apart.
    c, m = COUNTS.astype(np.float64).T
    with jax.enable_x64(True):
      got, known = jax.jit(advantages.best_of_k_plugin, static_argnums=2)(c, m, k)
    self.assertTrue(np.all(known))
    np.testing.assert_allclose(got, 1.0 - np.prod([(m - c) / m] * k, axis=0), rtol=1e-12, atol=1e-15)

  def test_bias(self):
    # Fails if the estimate is not the biased one: it never exceeds the unbiased, and k = 1 agrees.
    c, m = jnp.asarray(COUNTS[:, 0]), jnp.asarray(COUNTS[:, 1])
    enough = np.asarray(m >= 3)
    gap = np.asarray(advantages.best_of_k(c, m, 3)[0] - advantages.best_of_k_plugin(c, m, 3)[0])[enough]
    self.assertGreater(gap.min(), -1e-6)
    self.assertGreater(gap.max(), 0.05)
    np.testing.assert_allclose(advantages.best_of_k_plugin(c, m, 1)[0], advantages.best_of_k(c, m, 1)[0], atol=1e-6)

  def test_no_rollouts(self):
    # Fails if 0/0 spreads, or if nothing known gives 1 or counts as known.
    q, known = advantages.best_of_k_plugin(jnp.asarray(0), jnp.asarray(0), 5)
    self.assertEqual((float(q), bool(known)), (0.0, False))


class StepValuesTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if c and M change places, if no rollouts count as known or give 0/0, or if a zero of many is unknown.
    q, known = jax.jit(advantages.step_values)(jnp.asarray([[1, 0], [0, 5]]), jnp.asarray([[4, 8], [0, 5]]))
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
    # Fails if any step's baseline is not the value of the step before: the sum would not be Q_L - V(x).
    rng = np.random.default_rng(0)
    q, v0 = jnp.asarray(rng.random((20, 7)), jnp.float32), jnp.asarray(rng.random(20), jnp.float32)
    gained = jax.vmap(advantages.step_advantages)(q, v0)
    np.testing.assert_allclose(jnp.cumsum(gained, axis=1), q - v0[:, None], atol=1e-6)


class FirstPitTest(parameterized.TestCase):
  @parameterized.parameters(
    ("lowest_value", 4),
    ("first_zero", 4),
    ("first_dead", 4),
    ("least_advantage", 2),
    ("relative_drop", 2),
  )
  def test_by_hand(self, rule, expected):
    # Fails if a rule takes the last of equal steps, or another quantity than its own.
    q = jnp.asarray([0.6, 0.5, 0.1, 0.1, 0.0])
    pit = advantages.first_pit(q, jnp.ones(5, bool), jnp.asarray(0.55), rule=rule)
    self.assertEqual((int(pit), pit.dtype, pit.shape), (expected, jnp.int32, ()))

  @parameterized.parameters(*RULES)
  def test_equals_a_loop(self, rule):
    # Fails if an unknown step is picked, if a step after an unknown one counts where its advantage is unknown, if v0
    # counts as unknown, if rules are told apart by identity, or if ties go to a later step. NaN, -1, 9, 1, or
    # 1 and 0.1 in turn, stand at unknown steps, where nothing must read them.
    q, known, v0 = random_cases(400, 6)
    expected = [loop_pit(*case, rule) for case in zip(q, known, v0, strict=True)]
    for garbage in (np.nan, -1.0, 9.0, 1.0, [1.0, 0.1] * 3):
      filled = np.where(known, q, np.asarray(garbage, np.float32))
      got = pits(filled, known, v0, "".join(rule))  # a name that is equal, not identical
      self.assertEqual(np.asarray(got).tolist(), expected, garbage)
    self.assertGreater(len(set(expected)), 4)
    self.assertIn(-1, expected)

  @parameterized.parameters(*RULES)
  def test_vmap_equals_single_calls(self, rule):
    # Fails if a rule mixes responses, or can only be mapped.
    q, known, v0 = random_cases(12, 6)
    single = jax.jit(functools.partial(advantages.first_pit, rule=rule))
    alone = [int(single(*case)) for case in zip(q, known, v0, strict=True)]
    self.assertEqual(np.asarray(pits(q, known, v0, rule)).tolist(), alone)

  @parameterized.parameters(*RULES)
  def test_none_is_minus_one(self, rule):
    # Fails if a rule that finds nothing names step 0: argmin and argmax of nothing are 0.
    q = np.full((1, 4), 0.9, np.float32)
    v0 = np.array([0.9], np.float32)
    self.assertEqual(int(pits(q, np.zeros((1, 4), bool), v0, rule)[0]), -1)
    if rule in ("first_zero", "first_dead", "relative_drop"):
      self.assertEqual(int(pits(q, np.ones((1, 4), bool), v0, rule)[0]), -1)

  def test_a_success_later_on_outdoes_a_zero(self):
    # Fails if first_dead looks at the steps before, or first_zero at those after; step 3 is unknown and says nothing.
    q, known = jnp.asarray([0.5, 0.0, 0.25, 1.0, 0.0]), jnp.asarray([True, True, True, False, True])
    pit = lambda rule: int(advantages.first_pit(q, known, jnp.asarray(0.5), rule=rule))
    self.assertEqual((pit("first_zero"), pit("first_dead")), (1, 4))

  @parameterized.parameters("lowest_value", "first_zero", "first_dead")
  def test_nothing_comes_right(self, rule):
    # Fails if a response that is lost from its first step is not blamed for it.
    pit = pits(np.zeros((1, 4), np.float32), np.ones((1, 4), bool), np.zeros(1, np.float32), rule)
    self.assertEqual(np.asarray(pit).tolist(), [0])

  def test_thresholds_of_relative_drop(self):
    # Fails if <= or >= is strict, or if the two thresholds change places.
    q, known, v0 = jnp.asarray([0.5, 0.25, 0.125]), jnp.ones(3, bool), jnp.asarray(0.5)
    pit = lambda **how: int(advantages.first_pit(q, known, v0, rule="relative_drop", **how))
    self.assertEqual(pit(drop_ratio=0.5, min_before=0.5), 1)
    self.assertEqual(pit(drop_ratio=0.5, min_before=0.51), -1)
    self.assertEqual(pit(drop_ratio=0.49, min_before=0.1), -1)

  def test_settings_go_by_name(self):
    # Fails if a setting can be given by its place, where one float is easily taken for another.
    with self.assertRaises(TypeError):
      advantages.first_pit(jnp.zeros(2), jnp.ones(2, bool), jnp.asarray(0.0), "first_zero")
    with self.assertRaises(TypeError):
      advantages.spurious_step(jnp.zeros(2), jnp.ones(2, bool), jnp.asarray(0.0), -0.1)
    with self.assertRaises(TypeError):
      advantages.best_of_k(jnp.zeros(2), jnp.ones(2), 1, True)

  def test_unknown_rule(self):
    # Fails if an unknown rule falls through to one of the others.
    for rule in ("lowest", "a", "zero"):
      with self.assertRaisesRegex(ValueError, f"No pit rule '{rule}': lowest_value, first_zero, first_dead, least_"):
        advantages.first_pit(jnp.zeros(2), jnp.ones(2, bool), jnp.asarray(0.0), rule=rule)


class SpuriousStepTest(parameterized.TestCase):
  @parameterized.parameters((0.0, 1), (-0.2, 1), (-0.25, -1), (-0.4, -1))
  def test_by_hand(self, below, expected):
    # Fails if the lowest value is taken instead of the lowest advantage, if < is <=, or if `below` is not used.
    q = jnp.asarray([0.75, 0.5, 0.5, 1.0])
    step = advantages.spurious_step(q, jnp.ones(4, bool), jnp.asarray(0.25), below=below)
    self.assertEqual((int(step), step.dtype, step.shape), (expected, jnp.int32, ()))

  def test_none(self):
    # Fails if a response that only makes progress, or of which nothing is known, has a spurious step: the index -1 of
    # no step reads the last, whose advantage is < 0 here.
    rising, falling = jnp.asarray([0.5, 0.75, 1.0]), jnp.asarray([0.5, 0.25, 0.0])
    self.assertEqual(int(advantages.spurious_step(rising, jnp.ones(3, bool), jnp.asarray(0.25))), -1)
    self.assertEqual(int(advantages.spurious_step(falling, jnp.zeros(3, bool), jnp.asarray(0.25))), -1)
    self.assertEqual(int(advantages.spurious_step(falling, jnp.ones(3, bool), jnp.asarray(0.75))), 0)

  def test_default_is_any_step_back(self):
    # Fails if the default bound is not 0.
    q = jnp.asarray([0.5, 0.4375, 1.0])
    self.assertEqual(int(advantages.spurious_step(q, jnp.ones(3, bool), jnp.asarray(0.5))), 1)
    level = jnp.asarray([0.5, 0.5, 1.0])
    self.assertEqual(int(advantages.spurious_step(level, jnp.ones(3, bool), jnp.asarray(0.5))), -1)


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
