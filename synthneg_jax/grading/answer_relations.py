"""Equations, inequalities and sets of reals: the values they state, and equality of two of them."""

import dataclasses
import fractions
import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

from synthneg_jax.grading import answer_tree as tree
from synthneg_jax.grading.answer_numbers import Digits, Undefined, equal, sample_point
from synthneg_jax.grading.answer_tree import Node, is_operation

_FUNCTION_NAMES = frozenset("f g h F G H P Q T S p q a b r A V".split())
_CONVERSE = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_ORDER = {
  "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge, "=": operator.eq,
  "!=": operator.ne,
}  # fmt: skip


def is_constant(node: Node) -> bool:
  """Whether a tree is a single value without unknowns."""
  return tree.is_scalar(node) and not tree.symbols(node)


# Named values


class Label(NamedTuple):
  """A name and its value, from an equation: x = 5, f(x) = 2x, AB = 7."""

  name: str
  value: Node


def label(node: Node) -> Label | None:
  """The name and value of an equation that defines a name; None for any other tree.

  In a chain such as x = 2+3 = 5 the last side is the value.
  """
  if not isinstance(node, tree.Relation) or set(node.signs) != {"="}:
    return None
  head, *sides = node.operands
  if not is_name(head):
    is_expression = tree.is_scalar(head) and tree.symbols(head)
    if len(sides) > 1 or not is_name(sides[0]) or is_expression:
      return None
    head, sides = sides[0], [head]
  own = tree.symbols(head) if isinstance(head, tree.Symbol) else frozenset()
  if any(own & tree.symbols(side) for side in sides):
    return None
  value = sides[-1]
  if isinstance(head, tree.Bracket) and isinstance(value, tree.Bracket):  # (y,x) = (2,1)
    pairs = list(zip(map(_spelling, head.items), value.items, strict=False))
    if len(head.items) == len(value.items) and _in_order([name for name, _ in pairs]):
      ordered = tuple(item for _, item in sorted(pairs, key=lambda pair: pair[0]))
      value = dataclasses.replace(value, items=ordered)
  if is_operation(head, "mul") and not tree.symbols(value) and not _is_segment(head):
    head = head.operands[0]  # f(x) = 5 and f(n) = 5 define the same constant
  return Label(_spelling(head), value)


def unlabelled(node: Node) -> Node:
  """The value of an equation that defines a name; any other tree unchanged."""
  named = label(node)
  return named.value if named else node


_ORDERED_NAMES = ("ab", "abc", "pq", "xy", "xyz")  # whose order is the alphabet's


def _in_order(names: Sequence[str]) -> bool:
  """Whether values with these names are listed in the order of their letters."""
  return "".join(sorted(names)) in _ORDERED_NAMES and all(len(name) == 1 for name in names)


def values_by_name(nodes: Sequence[Node]) -> list[Node]:
  """The values of equations that define names; y = 2, x = 1 are sorted by their names."""
  labels = list(map(label, nodes))
  if all(labels) and _in_order([named.name for named in labels]):
    return [named.value for named in sorted(labels, key=lambda named: named.name)]
  return list(map(unlabelled, nodes))


def _spelling(name: Node) -> str:
  """A name as text; a segment AB and its length |AB| have the same spelling."""
  if is_operation(name, "abs"):
    return _spelling(name.operands[0])
  if is_operation(name, "mul") and _is_segment(name):
    return "".join(map(_spelling, name.operands))
  return name.name.removeprefix("overline ") if isinstance(name, tree.Symbol) else repr(name)


def is_name(node: Node) -> bool:
  """Whether a tree is a symbol, f(x), a segment AB or its length, or a tuple of symbols."""
  if isinstance(node, tree.Symbol):
    return node.name not in ("pi", "i", "oo")
  if is_operation(node, "abs"):
    return is_name(node.operands[0])
  if isinstance(node, tree.Bracket):
    return all(isinstance(item, tree.Symbol) for item in node.items)
  if is_operation(node, "div") or isinstance(node, tree.Ratio):
    return all(map(is_name, tree.children(node)))
  if not is_operation(node, "mul"):
    return False
  head = node.operands[0]
  head = head.operands[0] if is_operation(head, "pow") else head
  if isinstance(head, tree.Symbol) and head.name.split("_")[0].rstrip("'") in _FUNCTION_NAMES:
    return True
  return _is_segment(head) and _is_segment(node.operands[1])


def _is_segment(node: Node) -> bool:
  """Whether a tree is a product of capital letters."""
  if is_operation(node, "mul"):
    return all(map(_is_segment, node.operands))
  return isinstance(node, tree.Symbol) and len(node.name) == 1 and node.name.isupper()


def is_function(head: Node) -> bool:
  """Whether a name is y or a function application such as f(x)."""
  return head == tree.Symbol("y") or (is_operation(head, "mul") and not _is_segment(head))


def stated(node: tree.Relation, gold: Node) -> list[Node]:
  """The values that a relation states, to be compared with a gold answer of one value.

  x = 5 states 5; a ≈ b states a, and b if it is close to a.
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
    if all(tree.is_scalar(side) and equal(operands[0], side) for side in operands[1:]):
      return [operands[0]]
  except Undefined:
    pass
  return []


def _stated_approximately(node: tree.Relation, gold: Node) -> list[Node]:
  first = node.signs.index("~")
  before, after = node.operands[: first + 1], node.operands[first + 1 :]
  if len(before) > 1:
    values = stated(tree.Relation(before, node.signs[:first]), gold)
  elif is_name(before[0]):
    return [after[0]]
  else:
    values = [before[0]]
  return values + [side for side in after if values and _is_close(values[-1], side)]


def _has_numeral(node: Node) -> bool:
  """Whether an expression has numerals: a + b = 7 states a value, 2x = 10 is not yet solved."""
  if isinstance(node, tree.Number):
    return True
  return not is_name(node) and any(map(_has_numeral, tree.children(node)))


def _is_close(value: Node, approximation: Node) -> bool:
  """Whether two constants differ by at most 5 %."""
  if not is_constant(value) or not is_constant(approximation):
    return False
  digits = Digits(30)
  a, b = digits.value(value), digits.value(approximation)
  return abs(a - b) * 20 <= max(abs(a), abs(b))


# Relations in several unknowns


def same_relation(gold: tree.Relation, answer: tree.Relation) -> bool:
  """Whether two equations or inequalities in several unknowns are equivalent.

  2x - y = 3 equals 4x = 2y + 6; y > x equals x - y < 0; y = 1/x equals xy = 1.
  """
  if len(gold.signs) != 1 or len(answer.signs) != 1:
    return False
  if not all(map(tree.is_scalar, gold.operands + answer.operands)):
    return False
  left, right = (a - b for a, b in (gold.operands, answer.operands))
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
  """Whether left = c · right for a constant c ≠ 0; if `sign` is not 0, c must have this sign."""
  names = tree.symbols(left)
  if names != tree.symbols(right) or not names:
    return False
  for index in (0, 2):
    digits = Digits(40, sample_point(names, index))
    above, below = digits.value(left), digits.value(right)
    if not above or not below:
      return False
    ratio = digits.ctx.re(above / below)
    if ratio * sign < 0:
      return False
    factor = tree.number(_simplest_fraction(ratio))
    if factor.value and equal(left, factor * right):
      return True
  return False


def _simplest_fraction(value) -> fractions.Fraction:
  """A rational with a small denominator close to an mpf."""
  mantissa, exponent = value.man_exp
  magnitude = fractions.Fraction(mantissa) * fractions.Fraction(2) ** exponent
  return (-magnitude if value < 0 else magnitude).limit_denominator(10**6)


def _solves(solution: tree.Relation, equation: Node) -> bool:
  """Whether `solution` is y = v and y = v is the root of `equation`, which is linear in y."""
  named = label(solution)
  heads = [side for side in solution.operands if isinstance(side, tree.Symbol)]
  if not named or not heads or not tree.is_scalar(named.value):
    return False
  name, zero = heads[0].name, tree.number(0)
  if name not in tree.symbols(equation):
    return False
  values = [named.value + tree.number(step) for step in (-1, 0, 1)]
  below, at, above = (tree.substitute(equation, name, value) for value in values)
  bend = below + above - tree.number(2) * at
  return equal(at, zero) and equal(bend, zero) and not equal(above, zero)


# Sets of real numbers


def same_set(a: Node, b: Node) -> bool | None:
  """Whether two trees describe the same set of reals; None if one does not describe a set.

  Sets are intervals, finite sets, set operations, the real line, inequalities in one unknown, and
  lists of these.
  """
  try:
    line = _Line(a, b)
    left, right = line.cells(a), line.cells(b)
  except Undefined:
    return None
  return None if left is None or right is None else left == right


class _Line:
  """The real line, cut at every number in two trees.

  Cells with odd numbers are the cuts, cells with even numbers the open intervals between them. A
  set of reals is a set of cells, so that Python's set operators apply.
  """

  def __init__(self, *nodes: Node):
    """Raises Undefined if a cut is not a real number."""
    cuts = [cut for node in nodes for cut in _cuts(node)]
    if any(is_operation(part, "abs") for node in nodes for part in tree.walk(node)):  # |x| < 2
      cuts += [tree.number(0), *(-cut for cut in cuts)]
    self._cells, cell, last = {}, -1, None
    for cut in sorted(cuts, key=functools.cmp_to_key(_compare)):
      if last is None or _compare(last, cut):
        cell += 2
      self._cells[cut] = cell
      last = cut
    self.all = frozenset(range(cell + 2))

  def ray(self, sign: str, end: Node) -> frozenset[int]:
    """The numbers x that satisfy x `sign` end, where `end` may be infinite."""
    infinite = tree.infinite_sign(end)
    cell = infinite * len(self.all) if infinite else self._cells[end]
    return frozenset(other for other in self.all if _ORDER[sign](other, cell))

  def cells(self, node: Node) -> frozenset[int] | None:
    """The set that a tree describes; None if it does not describe a set."""
    if isinstance(node, tree.Bracket) and len(node.items) == 2:
      low, high = node.items
      if _compare(low, high) > 0:
        return frozenset([node])  # reversed ends: equal only to itself
      above = self.ray(">=" if node.opener == "[" else ">", low)
      return above & self.ray("<=" if node.closer == "]" else "<", high)
    if isinstance(node, tree.SetValue):
      return frozenset().union(*(self.ray("=", item) for item in _numbers(node)))
    if node == tree.Symbol("R"):
      return self.all
    if isinstance(node, tree.SetOperation):
      left, right = self.cells(node.left), self.cells(node.right)
      if left is None or right is None:
        return None
      return _SET_OPERATORS[node.op](left, right)
    if isinstance(node, tree.Relation):
      return self._solutions(node)
    if isinstance(node, tree.ListValue):
      parts = [None if isinstance(i, tree.SetValue) else self.cells(i) for i in node.items]
      if None in parts:
        return None
      relations = all(isinstance(item, tree.Relation) for item in node.items)
      join = operator.and_ if relations and node.joiner != "or" else operator.or_
      return functools.reduce(join, parts)
    return None

  def _solutions(self, node: tree.Relation) -> frozenset[int] | None:
    """Solutions of an inequality with one unknown: x < 5, 1 <= x < 5, |x| < 2, x in A."""
    if node.signs == ("in",) and is_name(node.operands[0]):
      return self.cells(node.operands[1])
    unknown = _unknown(node)
    if unknown is None:
      return None
    solutions, at = self.all, node.operands.index(unknown)
    for index, sign in enumerate(node.signs):
      if index < at:
        solutions &= self.ray(_CONVERSE[sign], node.operands[index])
      else:
        solutions &= self.ray(sign, node.operands[index + 1])
    if is_operation(unknown, "abs"):
      solutions &= self.ray(">=", tree.number(0))
      solutions |= {len(self.all) - 1 - cell for cell in solutions}
    return solutions


_SET_OPERATORS = {"union": operator.or_, "intersection": operator.and_, "minus": operator.sub}


def _unknown(node: tree.Relation) -> Node | None:
  """The unknown of an inequality whose other sides are constants; None for other relations."""
  if node.signs == ("=",) or any(sign not in _CONVERSE for sign in node.signs):
    return None
  unknowns = [operand for operand in node.operands if tree.symbols(operand)]
  return unknowns[0] if len(unknowns) == 1 and is_name(unknowns[0]) else None


def _numbers(node: tree.SetValue) -> list[Node]:
  others = (tree.Relation, tree.ListValue, tree.Text, tree.Bracket)
  return [item for item in node.items if not isinstance(item, others)]


def _cuts(node: Node) -> list[Node]:
  """The finite end points of the sets that a tree describes."""
  ends = []
  if isinstance(node, (tree.SetOperation, tree.ListValue)):
    return [cut for child in tree.children(node) for cut in _cuts(child)]
  if isinstance(node, tree.Bracket):
    ends = node.items
  elif isinstance(node, tree.SetValue):
    ends = _numbers(node)
  elif isinstance(node, tree.Relation) and node.signs == ("in",):
    return _cuts(node.operands[1])
  elif isinstance(node, tree.Relation) and _unknown(node) is not None:
    ends = [operand for operand in node.operands if operand != _unknown(node)]
  return [end for end in ends if not tree.infinite_sign(end)]


def _compare(a: Node, b: Node) -> int:
  """Compares two end points: -1, 0 or 1. Raises Undefined for non-real numbers."""
  first, second = tree.infinite_sign(a), tree.infinite_sign(b)
  if first or second:
    return (first > second) - (first < second)
  if equal(a, b):
    return 0
  digits = Digits(40)
  difference = digits.value(a) - digits.value(b)
  if digits.ctx.im(difference):
    raise Undefined("non-real end point")
  return 1 if digits.ctx.re(difference) > 0 else -1
