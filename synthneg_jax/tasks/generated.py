"""Tasks whose problems a program writes, with a scripted teacher: their splits, and documents for
their base models.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tokenizers

from synthneg_jax.data.records import Problem
from synthneg_jax.tasks import arithmetic, jobs, star_graph, stories

_SPLITS = ("train", "test", "pretrain")


class Drawn(NamedTuple):
  """A problem as a task draws it."""

  prompt: str
  solution: str
  answer: str


class Truth(NamedTuple):
  """What a task knows exactly about solutions, as lists of lines.

  Attributes:
    read: (prompt) -> the problem that it states.
    true_pit: (problem, lines) -> the first line after which a solution cannot come out right any
      more; -1 if there is none.
    is_open: (problem, lines) -> whether a solution that begins so can still come out right.
  """

  read: Callable
  true_pit: Callable
  is_open: Callable


class Task(NamedTuple):
  """What a generated task is to the others.

  Attributes:
    check: refuses settings of the config's section task, by a UserError.
    draw: (rng, task) -> Drawn, a problem with its teacher's solution.
    document: (rng, task, pretrain's section) -> Drawn, what the base model reads.
    tokenizer: (task) -> its tokenizer, with EOS and PAD of the names below.
    raw: its prompts are put to the model as they stand; False: in the form of task.prompt, as those
      of files are.
    truth: where it is known exactly which steps a solution recovers from; None for other tasks.
  """

  check: Callable
  draw: Callable
  document: Callable
  tokenizer: Callable[..., tokenizers.Tokenizer]
  raw: bool = True
  truth: Truth | None = None


EOS, PAD = "<eos>", "<pad>"
TASKS = {
  "arithmetic": Task(
    arithmetic.check,
    arithmetic.draw,
    arithmetic.document,
    lambda task: arithmetic.build_tokenizer(),
  ),
  "jobs": Task(
    jobs.check,
    jobs.draw,
    jobs.document,
    lambda task: jobs.build_tokenizer(),
    truth=Truth(jobs.read, jobs.true_pit, jobs.is_open),
  ),
  "star_graph": Task(
    star_graph.check,
    star_graph.problem,
    star_graph.document,
    lambda task: star_graph.build_tokenizer(task.star_graph.num_nodes),
  ),
  "stories": Task(
    stories.check,
    stories.draw,
    stories.document,
    lambda task: stories.build_tokenizer(),
    raw=False,
    truth=Truth(stories.read, stories.true_pit, stories.is_open),
  ),
}


def load(task, seed: int, split: str, count: int) -> list[Problem]:
  """The first `count` training problems of a seed, or test problems from number task.test_start on,
  which no seed changes.

  Raises:
    UserError: settings that the task cannot draw problems for.
  """
  TASKS[task.name].check(task)
  first, of_seed = (task.test_start, 0) if split == "test" else (0, seed)
  return [_problem(task, of_seed, split, index) for index in range(first, first + count)]


def _problem(task, seed: int, split: str, index: int) -> Problem:
  rng = np.random.default_rng([seed, _SPLITS.index(split), index])
  return Problem(
    f"{task.name}/{split}/{seed}/{index:06d}", *TASKS[task.name].draw(rng, task), "scripted teacher"
  )


def pretraining(task, section, seed: int) -> list[Problem]:
  """Documents for a base model: legal steps without a plan, and short problems solved by the
  teacher.
  """
  documents = []
  for index in range(section.num_problems):
    rng = np.random.default_rng([seed, _SPLITS.index("pretrain"), index])
    drawn = TASKS[task.name].document(rng, task, section)
    documents.append(
      Problem(f"{task.name}/pretrain/{seed}/{index:06d}", *drawn, "base model's reading")
    )
  return documents
