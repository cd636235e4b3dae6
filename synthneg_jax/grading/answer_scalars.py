"""Two single values compared: numbers and expressions with percent signs, degrees, units, bases, ratios and moduli."""

import dataclasses
import math

from synthneg_jax.grading import answer_values
from synthneg_jax.grading.answer_tree import Node, num, sym


class Ambiguous(Exception):
  """The answer states several values, or one that contradicts itself, where one is wanted."""


@dataclasses.dataclass(frozen=True)
class Conventions:
  """What counts as the same answer where honest people differ.

  Attributes:
    percent: what 20% equals: "either" (20 and 0.2), "fraction" (0.2) or "number" (20).
    units: a unit of the gold answer that the answer leaves out: "optional" (no matter), "required" (wrong), "ignored"
      (units are never looked at). Unless ignored, two known units that differ are converted or contradict.
    tuples: "ordered", or "unordered": (1,2) equals (2,1) and {1,2}.
    lists: whether 1, 2, 3 without braces is in order: "ordered", "unordered", or "auto": in order if it holds at least
      three numbers that do not ascend, for who lists a set sorts it.
    decimal_digits: significant digits from which a decimal that is the other side rounded or cut off counts as equal to
      it, where that has no finite decimal form itself; 0: never. The default takes what a computer prints (1/3 is
      0.333333333333) and nothing that a person rounds.
    extraction: "last" reads an unmarked response too, by its last display or line (responses.py); "marked" does not.
    retractions: what "The answer is 7. No wait, it is 8." states: nothing for sure ("ambiguous"), or 8 ("last").
  """

  percent: str = "either"
  units: str = "optional"
  tuples: str = "ordered"
  lists: str = "auto"
  decimal_digits: int = 12
  extraction: str = "last"
  retractions: str = "ambiguous"


def is_scalar(node: Node) -> bool:
  """Whether a tree is one value, and no collection, relation or text."""
  return node.op not in (
    "bracket", "set", "list", "union", "intersection", "minus", "matrix", "rel", "text", "opaque", "pm", "mp",
  )  # fmt: skip


def same_scalar(gold: Node, answer: Node, rules: Conventions) -> bool:
  """Whether two single values are the same.

  Raises:
    Undefined, TooLarge: a value that does not exist or is beyond what is computed.
  """
  clock, clock_too = _clock(gold), _clock(answer)
  if clock and clock_too:
    halves = {clock[1], clock_too[1]}  # 8:34 may be in the evening where the other says so
    return clock[0] == clock_too[0] or (len(halves) == 2 and None in halves and _twelve(clock) == _twelve(clock_too))
  if gold.op == "quantity" or answer.op == "quantity":
    return _same_quantity(gold, answer, rules)
  if gold.op == "base" or answer.op == "base":
    return _same_base(gold, answer)
  if {gold.op, answer.op} & {"ratio", "time"}:
    return _same_ratio(gold, answer)
  if gold.op == "mod" or answer.op == "mod":
    if gold.op == answer.op:
      return answer_values.equal(gold.args[1], answer.args[1]) and _multiple(gold, answer)
    return same_scalar(*(node.args[0] if node.op == "mod" else node for node in (gold, answer)), rules)
  if gold.op == answer.op and gold.op in ("percent", "degree"):
    return same_scalar(gold.args[0], answer.args[0], rules)
  if _infinite(gold) or _infinite(answer):
    return _infinite(gold) == _infinite(answer)
  return any(_equal(a, b, rules) for a in readings(gold, rules) for b in readings(answer, rules))


def _infinite(node: Node) -> int:
  if node == sym("oo"):
    return 1
  return -_infinite(node.args[0]) if node.op == "neg" else 0


def readings(node: Node, rules: Conventions) -> list[Node]:
  """What a percentage or an angle in degrees may stand for; any other value stands for itself."""
  if node.op == "neg" and node.args[0].op in ("percent", "degree"):
    return [Node("neg", (reading,)) for reading in readings(node.args[0], rules)]
  if node.op == "percent":
    found = {"fraction": [node], "number": [node.args[0]]}
    return found.get(rules.percent, [node.args[0], node])
  if node.op == "degree":
    return [node.args[0], node]
  return [node]


def _clock(node: Node) -> tuple[tuple, str | None] | None:
  """((hours, minutes, seconds) of 24 hours, "am", "pm" or None) of a time of day; None for all else."""
  half = None
  if node.op == "quantity":
    node, unit = node.args
    half = next((name for name in ("am", "pm") if name in unit.dimensions), None)
  if node.op != "time":
    return None
  hours, minutes, *seconds = (int(part.args[0]) for part in node.args)
  if half and hours <= 12:
    hours = hours % 12 + (12 if half == "pm" else 0)
  return (hours, minutes, *(seconds or [0])), half


def _twelve(clock: tuple[tuple, str | None]) -> tuple:
  (hours, *rest), half = clock
  return (hours % 12 if half or hours <= 12 else hours, *rest)


def _equal(gold: Node, answer: Node, rules: Conventions) -> bool:
  if answer_values.equal(gold, answer):
    return True
  if not rules.decimal_digits or answer_values.symbols(gold) or answer_values.symbols(answer):
    return False
  places, places_too = _places(gold), _places(answer)
  if (places is None) == (places_too is None):
    return False
  count, significant = places or places_too
  if significant < rules.decimal_digits:
    return False
  digits = answer_values.Digits(60 + significant)
  decimal, other = (digits.value(gold), digits.value(answer)) if places else (digits.value(answer), digits.value(gold))
  if digits.ctx.im(other) or digits.ctx.im(decimal):
    return False
  decimal, other = digits.ctx.re(decimal), digits.ctx.re(other)  # 7 + 0i is no mpf, and has no order
  off, unit = (other - decimal) * (1 if decimal >= 0 else -1), digits.ctx.mpf(10) ** -count
  return abs(off) * 2 <= unit or 0 <= off < unit  # rounded, or cut off


def _places(node: Node) -> tuple[int, int] | None:
  """(decimal places, significant digits) of a constant with a finite decimal form; None for any other."""
  value = answer_values.exact(node)
  if value is None or max(value.numerator.bit_length(), value.denominator.bit_length()) > 2000:
    return None
  rest, twos, fives = value.denominator, 0, 0
  while rest % 2 == 0:
    rest, twos = rest // 2, twos + 1
  while rest % 5 == 0:
    rest, fives = rest // 5, fives + 1
  count = max(twos, fives)
  if rest != 1 or count > 300:
    return None
  return count, len(str(abs(value.numerator * 10**count // value.denominator)))


def _same_quantity(gold: Node, answer: Node, rules: Conventions) -> bool:
  (value, unit), (value_too, unit_too) = (
    node.args if node.op == "quantity" else (node, None) for node in (gold, answer)
  )
  if {value.op, value_too.op} & {"time"} and not {value.op, value_too.op} <= {"time", "ratio"}:
    return False
  if rules.units == "ignored":
    return same_scalar(value, value_too, rules)
  if (
    rules.units == "required" and unit is not None and unit.dimensions and (unit_too is None or not unit_too.dimensions)
  ):
    return False
  if unit is None or unit_too is None:
    return same_scalar(value, value_too, rules)
  ratio = unit.ratio(unit_too)
  if ratio is None:
    return False
  return same_scalar(value if ratio == 1 else Node("mul", (num(ratio), value)), value_too, rules)


def _same_base(gold: Node, answer: Node) -> bool:
  """1011_2 equals 1011_2 and the bare digits 1011; never a numeral in another base."""
  if gold.op == answer.op:
    return gold.args[1] == answer.args[1] and gold.args[0].lstrip("0") == answer.args[0].lstrip("0")
  based, other = (gold, answer) if gold.op == "base" else (answer, gold)
  return based.args[0].isdigit() and answer_values.exact(other) == int(based.args[0])


def _same_ratio(gold: Node, answer: Node) -> bool:
  """Ratios up to a factor; but two that read as times of day (10:30) part for part. 3:2 is also 3/2."""
  kinds = ("ratio", "time")
  if gold.op not in kinds or answer.op not in kinds:
    ratio, other = (gold, answer) if gold.op in kinds else (answer, gold)
    if ratio.op == "time" and math.gcd(*(int(part.args[0]) for part in ratio.args)) != 1:
      return False  # who means a ratio writes 1:3, and 10:30 is a time
    return len(ratio.args) == 2 and answer_values.equal(Node("div", ratio.args), other)
  if len(gold.args) != len(answer.args):
    return False
  if gold.op == answer.op == "time":
    return gold == answer
  first, first_too = gold.args[0], answer.args[0]
  return all(
    answer_values.equal(Node("mul", (first, b)), Node("mul", (first_too, a)))
    for a, b in zip(gold.args[1:], answer.args[1:], strict=True)
  )


def _multiple(gold: Node, answer: Node) -> bool:
  values = [answer_values.exact(node) for node in (gold.args[0], answer.args[0], gold.args[1])]
  if None in values or values[2] == 0:
    return answer_values.equal(gold.args[0], answer.args[0])
  return ((values[0] - values[1]) / values[2]).denominator == 1
