"""The accelerator check: what it does with parts that fail, die or hang, its table, and its
rehearsal on the CPU.
"""

import json
import pathlib
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from benchmarks import accelerator_check, accelerator_parts
from synthneg_jax.preflight import chips

# Stands in for the process that measures: each part sleeps, ends the process, fails or reports, as
# its name says.
SCRIPT = """
import json, sys, time
for part in sys.argv[1:]:
  if part == "sft/1B": time.sleep(60)
  if part == "dpo/1B": sys.exit("Aborted (core dumped)")
  more = {"failed": "no memory"} if part == "decode/1B" else {"flops_per_s": 3.0}
  print("not a result"), print(json.dumps({"part": part, **more}), flush=True)
"""


@pytest.mark.slow  # starts processes
class RunTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.out = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "check.json"

  def run_parts(self, parts, seconds, limits):
    with (
      mock.patch.object(accelerator_check, "_COMMAND", (sys.executable, "-c", SCRIPT)),
      mock.patch.object(accelerator_check, "_SECONDS", seconds),
      mock.patch.object(accelerator_check, "_START", 0.0),
      mock.patch.object(accelerator_check, "PARTS", limits),
    ):
      return accelerator_check.run(parts, seconds=seconds, toy=False, out=self.out)

  def test_the_others_go_on(self):
    # Fails if a part that hangs, dies or fails takes others with it, if its reason is lost, or if
    # the file lacks a part.
    parts = ["device", "sft/1B", "numerics", "dpo/1B", "decode/1B", "transformers/sft/1B"]
    limits = dict.fromkeys(parts, 20.0) | {"sft/1B": 1.0}
    report = self.run_parts(parts, 60.0, limits)
    self.assertEqual(list(report["parts"]), parts)
    failed = {
      part: result["failed"] for part, result in report["parts"].items() if "failed" in result
    }
    self.assertEqual(
      failed,
      {
        "sft/1B": "it was stopped after 1 s",
        "dpo/1B": "its process ended with status 1: Aborted (core dumped)",
        "decode/1B": "no memory",
      },
    )
    self.assertEqual(json.loads(self.out.read_text()), json.loads(json.dumps(report)))

  def test_time_is_shared(self):
    # Fails if the whole takes longer than it may, or if parts for which no time is left are not
    # named.
    start = time.monotonic()
    report = self.run_parts(["sft/1B", "numerics"], 1.5, {"sft/1B": 30.0, "numerics": 30.0})
    self.assertLess(time.monotonic() - start, 10)
    self.assertIn("it was stopped after", report["parts"]["sft/1B"]["failed"])
    self.assertIn("no time was left", report["parts"]["numerics"]["failed"])

  def test_rehearsal(self):
    # Fails if a part does not run, if its figures lack their share of what the device can do, or if
    # a part that cannot run here stops the rest.
    report = accelerator_check.run(
      ["device", "attention", "sft/1B", "decode/7B"], seconds=5000, toy=True, out=self.out
    )
    parts = json.loads(self.out.read_text())["parts"]
    self.assertIn("attention is not fused on cpu", parts["attention"]["failed"])
    self.assertGreater(parts["sft/1B"]["flops_share"], 0, parts)
    self.assertGreater(parts["decode/7B"]["bytes_share"], 0, parts)
    self.assertIn("% of peak bandwidth", accelerator_check.table(report))


class TableTest(absltest.TestCase):
  def test_goals_and_others(self):
    # Fails if a goal is held against another figure, if met and missed are turned, or if a ratio is
    # upside down.
    trained = {"layers": 22, "size": "8 x 2048", "tokens_per_s": 1000.0, "flops_share": 0.5}
    parts = {
      "sft/1B": trained,
      "sft/7B": trained | {"flops_share": 0.4},
      "transformers/sft/1B": trained | {"tokens_per_s": 500.0},
      "transformers/sft/7B": {"failed": "no memory"},
    }
    lines = accelerator_check.table(
      {"goals": accelerator_check.GOALS, "parts": parts}
    ).splitlines()[2:]
    self.assertLen(lines, 2)
    self.assertIn(
      "| 22 layers, 8 x 2048, 1,000 tokens/s, 50 % of peak FLOP/s | 45 %: met |", lines[0]
    )
    self.assertIn("(ours 2.00x)", lines[0])
    self.assertIn("| 45 %: missed | transformers failed: no memory |", lines[1])

  def test_every_part_has_a_time_and_goals_are_of_parts(self):
    self.assertContainsSubset(accelerator_check.GOALS, accelerator_check.PARTS)


class NumericsTest(absltest.TestCase):
  def test_recorded_numbers(self):
    # Fails if the recorded file is of another program, so that a sound device would be blamed, or
    # if a wrong number passes.
    recorded = json.loads(accelerator_parts.RECORDED.read_text())
    with jax.default_matmul_precision("highest"):
      found = accelerator_parts._numbers("float32")
    self.assertLess(max(accelerator_parts._difference(found, recorded["float32"]).values()), 1e-4)
    found["logp"][3] += 0.1
    found["gradients"]["layers.query"][1][0] *= 1.5
    self.assertGreater(
      min(accelerator_parts._difference(found, recorded["float32"]).values()), 1e-3
    )

  def test_counts(self):
    # Fails if a step's FLOPs are not three times those of the forward pass, by hand: T has 4 layers
    # of 128 x (4·128 + 3·344) numbers and two norms, and 512 x 128 at its end.
    side = accelerator_parts.Side("T")
    _, work = accelerator_parts._work(accelerator_parts.TOY, "dpo", 1, side)
    pairs, prompt, branch = 128 // 62, 32, 15
    tokens = pairs * (prompt + 2 * branch)
    keys = sum(range(1, prompt + 1)) + 2 * sum(range(prompt + 1, prompt + branch + 1))
    layers = 4 * (128 * (4 * 128 + 3 * 344) + 2 * 128) + 128
    forward = 2 * layers * tokens + 2 * 512 * 128 * pairs * 2 * branch + 4 * 4 * 128 * keys * pairs
    self.assertEqual(work["tokens"], tokens)
    np.testing.assert_allclose(work["flops"], 3 * forward, rtol=1e-12)


class ChipsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("NVIDIA H200", 4.8e12),
    ("NVIDIA A100-SXM4-80GB", 2.04e12),
    ("TPU v5 lite", 0.82e12),
    ("TPU v6 lite", 1.64e12),
    ("cpu", None),
  )
  def test_kinds(self, kind, rate):
    # Fails if a device is taken for another.
    chip = chips.from_device_kind(kind)
    self.assertEqual(chip and chip.memory_rate, rate)


if __name__ == "__main__":
  absltest.main()
