"""Tests of the problem files."""

import functools
import gzip
import json
import os
import pathlib
import tempfile
import time

import pyarrow
from absl.testing import absltest, parameterized
from pyarrow import parquet

from synthneg_jax.data import problem_files
from synthneg_jax.runtime import errors

EXCERPT = pathlib.Path(__file__).parents[1] / "data" / "gsm8k"
GSM8K = [
  {
    "question": "How many clips?",
    "answer": "48/2 = <<48/2=24>>24\n48+24 = <<48+24=72>>72\n#### 72",
  },
  {
    "question": "How much is a \u00a3540 bill twice?",
    "answer": "It is \u00a3<<540*2=1080>>1080.\n#### 1,080",
  },
]
MATH = {
  "problem": "What is $1+1$?",
  "level": "Level 1",
  "type": "Algebra",
  "solution": "It is $\\boxed{2}.$",
}


class ProblemFilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def _file(self, *lines, name="rows.jsonl"):
    """Writes lines (bytes unchanged, text as UTF-8, other values as JSON) and returns the path."""
    encoded = [
      x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode()
      for x in lines
    ]
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path

  def _assert_error(self, function, *parts):
    """Asserts that a call raises one UserError whose text contains all parts."""
    with self.assertRaises(errors.UserError) as caught:
      function()
    for part in parts:
      self.assertIn(part, str(caught.exception))

  # Fails if annotations stay, the answer keeps its comma, or the id is the line number.
  def test_gsm8k(self):
    rows = problem_files.read(self._file(*GSM8K), "gsm8k", "train").rows
    self.assertEqual(
      (rows[1].problem, rows[1].solution, rows[1].answer, rows[1].kind),
      ("How much is a \u00a3540 bill twice?", "It is \u00a31080.\n#### 1,080", "1080", ""),
    )
    self.assertRegex(rows[1].id, r"^gsm8k/train/[0-9a-f]{16}$")
    again = problem_files.read(self._file(GSM8K[1], name="other.jsonl"), "gsm8k", "train").rows
    self.assertEqual(again, rows[1:])

  # Fails if generated ids change between versions, machines or runs.
  def test_hashed_id_is_fixed(self):
    self.assertEqual(
      problem_files.read(EXCERPT, "gsm8k", "train").rows[0].id, "gsm8k/train/6d009c0edbb6676b"
    )

  # Fails if keep_annotations is ignored.
  def test_keep_annotations(self):
    rows = problem_files.read(self._file(*GSM8K), "gsm8k", "train", keep_annotations=True).rows
    self.assertEqual([row.solution for row in rows], [row["answer"] for row in GSM8K])

  # Fails if real rows are lost, or an annotation remains.
  @parameterized.parameters((None, 48, 16), ("SYNTHNEG_DATA_DIR", 7473, 1319))
  def test_real_rows(self, variable, train, test):
    folder = (
      EXCERPT if variable is None else pathlib.Path(os.environ.get(variable, "/nowhere")) / "gsm8k"
    )
    if not folder.exists():
      self.skipTest(f"{variable} is not set")
    for split, count in (("train", train), ("test", test)):
      rows = problem_files.read(folder, "gsm8k", split).rows
      self.assertLen({row.id for row in rows}, count)
      self.assertFalse(any("<<" in row.solution or ">>" in row.solution for row in rows))

  # Fails if the line number is 0-based, the field is not named, or a broken line is skipped by
  # default; or if skipping it stops the rest or does not count it.
  @parameterized.parameters(
    ("{", "not JSON"),
    ("", "blank"),
    (b"\xff{}", "not JSON in UTF-8"),
    ("[" * 100_000, "not JSON"),
    ('{"question": ' + "1" * 5000 + "}", "not JSON"),
    ([1], "JSON object, not a list"),
    ("null", "JSON object, not a NoneType"),
    ({"question": "q"}, '"answer" is missing'),
    ({"answer": "#### 5"}, '"question"'),
    ({"question": "q", "answer": [5]}, '"answer" must be a string or a number, not a list'),
    ({"question": "q", "answer": True}, '"answer" must be a string or a number, not a bool'),
    ({"question": "q", "answer": float("nan")}, '"answer" must be a finite number'),
    ({"query": "q", "response": "It is 5."}, '"response" states no answer (\\boxed{}'),
    (
      {"prompt": [{"role": "user", "content": "q"}] * 2, "answer": 5},
      '"prompt" must hold one user turn, not 2',
    ),
    (
      {"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
      "an assistant turn",
    ),
    ({"prompt": [{"role": "user", "content": 5}], "answer": 5}, '"content" must be a string'),
    ({"prompt": ["q"], "answer": 5}, '"prompt" must hold turns'),
    ({"prompt": [], "answer": 5}, '"prompt" must hold one user turn, not 0'),
    (
      {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": None}},
      '"answer" is missing',
    ),
    (
      {"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "a"}]},
      "not 'tool'",
    ),
    ({"question": ["q"], "answer": "#### 5"}, '"question" must be a string, not a list'),
    ({"question": " ", "answer": "#### 5"}, '"question" is blank'),
    ({"question": "\ud800", "answer": "#### 5"}, '"question" holds an unpaired surrogate'),
    ({"question": "a\0b", "answer": "#### 5"}, '"question" holds a NUL character'),
    ({"question": "q", "answer": "It is\n5."}, '"answer": The solution states no readable answer'),
    ({"problem": "q", "solution": "It is 5."}, '"solution" states no answer (\\boxed{}'),
    ({"problem": "q", "solution": "It is \\boxed{5."}, '"solution" states no answer (\\boxed{}'),
    ({"problem": "q", "solution": "It is \\boxed{ }."}, '"solution" states no answer (\\boxed{}'),
    ({"problem": "q"}, '"answer" is missing'),
    ({"problem": "q", "answer": None}, '"answer" is missing'),
    ({"problem": "q", "answer": "5", "id": False}, '"id" must be a string, not a bool'),
    (
      {"problem": "q", "answer": "5", "solution": 5},
      '"solution" must be a string, not a int',
    ),
  )
  def test_broken_line(self, line, message):
    path = self._file(GSM8K[0], line, GSM8K[1])
    self._assert_error(
      lambda: problem_files.read(path, "gsm8k", "train"),
      f"{path}, line 2: ",
      message,
      "--skip_bad_rows",
    )
    rows = problem_files.read(path, "gsm8k", "train", skip_bad_rows=True)
    self.assertEqual([row.answer for row in rows.rows], ["72", "1080"])
    self.assertLen(rows.skipped, 1)
    self.assertStartsWith(rows.skipped[0], f"{path}, line 2: ")
    self.assertIn(message, rows.skipped[0])

  # Fails if a missing or empty file gives no rows or a traceback, or if a file without valid rows
  # passes.
  def test_missing_and_empty(self):
    def read(path, **how):
      return problem_files.read(path, "jsonl", "train", **how)

    empty = self.folder / "none" / "empty.jsonl"
    empty.parent.mkdir()
    empty.write_bytes(b"")
    self._assert_error(lambda: read(self.folder / "no.jsonl"), "no.jsonl does not exist")
    self._assert_error(lambda: read(empty), str(empty), "empty")
    self._assert_error(
      lambda: read(self._file("{", "}"), skip_bad_rows=True), "none of the 2 rows", "line 1"
    )
    (self.folder / "bare").mkdir()
    self._assert_error(lambda: read(self.folder / "bare"), "bare holds no train.jsonl")

  # Rows in the formats of the named datasets. Fails if one is refused or misread.
  @parameterized.parameters(
    ({"id": 60, "problem": "p", "answer": 204, "url": "u"}, "p", None, "204"),  # AIME
    ({"problem": "p", "answer": 204.0, "solution": "\\boxed{204}"}, "p", "\\boxed{204}", "204"),
    ({"problem": "p", "answer": 0.25}, "p", None, "0.25"),
    ({"problem": "p", "answer": None, "solution": "so \\boxed{7}."}, "p", "so \\boxed{7}.", "7"),
    ({"problem": "p", "answer": "", "solution": "so \\boxed{7}."}, "p", "so \\boxed{7}.", "7"),
    ({"problem": "p", "solution": "3+4=7\n#### 7"}, "p", "3+4=7\n#### 7", "7"),
    ({"question": "p", "answer": "72"}, "p", None, "72"),
    ({"question": "p", "answer": 72, "solution": "It is 72."}, "p", "It is 72.", "72"),
    ({"question": "p", "answer": "<<1+1=2>>2\n#### 2"}, "p", "2\n#### 2", "2"),
    (
      {"query": "p", "response": "a\n#### 72\nThe answer is: 72", "type": "GSM_Rephrased"},
      "p",
      None,
      "72",
    ),  # MetaMathQA
    ({"query": "p", "response": "a\nThe answer is: $\\frac12$"}, "p", None, "\\frac12"),
    (
      {"query": "p", "response": "a $\\boxed{\\frac12}$.\nThe answer is: \\frac{1}{2}"},
      "p",
      None,
      "\\frac12",
    ),
    ({"query": "p", "response": "a\nThe answer is: 1.5."}, "p", None, "1.5"),
    ({"query": "p", "response": "The answer is 1.5. So it is."}, "p", None, "1.5"),
    ({"question": "p", "answer": "First 2.\nSo \\boxed{5}."}, "p", "First 2.\nSo \\boxed{5}.", "5"),
    (  # DAPO and verl
      {
        "data_source": "math_dapo",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "p"}],
        "reward_model": {"ground_truth": "34", "style": "rule"},
        "extra_info": {"index": "9a9b"},
      },
      "p",
      None,
      "34",
    ),
    (
      {"prompt": [{"role": "user", "content": "p"}], "reward_model": {"ground_truth": 3}},
      "p",
      None,
      "3",
    ),
    ({"prompt": "p", "reward_model": {"ground_truth": "3"}}, "p", None, "3"),
    (  # chats for finetuning
      {
        "messages": [
          {"role": "user", "content": "p"},
          {"role": "assistant", "content": "s \\boxed{5}"},
        ]
      },
      "p",
      "s \\boxed{5}",
      "5",
    ),
  )
  def test_formats(self, row, problem, solution, answer):
    read = problem_files.read(self._file(row), "jsonl", "train").rows[0]
    self.assertEqual(
      (read.problem, read.solution, read.answer), (problem, solution or row.get("response"), answer)
    )
    self.assertEqual(read.id.startswith("jsonl/train/60"), "id" in row)

  # Fails if an answer in several boxes loses or repeats a part, or boxes of intermediate steps are
  # joined.
  @parameterized.parameters(
    ("$x=\\boxed{2}$ or $x=\\boxed{3}$", "2, 3"),
    ("$\\boxed{2}$ or $\\boxed{3}$.", "2, 3"),
    ("\\boxed{2}, \\boxed{3}, and \\boxed{2}", "2, 3"),
    ("\\[\\boxed{2}\\qquad\\boxed{3}\\text{ or }\\boxed{5}\\]", "2, 3, 5"),
    ("$$\\boxed{2}$$\n\n$$\\boxed{3}$$", "2, 3"),
    ("\\boxed{2}\\\\ &\\boxed{3}", "2, 3"),
    ("First \\boxed{2}. Then \\boxed{3}", "3"),
    ("\\boxed{2} and so \\boxed{3}", "3"),
    ("\\boxed{2} or", "2"),
    ("First \\boxed{4}. Then $x=\\boxed{2}$ or $x=\\boxed{3}$.", "2, 3"),
  )
  def test_gold_of_several_boxes(self, solution, answer):
    row = {"problem": "p", "solution": solution}
    self.assertEqual(problem_files.read(self._file(row), "math", "train").rows[0].answer, answer)

  # Fails if task.fields is not followed, also into objects; if rows without those names are not
  # read by their own fields; or if a partial match goes unnoticed.
  def test_fields(self):
    fields = {"problem": "q", "answer": "gold.final", "id": "n"}

    def read(*rows):
      return problem_files.read(self._file(*rows), "jsonl", "train", fields=fields)

    mine, plain = read(
      {"q": "p", "gold": {"final": 5}, "n": 3, "answer": "x"}, {"question": "r", "answer": "6"}
    ).rows
    self.assertEqual((mine.problem, mine.answer, mine.id), ("p", "5", "jsonl/train/3"))
    self.assertEqual((plain.problem, plain.answer), ("r", "6"))
    self._assert_error(
      lambda: read({"q": "p", "gold": {}}),
      'line 1: the field "gold.final" is missing',
      "task.fields",
    )
    self._assert_error(
      lambda: read({"q": 5, "gold": {"final": 5}}), 'the field "q" must be a string'
    )

  # Fails if trailing blank lines count as rows, or a blank line in the middle does not.
  def test_blank_lines(self):
    row = {"problem": "p", "answer": "5"}
    self.assertLen(problem_files.read(self._file(row, "", " ", "\r"), "jsonl", "train").rows, 1)
    path = self._file(row, "", row)
    self._assert_error(
      lambda: problem_files.read(path, "jsonl", "train"), f"{path}, line 2: a blank line"
    )

  # Fails if Parquet, gzip or a JSON list gives other rows than JSON lines, nested columns are lost,
  # or an error does not name the row.
  def test_other_files(self):
    rows = [
      {"prompt": [{"role": "user", "content": f"p{i}"}], "reward_model": {"ground_truth": str(i)}}
      for i in range(3)
    ]
    expected = problem_files.read(self._file(*rows), "jsonl", "train")
    (self.folder / "a.jsonl.gz").write_bytes(
      gzip.compress((self.folder / "rows.jsonl").read_bytes())
    )
    (self.folder / "a.json").write_text(json.dumps(rows, indent=2))
    (self.folder / "lines.json").write_bytes((self.folder / "rows.jsonl").read_bytes())
    parquet.write_table(pyarrow.Table.from_pylist(rows), self.folder / "a.parquet")
    bad = [*rows, {"prompt": rows[0]["prompt"], "reward_model": {"ground_truth": None}}]
    (self.folder / "b.json").write_text(json.dumps(bad))
    parquet.write_table(pyarrow.Table.from_pylist(bad), self.folder / "b.parquet")
    for name in ("a.jsonl.gz", "a.json", "a.parquet", "lines.json"):
      self.assertEqual(problem_files.read(self.folder / name, "jsonl", "train"), expected, name)
    for name, place in (("b.json", "item 4"), ("b.parquet", "row 4")):
      read = functools.partial(problem_files.read, self.folder / name, "jsonl", "train")
      self._assert_error(read, f'{name}, {place}: the field "answer" is missing')
    for name in ("c.parquet", "c.jsonl.gz", "c.json"):
      self._file("[1", name=name)
      read = functools.partial(problem_files.read, self.folder / name, "jsonl", "train")
      self._assert_error(read, name, "not ")

  # Fails if a file without rows, a number beyond floats, text that is not UTF-8 or a numeric
  # unique_id ends in a traceback, or float32 becomes another number.
  def test_rows_at_the_edge(self):
    def read(name="rows.jsonl"):
      return problem_files.read(self.folder / name, "jsonl", "train")

    row = {"problem": "p", "answer": "5"}
    self._file("[]", name="empty.json")
    table = pyarrow.table({"problem": ["p"], "answer": pyarrow.array([0.1], pyarrow.float32())})
    parquet.write_table(table, self.folder / "floats.parquet")
    parquet.write_table(table.slice(0, 0), self.folder / "empty.parquet")
    invalid = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers())
    parquet.write_table(
      pyarrow.table({"problem": invalid, "answer": ["5"]}), self.folder / "invalid.parquet"
    )
    for name in ("empty.json", "empty.parquet"):
      self._assert_error(functools.partial(read, name), name, "has no rows")
    self._assert_error(functools.partial(read, "invalid.parquet"), "invalid.parquet is not Parquet")
    self.assertEqual(read("floats.parquet").rows[0].answer, "0.1")
    self._file(row | {"answer": 10**400, "unique_id": 7})
    (found,) = read().rows
    self.assertEqual((found.id, found.answer), ("jsonl/train/7", str(10**400)))
    self._file(row | {"type": "\ud800"})
    self._assert_error(read, 'line 1: the field "type" holds an unpaired surrogate')

  # Fails if a split is not found under a common name, or another split's files are used.
  @parameterized.parameters(
    "train.parquet", "train.jsonl.gz", "train.json", "train/a.parquet", "train/b.jsonl.gz",
    "data/train-0-of-1.parquet",
    "train-00000-of-00001-1a2b.parquet",
  )  # fmt: skip
  def test_names_of_splits(self, name):
    row = {"problem": "p", "answer": "5"}
    path = self._file(row, name=name)
    self._file(row, name=str(path.relative_to(self.folder)).replace("train", "test", 1))
    self.assertEqual([str(file) for file in problem_files.find(self.folder, "train")], [str(path)])
    path.unlink()
    self._assert_error(lambda: problem_files.find(self.folder, "train"), "holds no train")

  # Fails if a given id or solution is dropped, null or "" counts as text, or whitespace changes the
  # id.
  def test_jsonl(self):
    lines = [
      {"problem": "p", "answer": "5", "solution": "s", "id": "a"},
      {"problem": "q", "answer": "x", "id": None, "solution": ""},
    ]
    first, second = problem_files.read(self._file(*lines, name="mine.jsonl"), "jsonl", "test").rows
    self.assertEqual(first, problem_files.Row("a", "p", "s", "5", ""))
    self.assertEqual((second.problem, second.solution, second.answer), ("q", None, "x"))
    spaced = problem_files.read(
      self._file({"problem": " q\n", "answer": "x"}), "jsonl", "test"
    ).rows
    self.assertEqual(spaced[0].id, second.id)

  # Fails if a byte-order mark or Windows line endings break a file or remain in the text.
  def test_bom_and_crlf(self):
    row = json.dumps({"problem": "a\r\nb", "answer": "5"}).encode()
    path = self._file(b"\xef\xbb\xbf" + row + b"\r", row.replace(b'"a\\', b'"c\\') + b"\r")
    self.assertEqual(
      [row.problem for row in problem_files.read(path, "jsonl", "train").rows], ["a\nb", "c\nb"]
    )

  # Fails if a huge line takes more than linear time.
  def test_huge_line(self):
    row = {"problem": "p", "solution": "\\boxed{" * 300_000 + "{" * 300_000 + "\\boxed{7}"}
    start = time.process_time()
    self.assertEqual(problem_files.read(self._file(row), "math", "train").rows[0].answer, "7")
    self.assertLess(time.process_time() - start, 20)

  # Fails if a repeated problem is kept or not counted, or a problem with two answers passes.
  def test_duplicates(self):
    row = {"problem": "p", "answer": "5"}
    rows = problem_files.read(
      self._file(row, {"problem": "q", "answer": "5"}, row), "jsonl", "train"
    )
    self.assertEqual(
      ([row.problem for row in rows.rows], rows.duplicates, rows.skipped), (["p", "q"], 1, [])
    )
    path = self._file(row, row | {"answer": "6"})
    self._assert_error(
      lambda: problem_files.read(path, "jsonl", "train"), f"{path}, line 2", f"{path}, line 1"
    )
    rows = problem_files.read(path, "jsonl", "train", skip_bad_rows=True)
    self.assertEqual(
      ([row.answer for row in rows.rows], rows.duplicates, len(rows.skipped)), (["5"], 0, 1)
    )

  # Fails if a repeated given id passes, even for equal rows.
  def test_given_id_twice(self):
    row = {"problem": "p", "answer": "5"}
    path = self._file(row | {"id": "a"}, row, row | {"id": "a"})
    self._assert_error(
      lambda: problem_files.read(path, "jsonl", "train"), f"{path}, line 3", "line 1", "'a'"
    )

  # Fails if optional fields are not validated.
  @parameterized.parameters("problem", "answer", "solution", "id")
  def test_broken_jsonl_field(self, field):
    row = {"problem": "p", "answer": "5", "solution": "s", "id": "a"}
    path = self._file(row, row | {"id": "b"} | {field: [7]})
    self._assert_error(
      lambda: problem_files.read(path, "jsonl", "train"),
      f"{path}, line 2: ",
      f'"{field}" must be a string',
    )

  # Fails if a tree's paths do not become ids, files of the other split or unrelated files are read,
  # MATH-500 gives the same problem another id, or the folder of a split is not accepted.
  def test_math_tree(self):
    self._file(MATH, name="MATH/train/algebra/2.json")
    self._file(MATH | {"type": "Geometry", "level": "Level ?"}, name="MATH/train/geometry/10.json")
    self._file({"any": "thing"}, name="MATH/notes.json")
    self._file(MATH, name="MATH/test/algebra/7.json")
    row = MATH | {
      "subject": MATH["type"],
      "level": 1,
      "answer": "2",
      "unique_id": "test/algebra/7.json",
    }
    five_hundred = self._file({key: row[key] for key in row if key != "type"}, name="math500.jsonl")
    train, test = (
      problem_files.read(self.folder / "MATH", "math", split).rows for split in ("train", "test")
    )
    self.assertEqual([row.id for row in train], ["math/train/algebra/2", "math/train/geometry/10"])
    self.assertEqual([row.kind for row in train], ["algebra/level 1", "geometry"])
    self.assertEqual([row.answer for row in train], ["2", "2"])
    self.assertEqual([row.id for row in test], ["math/test/algebra/7"])
    self.assertEqual(problem_files.read(five_hundred, "math", "test").rows, test)
    self.assertEqual(problem_files.read(self.folder / "MATH/test", "math", "test").rows, test)
    self._file("{", name="MATH/train/algebra/1.json")
    self._assert_error(
      lambda: problem_files.read(self.folder / "MATH", "math", "train"), "algebra/1.json: not JSON"
    )

  # Fails if a folder with splits stands in for its missing split.
  def test_missing_split(self):
    self._file(MATH, name="MATH/train.jsonl")
    self.assertLen(problem_files.read(self.folder / "MATH", "math", "train").rows, 1)
    self._assert_error(
      lambda: problem_files.read(self.folder / "MATH", "math", "test"), "MATH holds no test.jsonl"
    )

  # Fails if nested braces are not matched, escaped ones are, or the first or an unclosed box
  # counts.
  @parameterized.parameters(
    ("\\boxed{2}", "2"),
    ("$\\boxed{1}$, no: $\\boxed{\\frac{1}{2}}.$", "\\frac{1}{2}"),
    ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
    ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
    ("\\boxed{7} and \\boxed{8", "7"),
    ("\\boxed{\\boxed{4}}", "4"),
    (
      "\\boxed{\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}}",
      "\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}",
    ),
    ("\\fbox{4}", "4"),
    ("\\boxed {5}", "5"),
    ("\\boxed 6$ and", "6"),
    ("\\boxed\\frac12\\]", "\\frac12"),
    ("\\boxed{\\text{(A)}}", "\\text{(A)}"),
    ("}\\boxed{9}", "9"),
    ("\\boxedtwo{3}", None),
    ("\\boxed{}", None),
    ("none", None),
  )
  def test_boxed_answer(self, text, expected):
    answer, stop = problem_files.boxed_answer(text) or (None, None)
    self.assertEqual(answer, expected)
    if stop is not None:
      self.assertIsNone(problem_files.boxed_answer(text[stop:]))


if __name__ == "__main__":
  absltest.main()
