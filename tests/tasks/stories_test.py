"""Story problems: the text, the teacher, judged steps and true pits by hand and by an independent
reading.
"""

import re

import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.data import prompts
from synthneg_jax.grading import answers
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import generated, problems, stories

STORY = stories.Story(
  {
    "Kim": stories.Relation("Ben", "+", 12),
    "Ann": stories.Relation("Kim", "*", 2),
    "Ben": 7,
    "Dan": stories.Relation("Ann", "/", 2),
    "Max": 15,
  },
  ("Ann", "Ben"),
  "marbles",
)
PROMPT = (
  "Kim has 12 more marbles than Ben. Ann has twice as many marbles as Kim. Ben has 7 marbles. "
  "Dan has half as many marbles as Ann. Max has 15 marbles. How many marbles do Ann and Ben have "
  "together?"
)
KIM = "Kim has Ben's 7 + 12 = 19 marbles."
ANN = "Ann has Kim's 19 * 2 = 38 marbles."
SUM = "Together Ann and Ben have 38 + 7 = 45 marbles."


def section(**changes):
  """The config's section task.stories."""
  stories_section = config_schema.default().task.stories
  stories_section.update(changes)
  return stories_section


def drawn(count: int, **changes) -> list[stories.Story]:
  return [
    stories.make_story(np.random.default_rng(seed), section(**changes)) for seed in range(count)
  ]


def solved_by_words(prompt: str) -> int:
  """An independent reading of a prompt: sentences are applied until every quantity is known."""
  *sentences, question = re.findall(r"[A-Z][^.?]*[.?]", prompt)
  known = {}
  while len(known) < len(sentences):
    for sentence in sentences:
      words = sentence.strip(".").split()
      name, last = words[0], words[-1]
      if " than " not in sentence and " as " not in sentence:
        known[name] = int(words[2])
      elif last in known:
        value = known[last]
        number = int(words[2]) if words[2].isdigit() else 2
        more, fewer, half = (word in words for word in ("more", "fewer", "half"))
        known[name] = (
          value + number
          if more
          else value - number
          if fewer
          else value // 2
          if half
          else value * number
        )
  words = question.strip("?").split()
  return known[words[4]] + known[words[6]]


class StoriesTest(parameterized.TestCase):
  def test_text_by_hand(self):
    # Fails if a sentence, an equation or the sum changes.
    self.assertEqual(STORY.prompt, PROMPT)
    self.assertEqual([STORY.derivation("Kim"), STORY.derivation("Ann"), STORY.sum], [KIM, ANN, SUM])
    self.assertEqual(STORY.derivation("Dan"), "Dan has Ann's 38 / 2 = 19 marbles.")
    self.assertEqual(
      (STORY.answer, STORY.needed, STORY.derivations), (45, {"Ann", "Kim", "Ben"}, ["Kim", "Ann"])
    )

  def test_answers_against_an_independent_reading(self):
    # Fails if a relation's sentence and its computation differ.
    for story in drawn(100):
      self.assertEqual(solved_by_words(story.prompt), story.answer, story.prompt)

  @parameterized.parameters(
    {
      "min_people": 3,
      "max_people": 3,
      "min_derivations": 1,
      "max_derivations": 2,
      "max_distractors": 1,
    },
    {
      "min_people": 5,
      "max_people": 7,
      "min_derivations": 3,
      "max_derivations": 4,
      "max_distractors": 1,
    },
    {"largest_value": 20},
  )
  def test_difficulty_is_as_asked(self, **changes):
    # Fails if a story has more people, derivations, distractors or larger numbers than the leaves
    # allow, or always as many.
    wanted, derivations = section(**changes), set()
    for story in drawn(60, **changes):
      self.assertBetween(len(story.quantities), wanted.min_people, wanted.max_people)
      self.assertBetween(len(story.derivations), wanted.min_derivations, wanted.max_derivations)
      self.assertLessEqual(len(story.quantities) - len(story.needed), wanted.max_distractors)
      self.assertTrue(
        all(1 <= story.value(name) <= wanted.largest_value for name in story.quantities)
      )
      derivations.add(len(story.derivations))
    self.assertLen(derivations, wanted.max_derivations - wanted.min_derivations + 1)

  def test_the_teacher_is_right_and_draws_among_all_possible_orders(self):
    # Fails if a solution is wrong, derives what is not needed, or always takes the same order where
    # two are possible.
    rng, orders = np.random.default_rng(0), []
    for story in drawn(60):
      told = {stories.teach(rng, story) for _ in range(10)}
      orders.append(len(told))
      for solution in told:
        self.assertTrue(answers.grade(solution, str(story.answer)).correct)
        lines = solution.split("\n")
        self.assertLen(lines, len(story.derivations) + 2)
        self.assertEqual(stories.true_pit(story, lines), -1)
        known = set()
        for line in lines:
          step = stories.judge_step(story, known, line)
          self.assertEqual(step[1:3], (True, True), line)
          known.add(step.person)
    self.assertGreater(len(set(orders)), 2)

  def test_wandering_is_legal_and_says_no_answer(self):
    # Fails if a base model would read a false step, an answer, or only what is needed.
    rng, needless = np.random.default_rng(2), 0
    for story in drawn(60):
      known = set()
      for line in stories.wander(rng, story).splitlines():
        step = stories.judge_step(story, known, line)
        self.assertEqual(step[:3], ("derivation", True, True))
        known.add(step.person)
      needless += not known <= story.needed
    self.assertGreater(needless, 5)

  @parameterized.parameters(
    (KIM, (), ("derivation", True, True)),
    (ANN, ("Kim",), ("derivation", True, True)),
    (ANN, (), ("derivation", False, True)),  # Kim's quantity was not derived
    ("Kim has Ben's 7 + 12 = 20 marbles.", (), ("derivation", False, False)),
    ("Kim has Ben's 8 + 12 = 19 marbles.", (), ("derivation", False, False)),
    ("Kim has Max's 15 + 12 = 27 marbles.", (), ("derivation", False, False)),
    ("Kim has Max's 15 + 4 = 19 marbles.", (), ("derivation", False, True)),
    ("Kim has Ben's 7 + 12 = 19 coins.", (), ("derivation", False, True)),
    (
      "Max has Ben's 7 + 8 = 15 marbles.",
      (),
      ("derivation", False, True),
    ),  # stated, not to be derived
    ("Max has 15 + 15 = 30 marbles.", (), ("derivation", False, False)),
    ("Tom has Ben's 7 + 12 = 19 marbles.", (), ("derivation", False, False)),
    ("Kim has 7 + 12 = 19 marbles.", (), ("derivation", False, True)),  # does not say from whom
    ("Kim has 7 + 7 = 14 marbles.", (), ("derivation", False, False)),
    ("Together Ann and Ben have 38 - 7 = 45 marbles.", ("Kim", "Ann"), ("sum", False, False)),
    ("Kim has Ben's 7 / 0 = 19 marbles.", (), ("derivation", False, False)),
    (SUM, ("Kim", "Ann"), ("sum", True, True)),
    (SUM, ("Kim",), ("sum", False, True)),
    ("Together Ben and Ann have 7 + 38 = 45 marbles.", ("Kim", "Ann"), ("sum", True, True)),
    ("Together Ann and Ben have 7 + 38 = 45 marbles.", ("Kim", "Ann"), ("sum", False, True)),
    ("Together Ann and Ben have 19 + 7 = 26 marbles.", ("Kim", "Ann"), ("sum", False, False)),
    ("Together Ann and Max have 38 + 7 = 45 marbles.", ("Kim", "Ann"), ("sum", False, True)),
    ("#### 45", ("Kim", "Ann"), ("answer", True, True)),
    ("#### 45", (), ("answer", False, True)),
    ("#### 44", ("Kim", "Ann"), ("answer", False, False)),
    ("Kim has 19 marbles.", (), ("malformed", False, False)),
  )
  def test_judged_step(self, line, known, verdict):
    # Fails if a false number passes, a derivation that was left out goes unseen, or a right number
    # is called wrong.
    self.assertEqual(stories.judge_step(STORY, set(known), line)[:3], verdict)

  @parameterized.parameters(
    ([KIM, ANN, SUM, "#### 45"], -1),
    ([ANN, SUM, "#### 45"], -1),  # a step in the head, and right
    ([KIM, "Ann has Kim's 19 * 2 = 36 marbles.", SUM, "#### 45"], 1),
    (
      [
        "Ann has Ben's 7 * 2 = 14 marbles.",
        "Together Ann and Ben have 14 + 7 = 21 marbles.",
        "#### 21",
      ],
      0,
    ),
    (["Dan has Ann's 38 / 2 = 18 marbles.", KIM, ANN, SUM, "#### 45"], -1),  # Dan does not matter
    ([KIM, ANN, "Together Kim and Ben have 19 + 7 = 26 marbles.", "#### 26"], 2),
    ([KIM, ANN, SUM, "#### 54"], 3),
    ([KIM, "So Ann has 38.", SUM], 1),
    (["Tom has Ben's 7 + 12 = 19 marbles.", KIM], 0),
  )
  def test_true_pit(self, lines, pit):
    # Fails if the pit is a step early or late, or at a distractor.
    self.assertEqual(stories.true_pit(STORY, lines), pit)
    self.assertEqual(stories.is_open(STORY, lines), pit < 0)

  def test_a_prompt_is_read_again(self):
    # Fails if a relation's number or base is lost, or prose passes for a story.
    for story in drawn(60, max_people=9):
      self.assertEqual(stories.read(story.prompt), story)
    for prose in (
      PROMPT.replace("more", "less"),
      PROMPT + " Why?",
      "How many marbles do Ann and Ben have together?!",
    ):
      with self.assertRaisesRegex(ValueError, "tells no story"):
        stories.read(prose)

  def test_the_toy_base_model_reads_plain_prompts(self):
    # Fails if a word of the prompt's form has no token of its own.
    tokenizer = stories.build_tokenizer()
    for story in drawn(40):
      ids = tokenizer.encode(prompts.plain_text(story.prompt)).ids
      self.assertNotIn(tokenizer.token_to_id(stories.PAD), ids)
      self.assertEqual(tokenizer.decode(ids), prompts.plain_text(story.prompt))

  def test_settings_that_no_story_has_are_refused(self):
    # Fails if the check accepts numbers of people for which drawing never ends.
    task = config_schema.default().task
    task.name = "stories"
    for leaf, value in (
      ("min_people", 7),
      ("max_people", 19),
      ("min_derivations", 5),
      ("max_derivations", 6),
    ):
      changed = task.copy_and_resolve_references()
      changed.stories[leaf] = value
      with self.assertRaisesRegex(UserError, f"task.stories.{leaf}={value}"):
        generated.load(changed, 0, "train", 1)
    task.stories.max_people, task.stories.min_people = 2, 2
    task.stories.min_derivations = task.stories.max_derivations = 1
    self.assertLen(generated.load(task, 0, "train", 3), 3)

  def test_chat_and_plain_prompts_and_fresh_problems(self):
    # Fails if stories use the raw prompt style, or fresh problems go to SFT.
    task = config_schema.default().task
    task.name, task.train_problems, task.test_problems = "stories", 5, 3
    self.assertEqual(problems.prompt_style(task), "plain")
    task.prompt = "chat"
    self.assertEqual(problems.prompt_style(task), "chat")
    every = problems.choose_splits(task, 1).train
    task.train_problems, task.fresh_problems = 3, 2
    chosen = problems.choose_splits(task, 1)
    self.assertEqual((chosen.sft, chosen.train), (every[:3], every[3:]))


if __name__ == "__main__":
  absltest.main()
