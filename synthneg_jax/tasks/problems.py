"""The problems of a task by split, with their known solutions.

Problems from files stand in the order of a hash of seed and id. So the first 8,000 are among the
first 16,000, neither the order of files and lines nor the loss of single rows changes who is before
whom, and two splits or sources need no common count. The test split's order is that of seed 0
whatever the run's seed.
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence

from absl import logging
from etils import epath

from synthneg_jax.data import decontamination, hub
from synthneg_jax.data.problem_files import Row, Rows
from synthneg_jax.data.records import Problem
from synthneg_jax.grading import answers
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import generated, reasoning

_DATA_DIR = "SYNTHNEG_DATA_DIR"
_LOGGED = 5  # rows that are logged one by one
_ANNOUNCED = 2000  # solutions whose grading takes seconds


@dataclasses.dataclass
class Chosen:
  """The problems of a run.

  Attributes:
    train, test: problems; traces are sampled on the training problems.
    sft: problems whose solutions SFT sees instead of those of `train`; empty unless
      task.fresh_problems is set.
    figures: counts of what was left out, for the stage's manifest.
    report: one JSON-ready object a training problem that was left out because it overlaps a test
      problem, one a broken row, and one a row whose solution is not graded as right; docs/data.md
      has the fields.
  """

  train: list[Problem]
  test: list[Problem]
  figures: dict
  report: list[dict]
  sft: list[Problem] = dataclasses.field(default_factory=list)

  def sample_on_fresh(self, task) -> "Chosen":
    """With task.fresh_problems, the first task.train_problems are SFT's alone, and traces are
    sampled on the others.
    """
    if not task.fresh_problems:
      return self
    count = len(self.train) - task.fresh_problems
    return dataclasses.replace(self, sft=self.train[:count], train=self.train[count:])


def prompt_style(task) -> str:
  """How the task's problems are put to the model (data/prompts.py)."""
  return "raw" if task.name in generated.TASKS and generated.TASKS[task.name].raw else task.prompt


def is_drawn(task) -> bool:
  """Whether a program writes the task's problems, so that there are as many as one likes; else they
  are read from files.
  """
  return task.name in generated.TASKS or task.name == "reasoning_gym"


def choose(task, seed: int) -> Chosen:
  """The training and test problems of a task; more of them have the fewer ones first.

  With task.fresh_problems the training problems after the first task.train_problems are the ones
  sampled on.

  Training problems that overlap a test problem (data/decontamination.py), one of the whole test
  split and of task.decontaminate_against, are left out before the first task.train_problems are
  taken. So are those of which the solution states another answer than the gold one, unless
  task.gold_disagreements is "keep".

  Args:
    task: the config's section.
    seed: generated tasks: of the generator; files: of the training problems' order.

  Raises:
    UserError: an unknown task, a missing or broken file, or too few problems.
  """
  if is_drawn(task):
    counts = {"test": task.test_problems, "train": task.train_problems + task.fresh_problems}
    test, train = (load(task, seed, split, count) for split, count in counts.items())
    unseen = {problem.prompt for problem in test}
    kept = [problem for problem in train if problem.prompt not in unseen]
    return Chosen(kept, test, {"dropped_as_test": len(train) - len(kept)}, []).sample_on_fresh(task)
  test, train = _rows(task, "test"), _rows(task, "train")
  for rows in (test, train):
    _check_answers(task, rows)
  known = [
    *test.rows,
    *(row for path in task.decontaminate_against for row in _read(task, path, "test").rows),
  ]
  dropped = {}
  if task.decontaminate_ngram:
    texts = [[row.problem for row in rows] for rows in (train.rows, known)]
    dropped = {
      found.index: found for found in decontamination.overlaps(*texts, task.decontaminate_ngram)
    }
  unseen = {row.problem for row in known}
  kept = [row for i, row in enumerate(train.rows) if i not in dropped and row.problem not in unseen]
  figures = {
    "dropped_as_test": len(train.rows) - len(kept),
    "skipped_rows": len(train.skipped) + len(test.skipped),
    "duplicates": train.duplicates + test.duplicates,
  }
  paths = [
    path for path in (task.path, task.test_path, *task.decontaminate_against) if hub.is_hub(path)
  ]
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
  note = f"{figures['dropped_as_test']} more overlap test problems"
  taken, doubts = _first(task, kept, "train", seed, note, task.train_problems + task.fresh_problems)
  tested, test_doubts = _first(task, test.rows, "test", 0, "")
  figures["gold_disagreements"] = sum(doubt["reason"] == "wrong" for doubt in doubts)
  figures["test_gold_disagreements"] = sum(doubt["reason"] == "wrong" for doubt in test_doubts)
  doubts += test_doubts
  figures["unreadable_solutions"] = sum(doubt["reason"] != "wrong" for doubt in doubts)
  _log_disagreements([doubt for doubt in doubts if doubt["reason"] == "wrong"])
  return Chosen(taken, tested, figures, report + doubts).sample_on_fresh(task)


def _check_answers(task, rows: Rows) -> None:
  """Takes rows out whose gold answer the grader cannot read, or does not find equal to itself: no
  response could be right.

  Raises:
    UserError: there is one, and task.skip_bad_rows is not set.
  """
  state = "#### {}".format if task.answers == "integer" else str

  def grade(golds):
    return _grade(task, [state(gold) for gold in golds], golds)

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
      hint = (
        "task.answers=math compares more than numbers, and " if task.answers == "integer" else ""
      )
      raise UserError(
        f"{row.id}: {complaint.removesuffix('.')}; {hint}--skip_bad_rows leaves such rows out."
      )
    rows.skipped.append(f"{row.id}: {complaint}")
  rows.rows = kept


def _grade(task, responses: Sequence[str], golds: Sequence[str]) -> list[answers.Verdict]:
  """Verdicts by the task's rules."""
  rules = {name: value for name, value in task.grading.items() if name != "timeout_s"}
  rules = answers.Conventions(
    **rules | {"extraction": "marked"}
  )  # what only the last line says is no disagreement
  return answers.grade_many(
    responses, golds, kind=task.answers, timeout_s=task.grading.timeout_s, rules=rules
  )


def _log_disagreements(doubts: Sequence[dict]) -> None:
  for doubt in doubts[:_LOGGED]:
    logging.warning(
      "%s: the gold answer is %s, and the solution states %s; the row is %s.",
      doubt["id"],
      doubt["gold"],
      doubt["states"],
      "left out" if doubt["left_out"] else "kept",
    )
  if len(doubts) > _LOGGED:
    logging.warning(
      "%d more rows state another answer than their gold answer.", len(doubts) - _LOGGED
    )


def test_texts(task, seed: int) -> list[str]:
  """What no training problem may overlap: all problems of the test split, and those of
  task.decontaminate_against.
  """
  if is_drawn(task):
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
  if task.name == "reasoning_gym":
    return reasoning.load(task, seed, split, count)
  if task.name in generated.TASKS:
    return generated.load(task, seed, split, count)
  return _first(task, _rows(task, split).rows, split, seed if split == "train" else 0, "", count)[0]


def ordered(rows: Iterable[Row], seed: int) -> list[Row]:
  """Rows in the order of a hash of seed and id."""

  def rank(row):
    return hashlib.blake2b(f"{seed}|{row.id}".encode(), digest_size=16).digest()

  return sorted(rows, key=rank)


def _first(
  task, rows: Sequence[Row], split: str, seed: int, note: str, count: int | None = None
) -> tuple[list[Problem], list[dict]]:
  """The first problems of a split; training problems with a gold disagreement do not count.

  Args:
    task: the config's section.
    rows: all that may be taken.
    split: "train" or "test"; problems of the test split are never left out.
    seed: of the order.
    note: about rows that are gone already, for the sentence of the error.
    count: how many; None for the config's number.

  Returns:
    (the problems; an entry of the report for each row looked at whose solution is not right).

  Raises:
    UserError: there are too few.
  """
  count = task[f"{split}_problems"] if count is None else count
  queue, taken, doubts = iter(ordered(rows, seed)), [], []
  drops = split == "train" and task.gold_disagreements == "drop"
  while batch := list(itertools.islice(queue, count - len(taken))):
    solved = [row for row in batch if row.solution]
    if task.answers == "math" and len(solved) > _ANNOUNCED:
      logging.info("%d solutions are graded against their gold answers.", len(solved))
    graded = (
      _grade(task, [row.solution for row in solved], [row.answer for row in solved])
      if solved
      else []
    )
    verdicts = {
      row.id: verdict for row, verdict in zip(solved, graded, strict=True) if not verdict.correct
    }
    for row in batch:
      verdict = verdicts.get(row.id)
      left_out = drops and verdict is not None and verdict.reason == "wrong"
      if not left_out:
        taken.append(row)
      if verdict is not None:
        about = {
          "id": row.id,
          "gold": row.answer,
          "states": verdict.extracted,
          "reason": verdict.reason,
        }
        doubts.append(about | {"left_out": left_out})
  if count > len(taken):
    notes = [note] if note else []
    if gone := sum(doubt["left_out"] for doubt in doubts):
      notes.append(f"{gone} more state another answer in the solution than the gold one")
    others = f" ({', '.join(notes)})" if notes else ""
    raise UserError(
      f"The {split} split has {len(taken)} problems{others}; task.{split}_problems={count} asks "
      "for more."
    )

  def source(row):
    return "/".join([task.name, split] + ([row.kind] if row.kind else []))

  return [
    Problem(row.id, row.problem, row.solution or "", row.answer, source(row)) for row in taken
  ], doubts


def _read(task, path: str, split: str) -> Rows:
  from synthneg_jax.data import datasets  # imports TFDS, which the embedded task does without

  fields = config_schema.field_map(task.fields)
  return datasets.from_files(
    path, task.name, split, skip_bad_rows=task.skip_bad_rows, fields=fields
  )


def _rows(task, split: str) -> Rows:
  """A split from where the config says it is, or from where the task's files are looked for."""
  if split == "test" and task.test_path:
    return _read(task, task.test_path, "test")
  if task.path:
    kind = "split" if hub.is_hub(task.path) and hub.parse(task.path).split else "file"
    if split == "test" and (kind == "split" or epath.Path(task.path).expanduser().is_file()):
      raise UserError(
        f"task.path={task.path} is a {kind} of training problems; name the test problems by "
        "task.test_path."
      )
    return _read(task, task.path, split)
  home = os.environ.get(_DATA_DIR, "")
  if task.name == "jsonl" or (task.name == "math" and not home):
    hint = "" if task.name == "jsonl" else f" or set {_DATA_DIR} to the folder that holds math/"
    raise UserError(
      f"task.path is empty: name the file or folder of the problems by --config.task.path{hint}."
    )
  if not home:
    from synthneg_jax.data import datasets

    return datasets.gsm8k(split)
  return _read(task, epath.Path(home) / task.name, split)
