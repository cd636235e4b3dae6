"""Traces sampled on problems that SFT has not seen."""

import pathlib
import tempfile

import pytest
from absl.testing import absltest

from synthneg_jax.data.records import Problem, Shards, Trace
from synthneg_jax.pipeline import sample, sft, synthesize
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from tests.pipeline import small_run

pytestmark = pytest.mark.slow  # trains

LEAVES = {"task.train_problems": 12, "task.fresh_problems": 5, "sft.num_epochs": 1}


class FreshProblemsTest(absltest.TestCase):
  def test_sft_and_sampling_have_their_own(self):
    # Fails if SFT sees a fresh problem, if traces are sampled on SFT's problems, or if fewer
    # problems are not a subset of more.
    experiment = small_run.opened(pathlib.Path(tempfile.mkdtemp()) / "run", **LEAVES)
    counts = synthesize.run(experiment)
    self.assertEqual((counts["sft"], counts["train"]), (12, 5))
    self.assertEqual(sft.run(experiment)["solutions"], 12)
    sample.run(experiment)
    folder = experiment.workdir / "synthesize"
    sft_problems, sampled = (
      list(Shards(folder / split, Problem).read_dict()) for split in ("sft", "train")
    )
    traces = Shards(experiment.workdir / "sample" / "traces", Trace).read()
    self.assertEqual({trace.problem_id for trace in traces}, set(sampled))
    every = {"task.train_problems": 17, "task.fresh_problems": 0}
    plain = small_run.opened(pathlib.Path(tempfile.mkdtemp()) / "run", **LEAVES | every)
    synthesize.run(plain)
    self.assertEqual(sft_problems + sampled, list(plain.problems("train")))

  def test_what_does_not_go_together(self):
    # Fails if a capable model's D_syn, or RFT with teacher solutions, is combined with fresh
    # problems.
    for leaf, value in (("synthesis.provider", "scripted"), ("rft.with_teacher", True)):
      config = small_run.config()
      config.update_from_flattened_dict(LEAVES | {leaf: value})
      with self.assertRaisesRegex(UserError, "task.fresh_problems=5 needs"):
        config_schema.check_values(config)


if __name__ == "__main__":
  absltest.main()
