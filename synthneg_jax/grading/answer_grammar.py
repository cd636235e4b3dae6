r"""The grammar of written answers: tokens to a small tree of our own, which other modules compare.

    answer   = item {("," | ";" | "and" | "or") item}
    item     = operand {relation operand}
    operand  = union [":" union ...] [unit words]
    union    = sum {("\cup" | "\cap" | "\setminus") sum}
    sum      = ["+" | "-" | "±"] product {("+" | "-" | "±") product}
    product  = power {["*" | "/" | ...] power}          left to right: 1/2x is (1/2)x
    power    = atom {"!" | "%" | "°" | "_" label} ["^" power]

A tree is a `Node(op, args)`. Leaves: num (an exact Fraction), sym (a name), text (words). No value is computed here, so
9^9^9 is three leaves. Recursion is at most `MAX_DEPTH` brackets deep.
"""

import re

from synthneg_jax.grading import answer_atoms, answer_units
from synthneg_jax.grading.answer_tokens import Token, TooLarge, Unreadable, tidy, tokens
from synthneg_jax.grading.answer_tree import CONSTANTS, FUNCTIONS, GREEK, Node, num

MAX_DEPTH = 40

_RELATIONS = {
  "=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "le": "<=", "leq": "<=",
  "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=", "neq": "!=",
  "in": "in", "approx": "~", "simeq": "~", "thickapprox": "~", "equiv": "=", "coloneqq": "=", "subset": "subset",
  "subseteq": "subset", "mid": "divides", "nmid": "not divides", "perp": "perp", "parallel": "parallel", "notin": "notin",
}  # fmt: skip
_TIMES = {"*": "*", "cdot": "*", "times": "*", "/": "/", "div": "/", "ast": "*", "bullet": "*"}
_UNIONS = {"cup": "union", "cap": "intersection", "setminus": "minus", "backslash": "minus"}
_CLOSERS = frozenset([")", "]", "}", r"\}", "rfloor", "rceil", "rangle", "rbrace", "rvert", "rVert", "end"])
_ARROWS = frozenset("Rightarrow implies iff Leftrightarrow Longrightarrow to rightarrow therefore".split())
_LISTS = {",": ",", ";": ",", "and": "and", "or": "or", "lor": "or", "land": "and", "vee": "or", "wedge": "and"}

_END = Token("end", "")


class Parser:
  """Recursive descent over the tokens of one answer; every method reads one rule of the grammar above."""

  def __init__(self, found: list[Token]):
    self.tokens, self.place, self.depth, self.bars = found, 0, 0, 0
    self.currency = None
    self.colon_ends = False  # in {x : x > 1} a colon is no ratio

  def peek(self, ahead: int = 0) -> Token:
    """The token `ahead` places on, not taken; the end's where there is none."""
    place = self.place + ahead
    return self.tokens[place] if place < len(self.tokens) else _END

  def next(self) -> Token:
    """Takes a token."""
    token = self.peek()
    self.place += 1
    return token

  def at(self, *values: str) -> bool:
    """True if an operator or command of these comes next."""
    token = self.peek()
    return token.kind in ("op", "cmd") and token.value in values

  def take(self, *values: str) -> bool:
    """Takes the next token if it is one of these; says whether."""
    if self.at(*values):
      self.place += 1
      return True
    return False

  def need(self, *values: str) -> None:
    """Takes the next token, one of these; raises Unreadable if it is another."""
    if not self.take(*values):
      raise Unreadable(f"{' or '.join(values)} wanted")

  def answer(self) -> Node:
    """answer: item, or items between commas or semicolons, and nothing after them; raises Unreadable."""
    made = self._groups() if any(token.value == ";" for token in self.tokens) else self.items()
    if self.peek() is not _END:
      raise Unreadable(f"left over: {self.peek().value!r}")
    return made

  def _groups(self) -> Node:
    """Lists within a list, where semicolons stand between and commas within: x=1, y=2; x=3, y=4."""
    found = [self.items(";")]
    while self.take(";"):
      if self.peek() is not _END:
        found.append(self.items(";"))
    return found[0] if len(found) == 1 else Node("list", ("and", tuple(found)))

  def _joiner(self, closers: tuple[str, ...]) -> str | None:
    """Reads what joins two items of a list, ",", "and" or "or"; None where nothing does."""
    join = None
    while True:
      token = self.peek()
      if self.at(*closers):
        return join
      word = token.value.lower().strip(" ,;.") if token.kind in ("text", "word") else token.value
      if token.kind == "text" and word == "":
        word = ","
      if word not in _LISTS or (token.kind == "cmd" and word in ("and", "or")):
        return join
      join = max(join or ",", _LISTS[word])  # "," < "and" < "or"
      self.place += 1

  def items(self, *closers: str) -> Node:
    """A list up to the end or a closing sign, which is left; one item alone is itself."""
    found, join = [self.item()], ","
    while True:
      more = self._joiner(closers)
      if more is None:
        break
      if self.peek() is _END or self.at(*closers):
        if more == "or":
          raise Unreadable("a list that does not end")
        break
      join = max(join, more)
      found.append(self.item())
    return found[0] if len(found) == 1 else Node("list", (join, tuple(found)))

  def item(self) -> Node:
    """item: a label perhaps, then operands with relations or arrows between them."""
    self._label()
    self.take("approx", "simeq")
    parts = [self.operand()]
    while True:
      token = self.peek()
      if token.kind == "cmd" and token.value in _ARROWS:
        self.place += 1
        parts = [self.operand()]
        continue
      sign = _RELATIONS.get(token.value) if token.kind in ("op", "cmd") else None
      if sign is None:
        break
      self.place += 1
      parts += [sign, self.operand()]
    if len(parts) > 1 and any(part.op == "text" for part in parts[::2]):
      raise Unreadable("words beside a relation")
    return parts[0] if len(parts) == 1 else Node("rel", tuple(parts))

  def _label(self) -> None:
    """Skips a name before its value: \\text{Area} =, or a leading equals sign."""
    if self.take("="):
      return
    ahead = 0
    while self.peek(ahead).kind == "text" or (self.peek(ahead).kind == "word" and len(self.peek(ahead).value) > 2):
      ahead += 1
    token = self.peek(ahead)
    if ahead and token.kind == "op" and token.value in ("=", ":"):
      self.place += ahead + 1

  def operand(self) -> Node:
    """operand: words alone, a union, or a ratio of such, with its unit."""
    outer, self.currency = self.currency, None
    words = self._words_alone()
    if words is not None:
      return words
    start = self.place
    made = self.union()
    if self.at(":") and not self.colon_ends:
      parts = [made]
      while self.take(":"):
        parts.append(self.union())
      made = Node("time" if self._is_time(self.tokens[start : self.place]) else "ratio", tuple(parts))
    unit = self._unit()
    while unit and unit[0][0].lower() in ("percent", "pct", "percentage"):
      made, unit = Node("percent", (made,)), unit[1:]
    currency, self.currency = self.currency, outer
    if unit or currency:
      made = Node("quantity", (made, answer_units.Unit(([(currency, 1)] if currency else []) + unit)))
    if self.take("pmod", "bmod", "mod"):
      made = Node("mod", (made, answer_atoms.power(self)))
    return made

  @staticmethod
  def _is_time(found: list[Token]) -> bool:
    """Whether tokens are hours and two digits of minutes, and of seconds perhaps."""
    text = "".join(token.value for token in found if not token.spaced)
    return re.fullmatch("(?:[01]?[0-9]|2[0-4])(?::[0-5][0-9]){1,2}", text) is not None and len(found) in (3, 5)

  def _words_alone(self) -> Node | None:
    """Words that are the whole operand, as text; one- and two-letter words are symbols."""
    ahead, words = 0, []
    while self.peek(ahead).kind in ("text", "word") or (words and self.peek(ahead).value in ("-", "'", ".")):
      token = self.peek(ahead)
      if token.kind == "word" and token.value in ("and", "or"):
        break
      words.append(token.value)
      ahead += 1
    token = self.peek(ahead)
    ends = token is _END or (token.kind in ("op", "cmd", "word") and (token.value in _LISTS or token.value in _CLOSERS))
    if words and max(map(len, words)) < 2:
      return None  # x - y
    text = " ".join(words)
    if not words or not ends or (len(text) < 3 and not text.isdigit() and text not in ("no", "No")):
      return None
    if (
      text in FUNCTIONS
      or text in CONSTANTS
      or text in GREEK
      or (len(words) == 1 and self.peek().kind == "text" and len(text) < 2)
    ):
      return None
    self.place += ahead
    return Node("text", (text,))

  def _unit(self) -> list[tuple[str, int]]:
    """Reads the words after a number: (word, power). Words that change the number are not read."""
    parts, sign = [], 1
    while True:
      token, after = self.peek(), self.peek(1)
      if token.kind in ("text", "word"):
        if token.value.lower().strip(" ,;.") in _LISTS or not token.value.strip(" ,;."):
          return parts
        if answer_units.changes_number(token.value):
          raise Unreadable(f"{token.value!r} beside a number")
        for word in re.findall(r"[^\s,;()]+", token.value):
          base, _, power = word.partition("^")
          if word in ("per", "/"):
            sign = -1
          elif re.search(r"[0-9]", base):
            raise Unreadable("a number among the words")
          else:
            above, *below = base.strip(".").split("/")
            parts += [(above, sign * (int(power) if power in ("2", "3") else 1))] + [(part, -1) for part in below]
        self.place += 1
      elif parts and token.value == "^" and after.kind in ("num", "op"):
        self.place += 1
        parts[-1] = (parts[-1][0], parts[-1][1] * self._small_power())
      elif parts and token.value == "." and token.kind == "op":
        self.place += 1
      elif token.value in ("/", "cdot") and after.kind in ("text", "word"):
        sign = -1 if token.value == "/" else sign
        self.place += 1
      else:
        return parts

  def _small_power(self) -> int:
    braces = self.take("{")
    sign = -1 if self.take("-") else 1
    token = self.next()
    if token.kind != "num" or token.value not in ("1", "2", "3"):
      raise Unreadable("the power of a unit")
    if braces:
      self.need("}")
    return sign * int(token.value)

  def union(self) -> Node:
    """union: sums with set operators between them."""
    made = self.sum()
    while (self.peek().kind == "cmd" and self.peek().value in _UNIONS) or self._plain_union():
      op = _UNIONS.get(self.next().value, "union")
      made = Node(op, (made, self.sum()))
    return made

  def _plain_union(self) -> bool:
    return self.peek() == Token("word", "U", self.peek().spaced) and self.peek(1).value in ("(", "[", r"\{")

  def sum(self) -> Node:
    """sum: products with signs between them; raises TooLarge where brackets lie too deep."""
    self.depth += 1
    if self.depth > MAX_DEPTH:
      raise TooLarge("brackets within brackets")
    negative, made = False, None
    if self.at("pm", "mp"):
      op = self.next().value
      made = Node(op, (num(0), self.product()))
    else:
      while self.at("+", "-"):
        negative ^= self.next().value == "-"
      made = self.product()
      made = Node("neg", (made,)) if negative else made
    while self.at("+", "-", "pm", "mp"):
      op = self.next().value
      flip = False
      while op in "+-" and self.at("+", "-"):
        flip ^= self.next().value == "-"
      right = self.product()
      if op in ("pm", "mp"):
        made = Node(op, (made, right))
      else:
        made = Node("add", (made, Node("neg", (right,)) if (op == "-") ^ flip else right))
    self.depth -= 1
    return made

  def product(self) -> Node:
    """product: powers with times, over, or nothing between them."""
    made = answer_atoms.power(self)
    while True:
      token = self.peek()
      if token.kind in ("op", "cmd") and token.value in _TIMES:
        if token.value == "/" and self.peek(1).kind in ("text", "word") and len(self.peek(1).value) > 1:
          if answer_atoms.is_unit_word(self.peek(1)):
            return made
        self.place += 1
        negative = False
        while self.at("+", "-"):
          negative ^= self.next().value == "-"
        right = answer_atoms.power(self)
        right = Node("neg", (right,)) if negative else right
        made = Node("div" if _TIMES[token.value] == "/" else "mul", (made, right))
      elif answer_atoms.starts_factor(self, made):
        made = Node("mul", (made, answer_atoms.power(self)))
      else:
        return made


def parse(text: str) -> Node:
  """Reads an answer.

  Raises:
    Unreadable: the text is outside the grammar.
    TooLarge: it is longer or deeper than what is read.
  """
  return Parser(tokens(tidy(text))).answer()
