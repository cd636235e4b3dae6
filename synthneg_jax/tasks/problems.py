"""The problems of a task by split, with their known solutions."""

import os

import numpy as np
from etils import epath

from synthneg_jax.runtime.errors import UserError
from synthneg_jax.runtime.records import Problem
from synthneg_jax.tasks import arithmetic, problem_files

_SPLITS = ("train", "test", "pretrain")


def prompt_style(task) -> str:
  """How the task's problems are put to the model (tasks/prompts.py)."""
  return "raw" if task.name == "arithmetic" else task.prompt


def load(task, seed: int, split: str, count: int) -> list[Problem]:
  """The first `count` problems of a split; a larger count has the smaller one's problems first.

  Args:
    task: the config's section.
    seed: arithmetic: of the generator; files: of the order.
    split: "train" or "test".
    count: how many.

  Raises:
    UserError: an unknown task, a missing or broken file, or too few problems.
  """
  if task.name == "arithmetic":
    most = len(arithmetic.NAMES) - task.num_leaves
    if not (2 <= task.num_leaves and 1 <= task.needed_min <= task.needed_max <= task.num_operations <= most):
      raise UserError(
        f"task.num_leaves={task.num_leaves}, task.num_operations={task.num_operations}, task.needed_min={task.needed_min}, "
        f"task.needed_max={task.needed_max}: 2 leaves at least, 1 <= needed_min <= needed_max <= num_operations, and "
        f"{len(arithmetic.NAMES)} names in all."
      )
    return [_arithmetic(task, seed, split, index) for index in range(count)]
  if task.name == "gsm8k":
    folder = task.data_dir or os.environ.get("SYNTHNEG_DATA_DIR", "")
    if not folder:
      raise UserError(
        "task.data_dir is empty and SYNTHNEG_DATA_DIR is not set: name the folder with gsm8k/train.jsonl."
      )
    path = epath.Path(folder) / "gsm8k" / f"{split}.jsonl"
    rows = problem_files.read_rows(path, split)
    if count > len(rows):
      raise UserError(f"{path} has {len(rows)} rows; task.{split}_problems={count} asks for more.")
    order = np.random.default_rng([seed if split == "train" else 0, _SPLITS.index(split)]).permutation(len(rows))[
      :count
    ]
    return [
      Problem(rows[i]["id"], rows[i]["problem"], rows[i]["solution"], rows[i]["answer"], f"gsm8k/{split}")
      for i in order
    ]
  raise UserError(f"task.name={task.name!r} is none of arithmetic, gsm8k.")


def _arithmetic(task, seed: int, split: str, index: int) -> Problem:
  rng = np.random.default_rng([seed if split == "train" else 0, _SPLITS.index(split), index])
  puzzle = arithmetic.make_puzzle(rng, task.num_leaves, task.num_operations, (task.needed_min, task.needed_max))
  solution = arithmetic.teach(rng, puzzle, task.leap)
  return Problem(
    f"arithmetic/{split}/{seed if split == 'train' else 0}/{index:06d}",
    puzzle.prompt,
    solution,
    str(puzzle.value(puzzle.query)),
    "scripted teacher",
  )


def pretraining(task, config, seed: int) -> list[Problem]:
  """Documents for the embedded base model: legal steps without a plan, and short problems solved plainly."""
  documents = []
  for index in range(config.num_problems):
    rng = np.random.default_rng([seed, _SPLITS.index("pretrain"), index])
    wander = rng.random() < config.wander_share
    # Small problems beside full-sized ones: looking up is learned on short contexts first.
    num_leaves = int(rng.integers(2, task.num_leaves + 1))
    num_operations = int(rng.integers(1, task.num_operations + 1))
    most = min(task.needed_max if wander else config.answered_max, num_operations)
    puzzle = arithmetic.make_puzzle(rng, num_leaves, num_operations, (1, most))
    text = arithmetic.wander(rng, puzzle) if wander else arithmetic.teach(rng, puzzle, leap=0.0)
    documents.append(
      Problem(
        f"arithmetic/pretrain/{seed}/{index:06d}",
        puzzle.prompt,
        text,
        str(puzzle.value(puzzle.query)),
        "wander" if wander else "plain teacher",
      )
    )
  return documents
