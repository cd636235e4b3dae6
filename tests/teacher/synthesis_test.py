"""Parsing a capable model's replies, and selecting problems."""

import collections
import pathlib
import tempfile

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from synthneg_jax.core import selection
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import arithmetic
from synthneg_jax.teacher import scripted, synthesis


class TemplatesTest(parameterized.TestCase):
  @parameterized.parameters("gsm8k", "math", "arithmetic")
  def test_shipped_prompts_are_filled_in(self, name):
    # Fails if a placeholder remains, or a seed or problem is lost.
    templates = synthesis.Templates.read(f"configs/prompts/{name}")
    asked = templates.ask_problems(["First {count}.", "Second."], 7)
    self.assertEqual(synthesis.read_problems(asked, raw=False)[:2], ["First {count}.", "Second."])
    self.assertIn("Write 7 new problems", asked)
    solution = templates.ask_solution("What is {problem}?")
    self.assertIn("<problem>\nWhat is {problem}?", solution)

  def test_broken_folders(self):
    # Fails if a template without its placeholder passes, so that a thousand prompts lack the
    # problem.
    folder = pathlib.Path(tempfile.mkdtemp())
    with self.assertRaisesRegex(UserError, "not_there"):
      synthesis.Templates.read("not_there")
    with self.assertRaisesRegex(UserError, "problems.txt does not exist"):
      synthesis.Templates.read(str(folder))
    (folder / "problems.txt").write_text("{seeds} {count}")
    (folder / "solution.txt").write_text("Solve it.")
    with self.assertRaisesRegex(UserError, "solution.txt does not contain {problem}"):
      synthesis.Templates.read(str(folder))


class ReadTest(parameterized.TestCase):
  def test_problems(self):
    # Fails if other text counts as a problem, an unclosed tag runs on, or significant spaces are
    # lost.
    reply = (
      "Sure!\n<problem>\n A= 3 ? A=\n</problem>\n2. <problem>Two\nlines?</problem> "
      "<problem> </problem> <problem>cut"
    )
    self.assertEqual(synthesis.read_problems(reply, raw=True), [" A= 3 ? A=\n", "Two\nlines?"])
    self.assertEqual(synthesis.read_problems(reply, raw=False), ["A= 3 ? A=", "Two\nlines?"])
    thought = "<think><problem>A draft</problem></think>"
    self.assertEqual(
      synthesis.read_problems(thought + reply, raw=False), ["A= 3 ? A=", "Two\nlines?"]
    )

  @parameterized.parameters(
    (
      "Half of 8 is 4.\n\n4 + 1 = 5  \n#### 5\nHope that helps!",
      ("Half of 8 is 4.\n4 + 1 = 5\n#### 5", "5"),
    ),
    ("1 + 1 = 2\n**#### 2**", ("1 + 1 = 2\n#### 2", "2")),
    ("3 * 400 = 1200\n####1,200", ("3 * 400 = 1200\n#### 1,200", "1200")),
    ("#### unsolvable", None),
    ("The answer is 5.", None),
    ("#### 5\nNo, wait.\n#### 6", None),
    (
      "<think>\nMaybe 6.\n#### 6\n</think>\n\n2 + 3 = 5\n#### 5<|im_end|>",
      ("2 + 3 = 5\n#### 5", "5"),
    ),
    ("Maybe 6.\n#### 6\n</think>\n2 + 3 = 5\n#### 5", ("2 + 3 = 5\n#### 5", "5")),
    ("<think>\nMaybe 6.\n#### 6", None),
  )
  def test_solutions(self, reply, expected):
    # Fails if steps and lines differ, text after the answer or a thought is kept, or a hedge counts
    # as an answer.
    self.assertEqual(synthesis.read_solution(reply, raw=False), expected)

  @parameterized.parameters(
    (
      "By parts,\n\n$x = \\boxed{\\frac{1}{2}}$.\nI hope so.",
      ("By parts,\n$x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
    ),
    ("So\n\\[\n\\boxed{7}\n\\]\nDone.", ("So\n\\[\n\\boxed{7}\n\\]", "7")),
    ("So \\boxed{7", None),
    ("So $$\\boxed{a\n\nb}$$\nDone.", ("So $$\\boxed{a\nb}$$", "a\n\nb")),
    ("$\\boxed{2}$ and $\\boxed{3}$.\n", ("$\\boxed{2}$ and $\\boxed{3}$.", "2, 3")),
    ("<think>Is it \\boxed{8}?\n</think>So \\boxed{7}", ("So \\boxed{7}", "7")),
    ("It is 7.", None),
  )
  def test_boxed_solutions(self, reply, expected):
    # Fails if braces are cut, text after the answer is kept, or a formula stays open.
    self.assertEqual(synthesis.read_solution(reply, raw=False, kind="math"), expected)

  def test_the_embedded_task_keeps_its_spaces(self):
    # Fails if anything is trimmed: the tokenizer has " A=" but not "A=".
    text = " K: A*B A= 3 B= 4 K= 2\n #### 2"
    self.assertEqual(synthesis.read_solution(text, raw=True), (text, "2"))


class VoteTest(parameterized.TestCase):
  def test_majority(self):
    # Fails if draws without an answer do not count against it, ties are broken by value, or another
    # draw's solution is used.
    a, b = ("x\n#### 1", "1"), ("x\ny\n#### 2", "2")
    self.assertEqual(synthesis.vote([a, b, None, b]), synthesis.Vote("2", 0.5, 1, 3))
    self.assertEqual(synthesis.vote([b, a]), synthesis.Vote("2", 0.5, 0, 3))
    self.assertIsNone(synthesis.vote([None, None]))

  def test_forms_of_one_answer_vote_together(self):
    # Fails if 1/2 and 0.5 are different answers.
    draws = [("#### 3", "3"), ("#### 1/2", "1/2"), ("#### 0.5", "0.5")]
    self.assertEqual(synthesis.vote(draws), synthesis.Vote("1/2", 2 / 3, 1, 1))
    self.assertEqual(synthesis.vote(draws[:2], gold="1.50/3").chosen, 1)

  @pytest.mark.slow  # grades in worker processes
  def test_forms_of_a_formula_vote_together(self):
    # Fails if boxed answers are compared as text.
    draws = [("x", "2"), ("x", "\\frac{1}{2}"), ("x", "0.5"), ("x", "\\dfrac12")]
    self.assertEqual(synthesis.vote(draws, kind="math"), synthesis.Vote("\\frac{1}{2}", 0.75, 1, 1))

  def test_known_answer(self):
    # Fails if the majority overrules a known answer.
    a, b = ("#### 1", "1"), ("#### 2", "2")
    self.assertEqual(synthesis.vote([b, b, a], gold="1"), synthesis.Vote("1", 1 / 3, 2, 1))
    self.assertIsNone(synthesis.vote([b, b], gold="1"))


class ChoiceTest(parameterized.TestCase):
  def test_near_duplicates_are_those_of_core(self):
    # Fails if the incremental filter keeps other texts than the batch one.
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc"), size=rng.integers(4, 12))) for _ in range(200)]
    texts += [text[:at] + "x" + text[at + 1 :] for text in texts for at in (0, 2)] + ["", "a"]
    for threshold in (0.0, 0.25, 0.5):
      far = synthesis.NearDuplicates(threshold)
      kept = [i for i, text in enumerate(texts) if far.add(text)]
      self.assertEqual(kept, selection.deduplicate_by_edit_distance(texts, threshold))
      self.assertNotEmpty(kept)
      self.assertLess(len(kept), len(texts))

  def test_balance(self):
    # Fails if frequent difficulties displace rare ones, or the first items of a difficulty are not
    # used.
    difficulties = [2] * 10 + [3] * 2 + [9]
    self.assertEqual(synthesis.balance(difficulties, 6), [0, 1, 2, 10, 11, 12])
    self.assertEqual(synthesis.balance(difficulties, 99), list(range(13)))


class ScriptedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.task = config_schema.default().task
    self.templates = synthesis.Templates.read("configs/prompts/arithmetic")

  def test_problems_and_their_solutions(self):
    # Fails if the teacher cannot parse its own problems from the prompts, or its answers are wrong.
    asked = self.templates.ask_problems([" A= 3 ? A=\n"], 5)
    prompts = synthesis.read_problems(scripted.reply(self.task, [("user", asked)], 3), raw=True)
    self.assertLen(set(prompts), 5)
    sizes = collections.Counter()
    for prompt in prompts:
      puzzle = scripted.parse(prompt)
      self.assertEqual(puzzle.prompt, prompt)
      reply = scripted.reply(self.task, [("user", self.templates.ask_solution(prompt))], 0)
      text, answer = synthesis.read_solution(reply, raw=True)
      self.assertEqual(answer, str(puzzle.value(puzzle.query)))
      known = set()
      for line in text.splitlines()[:-1]:
        self.assertEqual(arithmetic.judge_step(puzzle, known, line), "legal")
        known.add(line.split(":")[0].strip())
      sizes[len(known)] += 1
    self.assertTrue(set(sizes) <= {3, 4, 5}, sizes)

  def test_seeds_are_draws(self):
    # Fails if every request for problems returns the same ones.
    asked = [("user", self.templates.ask_problems([" A= 3 ? A=\n"], 2))]
    self.assertEqual(scripted.reply(self.task, asked, 1), scripted.reply(self.task, asked, 1))
    self.assertNotEqual(scripted.reply(self.task, asked, 1), scripted.reply(self.task, asked, 2))

  def test_nonsense(self):
    # Fails if an unsolvable problem crashes the server.
    for prompt in ("", " ? A=", " K: A*B ? K=", " A= 3 ? B=", " A= 3 and more ? A="):
      self.assertIsNone(scripted.parse(prompt), prompt)


if __name__ == "__main__":
  absltest.main()
