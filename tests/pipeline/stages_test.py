"""The whole recipe at toy size by its command line: outputs, skipping, kills and errors."""

import functools
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from synthneg_jax.core.tree import Branch, Tree, pack
from synthneg_jax.data.records import Pair, Shards
from synthneg_jax.pipeline import pair_logprobs
from synthneg_jax.pipeline.experiment import Experiment
from tests.xla_flags import xla_flags

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[2]
METHODS = ["base", "sft", "rft", "dpo", "step_dpo"]


@functools.cache
def scratch() -> pathlib.Path:
  """One folder for all runs of this process."""
  return pathlib.Path(tempfile.mkdtemp(prefix="pipeline_test_"))


def command(workdir, *flags, config="configs/arithmetic.py:smoke", program="pipeline"):
  return [
    sys.executable,
    str(ROOT / f"launch/{program}.py"),
    f"--config={config}",
    f"--workdir={workdir}",
    *flags,
  ]


def environment(**changes):
  # one device, as for a user
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1)} | changes


def launch(*args, **kwargs) -> subprocess.CompletedProcess:
  env = environment(**kwargs.pop("env", {}))
  return subprocess.run(
    command(*args, **kwargs), capture_output=True, text=True, cwd=ROOT, env=env, check=False
  )


@functools.cache
def finished() -> pathlib.Path:
  """A workdir in which the recipe has finished."""
  workdir = scratch() / "finished"
  done = launch(workdir)
  assert done.returncode == 0, done.stderr[-3000:]
  return workdir


def copy_of_finished() -> pathlib.Path:
  workdir = pathlib.Path(tempfile.mkdtemp(dir=scratch())) / "run"
  shutil.copytree(finished(), workdir)
  return workdir


def methods(workdir):
  return json.loads((workdir / "summary.json").read_text())["methods"]


def outputs(workdir):
  """All records, regardless of shard order, and the fingerprints of all weights."""
  contents = {}
  for path in sorted(workdir.rglob("*.jsonl")):
    if path.parent.name in ("traces", "estimates", "pairs"):
      contents.setdefault(str(path.parent.relative_to(workdir)), []).extend(
        sorted(path.read_text().splitlines())
      )
  for path in workdir.rglob("fingerprint.json"):
    contents[str(path.relative_to(workdir))] = path.read_text()
  return contents


def run_with_kills(workdir, kills: int, longest_s: float, config: str, rng: random.Random) -> int:
  """Runs the command and kills it up to `kills` times at random; returns the number of kills."""
  came = 0
  for _ in range(kills):
    process = subprocess.Popen(
      command(workdir, config=config),
      cwd=ROOT,
      env=environment(),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    try:
      process.wait(timeout=rng.uniform(5.0, longest_s))
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      process.wait()
      came += 1
  done = launch(workdir, config=config)
  assert done.returncode == 0, done.stderr[-3000:]
  return came


class RecipeTest(absltest.TestCase):
  def test_summary_and_report(self):
    # Fails if a stage omits a figure, or a method is not evaluated on the test problems.
    summary = json.loads((finished() / "summary.json").read_text())
    self.assertEqual(list(summary["methods"]), METHODS)
    for figures in summary["methods"].values():
      self.assertEqual(set(figures), {"test_error", "ci95", "num_problems"})
      self.assertEqual(figures["num_problems"], 32)
      self.assertBetween(
        figures["test_error"], figures["ci95"][0] - 1e-4, figures["ci95"][1] + 1e-4
      )
    self.assertEqual(
      summary["step_dpo"], {"pair_mode": "shared_prefix", "pit_rule": "lowest_value"}
    )
    for stage in (
      "synthesize",
      "sft",
      "sample",
      "rft",
      "credit",
      "pairs/dpo",
      "pairs/step_dpo",
      "dpo/dpo",
      "dpo/step_dpo",
    ):
      self.assertGreaterEqual(summary["stages"][stage]["seconds"], 0)
    self.assertIn("</html>", (finished() / "report/index.html").read_text())
    config = json.loads((finished() / "config.json").read_text())
    self.assertEqual(config["config"]["task.train_problems"], 48)
    self.assertIn("jax", config["versions"])

  def test_policies_differ_and_training_is_logged(self):
    # Fails if a stage passes on the weights that it started from.
    names = ["sft", "rft", "dpo/dpo", "dpo/step_dpo"]
    prints = {
      json.loads((finished() / name / "policy/fingerprint.json").read_text())["fingerprint"]
      for name in names
    }
    self.assertLen(prints, len(names))
    for name in names:
      lines = [
        json.loads(line) for line in (finished() / name / "metrics.jsonl").read_text().splitlines()
      ]
      self.assertEqual([line["step"] for line in lines], list(range(len(lines))))

  def test_first_preference_step_starts_at_the_reference(self):
    # Fails if the reference is another policy, or the first response token is omitted on one side.
    for name in ("dpo", "step_dpo"):
      first = json.loads((finished() / f"dpo/{name}/metrics.jsonl").read_text().splitlines()[0])
      self.assertAlmostEqual(first["margin/per_pair"], 0.0, delta=1e-4)
      self.assertAlmostEqual(first["loss/per_pair"], 0.693147, delta=1e-4)

  def test_pairs_are_scored_before_and_after_training(self):
    # Fails if scores belong to other weights or branches, or if chosen and rejected are swapped.
    # The oracle scores one response per row, without packing or branches.
    sys.path.insert(0, str(ROOT / "configs"))
    import arithmetic

    experiment = Experiment.open(arithmetic.get_config("smoke"), finished())
    self.assertIn('id="texts-0"', (finished() / "report/traces.html").read_text())
    for name in ("dpo", "step_dpo"):
      pairs = {
        pair.id: pair for pair in Shards(experiment.workdir / "pairs" / name / "pairs", Pair).read()
      }
      moved = pair_logprobs.read(experiment, name)
      self.assertEqual(set(moved), set(pairs))
      for key in list(pairs)[:2]:
        pair, found = pairs[key], moved[key]
        for n, stage in enumerate(("sft", f"dpo/{name}")):
          policy = experiment.policy(stage)
          for ids, sums in ((pair.chosen, found.chosen), (pair.rejected, found.rejected)):
            rows = pack(
              [[Tree(tuple(pair.trunk), (Branch(len(pair.trunk), tuple(ids)),))]],
              len(pair.trunk) + len(ids),
            )
            hidden, _ = policy.model.hidden(policy.params, rows)
            logp = jax.nn.log_softmax(
              policy.model.logits(policy.params, hidden[0, len(pair.trunk) - 1 : -1])
            )
            expected = float(logp[jnp.arange(len(ids)), jnp.array(ids)].sum())
            self.assertAlmostEqual(sums[n], expected, delta=1e-3)
    self.assertGreater(max(abs(m.after - m.before) for m in moved.values()), 1e-3)

  def test_sampler_and_trainer_agree(self):
    # Fails if the decoder's log-probs come from another distribution than the trainer's (tempered,
    # masked, another fork) or belong to other tokens. In float32 only rounding may differ: of
    # records, to 1e-5, and of sums.
    stages = json.loads((finished() / "summary.json").read_text())["stages"]
    for name in ("dpo/dpo", "dpo/step_dpo"):
      self.assertBetween(stages[name]["sampler_gap_nats"], 1e-9, 1e-4)

  def test_rollouts_are_the_trace_itself_no_more_often_than_chance(self):
    # Fails if rollouts use the trace's keys, or all use one key. A rollout equals the rest of its
    # own trace with the probability that the trace was sampled with; 5 standard deviations leave
    # enough room.
    def records(name):
      return [json.loads(line) for line in (finished() / name / "00000.jsonl").open()]

    traces = {trace["id"]: trace for trace in records("sample/traces")}
    chance, spread, seen, distinct = 0.0, 0.0, 0, []
    for estimate in records("credit/estimates"):
      trace, end = traces[estimate["trace_id"]], estimate["prefix_end"]
      probability = math.exp(sum(trace["drawn_logps"][end:]))
      chance += probability * len(estimate["samples"])
      spread += probability * (1 - probability) * len(estimate["samples"])
      seen += sum(sample["ids"] == trace["ids"][end:] for sample in estimate["samples"])
      if len(estimate["samples"]) > 1:
        distinct.append(estimate["samples"][0]["ids"] != estimate["samples"][1]["ids"])
    self.assertGreater(chance, 3.0)  # else nothing would be tested
    self.assertLess(abs(seen - chance), 5 * spread**0.5 + 1, (seen, chance))
    self.assertGreater(sum(distinct), len(distinct) / 4)

  def test_another_loss_on_other_pairs(self):
    # Fails if dpo.loss or pairs.outcome_mode is ignored: DPO-Positive also starts at ln 2, IPO at
    # (1/2τ)² = 4.
    workdir = copy_of_finished()
    shutil.rmtree(workdir / "dpo")
    shutil.rmtree(workdir / "pairs/dpo")
    flags = [
      "--stages=pairs,dpo/dpo",
      "--config.dpo.loss=ipo",
      "--config.dpo.tau=0.25",
      "--config.pairs.outcome_mode=furthest",
    ]
    done = launch(workdir, *flags)
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    first = json.loads((workdir / "dpo/dpo/metrics.jsonl").read_text().splitlines()[0])
    self.assertAlmostEqual(first["loss/per_pair"], 4.0, delta=1e-3)
    self.assertIn('"pair_mode": "furthest"', (workdir / "pairs/dpo/pairs/00000.jsonl").read_text())

  def test_one_variant_alone(self):
    # Fails if per-step pairs cannot be built, or trained on, without arbitrary ones, or give other
    # results then.
    workdir = copy_of_finished()
    for stage in ("pairs", "dpo/dpo", "dpo/step_dpo"):
      shutil.rmtree(workdir / stage)
    done = launch(workdir, "--stages=pairs/step_dpo,dpo/step_dpo")
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    self.assertFalse((workdir / "pairs/dpo").exists() or (workdir / "dpo/dpo").exists())
    self.assertEqual(methods(workdir), methods(finished()))
    for path in ("pairs/step_dpo/pairs/00000.jsonl", "dpo/step_dpo/policy/fingerprint.json"):
      self.assertEqual((workdir / path).read_text(), (finished() / path).read_text())

  def test_another_schedule(self):
    # Fails if the schedule is ignored, if several rounds draw other rollouts than one round (their
    # keys count on), if rollouts of a round are lost or counted twice, or if rounds never end.
    workdir = copy_of_finished()

    def estimates(folder):
      return [json.loads(line) for line in (folder / "credit/estimates/00000.jsonl").open()]

    before = {(e["trace_id"], e["step"]): e for e in estimates(workdir)}
    shutil.rmtree(workdir / "credit")
    flags = [
      "--stages=credit",
      "--config.credit.schedule=adaptive",
      "--config.pairs.pit_rule=first_dead",
    ]
    done = launch(workdir, *flags)
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    after = {(e["trace_id"], e["step"]): e for e in estimates(workdir)}
    self.assertEqual(list(after), list(before))
    drawn = 0
    for key, estimate in after.items():
      ids = [sample["ids"] for sample in estimate["samples"]]
      self.assertEqual(ids, [sample["ids"] for sample in before[key]["samples"][: len(ids)]])
      self.assertEqual(estimate["samples_at"], before[key]["samples_at"])
      drawn += len(ids)
    self.assertBetween(drawn, 1, sum(len(estimate["samples"]) for estimate in before.values()) - 1)

  def test_second_run_does_nothing_again(self):
    # Fails if a finished stage runs again, which would rewrite its manifest.
    workdir = copy_of_finished()
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("manifest.json")}
    again = launch(workdir)
    self.assertEqual(again.returncode, 0, again.stderr[-2000:])
    self.assertEqual(
      before, {path: path.stat().st_mtime_ns for path in workdir.rglob("manifest.json")}
    )
    self.assertEqual(methods(workdir), methods(finished()))

  def test_kills_change_nothing(self):
    # Fails if a resumed stage samples other tokens, trains on other batches, or counts a shard
    # twice.
    workdir = scratch() / "killed"
    finished()  # compiles everything first, so that kills interrupt work
    seed = int(time.time())
    came = run_with_kills(workdir, 2, 16.0, "configs/arithmetic.py:smoke", random.Random(seed))
    message = f"kill seed {seed}, {came} kills"
    self.assertGreaterEqual(came, 1, message)
    self.assertEqual(methods(workdir), methods(finished()), message)
    self.assertEqual(outputs(workdir), outputs(finished()), message)

  @pytest.mark.long
  def test_ten_kills_at_full_size(self):
    # As above, for the quickstart.
    whole, killed = scratch() / "whole", scratch() / "ten_kills"
    done = launch(whole, config="configs/arithmetic.py")
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    seed = int(time.time())
    came = run_with_kills(killed, 10, 25.0, "configs/arithmetic.py", random.Random(seed))
    self.assertEqual(methods(killed), methods(whole), f"kill seed {seed}, {came} kills")
    self.assertGreaterEqual(came, 5)


class RefusalTest(parameterized.TestCase):
  """One sentence on stderr, exit status 1, and no change to the existing run."""

  def assert_refuses(self, done: subprocess.CompletedProcess, *parts: str):
    self.assertEqual(done.returncode, 1, done.stderr[-2000:])
    self.assertNotIn("Traceback", done.stderr)
    last = done.stderr.strip().splitlines()[-1]
    for part in parts:
      self.assertIn(part, last)

  def test_changed_config(self):
    # Fails if a stage is skipped or continued although its config or inputs changed.
    workdir = copy_of_finished()
    before = (workdir / "config.json").read_text()
    self.assert_refuses(
      launch(workdir, "--config.sft.num_epochs=2"), "sft.num_epochs=1", "now it is 2", "--workdir"
    )
    self.assertEqual((workdir / "config.json").read_text(), before)
    self.assertEqual(methods(workdir), methods(finished()))

  def test_another_base_model(self):
    # Fails if a stage that reads the base model is skipped or continued after the base model
    # changed.
    workdir = copy_of_finished()
    other = scratch() / "other_base"
    shutil.copytree(ROOT / "synthneg_jax/tasks/embedded", other, dirs_exist_ok=True)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    for path in (workdir / "sft", workdir / "rft", workdir / "evaluate/base"):
      begun = json.loads((path / "begun.json").read_text())
      begun["config"]["model.path"] = str(other)  # as if the weights had been changed in place
      (path / "begun.json").write_text(json.dumps(begun))
    for stage in ("sft", "rft", "evaluate"):
      done = launch(workdir, f"--config.model.path={other}", f"--stages={stage}")
      self.assert_refuses(done, "another base model")

  def test_replaced_weights(self):
    # Fails if a stage accepts changed weights in another stage's folder.
    workdir = copy_of_finished()
    shutil.rmtree(workdir / "rft")
    shutil.rmtree(workdir / "evaluate/sft")
    shutil.rmtree(workdir / "sft/policy/params")
    shutil.copytree(workdir / "dpo/dpo/policy/params", workdir / "sft/policy/params")
    self.assert_refuses(launch(workdir, "--stages=evaluate"), "other weights", "sft")

  def test_truncated_record_file(self):
    # Fails if later stages read a truncated file.
    workdir = copy_of_finished()
    shutil.rmtree(workdir / "rft")
    path = workdir / "sample/traces/00000.jsonl"
    path.write_text(path.read_text()[:-100])
    self.assert_refuses(launch(workdir, "--stages=rft"), "00000.jsonl", "truncated")

  def test_missing_weights(self):
    # Fails if missing weights raise a traceback or are replaced by random weights.
    workdir = copy_of_finished()
    shutil.rmtree(workdir / "rft")
    shutil.rmtree(workdir / "evaluate/sft")
    shutil.rmtree(workdir / "sft/policy/params")
    self.assert_refuses(launch(workdir, "--stages=evaluate"), "sft/policy/params", "missing")

  def test_missing_stage(self):
    # Fails if a stage starts without its inputs.
    self.assert_refuses(launch(scratch() / "empty", "--stages=credit"), "credit", "synthesize")

  @parameterized.parameters(
    ("--config.dpo.betta=1", ("dpo.betta", "dpo.beta")),
    ("--config.dpo.beta=high", ("dpo.beta", "high")),
    ("--stages=sft,samples", ("samples", "sample")),
    ("--stages=dpo/steps", ("'dpo/steps'", "dpo/step_dpo")),
    ("--config.task.name=gsm9k", ("gsm9k", "gsm8k")),
    ("--config.model.path=not_there", ("not_there",)),
    ("--config.mesh.tensor=3", ("mesh.tensor=3",)),
    ("--config.pairs.pit_rule=worst", ("pairs.pit_rule='worst'", "lowest_value")),
    ("--config.credit.best_of=9", ("credit.best_of=9",)),
    ("--config.credit.schedule=adaptive", ("credit.schedule='adaptive'", "first_dead")),
    ("--config.pairs.pair_mode=positives_too", ("positives_too", "credit.max_right_per_problem")),
    ("--config.task.arithmetic.num_operations=2", ("task.arithmetic.num_operations=2",)),
  )
  def test_flags(self, flag, parts):
    # Fails if an unknown leaf is accepted, or similar names are not listed.
    self.assert_refuses(launch(pathlib.Path(tempfile.mkdtemp(dir=scratch())), flag), *parts)

  def test_unknown_leaf_in_a_config_file(self):
    # Fails if config files may add leaves that nothing reads.
    path = scratch() / "mine.py"
    path.write_text(
      "from synthneg_jax.runtime import config_schema\n\n\ndef get_config():\n  c = "
      "config_schema.default()\n"
      "  c.dpo.betta = 1.0\n  return c\n"
    )
    self.assert_refuses(launch(scratch() / "x", config=path), "mine.py, line 6", "betta", "beta")

  def test_broken_problem_file(self):
    # Fails if an invalid line is skipped, or the message does not name it.
    folder = scratch() / "data" / "gsm8k"
    folder.mkdir(parents=True, exist_ok=True)
    good = json.dumps({"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"}) + "\n"
    (folder / "train.jsonl").write_text(good * 2 + '{"question": "1 + ')
    (folder / "test.jsonl").write_text(good * 6)
    done = launch(
      scratch() / "y",
      config="configs/gsm8k.py:model=smollm2_135m,smoke",
      env={"SYNTHNEG_DATA_DIR": str(folder.parent)},
    )
    self.assert_refuses(done, "train.jsonl", "line 3")

  def test_read_only_workdir(self):
    # Fails if an unwritable folder raises a traceback.
    path = scratch() / "a_file"
    path.write_text("")
    self.assert_refuses(launch(path / "run"), "a_file")


if __name__ == "__main__":
  absltest.main()
