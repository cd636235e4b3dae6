"""A task of irreversible choices: schedule jobs on one machine so that all meet their deadlines.

A problem lists jobs with hours, deadline and pay (` A 3h <9 $5`). A solution has one line per job,
with its hours, deadline, finishing time, "ok" or "late", pay, and the sum of the pay of jobs on
time. The last line states the sum:

     B: 2h <4 @2 ok $4 = 4
     A: 3h <9 @5 ok $5 = 9
     #### 9

The answer is the pay of all jobs, so that a single late job makes a solution wrong. A partial
solution can be completed correctly if and only if the remaining jobs meet their deadlines in the
order of the deadlines (Jackson's rule, "Scheduling a production line to minimize maximum
tardiness", 1955). The teacher plans: it draws the next job among those that keep this possible. The
base model's documents have jobs in any order, including late ones: it executes but does not plan.
"""

import dataclasses

import numpy as np
import tokenizers

from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import word_tokenizer
from synthneg_jax.tasks.word_tokenizer import EOS, PAD

NAMES = "ABCDEFGH"
MOST_HOURS, MOST_PAY = 4, 9


@dataclasses.dataclass(frozen=True)
class Job:
  """A job: its duration in hours, its deadline in hours from the start, and its pay if on time."""

  hours: int
  deadline: int
  pay: int


@dataclasses.dataclass(frozen=True)
class Puzzle:
  """A problem: jobs by name, in the order of the prompt."""

  jobs: dict[str, Job]

  @property
  def prompt(self) -> str:
    """The prompt, one line."""
    parts = [f" {name} {job.hours}h <{job.deadline} ${job.pay}" for name, job in self.jobs.items()]
    return "".join(parts) + " ?\n"

  @property
  def answer(self) -> int:
    """The pay of all jobs."""
    return sum(job.pay for job in self.jobs.values())

  def can_be_paid(self, done: set[str] | frozenset[str]) -> bool:
    """Whether all remaining jobs can be on time after these, done in any order."""
    clock = sum(self.jobs[name].hours for name in done)
    remaining = [job for name, job in self.jobs.items() if name not in done]
    for job in sorted(remaining, key=lambda job: job.deadline):
      clock += job.hours
      if clock > job.deadline:
        return False
    return True

  def lines(self, order) -> list[str]:
    """The steps of a solution that does the jobs in this order, each with its newline."""
    clock, paid, lines = 0, 0, []
    for name in order:
      job = self.jobs[name]
      clock += job.hours
      on_time = clock <= job.deadline
      paid += job.pay * on_time
      verdict = "ok" if on_time else "late"
      lines.append(
        f" {name}: {job.hours}h <{job.deadline} @{clock} {verdict} ${job.pay} = {paid}\n"
      )
    return lines


def read(prompt: str) -> Puzzle:
  """Parses a prompt.

  Raises:
    ValueError: it is not a prompt of this task.
  """
  words = prompt.split()
  if len(words) % 4 != 1 or words[-1] != "?":
    raise ValueError(f"{prompt!r} lists no jobs.")
  four = zip(*(iter(words[:-1]),) * 4, strict=True)
  return Puzzle(
    {name: Job(int(hours[:-1]), int(end[1:]), int(pay[1:])) for name, hours, end, pay in four}
  )


def make_puzzle(rng: np.random.Generator, fewest: int, most: int, slack: int) -> Puzzle:
  """Draws a solvable problem.

  Args:
    rng: random generator.
    fewest, most: bounds of the number of jobs, drawn uniformly.
    slack: largest number of hours between the end of a job in a hidden order and its deadline;
      each is drawn uniformly from 0 to slack.
  """
  names = [str(name) for name in rng.permutation(list(NAMES))[: rng.integers(fewest, most + 1)]]
  jobs, clock = {}, 0
  for name in names:
    hours = int(rng.integers(1, MOST_HOURS + 1))
    clock += hours
    jobs[name] = Job(
      hours, clock + int(rng.integers(slack + 1)), int(rng.integers(1, MOST_PAY + 1))
    )
  return Puzzle({str(name): jobs[name] for name in rng.permutation(names)})


def teach(rng: np.random.Generator, puzzle: Puzzle) -> str:
  """The teacher's solution: draws each job among those that keep a correct solution possible."""
  order, rest, clock = [], list(puzzle.jobs), 0
  while rest:
    good = []
    for name in rest:
      on_time = clock + puzzle.jobs[name].hours <= puzzle.jobs[name].deadline
      if on_time and puzzle.can_be_paid({*order, name}):
        good.append(name)
    order.append(good[rng.integers(len(good))])
    rest.remove(order[-1])
    clock += puzzle.jobs[order[-1]].hours
  return "".join(puzzle.lines(order)) + f" #### {puzzle.answer}"


def wander(rng: np.random.Generator, puzzle: Puzzle) -> str:
  """Some or all jobs in random order, including late ones, without an answer."""
  order = rng.permutation(list(puzzle.jobs))[: rng.integers(1, len(puzzle.jobs) + 1)]
  return "".join(puzzle.lines(str(name) for name in order))


def judge_step(puzzle: Puzzle, done: list[str], line: str) -> str:
  """Classifies a step.

  Args:
    puzzle: the problem.
    done: jobs of the earlier steps, in order, all different.
    line: the step, without its newline.

  Returns:
    "legal", "repeated" (a job already done, or unknown), "wrong" (an incorrect number or verdict)
    or "malformed".
  """
  parts = line.split()
  if len(parts) != 8 or not parts[0].endswith(":"):
    return "malformed"
  name = parts[0][:-1]
  if name not in puzzle.jobs or name in done:
    return "repeated"
  return "legal" if line == puzzle.lines([*done, name])[-1][:-1] else "wrong"


def true_pit(puzzle: Puzzle, lines: list[str]) -> int:
  """Index of the first step after which no continuation is correct; -1 if there is none.

  This is the first step that is not legal, or after which some job must be late.
  """
  done = []
  for number, line in enumerate(lines):
    if judge_step(puzzle, done, line) != "legal":
      return number
    done.append(line.split()[0][:-1])
    if not puzzle.can_be_paid({*done}):
      return number
  return -1


def is_open(puzzle: Puzzle, lines: list[str]) -> bool:
  """Whether some continuation of these lines is correct; the last line may be the answer."""
  *steps, last = lines
  if last.split()[:1] == ["####"]:
    complete = len(steps) == len(puzzle.jobs) and last.split()[1:] == [str(puzzle.answer)]
    return complete and true_pit(puzzle, steps) < 0
  return true_pit(puzzle, lines) < 0


def build_tokenizer() -> tokenizers.Tokenizer:
  """Tokens: jobs in the list (` A`) and done (` A:`), hours, deadlines, clock times, pay, sums."""
  longest = len(NAMES) * MOST_HOURS
  words = [PAD, EOS, "\n", " ?", " ####", " =", " ok", " late"]
  words += [f" {name}{kind}" for kind in ("", ":") for name in NAMES]
  words += [f" {hours}h" for hours in range(1, MOST_HOURS + 1)]
  words += [f" ${pay}" for pay in range(1, MOST_PAY + 1)]
  words += [f" <{hour}" for hour in range(1, 2 * longest)]
  words += [f" @{hour}" for hour in range(1, longest + 1)]
  words += [f" {paid}" for paid in range(len(NAMES) * MOST_PAY + 1)]
  return word_tokenizer.build(words, r"\n| ?[^ \n]+")


def check(task) -> None:
  """Raises UserError if the configured numbers of jobs or hours are invalid."""
  fewest, most, slack = task.jobs.fewest, task.jobs.most, task.jobs.slack
  if not (1 <= fewest <= most <= len(NAMES) and 0 <= slack <= MOST_HOURS * len(NAMES)):
    raise UserError(
      f"task.jobs.fewest={fewest}, task.jobs.most={most}, task.jobs.slack={slack}: must satisfy "
      f"1 <= fewest <= most <= {len(NAMES)} and 0 <= slack <= {MOST_HOURS * len(NAMES)}."
    )


def draw(rng: np.random.Generator, task) -> tuple[str, str, str]:
  """Draws a problem: (prompt, teacher's solution, answer)."""
  puzzle = make_puzzle(rng, task.jobs.fewest, task.jobs.most, task.jobs.slack)
  return puzzle.prompt, teach(rng, puzzle), str(puzzle.answer)


def document(rng: np.random.Generator, task, section) -> tuple[str, str, str]:
  """Draws a pretraining document: jobs in random order, or a short problem with its solution."""
  wandering = rng.random() < section.random_step_fraction
  most = task.jobs.most if wandering else min(section.max_answered_ops, task.jobs.most)
  puzzle = make_puzzle(rng, 1, most, task.jobs.slack)
  return puzzle.prompt, (wander if wandering else teach)(rng, puzzle), str(puzzle.answer)
