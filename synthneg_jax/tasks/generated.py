"""Generated tasks with scripted teachers: their splits and their pretraining documents."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tokenizers

from synthneg_jax.data.records import Problem
from synthneg_jax.tasks import arithmetic, jobs, star_graph, stories
from synthneg_jax.tasks.word_tokenizer import EOS as EOS
from synthneg_jax.tasks.word_tokenizer import PAD as PAD

_SPLITS = ("train", "test", "pretrain")


class Drawn(NamedTuple):
  """A drawn problem."""

  prompt: str
  solution: str
  answer: str


class Truth(NamedTuple):
  """Ground truth about solutions, given as lists of lines.

  Attributes:
    read: (prompt) -> the problem.
    true_pit: (problem, lines) -> index of the first line after which no continuation is correct;
      -1 if there is none.
    is_open: (problem, lines) -> whether some continuation of these lines is correct.
  """

  read: Callable
  true_pit: Callable
  is_open: Callable


class Task(NamedTuple):
  """The interface of a generated task; `task` is the config's section.

  Attributes:
    check: (task) -> None; raises UserError for invalid settings.
    draw: (rng, task) -> Drawn, a problem with the teacher's solution.
    document: (rng, task, the config's section pretrain) -> Drawn, a pretraining document.
    tokenizer: (task) -> the tokenizer, with the special tokens EOS and PAD.
    raw: whether the model sees prompts verbatim; if not, in the style of task.prompt.
    truth: ground truth about solutions; None if unknown.
  """

  check: Callable
  draw: Callable
  document: Callable
  tokenizer: Callable[..., tokenizers.Tokenizer]
  raw: bool = True
  truth: Truth | None = None


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
  """The first `count` training problems of a seed, or test problems from task.test_start on.

  Test problems do not depend on the seed.

  Raises:
    UserError: invalid settings of the task.
  """
  TASKS[task.name].check(task)
  first, seed = (task.test_start, 0) if split == "test" else (0, seed)
  return [_problem(task, seed, split, index) for index in range(first, first + count)]


def _problem(task, seed: int, split: str, index: int) -> Problem:
  rng = np.random.default_rng([seed, _SPLITS.index(split), index])
  return Problem(
    f"{task.name}/{split}/{seed}/{index:06d}", *TASKS[task.name].draw(rng, task), "scripted teacher"
  )


def pretraining(task, section, seed: int) -> list[Problem]:
  """Pretraining documents: legal steps without a plan, and short problems solved by the teacher."""
  documents = []
  for index in range(section.num_problems):
    rng = np.random.default_rng([seed, _SPLITS.index("pretrain"), index])
    drawn = TASKS[task.name].document(rng, task, section)
    documents.append(
      Problem(f"{task.name}/pretrain/{seed}/{index:06d}", *drawn, "base model's reading")
    )
  return documents
