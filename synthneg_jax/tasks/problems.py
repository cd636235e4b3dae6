"""The problems of a task by split, with their known solutions.

Problems from files stand in the order of a hash of seed and id. So the first 8,000 are among the first 16,000, neither the
order of files and lines nor the loss of single rows changes who is before whom, and two splits or sources need no common
count. The test split's order is that of seed 0 whatever the run's seed.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence

from etils import epath

from synthneg_jax.data import decontamination, hub
from synthneg_jax.data.problem_files import Row, Rows
from synthneg_jax.data.records import Problem
from synthneg_jax.grading import answers
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import generated

_DATA_DIR = "SYNTHNEG_DATA_DIR"


@dataclasses.dataclass
class Chosen:
  """The problems of a run.

  Attributes:
    train, test: problems.
    figures: counts of what was left out, for the stage's manifest.
    report: one JSON-ready object a training problem that was left out because it overlaps a test problem, and one a
      broken row; docs/data.md has the fields.
  """

  train: list[Problem]
  test: list[Problem]
  figures: dict
  report: list[dict]


def prompt_style(task) -> str:
  """How the task's problems are put to the model (data/prompts.py)."""
  return "raw" if task.name in generated.TASKS else task.prompt


def choose(task, seed: int) -> Chosen:
  """The training and test problems of a task; more of them have the fewer ones first.

  Training problems that overlap a test problem (data/decontamination.py), one of the whole test split and of
  task.decontaminate_against, are left out before the first task.train_problems are taken.

  Args:
    task: the config's section.
    seed: generated tasks: of the generator; files: of the training problems' order.

  Raises:
    UserError: an unknown task, a missing or broken file, or too few problems.
  """
  if task.name in generated.TASKS:
    test, train = (load(task, seed, split, task[f"{split}_problems"]) for split in ("test", "train"))
    unseen = {problem.prompt for problem in test}
    kept = [problem for problem in train if problem.prompt not in unseen]
    return Chosen(kept, test, {"dropped_as_test": len(train) - len(kept)}, [])
  test, train = _rows(task, "test"), _rows(task, "train")
  for rows in (test, train):
    _check_answers(task, rows)
  known = [*test.rows, *(row for path in task.decontaminate_against for row in _read(task, path, "test").rows)]
  dropped = {}
  if task.decontaminate_ngram:
    texts = [[row.problem for row in rows] for rows in (train.rows, known)]
    dropped = {found.index: found for found in decontamination.overlaps(*texts, task.decontaminate_ngram)}
  unseen = {row.problem for row in known}
  kept = [row for i, row in enumerate(train.rows) if i not in dropped and row.problem not in unseen]
  figures = {
    "dropped_as_test": len(train.rows) - len(kept),
    "skipped_rows": len(train.skipped) + len(test.skipped),
    "duplicates": train.duplicates + test.duplicates,
  }
  paths = [path for path in (task.path, task.test_path, *task.decontaminate_against) if hub.is_hub(path)]
  if paths:
    figures["hub_commits"] = {path: hub.commit(path) for path in paths}
  report = [
    {
      "id": train.rows[i].id,
      "overlaps": known[found.test_index].id,
      "words": found.words,
      "share": round(found.share, 4),
    }
    for i, found in dropped.items()
  ]
  report += [{"skipped": sentence} for rows in (train, test) for sentence in rows.skipped]
  made = [
    _first(task, rows, split, order_seed, note)
    for rows, split, order_seed, note in (
      (kept, "train", seed, f" ({figures['dropped_as_test']} more overlap test problems)"),
      (test.rows, "test", 0, ""),
    )
  ]
  return Chosen(*made, figures, report)


def _check_answers(task, rows: Rows) -> None:
  """Takes rows out whose gold answer the grader cannot read, or does not find equal to itself: no response could be right.

  Raises:
    UserError: there is one, and task.skip_bad_rows is not set.
  """
  state = "#### {}".format if task.answers == "integer" else str

  def grade(golds):
    return answers.grade_many([state(gold) for gold in golds], golds, kind=task.answers)

  golds = [row.answer for row in rows.rows]
  try:
    if all(verdict.correct for verdict in grade(golds)):
      return
  except UserError:  # one of them cannot be read, and which is not said
    pass
  kept = []
  for row, gold in zip(rows.rows, golds, strict=True):
    try:
      verdict = grade([gold])[0]
      if verdict.correct:
        kept.append(row)
        continue
      complaint = f"The gold answer {gold[:200]!r} is {verdict.reason}, held against itself."
    except UserError as error:
      complaint = str(error)
    if not task.skip_bad_rows:
      hint = "task.answers=math compares more than numbers, and " if task.answers == "integer" else ""
      raise UserError(f"{row.id}: {complaint.removesuffix('.')}; {hint}--skip_bad_rows leaves such rows out.")
    rows.skipped.append(f"{row.id}: {complaint}")
  rows.rows = kept


def test_texts(task, seed: int) -> list[str]:
  """What no training problem may overlap: all problems of the test split, and those of task.decontaminate_against."""
  if task.name in generated.TASKS:
    return [problem.prompt for problem in load(task, seed, "test", task.test_problems)]
  paths = [_rows(task, "test"), *(_read(task, path, "test") for path in task.decontaminate_against)]
  return [row.problem for rows in paths for row in rows.rows]


def load(task, seed: int, split: str, count: int) -> list[Problem]:
  """The first `count` problems of a split, overlaps not looked for.

  Args:
    task: the config's section.
    seed: generated tasks: of the generator; files: of the order.
    split: "train" or "test".
    count: how many.

  Raises:
    UserError: as in `choose`.
  """
  if task.name in generated.TASKS:
    return generated.load(task, seed, split, count)
  return _first(task, _rows(task, split).rows, split, seed if split == "train" else 0, "", count)


def ordered(rows: Iterable[Row], seed: int) -> list[Row]:
  """Rows in the order of a hash of seed and id."""

  def rank(row):
    return hashlib.blake2b(f"{seed}|{row.id}".encode(), digest_size=16).digest()

  return sorted(rows, key=rank)


def _first(task, rows: Sequence[Row], split: str, seed: int, note: str, count: int | None = None) -> list[Problem]:
  count = task[f"{split}_problems"] if count is None else count
  if count > len(rows):
    raise UserError(f"The {split} split has {len(rows)} problems{note}; task.{split}_problems={count} asks for more.")

  def source(row):
    return "/".join([task.name, split] + ([row.kind] if row.kind else []))

  return [
    Problem(row.id, row.problem, row.solution or "", row.answer, source(row)) for row in ordered(rows, seed)[:count]
  ]


def _read(task, path: str, split: str) -> Rows:
  from synthneg_jax.data import datasets  # imports TFDS, which the embedded task does without

  fields = config_schema.field_map(task.fields)
  return datasets.from_files(path, task.name, split, skip_bad_rows=task.skip_bad_rows, fields=fields)


def _rows(task, split: str) -> Rows:
  """A split from where the config says it is, or from where the task's files are looked for."""
  if split == "test" and task.test_path:
    return _read(task, task.test_path, "test")
  if task.path:
    kind = "split" if hub.is_hub(task.path) and hub.parse(task.path).split else "file"
    if split == "test" and (kind == "split" or epath.Path(task.path).expanduser().is_file()):
      raise UserError(
        f"task.path={task.path} is a {kind} of training problems; name the test problems by task.test_path."
      )
    return _read(task, task.path, split)
  home = os.environ.get(_DATA_DIR, "")
  if task.name == "jsonl" or (task.name == "math" and not home):
    hint = "" if task.name == "jsonl" else f" or set {_DATA_DIR} to the folder that holds math/"
    raise UserError(f"task.path is empty: name the file or folder of the problems by --config.task.path{hint}.")
  if not home:
    from synthneg_jax.data import datasets

    return datasets.gsm8k(split)
  return _read(task, epath.Path(home) / task.name, split)
