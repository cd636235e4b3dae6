"""Verdicts: compares the statements of a response (statements.py) with the gold answer.

Both kinds of answers are extracted and parsed the same way. Kind "math" compares trees; kind
"integer" compares the rational numbers that the trees denote.
"""

import fractions
import functools
import re
from typing import NamedTuple

from synthneg_jax.grading import (
  answer_equality,
  answer_grammar,
  answer_relations,
  answer_units,
  sentences,
)
from synthneg_jax.grading import answer_tree as tree
from synthneg_jax.grading import statements as statements_lib
from synthneg_jax.grading.answer_equality import Ambiguous, Conventions
from synthneg_jax.grading.answer_numbers import Undefined, exact
from synthneg_jax.grading.answer_tokens import MAX_CHARS, TooLarge, Unreadable, tidy
from synthneg_jax.grading.answer_tree import Node
from synthneg_jax.grading.statements import Statement
from synthneg_jax.runtime import errors

MAX_EXTRACTED = 200  # characters of an answer kept in a verdict
_MAX_BITS = 14_000  # of a rational answer, since Python prints at most 4,300 digits
_MAX_STATEMENTS = 40  # last statements compared
_CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:](?![0-9]))\s*(.*)", re.DOTALL)
_LETTER = re.compile(r"\(?([A-J])\)?\.?")
_LETTER_WITHIN = re.compile(
  r"\A\s*(?:[Ss]o\s+|[Tt]hus\s+|therefore,?\s+|hence\s+)?\(?([A-J])\)?\s+is\s+(?:the\s+)?"
  r"(?:correct|right|answer)|\(([A-J])\)[\s.]*\Z|\A\s*\(?([A-J])\)?\s*[,.:)]",
)
_ANOTHER_LETTER = re.compile(  # "A, B" and "A. 5, B. 6", but not "(A), since (B) is wrong"
  r"\)?[:.]?\s*(?:-?[0-9][0-9.,/]*|correct|incorrect|wrong|right)?\s*(?:[,;&]|,?\s*\band\b)\s*"
  r"\(?([A-J])(?=\s*(?:[,;&.:)]|and\b|\Z))"
  r"(?![^;(]*\b(?:wrong|false|not|less|eliminated|fail\w*|too|rule[sd]?|cannot)\b)"
)
_LETTERS = re.compile(
  r"(?:[A-J]|\([A-J]\))(?:\s*(?:[,;&]|(?:,\s*)?\band\b)\s*(?:[A-J]|\([A-J]\)))+[\s.]*"
)
_PLAIN_NUMBER = re.compile(
  r"\s*(-?)\$?(?:([1-9][0-9]{0,2}(?:,[0-9]{3})+)|([0-9]{1,300}))(?:\.([0-9]{1,300}))?\s*\.?\s*"
)
_ANSWERS_IN_WORDS = re.compile(
  r"(?:no\s+(?:real\s+)?solutions?|none|undefined|infinit\w*|impossible|does\s+not\s+exist|yes|no"
  r"|true|false)[.\s]*",
  re.IGNORECASE,
)


class Outcome(NamedTuple):
  """The comparison of one statement with the gold answer.

  Attributes:
    reason: as in a verdict.
    value: the parsed value, a tree or a fraction; None if nothing was parsed.
    whole: whether the value is the statement's whole text, not a number or formula within it.
  """

  reason: str
  value: Node | fractions.Fraction | None = None
  whole: bool = False


def canonical(text: str) -> str:
  """An answer without layout and spaces."""
  text = tidy(text[: 2 * MAX_CHARS])
  text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox|textit)\{([^{}]*)\}", r"\1", text)
  text = re.sub(r"(?<=[0-9])\s+(?=[0-9])(?![0-9]{3}(?![0-9]))", "_", text)  # 2 3 is not 23
  return re.sub(r"\s+", "", text)


def read(text: str) -> Node:
  """Parses an answer; text outside the grammar is Opaque, which equals only the same text.

  Raises:
    TooLarge: the text exceeds a size limit.
  """
  if len(text) > MAX_CHARS:
    raise TooLarge("characters")
  try:
    return answer_grammar.parse(text)
  except Unreadable:
    return tree.Opaque(canonical(text))
  except RecursionError:
    raise TooLarge("depth") from None


def _is_words(value) -> bool:
  if isinstance(value, tree.ListValue):
    return all(map(_is_words, value.items))
  return isinstance(value, tree.Text | tree.Opaque)


def _mixes_words(node: Node) -> bool:
  """Whether a list contains both words and values: "72, altogether"."""
  return isinstance(node, tree.ListValue) and len(set(map(_is_words, node.items))) == 2


class MathGold:
  """A gold answer of kind "math"."""

  def __init__(self, gold: str, rules: Conventions):
    self.text, self.rules = gold, rules
    self.tree, self.plain = _math_gold(gold)
    self.letter = _letter(self.tree, self.plain)
    self.letters = _letters(gold)
    self.is_words = _is_words(self.tree)

  def shown(self, outcome: Outcome, text: str) -> str | None:
    """The `extracted` field of the verdict."""
    if outcome.value is not None:
      try:
        value = exact(outcome.value)
        if value is not None and len(str(value)) < MAX_EXTRACTED:
          return str(value)
      except (Undefined, TooLarge, RecursionError, ValueError):
        pass
    return canonical(text)[:MAX_EXTRACTED] or None

  def at_once(self, text: str) -> Outcome | None:
    """The outcome of text that needs no parsing: the gold answer, or the letter of a choice."""
    approximate = text.lstrip().startswith("~")
    if len(text) <= 2 * MAX_CHARS and canonical(text) == self.plain and not approximate:
      return Outcome("right", self.tree, True)
    if (self.letters or self.letter) and (given := _letters(text)):
      return Outcome("right" if given == self.letters else "wrong", read(text), True)
    if self.letter is None:
      return None
    if chosen := _LETTER.fullmatch(canonical(text)):
      return self._choice(chosen.group(1))
    plain = _plain_words(text)
    chosen = _CHOICE.fullmatch(plain)
    explanation = chosen.group(2).partition("because")[0] if chosen else ""
    if re.search(r"\b(?:or|maybe|perhaps|not)\b", explanation):
      return None
    chosen = chosen or _LETTER_WITHIN.search(plain)
    if not chosen:
      return None
    start, letter = next((chosen.end(i), x) for i, x in enumerate(chosen.groups(), 1) if x)
    other = _ANOTHER_LETTER.match(plain, start)
    if other and other.group(1) != letter:
      return None
    return self._choice(letter)

  def _choice(self, letter: str) -> Outcome:
    return Outcome("right" if letter == self.letter else "wrong", tree.Symbol(letter), True)

  def compare(self, text: str) -> Outcome | None:
    """The outcome of one candidate; None if the grammar does not parse it."""
    node = read(text)
    if isinstance(node, tree.Opaque) or (_mixes_words(node) and not _mixes_words(self.tree)):
      return None
    for answer, gold in ((_decimal_comma(text), self.tree), (node, _decimal_comma(self.text))):
      if answer is not None and gold is not None and self._judge(answer, gold) == "right":
        return Outcome("right", answer)
    return Outcome(self._judge(node, self.tree), node)

  def _judge(self, node: Node, gold: Node) -> str:
    try:
      return "right" if answer_equality.same(gold, node, self.rules) else "wrong"
    except Ambiguous:
      return "right" if self._restates(node, gold) else "ambiguous"
    except Undefined:
      return "unparsable"
    except (TooLarge, RecursionError):
      return "too_large"

  def _restates(self, node: Node, gold: Node) -> bool:
    """Whether a list repeats the gold value in several forms: 1/2 or 0.5."""
    if not isinstance(node, tree.ListValue) or len(node.items) > answer_equality.MAX_ITEMS:
      return False
    return all(self._judge(item, gold) == "right" for item in node.items)

  def unread(self, text: str) -> Outcome:
    """The outcome of a statement without a parsable candidate."""
    node = read(text)
    if isinstance(self.tree, tree.Opaque) and isinstance(node, tree.Opaque):
      if answer_equality.words(self.plain) == answer_equality.words(node.text):
        return Outcome("right" if self.tree == node else "unparsable", node)
    return Outcome("unparsable")

  def is_part(self, outcome: Outcome) -> bool:
    """Whether a value is a member of the gold answer."""
    return isinstance(outcome.value, Node) and answer_equality.is_member(
      self.tree, outcome.value, self.rules
    )


@functools.lru_cache(maxsize=1 << 14)
def _math_gold(gold: str) -> tuple[Node, str]:
  """The tree and the canonical text of a gold answer.

  Raises:
    UserError: the gold answer is empty or too large.
  """
  text = statements_lib.gold_text(gold)
  try:
    if tidy(text[: 2 * MAX_CHARS]):
      return read(text), canonical(text)
    problem = "empty"
  except TooLarge:
    problem = "too long or too deeply nested"
  raise errors.UserError(f"The gold answer {gold[:MAX_EXTRACTED]!r} is {problem}.")


def _plain_words(text: str) -> str:
  """A text without LaTeX's text commands."""
  return re.sub(r"\\[a-z]+\{([^{}]*)\}", r"\1", tidy(text[:MAX_CHARS])).strip()


def _letters(text: str) -> frozenset[str]:
  """The letters of "A and C"; empty for any other text."""
  plain = _plain_words(text)
  return frozenset(re.findall("[A-J]", plain)) if _LETTERS.fullmatch(plain) else frozenset()


def _letter(gold: Node, plain: str) -> str | None:
  """The letter of a multiple-choice gold answer; None for any other answer."""
  if isinstance(gold, tree.Symbol | tree.Text):
    match = _LETTER.fullmatch(gold.name if isinstance(gold, tree.Symbol) else gold.text)
    return match.group(1) if match else None
  match = _CHOICE.fullmatch(plain)
  return match.group(1) if match and plain[1:2] in ".)" else None


def _decimal_comma(text: str) -> Node | None:
  """The number 3,14 with a decimal comma; None for other text, including 3,000."""
  match = re.fullmatch(r"(-?[0-9]+),([0-9]+)", tidy(text[:MAX_CHARS]))
  if not match or re.fullmatch(r"-?[1-9][0-9]{0,2},[0-9]{3}", match.group()):
    return None
  return read(f"{match.group(1)}.{match.group(2)}")


class IntegerGold:
  """A gold answer of kind "integer": one rational number."""

  is_words = False

  def __init__(self, gold: str):
    self.value = _integer_gold(gold)

  def shown(self, outcome: Outcome, text: str) -> str | None:
    """The `extracted` field of the verdict."""
    if outcome.value is not None:
      return str(outcome.value)
    return " ".join(text.split())[:MAX_EXTRACTED] or None

  def at_once(self, text: str) -> Outcome | None:
    """The outcome of a numeral, which needs no parsing."""
    match = _PLAIN_NUMBER.fullmatch(text)
    if not match:
      return None
    sign, grouped, digits, decimals = match.groups()
    digits, decimals = (grouped or digits).replace(",", ""), decimals or ""
    return self._outcome(
      fractions.Fraction(int(sign + digits + decimals), 10 ** len(decimals)), True
    )

  def _outcome(self, value: fractions.Fraction, whole: bool = False) -> Outcome:
    return Outcome("right" if value == self.value else "wrong", value, whole)

  def compare(self, text: str) -> Outcome | None:
    """The outcome of one candidate; None if it is not a rational number."""
    node = read(text)
    if isinstance(node, tree.Opaque) or _mixes_words(node):
      return None
    try:
      value = rational(node)
    except Ambiguous:
      return Outcome("ambiguous")
    except Undefined:
      return Outcome("unparsable")
    except (TooLarge, RecursionError):
      return Outcome("too_large")
    if value is None and _is_formula(node, text):
      return Outcome("unparsable", None, True)  # its number is not the answer
    return None if value is None else self._outcome(value)

  def unread(self, text: str) -> Outcome:
    """The outcome of a statement without a parsable candidate; several numbers are ambiguous."""
    several = re.match(r"[-+$ ]*[0-9]", text) and len(set(re.findall("[0-9]+", text))) > 1
    return Outcome("ambiguous" if several else "unparsable")

  def is_part(self, outcome: Outcome) -> bool:
    """A single number has no parts."""
    return False


def _is_formula(node: Node, text: str) -> bool:
  """Whether an answer is a formula without a rational value, rather than words with a number."""
  unit = re.fullmatch(r"[^A-Za-z]*[0-9]\s*([A-Za-z]{1,3})(?:/[A-Za-z]{1,4})?[\s.]*", text)
  if unit and (unit.group(1) in "NJVAWCFKLcp" or answer_units.unit_of(unit.group(1))):
    return False
  words = re.sub(r"\\[A-Za-z]+|\b(?:sqrt|pi|ln|log|sin|cos|tan|exp)\b", "", text)
  is_value = tree.is_scalar(node) or (isinstance(node, tree.Relation) and text.count("=") == 1)
  return is_value and not re.search("[A-Za-z]{2}|:", words)


@functools.lru_cache(maxsize=1 << 16)
def _integer_gold(gold: str) -> fractions.Fraction:
  """The value of a gold answer; raises UserError if it is not a number."""
  try:
    value = rational(read(statements_lib.gold_text(gold))) if gold.strip() else None
  except (Ambiguous, Undefined, TooLarge, RecursionError):
    value = None
  if value is None:
    raise errors.UserError(f"The gold answer {gold[:MAX_EXTRACTED]!r} is not a number.")
  return value


def rational(node: Node) -> fractions.Fraction | None:
  """The rational number of an answer without its unit (20% is 20); None for any other answer.

  Raises:
    Ambiguous: the answer states several numbers: "7, 8", "7 = 8".
    Undefined: the answer has no value.
    TooLarge: the value exceeds a size limit.
  """
  if isinstance(node, tree.Quantity):
    return rational(node.value)
  if tree.is_operation(node, "percent", "degree"):
    return rational(node.operands[0])
  if tree.is_operation(node, "neg"):
    inner = rational(node.operands[0])
    return None if inner is None else -inner
  if isinstance(node, tree.Text):
    digits = sentences.digits_for_words(node.text)
    return fractions.Fraction(digits) if digits.isdigit() else None
  if isinstance(node, tree.Relation):
    return _stated_rational(node)
  if isinstance(node, tree.ListValue | tree.SetValue):
    values = {rational(item) for item in node.items}
    if len(values) > 1:
      raise Ambiguous("several values")
    return values.pop() if values else None
  if isinstance(node, tree.PlusMinus):
    raise Ambiguous("two values")
  value = exact(node)
  if value is not None and max(abs(value.numerator), value.denominator).bit_length() > _MAX_BITS:
    raise TooLarge("number")
  return value


def _stated_rational(node: tree.Relation) -> fractions.Fraction | None:
  """The number that an equation states: 18 for x = 18 and 10+8 = 18, None for 2x = 36."""
  values = [value for value in map(rational, node.operands) if value is not None]
  if not values or not set(node.signs) <= {"=", "~"}:
    return None
  if "~" not in node.signs and len(set(values)) > 1:
    raise Ambiguous("the sides differ")
  if len(values) == len(node.operands):
    return values[0] if "~" in node.signs else values[-1]
  named = answer_relations.stated(node, tree.Number(values[-1]))
  return rational(named[0]) if named else None


def _outcome(statement: Statement, gold: MathGold | IntegerGold) -> Outcome:
  """Compares one statement with the gold answer."""
  if len(statement.text) > MAX_CHARS:
    return Outcome("too_large")
  outcome = gold.at_once(statement.text)
  if outcome is not None:
    return outcome
  statement = sentences.cleaned(statement)
  text = statement.text
  if not text.strip(" .*$"):
    return Outcome("no_answer")
  if statement.source not in ("box", "marker") and sentences.is_cut_off(statement):
    return Outcome("no_answer")
  outcome = gold.at_once(text)
  if outcome is not None:
    return outcome
  fallback = None
  try:
    for candidate in sentences.wholes(statement):
      outcome = gold.compare(candidate)
      if outcome is None:
        continue
      if outcome.whole:
        return outcome
      words = outcome.reason == "wrong" and _is_words(outcome.value)
      if outcome.reason not in ("unparsable", "ambiguous") and not words:
        return outcome._replace(whole=True)
      if fallback is None or outcome.reason == "ambiguous":
        fallback = outcome._replace(whole=words)
    if fallback is not None and fallback.reason == "ambiguous":
      return fallback
    if statement.source not in ("box", "marker"):
      part = sentences.part(statement)
      if part.text and (outcome := gold.compare(part.text)) is not None:
        return outcome
      if part.reason not in ("", "unparsable"):
        return Outcome(part.reason)
    if fallback is None and sentences.leaves_open(text):
      return Outcome("ambiguous")
    return fallback or gold.unread(text)
  except TooLarge:
    return Outcome("too_large")


def grade_response(
  response: str, gold: str, *, kind: str, rules: Conventions
) -> tuple[str, str | None]:
  """Grades a response and returns (reason, extracted answer).

  Args:
    response: any text.
    gold: the gold answer.
    kind: "integer" or "math".
    rules: conventions of equality and extraction.

  Raises:
    UserError: the gold answer cannot be read.
  """
  wanted = IntegerGold(gold) if kind == "integer" else MathGold(gold, rules)
  try:
    if kind == "math" and len(response) <= len(gold) + 100:
      if canonical(response) == canonical(gold):
        return "right", wanted.shown(Outcome("right", wanted.tree), gold)
    reading = statements_lib.read_response(response, marked_only=rules.extraction == "marked")
    return _verdict(reading, wanted, rules)
  except (TooLarge, RecursionError):
    return "too_large", None


def _verdict(
  reading: statements_lib.Reading, gold: MathGold | IntegerGold, rules: Conventions
) -> tuple[str, str | None]:
  """(reason, extracted answer) of the statements of a response."""
  if reading.failure:
    return reading.failure, None
  stated = list(dict.fromkeys(reading.statements))[-_MAX_STATEMENTS:]
  if rules.retractions == "last":
    turns = [index for index, statement in enumerate(stated) if statement.retracts]
    stated = stated[turns[-1] :] if turns else stated
  pairs = [(statement, _outcome(statement, gold)) for statement in stated]
  firm = [pair for pair in pairs if _is_firm(*pair, gold)]
  if not firm and reading.fallback:
    if all(pair[0].source == "heading" and pair[1].reason == "unparsable" for pair in pairs):
      firm = [(reading.fallback, _outcome(reading.fallback, gold))]
  pairs = firm or pairs[-1:]
  last, outcome = pairs[-1]
  if outcome.reason == "no_answer":
    return "no_answer", None
  shown = gold.shown(outcome, last.text)
  if outcome.reason != "too_large":
    if any(_contradict(other, outcome, gold) for _, other in pairs[:-1]):
      return "ambiguous", shown
  return outcome.reason, shown


def _is_firm(statement: Statement, outcome: Outcome, gold: MathGold | IntegerGold) -> bool:
  """Whether a statement counts beside others; a sentence only if its whole text is an answer."""
  if statement.source in ("line", "heading"):
    if _is_words(outcome.value) and not gold.is_words:
      return _ANSWERS_IN_WORDS.fullmatch(statement.text) is not None
    return outcome.whole
  if statement.source == "retraction":
    return outcome.value is not None or outcome.reason == "ambiguous"
  return outcome.reason != "no_answer"


def _contradict(earlier: Outcome, last: Outcome, gold: MathGold | IntegerGold) -> bool:
  """Whether an earlier statement of a response contradicts its last one."""
  if earlier.reason in ("ambiguous", "too_large"):
    return True
  if earlier.value is None:
    return False
  if earlier.reason != last.reason:
    return not (last.reason == "right" and gold.is_part(earlier))  # parts may precede the whole
  return isinstance(earlier.value, fractions.Fraction) and earlier.value != last.value


def stated_answer(solution: str) -> str | None:
  """The last answer that a solution marks, as written; None if it marks none."""
  stated = statements_lib.read_response(solution, marked_only=True).statements
  return stated[-1].text.strip().strip("$").strip() or None if stated else None


def extract_gold(solution: str) -> str:
  """The answer of a GSM8K solution as a reduced fraction without commas, for example "1080".

  Raises:
    UserError: the solution has no parsable number after `####`, or several different ones.
  """
  texts = [part.partition("\n")[0].strip() for part in re.split("#{4,}", solution)[1:]]
  values, reason = set(), "no_answer"
  for text in texts:
    try:
      value = rational(read(text)) if text else None
      reason = "" if value is not None else "unparsable"
      values.add(value)
    except Ambiguous:
      values, reason = {None}, "ambiguous"
    except (Undefined, TooLarge, RecursionError):
      reason = "unparsable"
  values.discard(None)
  if reason or len(values) != 1:
    reason = reason or "ambiguous"
    raise errors.UserError(
      f"The solution states no readable answer after #### ({reason}): {solution[-80:]!r}."
    )
  return str(values.pop())
