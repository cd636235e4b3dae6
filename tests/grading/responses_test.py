"""Tests of reading whole responses: two files of responses by family, and each rule of the reader.

responses.jsonl and responses_adversarial.jsonl hold our own reductions of how chat models write and
of what graders are publicly reported to get wrong. `known_miss` marks rows that are still misread.
"""

import collections
import json
import pathlib

import pytest
from absl.testing import absltest, parameterized

from synthneg_jax.grading import answers, assertions, response_text, statements, verdicts

HERE = pathlib.Path(__file__).parent


def families(name: str) -> dict[str, list[dict]]:
  """The rows of a file by family."""
  rows = collections.defaultdict(list)
  for line in (HERE / name).read_text("utf-8").splitlines():
    row = json.loads(line)
    rows[row["family"]].append(row)
  return rows


COMMON, ADVERSARIAL = families("responses.jsonl"), families("responses_adversarial.jsonl")


class ResponsesTest(parameterized.TestCase):
  # Fails if an extraction rule is removed or too permissive. Remove `known_miss` from rows that are
  # fixed.
  @parameterized.parameters(
    *[(COMMON, name) for name in COMMON], *[(ADVERSARIAL, name) for name in ADVERSARIAL]
  )
  def test_family(self, rows, family):
    rows = rows[family]
    self.assertGreaterEqual(len(rows), 5)
    for row in rows:
      reason, _ = verdicts.grade_response(
        row["response"], row["gold"], kind=row["kind"], rules=answers.Conventions()
      )
      expected = row["correct"] != row.get("known_miss", False)
      self.assertEqual(reason == "right", expected, f"{row} {reason}")

  def test_few_are_known_to_be_missed(self):
    # Fails if rows are marked instead of fixed.
    rows = [row for group in (*COMMON.values(), *ADVERSARIAL.values()) for row in group]
    self.assertGreater(len(rows), 1700)
    self.assertLess(sum(row.get("known_miss", False) for row in rows), 30)


class TimeTest(parameterized.TestCase):
  # Fails if an expression takes exponential time: 40 repetitions would take hours.
  @parameterized.parameters(
    "A and ", "A, and ", "(A) ", "Tom: 5, ", "x = 5, ", "5 and ", "$5$ and ", "minus ", "- ",
    "the above ", "I see that ", '"answer": "5", ', "Total: 5\n", "[", "\\frac{",
  )  # fmt: skip
  def test_repetition_takes_linear_time(self, piece):
    for before in ("", "Answer: ", "So \\boxed{5} "):
      for gold in ("B", "5"):
        text = before + piece * (8000 // len(piece))
        verdicts.grade_response(text, gold, kind="math", rules=answers.Conventions())


class ThoughtsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("<|im_start|>assistant\n<think>\n", True), ("<think>\n\n</think>\n\n", False),
    ("Solve it.", False),
    ("<think> in the problem </think> <|Assistant|><think>", True), ("[THINK]", True),
    ("◁think▷", True),
  )  # fmt: skip
  def test_the_prompt_opens_one(self, prompt, expected):
    self.assertEqual(answers.opens_thought(prompt), expected)

  @parameterized.parameters("integer", "math")
  @pytest.mark.slow  # starts a worker
  def test_a_response_that_begins_within_one(self, kind):
    # Fails if the flag does not reach the workers, or an unclosed thought is graded.
    for response, reason in (("#### 7", "no_answer"), ("so 8</think>\\boxed{7}", "right")):
      verdict = answers.grade(response, "7", kind=kind, thought_open=True)
      self.assertEqual(verdict.reason, reason)

  @parameterized.parameters(
    ("a <think> b </think> c", "a   c"), ("b </think> c", " c"), ("<think> b", None),
    ("a </think> b </think> c", " c"),
    ("<think> a <think> b </think> c", "  c"), ("analysisIt is 7.assistantfinalNo, 8.", "No, 8."),
    ("c</s>d", "c"), ("<|im_start|>assistant\nc<|im_end|>d", "\nc"),
  )  # fmt: skip
  def test_what_is_left(self, response, expected):
    self.assertEqual(response_text.answer_text(response), expected)


class MarkdownTest(parameterized.TestCase):
  @parameterized.parameters(
    ("**29** and *7*", "29 and 7"), ("2*3*4 = 24", "2*3*4 = 24"),
    ("$a*b*c$ and x_1 and y_2", "$a*b*c$ and x_1 and y_2"),
    ("> # **So** `7`", "So  7 "), ("~~7~~ 8", " 8"), ("7 ✅", "7  "), ("<b>7</b>", " 7 "),
    ("3 = <<1+2=3>>3", "3 = 3"),
    ("__7__", "7"), ("2 ** 3", "2 ** 3"), (r"\boxed{a*b*c}", r"\boxed{a*b*c}"),
    ("**a\n\nb**", "**a\n\nb**"),
  )  # fmt: skip
  def test_what_is_left(self, text, expected):
    self.assertEqual(response_text.without_markdown(text).split(), expected.split())


class StatementsTest(parameterized.TestCase):
  @parameterized.parameters(
    (r"\boxed{3} and \boxed{5}", [("3, 5", "box")]), ("#### 7", [("7", "marker")]),
    ("so 7", [("so 7", "last")]),
    ("The answer is 7, so #### 8", [("8", "marker")]), ("<answer>7</answer>", [("7", "tag")]),
    ("## Answer\n7", [("7", "heading")]),
    ("The answer is 7.\n\\boxed{7}", [("7", "line"), ("7", "box")]),
    ("We get\n$$7$$", [("7", "display")]),
    ("The answer is 7. No wait, it is 8.", [("7", "line"), ("wait, it is 8.", "retraction")]),
    ("The answer isn't 7.", [("The answer isn't 7.", "last")]),
    (r"The answer is not \boxed{7}.", []), (r"\boxed{}", []),
  )  # fmt: skip
  def test_sources(self, response, expected):
    # Fails if a rule is removed, or applies despite a stronger one.
    reading = statements.read_response(response)
    self.assertEqual([(one.text, one.source) for one in reading.statements], expected)

  def test_retractions(self):
    # Fails if the convention is ignored, or the last value counts without a retracting word.
    last = answers.Conventions(retractions="last")
    for response, reasons in (
      ("The answer is 7. No wait, it is 8.", ("ambiguous", "right")),
      (r"\boxed{7}. Wait, that is wrong. \boxed{8}", ("ambiguous", "right")),
      (r"\boxed{7}\boxed{8}", ("ambiguous", "ambiguous")),
      ("#### 7\n#### 8", ("ambiguous", "ambiguous")),
    ):  # fmt: skip
      found = tuple(
        answers.grade(response, "8", rules=rules).reason for rules in (answers.Conventions(), last)
      )
      self.assertEqual(found, reasons, response)

  @pytest.mark.slow  # starts a worker
  def test_marked_only(self):
    # Fails if the last line or display counts despite the convention.
    marked = answers.Conventions(extraction="marked")
    for kind in ("integer", "math"):
      self.assertEqual(
        answers.grade("so it is 7", "7", kind=kind, rules=marked).reason, "no_answer"
      )
      self.assertEqual(
        answers.grade("The answer is 7", "7", kind=kind, rules=marked).reason, "right"
      )

  @parameterized.parameters(
    ("x. The answer is: 72", "72"), ("#### 7\nThe answer is: 7", "7"),
    (r"so \boxed{2}, \boxed{3}", "2, 3"), ("so 7", None),
  )  # fmt: skip
  def test_stated_answer(self, solution, expected):
    self.assertEqual(answers.stated_answer(solution), expected)


class AssertionsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("It isn't 7", True), ("x is not 3, so it is 7", False),
    ("the largest number that cannot be obtained is 7", False),
    ("7 is wrong", True), ("the claim that it is 7 is false", True),
    ("nobody knows whether it is 7", True),
    ("no doubt it is 7", False), ("this contradicts x = 7", True),
    ("the answer is none other than 7", False),
    ("some people think that it is 7", True), ("so I think it is 7", False), ("7, not 8", False),
  )  # fmt: skip
  def test_denials(self, text, expected):
    # Fails if a denial elsewhere in the sentence counts, or one beside the value does not.
    start = text.index("7")
    self.assertEqual(assertions.is_denied(text, start, start + 1), expected)


if __name__ == "__main__":
  absltest.main()
