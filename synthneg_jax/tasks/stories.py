"""Story problems: what people have, some of it stated and some defined by what another person has.

    Kim has 12 more marbles than Ben. Ann has twice as many marbles as Kim. Ben has 7 marbles.
    Max has 15 marbles. How many marbles do Ann and Ben have together?

Sentences stand in any order, and some people do not matter for the question. A solution derives one
quantity per line from a quantity that is known by then, adds up the two that are asked for, and
ends like GSM8K's:

    Kim has Ben's 7 + 12 = 19 marbles.
    Ann has Kim's 19 * 2 = 38 marbles.
    Together Ann and Ben have 38 + 7 = 45 marbles.
    #### 45

The teacher derives what the question rests on, in a random order that is possible, and nothing
else. `judge_step` says of every line whether it is legal and whether its numbers are right; these
verdicts serve the diagnosis, never the training.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from synthneg_jax.runtime.errors import UserError

NAMES = (
  *("Adam", "Alice", "Ann", "Ben", "Bob", "Carl", "Dan", "David", "Frank"),
  *("Jack", "Jane", "Kim", "Mark", "Max", "Paul", "Peter", "Sam", "Tom"),
)
ITEMS = (
  *("apples", "balls", "beads", "books", "buttons", "cards", "coins", "cookies", "eggs", "flowers"),
  *("keys", "marbles", "pencils", "photos", "shells", "stamps", "stickers", "stones", "toys"),
)
EOS, PAD = "<eos>", "<pad>"
LARGEST_DIFFERENCE = 20
_MULTIPLES = {2: "twice", 3: "3 times", 4: "4 times", 5: "5 times"}
_RATIOS = {("*", number): words for number, words in _MULTIPLES.items()} | {("/", 2): "half"}
_STATED_SHARE = 0.25  # of the people after the first
_ATTEMPTS = 10_000  # drawn stories, of which one in about five has the wanted number of derivations


@dataclasses.dataclass(frozen=True)
class Relation:
  """A quantity defined by another person's: base operator number, such as Ben's + 12."""

  base: str
  operator: str
  number: int

  def apply(self, value: int) -> int:
    """The quantity, where the base has `value`; a value that cannot be halved is rounded down."""
    number = self.number
    if self.operator in "+-":
      return value + number if self.operator == "+" else value - number
    return value * number if self.operator == "*" else value // number


@dataclasses.dataclass(frozen=True)
class Story:
  """One problem: a number or a relation for each person, in the order of the sentences.

  Attributes:
    quantities: by name.
    asked: the two people whose quantities are added up.
    item: what they have, in the plural.
  """

  quantities: dict[str, int | Relation]
  asked: tuple[str, str]
  item: str

  @property
  def prompt(self) -> str:
    """The problem's text, one line."""
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
    """What the two have together."""
    return sum(self.value(name) for name in self.asked)

  def value(self, name: str) -> int:
    """What a person has."""
    quantity = self.quantities[name]
    return quantity if isinstance(quantity, int) else quantity.apply(self.value(quantity.base))

  def chain(self, name: str) -> list[str]:
    """The person and those whose quantities theirs rests on, the stated one last."""
    quantity = self.quantities[name]
    return [name] if isinstance(quantity, int) else [name, *self.chain(quantity.base)]

  @property
  def needed(self) -> set[str]:
    """The people that the answer rests on."""
    return {name for asked in self.asked for name in self.chain(asked)}

  @property
  def derivations(self) -> list[str]:
    """Those of `needed` whose quantities are not stated, in the order of the sentences."""
    needed = self.needed
    return [
      name
      for name, quantity in self.quantities.items()
      if name in needed and isinstance(quantity, Relation)
    ]

  def derivation(self, name: str) -> str:
    """The right step that derives what a person has, without its newline."""
    relation = self.quantities[name]
    change = f"{self.value(relation.base)} {relation.operator} {relation.number}"
    return f"{name} has {relation.base}'s {change} = {self.value(name)} {self.item}."

  @property
  def sum(self) -> str:
    """The right step that adds up what is asked for, without its newline."""
    first, second = self.asked
    equation = f"{self.value(first)} + {self.value(second)} = {self.answer}"
    return f"Together {first} and {second} have {equation} {self.item}."


def make_story(rng: np.random.Generator, section) -> Story:
  """Draws a story of the config's section task.stories.

  The number of derivations is uniform between the section's bounds; stories are drawn until one has
  it and no more people who do not matter than allowed.

  Raises:
    UserError: no story has what the section asks for.
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
    f"{section.max_distractors} people who do not matter; allow more people, or more who do not "
    "matter."
  )


def _draw_relation(rng: np.random.Generator, base: str, value: int, largest: int) -> Relation:
  """A relation to a base of this value that gives 1..largest; half are sums and differences."""
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
  """Those of the people whose base is stated or known."""
  available = known | {
    name for name, quantity in story.quantities.items() if isinstance(quantity, int)
  }
  return [name for name in names if story.quantities[name].base in available]


def teach(rng: np.random.Generator, story: Story) -> str:
  """The teacher's solution: each next derivation is drawn among those needed that are possible."""
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
  """Possible derivations in any order, needed or not, some or all of them, and no answer."""
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
  """The story that a prompt tells.

  Raises:
    ValueError: it tells none.
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
  """What a written step is.

  Attributes:
    kind: "derivation" (from somebody's quantity or a bare number), "sum", "answer" or "malformed".
    legal: it follows from the problem and the steps before: a derivation is by the person's own
      relation, from a quantity that is stated or was derived; a sum is of the two people asked for,
      both known; an answer repeats the sum.
    value_right: its numbers are right: what it says that somebody has, or that both have, is so,
    and its equation holds.
    person: whose quantity a derivation states; "" for other steps.
  """

  kind: str
  legal: bool
  value_right: bool
  person: str = ""


def judge_step(story: Story, known: set[str], line: str) -> Step:
  """What a written step is, after steps that derived these people's quantities.

  Args:
    story: the problem.
    known: people whose quantities were derived.
    line: one step, without its newline.
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
  """The first step after which a consistent solution cannot come out right, from 0; -1 for none.

  That is the first that states a wrong quantity of somebody the answer rests on, a wrong sum or a
  wrong answer, or is malformed. A wrong quantity of somebody who does not matter is no pit, nor is
  a right number whose derivation was left out.
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
  """Whether a consistent solution that begins with these lines can still come out right."""
  return true_pit(story, lines) < 0


def build_tokenizer() -> tokenizers.Tokenizer:
  """Words with the space before them, digits one by one, and marks, for base models of this task.

  Text round-trips.
  """
  words = [PAD, EOS, "\n", " ", ".", "?", ":", "'", "s", " +", " -", " *", " /", " =", "####"]
  words += ["Question", "Answer"]
  words += [str(digit) for digit in range(10)] + [" ####"]
  words += [f"{space}{name}" for space in ("", " ") for name in NAMES]
  words += [f" {item}" for item in ITEMS]
  plain = "has have more fewer than as many twice times half do and together"
  words += [f" {word}" for word in plain.split()] + ["How", " How", "Together", " Together"]
  vocabulary = {word: i for i, word in enumerate(words)}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
  split = Regex(r"\n| ?[A-Za-z]+| ?[-+*/=]| ?#+|\d| |[^\s\w]")
  tokenizer.pre_tokenizer = pre_tokenizers.Split(split, behavior="isolated")
  tokenizer.decoder = decoders.Fuse()
  tokenizer.add_special_tokens([PAD, EOS])
  return tokenizer


def check(task) -> None:
  """Refuses numbers of people and derivations that no story has.

  Raises:
    UserError: names the leaves.
  """
  s = task.stories
  people = 2 <= s.min_people <= s.max_people <= len(NAMES)
  derivations = 0 <= s.min_derivations <= s.max_derivations < s.max_people
  if not (people and derivations and s.min_people - s.max_derivations - 2 <= s.max_distractors):
    raise UserError(
      f"task.stories.min_people={s.min_people}, task.stories.max_people={s.max_people}, "
      f"task.stories.min_derivations={s.min_derivations}, "
      f"task.stories.max_derivations={s.max_derivations}, "
      f"task.stories.max_distractors={s.max_distractors}: there must be 2 <= min_people <= "
      "max_people <= "
      f"{len(NAMES)}, min_derivations <= max_derivations < max_people, and max_distractors of at "
      "least "
      "min_people - max_derivations - 2."
    )


def draw(rng: np.random.Generator, task) -> tuple[str, str, str]:
  """A problem of the config: (prompt, teacher's solution, answer)."""
  story = make_story(rng, task.stories)
  return story.prompt, teach(rng, story), str(story.answer)


def document(rng: np.random.Generator, task, section) -> tuple[str, str, str]:
  """What a base model of this task reads: derivations without a plan, or a short problem solved."""
  wandering = rng.random() < section.random_step_fraction
  stories = task.stories.copy_and_resolve_references()
  stories.min_derivations = 1
  if not wandering:
    stories.max_derivations = min(section.max_answered_ops, stories.max_derivations)
  stories.max_distractors = stories.max_people
  story = make_story(rng, stories)
  return story.prompt, (wander if wandering else teach)(rng, story), str(story.answer)
