"""Schedules by hand, by enumeration, and on simulated responses with a known first dead step."""

import itertools

import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import rollout_schedules


def first_dead(successes, rollouts) -> int:
  """The first step with only failures after the last success, else the last step."""
  alive = max([i for i, c in enumerate(successes) if c], default=-1)
  return next((i for i in range(alive + 1, len(rollouts)) if rollouts[i]), len(rollouts))


def simulate(schedule, q, rng, num_rollouts):
  """(counts, rounds) of a response with these values, rolled out until the schedule stops."""
  successes, rollouts, rounds = [0] * len(q), [0] * len(q), 0
  while any(more := schedule(successes, rollouts, num_rollouts)):
    rounds += 1
    for step, n in enumerate(more):
      successes[step] += int(rng.binomial(n, q[step]))
      rollouts[step] += n
  return successes, rollouts, rounds


def responses(num: int, seed: int = 0):
  """(values of all steps but the last, first dead step): alive values decrease, dead ones are 0."""
  rng = np.random.default_rng(seed)
  for _ in range(num):
    steps = int(rng.integers(2, 10))
    pit = int(rng.integers(0, steps + 1))
    yield np.concatenate([np.sort(rng.random(pit))[::-1], np.zeros(steps - pit)]), pit


class EveryTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if existing rollouts are not counted, or if more than R give a negative number.
    self.assertEqual(rollout_schedules.every([0, 2, 1], [0, 3, 9], 8), [8, 5, 0])


class UntilFirstZeroTest(parameterized.TestCase):
  @parameterized.parameters(
    ([0, 0, 0], [0, 0, 0], [4, 0, 0]),
    ([1, 0, 0], [4, 0, 0], [0, 4, 0]),
    ([1, 0, 0], [4, 1, 0], [0, 3, 0]),
    ([1, 0, 0], [4, 4, 0], [0, 0, 0]),
    ([1, 2, 3], [4, 4, 4], [0, 0, 0]),
    ([], [], []),
  )
  def test_by_hand(self, successes, rollouts, more):
    # Fails if a step is begun before the one on its left is done, if the walk goes on behind a
    # zero, or if a step with fewer rollouts than R counts as a zero.
    self.assertEqual(rollout_schedules.until_first_zero(successes, rollouts, 4), more)


class BisectTest(parameterized.TestCase):
  @parameterized.parameters(
    ([0] * 5, [0] * 5, 2),
    ([0, 0, 1, 0, 0], [0, 0, 4, 0, 0], 3),
    ([0, 0, 0, 0, 0], [0, 0, 4, 0, 0], 0),
    ([0, 0, 1, 0, 0], [0, 0, 4, 4, 0], None),
    ([0, 0, 1, 2, 0], [0, 0, 4, 4, 0], 4),
    ([0], [0], 0),
    ([], [], None),
  )
  def test_by_hand(self, successes, rollouts, step):
    # Fails if it goes to the wrong side of a zero, if a settled threshold is searched on, or if the
    # last step, which is dead, is asked for.
    expected = [0] * len(rollouts)
    if step is not None:
      expected[step] = 4
    self.assertEqual(rollout_schedules.bisect(successes, rollouts, 4), expected)

  def test_rounds_are_logarithmic(self):
    # Fails if steps are walked one by one.
    rng = np.random.default_rng(0)
    for pit in range(16):
      _, rollouts, rounds = simulate(
        rollout_schedules.bisect, [1.0] * pit + [0.0] * (15 - pit), rng, 3
      )
      self.assertEqual((rounds, sum(rollouts)), (4, 12))


class PitPosteriorTest(absltest.TestCase):
  def test_equals_bayes(self):
    # Fails for another prior or likelihood: by integrating Q ~ Beta(1, 1) numerically for each step
    # before the pit.
    q = (np.arange(20_000) + 0.5) / 20_000
    for rollouts in itertools.product((0, 1, 5), repeat=3):
      weight = []
      for pit in range(4):
        alive = [np.mean((1 - q) ** m) for m in rollouts[:pit]]
        weight.append(np.prod(alive))
      expected = np.array(weight) / np.sum(weight)
      np.testing.assert_allclose(
        rollout_schedules.pit_posterior([0, 0, 0], rollouts, 9), expected, rtol=1e-6
      )

  def test_a_success_excludes_pits_up_to_it(self):
    # Fails if a success says nothing of the steps before, or settles a zero before it.
    np.testing.assert_allclose(
      rollout_schedules.pit_posterior([0, 1, 0], [4, 2, 1], 4), [0, 0, 2 / 3, 1 / 3]
    )

  def test_none_of_r_settles(self):
    # Fails if R zeros leave a later pit possible.
    np.testing.assert_allclose(
      rollout_schedules.pit_posterior([0, 0, 0], [1, 4, 0], 4), [2 / 3, 1 / 3, 0, 0]
    )
    np.testing.assert_allclose(rollout_schedules.pit_posterior([], [], 4), [1.0])


class AdaptiveTest(parameterized.TestCase):
  @parameterized.parameters(
    ([0] * 7, [0] * 7),
    ([0, 0, 1, 0, 0], [0, 0, 2, 0, 2]),
    ([0, 0, 0], [2, 4, 6]),
    ([0, 0, 0, 0], [1, 7, 2, 0]),
  )
  def test_takes_the_step_that_tells_most(self, successes, rollouts):
    # Fails if another step is taken than the one whose outcomes leave the least entropy, each
    # outcome weighed by its probability: here both outcomes are put through Bayes anew. R = 8,
    # batches of 2.
    posterior = rollout_schedules.pit_posterior(successes, rollouts, 8)

    def entropy(p):
      return -np.sum(p[p > 0] * np.log(p[p > 0]))

    left = {}
    for step, (c, m) in enumerate(zip(successes, rollouts, strict=True)):
      if c or posterior[: step + 1].sum() == 0:
        continue
      n = min(2, 8 - m)

      def change(counts, by, step=step):
        return [count + by * (i == step) for i, count in enumerate(counts)]

      alive = posterior[step + 1 :].sum()
      lucky = alive * (1 - (0 if m + n == 8 else (m + 1) / (m + n + 1)))
      after = [
        rollout_schedules.pit_posterior(change(successes, by), change(rollouts, n), 8)
        for by in (1, 0)
      ]
      left[step] = lucky * entropy(after[0]) + (1 - lucky) * entropy(after[1])
    best = min(left, key=left.get)
    more = rollout_schedules.adaptive(successes, rollouts, 8)
    self.assertEqual(more, [min(2, 8 - rollouts[best]) * (i == best) for i in range(len(rollouts))])

  @parameterized.parameters(([2, 0], [2, 8]), ([0, 3], [0, 4]), ([], []))
  def test_is_content(self, successes, rollouts):
    # Fails if a settled pit is rolled out, or a step that has a success. (The third has one step:
    # nothing to find.)
    self.assertEqual(rollout_schedules.adaptive(successes, rollouts, 8), [0] * len(rollouts))

  def test_never_beyond_r(self):
    # Fails if a batch goes beyond R rollouts a step, or if the search does not end.
    rng = np.random.default_rng(1)
    for num_rollouts in (1, 3, 8):
      for q, _ in responses(60):
        _, rollouts, rounds = simulate(rollout_schedules.adaptive, q, rng, num_rollouts)
        self.assertLessEqual(max(rollouts), num_rollouts)
        self.assertLessEqual(rounds, sum(rollouts))

  def test_saves_rollouts_at_equal_error(self):
    # Fails if it spends rollouts where nothing is in doubt, or stops too early: against
    # until_first_zero with as many rollouts a step it needs two thirds at most, and errs no more.
    wrong, spent = {}, {}
    for name in ("until_first_zero", "bisect", "adaptive"):
      rng = np.random.default_rng(2)
      runs = [
        (pit, simulate(rollout_schedules.SCHEDULES[name], q, rng, 8)[:2])
        for q, pit in responses(500)
        if len(q)
      ]
      wrong[name] = np.mean([first_dead(*counts) != pit for pit, counts in runs])
      spent[name] = sum(sum(counts[1]) for _, counts in runs)
    self.assertLess(spent["adaptive"] * 1.5, spent["until_first_zero"])
    self.assertLess(spent["bisect"], spent["until_first_zero"])
    self.assertLess(wrong["adaptive"], wrong["until_first_zero"] + 0.02)

  def test_finds_a_sharp_pit(self):
    # Fails if the wrong side of a success or of zeros is searched: alive steps always succeed here.
    rng = np.random.default_rng(3)
    for steps in range(1, 12):
      for pit in range(steps + 1):
        counts = simulate(rollout_schedules.adaptive, [1.0] * pit + [0.0] * (steps - pit), rng, 8)[
          :2
        ]
        self.assertEqual(first_dead(*counts), pit)


if __name__ == "__main__":
  absltest.main()
