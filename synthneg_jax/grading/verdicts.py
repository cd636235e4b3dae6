"""Verdicts: what a response states (statements.py) held against the gold answer, for kinds "integer" and "math".

Both kinds read the same statements with the same grammar. Kind "math" compares trees; kind "integer" takes the one
rational number that a tree is, and nothing else.
"""

import fractions
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

from synthneg_jax.grading import answer_equality, answer_grammar, answer_relations, assertions, statements
from synthneg_jax.grading.answer_rationals import Undefined, exact
from synthneg_jax.grading.answer_scalars import Ambiguous, Conventions
from synthneg_jax.grading.answer_tokens import MAX_CHARS, TooLarge, Unreadable, tidy
from synthneg_jax.grading.answer_tree import Node
from synthneg_jax.grading.statements import Statement
from synthneg_jax.runtime import errors

_MAX_STATEMENTS = 40  # the last ones that are compared
MAX_EXTRACTED = 200  # characters of an answer kept in a verdict
_ONE_NUMBER = re.compile(
  r"(?<![A-Za-z0-9.,])-?\$?(?:[1-9][0-9]{0,2}(?>(?:,[0-9]{3})+)|[0-9]++)(?:[.,][0-9]++)?(?:/[0-9]++)?"
  r"(?![A-Za-z]?[0-9]|[A-Z]|[-+/^])%?"
)
_OPEN = re.compile(
  r"\b(?:or|nor|not|no|maybe|perhaps|possibly|either|about|approximately|around|nearly|almost|over|under|below|above|"
  r"least|most|than|between|negative|minus|plus|times|half|hundreds?|thousands?|millions?|billions?|trillions?|dozens?|"
  r"cannot|isn|don|unless|squared|cubed|could|might|probably|guess|score)\b|\b[0-9.]+ ?(?:k|(?-i:[KMB]))\b",
  re.IGNORECASE,
)
_CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:](?![0-9]))\s*(.*)", re.DOTALL)
_LETTER = re.compile(r"\(?([A-J])\)?\.?")
_IS = re.compile(
  r"\b(?:is|are|equals|be|was|by)\b:?+|\b(?:it|that|this|answer)['’]s\b|[:：]\s|→|=>|(?<![!<>=/])=(?![=/>])"
)
_OPTION = re.compile(r"\A\s*(?:the\s+)?(?:option|choice|letter)\s+(?=\(?[A-J]\b)", re.IGNORECASE)
_ASIDE = re.compile(
  r"\s*(?:\b(?:and|but)\s+not\b|,\s*(?:not|rather\s+than|instead\s+of|because|since|as|so|which|after|obtained)\b"
  r"|\b(?:because|since|rather\s+than|instead\s+of|as\s+(?:required|desired|claimed|shown|expected|needed|asked))\b"
  r"|(?P<loose>[,;]\s*(?:[A-Za-z'’-]+[ .]*){1,8}\Z|\((?=[^()]*[A-Za-z]{2})[^()]*\)[\s.]*\Z)).*\Z",
  re.IGNORECASE | re.DOTALL,
)
_TEXT_AROUND = re.compile(r"\s*\\(?:text|textbf|mathrm|mbox)\{([^{}]*[0-9][^{}]*)\}[\s.]*")
_ANSWER_LABEL = re.compile(
  r"\A\s*(?:\\(?:text|textbf|mathrm|mbox)\{)?\s*(?:the\s+)?(?:final\s+)?answer\s*(?:is)?\s*[:=]?\s*(?P<close>\})?\s*[:=]?",
  re.IGNORECASE,
)
_PLAIN_NUMBER = re.compile(
  r"\s*(-?)\$?(?:([1-9][0-9]{0,2}(?:,[0-9]{3})+)|([0-9]{1,300}))(?:\.([0-9]{1,300}))?\s*\.?\s*"
)
_NUMBER_WORDS = answer_equality._NUMBER_WORDS


_CUT = re.compile(r"(?<!\\)\$(?=[A-Za-z\\])|\\\([^)]*\Z|\\\[[^\]]*\Z")  # a formula that does not end
_UNIT_LETTERS = frozenset("msghlL")  # which the grammar reads as symbols


class Outcome(NamedTuple):
  """How one statement compares with the gold answer.

  Attributes:
    reason: as of a verdict.
    value: what was read, a tree or a fraction; None where nothing was.
    whole: the statement's whole text was read, not a number or formula within it.
  """

  reason: str
  value: Node | fractions.Fraction | None = None
  whole: bool = False


def canonical(text: str) -> str:
  """An answer without layout and spaces; equal answers written alike have equal strings."""
  text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox|textit)\{([^{}]*)\}", r"\1", tidy(text[: 2 * MAX_CHARS]))
  return re.sub(r"\s+", "", text)


def read(text: str) -> Node:
  """The tree of an answer; what the grammar does not read is an `opaque` leaf, equal to the same text only.

  Raises:
    TooLarge: the text is beyond what is read.
  """
  if len(text) > MAX_CHARS:
    raise TooLarge("characters")
  try:
    return answer_grammar.parse(text)
  except Unreadable:
    return Node("opaque", (canonical(text),))
  except RecursionError:
    raise TooLarge("depth") from None


def _candidates(statement: Statement) -> Iterator[str]:
  """Texts that may be all of a statement's answer, the best first.

  Boxes and markers hold the answer and nothing else. In a sentence the answer stands without its asides ("7, because"),
  after "is" or a colon, or is its only formula or number. A candidate that the sentence denies is left out.
  """
  text = statement.text
  yield text
  aside = _ASIDE.search(text)
  trimmed = text[: aside.start()] if aside and not _OPEN.search(re.sub(r"\bnot?\b", "", aside["loose"] or "")) else ""
  if trimmed.strip() and (re.search(r"[0-9$\\]", trimmed) or not re.search(r"[0-9$\\]", text)):
    yield trimmed
  if statement.source in ("box", "marker"):
    return
  for sentence in (text, trimmed):
    for last in reversed(list(_IS.finditer(sentence))[-3:]):
      after = sentence[last.end() :]
      if (
        re.search(r"[0-9$\\]", after)
        and not _OPEN.search(after)
        and not assertions.is_denied(sentence, last.end(), len(sentence))
      ):
        yield after


def _within(text: str, *, first: bool) -> tuple[int, str] | None:
  """The (start, text) of the first or last formula of a sentence, or number of one in prose; None where there is none.

  Of several different numbers in prose none is the first one's.
  """
  offset = max(0, len(text) - MAX_CHARS)
  text = text[offset:]
  found = [(match.start(), next(filter(None, match.groups()), "")) for match in statements.FORMULA.finditer(text)]
  outside = (
    statements.FORMULA.sub(lambda match: " " * len(match.group()), text).replace(r"\$", " $").replace(r"\%", "% ")
  )
  if not re.search(r"[\\^_{}<>|\[\]*`\x00-\x08]", outside):  # prose, where a number stands for itself
    found += [(match.start(), match.group()) for match in _ONE_NUMBER.finditer(outside)]
  parts = [(start, part) for start, part in sorted(found) if not re.fullmatch(r"\s*[A-Za-z]*\s*", part)]
  if not parts:
    return None
  if first and len({part for _, part in parts}) > 1 and not any("\\" in part or "$" in text for _, part in parts):
    return None
  start, part = parts[0 if first else -1]
  return offset + start, part


class Gold:
  """A gold answer of kind "math": its tree, and how statements compare with it."""

  def __init__(self, gold: str, rules: Conventions):
    self.text, self.rules = gold, rules
    self.tree, self.plain = _math_gold(gold)

  def shown(self, outcome: Outcome, text: str) -> str | None:
    if outcome.value is not None:
      try:
        value = exact(outcome.value)
        if value is not None and len(str(value.numerator)) + len(str(value.denominator)) < MAX_EXTRACTED:
          return str(value)
      except (Undefined, TooLarge, RecursionError, ValueError):
        pass
    return canonical(text)[:MAX_EXTRACTED] or None

  def at_once(self, text: str) -> Outcome | None:
    """The outcome of text that need not be parsed: the gold answer itself, or the letter of a choice."""
    if len(text) <= 2 * MAX_CHARS and canonical(text) == self.plain:
      return Outcome("right", self.tree, True)
    letter = self._letter()
    if letter is None:
      return None
    if _LETTER.fullmatch(canonical(text)):
      return Outcome("right" if letter in canonical(text) else "wrong", Node("sym", (letter,)), True)
    chosen = _CHOICE.fullmatch(re.sub(r"\\[a-z]+\{([^{}]*)\}", r"\1", tidy(text[:MAX_CHARS])).strip())
    if chosen and not _OPEN.search(chosen.group(2)):
      return Outcome("right" if chosen.group(1) == letter else "wrong", Node("sym", (chosen.group(1),)), True)
    return None

  def _letter(self) -> str | None:
    gold = self.tree
    found = _LETTER.fullmatch(str(gold.args[0])) if gold.op in ("sym", "text") else _CHOICE.fullmatch(self.plain)
    return found.group(1) if found and (gold.op in ("sym", "text") or self.plain[1:2] in ".)") else None

  def compare(self, text: str) -> Outcome | None:
    """The outcome of one candidate; None where the grammar does not read it."""
    node = read(text)
    if node.op == "opaque" or (_mixes_words(node) and not _mixes_words(self.tree)):
      return None
    for mine, theirs in ((_decimal_comma(text), self.tree), (node, _decimal_comma(self.text))):
      if mine is not None and theirs is not None and self._judge(mine, theirs) == "right":
        return Outcome("right", mine)
    return Outcome(self._judge(node, self.tree), node)

  def _judge(self, node: Node, gold: Node) -> str:
    try:
      return "right" if answer_equality.same(gold, node, self.rules) else "wrong"
    except Ambiguous:
      return "ambiguous"
    except Undefined:
      return "unparsable"
    except (TooLarge, RecursionError):
      return "too_large"

  def unread(self, text: str) -> Outcome:
    """The outcome of a statement of which nothing is read."""
    node = read(text)
    if self.tree.op == "opaque" and answer_equality.words(self.plain) == answer_equality.words(str(node.args[0])):
      return Outcome("right" if self.tree == node else "unparsable", node)
    return Outcome("unparsable")

  def is_part(self, outcome: Outcome) -> bool:
    """Whether a value is one of the gold answer's several."""
    members = answer_equality._collection(self.tree, self.rules) or []
    return isinstance(outcome.value, Node) and any(
      answer_equality._quietly_same(member, outcome.value, self.rules) for member in members
    )

  @property
  def is_collection(self) -> bool:
    return answer_equality.is_collection(self.tree)


@functools.lru_cache(maxsize=1 << 14)
def _math_gold(gold: str) -> tuple[Node, str]:
  """The tree and the canonical text of a gold answer; raises UserError where it is empty or beyond what is read."""
  text = statements.gold_text(gold)
  try:
    if tidy(text[: 2 * MAX_CHARS]):
      return read(text), canonical(text)
    reason = "empty"
  except TooLarge:
    reason = "too long or too deep to be read"
  raise errors.UserError(f"The gold answer {gold[:MAX_EXTRACTED]!r} is {reason}.")


def _decimal_comma(text: str) -> Node | None:
  """The number that 3,14 is where a comma stands for the decimal point; None for any other text."""
  found = re.fullmatch(r"(-?)([0-9]+),([0-9]+)", tidy(text[:MAX_CHARS]))
  return read("".join((found.group(1), found.group(2), ".", found.group(3)))) if found else None


class IntegerGold:
  """A gold answer of kind "integer": one rational number."""

  is_collection = False

  def __init__(self, gold: str):
    self.value = _integer_gold(gold)

  def shown(self, outcome: Outcome, text: str) -> str | None:
    return str(outcome.value) if outcome.value is not None else " ".join(text.split())[:MAX_EXTRACTED] or None

  def at_once(self, text: str) -> Outcome | None:
    number = _PLAIN_NUMBER.fullmatch(text)
    if not number:
      return None
    sign, grouped, digits, decimals = number.groups()
    value = fractions.Fraction(int((grouped or digits).replace(",", "") + (decimals or "")), 10 ** len(decimals or ""))
    return self._compared(-value if sign else value)

  def _compared(self, value: fractions.Fraction) -> Outcome:
    return Outcome("right" if value == self.value else "wrong", value, True)

  def compare(self, text: str) -> Outcome | None:
    node = read(text)
    if node.op == "opaque" or _mixes_words(node):
      return None
    try:
      value = rational(node)
    except (Ambiguous, Undefined, TooLarge, RecursionError) as error:
      return Outcome({Ambiguous: "ambiguous", Undefined: "unparsable"}.get(type(error), "too_large"))
    return None if value is None else self._compared(value)._replace(whole=False)

  def unread(self, text: str) -> Outcome:
    return Outcome("unparsable" if re.search("[0-9]", text) or text.strip() else "no_answer")

  def is_part(self, outcome: Outcome) -> bool:
    return False


@functools.lru_cache(maxsize=1 << 16)
def _integer_gold(gold: str) -> fractions.Fraction:
  """Returns the value of a gold answer; raises UserError where it has none."""
  try:
    value = rational(read(gold)) if gold.strip() else None
  except (Ambiguous, Undefined, TooLarge, RecursionError):
    value = None
  if value is None:
    raise errors.UserError(f"The gold answer {gold[:MAX_EXTRACTED]!r} is not a number that the grader can read.")
  return value


def rational(node: Node) -> fractions.Fraction | None:
  """The one rational number that an answer is, units left out and 20% being 20; None where it is anything else.

  Raises:
    Ambiguous: it states several, as 7, 8 and 7 = 8 do.
    Undefined, TooLarge: it has no value, or one beyond what is computed.
  """
  if node.op in ("quantity", "percent", "degree"):
    return rational(node.args[0])
  if node.op == "mul" and node.args[1].op == "sym" and node.args[1].args[0] in _UNIT_LETTERS:
    return rational(node.args[0])
  if node.op == "neg":
    inner = rational(node.args[0])
    return None if inner is None else -inner
  if node.op == "text":
    word = node.args[0].lower()
    return fractions.Fraction(_NUMBER_WORDS.index(word)) if word in _NUMBER_WORDS else None
  if node.op == "rel":
    values = [value for value in map(rational, node.args[::2]) if value is not None]
    if not values or not set(node.args[1::2]) <= {"=", "~"}:
      return None
    if "~" not in node.args[1::2] and len(set(values)) > 1:
      raise Ambiguous("sides that differ")
    stated = (
      answer_relations.stated(answer_relations.value_of(node), Node("num", (values[-1],)))
      if len(values) < len(node.args[::2])
      else [node.args[-1]]
    )
    return rational(stated[0]) if stated else None
  if node.op in ("list", "set"):
    items = node.args[1] if node.op == "list" else node.args
    values = {rational(item) for item in items}
    if len(values) > 1:
      raise Ambiguous("several values")
    return values.pop() if values else None
  if node.op in ("pm", "mp"):
    raise Ambiguous("two values")
  return exact(node)


def _outcome(statement: Statement, gold: Gold | IntegerGold) -> Outcome:
  """How one statement compares with the gold answer."""
  around = _TEXT_AROUND.fullmatch(statement.text)
  text = _OPTION.sub("", _ANSWER_LABEL.sub("", around.group(1) if around else statement.text))
  statement = statement._replace(text=text)
  if not text.strip(" .*$"):
    return Outcome("no_answer")
  outcome = gold.at_once(text)
  if outcome is not None:
    return outcome
  in_sentence = statement.source not in ("box", "marker")
  if statement.source in ("last", "retraction") and (
    text.endswith("?") or _CUT.search(statements.FORMULA.sub("", text))
  ):
    return Outcome("no_answer" if text.endswith("?") else "unparsable")
  without_value = None
  try:
    for candidate in _candidates(statement):
      outcome = gold.compare(candidate)
      if outcome is not None and outcome.reason != "unparsable":
        hedged = statement.source in ("last", "retraction") and candidate != text and assertions.is_hedged(text)
        return Outcome("ambiguous") if hedged else outcome._replace(whole=True)
      without_value = without_value or outcome
    part = _within(text, first=statement.source == "line") if in_sentence else None
    if part and assertions.is_denied(text, part[0], part[0] + len(part[1])):
      return Outcome("no_answer")
    clause = text[assertions.clause_start(text, part[0]) :] if part else text
    if _OPEN.search(clause) or (in_sentence and assertions.is_hedged(text)):
      return Outcome("ambiguous")
    if part and (outcome := gold.compare(part[1])) is not None:
      return outcome
    return without_value or gold.unread(text)
  except TooLarge:
    return Outcome("too_large")


def grade_response(response: str, gold: str, *, kind: str, rules: Conventions) -> tuple[str, str | None]:
  """(reason, extracted answer) of a response.

  Args:
    response: any text.
    gold: the gold answer.
    kind: "integer" or "math".
    rules: what counts as the same answer.

  Raises:
    UserError: the gold answer cannot be read.
  """
  wanted = IntegerGold(gold) if kind == "integer" else Gold(gold, rules)
  try:
    return _graded(response, wanted, rules)
  except (TooLarge, RecursionError):
    return "too_large", None


def _graded(response: str, gold: Gold | IntegerGold, rules: Conventions) -> tuple[str, str | None]:
  if isinstance(gold, Gold) and len(response) <= len(gold.text) + 100 and canonical(response) == canonical(gold.text):
    return "right", gold.shown(Outcome("right", gold.tree), gold.text)
  reading = statements.read_response(response, marked_only=rules.extraction == "marked")
  if reading.failure:
    return reading.failure, None
  stated = list(dict.fromkeys(reading.statements))[-_MAX_STATEMENTS:]
  if rules.retractions == "last":
    turns = [index for index, statement in enumerate(stated) if statement.retracts]
    stated = stated[turns[-1] :] if turns else stated
  pairs = [(statement, _outcome(statement, gold)) for statement in stated]
  pairs = [pair for pair in pairs if _is_firm(*pair)] or pairs[-1:]
  last, outcome = pairs[-1]
  if outcome.reason == "no_answer":
    return "no_answer", None
  shown = gold.shown(outcome, last.text)
  contradicts = any(_contradict(other, outcome, gold) for _, other in pairs[:-1])
  return ("ambiguous" if contradicts and outcome.reason != "too_large" else outcome.reason), shown


def _is_firm(statement: Statement, outcome: Outcome) -> bool:
  """Whether a statement counts beside others: a sentence only if all of it is an answer."""
  if statement.source == "line":
    return outcome.whole
  if statement.source == "retraction":
    return outcome.value is not None
  return outcome.reason != "no_answer"


def _contradict(earlier: Outcome, last: Outcome, gold: Gold | IntegerGold) -> bool:
  """Whether what a response states earlier contradicts its last statement."""
  if earlier.reason in ("ambiguous", "too_large"):
    return True
  if earlier.value is None or _is_words(earlier.value):
    return False
  if earlier.reason != last.reason:
    return not (last.reason == "right" and gold.is_part(earlier))  # parts may be restated whole
  return isinstance(earlier.value, fractions.Fraction) and earlier.value != last.value


def _mixes_words(node: Node) -> bool:
  """Whether a list holds words beside values, as "72, altogether" does."""
  return node.op == "list" and len({item.op == "text" for item in node.args[1]}) == 2


def _is_words(value) -> bool:
  return isinstance(value, Node) and value.op in ("text", "opaque")


def stated_answer(solution: str) -> str | None:
  """The answer that a solution marks, as written; the last one of several, None where none is marked."""
  stated = statements.read_response(solution, marked_only=True).statements
  return stated[-1].text.strip().strip("$").strip() or None if stated else None


def extract_gold(solution: str) -> str:
  """Returns the answer of a GSM8K solution as a reduced fraction without commas, for example "1080".

  Raises:
    UserError: the solution states no readable number after `####`, or several different ones.
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
    raise errors.UserError(f"The solution states no readable answer after #### ({reason}): {solution[-80:]!r}.")
  return str(values.pop())
