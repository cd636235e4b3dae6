r"""Where a response of kind "math" states its answer: the rules, in the order in which they apply.

1. What stands before a closing </think>, or after a special token (<|...), is no answer.
2. \boxed{...} or \fbox{...}: all of them; the last one is the answer.
3. The rest of the line after `####`: all of them; the last one is the answer.
4. What follows "the final answer is", "the answer is", "Answer:" or, at the start of a line, "A:", up to the end of the
   sentence or line; the last one.
5. Without any of these: the last line that holds a formula or a number, whole if it can be read, else its last formula
   or number. `marked_only` leaves this rule out.

Earlier statements under the same rule are returned too: an answer that is contradicted is ambiguous.
"""

import re
from typing import NamedTuple

from synthneg_jax.grading.answer_tokens import closing

MAX_SENTENCE = 1600  # characters of a sentence that an answer is looked for in
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_MARKER = re.compile(r"#{4,}")
_PHRASE = re.compile(
  r"(?:^A(?=:)|\b(?:answer|solution))\s*+(?>(?:\*\*\s*+)?)(?>(?:(?:to|for) (?:this|the) \w{1,12} )?)"
  r"(?:is\s*+(?>(?:(?:therefore|thus|simply|then|equal to|given by)\s++)?):?+|:|=)\s*+(?>(?:\*\*\s*+)?)",
  re.IGNORECASE | re.MULTILINE,
)
_SENTENCE = re.compile(r"\.(?=\s+[A-Z]|\s*$)|(?<=\$)\.(?=\s)|\.\s*(?=I hope)")
FORMULA = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_DISPLAY = re.compile(r"(?:\$\$([^$]++)\$\$|\\\[((?>(?:[^\\]|\\(?!\]))+))\\\])[.\s]*+\Z")
_STATEMENTS = 100  # the last ones that are looked at
_LINES = 50  # lines from the end in which an unmarked answer is looked for


class Statement(NamedTuple):
  """text: the answer as written; earlier: what earlier statements said; parts: they are boxes joined by "and", "or" or
  commas, which may be parts of one answer; open: the last box does not close; whole:
  where in a text that is a sentence the answer stands, "first" or "last"; "" where the text is the answer."""

  text: str
  earlier: list[str]
  parts: bool = False
  open: bool = False
  whole: str = ""


def boxed(text: str) -> tuple[list[str], bool]:
  """Contents of all boxes from left to right, and whether the last one does not close."""
  found, place = [], 0
  while match := _BOX.search(text, place):
    place = match.end()
    if place < len(text) and text[place] == "{":
      end = closing(text, place)
      if end < 0:
        return found, True
      found.append(text[place + 1 : end])
      place = end + 1
    else:
      word = re.match(r"\\[a-zA-Z]+(?:\{[^{}]*\}){0,2}|[^\s$.,;]+", text[place:])
      found.append(word.group() if word else "")
  return found, False


def joined(response: str) -> bool:
  """Whether little but "and", "or" or a comma stands between the boxes of a response."""
  between = [part.rpartition("}")[2] if len(part) > 500 else part for part in _BOX.split(response)[1:-1]]
  gaps = [part[closing(part, 0) + 1 :] if part.startswith("{") else part for part in between]
  return all(len(gap) <= 60 and re.search(r"\band\b|\bor\b|[,;&]|^[\s$]*$", gap) for gap in gaps)


def _sentence(text: str) -> str:
  line = text.partition("\n")[0].strip() or text.strip().partition("\n")[0].strip()
  end = _SENTENCE.search(line)
  return (line[: end.start()] if end else line).strip()


def statement(response: str, marked_only: bool = False) -> Statement | None:
  """The answer that a response states; None where it states none."""
  response = response.rpartition("</think>")[2].partition("<|")[0]
  boxes, is_open = boxed(response)
  if is_open:
    return Statement("", boxes, open=True)
  if boxes:
    return Statement(boxes[-1], boxes[:-1], parts=len(boxes) > 1 and joined(response))
  marked = [part.partition("\n")[0].strip() for part in _MARKER.split(response)[1:]]
  if marked:
    return Statement(marked[-1], marked[:-1])
  said = [
    _sentence(response[match.end() : match.end() + MAX_SENTENCE])
    for match in list(_PHRASE.finditer(response))[-_STATEMENTS:]
  ]
  said = [text for text in said if text]
  if said:
    return Statement(said[-1], said[:-1], whole="first")
  if marked_only:
    return None
  response = response.strip()
  display = _DISPLAY.search(response)
  if display:
    return Statement(next(filter(None, display.groups())), [], whole="last")
  for line in reversed(response.splitlines()[-_LINES:]):
    if re.search(r"[0-9$\\]", line) or len(response) == len(line):
      return Statement(line.strip()[-MAX_SENTENCE:], [], whole="last")
  return None
