"""The embedded pipeline as several processes on this machine: the same records and losses, deaths,
and ways back.
"""

import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from unittest import mock

import pytest
from absl.testing import absltest

from synthneg_jax.runtime import distributed

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 4  # of all processes together
STAGES = "synthesize,sft,sample,credit,pairs,dpo"
SETTINGS = (  # 50 steps of SFT; verdicts of both kinds, so that there are pairs
  "--config.task.train_problems=32",
  "--config.sft.batch_size=3",
  "--config.sft.num_epochs=5",
  "--config.sft.max_steps=50",
  "--config.sft.save_every_steps=10",
  "--config.dpo.max_steps=1",
  # so that processes must hear of each other's verdicts
  "--config.credit.schedule=until_first_zero",
)


@functools.cache
def scratch() -> pathlib.Path:
  return pathlib.Path(tempfile.mkdtemp(prefix="pods_test_"))


def free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def start(
  workdir, count: int, stages: str, *flags, stop_at: int = 0, last=(), last_env=()
) -> list[subprocess.Popen]:
  """The pipeline as `count` processes, which have DEVICES devices between them; the last has flags
  and variables besides.
  """
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES // count}"
  address, made = f"127.0.0.1:{free_port()}", []
  for index in range(count):
    command = [sys.executable, *(("-c", STOP_AT, str(stop_at)) if stop_at else ())]
    command += [str(ROOT / "launch/pipeline.py"), "--config=configs/arithmetic.py:smoke", *SETTINGS]
    command += [
      f"--workdir={workdir}",
      f"--compilation_cache={scratch() / 'xla'}",
      f"--stages={stages}",
      *flags,
    ]
    if count > 1:
      command += [
        "--distributed",
        f"--coordinator_address={address}",
        f"--coordinator_bind_address={address}",
        f"--num_processes={count}",
        f"--process_id={index}",
      ]
    own = index == count - 1
    log = (scratch() / f"{workdir.name}.{index}.log").open("w")
    made.append(
      subprocess.Popen(
        [*command, *(last if own else ())],
        cwd=ROOT,
        env={**env, **dict(last_env if own else ())},
        stdout=log,
        stderr=log,
      )
    )
    log.close()
  return made


def finish(started, workdir, status: int, timeout_s: float = 400.0, first: int = 0) -> list[str]:
  """The last lines of all, the first of them process `first`; each must end with this status."""
  until = time.monotonic() + timeout_s
  logs = []
  for index, process in enumerate(started, start=first):
    try:
      process.wait(timeout=max(until - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
      for other in started:
        other.kill()
      raise
    logs.append((scratch() / f"{workdir.name}.{index}.log").read_text())
  assert [process.returncode for process in started] == [status] * len(started), "\n".join(
    log[-2500:] for log in logs
  )
  return [log.strip().splitlines()[-1] for log in logs]


@functools.cache
def alone() -> pathlib.Path:
  """A workdir that one process made."""
  workdir = scratch() / "alone"
  finish(start(workdir, 1, STAGES), workdir, 0)
  return workdir


def after_sft(name: str) -> pathlib.Path:
  """A workdir with what one process made up to SFT: the given checkpoint."""
  workdir = scratch() / name
  for stage in ("synthesize", "sft"):
    shutil.copytree(alone() / stage, workdir / stage)
  return workdir


def records(workdir, name) -> dict[str, dict]:
  key = lambda record: record["id"] if "id" in record else f"{record['trace_id']}/{record['step']}"
  found = [
    json.loads(line)
    for path in (workdir / name).glob("*.jsonl")
    for line in path.read_text().splitlines()
  ]
  by_key = {key(record): record for record in found}
  assert len(by_key) == len(found)
  return by_key


def losses(workdir) -> list[float]:
  lines = [json.loads(line) for line in (workdir / "sft/metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(len(lines)))
  return [line["loss/per_token"] for line in lines]


class PodTestCase(absltest.TestCase):
  def assert_same_records(self, workdir, count: int):
    """Traces, rollouts and pairs are one process's; log-probs to rounding; each process wrote its
    part of all.
    """
    for name in ("sample/traces", "credit/estimates", "pairs/dpo/pairs", "pairs/step_dpo/pairs"):
      found, expected = records(workdir, name), records(alone(), name)
      self.assertNotEmpty(expected, name)
      self.assertEqual(set(found), set(expected), name)
      near = 0
      for key, record in expected.items():
        for field, value in record.items():
          if field in ("logps", "drawn_logps"):
            if record["ids"] == found[key]["ids"]:
              for a, b in zip(value, found[key][field], strict=True):
                self.assertAlmostEqual(a, b, delta=2e-4)
          elif field == "samples":
            near += sum(a["ids"] != b["ids"] for a, b in zip(value, found[key][field], strict=True))
            for a, b in zip(value, found[key][field], strict=True):
              if a["ids"] == b["ids"]:
                self.assertEqual(
                  (a["correct"], a["reason"], a["finish"]), (b["correct"], b["reason"], b["finish"])
                )
          elif field == "ids":
            near += value != found[key][field]
          elif record.get("ids") == found[key].get("ids"):
            self.assertEqual(value, found[key][field], f"{name} {key} {field}")
      self.assertEqual(
        near, 0, f"{name}: draws that lie at a CDF edge"
      )  # none was seen with these seeds
      files = sorted(path.name for path in (workdir / name).glob("*.jsonl"))
      self.assertEqual(files, [f"00000-p{index:05d}.jsonl" for index in range(count)], name)
      sizes = [len((workdir / name / file).read_text().splitlines()) for file in files]
      if len(expected) > 2 * count:
        self.assertGreater(min(sizes), 0, f"{name}: {sizes}")

  def assert_same_losses(self, workdir):
    found, expected = losses(workdir), losses(alone())
    self.assertLen(expected, 50)
    self.assertLen(found, 50)
    self.assertLess(max(abs(a - b) for a, b in zip(found, expected, strict=True)), 1e-4)

  def wait_for_steps(self, started, workdir, steps: int):
    path, until = workdir / "sft/metrics.jsonl", time.monotonic() + 300
    while not path.exists() or len(path.read_text().splitlines()) < steps:
      self.assertLess(time.monotonic(), until)
      self.assertEqual([process.poll() for process in started], [None] * len(started))
      time.sleep(0.05)

  def deaths_and_ways_back(self, workdir, count: int, then: int):
    """One process dies; one is asked to stop; then another number of processes goes on to the end."""
    started = start(workdir, count, "synthesize,sft")
    self.wait_for_steps(started, workdir, 12)
    started[-1].kill()
    at = time.monotonic()
    said = finish(started[:-1], workdir, distributed.LOST, timeout_s=60)
    self.assertLess(time.monotonic() - at, 60)
    for index, line in enumerate(said):
      self.assertIn(f"process {count - 1} of {count} died; process {index} stops.", line)

    started = start(workdir, count, "synthesize,sft")
    self.wait_for_steps(started, workdir, 24)
    started[-1].send_signal(signal.SIGTERM)
    at = time.monotonic()
    said = finish(started, workdir, distributed.PREEMPTED, timeout_s=30)
    self.assertLess(time.monotonic() - at, 30)
    for line in said:
      self.assertIn("stopped by SIGTERM; what was done is saved.", line)
    saved = max(
      int(path.name) for path in (workdir / "sft/checkpoints").iterdir() if path.name.isdigit()
    )
    self.assertLen((workdir / "sft/metrics.jsonl").read_text().splitlines(), saved)

    finish(start(workdir, then, "synthesize,sft"), workdir, 0)
    log = (scratch() / f"{workdir.name}.0.log").read_text()
    self.assertIn(f"sft: going on from step {saved}.", log)
    self.assert_same_losses(workdir)


class TwoProcessesTest(PodTestCase):
  def test_records_from_a_given_checkpoint(self):
    # Fails if a draw depends on the number of processes, a process grades or writes another's
    # share, the records' order reaches the pairs, or any process enters a program that another does
    # not (then it hangs).
    workdir = after_sft("records")
    finish(start(workdir, 2, "sample,credit,pairs,dpo"), workdir, 0)
    self.assert_same_records(workdir, 2)

  def test_deaths_and_ways_back(self):
    # Fails if the others hang when one dies, or say nothing; if SIGTERM to one stops that one only,
    # or all at different steps; or if one process does not go on where two were, or loses step or
    # shuffle.
    self.deaths_and_ways_back(scratch() / "deaths", 2, then=1)


class DifferencesTest(PodTestCase):
  def test_processes_that_were_started_with_other_settings(self):
    # Fails if two processes with different rates train on together, or one of them leaves a file.
    workdir = scratch() / "rates"
    said = finish(
      start(workdir, 2, "synthesize,sft", last=["--config.sft.optimizer.learning_rate=0.5"]),
      workdir,
      1,
      timeout_s=90,
    )
    for line in said:
      self.assertIn("The processes differ in sft.optimizer.learning_rate: ", line)
      self.assertIn("0.5 in process 1.", line)
    self.assertFalse(workdir.exists())

  def test_processes_that_read_other_data(self):
    # Fails if a process whose own data file has another row, here a bad one, works on, or is called
    # dead by the others.
    rows = [
      {"problem": f"{n} + 1", "solution": f"Answer: {n + 1}", "answer": str(n + 1)}
      for n in range(40)
    ]
    for name in ("data0", "data1"):
      folder = scratch() / name / "gsm8k"
      folder.mkdir(parents=True)
      for split in ("train", "test"):
        lines = [json.dumps(row) for row in rows] + (
          ["{broken"] if name == "data1" and split == "train" else []
        )
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    workdir = scratch() / "data"
    with mock.patch.dict(os.environ, {"SYNTHNEG_DATA_DIR": str(scratch() / "data0")}):
      started = start(
        workdir,
        2,
        "synthesize",
        "--config.task.name=gsm8k",
        last_env={"SYNTHNEG_DATA_DIR": str(scratch() / "data1")},
      )
    for line in finish(started, workdir, 1, timeout_s=90):
      self.assertIn("The processes differ in the data file gsm8k/train.jsonl: ", line)
    self.assertFalse(workdir.exists())


# Asks to stop at the given call of the decoding loop, as SIGTERM would, and runs the program named
# by the rest.
STOP_AT = """
import itertools, runpy, sys
from synthneg_jax.runtime import distributed
calls, at = itertools.count(1), int(sys.argv[1])
distributed.stopping = lambda: next(calls) >= at
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
class StoppedTest(PodTestCase):
  def test_what_was_drawn_before_a_stop_is_kept(self):
    # Fails if a stop costs finished problems, keeps one that was not finished, or changes what is
    # drawn after it.
    workdir = after_sft("stopped")
    small = ("--config.engine.lanes=8", "--config.credit.lanes=4")
    for stage, name, at in (("sample", "sample/traces", 4), ("credit", "credit/estimates", 30)):
      [process] = start(workdir, 1, stage, *small, stop_at=at)
      [line] = finish([process], workdir, distributed.PREEMPTED)
      self.assertIn("stopped by SIGTERM; what was done is saved.", line)
      kept, expected = records(workdir, name), records(alone(), name)
      self.assertBetween(len(kept), 1, len(expected) - 1, name)
      complete = {record["problem_id"] for record in kept.values()}
      self.assertEqual(
        set(kept), {key for key, record in expected.items() if record["problem_id"] in complete}
      )
      finish(start(workdir, 1, stage, *small), workdir, 0)
      found = records(workdir, name)
      for key, record in kept.items():
        self.assertEqual(found[key], record)
      self.assertLen(list((workdir / name).glob("*.jsonl")), 2)
      drawn = lambda made: {
        key: record.get("ids", [sample["ids"] for sample in record.get("samples", [])])
        for key, record in made.items()
      }
      self.assertEqual(drawn(found), drawn(expected))


@pytest.mark.long
class FourProcessesTest(PodTestCase):
  def test_the_whole_pipeline(self):
    # As above, from the start to the report.
    workdir = scratch() / "four"
    finish(start(workdir, 4, f"{STAGES},rft,evaluate,report"), workdir, 0)
    self.assert_same_losses(workdir)
    self.assertTrue((workdir / "report/index.html").exists())
    workdir = after_sft("four_records")
    finish(start(workdir, 4, "sample,credit,pairs,dpo"), workdir, 0)
    self.assert_same_records(workdir, 4)

  def test_deaths_and_ways_back(self):
    self.deaths_and_ways_back(scratch() / "four_deaths", 4, then=2)

  def test_the_first_process_dies(self):
    # Fails if the others wait for the one that they ask, or are ended by jax without a word.
    workdir = scratch() / "first"
    started = start(workdir, 4, "synthesize,sft")
    self.wait_for_steps(started, workdir, 3)
    started[0].kill()
    for line in finish(started[1:], workdir, distributed.LOST, timeout_s=60, first=1):
      self.assertIn("process 0 of 4 died", line)


if __name__ == "__main__":
  absltest.main()
