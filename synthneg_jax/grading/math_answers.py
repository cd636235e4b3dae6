"""Grades of kind "math": the answer that a response states, read and held against the gold answer.

In order, and the first that decides: the same string after normalisation; exact rational arithmetic; the grammar's trees
compared by kind. Model text reaches regexes and the parser of `answer_grammar` only: nothing evaluates it.
"""

import functools
import re

from synthneg_jax.grading import answer_equality, answer_extraction, answer_grammar
from synthneg_jax.grading.answer_equality import Ambiguous, Conventions
from synthneg_jax.grading.answer_numbers import Undefined, exact
from synthneg_jax.grading.answer_tokens import MAX_CHARS, TooLarge, Unreadable, tidy
from synthneg_jax.grading.answer_tree import Node, Opaque, Symbol, Text
from synthneg_jax.runtime import errors

MAX_EXTRACTED = 200  # characters of an answer kept in a verdict

_NUMBER = re.compile(r"[-+]?([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]*)?")
_ONE_NUMBER = re.compile(
  r"(?<![A-Za-z0-9.,])-?\$?(?:[1-9][0-9]{0,2}(?>(?:,[0-9]{3})+)|[0-9]++)(?:[.,][0-9]++)?(?:/[0-9]++)?(?![A-Za-z]?[0-9]|[A-Z]|[-+/^])%?"
)
_OPEN_WORDS = re.compile(
  r"\b(?:or|nor|not|no|maybe|perhaps|possibly|either|about|approximately|around|nearly|almost|over|under|below|above|"
  r"least|most|than|between|negative|minus|plus|times|half|hundred|thousand|million|billion|dozen|cannot|isn|don|unless|"
  r"squared|cubed|could|might|probably|guess)\b",
  re.IGNORECASE,
)
_CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:](?![0-9]))\s*(.*)", re.DOTALL)
_IS = re.compile(r"\b(?:is|are|equals|be|was|by)\b:?+")
_LETTER = re.compile(r"\(?([A-J])\)?\.?")


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
    return Opaque(canonical(text))
  except RecursionError:
    raise TooLarge("depth") from None


@functools.lru_cache(maxsize=1 << 14)
def _gold(gold: str) -> tuple[Node, str]:
  """The tree and the canonical text of a gold answer; raises UserError where it is empty or beyond what is read."""
  boxes, is_open = answer_extraction.boxed(gold)
  text = re.split(r"\\boxed\s*\{", gold)[-1] if is_open else ", ".join(dict.fromkeys(boxes)) or gold
  if boxes and not answer_extraction.joined(gold):
    text = boxes[-1]
  try:
    if tidy(text[: 2 * MAX_CHARS]):
      return read(text), canonical(text)
    reason = "empty"
  except TooLarge:
    reason = "too long or too deep to be read"
  raise errors.UserError(f"The gold answer {gold[:MAX_EXTRACTED]!r} is {reason}.")


def _letter(gold: Node, plain: str) -> str | None:
  """The letter of a multiple-choice gold answer; None for any other."""
  if isinstance(gold, (Symbol, Text)):
    found = _LETTER.fullmatch(gold.name if isinstance(gold, Symbol) else gold.text)
    return found.group(1) if found else None
  found = _CHOICE.fullmatch(plain)
  return found.group(1) if found and plain[1:2] in ".)" else None


def _judge(node: Node, gold: Node, rules: Conventions) -> str:
  """The reason of a readable answer."""
  try:
    if answer_equality.same(gold, node, rules):
      return "right"
    return "wrong"
  except Ambiguous:
    return "ambiguous"
  except Undefined:
    return "unparsable"
  except (TooLarge, RecursionError):
    return "too_large"


def _judge_either(text: str, node: Node, gold: str, wanted: Node, rules: Conventions) -> tuple[str, Node]:
  """(reason, tree) of a readable answer; a comma within one number may be a decimal point on either side."""
  for mine, theirs in ((_decimal_comma(text), wanted), (node, _decimal_comma(gold))):
    if mine is not None and theirs is not None and _judge(mine, theirs, rules) == "right":
      return "right", mine
  return _judge(node, wanted, rules), node


def _grade_text(text: str, gold: str, rules: Conventions, whole: str) -> tuple[str, Node | None]:
  """(reason, tree) of one answer as written."""
  wanted, plain = _gold(gold)
  if not text.strip(" .*$"):
    return "no_answer", None
  if len(text) <= 2 * MAX_CHARS and canonical(text) == plain:
    return "right", wanted
  letter = _letter(wanted, plain)
  if letter is not None:
    if _LETTER.fullmatch(canonical(text)):
      return ("right" if letter in canonical(text) else "wrong"), Symbol(letter)
    chosen = _CHOICE.fullmatch(re.sub(r"\\[a-z]+\{([^{}]*)\}", r"\1", tidy(text[:MAX_CHARS])).strip())
    if chosen and not _OPEN_WORDS.search(chosen.group(2)):
      return ("right" if chosen.group(1) == letter else "wrong"), Symbol(chosen.group(1))
  try:
    node = read(text)
  except TooLarge:
    return "too_large", None
  if not isinstance(node, Opaque):
    return _judge_either(text, node, gold, wanted, rules)
  if whole:
    after = _IS.split(text)[-1]
    if after != text and not _OPEN_WORDS.search(after) and re.search(r"[0-9$\\]", after):
      found = read(after)
      if not isinstance(found, (Opaque, Text)):
        return _judge_either(after, found, gold, wanted, rules)
  if _OPEN_WORDS.search(text):
    return "ambiguous", None
  for part in _within(text, whole):
    found = read(part)
    if not isinstance(found, Opaque):
      return _judge_either(part, found, gold, wanted, rules)
  if isinstance(wanted, Opaque) and answer_equality.words(plain) == answer_equality.words(node.text):
    return ("right" if wanted == node else "unparsable"), node
  return "unparsable", None


def _decimal_comma(text: str) -> Node | None:
  """The number that 3,14 is where a comma stands for the decimal point; None for any other text."""
  found = re.fullmatch(r"(-?)([0-9]+),([0-9]+)", tidy(text[:MAX_CHARS]))
  return read("".join((found.group(1), found.group(2), ".", found.group(3)))) if found else None


def _within(text: str, whole: str) -> list[str]:
  """What of a sentence is its answer: its "first" or "last" formula or number; nothing if `whole` is ""."""
  if not whole:
    return []
  text = text[-MAX_CHARS:]
  found = [
    (match.start(), next(filter(None, match.groups()), "")) for match in answer_extraction.FORMULA.finditer(text)
  ]
  outside = answer_extraction.FORMULA.sub(lambda match: " " * len(match.group()), text)
  if not re.search(r"[\\^_{}<>|\[\]*`\x00-\x08]", outside):  # prose, where a number stands for itself
    found += [(match.start(), match.group()) for match in _ONE_NUMBER.finditer(outside)]
  parts = [part for _, part in sorted(found) if not re.fullmatch(r"\s*[A-Za-z]*\s*", part)]
  if whole == "first" and len(set(parts)) > 1 and not any("\\" in part or "$" in text for part in parts):
    return []
  return parts[:1] if whole == "first" else parts[-1:]


def _shown(node: Node | None, text: str) -> str | None:
  if node is not None:
    try:
      value = exact(node)
      if value is not None and len(str(value.numerator)) + len(str(value.denominator)) < MAX_EXTRACTED:
        return str(value)
    except (Undefined, TooLarge, RecursionError, ValueError):
      pass
  return canonical(text)[:MAX_EXTRACTED] or None


def grade_math(response: str, gold: str, rules: Conventions) -> tuple[str, str | None]:
  """(reason, extracted answer) of a response.

  Raises:
    UserError: the gold answer is empty or too long.
  """
  try:
    return _graded(response, gold, rules)
  except (TooLarge, RecursionError):
    return "too_large", None


def _graded(response: str, gold: str, rules: Conventions) -> tuple[str, str | None]:
  wanted, _ = _gold(gold)
  if len(response) <= len(gold) + 100 and canonical(response) == canonical(gold):
    return "right", _shown(wanted, gold)
  stated = answer_extraction.statement(response, rules.extraction == "marked")
  if stated is None:
    return "no_answer", None
  if stated.open:
    return "unparsable", None
  reason, node = _grade_text(stated.text, gold, rules, stated.whole)
  shown = _shown(node, stated.text)
  others = [text for text in dict.fromkeys(stated.earlier) if text != stated.text]
  if not others or reason in ("no_answer", "too_large"):
    return reason, shown
  if stated.parts and answer_equality.is_collection(wanted) and len(others) < answer_equality.MAX_ITEMS:
    together, all_of_them = _grade_text(", ".join([*others, stated.text]), gold, rules, "")
    if together == "right":
      return "right", _shown(all_of_them, ", ".join([*others, stated.text]))
  for text in others[: answer_equality.MAX_ITEMS]:
    earlier, tree = _grade_text(text, gold, rules, stated.whole)
    readable = tree is not None and not isinstance(tree, (Text, Opaque))
    if earlier in ("ambiguous", "too_large") or (readable and earlier != reason):
      return "ambiguous", shown
  return reason, shown
