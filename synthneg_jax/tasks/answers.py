"""The verifier: reads the answer that a response states after `####` and compares it with the gold answer exactly.

What is read. The answer is the rest of the line after the last marker; a run of four or more `#` is one marker. It
must start with the number: an optional sign (`-`, `+`, U+2212) and an optional `$`, `€` or `£` in either order, then
digits with well-formed thousands commas or none, an optional decimal part, an optional `/ denominator`. Bold (`**`) is
ignored. After the number come at most unit words, `%` and light punctuation: `18 dollars`, `$5/hour`, `20%` (which is
20, not 1/5). Several numbers on the line are read only if all are equal and joined by `=` (`72/4 = 18`).

What is not read. Scientific notation (`1e3`), digits glued to letters, mixed numbers (`3 1/2`), words before the number
(`about 18`), powers, factorials and comparisons are never right. Words that hedge or change the number (`7 or eight`,
`5 million`, `2 and a half`) make the answer ambiguous.

Everything is one pass of possessive regexes over the text, so the time is linear in its length; nothing is evaluated.
"""

import dataclasses
import fractions
import functools
import re
import time

from synthneg_jax.runtime import errors

KINDS = ("integer",)

# right, wrong: a number was read. no_answer: no marker, or nothing after the last one. ambiguous: more than one answer.
# unparsable: text but no readable number. timeout: the clock ran out. too_large: a numeral of more than MAX_NUMERAL
# characters. truncated: for callers whose sampler hit the length limit; `grade` sees only text and never returns it.
REASONS = ("right", "wrong", "no_answer", "ambiguous", "unparsable", "timeout", "too_large", "truncated")

MAX_NUMERAL = 1000  # characters of one numeral, commas and point included
MAX_EXTRACTED = 200  # characters of unreadable answer text kept in a verdict

_MARKER = re.compile(r"#{4,}")
_RUN = r"\.?[0-9][0-9,.]*+"
_NUMBER = re.compile(rf"([-+]?+) ?+[$€£]?+ ?+([-+]?+) ?+({_RUN})(?: ?/ ?({_RUN}))?")
_NUMERAL = re.compile(r"([1-9][0-9]{0,2}(?:,[0-9]{3})++|[0-9]*+)(?:\.([0-9]++))?")
_GLUED = re.compile(r"[A-Za-z_^][-+]?[0-9]")
_UNITS = r"(?:[ A-Za-z%$€£°.,;:()'\"]|[-/](?=[A-Za-z]))*+"
_TRAIL = re.compile(_UNITS)
_EQUALS = re.compile(_UNITS + "= ?")
_CHANGES_NUMBER = re.compile(
  r"\b(?:or|nor|not|maybe|perhaps|plus|minus|negative|squared|cubed|pi|k|half|halves|"
  r"zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|"
  r"eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|"
  r"(?:hundred|thousand|million|billion|trillion)s?)\b",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The grade of one response.

  Attributes:
    correct: True exactly if `reason` is "right".
    reason: one of `REASONS`.
    extracted: the number as a reduced fraction ("1080", "-5", "3/4") where one was read, so that equal answers have
      equal strings; else the first `MAX_EXTRACTED` characters of the answer text; None where there is none.
  """

  correct: bool
  reason: str
  extracted: str | None


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
  """Returns what follows each `####` on its line, stripped, in order."""
  return [part.partition("\n")[0].strip() for part in _MARKER.split(response)[1:]]


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


def grade(response: str, gold: str, *, kind: str = "integer", timeout_s: float = 2.0) -> Verdict:
  """Grades a response against a gold answer.

  A response should stop after its answer, so several `####` lines that state different numbers are ambiguous; equal
  ones are fine, and earlier ones with no readable number (a heading such as `#### Step 1`) do not count.

  Args:
    response: the response's text; any string is allowed, hostile ones included.
    gold: the gold answer alone, without `####`, for example "1,080".
    kind: how answers compare. "integer", the only kind so far, despite its name compares all rationals exactly: 72.0
      equals 72, 3/4 equals 0.75, and no float is involved.
    timeout_s: seconds after which a response with very many `####` is given up ("timeout").

  Returns:
    The verdict.

  Raises:
    UserError: the kind is not supported, or the gold answer is not a readable number.
  """
  if kind not in KINDS:
    raise errors.UserError(f'The answer kind "{kind}" is not supported yet; the supported kinds: {", ".join(KINDS)}.')
  target = _gold_value(gold)
  texts = _answer_texts(response)
  value, reason = _grade_texts(texts, timeout_s)
  if value is None:
    return Verdict(False, reason, texts[-1][:MAX_EXTRACTED] or None if texts else None)
  return Verdict(value == target, "right" if value == target else "wrong", str(value))


def extract_gold(solution: str) -> str:
  """Returns the answer of a GSM8K solution as a reduced fraction without commas, for example "1080".

  Raises:
    UserError: the solution states no readable number after `####`, or several different ones.
  """
  value, reason = _grade_texts(_answer_texts(solution), timeout_s=2.0)
  if value is None:
    raise errors.UserError(f"The solution states no readable answer after #### ({reason}): {solution[-80:]!r}.")
  return str(value)
