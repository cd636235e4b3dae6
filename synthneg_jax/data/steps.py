"""Splits a response into steps: at a delimiter, or, for prose with LaTeX, at lines and sentences.

The prose rule is ours; the paper's steps are sentences, but its splitter is not published. A step
ends with its line, and within a line with its sentence, but never inside LaTeX: `$...$`, `$$...$$`,
`\\(...\\)`, `\\[...\\]`, `\\begin{x}...\\end{x}`, `{...}`, `[asy]...[/asy]`. As in TeX, formulas
and braces do not span a blank line: an unclosed `$` or `{` is plain text, and any other unclosed
opener holds everything up to the blank line together. `\\$` is a dollar sign. So is a `$` whose
partner follows a space or precedes a digit, unless both have a space inside (nearly pandoc's rule):
"costs $5. He has $3." contains no formula.

A sentence ends with `.`, `?` or `!` and any closing brackets, quotes and stars after it, if
whitespace and a word that does not start with a lowercase letter follow; or with a formula that
ends in a period (`$x=2.$ Then`). Numbers (3.14, 1,000), abbreviations (e.g., Fig. 2) and line
numbers (`1.`, `Step 2.`) do not end a sentence. `5!` is a factorial; `5!.` ends a sentence. A time
(5 p.m.) ends one before a capital letter, unless a weekday or a time zone follows. The full-width
stops of Chinese and Japanese (`。`, `！`, `？`) always end a sentence, together with the closing
brackets and quotes after them.

Steps do not depend on the text before them: splitting the rest of a response after a step gives the
rest of its steps.
"""

import re
from collections.abc import Iterator, Sequence

from synthneg_jax.data import token_text as token_text_lib
from synthneg_jax.data.token_text import TokenText

_SIGN = re.compile(
  rb"\\begin\s*\{(?P<begin>[A-Za-z]+\*?)\}|\\end\s*\{(?P<end>[A-Za-z]+\*?)\}"
  rb"|(?P<asy>\[asy\])|(?P<yas>\[/asy\])|\\(?P<escape>[^\n])|(?P<dollar>\$\$?)|(?P<brace>[{}])"
  rb"|(?P<blank>\n[ \t\r]*(?=\n))|(?P<line>\n)|(?P<stop>[.?!]+)"
  rb"|(?P<wide>(?:\xe3\x80\x82|\xef\xbc[\x81\x9f])+)"  # 。 ！ ？
)
# Brackets, quotes, stars; ’ ” 》 」 』 】 ）.
_CLOSERS = re.compile(
  rb"(?:[)\]\"'*_]|\xe2\x80[\x99\x9d]|\xe3\x80[\x8b\x8d\x8f\x91]|\xef\xbc\x89)*"
)
_SENTENCE_BEGINS = re.compile(rb"[ \t\r]+(?=([^a-z\s,;:.?!=<>+/^|)\]}]))")
_WORD = re.compile(rb"[A-Za-z]+(?:\.[A-Za-z]+)*\Z")
_LINE_NUMBER = re.compile(
  rb"[ \t\r>*#_-]*(?:(?:step|case|part|claim|method|solution) +)?"
  rb"(?:[0-9]{1,3}|[A-Za-z]|[ivx]{2,4})",
  re.IGNORECASE,
)
_LOOKBEHIND = 60  # bytes before a period that decide whether it ends a sentence
_ABBREVIATIONS = frozenset(
  b"al approx ca cf co cor def dept dr eg eq eqs ex fig figs ie inc jr lem ltd mr mrs ms prof prop "
  b"resp sr st thm viz vs".split()
)
_BEFORE_DIGITS = frozenset(  # No. 5, 5 ft. 3
  b"art ch ft hr hrs in lb lbs min mins no nos oz p pp sec secs vol yd".split()
)
_TIMES = (b"a.m", b"p.m")
_AFTER_TIME = re.compile(rb"(?!(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|[A-Z]{2,4}\b)[A-Z]")
_CLOSER_OF = {"[": "]", "(": ")"}


class _Text:
  """The tokens ("signs") of a text that matter for splitting, with openers matched to closers.

  Attributes:
    signs: (kind, start, stop) in order; kinds are `[ ] ( ) { } $ $$ begin end asy yas blank line
      stop wide`.
    ends: for an opener, the index of its closer; for an unclosed opener that holds the text
      together, -1 - i with i the index of the next blank line (or of the end); else None.
  """

  def __init__(self, data: bytes):
    self.data, self.signs, names = data, [], []
    for match in _SIGN.finditer(data):
      kind = match.lastgroup
      if kind == "escape":
        kind = match.group().decode("latin-1")[1]
        if kind not in "[]()":
          continue
      elif kind in ("dollar", "brace"):
        kind = match.group().decode("ascii")
      self.signs.append((kind, *match.span()))
      names.append(match.group("begin") or match.group("end"))
    self.ends = [None] * len(self.signs)
    next_of, environments, asy, paragraph = {}, {}, None, -1 - len(self.signs)
    for i in reversed(range(len(self.signs))):  # backwards, so no result depends on earlier text
      kind = self.signs[i][0]
      if kind == "blank":
        next_of, paragraph = {}, -1 - i
      elif kind in _CLOSER_OF:
        self.ends[i] = next_of.get(_CLOSER_OF[kind], paragraph)
      elif kind == "begin":
        open_ends = environments.get(names[i])
        self.ends[i] = open_ends.pop() if open_ends else paragraph
      elif kind == "end":
        environments.setdefault(names[i], []).append(i)
      elif kind == "asy":
        self.ends[i] = paragraph if asy is None else asy
      elif kind == "yas":
        asy = i
      elif kind == "{":
        self.ends[i] = next_of["}"].pop() if next_of.get("}") else None
      elif kind == "}":
        next_of.setdefault("}", []).append(i)
      elif kind in ("$", "$$"):
        j = next_of.get(kind)
        self.ends[i] = (paragraph if j is None else j) if kind == "$$" else self._partner(i, j)
      if kind in ("$", "$$", "]", ")"):
        next_of[kind] = i

  def _partner(self, i: int, j: int | None) -> int | None:
    """j if the dollars i and j enclose a formula, else None."""
    if j is None:
      return None
    opens, closes = self.signs[i][2], self.signs[j][1]
    spaces = self.data[opens : opens + 1].isspace(), self.data[closes - 1 : closes].isspace()
    if closes == opens or spaces[0] != spaces[1] or self.data[closes + 1 : closes + 2].isdigit():
      return None
    return j

  def ends_sentence(self, last: int, start: int, stop: int) -> bool:
    """Whether the stop at bytes [start, stop), closers included, ends a sentence.

    The sentence begins at byte `last` or later.
    """
    begins = _SENTENCE_BEGINS.match(self.data, stop)
    if not begins:
      return False
    before = self.data[max(last, start - _LOOKBEHIND) : start]
    if self.data[start : start + 1] == b"!":
      if self.data[start:stop].lstrip(b"!")[:1] in (b".", b"?"):  # a factorial, then a period
        return True
      return before[-2:].isalpha() and len(before) > 1
    if self.data[start : start + 1] == b"?":
      return True
    digit_follows = begins.group(1).isdigit()
    if digit_follows and before[-1:].isdigit():
      return False
    if len(before) < _LOOKBEHIND and _LINE_NUMBER.fullmatch(before):
      return False
    match = _WORD.search(before)
    word = match.group().lower() if match else b""
    if word in _TIMES:
      return _AFTER_TIME.match(self.data, begins.end()) is not None
    if b"." in word:
      return any(len(part) > 2 for part in word.split(b"."))
    return word not in _ABBREVIATIONS and not (digit_follows and word in _BEFORE_DIGITS)


def prose_separators(data: bytes) -> Iterator[tuple[int, int]]:
  """Yields the byte spans that separate steps: line breaks, and sentence stops with closers."""
  text, i, last = _Text(data), 0, 0
  while i < len(text.signs):
    kind, start, stop = text.signs[i]
    end, separates = text.ends[i], kind in ("blank", "line")
    if kind == "stop":
      stop = _CLOSERS.match(data, stop).end()
      separates = text.ends_sentence(last, start, stop)
    elif kind == "wide":
      stop, separates = _CLOSERS.match(data, stop).end(), True
    elif end is not None and end < 0:  # unclosed: skip to the blank line
      i = -1 - end
      continue
    elif end is not None:
      i, closer = end, text.signs[end]
      inside = data[stop : closer[1]].rstrip()
      if kind in ("$", "$$", "[", "(") and inside.endswith(b".") and not inside.endswith(b".."):
        start, stop = closer[1], _CLOSERS.match(data, closer[2]).end()
        separates = bool(_SENTENCE_BEGINS.match(data, stop))
    if separates:
      yield start, stop
      last = stop
    i += 1


def ends(ids: Sequence[int], token_text: TokenText, task) -> list[int]:
  """The exclusive token ends of a response's steps, as `token_text.ends_at`.

  Args:
    ids: the response.
    token_text: of its tokenizer.
    task: the config's section.
  """
  if task.steps == "prose":
    return token_text_lib.ends_at(ids, token_text, prose_separators)
  return token_text_lib.step_ends(ids, token_text, task.step_delimiter)
