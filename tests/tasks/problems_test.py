"""Tests of choosing the problems of a run."""

import json
import os
import pathlib
import tempfile
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from synthneg_jax.data.records import Problem, Shards
from synthneg_jax.runtime import config_schema, errors
from synthneg_jax.tasks import problems

EXCERPT = pathlib.Path(__file__).parents[1] / "data"


def task(**leaves):
  """The config's section with these leaves."""
  section = config_schema.default().task
  section.update(leaves)
  return section


def text(number: int, length: int = 20) -> str:
  """A problem that shares no two words in a row with another."""
  return " ".join(f"w{number}x{word}" for word in range(length))


class ProblemsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)
    self.enter_context(mock.patch.dict(os.environ, {"TFDS_DATA_DIR": str(self.folder / "tfds")}))

  def _file(self, texts, name="train.jsonl", **more):
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
      "".join(json.dumps({"problem": p, "answer": "5", **more}) + "\n" for p in texts)
    )
    return path

  def _chosen(self, seed=0, **leaves):
    return problems.choose_splits(
      task(**{"name": "jsonl", "path": str(self.folder), **leaves}), seed
    )

  # Fails if a smaller subset is not a prefix of a larger one; if two seeds have the same order; if
  # the order depends on the file's order or on later rows; or if the test problems depend on the
  # seed.
  def test_nested_under_one_seed(self):
    texts = [text(i) for i in range(200)]
    self._file(texts)
    self._file([text(1000 + i) for i in range(50)], "test.jsonl")

    def choose(count, seed=0):
      return self._chosen(seed, train_problems=count, test_problems=10)

    small, large, other = choose(40), choose(160), choose(40, seed=1)
    self.assertEqual(small.train, large.train[:40])
    self.assertLen({problem.id for problem in large.train}, 160)
    self.assertLess(len({p.id for p in small.train} & {p.id for p in other.train}), 20)
    self.assertEqual(small.test, other.test)
    gone = large.train[60].prompt
    self._file([p for p in reversed(texts) if p != gone])
    again = choose(160).train
    self.assertEqual(again[:60], large.train[:60])
    self.assertEqual(again[60:159], large.train[61:])

  # Fails if an overlap with a test problem beyond the first test_problems, or with one of
  # decontaminate_against, passes; if the count shrinks by it; if the report does not say which; or
  # if decontaminate_ngram=0 looks for overlaps all the same.
  def test_overlaps_go_before_the_count_is_taken(self):
    leaked = [text(i) + f" and {text(1000 + i)}" for i in range(30)] + [
      "more " + text(2000) + " still"
    ]
    self._file([*leaked, *(text(100 + i) for i in range(50))])
    self._file([text(1000 + i) for i in range(30)], "test.jsonl")
    other = self._file([text(2000)], "elsewhere.jsonl", id="that")
    chosen = self._chosen(train_problems=50, test_problems=2, decontaminate_against=(str(other),))
    self.assertLen(chosen.train, 50)
    self.assertFalse({p.prompt for p in chosen.train} & set(leaked))
    self.assertEqual(chosen.figures, {
      "dropped_as_test": 31, "skipped_rows": 0, "duplicates": 0, "gold_disagreements": 0,
      "test_gold_disagreements": 0,
      "unreadable_solutions": 0,
    })  # fmt: skip
    last = [line for line in chosen.report if line["overlaps"] == "that"]
    self.assertLen(chosen.report, 31)
    self.assertEqual((last[0]["words"], last[0]["share"]), (" ".join(text(2000).split()[:13]), 0.8))
    with self.assertRaisesRegex(
      errors.UserError, "has 50 problems .31 more overlap.*train_problems=51"
    ):
      self._chosen(train_problems=51, test_problems=2, decontaminate_against=(str(other),))
    self.assertLen(
      self._chosen(train_problems=81, test_problems=2, decontaminate_ngram=0).train, 81
    )

  # Fails if a training problem that is a test problem passes without the overlap search.
  def test_equal_problems_always_go(self):
    self._file([text(0), text(1), text(2)])
    self._file([text(1)], "test.jsonl")
    chosen = self._chosen(train_problems=2, test_problems=1, decontaminate_ngram=0)
    self.assertEqual({p.prompt for p in chosen.train}, {text(0), text(2)})

  # Fails if broken rows stop a run with --skip_bad_rows, or are not counted and listed.
  def test_skipped_rows_are_counted(self):
    path = self._file([text(0), text(1)])
    path.write_text(path.read_text() + "{\n")
    self._file([text(5)], "test.jsonl")
    with self.assertRaisesRegex(errors.UserError, "train.jsonl, line 3: "):
      self._chosen(train_problems=2, test_problems=1)
    chosen = self._chosen(train_problems=2, test_problems=1, skip_bad_rows=True)
    self.assertEqual(chosen.figures["skipped_rows"], 1)
    self.assertStartsWith(chosen.report[0]["skipped"], f"{path}, line 3: ")

  # Fails if an unusable gold answer is only found hours later, in the first verdict.
  @pytest.mark.slow  # grades in worker processes
  def test_answers_that_are_no_numbers(self):
    path = self._file([text(0), text(1)])
    path.write_text(
      path.read_text()
      + json.dumps({"problem": text(2), "answer": "\\sqrt{2}", "id": "half"})
      + "\n"
    )
    self._file([text(5)], "test.jsonl")
    with self.assertRaisesRegex(
      errors.UserError, "^half: .*sqrt.* is not a number.*task.answers=math"
    ):
      self._chosen(train_problems=3, test_problems=1)
    self.assertLen(self._chosen(train_problems=3, test_problems=1, answers="math").train, 3)
    chosen = self._chosen(train_problems=2, test_problems=1, skip_bad_rows=True)
    self.assertEqual(
      (chosen.figures["skipped_rows"], chosen.report[0]["skipped"][:5]), (1, "half:")
    )
    path.write_text(
      path.read_text()
      + json.dumps({"problem": text(3), "answer": "1+" * 3000, "id": "long"})
      + "\n"
    )
    with self.assertRaisesRegex(errors.UserError, "^long: The gold answer .*--skip_bad_rows"):
      self._chosen(train_problems=3, test_problems=1, answers="math")
    self.assertLen(
      self._chosen(train_problems=3, test_problems=1, answers="math", skip_bad_rows=True).train, 3
    )

  # Fails if a row whose solution states another answer than its gold is trained on unless that is
  # asked for, one that states none is dropped, test problems change, or the report, the figures or
  # the order of the others are wrong.
  @parameterized.parameters("drop", "keep")
  def test_gold_disagreements(self, choice):
    self._file([text(i) for i in range(20)], solution="It is 5.\n#### 5")
    self._file([text(100), text(101)], "test.jsonl", solution="#### 7")
    before = self._chosen(train_problems=20, test_problems=1).train
    wrong, silent = before[1], before[3]
    rows = [
      {
        "problem": p.prompt,
        "answer": "5",
        "solution": "#### 6" if p is wrong else "It is 5." if p is silent else "#### 5",
      }
      for p in before
    ]
    (self.folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = self._chosen(train_problems=10, test_problems=2, gold_disagreements=choice)
    expected = [p.id for p in before if p is not wrong or choice == "keep"][:10]
    self.assertEqual([p.id for p in chosen.train], expected)
    self.assertLen(chosen.test, 2)
    figures = {"gold_disagreements": 1, "test_gold_disagreements": 2, "unreadable_solutions": 1}
    self.assertEqual({name: chosen.figures[name] for name in figures}, figures)
    at_fault = {line["id"]: line for line in chosen.report}
    self.assertEqual(
      at_fault[wrong.id],
      {"id": wrong.id, "gold": "5", "states": "6", "reason": "wrong", "left_out": choice == "drop"},
    )
    self.assertEqual(
      (at_fault[silent.id]["reason"], at_fault[silent.id]["left_out"]), ("no_answer", False)
    )
    self.assertEqual({at_fault[p.id]["left_out"] for p in chosen.test}, {False})
    self.assertEqual(
      problems.load(
        task(name="jsonl", path=str(self.folder), gold_disagreements=choice), 0, "train", 10
      ),
      chosen.train,
    )
    if choice == "drop":
      with self.assertRaisesRegex(
        errors.UserError,
        "has 19 problems .0 more overlap test problems, 1 more .*task.train_problems=20",
      ):
        self._chosen(train_problems=20, test_problems=2)

  # Fails if a worked solution is compared as if it were the whole response.
  def test_solutions_of_exact_answers(self):
    self._file([text(i) for i in range(3)], solution="Go 1, then 2.\n#### 5")
    self._file([text(100)], "test.jsonl")
    chosen = self._chosen(train_problems=3, test_problems=1, answers="exact")
    self.assertLen(chosen.train, 3)
    self.assertEqual(chosen.figures["gold_disagreements"], 0)

  # Fails if the real GSM8K loses a row, has one whose solution states another answer, or is slow to
  # check.
  def test_golds_of_gsm8k(self):
    if not os.environ.get("SYNTHNEG_DATA_DIR"):
      self.skipTest("SYNTHNEG_DATA_DIR is not set")
    section = task(name="gsm8k", train_problems=7469, test_problems=1319)
    figures = problems.choose_splits(section, 0).figures
    names = ("gold_disagreements", "test_gold_disagreements", "dropped_as_test")
    self.assertEqual([figures[name] for name in names], [0, 0, 4])
    self.assertLessEqual(figures["unreadable_solutions"], 1)

  # Fails if a D_syn that a run wrote comes back changed, or under other ids.
  def test_written_d_syn(self):
    made = [
      Problem(f"mine/{i}", text(i), f"s{i}\n#### 5" if i else "", "5", "teacher") for i in range(5)
    ]
    Shards(self.folder / "synthesize" / "train", Problem).write(made[:3])
    Shards(self.folder / "synthesize" / "train", Problem).write(made[3:4])
    Shards(self.folder / "synthesize" / "test", Problem).write(made[4:])
    chosen = self._chosen(path=str(self.folder / "synthesize"), train_problems=4, test_problems=1)

    def fields(problem):
      return (problem.id, problem.prompt, problem.solution, problem.answer)

    self.assertEqual(sorted(map(fields, chosen.train)), sorted(map(fields, made[:4])))
    self.assertEqual(list(map(fields, chosen.test)), list(map(fields, made[4:])))
    self.assertEqual(chosen.train[0].source, "jsonl/train")

  # Fails if test problems of another format, MATH-500's, are not taken, or the path's own are taken
  # beside them.
  def test_test_path(self):
    self._file([text(0)])
    self._file([text(9)], "test.jsonl")
    path = self._file(
      [text(3)], "500.jsonl", unique_id="test/algebra/3.json", level=2, subject="Algebra"
    )
    chosen = self._chosen(train_problems=1, test_problems=1, test_path=str(path))
    self.assertEqual(
      [(p.id, p.source) for p in chosen.test],
      [("math/test/algebra/3", "jsonl/test/algebra/level 2")],
    )

  # Fails if task.fields does not reach the files, or test files in another form need it.
  def test_fields(self):
    self._file([text(0)])
    (self.folder / "mine.jsonl").write_text(
      json.dumps({"q": text(3), "a": {"gold": 7}, "answer": "6"})
    )
    chosen = self._chosen(
      path=str(self.folder / "mine.jsonl"), test_path=str(self.folder / "train.jsonl"),
      fields="problem=q,answer=a.gold", train_problems=1, test_problems=1,
    )  # fmt: skip
    self.assertEqual(
      [(p.prompt, p.answer) for p in (*chosen.train, *chosen.test)],
      [(text(3), "7"), (text(0), "5")],
    )

  # Fails if GSM8K in SYNTHNEG_DATA_DIR is not found, or a path is overruled by it.
  def test_where_gsm8k_is_looked_for(self):
    with mock.patch.dict(os.environ, {"SYNTHNEG_DATA_DIR": str(EXCERPT)}):
      chosen = problems.choose_splits(task(name="gsm8k", train_problems=48, test_problems=16), 0)
      self.assertEqual((len(chosen.train), len(chosen.test)), (48, 16))
      self.assertEqual({p.source for p in chosen.train}, {"gsm8k/train"})
      self._file([text(0)])
      self._file([text(1)], "test.jsonl")
      other = problems.choose_splits(
        task(name="gsm8k", path=str(self.folder), train_problems=1, test_problems=1), 0
      )
      self.assertEqual(other.train[0].prompt, text(0))

  # Fails if an empty path or a file of training problems is accepted as a test set, or the message
  # does not name the flag.
  @parameterized.parameters(
    ({"name": "jsonl", "path": ""}, "task.path is empty"),
    ({"name": "math", "path": ""}, "task.path is empty.*SYNTHNEG_DATA_DIR"),
    ({"name": "jsonl", "path": "train.jsonl"}, "task.test_path"),
    ({"name": "jsonl", "path": "nowhere"}, "nowhere does not exist"),
  )
  def test_missing(self, leaves, message):
    self._file([text(0)])
    os.environ.pop("SYNTHNEG_DATA_DIR", None)  # mock.patch.dict in setUp puts it back
    leaves = leaves | {"path": leaves["path"] and str(self.folder / leaves["path"])}
    with self.assertRaisesRegex(errors.UserError, message):
      self._chosen(**leaves)

  # Fails if `load` has another order than `choose`.
  def test_load(self):
    self._file([text(i) for i in range(9)])
    self._file([text(10)], "test.jsonl")
    section = task(name="jsonl", path=str(self.folder), train_problems=5, test_problems=1)
    self.assertEqual(
      problems.load(section, 3, "train", 5), problems.choose_splits(section, 3).train
    )
    self.assertEqual(problems.load(section, 3, "test", 1), problems.choose_splits(section, 3).test)


if __name__ == "__main__":
  absltest.main()
