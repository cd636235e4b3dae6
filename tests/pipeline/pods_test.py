"""The embedded pipeline in several processes: equal records and losses, crashes and resumption."""

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

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest
from etils import epath

from synthneg_jax.decoding.policy import EMBEDDED, Policy, files_identity
from synthneg_jax.models import adapter as adapter_lib
from synthneg_jax.runtime import config_schema, distributed
from tests import tiny_model
from tests.runtime import distributed_test
from tests.xla_flags import xla_flags

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 4  # over all processes
STAGES = "synthesize,sft,sample,credit,pairs,dpo"
SETTINGS = (  # 50 steps of SFT: verdicts of both kinds, so that pairs exist
  "--config.task.train_problems=32",
  "--config.sft.batch_size=3",
  "--config.sft.row_length=128",
  "--config.sft.num_epochs=5",
  "--config.sft.max_steps=50",
  "--config.sft.save_every_steps=10",
  "--config.dpo.max_steps=1",
  # so that processes need each other's verdicts
  "--config.credit.schedule=until_first_zero",
)


@functools.cache
def scratch() -> pathlib.Path:
  return pathlib.Path(tempfile.mkdtemp(prefix="pods_test_"))


def free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def start(
  workdir, count: int, stages: str, *flags, script=(), last=(), last_env=()
) -> list[subprocess.Popen]:
  """Starts the pipeline in `count` processes that share DEVICES devices.

  Args:
    workdir, stages, flags: for all processes.
    script: a Python program and its arguments; it runs the program in the rest of its command line.
    last, last_env: extra flags and variables of the last process.
  """
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  env["XLA_FLAGS"] = xla_flags(DEVICES // count)
  address, processes = f"127.0.0.1:{free_port()}", []
  for index in range(count):
    command = [sys.executable, *(("-c", *map(str, script)) if script else ())]
    command += [str(ROOT / "launch/pipeline.py"), "--config=configs/arithmetic.py:smoke", *SETTINGS]
    command += [
      f"--workdir={workdir}",
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
    processes.append(
      subprocess.Popen(
        [*command, *(last if own else ())],
        cwd=ROOT,
        env={**env, **dict(last_env if own else ())},
        stdout=log,
        stderr=log,
      )
    )
    log.close()
  return processes


def finish(started, workdir, status: int, timeout_s: float = 400.0, first: int = 0) -> list[str]:
  """Returns the last line of each process, from `first` on; each must exit with this status."""
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
  """A workdir that a single process wrote."""
  workdir = scratch() / "alone"
  finish(start(workdir, 1, STAGES), workdir, 0)
  return workdir


def after_sft(name: str) -> pathlib.Path:
  """A workdir up to SFT from a single process: the given checkpoint."""
  workdir = scratch() / name
  for stage in ("synthesize", "sft"):
    shutil.copytree(alone() / stage, workdir / stage)
  return workdir


def records(workdir, name) -> dict[str, dict]:
  def key(record):
    return record["id"] if "id" in record else f"{record['trace_id']}/{record['step']}"

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
  def assert_same_records(self, workdir, count: int, stopped: str = ""):
    """Checks that records equal a single process's and that each process wrote its part.

    Traces, rollouts and pairs are equal, log-probs up to rounding. `stopped` was written in two
    parts, the first before a stop.
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
                  (a["correct"], a["reason"], a["finish_reason"]),
                  (b["correct"], b["reason"], b["finish_reason"]),
                )
          elif field == "ids":
            near += value != found[key][field]
          elif record.get("ids") == found[key].get("ids"):
            self.assertEqual(value, found[key][field], f"{name} {key} {field}")
      # none was seen with these seeds
      self.assertEqual(near, 0, f"{name}: draws that lie at a CDF edge")
      files = sorted(path.name for path in (workdir / name).glob("*.jsonl"))
      parts = range(2 if name == stopped else 1)
      self.assertEqual(
        files, [f"{part:05d}-p{index:05d}.jsonl" for part in parts for index in range(count)], name
      )
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

  def stop(self, workdir, count: int, stages: str, marker: int | str, *flags):
    """Sends SIGTERM to the last process at a marker of NOTED; all must stop within 30 s."""
    marks = pathlib.Path(tempfile.mkdtemp(dir=scratch()))
    started = start(
      workdir,
      count,
      stages,
      *flags,
      script=(NOTED, marks, "compiles" if marker == "compiles" else ""),
    )
    until, asked = time.monotonic() + 300, [count - 1] if marker == "compiles" else range(count)
    while not all((marks / f"{index}.{marker}").exists() for index in asked):
      self.assertLess(time.monotonic(), until)
      self.assertEqual([process.poll() for process in started], [None] * len(started))
      time.sleep(0.02)
    self.assertFalse(marker == "compiles" and (marks / f"{count - 1}.compiled").exists())
    started[-1].send_signal(signal.SIGTERM)
    at = time.monotonic()
    lines = finish(started, workdir, distributed.PREEMPTED, timeout_s=30)
    self.assertLess(time.monotonic() - at, 30)
    for line in lines:
      self.assertIn("stopped by SIGTERM; all completed work is saved.", line)
    calls = [
      {path.name.partition(".")[2] for path in marks.glob(f"{index}.*")} for index in range(count)
    ]
    self.assertEqual(calls, calls[:1] * count)  # all processes called `stopping` equally often

  def deaths_and_ways_back(self, workdir, count: int, then: int):
    """One process dies, one is told to stop, and then another number of processes finishes."""
    started = start(workdir, count, "synthesize,sft")
    self.wait_for_steps(started, workdir, 12)
    started[-1].kill()
    at = time.monotonic()
    lines = finish(started[:-1], workdir, distributed.LOST, timeout_s=60)
    self.assertLess(time.monotonic() - at, 60)
    for index, line in enumerate(lines):
      self.assertIn(f"process {count - 1} of {count} died; process {index} stops.", line)

    for marker in (12, "compiles"):  # during training, then during a compilation within it
      self.stop(workdir, count, "synthesize,sft", marker)
      saved = max(
        int(path.name) for path in (workdir / "sft/checkpoints").iterdir() if path.name.isdigit()
      )
      self.assertLen((workdir / "sft/metrics.jsonl").read_text().splitlines(), saved)

    finish(start(workdir, then, "synthesize,sft"), workdir, 0)
    log = (scratch() / f"{workdir.name}.0.log").read_text()
    self.assertIn(f"sft: resuming from step {saved}.", log)
    self.assert_same_losses(workdir)


class TwoProcessesTest(PodTestCase):
  def test_records_from_a_given_checkpoint(self):
    # Fails if samples depend on the number of processes, if a process grades or writes another's
    # share, if the order of records affects pairs, or if a process enters a program that another
    # does not, which hangs. Also fails if SIGTERM to one process during decoding stops only that
    # one, or stops the two after different calls of the loop.
    workdir = after_sft("records")
    self.stop(workdir, 2, "sample", 4, "--config.engine.lanes=8")
    finish(start(workdir, 2, "sample,credit,pairs,dpo"), workdir, 0)
    self.assert_same_records(workdir, 2, stopped="sample/traces")

  def test_deaths_and_ways_back(self):
    # Fails if the others hang or stay silent when one process dies, if SIGTERM to one during
    # training or compilation stops only that one or all at different steps, or if one process
    # cannot resume the work of two, or loses step or shuffle.
    self.deaths_and_ways_back(scratch() / "deaths", 2, then=1)


class DifferencesTest(PodTestCase):
  def test_processes_that_were_started_with_other_settings(self):
    # Fails if two processes with different learning rates train on, or if one of them leaves a
    # file.
    workdir = scratch() / "rates"
    lines = finish(
      start(workdir, 2, "synthesize,sft", last=["--config.sft.optimizer.learning_rate=0.5"]),
      workdir,
      1,
      timeout_s=90,
    )
    for line in lines:
      self.assertIn("The processes differ in sft.optimizer.learning_rate: ", line)
      self.assertIn("0.5 in process 1.", line)
    self.assertFalse(workdir.exists())

  def test_processes_that_read_other_data(self):
    # Fails if a process whose data file differs in a row, here an invalid one, continues or is
    # reported dead by the others.
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


class BaseModelTest(distributed_test.MembersTestCase):
  """Process 1 has no base model; every matrix is split over the devices of both processes."""

  def test_process_0_reads_and_sends(self):
    # Fails if a process without the folder is refused, or gets other weights (in any bit, -0.0
    # included), another tokenizer, template, stop token or identity of the base model; or if
    # differing copies, or orbax weights that one process cannot see, are accepted.
    root = pathlib.Path(tempfile.mkdtemp(dir=scratch()))
    base, adapter = root / "0/base", root / "0/adapter"
    shutil.copytree(EMBEDDED, base)
    weights = safetensors.numpy.load_file(base / "model.safetensors")
    for value in weights.values():
      value.flat[::7] = -0.0
    safetensors.numpy.save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [3]}))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/terse.jinja").write_text("{{ messages[0]['content'] }}")
    config = config_schema.default().model
    expected = [Policy.load(base, config, tiny_model.one_device_mesh())]
    low_rank = adapter_lib.Adapter(expected[0].model, 2, 6.0, ("query", "down"))
    params = jax.tree.map(
      lambda leaf: np.full(leaf.shape, 0.125, np.float32), low_rank.abstract_params()
    )
    adapter_lib.save_peft(adapter, [(low_rank, params)], str(base))
    expected.append(Policy.load(adapter, config, tiny_model.one_device_mesh()))
    config.param_dtype = "bfloat16"
    expected.append(Policy.load(base, config, tiny_model.one_device_mesh()))
    about = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
      json.dumps(about | {"base_model_name_or_path": "base"})
    )
    for process in "01":
      (root / process / "other").mkdir(parents=True)
      (root / process / "other/config.json").write_text(process)
    (root / "0/kept/params").mkdir(parents=True)
    members = self.members(
      SENT.replace("ROOT", repr(str(root))), count=2, before=TWO_DEVICES, heartbeat_s=60
    )
    for status, output, line in self.ends(members, timeout_s=400):
      self.assertEqual(status, 0, line)
      own = [text for text in output.splitlines() if not text.startswith("[Gloo]")]
      *loaded, identity, differ, unseen = own
      for found, policy in zip(loaded, expected, strict=True):
        tied, endings = policy.model.config.tie_embeddings, list(policy.eos_ids)
        self.assertEqual(
          json.loads(found), [policy.fingerprint, tied, endings, policy.tokenizer.chat_template]
        )
      self.assertEqual(identity, files_identity(epath.Path(base)))
      self.assertRegex(
        differ,
        "^The processes differ in the files of the base model other: '.*' in process 0, "
        ".*process 1",
      )
      self.assertEqual(
        unseen,
        "The policy folder kept does not exist in process 1; every process must be able to read "
        "its params.",
      )


TWO_DEVICES = f"""
sys.path.insert(0, os.getcwd())
os.environ["XLA_FLAGS"] = "{xla_flags(2)}"
"""
SENT = """
import json
from configs import arithmetic
from synthneg_jax.pipeline import experiment as experiment_lib
from synthneg_jax.runtime.errors import UserError
os.chdir(pathlib.Path(ROOT) / str(index))
config = arithmetic.get_config("smoke")
config.mesh.update(data=1, fsdp=4)
config.model.path = "base"
experiment = experiment_lib.Experiment.open(config, folder / "run")
for path, dtype in (("base", "float32"), ("adapter", "float32"), ("base", "bfloat16")):
  config.model.path, config.model.param_dtype = path, dtype
  policy = experiment.base()
  template = policy.tokenizer.chat_template
  tied = policy.model.config.tie_embeddings
  print(json.dumps([policy.fingerprint, tied, list(policy.eos_ids), template]))
experiment.stage("sft", ["sft"], reads_base=True)
distributed.barrier()
print(json.loads((folder / "run/sft/begun.json").read_text())["inputs"]["base model"])
config.model.path = "kept"
for work in (lambda: experiment_lib._compare_base_models("other"), experiment.base):
  try:
    work()
  except UserError as error:
    print(error)
distributed.finish()
"""


# Requests a stop at the given call of the decoding loop, as SIGTERM would, and runs the program
# named in the remaining arguments.
STOP_AT = """
import itertools, runpy, sys
from synthneg_jax.runtime import distributed
calls, at = itertools.count(1), int(sys.argv[1])
distributed.stopping = lambda: next(calls) >= at
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Runs the program named in the remaining arguments and creates a file in a folder for each call of
# `stopping`, which then takes longer. On request, one of these calls before the second train step
# makes XLA compile another program for a second or more.
NOTED = """
import pathlib, runpy, sys, time
import jax
import jax.numpy as jnp
from synthneg_jax.runtime import distributed
from synthneg_jax.training import step
folder, compiles, sys.argv = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
mark = lambda name: (folder / f"{distributed.index()}.{name}").touch()
calls, stopping, make_step = [], distributed.stopping, step.make_step
def noted():
  calls.append(stopping())
  mark(len(calls))
  time.sleep(0.2)
  return calls[-1]
def slow(*args, **kwargs):
  made, lowered = make_step(*args, **kwargs), [jax.jit(sorts).lower(jnp.ones(64)), None]
  def step(*values):
    if lowered and (program := lowered.pop()):
      mark("compiles")
      program.compile()
      mark("compiled")
    return made(*values)
  return step
def sorts(x):
  for n in range(5):
    x = jnp.sort(jnp.sin(x * (n + time.time() % 1)))  # no cache has it
  return x
distributed.stopping = noted
if compiles:
  step.make_step = slow
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
class StoppedTest(PodTestCase):
  def test_what_was_drawn_before_a_stop_is_kept(self):
    # Fails if a stop loses finished problems, keeps an unfinished one, or changes later samples.
    workdir = after_sft("stopped")
    small = ("--config.engine.lanes=8", "--config.credit.lanes=4")
    for stage, name, at in (("sample", "sample/traces", 4), ("credit", "credit/estimates", 30)):
      [process] = start(workdir, 1, stage, *small, script=(STOP_AT, at))
      [line] = finish([process], workdir, distributed.PREEMPTED)
      self.assertIn("stopped by SIGTERM; all completed work is saved.", line)
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

      def drawn(by_key):
        return {
          key: record.get("ids", [sample["ids"] for sample in record.get("samples", [])])
          for key, record in by_key.items()
        }

      self.assertEqual(drawn(found), drawn(expected))


@pytest.mark.long
class FourProcessesTest(PodTestCase):
  def test_the_whole_pipeline(self):
    # As above, for the whole pipeline.
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
    # Fails if the others wait for the process that they ask, or if jax ends them without a message.
    workdir = scratch() / "first"
    started = start(workdir, 4, "synthesize,sft")
    self.wait_for_steps(started, workdir, 3)
    started[0].kill()
    for line in finish(started[1:], workdir, distributed.LOST, timeout_s=60, first=1):
      self.assertIn("process 0 of 4 died", line)


if __name__ == "__main__":
  absltest.main()
