"""Equations and inequalities as answers: those that only name a value, and those that are the answer themselves."""

import fractions

from synthneg_jax.grading import answer_values
from synthneg_jax.grading.answer_scalars import Ambiguous, Conventions, is_scalar, same_scalar
from synthneg_jax.grading.answer_tree import Node, num
from synthneg_jax.grading.answer_values import Undefined

_FUNCTION_NAMES = frozenset("f g h F G H P Q T S p q a b r A V".split())
_ORDERED = {"<": (-1, True), "<=": (-1, False), ">": (1, True), ">=": (1, False)}


def _constant(node: Node) -> bool:
  return is_scalar(node) and not answer_values.symbols(node)


def value_of(node: Node) -> Node:
  """A relation that states one constant or set, as that: 2+5 = 7, x in [1,2], a+b = 7; any other tree as it is.

  Raises:
    Ambiguous: its constant sides differ, as in 8 = 7.
  """
  if node.op != "rel":
    return node
  operands, signs = node.args[::2], node.args[1::2]
  if signs == ("in",) and operands[0].op in ("sym", "bracket", "mul", "list") and operands[1].op != "sym":
    return operands[1]
  if set(signs) != {"="}:
    return node
  if not all(map(_constant, operands)):
    return node
  for side in operands[1:]:
    if not same_scalar(operands[0], side, Conventions(percent="fraction")):
      raise Ambiguous("sides that differ")
  return operands[-1]


def stated(node: Node, gold: Node) -> list[Node]:
  """The values that a relation may be said to state where `gold` is one value: x = 5 states 5, a ≈ b states a and b."""
  operands, signs = node.args[::2], node.args[1::2]
  if not set(signs) <= {"=", "~"}:
    return []
  if "~" in signs:
    exact = operands[: signs.index("~") + 1]
    if len(exact) > 1:
      found = stated(Node("rel", node.args[: 2 * len(exact) - 1]), gold)
    elif is_name(exact[0]):
      return list(operands[1:2])
    else:
      found = list(exact)
    return found + [side for side in operands[len(exact) :] if found and _close(found[-1], side)]
  if _constant(gold):
    constants = [operand for operand in operands if _constant(operand)]
    others = [operand for operand in operands if not _constant(operand)]
    return constants[-1:] if others and not any(map(_holds_numeral, others)) else []
  named = label(node)
  if named:
    return [named[1]]
  try:
    if all(is_scalar(o) and answer_values.equal(operands[0], o) for o in operands[1:]):
      return [operands[0]]
  except Undefined:
    pass
  return []


def _holds_numeral(node) -> bool:
  """Whether numerals stand in an expression: a + b = 7 states what a + b is, but 2x = 10 is yet to be solved."""
  if isinstance(node, Node):
    return node.op == "num" or (not is_name(node) and any(map(_holds_numeral, node.args)))
  return isinstance(node, tuple) and any(map(_holds_numeral, node))


def _close(value: Node, approximation: Node) -> bool:
  """Whether two constants lie within 5 % of each other."""
  if not (_constant(value) and _constant(approximation)):
    return False
  digits = answer_values.Digits(30)
  a, b = digits.value(value), digits.value(approximation)
  return abs(a - b) * 20 <= max(abs(a), abs(b))


def label(node: Node) -> tuple[str, Node] | None:
  """(name, value) of an equation that gives a name's value: x = 5, f(x) = 2x, AB = 7; None for any other tree.

  Of several sides after the name the last one is the value: what stands between is how it was come by.
  """
  if node.op != "rel" or set(node.args[1::2]) != {"="}:
    return None
  operands = node.args[::2]
  head, rest = operands[0], operands[1:]
  if not is_name(head):
    if len(operands) != 2 or not is_name(rest[0]) or (is_scalar(head) and answer_values.symbols(head)):
      return None
    head, rest = rest[0], (head,)
  own = answer_values.symbols(head) if head.op == "sym" else frozenset()
  if any(own & symbols_within(value) for value in rest):
    return None
  if head.op == "mul" and not symbols_within(rest[-1]) and not _is_capital(head):
    head = head.args[0]  # f(x) = 5 and f(n) = 5 name the same
  return _spelled(head), rest[-1]


def _spelled(head: Node) -> str:
  """A name as text; a segment and its length, AB and |AB|, are spelled alike."""
  if head.op == "call":
    return _spelled(head.args[1])
  if _is_capital(head) and head.op == "mul":
    return "".join(map(_spelled, head.args))
  return head.args[0].removeprefix("overline ") if head.op == "sym" else repr(head)


def is_function(head: Node) -> bool:
  """Whether a name is y or that of a function of something."""
  return head == Node("sym", ("y",)) or (head.op == "mul" and not _is_capital(head))


def symbols_within(node) -> frozenset[str]:
  """Symbols of a tree of any kind, matrices and lists included."""
  if isinstance(node, Node):
    if node.op == "sym":
      return answer_values.symbols(node)
    node = node.args
  return frozenset().union(*map(symbols_within, node)) if isinstance(node, tuple) else frozenset()


def is_name(node: Node) -> bool:
  """Whether a tree is a symbol, a function of something (f(x)), a segment (AB) or the length of one."""
  if node.op == "sym":
    return node.args[0] not in ("pi", "i", "oo")
  if node.op == "call" and node.args[0] in ("abs", "norm", "det"):
    return is_name(node.args[1])
  if node.op == "bracket":
    return all(item.op == "sym" for item in node.args[1])
  if node.op in ("div", "ratio"):
    return all(map(is_name, node.args))
  if node.op != "mul":
    return False
  left, right = node.args
  left = left.args[0] if left.op == "pow" else left
  if left.op == "sym" and left.args[0].split("_")[0].rstrip("'") in _FUNCTION_NAMES:
    return True
  return _is_capital(left) and _is_capital(right)


def _is_capital(node: Node) -> bool:
  if node.op == "mul":
    return all(map(_is_capital, node.args))
  return node.op == "sym" and len(node.args[0]) == 1 and node.args[0].isupper()


def same_relation(gold: Node, answer: Node) -> bool:
  """Whether two equations or inequalities in several unknowns say the same.

  2x - y = 3 equals 4x = 2y + 6; y > x equals x - y < 0; y = 1/x equals xy = 1.
  """
  if len(gold.args) != 3 or len(answer.args) != 3:
    return False
  (a, sign, b), (c, sign_too, d) = gold.args, answer.args
  if not all(map(is_scalar, (a, b, c, d))):
    return False
  left, right = (Node("add", (x, Node("neg", (y,)))) for x, y in ((a, b), (c, d)))
  if sign == sign_too == "=":
    return _proportional(left, right, positive=False) or _solved(gold, right) or _solved(answer, left)
  if sign == sign_too == "!=":
    return _proportional(left, right, positive=False)
  if sign in _ORDERED and sign_too in _ORDERED:
    (way, strict), (way_too, strict_too) = _ORDERED[sign], _ORDERED[sign_too]
    return strict == strict_too and _proportional(left, right, positive=True, sign=way * way_too)
  return False


def _proportional(left: Node, right: Node, *, positive: bool, sign: int = 1) -> bool:
  """Whether left = c · right for a constant c other than 0, and with the sign asked for if `positive`."""
  names = answer_values.symbols(left)
  if names != answer_values.symbols(right) or not names:
    return False
  for at in (0, 2):
    values = answer_values.Digits(40, at)
    x, y = values.value(left), values.value(right)
    if not x or not y:
      return False
    ratio = values.ctx.re(x / y)
    if positive and ratio * sign < 0:
      return False
    constant = num(_fraction(ratio))
    if answer_values.exact(constant) and answer_values.equal(left, Node("mul", (constant, right))):
      return True
  return False


def _fraction(value):
  """The simplest rational beside a number of 40 digits."""
  man, exp = value.man_exp
  exactly = fractions.Fraction(man) * fractions.Fraction(2) ** exp
  return (-exactly if value < 0 else exactly).limit_denominator(10**6)


def _solved(solution: Node, equation: Node) -> bool:
  """Whether `solution` is y = v, and putting v for y, in which the equation is linear, makes it true."""
  named = label(solution)
  heads = [node for node in solution.args[::2] if node.op == "sym"]
  if not named or not heads or not is_scalar(named[1]):
    return False
  name, value = heads[0].args[0], named[1]
  if name not in answer_values.symbols(equation):
    return False
  at = [substitute(equation, name, Node("add", (value, num(step)))) for step in (-1, 0, 1)]
  bent = Node("add", (Node("add", (at[0], at[2])), Node("mul", (num(-2), at[1]))))
  return (
    answer_values.equal(at[1], num(0)) and answer_values.equal(bent, num(0)) and not answer_values.equal(at[2], num(0))
  )


def substitute(node: Node, name: str, value: Node) -> Node:
  """The tree with a value in the place of a symbol."""
  if node.op == "sym":
    return value if node.args[0] == name else node
  return Node(node.op, tuple(substitute(arg, name, value) if isinstance(arg, Node) else arg for arg in node.args))
