"""The study of stories at toy size: cells, figures, and estimated against true pits."""

import contextlib
import csv
import io
import json
import pathlib
import tempfile

import pytest
from absl.testing import absltest

from configs import stories, study_stories
from synthneg_jax.experiments.scaling import figure
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError

pytestmark = pytest.mark.slow  # trains


class StoriesStudyTest(absltest.TestCase):
  def test_the_study_at_toy_size(self):
    # Fails if a stage does not take stories, or the true pits of their traces cannot be told.
    config = study_stories.get_config("smoke")
    config.study.seeds = (0,)
    workdir = pathlib.Path(tempfile.mkdtemp()) / "study"
    with contextlib.redirect_stdout(io.StringIO()) as said:
      figure.whole_study(config, str(workdir))
    factors, *files = said.getvalue().splitlines()
    self.assertEqual(set(json.loads(factors)), {"rft", "step_dpo", "arbitrary", "algorithm1"})
    self.assertTrue(all(pathlib.Path(file).exists() for file in files))
    rows = list(
      csv.DictReader((workdir / "report" / "figure_true_pits.csv").read_text().splitlines())
    )
    shares = {row["series"]: float(row["mean"]) for row in rows}
    self.assertBetween(shares["pit by lowest value"], 0.05, 1.0)
    labels = [share for name, share in shares.items() if name.startswith("label")]
    self.assertLen(labels, 3)
    self.assertAlmostEqual(sum(labels), 1.0, places=3)

  def test_configs(self):
    # Fails if the study's test problems are not apart from what the search used, or an unknown
    # argument goes through.
    config_schema.check_values(study_stories.get_config())
    self.assertEqual(study_stories.get_config().task.stories, stories.get_config().task.stories)
    for module in (stories, study_stories):
      with self.assertRaisesRegex(UserError, "knows no 'toys'; it knows smoke"):
        module.get_config("toys")


if __name__ == "__main__":
  absltest.main()
