"""Tests of the problem files."""

import json
import os
import pathlib
import tempfile

from absl.testing import absltest, parameterized

from synthneg_jax.runtime import errors
from synthneg_jax.tasks import problem_files

GSM8K = [
  {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24\n48+24 = <<48+24=72>>72\n#### 72"},
  {"question": "How much is a \u00a3540 bill twice?", "answer": "It is \u00a3<<540*2=1080>>1080.\n#### 1,080"},
]


class ProblemFilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def _file(self, *lines, name="rows.jsonl"):
    """Writes lines (bytes as they stand, text as UTF-8, all else as JSON) and returns the path."""
    encoded = [x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines]
    path = self.folder / name
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path

  def _assert_error(self, function, *parts):
    """Asserts that a call raises one UserError whose text holds all parts."""
    with self.assertRaises(errors.UserError) as caught:
      function()
    for part in parts:
      self.assertIn(part, str(caught.exception))

  # Fails if ids count from 1, annotations stay, or the answer keeps its comma.
  def test_gsm8k(self):
    rows = problem_files.read_rows(self._file(*GSM8K), "train")
    expected = {
      "id": "gsm8k/train/00001",
      "problem": "How much is a \u00a3540 bill twice?",
      "solution": "It is \u00a31080.\n#### 1,080",
      "answer": "1080",
    }
    self.assertEqual(rows[1], expected)
    self.assertEqual(rows[0]["id"], "gsm8k/train/00000")

  # Fails if keep_annotations is ignored.
  def test_keep_annotations(self):
    rows = problem_files.read_rows(self._file(*GSM8K), "train", keep_annotations=True)
    self.assertEqual([row["solution"] for row in rows], [row["answer"] for row in GSM8K])

  # Fails if real rows are lost, or an annotation survives.
  def test_real_rows(self):
    folder = os.environ.get("SYNTHNEG_DATA_DIR")
    if not folder:
      self.skipTest("SYNTHNEG_DATA_DIR is not set")
    for split, count in (("train", 7473), ("test", 1319)):
      rows = problem_files.read_rows(pathlib.Path(folder) / "gsm8k" / f"{split}.jsonl", split)
      self.assertLen({row["id"] for row in rows}, count)
      self.assertEqual(rows[-1]["id"], f"gsm8k/{split}/{count - 1:05d}")
      self.assertFalse(any("<<" in row["solution"] or ">>" in row["solution"] for row in rows))

  # Fails if the line number is 0-based, the field is not named, or a broken line is skipped.
  @parameterized.parameters(
    ("{", "not JSON"),
    ("", "blank"),
    (b"\xff{}", "not JSON in UTF-8"),
    ("[" * 100_000, "not JSON"),
    ([1], "JSON object, not a list"),
    ({"question": "q"}, '"answer" is missing'),
    ({"answer": "#### 5"}, '"question" is missing'),
    ({"question": "q", "answer": 5}, '"answer" must be text in quotes, not a int'),
    ({"question": " ", "answer": "#### 5"}, '"question" is blank'),
    ({"question": "\ud800", "answer": "#### 5"}, '"question" holds half of a surrogate pair'),
    ({"question": "q", "answer": "It is 5."}, '"answer": The solution states no readable answer'),
  )
  def test_broken_gsm8k_line(self, line, message):
    path = self._file(GSM8K[0], line, GSM8K[1])
    self._assert_error(lambda: problem_files.read_rows(path, "train"), f"{path}, line 2: ", message)

  # Fails if a missing or an empty file gives no rows, or a traceback of ours.
  def test_missing_and_empty(self):
    for read in (lambda p: problem_files.read_rows(p, "test"), problem_files.read_jsonl_problems):
      missing, empty = self.folder / "no.jsonl", self.folder / "empty.jsonl"
      empty.write_bytes(b"")
      self._assert_error(lambda read=read, p=missing: read(p), str(missing), "SYNTHNEG_DATA_DIR")
      self._assert_error(lambda read=read, p=empty: read(p), str(empty), "empty")
      self._assert_error(lambda read=read: read(self.folder), str(self.folder), "cannot be read")

  # Fails if a given id or solution is dropped, or null is taken for text.
  def test_jsonl(self):
    lines = [{"problem": "p", "answer": "5", "solution": "s", "id": "a"}, {"problem": "q", "answer": "x", "id": None}]
    first, second = problem_files.read_jsonl_problems(self._file(*lines, name="mine.jsonl"))
    self.assertEqual(first, {"id": "a", "problem": "p", "solution": "s", "answer": "5"})
    self.assertEqual(second, {"id": "mine/00001", "problem": "q", "solution": None, "answer": "x"})

  # Fails if only one of the two lines is named, or ids made by us are not compared.
  def test_duplicate_ids(self):
    row = {"problem": "p", "answer": "5"}
    path = self._file(row | {"id": "a"}, row, row | {"id": "a"})
    self._assert_error(lambda: problem_files.read_jsonl_problems(path), str(path), "lines 1 and 3", "'a'")
    path = self._file(row | {"id": "rows/00001"}, row)
    self._assert_error(lambda: problem_files.read_jsonl_problems(path), "lines 1 and 2")

  # Fails if optional fields are not checked where they are present.
  @parameterized.parameters("problem", "answer", "solution", "id")
  def test_broken_jsonl_field(self, field):
    row = {"problem": "p", "answer": "5", "solution": "s", "id": "a"}
    path = self._file(row, row | {"id": "b"} | {field: 7})
    self._assert_error(lambda: problem_files.read_jsonl_problems(path), f"{path}, line 2: ", f'"{field}" must be text')


if __name__ == "__main__":
  absltest.main()
