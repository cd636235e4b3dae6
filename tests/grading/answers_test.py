"""Tests of grading answers of kind "integer"."""

import fractions
import json
import os
import pathlib
import time

from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from synthneg_jax.grading import answers, verdicts
from synthneg_jax.runtime import errors

BIG = "9007199254740992"

# (answer text after "#### ", gold, reason)
PAIRS = [
  ("18", "18", "right"), ("  18  ", "18", "right"), ("18.", "18", "right"), ("18\r", "18", "right"),
  ("19", "18", "wrong"), ("-18", "18", "wrong"), ("180", "18", "wrong"), ("1.8", "18", "wrong"),
  ("007", "7", "right"), ("+5", "5", "right"), ("-0", "0", "right"), ("0", "00", "right"),
  ("1,234", "1234", "right"), ("1234", "1,234", "right"), ("1,234,567.50", "1234567.5", "right"),
  ("12,34", "1234", "ambiguous"), ("1,2345", "12345", "ambiguous"), ("0,123", "123", "ambiguous"),
  ("1,,234", "1234", "ambiguous"), ("1.234,5", "1234.5", "ambiguous"),
  ("1.2.3", "1.2", "ambiguous"),
  ("7,8", "7", "ambiguous"), ("7,888", "7", "wrong"), ("1, 234", "1234", "ambiguous"),
  ("$5", "5", "right"), ("€5", "5", "right"), ("£5", "5", "right"), ("5$", "5", "right"),
  ("$5$", "5", "right"),
  ("-$5", "-5", "right"), ("$-5", "-5", "right"), ("\u22125", "-5", "right"),
  ("\u2212$5", "-5", "right"),
  ("- 5", "-5", "right"), ("--5", "5", "right"), ("-$-5", "5", "right"),
  ("72.0", "72", "right"), (".5", "1/2", "right"), ("$.50", "0.5", "right"),
  ("0.30", "3/10", "right"),
  ("0.3000000000000000000001", "0.3", "wrong"), ("9007199254740993", BIG, "wrong"),
  (BIG + ".0", BIG, "right"),
  ("3/4", "0.75", "right"), ("6 / 8", "3/4", "right"), ("-1/2", "-0.5", "right"),
  ("1/3", "0.3333333333", "wrong"),
  ("5/0", "5", "unparsable"), ("5/0.0", "5", "unparsable"), ("1/2/3", "1/2", "wrong"),
  ("4/2/2", "2", "wrong"),
  ("18 dollars", "18", "right"), ("5 eggs.", "5", "right"), ("20%", "20", "right"),
  ("20%", "0.2", "wrong"),
  ("5kg", "5", "right"), ("$5/hour", "5", "right"), ("60 km/h", "60", "right"),
  ("5 (eggs)", "5", "right"),
  ("5 cookies left over", "5", "right"),
  ("**18**", "18", "right"), ("**18.**", "18", "right"), ("**$18** dollars", "18", "right"),
  ("18**", "18", "right"),
  ("7 or 8", "7", "ambiguous"), ("7 or 8", "8", "ambiguous"), ("7, 8", "8", "ambiguous"),
  ("7 and 8", "7", "ambiguous"),
  ("5 = 6", "6", "ambiguous"), ("7 8", "7", "ambiguous"), ("7-8", "7", "wrong"),
  ("7 (8)", "7", "wrong"),
  ("7 or eight", "7", "ambiguous"), ("7 or more", "7", "ambiguous"),
  ("2 and a half", "2", "ambiguous"),
  ("5 million", "5", "wrong"), ("5k", "5", "unparsable"), ("5 pi", "5", "unparsable"),
  ("3 1/2", "3", "wrong"),
  ("5:00", "5", "ambiguous"), ("72/4 = 18", "18", "right"), ("5 = 5", "5", "right"),
  ("$5 = 5 dollars", "5", "right"),
  ("5 + 5", "5", "wrong"), ("5*5", "5", "wrong"), ("5**5", "5", "wrong"), ("5 - 5", "5", "wrong"),
  ("3e3", "3", "wrong"), ("1e3", "1000", "right"), ("1e999999999", "1", "too_large"),
  ("0x12", "18", "ambiguous"), ("1_000", "1000", "ambiguous"), ("5^5", "5", "wrong"),
  ("5!", "5", "wrong"),
  ("5\u00b2", "5", "wrong"), ("1\u00bd", "1", "wrong"), ("\u0665", "5", "unparsable"),
  ("5\u0665", "5", "unparsable"), ("about 18", "18", "unparsable"),
  ("negative 5", "5", "ambiguous"),
  (">5", "5", "unparsable"), ("(5)", "5", "right"), ("x = 5", "5", "right"), ("5\\", "5", "right"),
  ("nan", "5", "unparsable"), ("inf", "5", "unparsable"), ("eggs", "5", "unparsable"),
  ("...", "5", "no_answer"),
  ("__import__('os')", "5", "unparsable"), ("[5]*10**9", "5", "wrong"), ("\x00", "5", "unparsable"),
  ("", "5", "no_answer"), ("   ", "5", "no_answer"), ("****", "5", "no_answer"),
  ("\ud8005", "5", "unparsable"),
  ("1" * 1000, "1" * 1000, "right"), ("1" * 1001, "5", "too_large"),
  ("0" * 2000 + "5", "5", "too_large"),
  ("1880!", "5", "too_large"), ("2^{60000}", "5", "too_large"),
  ("9" * 100_000, "5", "too_large"), ("1/" + "9" * 5000, "5", "too_large"),
  ("0." + "3" * 5000, "0.3", "too_large"),
]  # fmt: skip

# (whole response, gold, reason)
RESPONSES = [
  ("\\boxed{18}", "18", "right"), ("\\boxed{18}\n\\boxed{19}", "19", "ambiguous"),
  ("x\nA: 1,800", "1800", "right"),
  ("The answer is 7 or 8.", "7", "ambiguous"), ("\\boxed{18}\n#### 19", "19", "ambiguous"),
  ("\\boxed{18", "18", "unparsable"),
  ("The answer is 18.", "18", "right"), ("So it is 18.", "18", "right"),
  ("A: 18", "18", "right"), ("", "18", "no_answer"), ("### 18", "18", "right"),
  ("a\n####18", "18", "right"), ("**#### 18**", "18", "right"), ("##### 18", "18", "right"),
  ("#### 18\nThat was 19.", "18", "right"), ("####\n18", "18", "right"),
  ("#### 5\n#### 6", "6", "ambiguous"), ("#### 5\n#### 6", "5", "ambiguous"),
  ("#### 5 #### 6", "6", "ambiguous"),
  ("#### 5\n#### 5.0", "5", "right"), ("#### 7 or 8\n#### 8", "8", "ambiguous"),
  ("#### 5\n####", "5", "right"),
  ("#### Step 1\n2+2\n#### 4", "4", "right"), ("#### " + "1" * 1001 + "\n#### 4", "4", "ambiguous"),
]  # fmt: skip

ROWS = [
  "Natalia sold 48/2 = <<48/2=24>>24 clips.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72",
  "It grew by 540*2 = <<540*2=1080>>1080.\n#### 1,080",
  "The balance is 5-9 = <<5-9=-4>>-4.\n#### -4",
]


def gold_solutions() -> list[str]:
  """The solutions of GSM8K if SYNTHNEG_DATA_DIR is set, else our own rows."""
  folder = os.environ.get("SYNTHNEG_DATA_DIR")
  if not folder:
    return ROWS
  files = [pathlib.Path(folder) / "gsm8k" / f"{split}.jsonl" for split in ("train", "test")]
  return [
    json.loads(line)["answer"] for path in files for line in path.read_text("utf-8").splitlines()
  ]


class GradeTest(parameterized.TestCase):
  # Fails if a rule of the grammar is removed: comma groups, sign order, the word list, MAX_NUMERAL.
  @parameterized.parameters(*PAIRS)
  def test_answer_text(self, text, gold, reason):
    verdict = answers.grade(f"2 + 2 = 4.\n#### {text}", gold)
    self.assertEqual(verdict.reason, reason)
    self.assertEqual(verdict.correct, reason == "right")
    self.assertIn(verdict.reason, answers.REASONS)

  # Fails if the first marker were read, or only the last one were.
  @parameterized.parameters(*RESPONSES)
  def test_response(self, response, gold, reason):
    self.assertEqual(answers.grade(response, gold).reason, reason)

  # Fails if `extracted` were the raw text: equal answers must be equal strings.
  def test_extracted(self):
    for text, expected in [
      ("1,080 eggs", "1080"),
      ("72.0", "72"),
      ("-$6/8", "-3/4"),
      ("eggs", "eggs"),
      ("", None),
    ]:
      self.assertEqual(answers.grade(f"#### {text}", "5").extracted, expected)
    self.assertIsNone(
      answers.grade("18", "5", rules=answers.Conventions(extraction="marked")).extracted
    )
    self.assertLen(answers.grade("#### " + "x" * 5000, "5").extracted, answers.MAX_EXTRACTED)

  # Fails if an unreadable gold answer made every response wrong instead.
  @parameterized.parameters("", "eggs", "7 or 8", "12,34", "1" * 2000)
  def test_bad_gold(self, gold):
    with self.assertRaisesRegex(errors.UserError, "gold answer"):
      answers.grade("#### 5", gold)

  # Fails if an unknown kind is graded as "integer".
  def test_bad_kind(self):
    with self.assertRaisesRegex(errors.UserError, '"real".*integer, math, exact'):
      answers.grade("#### 5", "5", kind="real")

  # Fails if two different numbers on one line can be right, whatever is between them.
  @settings(max_examples=300, deadline=None, database=None)
  @given(
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.text(" ,;=orand/().~|\t", min_size=1, max_size=6),
  )
  def test_two_numbers_are_never_one_of_them(self, a, b, between):
    text = f"#### {a} {between} {b}"
    for gold in {a, b}:
      allowed = gold == a == b or ("/" in between and b and gold == fractions.Fraction(a, b))
      self.assertTrue(allowed or not answers.grade(text, str(gold)).correct, text)

  # Fails if any string makes the grader raise.
  @settings(max_examples=300, deadline=None, database=None)
  @given(st.text(st.sampled_from("#0123456789,.-+/$% =*e\n\ror\u2212\u0665\u00bd")))
  def test_never_raises(self, text):
    self.assertIn(answers.grade("####" + text, "5").reason, answers.REASONS)

  # Fails if a regex backtracks over a long run (a non-possessive `\s*` before an optional sign, for
  # example).
  @parameterized.parameters(
      "#### " + " " * 300_000 + "x", "#" * 300_000, "#### " + "1," * 150_000,
      "#### " + "1 = " * 75_000,
      "#### " + "- $ " * 75_000, "#### " + "1/" * 150_000, "#### 5" + "a" * 300_000 + "!",
      "#### " + "**" * 150_000,
      "#### " + "1" * 999 + " ,.-" * 75_000 + "=", "#### 5\n" * 40_000 + "#### 5.0",
  )  # fmt: skip
  def test_hostile_text_is_quick(self, text):
    start = time.process_time()
    self.assertIn(answers.grade(text, "5").reason, answers.REASONS)
    self.assertLess(time.process_time() - start, 3.0)

  # Fails if every call compiles a regex or parses the gold answer. The bound is far below the
  # measured speed.
  def test_throughput(self):
    response = "She sold 48 / 2 = 24 clips in May.\n" * 4 + "#### 72 clips"
    start = time.process_time()
    for _ in range(5000):
      answers.grade(response, "72")
    self.assertLess(time.process_time() - start, 1.0)
    self.assertGreater(verdicts._integer_gold.cache_info().hits, 4000)


class ExtractGoldTest(absltest.TestCase):
  # Fails if commas stayed, or the first number of the solution were taken.
  def test_own_rows(self):
    self.assertEqual([answers.extract_gold(row) for row in ROWS], ["72", "1080", "-4"])

  # Fails if any gold solution is misread (a sign or thousands commas dropped, for example).
  def test_gold_is_right_against_itself(self):
    for solution in gold_solutions():
      gold = answers.extract_gold(solution)
      self.assertEqual(gold, solution.rpartition("####")[2].strip().replace(",", ""))
      self.assertEqual(answers.grade(solution, gold), answers.Verdict(True, "right", gold))

  # Fails if a solution without an answer gave some text or None.
  def test_no_answer(self):
    for solution in ("The answer is 5.", "#### eggs", "#### 5 or 6", "#### 5\n#### 6"):
      with self.assertRaisesRegex(errors.UserError, "no readable answer"):
        answers.extract_gold(solution)


if __name__ == "__main__":
  absltest.main()
