"""Grades of kind "integer": one rational number, compared exactly.

What is read. The answer is the rest of the line after the last `####`; a run of four or more `#` is one marker. A
response without one is read by rules 2 to 4 of `answer_extraction` (\\boxed{...}, "the answer is ..."). The answer must
start with the number: an optional sign (`-`, `+`, U+2212) and an optional `$`, `€` or `£` in either order, then digits
with well-formed thousands commas or none, an optional decimal part, an optional `/ denominator`. Bold (`**`) is ignored.
After the number come at most unit words, `%` and light punctuation: `18 dollars`, `$5/hour`, `20%` (which is 20, not
1/5). Several numbers on the line are read only if all are equal and joined by `=` (`72/4 = 18`).

What is not read. Scientific notation (`1e3`), digits glued to letters, mixed numbers (`3 1/2`), words before the number
(`about 18`), powers, factorials and comparisons are never right. Words that hedge or change the number (`7 or eight`,
`5 million`, `2 and a half`) make the answer ambiguous.

Everything is one pass of possessive regexes over the text, so the time is linear in its length; nothing is evaluated.
"""

import fractions
import functools
import re
import time

from synthneg_jax.grading import answer_extraction
from synthneg_jax.runtime import errors

MAX_NUMERAL = 1000  # characters of one numeral, commas and point included
MAX_EXTRACTED = 200  # characters of unreadable answer text kept in a verdict

_MARKER = re.compile(r"#{4,}")
_RUN = r"\.?[0-9][0-9,.]*+"
_NUMBER = re.compile(rf"([-+]?+) ?+[$€£]?+ ?+([-+]?+) ?+({_RUN})(?: ?/ ?({_RUN}))?")
_NUMERAL = re.compile(r"([1-9][0-9]{0,2}(?>(?:,[0-9]{3})+)|[0-9]*+)(?:\.([0-9]++))?")
_GLUED = re.compile(r"[A-Za-z_^][-+]?[0-9]")
_UNITS = r"(?>(?:[ A-Za-z%$€£°.,;:()'\"]|[-/](?=[A-Za-z]))*)"
_TRAIL = re.compile(_UNITS)
_EQUALS = re.compile(_UNITS + "= ?")
_CHANGES_NUMBER = re.compile(
  r"\b(?:or|nor|not|maybe|perhaps|plus|minus|negative|squared|cubed|pi|k|half|halves|"
  r"zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|"
  r"eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|"
  r"(?:hundred|thousand|million|billion|trillion)s?)\b",
  re.IGNORECASE,
)


def _numeral_value(run: str) -> tuple[fractions.Fraction | None, str]:
  """Reads one unsigned numeral; returns its value and "", or None and the reason."""
  if len(run) > MAX_NUMERAL:
    return None, "too_large"
  found = _NUMERAL.fullmatch(run.rstrip(".,"))
  if found is None:
    return None, "unparsable"
  whole, decimals = found.group(1).replace(",", ""), found.group(2)
  if decimals is None:
    return fractions.Fraction(int(whole)), ""
  return fractions.Fraction(int(whole + decimals), 10 ** len(decimals)), ""


def _match_value(match: re.Match) -> tuple[fractions.Fraction | None, str]:
  """Reads one match of `_NUMBER`, its sign and denominator included; returns as `_numeral_value`."""
  before, after, run, below = match.groups()
  if before and after:
    return None, "unparsable"
  value, reason = _numeral_value(run)
  if value is not None and below is not None:
    divisor, reason = _numeral_value(below)
    if not divisor:
      return None, reason or "unparsable"
    value /= divisor
  if value is not None and (before or after) == "-":
    value = -value
  return value, reason


def _read(text: str) -> tuple[fractions.Fraction | None, str]:
  """Reads one answer text (no marker, one line); returns its value and "", or None and the reason."""
  text = " ".join(text.replace("**", " ").replace("\u2212", "-").split())
  if not text:
    return None, "no_answer"
  if _GLUED.search(text):
    return None, "unparsable"
  value, start, end = None, 0, 0
  for match in _NUMBER.finditer(text):
    gap = text[end : match.start()]
    if value is None and gap:
      return None, "unparsable"
    other, reason = _match_value(match)
    if other is None:
      return None, reason
    if value is None:
      value, start = other, match.end()
    elif other != value or not _EQUALS.fullmatch(gap):
      return None, "ambiguous"
    end = match.end()
  if value is None:
    return None, "unparsable"
  if end < len(text):
    if _CHANGES_NUMBER.search(text[start:]):
      return None, "ambiguous"
    if not _TRAIL.fullmatch(text, end):
      return None, "unparsable"
  return value, ""


@functools.lru_cache(maxsize=1 << 16)
def _gold_value(gold: str) -> fractions.Fraction:
  """Returns the value of a gold answer; raises UserError where it has none."""
  value, _ = _read(gold)
  if value is None:
    raise errors.UserError(f"The gold answer {gold[:MAX_EXTRACTED]!r} is not a number that the grader can read.")
  return value


def _answer_texts(response: str) -> list[str]:
  """Returns what follows each `####` on its line, stripped, in order; else what the response says is its answer."""
  texts = [part.partition("\n")[0].strip() for part in _MARKER.split(response)[1:]]
  if texts:
    return texts
  stated = answer_extraction.statement(response, marked_only=True)
  return [*stated.earlier, stated.text] if stated else []


def _grade_texts(texts: list[str], timeout_s: float) -> tuple[fractions.Fraction | None, str]:
  """Reads the last of the answer texts and holds the earlier ones against it; returns as `_read`."""
  if not texts:
    return None, "no_answer"
  value, reason = _read(texts[-1])
  if value is None or len(texts) == 1:
    return value, reason
  deadline = time.monotonic() + timeout_s
  for text in texts[:-1]:
    if text != texts[-1]:
      other, reason = _read(text)
      if reason in ("ambiguous", "too_large") or (other is not None and other != value):
        return None, "ambiguous"
      if time.monotonic() > deadline:
        return None, "timeout"
  return value, ""


def grade_integer(response: str, gold: str, timeout_s: float) -> tuple[str, str | None]:
  """(reason, extracted answer) of a response; see `answers.grade`.

  Raises:
    UserError: the gold answer is not a readable number.
  """
  target = _gold_value(gold)
  texts = _answer_texts(response)
  value, reason = _grade_texts(texts, timeout_s)
  if value is None:
    return reason, (texts[-1][:MAX_EXTRACTED] or None if texts else None)
  return ("right" if value == target else "wrong"), str(value)


def extract_gold(solution: str) -> str:
  """Returns the answer of a GSM8K solution as a reduced fraction without commas, for example "1080".

  Raises:
    UserError: the solution states no readable number after `####`, or several different ones.
  """
  texts = [part.partition("\n")[0].strip() for part in _MARKER.split(solution)[1:]]
  value, reason = _grade_texts(texts, timeout_s=2.0)
  if value is None:
    raise errors.UserError(f"The solution states no readable answer after #### ({reason}): {solution[-80:]!r}.")
  return str(value)
