"""Problems from files: JSON lines, JSON, Parquet or a tree of JSON files, in the formats that
people have.

A row's fields say what it is, so that training and test files may differ:

    question, answer                     GSM8K as published: `answer` is the solution and ends in `#### gold answer`
    problem, solution [level, type]      competition MATH: the gold answer is what the solution states
    problem or question, answer [solution, id ...]   any other file; MATH-500's `unique_id` counts as an id
    query, response                      MetaMathQA: the response is the solution
    prompt, reward_model.ground_truth    DAPO and verl: `prompt` is a chat with one turn of the user
    messages [answer]                    a chat for finetuning: the assistant's turn is the solution
    prompt, answer, id [solution]        a Problem record of ours: a written D_syn

A gold answer that no field gives is what the solution states: its \\boxed{} (all of them where they
are parts of one answer), else what follows the last `####` or "the answer is". A chat's system turn
is dropped: task.instruction says what the model is told besides the problem.

A broken row is an error that names the file, the line (1-based) and the field, or, where the caller
asks for it, is left out and counted. Ids are stable: the one given (a number behind the dataset's
name and the split); for a tree the file's place in it; else a hash of the problem's text, so that
neither order nor file matters.
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

# A calculator annotation of GSM8K, for example <<48/2=24>>.
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"(?:[^$\n\\]|\\(?![\])])){0,200}")
_MATH_ID = re.compile(r"(?:train|test)/.+\.json")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# What stands between boxes that are parts of one answer: punctuation of LaTeX, "and", "or", `x =`.
_JOINT = re.compile(
  r"(?:[\s$,;&]|\\[\[\]()\\,;: "
  r"]|\\q?quad|\\(?:text|mbox|textrm|mathrm)\s*\{[\s,;]*(?:and|or)?[\s,;]*\}|\b(?:and|or)\b"
  r"|\b[A-Za-z]\s*=)*+"
)


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
    skipped: for each row left out because it is broken, the sentence that would have been the
      error.
    duplicates: rows left out because their text and answer stand in an earlier one.
  """

  rows: list[Row] = dataclasses.field(default_factory=list)
  skipped: list[str] = dataclasses.field(default_factory=list)
  duplicates: int = 0


def _of_kind(folder: epath.Path) -> list[epath.Path]:
  """A folder's problem files, of one suffix; without any, the JSON files in its folders (MATH's
  tree).
  """
  names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
  for suffix in SUFFIXES:
    if found := [folder / name for name in names if name.endswith(suffix)]:
      return found
  return sorted(folder.glob("*/*.json"))


def _of_split(folder: epath.Path, split: str) -> list[epath.Path]:
  """A split's files: one of its name, or parts (train-0-of-1.parquet), here or in data/; or its
  folder.
  """
  for place in (folder, folder / "data"):
    names = sorted(file.name for file in place.iterdir()) if place.is_dir() else []
    for pattern in (split, f"{split}-*"):
      for suffix in SUFFIXES:
        if found := [place / name for name in fnmatch.filter(names, pattern + suffix)]:
          return found
  return _of_kind(folder / split) if (folder / split).is_dir() else []


def find(path: epath.PathLike, split: str) -> list[epath.Path]:
  """The files of a split, .jsonl, .jsonl.gz, .parquet or .json.

  Args:
    path: a dataset on the Hub (data/hub.py); a file; or a folder with `<split>.jsonl`, with parts
      of that name, perhaps in a folder `data/` (`train-00000-of-00001.parquet`), with a folder
      `<split>/` of such files, of single JSON files, or of folders of those (MATH's tree), or,
      where it has no splits, with such files itself.
    split: "train" or "test".

  Returns:
    Files in the order of their names, at least one.

  Raises:
    UserError: there is none.
  """
  if hub.is_hub(path):
    return hub.files(path, split)
  path = epath.Path(path).expanduser()
  try:
    if path.is_file():
      return [path]
    if found := _of_split(path, split):
      return found
    if not _of_split(path, {"train": "test", "test": "train"}[split]) and (found := _of_kind(path)):
      return found
  except OSError as error:
    raise errors.UserError(f"The problems in {path} cannot be read: {error.strerror}.") from None
  if not path.exists():
    raise errors.UserError(f"The problem file {path} does not exist.")
  raise errors.UserError(
    f"The folder {path} holds no {split}.jsonl, no {split}/ with JSON files and none of its own "
    f"({', '.join(SUFFIXES)})."
  )


class _Box(NamedTuple):
  """A box of a text and what it holds."""

  start: int
  stop: int
  content: str


def _boxes(text: str) -> list[_Box]:
  """All \\boxed{} and \\fbox{} that are whole and not empty. One pass, whatever the text."""
  opened, close_of = [], {}
  for brace in _BRACE.finditer(text):
    if brace.group() == "{":
      opened.append(brace.start())
    elif brace.group() == "}" and opened:
      close_of[opened.pop()] = brace.start()
  found = []
  for box in _BOX.finditer(text):
    start = box.end()
    if text[start : start + 1] != "{":
      bare = _BARE.match(text, start)
      found.append(_Box(box.start(), bare.end(), bare.group().strip()))
    elif start in close_of:
      found.append(
        _Box(box.start(), close_of[start] + 1, text[start + 1 : close_of[start]].strip())
      )
  return [box for box in found if box.content]


def last_box(text: str) -> str | None:
  """What the last \\boxed{} (or \\fbox{}) of a text holds, braces balanced; None where none is
  whole.

  `\\boxed 7` holds what follows up to the formula's end, as in MATH.
  """
  boxes = _boxes(text)
  return boxes[-1].content if boxes else None


def stated_answer(solution: str) -> str | None:
  """The answer in a solution's boxes, else after its last `####` or "the answer is"; None for none.

  Several boxes with nothing but commas, "and", "or" or line breaks between them are one answer,
  such as "2, 3"; otherwise the last one counts.
  """
  if boxes := _boxes(solution):
    gaps = [
      solution[before.stop : after.start] for before, after in zip(boxes, boxes[1:], strict=False)
    ]
    parts = boxes if all(map(_JOINT.fullmatch, gaps)) else boxes[-1:]
    return ", ".join(dict.fromkeys(box.content for box in parts))
  return answers.stated_answer(solution)


def _text(row: dict, field: str) -> str:
  """A field that must be nonblank text; UserError without the place otherwise."""
  if field not in row:
    raise errors.UserError(f'the field "{field}" is missing')
  value = row[field]
  if not isinstance(value, str):
    raise errors.UserError(
      f'the field "{field}" must be text in quotes, not a {type(value).__name__}'
    )
  if not value.strip():
    raise errors.UserError(f'the field "{field}" is blank')
  try:
    value.encode("utf-8")
  except UnicodeEncodeError:
    raise errors.UserError(f'the field "{field}" holds half of a surrogate pair') from None
  if "\0" in value:
    raise errors.UserError(f'the field "{field}" holds a NUL character')
  return value.replace("\r\n", "\n")


def _answer(row: dict) -> str | None:
  """The gold answer that a row gives, text or a number; None where it gives none."""
  answer, reward = row.get("answer"), row.get("reward_model")
  if answer is None and isinstance(reward, dict):
    answer = reward.get("ground_truth")
  if answer is None or answer == "":
    return None
  if isinstance(answer, bool) or not isinstance(answer, str | int | float):
    raise errors.UserError(
      f'the field "answer" must be text or a number, not a {type(answer).__name__}'
    )
  if isinstance(answer, str):
    return _text({"answer": answer}, "answer")
  if not math.isfinite(answer):
    raise errors.UserError('the field "answer" must be a finite number')
  return str(int(answer) if answer == int(answer) else answer)


def _chat(row: dict, field: str) -> dict:
  """A row whose problem is a chat as one with "problem" and, if the assistant answers, "solution"."""
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
  asked, said = by_role["user"], by_role["assistant"]
  if len(asked) != 1:
    raise errors.UserError(f'the field "{field}" must hold one turn of the user, not {len(asked)}')
  if said and field == "prompt":
    raise errors.UserError('the field "prompt" must not hold a turn of an assistant')
  if said and (len(said) > 1 or turns[-1]["role"] != "assistant"):
    raise errors.UserError(f'the field "{field}" must end in its one turn of the assistant')
  return row | {"problem": asked[0]} | ({"solution": said[0]} if said else {})


def _mapped(row: dict, fields: Mapping[str, str]) -> dict:
  """The row with what `fields` names under our names; as it is where it has none of them."""
  found = {}
  for target, source in fields.items():
    value = row
    for name in source.split("."):
      value = value.get(name) if isinstance(value, dict) else None
    if value is not None:
      found[target] = value
  return (
    {name: value for name, value in row.items() if name not in fields} | found if found else row
  )


def _optional(row: dict, field: str) -> str | None:
  """As `_text`, but None for a field that is absent, null or empty."""
  return None if row.get(field) in (None, "") else _text(row, field)


def _kind(row: dict) -> str:
  """MATH's subject and level; its level is "Level 5", MATH-500's the number 5."""
  subject, level = row.get("type") or row.get("subject"), row.get("level")
  parts = [subject.lower()] if isinstance(subject, str) else []
  digits = re.search(r"\d+", str(level)) if isinstance(level, (str, int)) else None
  return "/".join(parts + ([f"level {digits.group()}"] if digits else []))


def _json(data: bytes) -> object:
  try:
    return json.loads(data.decode("utf-8"))
  except (ValueError, RecursionError) as error:
    raise errors.UserError(f"not JSON in UTF-8 ({error})") from None


def _object(content: bytes | object) -> dict:
  """The fields of an entry; UserError without the place where it is no JSON object."""
  if isinstance(content, bytes) and not content.strip():
    raise errors.UserError("blank")
  row = _json(content) if isinstance(content, bytes) else content
  if not isinstance(row, dict):
    raise errors.UserError(f"it must be a JSON object, not a {type(row).__name__}")
  return row


def read_row(
  row: dict,
  prefix: str,
  given_id: str | None = None,
  *,
  keep_annotations: bool = False,
  fields: Mapping[str, str] | None = None,
) -> Row:
  """One row in any of the formats.

  Args:
    row: the JSON object.
    prefix: of an id that is a hash or a number, "gsm8k/train".
    given_id: of a row whose place is its id.
    keep_annotations: keeps GSM8K's calculator annotations `<<...>>` in the solution.
    fields: "problem", "solution", "answer" or "id" -> the row's own name of it, dotted for a field
      of an object. A row that has none of these names is read by its fields alone.

  Raises:
    UserError: the field that is at fault, without the place.
  """
  fields = fields or {}
  mapped = _mapped(row, fields)
  try:
    return _read_mapped(mapped, prefix, given_id, keep_annotations)
  except errors.UserError as error:
    message = str(error)
  for target, source in fields.items() if mapped is not row else ():
    message = message.replace(f'the field "{target}"', f'the field "{source}"')
  raise errors.UserError(message)


def _read_mapped(row: dict, prefix: str, given_id: str | None, keep_annotations: bool) -> Row:
  """As `read_row`, of a row with our names of its fields."""
  names = ("problem", "question", "query", "prompt", "messages")
  asked = next((name for name in names if row.get(name) is not None), None)
  if asked is None:
    raise errors.UserError(
      'the field "problem" is missing (or "question", "query", "prompt" or "messages"; task.fields '
      "takes other names)"
    )
  if asked == "messages" or (asked == "prompt" and not isinstance(row["prompt"], str)):
    row, asked = _chat(row, asked), "problem"
  problem, answer = _text(row, asked), _answer(row)
  worked = "response" if asked == "query" and "solution" not in row else "solution"
  solution = _optional(row, worked)
  is_solution = answer is not None and (
    "####" in answer or (asked == "question" and "\n" in answer.strip())
  )
  if is_solution and solution is None:
    try:
      boxed = None if "####" in answer else last_box(answer)
      solution, answer = answer, stated_answer(answer) if boxed else answers.extract_gold(answer)
    except errors.UserError as error:
      raise errors.UserError(f'the field "answer": {str(error).removesuffix(".")}') from None
    if not keep_annotations:
      solution = _ANNOTATION.sub("", solution)
  if answer is None and solution is None:
    raise errors.UserError(
      f'the field "answer" is missing, and there is no "{worked}"; task.fields takes other names'
    )
  if answer is None:
    answer = stated_answer(solution)
  if answer is None:
    raise errors.UserError(
      f'the field "{worked}" has no \\boxed{{}}, #### or "the answer is" with an answer, and there '
      'is no "answer"'
    )
  numbered = type(row.get("id")) is int
  name = (
    given_id
    or (f"{prefix}/{row['id']}" if numbered else _optional(row, "id"))
    or _optional(row, "unique_id")
  )
  if name is not None and _MATH_ID.fullmatch(name):
    name = f"math/{name.removesuffix('.json')}"  # MATH-500 names MATH's files
  if name is None:
    name = (
      f"{prefix}/{hashlib.blake2b(' '.join(problem.split()).encode(), digest_size=8).hexdigest()}"
    )
  return Row(name, problem, solution, answer, _kind(row))


class _Entry(NamedTuple):
  """What may be a row: where it is, the id that this gives or None, and its JSON text or its
  fields.
  """

  place: str
  given_id: str | None
  content: bytes | object


def _parquet(file: epath.Path, data: bytes) -> Iterator[_Entry]:
  import pyarrow  # not for tasks without files
  from pyarrow import parquet

  try:
    batches = parquet.ParquetFile(io.BytesIO(data)).iter_batches()
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows, start=1):
      yield _Entry(f"{file}, row {number}", None, row)
  except pyarrow.ArrowException as error:
    raise errors.UserError(
      f"The problem file {file} is not Parquet: {str(error).splitlines()[0]}"
    ) from None


def _is_json_lines(data: bytes) -> bool:
  """Whether a file called .json has more than one line, and its first line is an object by itself."""
  first, _, rest = data.strip().partition(b"\n")
  try:
    return bool(rest) and isinstance(json.loads(first), dict)
  except (ValueError, RecursionError):
    return False


def _entries(
  files: Sequence[epath.Path], path: epath.Path, name: str, split: str
) -> Iterator[_Entry]:
  """Every line of JSON lines, row of Parquet, item of a JSON list, and JSON file with one row."""
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
        content = data  # refused, or left out, as a row is
      if isinstance(content, list):
        yield from (
          _Entry(f"{file}, item {number}", None, row) for number, row in enumerate(content, start=1)
        )
        continue
      place = (
        file.relative_to(folder).with_suffix("")
        if file.is_relative_to(folder) and file != path
        else file.stem
      )
      yield _Entry(str(file), f"{name}/{split}/{place}", content)
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
  """All rows of a split of a dataset.

  Args:
    path: as in `find`.
    name: of the dataset: "gsm8k", "math" or "jsonl"; ids that are not given begin with it and the
      split.
    split: "train" or "test".
    skip_bad_rows: leaves broken rows out, with a sentence each, instead of stopping at the first.
    keep_annotations, fields: as in `read_row`.

  Raises:
    UserError: no file, or (unless skip_bad_rows) a broken row, or one whose id stands in an earlier
      row; no good row.
  """
  made, place_of, seen = Rows(), {}, {}
  for place, given_id, content in _entries(
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
        if (row.problem.split(), row.answer) == seen[row.id] and row.id.startswith(
          f"{name}/{split}/"
        ):
          made.duplicates += 1
          continue
        raise errors.UserError(
          f'the "id" {row.id!r}, or the text it is a hash of, stands in {place_of[row.id]}, too'
        )
    except errors.UserError as error:
      if not skip_bad_rows:
        raise errors.UserError(
          f"{place}: {error}; --skip_bad_rows leaves such rows out and counts them."
        ) from None
      made.skipped.append(f"{place}: {error}.")
      continue
    place_of[row.id], seen[row.id] = place, (row.problem.split(), row.answer)
    made.rows.append(row)
  if not made.rows:
    raise errors.UserError(
      f"{path}: none of {len(made.skipped)} rows of {split} is whole; the first: {made.skipped[0]}"
    )
  return made
