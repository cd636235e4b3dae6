"""Whether a written answer says what the gold answer says: trees of `answer_grammar` compared by kind.

The conventions, and why, are in docs/grading.md; those on which honest people differ are leaves of `Conventions`.
"""

import re

from synthneg_jax.grading import answer_matrices, answer_relations, answer_scalars, answer_sets, answer_values
from synthneg_jax.grading.answer_relations import label
from synthneg_jax.grading.answer_scalars import Ambiguous, Conventions, is_scalar
from synthneg_jax.grading.answer_tree import Node, num
from synthneg_jax.grading.answer_values import Undefined

MAX_ITEMS = 40  # of a set or list that is compared without order
_NUMBER_WORDS = (
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
  "eighteen nineteen twenty"
).split()
DEFAULT = Conventions()


def same(gold: Node, answer: Node, rules: Conventions = DEFAULT) -> bool:
  """Whether the answer equals the gold answer.

  Raises:
    Ambiguous: it states several values where the gold answer has one.
    Undefined, TooLarge: a value that does not exist or is beyond what is computed.
  """
  if gold == answer:
    return True
  gold, answer = (answer_matrices.gathered(answer_relations.value_of(node)) for node in (gold, answer))
  if gold == answer:
    return True
  several = _collection(answer, rules)
  wanted = _collection(gold, rules)
  if _is_real_set(gold) or _is_real_set(answer):
    found = _as_sets(gold, answer)
    if found is not None:
      return found
  if wanted is not None or several is not None:
    return _collections(gold, answer, wanted, several, rules)
  kinds = {gold.op, answer.op}
  if kinds & {"text", "opaque"}:
    return _texts(gold, answer)
  if "matrix" in kinds or "bracket" in kinds:
    return _tuples(gold, answer, rules)
  if "rel" in kinds:
    return _relations(gold, answer, rules)
  return answer_scalars.same_scalar(gold, answer, rules)


def expand(node: Node) -> list[Node] | None:
  """The two values of an expression with ±, all signs chosen together; None where it has none."""
  if not _has_sign(node):
    return None
  return [_choose(node, 1), _choose(node, -1)]


def _has_sign(node) -> bool:
  if isinstance(node, Node) and node.op in ("pm", "mp"):
    return True
  return isinstance(node, tuple) and any(map(_has_sign, node.args if isinstance(node, Node) else node))


def _choose(node, sign: int):
  if isinstance(node, Node):
    args = tuple(_choose(arg, sign) for arg in node.args)
    if node.op in ("pm", "mp"):
      plus = (sign > 0) == (node.op == "pm")
      return Node("add", (args[0], args[1] if plus else Node("neg", (args[1],))))
    return Node(node.op, args)
  return tuple(_choose(part, sign) for part in node) if isinstance(node, tuple) else node


def _collection(node: Node, rules: Conventions) -> list[Node] | None:
  """The members of a finite collection without order; None for any other tree."""
  found = None
  if node.op == "set":
    found = node.args
  elif node.op == "list":
    found = node.args[1]
  elif node.op == "bracket" and rules.tuples == "unordered":
    found = node.args[1]
  elif node.op == "union" and all(part.op in ("set", "union") for part in node.args):
    found = tuple(item for part in node.args for item in _collection(part, rules) or ())
  if found is None:
    return expand(node)
  members = []
  for item in found:
    members += expand(item) or [item]
  return members


def _is_real_set(node: Node) -> bool:
  if node.op in ("union", "intersection", "minus"):
    return True
  if node.op == "bracket":
    ends = node.args[1]
    return len(ends) == 2 and (
      node.args[0] + node.args[2] in ("[)", "(]") or any(answer_sets._is_infinite(end) for end in ends)
    )
  if node.op == "list":
    return any(_is_real_set(item) for item in node.args[1])
  return node.op == "rel" and any(sign in ("<", ">", "<=", ">=", "!=") for sign in node.args[1::2])


def _as_sets(gold: Node, answer: Node) -> bool | None:
  """Whether both are the same set of reals; None where one of them is none."""
  try:
    left, right = answer_sets.pieces(gold), answer_sets.pieces(answer)
    if left is None or right is None:
      return None
    return answer_sets.equal(left, right)
  except Undefined:
    return None


def _collections(gold: Node, answer: Node, wanted, several, rules: Conventions) -> bool:
  if wanted is None:
    if gold.op == "bracket" and answer.op == "list":
      labels = [label(item) for item in several]
      values = [named[1] if named else item for named, item in zip(labels, several, strict=True)]
      return len(values) == len(gold.args[1]) and all(
        same(a, b, rules) for a, b in zip(gold.args[1], values, strict=True)
      )
    if answer.op == "set" and len(several) == 1:
      return same(gold, several[0], rules)
    if gold.op in ("bracket", "matrix"):
      return False
    named = label(gold)
    if named and _collection(named[1], rules) is not None:
      return same(named[1], answer, rules)
    if len(several) >= 1 and gold.op not in ("text", "opaque"):
      raise Ambiguous("several values")
    return False
  named = label(answer)
  if several is None and named:
    inner = _collection(named[1], rules)
    if inner is not None:
      return same(gold, named[1], rules)
  if several is None:
    if answer.op == "bracket" and gold.op == "list":
      several = list(answer.args[1])
      values = [named[1] if (named := label(item)) else item for item in wanted]
      return len(values) == len(several) and all(same(a, b, rules) for a, b in zip(values, several, strict=True))
    if len(wanted) == 1 and gold.op == "set":
      return same(wanted[0], answer, rules)
    if len(wanted) == 1 or answer.op in ("bracket", "matrix"):
      return False
    several = [answer]
  if gold.op == answer.op == "list" and _in_order(gold, answer, wanted, rules):
    return len(wanted) == len(several) and all(same(a, b, rules) for a, b in zip(wanted, several, strict=True))
  return _unordered(wanted, several, rules)


def _in_order(gold: Node, answer: Node, wanted: list[Node], rules: Conventions) -> bool:
  """Whether the order of a bare list of the gold answer matters."""
  if rules.lists != "auto":
    return rules.lists == "ordered"
  if (
    gold.args[0] != ","
    or answer.args[0] != ","
    or len(wanted) < 3
    or not all(item.op in ("num", "neg", "div", "add") for item in wanted)
  ):
    return False
  values = [answer_values.exact(item) for item in wanted]
  return None not in values and values != sorted(values)


def _unordered(wanted: list[Node], several: list[Node], rules: Conventions) -> bool:
  """Whether two collections hold the same values, however often."""
  if max(len(wanted), len(several)) > MAX_ITEMS:
    raise answer_values.TooLarge("items")
  named, named_too = [label(item) for item in wanted], [label(item) for item in several]
  if all(named) != all(named_too):
    # Names on one side only: distinct names are in order, one name's values in none.
    names = [name for name, _ in (named if all(named) else named_too)]
    wanted = [pair[1] for pair in named] if all(named) else wanted
    several = [pair[1] for pair in named_too] if all(named_too) else several
    if len(set(names)) == len(names) > 1:
      return len(wanted) == len(several) and all(same(a, b, rules) for a, b in zip(wanted, several, strict=True))
  matches = [[_quietly_same(a, b, rules) for b in several] for a in wanted]
  return all(map(any, matches)) and all(any(row[j] for row in matches) for j in range(len(several)))


def _quietly_same(a: Node, b: Node, rules: Conventions) -> bool:
  try:
    return same(a, b, rules)
  except (Ambiguous, Undefined):
    return False


def words(text: str) -> str:
  """Text as it is compared: letters and digits in lower case, without articles."""
  text = re.sub(r"\\[A-Za-z]+|\b(?:the|a|an)\b(?=.* )", " ", text.lower())
  return re.sub(r"[^a-z0-9\u0080-\uffff]+", "", text)


def _texts(gold: Node, answer: Node) -> bool:
  for text, other in ((gold, answer), (answer, gold)):
    if text.op == "text" and is_scalar(other):
      if text.args[0].lower() in _NUMBER_WORDS:
        return _quietly_same(num(_NUMBER_WORDS.index(text.args[0].lower())), other, DEFAULT)
      if other.op == "sym":
        return words(text.args[0]) == words(other.args[0])
  named = label(answer)
  if named:
    return same(gold, named[1])
  sides = [node.args[0] for node in (gold, answer) if node.op in ("text", "opaque")]
  return (
    len(sides) == 2
    and words(sides[0]) == words(sides[1]) != ""
    and ("opaque" not in (gold.op, answer.op) or "".join(sides[0].split()) == "".join(sides[1].split()))
  )


def _entries(node: Node) -> list[list[Node]] | None:
  """Rows of a matrix; a tuple is a column."""
  if node.op == "matrix":
    return [list(row) for row in node.args]
  return [[item] for item in node.args[1]] if node.op == "bracket" else None


def _tuples(gold: Node, answer: Node, rules: Conventions) -> bool:
  named, named_gold = label(answer), label(gold)
  if named or named_gold:
    return same(named_gold[1] if named_gold else gold, named[1] if named else answer, rules)
  if gold.op == answer.op == "bracket" and len(gold.args[1]) == 2:
    if (gold.args[0], gold.args[2]) != (answer.args[0], answer.args[2]):
      return False
  left, right = _entries(gold), _entries(answer)
  if left is None or right is None:
    return False
  if gold.op != answer.op and len(left[0]) > 1 and len(left) == 1:
    left = [[item] for item in left[0]]
  if gold.op != answer.op and len(right[0]) > 1 and len(right) == 1:
    right = [[item] for item in right[0]]
  return [len(row) for row in left] == [len(row) for row in right] and all(
    same(a, b, rules) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
  )


def _relations(gold: Node, answer: Node, rules: Conventions) -> bool:
  if gold.op != "rel":
    return any(same(gold, value, rules) for value in answer_relations.stated(answer, gold))
  named, named_too = label(gold), label(answer)
  if answer.op != "rel":
    values = [named[1]] if named else answer_relations.stated(gold, answer) if "~" in gold.args[1::2] else []
    return any(same(value, answer, rules) for value in values)
  if named and named_too and (named[0] == named_too[0] or _both_functions(gold, answer)):
    return same(named[1], named_too[1], rules)
  if "~" in gold.args[1::2] or "~" in answer.args[1::2]:
    return any(same(value, answer, rules) for value in answer_relations.stated(gold, answer))
  return answer_relations.same_relation(gold, answer)


def _both_functions(gold: Node, answer: Node) -> bool:
  """Whether both give a function: y = 2x and f(x) = 2x."""
  heads = [node.args[0] for node in (gold, answer)]
  return all(map(answer_relations.is_function, heads))


def is_collection(node: Node) -> bool:
  """Whether a gold answer is several values."""
  return _collection(node, DEFAULT) is not None
