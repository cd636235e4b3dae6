r"""What a response states as its answer: the one reader of model text for answers of every kind.

The rules apply in this order; docs/grading.md gives the reasons.

1. Text that is not the answer's goes first: thoughts, channels other than the final one, marks that end a turn.
2. Markdown outside LaTeX goes: emphasis, code, quotes, headings, emoji.
3. Explicit statements are collected: boxes, `####` lines, <answer> tags, "the answer is ..." lines, and the line below an
   "Answer" heading. Only a response without any is read by its last displayed formula, then by its last line.
4. A statement that is denied ("the answer isn't 7") or refuted ("7 is wrong") is none. One that follows "No, wait" takes
   back what stands before it.

Everything is regular expressions over the text, in time linear in its length for any input; nothing is evaluated.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from synthneg_jax.grading.answer_tokens import closing

MAX_SENTENCE = 1600  # characters of a sentence or line that is read
_MAX_STATEMENTS = 100  # the last ones of each rule
_MAX_LINES = 50  # lines from the end in which an unmarked answer is looked for


class Statement(NamedTuple):
  """One place where a response says what its answer is.

  Attributes:
    text: the answer as written, several values joined by commas.
    source: "box", "marker" (`####`), "tag" (<answer>), "line" ("the answer is ..."), "display" or "last".
    retracts: it follows words such as "No, wait", which take back what stands before.
    parts: the values that `text` joins; one where nothing is joined.
  """

  text: str
  source: str
  retracts: bool = False
  parts: tuple[str, ...] = ()


class Reading(NamedTuple):
  """What a response states.

  Attributes:
    statements: in the order of the text; of explicit sources only where there is one.
    failure: why there is none: "no_answer", "unparsable" (a box that does not close) or "ambiguous" (a hedge); else "".
  """

  statements: tuple[Statement, ...]
  failure: str = ""


# 1. Thoughts, channels and turns

_THOUGHT = re.compile(
  r"</?(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad|analysis|inner_thoughts?|"
  r"inner_monologue)\s*>|\[/?THINK\]|◁/?think▷|<\|(?:begin|end)_of_thought\|>|<\|(?:START|END)_THINKING\|>|"
  r"<\|channel>\s*thought|<channel\|>",
  re.IGNORECASE,
)
_THOUGHT_ENDS = re.compile(r"\W*/|<\|end_|<channel", re.IGNORECASE)
_CHANNEL = re.compile(r"<\|channel\|>\s*([A-Za-z]+)[^<|]{0,80}<\|message\|>")
_BARE_CHANNELS = re.compile(r"\A\s*analysis(?=[A-Z\s]).*assistant\s?final(?=[A-Z0-9\s\\$*#(-])", re.DOTALL)
_TURN_BEGINS = re.compile(
  r"(?:\s*(?:<s>|<bos>|\[/INST\]|<\|begin_of_text\|>|<\|startoftext\|>|<\|im_start\|>\s*assistant|<\|assistant\|>|"
  r"<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>|<start_of_turn>\s*model|<\|turn>\s*model|"
  r"<\|start\|>\s*assistant|<\|START_OF_TURN_TOKEN\|>|<\|CHATBOT_TOKEN\|>|<\|start_of_role\|>\s*assistant\s*"
  r"<\|end_of_role\|>|<｜begin▁of▁sentence｜>|<｜Assistant｜>))+"
)
_RESPONSE_MARKS = re.compile(
  r"<\|(?:(?:begin|end)_of_solution|(?:START|END)_(?:RESPONSE|TEXT)|content|message)\|>|</?(?:response|solution|output)>"
)
_TURN_ENDS = re.compile(
  r"</?s>|<eos>|<pad>|<EOT>|\[EOS\]|\[/?INST\]|<(?:end|start)_of_turn>|<end_of_utterance>|<turn\|>|<\|turn>|"
  r"<\|[A-Za-z][\w .:/-]{1,40}\|>|<[｜|][^<>｜|\n]{1,40}[｜|]>"
)


def opens_thought(prompt: str) -> bool:
  """Whether a prompt ends within a thought, as those of templates that write <think> themselves do."""
  marks = _THOUGHT.findall(prompt[-2000:])
  return bool(marks) and not _THOUGHT_ENDS.match(marks[-1])


def _without_thoughts(text: str) -> str | None:
  """The text outside thoughts; None where the last thought does not close.

  A closing mark without an opening one ends a thought that the prompt opened: all before it is dropped. An opening mark
  within a thought is text, as models that speak of their tags write it.
  """
  kept, start, inside = [], 0, False
  for mark in _THOUGHT.finditer(text):
    if _THOUGHT_ENDS.match(mark.group()):
      kept = kept if inside else []
      inside, start = False, mark.end()
    elif not inside:
      kept.append(text[start : mark.start()])
      inside = True
  return None if inside else " ".join([*kept, text[start:]])


def answer_text(response: str) -> str | None:
  """The part of a response that may state its answer; None where it never leaves its thought.

  Args:
    response: the text.
  """
  channels = list(_CHANNEL.finditer(response))
  if channels:
    if channels[-1].group(1).lower() != "final":
      return None
    response = response[channels[-1].end() :]
  else:
    bare = _BARE_CHANNELS.match(response) if "assistant" in response else None
    response = response[bare.end() :] if bare else response
  if "hink" in response or "<" in response or "THINK" in response:
    response = _without_thoughts(response)
    if response is None:
      return None
  if "<" in response or "[" in response:
    start = _TURN_BEGINS.match(response)
    response = _RESPONSE_MARKS.sub(" ", response[start.end() :] if start else response)
    end = _TURN_ENDS.search(response)
    response = response[: end.start()] if end else response
  return response


# 2. Markdown

_MATH = (
  r"\$\$[^$]++\$\$|\$(?=\S)[^$\n]++(?<=\S)\$(?![0-9])|\\\((?>(?:[^\\]|\\(?!\)))+)\\\)|\\\[(?>(?:[^\\]|\\(?!\]))+)\\\]"
)
_MATH_OR_BOX = re.compile(
  _MATH + r"|\\(?:boxed|fbox)\{(?>(?:[^{}\n]|\{(?>(?:[^{}\n]|\{[^{}\n]*+\})*)\})*)\}", re.DOTALL
)
_EMPHASIS = re.compile(r"\*{1,3}|_{1,3}|~~")
_LINE_START = re.compile(r"^[ \t]*(?:(?:>[ \t]*)++|(?:```|~~~)[^\n]*$|#{1,3}[ \t]+)", re.MULTILINE)
_HTML = re.compile(
  r"</?(?:b|i|em|strong|u|code|p|br|center|span|div|mark|h[1-6])(?:\s[^<>\n]{0,80})?/?>", re.IGNORECASE
)
_WRONG_MARK = re.compile("[❌✗✘]")
_EMOJI = re.compile("[\U0001f000-\U0001faff☀-✔✙-➓➘-➿⬛-⭕️⃣\u200d]")
_ENTITIES = {"&nbsp;": " ", "&lt;": "<", "&gt;": ">", "&amp;": "&", "&#36;": "$"}


def _emphasis_spans(text: str, masked: str) -> list[tuple[int, int]]:
  """Spans of paired emphasis marks; `masked` is the text with formulas blanked, so that no sign of theirs counts."""
  spans, opened = [], {}
  for mark in _EMPHASIS.finditer(masked):
    start, end, sign = *mark.span(), mark.group()
    before, after = masked[start - 1 : start], masked[end : end + 1]
    if before == "\\":
      continue
    if "\n\n" in masked[opened[sign][1] : start] if sign in opened else False:
      del opened[sign]  # emphasis does not cross paragraphs
    closes = not before.isspace() and before != "" and not (after.isalnum() or after in ("(", "{"))
    opens = not after.isspace() and after != "" and not (before.isalnum() or before in (")", "]", "}"))
    if closes and sign in opened:
      spans += [opened.pop(sign), (start, end)]
    elif opens:
      opened[sign] = (start, end)
  return spans


def without_markdown(text: str) -> str:
  """The text without Markdown and emoji; formulas and boxes stay as they are."""
  if not text.isascii():
    text = _EMOJI.sub(" ", _WRONG_MARK.sub(" is wrong ", text))
  if "<" in text:
    text = _HTML.sub(" ", text)
  if "&" in text:
    for entity, sign in _ENTITIES.items():
      text = text.replace(entity, sign)
  if "*" in text or "_" in text or "~~" in text:
    masked = _MATH_OR_BOX.sub(lambda formula: "x" * len(formula.group()), text)
    struck = None
    signs = list(text)
    for start, end in _emphasis_spans(text, masked):
      if text[start:end] == "~~":  # struck out: the text between goes, too
        signs[start if struck is None else struck : end] = [""] * (end - (start if struck is None else struck))
        struck = start if struck is None else None
      signs[start:end] = [""] * (end - start)
    text = "".join(signs)
  text = _LINE_START.sub("", text) if re.search("[>`~#]", text) else text
  return text.replace("`", " ")


# 3. Statements

_BOX = re.compile(r"(?:\\{1,2}|\x08|(?<![A-Za-z\\]))(?:boxed|oxed|fbox|framebox)(?![A-Za-z])[ \t]*")
_BARE_BOX = re.compile(r"\\[a-zA-Z]+(?:\{[^{}]*\}){0,2}|[-+]?[^\s$.,;{}()]+")
_PLACEHOLDER = re.compile(
  r"(?:\s|~|\\[;,:! ]|\.{2,}|…|\?|_|\\(?:ldots|dots|cdots|square|quad|text|hspace|mathrm|textbf|_)(?![A-Za-z])|[{}<>\[\]]|"
  r"\b(?:your|the|final|correct|numerical|numeric|integer|answer|result|value|number|here|goes|expression|xxx+)\b)*",
  re.IGNORECASE,
)
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»"}
_LIST_MARK = r"(?:[-*+•·]|\(?(?:[0-9]{1,2}|[a-zA-Z]|[ivx]{1,4})[.)])"
_GAP = re.compile(
  r"(?:[\s,;&$.、，；]|\\\\|\\(?:quad|qquad|text|mathrm|textrm|,|;|:|!| |\(|\)|\[|\])|[{}]|\b(?:and|or)\b|和|或|"
  rf"^[ \t]*{_LIST_MARK}|(?<![A-Za-z])[A-Za-z](?:_\{{?[0-9A-Za-z]\}}?)?(?:\([A-Za-z]\))?\s*[=:]|\bRoot [0-9]:)*",
  re.MULTILINE,
)
_ITEM_MARK = re.compile(rf"^[ \t]*{_LIST_MARK}[ \t]+")
_ITEMS = re.compile(rf"(?:[ \t]*{_LIST_MARK}[ \t]+[^\n]{{1,200}}(?:\n+|\Z)){{2,}}")
_MARKER = re.compile(r"#{4,}")
_ANSWER_NAME = (
  r"(?:(?:the|my|our|your|so|thus|therefore|hence|and|final|correct|short|numerical|numeric|exact|overall)\s+)*"
)
_HEADING = re.compile(
  rf"[ \t]*(?:{_ANSWER_NAME}(?:answers?|final result|result)|最终答案|答案)[ \t]*[:：.]?[ \t]*", re.IGNORECASE
)
_OTHER_HEADING = re.compile(
  r"(?:step|part|case|problem|question|solution|explanation|reasoning|given|analysis|verification|check|note|summary|"
  r"conclusion|approach|understanding|calculat\w*|comput\w*|find\w*|determin\w*|sett?\w*|solv\w*)\b(?![ \t]*[:=]?[ \t]*"
  r"[-$\\]?[0-9][0-9.,]*[ \t]*$)|[0-9]{1,2}[.)][ \t]+[A-Za-z]",
  re.IGNORECASE,
)
_ABOUT = (
  r"(?:\s*\([^()\n]{0,60}\)|,[^\n.:=,]{1,40},|(?:,?\s+(?:to|for|of|in|as|on|rounded|expressed|here|now|then|we|you|i|that|"
  r"written|therefore|thus|hence|must|will|would|should)\b[^\n.:=≠]{0,60}?))?"
)
_COPULA = (
  r"\s*(?:\b(?:is|are|was|were|equals?|becomes|be|comes\s+(?:out\s+)?to|comes\s+to\s+be|works\s+out\s+(?:to|as)|"
  r"turns\s+out\s+to|evaluates\s+to|simplifies\s+to|reduces\s+to)\b|['’]s\b|[:：=]|是|为)"
)
_FILLER = (
  r"(?:\s*(?:therefore|thus|simply|then|hence|indeed|clearly|exactly|just|precisely|be|equal\s+to|given\s+by|actually|"
  r"still|also|always|finally|obviously|to\s+be|the\s+following)\b,?)*\s*[:：]?"
)
_LINE = re.compile(
  rf"(?:\b(?:answers?|ans\.?|solutions?(?:\s+set)?|(?:correct|right|best)\s+(?:option|choice))|答案|結果|结果){_ABOUT}{_COPULA}{_FILLER}",
  re.IGNORECASE | re.MULTILINE,
)
_WORKING = re.compile(r"solutions?\s*[:：]", re.IGNORECASE)
_LEADS = re.compile(rf"(?:^|[.!?:;,。，\n])[\s*#>(-]*(?:{_ANSWER_NAME})\Z|[\u4e00-\u9fff]\Z", re.IGNORECASE)
_PARTIAL = re.compile(
  r"\b(?:first|second|third|previous|earlier|intermediate|partial|sub|wrong|incorrect|other|naive|student'?s?|their|his|her|"
  r"initial|expected|this part'?s?)\s*\Z|\bno\s*\Z",
  re.IGNORECASE,
)
_SENTENCE_END = re.compile(
  r"\.(?=\s+(?:[A-Z(\\\"“#*]|no\b|wait\b|but\b|actually\b|so\b|hmm|oh\b|sorry|it\b|that|this|we\b|i\b|check\b)|\s*\Z|\s*[\"”])"
  r"|(?<=\$)\.(?=\s)|\.\s*(?=I hope)|。|(?<![0-9A-Za-z)}\]])[!?](?=\s|\Z)|(?<=[a-z])!(?=\s|\Z)|[!?](?=\s+[A-Z])"
)
_DISPLAY = re.compile(
  r"\$\$((?>(?:[^$\\]|\\.)+))\$\$|\\\[((?>(?:[^\\]|\\(?!\]))+))\\\]|"
  r"\\begin\{(?:equation|align|gather|displaymath)\*?\}((?>(?:[^\\]|\\(?!end\{))+))\\end\{[a-z]+\*?\}"
)
FORMULA = re.compile(
  r"\$\$((?>(?:[^$\\]|\\.)+))\$\$|\$(\s[^$]+\s|[^$\s](?:[^$]*[^$\s])?)\$(?![0-9])|\\\((.+?)\\\)|\\\[(.+?)\\\]",
  re.DOTALL,
)
_TAG = re.compile(r"<(?:final_?)?answer>(.*?)(?:</(?:final_?)?answer>|\Z)", re.DOTALL | re.IGNORECASE)
_TAG_MARK = re.compile(r"</?(?:final_?)?answer>", re.IGNORECASE)
_ENDS_EMPTY = re.compile(r"(?:#{4,}|\\(?:boxed|fbox)\s*(?:\{\s*\})?)[\s$*.]*\Z")
_HOLDS_VALUE = re.compile(r"[0-9$\\]")


class _Found(NamedTuple):
  """A statement and where it stands."""

  start: int
  end: int
  statement: Statement


def boxes(text: str) -> tuple[list[tuple[int, int, str]], bool]:
  r"""(start, end, content) of every \boxed or \fbox from left to right, and whether the last one does not close."""
  found, place = [], 0
  while match := _BOX.search(text, place):
    place = match.end()
    if place < len(text) and text[place] == "{":
      end = closing(text, place)
      if end < 0:
        return found, True
      found.append((match.start(), end + 1, text[place + 1 : end]))
      place = end + 1
    elif match.group().startswith("\\") and (bare := _BARE_BOX.match(text, place)):
      if re.search(r"[0-9\\]", bare.group()) or len(bare.group()) == 1:
        found.append((match.start(), bare.end(), bare.group()))
        place = bare.end()
  return found, False


def _is_quoted(text: str, start: int, end: int) -> bool:
  before, after = text[:start].rstrip("$ ")[-1:], text[end:].lstrip("$ .,")[:1]
  return _QUOTES.get(before) == after != ""


def _box_groups(text: str, found: list[tuple[int, int, str]]) -> Iterator[_Found]:
  """Boxes that little but commas, "and" or line breaks separates, as one statement each."""
  groups = []
  for start, end, content in found:
    if _PLACEHOLDER.fullmatch(content[:200]) or _is_quoted(text, start, end):
      continue
    gap = text[groups[-1][-1][1] : start] if groups else "."
    if groups and len(gap) <= 60 and _GAP.fullmatch(gap):
      groups[-1].append((start, end, content))
    elif groups and len(gap) <= 60 and re.search(r",|;|\band\b|\bor\b", gap) and not _ENDS_OR_TURNS.search(gap):
      groups[-1].append((start, end, content))
    else:
      groups.append([(start, end, content)])
  for group in groups:
    parts = tuple(dict.fromkeys(content for _, _, content in group))
    yield _Found(group[0][0], group[-1][1], Statement(", ".join(parts), "box", parts=parts))


_ENDS_OR_TURNS = re.compile(
  r"[.!?](?:\s|\Z)|\n|\b(?:wait|no|not|actually|instead|sorry|but|rather|should|so|hence|thus|therefore|then|which|giving|"
  r"gives|step|finally|final|answer|in total|total)\b",
  re.IGNORECASE,
)


def gold_text(gold: str) -> str:
  r"""The gold answer of a text that may be a whole solution: what its last boxes hold together, else the text itself."""
  found, is_open = boxes(gold)
  if is_open:
    return re.split(r"\\(?:boxed|fbox)\s*\{", gold)[-1]
  groups = list(_box_groups(gold, found))
  return groups[-1].statement.text if groups else gold


def _block(text: str, start: int) -> tuple[str, int]:
  """The statement that begins at `start`: a sentence, or the display or list on the lines below. (text, end)."""
  while True:
    display = _DISPLAY.match(text, start + len(text[start:]) - len(text[start:].lstrip()))
    if display:
      return next(filter(None, display.groups()), "").strip(), display.end()
    line_end = text.find("\n", start)
    line_end = len(text) if line_end < 0 else line_end
    line = text[start : min(line_end, start + MAX_SENTENCE)]
    if line.strip(" \t\r.:：*") or line_end == len(text):
      break
    start = line_end + 1
  items = _ITEMS.match(text, start) if text[start - 1 : start] == "\n" else None
  if items:
    lines = [_ITEM_MARK.sub("", item).strip() for item in items.group().splitlines() if item.strip()]
    return ", ".join(lines), items.end()
  if text[start - 1 : start] == "\n" and (mark := _ITEM_MARK.match(line)):
    start, line = start + mark.end(), line[mark.end() :]
  end = _SENTENCE_END.search(line)
  return (line[: end.start()] if end else line).strip(), start + (end.start() if end else len(line))


def _markers(text: str) -> Iterator[_Found]:
  found = list(_MARKER.finditer(text))[-_MAX_STATEMENTS:]
  for index, marker in enumerate(found):
    line_end = text.find("\n", marker.end())
    end = min(e for e in (line_end if line_end >= 0 else len(text), *(m.start() for m in found[index + 1 : index + 2])))
    content = text[marker.end() : end].strip(" \t\r*")
    if not content or _HEADING.fullmatch(content):
      content, end = _block(text, end) if index + 1 == len(found) else ("", end)
      if not content or _MARKER.match(content):
        continue
    elif _OTHER_HEADING.match(content):
      continue
    yield _Found(marker.start(), end, Statement(content, "marker"))


def _lines(text: str) -> Iterator[_Found]:
  """ "The answer is ..." and what stands below an "Answer" heading."""
  if not re.search("answer|solution|ans|option|choice|答案|结果|result", text, re.IGNORECASE | re.MULTILINE):
    return
  reached = -1
  for match in list(_LINE.finditer(text))[-_MAX_STATEMENTS:]:
    before = text[max(0, match.start() - 60) : match.start()]
    if match.start() < reached or _PARTIAL.search(before):
      continue
    if match.group().rstrip()[-1:] in ":：=" and " is" not in match.group() and not _LEADS.search("\n" + before.rpartition("\n")[2]):
      continue  # a colon in the middle of a sentence about an answer
    content, end = _block(text, match.end())
    if _WORKING.match(match.group()) and (_HOLDS_VALUE.search(text[end:]) or not _HOLDS_VALUE.search(content)):
      continue
    reached = end
    if content:
      yield _Found(match.start(), end, Statement(content, "line"))
  place = 0
  for line in text.splitlines(keepends=True):
    place += len(line)
    if len(line) < 60 and _HEADING.fullmatch(line.rstrip("\r\n")) and line.strip() and place > reached:
      content, end = _block(text, place)
      if content and not _LINE.search(content) and ":" not in line:
        yield _Found(place, end, Statement(content, "line"))


_SHORT_ANSWER = re.compile(r"^A: *(?!.*^B:)", re.MULTILINE | re.DOTALL)


def _short_answer(text: str) -> list[_Found]:
  """What stands behind the last "A:", as in "Q: ... A: ..."; none where a "B:" makes it a choice."""
  *_, last = [None, *_SHORT_ANSWER.finditer(text)]
  if last is None:
    return []
  content, end = _block(text, last.end())
  return [_Found(last.start(), end, Statement(content, "line"))] if content else []


def _tags(text: str) -> Iterator[_Found]:
  for tag in _TAG.finditer(text):
    content = tag.group(1).strip()
    if content and not _PLACEHOLDER.fullmatch(content[:200]):
      yield _Found(tag.start(), tag.end(), Statement(content, "tag"))


def _explicit(text: str) -> tuple[list[_Found], bool]:
  """All explicit statements in the order of the text, and whether the last box does not close."""
  found, is_open = boxes(text) if "oxed" in text or "box" in text else ([], False)
  boxed = list(_box_groups(text, found))
  stated = list(boxed)
  inner = [*boxed, *_markers(text)] if "####" in text else boxed
  others = [*_lines(text), *(_tags(text) if "nswer>" in text.lower() else ())]
  # A line or tag around a box, a marker or another line states nothing more than that.
  for other in others:
    inside = (one for one in [*inner, *others] if one is not other and one.statement.source != "tag")
    if other.statement.source == "line":
      inside = inner
    if not any(other.start < one.end and one.start < other.end for one in inside):
      stated.append(other)
  return sorted([*inner, *stated[len(boxed) :]], key=lambda found: found.start), is_open


def _implicit(text: str) -> Statement | None:
  """The display that ends a text, else its last line with a formula or number, else its only line."""
  text = text.strip()
  displays = list(_DISPLAY.finditer(text))
  if displays and not _HOLDS_VALUE.search(text[displays[-1].end() :]):
    return Statement(next(filter(None, displays[-1].groups()), ""), "display")
  lines = text.splitlines()[-_MAX_LINES:]
  for line in reversed(lines):
    if _HOLDS_VALUE.search(line) or len(text) == len(line):
      if len(lines) > 1:
        line = _ITEM_MARK.sub("", line)
      return Statement(line.strip()[-MAX_SENTENCE:], "last")
  return None


# 4. Denials and retractions

_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mbox|textit)\s*\{([^{}]*)\}")
_SMALL = r"(?:(?:to|be|equal|equals|exactly|really|actually|necessarily|possibly|simply|just|even|the|answer|is|value|of)\b\s*)*"
_LEADS_IN = r"[\s$:=({]*(?:\\[(\[]\s*)?(?:[A-Za-z]\s*=\s*)?"
_DENIED_BEFORE = re.compile(
  rf"(?:不是|不等于|并非|不可能是?|不为)[\s$]*\Z|(?:(?:\bnot|n['’]t|\bnever|\bcannot|\bhardly|\bunlikely|\banything\s+but|\bfar\s+from|\bother\s+than|\brather\s+than|"
  rf"\binstead\s+of|\bnowhere\s+near|\bno\s+longer|\bneither|\bexcept)(?:\s+{_SMALL}|\s*)|(?:≠|!=|=/=|/=|<>|\\neq?)\s*)"
  rf"{_LEADS_IN}\Z"
  r"|\b(?:contradict\w*|rul(?:es?|ed|ing)\s+out|exclud(?:es|ing)|rejects|refutes|disproves)\b[^.,;\n]{0,60}\Z"
  r"|\b(?:nobody|no\s*one|unclear|unknown|unsure|(?<!no )doubt\w*|false|wrong|impossible|unlikely|untrue|incorrect|"
  r"(?:can(?:no|['’])t|do(?:es)?(?:n['’]t|\s+not)|not)\s+(?:\w+\s+){0,2}?(?:sure|certain|clear|known|true|the\s+case|correct|"
  r"right|know|say|tell|think|believe|follow|mean))\b(?:\s+\w+){0,4}?\s+(?:that|whether|if|how)\b[^.;\n]{0,60}\Z"
  r"|\b(?:do(?:es)?(?:n['’]t|\s+not)\s+(?:think|believe)|(?<!no )doubt)\b[^.;\n]{0,60}\Z",
  re.IGNORECASE,
)
_REFUTED = re.compile(
  r"\b(?:is|are|was|were|be|seems|looks|as|being)\s+(?:\w+ly\s+|just\s+|also\s+|thus\s+)?(?:wrong|incorrect|false|impossible|invalid|excluded|"
  r"ruled\s+out|untrue|mistaken|absurd|a\s+mistake|an\s+error|unlikely|rejected|inadmissible|extraneous|refuted|"
  r"out\s+of\s+the\s+question|too\s+(?:big|large|small|high|low|much|many))\b"
  r"|\b(?:is|are|was)(?:n['’]t|\s+not)\s+(?:\w+ly\s+)?(?:right|correct|the|a\s+solution|possible|valid|true|it\b|what|allowed|"
  r"our|my|equal|an?\s+answer)"
  r"|\bcan(?:no|['’])t\s+(?:\w+\s+)?be\s+(?:right|correct|true|the|it\b|so\b|possible)"
  r"|\b(?:does(?:n['’]t|\s+not)|do(?:n['’]t|\s+not)|did(?:n['’]t|\s+not))\s+(?:work|hold|satisfy|fit|make\s+sense|count|solve)"
  r"|\bfails\b|\bcontradicts\b|\bleads\s+to\s+a\s+contradiction",
  re.IGNORECASE,
)
_HEDGED = re.compile(
  r"\b(?:might|may|could)\s+(?:\w+\s+)?(?:be|equal)\b|\b(?:maybe|perhaps|possibly|probably|presumably|likely)\b|"
  r"\bI(?:\s+(?:would|will|can\s+only|am\s+just|just))?\s+guess\b|\bI['’]m\s+guessing|\bmy\s+guess\b|\bnot\s+(?:sure|certain)\b|"
  r"\bunsure\b|\bjust\s+a\s+guess\b|可能|也许|大概|或许",
  re.IGNORECASE,
)
_UNKNOWN = re.compile(
  r"\bI\s+(?:really\s+|simply\s+|just\s+)?(?:do(?:n['’]t|\s+not)|can(?:no|['’])t|could(?:n['’]t|\s+not)|am\s+(?:not|un)\s*able)\b[^.\n]{0,30}"
  r"(?:know|solve|answer|determine|tell|find|say|help|figure)|\bno\s+idea\b|\bI(?:['’]m|\s+am|\s+was)\s+(?:sorry|not\s+sure|unable)"
  r"|\bdon['’]t\s+know\b",
  re.IGNORECASE,
)
_CLAUSE = re.compile(r"[.;?\n。，,]|!(?!=)|\b(?:so|hence|thus|therefore|then|because|since|but|and)\b", re.IGNORECASE)
_SOFT_TURN = re.compile(
  r"(?:(?:oh|ah|um|well|but|and)[, ]+)*(?:no\b(?!\s+(?:other|more|further|need|matter|one|doubt))|nope|wait|hmm+|actually|hold\s+on|"
  r"sorry|apologies|let\s+me\s+(?:re|correct|double|check|fix|try)|on\s+second\s+thoughts?|edit\b|rather\b|hang\s+on|my\s+bad)",
  re.IGNORECASE,
)
_HARD_TURN = re.compile(
  r"(?:(?:oh|ah|um|well|but|and|no|wait|hmm+|actually|sorry)[,. ]+)*(?:correction|scratch\s+that|oops|never\s*mind|disregard|"
  r"i\s+(?:made|have\s+made)\s+an?\s+\w*\s*(?:mistake|error)|i\s+was\s+wrong|i\s+(?:misread|miscounted|miscalculated|forgot)|"
  r"(?:that|this|it|which)(?:['’]s|\s+is|\s+was|\s+can(?:no|['’])t\s+be|\s+isn['’]t|\s+seems)\s+(?:\w+ly\s+)?(?:not\s+)?"
  r"(?:wrong|incorrect|a\s+mistake|an\s+error|not\s+right|not\s+correct|false|too\s+(?:big|small|large)|right\b|correct\b|"
  r"impossible(?!\s+(?:to|that|for)))"
  r"|(?:that|this)\s+(?:doesn['’]t\s+(?:work|seem|make)|contradicts))",
  re.IGNORECASE,
)
_AFFIRMED = re.compile(
  r"(?:that|this|it|which)(?:['’]s|\s+is|\s+was|\s+seems)\s+(?:\w+ly\s+)?(?:right|correct)\b", re.IGNORECASE
)
_CONFIRMED = re.compile(
  r"\b(?:yes|yep|indeed|confirm\w*|checks?\s+out|matches|consistent|as\s+expected|verified|still|correct|right|works|holds|"
  r"same|agrees?|good)\b|✓|✔",
  re.IGNORECASE,
)


def words_of(text: str) -> str:
  """Text commands replaced by their words."""
  return _TEXT_COMMAND.sub(r" \1 ", text) if "\\" in text else text


def is_denied(text: str, start: int, end: int) -> bool:
  """Whether a text denies or refutes what stands at [start, end) of it: "isn't 7", "7 is wrong", "contradicts x = 7"."""
  before = text[max(0, start - 120) : start]
  boundaries = list(_CLAUSE.finditer(before))
  clause = words_of(before[boundaries[-1].end() :] if boundaries else before)
  if _DENIED_BEFORE.search(clause):
    return True
  after = _SENTENCE_END.split(text[end : end + 120].partition("\n")[0])[0]
  after = re.split(r"[,;]|\b(?:so|but|and|because|since|then)\b", words_of(after))[0]
  return (
    _REFUTED.match(after.lstrip(" $)}]\\.\"'")) is not None
    or _REFUTED.match("is " + after.lstrip()) is not None
    and after.lstrip().startswith(("(wrong", "wrong"))
  )


def clause_from(text: str, start: int) -> str:
  """The text from the beginning of the clause that holds `start`."""
  boundaries = [boundary.end() for boundary in _CLAUSE.finditer(text, 0, start)]
  return text[boundaries[-1] if boundaries else 0 :]


def denies(text: str) -> bool:
  """Whether the text of a statement takes its own value back: "7 is wrong", "not 7"; a contrast ("7, not 8") does not."""
  words = words_of(text)
  if re.match(
    r"\s*(?:(?:definitely|certainly)\s+)?(?:不是|不等于|not\b|never\b|anything\s+but|≠|!=|unlikely|no\s+longer|neither)",
    words,
    re.IGNORECASE,
  ):
    return True
  words = re.split(r"\b(?:because|since|as)\b", words)[0]
  return bool(_REFUTED.search(words)) and bool(re.search("[0-9]", words))


def _sentences(text: str) -> Iterator[tuple[int, str]]:
  start = 0
  for end in re.finditer(rf"(?:{_SENTENCE_END.pattern})|\n", text):
    yield start, text[start : end.end()]
    start = end.end()
  yield start, text[start:]


def _turn(text: str) -> tuple[bool, str] | None:
  """(hard, the rest from there) of the first sentence of a text that takes back what stands before it."""
  place = re.compile(r"[\s\-–—(*:;,.]*")
  for start, sentence in _sentences(text):
    sentence = sentence[place.match(sentence).end() :]
    if (
      _HARD_TURN.match(sentence)
      and not _AFFIRMED.match(re.sub(r"^\W*(?:\w+[,.]\s*)?", "", sentence))
      and not _AFFIRMED.match(sentence)
    ):
      return True, text[start:]
    if _SOFT_TURN.match(sentence):
      return False, text[start:]
  return None


def _retracted(text: str, found: list[_Found]) -> tuple[list[Statement], str]:
  """The statements with what follows them: which of them retract, and one more where a last retraction gives a value."""
  stated = []
  for index, one in enumerate(found):
    turn = _turn(text[found[index - 1].end : one.start]) if index else None
    stated.append(one.statement._replace(retracts=bool(turn)))
  turn = _turn(text[found[-1].end : found[-1].end + 2 * MAX_SENTENCE])
  if turn is None:
    return stated, ""
  hard, rest = turn
  if _CONFIRMED.search(rest) and not hard:
    return stated, ""
  value = _implicit(rest)
  if value is not None and _HOLDS_VALUE.search(value.text):
    return [*stated, value._replace(source="retraction", retracts=True)], ""
  return (stated, "no_answer") if hard else (stated, "")


def read_response(response: str, *, marked_only: bool = False) -> Reading:
  """What a response states.

  Args:
    response: any text.
    marked_only: leaves the last display and the last line out.
  """
  text = answer_text(response)
  if text is None:
    return Reading((), "no_answer")
  text = without_markdown(text.replace("\r\n", "\n").replace("\x0c", r"\f"))
  found, is_open = _explicit(text)
  found = found or _short_answer(text)
  if is_open:
    return Reading((), "unparsable")
  if "nswer>" in text:
    text = _TAG_MARK.sub(lambda mark: " " * len(mark.group()), text)
  hedged = False
  asserted = []
  for one in found:
    if _denied_statement(text, one):
      continue
    if _hedged_statement(text, one):
      hedged = True
      continue
    asserted.append(one)
  if asserted:
    statements, failure = _retracted(text, asserted)
    return Reading(() if failure else tuple(statements), failure)
  if found:
    return Reading((), "ambiguous" if hedged else "no_answer")
  if marked_only or _ENDS_EMPTY.search(text):
    return Reading((), "no_answer")
  stated = _implicit(text)
  if stated is None or _UNKNOWN.search(stated.text):
    return Reading((), "no_answer")
  return Reading((stated,))


def _denied_statement(text: str, found: _Found) -> bool:
  statement = found.statement
  if statement.source == "line":
    if text[found.end : found.end + 1] in ("?", "？"):
      return True
    return denies(statement.text) or is_denied(text, found.start, found.end) or _denied_line(text, found)
  return denies(statement.text) or is_denied(text, found.start, found.end)


def _denied_line(text: str, found: _Found) -> bool:
  """Whether the verb of an answer line denies it: "the answer must not be 7"."""
  head = text[found.start : found.end]
  head = head[: max(0, len(head) - len(found.statement.text))]
  return re.search(r"\bnot\b|n['’]t\b|\bnever\b|\bcannot\b|≠|!=|\bunlikely\b", head, re.IGNORECASE) is not None


def _hedged_statement(text: str, found: _Found) -> bool:
  before = text[max(0, found.start - 80) : found.start]
  boundary = max(before.rfind(sign) for sign in ("\n", ". ", "! ", "? "))
  head = before[boundary + 1 :] if found.statement.source in ("line", "box") else ""
  if found.statement.source == "line":
    head += text[found.start : found.end]
  tail = _SENTENCE_END.split(text[found.end : found.end + 80].partition("\n")[0])[0]
  return is_hedged(head) or is_hedged(tail)


def is_hedged(text: str) -> bool:
  """Whether a sentence leaves its value open: "might be 7", "probably 7"."""
  return _HEDGED.search(words_of(text)) is not None
