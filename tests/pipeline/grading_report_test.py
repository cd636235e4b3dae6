"""The grading report: counts, examples and disagreements."""

import collections
import dataclasses
import tempfile

import pytest
from absl.testing import absltest
from etils import epath

from synthneg_jax.data.records import Problem, Shards, Trace
from synthneg_jax.pipeline import grading_report
from synthneg_jax.runtime.errors import UserError
from tests.grading import math_answers_test

pytestmark = pytest.mark.slow  # starts processes


def problem(name: str, answer: str) -> Problem:
  empty = {field.name: "" for field in dataclasses.fields(Problem)}
  return Problem(**(empty | {"id": name, "prompt": "Find x.", "answer": answer}))


def trace(name: str, reason: str, text: str) -> Trace:
  return Trace(
    id=f"{name}/sample/0", problem_id=name, index=0, ids=[1], step_ends=[1], text=text,
    correct=reason == "right",
    reason=reason, extracted=text[:5], finish_reason="eos", logps=[0.0], drawn_logps=[0.0],
    policy="0" * 16,
  )  # fmt: skip


class GradingReportTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))
    Shards(self.folder / "synthesize" / "train", Problem).write(
      [problem("a", "7"), problem("b", "8"), problem("c", "9")]
    )
    Shards(self.folder / "synthesize" / "test", Problem).write([problem("d", "1")])
    self.traces = [
      trace("a", "right", "7"),
      trace("b", "unparsable", "x?y"),
      trace("c", "ambiguous", "9 or 8"),
    ]

  def test_reasons_and_examples(self):
    # Fails if counts are wrong, right responses come first, or an example is missing.
    Shards(self.folder / "sample" / "traces", Trace).write(self.traces)
    Shards(self.folder / "evaluate" / "sft" / "traces", Trace).write([trace("d", "wrong", "2")])
    text = grading_report.report(str(self.folder), False, 5).read_text()
    self.assertIn("| unparsable | 1 | 0 |", text)
    self.assertIn("| all | 3 | 1 |", text)
    order = [
      text.index(f"## {reason}: ") for reason in ("unparsable", "ambiguous", "wrong", "right")
    ]
    self.assertEqual(order, sorted(order))
    self.assertIn("- b/sample/0: gold `8`, read `x?y`", text)
    self.assertNotIn("second opinion", text)

  def test_disagreements(self):
    # Fails if agreements are listed, or None counts as an opinion.
    says = {"7": False, "x?y": None, "9 or 8": True}
    problems = {p.id: p for p in (problem("a", "7"), problem("b", "8"), problem("c", "9"))}
    text = grading_report.markdown(
      {"sample": self.traces}, problems, opinion=lambda response, gold: says[response], most=5
    )
    self.assertIn("## wrong here, right there: sample, 1 of 2", text)
    self.assertIn("## right here, wrong there: sample, 1 of 1", text)
    self.assertIn("no opinion on 1 of 3: sample", text)

  def test_math_verify_is_asked(self):
    # Fails if gold answers or opinions are passed on wrongly. The last case is a known mistake of
    # math-verify: it equates 2^-98 and 2^-99.
    opinion = grading_report.math_verify()
    self.assertIs(opinion(r"So \boxed{0.5}.", r"\frac12"), True)
    self.assertIs(opinion(r"So \boxed{0.6}.", r"\frac12"), False)
    self.assertIsNone(opinion(r"\boxed{1}", ""))
    self.assertIs(opinion(r"\boxed{2^{-98}}", "2^{-99}"), True)

  @pytest.mark.long
  def test_math_verify_judges_no_kind_of_answer_better(self):
    # Fails once math-verify beats our grader on any kind of answer in our own pairs; it should then
    # grade that kind.
    opinion, table = grading_report.math_verify(), collections.defaultdict(collections.Counter)
    for kind, gold, equal, unequal in math_answers_test.PAIRS:
      for answer, right in [(a, True) for a in equal] + [(a, False) for a in unequal]:
        response = rf"So we have it. \boxed{{{answer}}}"
        table[kind][right, "pairs"] += 1
        table[kind][right, "ours"] += (math_answers_test.reason(response, gold) == "right") == right
        table[kind][right, "theirs"] += bool(opinion(response, gold)) == right
    for kind, row in table.items():
      print(
        kind,
        *(
          f"{what} {row[right, what]}"
          for right in (True, False)
          for what in ("pairs", "ours", "theirs")
        ),
      )
      for right in (True, False):
        self.assertGreaterEqual(row[right, "ours"], row[right, "theirs"], kind)

  def test_few_are_shown(self):
    text = grading_report.markdown({"s": [self.traces[1]] * 9}, {"b": problem("b", "8")}, most=2)
    self.assertIn("- and 7 more", text)

  def test_an_empty_workdir_is_said(self):
    with self.assertRaisesRegex(UserError, "holds no traces"):
      grading_report.report(str(self.folder / "none"), False, 5)


if __name__ == "__main__":
  absltest.main()
