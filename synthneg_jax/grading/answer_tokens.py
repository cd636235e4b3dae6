r"""The tokenizer of answers in LaTeX or plain text, for `answer_grammar`.

`tokens("\\frac12 \\text{ cm}^2")` is [cmd frac, num 12, text cm, op ^, num 2]. It makes one pass of
regexes over at most `MAX_CHARS` characters and evaluates nothing. An unknown character is an error.
"""

import functools
import re
from typing import NamedTuple

from synthneg_jax.grading import answer_units

MAX_CHARS = 2000  # per answer
MAX_TOKENS = 1000  # per answer
MAX_DIGITS = 1000  # per numeral
MAX_EXPONENT = 1000  # absolute value in scientific notation


class Unreadable(Exception):
  """The text is outside the grammar."""


class TooLarge(Exception):
  """The text, or a value that it denotes, exceeds a size limit."""


class Token(NamedTuple):
  """A token.

  Attributes:
    kind: "num" (digits, point, exponent), "repeating" (a decimal such as 0.1(6)), "word" (letters),
      "cmd" (LaTeX command), "text" (a word of a text command), "op" (anything else).
    value: its text; of a command without the backslash.
    spaced: whether a space precedes it.
  """

  kind: str
  value: str
  spaced: bool = False


# Unicode signs and their LaTeX or ASCII equivalents.
_SIGNS = {
  "−–—﹣－‐‑": "-", "×": r"\times ", "⋅·": r"\cdot ", "∗": "*", "÷": r"\div ", "⁄∕": "/",
  "√": r"\sqrt ", "∛": r"\sqrt[3] ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ",
  "∈": r"\in ", "≤⩽": r"\le ", "≥⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ",
  "°": r"\degree ", "′’‘": "'", "“”\u00a0\u2009\u202f\u2003\u2002\u3000": " ", "≈": r"\approx ",
  "∨": r"\lor ", "∧": r"\land ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
  "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
  "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": "(", "⟩": ")", "…⋯": r"\ldots ",
  "→": r"\to ", "⇒": r"\Rightarrow ", "∖": r"\setminus ", "€": r"\euro ", "£": r"\pounds ",
  "，、": ",", "。": ".", "；": ";", "（": "(", "）": ")", "＝": "=", "＋": "+", "：": ":",
  "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}",
  "⅔": r"\frac{2}{3}", "⅛": r"\frac{1}{8}", "∠": r"\angle ", "∣": "|", "∥": r"\| ",
  "\u200b\u200c\u200d\ufeff\u2060\u2061\u2062\u2063✓✔✅": "",
}  # fmt: skip
_GREEK = (
  "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigmaf "
  "sigma tau upsilon phi chi psi omega"
).split()
_SIGN_TABLE = {ord(sign): latex for signs, latex in _SIGNS.items() for sign in signs}
_SIGN_TABLE |= {0x3B1 + offset: f"\\{name} " for offset, name in enumerate(_GREEK)}
_SIGN_TABLE |= {0xFF10 + digit: str(digit) for digit in range(10)}
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]++")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉]++")
_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789-+n0123456789")

_LAYOUT = re.compile(
  r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|"
  r"mathstrut|strut|phantom\{[^{}]*+\}|[hv]space\*?\{[^{}]*+\}|hfill|noindent|allowbreak|nonumber|"
  r"notag|label\{[^{}]*+\}|tag\{[^{}]*+\})(?![A-Za-z])\.?"
)
_SPACES = re.compile(
  r"(?<!\\)\\[,;:!> ~]|~|&nbsp;|"
  r"\\q?quad|\\(?:thinspace|enspace|medspace|thickspace)(?![A-Za-z])"
)
_THIN_GROUPS = re.compile(
  r"(?<![0-9.,])"
  r"([0-9]{1,3}(?>(?:(?:\\,|\\!,\\!|\\!|\{,\}\\?!?|,\\! ?|\{\\,\})[0-9]{3})+))"
  r"(?![0-9])"
)
_ENVIRONMENT = re.compile(
  r"\\(?:begin|end)\{(?:align|aligned|equation|gather|gathered|displaymath|math|center|split)\*?\}"
)
_WORD_COMMANDS = "text textnormal mbox hbox operatorname".split()
_FONT_COMMANDS = (
  "textbf textit textrm textsf textsc texttt textup emph mathrm mathsf mathtt mathbf mathit "
  "mathnormal boldsymbol bm pmb rm bf it underline"
).split()
_TEXT = re.compile(rf"\\({'|'.join(_WORD_COMMANDS + _FONT_COMMANDS)})\*?\s*(?=\{{)")
_ROMAN_UNIT = re.compile(  # cm^2, m/s
  r"([A-Za-z]{1,4})(?:\^\{?-?[1-9]\}?)?(?:/([A-Za-z]{1,4})(?:\^\{?[1-9]\}?)?)?"
)
_BARE_FONT = re.compile(
  r"\\(?:mathbf|mathrm|mathit|mathsf|boldsymbol|bm)\s+"
  r"([A-Za-z0-9])(?![A-Za-z])"
)
_DECORATION = re.compile(  # colours, frames and marks, which do not change a formula's meaning
  r"\\(?:text)?color\s*+(?:\[[^\[\]]*+\]\s*+)?\{[^{}]*+\}|\\colorbox\s*+\{[^{}]*+\}|"
  r"\\fcolorbox\s*+\{[^{}]*+\}\s*+\{[^{}]*+\}|\\bbox(?![A-Za-z])\s*+(?:\[[^\[\]]*+\])?|"
  r"\\(?:boxed|fbox|framebox|underbrace|overbrace|checkmark)(?![A-Za-z])"
)
_QUOTED = re.compile(r"\"([^\"]*+)\"|``([^`']*+)''")
_OLD_FONT = re.compile(
  r"\\(?:rm|bf|it|tt|sf|cal|boldmath|centering|tiny|small|normalsize|"
  r"large|Large|LARGE|huge|Huge)(?![A-Za-z])"
)
_DEGREE = re.compile(r"\^ ?(?:\{ ?\\(?:circ|degree) ?\}|\\(?:circ|degree)(?![A-Za-z]))")
_BRACKETS = {r"\lbrace": r"\{", r"\rbrace": r"\}", r"\langle": "(", r"\rangle": ")"}
_OPENERS, _CLOSERS = ("(", "[", r"\{"), (")", "]", r"\}")
_SCAN = re.compile(
  r"(?P<space>\s++)"
  r"|(?P<repeating>(?:[0-9]++\.[0-9]*+|\.[0-9]++)"  # 0.1(6)
  r"(?:\(\s*[0-9]++\s*\)|\\(?:overline|bar|dot)\s*(?:\{\s*[0-9]++\s*\}|[0-9]++)))"
  r"|(?P<num>(?:[1-9][0-9]{0,2}(?>(?:,[0-9]{3})+)(?!,?[0-9])(?:\.[0-9]++)?"  # 1,234.5
  r"|[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
  r"(?:[eE][+-]?[0-9]++(?![A-Za-z]))?)"
  r"|(?P<cmd>\\[A-Za-z]++\*?)"
  r"|(?P<word>[A-Za-z]++)"
  r"|(?P<op>\\[\\{}|$%#&_]|\*\*|=/=|/=|<>|<=|>=|!=|==|->|[-+*/^_=<>()\[\]{}|,;:!'%&$.?\"@#~])"
)


def closing(text: str, start: int) -> int:
  """The index of the brace that closes the one at `start`, or -1; ignores escaped braces."""
  depth, index = 0, start
  while index < len(text):
    char = text[index]
    if char == "\\":
      index += 2
      continue
    depth += (char == "{") - (char == "}")
    if depth == 0:
      return index
    index += 1
  return -1


def _plain_signs(text: str) -> str:
  """Replaces Unicode signs by LaTeX or ASCII, and superscripts by ^{...}."""
  text = re.sub(r"(?<=[0-9])( ?)([mck]?m|ft|in)(?=[²³])", r"\1\\text{\2}", text)
  text = _SUPERSCRIPTS.sub(lambda match: "^{" + match[0].translate(_DIGITS) + "}", text)
  text = _SUBSCRIPTS.sub(lambda match: "_{" + match[0].translate(_DIGITS) + "}", text)
  return text.translate(_SIGN_TABLE)


@functools.lru_cache(maxsize=1024)  # grading tidies the same answer several times
def tidy(text: str) -> str:
  """Removes layout: spaces, sizes, math delimiters, display environments, a final full stop."""
  text = re.sub(r"\\[()\[\]]", " ", _plain_signs(text)).replace("**", "^")
  text = re.sub(r"\\not\s*=", r"\\ne ", text)
  if text.startswith("^") or text.endswith("^"):
    text = text.strip("^ ")  # was bold in Markdown
  if r"\\begin" in text:
    text = text.replace(r"\\", "\\")  # every command is escaped twice
  elif r"\begin" not in text:
    text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # not a line break outside matrices
  text = _ENVIRONMENT.sub(" ", text)
  text = re.sub(r"(?<=[0-9]) ?\{ ?, ?\} ?(?=[0-9]{3})", "{,}", text)  # detokenized 14{,}916
  text = _THIN_GROUPS.sub(lambda match: re.sub(r"[^0-9]", "", match[0]), text)
  text = _BARE_FONT.sub(r" \1", text)
  text = re.sub(r"(?<=[0-9])\{[.,]\}(?=[0-9])", ".", text)
  text = re.sub(r"\b([apAP])\. ?[mM]\b\.?", r"\1m", text)
  for layout in (_LAYOUT, _SPACES, _OLD_FONT, _DECORATION):
    text = layout.sub(" ", text)
  text = _QUOTED.sub(r" \1\2 ", text)
  text = re.sub(r"\\[dtc](frac|binom)(?![A-Za-z])", r"\\\1", text).replace("`", " ")
  text = re.sub(r"\\(?:[lr]brace|[lr]angle)(?![A-Za-z])", lambda match: _BRACKETS[match[0]], text)
  text = _currency(_DEGREE.sub(r"\\degree ", text))
  return re.sub(r"(?<!\.)\.$", "", text.strip().rstrip("\\").strip()).strip()


def _currency(text: str) -> str:
  r"""Removes $ used as math delimiters; an unpaired $ and \$ are the currency."""
  text = text.replace(r"\$", r"\dollar ").replace("$$", " ")
  if text.count("$") % 2:
    text = text.replace("$", r"\dollar ", 1)
  return text.replace("$", " ")


def tokens(text: str) -> list[Token]:
  """Splits a tidied answer into tokens.

  Raises:
    Unreadable: an unknown character or an unclosed brace.
    TooLarge: more than MAX_CHARS, MAX_TOKENS or MAX_DIGITS.
  """
  if len(text) > MAX_CHARS:
    raise TooLarge("characters")
  result, index, spaced, brackets = [], 0, False, 0
  while index < len(text):
    command = _TEXT.match(text, index)
    if command:
      end = closing(text, command.end())
      if end < 0:
        raise Unreadable("unclosed text command")
      words = text[command.end() + 1 : end].split()
      if _is_formula(" ".join(words), command[1]):
        index = command.end()  # tokenize the braces as a group
      else:
        for word in words or [""]:
          result.append(Token("text", word, spaced))
          spaced = True
        index, spaced = end + 1, False
      continue
    match = _SCAN.match(text, index)
    if not match:
      raise Unreadable(f"unknown character {text[index]!r}")
    kind, value, index = match.lastgroup, match.group(), match.end()
    if kind == "space":
      spaced = True
      continue
    if kind == "repeating" and len(value) > MAX_DIGITS:
      raise TooLarge("numeral")
    if kind == "num":
      result.extend(_numeral(value, spaced, in_brackets=brackets > 0))
    elif kind == "cmd":
      result.append(Token("cmd", value[1:].rstrip("*"), spaced))
    else:
      brackets += (value in _OPENERS) - (value in _CLOSERS)
      result.append(Token(kind, value, spaced))
    spaced = False
    if len(result) > MAX_TOKENS:
      raise TooLarge("tokens")
  return result


def _is_formula(words: str, command: str) -> bool:
  """Whether the argument of a text command is a number, or a formula in bold."""
  if re.match(r"[-+]?[0-9]", words):
    return True
  if command == "mathrm" and (unit := _ROMAN_UNIT.fullmatch(words)):
    if all(map(answer_units.unit_of, filter(None, unit.groups()))):
      return False
  return command in _FONT_COMMANDS and re.search(r"[0-9\\^_+*/=]", words) is not None


def _numeral(value: str, spaced: bool, *, in_brackets: bool) -> list[Token]:
  """Tokens of a numeral: one, or in brackets two for "1,234" (but one for "1,000", by its zeros).

  Raises:
    TooLarge: more digits than MAX_DIGITS, or an exponent beyond MAX_EXPONENT.
  """
  digits, _, exponent = value.lower().partition("e")
  if len(digits) > MAX_DIGITS or len(exponent) > 8 or abs(int(exponent or "0")) > MAX_EXPONENT:
    raise TooLarge("numeral")
  groups = value.split(",")
  if not in_brackets or any(re.match(r"0[0-9]", group) for group in groups):
    return [Token("num", "".join(groups), spaced)]
  result = [Token("num", groups[0], spaced)]
  for group in groups[1:]:
    result += [Token("op", ","), Token("num", group)]
  return result
