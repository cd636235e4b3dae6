"""Tests of exact and many-digit values: oracles in fractions, near misses, caps."""

import fractions
import random
import time

from absl.testing import absltest, parameterized

from synthneg_jax.grading import answer_numbers
from synthneg_jax.grading.answer_grammar import parse
from synthneg_jax.grading.answer_numbers import Undefined, exact
from synthneg_jax.grading.answer_tokens import TooLarge
from synthneg_jax.grading.answer_tree import Node, Operation, number


def random_tree(random_: random.Random, depth: int) -> tuple[Node, fractions.Fraction | None]:
  """An expression and its value by Python's arithmetic; None if it divides by zero."""
  if depth == 0 or random_.random() < 0.2:
    value = fractions.Fraction(random_.randrange(-9, 10), random_.randrange(1, 5))
    return number(value), value
  op = random_.choice(["add", "mul", "div", "pow"])
  left, a = random_tree(random_, depth - 1)
  if op == "pow":
    power = random_.randrange(-3, 4)
    value = None if a is None or (a == 0 and power < 0) else a**power
    return Operation("pow", (left, number(power))), value
  right, b = random_tree(random_, depth - 1)
  value = None
  if a is not None and b is not None and not (op == "div" and b == 0):
    value = {"add": lambda: a + b, "mul": lambda: a * b, "div": lambda: a / b}[op]()
  return Operation(op, (left, right)), value


class ValuesTest(parameterized.TestCase):
  def test_exact_is_python_s_arithmetic(self):
    # Fails if an operation of `exact` differs from that of Fraction, or a division by zero has a
    # value.
    random_, defined = random.Random(0), 0
    for _ in range(2000):
      tree, value = random_tree(random_, 4)
      try:
        self.assertEqual(exact(tree), value)
        defined += 1
      except Undefined:
        self.assertIsNone(value)
      except TooLarge:
        pass
    self.assertGreater(defined, 1000)

  def test_digits_agree_with_exact(self):
    # Fails if an operation of Digits differs from that of `exact`.
    random_ = random.Random(1)
    for _ in range(300):
      tree, value = random_tree(random_, 3)
      if value is not None:
        digits = answer_numbers.Digits(60)
        self.assertLess(abs(digits.value(tree) - digits.value(number(value))), 1e-30)

  @parameterized.parameters(
    (r"\pi \cdot 10^{-50}", r"2\pi \cdot 10^{-50}"), (r"e^{\pi\sqrt{163}}", "262537412640768744"),
    (r"\ln 2 + 10^{-60}", r"\ln 2"), (r"\pi + 10^{-200}", r"\pi"),
    (r"\sqrt2 + 10^{-300}", r"\sqrt2"),
    (r"\sqrt{10^{40}+1}", r"10^{20}"), (r"\frac{\pi}{2^{99}}", r"\frac{\pi}{2^{98}}"),
    ("x + 10^{-100}", "x"),
    (r"\sqrt{5}+\sqrt{6}+\sqrt{18}", r"\sqrt{4}+\sqrt{12}+\sqrt{12}"),
    (r"\frac{e}{200!}", r"\frac{e}{199!}"),
    (r"\sqrt{1000001}+\sqrt{1000025}+\sqrt{1000031}",
    r"\sqrt{1000000}+\sqrt{1000026}+\sqrt{1000031.0000001}"),
  )  # fmt: skip
  def test_near_misses_differ(self, a, b):
    # Fails if too few digits are computed, or a difference is compared with an absolute bound.
    self.assertFalse(answer_numbers.equal(parse(a), parse(b)))

  @parameterized.parameters(
    (r"\sqrt{11+2\sqrt{29}}+\sqrt{16-2\sqrt{29}+2\sqrt{55-10\sqrt{29}}}",
    r"\sqrt{5}+\sqrt{22+2\sqrt{5}}"),
    (r"\sqrt[3]{2+\sqrt{5}}", r"\frac{1+\sqrt5}{2}"),
    (r"\sqrt[3]{\sqrt[3]{2}-1}", r"\frac{1-\sqrt[3]{2}+\sqrt[3]{4}}{\sqrt[3]{9}}"),
    (r"4\arctan\frac15-\arctan\frac1{239}", r"\frac{\pi}{4}"),
    (r"\cos\frac{\pi}{7}\cos\frac{2\pi}{7}\cos\frac{3\pi}{7}", r"\frac18"),
    (r"\sin^4 x+\cos^4 x", r"1-\frac{\sin^2 2x}{2}"), (r"\frac{x^3-y^3}{x-y}", "x^2+xy+y^2"),
    (r"\ln\frac{a}{b}", r"\ln a-\ln b"),
  )  # fmt: skip
  def test_identities_hold(self, a, b):
    # Fails if an identity is missed, whether exact by the separation bound or to many digits.
    self.assertTrue(answer_numbers.equal(parse(a), parse(b)))

  def test_separation_bound_is_a_bound(self):
    # Fails if the bound exceeds the value of a random nonzero sum of three roots.
    random_ = random.Random(2)
    for _ in range(200):
      text = "".join(
        f"{random_.choice('+-')}{random_.randrange(1, 9)}\\sqrt{{{random_.randrange(2, 99)}}}"
        for _ in range(3)
      )
      tree = parse(text)
      above, below, degree = answer_numbers.separation(tree)
      digits = answer_numbers.Digits(200)
      value = digits.value(tree)
      if abs(value) > 1e-150:
        self.assertGreaterEqual(digits.ctx.log(abs(value), 2), -(below + (degree - 1) * above))

  @parameterized.parameters(
    "9^{9^9}",
    "(10^6)!",
    r"\binom{10^9}{3}",
    "2^{10^9}",
    r"\exp(10^9)",
    r"\sin(10^{50})",
    "x^{10^9}",
  )
  def test_large_sizes_are_rejected_at_once(self, text):
    # Fails if a size is not checked before the value is computed.
    with self.assertRaises(TooLarge):
      answer_numbers.equal(parse(text), parse(r"\pi"))


class TurningPointsTest(parameterized.TestCase):
  @parameterized.parameters(
    "(x-1)(x+2)^2/4", "x^3y^9-20\\%x", "-2^{10}x+5!", "x/y", "(x^2)^4-x", "7", "x^0", "3x^{2.0}"
  )
  def test_polynomials(self, text):
    # Fails if an operation or a symbol is confused with another.
    node, at = parse(text), {"x": fractions.Fraction(7, 5), "y": fractions.Fraction(-3, 4)}
    value = answer_numbers.polynomial(node, "x", at).eval(at["x"])
    self.assertAlmostEqual(float(value), float(answer_numbers.Digits(30, at).value(node)), places=9)

  @parameterized.parameters(
    "x^9", "(x+1)^{60}", "\\pi x", "1/x", "2^x", "x!", "2^{300}x", "x/0", "|x|"
  )
  def test_other_expressions_are_none(self, text):
    # Fails if a limit is ignored, or a part without rational coefficients is dropped.
    self.assertIsNone(answer_numbers.polynomial(parse(text), "x", {}))

  @parameterized.parameters(
    ("|x-5000|", "5000-x", False), ("|x-5000|", "|5000-x|", True),
    (r"\sqrt{(x-54321)^2}", "54321-x", False),
    (r"\max(x, 70000)", "70000", False), (r"\max(x, 70000)", r"\frac{x+70000+|x-70000|}{2}", True),
    ("|x^2-9000000|", "9000000-x^2", False), ("|x-y-40000|", "40000+y-x", False),
    ("|y-x-40000|", "|40000+x-y|", True),
    (r"|x-5000|+|x-5002|", r"2", False), (r"\sqrt{x^2}", "|x|", True),
    ("x^{1/2}", r"\sqrt{x}", True),
  )  # fmt: skip
  def test_both_sides_of_a_turn(self, left, right, same):
    # Fails if expressions that differ only beyond all fixed points are equal, or equal ones are
    # not.
    self.assertEqual(answer_numbers.equal(parse(left), parse(right)), same)

  @parameterized.parameters(
    "|x^{9999}-2|-|2-x^{9999}|",
    "|(x+1)^{99999}|",
    "|((((x+1)^8)^8)^8)^8|",
    "|(x+1)^{60}|",
    r"|x!|",
    "|2^{x}-3|",
    r"\sqrt{9^{9^{9}}x}",
  )
  def test_hard_ones_are_left_alone(self, text):
    # Fails if a large power is expanded, or an exception escapes.
    start = time.process_time()
    self.assertLen(answer_numbers.turning_points(parse(text), {"x": fractions.Fraction(1, 3)}), 0)
    self.assertLess(time.process_time() - start, 4.0)


if __name__ == "__main__":
  absltest.main()
