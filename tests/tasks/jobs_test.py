"""Jobs with deadlines: the text, the teacher, true pits (by brute force), and
the tokenizer.
"""

import itertools

import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.grading import answers
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import generated, jobs

PUZZLE = jobs.Puzzle({"A": jobs.Job(3, 9, 5), "B": jobs.Job(2, 4, 4), "C": jobs.Job(4, 10, 1)})


def on_time(puzzle, order) -> bool:
  """An independent reading: every job of the order ends by its deadline."""
  ends = np.cumsum([puzzle.jobs[name].hours for name in order])
  return all(end <= puzzle.jobs[name].deadline for end, name in zip(ends, order, strict=True))


class JobsTest(parameterized.TestCase):
  def test_text_by_hand(self):
    # Fails if a number of a step, or their order, changes.
    self.assertEqual(PUZZLE.prompt, " A 3h <9 $5 B 2h <4 $4 C 4h <10 $1 ?\n")
    lines = [" B: 2h <4 @2 ok $4 = 4\n", " A: 3h <9 @5 ok $5 = 9\n", " C: 4h <10 @9 ok $1 = 10\n"]
    self.assertEqual(PUZZLE.lines("BAC"), lines)
    self.assertEqual(PUZZLE.lines("CB")[1], " B: 2h <4 @6 late $4 = 1\n")
    self.assertEqual(PUZZLE.answer, 10)

  def test_what_can_be_paid_against_all_orders(self):
    # Fails if a partial solution counts as lost although some order completes it, or vice versa.
    rng, both = np.random.default_rng(0), set()
    for _ in range(60):
      puzzle = jobs.make_puzzle(rng, 2, 5, 3)
      done = [str(name) for name in rng.permutation(list(puzzle.jobs))[: rng.integers(0, 4)]]
      rest = [name for name in puzzle.jobs if name not in done]
      clock = sum(puzzle.jobs[name].hours for name in done)
      late = jobs.Puzzle(
        {
          name: jobs.Job(job.hours, job.deadline - clock, job.pay)
          for name, job in puzzle.jobs.items()
          if name in rest
        }
      )
      brute = any(on_time(late, order) for order in itertools.permutations(rest))
      self.assertEqual(puzzle.can_be_paid(set(done)), brute)
      both.add(brute)
    self.assertEqual(both, {True, False})

  def test_the_teacher_is_right_and_draws_among_all_good_orders(self):
    # Fails if the teacher is ever late, or always picks the same of several correct orders.
    rng, several = np.random.default_rng(1), 0
    for _ in range(60):
      puzzle = jobs.make_puzzle(rng, 3, 5, 4)
      good = {order for order in itertools.permutations(puzzle.jobs) if on_time(puzzle, order)}
      told = set()
      for _ in range(40 if len(good) < 7 else 1):
        solution = jobs.teach(rng, puzzle)
        lines = solution.split("\n")[:-1]
        told.add(tuple(line.split()[0][:-1] for line in lines))
        self.assertTrue(answers.grade(solution, str(puzzle.answer)).correct)
        self.assertEqual(jobs.true_pit(puzzle, lines), -1)
      self.assertContainsSubset(told, good)
      if 1 < len(good) < 4:
        several += 1
        self.assertEqual(told, good)
    self.assertGreater(several, 5)

  def test_wandering_is_legal_and_says_no_answer(self):
    # Fails if the base model would read a false step or a solution, or only jobs on time.
    rng, late = np.random.default_rng(2), 0
    for _ in range(100):
      puzzle = jobs.make_puzzle(rng, 1, 5, 2)
      done = []
      for line in jobs.wander(rng, puzzle).split("\n")[:-1]:
        self.assertEqual(jobs.judge_step(puzzle, done, line), "legal")
        done.append(line.split()[0][:-1])
        late += " late " in line
    self.assertGreater(late, 20)

  @parameterized.parameters(
    (" B: 2h <4 @2 ok $4 = 4", [], "legal"),
    (" B: 2h <4 @2 ok $4 = 5", [], "wrong"),
    (" B: 2h <4 @2 late $4 = 4", [], "wrong"),
    (" B: 3h <4 @3 ok $4 = 4", [], "wrong"),
    (" B: 2h <4 @5 ok $4 = 9", ["A"], "wrong"),
    (" B: 2h <4 @5 late $4 = 5", ["A"], "legal"),
    (" B: 2h <4 @4 ok $4 = 8", ["B"], "repeated"),
    (" H: 2h <4 @2 ok $4 = 4", [], "repeated"),
    (" B: 2h <4 @2 ok", [], "malformed"),
  )
  def test_judged_step(self, line, done, verdict):
    # Fails if a false number, a false verdict of lateness, or a job done twice passes.
    self.assertEqual(jobs.judge_step(PUZZLE, done, line), verdict)

  def test_a_prompt_is_read_again(self):
    # Fails if a job's numbers are swapped or lost, or prose passes for a problem.
    for seed in range(20):
      puzzle = jobs.make_puzzle(np.random.default_rng(seed), 1, 8, 4)
      self.assertEqual(jobs.read(puzzle.prompt), puzzle)
    with self.assertRaisesRegex(ValueError, "lists no jobs"):
      jobs.read(" A 3h <9 ?")

  def test_the_true_pit_against_all_orders(self):
    # Fails if the pit is found a step early or late.
    rng, where = np.random.default_rng(3), []
    for _ in range(80):
      puzzle = jobs.make_puzzle(rng, 4, 5, 2)
      order = [str(name) for name in rng.permutation(list(puzzle.jobs))]
      lost = [
        not any(
          on_time(puzzle, [*order[:k], *rest])
          for rest in itertools.permutations(set(puzzle.jobs) - set(order[:k]))
        )
        for k in range(1, len(order) + 1)
      ]
      expected = lost.index(True) if True in lost else -1
      self.assertEqual(jobs.true_pit(puzzle, [line[:-1] for line in puzzle.lines(order)]), expected)
      where.append(expected)
    self.assertGreater(len(set(where)), 2)
    lie = [" C: 4h <10 @4 ok $1 = 1", " A: 3h <9 @7 ok $5 = 6", " B: 2h <4 @9 ok $4 = 10"]
    self.assertEqual(jobs.true_pit(PUZZLE, lie), 0)  # after C nothing helps B any more
    self.assertEqual(jobs.true_pit(PUZZLE, [" B: 2h <4 @2 ok $4 = 5"]), 0)

  def test_what_is_still_open(self):
    # Fails if an answer before all jobs are done, a wrong one, or a late job passes.
    whole = [line[:-1] for line in PUZZLE.lines("BAC")]
    self.assertTrue(jobs.is_open(PUZZLE, whole[:1]))
    self.assertTrue(jobs.is_open(PUZZLE, [*whole, " #### 10"]))
    for lines in (
      [*whole[:2], " #### 9"],
      [*whole, " #### 9"],
      [line[:-1] for line in PUZZLE.lines("C")],
    ):
      self.assertFalse(jobs.is_open(PUZZLE, lines))

  def test_settings_that_no_problem_has_are_refused(self):
    # Fails if the check accepts numbers of jobs for which the generator loops or crashes.
    task = config_schema.default().task
    task.name = "jobs"
    for leaf, value in (("fewest", 0), ("most", 9), ("fewest", 7), ("slack", -1)):
      changed = task.copy_and_resolve_references()
      changed.jobs[leaf] = value
      with self.assertRaisesRegex(UserError, f"task.jobs.{leaf}={value}"):
        generated.load(changed, 0, "train", 1)


class GeneratedTest(parameterized.TestCase):
  @parameterized.parameters(*generated.TASKS)
  def test_text_round_trips_through_tokens(self, name):
    # Fails if a word of a problem, a solution or a document has no token of its own.
    c = config_schema.default()
    c.task.name, c.pretrain.num_problems = name, 100
    tokenizer = generated.TASKS[name].tokenizer(c.task)
    pad = tokenizer.token_to_id(generated.PAD)
    self.assertEqual(
      tokenizer.decode([tokenizer.token_to_id(generated.EOS)], skip_special_tokens=False),
      generated.EOS,
    )
    for problem in generated.load(c.task, 0, "train", 100) + generated.pretraining(
      c.task, c.pretrain, 0
    ):
      text = problem.prompt + problem.solution
      ids = tokenizer.encode(text).ids
      self.assertNotIn(pad, ids)
      self.assertEqual(tokenizer.decode(ids), text)

  @parameterized.parameters(*generated.TASKS)
  def test_splits(self, name):
    # Fails if fewer problems are not a prefix of more, a seed changes the test split, or test_start
    # does not move it.
    task = config_schema.default().task
    task.name = name
    few, more = (generated.load(task, 3, "train", count) for count in (5, 9))
    self.assertEqual(few, more[:5])
    self.assertNotEqual(few, generated.load(task, 4, "train", 5))
    test = generated.load(task, 3, "test", 9)
    self.assertEqual(test, generated.load(task, 4, "test", 9))
    self.assertNoCommonElements(
      {problem.prompt for problem in test}, {problem.prompt for problem in more}
    )
    task.test_start = 4
    self.assertEqual(generated.load(task, 0, "test", 5), test[4:])

  @parameterized.parameters("arithmetic", "jobs")
  def test_documents(self, name):
    # Fails if the base model reads solutions of problems as long as those that it is to learn, or
    # no wandering.
    c = config_schema.default()
    c.task.name, c.pretrain.num_problems = name, 300
    documents = generated.pretraining(c.task, c.pretrain, 0)
    answered = [each for each in documents if "####" in each.solution]
    self.assertBetween(len(answered), 100, 200)
    self.assertLessEqual(
      max(each.solution.count("\n") for each in answered), c.pretrain.max_answered_ops
    )
    self.assertGreater(
      max(each.solution.count("\n") for each in documents), c.pretrain.max_answered_ops
    )


if __name__ == "__main__":
  absltest.main()
