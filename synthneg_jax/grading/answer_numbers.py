r"""Values of answer trees and their equality, by the first method that applies:

1. Rational constants are computed exactly; sizes are capped before a value is computed.
2. Constants built from rationals with + - * / and roots are algebraic. Two that differ do so by
   more than the separation bound of Burnikel, Funke, Mehlhorn, Schirra and Schmitt ("A Separation
   Bound for Real Algebraic Expressions", 2001), so that enough digits decide equality exactly.
3. All others (π, e, logarithms, trigonometry, symbols) are compared to many digits, with more
   digits for larger parts. Expressions in symbols are compared at fixed points, and on all sides of
   the turning points of |u|, roots and the like, which SymPy isolates. Agreement at all points
   counts as equality: a convention, because equality is undecidable in general.

SymPy only sees polynomials built from our own trees, never text.
"""

import fractions
import itertools
import math
import operator
import threading
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mpmath.ctx_mp import MPContext

from synthneg_jax.grading import answer_tree as tree
from synthneg_jax.grading.answer_tokens import TooLarge
from synthneg_jax.grading.answer_tree import Node, is_operation

Fraction = fractions.Fraction

MAX_BITS = 1 << 16  # of a numerator or denominator
MAX_FACTORIAL = 3000
MAX_DECIMALS = 3000
MAX_POWER = 10**6  # exponent of an inexact power
MAX_ARGUMENT = 10**6  # of an inexact function
MAX_GAMMA_DECIMALS = 450  # the Gamma function is slow beyond
MAX_ROOT = 64  # degree of an exact root
POINTS = 6  # for comparing expressions in symbols
_ARITHMETIC = {
  "neg": operator.neg, "add": operator.add, "mul": operator.mul, "div": operator.truediv,
}  # fmt: skip


class Undefined(Exception):
  """The expression has no value: a division by zero, or a matrix in place of a number."""


# Exact rationals


def exact(node: Node) -> Fraction | None:
  """The value of a rational constant; None for any other tree.

  Raises:
    TooLarge: the value has more than MAX_BITS.
    Undefined: the constant has no value.
  """
  if isinstance(node, tree.Number):
    return node.value
  if not isinstance(node, tree.Operation) or node.op not in _EXACT:
    return None
  values = []
  for operand in node.operands:
    value = exact(operand)
    if value is None:
      return None
    values.append(value)
  try:
    value = _EXACT[node.op](*values)
  except ZeroDivisionError:
    raise Undefined("division by zero") from None
  except TypeError:
    raise Undefined("wrong number of arguments") from None
  if value is not None and bits(value) > MAX_BITS:
    raise TooLarge("number")
  return value


def bits(value: Fraction) -> int:
  """Bit length of the numerator or the denominator, whichever is larger."""
  return max(value.numerator.bit_length(), value.denominator.bit_length())


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
  """The power if it is rational, else None; odd roots of negative numbers are real."""
  if base == 0:
    return base**exponent.numerator
  degree, times = exponent.denominator, exponent.numerator
  if degree > MAX_ROOT or (base < 0 and degree % 2 == 0):
    return None
  above, below = _integer_root(abs(base.numerator), degree), _integer_root(base.denominator, degree)
  if above is None or below is None:
    return None
  if above == below == 1:
    return Fraction(-1 if base < 0 and times % 2 else 1)
  if abs(times) * max(above, below).bit_length() > MAX_BITS:
    raise TooLarge("power")
  return Fraction(-above if base < 0 else above, below) ** times


def _integer_root(value: int, degree: int) -> int | None:
  """The root of a positive integer, or None if it is not an integer."""
  if degree == 1:
    return value
  if degree == 2:
    root = math.isqrt(value)
    return root if root**2 == value else None
  low, high = 1, 1 << (value.bit_length() // degree + 1)
  while low < high:
    middle = (low + high + 1) // 2
    if middle**degree <= value:
      low = middle
    else:
      high = middle - 1
  return low if low**degree == value else None


def _natural(value: Fraction) -> int:
  """The argument of a factorial as an integer."""
  if value.denominator != 1 or value < 0:
    raise Undefined("factorial of a negative number or fraction")
  if value > MAX_FACTORIAL:
    raise TooLarge("factorial")
  return value.numerator


def _integers(values) -> list[int]:
  if any(value.denominator != 1 for value in values):
    raise Undefined("gcd of fractions")
  return [value.numerator for value in values]


_EXACT = _ARITHMETIC | {
  "pow": _exact_power,
  "fact": lambda value: Fraction(math.factorial(_natural(value))),
  "binom": lambda above, below: Fraction(math.comb(_natural(above), _natural(below))),
  "gcd": lambda *values: Fraction(math.gcd(*_integers(values))),
  "lcm": lambda *values: Fraction(math.lcm(*_integers(values))),
  "max": lambda *values: max(values),
  "min": lambda *values: min(values),
  "abs": abs,
  "floor": lambda value: Fraction(math.floor(value)),
  "ceil": lambda value: Fraction(math.ceil(value)),
}


# Many digits

_LOCAL = threading.local()
_CIRCULAR = "sin cos tan cot sec csc".split()
_ELEMENTARY = {*_CIRCULAR, *("arc" + name for name in _CIRCULAR), "sinh", "cosh", "tanh", "coth"}


def sample_point(names: Iterable[str], index: int) -> dict[str, Fraction]:
  """Values of symbols at the point with this index, the same in every process.

  Points with even indices are positive, odd ones negative, and their distance from 0 grows, which
  distinguishes |x - 3| from 3 - x.
  """
  distance = (-1) ** index * (1, 19, 1009)[index // 2]
  point = {}
  for name in names:
    seed = zlib.crc32(f"{name}/{index}".encode())
    point[name] = Fraction(seed % 2_000_003 + 300_007, 1_000_003) * distance
  return point


class Digits:
  """Evaluates trees to a number of decimal digits, recording how large their parts are.

  Attributes:
    ctx: mpmath context.
    largest: the largest absolute binary magnitude of any part.
  """

  def __init__(self, decimals: int, at: Mapping[str, Fraction] | None = None):
    """at: values of symbols; default: those of sample point 0."""
    if not hasattr(_LOCAL, "context"):
      _LOCAL.context = MPContext()
    self.ctx, self.at, self.largest = _LOCAL.context, at or {}, 1.0
    self.ctx.dps = decimals

  def value(self, node: Node):
    """The value of a tree, an mpf or mpc.

    Raises:
      Undefined: the tree has no value or is not a number.
      TooLarge: a part exceeds a size limit.
    """
    try:
      return self._value(node)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError) as error:
      raise Undefined(str(error)) from None

  def _value(self, node: Node):
    if isinstance(node, tree.Number):
      value = self._rational(node.value)
    elif isinstance(node, tree.Symbol):
      value = self._symbol(node.name)
    elif isinstance(node, tree.Quantity):
      value = self._value(node.value)
    elif isinstance(node, tree.Operation):
      value = self._operation(node.op, [self._value(operand) for operand in node.operands])
    else:
      raise Undefined(f"{type(node).__name__} is not a number")
    if not self.ctx.isfinite(value):
      raise Undefined("not finite")
    magnitude = abs(self.ctx.mag(value)) if value else 0
    if magnitude > 4 * MAX_BITS:
      raise TooLarge("number")
    self.largest = max(self.largest, magnitude)
    return value

  def _rational(self, value: Fraction):
    return self.ctx.mpf(value.numerator) / value.denominator

  def _symbol(self, name: str):
    if name in ("pi", "e"):
      return +getattr(self.ctx, name)
    if name == "i":
      return self.ctx.mpc(0, 1)
    if name == "oo":
      raise Undefined("infinity is not a number")
    return self._rational(self.at[name] if name in self.at else sample_point([name], 0)[name])

  def _operation(self, op: str, values: list):
    if op in _ARITHMETIC:
      return _ARITHMETIC[op](*values)
    if op in _DIGITS:
      return _DIGITS[op](self, *values)
    if op not in _ELEMENTARY:
      raise Undefined(op)
    if abs(values[0]) > MAX_ARGUMENT:
      raise TooLarge("argument")
    return getattr(self.ctx, op.replace("arc", "a"))(*values)  # mpmath's arcsin is asin

  def _factorial(self, value):
    if abs(value) > MAX_FACTORIAL:
      raise TooLarge("factorial")
    if self.ctx.isint(value) and value >= 0:
      return self.ctx.mpf(math.factorial(int(self.ctx.re(value))))
    self._check_gamma()
    return self.ctx.gamma(value + 1)

  def _binomial(self, above, below):
    ctx = self.ctx
    if max(abs(above), abs(below)) > MAX_FACTORIAL:
      raise TooLarge("binomial")
    if ctx.isint(above) and ctx.isint(below) and min(above, below) >= 0:
      return ctx.mpf(math.comb(int(ctx.re(above)), int(ctx.re(below))))
    self._check_gamma()
    return ctx.binomial(above, below)

  def _check_gamma(self) -> None:
    if self.ctx.dps > MAX_GAMMA_DECIMALS:
      raise TooLarge("digits of a factorial")

  def _power(self, base, exponent):
    """base ** exponent, with real odd roots of negative bases."""
    ctx = self.ctx
    if abs(exponent) > MAX_POWER:
      raise TooLarge("power")
    if ctx.im(base) == 0 and ctx.re(base) < 0 and ctx.im(exponent) == 0 and not ctx.isint(exponent):
      for degree in (3, 5, 7, 9):
        times = ctx.re(exponent) * degree
        if abs(times - ctx.nint(times)) < ctx.mpf(10) ** (10 - ctx.dps):
          return (-1) ** int(ctx.nint(times)) * (-ctx.re(base)) ** exponent
    if base == 0 and ctx.re(exponent) <= 0:
      return ctx.mpf(1) if exponent == 0 else ctx.mpf("nan")
    return base**exponent

  def _log(self, value, base=None):
    return self.ctx.log(value) if base is None else self.ctx.log(value) / self.ctx.log(base)


_DIGITS = {
  "pow": Digits._power,
  "fact": Digits._factorial,
  "binom": Digits._binomial,
  "log": Digits._log,
  "abs": lambda digits, value: abs(value),
  "floor": lambda digits, value: digits.ctx.floor(value),
  "ceil": lambda digits, value: digits.ctx.ceil(value),
  "sgn": lambda digits, value: digits.ctx.sign(value),
  "max": lambda digits, *values: max(values),
  "min": lambda digits, *values: min(values),
  "percent": lambda digits, value: value / 100,
  "degree": lambda digits, value: value * digits.ctx.pi / 180,
}


# Equality


class Separation(NamedTuple):
  """A nonzero algebraic constant has absolute value of at least 1 / (l · u^(degree - 1))."""

  log2_u: float
  log2_l: float
  degree: int


def separation(node: Node) -> Separation | None:
  """The bound of a constant made of rationals, i, + - * / and integer roots; else None."""
  if isinstance(node, tree.Number):
    above, below = node.value.numerator.bit_length(), node.value.denominator.bit_length()
    return Separation(float(above), float(below), 1)
  if isinstance(node, tree.Symbol):
    return Separation(0.0, 0.0, 2) if node.name == "i" else None
  if not is_operation(node, "neg", "add", "mul", "div", "pow"):
    return None
  left = separation(node.operands[0])
  if left is None or node.op == "neg":
    return left
  if node.op == "pow":
    exponent = exact(node.operands[1])
    if exponent is None or exponent.denominator > MAX_ROOT or abs(exponent) > 1000:
      return None
    return _power_separation(left, exponent)
  right = separation(node.operands[1])
  if right is None:
    return None
  degree = left.degree * right.degree
  if node.op == "div":
    right = Separation(right.log2_l, right.log2_u, right.degree)
  if node.op in ("mul", "div"):
    return Separation(left.log2_u + right.log2_u, left.log2_l + right.log2_l, degree)
  above = max(left.log2_u + right.log2_l, right.log2_u + left.log2_l) + 1
  return Separation(above, left.log2_l + right.log2_l, degree)


def _power_separation(base: Separation, exponent: Fraction) -> Separation:
  times, degree = abs(exponent.numerator), exponent.denominator
  above, below = base.log2_u * times, base.log2_l * times
  if exponent <= 0:
    above, below = below, above
  if degree > 1 and above >= below:
    above = (above + (degree - 1) * below) / degree
  elif degree > 1:
    below = ((degree - 1) * above + below) / degree
  return Separation(above, below, base.degree * degree)


def equal(a: Node, b: Node) -> bool:
  """Whether two expressions have the same value, by the methods of the module docstring.

  Raises:
    Undefined: an expression has no value.
    TooLarge: a value exceeds a size limit.
  """
  if a == b:
    return True
  left, right = exact(a), exact(b)
  if left is not None and right is not None:
    return left == right
  names, other_names = tree.symbols(a), tree.symbols(b)
  if not names and not other_names:
    return _equal_at(a, b, {})
  points = [sample_point(names | other_names, index) for index in range(POINTS)]
  outcomes = set()
  for index, point in enumerate(points):
    outcomes.add(_agree(a, b, point, real=index % 2 == 1, may_skip=index >= 2))
    if False in outcomes:
      return False
  if True not in outcomes:
    raise Undefined("no value at any sample point")
  turns = turning_points(a - b, points[0])
  return all(_agree(a, b, turn, real=True) is not False for turn in turns)


def _agree(
  a: Node, b: Node, at: dict[str, Fraction], *, real: bool, may_skip: bool = True
) -> bool | None:  # fmt: skip
  """Whether two expressions agree at a point; None if they have no value there.

  Args:
    a, b: the expressions.
    at: the point.
    real: whether non-real values count as no value, unless an expression contains i.
    may_skip: whether to return None instead of raising TooLarge.
  """
  try:
    if real and not any(part == tree.Symbol("i") for part in tree.walk(a - b)):
      digits = Digits(20, at)
      if any(digits.ctx.im(digits.value(side)) for side in (a, b)):
        return None
    return _equal_at(a, b, at)
  except Undefined:
    return None
  except TooLarge:
    if may_skip:
      return None
    raise


def _equal_at(a: Node, b: Node, at: Mapping[str, Fraction]) -> bool:
  """Whether two expressions have the same value at a point."""
  rough = Digits(40, at)
  value = rough.value(a) - rough.value(b)
  if value and rough.ctx.mag(value) > max(rough.largest * 2 - 60, -60):
    return False
  difference = a - b
  bound = separation(difference)
  if bound is not None:
    bits = bound.log2_l + (bound.degree - 1) * bound.log2_u + rough.largest + 40
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


# Turning points

MAX_TURN_DEGREE = 8  # of polynomials whose roots are isolated
MAX_TURN_POWER = 64
MAX_TURNS = 24
MAX_COEFFICIENT_BITS = 256


def polynomial(node: Node, name: str, at: Mapping[str, Fraction]):
  """A polynomial in one symbol as a SymPy Poly over the rationals, other symbols at their values.

  None for any other tree, a degree above MAX_TURN_DEGREE or coefficients above
  MAX_COEFFICIENT_BITS.
  """
  import sympy  # takes half a second, and most answers do not need it

  if isinstance(node, tree.Symbol) and node.name == name:
    return sympy.Poly([1, 0], sympy.Symbol(name), domain="QQ")
  value = at.get(node.name) if isinstance(node, tree.Symbol) else exact(node)
  if value is not None:
    if bits(value) > MAX_COEFFICIENT_BITS:
      return None
    return sympy.Poly([sympy.Rational(*value.as_integer_ratio())], sympy.Symbol(name), domain="QQ")
  if isinstance(node, tree.Quantity):
    return polynomial(node.value, name, at)
  if is_operation(node, "percent"):
    return polynomial(node.operands[0] / tree.number(100), name, at)
  if not is_operation(node, "neg", "add", "mul", "div", "pow"):
    return None
  operands = [polynomial(operand, name, at) for operand in node.operands]
  if None in operands:
    return None
  left, right = operands[0], operands[-1]
  if node.op == "pow":
    exponent = exact(node.operands[1])
    if exponent is None or exponent.denominator != 1 or exponent < 0:
      return None
    if exponent > MAX_TURN_POWER or left.degree() * exponent > MAX_TURN_DEGREE:
      return None
    result = left ** int(exponent)
  elif node.op == "div":
    if right.degree() > 0 or right.is_zero:
      return None
    result = left.mul_ground(1 / right.LC())
  else:
    result = _ARITHMETIC[node.op](*operands)
  too_large = any(
    bits(Fraction(int(c.p), int(c.q))) > MAX_COEFFICIENT_BITS for c in result.all_coeffs()
  )
  return None if result.degree() > MAX_TURN_DEGREE or too_large else result


def _turning_parts(node: Node) -> list[Node]:
  """Expressions whose roots are turning points: u of |u|, ⌊u⌋, sgn u, √u; a - b of max(a, b)."""
  parts = []
  for part in tree.walk(node):
    if is_operation(part, "abs", "floor", "ceil", "sgn"):
      parts += part.operands
    elif is_operation(part, "max", "min"):
      parts += [a - b for a, b in itertools.combinations(part.operands, 2)]
    elif is_operation(part, "pow"):
      exponent = exact(part.operands[1])
      if exponent is None or exponent.denominator != 1:
        parts.append(part.operands[0])
  return parts


def _real_roots(node: Node, name: str, at: Mapping[str, Fraction]) -> list[Fraction]:
  """Approximate real roots in one symbol of a polynomial; none for any other tree."""
  try:
    poly = polynomial(node, name, at)
  except (Undefined, TooLarge):
    return []
  if poly is None or poly.degree() < 1:
    return []
  intervals = poly.intervals(eps=Fraction(1, 10**6))
  return [Fraction(int((a + b).p), int((a + b).q)) / 2 for (a, b), _ in intervals]


def turning_points(node: Node, at: Mapping[str, Fraction]) -> list[dict[str, Fraction]]:
  """Points on all sides of an expression's turning points, moving one symbol at a time.

  Fixed points alone cannot distinguish |x - 5000| from 5000 - x.

  Args:
    node: an expression.
    at: values of its symbols while another symbol moves.

  Returns:
    At most MAX_TURNS points; none if the expression has no turning points.
  """
  parts, points = _turning_parts(node), []
  for name in sorted(at) if parts else ():
    roots = sorted({root for part in parts for root in _real_roots(part, name, at)})
    if not roots:
      continue
    values = {(a + b) / 2 for a, b in zip(roots, roots[1:], strict=False)}
    for root in (roots[0], roots[-1]):
      step = 1 + abs(root) / 1000
      values |= {root - step, root + step}
    points += [{**at, name: value} for value in sorted(values)]
  return points[:MAX_TURNS]
