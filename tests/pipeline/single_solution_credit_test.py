"""Credit of a single given solution."""

import numpy as np
import pytest
from absl.testing import absltest
from scipy import stats

from synthneg_jax.decoding.engine import Trunk
from synthneg_jax.pipeline import single_solution_credit, traces, train_policy
from synthneg_jax.pipeline.experiment import sampling
from synthneg_jax.runtime import keys
from synthneg_jax.runtime.errors import UserError
from tests.pipeline import small_run

pytestmark = pytest.mark.slow  # trains

ROLLOUTS = 6


class OneTextTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.experiment = small_run.opened(small_run.copied("synthesize", "sft"))
    cls.policy = cls.experiment.policy("sft")
    cls.problem = next(iter(cls.experiment.problems("train").values()))

  def credit(self, text):
    return single_solution_credit.credit(
      self.experiment,
      self.policy,
      self.problem.prompt,
      text,
      self.problem.answer,
      num_rollouts=ROLLOUTS,
    )

  def test_cut_responses(self):
    # Fails if a truncated response is graded by its last line, or one that answered before that
    # line is not graded.
    gold = self.problem.answer
    cases = (
      (f"#### {gold}\n x", "length", "right"),
      (f" x\n#### {gold}", "length", "truncated"),
      (f"#### {gold}", "eos", "right"),
      (f" {gold}", "eos", "no_answer"),  # generated tasks answer behind ####
      (f"<think> #### {gold}\n x", "length", "truncated"),
    )
    graded = traces.verdicts(
      self.experiment,
      self.policy,
      [text for text, _, _ in cases],
      [self.problem] * len(cases),
      [finish for _, finish, _ in cases],
    )
    self.assertEqual([verdict.reason for verdict in graded], [reason for _, _, reason in cases])

  def test_counts_are_those_of_the_rollouts(self):
    # Fails if a rollout counts for another step than the one it continues, or no rollout is ever
    # right.
    lines = self.problem.solution.splitlines(keepends=True)
    trace, rollouts = self.credit(self.problem.solution)
    self.assertEqual([step.text for step in trace.steps], lines)
    self.assertLen(rollouts, len(lines))
    once_right = False
    for number, drawn in enumerate(rollouts):
      self.assertLen(drawn, ROLLOUTS)
      wholes = ["".join(lines[:number]) + text for text, _ in drawn]
      graded = traces.verdicts(
        self.experiment, self.policy, wholes, [self.problem] * ROLLOUTS, ["eos"] * ROLLOUTS
      )
      for (_, right), verdict in zip(drawn, graded, strict=True):
        self.assertTrue(verdict.correct or not right)
        once_right |= right
      right = sum(right for _, right in drawn)
      if number == 0:
        self.assertEqual(
          (trace.right_samples, trace.samples, trace.v0), (right, ROLLOUTS, right / ROLLOUTS)
        )
      else:
        step = trace.steps[number - 1]
        self.assertEqual((step.successes, step.rollouts), (right, ROLLOUTS))
        self.assertAlmostEqual(step.q, right / ROLLOUTS, places=6)
        wilson = stats.binomtest(right, ROLLOUTS).proportion_ci(method="wilson")
        np.testing.assert_allclose(step.interval, (wilson.low, wilson.high), atol=1e-3)
    self.assertTrue(once_right)  # before the last step only the answer is left to write

  def test_rollouts_go_on_from_the_end_of_their_step(self):
    # Fails if a branch forks one token early or late: its samples then differ from those with the
    # prefix as the whole trunk.
    _, rollouts = self.credit(self.problem.solution)
    prompt = train_policy.prompt_ids(self.experiment, self.policy.tokenizer, self.problem)
    lines, same = self.problem.solution.splitlines(keepends=True), []
    for number in range(len(lines)):
      prefix = self.policy.tokenizer.encode("".join(lines[:number]), add_special_tokens=False)
      seed, hash_ = self.experiment.config.seed, keys.hash_ids(prefix)
      draws = np.stack(
        [keys.draw_key(seed, "one_text", 0, "yours", hash_, index) for index in range(ROLLOUTS)]
      )
      trunk = Trunk([*prompt, *prefix], [len(prompt) + len(prefix)] * ROLLOUTS, draws)
      engine = self.experiment.engine(self.policy, lanes=1, slots=ROLLOUTS)
      ((_, generations),) = engine.run(
        self.policy.params, [trunk], sampling(self.experiment.config.credit)
      )
      same += [
        self.policy.token_text.text(a.ids) == b
        for a, (b, _) in zip(generations, rollouts[number], strict=True)
      ]
    self.assertGreater(
      np.mean(same), 0.9
    )  # a draw at the edge of its interval may fall to the other side

  def test_a_right_text_has_no_pit_and_ends_at_one(self):
    # Fails if the last step's Q is not the verdict, or a right solution gets a pit.
    trace, _ = self.credit(self.problem.solution)
    self.assertEqual(
      (trace.reason, trace.pit, trace.steps[-1].q, trace.steps[-1].exact), ("right", -1, 1.0, True)
    )
    self.assertAlmostEqual(sum(step.advantage for step in trace.steps), 1.0 - trace.v0, places=5)

  def test_a_wrong_text_has_its_pit_at_the_first_lowest(self):
    # Fails if the pit follows other values than the ones shown.
    lines = self.problem.solution.splitlines(keepends=True)
    lines[-1] = f" #### {(int(self.problem.answer) + 1) % 10}"
    trace, _ = self.credit("".join(lines))
    q = [step.q for step in trace.steps]
    self.assertEqual((trace.reason, trace.steps[-1].q, trace.pit), ("wrong", 0.0, q.index(min(q))))

  def test_the_same_text_gives_the_same_rollouts(self):
    # Fails if samples depend on anything but seed, problem, prefix and index.
    self.assertEqual(self.credit(self.problem.solution)[1], self.credit(self.problem.solution)[1])

  def test_refuses_what_the_policy_cannot_read(self):
    # Fails if unknown words are silently read as padding, or an empty or too long solution is
    # accepted.
    with self.assertRaisesRegex(
      UserError, "solution has text .* vocabulary cannot represent, at character 1: 'Hello"
    ):
      self.credit("Hello world")
    with self.assertRaisesRegex(UserError, "has 0 tokens"):
      self.credit("")
    with self.assertRaisesRegex(UserError, "leave room for 1 to"):
      self.credit(self.problem.solution * 9)


if __name__ == "__main__":
  absltest.main()
