"""Syntax trees of answers: the grammar builds them, the other answer modules compare them.

Nodes are immutable. Two nodes are equal if they have the same structure: 1/2 and 2/4 are different
trees of equal value. Python's operators build trees: a - b is the tree of a plus the negative of b.
"""

import dataclasses
import fractions
from collections.abc import Callable, Iterator

from synthneg_jax.grading.answer_units import Unit

CONSTANTS = frozenset(("pi", "e", "i", "oo"))  # symbols with a fixed value; oo is infinity
_node = dataclasses.dataclass(frozen=True, slots=True)


@_node
class Node:
  """Base class of all nodes; fields hold nodes, (nested) tuples of nodes, or plain values."""

  def __add__(self, other: "Node") -> "Node":
    return Operation("add", (self, other))

  def __neg__(self) -> "Node":
    return Operation("neg", (self,))

  def __sub__(self, other: "Node") -> "Node":
    return self + -other

  def __mul__(self, other: "Node") -> "Node":
    return Operation("mul", (self, other))

  def __truediv__(self, other: "Node") -> "Node":
    return Operation("div", (self, other))


@_node
class Number(Node):
  """A rational number."""

  value: fractions.Fraction


@_node
class Symbol(Node):
  """An unknown (x, x_1), or one of CONSTANTS."""

  name: str


@_node
class Operation(Node):
  """An arithmetic operation (add, mul, div, pow, neg, fact, binom, percent, degree) or a function.

  Roots are powers. "log" has the base as an optional second operand.
  """

  op: str
  operands: tuple[Node, ...]


@_node
class PlusMinus(Node):
  r"""Two values, left ± right; `upper` is "+" for \pm and "-" for \mp."""

  upper: str
  left: Node
  right: Node


@_node
class Based(Node):
  """A numeral with a base: 1011_2."""

  digits: str
  base: int


@_node
class Ratio(Node):
  """A ratio of two or more parts: 3:2."""

  parts: tuple[Node, ...]


@_node
class Clock(Ratio):
  """A time of day, h:mm or h:mm:ss, which may also be a ratio."""


@_node
class Quantity(Node):
  """A value with its unit: 5 cm."""

  value: Node
  unit: Unit


@_node
class Modular(Node):
  """A residue: 3 (mod 7)."""

  value: Node
  modulus: Node


@_node
class Bracket(Node):
  """A tuple or an interval: (a, b), [a, b), (a, b, c)."""

  opener: str
  items: tuple[Node, ...]
  closer: str


@_node
class SetValue(Node):
  """A finite set: {1, 2}."""

  items: tuple[Node, ...]


@_node
class ListValue(Node):
  """Values without brackets: 1, 2 and 3. `joiner` is ",", "and" or "or"."""

  joiner: str
  items: tuple[Node, ...]


@_node
class SetOperation(Node):
  """A "union", "intersection" or "minus" (set difference)."""

  op: str
  left: Node
  right: Node


@_node
class Matrix(Node):
  """Rows of equal length."""

  rows: tuple[tuple[Node, ...], ...]


@_node
class Relation(Node):
  """An equation or inequality; n operands and n - 1 signs, such as 1 <= x < 5."""

  operands: tuple[Node, ...]
  signs: tuple[str, ...]


@_node
class Text(Node):
  """An answer in words."""

  text: str


@_node
class Opaque(Node):
  """Text outside the grammar."""

  text: str


INFINITY = Symbol("oo")
_SCALARS = (Number, Symbol, Operation, Based, Ratio, Quantity, Modular)


def is_scalar(node: Node) -> bool:
  """Whether a tree is a single value, not a collection, relation or text."""
  return isinstance(node, _SCALARS)


def is_operation(node: Node, *ops: str) -> bool:
  """Whether a tree is an Operation of one of these kinds."""
  return isinstance(node, Operation) and node.op in ops


def root(radicand: Node, degree: Node) -> Node:
  """The root of this degree, as a power."""
  return Operation("pow", (radicand, number(1) / degree))


def number(value) -> Number:
  """A Number from anything that Fraction accepts."""
  return Number(fractions.Fraction(value))


def _fields(node: Node) -> list:
  return [getattr(node, field) for field in node.__dataclass_fields__]


def children(node: Node) -> list[Node]:
  """The direct child nodes, from left to right."""
  nodes = []
  pending = _fields(node)[::-1]
  while pending:
    field = pending.pop()
    if isinstance(field, Node):
      nodes.append(field)
    elif isinstance(field, tuple):
      pending += field[::-1]
  return nodes


def walk(node: Node) -> Iterator[Node]:
  """Yields a node and all its descendants, in no particular order."""
  pending = [node]
  while pending:
    node = pending.pop()
    yield node
    pending += children(node)


def map_children(node: Node, change: Callable[[Node], Node]) -> Node:
  """A copy of the node with `change` applied to each child node."""

  def changed(field):
    if isinstance(field, tuple):
      return tuple([changed(part) for part in field])
    return change(field) if isinstance(field, Node) else field

  return type(node)(*map(changed, _fields(node)))


def symbols(node: Node) -> frozenset[str]:
  """Names of the unknowns of a tree."""
  names = {part.name for part in walk(node) if isinstance(part, Symbol)}
  return frozenset(names - CONSTANTS)


def substitute(node: Node, name: str, value: Node) -> Node:
  """The tree with an unknown replaced by a value."""
  if isinstance(node, Symbol):
    return value if node.name == name else node
  return map_children(node, lambda child: substitute(child, name, value))


def infinite_sign(node: Node) -> int:
  """1 for infinity, -1 for minus infinity, 0 for anything else."""
  if is_operation(node, "neg"):
    return -infinite_sign(node.operands[0])
  return int(node == INFINITY)
