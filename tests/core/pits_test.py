"""First pits and spurious steps against a plain-python loop over the rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import pits

RULES = ("lowest_value", "first_zero", "first_dead", "least_advantage", "relative_drop")


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
    if rule == "first_dead" and not any(
      known[later] and q[later] > 0 for later in range(step, len(q))
    ):
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
def jitted_pits(q_NS, known_NS, v0_N, rule):
  return jax.vmap(functools.partial(pits.first_pit, rule=rule))(q_NS, known_NS, v0_N)


def random_cases(num: int, steps: int):
  """Coarse values with many ties and zeros; a third of the steps unknown, some rows entirely."""
  rng = np.random.default_rng(0)
  q = (rng.integers(0, 6, (num, steps)) / 5.0).astype(np.float32)
  known = rng.random((num, steps)) < rng.choice(
    [0.0, 0.3, 0.7, 1.0], (num, 1), p=[0.05, 0.2, 0.35, 0.4]
  )
  return q, known, (rng.integers(0, 6, num) / 5.0).astype(np.float32)


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
    pit = pits.first_pit(q, jnp.ones(5, bool), jnp.asarray(0.55), rule=rule)
    self.assertEqual((int(pit), pit.dtype, pit.shape), (expected, jnp.int32, ()))

  @parameterized.parameters(*RULES)
  def test_equals_a_loop(self, rule):
    # Fails if an unknown step is picked, if a step after an unknown one counts where its advantage
    # is unknown, if v0 counts as unknown, if rules are told apart by identity, or if ties go to a
    # later step. NaN, -1, 9, 1, or 1 and 0.1 in turn, stand at unknown steps, where nothing must
    # read them.
    q, known, v0 = random_cases(400, 6)
    expected = [loop_pit(*case, rule) for case in zip(q, known, v0, strict=True)]
    for garbage in (np.nan, -1.0, 9.0, 1.0, [1.0, 0.1] * 3):
      filled = np.where(known, q, np.asarray(garbage, np.float32))
      got = jitted_pits(filled, known, v0, "".join(rule))  # a name that is equal, not identical
      self.assertEqual(np.asarray(got).tolist(), expected, garbage)
    self.assertGreater(len(set(expected)), 4)
    self.assertIn(-1, expected)

  @parameterized.parameters(*RULES)
  def test_vmap_equals_single_calls(self, rule):
    # Fails if a rule mixes responses, or can only be mapped.
    q, known, v0 = random_cases(12, 6)
    single = jax.jit(functools.partial(pits.first_pit, rule=rule))
    alone = [int(single(*case)) for case in zip(q, known, v0, strict=True)]
    self.assertEqual(np.asarray(jitted_pits(q, known, v0, rule)).tolist(), alone)

  @parameterized.parameters(*RULES)
  def test_none_is_minus_one(self, rule):
    # Fails if a rule that finds nothing names step 0: argmin and argmax of nothing are 0.
    q = np.full((1, 4), 0.9, np.float32)
    v0 = np.array([0.9], np.float32)
    self.assertEqual(int(jitted_pits(q, np.zeros((1, 4), bool), v0, rule)[0]), -1)
    if rule in ("first_zero", "first_dead", "relative_drop"):
      self.assertEqual(int(jitted_pits(q, np.ones((1, 4), bool), v0, rule)[0]), -1)

  def test_a_success_later_on_outdoes_a_zero(self):
    # Fails if first_dead looks at the steps before, or first_zero at those after; step 3 is unknown
    # and says nothing.
    q, known = jnp.asarray([0.5, 0.0, 0.25, 1.0, 0.0]), jnp.asarray([True, True, True, False, True])

    def pit(rule):
      return int(pits.first_pit(q, known, jnp.asarray(0.5), rule=rule))

    self.assertEqual((pit("first_zero"), pit("first_dead")), (1, 4))

  @parameterized.parameters("lowest_value", "first_zero", "first_dead")
  def test_nothing_comes_right(self, rule):
    # Fails if a response that is lost from its first step is not blamed for it.
    pit = jitted_pits(
      np.zeros((1, 4), np.float32), np.ones((1, 4), bool), np.zeros(1, np.float32), rule
    )
    self.assertEqual(np.asarray(pit).tolist(), [0])

  def test_thresholds_of_relative_drop(self):
    # Fails if <= or >= is strict, or if the two thresholds are swapped.
    q, known, v0 = jnp.asarray([0.5, 0.25, 0.125]), jnp.ones(3, bool), jnp.asarray(0.5)

    def pit(**how):
      return int(pits.first_pit(q, known, v0, rule="relative_drop", **how))

    self.assertEqual(pit(drop_ratio=0.5, min_before=0.5), 1)
    self.assertEqual(pit(drop_ratio=0.5, min_before=0.51), -1)
    self.assertEqual(pit(drop_ratio=0.49, min_before=0.1), -1)

  def test_settings_go_by_name(self):
    # Fails if a setting can be passed positionally, where floats are easily confused.
    with self.assertRaises(TypeError):
      pits.first_pit(jnp.zeros(2), jnp.ones(2, bool), jnp.asarray(0.0), "first_zero")
    with self.assertRaises(TypeError):
      pits.spurious_step(jnp.zeros(2), jnp.ones(2, bool), jnp.asarray(0.0), -0.1)

  def test_unknown_rule(self):
    # Fails if an unknown rule falls through to one of the others.
    for rule in ("lowest", "a", "zero"):
      with self.assertRaisesRegex(
        ValueError,
        f"Unknown pit rule '{rule}': must be lowest_value, first_zero, first_dead, least_",
      ):
        pits.first_pit(jnp.zeros(2), jnp.ones(2, bool), jnp.asarray(0.0), rule=rule)


class SpuriousStepTest(parameterized.TestCase):
  @parameterized.parameters((0.0, 1), (-0.2, 1), (-0.25, -1), (-0.4, -1))
  def test_by_hand(self, below, expected):
    # Fails if the lowest value is taken instead of the lowest advantage, if < is <=, or if `below`
    # is not used.
    q = jnp.asarray([0.75, 0.5, 0.5, 1.0])
    step = pits.spurious_step(q, jnp.ones(4, bool), jnp.asarray(0.25), below=below)
    self.assertEqual((int(step), step.dtype, step.shape), (expected, jnp.int32, ()))

  def test_none(self):
    # Fails if a response that only makes progress, or of which nothing is known, has a spurious
    # step: the index -1 of no step reads the last, whose advantage is < 0 here.
    rising, falling = jnp.asarray([0.5, 0.75, 1.0]), jnp.asarray([0.5, 0.25, 0.0])
    self.assertEqual(int(pits.spurious_step(rising, jnp.ones(3, bool), jnp.asarray(0.25))), -1)
    self.assertEqual(int(pits.spurious_step(falling, jnp.zeros(3, bool), jnp.asarray(0.25))), -1)
    self.assertEqual(int(pits.spurious_step(falling, jnp.ones(3, bool), jnp.asarray(0.75))), 0)

  def test_default_is_any_step_back(self):
    # Fails if the default bound is not 0.
    q = jnp.asarray([0.5, 0.4375, 1.0])
    self.assertEqual(int(pits.spurious_step(q, jnp.ones(3, bool), jnp.asarray(0.5))), 1)
    level = jnp.asarray([0.5, 0.5, 1.0])
    self.assertEqual(int(pits.spurious_step(level, jnp.ones(3, bool), jnp.asarray(0.5))), -1)


if __name__ == "__main__":
  absltest.main()
