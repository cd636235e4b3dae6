"""The tree of a written answer: what the grammar reads and the other answer modules compare.

Nodes are immutable and equal if they are written alike: 1/2 and 2/4 are different trees of equal value.
"""

import dataclasses
import fractions
from collections.abc import Callable

from synthneg_jax.grading.answer_units import Unit

_node = dataclasses.dataclass(frozen=True, slots=True)
CONSTANTS = frozenset(("pi", "e", "i", "oo"))  # symbols that are not unknowns; oo is infinity


@_node
class Node:
  """Base class of all nodes. Fields of a subclass hold nodes, tuples of nodes, or plain values."""


@_node
class Number(Node):
  """A rational numeral."""

  value: fractions.Fraction


@_node
class Symbol(Node):
  """An unknown, or one of CONSTANTS: x, x_1, pi."""

  name: str


@_node
class Text(Node):
  """Words that are the whole answer."""

  text: str


@_node
class Opaque(Node):
  """Text outside the grammar."""

  text: str


@_node
class Operation(Node):
  """Arithmetic (add, mul, div, pow, neg, root, fact, binom, percent, degree) or a function (sin, log, max, ...).

  root has the operands (radicand, degree); log may have a base as its second operand.
  """

  op: str
  operands: tuple[Node, ...]


@_node
class PlusMinus(Node):
  r"""left ± right; `upper` is "+" for \pm and "-" for \mp."""

  left: Node
  right: Node
  upper: str


@_node
class Based(Node):
  """A numeral with its base as a subscript: 1011_2."""

  digits: str
  base: int


@_node
class Ratio(Node):
  """3:2, 1:2:3."""

  parts: tuple[Node, ...]


@_node
class Clock(Node):
  """A time of day: hours, two digits of minutes, and perhaps of seconds."""

  parts: tuple[Node, ...]


@_node
class Quantity(Node):
  """A value with its unit: 5 cm."""

  value: Node
  unit: Unit


@_node
class Modular(Node):
  r"""3 \pmod 7."""

  value: Node
  modulus: Node


@_node
class Bracket(Node):
  """(a, b), [a, b), (a, b, c): a tuple or an interval; only the other answer can tell which."""

  opener: str
  items: tuple[Node, ...]
  closer: str


@_node
class SetValue(Node):
  """A finite set in braces."""

  items: tuple[Node, ...]


@_node
class ListValue(Node):
  """Several values without brackets; joiner is ",", "and" or "or"."""

  joiner: str
  items: tuple[Node, ...]


@_node
class SetOperation(Node):
  """union, intersection or minus of two sets."""

  op: str
  left: Node
  right: Node


@_node
class Matrix(Node):
  """Rows of equal length."""

  rows: tuple[tuple[Node, ...], ...]


@_node
class Relation(Node):
  """A chain of equations or inequalities: 1 <= x < 5 has three operands and two signs."""

  operands: tuple[Node, ...]
  signs: tuple[str, ...]


INFINITY = Symbol("oo")
_NOT_SCALAR = (
  Text, Opaque, PlusMinus, Bracket, SetValue, ListValue, SetOperation, Matrix, Relation,
)  # fmt: skip


def is_scalar(node: Node) -> bool:
  """Whether a tree is a single value and not a collection, relation or text."""
  return not isinstance(node, _NOT_SCALAR)


def is_operation(node: Node, *ops: str) -> bool:
  """Whether a tree is one of these operations."""
  return isinstance(node, Operation) and node.op in ops


def number(value) -> Number:
  """A numeral from anything that Fraction reads."""
  return Number(fractions.Fraction(value))


def negated(node: Node) -> Node:
  """-node."""
  return Operation("neg", (node,))


def added(left: Node, right: Node) -> Node:
  """left + right."""
  return Operation("add", (left, right))


def subtracted(left: Node, right: Node) -> Node:
  """left - right."""
  return added(left, negated(right))


def multiplied(left: Node, right: Node) -> Node:
  """left · right."""
  return Operation("mul", (left, right))


def divided(left: Node, right: Node) -> Node:
  """left / right."""
  return Operation("div", (left, right))


def children(node: Node) -> list[Node]:
  """The nodes directly within a node, from left to right."""
  return _nodes_in(tuple(getattr(node, name) for name in node.__slots__))


def _nodes_in(field) -> list[Node]:
  if isinstance(field, Node):
    return [field]
  if isinstance(field, tuple):
    return [node for part in field for node in _nodes_in(part)]
  return []


def map_children(node: Node, change: Callable[[Node], Node]) -> Node:
  """The node with `change` applied to each node directly within it."""
  return type(node)(*(_mapped(getattr(node, name), change) for name in node.__slots__))


def _mapped(field, change: Callable[[Node], Node]):
  if isinstance(field, Node):
    return change(field)
  if isinstance(field, tuple):
    return tuple(_mapped(part, change) for part in field)
  return field


def contains(node: Node, predicate: Callable[[Node], bool]) -> bool:
  """Whether a node, or any within it, satisfies a predicate."""
  return predicate(node) or any(contains(child, predicate) for child in children(node))


def symbols(node: Node) -> frozenset[str]:
  """Names of the unknowns of a tree."""
  if isinstance(node, Symbol):
    return frozenset((node.name,)) - CONSTANTS
  return frozenset().union(*map(symbols, children(node)))


def substitute(node: Node, name: str, value: Node) -> Node:
  """The tree with a value in the place of an unknown."""
  if isinstance(node, Symbol):
    return value if node.name == name else node
  return map_children(node, lambda child: substitute(child, name, value))


def infinite_sign(node: Node) -> int:
  """1 for infinity, -1 for minus infinity, 0 for anything else."""
  if node == INFINITY:
    return 1
  return -infinite_sign(node.operands[0]) if is_operation(node, "neg") else 0
