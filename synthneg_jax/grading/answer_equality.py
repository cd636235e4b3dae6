"""Equality of an answer and the gold answer: compares trees of `answer_grammar` by kind.

docs/grading.md explains the conventions; the configurable ones are fields of `Conventions`.
"""

import dataclasses
import functools
import itertools
import math
import operator
import re
from typing import NamedTuple

from synthneg_jax.grading import answer_tree as tree
from synthneg_jax.grading.answer_numbers import Digits, Undefined, bits, equal, exact
from synthneg_jax.grading.answer_relations import (
  is_constant,
  is_function,
  label,
  same_relation,
  same_set,
  stated,
  unlabelled,
  values_by_name,
)
from synthneg_jax.grading.answer_tokens import TooLarge
from synthneg_jax.grading.answer_tree import Node, is_operation
from synthneg_jax.grading.answer_units import Unit

MAX_ITEMS = 40  # of an unordered set or list
MAX_ENTRIES = 100  # of a matrix
_NUMBER_WORDS = (
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
  "sixteen seventeen eighteen nineteen twenty"
).split()


class Ambiguous(Exception):
  """The answer states several values where the gold answer has one, or contradicts itself."""


@dataclasses.dataclass(frozen=True)
class Conventions:
  """Configurable conventions of equality and extraction.

  Attributes:
    percent: 20% equals "either" 20 or 0.2, only 0.2 ("fraction"), or only 20 ("number").
    units: whether an answer may omit the gold answer's unit: "optional", "required", or "ignored",
      which ignores all units. Unless ignored, different units are converted or make the answer
      wrong.
    tuples: "ordered", or "unordered": (1,2) equals (2,1) and {1,2}.
    lists: whether the order of 1, 2, 3 without braces matters: "ordered", "unordered", or "auto":
      ordered if the gold list has at least three numbers that do not ascend, since people write
      sets in ascending order.
    decimal_digits: minimum number of significant digits for which a rounded or truncated decimal
      equals a number without a finite decimal form; 0: never. The default accepts what a computer
      prints (0.333333333333 for 1/3) but no manual rounding.
    extraction: "last" falls back to the last display or line of a response that marks no answer
      (statements.py); "marked" does not.
    retractions: "The answer is 7. No wait, it is 8." is "ambiguous", or states 8 ("last").
  """

  percent: str = "either"
  units: str = "optional"
  tuples: str = "ordered"
  lists: str = "auto"
  decimal_digits: int = 12
  extraction: str = "last"
  retractions: str = "ambiguous"


DEFAULT = Conventions()


def same(gold: Node, answer: Node, rules: Conventions = DEFAULT) -> bool:
  """Whether the answer equals the gold answer.

  Raises:
    Ambiguous: the answer states several values where the gold answer has one.
    Undefined: a value does not exist.
    TooLarge: a value exceeds a size limit.
  """
  if gold == answer:
    return True
  gold, answer = (_evaluate_matrices(_stated_value(node)) for node in (gold, answer))
  if gold == answer:
    return True
  if _is_real_set(gold) or _is_real_set(answer):
    same_reals = same_set(gold, answer)
    if same_reals is not None:
      return same_reals
  wanted, given = _members(gold, rules), _members(answer, rules)
  if wanted is not None or given is not None:
    return _same_collections(gold, answer, rules)
  kinds = (type(gold), type(answer))
  if tree.Text in kinds or tree.Opaque in kinds:
    return _same_text(gold, answer)
  if tree.Matrix in kinds or tree.Bracket in kinds:
    return _same_tuples(gold, answer, rules)
  if tree.Relation in kinds:
    return _same_relations(gold, answer, rules)
  return _same_scalars(gold, answer, rules)


def _same_in_order(gold, answer, rules: Conventions) -> bool:
  """Whether two sequences are equal item by item."""
  if len(gold) != len(answer):
    return False
  return all(same(a, b, rules) for a, b in zip(gold, answer, strict=True))


def _same_or_undecided(gold: Node, answer: Node, rules: Conventions) -> bool:
  """`same`, but False if it raises Ambiguous or Undefined."""
  try:
    return same(gold, answer, rules)
  except (Ambiguous, Undefined):
    return False


def _both(kind: type, gold: Node, answer: Node) -> bool:
  return isinstance(gold, kind) and isinstance(answer, kind)


def _stated_value(node: Node) -> Node:
  """The constant or set that a relation states, as in 2+5 = 7 or x in [1,2]; else the tree itself.

  Raises:
    Ambiguous: the constant sides differ, as in 8 = 7.
  """
  if not isinstance(node, tree.Relation):
    return node
  first, *others = node.operands
  if node.signs == ("in",) and not isinstance(others[0], tree.Symbol):
    names = (tree.Symbol, tree.Bracket, tree.ListValue)
    if isinstance(first, names) or is_operation(first, "mul"):
      return others[0]
  if set(node.signs) != {"="} or not all(map(is_constant, node.operands)):
    return node
  for side in others:
    if not _same_scalars(first, side, Conventions(percent="fraction")):
      raise Ambiguous("the sides differ")
  return others[-1]


# Collections: sets, lists, values with ±


def is_member(collection: Node, value: Node, rules: Conventions) -> bool:
  """Whether a value equals a member of a collection."""
  members = _members(collection, rules) or []
  return any(_same_or_undecided(member, value, rules) for member in members)


def _members(node: Node, rules: Conventions) -> list[Node] | None:
  """The members of a finite collection, with ± as two values; None for any other tree."""
  if isinstance(node, (tree.SetValue, tree.ListValue)):
    items = node.items
  elif isinstance(node, tree.Bracket) and rules.tuples == "unordered":
    items = node.items
  elif _is_union_of_sets(node):
    return _members(node.left, rules) + _members(node.right, rules)
  else:
    return [_with_sign(node, "+"), _with_sign(node, "-")] if _has_sign(node) else None
  members = []
  for item in items:
    members += [_with_sign(item, "+"), _with_sign(item, "-")] if _has_sign(item) else [item]
  return members


def _is_union_of_sets(node: Node) -> bool:
  if not isinstance(node, tree.SetOperation) or node.op != "union":
    return False
  sides = (node.left, node.right)
  return all(isinstance(side, tree.SetValue) or _is_union_of_sets(side) for side in sides)


def _has_sign(node: Node) -> bool:
  return any(isinstance(part, tree.PlusMinus) for part in tree.walk(node))


def _with_sign(node: Node, sign: str) -> Node:
  """The tree with every ± replaced by `sign`, and every ∓ by the opposite sign."""
  node = tree.map_children(node, functools.partial(_with_sign, sign=sign))
  if not isinstance(node, tree.PlusMinus):
    return node
  return node.left + node.right if node.upper == sign else node.left - node.right


def _same_collections(gold: Node, answer: Node, rules: Conventions) -> bool:
  """Whether gold and answer have the same values; at least one of them is a collection."""
  wanted, given = _members(gold, rules), _members(answer, rules)
  if wanted is None and _members(unlabelled(gold), rules) is not None:
    return same(unlabelled(gold), answer, rules)
  if given is None and _members(unlabelled(answer), rules) is not None:
    return same(gold, unlabelled(answer), rules)
  if wanted is None:
    if isinstance(gold, tree.Bracket) and isinstance(answer, tree.ListValue):
      return _same_in_order(gold.items, values_by_name(given), rules)
    if isinstance(answer, tree.SetValue) and len(given) == 1:
      return same(gold, given[0], rules)
    if isinstance(gold, (tree.Bracket, tree.Matrix, tree.Text, tree.Opaque)) or not given:
      return False
    raise Ambiguous("several values")
  if given is None:
    if isinstance(answer, tree.Bracket) and isinstance(gold, tree.ListValue):
      return _same_in_order(values_by_name(wanted), answer.items, rules)
    if isinstance(gold, tree.SetValue) and len(wanted) == 1:
      return same(wanted[0], answer, rules)
    if isinstance(answer, (tree.Bracket, tree.Matrix)) or len(wanted) == 1:
      return False
    given = [answer]
  if _both(tree.ListValue, gold, answer) and _is_ordered(gold, answer, rules):
    return _same_in_order(wanted, given, rules)
  return _same_members(wanted, given, rules)


def _is_ordered(gold: tree.ListValue, answer: tree.ListValue, rules: Conventions) -> bool:
  """Whether the order of a list without brackets matters."""
  if rules.lists != "auto":
    return rules.lists == "ordered"
  if gold.joiner != "," or answer.joiner != "," or len(gold.items) < 3:
    return False
  for item in gold.items:
    if not isinstance(item, tree.Number) and not is_operation(item, "neg", "div", "add"):
      return False
  values = [exact(item) for item in gold.items]
  return None not in values and values != sorted(values)


def _same_members(wanted: list[Node], given: list[Node], rules: Conventions) -> bool:
  """Whether two collections have the same members, ignoring order and repetition."""
  if max(len(wanted), len(given)) > MAX_ITEMS:
    raise TooLarge("items")
  labels, given_labels = list(map(label, wanted)), list(map(label, given))
  if all(labels) != all(given_labels):
    # Names on one side only: order matters for distinct names, but not for values of one name.
    if all(labels):
      wanted = values_by_name(wanted)
    else:
      labels, given = given_labels, values_by_name(given)
    names = {named.name for named in labels}
    if len(names) == len(labels) > 1:
      return _same_in_order(wanted, given, rules)
  matches = [[_same_or_undecided(a, b, rules) for b in given] for a in wanted]
  columns = zip(*matches, strict=True) if wanted else [()] * len(given)
  return all(map(any, matches)) and all(map(any, columns))


def _is_real_set(node: Node) -> bool:
  """Whether a tree can only denote a set of reals."""
  if isinstance(node, tree.Bracket):
    half_open = node.opener + node.closer in ("[)", "(]")
    return len(node.items) == 2 and (half_open or any(map(tree.infinite_sign, node.items)))
  if isinstance(node, tree.ListValue):
    return any(map(_is_real_set, node.items))
  if isinstance(node, tree.Relation):
    return not {"<", ">", "<=", ">=", "!="}.isdisjoint(node.signs)
  return isinstance(node, tree.SetOperation)


# Text


def words(text: str) -> str:
  """Text normalised for comparison: letters and digits in lower case, without articles."""
  text = re.sub(r"\\[A-Za-z]+|\b(?:the|a|an)\b(?=.* )", " ", text.lower())
  return re.sub(r"[^a-z0-9\u0080-\uffff]+", "", text)


def _same_text(gold: Node, answer: Node) -> bool:
  for node, other in ((gold, answer), (answer, gold)):
    if isinstance(node, tree.Text) and tree.is_scalar(other):
      word = node.text.lower()
      if word in _NUMBER_WORDS:
        return _same_or_undecided(tree.number(_NUMBER_WORDS.index(word)), other, DEFAULT)
      if isinstance(other, tree.Symbol):
        return words(node.text) == words(other.name)
  if label(answer):
    return same(gold, unlabelled(answer))
  if not _both((tree.Text, tree.Opaque), gold, answer):
    return False
  if not _both(tree.Text, gold, answer):
    if "".join(gold.text.split()) != "".join(answer.text.split()):
      return False
  return words(gold.text) == words(answer.text) != ""


# Tuples and matrices


def _same_tuples(gold: Node, answer: Node, rules: Conventions) -> bool:
  if label(answer) or label(gold):
    return same(unlabelled(gold), unlabelled(answer), rules)
  if _both(tree.Bracket, gold, answer):
    # Two items may be an interval, and [1, 2] differs from (1, 2).
    same_signs = (gold.opener, gold.closer) == (answer.opener, answer.closer)
    if len(gold.items) == 2 and not same_signs:
      return False
    return _same_in_order(gold.items, answer.items, rules)
  if not _both((tree.Bracket, tree.Matrix), gold, answer):
    return False
  if _both(tree.Matrix, gold, answer):
    left, right = gold.rows, answer.rows
  else:
    left, right = _as_column(gold), _as_column(answer)
  if len(left) != len(right):
    return False
  return all(_same_in_order(a, b, rules) for a, b in zip(left, right, strict=True))


def _as_column(node: tree.Bracket | tree.Matrix) -> tuple[tuple[Node, ...], ...]:
  """The rows of a matrix; a tuple or a single row becomes a column."""
  rows = (node.items,) if isinstance(node, tree.Bracket) else node.rows
  return tuple((entry,) for entry in rows[0]) if len(rows) == 1 else rows


def _evaluate_matrices(node: Node) -> Node:
  """Reduces an expression in matrices to one matrix of expressions; keeps any other tree.

  Raises:
    TooLarge: a matrix has more than MAX_ENTRIES.
  """
  if isinstance(node, tree.Matrix) and len(node.rows) * len(node.rows[0]) > MAX_ENTRIES:
    raise TooLarge("matrix")
  if not is_operation(node, "neg", "add", "mul", "div"):
    return node
  operands = [_evaluate_matrices(operand) for operand in node.operands]
  left, right = operands[0], operands[-1]
  if _both(tree.Matrix, left, right):
    if node.op == "neg":
      return tree.map_children(left, operator.neg)
    if node.op == "mul" and len(left.rows[0]) == len(right.rows):
      columns = list(zip(*right.rows, strict=True))
      return tree.Matrix(tuple(tuple(_dot(row, each) for each in columns) for row in left.rows))
    if node.op == "add" and list(map(len, left.rows)) == list(map(len, right.rows)):
      pairs = zip(left.rows, right.rows, strict=True)
      return tree.Matrix(tuple(tuple(map(operator.add, *rows)) for rows in pairs))
  elif isinstance(left, tree.Matrix) and node.op in ("mul", "div"):
    return tree.map_children(left, lambda entry: tree.Operation(node.op, (entry, right)))
  elif isinstance(right, tree.Matrix) and node.op == "mul":
    return tree.map_children(right, lambda entry: left * entry)
  return node


def _dot(row: tuple[Node, ...], column: tuple[Node, ...]) -> Node:
  return functools.reduce(operator.add, map(operator.mul, row, column))


# Relations


def _same_relations(gold: Node, answer: Node, rules: Conventions) -> bool:
  if not isinstance(gold, tree.Relation):
    return any(same(gold, value, rules) for value in stated(answer, gold))
  gold_label, answer_label = label(gold), label(answer)
  approximate = "~" in gold.signs
  if not isinstance(answer, tree.Relation):
    values = stated(gold, answer) if approximate else []
    if gold_label:
      values = [gold_label.value]
    return any(same(value, answer, rules) for value in values)
  if gold_label and answer_label:
    both_functions = is_function(gold.operands[0]) and is_function(answer.operands[0])
    if gold_label.name == answer_label.name or both_functions:
      return same(gold_label.value, answer_label.value, rules)
  if approximate or "~" in answer.signs:
    return any(same(value, answer, rules) for value in stated(gold, answer))
  return same_relation(gold, answer)


# Single values


def _same_scalars(gold: Node, answer: Node, rules: Conventions) -> bool:
  """Whether two single values are equal."""
  times = _time_of_day(gold), _time_of_day(answer)
  if None not in times:
    return _same_time(*times)
  kinds = (type(gold), type(answer))
  if tree.Quantity in kinds:
    return _same_quantities(gold, answer, rules)
  if tree.Based in kinds:
    return _same_based(gold, answer)
  if tree.Ratio in kinds or tree.Clock in kinds:
    return _same_ratios(gold, answer)
  if _both(tree.Modular, gold, answer):
    return equal(gold.modulus, answer.modulus) and _is_congruent(gold, answer)
  if tree.Modular in kinds:
    gold = gold.value if isinstance(gold, tree.Modular) else gold
    answer = answer.value if isinstance(answer, tree.Modular) else answer
    return _same_scalars(gold, answer, rules)
  if is_operation(gold, "percent", "degree") and is_operation(answer, gold.op):
    return _same_scalars(gold.operands[0], answer.operands[0], rules)
  if tree.infinite_sign(gold) or tree.infinite_sign(answer):
    return tree.infinite_sign(gold) == tree.infinite_sign(answer)
  pairs = itertools.product(_readings(gold, rules), _readings(answer, rules))
  return any(_equal_or_rounded(a, b, rules) for a, b in pairs)


def _readings(node: Node, rules: Conventions) -> list[Node]:
  """The possible values of a percentage or an angle; any other value has one: itself."""
  if is_operation(node, "neg") and is_operation(node.operands[0], "percent", "degree"):
    return [-reading for reading in _readings(node.operands[0], rules)]
  if not is_operation(node, "percent", "degree"):
    return [node]
  readings = [node.operands[0], node]
  if node.op == "percent" and rules.percent != "either":
    return readings[1:] if rules.percent == "fraction" else readings[:1]
  return readings


class _Time(NamedTuple):
  """A time of day in 24 hours; `half` is "am", "pm" or, if not written, None."""

  hours: int
  minutes_and_seconds: tuple[int, ...]
  half: str | None


def _time_of_day(node: Node) -> _Time | None:
  half = None
  if isinstance(node, tree.Quantity):
    half = next((name for name, _ in node.unit.dimensions if name in ("am", "pm")), None)
    node = node.value
  if not isinstance(node, tree.Clock):
    return None
  hours, *rest = (int(part.value) for part in node.parts)
  if half and hours <= 12:
    hours = hours % 12 + (12 if half == "pm" else 0)
  return _Time(hours, (*rest, 0)[:2], half)


def _same_time(gold: _Time, answer: _Time) -> bool:
  if gold.minutes_and_seconds != answer.minutes_and_seconds:
    return False
  if gold.hours == answer.hours:
    return True
  # 8:34 equals 8:34 PM, but 20:34 does not equal 8:34 AM.
  with_half, without = (gold, answer) if gold.half else (answer, gold)
  if not with_half.half or without.half or without.hours > 12:
    return False
  return with_half.hours % 12 == without.hours % 12


def _equal_or_rounded(gold: Node, answer: Node, rules: Conventions) -> bool:
  """Whether two values are equal, or one is a rounded or truncated decimal of the other."""
  if equal(gold, answer):
    return True
  if not rules.decimal_digits or tree.symbols(gold) or tree.symbols(answer):
    return False
  form, other_form = _decimal_form(gold), _decimal_form(answer)
  if (form is None) == (other_form is None):
    return False
  decimal, other = (gold, answer) if form else (answer, gold)
  form = form or other_form
  if form.significant < rules.decimal_digits:
    return False
  digits = Digits(60 + form.significant)
  difference = digits.value(other) - digits.value(decimal)
  if digits.ctx.im(difference):
    return False
  difference = digits.ctx.re(difference)  # an mpc such as 7 + 0i has no order
  if digits.ctx.re(digits.value(decimal)) < 0:
    difference = -difference
  last_place = digits.ctx.mpf(10) ** -form.places
  return abs(difference) * 2 <= last_place or 0 <= difference < last_place  # rounded, or truncated


class _DecimalForm(NamedTuple):
  places: int
  significant: int


def _decimal_form(node: Node) -> _DecimalForm | None:
  """Decimal places and significant digits of a finite decimal; None for any other tree."""
  value = exact(node)
  if value is None or bits(value) > 2000:
    return None
  places = value.denominator.bit_length()  # enough for any power of 2 and 5
  scaled = value * 10**places
  if scaled.denominator != 1:
    return None
  digits = str(abs(scaled.numerator))
  spare = min(places, len(digits) - len(digits.rstrip("0")))
  return _DecimalForm(places - spare, max(1, len(digits) - spare))


def _same_quantities(gold: Node, answer: Node, rules: Conventions) -> bool:
  """Whether two values are equal; at least one of them has a unit."""
  value, unit = _value_and_unit(gold)
  other, other_unit = _value_and_unit(answer)
  kinds = {type(value), type(other)}
  if tree.Clock in kinds and not kinds <= {tree.Clock, tree.Ratio}:
    return False
  if rules.units == "ignored":
    return _same_scalars(value, other, rules)
  if rules.units == "required" and unit and unit.dimensions:
    if other_unit is None or not other_unit.dimensions:
      return False
  ratio = unit.ratio(other_unit) if unit and other_unit else 1
  if ratio is None:
    return False
  return _same_scalars(value if ratio == 1 else tree.number(ratio) * value, other, rules)


def _value_and_unit(node: Node) -> tuple[Node, Unit | None]:
  return (node.value, node.unit) if isinstance(node, tree.Quantity) else (node, None)


def _same_based(gold: Node, answer: Node) -> bool:
  """Whether two numerals have equal digits and bases; the base may be missing on one side."""
  if _both(tree.Based, gold, answer):
    return gold.base == answer.base and gold.digits.lstrip("0") == answer.digits.lstrip("0")
  based, other = (gold, answer) if isinstance(gold, tree.Based) else (answer, gold)
  return based.digits.isdigit() and exact(other) == int(based.digits)


def _same_ratios(gold: Node, answer: Node) -> bool:
  """Whether two ratios are proportional (3:2 also equals 3/2); two times must be identical."""
  if _both(tree.Clock, gold, answer):
    return gold == answer
  if _both(tree.Ratio, gold, answer):
    if len(gold.parts) != len(answer.parts):
      return False
    first, other_first = gold.parts[0], answer.parts[0]
    pairs = zip(gold.parts, answer.parts, strict=True)
    return all(equal(first * b, other_first * a) for a, b in pairs)
  ratio, other = (gold, answer) if isinstance(gold, tree.Ratio) else (answer, gold)
  if isinstance(ratio, tree.Clock) and math.gcd(*(int(part.value) for part in ratio.parts)) != 1:
    return False  # 10:30 is a time: as a ratio it would be 1:3
  return len(ratio.parts) == 2 and equal(ratio.parts[0] / ratio.parts[1], other)


def _is_congruent(gold: tree.Modular, answer: tree.Modular) -> bool:
  values = [exact(node) for node in (gold.value, answer.value, gold.modulus)]
  if None in values or values[2] == 0:
    return equal(gold.value, answer.value)
  return ((values[0] - values[1]) / values[2]).denominator == 1
