"""Problems of reasoning-gym: splits, parameters, solutions, and verdicts by scorers that evaluate
no text.
"""

import inspect
import os
import pathlib
import re
import tempfile

from absl.testing import absltest, parameterized

from synthneg_jax.data.records import Problem
from synthneg_jax.grading import answers
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import problems, reasoning, verification

try:
  from reasoning_gym.factory import DATASETS
except ImportError:  # tests/run.sh installs it
  DATASETS = {}


def task(dataset: str, params: str = "", **leaves):
  section = config_schema.default().task
  section.name = "reasoning_gym"
  section.reasoning_gym.dataset, section.reasoning_gym.params = dataset, params
  section.update(leaves)
  return section


def is_longer(response: str, problem: Problem) -> bool:
  """A verifier of the tests' own."""
  return len(response) > len(problem.prompt)


@absltest.skipUnless(DATASETS, "reasoning-gym is not installed")
class ReasoningTest(parameterized.TestCase):
  @parameterized.parameters("gsm_symbolic", "chain_sum", "word_sorting", "letter_counting")
  def test_no_question_is_in_two_splits(self, name):
    # Fails if splits or seeds share indices, fewer problems are not a prefix of more, or a seed
    # changes the test split.
    chosen = {
      seed: problems.choose_splits(task(name, train_problems=40, test_problems=40), seed)
      for seed in (0, 1)
    }
    few = problems.choose_splits(
      task(name, train_problems=30, test_problems=10, fresh_problems=10), 0
    )
    self.assertEqual(few.sft + few.train, chosen[0].train)
    self.assertEqual(few.test, chosen[0].test[:10])
    self.assertEqual(chosen[0].test, chosen[1].test)
    splits = [chosen[0].train, chosen[1].train, chosen[0].test]
    for split in splits:
      self.assertLen({problem.prompt for problem in split}, len(split))
      self.assertLen({problem.id for problem in split}, len(split))
    for first, second in ((0, 1), (0, 2), (1, 2)):
      shared = {p.prompt for p in splits[first]} & {p.prompt for p in splits[second]}
      self.assertEmpty(shared)

  @parameterized.parameters("gsm_symbolic", "chain_sum", "spell_backward")
  def test_solutions_state_the_answer_and_are_right(self, name):
    # Fails if a worked solution's answer is lost, or the task's own solution is judged wrong.
    section = task(name)
    for problem in reasoning.load(section, 0, "train", 20):
      self.assertEqual(reasoning.stated(problem.solution), problem.answer)
      verdict = verification.verdict(section, problem.solution, problem)
      self.assertEqual(verdict is None, reasoning.is_number(problem.answer))
      verdict = verdict or answers.grade(problem.solution, problem.answer)
      self.assertTrue(verdict.correct, problem)

  def test_a_running_sum(self):
    # Fails if a term is added that is to be subtracted.
    for problem in reasoning.load(task("chain_sum", "min_terms=3, max_terms=5"), 0, "train", 20):
      for line in problem.solution.splitlines()[:-1]:
        first, operator, second, result = re.fullmatch(
          r"(-?\d+) ([-+]) (-?\d+) = (-?\d+)", line
        ).groups()
        signed = int(second) if operator == "+" else -int(second)
        self.assertEqual(int(first) + signed, int(result))

  def test_sources_name_the_template(self):
    # Fails if problems of one template cannot be told from others'.
    sources = {problem.source for problem in reasoning.load(task("gsm_symbolic"), 0, "train", 20)}
    self.assertGreater(len(sources), 5)
    self.assertTrue(
      all(re.fullmatch(r"reasoning_gym/train/gsm_symbolic/\d+", source) for source in sources)
    )

  @parameterized.parameters(
    ("chain_sums", "", "chain_sums.*did you mean chain_sum"),
    ("chain_sum", "terms=3", "no parameter 'terms'; it has .*max_terms"),
    ("chain_sum", "min_terms=5, max_terms=2", "chain_sum rejects it .max_terms must be"),
    ("chain_sum", "seed=3", "no parameter 'seed'"),
    ("binary_matrix", "", "may evaluate the answer's text .* task.verifier"),
    ("figlet_font", "", "ten matching letters"),
    ("rubiks_cube", "", "was not reviewed"),
    ("aiw", "train_problems=1", "no parameter"),
  )
  def test_what_is_refused(self, name, params, sentence):
    # Fails if an unknown dataset or parameter, or an unreviewed scorer, is accepted.
    with self.assertRaisesRegex(UserError, sentence):
      reasoning.load(task(name, params), 0, "train", 3)

  def test_too_few_questions_are_refused(self):
    # Fails if a small dataset repeats a question to be long enough.
    small = task("chain_sum", "min_terms=1, max_terms=1, max_digits=1")
    self.assertLen(reasoning.load(small, 0, "train", 10), 10)
    with self.assertRaisesRegex(UserError, " 10 .* 11 train problems"):
      reasoning.load(small, 0, "train", 11)

  def test_params_are_literals(self):
    # Fails if the leaf's text is evaluated.
    self.assertEqual(
      config_schema.literals("a=1, b=('+', '-'), c=True"), {"a": 1, "b": ("+", "-"), "c": True}
    )
    for text in ("a=f()", "1, 2", "a", "**{'a': 1}", "a=1) + g("):
      with self.assertRaisesRegex(UserError, "names with literal values"):
        config_schema.literals(text)

  def test_reviewed_scorers_evaluate_no_text(self):
    # Fails if a reviewed scorer runs an answer's code, scores it as right, or has changed since the
    # review.
    marker = pathlib.Path(tempfile.mkdtemp()) / "evaluated"
    write = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    hostile = (
      write,
      f"[{write}]",
      f"[[{write}]]",
      f"{{'a': {write}}}",
      f"({write}, 1)",
      f"1 if {write} else 2",
    )
    self.assertContainsSubset(reasoning.REVIEWED, DATASETS)
    self.assertContainsSubset(reasoning.REFUSED, DATASETS)
    self.assertEmpty(reasoning.REVIEWED & reasoning.REFUSED.keys())
    for name in sorted(reasoning.REVIEWED):
      kind, config_kind = DATASETS[name]
      self.assertNotRegex(
        inspect.getsource(kind.score_answer), r"\b(eval|exec|parse_expr|sympify|compile)\(", name
      )
      section = task(name)
      of_name = kind(config_kind(seed=0, size=1))
      answer = str(of_name[0]["answer"])
      problem = Problem(f"reasoning_gym/{name}/0000000", "", "", answer, "")
      self.assertEqual(of_name.score_answer(answer, of_name[0]), 1.0, name)
      for text in hostile:
        self.assertLess(reasoning.score(section, problem, text), 1.0, name)
      self.assertFalse(marker.exists(), name)

  def test_refused_scorers_do_evaluate(self):
    # Fails if the test above would pass for a scorer that runs an answer's code.
    marker = pathlib.Path(tempfile.mkdtemp()) / "evaluated"
    kind, config_kind = DATASETS["binary_matrix"]
    of_name = kind(config_kind(seed=0, size=1))
    of_name.score_answer(f"__import__('os').mkdir({os.fspath(marker)!r})", of_name[0])
    self.assertTrue(marker.exists())


class VerificationTest(absltest.TestCase):
  PROBLEM = Problem("p", "What?", "", "x y", "")

  def test_a_verifier_of_ones_own(self):
    # Fails if the verifier is not called, or a name that cannot be imported ends in a traceback.
    section = config_schema.default().task
    section.verifier = f"{__name__}:is_longer"
    self.assertTrue(verification.verdict(section, "A long response", self.PROBLEM).correct)
    self.assertFalse(verification.verdict(section, "no", self.PROBLEM).correct)
    for name in ("no_such_module:f", f"{__name__}:no_such_function", "os:sep"):
      section.verifier = name
      with self.assertRaisesRegex(UserError, f"task.verifier='{name}'"):
        verification.verdict(section, "no", self.PROBLEM)

  def test_what_a_response_states(self):
    # Fails if an answer of several lines is cut, an earlier one is taken, or a heading within a
    # line counts.
    self.assertEqual(reasoning.stated("so\n#### 1 2\n3 4\n"), "1 2\n3 4")
    self.assertEqual(reasoning.stated("#### a\n#### b"), "b")
    self.assertIsNone(reasoning.stated("the answer is #### not marked"))


if __name__ == "__main__":
  absltest.main()
