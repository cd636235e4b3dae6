r"""Values of answer trees: exact rationals, numbers to many digits, and whether two expressions are equal.

Three ways, the first that applies:

1. Rational constants are computed exactly, with a cap on their size that is checked before anything is computed.
2. Constants made of rationals by + - * / and roots are algebraic. If two of them differ, they differ by more than the
   separation bound of Burnikel, Funke, Mehlhorn, Schirra and Schmitt ("A Separation Bound for Real Algebraic
   Expressions", 2001), so that enough digits decide exactly.
3. All else (π, e, logarithms, trigonometry, symbols) is compared to many digits, more the larger its parts are, at
   points of our choosing where there are symbols, and on all sides of where |u|, roots and the like turn. Agreement there
   counts as equality. This is a decision: nobody can decide it in general, and answers that differ agree to so many
   digits only if they were made to.
"""

import fractions
import math
import threading
import zlib

from mpmath.ctx_mp import MPContext

from synthneg_jax.grading import answer_sympy
from synthneg_jax.grading.answer_rationals import MAX_BITS, MAX_FACTORIAL, Undefined, exact
from synthneg_jax.grading.answer_tokens import TooLarge
from synthneg_jax.grading.answer_tree import Node

Fraction = fractions.Fraction

MAX_DECIMALS = 3000  # digits that are computed
MAX_POWER = 10**6  # exponent of a power in digits' arithmetic
POINTS = 6  # points at which expressions in symbols are compared

_LOCAL = threading.local()


def _context() -> MPContext:
  if not hasattr(_LOCAL, "context"):
    _LOCAL.context = MPContext()
  return _LOCAL.context


def symbols(node: Node) -> frozenset[str]:
  """Names of the symbols of a tree, without the constants π, e, i and infinity."""
  if node.op == "sym":
    return frozenset() if node.args[0] in ("pi", "e", "i", "oo") else frozenset(node.args)
  found = [symbols(arg) for arg in node.args if isinstance(arg, Node)]
  return frozenset().union(*found)


def point(name: str, index: int) -> Fraction:
  """Where a symbol is put at a point: positive at even points, negative at odd ones, ever farther out, so that |x - 3| and
  3 - x are told apart; the same in every process."""
  seed = zlib.crc32(f"{name}/{index}".encode())
  return Fraction(seed % 2_000_003 + 300_007, 1_000_003) * (-1) ** index * (1, 19, 1009)[index // 2]


class Digits:
  """The value of a tree to a number of decimal digits; remembers how large its parts were.

  Attributes:
    largest: the largest absolute value, or inverse of one, of any part.
  """

  def __init__(self, decimals: int, at: int | dict[str, Fraction] = 0):
    """at: the point at which symbols are taken, by its number or as their values."""
    self.ctx, self.at, self.largest = _context(), at, 1.0
    self.ctx.dps = decimals

  def value(self, node: Node):
    """The value, an mpf or mpc.

    Raises:
      Undefined: it has none, or the tree is no number.
      TooLarge: a part is beyond what is computed.
    """
    try:
      made = self._value(node)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError) as error:
      raise Undefined(str(error)) from None
    return made

  def _value(self, node: Node):
    op, args, ctx = node.op, node.args, self.ctx
    if op == "num":
      made = ctx.mpf(args[0].numerator) / args[0].denominator
    elif op == "sym":
      made = self._symbol(args[0])
    elif op in ("neg", "add", "mul", "div", "pow", "root", "fact", "binom"):
      made = self._arithmetic(op, [self._value(arg) for arg in args])
    elif op == "degree":
      made = self._value(args[0]) * ctx.pi / 180
    elif op == "percent":
      made = self._value(args[0]) / 100
    elif op == "quantity":
      made = self._value(args[0])
    elif op == "call":
      made = self._call(args[0], [self._value(arg) for arg in args[1:]])
    else:
      raise Undefined(f"{op} is no number")
    if not ctx.isfinite(made):
      raise Undefined("not finite")
    size = abs(ctx.mag(made)) if made else 0
    if size > 4 * MAX_BITS:
      raise TooLarge("number")
    self.largest = max(self.largest, size)
    return made

  def _symbol(self, name: str):
    ctx = self.ctx
    if name == "pi":
      return +ctx.pi
    if name == "e":
      return +ctx.e
    if name == "i":
      return ctx.mpc(0, 1)
    if name == "oo":
      raise Undefined("infinity is no number")
    place = self.at[name] if isinstance(self.at, dict) else point(name, self.at)
    return ctx.mpf(place.numerator) / place.denominator

  def _arithmetic(self, op: str, values: list):
    ctx, a, b = self.ctx, values[0], values[-1]
    if op == "neg":
      return -a
    if op == "add":
      return a + b
    if op == "mul":
      return a * b
    if op == "div":
      return a / b
    if op == "fact":
      if abs(a) > MAX_FACTORIAL:
        raise TooLarge("factorial")
      if ctx.isint(a) and a >= 0:
        return ctx.mpf(math.factorial(int(ctx.re(a))))
      self._few_digits()
      return ctx.gamma(a + 1)
    if op == "binom":
      if max(abs(a), abs(b)) > MAX_FACTORIAL:
        raise TooLarge("binomial")
      if ctx.isint(a) and ctx.isint(b) and min(a, b) >= 0:
        return ctx.mpf(math.comb(int(ctx.re(a)), int(ctx.re(b))))
      self._few_digits()
      return ctx.binomial(a, b)
    if abs(b) > MAX_POWER:
      raise TooLarge("power")
    if op == "root":
      return self._real_root(a, 1 / b) if b else ctx.mpf("nan")
    return self._real_root(a, b)

  def _few_digits(self) -> None:
    """The Gamma function takes long to many digits."""
    if self.ctx.dps > 450:
      raise TooLarge("digits of a factorial")

  def _real_root(self, base, exponent):
    """base ** exponent; the real value where the exponent is a rational of odd denominator and the base is negative."""
    ctx = self.ctx
    if ctx.im(base) == 0 and ctx.re(base) < 0 and ctx.im(exponent) == 0 and not ctx.isint(exponent):
      for degree in (3, 5, 7, 9):
        times = ctx.re(exponent) * degree
        if abs(times - ctx.nint(times)) < ctx.mpf(10) ** (10 - ctx.dps):
          return (-1) ** int(ctx.nint(times)) * (-ctx.re(base)) ** exponent
    if base == 0 and ctx.re(exponent) <= 0:
      return ctx.mpf(1) if exponent == 0 else ctx.mpf("nan")
    return base**exponent

  def _call(self, name: str, values: list):
    ctx, a = self.ctx, values[0]
    if name in ("max", "min", "gcd", "lcm"):
      if any(ctx.im(value) for value in values) or name in ("gcd", "lcm"):
        raise Undefined(name)
      return max(values) if name == "max" else min(values)
    if name in ("log", "ln", "lg"):
      base = values[1] if len(values) == 2 else ctx.mpf(10) if name == "lg" else None
      return ctx.log(a) if base is None else ctx.log(a) / ctx.log(base)
    if len(values) != 1:
      raise Undefined("several arguments")
    if abs(a) > 10**6 and name not in ("abs", "norm", "sgn", "floor", "ceil"):
      raise TooLarge("argument")
    made = {
      "abs": abs, "norm": abs, "exp": ctx.exp, "floor": ctx.floor, "ceil": ctx.ceil, "sgn": ctx.sign,
      "sin": ctx.sin, "cos": ctx.cos, "tan": ctx.tan, "cot": ctx.cot, "sec": ctx.sec, "csc": ctx.csc,
      "arcsin": ctx.asin, "arccos": ctx.acos, "arctan": ctx.atan, "arccot": ctx.acot, "arcsec": ctx.asec,
      "arccsc": ctx.acsc, "asin": ctx.asin, "acos": ctx.acos, "atan": ctx.atan, "sinh": ctx.sinh, "cosh": ctx.cosh,
      "tanh": ctx.tanh, "coth": ctx.coth, "cis": ctx.expj,
    }.get(name)  # fmt: skip
    if made is None:
      raise Undefined(name)
    return made(a)


def separation(node: Node) -> tuple[float, float, int] | None:
  """(log2 u, log2 l, D) of an algebraic constant: if its value is not 0, it is at least 1 / (l · u^(D - 1)).

  None where the tree is no algebraic constant of rationals, + - * /, i and roots of integer degree.
  """
  op, args = node
  if op == "num":
    return _log2(args[0].numerator), _log2(args[0].denominator), 1
  if op == "sym":
    return (0.0, 0.0, 2) if args[0] == "i" else None
  if op == "neg":
    return separation(args[0])
  if op == "pow":
    exponent = exact(args[1])
    if exponent is None or exponent.denominator > 64 or abs(exponent) > 1000:
      return None
    under = separation(args[0])
    if under is None:
      return None
    times = abs(exponent.numerator)
    made = (under[0] * times, under[1] * times, under[2])
    made = made if exponent > 0 else (made[1], made[0], made[2])
    return _rooted(made, exponent.denominator)
  if op == "root":
    degree = exact(args[1])
    under = separation(args[0])
    if under is None or degree is None or degree.denominator != 1 or not 1 <= degree <= 64:
      return None
    return _rooted(under, degree.numerator)
  if op not in ("add", "mul", "div"):
    return None
  left, right = separation(args[0]), separation(args[1])
  if left is None or right is None:
    return None
  degree = left[2] * right[2]
  if op == "mul":
    return left[0] + right[0], left[1] + right[1], degree
  if op == "div":
    return left[0] + right[1], left[1] + right[0], degree
  return max(left[0] + right[1], right[0] + left[1]) + 1, left[1] + right[1], degree


def _log2(value: int) -> float:
  return float(value.bit_length()) if value else 0.0


def _rooted(under: tuple[float, float, int], degree: int) -> tuple[float, float, int]:
  above, below, count = under
  if degree == 1:
    return under
  if above >= below:
    return (above + (degree - 1) * below) / degree, below, count * degree
  return above, ((degree - 1) * above + below) / degree, count * degree


def equal(a: Node, b: Node) -> bool:
  """Whether two expressions have one value, by the three ways above.

  Raises:
    Undefined: one of them has no value.
    TooLarge: a value is beyond what is computed.
  """
  if a == b:
    return True
  left, right = exact(a), exact(b)
  if left is not None and right is not None:
    return left == right
  difference = Node("add", (a, Node("neg", (b,))))
  if symbols(a) != symbols(b) and not _same_without(a, b):
    return False
  if not symbols(difference):
    return _vanishes(difference, 0)
  known = False
  for index in range(POINTS):
    found = _vanishes_or_none(difference, index)
    if found is False:
      return False
    known |= found is not None
  if not known:
    raise Undefined("no value at any point")
  turns = answer_sympy.places(difference, {name: point(name, 0) for name in symbols(difference)})
  return all(_vanishes_or_none(difference, place) is not False for place in turns)


def _same_without(a: Node, b: Node) -> bool:
  """Whether symbols that one side has alone make no difference there, as x in x + 5 - x."""
  return all(_vanishes_or_none(Node("add", (a, Node("neg", (b,)))), index) in (True, None) for index in range(2))


def _vanishes_or_none(difference: Node, at: int | dict[str, Fraction]) -> bool | None:
  """As `_vanishes`; None where there is no value, or at a point with negative symbols a real function has no real one."""
  try:
    if (isinstance(at, dict) or at % 2) and not _holds(difference, "i"):
      values = Digits(20, at)
      if any(values.ctx.im(values.value(side)) for side in (difference.args[0], difference.args[1])):
        return None
    return _vanishes(difference, at)
  except Undefined:
    return None
  except TooLarge:
    if at in (0, 1):
      raise
    return None


def _holds(node: Node, name: str) -> bool:
  return node == Node("sym", (name,)) or any(_holds(arg, name) for arg in node.args if isinstance(arg, Node))


def _vanishes(difference: Node, at: int | dict[str, Fraction]) -> bool:
  """Whether an expression is 0 at a point."""
  rough = Digits(40, at)
  value = rough.value(difference.args[0]) + rough.value(difference.args[1])  # what is left of it is no part
  if value and rough.ctx.mag(value) > rough.largest * 2 - 60 and rough.ctx.mag(value) > -60:
    return False
  bound = separation(difference)
  if bound is not None:
    bits = bound[1] + (bound[2] - 1) * bound[0] + rough.largest + 40
    if bits * 0.302 < MAX_DECIMALS:
      fine = Digits(int(bits * 0.302) + 20, at)
      value = fine.value(difference)
      return not value or fine.ctx.mag(value) < -(bits - rough.largest - 35)
  decimals = 120 + int(rough.largest * 2)
  if decimals > MAX_DECIMALS:
    raise TooLarge("digits")
  fine = Digits(decimals, at)
  value = fine.value(difference)
  return not value or fine.ctx.mag(value) < -int(decimals * 1.6)
