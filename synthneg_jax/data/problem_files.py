"""Reads problems from JSON lines, JSON, Parquet or a tree of JSON files, in common formats.

A row's fields identify its format, so training and test files may differ:

    question, answer                  GSM8K: `answer` is the solution, ending in `#### gold answer`
    problem, solution [level, type]   competition MATH: the solution states the gold answer
    problem or question, answer [solution, id ...]
                                      any other file; MATH-500's `unique_id` counts as an id
    query, response                   MetaMathQA: the response is the solution
    prompt, reward_model.ground_truth DAPO and verl: `prompt` is a chat with one user turn
    messages [answer]                 a chat for finetuning: the assistant's turn is the solution
    prompt, answer, id [solution]     our own Problem record, from a D_syn

Without a gold answer in a field, the solution states it: in its \\boxed{} (all boxes if they are
parts of one answer), else after the last `####` or "the answer is". A chat's system turn is
dropped; use task.instruction instead.

A broken row raises an error that names the file, the line (1-based) and the field, unless the
caller asks to skip and count such rows. Ids are stable: the given id (a number is prefixed with the
dataset's name and split); for a tree, the file's path in it; else a hash of the problem's text,
independent of order and file.
"""

import dataclasses
import fnmatch
import gzip
import hashlib
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from etils import epath

from synthneg_jax.data import hub
from synthneg_jax.data.hub import SUFFIXES
from synthneg_jax.grading import answers
from synthneg_jax.runtime import errors

# GSM8K's calculator annotations, such as <<48/2=24>>.
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"(?:[^$\n\\]|\\(?![\])])){0,200}")
_MATH_ID = re.compile(r"(?:train|test)/.+\.json")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# Text between boxes that are parts of one answer: LaTeX punctuation, "and", "or", `x =`.
_JOINT = re.compile(
  r"(?:[\s$,;&]|\\[\[\]()\\,;: ]|\\q?quad"
  r"|\\(?:text|mbox|textrm|mathrm)\s*\{[\s,;]*(?:and|or)?[\s,;]*\}|\b(?:and|or)\b"
  r"|\b[A-Za-z]\s*=)*+"
)


@dataclasses.dataclass(frozen=True)
class Row:
  """One problem of a file."""

  id: str
  problem: str
  solution: str | None  # answer last; None if the file has none
  answer: str  # the gold answer alone
  kind: str  # such as "algebra/level 5"; "" if the file does not say


@dataclasses.dataclass
class Rows:
  """The problems of a file or folder, in order.

  Attributes:
    rows: valid rows with unique ids.
    skipped: the error message of each broken row.
    duplicates: number of rows dropped because an earlier row has the same text and answer.
  """

  rows: list[Row] = dataclasses.field(default_factory=list)
  skipped: list[str] = dataclasses.field(default_factory=list)
  duplicates: int = 0


def _names_in(folder: epath.Path) -> list[str]:
  return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


def _files_in(folder: epath.Path) -> list[epath.Path]:
  """A folder's problem files of one suffix, else the JSON files in its subfolders (MATH's tree)."""
  names = _names_in(folder)
  for suffix in SUFFIXES:
    if files := [folder / name for name in names if name.endswith(suffix)]:
      return files
  return sorted(folder.glob("*/*.json"))


def _split_files(root: epath.Path, split: str) -> list[epath.Path]:
  """A split's files: `split` or its parts (train-0-of-1.parquet), here, in data/ or in split/."""
  for folder in (root, root / "data"):
    names = _names_in(folder)
    for pattern in (split, f"{split}-*"):
      for suffix in SUFFIXES:
        if files := [folder / name for name in fnmatch.filter(names, pattern + suffix)]:
          return files
  return _files_in(root / split) if (root / split).is_dir() else []


def find(path: epath.PathLike, split: str) -> list[epath.Path]:
  """The files of a split: .jsonl, .jsonl.gz, .parquet or .json.

  Args:
    path: a dataset on the Hub (data/hub.py), a file, or a folder. A folder holds `<split>.jsonl`;
      or parts (`train-00000-of-00001.parquet`), possibly in `data/`; or a folder `<split>/` of
      such files, of JSON files with one problem each, or of subfolders of those (MATH's tree). A
      folder without splits may hold such files directly.
    split: "train" or "test".

  Returns:
    Files sorted by name, at least one.

  Raises:
    UserError: no file was found.
  """
  if hub.is_hub(path):
    return hub.files(path, split)
  path = epath.Path(path).expanduser()
  try:
    if path.is_file():
      return [path]
    if files := _split_files(path, split):
      return files
    other = {"train": "test", "test": "train"}[split]
    if not _split_files(path, other) and (files := _files_in(path)):
      return files
  except OSError as error:
    raise errors.UserError(f"The problems in {path} cannot be read: {error.strerror}.") from None
  if not path.exists():
    raise errors.UserError(f"The problem file {path} does not exist.")
  raise errors.UserError(
    f"The folder {path} holds no {split}.jsonl, no {split}/ with JSON files and no problem files "
    f"({', '.join(SUFFIXES)})."
  )


class _Box(NamedTuple):
  """A box in a text, with its content."""

  start: int
  stop: int
  content: str


def _boxes(text: str) -> list[_Box]:
  """All closed, nonempty \\boxed{} and \\fbox{}, nested ones included. Takes linear time."""
  opened, close_of = [], {}
  for brace in _BRACE.finditer(text):
    if brace.group() == "{":
      opened.append(brace.start())
    elif brace.group() == "}" and opened:
      close_of[opened.pop()] = brace.start()
  boxes = []
  for match in _BOX.finditer(text):
    start = match.end()
    if text[start : start + 1] != "{":
      bare = _BARE.match(text, start)
      boxes.append(_Box(match.start(), bare.end(), bare.group().strip()))
    elif start in close_of:
      stop = close_of[start]
      boxes.append(_Box(match.start(), stop + 1, text[start + 1 : stop].strip()))
  return [box for box in boxes if box.content]


def stated_answer(solution: str) -> str | None:
  """The answer in a solution's boxes, else after its last `####` or "the answer is"; None for none.

  The last boxes that only commas, "and", "or" or line breaks separate form one answer, such as
  "2, 3".
  """
  boxed = boxed_answer(solution)
  return boxed[0] if boxed else answers.stated_answer(solution)


def boxed_answer(text: str) -> tuple[str, int] | None:
  """Returns (the answer in a text's last boxes, the position behind them); None without a box.

  Boxes are closed \\boxed{} and \\fbox{}. As in MATH, `\\boxed 7` without braces extends to the end
  of the formula.
  """
  boxes = _boxes(text)
  within = itertools.pairwise(boxes)
  boxes = [box for box, inner in within if inner.start >= box.stop] + boxes[-1:]
  if not boxes:
    return None
  first = len(boxes) - 1
  while first and _JOINT.fullmatch(text[boxes[first - 1].stop : boxes[first].start]):
    first -= 1
  answer = ", ".join(dict.fromkeys(box.content for box in boxes[first:]))
  return answer, boxes[-1].stop


def _text(row: dict, field: str) -> str:
  """A field that must hold nonblank text. UserError names the field, not the row."""
  if field not in row:
    raise errors.UserError(f'the field "{field}" is missing')
  value = row[field]
  if not isinstance(value, str):
    raise errors.UserError(f'the field "{field}" must be a string, not a {type(value).__name__}')
  if not value.strip():
    raise errors.UserError(f'the field "{field}" is blank')
  try:
    value.encode("utf-8")
  except UnicodeEncodeError:
    raise errors.UserError(f'the field "{field}" holds an unpaired surrogate') from None
  if "\0" in value:
    raise errors.UserError(f'the field "{field}" holds a NUL character')
  return value.replace("\r\n", "\n")


def _answer(row: dict) -> str | None:
  """A row's gold answer, text or a number, as text; None for none."""
  answer, reward = row.get("answer"), row.get("reward_model")
  if answer is None and isinstance(reward, dict):
    answer = reward.get("ground_truth")
  if answer is None or answer == "":
    return None
  if isinstance(answer, bool) or not isinstance(answer, str | int | float):
    raise errors.UserError(
      f'the field "answer" must be a string or a number, not a {type(answer).__name__}'
    )
  if isinstance(answer, str):
    return _text({"answer": answer}, "answer")
  if isinstance(answer, float) and not math.isfinite(answer):
    raise errors.UserError('the field "answer" must be a finite number')
  return str(int(answer) if answer == int(answer) else answer)


def _chat(row: dict, field: str) -> dict:
  """Adds "problem" and, if the assistant answers, "solution" to a row that holds a chat."""
  turns = row[field]
  if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
    raise errors.UserError(f'the field "{field}" must hold turns with "role" and "content"')
  by_role = {"system": [], "user": [], "assistant": []}
  for turn in turns:
    if turn.get("role") not in by_role:
      raise errors.UserError(
        f'a "role" in "{field}" must be one of {", ".join(by_role)}, not {turn.get("role")!r}'
      )
    by_role[turn["role"]].append(_text(turn, "content"))
  questions, replies = by_role["user"], by_role["assistant"]
  if len(questions) != 1:
    raise errors.UserError(f'the field "{field}" must hold one user turn, not {len(questions)}')
  if replies and field == "prompt":
    raise errors.UserError('the field "prompt" must not hold an assistant turn')
  if replies and (len(replies) > 1 or turns[-1]["role"] != "assistant"):
    raise errors.UserError(f'the field "{field}" must end in its only assistant turn')
  row = row | {"problem": questions[0]}
  return row | {"solution": replies[0]} if replies else row


def _mapped(row: dict, fields: Mapping[str, str]) -> dict:
  """Renames the fields that `fields` lists; returns a row that has none of them unchanged."""
  renamed = {}
  for target, source in fields.items():
    value = row
    for name in source.split("."):
      value = value.get(name) if isinstance(value, dict) else None
    if value is not None:
      renamed[target] = value
  if not renamed:
    return row
  return {name: value for name, value in row.items() if name not in fields} | renamed


def _optional(row: dict, field: str) -> str | None:
  """As `_text`, but None for an absent, null or empty field."""
  return None if row.get(field) in (None, "") else _text(row, field)


def _kind(row: dict) -> str:
  """Subject and level; MATH writes the level as "Level 5", MATH-500 as the number 5."""
  subject, level = row.get("type") or row.get("subject"), row.get("level")
  is_text = isinstance(subject, str) and subject.strip()
  parts = [_text({"type": subject}, "type").lower()] if is_text else []
  digits = re.search(r"\d+", str(level)) if isinstance(level, (str, int)) else None
  return "/".join(parts + ([f"level {digits.group()}"] if digits else []))


def _json(data: bytes) -> object:
  try:
    return json.loads(data.decode("utf-8"))
  except (ValueError, RecursionError) as error:
    raise errors.UserError(f"not JSON in UTF-8 ({error})") from None


def _object(content: bytes | object) -> dict:
  """The fields of an entry. UserError does not name the row."""
  if isinstance(content, bytes) and not content.strip():
    raise errors.UserError("a blank line")
  row = _json(content) if isinstance(content, bytes) else content
  if not isinstance(row, dict):
    raise errors.UserError(f"must be a JSON object, not a {type(row).__name__}")
  return row


def read_row(
  row: dict,
  prefix: str,
  given_id: str | None = None,
  *,
  keep_annotations: bool = False,
  fields: Mapping[str, str] | None = None,
) -> Row:
  """Reads one row in any of the formats.

  Args:
    row: the JSON object.
    prefix: prepended to an id that is a hash or a number, such as "gsm8k/train".
    given_id: id of a row that is identified by its file.
    keep_annotations: keeps GSM8K's calculator annotations `<<...>>` in the solution.
    fields: maps "problem", "solution", "answer" or "id" to the row's name for it; a dot descends
      into an object. A row with none of these names is read as if `fields` were empty.

  Raises:
    UserError: names the faulty field, but not the row.
  """
  fields = fields or {}
  mapped = _mapped(row, fields)
  try:
    return _read_mapped(mapped, prefix, given_id, keep_annotations=keep_annotations)
  except errors.UserError as error:
    message = str(error)
  for target, source in fields.items() if mapped is not row else ():
    message = message.replace(f'the field "{target}"', f'the field "{source}"')
  raise errors.UserError(message)


def _read_mapped(row: dict, prefix: str, given_id: str | None, *, keep_annotations: bool) -> Row:
  """As `read_row`, for a row whose fields have our names."""
  names = ("problem", "question", "query", "prompt", "messages")
  field = next((name for name in names if row.get(name) is not None), None)
  if field is None:
    raise errors.UserError(
      'the field "problem" (or "question", "query", "prompt", "messages") is missing; task.fields '
      "maps other names"
    )
  if field == "messages" or (field == "prompt" and not isinstance(row["prompt"], str)):
    row, field = _chat(row, field), "problem"
  problem, answer = _text(row, field), _answer(row)
  solution_field = "response" if field == "query" and "solution" not in row else "solution"
  solution = _optional(row, solution_field)
  is_solution = answer is not None and (
    "####" in answer or (field == "question" and "\n" in answer.strip())
  )
  if is_solution and solution is None:
    try:
      boxed = None if "####" in answer else boxed_answer(answer)
      solution, answer = answer, boxed[0] if boxed else answers.extract_gold(answer)
    except errors.UserError as error:
      raise errors.UserError(f'the field "answer": {str(error).removesuffix(".")}') from None
    if not keep_annotations:
      solution = _ANNOTATION.sub("", solution)
  if answer is None and solution is None:
    raise errors.UserError(
      f'the field "answer" is missing, and so is the field "{solution_field}"; task.fields maps '
      "other names"
    )
  if answer is None:
    answer = stated_answer(solution)
  if answer is None:
    raise errors.UserError(
      f'the field "{solution_field}" states no answer (\\boxed{{}}, #### or "the answer is"), and '
      'the field "answer" is missing'
    )
  row_id = given_id or _row_id(row, prefix, problem)
  if _MATH_ID.fullmatch(row_id):
    row_id = f"math/{row_id.removesuffix('.json')}"  # MATH-500 names MATH's files
  return Row(row_id, problem, solution, answer, _kind(row))


def _row_id(row: dict, prefix: str, problem: str) -> str:
  for name in ("id", "unique_id"):
    if type(row.get(name)) is int:
      return f"{prefix}/{row[name]}"
  digest = hashlib.blake2b(" ".join(problem.split()).encode(), digest_size=8).hexdigest()
  return _optional(row, "id") or _optional(row, "unique_id") or f"{prefix}/{digest}"


class _Entry(NamedTuple):
  """A row that is not yet parsed."""

  location: str  # file and line, for error messages
  given_id: str | None  # id given by the file's path
  content: bytes | object  # JSON text, or the parsed value


def _parquet(file: epath.Path, data: bytes) -> Iterator[_Entry]:
  import pyarrow  # loaded only for Parquet files
  from pyarrow import parquet

  try:
    batches = map(_as_written, parquet.ParquetFile(io.BytesIO(data)).iter_batches())
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows, start=1):
      yield _Entry(f"{file}, row {number}", None, row)
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise errors.UserError(
      f"The problem file {file} is not Parquet: {str(error).splitlines()[0]}"
    ) from None


def _as_written(batch):
  """A batch of Parquet rows whose float32 0.1 is 0.1, not 0.10000000149."""
  import pyarrow

  for index, field in enumerate(batch.schema):
    if field.type == pyarrow.float32():
      column = batch.column(index).cast(pyarrow.string()).cast(pyarrow.float64())
      batch = batch.set_column(index, field.name, column)
  return batch


def _is_json_lines(data: bytes) -> bool:
  """Whether a .json file holds JSON lines: several lines, the first an object by itself."""
  first, _, rest = data.strip().partition(b"\n")
  try:
    return bool(rest) and isinstance(json.loads(first), dict)
  except (ValueError, RecursionError):
    return False


def _entries(
  files: Sequence[epath.Path], path: epath.Path, name: str, split: str
) -> Iterator[_Entry]:
  """Yields each line of JSON lines, row of Parquet, item of a JSON list or single-row JSON file."""
  folder = path / split if (path / split).is_dir() else path
  for file in files:
    try:
      data = file.read_bytes()
    except OSError as error:
      raise errors.UserError(f"The problem file {file} cannot be read: {error.strerror}.") from None
    if file.suffix == ".parquet":
      yield from _parquet(file, data)
      continue
    if file.suffix == ".gz":
      try:
        data = gzip.decompress(data)
      except (OSError, EOFError, zlib.error) as error:
        raise errors.UserError(f"The problem file {file} is not gzip: {error}.") from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    if file.suffix == ".json" and not _is_json_lines(data):
      try:
        content = _json(data)
      except errors.UserError:
        content = data  # the caller reports it as a broken row
      if isinstance(content, list):
        for number, row in enumerate(content, start=1):
          yield _Entry(f"{file}, item {number}", None, row)
        continue
      in_folder = file.is_relative_to(folder) and file != path
      stem = file.relative_to(folder).with_suffix("") if in_folder else file.stem
      yield _Entry(str(file), f"{name}/{split}/{stem}", content)
      continue
    if not data.strip():
      raise errors.UserError(f"The problem file {file} is empty.")
    for number, line in enumerate(data.rstrip().split(b"\n"), start=1):
      yield _Entry(f"{file}, line {number}", None, line)


def read(
  path: epath.PathLike,
  name: str,
  split: str,
  *,
  skip_bad_rows: bool = False,
  keep_annotations: bool = False,
  fields: Mapping[str, str] | None = None,
) -> Rows:
  """Reads all rows of a split.

  Args:
    path: as in `find`.
    name: of the dataset: "gsm8k", "math" or "jsonl"; generated ids start with it and the split.
    split: "train" or "test".
    skip_bad_rows: collects the error messages of broken rows instead of raising the first.
    keep_annotations, fields: as in `read_row`.

  Raises:
    UserError: no file; no valid row; or, unless skip_bad_rows, a broken row or a duplicate id.
  """
  result, location_of, seen = Rows(), {}, {}
  for location, given_id, content in _entries(
    find(path, split), epath.Path(path).expanduser(), name, split
  ):
    try:
      row = read_row(
        _object(content),
        f"{name}/{split}",
        given_id,
        keep_annotations=keep_annotations,
        fields=fields,
      )
      if row.id in seen:
        is_generated = row.id.startswith(f"{name}/{split}/")
        if is_generated and (row.problem.split(), row.answer) == seen[row.id]:
          result.duplicates += 1
          continue
        raise errors.UserError(
          f'the "id" {row.id!r} (or the text that it hashes) repeats {location_of[row.id]}'
        )
    except errors.UserError as error:
      if not skip_bad_rows:
        raise errors.UserError(
          f"{location}: {error}. Use --skip_bad_rows to skip and count such rows."
        ) from None
      result.skipped.append(f"{location}: {error}.")
      continue
    location_of[row.id], seen[row.id] = location, (row.problem.split(), row.answer)
    result.rows.append(row)
  if not result.rows and not result.skipped:
    raise errors.UserError(f"{path}: the split {split} has no rows.")
  if not result.rows:
    raise errors.UserError(
      f"{path}: none of the {len(result.skipped)} rows of {split} is valid. The first error: "
      f"{result.skipped[0]}"
    )
  return result
