"""Story problems: people have items, in numbers that are stated or relative to another person's.

    Kim has 12 more marbles than Ben. Ann has twice as many marbles as Kim. Ben has 7 marbles.
    Max has 15 marbles. How many marbles do Ann and Ben have together?

Sentences come in any order, and some people are distractors. A solution derives one quantity per
line from a known one, adds the two quantities in question, and ends as in GSM8K:

    Kim has Ben's 7 + 12 = 19 marbles.
    Ann has Kim's 19 * 2 = 38 marbles.
    Together Ann and Ben have 38 + 7 = 45 marbles.
    #### 45

The teacher derives only the quantities that the question depends on, in a random legal order.
`judge_step` decides whether a line is legal and whether its numbers are correct; it serves
diagnosis only, never training.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import word_tokenizer
from synthneg_jax.tasks.word_tokenizer import EOS, PAD

NAMES = (
  *("Adam", "Alice", "Ann", "Ben", "Bob", "Carl", "Dan", "David", "Frank"),
  *("Jack", "Jane", "Kim", "Mark", "Max", "Paul", "Peter", "Sam", "Tom"),
)
ITEMS = (
  *("apples", "balls", "beads", "books", "buttons", "cards", "coins", "cookies", "eggs", "flowers"),
  *("keys", "marbles", "pencils", "photos", "shells", "stamps", "stickers", "stones", "toys"),
)
LARGEST_DIFFERENCE = 20
_MULTIPLES = {2: "twice", 3: "3 times", 4: "4 times", 5: "5 times"}
_RATIOS = {("*", number): words for number, words in _MULTIPLES.items()} | {("/", 2): "half"}
_STATED_SHARE = 0.25  # of the people after the first
_ATTEMPTS = 10_000  # about one story in five has the required number of derivations


@dataclasses.dataclass(frozen=True)
class Relation:
  """A quantity relative to another person's: base operator number, such as Ben's + 12."""

  base: str
  operator: str
  number: int

  def apply(self, value: int) -> int:
    """The quantity if the base has `value`; odd values are halved rounding down."""
    number = self.number
    if self.operator in "+-":
      return value + number if self.operator == "+" else value - number
    return value * number if self.operator == "*" else value // number


@dataclasses.dataclass(frozen=True)
class Story:
  """A problem.

  Attributes:
    quantities: a number or a relation by name, in the order of the sentences.
    asked: the two people whose quantities are added.
    item: the plural of the items that the people have.
  """

  quantities: dict[str, int | Relation]
  asked: tuple[str, str]
  item: str

  @property
  def prompt(self) -> str:
    """The prompt, one line."""
    sentences = [self._sentence(name) for name in self.quantities]
    first, second = self.asked
    return " ".join(sentences) + f" How many {self.item} do {first} and {second} have together?"

  def _sentence(self, name: str) -> str:
    quantity = self.quantities[name]
    if isinstance(quantity, int):
      return f"{name} has {quantity} {self.item}."
    base, operator, number = dataclasses.astuple(quantity)
    if operator in "+-":
      more = "more" if operator == "+" else "fewer"
      return f"{name} has {number} {more} {self.item} than {base}."
    return f"{name} has {_RATIOS[operator, number]} as many {self.item} as {base}."

  @property
  def answer(self) -> int:
    """The sum of the two quantities in question."""
    return sum(self.value(name) for name in self.asked)

  def value(self, name: str) -> int:
    """The quantity of a person."""
    quantity = self.quantities[name]
    return quantity if isinstance(quantity, int) else quantity.apply(self.value(quantity.base))

  def chain(self, name: str) -> list[str]:
    """The person and those whose quantities theirs depends on, ending with a stated one."""
    quantity = self.quantities[name]
    return [name] if isinstance(quantity, int) else [name, *self.chain(quantity.base)]

  @property
  def needed(self) -> set[str]:
    """The people whose quantities the answer depends on."""
    return {name for asked in self.asked for name in self.chain(asked)}

  @property
  def derivations(self) -> list[str]:
    """The people of `needed` whose quantities are not stated, in the order of the sentences."""
    needed = self.needed
    return [
      name
      for name, quantity in self.quantities.items()
      if name in needed and isinstance(quantity, Relation)
    ]

  def derivation(self, name: str) -> str:
    """The correct step that derives a person's quantity, without its newline."""
    relation = self.quantities[name]
    change = f"{self.value(relation.base)} {relation.operator} {relation.number}"
    return f"{name} has {relation.base}'s {change} = {self.value(name)} {self.item}."

  @property
  def sum(self) -> str:
    """The correct step that adds the two quantities in question, without its newline."""
    first, second = self.asked
    equation = f"{self.value(first)} + {self.value(second)} = {self.answer}"
    return f"Together {first} and {second} have {equation} {self.item}."


def make_story(rng: np.random.Generator, section) -> Story:
  """Draws a story by rejection sampling.

  The number of derivations is uniform within the bounds of `section`, the config's task.stories.
  Stories with another number of derivations or too many distractors are rejected.

  Raises:
    UserError: all drawn stories were rejected.
  """
  wanted = int(rng.integers(section.min_derivations, section.max_derivations + 1))
  for _ in range(_ATTEMPTS):
    count = int(rng.integers(max(section.min_people, wanted + 1), section.max_people + 1))
    names = [str(name) for name in rng.permutation(list(NAMES))[:count]]
    quantities, values = {}, {}
    for number, name in enumerate(names):
      if number == 0 or rng.random() < _STATED_SHARE:
        quantities[name] = values[name] = int(rng.integers(1, section.largest_value + 1))
      else:
        base = names[rng.integers(number)]
        quantities[name] = _draw_relation(rng, base, values[base], section.largest_value)
        values[name] = quantities[name].apply(values[base])
    first, second = (str(name) for name in rng.choice(names, size=2, replace=False))
    shuffled = {str(name): quantities[str(name)] for name in rng.permutation(names)}
    story = Story(shuffled, (first, second), ITEMS[rng.integers(len(ITEMS))])
    if len(story.derivations) == wanted and count - len(story.needed) <= section.max_distractors:
      return story
  raise UserError(
    f"task.stories: none of {_ATTEMPTS} drawn stories has {wanted} derivations and at most "
    f"{section.max_distractors} distractors; increase max_people or max_distractors."
  )


def _draw_relation(rng: np.random.Generator, base: str, value: int, largest: int) -> Relation:
  """A relation to a base of this value, with a result in 1..largest; half the time a ratio."""
  room = {"+": largest - value, "-": value - 1}
  differences = [(sign, min(LARGEST_DIFFERENCE, most)) for sign, most in room.items() if most >= 2]
  ratios = [("*", number) for number in _MULTIPLES if value * number <= largest]
  if value % 2 == 0:
    ratios.append(("/", 2))
  if not ratios or (differences and rng.random() < 0.5):
    operator, most = differences[rng.integers(len(differences))]
    return Relation(base, operator, int(rng.integers(2, most + 1)))
  return Relation(base, *ratios[rng.integers(len(ratios))])


def _ready(story: Story, names: Sequence[str], known: set[str]) -> list[str]:
  """The people among `names` whose base is stated or known."""
  available = known | {
    name for name, quantity in story.quantities.items() if isinstance(quantity, int)
  }
  return [name for name in names if story.quantities[name].base in available]


def teach(rng: np.random.Generator, story: Story) -> str:
  """The teacher's solution: draws each derivation among the needed ones that are possible."""
  rest, lines = story.derivations, []
  known: set[str] = set()
  while rest:
    ready = _ready(story, rest, known)
    name = ready[rng.integers(len(ready))]
    rest.remove(name)
    known.add(name)
    lines.append(story.derivation(name))
  return "\n".join([*lines, story.sum, f"#### {story.answer}"])


def wander(rng: np.random.Generator, story: Story) -> str:
  """Some or all derivations, needed or not, in random legal order and without an answer."""
  rest = [name for name, quantity in story.quantities.items() if not isinstance(quantity, int)]
  lines, known = [], set()
  for _ in range(rng.integers(1, len(rest) + 1)):
    ready = _ready(story, rest, known)
    name = ready[rng.integers(len(ready))]
    rest.remove(name)
    known.add(name)
    lines.append(story.derivation(name))
  return "\n".join(lines) + "\n"


_SENTENCE = re.compile(
  r"(\w+) has (\d+|\d+ more|\d+ fewer|twice|\d times|half)( as many)? (\w+)(?: (?:than|as) "
  r"(\w+))?\."
)
_QUESTION = re.compile(r"How many (\w+) do (\w+) and (\w+) have together\?$")
_DERIVATION = re.compile(r"(\w+) has (?:(\w+)'s )?(\d+) ([-+*/]) (\d+) = (-?\d+) (\w+)\.")
_SUM = re.compile(r"Together (\w+) and (\w+) have (\d+) ([-+*/]) (\d+) = (-?\d+) (\w+)\.")
_ANSWER = re.compile(r"#### (-?\d+)")
_OPERATORS = {"more": "+", "fewer": "-", "half": "/", "twice": "*", "times": "*"}


def read(prompt: str) -> Story:
  """Parses a prompt.

  Raises:
    ValueError: it is not a prompt of this task.
  """
  question = _QUESTION.search(prompt)
  quantities: dict[str, int | Relation] = {}
  for name, amount, _, _, base in _SENTENCE.findall(prompt):
    if not base:
      quantities[name] = int(amount)
      continue
    number = next((int(word) for word in amount.split() if word.isdigit()), 2)
    quantities[name] = Relation(base, _OPERATORS[amount.split()[-1]], number)
  if question is None or Story(quantities, question.groups()[1:], question[1]).prompt != prompt:
    raise ValueError(f"{prompt!r} tells no story.")
  return Story(quantities, question.groups()[1:], question[1])


class Step(NamedTuple):
  """The classification of a step.

  Attributes:
    kind: "derivation" (from a person's quantity or a bare number), "sum", "answer" or "malformed".
    legal: whether it follows from the problem and the earlier steps: a derivation applies the
      person's own relation to a known quantity, a sum adds the two quantities in question, both
      known, and an answer repeats the sum.
    value_right: whether its numbers are correct: the quantity that it states, and its equation.
    person: the person whose quantity a derivation states; "" for other steps.
  """

  kind: str
  legal: bool
  value_right: bool
  person: str = ""


def judge_step(story: Story, known: set[str], line: str) -> Step:
  """Classifies a step.

  Args:
    story: the problem.
    known: people whose quantities were derived in earlier steps.
    line: the step, without its newline.
  """
  line = line.strip()

  def is_known(name):
    return name in known or isinstance(story.quantities.get(name), int)

  if match := _DERIVATION.fullmatch(line):
    name, base = match.groups()[:2]
    relation = story.quantities.get(name)
    number_right = name in story.quantities and int(match[6]) == story.value(name)
    written = Relation(base or "", match[4], int(match[5]))
    divides_by_0 = written.operator == "/" and written.number == 0
    holds = not divides_by_0 and written.apply(int(match[3])) == int(match[6])
    legal = isinstance(relation, Relation) and is_known(relation.base)
    return Step(
      "derivation", legal and line == story.derivation(name), number_right and holds, name
    )
  if match := _SUM.fullmatch(line):
    asked = set(match.groups()[:2]) == set(story.asked)
    first, second, total = (int(match[group]) for group in (3, 5, 6))
    right = total == story.answer and match[4] == "+" and first + second == total
    exact = asked and right and first == story.value(match[1]) and match[7] == story.item
    return Step("sum", exact and all(map(is_known, story.asked)), right)
  if match := _ANSWER.fullmatch(line):
    right = int(match[1]) == story.answer
    return Step("answer", right and all(map(is_known, story.asked)), right)
  return Step("malformed", False, False)


def true_pit(story: Story, lines: Sequence[str]) -> int:
  """Index of the first step after which no consistent continuation is correct; -1 if there is none.

  This is the first step with a wrong quantity that the answer depends on, a wrong sum, a wrong
  answer or a malformed line. A distractor's wrong quantity is not a pit, nor is a correct quantity
  whose derivation was skipped.
  """
  known: set[str] = set()
  for number, line in enumerate(lines):
    step = judge_step(story, known, line)
    needless = step.person in story.quantities and step.person not in story.needed
    if not step.value_right and not needless:
      return number
    known.add(step.person)
  return -1


def is_open(story: Story, lines: Sequence[str]) -> bool:
  """Whether some consistent continuation of these lines is correct."""
  return true_pit(story, lines) < 0


def build_tokenizer() -> tokenizers.Tokenizer:
  """Tokens: words with the space before them, single digits, and marks."""
  words = [PAD, EOS, "\n", " ", ".", "?", ":", "'", "s", " +", " -", " *", " /", " =", "####"]
  words += ["Question", "Answer"]
  words += [str(digit) for digit in range(10)] + [" ####"]
  words += [f"{space}{name}" for space in ("", " ") for name in NAMES]
  words += [f" {item}" for item in ITEMS]
  plain = "has have more fewer than as many twice times half do and together"
  words += [f" {word}" for word in plain.split()] + ["How", " How", "Together", " Together"]
  return word_tokenizer.build(words, r"\n| ?[A-Za-z]+| ?[-+*/=]| ?#+|\d| |[^\s\w]")


def check(task) -> None:
  """Raises UserError if no story has the configured numbers of people and derivations."""
  s = task.stories
  people = 2 <= s.min_people <= s.max_people <= len(NAMES)
  derivations = 0 <= s.min_derivations <= s.max_derivations < s.max_people
  if not (people and derivations and s.min_people - s.max_derivations - 2 <= s.max_distractors):
    raise UserError(
      f"task.stories.min_people={s.min_people}, task.stories.max_people={s.max_people}, "
      f"task.stories.min_derivations={s.min_derivations}, "
      f"task.stories.max_derivations={s.max_derivations}, "
      f"task.stories.max_distractors={s.max_distractors}: must satisfy 2 <= min_people <= "
      f"max_people <= {len(NAMES)}, 0 <= min_derivations <= max_derivations < max_people and "
      "max_distractors >= min_people - max_derivations - 2."
    )


def draw(rng: np.random.Generator, task) -> tuple[str, str, str]:
  """Draws a problem: (prompt, teacher's solution, answer)."""
  story = make_story(rng, task.stories)
  return story.prompt, teach(rng, story), str(story.answer)


def document(rng: np.random.Generator, task, section) -> tuple[str, str, str]:
  """Draws a pretraining document: random derivations, or a short problem with its solution."""
  wandering = rng.random() < section.random_step_fraction
  stories = task.stories.copy_and_resolve_references()
  stories.min_derivations = 1
  if not wandering:
    stories.max_derivations = min(section.max_answered_ops, stories.max_derivations)
  stories.max_distractors = stories.max_people
  story = make_story(rng, stories)
  return story.prompt, (wander if wandering else teach)(rng, story), str(story.answer)
