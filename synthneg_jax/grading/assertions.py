r"""Whether a sentence asserts a value: denials, refutations, hedges and retractions.

"The answer isn't 7", "7 is wrong" and "this contradicts x = 7" mention a value without asserting
it; "x is not negative, so x = 7" and "7, not 8" assert 7. Patterns are limited to the value's
clause and adjacent words, so that "the largest number that cannot be obtained is 43" asserts 43.
"""

import re
from collections.abc import Iterator

_REACH = 120  # characters searched before and after a value


def _any_of(phrases: str) -> str:
  """A pattern for phrases separated by bars; a space matches any white space, n't also n’t."""
  pattern = re.sub(r"\s*\|\s*", "|", phrases.strip())
  return "(?:" + re.sub(r"\s+", r"\\s+", pattern).replace("'", "['’]") + ")"


def _compiled(*patterns: str) -> re.Pattern:
  return re.compile("|".join(patterns), re.IGNORECASE)


_NOT = r"(?:n['’]t|\s+not)"
_CANNOT = r"can(?:no|['’])t"
_CLAUSE = _compiled(
  r"[.;?\n。，,]|!(?!=)",
  r"\b" + _any_of("so|hence|thus|therefore|then|because|since|but|and") + r"\b",
)
SENTENCE_END = re.compile(
  r"""
  \.(?= \s+(?: [A-Z(\\"“#*] | (?:no|wait|but|actually|so|oh|it|we|i|check)\b | hmm | sorry | that
      | this ) | \s*\Z | \s*["”] )
  | (?<=\$)\.(?=\s) | (?<=\.\$\$)(?=\s+[A-Z]) | (?<=\.\\\])(?=\s+[A-Z]) | \.\s*(?=I\ hope) | 。
  | (?<![\\0-9A-Za-z)}\]])[!?](?=\s|\Z) | (?<=[a-z])!(?=\s|\Z) | (?<!\\)[!?](?=\s+[A-Z])
  """,
  re.VERBOSE,
)

# Before the value

_SMALL_WORDS = _any_of(  # may stand between a denial and the value
  "have|has|need|get|cost|contain|make|take|want|write|to|be|equal|equals|exactly|really|actually"
  "|necessarily|possibly|simply|just|even|the|answer|is|value|of"
)
_LEADS_IN = rf"(?:{_SMALL_WORDS}\b\s*)*[\s$:=({{]*(?:\\[(\[]\s*)?(?:[A-Za-z]\s*=\s*)?\Z"
_DENIED_BEFORE = _compiled(
  r"(?:不是|不等于|并非|不可能是?|不为)[\s$]*\Z",
  r"(?:≠|!=|=/=|/=|<>|\\neq?)\s*" + _LEADS_IN,
  r"(?:\bnot|n['’]t|\b"
  + _any_of(
    r"never|cannot|hardly|unlikely|anything but|far from|(?<!none\s)other than|different from"
    "|rather than|instead of|nowhere near|no longer|neither|except"
  )
  + r")\s*"
  + _LEADS_IN,
  r"\b"
  + _any_of(r"contradict\w*|rul(?:es?|ed|ing) out|exclud(?:es|ing)|rejects|refutes|disproves")
  + r"\b[^.,;\n]{0,60}\Z",
  # "nobody knows whether it is 7", "it is not true that x = 7"
  r"\b(?:"
  + _any_of(
    r"nobody|no\s*one|unclear|unknown|unsure|(?<!no\s)doubt\w*|false|wrong|impossible|unlikely|untrue"
    r"|incorrect"
  )
  + rf"|(?:{_CANNOT}|do(?:es)?{_NOT}|not)\s+(?:\w+\s+){{0,2}}?"
  + _any_of(
    "sure|certain|clear|known|true|the case|correct|right|know|say|tell|think|believe|follow|mean"
  )
  + r")\b(?:\s+\w+){0,4}?\s+(?:that|whether|if|how)\b[^.;\n]{0,60}\Z",
  rf"\b(?:do(?:es)?{_NOT}\s+(?:think|believe)|(?<!no\s)doubt|whether|suppose|assume|assuming"
  r"|imagine)\b[^.;\n]{0,60}\Z",
  # "some people think the answer is", "a common misconception that", "a wrong answer is"
  r"\b(?!(?:I|we)\s)(?!so\s)\w+\s+(?:(?:might|may|would|could|often|initially)\s+)?"
  r"(?:thinks?|believes?|claims?|says?|argues?|guess(?:es)?|assumes?)\b[^.;\n]{0,60}\Z",
  r"\b(?:misconception|mistake|no\s+way|not\s+conclude|cannot\s+conclude|cannot\s+say)\b"
  r"[^.;\n]{0,60}\Z",
  r"(?<!of\s)\b(?:wrong|incorrect)(?:\s+(?:answer|result|value|solution))?"
  r"(?:\s+(?:is|would\s+be))?[\s:]*\Z",
  "(?:无法确定|不能说|不能确定)[^。，,]{0,30}\\Z",
)
_BEGINS_DENIED = re.compile(
  r"\s*(?:(?:definitely|certainly)\s+)?(?:不是|不等于|≠|!=|(?:not|never|unlikely)\b"
  r"|anything\s+but|no\s+longer|neither\b(?=.*[0-9$\\]))",
  re.IGNORECASE,
)
_DENYING_VERB = _compiled(r"\b(?:not|never|cannot|unlikely)\b", r"n['’]t\b", "≠", "!=")

# After the value

_REFUTED = _compiled(
  r"(?:\b(?:is|are|was|were|be|seems|looks|as|being)|['’]s)\s+(?:(?:\w+ly|just|also|thus|a)\s+)?"
  + _any_of(
    "wrong|incorrect|false|impossible|invalid|excluded|ruled out|untrue|mistaken|absurd|a mistake"
    "|an error|unlikely|rejected|inadmissible|extraneous|refuted|out of the question"
    "|too (?:big|large|small|high|low|much|many)"
  )
  + r"\b",
  rf"\b(?:is|are|was){_NOT}\s+(?:\w+ly\s+)?"
  + _any_of(
    r"right|correct|the|a solution|possible|valid|true|it\b|what|allowed|our|my|equal|an?\s+answer"
  ),
  rf"\b{_CANNOT}\s+(?:\w+\s+)?be\s+(?:right|correct|true|the|it\b|so\b|possible)",
  rf"\b(?:does|do|did){_NOT}\s+" + _any_of("work|hold|satisfy|fit|make sense|count|solve"),
  r"\b(?:fails|contradicts|leads\s+to\s+a\s+contradiction)\b",
  r"\bwould\s+be\s+(?:wrong|incorrect)\b",
  r"\((?:wrong|incorrect|not\s+(?:right|correct))\b",
  r"(?:这)?(?:是|并)?(?:错误|错的|不正确|不对)|不是答案",
)

# The whole sentence

_HEDGED = _compiled(
  r"\b(?:might|may|could)\s+(?:\w+\s+)?(?:be|equal)\b(?=\s*(?:(?:equal\s+to|about|around|just|only)\s+)?"
  r"(?:[-$\\({0-9:]|[A-Za-z]\b)|\s*\Z)",
  r"\b(?:maybe|perhaps|possibly|probably|presumably|likely|unsure)\b(?!\s+\w+ly,)",
  r"\b"
  + _any_of(
    "I(?: (?:would|will|can only|am just|just))? guess|I'm guessing|my (?:best )?guess|had to guess"
    "|not (?:sure|certain)|just a guess|I suppose|I don't know"
  )
  + r"\b",
  "可能|也许|大概|或许|我猜",
)
_UNKNOWN = _compiled(
  rf"\bI\s+(?:(?:really|simply|just)\s+)?(?:do{_NOT}|{_CANNOT}|could{_NOT}|am\s+(?:not|un)\s*able)\b"
  r"[^.\n]{0,30}(?:know|solve|answer|determine|tell|find|say|help|figure)",
  r"\b" + _any_of(r"no idea|don't know|I(?:'m|\sam|\swas) (?:sorry|not sure|unable)"),
)

_DISOWNED = _compiled(
  r"\A\W*(?:an?\s+)?(?:\w+\s+)?(?:wrong|incorrect)\b(?!\s+answers\b)",
  r"\bif\b[^.]*\bwould\b",
  r"\b"
  + _any_of("not enough information|please provide|cannot be determined|something went wrong"),
)

# Retractions: words that begin a later sentence

_OPENERS = r"(?:(?:oh|ah|um|well|but|and|{})[,. ]+)*"
_TURNS = re.compile(
  _OPENERS.format("so")
  + _any_of(
    r"no\b(?! (?:other|more|further|need|matter|one|doubt))|nope|wait|hmm+|actually|hold on"
    r"|hang on|sorry|apologies|upon re|strike that|等等|不对"
    r"|let me (?:re|correct|double|check|fix|try)|on second thoughts?|edit\b|rather\b"
    r"|my (?:bad|mistake)|update:|make that|i mean\b|(?:it|this|that) should be(?= [-$(]*[0-9])"
    r"|the correct (?:value|result) is|(?:on reflection|looking back)(?! at)"
    r"|i apologi[sz]e(?! for the l)"
    r"|i (?:realize|realise|see) (?:now )?(?:that )?(?:i|the above|my) (?:was|is|made|had)"
  ),
  re.IGNORECASE,
)
_THAT = r"(?:that|this|it|which)(?:['’]s|\s+is|\s+was|\s+seems)\s+(?:\w+ly\s+)?"
_TURNS_FIRMLY = re.compile(
  _OPENERS.format("no|wait|hmm+|actually|sorry|looking back|on reflection")
  + "(?:"
  + _any_of(
    r"correction|scratch that|oops|never\s*mind|disregard|i (?:made|have made) an? "
    r"\w*\s*(?:mistake|error)"
    r"|i was wrong|i (?:misread|miscounted|miscalculated|forgot)"
    r"|(?:that|this) (?:does(?:n't|\snot) (?:work|seem|make)|contradicts)|something went wrong"
    r"|there must be an? (?:error|mistake)"
    r"|(?:i (?:realize|realise|see) (?:now )?(?:that )?)?(?:this|the|that|my)"
    r" (?:(?:above|previous|earlier|first) )?(?:(?:answer|result|value|solution) )?(?:above )?"
    r"(?:is|was) (?:wrong|incorrect|not (?:right|correct))|(?:wrong|incorrect|no)[.!]*\s*\Z"
    r"|i take (?:that|it) back"
    r"|(?:wrong|incorrect)!"
    r"|i'm not sure|this leads to a contradiction|contradiction"
    r"|(?:that|this|it|which) (?:can't be|cannot be|isn't) (?:\w+ly )?(?:right|correct)"
  )
  + "|"
  + _THAT
  + _any_of(
    "wrong|incorrect|a mistake|an error|not (?:right|correct|possible)|false"
    "|too (?:big|small|large)|impossible(?! (?:to|that|for))"
  )
  + ")",
  re.IGNORECASE,
)
_CONFIRMS = _compiled(
  r"\b"
  + _any_of(
    r"yes|yep|indeed|confirm\w*|checks? out|matches|consistent|as expected|verified|holds|agrees?"
    r"|(?:is|was|are|that's|it's|still) (?:\w+ly )?(?:correct|right|the same|good)"
  )
  + r"\b",
  "✓|✔",
)
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mbox|textit)\s*\{([^{}]*)\}")
_SENTENCE_START = re.compile(r"[\s\-–—(*:;,.]*")


def _words(text: str) -> str:
  r"""Replaces \text{...} commands by their words."""
  return _TEXT_COMMAND.sub(r" \1 ", text)


def clause_start(text: str, end: int) -> int:
  """The start of the clause that contains position `end`."""
  begin = max(0, end - _REACH)
  return max((boundary.end() for boundary in _CLAUSE.finditer(text, begin, end)), default=begin)


def is_denied(text: str, start: int, end: int) -> bool:
  """Whether a text denies the value at [start, end): "isn't 7", "7 is wrong"."""
  begin = len(text[:start].rstrip(" \t$"))
  if re.search(r"[:：]\s*\Z", text[max(0, begin - 10) : begin]):  # "The following is wrong:"
    begin = len(text[:begin].rstrip(" \n\t:：$"))
  begin -= 2 * text[:begin].endswith(("\\[", "\\("))
  if _DENIED_BEFORE.search(_words(text[clause_start(text, begin) : start])):
    return True
  after = _words(text[end : end + _REACH]).lstrip(" $)}]\\\"'\n")
  after = SENTENCE_END.split(after.partition("\n")[0])[0]
  boundary = _CLAUSE.search(after)
  return _REFUTED.match(after[: boundary.start() if boundary else None]) is not None


def denies_itself(text: str) -> bool:
  """Whether a statement denies its own value: "not 7", "7 is wrong"."""
  words = _words(text)
  if _BEGINS_DENIED.match(words):
    return True
  words = re.split(r"\b(?:because|since|as)\b", words)[0]
  return bool(_REFUTED.search(words) and re.search("[0-9]", words))


def has_denying_verb(text: str) -> bool:
  """Whether the words before a value deny it: "the answer must not be"."""
  return _DENYING_VERB.search(text) is not None


def is_hedged(text: str) -> bool:
  """Whether a sentence hedges its value: "might be 7", "probably 7"."""
  return _HEDGED.search(re.split(r"\bbut\b", _words(text))[-1]) is not None


def disowns(text: str) -> bool:
  """Whether a last line mentions a value without stating it: "Wrong answer: 7"."""
  return _DISOWNED.search(text) is not None


def admits_ignorance(text: str) -> bool:
  """Whether the author does not know the answer: "I don't know"."""
  return _UNKNOWN.search(text) is not None


def confirms(text: str) -> bool:
  """Whether a text that questions a statement then confirms it: "Wait, 3 + 4 = 7. Yes."."""
  return _CONFIRMS.search(text) is not None


def _sentence_starts(text: str) -> Iterator[int]:
  """The start positions of sentences and lines."""
  yield 0
  for end in SENTENCE_END.finditer(text):
    yield end.end()
  for line in re.finditer("\n", text):
    yield line.end()


def turn(text: str) -> tuple[int, bool] | None:
  """The first sentence opening that retracts the statement before the text.

  Returns:
    (end of the opening, whether it is firm), or None. A firm opening retracts unconditionally
    ("That is wrong"), others only if another value follows ("Wait, ...").
  """
  for start in sorted(_sentence_starts(text)):
    begin = _SENTENCE_START.match(text, start).end()
    for openings, firm in ((_TURNS_FIRMLY, True), (_TURNS, False)):
      if match := openings.match(text, begin):
        return match.end(), firm
  return None
