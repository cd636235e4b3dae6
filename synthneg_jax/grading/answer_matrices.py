"""Matrices as answers: sums, products and multiples of them, entry by entry; no value is computed here."""

from synthneg_jax.grading.answer_tokens import TooLarge
from synthneg_jax.grading.answer_tree import Node

MAX_ENTRIES = 100


def gathered(node: Node) -> Node:
  """An expression in matrices as one matrix of expressions; any other tree, or one that does not fit, as it is.

  Raises:
    TooLarge: a matrix has more than MAX_ENTRIES.
  """
  if node.op == "matrix" and len(node.args) * len(node.args[0]) > MAX_ENTRIES:
    raise TooLarge("matrix")
  if node.op == "neg":
    inner = gathered(node.args[0])
    return _each(inner, lambda entry: Node("neg", (entry,))) if inner.op == "matrix" else node
  if node.op not in ("add", "mul", "div"):
    return node
  left, right = map(gathered, node.args)
  matrices = (left.op == "matrix", right.op == "matrix")
  if not any(matrices):
    return node
  if node.op == "div":
    return _each(left, lambda entry: Node("div", (entry, right))) if matrices == (True, False) else node
  if node.op == "mul" and not all(matrices):
    scale, matrix = (left, right) if matrices[1] else (right, left)
    return _each(matrix, lambda entry: Node("mul", (scale, entry)))
  if not all(matrices):
    return node
  if node.op == "add":
    if [len(row) for row in left.args] != [len(row) for row in right.args]:
      return node
    rows = zip(left.args, right.args, strict=True)
    return Node("matrix", tuple(tuple(Node("add", pair) for pair in zip(a, b, strict=True)) for a, b in rows))
  if len(left.args[0]) != len(right.args):
    return node
  columns = list(zip(*right.args, strict=True))
  return Node("matrix", tuple(tuple(_dot(row, column) for column in columns) for row in left.args))


def _each(matrix: Node, change) -> Node:
  return Node("matrix", tuple(tuple(change(entry) for entry in row) for row in matrix.args))


def _dot(row, column) -> Node:
  made = None
  for a, b in zip(row, column, strict=True):
    term = Node("mul", (a, b))
    made = term if made is None else Node("add", (made, term))
  return made
