"""The problems of a task by split, with their reference solutions.

Problems from files are sorted by a hash of seed and id. The first 8,000 are therefore among the
first 16,000, and neither the order of files and lines nor removed rows change the relative order.
The test split always uses seed 0.
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
_MAX_LOGGED = 5  # rows logged individually
_MANY_SOLUTIONS = 2000  # grading more takes seconds and is logged


@dataclasses.dataclass
class Splits:
  """The problems of a run.

  Attributes:
    train, test: problems; traces are sampled on the training problems.
    sft: problems for SFT in place of `train`; empty unless task.fresh_problems is set.
    figures: counts of dropped rows, for the stage's manifest.
    report: JSON objects, one per training problem that overlaps a test problem, per broken row, and
      per row whose solution is not graded as right; docs/data.md lists the fields.
  """

  train: list[Problem]
  test: list[Problem]
  figures: dict
  report: list[dict]
  sft: list[Problem] = dataclasses.field(default_factory=list)

  def sample_on_fresh(self, task) -> "Splits":
    """With task.fresh_problems, moves the first task.train_problems from `train` to `sft`."""
    if not task.fresh_problems:
      return self
    count = len(self.train) - task.fresh_problems
    return dataclasses.replace(self, sft=self.train[:count], train=self.train[count:])


def prompt_style(task) -> str:
  """The prompt style of the task's problems (data/prompts.py)."""
  return "raw" if task.name in generated.TASKS and generated.TASKS[task.name].raw else task.prompt


def is_drawn(task) -> bool:
  """Whether the task's problems are generated, in any number, rather than read from files."""
  return task.name in generated.TASKS or task.name == "reasoning_gym"


def choose_splits(task, seed: int) -> Splits:
  """Chooses the training and test problems of a task; larger numbers only append problems.

  Training problems that overlap any problem of the test split or of task.decontaminate_against
  (data/decontamination.py) are dropped first, as are those whose solution states another answer
  than the gold answer, unless task.gold_disagreements is "keep". With task.fresh_problems, traces
  are sampled on the training problems after the first task.train_problems.

  Args:
    task: the config's section.
    seed: seed of the generator, or of the order of the training problems from files.

  Raises:
    UserError: an unknown task, a missing or broken file, or too few problems.
  """
  if is_drawn(task):
    counts = {"test": task.test_problems, "train": task.train_problems + task.fresh_problems}
    test, train = (load(task, seed, split, count) for split, count in counts.items())
    unseen = {problem.prompt for problem in test}
    kept = [problem for problem in train if problem.prompt not in unseen]
    return Splits(kept, test, {"dropped_as_test": len(train) - len(kept)}, []).sample_on_fresh(task)
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
    overlaps = decontamination.overlaps(*texts, task.decontaminate_ngram)
    dropped = {overlap.index: overlap for overlap in overlaps}
  unseen = {row.problem for row in known}
  kept = [row for i, row in enumerate(train.rows) if i not in dropped and row.problem not in unseen]
  figures = {
    "dropped_as_test": len(train.rows) - len(kept),
    "skipped_rows": len(train.skipped) + len(test.skipped),
    "duplicates": train.duplicates + test.duplicates,
  }
  paths = (task.path, task.test_path, *task.decontaminate_against)
  if commits := {path: hub.commit(path) for path in paths if hub.is_hub(path)}:
    figures["hub_commits"] = commits
  report = [
    {
      "id": train.rows[i].id,
      "overlaps": known[overlap.test_index].id,
      "words": overlap.words,
      "share": round(overlap.share, 4),
    }
    for i, overlap in dropped.items()
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
  return Splits(taken, tested, figures, report + doubts).sample_on_fresh(task)


def _check_answers(task, rows: Rows) -> None:
  """Drops rows whose gold answer is unparsable or not equal to itself, so that none can be right.

  Raises:
    UserError: there is such a row, and task.skip_bad_rows is not set.
  """
  template = "#### {}" if task.answers == "integer" else "{}"

  def grade(golds):
    return _grade(task, [template.format(gold) for gold in golds], golds)

  golds = [row.answer for row in rows.rows]
  try:
    if all(verdict.correct for verdict in grade(golds)):
      return
  except UserError:  # does not name the row
    pass
  kept = []
  for row, gold in zip(rows.rows, golds, strict=True):
    try:
      verdict = grade([gold])[0]
      if verdict.correct:
        kept.append(row)
        continue
      problem = f"The gold answer {gold[:200]!r} is {verdict.reason} when graded against itself."
    except UserError as error:
      problem = str(error)
    if not task.skip_bad_rows:
      is_integer = task.answers == "integer"
      hint = "task.answers=math compares more than numbers, and " if is_integer else ""
      raise UserError(
        f"{row.id}: {problem.removesuffix('.')}; {hint}--skip_bad_rows drops such rows."
      )
    rows.skipped.append(f"{row.id}: {problem}")
  rows.rows = kept


def _grade(task, responses: Sequence[str], golds: Sequence[str]) -> list[answers.Verdict]:
  """Verdicts by the task's conventions, but only on marked answers: last lines are unreliable."""
  rules = {name: value for name, value in task.grading.items() if name != "timeout_s"}
  rules = answers.Conventions(**rules | {"extraction": "marked"})
  return answers.grade_many(
    responses, golds, kind=task.answers, timeout_s=task.grading.timeout_s, rules=rules
  )


def _log_disagreements(doubts: Sequence[dict]) -> None:
  for doubt in doubts[:_MAX_LOGGED]:
    action = "dropped" if doubt["left_out"] else "kept"
    logging.warning(
      "%s: the gold answer is %s, but the solution states %s; the row is %s.",
      doubt["id"],
      doubt["gold"],
      doubt["states"],
      action,
    )
  if len(doubts) > _MAX_LOGGED:
    more = len(doubts) - _MAX_LOGGED
    logging.warning("%d more solutions state another answer than the gold answer.", more)


def test_texts(task, seed: int) -> list[str]:
  """All problem texts of the test split and of task.decontaminate_against."""
  if is_drawn(task):
    return [problem.prompt for problem in load(task, seed, "test", task.test_problems)]
  paths = [_rows(task, "test"), *(_read(task, path, "test") for path in task.decontaminate_against)]
  return [row.problem for rows in paths for row in rows.rows]


def load(task, seed: int, split: str, count: int) -> list[Problem]:
  """The first `count` problems of a split, without decontamination.

  Args:
    task: the config's section.
    seed: seed of the generator, or of the order of problems from files.
    split: "train" or "test".
    count: number of problems.

  Raises:
    UserError: as in `choose`.
  """
  if task.name == "reasoning_gym":
    return reasoning.load(task, seed, split, count)
  if task.name in generated.TASKS:
    return generated.load(task, seed, split, count)
  return _first(task, _rows(task, split).rows, split, seed if split == "train" else 0, "", count)[0]


def ordered(rows: Iterable[Row], seed: int) -> list[Row]:
  """Sorts rows by a hash of seed and id."""

  def rank(row):
    return hashlib.blake2b(f"{seed}|{row.id}".encode(), digest_size=16).digest()

  return sorted(rows, key=rank)


def _first(
  task, rows: Sequence[Row], split: str, seed: int, note: str, count: int | None = None
) -> tuple[list[Problem], list[dict]]:
  """The first problems of a split, without training problems that have a gold disagreement.

  Args:
    task: the config's section.
    rows: candidate rows.
    split: "train" or "test"; test problems are never dropped.
    seed: seed of the order.
    note: appended to the error message, about rows dropped earlier.
    count: number of problems; None for the config's number.

  Returns:
    The problems, and a report entry for each examined row whose solution is not graded as right.

  Raises:
    UserError: too few problems.
  """
  count = task[f"{split}_problems"] if count is None else count
  queue, taken, doubts = iter(ordered(rows, seed)), [], []
  drops = split == "train" and task.gold_disagreements == "drop"
  while batch := list(itertools.islice(queue, count - len(taken))):
    # "exact" compares whole responses, which worked solutions are not.
    solved = [row for row in batch if row.solution and task.answers != "exact"]
    if task.answers == "math" and len(solved) > _MANY_SOLUTIONS:
      logging.info("Grading %d solutions against their gold answers.", len(solved))
    graded = _grade(task, [row.solution for row in solved], [row.answer for row in solved])
    verdicts = {
      row.id: verdict for row, verdict in zip(solved, graded, strict=True) if not verdict.correct
    }
    for row in batch:
      verdict = verdicts.get(row.id)
      left_out = drops and verdict is not None and verdict.reason == "wrong"
      if not left_out:
        taken.append(row)
      if verdict is not None:
        doubts.append(
          {
            "id": row.id,
            "gold": row.answer,
            "states": verdict.extracted,
            "reason": verdict.reason,
            "left_out": left_out,
          }
        )
  if count > len(taken):
    notes = [note] if note else []
    if num_dropped := sum(doubt["left_out"] for doubt in doubts):
      notes.append(
        f"{num_dropped} more have a solution that states another answer than the gold one"
      )
    others = f" ({', '.join(notes)})" if notes else ""
    raise UserError(
      f"The {split} split has {len(taken)} problems{others}, fewer than "
      f"task.{split}_problems={count}."
    )

  def source(row):
    return "/".join([task.name, split] + ([row.kind] if row.kind else []))

  return [
    Problem(row.id, row.problem, row.solution or "", row.answer, source(row)) for row in taken
  ], doubts


def _read(task, path: str, split: str) -> Rows:
  from synthneg_jax.data import datasets  # imports TFDS, which the embedded task does not need

  fields = config_schema.field_map(task.fields)
  return datasets.from_files(
    path, task.name, split, skip_bad_rows=task.skip_bad_rows, fields=fields
  )


def _rows(task, split: str) -> Rows:
  """Reads a split from the configured path, or from the task's default location."""
  if split == "test" and task.test_path:
    return _read(task, task.test_path, "test")
  if task.path:
    kind = "split" if hub.is_hub(task.path) and hub.parse(task.path).split else "file"
    if split == "test" and (kind == "split" or epath.Path(task.path).expanduser().is_file()):
      raise UserError(
        f"task.path={task.path} is a {kind} of training problems; set task.test_path for the test "
        "problems."
      )
    return _read(task, task.path, split)
  home = os.environ.get(_DATA_DIR, "")
  if task.name == "jsonl" or (task.name == "math" and not home):
    hint = "" if task.name == "jsonl" else f" or set {_DATA_DIR} to the folder that contains math/"
    raise UserError(
      f"task.path is empty; set --config.task.path to the problems' file or folder{hint}."
    )
  if not home:
    from synthneg_jax.data import datasets

    return datasets.gsm8k(split)
  return _read(task, epath.Path(home) / task.name, split)
