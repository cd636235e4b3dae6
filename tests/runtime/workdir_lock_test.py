"""Locking a workdir: flock, a lease with a fake clock, a bucket over HTTP, and two pipelines."""

import errno
import fcntl
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import tensorstore as ts
from absl.testing import absltest, parameterized

from configs import arithmetic
from synthneg_jax.pipeline import stages
from synthneg_jax.runtime import distributed, workdir_lock
from synthneg_jax.runtime.errors import UserError
from tests import gcs_server
from tests.xla_flags import xla_flags

ROOT = pathlib.Path(__file__).parents[2]
HELD = (
  r"held by another run, process {} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC; wait "
  r"until it ends, or use"
)


def workdir() -> pathlib.Path:
  return pathlib.Path(tempfile.mkdtemp(prefix="workdir_lock_")) / "run"


class HoldTest(parameterized.TestCase):
  def test_one_holder_at_a_time(self):
    # Fails if two processes can hold a folder, if the message does not name the holder, or if the
    # lock outlives its body.
    folder = workdir()
    with self.assertRaisesRegex(RuntimeError, "stop"), workdir_lock.hold(folder):
      with self.assertRaisesRegex(UserError, HELD.format(os.getpid())), workdir_lock.hold(folder):
        self.fail("held twice")
      with (
        workdir_lock.claim(folder) as holder,
        workdir_lock.claim(folder.with_name("other")) as nobody,
      ):
        self.assertRegex(holder, rf"^process {os.getpid()} on \S+ since ")
        self.assertEqual(nobody, "")
      # the claim that failed took nothing from the holder
      with workdir_lock.claim(folder) as holder:
        self.assertNotEmpty(holder)
      raise RuntimeError("stop")
    with workdir_lock.hold(folder):
      pass

  def test_without_flock_a_lease_is_kept(self):
    # Fails if a file system without flock lets two runs in, or refuses all.
    def refuse(*_):
      raise OSError(errno.ENOLCK, "no locks available")

    self.enter_context(absltest.mock.patch.object(fcntl, "flock", refuse))
    self.enter_context(absltest.mock.patch.object(workdir_lock, "BEAT_S", 1.0))
    folder = workdir()
    with workdir_lock.hold(folder):
      self.assertEqual(json.loads((folder / "run.lease").read_text())["pid"], os.getpid())
      with self.assertRaisesRegex(UserError, HELD.format(os.getpid())), workdir_lock.hold(folder):
        self.fail("held twice")
    self.assertFalse((folder / "run.lease").exists())
    with workdir_lock.hold(folder):
      pass

  def test_a_workdir_that_cannot_be_written(self):
    # Fails if the error is a traceback.
    path = workdir().parent / "file"
    path.write_text("")
    with self.assertRaisesRegex(UserError, "cannot be written"), workdir_lock.hold(path / "run"):
      pass

  @parameterized.parameters(
    "pretrain", "synthesize", "sample", "dpo/step_dpo", "export", "report", "traces"
  )
  def test_commands(self, name):
    # Fails if a command that writes records runs beside another run, or one that only draws is
    # refused.
    folder, calls = workdir(), []

    def do():
      return stages.run(arithmetic.get_config("smoke"), str(folder), [name], {name: calls.append})

    with workdir_lock.hold(folder):
      if name in ("report", "traces"):
        do()
      else:
        with self.assertRaisesRegex(UserError, HELD.format(os.getpid())):
          do()
    self.assertLen(calls, name in ("report", "traces"))
    do()
    self.assertLen(calls, 1 + (name in ("report", "traces")))


class Clock:
  """A clock that advances on sleep; `then` is called after each sleep."""

  def __init__(self):
    self.now, self.then = 1000.0, lambda: None

  def sleep(self, seconds: float) -> None:
    self.now += seconds
    assert self.now < 20_000, "it waits for ever"
    self.then()


class LeaseTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.store, self.clock, self.ends = ts.KvStore.open({"driver": "memory"}).result(), Clock(), []
    self.enter_context(absltest.mock.patch.object(threading.Thread, "start"))  # renewed by hand

  def lease(self, store=None) -> workdir_lock.Lease:
    def end(*what):
      return self.ends.append(what)

    return workdir_lock.Lease(store or self.store, end, lambda: self.clock.now, self.clock.sleep)

  def test_a_lease_that_is_renewed_is_held(self):
    # Fails if a live holder counts as dead, or is recognised only when its lease nearly expires.
    holder, other = self.lease(), self.lease()
    self.assertIsNone(holder.acquire())
    beats = iter(range(1000))
    self.clock.then = lambda: next(beats) % 10 == 9 and holder.renew()
    self.assertEqual(other.acquire()["pid"], os.getpid())
    self.assertEqual(self.clock.now, 1000.0)
    self.assertEqual(other.acquire(patient=True)["pid"], os.getpid())
    self.assertBetween(self.clock.now, 1001.0, 1000.0 + workdir_lock.BEAT_S)
    for _ in range(100):
      self.clock.sleep(1.0)
    self.assertIsNotNone(other.acquire())
    self.assertEmpty(self.ends)

  def test_the_lease_of_a_dead_holder_runs_out(self):
    # Fails if a dead holder keeps the workdir, loses it too early, or continues after losing it.
    holder, other = self.lease(), self.lease()
    self.assertIsNone(holder.acquire())
    self.clock.now += workdir_lock.LEASE_S
    self.assertIsNotNone(other.acquire())
    self.clock.now += 1.0
    self.assertIsNone(other.acquire())
    holder.renew()
    ((status, sentence),) = self.ends
    self.assertEqual(status, 1)
    self.assertRegex(
      sentence,
      rf"another run took over the workdir, process {os.getpid()} on .* "
      r"did not renew its lease",
    )
    other.renew()
    self.assertLen(self.ends, 1)

  def test_a_run_waits_for_the_lease_of_one_that_died_just_now(self):
    # Fails if a requeued job is refused because its predecessor died moments ago, for any clock
    # offset.
    for skew in (0.0, 3600.0):
      holder, other = self.lease(), self.lease()
      self.clock.now += skew
      self.assertIsNone(holder.acquire())
      self.clock.now -= skew
      begin = self.clock.now
      self.assertIsNone(other.acquire(patient=True))
      self.assertBetween(self.clock.now - begin, workdir_lock.LEASE_S, workdir_lock.LEASE_S + 2.0)
      other._thread = absltest.mock.Mock()
      other.release()

  def test_of_many_one_gets_it(self):
    # Fails if writes are not conditional on the generation.
    leases = [self.lease() for _ in range(20)]
    reads = [lease._read() for lease in leases]
    for lease, read in zip(leases, reads, strict=True):  # all see no lease before any writes one
      later = iter([read])
      lease._read = lambda later=later, own=lease: (
        next(later, None) or workdir_lock.Lease._read(own)
      )
    self.assertEqual([lease.acquire() for lease in leases].count(None), 1)

  def test_a_reply_that_was_lost(self):
    # Fails if a holder mistakes its own repeated write for another's.
    lease = self.lease()
    self.assertIsNone(lease.acquire())
    # another generation
    self.store.write(lease.KEY, self.store.read(lease.KEY).result().value).result()
    lease.renew()
    lease.renew()
    self.assertEmpty(self.ends)

  def test_a_store_that_does_not_answer(self):
    # Fails if a single failure ends a run, or if a run continues when others may take it over.
    store = absltest.mock.Mock(wraps=self.store)
    lease = self.lease(store)
    self.assertIsNone(lease.acquire())
    store.write.side_effect = ValueError("no network")
    self.clock.now += workdir_lock.BEAT_S
    lease.renew()
    self.assertEmpty(self.ends)
    self.clock.now += workdir_lock.LEASE_S - 2 * workdir_lock.BEAT_S
    lease.renew()
    self.assertLen(self.ends, 1)
    self.assertEqual(self.ends[0][0], distributed.LOST)
    self.assertIn("no network", self.ends[0][1])


HOLDER = """
import sys, time
from synthneg_jax.runtime import workdir_lock
workdir_lock.BEAT_S, workdir_lock.LEASE_S = 1.0, 6.0
with workdir_lock.hold(sys.argv[1]):
  print("held", flush=True)
  time.sleep(float(sys.argv[2]))
"""


@pytest.mark.slow
class ProcessesTest(absltest.TestCase):
  """Processes that only hold a folder."""

  def holder(self, folder, seconds: float, **env) -> subprocess.Popen:
    process = subprocess.Popen(
      [sys.executable, "-c", HOLDER, str(folder), str(seconds)],
      cwd=ROOT,
      env={**os.environ, **env},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    self.addCleanup(process.communicate)
    self.addCleanup(process.kill)
    return process

  def assert_refused(self, process: subprocess.Popen, holder: subprocess.Popen):
    _, stderr = process.communicate(timeout=60)
    self.assertRegex(stderr.strip().splitlines()[-1], HELD.format(holder.pid))

  def folders(self):
    """A local folder and one in a bucket, each with the environment of its processes."""
    server = gcs_server.Server()
    self.addCleanup(server.close)
    return (workdir(), {}), ("gs://bucket/run", server.environment())

  def test_two_at_random_offsets(self):
    # Fails if both, or neither, of two processes that start at about the same time hold the folder.
    for folder, env in self.folders():
      offset = random.uniform(0.0, 0.5)
      made = [self.holder(folder, 60, **env)]
      time.sleep(offset)
      made.append(self.holder(folder, 60, **env))
      until = time.monotonic() + 120
      while all(process.poll() is None for process in made):
        self.assertLess(time.monotonic(), until, offset)
        time.sleep(0.05)
      [loser] = [process for process in made if process.poll() is not None]
      [winner] = [process for process in made if process is not loser]
      self.assertEqual(winner.stdout.readline(), "held\n")
      self.assert_refused(loser, winner)
      self.assertEqual(loser.returncode, 1)
      self.assertIsNone(winner.poll())
      winner.kill()

  def test_a_holder_that_was_killed(self):
    # Fails if another process ignores the lock, or if after SIGKILL it lasts longer than the lease.
    for folder, env in self.folders():
      first = self.holder(folder, 60, **env)
      self.assertEqual(first.stdout.readline(), "held\n")
      self.assert_refused(self.holder(folder, 0, **env), first)
      first.send_signal(signal.SIGKILL)
      first.wait()
      said, _ = self.holder(folder, 0, **env).communicate(timeout=60)
      self.assertEqual(said, "held\n")

  def test_a_bucket(self):
    # Fails if the lease is written without its precondition, is not renewed, does not expire or is
    # not released; or if a suspended holder continues beside its successor.
    server = gcs_server.Server()
    self.addCleanup(server.close)
    env, folder = server.environment(), "gs://bucket/run"
    first = self.holder(folder, 60, **env)
    self.assertEqual(first.stdout.readline(), "held\n")
    self.assert_refused(self.holder(folder, 0, **env), first)
    first.send_signal(signal.SIGSTOP)
    second = self.holder(folder, 4, **env)
    self.assertEqual(second.stdout.readline(), "held\n")
    first.send_signal(signal.SIGCONT)
    _, stderr = first.communicate(timeout=30)
    self.assertEqual(first.returncode, 1)
    self.assertIn(
      f"another run took over the workdir, process {second.pid} on", stderr.strip().splitlines()[-1]
    )
    self.assertEqual(second.wait(timeout=30), 0)
    self.assertGreaterEqual(server.refused, 1)
    self.assertNotIn("run/run.lease", server.objects)


@pytest.mark.slow
class PipelinesTest(absltest.TestCase):
  """The embedded pipeline, started twice in one workdir."""

  def start(self, folder, stages: str = "synthesize,sft,sample") -> subprocess.Popen:
    command = [
      sys.executable,
      "launch/pipeline.py",
      "--config=configs/arithmetic.py:smoke",
      f"--workdir={folder}",
    ]
    command += [
      f"--stages={stages}",
      "--config.task.train_problems=16",
    ]
    command += ["--config.sft.batch_size=4", "--config.sft.max_steps=4"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1)}
    process = subprocess.Popen(
      command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    self.addCleanup(process.kill)
    return process

  def assert_undamaged(self, folder, **counts: int):
    """Every record of these stages, and every update of SFT, exists once."""
    for name, count in {"synthesize/train": 16, **counts}.items():
      rows = [
        json.loads(line)
        for path in (folder / name).glob("*.jsonl")
        for line in path.read_text().splitlines()
      ]
      self.assertLen({row["id"] for row in rows}, len(rows))
      self.assertLen(rows, count)
    steps = [
      json.loads(line)["step"] for line in (folder / "sft/metrics.jsonl").read_text().splitlines()
    ]
    self.assertEqual(steps, [0, 1, 2, 3])

  def test_a_command_given_twice(self):
    # Fails if both run, if neither does, or if the second changes the first one's records.
    folder, offset = workdir(), random.uniform(0.0, 2.0)
    first = self.start(folder)
    time.sleep(offset)
    second = self.start(folder)
    stderr = {process: process.communicate(timeout=200)[1] for process in (first, second)}
    self.assertEqual(sorted(process.returncode for process in stderr), [0, 1], (offset, stderr))
    winner, loser = sorted(stderr, key=lambda process: process.returncode)
    self.assertRegex(
      stderr[loser].strip().splitlines()[-1], "pipeline.py: .* is " + HELD.format(winner.pid)
    )
    self.assertNotIn("Traceback", stderr[loser])
    self.assert_undamaged(folder, **{"sample/traces": 48})

  def test_a_holder_that_was_killed(self):
    # Fails if the workdir of a killed run is refused to the next run, or damaged by it.
    folder, delay = workdir(), random.uniform(0.0, 2.0)
    first = self.start(folder, "synthesize,sft")
    while not (folder / "synthesize").exists():
      self.assertIsNone(first.poll())
      time.sleep(0.02)
    time.sleep(delay)
    first.kill()
    first.communicate()
    second = self.start(folder, "synthesize,sft")
    _, stderr = second.communicate(timeout=200)
    self.assertEqual(second.returncode, 0, (delay, stderr))
    self.assert_undamaged(folder)


if __name__ == "__main__":
  absltest.main()
