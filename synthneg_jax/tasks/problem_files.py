"""Problems from JSON-lines files: GSM8K as published, and any file with `problem` and `answer`.

Every row becomes a dict of `id`, `problem`, `solution` and `answer`, all text; `solution` is None where there is none.
A broken line is an error that names the file, the line (1-based) and the field; no line is ever skipped.
"""

import json
import os
import re
from collections.abc import Iterator

from etils import epath

from synthneg_jax.runtime import errors
from synthneg_jax.tasks import answers

# A calculator annotation of GSM8K, for example <<48/2=24>>.
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


def _lines(path: epath.Path) -> list[bytes]:
  """Returns the lines of a file; UserError where it cannot be read or holds no line."""
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    raise errors.UserError(
      f"The problem file {path} does not exist; name a file that does, or set SYNTHNEG_DATA_DIR to the folder that "
      "holds gsm8k/train.jsonl and gsm8k/test.jsonl."
    ) from None
  except OSError as error:
    raise errors.UserError(f"The problem file {path} cannot be read: {error.strerror}.") from None
  lines = data.removesuffix(b"\n").split(b"\n")
  if lines == [b""]:
    raise errors.UserError(f"The problem file {path} is empty.")
  return lines


def _objects(path: epath.Path) -> Iterator[tuple[str, dict]]:
  """Yields ("PATH, line N", object) for every line; UserError for a line that is not a JSON object."""
  for number, line in enumerate(_lines(path), start=1):
    place = f"{path}, line {number}"
    if not line.strip():
      raise errors.UserError(f"{place}: the line is blank.")
    try:
      row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
      raise errors.UserError(f"{place}: the line is not JSON in UTF-8 ({error}).") from None
    if not isinstance(row, dict):
      raise errors.UserError(f"{place}: the line must be a JSON object, not a {type(row).__name__}.")
    yield place, row


def _text_field(place: str, row: dict, field: str) -> str:
  """Returns a field that must be nonblank text; UserError otherwise."""
  if field not in row:
    raise errors.UserError(f'{place}: the field "{field}" is missing.')
  value = row[field]
  if not isinstance(value, str):
    raise errors.UserError(f'{place}: the field "{field}" must be text in quotes, not a {type(value).__name__}.')
  if not value.strip():
    raise errors.UserError(f'{place}: the field "{field}" is blank.')
  try:
    value.encode("utf-8")
  except UnicodeEncodeError:
    raise errors.UserError(f'{place}: the field "{field}" holds half of a surrogate pair.') from None
  return value


def read_rows(path: str | os.PathLike, split: str, *, keep_annotations: bool = False) -> list[dict]:
  """Reads a GSM8K file, whose lines hold `question` and `answer` (the solution, ending in `#### answer`).

  Args:
    path: the JSON-lines file.
    split: name of the split, for the ids: "gsm8k/SPLIT/00000" is the first line.
    keep_annotations: keeps the calculator annotations `<<...>>` in the solutions.

  Returns:
    The rows in file order: `id`, `problem`, `solution` (with its `####` line) and `answer` (as `extract_gold` gives
    it).

  Raises:
    UserError: the file cannot be read or a line is broken.
  """
  rows = []
  for index, (place, row) in enumerate(_objects(epath.Path(path))):
    problem, solution = _text_field(place, row, "question"), _text_field(place, row, "answer")
    try:
      answer = answers.extract_gold(solution)
    except errors.UserError as error:
      raise errors.UserError(f'{place}: the field "answer": {error}') from None
    if not keep_annotations:
      solution = _ANNOTATION.sub("", solution)
    rows.append({"id": f"gsm8k/{split}/{index:05d}", "problem": problem, "solution": solution, "answer": answer})
  return rows


def read_jsonl_problems(path: str | os.PathLike) -> list[dict]:
  """Reads any JSON-lines file whose lines hold `problem` and `answer`, and optionally `solution` and `id`.

  The answer is kept as it stands (the grader that a run chooses judges it). A null `solution` or `id` counts as absent;
  a row without an id gets "NAME/00000", with the file's name without its ending and the 0-based line index.

  Returns:
    The rows in file order: `id`, `problem`, `solution` (None if absent) and `answer`.

  Raises:
    UserError: the file cannot be read, a line is broken, or two lines have the same id.
  """
  path = epath.Path(path)
  rows, line_of = [], {}
  for index, (place, row) in enumerate(_objects(path)):
    name = f"{path.stem}/{index:05d}" if row.get("id") is None else _text_field(place, row, "id")
    if name in line_of:
      raise errors.UserError(f'{path}: lines {line_of[name]} and {index + 1} have the same "id", {name!r}.')
    line_of[name] = index + 1
    solution = None if row.get("solution") is None else _text_field(place, row, "solution")
    problem, answer = _text_field(place, row, "problem"), _text_field(place, row, "answer")
    rows.append({"id": name, "problem": problem, "solution": solution, "answer": answer})
  return rows
