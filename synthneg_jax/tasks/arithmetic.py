"""The embedded task: arithmetic modulo 10 over named quantities, with a scripted teacher.

A problem defines leaves (` A= 3`), then operations on earlier names (` K: A*B`), and asks for the
value of one operation (` ? K=`). Arithmetic is modulo 10: 7 + 5 = 2. A solution has one line per
operation, with its definition, the values of its operands and its result, and ends as in GSM8K:

     K: A*B A= 3 B= 4 K= 2
     #### 2

Some operations are irrelevant to the question. The teacher writes the relevant ones in the order of
the problem. With probability `skip_step_prob` it omits the line of an addition and only uses its
result, as capable models skip easy steps. `judge_step` serves diagnosis only, never training.
"""

import dataclasses

import numpy as np
import tokenizers

from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import word_tokenizer
from synthneg_jax.tasks.word_tokenizer import EOS, PAD

CLOCK = 10
NAMES = "ABCDEFGHIJKL"
OPERATORS = "+-*"


@dataclasses.dataclass(frozen=True)
class Puzzle:
  """A problem; `definitions` maps a name (a letter) to a digit or to (left, operator, right)."""

  definitions: dict
  query: str

  @property
  def prompt(self) -> str:
    """The prompt, one line."""
    parts = []
    for name, definition in self.definitions.items():
      is_leaf = isinstance(definition, int)
      parts.append(f" {name}= {definition}" if is_leaf else f" {name}: {''.join(definition)}")
    return "".join(parts) + f" ? {self.query}=\n"

  def value(self, name: str) -> int:
    """The value of a name, 0 to 9."""
    definition = self.definitions[name]
    if isinstance(definition, int):
      return definition
    left, operator, right = definition
    return apply(self.value(left), operator, self.value(right))

  def needed(self, name: str) -> set[str]:
    """The operations that the name's value depends on, including its own."""
    definition = self.definitions[name]
    if isinstance(definition, int):
      return set()
    return {name} | self.needed(definition[0]) | self.needed(definition[2])

  def line(self, name: str) -> str:
    """The correct step for an operation."""
    left, _, right = self.definitions[name]
    values = "".join(f" {each}= {self.value(each)}" for each in (left, right, name))
    return f" {name}: {''.join(self.definitions[name])}{values}\n"


def apply(left: int, operator: str, right: int) -> int:
  """The result of an operation modulo 10."""
  return {"+": left + right, "-": left - right, "*": left * right}[operator] % CLOCK


def make_puzzle(
  rng: np.random.Generator, num_leaves: int, num_operations: int, needed: tuple[int, int]
) -> Puzzle:
  """Draws a problem whose query depends on needed[0]..needed[1] operations, uniformly."""
  wanted = int(rng.integers(needed[0], needed[1] + 1))
  while True:
    names = [str(name) for name in rng.permutation(list(NAMES))[: num_leaves + num_operations]]
    definitions = {name: int(rng.integers(CLOCK)) for name in names[:num_leaves]}
    for i, name in enumerate(names[num_leaves:]):
      left, right = rng.choice(num_leaves + i, size=2, replace=False)
      definitions[name] = (names[left], OPERATORS[rng.integers(len(OPERATORS))], names[right])
    puzzle = Puzzle(definitions, "")
    queries = [name for name in names[num_leaves:] if len(puzzle.needed(name)) == wanted]
    if queries:
      return dataclasses.replace(puzzle, query=queries[rng.integers(len(queries))])


def teach(rng: np.random.Generator, puzzle: Puzzle, skip_step_prob: float) -> str:
  """The teacher's solution; it skips an addition with probability `skip_step_prob`.

  It never skips the queried operation or an operation on a skipped one.
  """
  skipped, lines = set(), []
  needed = puzzle.needed(puzzle.query)
  for name in [name for name in puzzle.definitions if name in needed]:
    left, operator, right = puzzle.definitions[name]
    may_skip = operator == "+" and name != puzzle.query and not {left, right} & skipped
    if may_skip and rng.random() < skip_step_prob:
      skipped.add(name)
    else:
      lines.append(puzzle.line(name))
  return "".join(lines) + f" #### {puzzle.value(puzzle.query)}"


def wander(rng: np.random.Generator, puzzle: Puzzle) -> str:
  """Legal steps without a plan: one or two random operations with their dependencies, no answer.

  Half of the texts follow the order of the problem, half a random legal order, so that the model
  learns to copy a definition from any position.
  """
  operations = [
    name for name, definition in puzzle.definitions.items() if not isinstance(definition, int)
  ]
  goals = rng.choice(operations, size=min(rng.integers(1, 3), len(operations)), replace=False)
  needed = set().union(*(puzzle.needed(str(goal)) for goal in goals))
  rest = [name for name in operations if name in needed]
  shuffled, lines = rng.random() < 0.5, []
  while rest:
    ready = [name for name in rest if not (puzzle.needed(name) - {name}) & set(rest)]
    name = ready[rng.integers(len(ready))] if shuffled else rest[0]
    rest.remove(name)
    lines.append(puzzle.line(name))
  return "".join(lines)


def judge_step(puzzle: Puzzle, known: set[str], line: str) -> str:
  """Classifies a step.

  Args:
    puzzle: the problem.
    known: operations computed in earlier steps.
    line: the step, without its newline.

  Returns:
    "legal" (known operands, correct values), "leap" (correct definition, an operand not yet
    computed), "wrong" (an incorrect value, operand or operator) or "malformed".
  """
  parts = line.split()
  if len(parts) != 8 or not parts[0].endswith(":") or len(parts[1]) != 3:
    return "malformed"
  name, (left, _, right) = parts[0][:-1], parts[1]
  if puzzle.definitions.get(name) != tuple(parts[1]):
    return "wrong"
  if parts[2::2] != [f"{each}=" for each in (left, right, name)]:
    return "wrong"
  for operand in (left, right):
    if not isinstance(puzzle.definitions[operand], int) and operand not in known:
      return "leap"
  return "legal" if parts == puzzle.line(name).split() else "wrong"


def build_tokenizer() -> tokenizers.Tokenizer:
  """Tokens: letters as defined (` K:`) and as valued (` K=`), expressions (` A*B`), digits, marks.

  With these tokens every lookup is one step of attention, which small models can learn.
  """
  words = [PAD, EOS, "\n", " ?", " ####"]
  words += [f" {digit}" for digit in range(CLOCK)]
  words += [f" {name}{kind}" for kind in (":", "=") for name in NAMES]
  words += [f" {a}{operator}{b}" for operator in OPERATORS for a in NAMES for b in NAMES if a != b]
  return word_tokenizer.build(words, r"\n| ?[^ \n]+")


def check(task) -> None:
  """Raises UserError if no problem has the configured numbers of leaves and operations."""
  c = task.arithmetic
  most = len(NAMES) - c.num_leaves
  ordered = 1 <= c.min_needed_ops <= c.max_needed_ops <= c.num_operations <= most
  if c.num_leaves < 2 or not ordered:
    raise UserError(
      f"task.arithmetic.num_leaves={c.num_leaves}, "
      f"task.arithmetic.num_operations={c.num_operations}, "
      f"task.arithmetic.min_needed_ops={c.min_needed_ops}, "
      f"task.arithmetic.max_needed_ops={c.max_needed_ops}: must satisfy num_leaves >= 2, "
      "1 <= min_needed_ops <= max_needed_ops <= num_operations and "
      f"num_leaves + num_operations <= {len(NAMES)}."
    )


def draw(rng: np.random.Generator, task) -> tuple[str, str, str]:
  """Draws a problem: (prompt, teacher's solution, answer)."""
  c = task.arithmetic
  puzzle = make_puzzle(rng, c.num_leaves, c.num_operations, (c.min_needed_ops, c.max_needed_ops))
  return puzzle.prompt, teach(rng, puzzle, c.skip_step_prob), str(puzzle.value(puzzle.query))


def document(rng: np.random.Generator, task, section) -> tuple[str, str, str]:
  """Draws a pretraining document: legal steps without a plan, or a short problem with its solution.

  Problem sizes vary from small to full, since models learn lookups on short contexts first.
  """
  wandering = rng.random() < section.random_step_fraction
  num_leaves = int(rng.integers(2, task.arithmetic.num_leaves + 1))
  num_operations = int(rng.integers(1, task.arithmetic.num_operations + 1))
  most = min(
    task.arithmetic.max_needed_ops if wandering else section.max_answered_ops, num_operations
  )
  puzzle = make_puzzle(rng, num_leaves, num_operations, (1, most))
  text = wander(rng, puzzle) if wandering else teach(rng, puzzle, skip_step_prob=0.0)
  return puzzle.prompt, text, str(puzzle.value(puzzle.query))
