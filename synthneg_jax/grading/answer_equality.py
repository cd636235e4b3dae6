"""Whether a written answer says what the gold answer says: trees of `answer_grammar` by kind.

The conventions, and why, are in docs/grading.md; those on which people differ are leaves of
`Conventions`.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

from synthneg_jax.grading.answer_numbers import Digits, Undefined, equal, exact
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
from synthneg_jax.grading.answer_tree import (
  Based,
  Bracket,
  Clock,
  ListValue,
  Matrix,
  Modular,
  Node,
  Number,
  Opaque,
  PlusMinus,
  Quantity,
  Ratio,
  Relation,
  SetOperation,
  SetValue,
  Symbol,
  Text,
  added,
  contains,
  divided,
  infinite_sign,
  is_operation,
  is_scalar,
  map_children,
  multiplied,
  negated,
  number,
  subtracted,
  symbols,
)
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
    extraction: "last" reads an unmarked response too (rule 5 of answer_extraction.py); "marked"
      does not.
  """

  percent: str = "either"
  units: str = "optional"
  tuples: str = "ordered"
  lists: str = "auto"
  decimal_digits: int = 12
  extraction: str = "last"


DEFAULT = Conventions()


def same(gold: Node, answer: Node, rules: Conventions = DEFAULT) -> bool:
  """Whether the answer equals the gold answer.

  Raises:
    Ambiguous: it states several values where the gold answer has one.
    Undefined, TooLarge: a value that does not exist or is beyond what is computed.
  """
  if gold == answer:
    return True
  gold, answer = _simplified(gold), _simplified(answer)
  if gold == answer:
    return True
  if _is_real_set(gold) or _is_real_set(answer):
    same_reals = same_set(gold, answer)
    if same_reals is not None:
      return same_reals
  if _is_collection(gold, rules) or _is_collection(answer, rules):
    return _same_collections(gold, answer, rules)
  kinds = (type(gold), type(answer))
  if Text in kinds or Opaque in kinds:
    return _same_text(gold, answer)
  if Matrix in kinds or Bracket in kinds:
    return _same_tuples(gold, answer, rules)
  if Relation in kinds:
    return _same_relations(gold, answer, rules)
  return _same_scalars(gold, answer, rules)


def _same_in_order(gold, answer, rules: Conventions) -> bool:
  """Whether two sequences hold the same values one by one."""
  return len(gold) == len(answer) and all(same(a, b, rules) for a, b in zip(gold, answer, strict=True))


def _same_or_undecided(gold: Node, answer: Node, rules: Conventions) -> bool:
  """As `same`; False where it raises."""
  try:
    return same(gold, answer, rules)
  except (Ambiguous, Undefined):
    return False


def _simplified(node: Node) -> Node:
  """A tree without what only leads to its value: the steps of 2+5 = 7, matrix arithmetic."""
  return _evaluate_matrices(_stated_value(node))


def _stated_value(node: Node) -> Node:
  """A relation that states one constant or set, as that: 2+5 = 7, x in [1,2]; else the tree.

  Raises:
    Ambiguous: its constant sides differ, as in 8 = 7.
  """
  if not isinstance(node, Relation):
    return node
  first, *others = node.operands
  if node.signs == ("in",) and not isinstance(others[0], Symbol):
    if isinstance(first, (Symbol, Bracket, ListValue)) or is_operation(first, "mul"):
      return others[0]
  if set(node.signs) != {"="} or not all(map(is_constant, node.operands)):
    return node
  for side in others:
    if not _same_scalars(first, side, Conventions(percent="fraction")):
      raise Ambiguous("sides that differ")
  return others[-1]


# Collections: sets, lists, roots with ±


def is_collection(node: Node) -> bool:
  """Whether a gold answer is several values."""
  return _is_collection(node, DEFAULT)


def _is_collection(node: Node, rules: Conventions) -> bool:
  return _members(node, rules) is not None


def _members(node: Node, rules: Conventions) -> list[Node] | None:
  """The members of a finite collection, ± as two values; None for any other tree."""
  if isinstance(node, (SetValue, ListValue)):
    items = node.items
  elif isinstance(node, Bracket) and rules.tuples == "unordered":
    items = node.items
  elif _is_union_of_sets(node):
    items = [*(_members(node.left, rules) or ()), *(_members(node.right, rules) or ())]
  elif contains(node, _is_plus_minus):
    items = (node,)
  else:
    return None
  members = []
  for item in items:
    if contains(item, _is_plus_minus):
      members += [_with_sign(item, "+"), _with_sign(item, "-")]
    else:
      members.append(item)
  return members


def _is_union_of_sets(node: Node) -> bool:
  if not isinstance(node, SetOperation) or node.op != "union":
    return False
  return all(isinstance(p, SetValue) or _is_union_of_sets(p) for p in (node.left, node.right))


def _is_plus_minus(node: Node) -> bool:
  return isinstance(node, PlusMinus)


def _with_sign(node: Node, sign: str) -> Node:
  """The tree with all signs ± chosen together, ∓ the other way."""
  node = map_children(node, functools.partial(_with_sign, sign=sign))
  if not isinstance(node, PlusMinus):
    return node
  return (added if node.upper == sign else subtracted)(node.left, node.right)


def _same_collections(gold: Node, answer: Node, rules: Conventions) -> bool:
  """Whether gold and answer, of which one is a collection at least, hold the same values."""
  if not _is_collection(gold, rules) and _is_collection(unlabelled(gold), rules):
    return same(unlabelled(gold), answer, rules)
  if not _is_collection(answer, rules) and _is_collection(unlabelled(answer), rules):
    return same(gold, unlabelled(answer), rules)
  wanted, given = _members(gold, rules), _members(answer, rules)
  if wanted is None:
    if isinstance(gold, Bracket) and isinstance(answer, ListValue):
      return _same_in_order(gold.items, list(map(unlabelled, given)), rules)
    if isinstance(answer, SetValue) and len(given) == 1:
      return same(gold, given[0], rules)
    if isinstance(gold, (Bracket, Matrix, Text, Opaque)) or not given:
      return False
    raise Ambiguous("several values")
  if given is None:
    if isinstance(answer, Bracket) and isinstance(gold, ListValue):
      return _same_in_order(list(map(unlabelled, wanted)), answer.items, rules)
    if isinstance(gold, SetValue) and len(wanted) == 1:
      return same(wanted[0], answer, rules)
    if isinstance(answer, (Bracket, Matrix)) or len(wanted) == 1:
      return False
    given = [answer]
  if isinstance(gold, ListValue) and isinstance(answer, ListValue):
    if _is_ordered(gold, answer, rules):
      return _same_in_order(wanted, given, rules)
  return _same_members(wanted, given, rules)


def _is_ordered(gold: ListValue, answer: ListValue, rules: Conventions) -> bool:
  """Whether the order of a list without brackets matters."""
  if rules.lists != "auto":
    return rules.lists == "ordered"
  if gold.joiner != "," or answer.joiner != "," or len(gold.items) < 3:
    return False
  for item in gold.items:
    if not isinstance(item, Number) and not is_operation(item, "neg", "div", "add"):
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
    names = [named.name for named in (labels if all(labels) else given_labels)]
    if all(labels):
      wanted = list(map(unlabelled, wanted))
    else:
      given = list(map(unlabelled, given))
    if len(set(names)) == len(names) > 1:
      return _same_in_order(wanted, given, rules)
  matches = [[_same_or_undecided(a, b, rules) for b in given] for a in wanted]
  return all(map(any, matches)) and all(any(row[column] for row in matches) for column in range(len(given)))


def _is_real_set(node: Node) -> bool:
  """Whether a tree can only be meant as a set of reals."""
  if isinstance(node, Bracket):
    half_open = node.opener + node.closer in ("[)", "(]")
    return len(node.items) == 2 and (half_open or any(map(infinite_sign, node.items)))
  if isinstance(node, ListValue):
    return any(map(_is_real_set, node.items))
  if isinstance(node, Relation):
    return not {"<", ">", "<=", ">=", "!="}.isdisjoint(node.signs)
  return isinstance(node, SetOperation)


# Text


def words(text: str) -> str:
  """Text as it is compared: letters and digits in lower case, without articles."""
  text = re.sub(r"\\[A-Za-z]+|\b(?:the|a|an)\b(?=.* )", " ", text.lower())
  return re.sub(r"[^a-z0-9\u0080-\uffff]+", "", text)


def _same_text(gold: Node, answer: Node) -> bool:
  for node, other in ((gold, answer), (answer, gold)):
    if isinstance(node, Text) and is_scalar(other):
      word = node.text.lower()
      if word in _NUMBER_WORDS:
        return _same_or_undecided(number(_NUMBER_WORDS.index(word)), other, DEFAULT)
      if isinstance(other, Symbol):
        return words(node.text) == words(other.name)
  if label(answer):
    return same(gold, unlabelled(answer))
  if not isinstance(gold, (Text, Opaque)) or not isinstance(answer, (Text, Opaque)):
    return False
  if isinstance(gold, Opaque) or isinstance(answer, Opaque):
    if "".join(gold.text.split()) != "".join(answer.text.split()):
      return False
  return words(gold.text) == words(answer.text) != ""


# Tuples and matrices


def _same_tuples(gold: Node, answer: Node, rules: Conventions) -> bool:
  if label(answer) or label(gold):
    return same(unlabelled(gold), unlabelled(answer), rules)
  if isinstance(gold, Bracket) and isinstance(answer, Bracket):
    if len(gold.items) == 2:
      if (gold.opener, gold.closer) != (answer.opener, answer.closer):
        return False
    return _same_in_order(gold.items, answer.items, rules)
  left, right = _rows(gold), _rows(answer)
  if left is None or right is None:
    return False
  if not (isinstance(gold, Matrix) and isinstance(answer, Matrix)):  # a tuple is a row or a column
    left, right = _as_column(left), _as_column(right)
  return len(left) == len(right) and all(_same_in_order(*pair, rules) for pair in zip(left, right, strict=True))


def _rows(node: Node) -> tuple[tuple[Node, ...], ...] | None:
  if isinstance(node, Bracket):
    return (node.items,)
  return node.rows if isinstance(node, Matrix) else None


def _as_column(rows: tuple[tuple[Node, ...], ...]) -> tuple[tuple[Node, ...], ...]:
  return tuple((entry,) for entry in rows[0]) if len(rows) == 1 else rows


def _evaluate_matrices(node: Node) -> Node:
  """An expression in matrices as one matrix of expressions; any other tree as it is.

  Raises:
    TooLarge: a matrix has more than MAX_ENTRIES.
  """
  if isinstance(node, Matrix) and len(node.rows) * len(node.rows[0]) > MAX_ENTRIES:
    raise TooLarge("matrix")
  if not is_operation(node, "neg", "add", "mul", "div"):
    return node
  operands = [_evaluate_matrices(operand) for operand in node.operands]
  if not any(isinstance(operand, Matrix) for operand in operands):
    return node
  left, right = operands[0], operands[-1]
  both = isinstance(left, Matrix) and isinstance(right, Matrix)
  if node.op == "neg":
    return map_children(left, negated)
  if node.op == "div" and not isinstance(right, Matrix):
    return map_children(left, lambda entry: divided(entry, right))
  if node.op == "mul" and not both:
    scale, matrix = (left, right) if isinstance(right, Matrix) else (right, left)
    return map_children(matrix, lambda entry: multiplied(scale, entry))
  if node.op == "mul" and len(left.rows[0]) == len(right.rows):
    columns = list(zip(*right.rows, strict=True))
    return Matrix(tuple(tuple(_dot(row, column) for column in columns) for row in left.rows))
  if node.op == "add" and both and _shape(left) == _shape(right):
    pairs = zip(left.rows, right.rows, strict=True)
    return Matrix(tuple(tuple(map(added, *rows)) for rows in pairs))
  return node


def _shape(matrix: Matrix) -> tuple[int, int]:
  return len(matrix.rows), len(matrix.rows[0])


def _dot(row: tuple[Node, ...], column: tuple[Node, ...]) -> Node:
  return functools.reduce(added, map(multiplied, row, column))


# Relations


def _same_relations(gold: Node, answer: Node, rules: Conventions) -> bool:
  if not isinstance(gold, Relation):
    return any(same(gold, value, rules) for value in stated(answer, gold))
  gold_label, answer_label = label(gold), label(answer)
  approximate = "~" in gold.signs
  if not isinstance(answer, Relation):
    values = [gold_label.value] if gold_label else stated(gold, answer) if approximate else []
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
  if Quantity in kinds:
    return _same_quantities(gold, answer, rules)
  if Based in kinds:
    return _same_based(gold, answer)
  if Ratio in kinds or Clock in kinds:
    return _same_ratios(gold, answer)
  if Modular in kinds:
    if isinstance(gold, Modular) and isinstance(answer, Modular):
      return equal(gold.modulus, answer.modulus) and _is_congruent(gold, answer)
    gold, answer = (node.value if isinstance(node, Modular) else node for node in (gold, answer))
    return _same_scalars(gold, answer, rules)
  if is_operation(gold, "percent", "degree") and is_operation(answer, gold.op):
    return _same_scalars(gold.operands[0], answer.operands[0], rules)
  if infinite_sign(gold) or infinite_sign(answer):
    return infinite_sign(gold) == infinite_sign(answer)
  return any(_equal_or_rounded(a, b, rules) for a in _readings(gold, rules) for b in _readings(answer, rules))


def _readings(node: Node, rules: Conventions) -> list[Node]:
  """What a percentage or an angle may stand for; any other value stands for itself."""
  if is_operation(node, "neg") and is_operation(node.operands[0], "percent", "degree"):
    return [negated(reading) for reading in _readings(node.operands[0], rules)]
  if is_operation(node, "percent") and rules.percent == "fraction":
    return [node]
  if is_operation(node, "percent") and rules.percent == "number":
    return [node.operands[0]]
  return [node.operands[0], node] if is_operation(node, "percent", "degree") else [node]


class _Time(NamedTuple):
  """A time of day in 24 hours; half is "am", "pm" or None if it is not written."""

  hours: int
  minutes_and_seconds: tuple[int, int]
  half: str | None


def _time_of_day(node: Node) -> _Time | None:
  half = None
  if isinstance(node, Quantity):
    half = next((name for name in ("am", "pm") if name in node.unit.dimensions), None)
    node = node.value
  if not isinstance(node, Clock):
    return None
  hours, minutes, *seconds = (int(part.value) for part in node.parts)
  if half and hours <= 12:
    hours = hours % 12 + (12 if half == "pm" else 0)
  return _Time(hours, (minutes, seconds[0] if seconds else 0), half)


def _same_time(gold: _Time, answer: _Time) -> bool:
  if gold.minutes_and_seconds != answer.minutes_and_seconds:
    return False
  if gold.hours == answer.hours:
    return True
  if (gold.half is None) == (answer.half is None):
    return False
  # 8:34 may be in the evening if the other says so, but not 20:34 in the morning.
  halves = [time.hours % 12 if time.half or time.hours <= 12 else None for time in (gold, answer)]
  return None not in halves and halves[0] == halves[1]


def _equal_or_rounded(gold: Node, answer: Node, rules: Conventions) -> bool:
  """Whether two values are equal, or one is the other as a decimal to many digits."""
  if equal(gold, answer):
    return True
  if not rules.decimal_digits or symbols(gold) or symbols(answer):
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
  """Decimal places and significant digits of a finite decimal."""

  places: int
  significant: int


def _decimal_form(node: Node) -> _DecimalForm | None:
  """None where a tree is no constant with a finite decimal form of sensible length."""
  value = exact(node)
  if value is None or max(value.numerator.bit_length(), value.denominator.bit_length()) > 2000:
    return None
  rest, places = value.denominator, 0
  for prime in (2, 5):
    count = 0
    while rest % prime == 0:
      rest, count = rest // prime, count + 1
    places = max(places, count)
  if rest != 1 or places > 300:
    return None
  return _DecimalForm(places, len(str(abs(value.numerator * 10**places // value.denominator))))


def _same_quantities(gold: Node, answer: Node, rules: Conventions) -> bool:
  """Whether two values, one of them with a unit at least, are the same."""
  value, unit = _value_and_unit(gold)
  other, other_unit = _value_and_unit(answer)
  kinds = {type(value), type(other)}
  if Clock in kinds and not kinds <= {Clock, Ratio}:
    return False
  if rules.units != "ignored":
    if rules.units == "required" and unit and unit.dimensions:
      if other_unit is None or not other_unit.dimensions:
        return False
    ratio = unit.ratio(other_unit) if unit and other_unit else 1
    if ratio is None:
      return False
    if ratio != 1:
      value = multiplied(number(ratio), value)
  return _same_scalars(value, other, rules)


def _value_and_unit(node: Node) -> tuple[Node, Unit | None]:
  return (node.value, node.unit) if isinstance(node, Quantity) else (node, None)


def _same_based(gold: Node, answer: Node) -> bool:
  """1011_2 equals 1011_2 and the bare digits 1011; never a numeral in another base."""
  if isinstance(gold, Based) and isinstance(answer, Based):
    return gold.base == answer.base and gold.digits.lstrip("0") == answer.digits.lstrip("0")
  based, other = (gold, answer) if isinstance(gold, Based) else (answer, gold)
  return based.digits.isdigit() and exact(other) == int(based.digits)


def _same_ratios(gold: Node, answer: Node) -> bool:
  """Ratios up to a factor; two that read as times (10:30) part for part. 3:2 is also 3/2."""
  kinds = (Ratio, Clock)
  if isinstance(gold, Clock) and isinstance(answer, Clock):
    return gold == answer
  if isinstance(gold, kinds) and isinstance(answer, kinds):
    if len(gold.parts) != len(answer.parts):
      return False
    (first, *rest), (other_first, *other_rest) = gold.parts, answer.parts
    return all(equal(multiplied(first, b), multiplied(other_first, a)) for a, b in zip(rest, other_rest, strict=True))
  ratio, other = (gold, answer) if isinstance(gold, kinds) else (answer, gold)
  if isinstance(ratio, Clock) and math.gcd(*(int(part.value) for part in ratio.parts)) != 1:
    return False  # who means a ratio writes 1:3, and 10:30 is a time
  return len(ratio.parts) == 2 and equal(divided(*ratio.parts), other)


def _is_congruent(gold: Modular, answer: Modular) -> bool:
  values = [exact(node) for node in (gold.value, answer.value, gold.modulus)]
  if None in values or values[2] == 0:
    return equal(gold.value, answer.value)
  return ((values[0] - values[1]) / values[2]).denominator == 1
