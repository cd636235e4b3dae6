"""Whether a written answer says what the gold answer says: trees of `answer_grammar` by kind.

The conventions, and why, are in docs/grading.md; those on which people differ are leaves of
`Conventions`.
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
)
from synthneg_jax.grading.answer_tokens import TooLarge
from synthneg_jax.grading.answer_tree import Node, is_operation
from synthneg_jax.grading.answer_units import Unit

MAX_ITEMS = 40  # of a set or list that is compared without order
MAX_ENTRIES = 100  # of a matrix
_NUMBER_WORDS = (
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
  "sixteen seventeen eighteen nineteen twenty"
).split()


class Ambiguous(Exception):
  """The answer states several values, or contradicts itself, where one value is wanted."""


@dataclasses.dataclass(frozen=True)
class Conventions:
  """What counts as the same answer where people differ.

  Attributes:
    percent: what 20% equals: "either" (20 and 0.2), "fraction" (0.2) or "number" (20).
    units: a unit of the gold answer that the answer leaves out: "optional" (no matter), "required"
      (wrong), "ignored" (units are never looked at). Unless ignored, two known units that differ
      are converted or contradict.
    tuples: "ordered", or "unordered": (1,2) equals (2,1) and {1,2}.
    lists: whether 1, 2, 3 without braces is in order: "ordered", "unordered", or "auto": in order
      if it holds at least three numbers that do not ascend, as people sort the lists of a set.
    decimal_digits: significant digits from which a decimal that is the other side rounded or cut
      off equals it, where that has no finite decimal form itself; 0: never. The default takes what
      a computer prints (1/3 is 0.333333333333) and nothing that a person rounds.
    extraction: "last" also reads a response that marks no answer, by its last display or line
      (statements.py); "marked" does not.
    retractions: what "The answer is 7. No wait, it is 8." states: nothing for sure ("ambiguous"),
      or 8 ("last").
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
    Ambiguous: it states several values where the gold answer has one.
    Undefined, TooLarge: a value that does not exist or is beyond what is computed.
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
  """Whether two sequences hold the same values one by one."""
  if len(gold) != len(answer):
    return False
  return all(same(a, b, rules) for a, b in zip(gold, answer, strict=True))


def _same_or_undecided(gold: Node, answer: Node, rules: Conventions) -> bool:
  """As `same`; False where it raises."""
  try:
    return same(gold, answer, rules)
  except (Ambiguous, Undefined):
    return False


def _both(kind: type, gold: Node, answer: Node) -> bool:
  return isinstance(gold, kind) and isinstance(answer, kind)


def _stated_value(node: Node) -> Node:
  """A relation that states one constant or set, as that: 2+5 = 7, x in [1,2]; else the tree.

  Raises:
    Ambiguous: its constant sides differ, as in 8 = 7.
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
      raise Ambiguous("sides that differ")
  return others[-1]


# Collections: sets, lists, values with ±


def is_collection(node: Node) -> bool:
  """Whether a gold answer is several values."""
  return _members(node, DEFAULT) is not None


def is_member(collection: Node, value: Node, rules: Conventions) -> bool:
  """Whether a value is one of several that a tree holds."""
  members = _members(collection, rules) or []
  return any(_same_or_undecided(member, value, rules) for member in members)


def _members(node: Node, rules: Conventions) -> list[Node] | None:
  """The members of a finite collection, ± as two values; None for any other tree."""
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
  """The tree with all signs ± chosen together, ∓ the other way."""
  node = tree.map_children(node, functools.partial(_with_sign, sign=sign))
  if not isinstance(node, tree.PlusMinus):
    return node
  return node.left + node.right if node.upper == sign else node.left - node.right


def _same_collections(gold: Node, answer: Node, rules: Conventions) -> bool:
  """Whether gold and answer, of which at least one is a collection, hold the same values."""
  wanted, given = _members(gold, rules), _members(answer, rules)
  if wanted is None and _members(unlabelled(gold), rules) is not None:
    return same(unlabelled(gold), answer, rules)
  if given is None and _members(unlabelled(answer), rules) is not None:
    return same(gold, unlabelled(answer), rules)
  if wanted is None:
    if isinstance(gold, tree.Bracket) and isinstance(answer, tree.ListValue):
      return _same_in_order(gold.items, list(map(unlabelled, given)), rules)
    if isinstance(answer, tree.SetValue) and len(given) == 1:
      return same(gold, given[0], rules)
    if isinstance(gold, (tree.Bracket, tree.Matrix, tree.Text, tree.Opaque)) or not given:
      return False
    raise Ambiguous("several values")
  if given is None:
    if isinstance(answer, tree.Bracket) and isinstance(gold, tree.ListValue):
      return _same_in_order(list(map(unlabelled, wanted)), answer.items, rules)
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
  """Whether two collections hold the same values, however often."""
  if max(len(wanted), len(given)) > MAX_ITEMS:
    raise TooLarge("items")
  labels, given_labels = list(map(label, wanted)), list(map(label, given))
  if all(labels) != all(given_labels):
    # Names on one side only: distinct names are in order, values of a single name in none.
    if all(labels):
      wanted = list(map(unlabelled, wanted))
    else:
      labels, given = given_labels, list(map(unlabelled, given))
    names = {named.name for named in labels}
    if len(names) == len(labels) > 1:
      return _same_in_order(wanted, given, rules)
  matches = [[_same_or_undecided(a, b, rules) for b in given] for a in wanted]
  columns = zip(*matches, strict=True) if wanted else [()] * len(given)
  return all(map(any, matches)) and all(map(any, columns))


def _is_real_set(node: Node) -> bool:
  """Whether a tree can only be meant as a set of reals."""
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
  """Text as it is compared: letters and digits in lower case, without articles."""
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
    # Two items may be an interval, and [1, 2] is another one than (1, 2).
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
  """Rows of a column for a tuple or a single row; else a matrix's own."""
  rows = (node.items,) if isinstance(node, tree.Bracket) else node.rows
  return tuple((entry,) for entry in rows[0]) if len(rows) == 1 else rows


def _evaluate_matrices(node: Node) -> Node:
  """An expression in matrices as one matrix of expressions; any other tree as it is.

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
  """Whether two single values are the same."""
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
  """The possible values of a percentage or an angle; any other value has one reading."""
  if is_operation(node, "neg") and is_operation(node.operands[0], "percent", "degree"):
    return [-reading for reading in _readings(node.operands[0], rules)]
  if not is_operation(node, "percent", "degree"):
    return [node]
  readings = [node.operands[0], node]
  if node.op == "percent" and rules.percent != "either":
    return readings[1:] if rules.percent == "fraction" else readings[:1]
  return readings


class _Time(NamedTuple):
  """A time of day in 24 hours; half is "am", "pm" or None if it is not written."""

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
  # 8:34 may be in the evening if the other says so, but 20:34 not in the morning.
  with_half, without = (gold, answer) if gold.half else (answer, gold)
  if not with_half.half or without.half or without.hours > 12:
    return False
  return with_half.hours % 12 == without.hours % 12


def _equal_or_rounded(gold: Node, answer: Node, rules: Conventions) -> bool:
  """Whether two values are equal, or one is the other as a decimal to many digits."""
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
  difference = digits.ctx.re(difference)  # 7 + 0i is no mpf and has no order
  if digits.ctx.re(digits.value(decimal)) < 0:
    difference = -difference
  last_place = digits.ctx.mpf(10) ** -form.places
  return abs(difference) * 2 <= last_place or 0 <= difference < last_place  # rounded, or cut off


class _DecimalForm(NamedTuple):
  places: int
  significant: int


def _decimal_form(node: Node) -> _DecimalForm | None:
  """Decimal places and significant digits of a constant; None if it is no finite decimal."""
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
  """Whether two values, one of them with a unit at least, are the same."""
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
  """1011_2 equals 1011_2 and the bare digits 1011; never a numeral in another base."""
  if _both(tree.Based, gold, answer):
    return gold.base == answer.base and gold.digits.lstrip("0") == answer.digits.lstrip("0")
  based, other = (gold, answer) if isinstance(gold, tree.Based) else (answer, gold)
  return based.digits.isdigit() and exact(other) == int(based.digits)


def _same_ratios(gold: Node, answer: Node) -> bool:
  """Ratios up to a factor; two that read as times (10:30) part for part. 3:2 is also 3/2."""
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
    return False  # a ratio would be written 1:3, and 10:30 is a time
  return len(ratio.parts) == 2 and equal(ratio.parts[0] / ratio.parts[1], other)


def _is_congruent(gold: tree.Modular, answer: tree.Modular) -> bool:
  values = [exact(node) for node in (gold.value, answer.value, gold.modulus)]
  if None in values or values[2] == 0:
    return equal(gold.value, answer.value)
  return ((values[0] - values[1]) / values[2]).denominator == 1
