r"""Whether a sentence asserts a value: denials, refutations, hedges, and words that take it back.

"The answer isn't 7", "7 is wrong" and "this contradicts x = 7" name a value and do not assert it;
"x is not negative, so x = 7" and "7, not 8" do. Clauses matter, and what stands right beside the
value, so that "the largest number that cannot be obtained is 43" asserts 43.
"""

import re
from collections.abc import Iterator

_REACH = 120  # characters before and after a value that are looked at


def _any_of(phrases: str) -> str:
  """A pattern of any of several phrases between bars; a space is any white space, n't also n’t."""
  pattern = re.sub(r"\s*\|\s*", "|", phrases.strip())
  return "(?:" + re.sub(r"\s+", r"\\s+", pattern).replace("'", "['’]") + ")"


def _compiled(*patterns: str) -> re.Pattern:
  return re.compile("|".join(patterns), re.IGNORECASE)


_NOT = r"(?:n['’]t|\s+not)"
_CANNOT = r"can(?:no|['’])t"
_CLAUSE = _compiled(
  r"[.;?\n。，,]|!(?!=)", r"\b" + _any_of("so|hence|thus|therefore|then|because|since|but|and") + r"\b"
)
SENTENCE_END = re.compile(
  r"""
  \.(?= \s+(?: [A-Z(\\"“#*] | (?:no|wait|but|actually|so|oh|it|we|i|check)\b | hmm | sorry | that
      | this ) | \s*\Z | \s*["”] )
  | (?<=\$)\.(?=\s) | \.\s*(?=I\ hope) | 。
  | (?<![0-9A-Za-z)}\]])[!?](?=\s|\Z) | (?<=[a-z])!(?=\s|\Z) | [!?](?=\s+[A-Z])
  """,
  re.VERBOSE,
)

# Before the value. Words that may stand between the denial and it:
_SMALL_WORDS = _any_of(
  "to|be|equal|equals|exactly|really|actually|necessarily|possibly|simply|just|even|the|answer|is|value|of"
)
_LEADS_IN = rf"(?:{_SMALL_WORDS}\b\s*)*[\s$:=({{]*(?:\\[(\[]\s*)?(?:[A-Za-z]\s*=\s*)?\Z"
_DENIED_BEFORE = _compiled(
  r"(?:不是|不等于|并非|不可能是?|不为)[\s$]*\Z",
  r"(?:≠|!=|=/=|/=|<>|\\neq?)\s*" + _LEADS_IN,
  r"(?:\bnot|n['’]t|\b"
  + _any_of(
    "never|cannot|hardly|unlikely|anything but|far from|other than|rather than|instead of|nowhere near"
    "|no longer|neither|except"
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
  + _any_of("sure|certain|clear|known|true|the case|correct|right|know|say|tell|think|believe|follow|mean")
  + r")\b(?:\s+\w+){0,4}?\s+(?:that|whether|if|how)\b[^.;\n]{0,60}\Z",
  rf"\b(?:do(?:es)?{_NOT}\s+(?:think|believe)|(?<!no\s)doubt)\b[^.;\n]{{0,60}}\Z",
)
_BEGINS_DENIED = re.compile(
  r"\s*(?:(?:definitely|certainly)\s+)?(?:不是|不等于|≠|!=|(?:not|never|unlikely|neither)\b"
  r"|anything\s+but|no\s+longer)",
  re.IGNORECASE,
)
_DENYING_VERB = _compiled(r"\b(?:not|never|cannot|unlikely)\b", r"n['’]t\b", "≠", "!=")

# After the value

_REFUTED = _compiled(
  r"\b(?:is|are|was|were|be|seems|looks|as|being)\s+(?:(?:\w+ly|just|also|thus)\s+)?"
  + _any_of(
    "wrong|incorrect|false|impossible|invalid|excluded|ruled out|untrue|mistaken|absurd|a mistake"
    "|an error|unlikely|rejected|inadmissible|extraneous|refuted|out of the question"
    "|too (?:big|large|small|high|low|much|many)"
  )
  + r"\b",
  rf"\b(?:is|are|was){_NOT}\s+(?:\w+ly\s+)?"
  + _any_of(r"right|correct|the|a solution|possible|valid|true|it\b|what|allowed|our|my|equal|an?\s+answer"),
  rf"\b{_CANNOT}\s+(?:\w+\s+)?be\s+(?:right|correct|true|the|it\b|so\b|possible)",
  rf"\b(?:does|do|did){_NOT}\s+" + _any_of("work|hold|satisfy|fit|make sense|count|solve"),
  r"\b(?:fails|contradicts|leads\s+to\s+a\s+contradiction)\b",
)

# The whole sentence

_HEDGED = _compiled(
  r"\b(?:might|may|could)\s+(?:\w+\s+)?(?:be|equal)\b",
  r"\b(?:maybe|perhaps|possibly|probably|presumably|likely|unsure)\b",
  r"\b"
  + _any_of("I(?: (?:would|will|can only|am just|just))? guess|I'm guessing|my guess|not (?:sure|certain)|just a guess")
  + r"\b",
  "可能|也许|大概|或许",
)
_UNKNOWN = _compiled(
  rf"\bI\s+(?:(?:really|simply|just)\s+)?(?:do{_NOT}|{_CANNOT}|could{_NOT}|am\s+(?:not|un)\s*able)\b"
  r"[^.\n]{0,30}(?:know|solve|answer|determine|tell|find|say|help|figure)",
  r"\b" + _any_of(r"no idea|don't know|I(?:'m|\sam|\swas) (?:sorry|not sure|unable)"),
)

# What takes a statement back: words that begin a later sentence

_OPENERS = r"(?:(?:oh|ah|um|well|but|and|{})[,. ]+)*"
_TURNS = re.compile(
  _OPENERS.format("so")
  + _any_of(
    r"no\b(?! (?:other|more|further|need|matter|one|doubt))|nope|wait|hmm+|actually|hold on|hang on|sorry"
    r"|apologies|let me (?:re|correct|double|check|fix|try)|on second thoughts?|edit\b|rather\b|my bad"
  ),
  re.IGNORECASE,
)
_THAT = r"(?:that|this|it|which)(?:['’]s|\s+is|\s+was|\s+seems)\s+(?:\w+ly\s+)?"
_TURNS_FIRMLY = re.compile(
  _OPENERS.format("no|wait|hmm+|actually|sorry")
  + "(?:"
  + _any_of(
    r"correction|scratch that|oops|never\s*mind|disregard|i (?:made|have made) an? \w*\s*(?:mistake|error)"
    r"|i was wrong|i (?:misread|miscounted|miscalculated|forgot)"
    r"|(?:that|this) (?:doesn't (?:work|seem|make)|contradicts)"
    r"|(?:that|this|it|which) (?:can't be|cannot be|isn't) (?:\w+ly )?(?:right|correct)"
  )
  + "|"
  + _THAT
  + _any_of(
    "wrong|incorrect|a mistake|an error|not (?:right|correct)|false|too (?:big|small|large)"
    "|impossible(?! (?:to|that|for))"
  )
  + ")",
  re.IGNORECASE,
)
_CONFIRMS = _compiled(
  r"\b"
  + _any_of(
    r"yes|yep|indeed|confirm\w*|checks? out|matches|consistent|as expected|verified|still|correct|right|works"
    r"|holds|same|agrees?|good"
  )
  + r"\b",
  "✓|✔",
)
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mbox|textit)\s*\{([^{}]*)\}")
_SENTENCE_START = re.compile(r"[\s\-–—(*:;,.]*")


def _words(text: str) -> str:
  """The text with \\text{...} commands replaced by their words."""
  return _TEXT_COMMAND.sub(r" \1 ", text)


def clause_start(text: str, end: int) -> int:
  """Where the clause begins that `end` lies in."""
  begin = max(0, end - _REACH)
  return max((boundary.end() for boundary in _CLAUSE.finditer(text, begin, end)), default=begin)


def is_denied(text: str, start: int, end: int) -> bool:
  """Whether a text denies what stands at [start, end) of it: "isn't 7", "7 is wrong"."""
  if _DENIED_BEFORE.search(_words(text[clause_start(text, start) : start])):
    return True
  after = SENTENCE_END.split(text[end : end + _REACH].partition("\n")[0])[0]
  boundary = _CLAUSE.search(_words(after))
  after = _words(after)[: boundary.start() if boundary else None].lstrip(" $)}]\\.\"'")
  return _REFUTED.match(after) is not None or after.startswith("(wrong")


def denies_itself(text: str) -> bool:
  """Whether the text of a statement denies its own value: "not 7", "7 is wrong"."""
  words = _words(text)
  if _BEGINS_DENIED.match(words):
    return True
  words = re.split(r"\b(?:because|since|as)\b", words)[0]
  return bool(_REFUTED.search(words) and re.search("[0-9]", words))


def has_denying_verb(text: str) -> bool:
  """Whether the words up to a value deny it: "the answer must not be"."""
  return _DENYING_VERB.search(text) is not None


def is_hedged(text: str) -> bool:
  """Whether a sentence leaves its value open: "might be 7", "probably 7"."""
  return _HEDGED.search(_words(text)) is not None


def admits_ignorance(text: str) -> bool:
  """Whether a sentence says that its author does not know: "I don't know"."""
  return _UNKNOWN.search(text) is not None


def confirms(text: str) -> bool:
  """Whether a text that turns on a statement ends up confirming it: "Wait, 3 + 4 = 7. Yes."."""
  return _CONFIRMS.search(text) is not None


def _sentences(text: str) -> Iterator[int]:
  """Where the sentences and lines of a text begin."""
  yield 0
  for end in SENTENCE_END.finditer(text):
    yield end.end()
  for line in re.finditer("\n", text):
    yield line.end()


def turn(text: str) -> tuple[int, bool] | None:
  """The first sentence of a text that turns on what stands before it.

  Returns:
    (start, firm), where firm sentences take it back whatever follows ("That is wrong") and others
    only if they go on to another value ("Wait, ..."); None where no sentence does.
  """
  for start in sorted(_sentences(text)):
    begin = _SENTENCE_START.match(text, start).end()
    if _TURNS_FIRMLY.match(text, begin):
      return start, True
    if _TURNS.match(text, begin):
      return start, False
  return None
