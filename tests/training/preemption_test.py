"""Training as a process: killed at every step, stopped, on a full disk, foreign checkpoint."""

import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from absl.testing import absltest

from synthneg_jax.runtime import distributed
from tests.xla_flags import xla_flags

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[2]


@functools.cache
def scratch() -> pathlib.Path:
  return pathlib.Path(tempfile.mkdtemp(prefix="preemption_test_"))


def start(workdir, *args) -> subprocess.Popen:
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1)}
  command = [sys.executable, "-m", "tests.training.small_training", f"--workdir={workdir}", *args]
  return subprocess.Popen(
    command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def run(workdir, *args) -> subprocess.CompletedProcess:
  process = start(workdir, *args)
  _, stderr = process.communicate(timeout=120)
  return subprocess.CompletedProcess(process.args, process.returncode, stderr=stderr)


@functools.cache
def whole() -> pathlib.Path:
  """An uninterrupted run."""
  done = run(scratch() / "whole")
  assert done.returncode == 0, done.stderr
  return scratch() / "whole"


def kept(workdir) -> list[int]:
  return sorted(
    int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
  )


class PreemptionTest(absltest.TestCase):
  def assert_as_whole(self, workdir):
    """The same bits and the same lines as in an uninterrupted run."""
    with np.load(whole() / "trained.npz") as expected, np.load(workdir / "trained.npz") as found:
      for name in expected:
        np.testing.assert_array_equal(found[name].view(np.uint32), expected[name].view(np.uint32))
    self.assertEqual(
      (workdir / "metrics.jsonl").read_text(), (whole() / "metrics.jsonl").read_text()
    )

  def assert_one_sentence(self, done, *parts):
    self.assertEqual(done.returncode, 1, done.stderr)
    self.assertNotIn("Traceback", done.stderr)
    for part in parts:
      self.assertIn(part, done.stderr.strip().splitlines()[-1])

  def test_sigkill_at_every_step(self):
    # Fails if a checkpoint that was being written is taken for whole, or if any of state, data
    # position and metrics resumes from another step than the others.
    workdir = scratch() / "killed"
    for step in range(6):
      self.assertEqual(run(workdir, f"--kill_at={step}").returncode, -signal.SIGKILL)
    done = run(workdir)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn("resuming from step", done.stderr)
    self.assert_as_whole(workdir)

  def test_sigterm_saves_and_ends_with_its_own_status(self):
    # Fails if SIGTERM kills, if its status is another's, if the step under way is lost, or if it
    # takes its time.
    workdir = scratch() / "terminated"
    process = start(workdir, "--step_s=0.5", "--save_every_steps=100")

    def lines():
      return (
        len((workdir / "metrics.jsonl").read_text().splitlines())
        if (workdir / "metrics.jsonl").exists()
        else 0
      )

    while lines() < 1:
      self.assertIsNone(process.poll())
      time.sleep(0.05)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    self.assertLess(time.monotonic() - asked, 30)
    self.assertEqual(process.returncode, distributed.PREEMPTED, stderr)
    self.assertIn("stopped by SIGTERM; all completed work is saved.", stderr.splitlines()[-1])
    steps = lines()
    self.assertBetween(steps, 1, 5)
    self.assertEqual(kept(workdir)[-1], steps)
    done = run(workdir)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn(f"resuming from step {steps}.", done.stderr)
    self.assert_as_whole(workdir)

  def test_sigterm_while_nothing_can_be_saved(self):
    # Fails if a process that hangs, or compiles for minutes, lives on after SIGTERM.
    self.assertLess(distributed.GRACE_S, 30)
    program = (
      "import signal, os, time; from synthneg_jax.runtime import distributed; distributed.GRACE_S "
      "= 1.0;"
      "distributed.watch_signals(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1);"
      "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); time.sleep(30)"
    )
    done = subprocess.run(
      [sys.executable, "-c", program],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
      timeout=25,
    )
    self.assertEqual(done.returncode, distributed.PREEMPTED, done.stderr)
    self.assertIn("after SIGTERM; everything saved before is kept.", done.stderr.splitlines()[-1])

  def test_a_full_disk(self):
    # Fails if a disk that is full ends in a traceback or in status 0, if it costs the checkpoints
    # that were whole, or if the run does not resume once there is space.
    workdir = scratch() / "full"
    self.assertEqual(run(workdir, "--kill_at=5").returncode, -signal.SIGKILL)
    before = kept(workdir)
    self.assertNotEmpty(before)
    for step in before[1:]:
      shutil.rmtree(workdir / "checkpoints" / str(step))
    self.assert_one_sentence(
      run(workdir, "--largest_file=900"), "A checkpoint in", "cannot be written", "are kept"
    )
    self.assertEqual(kept(workdir)[0], before[0])
    done = run(workdir)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn(f"resuming from step {before[0]}", done.stderr)
    self.assert_as_whole(workdir)

  def test_coroutines_of_orbax_that_were_dropped(self):
    # Fails if the sentence is not the last line, because what a failed save leaves is warned of.
    program = (
      "import asyncio, sys; from synthneg_jax.runtime import startup; startup._quiet_logs();"
      "coroutine = asyncio.sleep(1); del coroutine; sys.exit('A checkpoint')"
    )
    done = subprocess.run(
      [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    self.assertEqual(done.stderr, "A checkpoint\n")

  def test_a_full_disk_under_the_metrics(self):
    # Fails if a line that cannot be written ends in a traceback.
    workdir = scratch() / "full_metrics"
    workdir.mkdir()
    (workdir / "metrics.jsonl.tmp").symlink_to("/dev/full")
    self.assert_one_sentence(
      run(workdir), "metrics.jsonl cannot be written: No space left on device"
    )

  def test_a_checkpoint_of_another_model(self):
    # Fails if it is passed over, so that training starts anew and deletes it, or if the sentence
    # does not say what differs.
    workdir = scratch() / "other"
    shutil.copytree(whole(), workdir)
    before = kept(workdir)
    self.assert_one_sentence(
      run(workdir, "--width=5"),
      "is a checkpoint of another model",
      "matrix",
      "(6, 4) in the checkpoint and (6, 5) in this model",
    )
    self.assertEqual(kept(workdir), before)

  def test_a_checkpoint_that_cannot_be_read_now(self):
    # Fails if what may be a passing fault costs the checkpoint, or the run.
    workdir = scratch() / "unreadable"
    shutil.copytree(whole(), workdir)
    newest = workdir / "checkpoints" / str(kept(workdir)[-1])
    names = {path: path.with_name(path.name + ".away") for path in newest.rglob("manifest.ocdbt")}
    for path, away in names.items():
      path.rename(away)
    stopped = run(workdir, "--kill_at=3")
    self.assertEqual(stopped.returncode, -signal.SIGKILL)
    self.assertIn("cannot be read", stopped.stderr)
    self.assertIn("trying the previous one", stopped.stderr)
    for path, away in names.items():
      away.rename(path)
    (workdir / "trained.npz").unlink()
    done = run(workdir)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn(f"resuming from step {newest.name}", done.stderr)
    self.assert_as_whole(workdir)

  def test_no_checkpoint_can_be_read(self):
    # Fails if the training does not start from step 0 in the same call, or ends in "cannot be
    # written".
    workdir = scratch() / "all_damaged"
    shutil.copytree(whole(), workdir)
    before = kept(workdir)
    for path in (workdir / "checkpoints").rglob("*"):
      if path.is_file():
        path.write_bytes(path.read_bytes()[:3])
    (workdir / "trained.npz").unlink()
    done = run(workdir)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn("and training starts from step 0", done.stderr)
    self.assert_as_whole(workdir)
    self.assertEqual(kept(workdir), before)
    aside = workdir / "checkpoints.unreadable"
    self.assertEqual(sorted(int(path.name) for path in aside.iterdir()), before)


if __name__ == "__main__":
  absltest.main()
