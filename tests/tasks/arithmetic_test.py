"""The embedded task: its problems, its teacher, its tokenizer, and the rules of a legal step."""

import numpy as np
import transformers
from absl.testing import absltest, parameterized

from synthneg_jax.data.token_text import TokenText, step_ends
from synthneg_jax.grading import answers
from synthneg_jax.runtime import config_schema
from synthneg_jax.tasks import arithmetic, problems

PUZZLE = arithmetic.Puzzle(
  {
    "A": 3,
    "B": 4,
    "C": ("A", "+", "B"),
    "D": ("C", "*", "A"),
    "E": ("B", "-", "A"),
    "F": ("D", "-", "C"),
  },
  "F",
)


def evaluate(text: str) -> int:
  """An independent reading of a prompt: definitions collected by name, the query worked out."""
  tokens, definitions = text.split(), {}
  query = tokens[-1].rstrip("=")
  tokens, at = tokens[:-2], 0
  while at < len(tokens):
    name = tokens[at][:-1]
    definitions[name] = tokens[at + 1]
    at += 2

  def value(name):
    parts = definitions[name]
    if len(parts) == 1:
      return int(parts)
    left, right = value(parts[0]), value(parts[2])
    return (
      left + right if parts[1] == "+" else left - right if parts[1] == "-" else left * right
    ) % 10

  return value(query)


class ArithmeticTest(parameterized.TestCase):
  def test_text_by_hand(self):
    # Fails if a step's operands, values or their order change.
    self.assertEqual(PUZZLE.prompt, " A= 3 B= 4 C: A+B D: C*A E: B-A F: D-C ? F=\n")
    self.assertEqual(PUZZLE.line("D"), " D: C*A C= 7 A= 3 D= 1\n")
    self.assertEqual(PUZZLE.needed("F"), {"C", "D", "F"})

  def test_answers_against_an_independent_reading(self):
    # Fails if the generator's own arithmetic is wrong, or a plain solution holds an illegal step.
    rng = np.random.default_rng(0)
    for _ in range(200):
      puzzle = arithmetic.make_puzzle(rng, 4, 6, (3, 5))
      self.assertBetween(len(puzzle.needed(puzzle.query)), 3, 5)
      solution = arithmetic.teach(rng, puzzle, skip_step_prob=0.0)
      self.assertTrue(answers.grade(solution, str(evaluate(puzzle.prompt))).correct)
      known = set()
      for line in solution.split("\n")[:-1]:
        self.assertEqual(arithmetic.judge_step(puzzle, known, line), "legal")
        known.add(line.split()[0][:-1])
      self.assertEqual(known, puzzle.needed(puzzle.query))

  def test_leaping_teacher_is_right_and_leaps_over_additions_only(self):
    # Fails if the teacher skips other steps, two in one line, or at another rate.
    rng, leaps, places = np.random.default_rng(1), 0, 0
    for _ in range(300):
      puzzle = arithmetic.make_puzzle(rng, 4, 6, (3, 5))
      solution = arithmetic.teach(rng, puzzle, skip_step_prob=0.5)
      self.assertTrue(answers.grade(solution, str(puzzle.value(puzzle.query))).correct)
      written = {line.split()[0][:-1] for line in solution.split("\n")[:-1]}
      silent = puzzle.needed(puzzle.query) - written
      for name in silent:
        left, operator, right = puzzle.definitions[name]
        self.assertEqual(operator, "+")
        self.assertNoCommonElements({left, right}, silent)
      leaps += len(silent)
      places += sum(
        puzzle.definitions[name][1] == "+" for name in puzzle.needed(puzzle.query) - {puzzle.query}
      )
    self.assertBetween(leaps / places, 0.4, 0.5)

  @parameterized.parameters(
    (" C: A+B A= 3 B= 4 C= 7", set(), "legal"),
    (" C: A+B A= 3 B= 4 C= 8", set(), "wrong"),
    (" C: B+A B= 4 A= 3 C= 7", set(), "wrong"),
    (" D: C*A C= 7 A= 3 D= 1", set(), "leap"),
    (" D: C*A C= 7 A= 3 D= 1", {"C"}, "legal"),
    (" D: C*A C= 6 A= 3 D= 8", {"C"}, "wrong"),
    (" A: A+B A= 3 B= 4 A= 7", set(), "wrong"),
    (" D: C*A C= 7 A= 3 D=", {"C"}, "malformed"),
    ("", set(), "malformed"),
  )
  def test_judge_step(self, line, known, verdict):
    # Fails if a rule of legality is dropped.
    self.assertEqual(arithmetic.judge_step(PUZZLE, known, line), verdict)

  def test_tokenizer_round_trip_and_steps(self):
    # Fails if a token's text changes, an unknown word slips in, or a newline is not its own token.
    raw = arithmetic.build_tokenizer()
    text = PUZZLE.prompt + PUZZLE.line("C") + PUZZLE.line("D") + " #### 1"
    ids = raw.encode(text).ids
    self.assertNotIn(raw.token_to_id(arithmetic.PAD), ids)
    fast = transformers.PreTrainedTokenizerFast(
      tokenizer_object=raw, eos_token=arithmetic.EOS, pad_token=arithmetic.PAD
    )
    token_text = TokenText(fast)
    self.assertEqual(token_text.text(ids), text)
    solution = fast.encode(PUZZLE.line("C") + PUZZLE.line("D") + " #### 1") + [fast.eos_token_id]
    self.assertEqual(step_ends(solution, token_text), [9, 18, len(solution)])

  def test_subsets_are_nested_and_splits_differ(self):
    # Fails if a problem depends on the number of problems, or test problems on the seed.
    task = config_schema.default().task
    few, many = problems.load(task, 3, "train", 5), problems.load(task, 3, "train", 9)
    self.assertEqual(few, many[:5])
    self.assertNotEqual(few, problems.load(task, 4, "train", 5))
    self.assertEqual(problems.load(task, 3, "test", 5), problems.load(task, 4, "test", 5))
    self.assertNoCommonElements(
      [p.prompt for p in many], [p.prompt for p in problems.load(task, 3, "test", 9)]
    )


if __name__ == "__main__":
  absltest.main()
