"""The study of open questions at toy size: cells, figures, stages shared by methods."""

import contextlib
import csv
import io
import json
import pathlib
import tempfile

import pytest
from absl.testing import absltest

from configs import study_questions
from synthneg_jax.data.records import Pair, Problem, Shards, StepEstimate, Trace
from synthneg_jax.experiments.scaling import figure, grid
from synthneg_jax.runtime.errors import UserError

pytestmark = pytest.mark.slow  # trains

BUDGET = "with_credit.max_rollouts=12-credit.schedule=until_first_zero-sample.num_traces=4"


class QuestionsStudyTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.config = study_questions.get_config("smoke")
    cls.workdir = pathlib.Path(tempfile.mkdtemp(prefix="questions_")) / "study"
    cls.enterClassContext(absltest.mock.patch.multiple(figure, HELD_OUT=6, ROLLOUTS=2))
    with contextlib.redirect_stdout(io.StringIO()) as said:
      figure.whole_study(cls.config, str(cls.workdir))
    cls.files = said.getvalue().splitlines()[1:]
    cls.run_folder = cls.workdir / "runs" / "32_1"

  def figures(self, stage):
    return json.loads((self.run_folder / stage / "manifest.json").read_text())["figures"]

  def test_every_cell_and_figure_is_there(self):
    # Fails if a method cannot be made, or if a cell does not hold the figures of every stage that
    # it rests on.
    for cell in grid.read(self.config):
      found = grid.load(grid.epath.Path(self.workdir / "cells"), self.config, cell)
      self.assertTrue(all(found["stages"].values()), (cell.name, found["stages"].keys()))
    self.assertLen(self.files, 3 * len(self.config.study.figures))
    rows = list(
      csv.DictReader((self.workdir / "report" / "figure_settings.csv").read_text().splitlines())
    )
    means = {row["series"]: float(row["mean"]) for row in rows}
    one, other = "SFT", "RFT"
    self.assertAlmostEqual(means[f"{one} minus {other}"], means[one] - means[other], places=4)
    rows = list(
      csv.DictReader((self.workdir / "report" / "figure_shifts.csv").read_text().splitlines())
    )
    self.assertIn("theorem, β = 0.3", {row["series"] for row in rows})

  def read(self, folder, kind):
    return list(Shards(self.run_folder / folder, kind).read())

  def test_what_is_not_overridden_is_shared(self):
    # Fails if π_sft or its traces are made anew for credit of one's own, or if more samples are not
    # drawn where they are asked for, by the same policy.
    right = "with_credit.max_right_per_problem=2"
    plain = self.read("sample/traces", Trace)
    self.assertEqual(self.read(f"{right}/sample/traces", Trace), plain)
    more = self.read(f"{BUDGET}/sample/traces", Trace)
    self.assertLen(more, 4 * 32)
    self.assertEqual({trace.policy for trace in more}, {trace.policy for trace in plain})
    verdicts = {trace.id: trace.correct for trace in plain}
    credited = {
      estimate.trace_id for estimate in self.read(f"{right}/credit/estimates", StepEstimate)
    }
    self.assertEqual({verdicts[key] for key in credited}, {True, False})

  def test_a_budget_of_rollouts_is_spent_problem_by_problem(self):
    # Fails if the budget is overspent by more than a problem, or a problem is left out before it is
    # spent.
    estimates = self.read(f"{BUDGET}/credit/estimates", StepEstimate)
    spent = {}
    for estimate in estimates:
      spent[estimate.problem_id] = spent.get(estimate.problem_id, 0) + len(estimate.samples)
    self.assertGreaterEqual(sum(spent.values()), 12)
    self.assertLess(sum(spent.values()) - list(spent.values())[-1], 12)
    wrong = {
      trace.problem_id
      for trace in self.read(f"{BUDGET}/sample/traces", Trace)
      if trace.reason == "wrong"
    }
    of_order = [key for key in self.read_problems() if key in wrong]
    self.assertEqual(list(spent), of_order[: len(spent)])
    self.assertEqual(self.figures(f"{BUDGET}/credit")["rollouts"], sum(spent.values()))

  def read_problems(self):
    return [problem.id for problem in self.read("synthesize/train", Problem)]

  def test_rounds_go_on_from_one_another(self):
    # Fails if the third round starts from another policy than the second's.
    def identity(stage):
      return json.loads((self.run_folder / stage / "policy/fingerprint.json").read_text())[
        "fingerprint"
      ]

    self.assertEqual(
      identity("after_step_dpo_twice/sft"), identity("after_step_dpo/dpo/step_dpo_twice")
    )
    self.assertNotEqual(identity("after_step_dpo_twice/sft"), identity("dpo/step_dpo"))

  def test_pairs_are_of_the_budget_and_protected(self):
    # Fails if a method's own leaves do not reach its pairs.
    cell = next(cell for cell in grid.read(self.config) if cell.method.kind == "prefix_protected")
    pairs = self.read(f"{cell.method.pairs_folder}/pairs", Pair)
    self.assertBetween(len(pairs), 1, 4)
    self.assertEqual([bool(pair.context) for pair in pairs], [pair.pit > 0 for pair in pairs])

  def test_unknown_arguments(self):
    # Fails if an unknown argument goes through.
    with self.assertRaisesRegex(
      UserError, "knows no '6'; it knows equation4, 1, 2, 3, 4, 5, tune and smoke"
    ):
      study_questions.get_config("6")


if __name__ == "__main__":
  absltest.main()
