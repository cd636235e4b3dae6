"""Problems from files: invalid rows, the list of omitted rows, and worked examples in prompts."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types
from unittest import mock

import pytest
import transformers
from absl.testing import absltest, parameterized

from synthneg_jax.data.records import Problem
from synthneg_jax.pipeline import evaluate, traces, train_policy
from synthneg_jax.runtime import config_schema, errors
from tests.models import smollm2

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[2]


class SynthesizeTest(absltest.TestCase):
  # Fails if --skip_bad_rows is not a flag, if the stage that an invalid row stopped cannot be
  # resumed with it, or if omitted rows are not listed.
  def test_skip_bad_rows(self):
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def row(question, answer):
      return json.dumps({"problem": question, "answer": answer}) + "\n"

    leak = "one two three four five six seven eight nine ten eleven twelve thirteen"
    (folder / "train.jsonl").write_text(
      row("first", "1") + row(leak + " fourteen", "2") + "{\n" + row("last", "3")
    )
    (folder / "test.jsonl").write_text(row(leak, "4"))
    (folder / "mine.py").write_text(
      "from synthneg_jax.runtime import config_schema\n\n\ndef get_config():\n  c = "
      "config_schema.default()\n"
      f"  c.task.name, c.task.path = 'jsonl', {str(folder)!r}\n"
      "  c.task.train_problems, c.task.test_problems = 2, 1\n  return c\n"
    )
    command = [
      sys.executable,
      str(ROOT / "launch/synthesize.py"),
      f"--config={folder}/mine.py",
      f"--workdir={folder}/run",
    ]

    def start(*flags):
      return subprocess.run(
        [*command, *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
      )

    stopped = start()
    self.assertEqual(stopped.returncode, 1, stopped.stderr)
    self.assertIn(f"{folder}/train.jsonl, line 3: not JSON", stopped.stderr)
    done = start("--skip_bad_rows")
    self.assertEqual(done.returncode, 0, done.stderr)
    figures = json.loads((folder / "run/synthesize/manifest.json").read_text())["figures"]
    expected = {"train": 2, "test": 1, "dropped_as_test": 1, "skipped_rows": 1, "duplicates": 0}
    self.assertEqual({key: figures[key] for key in expected}, expected)
    overlap, skipped = map(
      json.loads, (folder / "run/synthesize/left_out.jsonl").read_text().splitlines()
    )
    self.assertEqual((overlap["words"], overlap["share"]), (leak, 0.5))
    self.assertIn("train.jsonl, line 3", skipped["skipped"])


class ShotsTest(parameterized.TestCase):
  def _run(self, **leaves):
    config = config_schema.default()
    config.task.name, config.task.prompt, config.task.instruction = "gsm8k", "plain", "Be brief."
    config.evaluate.update(leaves)
    all_problems = [Problem(str(i), f"q{i}", f"s{i}" if i != 1 else "", "5", "") for i in range(4)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.smollm2_dir())
    policy = types.SimpleNamespace(tokenizer=tokenizer)
    return types.SimpleNamespace(
      config=config,
      stage=lambda *args, **kwargs: types.SimpleNamespace(
        done=False, folder=pathlib.Path("/nowhere")
      ),
      base=lambda: policy,
      policy=lambda name: policy,
      problems=lambda split: {problem.id: problem for problem in all_problems},
      engine=lambda *args, **kwargs: None,
    )

  # Fails if fine-tuned policies get worked examples, the base model gets none, or an example lacks
  # a solution.
  @parameterized.parameters(("base", 2, ["0", "2"]), ("base", 0, []), ("sft", 2, []))
  def test_only_the_base_model_gets_them(self, method, shots, expected):
    experiment = self._run(base_shots=shots, methods=(method,))
    given = []

    def respond(*args, request, **kwargs):
      given.append(request.shots)
      raise StopIteration

    with mock.patch.object(traces, "respond", respond), self.assertRaises(StopIteration):
      evaluate.run(experiment)
    self.assertEqual([problem.id for problem in given[0]], expected)

  # Fails if prompts lack the worked examples or the config's instruction.
  def test_prompt(self):
    experiment = self._run()
    ids = train_policy.prompt_ids(
      experiment,
      experiment.base().tokenizer,
      Problem("9", "q9", "", "5", ""),
      [experiment.problems("train")["0"]],
    )
    self.assertEqual(
      experiment.base().tokenizer.decode(ids),
      "Question: q0\nBe brief.\nAnswer:\ns0\n\nQuestion: q9\nBe brief.\nAnswer:\n",
    )

  # Fails if a base model may be prompted with worked examples but without a stop string: it would
  # continue with problems of its own.
  @parameterized.parameters(
    ({"evaluate.base_shots": 2}, "engine.stop"),
    ({"evaluate.base_shots": -1}, r"base_shots=-1 must be in \[0, inf\)"),
    ({"task.decontaminate_ngram": -1}, r"must be in \[0, inf\)"),
    ({"task.steps": "words"}, "delimiter, prose"),
    ({"task.answers": "text"}, "integer, math"),
  )
  def test_refusals(self, leaves, message):
    config = config_schema.default()
    config.update_from_flattened_dict(leaves)
    with self.assertRaisesRegex(errors.UserError, message):
      config_schema.check_values(config)


if __name__ == "__main__":
  absltest.main()
