"""Exports and imports of traces, pairs and step labels, read back and compared with the records."""

import collections
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import types

import numpy as np
import pytest
import tokenizers
import transformers
from absl.testing import absltest, parameterized

from synthneg_jax.data.records import Pair, Problem, Shards, StepEstimate, Trace
from synthneg_jax.data.token_text import TokenText
from synthneg_jax.pipeline import credit, export_formats, import_traces, record_io
from synthneg_jax.runtime.errors import UserError
from tests import tiny_model
from tests.pipeline import small_run

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[2]


def read(workdir, folder, kind) -> list:
  return list(Shards(workdir / folder, kind).read())


def exported(what: str, suffix: str = ".jsonl", source: str = "") -> list[dict]:
  out = pathlib.Path(tempfile.mkdtemp()) / f"{what}{suffix}"
  count = export_formats.write(small_run.opened(small_run.finished()), what, str(out), source)
  rows = [row for _, row in record_io.read(record_io.epath.Path(out))]
  assert count == len(rows) > 0
  return rows


def write_rows(rows, suffix: str = ".jsonl") -> str:
  path = pathlib.Path(tempfile.mkdtemp()) / f"rows{suffix}"
  record_io.write(record_io.epath.Path(path), rows)
  return str(path)


def imported(rows, assume_finish: str = "", suffix: str = ".jsonl", skip: bool = False, **changes):
  """Returns (the run that imported the rows, its figures)."""
  experiment = small_run.opened(small_run.copied("synthesize", "sft"), **changes)
  return experiment, import_traces.run(experiment, [write_rows(rows, suffix)], assume_finish, skip)


class RoundTripTest(parameterized.TestCase):
  @parameterized.parameters(".jsonl", ".parquet")
  def test_traces_come_back_as_they_were(self, suffix):
    # Fails if export or import loses, rounds, reorders or retokenises a field.
    rows = exported("traces", suffix)
    self.assertTrue(all(row["problem"].startswith(" ") and row["answer"].isdigit() for row in rows))
    np.random.default_rng(0).shuffle(rows)
    experiment, figures = imported(rows, suffix=suffix)
    self.assertEqual(
      read(experiment.workdir, "sample/traces", Trace),
      read(small_run.finished(), "sample/traces", Trace),
    )
    self.assertEqual((figures["imported"]["rows"], figures["imported"]["without_logps"]), (120, 0))

  def test_text_is_tokenised_once_and_scored(self):
    # Fails if a trace imported as text differs from the same trace imported as ids, beyond the last
    # digits of log-probs, or if credit treats it differently.
    ours = read(small_run.finished(), "sample/traces", Trace)
    rows = [
      {
        "problem": t.text and self.prompt_of(t),
        "response": t.text,
        "finish_reason": t.finish_reason,
      }
      for t in ours
    ]
    experiment, figures = imported(rows)
    for trace, known in zip(read(experiment.workdir, "sample/traces", Trace), ours, strict=True):
      for field in (
        "id",
        "ids",
        "step_ends",
        "text",
        "correct",
        "reason",
        "extracted",
        "finish_reason",
      ):
        self.assertEqual(getattr(trace, field), getattr(known, field))
      np.testing.assert_allclose(trace.logps, known.logps, atol=5e-5)
      self.assertEqual((trace.policy, trace.drawn_logps), ("elsewhere", []))
    self.assertEqual(figures["imported"]["without_logps"], 120)
    self.assertEqual(list((experiment.workdir / "sample").glob("*.npz")), [])
    credit.run(experiment)

    def estimates(workdir):
      return read(workdir, "credit/estimates", StepEstimate)

    self.assertEqual(estimates(experiment.workdir), estimates(small_run.finished()))

  def prompt_of(self, trace):
    if not hasattr(self, "prompts"):
      self.prompts = {
        p.id: p.prompt for p in read(small_run.finished(), "synthesize/train", Problem)
      }
    return self.prompts[trace.problem_id]

  def test_a_policy_trained_elsewhere(self):
    # Fails if traces of another policy require our SFT, or if stage sft keeps weights other than
    # the given ones.
    experiment = small_run.opened(small_run.copied("synthesize"))
    figures = import_traces.adopt_sft(experiment, "embedded")
    self.assertEqual(figures["adopted"], "embedded")
    self.assertEqual(experiment.policy("sft").fingerprint, experiment.base().fingerprint)
    self.assertEqual(import_traces.adopt_sft(experiment, "embedded"), {})
    with self.assertRaisesRegex(UserError, "with other weights"):
      import_traces.adopt_sft(experiment, str(small_run.finished() / "sft/policy"))

  def test_rows_that_cannot_be_read(self):
    # Fails if an id of another type or text that is not UTF-8 ends in a traceback, or cannot be
    # skipped.
    good = exported("traces")[0]
    bad = [
      good | {"problem_id": ["a"]},
      good | {"ids": None, "text": "5 \ud800"},
      good | {"tokens": ["\ud83d"]},
    ]
    path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"  # with surrogates as escapes

    def read_rows(*rows, skip=False):
      path.write_text("".join(json.dumps(row) + "\n" for row in rows))
      return import_traces.run(experiment, [str(path)], "", skip)

    experiment = small_run.opened(small_run.copied("synthesize", "sft"))
    for row in bad:
      with self.assertRaisesRegex(UserError, 'line 1: (the field "problem_id" must be|"text" or)'):
        read_rows(row)
    self.assertEqual(read_rows(*bad, good, skip=True)["traces"], 1)
    report = json.loads((experiment.workdir / "sample/import_report.json").read_text())
    self.assertEqual(report["skipped_rows"], 3)

  def test_export_of_another_config(self):
    # Fails if records are written with the prompts of another config.
    experiment = small_run.opened(small_run.finished(), **{"sample.temperature": 0.123})
    with self.assertRaisesRegex(UserError, "sample .* was begun with sample.temperature="):
      export_formats.write(experiment, "stepwise", "/nowhere/x.jsonl")

  def test_by_the_command_line(self):
    # Fails if a command does not match the function it calls, or the stage is not done afterwards.
    out, workdir = pathlib.Path(tempfile.mkdtemp()), small_run.copied("synthesize", "sft")
    (out / "config.py").write_text(
      "from tests.pipeline import small_run\n\n\ndef get_config():\n  return small_run.config()\n"
    )

    def launch(program, workdir, *flags):
      command = [
        sys.executable,
        f"launch/{program}.py",
        f"--config={out / 'config.py'}",
        f"--workdir={workdir}",
        *flags,
      ]
      env = {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "HOME": str(out),
        "PATH": "/usr/bin:/bin",
      }
      return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    done = launch(
      "export_records", small_run.finished(), "--what=traces", f"--out={out / 't.jsonl'}"
    )
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    self.assertIn("120 rows", done.stderr)
    done = launch("import_traces", workdir, f"--traces={out / 't.jsonl'}")
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    self.assertEqual(
      json.loads((workdir / "summary.json").read_text())["stages"]["sample"]["traces"], 120
    )
    done = launch("export_records", workdir, "--what=stepwise", f"--out={out / 's.jsonl'}")
    self.assertEqual(done.returncode, 1)
    self.assertIn("credit/estimates has no records", done.stderr)


class RefusalTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    trace = read(small_run.finished(), "sample/traces", Trace)[0]
    self.row = {
      "problem_id": trace.problem_id,
      "ids": trace.ids,
      "finish_reason": trace.finish_reason,
      "logps": trace.logps,
    }

  @parameterized.parameters(
    ({"problem_id": "other/7"}, "problem_id 'other/7' is not a training problem"),
    ({"problem_id": None}, 'neither "problem_id" nor "problem"'),
    ({"ids": None}, 'neither "ids" nor "text"'),
    ({"ids": [1, 5], "logps": None}, "EOS occurs before the end"),
    ({"ids": [99999]}, "whole numbers from 0 to"),
    ({"ids": "5 6"}, 'the field "ids" must be a list'),
    ({"ids": [], "logps": [], "finish_reason": "length"}, "the response has 0 tokens"),
    ({"ids": [5] * 200, "logps": None}, "leaves room for 1 to"),
    ({"logps": [-0.5]}, '"logps" has 1 numbers'),
    ({"logps": [0.7, "x"]}, "must hold log-probs"),
    ({"logps": [-0.5, float("-inf")]}, '"logps" must hold finite log-probs'),
    ({"drawn_logps": [float("nan")]}, '"drawn_logps" must hold finite log-probs'),
    ({"ids": [5, True], "logps": None}, '"ids" must hold whole numbers'),
    ({"finish_reason": None}, "--assume_finish"),
    ({"finish_reason": "tool_calls"}, "'tool_calls' but must be one of eos, stop, length"),
  )
  def test_rows(self, changes, message):
    # Fails if an invalid row is accepted, or the message does not name the row.
    row = {name: value for name, value in (self.row | changes).items() if value is not None}
    with self.assertRaisesRegex(UserError, r"rows.jsonl, line 2: .*" + re.escape(message)):
      imported([self.row | {"index": 5}, row])

  def test_skipped_rows_are_counted(self):
    # Fails if --skip_bad_rows drops valid rows or does not count the invalid ones.
    changes = {"credit.best_of": 1}
    _, figures = imported(
      [self.row, self.row | {"finish_reason": "x"}, self.row], skip=True, **changes
    )
    self.assertEqual((figures["traces"], figures["imported"]["skipped_rows"]), (2, 1))

  def test_a_trace_twice(self):
    # Fails if two traces may share an id.
    with self.assertRaisesRegex(UserError, "trace 3 of problem .* occurs twice"):
      imported([self.row | {"index": 3}] * 2)

  def test_too_few_for_best_of_k(self):
    # Fails if Best-of-k would be estimated from fewer than k traces, which later raises a
    # traceback.
    with self.assertRaisesRegex(UserError, "has 1 traces, less than credit.best_of=2"):
      imported([self.row], **{"credit.best_of": 2})

  @parameterized.parameters(
    ("t.csv", "must end in"), ("t.jsonl", "cannot be read"), ("t.parquet", "not a Parquet file")
  )
  def test_files(self, name, message):
    # Fails if a missing file, or a file of another format, raises a traceback.
    path = pathlib.Path(tempfile.mkdtemp()) / name
    if name == "t.parquet":
      path.write_text("no parquet")
    with self.assertRaisesRegex(UserError, message):
      list(record_io.read(record_io.epath.Path(path)))


class ExactnessTest(parameterized.TestCase):
  """A tokenizer with merges: "ab" is one token, and so is "\\nb"."""

  def setUp(self):
    super().setUp()
    vocab = {
      piece: i for i, piece in enumerate(["<eos>", "a", "b", "Ċ", "#", "Ġ", "1", "ab", "Ċb"])
    }
    backend = tokenizers.Tokenizer(
      tokenizers.models.BPE(vocab=vocab, merges=[("a", "b"), ("Ċ", "b")])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_tokens(["<end>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    policy = types.SimpleNamespace(
      tokenizer=tokenizer,
      token_text=TokenText(tokenizer, (9,)),
      eos_ids=(0, 9),
      model=tiny_model.model(vocab_size=10),
    )
    problems = {"p": Problem("p", "a\n", "", "1", "")}
    experiment = types.SimpleNamespace(config=small_run.config(), problems=lambda split: problems)
    self.reader = import_traces._Reader(experiment, policy, "")

  def read(self, **row):
    return self.reader.read({"problem_id": "p"} | row)

  def test_ids_that_text_would_not_give_back(self):
    # Fails if ids are retokenised, or the report does not count what retokenising would change.
    response = self.read(ids=[1, 2, 1, 7, 0], finish="eos", logps=[-1.0] * 5)
    self.assertEqual(
      (response.ids, response.finish_reason, list(response.logp)),
      ([1, 2, 1, 7, 0], "eos", [-1.0] * 5),
    )
    report = import_traces._report(self.reader.counts)
    self.assertEqual((report["reencoded_boundaries"], report["reencoded_boundaries_moved"]), (3, 1))
    self.assertEqual(
      (report["reencoded_rows_moved"], report["reencoded_share_moved"]), (1, round(1 / 3, 6))
    )

  def test_logprobs_of_other_tokens_are_not_taken(self):
    # Fails if log-probs are assigned to tokens that they do not belong to.
    moved = self.read(text="abb", tokens=["a", "b", "b"], logps=[-1.0, -2.0, -3.0], finish="length")
    self.assertEqual((moved.ids, moved.logp), ([7, 2], None))
    kept = self.read(text="abb", tokens=["ab", "b"], logps=[-1.0, -2.0], finish="length")
    self.assertEqual((kept.ids, kept.logp), ([7, 2], [-1.0, -2.0]))
    self.assertEqual(
      (
        self.reader.counts["retokenised_boundaries"],
        self.reader.counts["retokenised_boundaries_moved"],
      ),
      (3, 1),
    )

  def test_the_seam(self):
    # Fails if the report misses that prompt and response merge when encoded as one text.
    self.read(text="b1", finish="length")
    self.assertEqual(self.reader.counts["seam_moved"], 1)
    self.read(text="1b", finish="length")
    self.assertEqual(self.reader.counts["seam_moved"], 1)

  def test_eos_is_its_authors(self):
    # Fails if EOS is added to a response that was cut off, or missing from one that ended.
    self.assertEqual(self.read(text="1", finish="length").ids, [6])
    self.assertEqual(self.read(text="1", finish="stop").ids, [6, 0])
    cut, whole = (
      self.read(ids=[6], finish="length", logps=[-1.0]),
      self.read(ids=[6], finish="stop", logps=[-1.0]),
    )
    self.assertEqual((cut.ids, cut.finish_reason, cut.logp), ([6], "length", [-1.0]))
    self.assertEqual((whole.ids, whole.finish_reason, whole.logp), ([6, 0], "eos", None))
    self.assertEqual(self.reader.counts["eos_restored"], 1)

  def test_every_ending_of_the_policy(self):
    # Fails if only the tokenizer's EOS ends a trace: a trace that ends with another stop token
    # would get a second EOS and lose its log-probs.
    for finish in ("eos", "stop"):
      response = self.read(ids=[6, 9], finish=finish, logps=[-1.0, -2.0])
      self.assertEqual(
        (response.ids, response.finish_reason, response.logp), ([6, 9], "eos", [-1.0, -2.0])
      )
    self.assertEqual(self.read(text="1<end>", finish="stop").ids, [6, 9])
    self.assertEqual(self.reader.counts["eos_restored"], 0)
    with self.assertRaisesRegex(UserError, "EOS occurs before the end of the ids"):
      self.read(ids=[6, 9, 6], finish="length")
    with self.assertRaisesRegex(UserError, '"ids" must hold whole numbers from 0 to 9'):
      self.read(ids=[10], finish="length")


class ExportTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    workdir = small_run.finished()
    self.traces = {trace.id: trace for trace in read(workdir, "sample/traces", Trace)}
    self.problems = {problem.id: problem for problem in read(workdir, "synthesize/train", Problem)}
    self.estimates = collections.defaultdict(list)
    for estimate in read(workdir, "credit/estimates", StepEstimate):
      self.estimates[estimate.trace_id].append(estimate)

  @parameterized.parameters("pairs", "stepwise", "math_shepherd", "prm800k")
  def test_parquet_holds_the_same(self, what):
    # Fails if Parquet loses a nested or empty field.
    self.assertEqual(exported(what, ".parquet"), exported(what))

  def test_pairs(self):
    # Fails if ids and text belong to different pairs, EOS is added to a step, or a pair is missing.
    records = {pair.id: pair for pair in read(small_run.finished(), "pairs/step_dpo/pairs", Pair)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(small_run.finished() / "sft/policy"))
    rows = exported("pairs")
    self.assertEqual([row["id"] for row in rows], list(records))
    unfinished = 0
    for row in rows:
      pair = records[row["id"]]
      self.assertEqual(
        (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]),
        (pair.trunk, pair.chosen, pair.rejected),
      )
      for side in ("prompt", "chosen", "rejected"):
        self.assertEqual(tokenizer.encode(row[side], add_special_tokens=False), row[f"{side}_ids"])
      unfinished += not row["rejected"].endswith("<eos>")
      self.assertIn(self.problems[row["problem_id"]].prompt, row["prompt"])
    self.assertGreater(unfinished, 0)

  def labels(self, trace_id) -> list[bool]:
    """Expected labels from the records: True for steps with any correct continuation."""
    right = self.traces[trace_id].correct
    return [right or e.successes > 0 or (e.exact and e.correct) for e in self.estimates[trace_id]]

  def test_stepwise(self):
    # Fails if steps and labels are misaligned, or counts differ from those of credit.
    rows = exported("stepwise")
    self.assertCountEqual([row["trace_id"] for row in rows], self.estimates)
    both = set()
    for row in rows:
      trace = self.traces[row["trace_id"]]
      self.assertEqual("\n".join(row["completions"]), trace.text.rstrip("\n"))
      self.assertEqual(row["labels"], self.labels(trace.id))
      self.assertEqual(row["prompt"], self.problems[trace.problem_id].prompt)
      counts = [
        (e.successes, e.rollouts) if not e.exact else (int(e.correct), 1)
        for e in self.estimates[trace.id]
      ]
      self.assertEqual(list(zip(row["successes"], row["rollouts"], strict=True)), counts)
      both |= set(row["labels"])
    self.assertEqual(both, {True, False})

  def test_math_shepherd(self):
    # Fails if a tag or sign is missing: consumers find labels by replacing the tags of `input`.
    for row, trace_id in zip(exported("math_shepherd"), self.estimates, strict=True):
      signs = []
      for part, line in zip(row["input"].split("\n"), row["label"].split("\n"), strict=True):
        self.assertTrue(part.endswith(" ки"), part)
        self.assertEqual(part[: -len("ки")], line[:-1])
        signs.append(line[-1] == "+")
      self.assertEqual(signs, self.labels(trace_id))
      self.assertIn(" Step 1: ", row["input"])

  def test_prm800k(self):
    # Fails if ratings continue after the first error, or an unlabelled rest counts as a solution.
    for row, trace_id in zip(exported("prm800k"), self.estimates, strict=True):
      labels = self.labels(trace_id)
      end = labels.index(False) + 1 if False in labels else len(labels)
      ratings = [step["completions"][0]["rating"] for step in row["label"]["steps"]]
      self.assertEqual(ratings, [1 if label else -1 for label in labels[:end]])
      self.assertEqual(
        row["label"]["finish_reason"], "found_error" if False in labels else "solution"
      )
      self.assertLen(row["question"]["pre_generated_steps"], len(labels))

  def test_what_is_not_known_has_no_label(self):
    # Fails if a step that the schedule skipped is labelled: rows must end before it.
    workdir = small_run.copied("synthesize", "sft", "sample", "credit")
    shards = Shards(workdir / "credit/estimates", StepEstimate)
    records = [
      json.loads(line) for path in shards.files() for line in path.read_text().splitlines()
    ]
    for record in records:
      if record["step"] == 1 and not record["exact"]:
        record["rollouts"] = record["successes"] = 0
    shards.files()[0].write_text("".join(json.dumps(record) + "\n" for record in records))
    out = workdir / "out.jsonl"
    export_formats.write(small_run.opened(workdir), "stepwise", str(out))
    lengths = {len(json.loads(line)["labels"]) for line in out.read_text().splitlines()}
    self.assertEqual(max(lengths), 2 if 2 in lengths else 1)
    cut = {record["trace_id"] for record in records if record["step"] == 1 and not record["exact"]}
    for line in out.read_text().splitlines():
      row = json.loads(line)
      self.assertLen(
        row["labels"], 1 if row["trace_id"] in cut else len(self.estimates[row["trace_id"]])
      )


if __name__ == "__main__":
  absltest.main()
