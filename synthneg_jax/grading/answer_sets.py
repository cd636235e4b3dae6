"""Sets of real numbers as answers: intervals, unions, inequalities in one unknown, and whether two are equal."""

import functools
from typing import NamedTuple

from synthneg_jax.grading import answer_relations, answer_values
from synthneg_jax.grading.answer_tree import Node, num, sym

_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_INFINITY, _MINUS_INFINITY = sym("oo"), Node("neg", (sym("oo"),))


class Piece(NamedTuple):
  """An interval. low, high: trees of its ends, infinity included; low_in, high_in: whether the ends belong to it."""

  low: Node
  low_in: bool
  high: Node
  high_in: bool


_LINE = Piece(_MINUS_INFINITY, False, _INFINITY, False)


def _is_infinite(node: Node) -> int:
  """1 for infinity, -1 for minus infinity, 0 for all else."""
  if node == _INFINITY or node == Node("add", (Node("sym", ("oo",)),)):
    return 1
  return -_is_infinite(node.args[0]) if node.op == "neg" else 0


def compare(a: Node, b: Node) -> int:
  """-1, 0, 1 as two ends lie; raises as answer_values.equal, and Undefined for ends that are no real numbers."""
  first, second = _is_infinite(a), _is_infinite(b)
  if first or second:
    return (first > second) - (first < second)
  if answer_values.equal(a, b):
    return 0
  digits = answer_values.Digits(40)
  difference = digits.value(Node("add", (a, Node("neg", (b,)))))
  if digits.ctx.im(difference):
    raise answer_values.Undefined("ends that are not real")
  return 1 if digits.ctx.re(difference) > 0 else -1


def _ray(sign: str, bound: Node) -> list[Piece]:
  """The numbers x with x `sign` bound."""
  if sign in ("<", "<="):
    return [Piece(_MINUS_INFINITY, False, bound, sign == "<=")]
  if sign in (">", ">="):
    return [Piece(bound, sign == ">=", _INFINITY, False)]
  if sign == "=":
    return [Piece(bound, True, bound, True)]
  return [Piece(_MINUS_INFINITY, False, bound, False), Piece(bound, False, _INFINITY, False)]


def _intersection(left: list[Piece], right: list[Piece]) -> list[Piece]:
  found = []
  for a in left:
    for b in right:
      order = compare(a.low, b.low)
      low, low_in = (b.low, b.low_in) if order < 0 else (a.low, a.low_in)
      low_in = low_in and (order != 0 or b.low_in)
      order = compare(a.high, b.high)
      high, high_in = (a.high, a.high_in) if order < 0 else (b.high, b.high_in)
      high_in = high_in and (order != 0 or a.high_in)
      order = compare(low, high)
      if order < 0 or (order == 0 and low_in and high_in):
        found.append(Piece(low, low_in, high, high_in))
  return found


def _complement(pieces: list[Piece]) -> list[Piece]:
  left = [_LINE]
  for piece in pieces:
    sides = [Piece(_MINUS_INFINITY, False, piece.low, not piece.low_in)] if not _is_infinite(piece.low) else []
    sides += [Piece(piece.high, not piece.high_in, _INFINITY, False)] if not _is_infinite(piece.high) else []
    left = _intersection(left, sides)
  return left


def pieces(node: Node, *, closed_list: bool = True) -> list[Piece] | None:
  """The set that a tree describes; None where it describes none.

  Args:
    node: an interval, a union, the real line, an inequality in one unknown, or a list of such joined by "or" or "and".
    closed_list: whether finite sets count.
  """
  op, args = node
  if op == "bracket" and len(args[1]) == 2 and all(isinstance(item, Node) for item in args[1]):
    return [Piece(args[1][0], args[0] == "[", args[1][1], args[2] == "]")]
  if op == "set" and closed_list:
    return [Piece(item, True, item, True) for item in args if item.op not in ("rel", "list", "text", "bracket")]
  if op == "sym" and args[0] == "R":
    return [_LINE]
  if op in ("union", "intersection", "minus"):
    left, right = pieces(args[0]), pieces(args[1])
    if left is None or right is None:
      return None
    if op == "union":
      return left + right
    return _intersection(left, right if op == "intersection" else _complement(right))
  if op == "rel":
    return _relation(args)
  if op == "list":
    parts = [pieces(item, closed_list=False) for item in args[1]]
    if any(part is None for part in parts):
      return None
    if args[0] == "or" or not all(item.op == "rel" for item in args[1]):
      return [piece for part in parts for piece in part]
    return functools.reduce(_intersection, parts)
  return None


def _relation(parts: tuple) -> list[Piece] | None:
  """x < 5, 1 <= x < 5, x in A: an unknown between constants."""
  operands, signs = parts[::2], parts[1::2]
  if signs == ("in",) and answer_relations.is_name(operands[0]):
    return pieces(operands[1])
  if any(sign not in _FLIPPED for sign in signs) or signs == ("=",):
    return None
  unknown = [i for i, o in enumerate(operands) if answer_relations.is_name(o) and answer_values.symbols(o)]
  if len(unknown) != 1 or any(answer_values.symbols(o) for i, o in enumerate(operands) if i != unknown[0]):
    return None
  place, found = unknown[0], [_LINE]
  for index, operand in enumerate(operands):
    if index < place:
      found = _intersection(found, _ray(_FLIPPED[signs[index]], operand))
    elif index > place:
      found = _intersection(found, _ray(signs[index - 1], operand))
  if operands[place].op != "call":
    return found
  found = _intersection(found, _ray(">=", num(0)))  # |x|: both signs
  return found + [
    Piece(*(Node("neg", (end,)) if isinstance(end, Node) else end for end in (p.high, p.high_in, p.low, p.low_in)))
    for p in found
  ]


def _canonical(found: list[Piece]) -> list[Piece]:
  """The pieces from left to right, those that meet made one."""
  ordered = sorted(found, key=functools.cmp_to_key(lambda a, b: compare(a.low, b.low) or b.low_in - a.low_in))
  merged = []
  for piece in ordered:
    if merged:
      last = merged[-1]
      order = compare(piece.low, last.high)
      if order < 0 or (order == 0 and (piece.low_in or last.high_in)):
        longer = compare(piece.high, last.high)
        high_in = piece.high_in if longer > 0 else last.high_in or (longer == 0 and piece.high_in)
        merged[-1] = last._replace(high=piece.high if longer > 0 else last.high, high_in=high_in)
        continue
    merged.append(piece)
  return merged


def equal(left: list[Piece], right: list[Piece]) -> bool:
  """Whether two unions of intervals are the same set; raises as `compare`."""
  a, b = _canonical(left), _canonical(right)
  if len(a) != len(b):
    return False
  return all(
    (x.low_in, x.high_in) == (y.low_in, y.high_in) and compare(x.low, y.low) == 0 and compare(x.high, y.high) == 0
    for x, y in zip(a, b, strict=True)
  )
