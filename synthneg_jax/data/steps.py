"""Where the steps of a response end: at a delimiter, or, in prose with LaTeX, at the ends of lines
and sentences.

Prose (ours; the paper's steps are sentences, its splitter is not known). A step ends with its line,
and within a line with its sentence, but never inside LaTeX: `$...$`, `$$...$$`, `\\(...\\)`,
`\\[...\\]`, `\\begin{x}...\\end{x}`, `{...}`, `[asy]...[/asy]`. As in TeX, formulas and braces do
not reach over a blank line. What is never closed before one: a `$` or `{` is plain text, the others
hold all up to there together. `\\$` is a dollar, and so is a `$` whose partner stands after a space
or before a digit, unless spaces are inside both (nearly pandoc's rule): "costs $5. He has $3." has
no formula.

A sentence ends with `.`, `?` or `!` and the closing brackets, quotes and stars after it, before
whitespace and a word that does not begin with a small letter; or with a formula whose last sign is
a period (`$x=2.$ Then`). So no number is cut (3.14, 1,000), and no abbreviation (e.g., Fig. 2), nor
a line's number (`1.`, `Step 2.`). `5!` is a factorial, and `5!.` ends a sentence. A time (5 p.m.)
ends one before a capital letter, unless a weekday or a time zone follows. The full-width stops of
Chinese and Japanese (`。`, `！`, `？`) end a sentence whatever follows, and take closing brackets and
quotes along.

What follows a step does not depend on what stood before it: the steps of a response's rest are the
rest of its steps.
"""

import re
from collections.abc import Iterator, Sequence

from synthneg_jax.data import token_text as token_text_lib
from synthneg_jax.data.token_text import TokenText

_SIGN = re.compile(
  rb"\\begin\s*\{(?P<begin>[A-Za-z]+\*?)\}|\\end\s*\{(?P<end>[A-Za-z]+\*?)\}|(?P<asy>\[asy\])|(?P<yas>\[/asy\])"
  rb"|\\(?P<escape>[^\n])|(?P<dollar>\$\$?)|(?P<brace>[{}])|(?P<blank>\n[ "
  rb"\t\r]*(?=\n))|(?P<line>\n)|(?P<stop>[.?!]+)"
  rb"|(?P<wide>(?:\xe3\x80\x82|\xef\xbc[\x81\x9f])+)"  # 。 ！ ？
)
# Brackets, quotes, stars; ’ ” 》 」 』 】 ）.
_CLOSERS = re.compile(
  rb"(?:[)\]\"'*_]|\xe2\x80[\x99\x9d]|\xe3\x80[\x8b\x8d\x8f\x91]|\xef\xbc\x89)*"
)
_SENTENCE_BEGINS = re.compile(rb"[ \t\r]+(?=([^a-z\s,;:.?!=<>+/^|)\]}]))")
_WORD = re.compile(rb"[A-Za-z]+(?:\.[A-Za-z]+)*\Z")
_LINE_NUMBER = re.compile(
  rb"[ \t\r>*#_-]*(?:(?:step|case|part|claim|method|solution) +)?(?:[0-9]{1,3}|[A-Za-z]|[ivx]{2,4})",
  re.IGNORECASE,
)
_LONGEST = 60  # bytes before a period that are looked at
_ABBREVIATIONS = frozenset(
  b"al approx ca cf co cor def dept dr eg eq eqs ex fig figs ie inc jr lem ltd mr mrs ms prof prop "
  b"resp sr st thm viz "
  b"vs".split()
)
_BEFORE_DIGITS = frozenset(
  b"art ch ft hr hrs in lb lbs min mins no nos oz p pp sec secs vol yd".split()
)  # No. 5, 5 ft. 3
_TIMES = (b"a.m", b"p.m")
_NEW_SENTENCE = re.compile(
  rb"(?!(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|[A-Z]{2,4}\b)[A-Z]"
)  # after a time of day
_CLOSER_OF = {"[": "]", "(": ")"}


class _Text:
  """The signs of a text that matter, and for each that opens something, where that ends.

  Attributes:
    signs: (kind, start, stop) in order; kinds are `[ ] ( ) { } $ $$ begin end asy yas blank line
      stop wide`.
    ends: for a sign that opens something the number of the sign that closes it, or, where it is
      held together up to a blank line or the end, the number of the sign there, negative and less
      1; None for all others.
  """

  def __init__(self, data: bytes):
    self.data, self.signs, names = data, [], []
    for found in _SIGN.finditer(data):
      kind = found.lastgroup
      if kind == "escape":
        kind = found.group().decode("latin-1")[1]
        if kind not in "[]()":
          continue
      elif kind in ("dollar", "brace"):
        kind = found.group().decode("ascii")
      self.signs.append((kind, *found.span()))
      names.append(found.group("begin") or found.group("end"))
    self.ends = [None] * len(self.signs)
    next_of, environments, asy, paragraph = {}, {}, None, -1 - len(self.signs)
    for i in reversed(
      range(len(self.signs))
    ):  # from the end, so that nothing depends on what stands before
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
    """j where the dollars i and j make a formula."""
    if j is None:
      return None
    opens, closes = self.signs[i][2], self.signs[j][1]
    spaces = self.data[opens : opens + 1].isspace(), self.data[closes - 1 : closes].isspace()
    if closes == opens or spaces[0] != spaces[1] or self.data[closes + 1 : closes + 2].isdigit():
      return None
    return j

  def ends_sentence(self, last: int, start: int, stop: int) -> bool:
    """Whether the stop at [start, stop), closers behind it included, ends a sentence that began at
    `last` or later.
    """
    begins = _SENTENCE_BEGINS.match(self.data, stop)
    if not begins:
      return False
    before = self.data[max(last, start - _LONGEST) : start]
    if self.data[start : start + 1] == b"!":
      if self.data[start:stop].lstrip(b"!")[:1] in (
        b".",
        b"?",
      ):  # the factorial 5! and then a period
        return True
      return before[-2:].isalpha() and len(before) > 1
    if self.data[start : start + 1] == b"?":
      return True
    digit_follows = begins.group(1).isdigit()
    if digit_follows and before[-1:].isdigit():
      return False
    if len(before) < _LONGEST and _LINE_NUMBER.fullmatch(before):
      return False
    found = _WORD.search(before)
    word = found.group().lower() if found else b""
    if word in _TIMES:
      return _NEW_SENTENCE.match(self.data, begins.end()) is not None
    if b"." in word:
      return any(len(part) > 2 for part in word.split(b"."))
    return word not in _ABBREVIATIONS and not (digit_follows and word in _BEFORE_DIGITS)


def prose_separators(data: bytes) -> Iterator[tuple[int, int]]:
  """The byte spans that separate steps of prose: line breaks, and the stops of sentences with the
  closers behind them.
  """
  text, i, last = _Text(data), 0, 0
  while i < len(text.signs):
    kind, start, stop = text.signs[i]
    end, separates = text.ends[i], kind in ("blank", "line")
    if kind == "stop":
      stop = _CLOSERS.match(data, stop).end()
      separates = text.ends_sentence(last, start, stop)
    elif kind == "wide":
      stop, separates = _CLOSERS.match(data, stop).end(), True
    elif end is not None and end < 0:  # held together up to the sign there
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
  """The exclusive token ends of a response's steps by the config's section `task`; as
  `token_text.ends_at`.
  """
  if task.steps == "prose":
    return token_text_lib.ends_at(ids, token_text, prose_separators)
  return token_text_lib.step_ends(ids, token_text, task.step_delimiter)
