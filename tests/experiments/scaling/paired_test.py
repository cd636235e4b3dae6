"""The paired difference against closed forms."""

import json
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest

from synthneg_jax.data.records import Shards, Trace
from synthneg_jax.experiments.scaling import paired
from synthneg_jax.runtime.errors import UserError


def workdir_with(errors: dict[str, list[bool]]) -> str:
  root = pathlib.Path(tempfile.mkdtemp())
  for method, wrong in errors.items():
    folder = root / "evaluate" / method
    Shards(folder / "traces", Trace).write(
      Trace(
        f"p{i}/e/0",
        f"p{i}",
        0,
        [1],
        [1],
        "",
        not bad,
        "wrong" if bad else "right",
        None,
        "eos",
        [0.0],
        [0.0],
        "f",
      )
      for i, bad in enumerate(wrong)
    )
    (folder / "manifest.json").write_text(json.dumps({}))
  return str(root)


class PairedTest(absltest.TestCase):
  def test_mean_and_interval_of_one_run(self):
    # Fails if the sign is turned, or problems are not paired (the interval would be far wider).
    rng = np.random.default_rng(0)
    first = rng.random((1, 2000)) < 0.6
    second = first & (rng.random((1, 2000)) < 0.9)
    mean, low, high = paired.paired_difference(first, second)
    difference = first.astype(float) - second
    half = 1.96 * difference.std() / np.sqrt(2000)
    self.assertAlmostEqual(mean, difference.mean())
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.1 * half)

  def test_runs_are_resampled_too(self):
    # Fails if only problems are resampled: runs that disagree must widen the interval.
    first = np.ones((3, 1000), bool)
    second = np.stack([np.ones(1000, bool), np.zeros(1000, bool), np.zeros(1000, bool)])
    _, low, high = paired.paired_difference(first, second)
    self.assertLess(low, 0.05)
    self.assertGreater(high, 0.95)

  def test_compare_reads_workdirs(self):
    # Fails if another method's traces are read, or other test problems are accepted.
    one = workdir_with({"sft": [True, True, False], "step_dpo": [False, True, False]})
    result = paired.compare([one, one], "sft", "step_dpo")
    self.assertEqual(result["errors_first"], [0.6667, 0.6667])
    self.assertAlmostEqual(result["difference"], 0.3333, places=4)
    with self.assertRaisesRegex(UserError, "names no run"):
      paired.compare([], "sft", "step_dpo")
    with self.assertRaisesRegex(UserError, "the same problems"):
      paired.compare([one, workdir_with({"sft": [True], "step_dpo": [True]})], "sft", "step_dpo")
    with self.assertRaisesRegex(UserError, "no finished evaluation of rft"):
      paired.compare([one], "rft", "sft")


if __name__ == "__main__":
  absltest.main()
