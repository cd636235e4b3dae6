r"""The bracketed parts of a written answer: groups, tuples, intervals, sets, matrices, systems, and labels in braces.

Each function reads one rule from a `Parser` (answer_grammar.py); none computes a value.
"""

from synthneg_jax.grading.answer_tokens import Unreadable
from synthneg_jax.grading.answer_tree import Node

_MATRICES = frozenset("pmatrix bmatrix matrix vmatrix Bmatrix Vmatrix smallmatrix array".split())


def label(parser) -> str:
  """The text of a subscript."""
  if not parser.take("{"):
    token = parser.next()
    if token.kind not in ("num", "word", "text", "cmd"):
      raise Unreadable("a subscript")
    return token.value
  parts, depth = [], 1
  while True:
    token = parser.next()
    if token.kind == "end":
      raise Unreadable("a subscript that does not end")
    depth += (token.value == "{") - (token.value == "}")
    if depth == 0:
      return "".join(parts).strip("()")
    parts.append(token.value)


def bracket(parser) -> Node:
  """( ... ) or [ ... ] or a mixture: one item in matching brackets is a group, several are a tuple or interval."""
  opener = parser.next().value
  bars, parser.bars = parser.bars, 0
  colon, parser.colon_ends = parser.colon_ends, False
  made = parser.items(")", "]", "[")
  parser.bars, parser.colon_ends = bars, colon
  closer = parser.next().value
  if closer not in (")", "]", "["):
    raise Unreadable("a bracket that does not close")
  items = made.args[1] if made.op == "list" else (made,)
  if opener == "]" or closer == "[":
    if len(items) != 2:
      raise Unreadable("a bracket the wrong way round")
    opener, closer = {"]": "("}.get(opener, opener), {"[": ")"}.get(closer, closer)
  if len(items) == 1:
    if (opener == "(") != (closer == ")"):
      raise Unreadable("brackets that do not match")
    return items[0]
  return Node("bracket", (opener, items, closer))


def finite_set(parser) -> Node:
  r"""\{ ... \}: a finite set, or what its condition says."""
  parser.next()
  if parser.take(r"\}", "rbrace"):
    return Node("set", ())
  bars, parser.bars = parser.bars, 1
  colon, parser.colon_ends = parser.colon_ends, True
  made = parser.items(r"\}", "rbrace")
  if parser.take("|", ":") or (made.op == "rel" and made.args[1] == "divides"):
    made = made.args[2] if made.op == "rel" and made.args[1] == "divides" else parser.items(r"\}", "rbrace")
    made = Node("builder", (made,))
  parser.bars, parser.colon_ends = bars, colon
  parser.need(r"\}", "rbrace")
  if made.op == "builder":
    return made.args[0]
  return Node("set", made.args[1] if made.op == "list" else (made,))


def _cases(parser) -> Node:
  """A system of equations, one a line."""
  found = []
  while not parser.take("end"):
    found.append(parser.item())
    parser.take(",")
    if not parser.take("\\\\") and not parser.at("end"):
      raise Unreadable("a case with a condition")
  label(parser)
  return Node("list", ("and", tuple(found)))


def matrix(parser) -> Node:
  """A matrix or list of cases, the parser being behind its \\begin; raises Unreadable for other environments."""
  parser.need("{")
  name = parser.next().value
  parser.need("}")
  if name == "cases":
    return _cases(parser)
  if name not in _MATRICES:
    raise Unreadable(f"the environment {name[:20]!r}")
  if name == "array":
    label(parser)
  rows, row = [], [parser.operand()]
  while True:
    if parser.take("&"):
      row.append(parser.operand())
    elif parser.take("\\\\"):
      rows.append(tuple(row))
      if parser.at("end"):
        break
      row = [parser.operand()]
    else:
      rows.append(tuple(row))
      break
  parser.need("end")
  parser.need("{")
  parser.next()
  parser.need("}")
  if len({len(row) for row in rows}) != 1:
    raise Unreadable("rows of different length")
  made = Node("matrix", tuple(rows))
  return Node("call", ("det", made)) if name == "vmatrix" else made


def group(parser) -> Node:
  """{ ... }: a group, or a set where it holds several items."""
  parser.need("{")
  if parser.take("}"):
    return Node("set", ())
  bars, parser.bars = parser.bars, 0
  made = parser.items("}")
  if parser.take("choose"):
    made = Node("binom", (made, parser.items("}")))
  parser.bars = bars
  parser.need("}")
  return made
