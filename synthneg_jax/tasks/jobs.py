"""A task of choices that cannot be taken back: jobs on one machine, each with a deadline, and every
one is to be paid.

A problem lists jobs: hours, deadline and pay (` A 3h <9 $5`). A solution does one job a line: what
it takes, its deadline and pay are copied, the clock goes on, the pay of a job that ends by its
deadline is added up, and the last line states the sum:

     B: 2h <4 @2 ok $4 = 4
     A: 3h <9 @5 ok $5 = 9
     #### 9

The answer is the pay of all jobs, so that one job too late makes a solution wrong. Whether a
beginning can still come out right is known exactly: the jobs that are left must all be on time in
the order of their deadlines (Jackson's rule, "Scheduling a production line to minimize maximum
tardiness", 1955). The teacher plans: each next job is drawn among those after which everything can
still be on time. The base model has seen jobs done in any order, late ones too: it executes and
does not plan.
"""

import dataclasses

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from synthneg_jax.runtime.errors import UserError

NAMES = "ABCDEFGH"
MOST_HOURS, MOST_PAY = 4, 9
EOS, PAD = "<eos>", "<pad>"


@dataclasses.dataclass(frozen=True)
class Job:
  """What a job takes (hours), until when it must be done (hours from the start), and what it pays
  if it is.
  """

  hours: int
  deadline: int
  pay: int


@dataclasses.dataclass(frozen=True)
class Puzzle:
  """One problem: jobs by name, in the order of the prompt."""

  jobs: dict[str, Job]

  @property
  def prompt(self) -> str:
    """What the model is given, one line."""
    return (
      "".join(f" {name} {job.hours}h <{job.deadline} ${job.pay}" for name, job in self.jobs.items())
      + " ?\n"
    )

  @property
  def answer(self) -> int:
    """The pay of all jobs."""
    return sum(job.pay for job in self.jobs.values())

  def can_be_paid(self, done: set[str] | frozenset[str]) -> bool:
    """Whether all jobs that are left can still be on time, after these in any order."""
    clock = sum(self.jobs[name].hours for name in done)
    for job in sorted(
      (job for name, job in self.jobs.items() if name not in done), key=lambda job: job.deadline
    ):
      clock += job.hours
      if clock > job.deadline:
        return False
    return True

  def lines(self, order) -> list[str]:
    """The steps of a solution that does jobs in this order, each with its newline."""
    clock, paid, made = 0, 0, []
    for name in order:
      job = self.jobs[name]
      clock += job.hours
      on_time = clock <= job.deadline
      paid += job.pay * on_time
      verdict = "ok" if on_time else "late"
      made.append(f" {name}: {job.hours}h <{job.deadline} @{clock} {verdict} ${job.pay} = {paid}\n")
    return made


def read(prompt: str) -> Puzzle:
  """The problem that a prompt states.

  Raises:
    ValueError: it states none.
  """
  words = prompt.split()
  if len(words) % 4 != 1 or words[-1] != "?":
    raise ValueError(f"{prompt!r} lists no jobs.")
  four = zip(*(iter(words[:-1]),) * 4, strict=True)
  return Puzzle(
    {name: Job(int(hours[:-1]), int(end[1:]), int(pay[1:])) for name, hours, end, pay in four}
  )


def make_puzzle(rng: np.random.Generator, fewest: int, most: int, slack: int) -> Puzzle:
  """Draws a problem that has a solution.

  Args:
    rng: of the draw.
    fewest, most: jobs, uniformly.
    slack: hours that a deadline lies behind the job's end in a hidden order, at most; uniformly
      from 0.
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
  """A teacher's solution: each next job is drawn among those after which everything can still be on
  time.
  """
  order, rest = [], list(puzzle.jobs)
  while rest:
    clock = sum(puzzle.jobs[name].hours for name in order)
    good = [
      name
      for name in rest
      if clock + puzzle.jobs[name].hours <= puzzle.jobs[name].deadline
      and puzzle.can_be_paid({*order, name})
    ]
    order.append(good[rng.integers(len(good))])
    rest.remove(order[-1])
  return "".join(puzzle.lines(order)) + f" #### {puzzle.answer}"


def wander(rng: np.random.Generator, puzzle: Puzzle) -> str:
  """Jobs in any order, late ones too, some or all of them, and no answer."""
  order = rng.permutation(list(puzzle.jobs))[: rng.integers(1, len(puzzle.jobs) + 1)]
  return "".join(puzzle.lines(str(name) for name in order))


def judge_step(puzzle: Puzzle, done: list[str], line: str) -> str:
  """What a written step is, after jobs done in this order.

  Args:
    puzzle: the problem.
    done: names in the steps before, each a job of the problem that had not been done.
    line: one step, without its newline.

  Returns:
    "legal"; "repeated", a job that was done or is none; "wrong", a false number or verdict; or
    "malformed".
  """
  parts = line.split()
  if len(parts) != 8 or not parts[0].endswith(":"):
    return "malformed"
  name = parts[0][:-1]
  if name not in puzzle.jobs or name in done:
    return "repeated"
  return "legal" if line == puzzle.lines([*done, name])[-1][:-1] else "wrong"


def true_pit(puzzle: Puzzle, lines: list[str]) -> int:
  """The first step after which the solution cannot come out right any more, from 0; -1 if there is
  none.

  That is the first step that is not legal, or after which some job must be late; a job that is late
  had to be, before.
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
  """Whether a solution that begins with these lines, an answer perhaps last, can still come out
  right.
  """
  *steps, last = lines
  if last.split()[:1] == ["####"]:
    whole = len(steps) == len(puzzle.jobs) and last.split()[1:] == [str(puzzle.answer)]
    return whole and true_pit(puzzle, steps) < 0
  return true_pit(puzzle, lines) < 0


def build_tokenizer() -> tokenizers.Tokenizer:
  """Typed tokens: a job in the list (` A`) and done (` A:`), hours, deadlines, clock, pay, sums.
  Text round-trips.
  """
  longest = len(NAMES) * MOST_HOURS
  words = [PAD, EOS, "\n", " ?", " ####", " =", " ok", " late"]
  words += [f" {name}{kind}" for kind in ("", ":") for name in NAMES]
  words += [f" {hours}h" for hours in range(1, MOST_HOURS + 1)] + [
    f" ${pay}" for pay in range(1, MOST_PAY + 1)
  ]
  words += [f" <{hour}" for hour in range(1, 2 * longest)] + [
    f" @{hour}" for hour in range(1, longest + 1)
  ]
  words += [f" {paid}" for paid in range(len(NAMES) * MOST_PAY + 1)]
  tokenizer = tokenizers.Tokenizer(
    models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD)
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[^ \n]+"), behavior="isolated")
  tokenizer.decoder = decoders.Fuse()
  tokenizer.add_special_tokens([PAD, EOS])
  return tokenizer


def check(task) -> None:
  """Refuses numbers of jobs that cannot be drawn.

  Raises:
    UserError: names the leaves.
  """
  fewest, most, slack = task.jobs.fewest, task.jobs.most, task.jobs.slack
  if not (1 <= fewest <= most <= len(NAMES) and 0 <= slack <= MOST_HOURS * len(NAMES)):
    raise UserError(
      f"task.jobs.fewest={fewest}, task.jobs.most={most}, task.jobs.slack={slack}: 1 <= fewest <= "
      f"most <= {len(NAMES)}, and a "
      f"slack of 0 to {MOST_HOURS * len(NAMES)} hours."
    )


def draw(rng: np.random.Generator, task) -> tuple[str, str, str]:
  """A problem of the config: (prompt, teacher's solution, answer)."""
  puzzle = make_puzzle(rng, task.jobs.fewest, task.jobs.most, task.jobs.slack)
  return puzzle.prompt, teach(rng, puzzle), str(puzzle.answer)


def document(rng: np.random.Generator, task, section) -> tuple[str, str, str]:
  """What the base model reads: jobs done in any order without an answer, or a short problem solved
  by the teacher.
  """
  wandering = rng.random() < section.random_step_fraction
  most = task.jobs.most if wandering else min(section.max_answered_ops, task.jobs.most)
  puzzle = make_puzzle(rng, 1, most, task.jobs.slack)
  return puzzle.prompt, (wander if wandering else teach)(rng, puzzle), str(puzzle.answer)
