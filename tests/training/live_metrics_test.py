"""Metrics of a run, read back by other programs' readers: TensorBoard, W&B, the profiler."""

import functools
import gzip
import importlib.util
import json
import pathlib
import struct
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from etils import epath
from tensorboard.backend.event_processing import event_accumulator, event_file_loader
from wandb.proto import wandb_internal_pb2

from synthneg_jax.runtime import config_schema, distributed, throughput
from synthneg_jax.runtime import metrics as metrics_lib
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training import loop, objectives
from tests import tiny_model
from tests.training import loop_test

pytestmark = pytest.mark.slow  # starts processes, compiles for TPUs

ROOT = pathlib.Path(__file__).parents[2]
STEPS, KILLED_AT = 6, 5


def config(**changes):
  c = config_schema.default()
  c.sft.update(save_every_steps=3, max_to_keep=1)
  c.metrics.update(changes)
  return c


def fit(workdir, c, batches, objective=None, open_metrics=None):
  """A real step of the toy decoder, in workdir/sft."""
  model, folder = tiny_model.model(num_layers=1), epath.Path(workdir) / "sft"
  opened = open_metrics or functools.partial(metrics_lib.Metrics, c, epath.Path(workdir), folder)
  run = loop.Run(
    name="sft",
    section=c.sft,
    model=model,
    objective=objective or objectives.make_sft(model),
    batches=batches,
    mesh=tiny_model.one_device_mesh(),
    folder=folder,
    open_metrics=opened,
  )
  return loop.fit(run, tiny_model.make_params(model))


def lines(workdir) -> list[dict]:
  return [
    json.loads(line)
    for line in (pathlib.Path(workdir) / "sft/metrics.jsonl").read_text().splitlines()
  ]


def raw_events(folder) -> list:
  """Every event of every file, as TensorBoard's loader reads it, with nothing dropped."""
  files = sorted(pathlib.Path(folder).glob("events.out.tfevents.*"))
  return [
    event for path in files for event in event_file_loader.LegacyEventFileLoader(str(path)).Load()
  ]


def wandb_history(path: pathlib.Path) -> list[dict]:
  """The logged rows of a .wandb file: LevelDB's log format, records may span blocks of 32 KiB."""
  data, at, part, rows = path.read_bytes(), 7, b"", []
  while at + 7 <= len(data):
    if (1 << 15) - at % (1 << 15) < 7:
      at += (1 << 15) - at % (1 << 15)
      continue
    _, size, kind = struct.unpack("<IHB", data[at : at + 7])
    part += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # whole, or the last of several
      record = wandb_internal_pb2.Record.FromString(part)
      part = b""
      if record.HasField("history"):
        rows.append(
          {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
          }
        )
  return rows


class WrittenTest(parameterized.TestCase):
  """One training that was killed between checkpoints and resumed."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.workdir = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory())) / "run"
    cls.config = config(wandb="a-project", wandb_mode="offline")
    with absltest.TestCase().assertRaises(KeyboardInterrupt):
      fit(cls.workdir, cls.config, loop_test.Spy(kill_at=KILLED_AT, num_steps=STEPS))
    cls.before = raw_events(cls.workdir / "sft")
    cls.batches = loop_test.Spy(num_steps=STEPS)
    _, cls.figures = fit(cls.workdir, cls.config, cls.batches)
    cls.lines = lines(cls.workdir)

  def test_tensorboard_says_what_the_lines_say(self):
    # Fails if a metric is missing from the event files or is at another step, if values differ,
    # or if TensorBoard cannot read the files (lengths, checksums).
    board = event_accumulator.EventAccumulator(str(self.workdir / "sft"))
    board.Reload()
    self.assertEqual([line["step"] for line in self.lines], list(range(STEPS)))
    names = set(self.lines[0]) - {"step"}
    self.assertContainsSubset(
      {"loss/per_token", "grad_norm", "learning_rate", "run/tokens_per_s"}, names
    )
    self.assertEqual(set(board.Tags()["scalars"]), names)
    for name in names:
      found = [(event.step, event.value) for event in board.Scalars(name)]
      self.assertEqual(
        found, [(line["step"], float(np.float32(line[name]))) for line in self.lines], name
      )

  def test_no_step_is_written_twice(self):
    # Fails if what was done after the last checkpoint stays in the files of the start that was
    # killed; the second half of the assertion, if that start had not got that far, and so nothing
    # was tested.
    def steps(events):
      return [event.step for event in events if event.HasField("summary")]

    self.assertEqual(sorted(steps(self.before)), [0, 1, 2, 3])
    self.assertEqual(sorted(steps(raw_events(self.workdir / "sft"))), list(range(STEPS)))
    self.assertLen(list((self.workdir / "sft").glob("*tfevents*")), 2)

  def test_an_open_tensorboard_forgets_them_too(self):
    # Fails if the second file does not say the step it resumes from.
    starts = [
      event.step for event in raw_events(self.workdir / "sft") if event.session_log.status == 1
    ]
    self.assertEqual(starts, [3])

  def test_histograms(self):
    # Fails if the histogram is of other tokens than the loss: each step's batch has two scored
    # tokens. all, not the last
    board = event_accumulator.EventAccumulator(str(self.workdir / "sft"), {"histograms": 0})
    board.Reload()
    self.assertEqual(board.Tags()["histograms"], ["histogram/nll/per_token"])
    for event, line in zip(board.Histograms("histogram/nll/per_token"), self.lines, strict=True):
      one = event.histogram_value
      self.assertEqual((event.step, one.num, sum(one.bucket)), (line["step"], 2, 2))
      self.assertBetween(line["loss/per_token"], one.min, one.max)

  def test_weights_and_biases(self):
    # Fails if the resumed run is another run, if rows are logged at other steps or with other
    # values, or without their histograms; or if the config does not go along.
    files = sorted((self.workdir / "sft").rglob("*.wandb"))
    self.assertLen(files, 2)
    mark = (self.workdir / "sft/wandb_run").read_text()
    self.assertEqual({path.name for path in files}, {f"run-{mark}.wandb"})
    found = [row for path in files for row in wandb_history(path)]
    # the server keeps the first of a step
    self.assertEqual([row["_step"] for row in found], [0, 1, 2, 3, 3, 4, 5])
    for row in found:
      expected = self.lines[row["_step"]]
      self.assertEqual(row["loss/per_token"], expected["loss/per_token"])
      self.assertEqual(row["histogram/nll/per_token/_type"], "histogram")
      self.assertEqual(set(expected) - set(row), {"step"})

  def test_what_it_costs(self):
    # Fails if padding counts as throughput, if the share is of something else, if a program is
    # compiled at every step or compilations are not seen, or if memory is not in bytes.
    for line in self.lines:
      tokens = self.batches.num_tokens(line["step"])
      self.assertEqual((tokens, self.batches.capacity(0)), (4, 8))
      self.assertAlmostEqual(line["run/tokens_per_s"] * line["run/step_s"], tokens, delta=0.05)
      self.assertEqual(line["run/padding_share"], 0.5)
      self.assertBetween(line["run/host_memory_peak_bytes"], 5e7, 1e12)
    resumed = self.lines[3:]
    self.assertGreater(resumed[0]["run/compilations"], 0)
    self.assertGreater(resumed[0]["run/compile_s"], 0)
    self.assertEqual(resumed[-1]["run/compilations"], resumed[0]["run/compilations"])
    self.assertGreater(resumed[0]["run/step_s"], resumed[0]["run/compile_s"] * 0.99)
    self.assertEqual(self.figures["compilations"], resumed[-1]["run/compilations"])
    self.assertEqual(self.lines[0]["learning_rate"], np.float32(1e-5))


class ProfileTest(absltest.TestCase):
  def test_updates_that_are_traced(self):
    # Fails if other updates are traced, if the trace ends before they are done, or if the model's
    # parts have no names. In a process of its own: where another test has asked XLA for a TPU's
    # topology, jax's profiler crashes.
    code = (
      "import sys; from tests.training import live_metrics_test as t; t.fit(sys.argv[1], "
      "t.config(profile_steps='3:5'), t.loop_test.Spy(num_steps=t.STEPS))"
    )
    with tempfile.TemporaryDirectory() as workdir:
      subprocess.run(
        [sys.executable, "-c", code, workdir], cwd=ROOT, check=True, capture_output=True
      )
      profile = pathlib.Path(workdir) / "sft" / "profile"
      (trace,) = profile.rglob("*.trace.json.gz")
      events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
      inside = b"".join(path.read_bytes() for path in profile.rglob("*.xplane.pb"))
    steps = [
      event["args"]["step_num"]
      for event in events
      if event.get("name") == "train" and "args" in event
    ]
    self.assertEqual(sorted(map(int, steps)), [3, 4])
    for scope in (b"attention", b"feed_forward", b"logits", b"update"):
      self.assertIn(scope, inside)


class OrderTest(absltest.TestCase):
  def test_the_next_step_is_dispatched_before_figures_are_fetched(self):
    # Fails if the loop waits for a step's figures before it builds and dispatches the next.
    batches, seen = loop_test.Spy(num_steps=4), []

    class Sink:
      measured, profile_steps = True, ""

      def write(self, step, scalars, histograms):
        seen.append((step, batches.built[-1]))

      def save(self):
        pass

      def close(self):
        pass

    c = config()
    c.sft.save_every_steps = 0
    with tempfile.TemporaryDirectory() as workdir:
      fit(workdir, c, batches, open_metrics=lambda first_step: Sink())
    self.assertEqual(seen, [(0, 1), (1, 2), (2, 3), (3, 3)])

  def test_the_first_process_alone_writes(self):
    # Fails if another process opens any file for metrics.
    with (
      tempfile.TemporaryDirectory() as folder,
      mock.patch.object(distributed, "is_primary", lambda: False),
    ):
      made = metrics_lib.Metrics(
        config(wandb="x"), epath.Path(folder), epath.Path(folder) / "sft", 0
      )
      made.write(0, {"loss/per_token": 1.0}, {})
      made.save()
      made.close()
      self.assertEqual(list(pathlib.Path(folder).rglob("*")), [])
      self.assertEqual(throughput.Profiler("0:2", epath.Path(folder), 0, 2)._after, 0)

  def test_by_flag(self):
    # Fails if a leaf does not turn off what it names.
    with tempfile.TemporaryDirectory() as folder:
      made = metrics_lib.Metrics(
        config(jsonl=False, tensorboard=False), epath.Path(folder), epath.Path(folder), 0
      )
      made.write(0, {"loss/per_token": 1.0}, {})
      made.close()
      self.assertEqual(list(pathlib.Path(folder).rglob("*")), [])


class RefusalTest(parameterized.TestCase):
  def test_wandb_missing(self):
    # Fails if hours of work precede the news that the package is missing.
    with mock.patch.object(importlib.util, "find_spec", lambda name: None):
      with self.assertRaisesRegex(
        UserError, "metrics.wandb='p' needs the package wandb, which is not installed: pip"
      ):
        metrics_lib.check(config(wandb="p").metrics)

  @parameterized.parameters("5", "5:5", "a:b", ":3", "-1:3", "3:")
  def test_no_range(self, text):
    # Fails if something that is no range is taken for one, or ends in a traceback.
    with self.assertRaisesRegex(UserError, f"--profile_steps='{text}' must be a range a:b"):
      metrics_lib.check(config(profile_steps=text).metrics)

  def test_the_flag_reaches_the_config(self):
    # Fails if --profile_steps is no flag of a stage, or is not heeded before work begins.
    with tempfile.TemporaryDirectory() as folder:
      given = [
        "--config=configs/arithmetic.py:smoke",
        f"--workdir={folder}/run",
        "--profile_steps=9:9",
      ]
      done = subprocess.run(
        [sys.executable, "launch/sft.py", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
      )
      self.assertFalse((pathlib.Path(folder) / "run").exists())
    self.assertEqual(done.returncode, 1)
    self.assertEqual(
      done.stderr.splitlines()[-1].partition(" must be a range")[0], "sft.py: --profile_steps='9:9'"
    )

  def test_a_range_beyond_the_end_traces_nothing(self):
    # Fails if the profiler is started and never stopped.
    with tempfile.TemporaryDirectory() as folder:
      profiler = throughput.Profiler("7:9", epath.Path(folder), 0, 3)
      for step in range(3):
        with profiler.before(step):
          pass
        profiler.after(step, None)
      self.assertEqual(list(pathlib.Path(folder).iterdir()), [])


if __name__ == "__main__":
  absltest.main()
