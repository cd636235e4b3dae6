r"""The tree of a written answer: what the grammar reads and the other answer modules compare.

    Number, Symbol            leaves: 3/4; x, x_1, and the CONSTANTS
    Operation                 arithmetic (add, mul, div, pow, neg, fact, binom, percent, degree)
                              and functions; log may have a base; roots are powers
    PlusMinus                 left ± right; `upper` is "+" for \pm and "-" for \mp
    Based, Ratio, Clock       1011_2; 3:2; 10:30, which may also be a ratio
    Quantity, Modular         5 cm; 3 (mod 7)
    Bracket                   (a, b), [a, b), (a, b, c): a tuple or an interval
    SetValue, ListValue       {1, 2}; 1, 2 and 3, where `joiner` is ",", "and" or "or"
    SetOperation              union, intersection or minus
    Matrix, Relation          rows; 1 <= x < 5 has three operands and two signs
    Text, Opaque              words that are the whole answer; text outside the grammar

Nodes are immutable, and equal if they are written alike: 1/2 and 2/4 are different trees of equal
value. Python's operators build trees: a - b is the tree of a plus the negative of b.
"""

import dataclasses
import fractions
from collections.abc import Callable, Iterator

from synthneg_jax.grading.answer_units import Unit

CONSTANTS = frozenset(("pi", "e", "i", "oo"))  # symbols that are not unknowns; oo is infinity
_node = dataclasses.dataclass(frozen=True, slots=True)


@_node
class Node:
  """Base class of all nodes. Their fields hold nodes, tuples of nodes, or plain values."""

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
  """An unknown, or one of CONSTANTS."""

  name: str


@_node
class Operation(Node):
  """Arithmetic, a root or a function of operands."""

  op: str
  operands: tuple[Node, ...]


@_node
class PlusMinus(Node):
  """Two values, left ± right or left ∓ right."""

  upper: str
  left: Node
  right: Node


@_node
class Based(Node):
  """A numeral in a base other than ten."""

  digits: str
  base: int


@_node
class Ratio(Node):
  """a : b, or more parts."""

  parts: tuple[Node, ...]


@_node
class Clock(Ratio):
  """Hours, two digits of minutes, and perhaps of seconds."""


@_node
class Quantity(Node):
  """A value with its unit."""

  value: Node
  unit: Unit


@_node
class Modular(Node):
  """A value modulo another."""

  value: Node
  modulus: Node


@_node
class Bracket(Node):
  """A tuple or an interval."""

  opener: str
  items: tuple[Node, ...]
  closer: str


@_node
class SetValue(Node):
  """A finite set."""

  items: tuple[Node, ...]


@_node
class ListValue(Node):
  """Values side by side, without brackets."""

  joiner: str
  items: tuple[Node, ...]


@_node
class SetOperation(Node):
  """A union, intersection or difference."""

  op: str
  left: Node
  right: Node


@_node
class Matrix(Node):
  """Rows of equal length."""

  rows: tuple[tuple[Node, ...], ...]


@_node
class Relation(Node):
  """Equations and inequalities, as many signs as gaps between operands."""

  operands: tuple[Node, ...]
  signs: tuple[str, ...]


@_node
class Text(Node):
  """Words that are the whole answer."""

  text: str


@_node
class Opaque(Node):
  """Text that the grammar does not read."""

  text: str


INFINITY = Symbol("oo")
_SCALARS = (Number, Symbol, Operation, Based, Ratio, Quantity, Modular)


def is_scalar(node: Node) -> bool:
  """Whether a tree is a single value and not a collection, relation or text."""
  return isinstance(node, _SCALARS)


def is_operation(node: Node, *ops: str) -> bool:
  """Whether a tree is one of these operations."""
  return isinstance(node, Operation) and node.op in ops


def root(radicand: Node, degree: Node) -> Node:
  """A power with the inverse of the degree as its exponent."""
  return Operation("pow", (radicand, number(1) / degree))


def number(value) -> Number:
  """A numeral from anything that Fraction reads."""
  return Number(fractions.Fraction(value))


def _fields(node: Node) -> list:
  return [getattr(node, field) for field in node.__dataclass_fields__]


def children(node: Node) -> list[Node]:
  """The nodes directly within a node, from left to right."""
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
  """A node and all nodes within it, in no order."""
  pending = [node]
  while pending:
    node = pending.pop()
    yield node
    pending += children(node)


def map_children(node: Node, change: Callable[[Node], Node]) -> Node:
  """The node with `change` applied to each node directly within it."""

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
  """The tree with a value in the place of an unknown."""
  if isinstance(node, Symbol):
    return value if node.name == name else node
  return map_children(node, lambda child: substitute(child, name, value))


def infinite_sign(node: Node) -> int:
  """1 for infinity, -1 for minus infinity, 0 for anything else."""
  if is_operation(node, "neg"):
    return -infinite_sign(node.operands[0])
  return int(node == INFINITY)
