"""Candidate answers within a statement: its whole text, or a value within its sentence.

A box or `####` contains only an answer. A sentence may add asides ("7, because ..."), state its
answer after "is", ":" or "=", or contain it as its only formula or number. Words beside a number
may make it ambiguous ("at least 7", "a multiple of 7").
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from synthneg_jax.grading import assertions, statements
from synthneg_jax.grading.answer_tokens import MAX_CHARS
from synthneg_jax.grading.statements import Statement

_HOLDS_VALUE = re.compile(r"[0-9$\\]")
_TEXT = r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*"
_TEXT_AROUND = re.compile(rf"\s*{_TEXT}\{{([^{{}}]*[0-9][^{{}}]*)\}}[\s.]*")
_EMPTY_TEXT = re.compile(_TEXT + r"\{\s*\}")
_ANSWER_LABEL = re.compile(
  rf"\A\s*(?:{_TEXT}\{{)?\s*(?:the\s+)?(?:final\s+)?answer\s*(?:is)?\s*[:=]?\s*\}}?\s*[:=]?",
  re.IGNORECASE,
)
_OPTION = re.compile(
  r"\A\s*(?:the\s+)?(?:option|choice|letter)\s+(?=\(?[A-J]\b)|\A\s*选[:：]?\s*(?=[A-J]\b)",
  re.IGNORECASE,
)
_CHINESE_UNITS = "(?:千[米克瓦]|[个元人天只本米岁块件条次年月日])+"
_TRAILING_CHINESE = re.compile(
  rf"(?:{_TEXT}\{{\s*{_CHINESE_UNITS}\s*\}}|{_CHINESE_UNITS})[\s。.]*\Z"
)
_SPACED_THOUSANDS = re.compile(r"\A\s*[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9 ])")
_UNIT_LETTER = re.compile(r"(?<=[0-9}])([ \t]+)([msghL])(?=\s*(?:\^|[²³]|[.,]?\s*\Z))")
_EXPLAINED = re.compile(  # "8 (= 7 + 1)", "7 (B)", "none other than 8"
  r"\s*\(\s*(?:=|≈|\\approx)[^()]*\)\s*\.?\Z|(?<=[0-9])\s+\([A-J]\)[\s.]*\Z"
  r"|\A\s*none\s+other\s+than\s+|\A\s*\(?[A-J]\)\s*:\s*(?=[-$\\0-9])"
)
_CHOICE_BEFORE = re.compile(rf"\A\s*(?:{_TEXT}\{{)?\s*\(?[A-J]\)[\s:}}]*(?=\S)")
_CHOICE_BEHIND = re.compile(r"(?<=\S)\s*\([A-J]\)[\s.]*\Z")
_CONNECTIVE = re.compile(
  r"\A\s*(?:so|thus|hence|therefore|then|finally|and|we\s+(?:get|have|find|obtain)(?:\s+that)?"
  r"|giving|which\s+gives)\b[,:]?\s*",
  re.IGNORECASE,
)
_IS = re.compile(
  r"\b(?:is|are|equals|be|was)\b:?+|\b(?:it|that|this|answer)['’]s\b|[:：]\s|→|=>"
  r"|(?<![!<>=/])=(?![=/>])|\btotal\s+of\b|\bin\s+total,?(?=\s)|是|有|为"
)
# Between two verbs of "Tom: 5, Ann: 6": a value and another label.
_CONNECTS = (
  r"so|thus|hence|therefore|then|which|that|giving|total|sum|answer|altogether|together|overall|all"
  r"|result|product|difference|combined|finally|left|remaining|where|since|because|if|when|final"
)
_DERIVED = re.compile(
  r"\b(?:area|perimeter|volume|distance|amount|profit|cost|due|average)\b", re.IGNORECASE
)
_OTHER_LABEL = re.compile(
  rf"""
  [\s\\$({{:]* (?P<value> -?[0-9][0-9.,/]*? ) (?: [\s$)}}]*[A-Za-z%°]+ ){{0,3}}? [\s$)}}.]*
  (?: [,;] | \band\b ) (?: (?! \b(?:{_CONNECTS})\b | [而但所因总共合] ) [^0-9=:+*/] )*
  """,
  re.IGNORECASE | re.VERBOSE,
)
_NAMED_NUMBER = re.compile(r"\s*(?:[A-Za-z]\s*=\s*)?(-?[0-9][0-9.,]*)\s*")
_TOTAL_BEHIND = re.compile(
  r"\s*(?:in\s+all|in\s+total|altogether|together|combined|left)\b", re.IGNORECASE
)
_PARALLEL = re.compile(rf"(?=.*(?:[,;]|\band\b))(?!.*\b(?:{_CONNECTS})\b)", re.IGNORECASE)
# Text after the answer in its sentence that is not part of it.
_ASIDE = re.compile(
  r"""
  \s* (?:
    [,;(]? \s* \b(?: (?:and|but)\s+not | rather\s+than | instead\s+of | because | since
      | as\s+(?:required|desired|claimed|shown|expected|needed|asked)
      | (?:attained|achieved|reached|obtained)\b (?!\s*\Z) )\b
    | [,，]\s*(?: not | as | so | which | after | obtained | with\s+equality | when | where | for
        | at | [0-9]+\s+of\s+(?:whom|which|them) )\b
    | (?<=\$)\s+(?: when | where | for | at | if )\b (?!.*\b(?:when|if|otherwise|and|or)\b)
    | [,，;]?\s*\(? \s*(?: or\s+(?:equivalently|about|approximately|roughly|around|approx\.?)
        | \(\s*(?:about|approximately|roughly|approx\.?|i\.e\.|that\s+is|≈|\\approx) ) (?!\w)
    | [,，]\s*不是 | ;\s*(?=[^;]*[A-Za-z]{3}[^;]*\s[A-Za-z]{3}) | \s+by\s+[A-Za-z]+\s*[.]?\Z
    | (?P<loose> [,;]\s*(?:[A-Za-z'’-]++[ .]*+){1,8}\Z | \((?=[^()]*[A-Za-z]{2})[^()]*\)[\s.]*\Z )
  ) .*\Z
  """,
  re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
_SUBORDINATE = re.compile(
  r"\b(?:when|where|if|because|since|for|at|with|attained|achieved|reached)\s*[$\\([]*\Z",
  re.IGNORECASE,
)
_ONE_NUMBER = re.compile(
  r"(?<![A-Za-z0-9.,])-?\$?(?:[1-9][0-9]{0,2}(?>(?:,[0-9]{3})+)|[0-9]++)(?:[.,][0-9]++)?"
  r"(?:/[0-9]++)?(?![A-Za-z]?[0-9]|[A-Z]|[-+/^])%?"
)
_SYMBOL_BEFORE = re.compile(
  r"(?:(?<![A-Za-z'’])(?:[A-Za-z]\s*[+*/×·÷^]|[e-zE-Z]\s*[-−]|(?<![A-Za-z]{2}\s)[A-Za-z]\s*[-−])|[√^]|\b(?:sqrt|log|ln|sin|cos|tan)\s*\(?)\s*\Z"
)
_SYMBOL_BEHIND = re.compile(
  r"[abcdefijknopqrtuvwxyz](?![A-Za-z])|\s*(?:π|√|pi\b)|\s*[-+*/×·÷^−]\s*[A-Za-z](?![A-Za-z])"
)
_SCALE = (
  r"(?:hundreds?|thousands?|millions?|billions?|trillions?|dozens?|score|gross(?!\s+[a-z])|tens|lakhs?|crores?|bn"
  r"|mn|mil|halves|thirds?|fourths?|quarters?|(?:fif|six|seven|eigh|nin|ten|eleven|twelf|hundred"
  r"|thousand|million)ths?|ths\b)\b"
)
# Words directly before or after a value that make it ambiguous.
_OPEN_BEFORE = re.compile(
  r"""
  (?: \b(?: or|nor|not|no|maybe|perhaps|possibly|either|about|approximately|around|nearly|almost
      |over|under|below|above|least|most|than|between|negative|minus|plus|times|half|up\s+to|guess
      |(?:different|differs?)\s+from|twice|double|triple|thrice|choose|one\s+of
      |(?:step|equation|problem|part|case|figure|page|chapter|question|level|grade|number|room)
      |(?:multiples|powers|factors|divisors)\s+of|minimum|maximum|exceeds?|exceeding
      |approx\.?|ca\.|upwards\s+of|within|beyond|everything\s+but|without|loss\s+of|divides
      |(?:co)?prime\s+to|ends\s+in|contains|No\.|should\s+have\s+been|supposed\s+to\s+be
      |(?:divided|divisible|dividing|divide|multiplied|multiple|multiplying|multiply)\s+(?:by|of)
      |(?:correct|rounded|close|nearest|accurate)\s+to|with
      |(?:thirds?|hal(?:f|ves)|quarters?|fifths?|tenths?|percent|multiple|square|cube|root|power
        |opposite|reciprocal|inverse|double|one|each|out|any|factor|divisor|remainder|[0-9%]+)
        \s+of )\s+
    | 至少[是有为]?\s* | 至多[是有为]?\s* | 大于\s* | 小于\s* | [大约約]*[约約][是为]?\s* | 不到\s*
    | 最[多少]是?\s* | 接近\s* | [大小]于等于\s* | 第\s*
    | 不[少多]于\s* | 超过\s* | 根号\s* | 百分之\s* | 零下\s* | マイナス\s* | [~≈∼]\s*
    | \b(?: nicht|kein\w*|mindestens|höchstens|etwa|ungefähr|rund|no\s+(?:es|son)|al\s+menos
        | pas|environ|au\s+moins|moins\s+de|plus\s+de|más\s+de|weniger\s+als|mehr\s+als|circa
        |non\s+è|não\s+é|menos|unos|более|менее|не|около|примерно|минус )\s+ ) \$?\s*\Z
  """,
  re.IGNORECASE | re.VERBOSE,
)
_OPEN_BEHIND = re.compile(
  rf"""
  \s* (?: (?:or|nor|unless|maybe|perhaps|squared|cubed|factorial|half|and\s+a\s+half|more)\b
    | (?:and|or)\s+(?:above|below|over|under|up) | degrees?\s+below | less\s+than
    | at\s+(?:most|least) | below\s+zero | in\s+the\s+negative | max\b | minimum\b | doubled
    | halved | and\s+three\s+quarters | r\s?[0-9] | \((?:mod|base)\b
    | times\s+(?:as|more|the|[0-9]) | -?{_SCALE} | (?:st|nd|rd|th)\b
    | [-\s](?:digits?|decimal|significant)\b
    | (?:k|(?-i:[KMB]))\b | [万亿百] | 千(?![克米瓦]) | 以上 | 以下 | 左右
    | 的?倍数? | 个半 | 的平方 | [이가]\s*아닙니다 | [個个]?では
    | Million\w*|Milliarden?|tausend|mil(?:lones)?\b|mille\b|миллион\w*|тысяч\w* )
  """,
  re.IGNORECASE | re.VERBOSE,
)
_MULTIPLE_BEHIND = re.compile(r"\s+(hundred|thousand|million|billion|trillion|dozen|lakh|crore)\b")
_OPEN_AT_ALL = re.compile(
  rf"\b(?:or|nor|maybe|perhaps|possibly|either|squared|cubed|guess|negative|half)\b|\b{_SCALE}",
  re.IGNORECASE,
)
_CUT_OFF = re.compile(  # an unfinished formula or sum
  r"(?<!\\)\$(?=[A-Za-z\\])|\\\([^)]*\Z|\\\[[^\]]*\Z|[-+=/×÷:]\s*\Z|\A\s*step\s+[0-9]+[.:)]?\s*\Z",
  re.IGNORECASE,
)
_BOUND = re.compile(
  r"\A\s*(?:≥|≤|>|<|\\[gl]eq?\b|at\s+(?:least|most)|≈|\\approx\b|(?:min|max)imum\b(?!\s+is)"
  r"|(?:multiples|powers|factors|divisors)\s+of\b)"
)

_SMALL_NUMBERS = (
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
  "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORD_VALUES = {word: value for value, word in enumerate(_SMALL_NUMBERS)}
_WORD_VALUES |= {word: 20 + 10 * index for index, word in enumerate(_TENS)}
_WORD_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6}
_NUMBER_WORDS = re.compile(
  rf"\b(?:{'|'.join([*_WORD_VALUES, 'a(?= hundred)'])})"
  rf"(?:(?:[-\s]|\sand\s)(?:{'|'.join([*_WORD_VALUES, *_WORD_SCALES])}))*\b",
  re.IGNORECASE,
)


class Part(NamedTuple):
  """A value within a sentence, or "" and the reason for its absence."""

  text: str
  reason: str = ""


def cleaned(statement: Statement) -> Statement:
  """Removes labels ("Answer:", "option"), Chinese units and empty text commands."""
  text = _EMPTY_TEXT.sub(" ", " ".join(statement.text.split()))
  around = _TEXT_AROUND.fullmatch(text)
  text = _OPTION.sub("", _ANSWER_LABEL.sub("", around.group(1) if around else text))
  text = _EXPLAINED.sub("", text)
  text = _SPACED_THOUSANDS.sub(lambda match: match.group().replace(" ", ""), text)
  text = _UNIT_LETTER.sub(r"\1\\text{\2}", _TRAILING_CHINESE.sub("", text))
  is_sentence = statement.source in ("last", "retraction") and re.search(
    r"[A-Za-z]\W|\s", text.strip("!. ")
  )
  if statement.source in ("line", "heading") or is_sentence:
    text = re.sub(r"(?<=[0-9])!+\s*\Z", "", text)  # an exclamation, not a factorial
  return statement._replace(text=text)


def digits_for_words(text: str) -> str:
  """Replaces numbers in words by digits: "twenty-one apples" becomes "21 apples"."""

  def value(match: re.Match) -> str:
    total = current = 0
    for word in re.findall("[a-z]+", match.group().lower()):
      if word in _WORD_SCALES:
        scale = _WORD_SCALES[word]
        current = max(current, 1) * scale
        if scale > 100:
          total, current = total + current, 0
      else:
        current += _WORD_VALUES.get(word, 0)
    return str(total + current)

  return _NUMBER_WORDS.sub(value, text)


def wholes(statement: Statement) -> Iterator[str]:
  """Yields texts that may be the whole answer of a statement, the best first, unless denied."""
  text = statement.text
  if _BOUND.match(text) or (statement.source != "box" and text.lstrip().startswith("~")):
    return
  yield text
  aside = _ASIDE.search(text)
  trimmed = ""
  if aside and not _OPEN_AT_ALL.search(aside["loose"] or ""):
    trimmed = text[: aside.start()]
  if trimmed.strip() and (_HOLDS_VALUE.search(trimmed) or not _HOLDS_VALUE.search(text)):
    yield trimmed
  for pattern in (_CHOICE_BEFORE, _CHOICE_BEHIND, _CONNECTIVE):
    without = pattern.sub("", text)
    if without != text and _HOLDS_VALUE.search(without):
      yield without
  if not re.search("[0-9]", text):
    spelled = digits_for_words(text)
    if spelled != text:
      yield spelled
  if statement.source == "marker" or (statement.source == "box" and "\\text" not in text):
    return
  if assertions.is_hedged(text):
    return
  formulas = [formula.span() for formula in statements.FORMULA.finditer(text)]
  verbs = []
  for verb in reversed(list(_IS.finditer(text))):
    if not any(start < verb.start() < end for start, end in formulas):
      verbs.append(verb)
  totals = [verb for verb in verbs if "total" in verb.group()]
  inside = [verb for verb in verbs if verb.end() <= len(trimmed)]
  labels = {
    verb
    for verb, before in itertools.pairwise(verbs)
    if "total" not in before.group()
    and _is_another_label(text[before.end() : verb.start()], text[verb.end() :])
    and not re.search(r"[0-9][a-zA-Z]\s*\Z", text[: before.start()])  # 2x = 48, x = 24
    and (statement.source == "box" or not _DERIVED.search(text[before.end() : verb.start()]))
  }
  for verb in (totals + inside + verbs)[:6]:
    after = (trimmed if verb in inside else text)[verb.end() :]
    if verb in labels or _OPEN_BEFORE.search(text[: verb.end()] + " "):
      continue
    if _HOLDS_VALUE.search(after) and not assertions.is_denied(text, verb.end(), len(text)):
      yield after.lstrip(" }")


def _is_another_label(between: str, after: str) -> bool:
  """Whether the text between two verbs is a value and a second label: "Tom: 5, Ann: 6"."""
  match = _OTHER_LABEL.fullmatch(between)
  same = match and re.match(rf"[\s$({{]*{re.escape(match['value'].rstrip('.,'))}(?![0-9.])", after)
  return match is not None and not same


def leaves_open(text: str) -> bool:
  """Whether an answer contains words that hedge or change it: "7 or more", "negative 7"."""
  return _OPEN_AT_ALL.search(text) is not None


def is_cut_off(statement: Statement) -> bool:
  """Whether a statement breaks off in a formula or sum, or asks a question."""
  text = statement.text
  return text.endswith(("?", "？")) or bool(_CUT_OFF.search(statements.FORMULA.sub("x", text)))


def _are_parallel(text: str, formulas: Sequence[tuple[int, int, str]]) -> bool:
  """Whether formulas are different numbers side by side: "$5$ for Tom and $6$ for Ann"."""
  numbers = [_NAMED_NUMBER.fullmatch(formula) for _, _, formula in formulas]
  if None in numbers or len({number.group(1) for number in numbers}) < 2:
    return False
  if _TOTAL_BEHIND.match(text, formulas[-1][1]):
    return False
  gaps = [text[end:start] for (_, end, _), (start, _, _) in itertools.pairwise(formulas)]
  return all(_PARALLEL.match(gap) for gap in gaps)


def part(statement: Statement) -> Part:
  """The formula or number in a sentence that may be its answer; different numbers are ambiguous."""
  text = statement.text[-MAX_CHARS:]
  formulas = []
  for match in statements.FORMULA.finditer(text):
    formula = next(filter(None, match.groups()), "")
    if not re.fullmatch(r"\s*[A-Za-z]*\s*", formula):  # a bare name
      formulas.append((match.start(), match.end(), formula))
  main = [formula for formula in formulas if not _SUBORDINATE.search(text[: formula[0]])]
  formulas = main or formulas
  outside = statements.FORMULA.sub(lambda match: " " * len(match.group()), text)
  outside = outside.replace(r"\$", " $").replace(r"\%", "% ")
  if formulas:
    if _are_parallel(text, formulas):
      return Part("", "ambiguous")
    start, end, chosen = formulas[0 if statement.source == "line" else -1]
  elif re.search(r"[\\^_{}<>≥≤≠|\[\]*`\x00-\x08]", outside):  # not prose
    return Part("", "unparsable")
  else:
    numbers = list(_ONE_NUMBER.finditer(outside))
    if not numbers:
      return Part("", "unparsable")
    start, end, chosen = *numbers[-1].span(), numbers[-1].group()
    if len({number.group().strip("$ ") for number in numbers}) > 1:
      return Part("", "ambiguous")
  if assertions.is_denied(text, start, end):
    return Part("", "no_answer")
  if _SYMBOL_BEFORE.search(outside[:start]) or _SYMBOL_BEHIND.match(outside, end):
    return Part("", "unparsable")
  if multiple := _MULTIPLE_BEHIND.match(outside, end):
    chosen, end = f"{chosen} {multiple.group(1)}", multiple.end()
  clause = text[assertions.clause_start(text, start) : start]
  if _OPEN_BEFORE.search(clause) or _OPEN_BEHIND.match(outside[end:]) or assertions.is_hedged(text):
    return Part("", "ambiguous")
  return Part(chosen)
