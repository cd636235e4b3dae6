"""Tests of problem files as TensorFlow Datasets in array_record."""

import functools
import http.server
import json
import os
import pathlib
import sys
import tempfile
import threading
from unittest import mock

from absl.testing import absltest
from tensorflow_datasets.text.gsm8k import gsm8k as published

from synthneg_jax.data import datasets, problem_files
from synthneg_jax.runtime import errors

EXCERPT = pathlib.Path(__file__).parents[1] / "data" / "gsm8k"


class DatasetsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)
    self.enter_context(mock.patch.dict(os.environ, {"TFDS_DATA_DIR": str(self.folder / "tfds")}))

  def _file(self, *rows):
    path = self.folder / "rows.jsonl"
    path.write_text(
      "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path

  def _prepared(self):
    return sorted((self.folder / "tfds").rglob("*.array_record*"))

  # Fails if array_record loses a field, the order or Unicode, or an absent solution becomes text.
  def test_rows_are_those_of_the_files(self):
    for path, name, split in ((EXCERPT, "gsm8k", "train"), (EXCERPT, "gsm8k", "test")):
      self.assertEqual(
        datasets.from_files(path, name, split), problem_files.read(path, name, split)
      )
    row = {"problem": "\u00e9t\u00e9 \U0001f600 $x$", "answer": "\\frac{1}{2}", "id": "a"}
    path = self._file(
      row, row | {"id": "b", "solution": "s", "type": "Algebra", "level": "Level 3"}
    )
    rows = datasets.from_files(path, "jsonl", "train")
    self.assertEqual(rows, problem_files.read(path, "jsonl", "train"))
    self.assertEqual(
      [(r.solution, r.kind) for r in rows.rows], [(None, ""), ("s", "algebra/level 3")]
    )
    self.assertLen(self._prepared(), 3)
    self.assertNotIn("tensorflow", sys.modules)  # fails, too, if TensorFlow comes to be needed

  # Fails if prepared files are read again, or the second read forgets skipped rows.
  def test_prepared_once(self):
    path = self._file({"problem": "p", "answer": "5"}, "{", {"problem": "p", "answer": "5"}, "}")
    first = datasets.from_files(path, "jsonl", "train", skip_bad_rows=True)
    self.assertEqual((len(first.rows), len(first.skipped), first.duplicates), (1, 2, 1))
    with mock.patch.object(problem_files, "read", side_effect=AssertionError):
      self.assertEqual(datasets.from_files(path, "jsonl", "train", skip_bad_rows=True), first)
    self.assertLen(self._prepared(), 1)
    with self.assertRaisesRegex(errors.UserError, "line 2"):
      datasets.from_files(path, "jsonl", "train")

  # Fails if all error messages of a file of broken rows are stored, or only some are counted.
  def test_many_skipped(self):
    path = self._file({"problem": "p", "answer": "5"}, *["{"] * 1500)
    for _ in range(2):
      skipped = datasets.from_files(path, "jsonl", "train", skip_bad_rows=True).skipped
      self.assertEqual((len(skipped), skipped[-1]), (1001, "and 500 more."))

  # Fails if a dataset prepared with another task.fields is reused.
  def test_fields(self):
    path = self._file({"problem": "p", "answer": "5", "other": "6"})
    answers = [
      datasets.from_files(path, "jsonl", "train", fields=f).rows[0].answer
      for f in ({}, {"answer": "other"})
    ]
    self.assertEqual(answers, ["5", "6"])

  # Fails if an edited file is served from the old prepared dataset.
  def test_changed_file(self):
    path = self._file({"problem": "p", "answer": "5"})
    datasets.from_files(path, "jsonl", "train")
    before = path.stat()
    self._file({"problem": "p", "answer": "6"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 2_000_000))
    self.assertEqual(datasets.from_files(path, "jsonl", "train").rows[0].answer, "6")

  # Fails if a broken row leaves a prepared dataset behind, or changes the error message.
  def test_broken_row(self):
    path = self._file({"problem": "p", "answer": "5"}, {"problem": "q"})
    with self.assertRaisesRegex(errors.UserError, 'line 2: the field "answer" is missing'):
      datasets.from_files(path, "jsonl", "train")
    self.assertEmpty(self._prepared())

  # Fails if concurrent preparations of a dataset conflict: the second finishes while the first
  # writes.
  def test_prepared_twice_at_once(self):
    path = self._file(*({"problem": f"p{i}", "answer": "5"} for i in range(30)))
    original, inner = datasets.SynthnegProblems._generate_examples, []

    def generate(builder):
      yield from original(builder)
      if not inner:
        inner.append(None)
        inner.append(datasets.from_files(path, "jsonl", "train"))

    with mock.patch.object(datasets.SynthnegProblems, "_generate_examples", generate):
      outer = datasets.from_files(path, "jsonl", "train")
    self.assertEqual([outer, inner[1]], [problem_files.read(path, "jsonl", "train")] * 2)
    self.assertLen(self._prepared(), 1)

  # Fails if a read-only folder ends in a traceback.
  def test_unwritable(self):
    (self.folder / "tfds").write_text("a file")
    with self.assertRaisesRegex(errors.UserError, "cannot be prepared in .*TFDS_DATA_DIR"):
      datasets.from_files(EXCERPT, "gsm8k", "test")


class DownloadTest(absltest.TestCase):
  """TFDS's own builder of GSM8K, over HTTP from a local server."""

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.enter_context(mock.patch.dict(os.environ, {"TFDS_DATA_DIR": folder.name}))

  def _serve(self, folder: pathlib.Path) -> str:
    class Quiet(http.server.SimpleHTTPRequestHandler):
      def log_message(self, *args):
        pass

    server = http.server.ThreadingHTTPServer(
      ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    self.addCleanup(server.server_close)
    self.addCleanup(server.shutdown)
    return f"http://127.0.0.1:{server.server_address[1]}"

  # Fails if the download differs from the files, including ids, or is repeated.
  def test_downloaded_rows_are_those_of_the_files(self):
    at = self._serve(EXCERPT)
    names = {"train": "train", "test": "test", "train_socratic": "train", "test_socratic": "test"}
    with mock.patch.dict(
      published._URLS, {split: f"{at}/{name}.jsonl" for split, name in names.items()}
    ):
      for split in ("train", "test"):
        rows = datasets.gsm8k(split).rows
        expected = problem_files.read(EXCERPT, "gsm8k", split).rows
        self.assertCountEqual(rows, expected)
    self.assertEqual(len(datasets.gsm8k("test").rows), 16)  # the addresses are the real ones again

  # Fails if a missing network causes minutes of retries, or the message names no remedy.
  def test_no_network(self):
    with mock.patch.dict(
      published._URLS, {split: "http://127.0.0.1:9/none" for split in published._URLS}
    ):
      with self.assertRaisesRegex(
        errors.UserError, "GSM8K could not be downloaded .*SYNTHNEG_DATA_DIR"
      ):
        datasets.gsm8k("train")


if __name__ == "__main__":
  absltest.main()
