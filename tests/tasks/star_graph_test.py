"""The star graph: what its prompts say, read independently; its documents, tokens, steps and
verdicts.
"""

import hypothesis
import numpy as np
import transformers
from absl.testing import absltest, parameterized
from hypothesis import strategies

from synthneg_jax.data.token_text import TokenText, step_ends
from synthneg_jax.grading import answers
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import problems, star_graph


def task(**changes):
  from configs import star_graph as config

  found = config.get_config().task
  found.star_graph.update(
    {name: value for name, value in changes.items() if name in found.star_graph}
  )
  found.update({name: value for name, value in changes.items() if name not in found.star_graph})
  return found


def read(prompt: str) -> tuple[dict[str, list[str]], str, str, str]:
  """An independent reading: (predecessors of each node, first and second node asked for, mark)."""
  before = {}
  for edge in prompt[: prompt.index("?")].rstrip("|").split("|"):
    start, end = edge.split()
    before.setdefault(end, []).append(start)
  first, second = prompt[prompt.index("?") + 1 : -1].split()
  return before, first, second, prompt[-1]


def back_from(before: dict[str, list[str]], node: str) -> list[str]:
  path = [node]
  while path[-1] in before:
    path.append(before[path[-1]][0])
  return path


class StarGraphTest(parameterized.TestCase):
  @hypothesis.settings(max_examples=60, deadline=None)
  @hypothesis.given(
    strategies.integers(2, 5),
    strategies.integers(3, 5),
    strategies.integers(0, 9),
    strategies.integers(0),
  )
  def test_graphs(self, degree, path_nodes, spare, seed):
    # Fails if a name repeats, an edge is lost or turned round, the goal is no leaf, or the solution
    # is another arm.
    count = 1 + degree * (path_nodes - 1)
    graphs = star_graph.draw(np.random.default_rng(seed), 3, degree, path_nodes, count + spare)
    for row in range(3):
      prompt = star_graph.text(star_graph.prompt_ids(graphs)[row])
      before, center, goal, mark = read(prompt)
      self.assertLen(before, count - 1)
      self.assertEqual({len(each) for each in before.values()}, {1})
      starts = [each[0] for each in before.values()]
      self.assertEqual(starts.count(center), degree)
      self.assertEqual({starts.count(name) for name in set(starts) - {center}} - {1}, set())
      self.assertNotIn(goal, starts)
      self.assertEqual(mark, "=")
      path = back_from(before, goal)[::-1]
      self.assertLen(path, path_nodes)
      solution = star_graph.text(star_graph.solution_ids(graphs)[row])
      self.assertEqual(solution.split(), path)
      self.assertEqual(star_graph.judge(prompt, solution), "right")
      for leaf in set(before) - set(starts) - {goal}:
        self.assertEqual(
          star_graph.judge(prompt, " ".join(back_from(before, leaf)[::-1])), "other_arm"
        )
      for wrong in (
        "",
        center,
        " ".join(path[1:]),
        " ".join(path[:-1]),
        " ".join([center, goal]),
        f"{solution}{center}",
      ):
        self.assertEqual(star_graph.judge(prompt, wrong), "illegal", wrong)

  def test_documents_show_look_ups_and_no_plan(self):
    # Fails if a document holds a false look-up, or if walks of `=` come to the goal more often than
    # by chance.
    rng = np.random.default_rng(0)
    graphs = star_graph.draw(rng, 3000, 3, 3, 20)
    kinds, arrived = {"=": 0, "<": 0}, 0
    for prompt, response in zip(
      *map(lambda ids: map(star_graph.text, ids), star_graph.walks(rng, graphs)), strict=True
    ):
      before, first, second, mark = read(prompt)
      nodes = response.split()
      kinds[mark] += 1
      walked = nodes if mark == "<" else nodes[::-1]
      self.assertEqual(walked, back_from(before, walked[0]))
      self.assertEqual(walked[-1], first)
      arrived += mark == "=" and nodes[-1] == second
      self.assertTrue(mark == "=" or walked[0] == second)
    self.assertBetween(arrived / kinds["="], 0.28, 0.39)  # standard error .016
    self.assertBetween(kinds["="] / 3000, 0.46, 0.54)
    for prompt, response in zip(
      *map(lambda ids: map(star_graph.text, ids), star_graph.tours(rng, graphs)), strict=True
    ):
      before, _, _, mark = read(prompt)
      nodes = response.split()
      arms = [nodes[at : at + 3] for at in (0, 3, 6)]
      for arm in arms:
        walked = arm if mark == "<" else arm[::-1]
        self.assertEqual(walked, back_from(before, walked[0]))
      self.assertLen({tuple(arm) for arm in arms}, 3)

  def test_text_and_ids_agree_and_a_node_is_a_step(self):
    # Fails if the tokenizer's ids differ from the arrays, or if a node and its space are not one
    # step.
    backend = star_graph.build_tokenizer(20)
    tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    )
    graphs = star_graph.draw(np.random.default_rng(1), 20, 3, 4, 20)
    text = TokenText(tokenizer)
    for ids in [*star_graph.prompt_ids(graphs), *star_graph.solution_ids(graphs)]:
      written = star_graph.text(ids)
      self.assertEqual(tokenizer.encode(written), [i for i in ids if i > 1])
      self.assertEqual(text.text(ids.tolist()), written)
    self.assertEqual(
      step_ends(star_graph.solution_ids(graphs)[0].tolist(), text, " "), [1, 2, 3, 5]
    )

  def test_problems(self):
    # Fails if fewer problems are not a prefix of more, if splits share problems, or if a solution
    # is graded wrong.
    chosen = problems.choose_splits(task(train_problems=60, test_problems=40), seed=3)
    self.assertEqual(problems.load(task(), 3, "train", 20), chosen.train[:20])
    self.assertNotEqual(problems.load(task(), 4, "train", 20), chosen.train[:20])
    self.assertEqual(problems.load(task(), 4, "test", 40), chosen.test)
    self.assertEmpty({each.prompt for each in chosen.train} & {each.prompt for each in chosen.test})
    for problem in chosen.test:
      before, _, goal, _ = read(problem.prompt)
      self.assertEqual(problem.solution.split(), back_from(before, goal)[::-1])
      self.assertTrue(answers.grade(problem.solution, problem.answer, kind="exact").correct)

  @parameterized.parameters(
    ("3 11 2 ", "right"),
    ("3 11 2", "right"),
    ("3 11", "wrong"),
    ("3 11 2 2 ", "wrong"),
    ("31 12", "wrong"),
    (" ", "no_answer"),
  )
  def test_exact_verdicts(self, response, reason):
    # Fails if a part of the path passes for it, or if whitespace counts.
    self.assertEqual(answers.grade(response, "3 11 2", kind="exact").reason, reason)

  @parameterized.parameters({"degree": 1}, {"path_nodes": 2}, {"num_nodes": 4})
  def test_sizes_that_make_no_star_are_refused(self, **changes):
    # Fails if the check accepts too few names, or a graph without a decision.
    with self.assertRaisesRegex(
      UserError, f"task.star_graph.{next(iter(changes))}={next(iter(changes.values()))}"
    ):
      problems.load(task(**changes), 0, "train", 1)


if __name__ == "__main__":
  absltest.main()
