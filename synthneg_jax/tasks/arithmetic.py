"""The embedded task: clock arithmetic over named quantities, with a scripted teacher in place of a
capable model.

A problem defines a few leaves (` A= 3`), then operations over what stands before them (` K: A*B`),
and asks for one of these (` ? K=`). Values live on a clock of ten: 7 + 5 = 2. A solution writes one
operation a line, copied, its operands looked up and its result worked out, and ends like GSM8K's:

     K: A*B A= 3 B= 4 K= 2
     #### 2

Some defined operations do not matter for the question. The teacher writes those that do, in the
order of the problem. With probability `skip_step_prob` it does an addition in its head: the line is
left out and only its result is used (capable models skip what is easy for them). The rules that say
what a legal step is serve the diagnosis, never the training.
"""

import dataclasses

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from synthneg_jax.runtime.errors import UserError

CLOCK = 10
NAMES = "ABCDEFGHIJKL"
OPERATORS = "+-*"
EOS, PAD = "<eos>", "<pad>"


@dataclasses.dataclass(frozen=True)
class Puzzle:
  """One problem. Names are letters; `definitions` maps a name to a digit or to (left, operator,
  right).
  """

  definitions: dict
  query: str

  @property
  def prompt(self) -> str:
    """What the model is given, one line."""
    parts = []
    for name, definition in self.definitions.items():
      parts.append(
        f" {name}= {definition}"
        if isinstance(definition, int)
        else f" {name}: {''.join(definition)}"
      )
    return "".join(parts) + f" ? {self.query}=\n"

  def value(self, name: str) -> int:
    """The value of a name, on the clock."""
    definition = self.definitions[name]
    return (
      definition
      if isinstance(definition, int)
      else apply(self.value(definition[0]), definition[1], self.value(definition[2]))
    )

  def needed(self, name: str) -> set[str]:
    """The operations that the name's value rests on, its own included."""
    definition = self.definitions[name]
    if isinstance(definition, int):
      return set()
    return {name} | self.needed(definition[0]) | self.needed(definition[2])

  def line(self, name: str) -> str:
    """The right step for an operation."""
    left, _, right = self.definitions[name]
    values = "".join(f" {each}= {self.value(each)}" for each in (left, right, name))
    return f" {name}: {''.join(self.definitions[name])}{values}\n"


def apply(left: int, operator: str, right: int) -> int:
  """left operator right on the clock of ten."""
  return {"+": left + right, "-": left - right, "*": left * right}[operator] % CLOCK


def make_puzzle(
  rng: np.random.Generator, num_leaves: int, num_operations: int, needed: tuple[int, int]
) -> Puzzle:
  """Draws a problem whose query rests on needed[0]..needed[1] operations (uniformly, as far as
  drawn graphs allow).
  """
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
  """A teacher's solution; with probability `skip_step_prob` an addition that the query does not ask
  for is done silently.

  Never two in one line: an operation over a silent one is written.
  """
  silent, lines = set(), []
  needed = puzzle.needed(puzzle.query)
  for name in [name for name in puzzle.definitions if name in needed]:
    left, operator, right = puzzle.definitions[name]
    if (
      operator == "+"
      and name != puzzle.query
      and not {left, right} & silent
      and rng.random() < skip_step_prob
    ):
      silent.add(name)
    else:
      lines.append(puzzle.line(name))
  return "".join(lines) + f" #### {puzzle.value(puzzle.query)}"


def wander(rng: np.random.Generator, puzzle: Puzzle) -> str:
  """Legal steps without a plan: one or two operations with what they rest on, asked for or not, and
  no answer.

  Half of the texts follow the order of the problem, half a random legal one, so that a step is
  copied from its definition wherever that stands.
  """
  operations = [
    name for name, definition in puzzle.definitions.items() if not isinstance(definition, int)
  ]
  goals = rng.choice(operations, size=min(rng.integers(1, 3), len(operations)), replace=False)
  rest = [
    name
    for name in operations
    if name in set().union(*(puzzle.needed(str(goal)) for goal in goals))
  ]
  shuffled, lines = rng.random() < 0.5, []
  while rest:
    ready = [name for name in rest if not (puzzle.needed(name) - {name}) & set(rest)]
    name = ready[rng.integers(len(ready))] if shuffled else rest[0]
    rest.remove(name)
    lines.append(puzzle.line(name))
  return "".join(lines)


def judge_step(puzzle: Puzzle, known: set[str], line: str) -> str:
  """What a written step is: "legal" (operands known, all values right), "leap" (right definition,
  an operand not yet worked out), "wrong" (a false value, operand or operator), or "malformed".

  Args:
    puzzle: the problem.
    known: operations worked out in the steps before.
    line: one step, without its newline.
  """
  parts = line.split()
  if len(parts) != 8 or not parts[0].endswith(":") or len(parts[1]) != 3:
    return "malformed"
  name, (left, _, right) = parts[0][:-1], parts[1]
  if puzzle.definitions.get(name) != tuple(parts[1]) or parts[2::2] != [
    f"{each}=" for each in (left, right, name)
  ]:
    return "wrong"
  for operand in (left, right):
    if not isinstance(puzzle.definitions[operand], int) and operand not in known:
      return "leap"
  right_line = puzzle.line(name).split()
  return "legal" if parts == right_line else "wrong"


def build_tokenizer() -> tokenizers.Tokenizer:
  """Typed tokens: each letter as defined (` K:`) and as valued (` K=`), each expression (` A*B`),
  digits and marks.

  Text round-trips. With these every lookup is one step of attention; small models hardly learn it
  otherwise.
  """
  words = [PAD, EOS, "\n", " ?", " ####"]
  words += [f" {digit}" for digit in range(CLOCK)]
  words += [f" {name}{kind}" for kind in (":", "=") for name in NAMES]
  words += [f" {a}{operator}{b}" for operator in OPERATORS for a in NAMES for b in NAMES if a != b]
  tokenizer = tokenizers.Tokenizer(
    models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD)
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[^ \n]+"), behavior="isolated")
  tokenizer.decoder = decoders.Fuse()
  tokenizer.add_special_tokens([PAD, EOS])
  return tokenizer


def check(task) -> None:
  """Refuses numbers of leaves and operations that no problem has.

  Raises:
    UserError: names the leaves of the config.
  """
  c = task.arithmetic
  most = len(NAMES) - c.num_leaves
  if not (
    2 <= c.num_leaves and 1 <= c.min_needed_ops <= c.max_needed_ops <= c.num_operations <= most
  ):
    raise UserError(
      f"task.arithmetic.num_leaves={c.num_leaves}, "
      f"task.arithmetic.num_operations={c.num_operations}, "
      f"task.arithmetic.min_needed_ops={c.min_needed_ops}, "
      f"task.arithmetic.max_needed_ops={c.max_needed_ops}: there must be "
      "at least 2 leaves, 1 <= min_needed_ops <= max_needed_ops <= num_operations, and at most "
      f"{len(NAMES)} names in all."
    )


def draw(rng: np.random.Generator, task) -> tuple[str, str, str]:
  """A problem of the config: (prompt, teacher's solution, answer)."""
  c = task.arithmetic
  puzzle = make_puzzle(rng, c.num_leaves, c.num_operations, (c.min_needed_ops, c.max_needed_ops))
  return puzzle.prompt, teach(rng, puzzle, c.skip_step_prob), str(puzzle.value(puzzle.query))


def document(rng: np.random.Generator, task, section) -> tuple[str, str, str]:
  """What the base model reads: legal steps without a plan, or a short problem solved plainly.

  Small problems stand beside full-sized ones: looking up is learned on short contexts first.
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
