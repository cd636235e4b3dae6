"""Problem files as TensorFlow Datasets: prepared once as array_record, then read from there.
TensorFlow is not needed.

GSM8K is TFDS's own builder where it is to be downloaded. Everything that lies in files (GSM8K,
MATH's tree of 12,500 files, MATH-500, any JSON lines, a written D_syn) goes through a builder of
ours, whose rows keep their order, their ids and what was skipped. A prepared dataset is found again
by its files' names, sizes and times of change, and by the code that reads them. It stands where
TFDS keeps its own: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
"""

import contextlib
import hashlib
import inspect
import io
import os
import urllib.request
from collections.abc import Mapping

import tensorflow_datasets.public_api as tfds
from absl import logging
from etils import epath

from synthneg_jax.data import problem_files
from synthneg_jax.data.problem_files import Row, Rows
from synthneg_jax.grading import answers
from synthneg_jax.runtime import errors

_FIELDS = ("id", "problem", "solution", "answer", "kind")
_SENTENCES = 1000  # sentences on skipped rows that are kept


class SynthnegProblems(tfds.core.GeneratorBasedBuilder):
  """Rows of problem files, in their order. A config is one split of one set of files."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, rows: Rows | None = None, **kwargs):
    """Opens what was prepared, or, given rows, what is to be."""
    self._rows = rows or Rows()
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    counts = {"skipped": len(self._rows.skipped), "duplicates": self._rows.duplicates}
    return tfds.core.DatasetInfo(
      builder=self,
      description="Problems with gold answers, from files of the user.",
      features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in _FIELDS}),
      disable_shuffling=True,  # order is by seed and id, later (tasks/problems.py)
      metadata=tfds.core.MetadataDict(counts | {"sentences": self._rows.skipped[:_SENTENCES]}),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    return {"rows": self._generate_examples()}

  def _generate_examples(self):
    for index, row in enumerate(self._rows.rows):
      yield index, {name: getattr(row, name) or "" for name in _FIELDS}


def folder() -> epath.Path:
  """Where prepared datasets stand."""
  return epath.Path(
    os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
  ).expanduser()


def _mark(files: list[epath.Path], *how) -> str:
  """Tells files and ways of reading apart: names, sizes, times of change, arguments and the
  readers' source.
  """
  digest = hashlib.sha256(repr(how).encode())
  for module in (problem_files, answers, inspect.getmodule(answers.stated_answer)):
    digest.update(inspect.getsource(module).encode())
  for file in files:
    stat = file.stat()
    digest.update(f"{file}|{stat.length}|{stat.mtime}\n".encode())
  return digest.hexdigest()[:16]


@contextlib.contextmanager
def _quiet():
  """Puts TFDS's own progress and its remarks on configurations aside; errors are raised all the
  same.
  """
  before = logging.get_verbosity()
  tfds.disable_progress_bar()
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(before)


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
  """download_and_prepare as array_record.

  Another process may prepare the same at the same time: each works in a folder of its own, and one
  rename wins.
  """
  try:
    builder.download_and_prepare(file_format="array_record")
  except OSError:
    if not epath.Path(builder.data_dir).exists():
      raise


def _decode(example: dict) -> Row:
  fields = {name: example[name].decode("utf-8") for name in _FIELDS}
  return Row(**fields | {"solution": fields["solution"] or None})


def from_files(
  path: epath.PathLike,
  name: str,
  split: str,
  *,
  skip_bad_rows: bool = False,
  fields: Mapping[str, str] | None = None,
) -> Rows:
  """The rows of a split of a dataset in files; arguments and errors as in `problem_files.read`.

  Raises:
    UserError: also, the prepared dataset cannot be written.
  """
  files = problem_files.find(path, split)
  config = tfds.core.BuilderConfig(
    name=f"{name}_{split}_{_mark(files, name, split, skip_bad_rows, fields or {})}"
  )

  def make(rows=None):
    return SynthnegProblems(rows, config=config, data_dir=folder(), file_format="array_record")

  try:
    with _quiet():
      builder = make()
      if not builder.is_prepared():
        _prepare(
          make(problem_files.read(path, name, split, skip_bad_rows=skip_bad_rows, fields=fields))
        )
        builder = make()
  except OSError as error:
    raise errors.UserError(
      f"The problems of {path} cannot be prepared in {folder()}: {error.strerror or error}; "
      "TFDS_DATA_DIR names another "
      "folder."
    ) from error
  source = builder.as_data_source("rows")
  made = Rows([_decode(source[index]) for index in range(len(source))])
  made.skipped, made.duplicates = (
    list(builder.info.metadata["sentences"]),
    builder.info.metadata["duplicates"],
  )
  missing = builder.info.metadata["skipped"] - len(made.skipped)
  if missing:
    made.skipped.append(f"and {missing} more.")
  return made


def gsm8k(split: str) -> Rows:
  """GSM8K through TFDS's own builder, downloaded when it is not there yet; rows and ids equal those
  of the files.

  Raises:
    UserError: it cannot be downloaded.
  """
  from tensorflow_datasets.text.gsm8k import gsm8k as published

  try:
    with _quiet():
      builder = published.Gsm8k(data_dir=folder() / "synthneg_jax", file_format="array_record")
      prepared = builder.is_prepared()
    if not prepared:
      logging.info("GSM8K is downloaded to %s.", builder.data_dir)
      # Fails at once where TFDS would try for minutes.
      urllib.request.urlopen(next(iter(published._URLS.values())), timeout=20).close()
      with _quiet():
        _prepare(builder)
  except Exception as error:  # urllib, requests and TFDS have no common class for "no network"
    raise errors.UserError(
      f"GSM8K could not be downloaded ({type(error).__name__}: {str(error)[:200]}); set "
      "SYNTHNEG_DATA_DIR to a folder with "
      "gsm8k/train.jsonl and gsm8k/test.jsonl, or name their folder by --config.task.path."
    ) from error
  source = builder.as_data_source(split)
  made = [source[index] for index in range(len(source))]

  def decode(example):
    return {name: example[name].decode("utf-8") for name in ("question", "answer")}

  return Rows([problem_files.read_row(decode(example), f"gsm8k/{split}") for example in made])
