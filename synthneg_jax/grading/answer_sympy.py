r"""Answer trees as SymPy objects, and the places where an expression turns from one form into another.

SymPy's objects are made by its constructors from a tree of our own grammar; no text reaches it. It decides nothing: what it
finds are points at which |x - 5000| and 5000 - x have to be compared, which no fixed choice of points would hold.
"""

import fractions
import math

from synthneg_jax.grading.answer_rationals import MAX_FACTORIAL, Undefined
from synthneg_jax.grading.answer_tokens import TooLarge
from synthneg_jax.grading.answer_tree import Node

Fraction = fractions.Fraction

MAX_DEGREE, MAX_PLACES, MAX_BITS = (
  8,
  24,
  256,
)  # of polynomials whose roots are looked for; of points; of their coefficients
_POWER = 64  # largest exponent of a constant that SymPy is given
_CONSTANTS = {"pi": "pi", "e": "E", "i": "I", "oo": "oo"}
_CALLS = {
  "abs": "Abs", "norm": "Abs", "floor": "floor", "ceil": "ceiling", "sgn": "sign", "exp": "exp", "ln": "log", "max": "Max",
  "min": "Min", "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc", "arcsin": "asin",
  "arccos": "acos", "arctan": "atan", "asin": "asin", "acos": "acos", "atan": "atan", "sinh": "sinh", "cosh": "cosh",
  "tanh": "tanh",
}  # fmt: skip
_TURNS = ("abs", "norm", "floor", "ceil", "sgn", "max", "min")


def expression(node: Node):
  """A number or an expression as a SymPy object; symbols are real.

  Raises:
    Undefined: the tree is no expression, or holds a function that SymPy has under no name of ours.
    TooLarge: a power or factorial that SymPy would write out.
  """
  import sympy  # half a second, which most answers need not wait for

  op, args = node
  if op == "num":
    return sympy.Rational(args[0].numerator, args[0].denominator)
  if op == "sym":
    return getattr(sympy, _CONSTANTS[args[0]]) if args[0] in _CONSTANTS else sympy.Symbol(args[0], real=True)
  if op == "quantity":
    return expression(args[0])
  if op == "call":
    if args[0] not in _CALLS and args[0] not in ("log", "lg"):
      raise Undefined(args[0])
    inner = [expression(arg) for arg in args[1:]]
    if args[0] in ("log", "lg"):
      return sympy.log(*inner) if args[0] == "log" else sympy.log(inner[0], 10)
    return getattr(sympy, _CALLS[args[0]])(*inner)
  if op not in ("neg", "add", "mul", "div", "pow", "root", "fact", "binom", "degree", "percent"):
    raise Undefined(f"{op} is no number")
  first, *rest = (expression(arg) for arg in args)
  if op == "pow" and first.is_number and rest[0].is_number and not abs(rest[0].evalf(15)) <= _POWER:
    raise TooLarge("power")
  if op in ("fact", "binom") and first.is_number and not abs(first.evalf(15)) <= MAX_FACTORIAL // 10:
    raise TooLarge(op)
  return {
    "neg": lambda: -first,
    "add": lambda: first + rest[0],
    "mul": lambda: first * rest[0],
    "div": lambda: first / rest[0],
    "pow": lambda: first ** rest[0],
    "root": lambda: first ** (1 / rest[0]),
    "fact": lambda: sympy.factorial(first),
    "binom": lambda: sympy.binomial(first, rest[0]),
    "degree": lambda: first * sympy.pi / 180,
    "percent": lambda: first / 100,
  }[op]()


def _whole(node: Node) -> bool:
  return (node.op == "num" and node.args[0].denominator == 1) or (node.op == "neg" and _whole(node.args[0]))


def _degree(node: Node, name: str) -> float:
  """Of a polynomial, at most; infinity for what is none. Looked at before anything is multiplied out."""
  op, args = node
  if op in ("num", "sym"):
    return float(args[0] == name)
  if op in ("neg", "quantity", "percent", "degree"):
    return _degree(args[0], name)
  if op in ("add", "mul", "div", "pow"):
    left, right = (_degree(arg, name) for arg in args)
    if op == "add":
      return max(left, right)
    if op == "mul":
      return left + right
    if right or (op == "pow" and left and (args[1].op != "num" or args[1].args[0] < 0)):
      return math.inf
    return left if op == "div" or not left else left * float(args[1].args[0])
  return 0.0 if all(_degree(arg, name) == 0 for arg in args if isinstance(arg, Node)) else math.inf


def _turning(node: Node) -> list[Node]:
  """What changes sign where a part of the tree turns: u of |u|, ⌊u⌋, sgn u and roots of u, a - b of max(a, b)."""
  found = [one for arg in node.args if isinstance(arg, Node) for one in _turning(arg)]
  if node.op == "call" and node.args[0] in _TURNS:
    inner = node.args[1:]
    if node.args[0] in ("max", "min"):
      found += [Node("add", (a, Node("neg", (b,)))) for i, a in enumerate(inner) for b in inner[:i]]
    else:
      found += inner
  elif node.op == "root" or (node.op == "pow" and not _whole(node.args[1])):
    found.append(node.args[0])
  return found


def _roots(node: Node, name: str, at: dict[str, Fraction]) -> list[Fraction]:
  """Real roots in one symbol, near enough, where the tree is a polynomial with rational coefficients; else none."""
  import sympy

  if not 1 <= _degree(node, name) <= MAX_DEGREE:
    return []
  symbol = sympy.Symbol(name, real=True)
  others = {sympy.Symbol(other, real=True): sympy.Rational(v.numerator, v.denominator) for other, v in at.items()}
  try:
    polynomial = sympy.Poly(expression(node).subs({key: v for key, v in others.items() if key != symbol}), symbol)
    degree = polynomial.degree()
    if not 1 <= degree <= MAX_DEGREE or polynomial.domain not in (sympy.ZZ, sympy.QQ):
      return []
    if max(math.frexp(float(abs(c)))[1] if c else 0 for c in polynomial.all_coeffs()) > MAX_BITS:
      return []
    intervals = polynomial.intervals(eps=sympy.Rational(1, 10**6))
  except (Undefined, TooLarge, sympy.PolynomialError, OverflowError, ValueError, TypeError, ZeroDivisionError):
    return []
  return [Fraction(int((a + b).p), int((a + b).q)) / 2 for (a, b), _ in intervals]


def places(node: Node, at: dict[str, Fraction]) -> list[dict[str, Fraction]]:
  """Points on all sides of where parts of an expression turn, one symbol moved at a time.

  Args:
    node: an expression.
    at: a value of each of its symbols; it stays where another symbol moves.

  Returns:
    at most MAX_PLACES points, none where nothing turns.
  """
  turning, found = _turning(node), []
  for name in sorted(at) if turning else ():
    roots = sorted({root for one in turning for root in _roots(one, name, at)})
    if roots:
      between = [(a + b) / 2 for a, b in zip(roots, roots[1:], strict=False)]
      beside = [root + side * (1 + abs(root) / 1000) for root in (roots[0], roots[-1]) for side in (-1, 1)]
      found += [at | {name: value} for value in sorted({*between, *beside})]
  return found[:MAX_PLACES]
