"""D_syn over HTTP equals the one made in process, despite faults, and is paid for once."""

import collections
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from absl.testing import absltest, parameterized
from etils import epath

from configs import arithmetic
from synthneg_jax.data.records import Candidate, Problem, Shards
from synthneg_jax.pipeline import sft, synthesize, teacher_backends
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.teacher import scripted
from tests import tiny_model
from tests.openai_server import ROOT, Server, scripted_chat
from tests.xla_flags import xla_flags

pytestmark = pytest.mark.slow  # starts processes

KEY = "sk-very-secret-4711"


def make_config(**changes):
  config = arithmetic.get_config("smoke")
  c = config.synthesis
  c.provider, c.num_solutions, c.new_per_request = "scripted", 2, 5
  c.endpoint.model, c.endpoint.key_variable, c.endpoint.backoff_s, c.endpoint.timeout_s = (
    "teacher",
    "",
    0.01,
    2.0,
  )
  c.update(changes)
  return config


def served(server, **changes):
  config = make_config(provider="endpoint", **changes)
  config.synthesis.endpoint.url = server.url
  return config


def open_run(config, workdir=None) -> Experiment:
  return Experiment(config, epath.Path(workdir or tempfile.mkdtemp()), tiny_model.one_device_mesh())


def records(experiment, name="train", kind=Problem) -> list:
  return list(Shards(experiment.workdir / "synthesize" / name, kind).read())


def without_source(problems):
  return [dataclasses.replace(problem, source="") for problem in problems]


class SynthesizeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.server = Server(scripted_chat(make_config().task))
    self.addCleanup(self.server.close)

  def test_new_problems_over_http_are_those_made_in_process(self):
    # Fails if the protocol changes a problem or solution, or samples depend on the order of
    # replies; injected faults must leave no trace. A second workdir with the same replies must send
    # no request.
    local = open_run(make_config())
    self.server.faults = ["503", "die", "broken_json", "429:0.05", "cut"]
    remote = open_run(served(self.server))
    figures = {"here": synthesize.run(local), "there": synthesize.run(remote)}
    self.assertEqual(without_source(records(local)), without_source(records(remote)))
    self.assertLen(records(remote), 48)
    self.assertEqual(records(remote)[0].source, "teacher (endpoint)")
    self.assertEqual(figures["there"]["difficulty"], figures["here"]["difficulty"])
    self.assertEqual(figures["there"]["asked"], len(self.server.requests) - 5)
    self.server.requests.clear()
    again = open_run(served(self.server, replies=str(remote.workdir / "replies")))
    synthesize.run(again)
    self.assertEqual(records(again), records(remote))
    self.assertEmpty(self.server.requests)

  def test_solutions_over_http_train_the_same(self):
    # Fails if D_syn with solutions of a teacher over HTTP differs in any character from the one
    # made in process.
    own, remote = (
      open_run(make_config(provider="task")),
      open_run(served(self.server, generate="solutions")),
    )
    prints = []
    for experiment in (own, remote):
      synthesize.run(experiment)
      sft.run(experiment)
      prints.append(
        json.loads((experiment.workdir / "sft/policy/fingerprint.json").read_text())["fingerprint"]
      )
    self.assertEqual(without_source(records(own)), without_source(records(remote)))
    self.assertEqual(prints[0], prints[1])
    self.assertLen(self.server.requests, 96)

  def test_what_is_dropped_and_why(self):
    # Fails if a problem without agreement, a repeat or a test problem is trained on, or a minority
    # wins a vote.
    teacher = scripted_chat(make_config().task)
    own = open_run(make_config(provider="task"))
    synthesize.run(own)
    stolen = records(own, "test")[3].prompt
    wrong, repeated = [], []

    def chat(body):
      text = teacher(body)
      if "new problems" in body["messages"][0]["content"]:
        first = text.split("</problem>")[0] + "</problem>"
        repeated.append(first)
        return (
          f"{text}\n{first}\n<problem>\n{stolen}</problem>\n<problem>\nnonsense "
          f"{len(repeated)} {hash(text)}</problem>"
        )
      if len(wrong) < 30 and body["seed"] % 3 == 0:
        wrong.append(body)
        return text[:-1] + str((int(text[-1]) + 1) % 10)
      return text

    self.server.chat = chat
    experiment = open_run(served(self.server, num_solutions=3, min_agreement=0.6))
    figures = synthesize.run(experiment)
    found = collections.defaultdict(list)
    for candidate in records(experiment, "candidates", Candidate):
      found[candidate.outcome].append(candidate)
    self.assertEqual({name: len(group) for name, group in found.items()}, figures["outcomes"])
    self.assertNotEmpty(wrong)
    self.assertLen(found["near_duplicate"], len(repeated))
    self.assertEqual({candidate.prompt for candidate in found["contaminated"]}, {stolen})
    nonsense = [
      candidate for candidate in found["unsolved"] if candidate.prompt.startswith("nonsense")
    ]
    self.assertLen(nonsense, len(repeated))
    for candidate in found["kept"]:
      puzzle = scripted.parse(candidate.prompt)
      votes = collections.Counter(solution["answer"] for solution in candidate.solutions)
      self.assertEqual((candidate.answer, votes[candidate.answer]), votes.most_common(1)[0])
      self.assertAlmostEqual(candidate.agreement, votes[candidate.answer] / 3, places=4)
      if candidate.agreement == 1.0:
        self.assertEqual(candidate.answer, str(puzzle.value(puzzle.query)))
    self.assertLess(min(candidate.agreement for candidate in found["kept"]), 1.0)
    by_id = {candidate.id: candidate for candidate in found["kept"]}
    for problem in records(experiment):
      self.assertEqual(
        problem.solution, by_id[problem.id].solutions[by_id[problem.id].chosen]["text"]
      )

  def test_too_few(self):
    # Fails if a run continues with fewer problems than asked for.
    self.server.chat = lambda body: "I would rather not."
    with self.assertRaisesRegex(
      UserError, "max_rounds=2 rounds 0 problems of task.train_problems=48"
    ):
      synthesize.run(open_run(served(self.server, max_rounds=2)))

  def test_budget(self):
    # Fails if the budget is exceeded, or replies are bought again after it is raised.
    changes = {"usd_per_million_prompt": 1.0, "usd_per_million_completion": 1.0, "max_tokens": 300}
    config = served(self.server, budget_usd=0.004, **changes)
    experiment = open_run(config)
    with self.assertRaisesRegex(UserError, "budget_usd=0.004"):
      synthesize.run(experiment)
    before = len(self.server.requests)
    self.assertGreater(before, 12)
    config.synthesis.budget_usd = 1.0
    figures = synthesize.run(open_run(config, experiment.workdir))
    self.assertEqual(figures["asked"] + before, len(self.server.requests))
    bodies = [json.dumps(body, sort_keys=True) for body in self.server.bodies()]
    self.assertLen(set(bodies), len(bodies))
    self.assertBetween(figures["spent_usd"], 0.004, 1.0)

  def test_a_local_checkpoint(self):
    # Fails if our own engine cannot be the teacher, or its replies are sampled again or all with
    # one key. The embedded base model solves almost nothing, so the test checks its replies, not
    # the problems kept.
    config = make_config(
      provider="local", generate="solutions", max_tokens=40, temperature_solutions=3.0
    )
    config.task.train_problems = 3
    config.synthesis.endpoint.model = "embedded"
    config.engine.lanes, config.engine.slots = 2, 2
    first, drawn = open_run(config), []
    for _ in range(2):
      try:
        synthesize.run(first)
      except UserError as error:
        self.assertIn("solved none of 3 problems", str(error))
      paths = sorted((first.workdir / "replies").glob("*/*.json"))
      drawn.append({path.name: (path.stat().mtime, json.loads(path.read_text())) for path in paths})
    self.assertEqual(drawn[0], drawn[1])
    self.assertLen(drawn[0], 6)
    for _, kept in drawn[0].values():
      self.assertBetween(kept["reply"]["completion_tokens"], 1, 40)
    self.assertGreater(len({kept["reply"]["text"] for _, kept in drawn[0].values()}), 4)
    known = teacher_backends.identity(first)
    for leaf, value in (("engine.stop", ("E",)), ("task.template_args", '{"a": 1}'), ("seed", 9)):
      other = config.copy_and_resolve_references()
      other.update_from_flattened_dict({leaf: value})
      self.assertNotEqual(teacher_backends.identity(open_run(other)), known, leaf)


class CommandTest(absltest.TestCase):
  """By the command line, as a user runs it."""

  def setUp(self):
    super().setUp()
    self.server = Server(scripted_chat(make_config().task))
    self.addCleanup(self.server.close)
    self.workdir = pathlib.Path(tempfile.mkdtemp())

  def start(self, *flags) -> subprocess.Popen:
    command = [
      sys.executable,
      "launch/synthesize.py",
      "--config=configs/arithmetic.py:smoke",
      f"--workdir={self.workdir}",
    ]
    leaves = {
      "provider": "endpoint",
      "num_solutions": 2,
      "new_per_request": 5,
      "endpoint.url": self.server.url,
    }
    leaves |= {
      "endpoint.model": "teacher",
      "endpoint.key_variable": "TEACHER_KEY",
      "endpoint.concurrency": 4,
    }
    command += [f"--config.synthesis.{name}={value}" for name, value in leaves.items()]
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": xla_flags(1),
      "TEACHER_KEY": KEY,
      "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
      [*command, *flags],
      cwd=ROOT,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def test_killed_and_gone_on_with(self):
    # Fails if a stored reply is requested again after SIGKILL, if the results differ from those of
    # an uninterrupted run, if cost and tokens are not logged before and at the end, or if the key,
    # which the server echoes in replies and errors, appears in any file or the log.
    self.server.delay_s = 0.2
    first = self.start()
    deadline = time.monotonic() + 300

    def replies():
      return [
        p
        for p in (self.workdir / "replies").glob("*/*.json")
        if not p.name.endswith(".attempt.json")
      ]

    while len(replies()) < 20 and time.monotonic() < deadline and first.poll() is None:
      time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    log = first.communicate()[0]
    kept = len(replies())
    self.assertBetween(kept, 20, 130, log)
    before = len(self.server.requests)
    self.server.delay_s = 0.0
    self.server.faults = ["echo", "503", "echo", "die"]
    prices = (
      "--config.synthesis.usd_per_million_prompt=1",
      "--config.synthesis.usd_per_million_completion=2",
    )
    second = self.start(*prices)
    log += second.communicate(timeout=300)[0]
    self.assertEqual(second.returncode, 0, log)
    whole = open_run(make_config())
    synthesize.run(whole)
    train = list(Shards(epath.Path(self.workdir) / "synthesize/train", Problem).read())
    self.assertEqual(without_source(train), without_source(records(whole)))
    self.assertLessEqual(before, kept + 4)  # at most the requests in flight were lost
    self.assertLen(self.server.requests, before + len(replies()) - kept + 2)  # two were broken
    self.assertRegex(
      log,
      r"synthesize solutions: \d+ requests .* at most \d+ reply tokens and 0\.\d+ US dollars",
    )
    self.assertRegex(log, r"synthesize solutions: (\d+)/\1 replies, .* tokens \S+, usd 0\.\d+")
    self.assertNotIn(KEY, log)
    for path in self.workdir.rglob("*"):
      if path.is_file():
        self.assertNotIn(KEY.encode(), path.read_bytes(), path)


if __name__ == "__main__":
  absltest.main()
