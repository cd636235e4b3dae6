"""Rational constants of answer trees, exactly; the size of a value is capped before it is computed."""

import fractions
import math

from synthneg_jax.grading.answer_tokens import TooLarge
from synthneg_jax.grading.answer_tree import Node

Fraction = fractions.Fraction

MAX_BITS = 1 << 16  # of a numerator or denominator
MAX_FACTORIAL = 3000


class Undefined(Exception):
  """The expression has no value: a division by zero, a matrix where a number is wanted."""


def exact(node: Node) -> Fraction | None:
  """The value of a rational constant; None where the tree holds anything else.

  Raises:
    TooLarge: the value has more than MAX_BITS.
    Undefined: it has none.
  """
  op, args = node
  if op == "num":
    return args[0]
  if op not in ("neg", "add", "mul", "div", "pow", "root", "fact", "binom", "call"):
    return None
  function = args[0] if op == "call" else None
  if op == "call" and function not in ("abs", "floor", "ceil", "gcd", "lcm", "max", "min"):
    return None
  values = []
  for arg in args[1:] if op == "call" else args:
    value = exact(arg)
    if value is None:
      return None
    values.append(value)
  made = _combine(op, function, values)
  if made is not None and max(made.numerator.bit_length(), made.denominator.bit_length()) > MAX_BITS:
    raise TooLarge("number")
  return made


def _combine(op: str, function: str | None, values: list[Fraction]) -> Fraction | None:
  a, b = values[0], values[-1]
  if op == "neg":
    return -a
  if op == "add":
    return a + b
  if op == "mul":
    return a * b
  if op == "div":
    if b == 0:
      raise Undefined("division by zero")
    return a / b
  if op == "pow":
    return _power(a, b)
  if op == "root":
    if b == 0:
      raise Undefined("root of degree zero")
    return _power(a, 1 / b)
  if op == "fact":
    return Fraction(math.factorial(_counted(a)))
  if op == "binom":
    return Fraction(math.comb(_counted(a), _counted(b)))
  if function in ("gcd", "lcm"):
    if any(value.denominator != 1 for value in values):
      raise Undefined("gcd of fractions")
    return Fraction((math.gcd if function == "gcd" else math.lcm)(*(value.numerator for value in values)))
  if function in ("max", "min"):
    return max(values) if function == "max" else min(values)
  if len(values) != 1:
    raise Undefined("several arguments")
  return abs(a) if function == "abs" else Fraction(math.floor(a) if function == "floor" else math.ceil(a))


def _counted(value: Fraction) -> int:
  if value.denominator != 1 or value < 0:
    raise Undefined("factorial of what is no count")
  if value > MAX_FACTORIAL:
    raise TooLarge("factorial")
  return value.numerator


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
  """A rational power of a rational where it is rational; of a negative base with an odd root, the real one."""
  if base == 0:
    if exponent < 0:
      raise Undefined("division by zero")
    return Fraction(int(exponent == 0))
  if exponent.denominator > 64:
    return None
  above, below = _root(abs(base.numerator), exponent.denominator), _root(base.denominator, exponent.denominator)
  if above is None or below is None or (base < 0 and exponent.denominator % 2 == 0):
    return None
  if (above, below) != (1, 1) and abs(exponent.numerator) * max(above, below).bit_length() > MAX_BITS:
    raise TooLarge("power")
  base = Fraction(-above if base < 0 else above, below)
  return Fraction(1) ** 1 if base == 1 else base ** (exponent.numerator if abs(base) != 1 else exponent.numerator % 2)


def _root(value: int, degree: int) -> int | None:
  """The exact integer root of a positive integer; None where there is none."""
  if degree == 1 or value == 1:
    return value
  if degree == 2:
    found = math.isqrt(value)
  else:
    low, high = 1, 1 << (value.bit_length() // degree + 1)
    while low < high:
      middle = (low + high + 1) // 2
      low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    found = low
  return found if found**degree == value else None
