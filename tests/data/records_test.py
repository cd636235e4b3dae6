"""Records on disk: only whole shards, and errors that name every damaged line."""

import dataclasses
import json
import tempfile

from absl.testing import absltest, parameterized
from etils import epath

from synthneg_jax.data import records
from synthneg_jax.data.records import Pair, Problem, Rollout, Shards, StepEstimate, Trace
from synthneg_jax.runtime.errors import UserError


def problem(number: int, prompt: str = "How many?") -> Problem:
  return Problem(f"p{number}", prompt, "2 + 2 = 4\n#### 4", "4", "train")


TRACE = Trace(
  "p0/sample/0/1",
  "p0",
  1,
  [5, 6, 2],
  [1, 3],
  "a\nb",
  False,
  "wrong",
  None,
  "eos",
  [-0.5, -1.25, 0.0],
  [-0.25, -1.0, 0.0],
  "0123456789abcdef",
)
ESTIMATE = StepEstimate(
  "p0/sample/0/1",
  "p0",
  0,
  1,
  2,
  1,
  False,
  False,
  [dataclasses.asdict(Rollout([6, 2], True, "right", "eos", -0.5, -1.25))] * 2,
  "p0/sample/0/1/0",
)
PAIR = Pair(
  "p0/sample/0/1/algorithm1/0",
  "p0",
  "p0/sample/0/1",
  [1, 2],
  [3, 4, 2],
  [5],
  "algorithm1",
  0,
  0.125,
)


class ShardsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = epath.Path(self.enterContext(tempfile.TemporaryDirectory())) / "problems"
    self.shards = Shards(self.folder, Problem)

  @parameterized.parameters(problem(0), TRACE, ESTIMATE, PAIR)
  def test_round_trip(self, record):
    # Fails if JSON loses, renames, rounds or retypes a field, or the key changes.
    shards = Shards(self.folder, type(record))
    shards.write([record])
    self.assertEqual(list(shards.read()), [record])
    self.assertEqual(shards.read_dict(), {record.key: record})

  def test_keys(self):
    # Fails if a key differs from the references in other records.
    self.assertEqual(
      [r.key for r in (problem(0), TRACE, ESTIMATE, PAIR)],
      ["p0", "p0/sample/0/1", "p0/sample/0/1/0", PAIR.id],
    )

  def test_shards_keep_their_order(self):
    # Fails if shards are sorted as text (10 before 2), or a second write overwrites the first.
    for number in range(12):
      self.shards.write([problem(2 * number), problem(2 * number + 1)])
    self.assertLen(self.shards.files(), 12)
    self.assertLen(list(self.folder.iterdir()), 12)  # and no temporary file
    self.assertEqual(
      [record.id for record in self.shards.read()], [f"p{number}" for number in range(24)]
    )

  def test_text_of_any_kind(self):
    # Fails if a record's text can end a line: line and paragraph separators, carriage returns,
    # quotes, emoji.
    texts = ["a\nb\r\nc", "a\u2028b\u2029c\x85d\x0be", 'say "4"', "½ 🙂", ""]
    self.shards.write([problem(i, text) for i, text in enumerate(texts)])
    self.assertEqual([record.prompt for record in self.shards.read()], texts)

  def test_no_folder_and_no_records(self):
    # Fails if reading an empty stage raises.
    self.assertEqual(self.shards.files(), [])
    self.assertEqual(list(self.shards.read()), [])
    self.shards.write([])
    self.assertEqual(self.shards.read_dict(), {})

  def test_a_killed_write_is_ignored(self):
    # Fails if a temporary file is read or takes a shard's number, or a failed write leaves a shard.
    self.shards.write([problem(0)])
    (self.folder / "00001.jsonl.123.tmp").write_text('{"id": "p1", "pro')

    def killed():
      yield problem(1)
      raise KeyboardInterrupt

    with self.assertRaises(KeyboardInterrupt):
      self.shards.write(killed())
    self.assertEqual([record.id for record in self.shards.read()], ["p0"])
    self.shards.write([problem(2)])
    self.assertEqual([path.name for path in self.shards.files()], ["00000.jsonl", "00001.jsonl"])

  def test_a_deleted_shard_overwrites_no_other(self):
    # Fails if a new shard's number is the number of shards: after a deletion, as error messages
    # suggest, the next write would overwrite the last shard.
    for number in range(3):
      self.shards.write([problem(number)])
    self.shards.files()[1].unlink()
    self.shards.write([problem(9)])
    self.assertCountEqual([record.id for record in self.shards.read()], ["p0", "p2", "p9"])

  @parameterized.parameters(1, 5, 40)
  def test_truncated_file(self, cut):
    # Fails if a truncated file passes, or the error names another file or line.
    for number in range(2):
      self.shards.write([problem(2 * number), problem(2 * number + 1)])
    path = self.shards.files()[1]
    path.write_text(path.read_text()[:-cut])
    with self.assertRaises(UserError) as caught:
      list(self.shards.read())
    message = str(caught.exception)
    self.assertEqual(message[: len(f"{path}, line 2: ")], f"{path}, line 2: ")
    self.assertIn("truncated", message)
    self.assertNotIn("\n", message)

  def test_other_damage(self):
    # Fails if a blank line, another record type, or a missing or additional field passes.
    self.shards.write([problem(0), problem(1)])
    path = self.shards.files()[0]
    first, second = path.read_text().splitlines()
    fields = json.loads(second)
    short = json.dumps({name: value for name, value in fields.items() if name != "answer"})
    for damaged, sentence in (
      ("", "line 2: not a complete Problem record"),
      ("[1, 2]", "line 2: the fields do not match a Problem record"),
      ("7", "line 2: the fields do not match"),
      (short, "line 2: the fields do not match"),
      (json.dumps({**fields, "x": 1}), "line 2: the fields do not match"),
      (json.dumps(dataclasses.asdict(PAIR)), "line 2: the fields do not match"),
    ):
      path.write_text(f"{first}\n{damaged}\n")
      with self.assertRaisesRegex(UserError, f"{path}, {sentence}"):
        list(self.shards.read())

  def test_duplicate_key(self):
    # Fails if a later record silently replaces an earlier one.
    self.shards.write([problem(0), problem(1)])
    self.shards.write([problem(1, "another prompt")])
    with self.assertRaisesRegex(UserError, f"{self.folder}: duplicate key 'p1'"):
      self.shards.read_dict()
    self.assertLen(list(self.shards.read()), 3)

  def test_every_type_can_be_stored(self):
    # Fails if a new record type cannot be restored from plain JSON values, or has no key.
    for kind in records.Record.__constraints__:
      self.assertTrue(dataclasses.is_dataclass(kind))
      self.assertTrue(hasattr(kind, "key"))


if __name__ == "__main__":
  absltest.main()
