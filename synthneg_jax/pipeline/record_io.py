"""Reads and writes rows in files shared with other programs: JSON lines and Parquet."""

import io
import json
from collections.abc import Iterable, Iterator

import pyarrow
from etils import epath
from pyarrow import parquet

from synthneg_jax.runtime.errors import UserError

SUFFIXES = (".jsonl", ".parquet")


def _check_suffix(path: epath.Path) -> None:
  if path.suffix not in SUFFIXES:
    raise UserError(f"{path} must end in {' or '.join(SUFFIXES)}.")


def content(path: epath.Path) -> bytes:
  """The bytes of a .jsonl or .parquet file.

  Raises:
    UserError: another suffix, or the file cannot be read.
  """
  _check_suffix(path)
  try:
    return path.read_bytes()
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def read(path: epath.Path) -> Iterator[tuple[str, dict]]:
  """Yields ("PATH, line N" or "PATH, row N", row) of a .jsonl or .parquet file; N counts from 1.

  Raises:
    UserError: the file cannot be read, or a line is not a JSON object.
  """
  data = content(path)
  if path.suffix == ".parquet":
    try:
      table = parquet.read_table(io.BytesIO(data))
    except pyarrow.ArrowException as error:
      raise UserError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(table.to_pylist(), start=1):
      yield f"{path}, row {number}", row
    return
  for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
    location = f"{path}, line {number}"
    try:
      row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
      raise UserError(f"{location}: the line is not JSON in UTF-8 ({error}).") from None
    if not isinstance(row, dict):
      raise UserError(f"{location}: the line must be a JSON object, not a {type(row).__name__}.")
    yield location, row


def write(path: epath.Path, rows: Iterable[dict]) -> int:
  """Writes a .jsonl or .parquet file under a temporary name, renames it, and counts the rows.

  Raises:
    UserError: another suffix, or the file cannot be written.
  """
  _check_suffix(path)
  temporary = path.parent / f"{path.name}.tmp"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
      table = pyarrow.Table.from_pylist(list(rows))
      buffer = io.BytesIO()
      parquet.write_table(table, buffer)
      temporary.write_bytes(buffer.getvalue())
      count = table.num_rows
    else:
      lines = [json.dumps(row, ensure_ascii=False) for row in rows]
      temporary.write_text("".join(line + "\n" for line in lines))
      count = len(lines)
    temporary.replace(path)
  except OSError as error:
    raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None
  return count
