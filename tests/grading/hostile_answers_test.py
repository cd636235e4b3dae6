"""Hostile answers cause no hang, crash or accidental verdict; with --long, an hour of fuzzing."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

import pytest
from absl.testing import absltest, parameterized

from synthneg_jax.grading import answers
from synthneg_jax.grading.answer_equality import Conventions
from synthneg_jax.grading.verdicts import grade_response
from tests.grading import hostile_answers

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[2]
GOLDS = ("7", "x+1", r"\sqrt{2}", r"\{1,2\}", "[0,1)", "x=8")
RULES = Conventions()

FUZZ = r"""
import sys
import tempfile
import atheris
with atheris.instrument_imports(include=["synthneg_jax.grading"]):
  from synthneg_jax.grading.answer_equality import Conventions
  from synthneg_jax.grading.verdicts import grade_response
RULES = Conventions()
GOLDS = ("7", "x+1", r"\sqrt{2}", r"\{1,2\}", "[0,1)", "x=8")
def one(data):
  provider = atheris.FuzzedDataProvider(data)
  gold = GOLDS[provider.ConsumeIntInRange(0, 5)]
  text = provider.ConsumeUnicode(500)
  for response in (text, r"\boxed{" + text + "}"):
    grade_response(response, gold, kind="math", rules=RULES)
    grade_response(response, "7", kind="integer", rules=RULES)
atheris.Setup(sys.argv, one)
atheris.Fuzz()
"""


class HostileTest(parameterized.TestCase):
  def test_ten_thousand_strings(self):
    # Fails if a string makes the grader raise or takes long (a value computed before its size is
    # capped, a backtracking regex, infinite recursion), or if gibberish is graded as right.
    worst, right = 0.0, []
    for index, text in enumerate(hostile_answers.strings(10_000, seed=3)):
      gold, start = GOLDS[index % len(GOLDS)], time.process_time()
      reason, _ = grade_response(
        text if index % 2 else rf"\boxed{{{text}}}", gold, kind="math", rules=RULES
      )
      worst = max(worst, time.process_time() - start)
      self.assertIn(reason, answers.REASONS)
      if reason == "right":
        right.append((text[:200], gold))
    self.assertLess(worst, 5.0)
    self.assertEmpty([pair for pair in right if len(pair[0]) > 8], right)

  @parameterized.parameters(
    "." * 80 + "f", "xxx" * 30 + "7..." * 20 + "f",
    "((x!)!)! + y", "!d!$x! b! n! y!", r"\binom{x}{y!}^{y!}",
    "9**9**9", "10^{10^{10}}", "1e999999999", "9^{9^{9^{9}}}", "(" * 50_000, "{" * 50_000,
    r"\frac{" * 20_000,
    "1+" * 50_000 + "1",
    "x" * 100_000, "\x00" * 10, "7\x00", "\ud800", "٧", "𝟕", "7\u202e8", "99999999!",
    "((10!)!)!", r"\sqrt[10^9]{2}", "-" * 100_000,
    r"\boxed{" * 5000, "$" * 100_000, " " * 100_000 + "7x",
    "the answer is " * 20_000, "answer" + " " * 100_000, "A:" + "\n" * 100_000,
    "#### 7\n" * 30_000 + "#### 8",
    r"\begin{pmatrix}" + "1&" * 400 + r"1\end{pmatrix}", "1," * 900 + "1",
    r"2\pm" * 300 + "1",
    r"\sin" * 500 + "x", "x^" * 500 + "x", "|" * 900, "1<" * 400 + "x", r"\cup" * 400,
    "=" * 900, "0." + "3" * 5000, "1/" * 400 + "1",
    r"\text{" * 300, "**" * 50_000, r"\$" * 50_000,
    r"\(" * 50_000, r"\\" * 50_000,
    r"sgn\{\}", "sgn{}", r"\sin\emptyset", "sgn()",
    "1" * 50 + "=0i", "1" * 20 + ".5+0i", "[0i,2)", "0i<x<3", "x>2+0i", r"\max(1+0i,2)", "3+0i:4",
    r"\floor(2+0i)",
  )  # fmt: skip
  def test_is_quick_and_never_right(self, text):
    # Fails if a string hangs, raises, or is graded as 7.
    for response in (text, rf"\boxed{{{text}}}", f"#### {text}", f"The answer is {text}"):
      start = time.process_time()
      reason, _ = grade_response(response, "7", kind="math", rules=RULES)
      self.assertLess(time.process_time() - start, 4.0)
      self.assertNotEqual(reason, "right", response[:50])

  def test_same_verdict_in_a_worker(self):
    # Fails if a worker's memory or time limit changes a verdict.
    texts = [rf"\boxed{{{text}}}" for text in hostile_answers.strings(500, seed=4)]
    here = [grade_response(text, "7", kind="math", rules=RULES)[0] for text in texts]
    there = [
      verdict.reason
      for verdict in answers.grade_many(texts, ["7"] * 500, kind="math", timeout_s=20.0)
    ]
    self.assertEqual(here, there)

  @pytest.mark.long
  def test_an_hour_of_fuzzing(self):
    # Fails if fuzzing finds an exception or a text that takes more than 10 s. Needs `pip install
    # atheris`.
    pytest.importorskip("atheris")
    done = subprocess.run(
      [sys.executable, "-c", FUZZ, "-max_total_time=3600", "-timeout=10", "-rss_limit_mb=4096",
      "-max_len=600"],
      env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
      cwd=self.enterContext(tempfile.TemporaryDirectory()),
    )  # fmt: skip
    self.assertEqual(done.returncode, 0, done.stderr[-3000:])


if __name__ == "__main__":
  absltest.main()
