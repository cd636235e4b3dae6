r"""The smallest parts of a written answer: numerals, symbols, brackets, roots, functions, matrices.

Each function reads one rule from a `Parser` (answer_grammar.py); none computes a value.
"""

import re

from synthneg_jax.grading import answer_brackets, answer_units
from synthneg_jax.grading.answer_tokens import Token, TooLarge, Unreadable
from synthneg_jax.grading.answer_tree import CONSTANTS, FUNCTIONS, GREEK, Node, num, sym

_DECORATIONS = frozenset(
  "vec hat bar overline overrightarrow tilde dot widehat mathcal mathbb mathfrak mathscr overparen widetilde".split()
)
_BRACKETS = {
  "lfloor": ("rfloor", "floor"),
  "lceil": ("rceil", "ceil"),
  "lvert": ("rvert", "abs"),
  "lVert": ("rVert", "norm"),
}
_STARTERS = frozenset(
  "frac sqrt pi infty infinity binom lfloor lceil langle lbrace lvert emptyset varnothing begin dollar euro pounds".split()
)
_OPERATORS = frozenset(
  "oplus otimes circ mod bmod pmod land lor wedge vee neg cup cap setminus end right left choose over atop iff to rightarrow "
  "implies Rightarrow le ge leq geq ne neq in notin subset subseteq approx equiv sim cong propto mid parallel perp "
  "times cdot div ast pm mp text boxed rfloor rceil rangle rbrace rvert rVert input write def catcode".split()
)
_CURRENCIES = {"dollar": "dollar", "euro": "euro", "pounds": "pounds sterling", "pound": "pounds sterling"}
_LETTERS_MOST = 3  # letters that stand together as a product of symbols; more are a word
_ENGLISH = frozenset(
  "the is of we so it to at be are for has was not all any sum its one two six ten day and or no yes set his her if as "
  "by on my he she find that than then this from let when with there are".split()
)
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sec": "arcsec", "csc": "arccsc"}


def is_unit_word(token: Token) -> bool:
  """Whether words after a number are its unit, and no further factor."""
  if token.value == "min":
    return True
  if token.kind == "text":
    return token.value.lower() not in FUNCTIONS and (
      len(token.value) > 1 or answer_units.unit_of(token.value) is not None
    )
  if token.kind != "word" or token.value in FUNCTIONS or token.value in CONSTANTS or _function_prefix(token.value):
    return False
  return (
    answer_units.is_abbreviation(token.value)
    or len(token.value) > _LETTERS_MOST
    or answer_units.unit_of(token.value) is not None
    and len(token.value) > 1
  )


def _function_prefix(word: str) -> str | None:
  """The function whose name and one argument letter are written together: sinx."""
  found = [name for name in FUNCTIONS if word.startswith(name) and len(word) == len(name) + 1]
  return max(found, key=len) if found else None


def starts_factor(parser, left: Node) -> bool:
  """Whether the next token goes on with a product by standing beside it."""
  token = parser.peek()
  if token.kind == "num":
    last = (left.args[-1] if left.op == "mul" else left).op
    return token.spaced and (last == "fact" or (last == "pow" and parser.peek(1).value == "^"))
  if token.kind == "word":
    return (
      token.value not in ("and", "or", "U") and not is_unit_word(token)
      if token.value != "U"
      else not parser._plain_union()
    )
  if token.kind == "text":
    return (
      token.value.lower().strip() not in ("and", "or") and bool(token.value.strip(" ,;.")) and not is_unit_word(token)
    )
  if token.kind == "cmd":
    name = token.value
    return name in _STARTERS or name in FUNCTIONS or name in GREEK or name in _DECORATIONS or name in ("operatorname",)
  if token.value == "|":
    return parser.bars == 0
  return token.value in ("(", "{", r"\{") or (token.value == "[" and left.op not in ("num",))


def power(parser) -> Node:
  """atom with what follows it: factorials, percent, degrees, labels, and a power, which binds to the right."""
  parser.depth += 1
  if parser.depth > 2 * 40:
    raise TooLarge("powers of powers")
  made = _postfix(parser, atom(parser))
  if parser.take("^"):
    if parser.at("'") or (parser.at("{") and parser.peek(1).value in ("'", "prime")):
      raise Unreadable("a prime as a power")
    made = Node("pow", (made, _exponent(parser)))
    made = _postfix(parser, made)
  parser.depth -= 1
  return made


def _exponent(parser) -> Node:
  negative = False
  while parser.at("+", "-"):
    negative ^= parser.next().value == "-"
  if parser.at("{"):
    made = _postfix(parser, answer_brackets.group(parser))
    if parser.take("^"):
      made = Node("pow", (made, _exponent(parser)))
  else:
    made = power(parser)
  return Node("neg", (made,)) if negative else made


def _postfix(parser, made: Node) -> Node:
  while True:
    if parser.take("!"):
      if parser.take("!"):
        raise Unreadable("a double factorial")
      made = Node("fact", (made,))
    elif parser.take("%", r"\%"):
      made = Node("percent", (made,))
    elif parser.take("degree", "circ"):
      made = Node("degree", (made,))
      if parser.peek().value in ("C", "F") and parser.peek().kind in ("word", "text"):
        parser.next()
    elif parser.at("'", "prime") and made.op == "sym":
      parser.next()
      made = sym(made.args[0] + "'")
    elif parser.at("dollar", "euro", "pounds") and parser.currency is None and made.op in ("num", "neg"):
      parser.currency = _CURRENCIES[parser.next().value]
    elif parser.at("_") and made.op in ("sym", "num"):
      parser.next()
      label = answer_brackets.label(parser)
      if made.op == "sym":
        made = sym(f"{made.args[0]}_{label}")
      else:
        made = _based(made, label)
    else:
      return made


def _based(made: Node, label: str) -> Node:
  if made.args[0].denominator != 1 or not re.fullmatch(r"[0-9]{1,2}", label) or not 2 <= int(label) <= 36:
    raise Unreadable("the base of a numeral")
  return Node("base", (str(made.args[0]), int(label)))


def atom(parser) -> Node:
  """The number, word, text or bracket that the parser is at; raises Unreadable where it is none."""
  token = parser.peek()
  if token.kind == "num":
    return _number(parser)
  if token.kind == "word":
    return _word(parser)
  if token.kind == "text":
    return _text(parser)
  if token.kind == "cmd":
    return _command(parser)
  if token.value in ("(", "[", "]"):
    return answer_brackets.bracket(parser)
  if token.value == "{":
    return answer_brackets.group(parser)
  if token.value == r"\{":
    return answer_brackets.finite_set(parser)
  if token.value in ("|", r"\|"):
    parser.next()
    parser.bars += 1
    made = parser.sum()
    parser.bars -= 1
    parser.need(token.value)
    return Node("call", ("abs" if token.value == "|" else "norm", made))
  raise Unreadable(f"{token.value!r} where a value is wanted" if token.value else "a value is wanted")


def _number(parser) -> Node:
  """A numeral, with what makes it a repeating decimal or a mixed number."""
  token = parser.next()
  made = num(token.value)
  if parser.at("overline", "bar", "dot") and re.fullmatch(r"[0-9]*\.[0-9]*", token.value):
    parser.next()
    return _repeating(token.value, _digits(parser))
  after = parser.peek()
  if (
    re.fullmatch(r"[0-9]*\.[0-9]*", token.value)
    and after.value == "("
    and not after.spaced
    and parser.peek(1).kind == "num"
  ):
    if parser.peek(2).value == ")" and parser.peek(1).value.isdigit():
      parser.next()
      repeat = parser.next().value
      parser.next()
      return _repeating(token.value, repeat)
  if token.value.isdigit():
    if parser.at("frac"):
      start = parser.place
      fraction = _command(parser)
      above, below = fraction.args
      if above.op == below.op == "num" and 0 < above.args[0] < below.args[0] and not parser.at("^", "!"):
        return Node("add", (made, fraction))
      parser.place = start
    elif after.kind == "num" and after.spaced and parser.peek(1).value == "/" and parser.peek(2).kind == "num":
      above, below = after.value, parser.peek(2).value
      if above.isdigit() and below.isdigit() and 0 < int(above) < int(below):
        parser.place += 3
        return Node("add", (made, Node("div", (num(above), num(below)))))
  if parser.at("^") and token.mark == "" and parser.peek(1).kind == "text":
    raise Unreadable("text as a power")
  return made


def _digits(parser) -> str:
  braces = parser.take("{")
  token = parser.next()
  if token.kind != "num" or not token.value.isdigit():
    raise Unreadable("the digits that repeat")
  if braces:
    parser.need("}")
  return token.value


def _repeating(before: str, repeat: str) -> Node:
  whole, _, fixed = before.partition(".")
  scale = 10 ** len(fixed)
  start = num(int((whole or "0") + fixed)).args[0] / scale
  return num(start + num(int(repeat)).args[0] / (scale * (10 ** len(repeat) - 1)))


def _word(parser) -> Node:
  token = parser.next()
  word = token.value
  if word in FUNCTIONS:
    return _function(parser, word)
  if word in CONSTANTS:
    return sym(CONSTANTS[word])
  if word in GREEK and len(word) > 1:
    return sym(word)
  prefix = _function_prefix(word)
  if prefix:
    parser.tokens[parser.place - 1] = Token("word", prefix, token.spaced)
    parser.tokens.insert(parser.place, Token("word", word[len(prefix) :]))
    return _function(parser, prefix)
  if len(word) > _LETTERS_MOST or (word.lower() in _ENGLISH and not (word.isupper() and len(word) > 1)):
    raise Unreadable(f"the word {word[:20]!r}")
  if len(word) > 1:
    parser.tokens[parser.place - 1] = Token("word", word[0], token.spaced)
    parser.tokens.insert(parser.place, Token("word", word[1:]))
  return sym(CONSTANTS.get(word[0], word[0]))


def _text(parser) -> Node:
  token = parser.next()
  word = token.value.strip()
  if word.lower() in FUNCTIONS:
    return _function(parser, word.lower())
  if re.fullmatch(r"[A-Za-z]", word):
    return sym(CONSTANTS.get(word, word))
  if re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", word):
    return num(word)
  raise Unreadable(f"the word {word[:20]!r}")


def _argument(parser) -> Node:
  r"""One argument of a LaTeX command: a group, a digit of a numeral, a command."""
  if parser.at("{"):
    return answer_brackets.group(parser)
  token = parser.peek()
  if token.kind == "num" and token.value.isdigit() and len(token.value) > 1:
    parser.tokens[parser.place] = Token("num", token.value[1:])
    return num(token.value[0])
  return atom(parser)


def _command(parser) -> Node:
  token = parser.next()
  name = token.value
  if name == "frac":
    above = _argument(parser)
    return Node("div", (above, _argument(parser)))
  if name == "sqrt":
    return _root(parser)
  if name in FUNCTIONS:
    return _function(parser, name)
  if name in CONSTANTS:
    return sym(CONSTANTS[name])
  if name in GREEK:
    return _angle(parser, name)
  if name == "binom":
    above = _argument(parser)
    return Node("binom", (above, _argument(parser)))
  if name in _BRACKETS:
    closer, function = _BRACKETS[name]
    made = parser.items(closer)
    parser.need(closer)
    return Node("call", (function, made))
  if name == "langle":
    made = parser.items("rangle")
    parser.need("rangle")
    return Node("bracket", ("(", made.args[1] if made.op == "list" else (made,), ")"))
  if name == "lbrace":
    parser.place -= 1
    return answer_brackets.finite_set(parser)
  if name in ("emptyset", "varnothing"):
    return Node("set", ())
  if name in _CURRENCIES:
    if parser.currency is not None:
      raise Unreadable("two currencies")
    parser.currency = _CURRENCIES[name]
    if parser.at("-"):
      parser.next()
      return Node("neg", (atom(parser),))
    return atom(parser)
  if name in _DECORATIONS:
    braces = parser.at("{")
    label = answer_brackets.label(parser) if braces or parser.peek().kind != "end" else ""
    if not re.fullmatch(r"[A-Za-z0-9']{1,12}", label):
      raise Unreadable("what a decoration stands over")
    return sym(label if name == "mathbb" else f"{name} {label}")
  if name == "begin":
    return answer_brackets.matrix(parser)
  if name in ("ldots", "dots", "cdots"):
    return sym("...")
  if name in _OPERATORS or parser.at("{", "["):
    raise Unreadable(f"the command {name[:20]!r}")
  return sym(name)  # a sign that stands for itself, equal to itself only


def _angle(parser, name: str) -> Node:
  r"""\angle ABC and \triangle ABC are one name; any other Greek letter is its own."""
  if name in ("angle", "triangle") and parser.peek().kind == "word":
    return sym(f"{name} {parser.next().value}")
  return sym(name)


def _root(parser) -> Node:
  degree = num(2)
  if parser.take("["):
    degree = parser.sum()
    parser.need("]")
  if parser.at("{"):
    return Node("root", (answer_brackets.group(parser), degree))
  return Node("root", (atom(parser), degree))


def _function(parser, name: str) -> Node:
  """A function with its argument: bracketed, or the factors that stand beside it up to the next function."""
  exponent, base = None, None
  while parser.at("^", "_"):
    if parser.next().value == "^":
      exponent = _exponent(parser)
    else:
      base = answer_brackets.group(parser) if parser.at("{") else _argument(parser)
  if exponent == Node("neg", (num(1),)) and name in _INVERSE:
    name, exponent = _INVERSE[name], None
  parser.depth += 1
  if parser.depth > 2 * 40:
    raise TooLarge("functions of functions")
  if parser.at("(", "["):
    inner = answer_brackets.bracket(parser)
    arguments = inner.args[1] if inner.op == "bracket" else (inner,)
  elif parser.at("{"):
    inner = answer_brackets.group(parser)
    arguments = inner.args if inner.op == "set" else (inner,)
  else:
    negative = parser.take("-")
    inner = power(parser)
    while (
      starts_factor(parser, inner) and not parser.at("(") and parser.peek().value not in FUNCTIONS and name != "sqrt"
    ):
      inner = Node("mul", (inner, power(parser)))
    arguments = (Node("neg", (inner,)) if negative else inner,)
  parser.depth -= 1
  if not arguments:
    raise Unreadable("a function of nothing")
  if name == "sqrt":
    made = Node("root", (arguments[0], num(2)))
  elif name == "cbrt":
    made = Node("root", (arguments[0], num(3)))
  else:
    made = Node("call", (name, *arguments, *((base,) if base is not None and name == "log" else ())))
  if base is not None and name != "log":
    raise Unreadable("a function with a subscript")
  return Node("pow", (made, exponent)) if exponent is not None else made
