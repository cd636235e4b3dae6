r"""Extracts the statements of an answer from a response, for every kind of answer.

The rules apply in this order; docs/grading.md gives examples.

1. Remove thoughts, turn marks and Markdown (response_text.py).
2. Collect explicit statements: boxes, `####` lines, <answer> tags, "the answer is ..." lines, and
   the line below an "Answer" heading. Without any, fall back to the display that ends the response,
   or else to its last line.
3. Drop denied and hedged statements; "No, wait" retracts the statements before it (assertions.py).

All regular expressions take time linear in the length of the text.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from synthneg_jax.grading import assertions, response_text
from synthneg_jax.grading.answer_tokens import closing

MAX_SENTENCE = 1600  # characters of a sentence or line
_MAX_STATEMENTS = 100  # last matches of each rule
_MAX_LINES = 50  # last lines searched for an unmarked answer
_MAX_GAP = 60  # characters between boxes of one answer


class Statement(NamedTuple):
  """A statement of an answer.

  Attributes:
    text: the answer as written, several values joined by commas.
    source: "box", "marker" (`####`), "tag" (<answer>), "line" ("the answer is ..."), "heading"
      (below "Answer"), "display", "last" (the last line) or "retraction" (after "No, wait").
    retracts: whether it follows words that retract the statements before it.
  """

  text: str
  source: str
  retracts: bool = False


class Reading(NamedTuple):
  """The statements of a response.

  Attributes:
    statements: in the order of the text; only explicit ones if there are any.
    failure: why there are none: "no_answer", "unparsable" (an unclosed box) or "ambiguous" (a
      hedge); else "".
    fallback: the statement of the last line, in case all statements are unparsable headings.
  """

  statements: tuple[Statement, ...]
  failure: str = ""
  fallback: Statement | None = None


class _Span(NamedTuple):
  """A statement and its position in the text."""

  start: int
  end: int
  statement: Statement


_HOLDS_VALUE = re.compile(r"[0-9$\\]")
_HOLDS_ANSWER = re.compile(r"[0-9$\\]|\b[A-J]\b\)?[.!]?\s*\Z")
_DISPLAY = re.compile(
  r"""
  \$\$((?>(?:[^$\\]|\\.){1,1500}))\$\$ | \\\[((?>(?:[^\\]|\\(?!\])){1,1500}))\\\]
  | \\begin\{(?:equation|align|gather|displaymath)\*?\}
    ((?>(?:[^\\]|\\(?!end\{)){1,1500}))\\end\{[a-z]+\*?\}
  """,
  re.VERBOSE,
)
FORMULA = re.compile(
  r"""
  \$\$((?>(?:[^$\\]|\\.){1,1500}))\$\$ | \$([^$]+)\$(?![0-9])
  | \\\((.{1,1500}?)\\\) | \\\[(.{1,1500}?)\\\]
  """,
  re.DOTALL | re.VERBOSE,
)
_LIST_MARK = r"[ \t]*(?:[-*+•·]|\(?(?:[0-9]{1,2}|[a-zA-Z]|[ivx]{1,4})[.)])"
_BLANKS = re.compile(r"(?:[\s:：*]|\.(?=\s))*+")
_REST_OF_LINE = re.compile(rf"[^\n]{{0,{MAX_SENTENCE}}}")
_ITEM_MARK = re.compile(rf"{_LIST_MARK}[ \t]+")
_ITEMS = re.compile(rf"(?:{_LIST_MARK}[ \t]+[^\n]{{1,200}}(?:\n+|\Z)){{2,}}")
_LABELLED = re.compile(  # lines such as "Tom: 5" and "$x = 5$"
  r"(?:[ \t]*\$?[A-Za-z][A-Za-z ]{0,30}[:=][ \t]*\$?-?[0-9][0-9.,/]*\$?(?:[ \t]+[A-Za-z]+){0,2}"
  r"[ \t]*(?:\n+|\Z)){2,}"
)
_TOTAL_LINE = re.compile(r"^[ \t]*(?:total|answer)[^\n:=]*[:=][ \t]*([^\n]+)", re.I | re.M)

# Boxes. JSON decoding may have turned the \b of \boxed into a backspace.
_BOX = re.compile(r"(?:\\{1,2}|\x08|(?<![A-Za-z\\]))(?:boxed|oxed|fbox|framebox)(?![A-Za-z])[ \t]*")
_BARE_BOX = re.compile(r"\\[a-zA-Z]+(?:\{[^{}]*\}){0,2}|[-+]?[^\s$.,;{}()]+")
_PLACEHOLDER = re.compile(  # \boxed{}, \boxed{...}, \boxed{your answer}
  r"""
  (?: \s | ~ | \\[;,:!\ ] | \.{2,}+ | … | \? | _ | [{}<>\[\]]
    | \\(?:ldots|dots|cdots|square|quad|text|hspace|mathrm|textbf|_)(?![A-Za-z])
    | \b(?:your|the|final|correct|numerical|numeric|integer|answer|result|value|number|here|goes
        |expression|xxx+)\b )*+
  """,
  re.IGNORECASE | re.VERBOSE,
)
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»"}
_GAP = re.compile(  # text between boxes of one answer
  rf"""
  (?: [\s,;&$.、，；{{}}] | \\\\ | \\(?:quad|qquad|text|mathrm|textrm|[,;:!\ ()\[\]])
    | \b(?:and|or)\b | 和 | 或 | ^{_LIST_MARK}
    | (?<![A-Za-z])[A-Za-z](?:_\{{?[0-9A-Za-z]\}}?)?(?:\([A-Za-z]\))?\s*[=:] )*
  """,
  re.MULTILINE | re.VERBOSE,
)
_MINUS_BEFORE = re.compile(
  r"""
  (?: (?:[=$(]|\\\(|\\\[|\bis)[ \t]*[-−](?:\\,)?\$?[ \t]* | (?<!not[ ])\b(?:minus|negative)[ \t]+\$?
    | \A−\$? | \s−\$? | [-−][ \t]*(?:\\left)?\( )\Z
  """,
  re.IGNORECASE | re.VERBOSE,
)
_CHANGED_BEFORE = re.compile(
  r"""
  (?: \\(?:cdot|times|div)\s* | \\sqrt\s*(?:\[[^\[\]]*\])?\{ | \\[dt]?frac\s*(?:\{[^{}]*\}\s*)?\{
    | [0-9a-z)}]\s*[*/^+]\s*\{? | [0-9]\s*-\s* | \$-?[0-9a-z.]+
    | \\(?:log|ln|lg|exp|sin|cos|tan)\s*[({]? | (?:(?<=\s)|(?<=[0-9)]))[<>≈]\s*
    | \\(?:[gl]eq?|approx)\s* | (?<!\\)\[ | \\\{
    | \b(?:at\s+(?:least|most)|(?:more|less|fewer)\s+than|about|half\s+of|root\s+of)\s+\$? )\Z
  """,
  re.VERBOSE,
)
_CHANGED_BEHIND = re.compile(
  r"""
  [ \t]* (?: \^(?!\s*\{?\s*\\circ) | [_×÷] | /\s*[0-9]
    | \\(?:pi|pm|cdot|times|sqrt|[dt]?frac|div)(?![a-z])
    | [*+][ \t]*[0-9a-z\\] | [ \t]-[ \t]*[0-9a-z](?![A-Za-z]) )
  | -[0-9] | ,[0-9]{3}(?![0-9]) | :[0-9] | [a-zA-Z](?<![mgshlLNJVAWCF])(?![A-Za-z])
  | \s*,\s*[0-9]+\s*[)\]}\\] | \)[\^!]
  | [\s$]*(?:and\s+a\s+half|(?:hundred|thousand|million)ths?|squared|cubed|(?:or|to)\s+[0-9])\b
  """,
  re.VERBOSE,
)
_SCALE_BEHIND = re.compile(
  r"(?:[\s$]|\\[,;: ])*(?:\\text\s*\{\s*)?"
  r"((?:hundred|thousand|million|billion|trillion|dozen|lakh|crore)s?)\b",
  re.IGNORECASE,
)
_JOINS = re.compile(r"[,;]|\b(?:and|or)\b")
_SEPARATES = re.compile(
  r"""
  [.!?](?:\s|\Z) | \n
  | \b(?:wait|no|not|actually|instead|sorry|but|rather|should|so|hence|thus|therefore|then|which
      |giving|gives|step|finally|final|answer|total)\b
  """,
  re.IGNORECASE | re.VERBOSE,
)

# "####", and headings
_MARKER = re.compile(r"#{4,}")
_ANSWER_NAME = (
  r"(?:(?:the|my|our|your|so|thus|therefore|hence|and|final|correct|short|numerical|numeric|exact"
  r"|overall)\s+)*"
)
_HEADING = re.compile(
  rf"[ \t]*(?:{_ANSWER_NAME}(?:answers?|(?:final[ ])?result)|最终答案|答案)[ \t]*[:：.]?[ \t]*",
  re.IGNORECASE,
)
_OTHER_HEADING = re.compile(  # "#### Step 1: add", but not "#### Step 12"
  r"""
  (?:step|part|case|problem|question|solution|explanation|reasoning|given|analysis|verification
    |check|note|summary|conclusion|approach|understanding|calculat\w*|comput\w*|find\w*
    |determin\w*|sett?\w*|solv\w*)\b (?![ \t]*[:=]?[ \t]*[-$\\]?[0-9][0-9.,]*[ \t]*$)
  | [0-9]{1,2}[.)][ \t]+[A-Za-z]
  """,
  re.IGNORECASE | re.VERBOSE,
)

# "The answer (to this question) is therefore ..."
_LINE = re.compile(
  r"""
  (?: \b(?: answers?(?:\s+[0-9])? | ans\.? | solutions?(?:\s+set)?
        | (?:correct|right|best)\s+(?:option|choice) )
    | 答案 | 結果 | 结果 | 故 | 应 )
  (?: \s*\([^()\n]{0,60}\) | ,[^\n.:=,]{1,40},
    | ,?\s+(?: to|for|of|in|as|on|rounded|expressed|here|now|then|we|you|i|that|written|therefore
        |thus|hence|must|will|would|should )\b (?:(?!answer)[^\n.:=≠]){0,60}? )?
  \s*(?: \b(?: is|are|was|were|equals?|becomes|be|comes\s+(?:out\s+)?to|comes\s+to\s+be
        |works\s+out\s+(?:to|as)|turns\s+out\s+to|evaluates\s+to|simplifies\s+to|reduces\s+to )\b
    | ['’]s\b | [:：=] | (?<=\s)[-–—](?=\s) | 是 | 为 | 选 )
  (?: \s*(?: therefore|thus|simply|then|hence|indeed|clearly|exactly|just|precisely|be|equal\s+to
        |given\s+by|actually|still|also|always|finally|obviously|to\s+be|the\s+following )\b,? )*
  \s*[:：]?
  """,
  re.IGNORECASE | re.VERBOSE,
)
_LINE_WORD = re.compile("answer|solution|ans|option|choice|答案|结果|結果|故|应|选", re.IGNORECASE)
_SOLUTION_HEADING = re.compile(r"solutions?\s*[:：]", re.IGNORECASE)
_SIGN_ALONE = re.compile(r"(?!.*\sis\b).*[:：=]\s*\Z", re.DOTALL | re.IGNORECASE)
_BEGINS_CLAUSE = re.compile(
  rf"(?:^|[.!?:;,。，])[\s*#>(-]*{_ANSWER_NAME}\Z|[\u4e00-\u9fff]\Z", re.IGNORECASE
)
_OF_SOMETHING_ELSE = re.compile(
  r"""
  \b(?:first|second|third|next|previous|earlier|intermediate|partial|sub|other|naive
    |student'?s?|their|his|her|initial|expected|no)\s*\Z
  """,
  re.IGNORECASE | re.VERBOSE,
)
_REMARK = re.compile(  # "the answer is correct because ...", "the answer is the same"
  r"""
  (?:the\s+)?(?:correct|right|wrong|incorrect|not\s+(?:right|correct)|same|clear|boxed|above|below
    |obvious|unique|reasonable|shown|consistent|verified|confirmed|as\s+follows|found\s+by|obtained
    |not\s+boxed|already|in\s+the\s+box|given\s+(?:above|by)
    |an?\s+(?:positive\s+|negative\s+|whole\s+)?(?:integer|number|fraction|multiple|prime)\b)
  """,
  re.IGNORECASE | re.VERBOSE,
)
_CONDITIONAL = re.compile(r"\b(?:if|in\s+general)\b[^.\n]*\Z", re.IGNORECASE)
_NOT_BUT = re.compile(r"\s*not\b[^.;]{1,40}?,?\s*but\s+(?:rather\s+)?", re.IGNORECASE)
_SHORT_ANSWER = re.compile(r"^A: *", re.MULTILINE)
_SECOND_CHOICE = re.compile(r"^B:", re.MULTILINE)
_TAG = re.compile(
  r"<(?:final_?)?answer>(.*?)(?:</(?:final_?)?answer>|\Z)", re.DOTALL | re.IGNORECASE
)
_JSON = re.compile(
  r'"(?:final_?)?answer"\s*:\s*(?:"([^"\n]{1,200})"|([^",}\n]{1,200}))', re.IGNORECASE
)
_TAG_MARK = re.compile(r"</?(?:final_?)?answer>", re.IGNORECASE)
_CONCLUDES = re.compile(  # text that derives a result after a display
  r"""
  \b(?:so|thus|hence|therefore|then|consequently|finally|giving|gives|get|obtain|yields?|means
    |implies|solving|dividing|since|total|answer|result|we\s+(?:have|find|see))\b (?=[^$]*[0-9$\\])
  | =(?=[^\n]*\Z) | \bis\b(?=[^\n]*[0-9$\\])
  """,
  re.IGNORECASE | re.VERBOSE,
)
_AFTERTHOUGHT = re.compile(
  r"""
  \s*(?: (?:check|note|verif\w*|remark|explanation|here)\b | to\s+(?:check|verify)
    | (?:we|you)\s+can\s+(?:also\s+)?(?:check|verify) | let\s+me\s+know | (?:i\s+)?hope\b
    | feel\s+free | please\b )
  """,
  re.IGNORECASE | re.VERBOSE,
)
_REASON = re.compile(r"\A(?:since|because|as)\b[^.\n]*", re.IGNORECASE)  # of a retraction
_CHINESE_MINUS = re.compile(r"负的?(?=[\s$]*[0-9\\])")
_ENDS_EMPTY = re.compile(r"(?:#{4,}|\\(?:boxed|fbox)\s*(?:\{\s*\})?)[\s$*.]*\Z")


def boxes(text: str) -> tuple[list[tuple[int, int, str]], bool]:
  r"""(start, end, content) of every \boxed or \fbox, and whether the last one is unclosed."""
  result, position = [], 0
  if "box" not in text and "oxed" not in text:
    return result, False
  while match := _BOX.search(text, position):
    position = match.end()
    if position < len(text) and text[position] == "{":
      end = closing(text, position)
      if end < 0:
        return result, True
      result.append((match.start(), end + 1, text[position + 1 : end]))
      position = end + 1
    elif match.group().startswith("\\") and (bare := _BARE_BOX.match(text, position)):
      if re.search(r"[0-9\\]", bare.group()) or len(bare.group()) == 1:
        result.append((match.start(), bare.end(), bare.group()))
        position = bare.end()
  return result, False


def _is_quoted(text: str, start: int, end: int) -> bool:
  before, after = text[:start].rstrip("$ ")[-1:], text[end:].lstrip("$ .,")[:1]
  return _QUOTES.get(before) == after != ""


def _is_joint(gap: str) -> bool:
  """Whether boxes separated by this text are one answer."""
  if len(gap) > _MAX_GAP:
    return False
  return bool(_GAP.fullmatch(gap) or (_JOINS.search(gap) and not _SEPARATES.search(gap)))


def _box_statements(text: str, contents: list[tuple[int, int, str]]) -> list[_Span]:
  """Merges the boxes of one answer into one statement; drops empty and quoted boxes."""
  groups = []
  for start, end, content in contents:
    if _PLACEHOLDER.fullmatch(content.strip()[:200]) or _is_quoted(text, start, end):
      continue
    content = _in_context(text, start, end, content)
    if groups and _is_joint(text[groups[-1][-1][1] : start]):
      groups[-1].append((start, end, content))
    else:
      groups.append([(start, end, content)])
  spans = []
  for group in groups:
    joined = ", ".join(dict.fromkeys(content for _, _, content in group))
    spans.append(_Span(group[0][0], group[-1][1], Statement(joined, "box")))
  return spans


def _in_context(text: str, start: int, end: int, content: str) -> str:
  """A box's content with the sign or scale word around it; "?" if what surrounds it changes it."""
  before, after = text[max(0, start - 40) : start], text[end : end + 40]
  if _MINUS_BEFORE.search(before):
    return f"-({content})"
  if scale := _SCALE_BEHIND.match(after):
    return f"{content} {scale.group(1)}"
  return "?" if _CHANGED_BEFORE.search(before) or _CHANGED_BEHIND.match(after) else content


def gold_text(gold: str) -> str:
  """The content of the last box, or of the boxes of the last answer; or else the whole text."""
  contents, is_open = boxes(gold)
  if is_open:
    return re.split(r"\\(?:boxed|fbox)\s*\{", gold)[-1]
  spans = _box_statements(gold, contents)
  return spans[-1].statement.text if spans else gold


def _statement_at(text: str, start: int) -> tuple[str, int]:
  """(text, end) of the statement that follows `start`: a sentence, display or list."""
  begin = _BLANKS.match(text, start).end()
  display = _DISPLAY.match(text, begin)
  if display:
    return next(filter(None, display.groups()), "").strip(), display.end()
  if "\n" in text[max(0, start - 1) : begin]:
    begin = text.rfind("\n", 0, begin) + 1
    if items := _ITEMS.match(text, begin):
      lines = [_ITEM_MARK.sub("", item, 1).strip() for item in items.group().splitlines()]
      return ", ".join(filter(None, lines)), items.end()
    if labelled := _LABELLED.match(text, begin):
      if total := _TOTAL_LINE.search(labelled.group()):
        return total.group(1), labelled.end()
      return ", ".join(labelled.group().split("\n")).strip(", "), labelled.end()
    if mark := _ITEM_MARK.match(text, begin):
      begin = mark.end()
  line = _REST_OF_LINE.match(text, begin).group()
  stop = assertions.SENTENCE_END.search(line)
  length = stop.start() if stop else len(line)
  return line[:length].strip(), begin + length


def _markers(text: str) -> Iterator[_Span]:
  """The text after each `####` on its line, or below it if the line is empty or a heading."""
  markers = list(_MARKER.finditer(text))[-_MAX_STATEMENTS:]
  for index, marker in enumerate(markers):
    following = markers[index + 1].start() if index + 1 < len(markers) else len(text)
    newline = text.find("\n", marker.end())
    end = min(newline if newline >= 0 else len(text), following)
    content = text[marker.end() : end].strip(" \t\r*")
    if not content or _HEADING.fullmatch(content):
      content, end = _statement_at(text, end) if following == len(text) else ("", end)
    elif _OTHER_HEADING.match(content):
      content = ""
    if content:
      yield _Span(marker.start(), end, Statement(content, "marker"))


def _lines(text: str) -> Iterator[_Span]:
  """Sentences such as "the answer is ...", and the text below "Answer" headings."""
  if not _LINE_WORD.search(text):
    return
  reached = -1
  matches = list(_LINE.finditer(text))[-_MAX_STATEMENTS:]
  for match, following in itertools.zip_longest(matches, matches[1:]):
    before = text[max(0, match.start() - 60) : match.start()].rpartition("\n")[2]
    if match.start() < reached or _OF_SOMETHING_ELSE.search(before):
      continue
    if _SIGN_ALONE.match(match.group()) and not _BEGINS_CLAUSE.search(before):
      continue  # a colon in a sentence about an answer
    start, begin = match.span()
    if contrast := _NOT_BUT.match(text, begin):
      start = begin = contrast.end()  # "not 7, but 8"
    content, end = _statement_at(text, begin)
    if following and following.start() < end:  # "the solutions are ..., so the answer is ..."
      end = following.start()
      content = text[begin:end].strip()
    if _SOLUTION_HEADING.match(match.group()) and _HOLDS_VALUE.search(text[end:]):
      continue  # heads the working, not the answer
    if _REMARK.match(content):
      continue
    if _CONDITIONAL.search(before) and re.search("would|in general", before + match.group()):
      continue
    reached = end
    shown = _BOX.sub("", content).strip("\"'”’.) ")
    if shown and not _PLACEHOLDER.fullmatch(shown[:200]):
      below = "\n" in text[match.start() : text.find(content, begin)]
      if not (below and _OTHER_HEADING.match(content)):
        yield _Span(start, end, Statement(content, "heading" if below else "line"))
  position = 0
  for line in text.splitlines(keepends=True):
    position += len(line)
    if len(line) < 60 and ":" not in line and line.strip() and position > reached:
      if _HEADING.fullmatch(line.rstrip("\r\n")):
        content, end = _statement_at(text, position)
        if content and not _LINE.search(content) and not _OTHER_HEADING.match(content):
          yield _Span(position, end, Statement(content, "heading"))


def _short_answer(text: str) -> list[_Span]:
  """The text after the last "A:" of "Q: ... A: ...", unless a "B:" makes it a choice."""
  *_, last = [None, *_SHORT_ANSWER.finditer(text)]
  if last is None or _SECOND_CHOICE.search(text, last.end()):
    return []
  content, end = _statement_at(text, last.end())
  return [_Span(last.start(), end, Statement(content, "line"))] if content else []


def _tags(text: str) -> Iterator[_Span]:
  """<answer> tags, with short lines joined by commas, and the "answer" field of JSON."""
  for tag in [*_TAG.finditer(text), *_JSON.finditer(text)]:
    content = next(filter(None, tag.groups()), "").strip()
    if content and not _PLACEHOLDER.fullmatch(content[:200]):
      lines = [line.strip() for line in content.splitlines() if line.strip()]
      if all(len(line) < 20 for line in lines):
        content = ", ".join(lines)
      yield _Span(*tag.span(), Statement(content, "tag"))


def _explicit(text: str) -> tuple[list[_Span], bool]:
  """All explicit statements in the order of the text, and whether the last box is unclosed.

  A line that overlaps a box or marker is no statement of its own, nor is a tag that overlaps any of
  these.
  """
  contents, is_open = boxes(text)
  spans = [*_box_statements(text, contents), *_markers(text)]
  for outer in (_lines(_blank_tags(text)), _tags(text)):
    inner = list(spans)
    for span in outer:
      if not any(span.start < other.end and other.start < span.end for other in inner):
        spans.append(span)
  return sorted(spans or _short_answer(text)), is_open


def _blank_tags(text: str) -> str:
  """Replaces <answer> tags by as many spaces."""
  return _TAG_MARK.sub(lambda mark: " " * len(mark.group()), text)


def _implicit(text: str, bold: Sequence[str] = ()) -> Statement | None:
  """The display that ends a text, else its last line with a formula or number, else its only line.

  Args:
    text: text without Markdown.
    bold: its bold parts; the only bold value in the line replaces the line.
  """
  text = text.strip()
  *_, display = [None, *_DISPLAY.finditer(text)]
  if display and not _CONCLUDES.search(text[display.end() :]):
    return Statement(next(filter(None, display.groups()), ""), "display")
  lines = text.splitlines()[-_MAX_LINES:]
  for line in reversed(lines):
    if (_HOLDS_VALUE.search(line) and not _AFTERTHOUGHT.match(line)) or len(line) == len(text):
      line = _ITEM_MARK.sub("", line, 1) if len(lines) > 1 and _ITEM_MARK.match(line) else line
      marked = {part for part in bold if part in line and _HOLDS_VALUE.search(part)}
      chosen = marked.pop() if len(marked) == 1 else _last_sentence(line)
      return Statement(chosen.strip()[-MAX_SENTENCE:], "last")
  return None


def _last_sentence(line: str) -> str:
  """The last sentence of a line with a value; the whole line if that sentence is a retraction."""
  begins = [0, *(stop.end() for stop in assertions.SENTENCE_END.finditer(line))]
  for begin, end in reversed(list(zip(begins, [*begins[1:], len(line)], strict=True))):
    sentence = line[begin:end].strip()
    if _HOLDS_VALUE.search(sentence) and not _AFTERTHOUGHT.match(sentence):
      return line if begin and assertions.turn(sentence) else sentence
  return line


def _is_denied(text: str, span: _Span) -> bool:
  statement = span.statement
  if statement.source == "line":
    verb = text[span.start : span.end].removesuffix(statement.text)
    is_question = text[span.end : span.end + 1] in ("?", "？")
    if is_question or statement.text.endswith(("?", "？", "吗")):
      return True
    if assertions.has_denying_verb(verb):
      return True
  return assertions.denies_itself(statement.text) or assertions.is_denied(text, *span[:2])


def _is_hedged(text: str, span: _Span) -> bool:
  """Whether the sentence around a statement hedges it."""
  before = text[max(0, span.start - 80) : span.start]
  begin = max(before.rfind(sign) for sign in ("\n", ". ", "! ", "? ")) + 1
  head = {"line": before[begin:] + text[span.start : span.end], "box": before[begin:]}
  tail = text[span.end : span.end + 80].partition("\n")[0]
  tail = assertions.SENTENCE_END.split(tail)[0]
  return assertions.is_hedged(head.get(span.statement.source, "")) or assertions.is_hedged(tail)


def _with_retractions(text: str, spans: list[_Span]) -> Reading:
  """Marks the statements that follow a retraction, and adds the value of a final retraction."""
  statements = [spans[0].statement]
  for before, span in zip(spans, spans[1:], strict=False):
    turns = assertions.turn(text[before.end : span.start]) is not None
    statements.append(span.statement._replace(retracts=turns))
  rest = text[spans[-1].end : spans[-1].end + 2 * MAX_SENTENCE]
  turn = assertions.turn(rest)
  if turn is None:
    return Reading(tuple(statements))
  end, firm = turn
  if not firm and assertions.confirms(rest[end:]):
    return Reading(tuple(statements))
  value = _implicit(_REASON.sub("", rest[end:].lstrip(" \n.,:;*!-")))
  if value is not None and _HOLDS_ANSWER.search(value.text):
    return Reading((*statements, Statement(value.text, "retraction", retracts=True)))
  return Reading((), "no_answer") if firm else Reading(tuple(statements))


def read_response(response: str, *, marked_only: bool = False) -> Reading:
  """Extracts the statements of a response.

  Args:
    response: any text.
    marked_only: whether to skip the last display and the last line.
  """
  text = response_text.answer_text(response)
  if text is None:
    return Reading((), "no_answer")
  text = text.replace("\r\n", "\n").replace("\x0c", r"\f")
  text = _CHINESE_MINUS.sub("-", text)
  bold = response_text.bold_parts(text)
  text = response_text.without_markdown(text)
  spans, is_open = _explicit(text)
  if is_open:
    return Reading((), "unparsable")
  text = _blank_tags(text)
  asserted = [span for span in spans if not _is_denied(text, span)]
  certain = [span for span in asserted if not _is_hedged(text, span)]
  if certain:
    is_heading = all(span.statement.source == "heading" for span in certain)
    fallback = _implicit(text, bold) if is_heading and not marked_only else None
    return _with_retractions(text, certain)._replace(fallback=fallback)
  if asserted:
    return Reading((), "ambiguous")
  if spans or marked_only or _ENDS_EMPTY.search(text):
    return Reading((), "no_answer")
  statement = _implicit(text, bold)
  last_line = text.strip().rpartition("\n")[2]
  if statement is None or assertions.admits_ignorance(statement.text):
    return Reading((), "no_answer")
  if _HOLDS_VALUE.search(statement.text) and assertions.disowns(last_line):
    return Reading((), "no_answer")
  return Reading((statement,))
