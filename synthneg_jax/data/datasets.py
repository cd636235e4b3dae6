"""Problem files as TensorFlow Datasets, prepared once as array_record; without TensorFlow.

TFDS's own builder downloads GSM8K. Problems in files (GSM8K, MATH's tree of 12,500 files, MATH-500,
any JSON lines, a D_syn) go through `SynthnegProblems`, which keeps row order, ids and the list of
skipped rows. A prepared dataset is reused while the files' names, sizes and modification times and
the code that reads them stay the same. It is stored with TFDS's datasets, in $TFDS_DATA_DIR or
~/tensorflow_datasets.
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
_MAX_SKIPPED = 1000  # skipped rows that are listed


class SynthnegProblems(tfds.core.GeneratorBasedBuilder):
  """Rows of problem files in file order. A config is one split of one set of files."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, rows: Rows | None = None, **kwargs):
    """Opens a prepared dataset or, given rows, one to prepare."""
    self._rows = rows or Rows()
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    counts = {"skipped": len(self._rows.skipped), "duplicates": self._rows.duplicates}
    return tfds.core.DatasetInfo(
      builder=self,
      description="Problems with gold answers, from the user's files.",
      features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in _FIELDS}),
      disable_shuffling=True,  # tasks/problems.py orders by seed and id
      metadata=tfds.core.MetadataDict(counts | {"sentences": self._rows.skipped[:_MAX_SKIPPED]}),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    return {"rows": self._generate_examples()}

  def _generate_examples(self):
    for index, row in enumerate(self._rows.rows):
      yield index, {name: getattr(row, name) or "" for name in _FIELDS}


def folder() -> epath.Path:
  """The folder of prepared datasets."""
  return epath.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _fingerprint(files: list[epath.Path], *arguments) -> str:
  """Hash of names, sizes, modification times, reader arguments and the readers' source code."""
  digest = hashlib.sha256(repr(arguments).encode())
  for module in (problem_files, answers, inspect.getmodule(answers.stated_answer)):
    digest.update(inspect.getsource(module).encode())
  for file in files:
    stat = file.stat()
    modified = os.stat(file).st_mtime_ns if os.path.exists(file) else stat.mtime
    digest.update(f"{file}|{stat.length}|{modified}\n".encode())
  return digest.hexdigest()[:16]


@contextlib.contextmanager
def _quiet():
  """Silences TFDS's progress bars and log lines; errors still propagate."""
  before = logging.get_verbosity()
  tfds.disable_progress_bar()
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(before)


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
  """Runs download_and_prepare as array_record.

  Processes may prepare the same dataset concurrently: each writes its own folder, and one rename
  wins.
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
  """The rows of a split of a dataset in files; arguments as in `problem_files.read`.

  Raises:
    UserError: as `problem_files.read`, or the prepared dataset cannot be written.
  """
  files = problem_files.find(path, split)
  fingerprint = _fingerprint(files, name, split, skip_bad_rows, fields or {})
  config = tfds.core.BuilderConfig(name=f"{name}_{split}_{fingerprint}")

  def make_builder(rows=None):
    return SynthnegProblems(rows, config=config, data_dir=folder(), file_format="array_record")

  try:
    with _quiet():
      builder = make_builder()
      if not builder.is_prepared():
        rows = problem_files.read(path, name, split, skip_bad_rows=skip_bad_rows, fields=fields)
        _prepare(make_builder(rows))
        builder = make_builder()
  except OSError as error:
    raise errors.UserError(
      f"The problems of {path} cannot be prepared in {folder()}: {error.strerror or error}. Set "
      "TFDS_DATA_DIR to use another folder."
    ) from error
  source = builder.as_data_source("rows")
  metadata = builder.info.metadata
  skipped = list(metadata["sentences"])
  if unlisted := metadata["skipped"] - len(skipped):
    skipped.append(f"and {unlisted} more.")
  rows = [_decode(source[index]) for index in range(len(source))]
  return Rows(rows, skipped, metadata["duplicates"])


def gsm8k(split: str) -> Rows:
  """GSM8K through TFDS's own builder, downloaded on first use; rows and ids as from its files.

  Raises:
    UserError: the download fails.
  """
  from tensorflow_datasets.text.gsm8k import gsm8k as published

  try:
    with _quiet():
      builder = published.Gsm8k(data_dir=folder() / "synthneg_jax", file_format="array_record")
      prepared = builder.is_prepared()
    if not prepared:
      logging.info("Downloading GSM8K to %s.", builder.data_dir)
      # Fails at once without a network, whereas TFDS would retry for minutes.
      urllib.request.urlopen(next(iter(published._URLS.values())), timeout=20).close()
      with _quiet():
        _prepare(builder)
  except Exception as error:  # urllib, requests and TFDS share no base class for "no network"
    raise errors.UserError(
      f"GSM8K could not be downloaded ({type(error).__name__}: {str(error)[:200]}); set "
      "SYNTHNEG_DATA_DIR to a folder with gsm8k/train.jsonl and gsm8k/test.jsonl, or "
      "--config.task.path to the folder that holds them."
    ) from error
  source = builder.as_data_source(split)
  rows = Rows()
  for index in range(len(source)):
    example = source[index]
    row = {name: example[name].decode("utf-8") for name in ("question", "answer")}
    rows.rows.append(problem_files.read_row(row, f"gsm8k/{split}"))
  return rows
