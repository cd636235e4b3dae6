"""Equations and inequalities as answers: the values they state, the sets they describe, and whether
two of them say the same."""

import fractions
import functools
from typing import NamedTuple

from synthneg_jax.grading import answer_tree as tree
from synthneg_jax.grading.answer_numbers import Digits, Undefined, equal, sample
from synthneg_jax.grading.answer_tree import (
  Bracket,
  ListValue,
  Node,
  Number,
  Relation,
  SetOperation,
  SetValue,
  Symbol,
  children,
  infinite_sign,
  is_operation,
  is_scalar,
  multiplied,
  negated,
  number,
  substitute,
  subtracted,
  symbols,
)

_FUNCTION_NAMES = frozenset("f g h F G H P Q T S p q a b r A V".split())
_CONVERSE = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def is_constant(node: Node) -> bool:
  """Whether a tree is a single value without unknowns."""
  return is_scalar(node) and not symbols(node)


# Names and what an equation says of them


class Label(NamedTuple):
  """An equation that gives a name's value: x = 5, f(x) = 2x, AB = 7."""

  name: str
  value: Node


def label(node: Node) -> Label | None:
  """Name and value of an equation that gives a name's value; None for any other tree.

  Of several sides after the name the last one is the value: the others lead to it.
  """
  if not isinstance(node, Relation) or set(node.signs) != {"="}:
    return None
  head, *sides = node.operands
  if not is_name(head):
    is_expression = is_scalar(head) and symbols(head)
    if len(sides) > 1 or not is_name(sides[0]) or is_expression:
      return None
    head, sides = sides[0], [head]
  if isinstance(head, Symbol) and any(symbols(head) & symbols(side) for side in sides):
    return None
  value = sides[-1]
  if is_operation(head, "mul") and not symbols(value) and not _is_segment(head):
    head = head.operands[0]  # f(x) = 5 and f(n) = 5 name the same
  return Label(_spelled(head), value)


def unlabelled(node: Node) -> Node:
  """The value of an equation that gives a name's value; any other tree as it is."""
  named = label(node)
  return named.value if named else node


def _spelled(name: Node) -> str:
  """A name as text; a segment and its length, AB and |AB|, are spelled alike."""
  if is_operation(name, "abs", "norm", "det"):
    return _spelled(name.operands[0])
  if is_operation(name, "mul") and _is_segment(name):
    return "".join(map(_spelled, name.operands))
  return name.name.removeprefix("overline ") if isinstance(name, Symbol) else repr(name)


def is_name(node: Node) -> bool:
  """Whether a tree is a symbol, f(x), a segment (AB), the length of one, or a tuple of symbols."""
  if isinstance(node, Symbol):
    return node.name not in ("pi", "i", "oo")
  if is_operation(node, "abs", "norm", "det"):
    return is_name(node.operands[0])
  if isinstance(node, Bracket):
    return all(isinstance(item, Symbol) for item in node.items)
  if is_operation(node, "div") or isinstance(node, tree.Ratio):
    return all(map(is_name, children(node)))
  if not is_operation(node, "mul"):
    return False
  head = node.operands[0]
  head = head.operands[0] if is_operation(head, "pow") else head
  if isinstance(head, Symbol) and head.name.split("_")[0].rstrip("'") in _FUNCTION_NAMES:
    return True
  return _is_segment(head) and _is_segment(node.operands[1])


def _is_segment(node: Node) -> bool:
  """Whether a tree is a product of capital letters."""
  if is_operation(node, "mul"):
    return all(map(_is_segment, node.operands))
  return isinstance(node, Symbol) and len(node.name) == 1 and node.name.isupper()


def is_function(head: Node) -> bool:
  """Whether a name is y, or that of a function of something."""
  return head == Symbol("y") or (is_operation(head, "mul") and not _is_segment(head))


def stated(node: Relation, gold: Node) -> list[Node]:
  """The values that a relation states where the gold answer is a single value.

  x = 5 states 5; a ≈ b states a, and b if it is close.
  """
  operands, signs = node.operands, node.signs
  if not set(signs) <= {"=", "~"}:
    return []
  if "~" in signs:
    return _stated_approximately(node, gold)
  if is_constant(gold):
    constants = [operand for operand in operands if is_constant(operand)]
    others = [operand for operand in operands if not is_constant(operand)]
    return constants[-1:] if others and not any(map(_has_numeral, others)) else []
  named = label(node)
  if named:
    return [named.value]
  try:
    if all(is_scalar(side) and equal(operands[0], side) for side in operands[1:]):
      return [operands[0]]
  except Undefined:
    pass
  return []


def _stated_approximately(node: Relation, gold: Node) -> list[Node]:
  first = node.signs.index("~")
  before, after = node.operands[: first + 1], node.operands[first + 1 :]
  if len(before) > 1:
    values = stated(Relation(before, node.signs[:first]), gold)
  elif is_name(before[0]):
    return [after[0]]
  else:
    values = [before[0]]
  return values + [side for side in after if values and _is_close(values[-1], side)]


def _has_numeral(node: Node) -> bool:
  """Whether an expression has numerals: a + b = 7 states a + b, but 2x = 10 is yet to be solved."""
  if isinstance(node, Number):
    return True
  return not is_name(node) and any(map(_has_numeral, children(node)))


def _is_close(value: Node, approximation: Node) -> bool:
  """Whether two constants lie within 5 % of each other."""
  if not is_constant(value) or not is_constant(approximation):
    return False
  digits = Digits(30)
  a, b = digits.value(value), digits.value(approximation)
  return abs(a - b) * 20 <= max(abs(a), abs(b))


# Relations in several unknowns


def same_relation(gold: Relation, answer: Relation) -> bool:
  """Whether two equations or inequalities in several unknowns say the same.

  2x - y = 3 equals 4x = 2y + 6; y > x equals x - y < 0; y = 1/x equals xy = 1.
  """
  if len(gold.signs) != 1 or len(answer.signs) != 1:
    return False
  if not all(map(is_scalar, gold.operands + answer.operands)):
    return False
  left, right = subtracted(*gold.operands), subtracted(*answer.operands)
  sign, other_sign = gold.signs[0], answer.signs[0]
  if sign == other_sign == "=":
    return _proportional(left, right) or _solves(gold, right) or _solves(answer, left)
  if sign == other_sign == "!=":
    return _proportional(left, right)
  if sign[0] in "<>" and sign == other_sign:
    return _proportional(left, right, sign=1)
  if sign[0] in "<>" and sign == _CONVERSE.get(other_sign):
    return _proportional(left, right, sign=-1)
  return False


def _proportional(left: Node, right: Node, sign: int = 0) -> bool:
  """Whether left = c · right for a constant c that is not 0, and has this sign unless it is 0."""
  names = symbols(left)
  if names != symbols(right) or not names:
    return False
  for index in (0, 2):
    digits = Digits(40, {name: sample(name, index) for name in names})
    above, below = digits.value(left), digits.value(right)
    if not above or not below:
      return False
    ratio = digits.ctx.re(above / below)
    if ratio * sign < 0:
      return False
    factor = number(_simplest_fraction(ratio))
    if factor.value and equal(left, multiplied(factor, right)):
      return True
  return False


def _simplest_fraction(value) -> fractions.Fraction:
  """The simplest rational close to an mpf."""
  mantissa, exponent = value.man_exp
  magnitude = fractions.Fraction(mantissa) * fractions.Fraction(2) ** exponent
  return (-magnitude if value < 0 else magnitude).limit_denominator(10**6)


def _solves(solution: Relation, equation: Node) -> bool:
  """Whether `solution` is y = v, and v for y makes `equation`, which is linear in y, 0."""
  named = label(solution)
  heads = [side for side in solution.operands if isinstance(side, Symbol)]
  if not named or not heads or not is_scalar(named.value):
    return False
  name, zero = heads[0].name, number(0)
  if name not in symbols(equation):
    return False
  below, at, above = (substitute(equation, name, tree.added(named.value, number(step))) for step in (-1, 0, 1))
  bend = subtracted(tree.added(below, above), multiplied(number(2), at))
  return equal(at, zero) and equal(bend, zero) and not equal(above, zero)


# Sets of real numbers


class Interval(NamedTuple):
  """The reals between two ends, infinity included; *_in: whether an end belongs to it."""

  low: Node
  low_in: bool
  high: Node
  high_in: bool


_PLUS, _MINUS = tree.INFINITY, negated(tree.INFINITY)
_LINE = Interval(_MINUS, False, _PLUS, False)


def same_set(a: Node, b: Node) -> bool | None:
  """Whether two trees describe the same set of reals; None where one describes none."""
  try:
    left, right = intervals(a), intervals(b)
    if left is None or right is None:
      return None
    left, right = _merged(left), _merged(right)
    return len(left) == len(right) and all(map(_same_interval, left, right))
  except Undefined:
    return None


def intervals(node: Node) -> list[Interval] | None:
  """The set that a tree describes as a union; None where it describes none.

  It is an interval, a finite set, a union, the real line, an inequality in one unknown, or a list
  of such joined by "or" or "and".
  """
  if isinstance(node, Bracket) and len(node.items) == 2:
    low, high = node.items
    return [Interval(low, node.opener == "[", high, node.closer == "]")]
  if isinstance(node, SetValue):
    no_numbers = (Relation, ListValue, tree.Text, Bracket)
    return [Interval(item, True, item, True) for item in node.items if not isinstance(item, no_numbers)]
  if node == Symbol("R"):
    return [_LINE]
  if isinstance(node, SetOperation):
    left, right = intervals(node.left), intervals(node.right)
    if left is None or right is None:
      return None
    if node.op == "union":
      return left + right
    return _intersection(left, right if node.op == "intersection" else _complement(right))
  if isinstance(node, Relation):
    return _solutions(node)
  if isinstance(node, ListValue):
    parts = [None if isinstance(item, SetValue) else intervals(item) for item in node.items]
    if None in parts:
      return None
    if node.joiner == "or" or not all(isinstance(item, Relation) for item in node.items):
      return [interval for part in parts for interval in part]
    return functools.reduce(_intersection, parts)
  return None


def _solutions(node: Relation) -> list[Interval] | None:
  """The solutions of x < 5, 1 <= x < 5, |x| < 2, x in A: an unknown between constants."""
  operands, signs = node.operands, node.signs
  if signs == ("in",) and is_name(operands[0]):
    return intervals(operands[1])
  if any(sign not in _CONVERSE for sign in signs) or signs == ("=",):
    return None
  unknowns = [index for index, operand in enumerate(operands) if symbols(operand)]
  if len(unknowns) != 1 or not is_name(operands[unknowns[0]]):
    return None
  at = unknowns[0]
  rays = [_ray(_CONVERSE[sign], side) for sign, side in zip(signs[:at], operands, strict=False)]
  rays += [_ray(sign, side) for sign, side in zip(signs[at:], operands[at + 1 :], strict=True)]
  result = functools.reduce(_intersection, rays, [_LINE])
  if not is_operation(operands[at], "abs", "norm", "det"):
    return result
  result = _intersection(result, _ray(">=", number(0)))
  mirrored = [Interval(negated(part.high), part.high_in, negated(part.low), part.low_in) for part in result]
  return result + mirrored


def _ray(sign: str, bound: Node) -> list[Interval]:
  """The numbers x with x `sign` bound."""
  if sign in ("<", "<="):
    return [Interval(_MINUS, False, bound, sign == "<=")]
  if sign in (">", ">="):
    return [Interval(bound, sign == ">=", _PLUS, False)]
  if sign == "=":
    return [Interval(bound, True, bound, True)]
  return [Interval(_MINUS, False, bound, False), Interval(bound, False, _PLUS, False)]


def _compare(a: Node, b: Node) -> int:
  """-1, 0, 1 as two ends lie; raises Undefined for ends that are no real numbers."""
  first, second = infinite_sign(a), infinite_sign(b)
  if first or second:
    return (first > second) - (first < second)
  if equal(a, b):
    return 0
  digits = Digits(40)
  difference = digits.value(a) - digits.value(b)
  if digits.ctx.im(difference):
    raise Undefined("ends that are not real")
  return 1 if digits.ctx.re(difference) > 0 else -1


def _intersection(left: list[Interval], right: list[Interval]) -> list[Interval]:
  result = []
  for a in left:
    for b in right:
      order = _compare(a.low, b.low)
      low, low_in = (b.low, b.low_in) if order < 0 else (a.low, a.low_in)
      low_in = low_in and (order != 0 or b.low_in)
      order = _compare(a.high, b.high)
      high, high_in = (a.high, a.high_in) if order < 0 else (b.high, b.high_in)
      high_in = high_in and (order != 0 or a.high_in)
      order = _compare(low, high)
      if order < 0 or (order == 0 and low_in and high_in):
        result.append(Interval(low, low_in, high, high_in))
  return result


def _complement(parts: list[Interval]) -> list[Interval]:
  result = [_LINE]
  for part in parts:
    sides = []
    if not infinite_sign(part.low):
      sides.append(Interval(_MINUS, False, part.low, not part.low_in))
    if not infinite_sign(part.high):
      sides.append(Interval(part.high, not part.high_in, _PLUS, False))
    result = _intersection(result, sides)
  return result


def _by_low_end(a: Interval, b: Interval) -> int:
  return _compare(a.low, b.low) or b.low_in - a.low_in


def _merged(parts: list[Interval]) -> list[Interval]:
  """The intervals from left to right, those that meet merged."""
  result = []
  for part in sorted(parts, key=functools.cmp_to_key(_by_low_end)):
    if result:
      last = result[-1]
      order = _compare(part.low, last.high)
      if order < 0 or (order == 0 and (part.low_in or last.high_in)):
        order = _compare(part.high, last.high)
        if order > 0:
          last = last._replace(high=part.high, high_in=part.high_in)
        elif order == 0:
          last = last._replace(high_in=last.high_in or part.high_in)
        result[-1] = last
        continue
    result.append(part)
  return result


def _same_interval(a: Interval, b: Interval) -> bool:
  ends_in = (a.low_in, a.high_in) == (b.low_in, b.high_in)
  return ends_in and _compare(a.low, b.low) == 0 and _compare(a.high, b.high) == 0
