r"""The grammar of answers: a recursive-descent parser from tokens to trees (answer_tree.py).

    answer     = item {("," | ";" | "and" | "or") item}
    item       = [label "="] operand {relation operand}
    operand    = words | expression {":" expression} [unit words] ["\pmod" power]
    expression = [sign] power {[operator] [sign] power}
    power      = atom {"!" | "%" | "°" | "_" label} ["^" exponent]
    atom       = numeral | symbol | function argument | bracket | \command arguments

Adjacent powers are a product. Operators are left-associative and bind in the order product, sum,
union: 1/2x is (1/2)x. The parser computes no values: 9^9^9 has three leaves.
"""

import functools
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from synthneg_jax.grading import answer_tree as tree
from synthneg_jax.grading import answer_units
from synthneg_jax.grading.answer_tokens import Token, TooLarge, Unreadable, tidy, tokens
from synthneg_jax.grading.answer_tree import Node, Number, Operation, Symbol, is_operation, number

MAX_DEPTH = 40  # of nested brackets, functions and powers


def _by_spelling(spellings: dict[str, str]) -> dict[str, str]:
  """{"and": "land wedge"} as {"land": "and", "wedge": "and"}."""
  return {word: meaning for meaning, words in spellings.items() for word in words.split()}


_JOINERS = _by_spelling({",": ", ;", "and": "and land wedge", "or": "or lor vee"})
_RELATIONS = _by_spelling({
  "=": "= == equiv coloneqq", "!=": "!= =/= /= <> ne neq", "<": "< lt", ">": "> gt",
  "<=": "<= le leq leqslant", ">=": ">= ge geq geqslant", "~": "approx simeq thickapprox",
  "in": "in", "notin": "notin", "subset": "subset subseteq", "not divides": "nmid",
  "perp": "perp", "parallel": "parallel",
})  # fmt: skip
_ARROWS = frozenset(
  "Rightarrow implies iff Leftrightarrow Longrightarrow to rightarrow therefore".split()
)  # fmt: skip
_UNION, _SUM, _PRODUCT, _POWER = range(4)  # operator precedence


class _Operator(NamedTuple):
  level: int
  join: Callable[[Node, Node], Node]


_TIMES = _Operator(_PRODUCT, operator.mul)
_OVER = _Operator(_PRODUCT, operator.truediv)
_ADJACENT = _Operator(_PRODUCT, operator.mul)  # no sign between the factors
_CUP = _Operator(_UNION, functools.partial(tree.SetOperation, "union"))
_MINUS_SET = _Operator(_UNION, functools.partial(tree.SetOperation, "minus"))
_OPERATORS = {
  "cup": _CUP,
  "cap": _Operator(_UNION, functools.partial(tree.SetOperation, "intersection")),
  **dict.fromkeys(("setminus", "backslash"), _MINUS_SET),
  "+": _Operator(_SUM, operator.add),
  "-": _Operator(_SUM, operator.sub),
  "pm": _Operator(_SUM, functools.partial(tree.PlusMinus, "+")),
  "mp": _Operator(_SUM, functools.partial(tree.PlusMinus, "-")),
  **dict.fromkeys(("/", "div"), _OVER),
  **dict.fromkeys(("*", "cdot", "times", "ast", "bullet"), _TIMES),
}
_FUNCTIONS = frozenset(
  "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth log ln lg "
  "exp gcd lcm max min floor ceil abs sqrt cbrt sgn asin acos atan cis".split()
)
_ALIASES = {"ln": "log", "asin": "arcsin", "acos": "arccos", "atan": "arctan"}
_INVERTIBLE = frozenset("sin cos tan cot sec csc".split())
_BRACKET_FUNCTIONS = {"lfloor": "floor", "lceil": "ceil", "lvert": "abs", "lVert": "abs"}
_CONSTANTS = _by_spelling({"pi": "pi", "oo": "infty infinity inf oo Infinity", "e": "e", "i": "i"})
_GREEK = frozenset(
  "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
  "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi "
  "Psi Omega ell hbar angle triangle square star top".split()
)
_DECORATIONS = frozenset(
  "vec hat bar overline overrightarrow tilde dot widehat mathcal mathbb mathfrak mathscr overparen "
  "widetilde".split()
)  # fmt: skip
_CURRENCIES = _by_spelling({"dollar": "dollar", "euro": "euro", "pounds sterling": "pounds pound"})
_CLOSERS = frozenset([")", "]", "}", r"\}", *"rfloor rceil rvert rVert end".split()])
_MATRICES = frozenset("pmatrix bmatrix matrix vmatrix Bmatrix Vmatrix smallmatrix array".split())
_FACTOR_COMMANDS = _FUNCTIONS | _GREEK | _DECORATIONS  # commands that continue a product
_FACTOR_COMMANDS |= frozenset(
  "frac sqrt pi infty infinity binom lfloor lceil lvert emptyset varnothing begin dollar "
  "euro pounds operatorname".split()
)
_NOT_SYMBOLS = frozenset(  # any other unknown command is a symbol
  "oplus otimes circ mod bmod pmod land lor wedge vee neg cup cap setminus end right left choose "
  "over atop iff to rightarrow implies Rightarrow le ge leq geq ne neq in notin subset subseteq "
  "approx equiv sim cong propto mid parallel perp times cdot div ast pm mp text boxed rfloor rceil "
  "rvert rVert input write def catcode".split()
)
_MAX_LETTERS = 3  # adjacent letters that are a product of symbols; more are a word
_ENGLISH = frozenset(
  "the is of we so it to at be are for has was not all any sum its one two six ten day and or no "
  "yes set his her if as by on my he she find that than then this from let when with there "
  "are".split()
)
_UNIT_POWERS = {number(power): power for power in (1, 2, 3)}
_UNIT_POWERS |= {-numeral: -power for numeral, power in _UNIT_POWERS.items()}
_END = Token("end", "")


def parse(text: str) -> Node:
  """Parses an answer.

  Raises:
    Unreadable: the text is outside the grammar.
    TooLarge: the text exceeds a limit of answer_tokens.py, or MAX_DEPTH.
  """
  return Parser(tokens(tidy(text))).answer()


class Parser:
  """Parses the tokens of one answer. Each method parses one rule of the grammar.

  Methods raise Unreadable for tokens outside their rule, and TooLarge beyond MAX_DEPTH.
  """

  def __init__(self, answer_tokens: list[Token]):
    self._tokens = answer_tokens
    self._position = 0
    self._depth = 0
    self._open_bars = 0  # unclosed |: the next bar closes one instead of starting a factor
    self._colon_separates = False  # in {x : x > 1} a colon is not a ratio
    self._currency = None  # of the current operand

  # Tokens

  def peek(self, ahead: int = 0) -> Token:
    """The token at offset `ahead` from the next one, not consumed; _END beyond the last."""
    index = self._position + ahead
    return self._tokens[index] if index < len(self._tokens) else _END

  def next(self) -> Token:
    """Consumes and returns the next token."""
    token = self.peek()
    self._position += 1
    return token

  def at(self, *values: str) -> bool:
    """Whether the next token is one of these operators or commands."""
    token = self.peek()
    return token.kind in ("op", "cmd") and token.value in values

  def take(self, *values: str) -> bool:
    """Consumes the next token if it is one of these; returns whether it was."""
    if self.at(*values):
      self._position += 1
      return True
    return False

  def need(self, *values: str) -> None:
    """Consumes the next token, which must be one of these."""
    if not self.take(*values):
      raise Unreadable(f"expected {' or '.join(values)}")

  def _split(self, index: int, length: int) -> None:
    """Splits the token at an index into two, the first of this length."""
    token = self._tokens[index]
    first = token._replace(value=token.value[:length])
    self._tokens[index : index + 1] = [first, Token(token.kind, token.value[length:])]

  def _signs(self) -> bool:
    """Consumes plus and minus signs; returns whether they negate the value after them."""
    negative = False
    while self.at("+", "-"):
      negative ^= self.next().value == "-"
    return negative

  # Lists and relations

  def answer(self) -> Node:
    """answer: a list, or several lists separated by semicolons: x=1, y=2; x=3, y=4."""
    groups = [self.items(";")]
    while self.take(";"):
      if self.peek() is not _END:
        groups.append(self.items(";"))
    if self.peek() is not _END:
      raise Unreadable(f"unexpected {self.peek().value!r}")
    return groups[0] if len(groups) == 1 else tree.ListValue("and", tuple(groups))

  def items(self, *closers: str) -> Node:
    """A list up to the end or a closing sign, which is not consumed; or its only item."""
    items, joiner = [self.item()], ","
    while True:
      next_joiner = self._joiner(closers)
      if next_joiner is None:
        break
      if self.peek() is _END or self.at(*closers):
        if next_joiner == "or":
          raise Unreadable("unfinished list")
        break
      joiner = max(joiner, next_joiner)  # "," < "and" < "or"
      items.append(self.item())
    return items[0] if len(items) == 1 else tree.ListValue(joiner, tuple(items))

  def _joiner(self, closers: tuple[str, ...]) -> str | None:
    """Consumes the joiner of two items, such as ", and"; returns ",", "and", "or" or None."""
    joiner = None
    while not self.at(*closers):
      token = self.peek()
      word = token.value
      if token.kind in ("text", "word"):
        word = word.lower().strip(" ,;.")
      if token.kind == "text" and not word:
        word = ","
      if word not in _JOINERS or (token.kind == "cmd" and word in ("and", "or")):
        break
      joiner = max(joiner or ",", _JOINERS[word])
      self._position += 1
    return joiner

  def item(self) -> Node:
    """item: an optional label, then operands joined by relations or arrows."""
    self._skip_label()
    self.take("approx", "simeq")
    operands, signs = [self.operand()], []
    while self.peek().kind in ("op", "cmd"):
      sign = self.peek().value
      if sign in _RELATIONS:
        self.next()
        signs.append(_RELATIONS[sign])
        operands.append(self.operand())
      elif sign in _ARROWS and self.peek().kind == "cmd":
        self.next()
        operands, signs = [self.operand()], []
      else:
        break
    if not signs:
      return operands[0]
    if any(isinstance(operand, tree.Text) for operand in operands):
      raise Unreadable("words in a relation")
    return tree.Relation(tuple(operands), tuple(signs))

  def _skip_label(self) -> None:
    r"""Skips a name before its value (\text{Area} = 5, \text{Area: } 5), or a leading `=`."""
    if self.take("="):
      return
    ahead, token = 0, self.peek()
    while token.kind == "text" or (token.kind == "word" and len(token.value) > 2):
      ahead += 1
      ends, token = token.value.endswith(":"), self.peek(ahead)
      if ends and token is not _END:
        self._position += ahead
        return
    if ahead and token.kind == "op" and token.value in ("=", ":"):
      self._position += ahead + 1

  # Operands: words, and values with units

  def operand(self) -> Node:
    """operand: words, or an expression or ratio with an optional unit."""
    outer_currency, self._currency = self._currency, None
    words = self._words_alone()
    if words is not None:
      return words
    value = self._ratio()
    scale = self._scale()
    value = value if scale == 1 else number(scale) * value
    unit = self._unit()
    while unit and unit[0][0].lower() in ("percent", "pct", "percentage"):
      value, unit = Operation("percent", (value,)), unit[1:]
    if self._currency:
      unit = [(self._currency, 1), *unit]
    self._currency = outer_currency
    if unit:
      value = tree.Quantity(value, answer_units.unit(unit))
    if self.take("pmod", "bmod", "mod"):
      value = tree.Modular(value, self.power())
    return value

  def _words_alone(self) -> Node | None:
    """Words that are the whole operand, or None; words of one or two letters are symbols."""
    words = []
    while True:
      token = self.peek(len(words))
      is_word = token.kind in ("text", "word") or (words and token.value in ("-", "'", "."))
      if not is_word or (token.kind == "word" and token.value in ("and", "or")):
        break
      words.append(token.value)
    ends = token is _END or token.value in _JOINERS or token.value in _CLOSERS
    text = " ".join(words)
    is_symbol = text in _FUNCTIONS or text in _CONSTANTS or text in _GREEK
    if not ends or is_symbol or max(map(len, words), default=0) < 2:
      return None
    if len(text) < 3 and text not in ("no", "No"):
      return None
    self._position += len(words)
    return tree.Text(text)

  def _ratio(self) -> Node:
    """An expression, a ratio of expressions, or a time of day."""
    start = self._position
    parts = [self.expression()]
    while not self._colon_separates and self.take(":"):
      parts.append(self.expression())
    if len(parts) == 1:
      return parts[0]
    digits = self._tokens[start : self._position]
    text = "".join(token.value for token in digits if not token.spaced)
    is_time = re.fullmatch("(?:[01]?[0-9]|2[0-4])(?::[0-5][0-9]){1,2}", text)
    if is_time and len(digits) in (3, 5):
      return tree.Clock(tuple(parts))
    return tree.Ratio(tuple(parts))

  def _scale(self) -> int:
    """Consumes the words that multiply a number, as in 7 million; returns their product."""
    scale = 1
    while self.peek().kind in ("text", "word"):
      if self.peek().value.lower() not in answer_units.SCALES:
        break
      scale *= answer_units.SCALES[self.next().value.lower()]
    return scale

  def _unit(self) -> list[tuple[str, int]]:
    """The words after a number as (word, power) pairs.

    Raises Unreadable for words that change the number.
    """
    parts, sign = [], 1
    while True:
      token, after = self.peek(), self.peek(1)
      if token.kind in ("text", "word"):
        word = token.value.strip(",;()")
        if word.lower() in _JOINERS or not word.strip("."):
          return parts
        is_scale = sign > 0 and word.lower() in answer_units.SCALES  # unlike 7 per dozen
        if is_scale or answer_units.changes_number(word):
          raise Unreadable(f"{word!r} changes the number")
        if word in ("per", "/"):
          sign = -1
        else:
          parts += _unit_parts(word, sign)
        self.next()
      elif parts and token.value == "^" and after.kind in ("num", "op"):
        self.next()
        power = _UNIT_POWERS.get(self._exponent())
        if power is None:
          raise Unreadable("unknown power of a unit")
        parts[-1] = (parts[-1][0], parts[-1][1] * power)
      elif parts and token == Token("op", ".", token.spaced):
        self.next()
      elif token.value in ("/", "cdot") and after.kind in ("text", "word"):
        sign = -1 if token.value == "/" else sign
        self.next()
      else:
        return parts

  # Arithmetic

  def expression(self, level: int = _UNION) -> Node:
    """Powers joined by operators of precedence `level` or higher."""
    if level <= _SUM and self.at("pm", "mp"):
      result = number(0)
    elif self.at("+", "-"):
      negative = self._signs()
      result = self.expression(max(level, _PRODUCT))
      result = -result if negative else result
    else:
      result = self.power()
    while True:
      operation = self._operator(result)
      if operation is None or operation.level < level:
        return result
      if operation is not _ADJACENT:
        self.next()
      result = operation.join(result, self.expression(operation.level + 1))

  def _operator(self, left: Node) -> _Operator | None:
    """The operator after a value, not consumed; _ADJACENT if a factor follows; else None."""
    token, after = self.peek(), self.peek(1)
    if token.kind in ("op", "cmd") and token.value in _OPERATORS:
      starts_unit = token.value == "/" and len(after.value) > 1 and _is_unit_word(after)
      return None if starts_unit else _OPERATORS[token.value]
    if token.kind == "word" and token.value == "U" and after.value in ("(", "[", r"\{"):
      return _CUP
    return _ADJACENT if self._starts_factor(left) else None

  def _starts_factor(self, left: Node) -> bool:
    """Whether the next token starts a factor that multiplies `left` without a sign."""
    token = self.peek()
    kind, value = token.kind, token.value
    if kind == "num":
      last = left.operands[-1] if is_operation(left, "mul") else left
      is_power = is_operation(last, "pow") and self.peek(1).value == "^"
      return token.spaced and (is_operation(last, "fact") or is_power)
    if kind in ("word", "text"):
      word = value.lower().strip(" ,;.") if kind == "text" else value
      return word not in ("", "and", "or") and not _is_unit_word(token)
    if kind == "cmd":
      return value in _FACTOR_COMMANDS
    if value == "|":
      return self._open_bars == 0
    return value in ("(", "{", r"\{") or (value == "[" and not isinstance(left, Number))

  def power(self) -> Node:
    """power: an atom with its postfix signs and a right-associative exponent."""
    self._depth += 1
    if self._depth > MAX_DEPTH:
      raise TooLarge("nesting depth")
    result = self._postfix(self.atom())
    if self.take("^"):
      if self.at("'") or (self.at("{") and self.peek(1).value in ("'", "prime")):
        raise Unreadable("prime as an exponent")
      result = self._postfix(Operation("pow", (result, self._exponent())))
    self._depth -= 1
    return result

  def _exponent(self) -> Node:
    negative = self._signs()
    if self.at("{"):
      exponent = self._postfix(self.group())
      if self.take("^"):
        exponent = Operation("pow", (exponent, self._exponent()))
    else:
      exponent = self.power()
    return -exponent if negative else exponent

  def _postfix(self, value: Node) -> Node:
    """A value with the factorials, percent and degree signs, primes and subscripts after it."""
    while True:
      if self.take("!"):
        if self.at("!"):
          raise Unreadable("double factorial")
        value = Operation("fact", (value,))
      elif self.take("%", r"\%"):
        value = Operation("percent", (value,))
      elif self.take("degree", "circ"):
        value = Operation("degree", (value,))
        if self.peek().kind in ("word", "text") and self.peek().value in ("C", "F"):
          self.next()
      elif self.at("'", "prime") and isinstance(value, Symbol):
        self.next()
        value = Symbol(value.name + "'")
      elif self.at(*_CURRENCIES) and self._currency is None and isinstance(value, Number):
        self._currency = _CURRENCIES[self.next().value]
      elif self.at("_") and isinstance(value, Symbol):
        self.next()
        value = Symbol(f"{value.name}_{self.label()}")
      elif self.at("_") and isinstance(value, Number):
        self.next()
        value = _based(value, self.label())
      else:
        return value

  # Atoms

  def atom(self) -> Node:
    """atom: a number, word, command or bracket."""
    token = self.peek()
    if token.kind == "num":
      return self._number()
    if token.kind == "repeating":
      return _repeating(self.next().value)
    if token.kind == "word":
      return self._word()
    if token.kind == "text":
      return self._text()
    if token.kind == "cmd":
      return self._command()
    if token.value in ("(", "[", "]"):
      return self.bracket()
    if token.value == "{":
      return self.group()
    if token.value == r"\{":
      return self.finite_set()
    if token.value in ("|", r"\|"):
      return self._bars()
    raise Unreadable(f"expected a value, not {token.value!r}")

  def _number(self) -> Node:
    """A numeral or mixed number."""
    token = self.next()
    if token.value.isdigit():
      fraction = self._proper_fraction()
      if fraction is not None:
        return number(token.value) + fraction
    if self.at("^") and self.peek(1).kind == "text":
      raise Unreadable("text as an exponent")
    if "." in token.value and self.at("overline", "bar", "dot"):
      raise Unreadable("unknown repeating digits")
    suffix = self.peek()
    if self._currency and not suffix.spaced and suffix.value in answer_units.MONEY_SCALES:
      self.next()
      return number(number(token.value).value * answer_units.MONEY_SCALES[suffix.value])
    return number(token.value)

  def _proper_fraction(self) -> Node | None:
    r"""The fraction of a mixed number (2\frac{3}{5}, 2 3/5); None, without consuming, if none."""
    start, before = self._position, self._tokens.copy()
    if self.at("frac"):
      fraction = self._command()
      above, below = fraction.operands
      numerals = isinstance(above, Number) and isinstance(below, Number)
      if numerals and 0 < above.value < below.value and not self.at("^", "!"):
        return fraction
      self._position, self._tokens = start, before
      return None
    above, slash, below = self.peek(), self.peek(1), self.peek(2)
    numerals = above.kind == below.kind == "num" and above.value.isdigit() and below.value.isdigit()
    if numerals and above.spaced and slash.value == "/" and 0 < int(above.value) < int(below.value):
      self._position += 3
      return number(above.value) / number(below.value)
    return None

  def _word(self) -> Node:
    """A word: a function, constant or Greek letter, or the first symbol of a product."""
    token = self.next()
    word = token.value
    if word in _FUNCTIONS:
      return self._function(word)
    if word in _CONSTANTS:
      return Symbol(_CONSTANTS[word])
    if word in _GREEK:
      return Symbol(word)
    prefix = _function_prefix(word)
    if prefix:
      self._split(self._position - 1, len(prefix))
      return self._function(prefix)
    is_english = word.lower() in _ENGLISH and not (word.isupper() and len(word) > 1)
    if len(word) > _MAX_LETTERS or is_english:
      raise Unreadable(f"unknown word {word[:20]!r}")
    if len(word) > 1:
      self._split(self._position - 1, 1)
    return Symbol(_CONSTANTS.get(word[0], word[0]))

  def _text(self) -> Node:
    """A word of a text command that is a function or a letter."""
    word = self.next().value.strip()
    if word.lower() in _FUNCTIONS:
      return self._function(word.lower())
    if re.fullmatch("[A-Za-z]", word):
      return Symbol(_CONSTANTS.get(word, word))
    raise Unreadable(f"unknown word {word[:20]!r}")

  def _function(self, name: str) -> Node:
    """A function applied to a bracket, or to the factors up to the next function."""
    exponent, base = None, None
    while self.at("^", "_"):
      if self.next().value == "^":
        exponent = self._exponent()
      else:
        base = self._argument()
    if base is not None and name != "log":
      raise Unreadable("function with a subscript")
    if exponent == -number(1) and name in _INVERTIBLE:
      name, exponent = "arc" + name, None
    operands = self._function_operands(name)
    if not operands:
      raise Unreadable("function without an argument")
    first = operands[0]
    if name in ("sqrt", "cbrt"):
      result = tree.root(first, number(2 if name == "sqrt" else 3))
    elif name in ("exp", "cis"):
      result = Operation("pow", (Symbol("e"), first if name == "exp" else Symbol("i") * first))
    elif name == "lg":
      result = Operation("log", (first, number(10)))
    else:
      result = Operation(_ALIASES.get(name, name), operands if base is None else (*operands, base))
    return result if exponent is None else Operation("pow", (result, exponent))

  def _function_operands(self, name: str) -> tuple[Node, ...]:
    if self.at("(", "["):
      inner = self.bracket()
      return inner.items if isinstance(inner, tree.Bracket) else (inner,)
    if self.at("{"):
      inner = self.group()
      return inner.items if isinstance(inner, tree.SetValue) else (inner,)
    negative = self.take("-")
    argument = self.power()
    while self._starts_factor(argument) and name != "sqrt":
      if self.at("(") or self.peek().value in _FUNCTIONS:
        break
      argument *= self.power()
    return (-argument if negative else argument,)

  # Commands and their arguments

  def _command(self) -> Node:
    name = self.next().value
    if name in ("frac", "binom"):
      above = self._argument()
      return Operation("div" if name == "frac" else "binom", (above, self._argument()))
    if name == "sqrt":
      return self._root()
    if name == "begin":
      return self._environment()
    if name in _FUNCTIONS:
      return self._function(name)
    if name in _CONSTANTS:
      return Symbol(_CONSTANTS[name])
    if name in ("angle", "triangle") and self.peek().kind == "word":
      return Symbol(f"{name} {self.next().value}")
    if name in _GREEK:
      return Symbol(name)
    if name in _BRACKET_FUNCTIONS:
      inner = self.items("r" + name[1:])
      self.need("r" + name[1:])
      return Operation(_BRACKET_FUNCTIONS[name], (inner,))
    if name in ("emptyset", "varnothing"):
      return tree.SetValue(())
    if name in ("ldots", "dots", "cdots"):
      return Symbol("...")
    if name in _CURRENCIES:
      if self._currency is not None:
        raise Unreadable("two currencies")
      self._currency = _CURRENCIES[name]
      return -self.atom() if self.take("-") else self.atom()
    if name in _DECORATIONS:
      return self._decorated(name)
    if name in _NOT_SYMBOLS or self.at("{", "["):
      raise Unreadable(f"unsupported command {name[:20]!r}")
    return Symbol(name)  # an unknown command is a symbol

  def _argument(self) -> Node:
    """One argument of a LaTeX command: a group, one digit of a numeral, or a command."""
    if self.at("{"):
      return self.group()
    token = self.peek()
    if token.kind == "num" and token.value.isdigit() and len(token.value) > 1:
      self._split(self._position, 1)
      return number(self.next().value)
    return self.atom()

  def _root(self) -> Node:
    degree = number(2)
    if self.take("["):
      degree = self.expression(_SUM)
      self.need("]")
    radicand = self.group() if self.at("{") else self.atom()
    return tree.root(radicand, degree)

  def _decorated(self, name: str) -> Node:
    r"""A decorated name as a symbol: \vec{v} is "vec v"; but \mathbb{R} is "R"."""
    base = self.label() if self.peek() is not _END else ""
    if not re.fullmatch("[A-Za-z0-9']{1,12}", base):
      raise Unreadable("decoration of something other than a name")
    return Symbol(base if name == "mathbb" else f"{name} {base}")

  def label(self) -> str:
    """The text of a subscript, or of a group that is not a formula."""
    if not self.take("{"):
      token = self.next()
      if token.kind not in ("num", "word", "text", "cmd"):
        raise Unreadable("unsupported subscript")
      return token.value
    parts, depth = [], 1
    while True:
      token = self.next()
      if token is _END:
        raise Unreadable("unclosed subscript")
      depth += (token.value == "{") - (token.value == "}")
      if depth == 0:
        return "".join(parts).strip("()")
      parts.append(token.value)

  # Brackets

  def _enclosed(self, *closers: str, bars: int = 0, colon_separates: bool = False) -> Node:
    """`items` with fresh bar and colon state, so that bars and colons outside have no effect."""
    outer = self._open_bars, self._colon_separates
    self._open_bars, self._colon_separates = bars, colon_separates
    inner = self.items(*closers)
    self._open_bars, self._colon_separates = outer
    return inner

  def bracket(self) -> Node:
    """A group if it has one item, else a tuple or an interval: (...), [...], (...], ]...[."""
    opener = self.next().value
    items = _members(self._enclosed(")", "]", "["))
    closer = self.next().value
    if closer not in (")", "]", "["):
      raise Unreadable("unclosed bracket")
    if opener == "]" or closer == "[":  # ]a,b[
      if len(items) != 2:
        raise Unreadable("reversed bracket")
      opener, closer = opener.replace("]", "("), closer.replace("[", ")")
    if len(items) > 1:
      return tree.Bracket(opener, items, closer)
    if (opener == "(") != (closer == ")"):
      raise Unreadable("mismatched brackets")
    return items[0]

  def group(self) -> Node:
    """{ ... } around a formula, or a list."""
    self.need("{")
    if self.take("}"):
      return tree.SetValue(())
    inner = self._enclosed("}")
    if self.take("choose"):
      inner = Operation("binom", (inner, self._enclosed("}")))
    self.need("}")
    return inner

  def _bars(self) -> Node:
    """|x| or \\|x\\|."""
    bar = self.next().value
    self._open_bars += 1
    inner = self.expression(_SUM)
    self._open_bars -= 1
    self.need(bar)
    return Operation("abs", (inner,))

  def finite_set(self) -> Node:
    r"""\{ ... \}: a finite set, or the condition of a set such as \{x | x > 1\}."""
    self.next()
    if self.take(r"\}"):
      return tree.SetValue(())
    inner = self._enclosed(r"\}", bars=1, colon_separates=True)
    has_condition = self.take("|", ":", "mid")
    if has_condition:
      inner = self._enclosed(r"\}", bars=1, colon_separates=True)
    self.need(r"\}")
    return inner if has_condition else tree.SetValue(_members(inner))

  def _environment(self) -> Node:
    r"""A matrix, or a system of equations as a list; the parser has consumed \begin."""
    name = self.label()
    if name not in _MATRICES and name != "cases":
      raise Unreadable(f"unsupported environment {name[:20]!r}")
    if name == "array":
      self.label()  # column alignment
    read_entry = self.item if name == "cases" else self.operand
    rows = [[read_entry()]]
    while not self.take("end"):
      if self.take("&"):
        rows[-1].append(read_entry())
      elif self.take("\\\\"):
        if not self.at("end"):
          rows.append([read_entry()])
      elif not (name == "cases" and self.take(",")):
        raise Unreadable("unfinished matrix entry")
    if self.label() != name:
      raise Unreadable("unclosed environment")
    if len({len(row) for row in rows}) != 1:
      raise Unreadable("rows of different lengths")
    if name != "cases":
      matrix = tree.Matrix(tuple(map(tuple, rows)))
      return Operation("det", (matrix,)) if name == "vmatrix" else matrix
    if len(rows[0]) > 1:
      raise Unreadable("case with a condition")
    return tree.ListValue("and", tuple(row[0] for row in rows))


def _members(node: Node) -> tuple[Node, ...]:
  return node.items if isinstance(node, tree.ListValue) else (node,)


def _based(numeral: Number, label: str) -> Node:
  is_base = re.fullmatch("[0-9]{1,2}", label) and 2 <= int(label) <= 36
  if numeral.value.denominator != 1 or not is_base:
    raise Unreadable("unsupported base")
  return tree.Based(str(numeral.value), int(label))


def _repeating(decimal: str) -> Node:
  r"""The value of 0.1(6) or 0.1\overline{6}."""
  whole, fixed, repeat = re.fullmatch(r"([0-9]*)\.([0-9]*)[^0-9]+([0-9]+)[^0-9]*", decimal).groups()
  period = Fraction(int(repeat), 10 ** len(repeat) - 1)
  return number((int(whole + fixed or "0") + period) / 10 ** len(fixed))


def _unit_parts(word: str, sign: int) -> list[tuple[str, int]]:
  """(unit, power) pairs of one word: m^2, km/h."""
  base, _, power = word.partition("^")
  if re.search("[0-9]", base):
    raise Unreadable("number in a unit")
  above, *below = base.strip(".").split("/")
  first = (above, sign * (int(power) if power in ("2", "3") else 1))
  return [first, *((part, -1) for part in below)]


def _function_prefix(word: str) -> str | None:
  """The function in a word that also holds its one-letter argument: sinx."""
  return word[:-1] if word[:-1] in _FUNCTIONS else None


def _is_unit_word(token: Token) -> bool:
  """Whether a word after a number is its unit rather than a factor."""
  word = token.value
  if token.kind not in ("text", "word"):
    return False
  if word in ("min", "per"):
    return True
  is_unit = answer_units.unit_of(word) is not None
  if token.kind == "text":
    return word.lower() not in _FUNCTIONS and (len(word) > 1 or is_unit)
  if word in _FUNCTIONS or word in _CONSTANTS or _function_prefix(word):
    return False
  is_long = len(word) > _MAX_LETTERS or (is_unit and len(word) > 1)
  return is_long or answer_units.is_abbreviation(word)
