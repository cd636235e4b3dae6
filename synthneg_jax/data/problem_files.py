"""Problems from files: JSON lines or a tree of JSON files, in the formats that people have.

What a row is, is told by its fields, so that training and test files may differ:

    question, answer                     GSM8K as published: `answer` is the solution and ends in `#### gold answer`
    problem, solution [level, type]      competition MATH: the gold answer is the solution's last \\boxed{}
    problem, answer [solution, id ...]   any other file; MATH-500's `unique_id` counts as an id
    prompt, answer, id [solution]        a Problem record of ours: a written D_syn

A broken row is an error that names the file, the line (1-based) and the field, or, where the caller asks for it, is left
out and counted. Ids are stable: the one given; for a tree the file's place in it; else a hash of the problem's text, so
that neither order nor file matters.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator

from etils import epath

from synthneg_jax.grading import answers
from synthneg_jax.runtime import errors

# A calculator annotation of GSM8K, for example <<48/2=24>>.
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"(?:[^$\n\\]|\\(?![\])])){0,200}")
_MATH_ID = re.compile(r"(?:train|test)/.+\.json")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Row:
  """One problem as a file has it."""

  id: str
  problem: str
  solution: str | None  # with its answer last; None where there is none
  answer: str  # the gold answer alone
  kind: str  # "algebra/level 5" as far as the file says; else ""


@dataclasses.dataclass
class Rows:
  """What a file or folder holds, in its order.

  Attributes:
    rows: the good ones, ids unique.
    skipped: for each row left out because it is broken, the sentence that would have been the error.
    duplicates: rows left out because their text and answer stand in an earlier one.
  """

  rows: list[Row] = dataclasses.field(default_factory=list)
  skipped: list[str] = dataclasses.field(default_factory=list)
  duplicates: int = 0


def find(path: epath.PathLike, split: str) -> list[epath.Path]:
  """The files of a split.

  Args:
    path: a file; or a folder with `<split>.jsonl`, with a folder `<split>/` of JSON lines, of single JSON files, or of folders
      of those (MATH's tree), or, where it has no splits, with such files itself.
    split: "train" or "test".

  Returns:
    Files in the order of their names, at least one.

  Raises:
    UserError: there is none.
  """
  path = epath.Path(path).expanduser()
  try:
    if path.is_file():
      return [path]
    if (path / f"{split}.jsonl").is_file():
      return [path / f"{split}.jsonl"]
    other = {"train": "test", "test": "train"}[split]
    for folder in (path / split, path):
      if folder == path and ((path / other).is_dir() or (path / f"{other}.jsonl").is_file()):
        break  # it holds splits, but not this one
      for pattern in ("*.jsonl", "*.json", "*/*.json"):
        if folder.is_dir() and (found := sorted(folder.glob(pattern))):
          return found
  except OSError as error:
    raise errors.UserError(f"The problems in {path} cannot be read: {error.strerror}.") from None
  if not path.exists():
    raise errors.UserError(f"The problem file {path} does not exist.")
  raise errors.UserError(f"The folder {path} holds no {split}.jsonl, no {split}/ with JSON files and none of its own.")


def last_box(text: str) -> str | None:
  """What the last \\boxed{} (or \\fbox{}) of a text holds, braces balanced; None where none is whole.

  `\\boxed 7` holds what follows up to the formula's end, as in MATH. One pass, whatever the text.
  """
  opened, close_of = [], {}
  for brace in _BRACE.finditer(text):
    if brace.group() == "{":
      opened.append(brace.start())
    elif brace.group() == "}" and opened:
      close_of[opened.pop()] = brace.start()
  found = None
  for box in _BOX.finditer(text):
    start = box.end()
    if text[start : start + 1] != "{":
      found = _BARE.match(text, start).group().strip() or found
    elif start in close_of:
      found = text[start + 1 : close_of[start]].strip() or found
  return found


def _text(row: dict, field: str) -> str:
  """A field that must be nonblank text; UserError without the place otherwise."""
  if field not in row:
    raise errors.UserError(f'the field "{field}" is missing')
  value = row[field]
  if not isinstance(value, str):
    raise errors.UserError(f'the field "{field}" must be text in quotes, not a {type(value).__name__}')
  if not value.strip():
    raise errors.UserError(f'the field "{field}" is blank')
  try:
    value.encode("utf-8")
  except UnicodeEncodeError:
    raise errors.UserError(f'the field "{field}" holds half of a surrogate pair') from None
  if "\0" in value:
    raise errors.UserError(f'the field "{field}" holds a NUL character')
  return value.replace("\r\n", "\n")


def _optional(row: dict, field: str) -> str | None:
  """As `_text`, but None for a field that is absent, null or empty."""
  return None if row.get(field) in (None, "") else _text(row, field)


def _kind(row: dict) -> str:
  """MATH's subject and level; its level is "Level 5", MATH-500's the number 5."""
  subject, level = row.get("type") or row.get("subject"), row.get("level")
  parts = [subject.lower()] if isinstance(subject, str) else []
  digits = re.search(r"\d+", str(level)) if isinstance(level, (str, int)) else None
  return "/".join(parts + ([f"level {digits.group()}"] if digits else []))


def _parse(data: bytes) -> dict:
  """The JSON object in a line or file; UserError without the place for anything else."""
  if not data.strip():
    raise errors.UserError("blank")
  try:
    row = json.loads(data.decode("utf-8"))
  except (ValueError, RecursionError) as error:
    raise errors.UserError(f"not JSON in UTF-8 ({error})") from None
  if not isinstance(row, dict):
    raise errors.UserError(f"it must be a JSON object, not a {type(row).__name__}")
  return row


def read_row(row: dict, prefix: str, given_id: str | None = None, keep_annotations: bool = False) -> Row:
  """One row in any of the formats.

  Args:
    row: the JSON object.
    prefix: of an id that is a hash, "gsm8k/train".
    given_id: of a row whose place is its id.
    keep_annotations: keeps GSM8K's calculator annotations `<<...>>` in the solution.

  Raises:
    UserError: the field that is at fault, without the place.
  """
  if "question" in row and "problem" not in row:
    problem, solution = _text(row, "question"), _text(row, "answer")
    try:
      answer = answers.extract_gold(solution)
    except errors.UserError as error:
      raise errors.UserError(f'the field "answer": {str(error).removesuffix(".")}') from None
    if not keep_annotations:
      solution = _ANNOTATION.sub("", solution)
  elif "problem" in row or "prompt" in row:
    problem = _text(row, "problem" if "problem" in row else "prompt")
    solution = _optional(row, "solution")
    answer = None if "answer" not in row and solution else _text(row, "answer")
    if answer is None:
      answer = last_box(solution)
    if answer is None:
      raise errors.UserError('the field "solution" has no \\boxed{} with an answer, and there is no "answer"')
  else:
    raise errors.UserError('the field "problem" is missing (or "question", as in GSM8K, or "prompt", as in a D_syn)')
  name = given_id or _optional(row, "id") or _optional(row, "unique_id")
  if name is not None and _MATH_ID.fullmatch(name):
    name = f"math/{name.removesuffix('.json')}"  # MATH-500 names MATH's files
  if name is None:
    name = f"{prefix}/{hashlib.blake2b(' '.join(problem.split()).encode(), digest_size=8).hexdigest()}"
  return Row(name, problem, solution, answer, _kind(row))


def _entries(
  files: list[epath.Path], path: epath.Path, name: str, split: str
) -> Iterator[tuple[str, str | None, bytes]]:
  """(place, id of the place or None, bytes) of every line of JSON lines, and of every single JSON file."""
  folder = path / split if (path / split).is_dir() else path
  for file in files:
    try:
      data = file.read_bytes()
    except OSError as error:
      raise errors.UserError(f"The problem file {file} cannot be read: {error.strerror}.") from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    if file.suffix == ".json":
      place = file.relative_to(folder).with_suffix("") if file != path else file.stem
      yield str(file), f"{name}/{split}/{place}", data
      continue
    if not data:
      raise errors.UserError(f"The problem file {file} is empty.")
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
      yield f"{file}, line {number}", None, line


def read(
  path: epath.PathLike, name: str, split: str, *, skip_bad_rows: bool = False, keep_annotations: bool = False
) -> Rows:
  """All rows of a split of a dataset.

  Args:
    path: as in `find`.
    name: of the dataset: "gsm8k", "math" or "jsonl"; ids that are not given begin with it and the split.
    split: "train" or "test".
    skip_bad_rows: leaves broken rows out, with a sentence each, instead of stopping at the first.
    keep_annotations: as in `read_row`.

  Raises:
    UserError: no file, or (unless skip_bad_rows) a broken row, or one whose id stands in an earlier row; no good row.
  """
  made, place_of, seen = Rows(), {}, {}
  for place, given_id, data in _entries(find(path, split), epath.Path(path).expanduser(), name, split):
    try:
      row = read_row(_parse(data), f"{name}/{split}", given_id, keep_annotations)
      if row.id in seen:
        if (row.problem.split(), row.answer) == seen[row.id] and row.id.startswith(f"{name}/{split}/"):
          made.duplicates += 1
          continue
        raise errors.UserError(f'the "id" {row.id!r}, or the text it is a hash of, stands in {place_of[row.id]}, too')
    except errors.UserError as error:
      if not skip_bad_rows:
        raise errors.UserError(f"{place}: {error}; --skip_bad_rows leaves such rows out and counts them.") from None
      made.skipped.append(f"{place}: {error}.")
      continue
    place_of[row.id], seen[row.id] = place, (row.problem.split(), row.answer)
    made.rows.append(row)
  if not made.rows:
    raise errors.UserError(
      f"{path}: none of {len(made.skipped)} rows of {split} is whole; the first: {made.skipped[0]}"
    )
  return made
