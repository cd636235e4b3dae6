"""Tests of grading answers of kind "math": pairs, hedges, extraction, conventions."""

import itertools
import pathlib
import random
import re
import unittest.mock

import sympy
from absl.testing import absltest, parameterized

from synthneg_jax.grading import answer_grammar, answers, verdicts
from synthneg_jax.grading.answer_equality import Conventions
from synthneg_jax.runtime import errors

RULES = Conventions()


def graded(response: str, gold: str, rules: Conventions = RULES) -> tuple[str, str | None]:
  return verdicts.grade_response(response, gold, kind="math", rules=rules)


def reason(response: str, gold: str, **conventions) -> str:
  return graded(response, gold, Conventions(**conventions))[0]


def pairs() -> list[tuple[str, str, list[str], list[str]]]:
  """(kind, gold, equal answers, unequal answers) of every line of answer_pairs.txt."""
  found, kind = [], ""
  for line in pathlib.Path(__file__).with_name("answer_pairs.txt").read_text("utf-8").splitlines():
    if re.fullmatch(r"\[\w+\]", line):
      kind = line[1:-1]
    elif line and not line.startswith("#"):
      gold, rest = line.split(" == ")
      equal, unequal = rest.split(" != ")
      found.append((kind, gold, equal.split(" ;; "), unequal.split(" ;; ")))
  return found


PAIRS = pairs()
KINDS = sorted({kind for kind, *_ in PAIRS})


class PairsTest(parameterized.TestCase):
  def test_there_are_enough(self):
    # Fails if the file is not read: the tests below would test nothing.
    self.assertGreaterEqual(sum(len(equal) for _, _, equal, _ in PAIRS), 300)
    self.assertGreaterEqual(sum(len(unequal) for _, _, _, unequal in PAIRS), 600)
    self.assertGreater(len(KINDS), 15)

  @parameterized.parameters(*KINDS)
  def test_pairs(self, kind):
    # Fails if a rule of the grammar or of equality is removed, or is too permissive.
    for _, gold, equal, unequal in (line for line in PAIRS if line[0] == kind):
      for answer, right in itertools.chain(
        ((a, True) for a in equal), ((a, False) for a in unequal)
      ):
        for response in (answer, rf"So we have it. \boxed{{{answer}}}"):
          found = reason(response, gold)
          self.assertEqual(found == "right", right, f"{gold} | {response}: {found}")

  @parameterized.parameters(*KINDS)
  def test_gold_is_right_against_itself(self, kind):
    for _, gold, _, _ in (line for line in PAIRS if line[0] == kind):
      for response in (
        rf"\boxed{{{gold}}}",
        rf"The final answer is ${gold}$." if "$" not in gold else gold,
      ):
        self.assertEqual(reason(response, gold), "right", f"{gold} | {response}")

  def test_other_golds_are_never_right(self):
    # Fails if different gold answers are equal.
    every = list(itertools.permutations(PAIRS, 2))
    for (_, a, equal, _), (_, b, also_equal, _) in random.Random(0).sample(every, 3000):
      if a == b or a in also_equal or b in equal or set(equal) & set(also_equal) or "pmod" in a + b:
        continue  # these are equal: 3 is right for 3 modulo 7
      self.assertNotEqual(reason(rf"\boxed{{{a}}}", b), "right", f"{a} for {b}")

  def test_a_changed_digit_is_never_right(self):
    # Fails if any digit of an answer does not count.
    random_, changed = random.Random(0), 0
    for kind, gold, equal, _ in PAIRS:
      if kind in (
        "bases_ratios_times",
        "functions_of_integers",
        "logarithms_and_trigonometry",
        "complex",
        "choices",
      ):
        # the value may stay the same: 3:45 mod 12 hours, 1/2004!
        continue
      for answer in [gold, *equal]:
        for place in [m.start() for m in re.finditer(r"\d", answer)]:
          other = random_.choice([d for d in "123456789" if d != answer[place]])
          wrong = answer[:place] + other + answer[place + 1 :]
          if _means_the_same(wrong, gold):
            continue
          changed += 1
          self.assertNotEqual(reason(rf"\boxed{{{wrong}}}", gold), "right", f"{wrong} for {gold}")
    self.assertGreater(changed, 800)


def _means_the_same(changed: str, gold: str) -> bool:
  """Whether the changed digit may not matter: names, powers of 1, steps before the answer."""
  return (
    any(
      text in changed
      for text in (r"\cup[2,5]", r"[1,3]\cup", r"]\cup[3,5]", "1^", "0^", "_1", "_2", "x_")
    )
    or changed.count("=") > 1
  )


class HedgesTest(parameterized.TestCase):
  @parameterized.parameters(
    *itertools.product(
      [
        r"\boxed{7 \text{ or } 8}", r"\boxed{x=7 \lor x=8}", r"\boxed{7}\boxed{8}",
        r"\boxed{7}. No: \boxed{8}", "#### 7 or 8",
        "The answer is 7 or 8.", "The answer is either 7 or 8", r"\boxed{8=7}", r"\boxed{7=8}",
        r"\boxed{7,8}",
        r"\boxed{\{7,8\}}",
        r"\boxed{7 \text{ maybe}}", r"\boxed{7 \text{ or more}}", r"\boxed{\text{not } 7}",
        r"\boxed{7\text{ or so}}",
        r"\boxed{7 \text{ and } 8}", r"\boxed{\pm 7}", r"\boxed{7 \pm 1}", "#### 7\n#### 8",
        r"\boxed{(7,8)}", r"\boxed{7;8}",
        r"\boxed{7 \text{ million}}", r"\boxed{x \approx 7 \text{ or } x \approx 8}",
        "The answer is 7. The answer is 8.",
        "Answer: 7\nAnswer: 8", r"\boxed{7 \Rightarrow 8 \text{ or } 7}",
        r"\boxed{7, \text{ or } 8}", "A: 7 or 8",
        r"\boxed{\text{7 or 8}}", "I guess 7 or maybe 8.", "It is not 7",
        r"\boxed{7 \ne 8}", r"\boxed{7<8}", r"\boxed{7 | 8}",
        r"\boxed{[7,8]}", r"\boxed{7 \cup 8}", r"\boxed{7\; 8}", r"\boxed{7 \text{ unless } 8}",
        r"\boxed{7?}",
        r"\boxed{7 \vee 8}",
        r"\boxed{7}\boxed{8}\boxed{7}", r"\boxed{8}. \boxed{7}. \boxed{8}",
      ],
      ["7", "8"],
    )
  )  # fmt: skip
  def test_a_hedge_is_not_right(self, response, gold):
    # Fails if one of several values is picked for the answer.
    self.assertNotEqual(reason(response, gold), "right")

  @parameterized.parameters(
    r"\boxed{7 \text{ or } 8}",
    r"\boxed{x=7 \lor x=8}",
    r"\boxed{7}\boxed{8}",
    "The answer is 7 or 8.",
  )
  def test_it_is_called_ambiguous(self, response):
    self.assertEqual(reason(response, "7"), "ambiguous")

  def test_a_list_is_right_where_a_list_is_wanted(self):
    for response in (r"\boxed{7 \text{ or } 8}", r"\boxed{7} and \boxed{8}", r"$x=7$ or $x=8$"):
      self.assertEqual(reason(response, "7, 8"), "right")


class ExtractionTest(parameterized.TestCase):
  @parameterized.parameters(
    (r"First \boxed{3}, so again \boxed{3}.", "3", "right"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{\sqrt2}{2}", "right"),
    (r"\fbox{3}", "3", "right"), (r"\boxed 3", "3", "right"),
    (r"\boxed{a+b = 3}", "3", "right"), (r"\boxed{2x = 3}", "3", "wrong"),
    (r"\boxed{ \text{The area is } 3}", "3", "right"),
    (r"\boxed{3", "3", "unparsable"), (r"\boxed{}", "3", "no_answer"), ("", "3", "no_answer"),
    ("   \n ", "3", "no_answer"),
    (r"<think>\boxed{4}</think> \boxed{3}", "3", "right"),
    (r"\boxed{3}<|im_end|>\boxed{4}", "3", "right"),
    ("#### 3", "3", "right"), ("So.\n#### $\\frac{6}{2}$", "3", "right"),
    ("The final answer is $3$. I hope it is correct.", "3", "right"),
    ("The answer is: **3**", "3", "right"), ("The answer is 3 apples.", "3", "right"),
    ("Answer: $x = 3$", "3", "right"),
    ("A: 3\n", "3", "right"), ("Final Answer: The largest $n$ is 3.", "3", "right"),
    ("Thus $x=3$.", "3", "right"),
    ("We get\n\\[ x = 3. \\]", "3", "right"), ("We get $$3$$", "3", "right"),
    ("so that 2+1 = 3", "3", "right"),
    ("There are 3 of them", "3", "right"), ("I do not know", "3", "no_answer"),
    ("As above.", "3", "wrong"),
  )  # fmt: skip
  def test_where_the_answer_is(self, response, gold, wanted):
    # Fails if a rule of statements.py is removed, or the order of rules changes.
    self.assertEqual(reason(response, gold), wanted)

  def test_marked_only(self):
    # Fails if the convention does not reach the extraction.
    self.assertEqual(reason("Thus $x=3$.", "3", extraction="marked"), "no_answer")
    self.assertEqual(reason("The answer is 3.", "3", extraction="marked"), "right")

  def test_extracted(self):
    # Fails if equal rational answers have different strings, which majority votes count.
    shown = [graded(rf"\boxed{{{a}}}", "9")[1] for a in ("0.5", r"\frac{2}{4}", "1/2", r"\frac12")]
    self.assertEqual(set(shown), {"1/2"})
    self.assertEqual(graded(r"\boxed{ x + \, 1 }", "9")[1], "x+1")

  @parameterized.parameters("", "  ", "$ $", "x" * 3000, "(" * 100)
  def test_bad_gold(self, gold):
    # Fails if a gold answer that cannot be read makes every response wrong instead.
    with self.assertRaisesRegex(errors.UserError, "gold answer"):
      graded("5", gold)


class ConventionsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("20", r"20\%", {"percent": "fraction"}, "wrong"),
    ("0.2", r"20\%", {"percent": "fraction"}, "right"),
    ("0.2", r"20\%", {"percent": "number"}, "wrong"),
    ("20", r"20\%", {"percent": "number"}, "right"),
    ("5", r"5\text{ cm}", {"units": "required"}, "wrong"),
    ("5 cm", r"5\text{ cm}", {"units": "required"}, "right"),
    ("5 kg", r"5\text{ cm}", {"units": "ignored"}, "right"), ("5 kg", r"5\text{ cm}", {}, "wrong"),
    ("(2,1)", "(1,2)", {"tuples": "unordered"}, "right"),
    (r"\{1,2\}", "(1,2)", {"tuples": "unordered"}, "right"),
    ("2, 3, 1", "1, 2, 3", {"lists": "ordered"}, "wrong"), ("2, 3, 1", "1, 2, 3", {}, "right"),
    ("3, 5, 4", "5, 3, 4", {"lists": "unordered"}, "right"), ("3, 5, 4", "5, 3, 4", {}, "wrong"),
    ("1.414", r"\sqrt2", {"decimal_digits": 3}, "right"),
    ("1.41", r"\sqrt2", {"decimal_digits": 4}, "wrong"),
    ("1.415", r"\sqrt2", {"decimal_digits": 3}, "wrong"), ("1.414", r"\sqrt2", {}, "wrong"),
    ("1.41421356237310", r"\sqrt2", {}, "right"),
    ("1.41421356237310", r"\sqrt2", {"decimal_digits": 0}, "wrong"),
    ("0.1", "0.1000000000001", {}, "wrong"),
  )  # fmt: skip
  def test_conventions(self, answer, gold, conventions, wanted):
    # Fails if a field of Conventions is ignored.
    self.assertEqual(reason(rf"\boxed{{{answer}}}", gold, **conventions), wanted)


class NoExecutionTest(absltest.TestCase):
  def test_nothing_evaluates_text(self):
    # Fails if model text, or any part of it, reaches an evaluator, even where errors are caught.
    called = []

    def refused(*args, **_):
      called.append(args)
      raise AssertionError("model text was evaluated")

    texts = [answer for _, gold, equal, unequal in PAIRS for answer in (gold, *equal, *unequal)]
    texts += ["open('/nowhere/x', 'w')", "__import__('os')"]
    verdicts._math_gold.cache_clear()
    with (
      unittest.mock.patch("builtins.eval", refused),
      unittest.mock.patch("builtins.exec", refused),
      unittest.mock.patch("builtins.compile", refused),
      unittest.mock.patch.object(sympy, "sympify", refused),
      unittest.mock.patch.object(sympy, "lambdify", refused),
      unittest.mock.patch.object(sympy.parsing.sympy_parser, "parse_expr", refused),
      unittest.mock.patch.object(sympy.parsing.sympy_parser, "eval_expr", refused),
    ):
      for text, gold in zip(texts, itertools.cycle(["7", "x+1", r"\{1,2\}"])):
        for form in (r"\boxed{%s}", "#### %s", "The answer is %s", "%s"):
          self.assertIn(
            reason(form.replace("%s", text), gold),
            ("right", "wrong", "ambiguous", "unparsable", "too_large", "no_answer"),
          )
          verdicts.grade_response(
            form.replace("%s", text), "7", kind="integer", rules=answers.Conventions()
          )
    self.assertEmpty(called)

  def test_the_grader_names_no_evaluator(self):
    # Fails if a module of the grader calls an evaluator.
    paths = list(pathlib.Path(answer_grammar.__file__).parent.glob("*.py"))
    self.assertIn("verdicts.py", [path.name for path in paths])
    for path in paths:
      evaluators = r"(?<!re\.)\b(?:eval|exec|compile|sympify|parse_expr|lambdify)\("
      self.assertNotRegex(path.read_text(), evaluators, path.name)


if __name__ == "__main__":
  absltest.main()
