r"""Values of answer trees: exact rationals, numbers to many digits, and whether two are equal.

Three ways, the first that applies:

1. Rational constants are computed exactly; the size of a value is capped before it is computed.
2. Constants made of rationals by + - * / and roots are algebraic. If two of them differ, they
   differ by more than the separation bound of Burnikel, Funke, Mehlhorn, Schirra and Schmitt ("A
   Separation Bound for Real Algebraic Expressions", 2001), so that enough digits decide exactly.
3. All else (π, e, logarithms, trigonometry, symbols) is compared to many digits, more the larger
   its parts are. Expressions in symbols are compared at points of our choosing and on all sides of
   where |u|, roots and the like turn, which SymPy finds. Agreement there counts as equality. This
   is a decision: equality is undecidable in general, and answers that differ agree to so many
   digits only if they were made to.

SymPy's objects are made by its constructors from a tree of our own grammar; no text reaches it.
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
MAX_DECIMALS = 3000  # digits that are computed
MAX_POWER = 10**6  # exponent of a power to many digits
MAX_ARGUMENT = 10**6  # of a function to many digits
MAX_GAMMA_DECIMALS = 450  # the Gamma function takes long to many digits
MAX_ROOT = 64  # degree of a root that is taken exactly
POINTS = 6  # at which expressions in symbols are compared
_ARITHMETIC = {
  "neg": operator.neg, "add": operator.add, "mul": operator.mul, "div": operator.truediv,
}  # fmt: skip


class Undefined(Exception):
  """The expression has no value: a division by zero, a matrix where a number is wanted."""


# Exact rationals


def exact(node: Node) -> Fraction | None:
  """The value of a rational constant; None for any other tree.

  Raises:
    TooLarge: the value has more than MAX_BITS.
    Undefined: it has none.
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
    raise Undefined("number of arguments") from None
  if value is not None and bits(value) > MAX_BITS:
    raise TooLarge("number")
  return value


def bits(value: Fraction) -> int:
  """Size of the larger of numerator and denominator."""
  return max(value.numerator.bit_length(), value.denominator.bit_length())


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
  """A power that is rational; of a negative base with an odd root, the real one. None otherwise."""
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
  """The integer root of a positive integer, or None if it is not an integer."""
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


def _counted(value: Fraction) -> int:
  if value.denominator != 1 or value < 0:
    raise Undefined("factorial of what is no count")
  if value > MAX_FACTORIAL:
    raise TooLarge("factorial")
  return value.numerator


def _integers(values) -> list[int]:
  if any(value.denominator != 1 for value in values):
    raise Undefined("gcd of fractions")
  return [value.numerator for value in values]


_EXACT = _ARITHMETIC | {
  "pow": _exact_power,
  "fact": lambda value: Fraction(math.factorial(_counted(value))),
  "binom": lambda above, below: Fraction(math.comb(_counted(above), _counted(below))),
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


def _library_name(function: str) -> str:
  """The name that mpmath and SymPy have for an elementary function."""
  return function.replace("arc", "a")


def sample_point(names: Iterable[str], index: int) -> dict[str, Fraction]:
  """Values of symbols at a point, the same in every process.

  They are positive at even points, negative at odd ones, and ever farther out, so that |x - 3| and
  3 - x are told apart.
  """
  distance = (-1) ** index * (1, 19, 1009)[index // 2]
  point = {}
  for name in names:
    seed = zlib.crc32(f"{name}/{index}".encode())
    point[name] = Fraction(seed % 2_000_003 + 300_007, 1_000_003) * distance
  return point


class Digits:
  """The value of a tree to a number of decimal digits; remembers how large its parts were.

  Attributes:
    ctx: the mpmath context of its numbers.
    largest: the largest binary magnitude, in absolute value, of any part.
  """

  def __init__(self, decimals: int, at: Mapping[str, Fraction] | None = None):
    """at: values of symbols; by default those of point 0."""
    if not hasattr(_LOCAL, "context"):
      _LOCAL.context = MPContext()
    self.ctx, self.at, self.largest = _LOCAL.context, at or {}, 1.0
    self.ctx.dps = decimals

  def value(self, node: Node):
    """The value, an mpf or mpc.

    Raises:
      Undefined: it has no value, or the tree is not a number.
      TooLarge: a part is beyond what is computed.
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
    return getattr(self.ctx, _library_name(op))(*values)

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
    """base ** exponent; the real value for a negative base and an exponent of odd denominator."""
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
  """If the value of an algebraic constant is not 0, it is at least 1 / (l · u^(degree - 1))."""

  log2_u: float
  log2_l: float
  degree: int


def separation(node: Node) -> Separation | None:
  """None if a tree is no algebraic constant of rationals, + - * /, i and roots of whole degree."""
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
  """Whether two expressions have one value, by the three ways of this module.

  Raises:
    Undefined: one of them has no value.
    TooLarge: a value is beyond what is computed.
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
    raise Undefined("no value at any point")
  turns = turning_points(a - b, points[0])
  return all(_agree(a, b, turn, real=True) is not False for turn in turns)


def _agree(
  a: Node, b: Node, at: dict[str, Fraction], *, real: bool, may_skip: bool = True
) -> bool | None:  # fmt: skip
  """Whether two expressions agree at a point; None where they have no value.

  Args:
    real: whether they must be real there to count, unless one of them holds i.
    may_skip: whether None is returned, and TooLarge not raised, for values beyond the limits.
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
  """Whether two expressions have one value at a point."""
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

MAX_TURN_DEGREE = 8  # of polynomials whose roots are looked for
MAX_TURNS = 24
MAX_COEFFICIENT_BITS = 256
MAX_SYMPY_POWER = 64  # exponent of a constant that SymPy is given
MAX_SYMPY_FACTORIAL = 300


def sympy_expression(node: Node):
  """A number or an expression as a SymPy object; symbols are real.

  Raises:
    Undefined: the tree is no expression, or holds a function that SymPy is not given.
    TooLarge: a power or factorial that SymPy would write out.
  """
  import sympy  # takes half a second, and most answers do not need it

  if isinstance(node, tree.Number):
    return sympy.Rational(node.value.numerator, node.value.denominator)
  if isinstance(node, tree.Symbol):
    constants = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}
    return constants.get(node.name, sympy.Symbol(node.name, real=True))
  if isinstance(node, tree.Quantity):
    return sympy_expression(node.value)
  if not isinstance(node, tree.Operation):
    raise Undefined(f"{type(node).__name__} is not a number")
  op, values = node.op, [sympy_expression(operand) for operand in node.operands]
  if op in _ARITHMETIC:
    return _ARITHMETIC[op](*values)
  if op in _ELEMENTARY:
    return getattr(sympy, _library_name(op))(*values)
  if op == "pow" and all(value.is_number for value in values):
    if not abs(values[1].evalf(15)) <= MAX_SYMPY_POWER:
      raise TooLarge("power")
  if op in ("fact", "binom") and values[0].is_number:
    if not abs(values[0].evalf(15)) <= MAX_SYMPY_FACTORIAL:
      raise TooLarge(op)
  functions = {
    "pow": operator.pow, "fact": sympy.factorial, "binom": sympy.binomial, "log": sympy.log,
    "abs": sympy.Abs, "floor": sympy.floor, "ceil": sympy.ceiling, "sgn": sympy.sign,
    "max": sympy.Max, "min": sympy.Min, "percent": lambda value: value / 100,
    "degree": lambda value: value * sympy.pi / 180,
  }  # fmt: skip
  if op not in functions:
    raise Undefined(op)
  return functions[op](*values)


def _degree_bound(node: Node, name: str) -> float:
  """Degree of a polynomial, at most, before it is multiplied out; infinity if it is none."""
  if isinstance(node, tree.Symbol):
    return float(node.name == name)
  degrees = [_degree_bound(child, name) for child in tree.children(node)]
  if not any(degrees):
    return 0.0
  if is_operation(node, "add"):
    return max(degrees)
  if is_operation(node, "mul"):
    return sum(degrees)
  if is_operation(node, "neg", "percent", "degree") or isinstance(node, tree.Quantity):
    return degrees[0]
  if is_operation(node, "div") and not degrees[1]:
    return degrees[0]
  if is_operation(node, "pow") and isinstance(node.operands[1], tree.Number):
    exponent = node.operands[1].value
    if exponent >= 0 and exponent.denominator == 1:
      return degrees[0] * float(exponent)
  return math.inf


def _turning_parts(node: Node) -> list[Node]:
  """What changes sign where a tree turns: u of |u|, ⌊u⌋, sgn u, √u; a - b of max(a, b)."""
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
  """Approximate real roots in one symbol of a polynomial with rational coefficients; else none."""
  import sympy

  if not 1 <= _degree_bound(node, name) <= MAX_TURN_DEGREE:
    return []
  for other, value in at.items():
    if other != name:
      node = tree.substitute(node, other, tree.number(value))
  try:
    polynomial = sympy.Poly(sympy_expression(node), sympy.Symbol(name, real=True))
    if polynomial.domain not in (sympy.ZZ, sympy.QQ):
      return []
    if not 1 <= polynomial.degree() <= MAX_TURN_DEGREE:
      return []
    if any(abs(c) >= 1 << MAX_COEFFICIENT_BITS for c in polynomial.all_coeffs()):
      return []
    intervals = polynomial.intervals(eps=sympy.Rational(1, 10**6))
  except (
    Undefined, TooLarge, sympy.PolynomialError, OverflowError, ValueError, TypeError,
    ZeroDivisionError,
  ):  # fmt: skip
    return []
  return [Fraction(int((a + b).p), int((a + b).q)) / 2 for (a, b), _ in intervals]


def turning_points(node: Node, at: Mapping[str, Fraction]) -> list[dict[str, Fraction]]:
  """Points on all sides of where parts of an expression turn, one symbol moved at a time.

  No fixed choice of points would tell |x - 5000| from 5000 - x.

  Args:
    node: an expression.
    at: a value of each of its symbols, which it keeps while another symbol moves.

  Returns:
    at most MAX_TURNS points, none where nothing turns.
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
