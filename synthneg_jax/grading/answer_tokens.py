r"""Tokens of a written answer, LaTeX or plain: what `answer_grammar` reads.

`tokens("\\frac12 \\text{ cm}^2")` is [cmd frac, num 12, text cm, op ^, num 2]. Everything is one pass of regexes over at
most `MAX_CHARS` characters; nothing is evaluated, and a character that no rule knows is an error, never skipped.
"""

import re
from typing import NamedTuple

MAX_CHARS = 2000  # characters of one answer
MAX_TOKENS = 1000
MAX_DIGITS = 1000  # digits of one numeral
MAX_EXPONENT = 1000  # of scientific notation, in absolute value


class Unreadable(Exception):
  """The text is outside the grammar."""


class TooLarge(Exception):
  """The text, or a value that it asks for, is beyond what is computed."""


class Token(NamedTuple):
  """kind: num (digits, point, exponent), word (letters), cmd (LaTeX command), text (words of a text command),
  group (raw text within braces of a base or label), op (all else); value: its text; spaced: a space stands before it;
  mark: for num, "," if it holds thousands commas."""

  kind: str
  value: str
  spaced: bool = False
  mark: str = ""


# Signs that stand for LaTeX or ASCII. A character of this table is a way of writing, never a rounding of another.
_SIGNS = {
  "\u2212": "-", "\u2013": "-", "\u2014": "-", "\ufe63": "-", "\uff0d": "-", "\u2010": "-", "\u2011": "-",
  "\u00d7": r"\times ", "\u22c5": r"\cdot ", "\u00b7": r"\cdot ", "\u2217": "*", "\u00f7": r"\div ", "\u2044": "/",
  "\u2215": "/", "\u221a": r"\sqrt ", "\u221b": r"\sqrt[3] ", "\u03c0": r"\pi ", "\u221e": r"\infty ",
  "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2a7d": r"\le ",
  "\u2a7e": r"\ge ", "\u2260": r"\ne ", "\u00b1": r"\pm ", "\u2213": r"\mp ", "\u00b0": r"\degree ", "\u2032": "'",
  "\u2019": "'", "\u2018": "'", "\u201c": " ", "\u201d": " ", "\u2248": r"\approx ", "\u2228": r"\lor ",
  "\u2227": r"\land ", "\u2205": r"\emptyset ", "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}",
  "\u2115": r"\mathbb{N}", "\u211a": r"\mathbb{Q}", "\u2102": r"\mathbb{C}", "\u230a": r"\lfloor ",
  "\u230b": r"\rfloor ", "\u2308": r"\lceil ", "\u2309": r"\rceil ", "\u27e8": r"\langle ", "\u27e9": r"\rangle ",
  "\u2026": r"\ldots ", "\u22ef": r"\ldots ", "\u2192": r"\to ", "\u21d2": r"\Rightarrow ", "\u2216": r"\setminus ",
  "\u20ac": r"\euro ", "\u00a3": r"\pounds ", "\uff0c": ",", "\u3001": ",", "\u3002": ".", "\uff1b": ";",
  "\uff08": "(", "\uff09": ")", "\uff1d": "=", "\uff0b": "+", "\uff1a": ":", "\u00bd": r"\frac{1}{2}",
  "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}", "\u2153": r"\frac{1}{3}", "\u2154": r"\frac{2}{3}",
  "\u215b": r"\frac{1}{8}", "\u2220": r"\angle ", "\u2223": "|", "\u2225": r"\| ",
  "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2003": " ", "\u2002": " ", "\u3000": " ",
  "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "\u2060": "", "\u2061": "", "\u2062": "", "\u2063": "",
}  # fmt: skip
_GREEK = (
  "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigmaf sigma tau upsilon "
  "phi chi psi omega"
).split()
_SIGNS |= {chr(0x3B1 + n): f"\\{name} " for n, name in enumerate(_GREEK)}
_SIGNS |= {chr(0xFF10 + n): str(n) for n in range(10)}
_TABLE = str.maketrans(_SIGNS)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]++")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉]++")

_LAYOUT = re.compile(
  r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut|strut|"
  r"phantom\{[^{}]*+\}|[hv]space\*?\{[^{}]*+\}|hfill|noindent|allowbreak|nonumber|notag|"
  r"label\{[^{}]*+\}|tag\{[^{}]*+\})(?![A-Za-z])\.?"
)
_SPACES = re.compile(
  r"(?<!\\)\\[,;:!> ~]|~|\\q?quad|\\(?:thinspace|enspace|medspace|thickspace)(?![A-Za-z])|&(?:nbsp;)"
)
_THIN_GROUPS = re.compile(
  r"(?<![0-9.,])([0-9]{1,3}(?>(?:(?:\\,|\\!,\\!|\\!|\{,\}\\?!?|,\\! ?|\{\\,\})[0-9]{3})+))(?![0-9])"
)
_ENVIRONMENT = re.compile(
  r"\\(?:begin|end)\{(?:align|aligned|equation|gather|gathered|displaymath|math|center|split)\*?\}"
)
_TEXT_COMMANDS = (
  "text textbf textit textrm textsf textsc texttt textup textnormal mbox hbox emph mathrm mathsf mathtt mathbf mathit "
  "mathnormal operatorname boldsymbol bm pmb rm bf it underline"
).split()
_WORD_COMMANDS = frozenset("text textnormal mbox hbox operatorname".split())
_TEXT = re.compile(rf"\\({'|'.join(_TEXT_COMMANDS)})\*?\s*(?=\{{)")
_BARE_FONT = re.compile(r"\\(?:mathbf|mathrm|mathit|mathsf|boldsymbol|bm)\s+([A-Za-z0-9])(?![A-Za-z])")
_OLD_FONT = re.compile(r"\\(?:rm|bf|it|tt|sf|cal|boldmath|centering|large|Large|small)(?![A-Za-z])")
_OPENS, _CLOSES = ("(", "[", r"\{"), (")", "]", r"\}")
_NUMERAL = r"(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
_SCAN = re.compile(
  rf"(?P<space>\s++)|(?P<num>(?:[1-9][0-9]{{0,2}}(?>(?:,[0-9]{{3}})+)(?!,?[0-9])(?:\.[0-9]++)?|{_NUMERAL})(?:[eE][+-]?[0-9]++(?![A-Za-z]))?)|"
  r"(?P<cmd>\\[A-Za-z]++\*?)|(?P<word>[A-Za-z]++)|(?P<op>\\[\\{}|$%#&_]|\*\*|<=|>=|!=|==|->|[-+*/^_=<>()\[\]{}|,;:!'%&$.?\"@#~])"
)


def closing(text: str, start: int) -> int:
  """The index of the brace that closes the one at `start`; -1 where none does. Escaped braces do not count."""
  depth, place = 0, start
  while place < len(text):
    sign = text[place]
    if sign == "\\":
      place += 2
      continue
    depth += (sign == "{") - (sign == "}")
    if depth == 0:
      return place
    place += 1
  return -1


def plain_signs(text: str) -> str:
  """The text with Unicode signs as LaTeX or ASCII, raised and lowered digits as ^{...} and _{...}."""
  text = re.sub(r"(?<=[0-9])( ?)([mck]?m|ft|in)(?=[²³])", r"\1\\text{\2}", text)
  text = _SUPERSCRIPTS.sub(lambda found: "^{" + found.group().translate(_RAISED) + "}", text)
  text = _SUBSCRIPTS.sub(lambda found: "_{" + found.group().translate(_LOWERED) + "}", text)
  return text.translate(_TABLE)


def tidy(text: str) -> str:
  """The text without layout: spaces, sizes, math delimiters, display environments and a closing full stop."""
  text = plain_signs(text)
  text = text.replace(r"\(", " ").replace(r"\)", " ").replace(r"\[", " ").replace(r"\]", " ").replace("**", "^")
  if text.startswith("^") or text.endswith("^"):
    text = text.strip("^ ")  # bold
  if r"\\begin" in text:
    text = text.replace(r"\\", "\\")  # all of it escaped twice
  elif r"\begin" not in text:
    text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # a command escaped twice; no line breaks outside matrices
  text = _ENVIRONMENT.sub(" ", text)
  text = re.sub(r"(?<=[0-9]) ?\{ ?, ?\} ?(?=[0-9]{3})", "{,}", text)  # as tokenizers put 14{,}916 together again
  text = _THIN_GROUPS.sub(lambda found: re.sub(r"[^0-9]", "", found.group()), text)
  text = re.sub(r"(?<=[0-9])\{[.,]\}(?=[0-9])", ".", _BARE_FONT.sub(r" \1", text))
  text = re.sub(r"\b([apAP])\. ?[mM]\b\.?", r"\1m", text)
  text = _OLD_FONT.sub(" ", _SPACES.sub(" ", _LAYOUT.sub(" ", text)))
  text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text).replace("`", " ")
  text = re.sub(r"\\[dt]binom(?![A-Za-z])", r"\\binom", text)
  text = re.sub(r"\^ ?(?:\{ ?\\(?:circ|degree) ?\}|\\(?:circ|degree)(?![A-Za-z]))", r"\\degree ", text)
  text = _currency(text)
  return re.sub(r"(?<![.0-9])\.$|(?<=[0-9])\.$", "", text.strip().rstrip("\\").strip()).strip()


def _currency(text: str) -> str:
  r"""Pairs of $ are math delimiters and go; an odd one, or \$, is the currency."""
  text = text.replace(r"\$", r"\dollar ").replace("$$", " ")
  if text.count("$") % 2 == 0:
    return text.replace("$", " ")
  return text.replace("$", r"\dollar ", 1).replace("$", " ")


def tokens(text: str) -> list[Token]:
  """Reads a tidied answer.

  Raises:
    Unreadable: a character or brace is outside the grammar.
    TooLarge: more than MAX_CHARS, MAX_TOKENS or MAX_DIGITS.
  """
  if len(text) > MAX_CHARS:
    raise TooLarge("characters")
  found, place, spaced, brackets = [], 0, False, 0
  while place < len(text):
    command = _TEXT.match(text, place)
    if command:
      end = closing(text, command.end())
      if end < 0:
        raise Unreadable("a text command that does not end")
      inner = " ".join(text[command.end() + 1 : end].split())
      if re.match(r"[-+]?[0-9]", inner) or (
        command.group(1) not in _WORD_COMMANDS and re.search(r"[0-9\\^_+*/=]", inner)
      ):
        place = command.end()  # a formula in bold, or a number in roman: read as it stands
        continue
      found.append(Token("text", inner, spaced))
      place, spaced = end + 1, False
      continue
    match = _SCAN.match(text, place)
    if not match:
      raise Unreadable(f"the sign {text[place]!r}")
    kind, value, place = match.lastgroup, match.group(), match.end()
    if kind == "space":
      spaced = True
      continue
    if kind == "num":
      _check_numeral(value)
      found.extend(_numeral(value, spaced, brackets))
    elif kind == "cmd":
      found.append(Token("cmd", value[1:].rstrip("*"), spaced))
    else:
      brackets += (value in _OPENS) - (value in _CLOSES)
      found.append(Token(kind, value, spaced))
    spaced = False
    if len(found) > MAX_TOKENS:
      raise TooLarge("tokens")
  return found


def _numeral(value: str, spaced: bool, brackets: int) -> list[Token]:
  """One numeral; within brackets "1,234" is two unless a group could not stand alone, as in "1,000"."""
  groups = value.split(",")
  if brackets > 0 and len(groups) > 1 and not any(re.match(r"0[0-9]", group) for group in groups):
    parts = [token for group in groups for token in (Token("op", ","), Token("num", group))][1:]
    return [parts[0]._replace(spaced=spaced), *parts[1:]]
  return [Token("num", "".join(groups), spaced, "," if len(groups) > 1 else "")]


def _check_numeral(value: str) -> None:
  digits, _, exponent = value.lower().partition("e")
  if len(digits) > MAX_DIGITS or len(exponent) > 8 or (exponent and abs(int(exponent)) > MAX_EXPONENT):
    raise TooLarge("numeral")
