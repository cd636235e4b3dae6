"""A study: results from cells against closed forms, and a complete study at toy size."""

import contextlib
import csv
import io
import json
import math
import os
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import pytest
from absl.testing import absltest
from etils import epath
from matplotlib.figure import Figure

from configs import study_arithmetic
from synthneg_jax.data import prompts
from synthneg_jax.data.records import Shards, Trace
from synthneg_jax.experiments.scaling import figure, grid, measures, methods, study
from synthneg_jax.pipeline import train_policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import workdir_lock
from synthneg_jax.runtime.errors import UserError

pytestmark = pytest.mark.slow  # trains

TWICE = "step_dpo_twice,pairs.pair_mode=algorithm1"
FOLDER = TWICE.replace(",", "-")


def point(size: int, error: float, seeds=(1, 2), problems: int = 1000) -> study.Point:
  """A method that answers the first problems wrong, with every seed."""
  wrong_SN = np.tile(np.arange(problems) < round(error * problems), (len(seeds), 1))
  return study.Point(size, tuple(seeds), wrong_SN, error, error, error)


def curve(sizes, a: float = 0.5, b: float = 8.0) -> list[study.Point]:
  return [point(size, b * size**-a, problems=10_000) for size in sizes]


class ToldTest(absltest.TestCase):
  def test_factors_of_known_curves(self):
    # Fails if a factor is not the ratio of sizes of equal error, or is told at another size.
    c = study_arithmetic.get_config("toy")
    found = {"sft": curve((256, 1024, 4096)), "rft": [point(256, 8 * 512**-0.5, problems=10_000)]}
    found["step_dpo"] = [point(size, 8 * (size * 8) ** -0.5, problems=10_000) for size in (32, 256)]
    c.study.reference_size = 256
    told = study.efficiency(c, found)
    self.assertAlmostEqual(told["rft"]["factor"], 2.0, delta=0.01)
    self.assertAlmostEqual(told["step_dpo"]["factor"], 8.0, delta=0.05)
    self.assertFalse(told["step_dpo"]["extrapolated"])
    self.assertLess(told["step_dpo"]["low"], told["step_dpo"]["high"])
    self.assertAlmostEqual(told["step_dpo"]["by_size"]["32"]["factor"], 8.0, delta=0.05)
    self.assertNotIn("sft", told)
    self.assertEqual((told["rft"]["at"], told["rft"]["seeds"]), (256, 2))
    found["rft"] = [point(256, 8 * 16384**-0.5, problems=10_000)]
    self.assertTrue(study.efficiency(c, found)["rft"]["extrapolated"])

  def test_an_infinite_end_is_null(self):
    # Fails if efficiency.json would hold a number that is not JSON.
    c = study_arithmetic.get_config("toy")
    c.study.reference_size = 10
    found = {"sft": [point(10, 0.5), point(20, 0.5)], "rft": [point(10, 0.1)]}
    told = study.efficiency(c, found)["rft"]
    self.assertIsNone(told["factor"])
    json.dumps(told, allow_nan=False)

  def test_exponents_of_a_known_law(self):
    # Fails if the exponent's sign, its interval or its coefficient is off.
    told = study.exponents({"sft": curve((256, 1024, 4096)), "rft": curve((256,))})
    self.assertEqual(list(told), ["sft"])
    self.assertAlmostEqual(told["sft"]["exponent"], 0.5, places=2)
    self.assertAlmostEqual(told["sft"]["coefficient"], 8.0, delta=0.1)

  def test_no_mistakes_count_as_half_a_one(self):
    # Fails if a method without mistakes ends a study in the log of 0.
    told = study.exponents({"sft": [point(10, 0.25), point(20, 0.0)]})
    self.assertGreater(told["sft"]["exponent"], 1.0)

  def test_what_was_measured_of_another_run_is_measured_anew(self):
    # Fails if a figure shows a measure of another config or of stages that were run again, or
    # measures again what is unchanged or whose run folder is gone.
    c = study_arithmetic.get_config("toy")
    workdir = epath.Path(self.enter_context(tempfile.TemporaryDirectory()))
    values, size = iter(range(9)), c.study.reference_size
    c.study.seeds = c.study.seeds[:1]
    self.enter_context(absltest.mock.patch.object(figure.Experiment, "open"))

    def found():
      of = figure.load(c, workdir)
      return figure._measured(of, "m", lambda _: {"value": next(values)})[0]["value"]

    folder = workdir / "runs" / grid.Cell(size, c.study.seeds[0], methods.resolve(c, "sft")).unit
    path = folder / "sample" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"identity": "a"}')
    self.assertEqual([found(), found()], [0, 0])
    path.write_text('{"identity": "b"}')
    self.assertEqual([found(), found()], [1, 1])
    c.sft.num_epochs += 1
    self.assertEqual([found(), found()], [2, 2])
    path.unlink()
    self.assertEqual(found(), 2)

  def test_the_rest_of_the_time(self):
    # Fails if large cells are taken to cost what small ones do.
    cells = grid.read(study_arithmetic.get_config("toy"))
    rest = [cell for cell in cells if cell.method.kind == "sft"]
    self.assertEqual(sum(cell.size for cell in rest), 160)
    self.assertEqual(study._time_left({"sft": [(32, 64.0)]}, rest), ", about 6 min left")


class MajorityTest(absltest.TestCase):
  def test_most_frequent_answers_by_hand(self):
    # Fails if ties go to the later answer, answers that are missing are counted, or groups of k
    # overlap.
    def trace(answer, gold):
      return Trace("", "", 0, [], [], "", answer == gold, "", answer, "eos", [], [], "")

    group = [trace(answer, "7") for answer in ("7", "8", None, None, "8", "7", "8", "7")]
    # k = 1: three right of eight; k = 2: (7 8) right, nothing, (8 7) wrong, (8 7) wrong; k = 4: (7
    # 8) right, (8 7 8 7) wrong.
    self.assertEqual(
      [measures._majority_at([group], k) for k in (1, 2, 4, 8)], [3 / 8, 1 / 4, 1 / 2, 1.0]
    )


class ToyTest(absltest.TestCase):
  """A complete study with one seed."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.config = study_arithmetic.get_config("toy")
    cls.config.study.seeds = (1,)
    cls.workdir = epath.Path(tempfile.mkdtemp(prefix="study_")) / "study"
    cls.cells = grid.read(cls.config)
    cls.whole = study.make(cls.config, cls.workdir, cls.cells)

  def test_every_cell_is_there_and_factors_are_told(self):
    # Fails if a cell is not made, or its file does not say what its policy did.
    self.assertTrue(self.whole)
    found = study.results(self.config, self.workdir, self.cells)
    self.assertEqual({name: [p.size for p in points] for name, points in found.items()}, {
      "sft": [32, 48], "rft": [32], "step_dpo": [32], TWICE: [32], "arbitrary": [32],
    })  # fmt: skip
    for cell in self.cells:
      told = grid.load(self.workdir / "cells", self.config, cell)
      name = cell.method.name.replace(",", "-")
      manifest = self.workdir / "runs" / cell.unit / "evaluate" / name / "manifest.json"
      self.assertAlmostEqual(
        told["test_error"], json.loads(manifest.read_text())["figures"]["test_error"], places=3
      )
      self.assertEqual(told["stages"]["synthesize"]["train"], cell.size)
    factors = study.write(self.config, self.workdir, self.cells)
    self.assertEqual(set(factors), {"rft", "step_dpo", TWICE, "arbitrary"})
    written = json.loads((self.workdir / "report" / "efficiency.json").read_text())
    self.assertEqual(written, json.loads(json.dumps(factors)))
    rows = list(csv.DictReader(io.StringIO((self.workdir / "report" / "results.csv").read_text())))
    means = {(row["method"], row["problems"]) for row in rows if row["seed"] == "mean"}
    at_32 = ("sft", "rft", "step_dpo", TWICE, "arbitrary")
    self.assertEqual(means, {("sft", "48"), *((name, "32") for name in at_32)})

  def test_a_second_round_is_of_the_first_rounds_policy(self):
    # Fails if round two samples from π_sft again, starts from it, or is made where round one's
    # folder is.
    experiment = self.workdir / "runs" / "32_1"

    def weights(name):
      return json.loads((experiment / name / "policy" / "fingerprint.json").read_text())[
        "fingerprint"
      ]

    samples = list(Shards(experiment / "after_step_dpo" / "sample" / "traces", Trace).read())
    self.assertEqual({trace.policy for trace in samples}, {weights("dpo/step_dpo")})
    self.assertEqual(weights("after_step_dpo/sft"), weights("dpo/step_dpo"))
    self.assertNotEqual(weights(f"after_step_dpo/dpo/{FOLDER}"), weights("dpo/step_dpo"))
    references = [
      path.name for path in (experiment / "after_step_dpo" / "dpo" / "reference").glob("*.npz")
    ]
    self.assertEqual([name.split("-")[0] for name in references], [weights("dpo/step_dpo")])
    cell = next(cell for cell in self.cells if cell.method.name == TWICE)
    stages = grid.load(self.workdir / "cells", self.config, cell)["stages"]
    for name in (
      "sft",
      "credit",
      "dpo/step_dpo",
      "after_step_dpo/sample",
      f"after_step_dpo/dpo/{FOLDER}",
    ):
      self.assertTrue(stages[name], name)

  def test_compute_is_what_was_trained_and_drawn(self):
    # Fails if padding is counted, a pass is forgotten, or drawn tokens cost what trained ones do.
    cell = next(cell for cell in self.cells if cell.method.name == "sft" and cell.size == 32)
    experiment = Experiment.open(grid.configure(self.config, cell), self.workdir / "runs" / "32_1")
    found, base = (
      measures.compute(experiment, ("synthesize", "sft", "sample", "credit", "dpo/step_dpo")),
      experiment.base(),
    )
    prompts_ = {
      key: len(train_policy.prompt_ids(experiment, base.tokenizer, p))
      for key, p in experiment.problems("train").items()
    }
    solutions = [
      len(prompts.encode_solution(base.tokenizer, p.solution))
      for p in experiment.problems("train").values()
    ]
    leaves = jax.tree.leaves(base.params)
    model = base.model.config
    weights = sum(
      leaf.size for leaf in leaves if leaf.ndim > 1
    )  # no norms, and no embedding, which is looked up
    weights -= 0 if model.tie_embeddings else model.vocab_size * model.d_model
    tokens = self.config.sft.num_epochs * (sum(prompts_.values()) + sum(solutions))
    self.assertAlmostEqual(
      found["sft"] / (6 * weights * tokens), 1.0, delta=0.01
    )  # seconds are written to microseconds
    drawn = sum(
      len(trace.ids) for trace in Shards(experiment.workdir / "sample" / "traces", Trace).read()
    )
    self.assertAlmostEqual(
      found["sample"] / (2 * weights * (sum(prompts_.values()) + drawn)), 1.0, delta=0.01
    )  # seconds are kept to the microsecond
    self.assertGreater(found["dpo/step_dpo"], 0)
    self.assertGreater(found["credit"], 0)

  def test_cells_go_with_the_study_and_one_made_again_agrees(self):
    # Fails if finished cells are made again on another machine, or a cell from scratch says
    # something else.
    other = epath.Path(tempfile.mkdtemp()) / "study"
    shutil.copytree(self.workdir / "cells", other / "cells")
    self.assertTrue(study.make(self.config, other, self.cells))
    self.assertFalse((other / "runs").exists())
    lost = next(cell for cell in self.cells if cell.method.name == "rft")
    before = grid.load(other / "cells", self.config, lost)
    (other / "cells" / f"{lost.name}.json").unlink()
    self.assertTrue(study.make(self.config, other, self.cells))
    again = grid.load(other / "cells", self.config, lost)
    self.assertEqual(again["wrong"], before["wrong"])
    self.assertEqual(again["stages"]["rft"]["solutions"], before["stages"]["rft"]["solutions"])
    self.assertFalse((other / "runs" / "32_1" / "dpo").exists())  # and nothing else is

  def test_where_another_works_nothing_is_done(self):
    # Fails if two processes would write one run folder, or a study with cells missing calls itself
    # whole.
    other = epath.Path(tempfile.mkdtemp()) / "study"
    with workdir_lock.claim(other / "runs/32_1"), workdir_lock.claim(other / "runs/48_1"):
      self.assertFalse(study.make(self.config, other, self.cells))
    self.assertEqual([path.name for path in (other / "cells").iterdir()], [])

  def test_a_cell_held_by_another_is_passed_over(self):
    # Fails if a study works in a folder that another process holds, says nothing of it, or makes no
    # other cell; or if a folder that was claimed stays so.
    other = epath.Path(tempfile.mkdtemp()) / "study"
    shutil.copytree(self.workdir, other)
    for name in ("sft_32_1", "sft_48_1"):
      (other / "cells" / f"{name}.json").unlink()
    with workdir_lock.claim(other / "runs/32_1"), self.assertLogs(level="INFO") as logs:
      self.assertFalse(study.make(self.config, other, self.cells))
    self.assertRegex(
      "\n".join(logs.output), f"skipping 32_1, which is held by process {os.getpid()} on"
    )
    self.assertFalse((other / "cells/sft_32_1.json").exists())
    self.assertTrue((other / "cells/sft_48_1.json").exists())
    self.assertTrue(study.make(self.config, other, self.cells))

  def test_figures(self):
    # Fails if a figure cannot be drawn, or says other than the cells; measured ones are measured
    # once.
    self.enter_context(
      absltest.mock.patch.multiple(
        figure, FIGURE_7=("sft", "step_dpo"), HELD_OUT=6, ROLLOUTS=2, LEAST_RESPONSES=1
      )
    )
    of = figure.load(self.config, self.workdir)
    self.enter_context(absltest.mock.patch.object(figure, "SAMPLES", 4))
    for name in ("1", "2a", "5a", "3", "7", "7_critical", "samples", "compute"):
      svg, png, table = figure.write(of, name)
      self.assertStartsWith(svg.read_text(), "<svg")
      self.assertEqual(png.read_bytes()[:4], b"\x89PNG")
      rows = list(csv.DictReader(io.StringIO(table.read_text())))
      self.assertTrue(
        all(math.isfinite(float(row["count" if name == "1" else "mean"])) for row in rows)
      )
      if name == "1":
        sample = of.stage(grid.Cell(32, 1, methods.resolve(self.config, "rft")), "sample")
        told = {row["what"]: float(row["count"]) for row in rows}
        self.assertEqual(
          (told["traces"], told["right"]), (sample["traces"], sample["reasons"].get("right", 0))
        )
      if name == "samples":  # more samples never make "any of k" worse
        any_ = [float(row["mean"]) for row in rows if row["series"] == "SFT, any of k"]
        self.assertLen(any_, 3)
        self.assertEqual(any_, sorted(any_, reverse=True))
      if name == "5a":
        told = {(row["series"], row["problems"]): float(row["mean"]) for row in rows}
        self.assertAlmostEqual(told["per-step DPO", "32"], of.results["step_dpo"][0].mean, places=4)
    kept = sorted(path.name for path in (self.workdir / "measures").glob("*.json"))
    compute = [
      "compute-rft_32_1.json",
      "compute-sft_32_1.json",
      "compute-sft_48_1.json",
      "compute-step_dpo_32_1.json",
    ]
    self.assertEqual(
      kept, [*compute, "likelihoods_32_1.json", "samples_32_1.json", "values_32_1.json"]
    )
    values = json.loads((self.workdir / "measures" / "values_32_1.json").read_text())
    self.assertEqual(set(values), {"sft", "dpo/step_dpo"})
    self.assertEqual(len(values["sft"]["critical"]), len(values["dpo/step_dpo"]["critical"]))
    made, _ = figure.FIGURES["2a"](of)
    self.assertIsInstance(made, Figure)
    with self.assertRaisesRegex(
      UserError, "needs cells that set rft.max_per_problem at 32 problems"
    ):
      figure.write(of, "2c")
    with self.assertRaisesRegex(UserError, "needs cells of 'rft_advantage'"):
      figure.write(of, "11")

  def test_a_study_ends_in_its_figures(self):
    # Fails if the command draws nothing, draws while others still work, or takes a figure that
    # there is not.
    with contextlib.redirect_stdout(io.StringIO()) as said:
      figure.whole_study(self.config, str(self.workdir))
    factors, *files = said.getvalue().splitlines()
    self.assertEqual(set(json.loads(factors)), {"rft", "step_dpo", TWICE, "arbitrary"})
    self.assertLen(files, 6)
    self.assertTrue(all(pathlib.Path(file).exists() for file in files))
    other = epath.Path(tempfile.mkdtemp()) / "study"
    with workdir_lock.claim(other / "runs/32_1"), workdir_lock.claim(other / "runs/48_1"):
      with self.assertRaisesRegex(UserError, "Other processes still work on cells"):
        figure.main(self.config, str(other), ["2a"])
    with self.assertRaisesRegex(UserError, "--figure names '6'; figures are 1, 2a"):
      figure.main(self.config, str(self.workdir), ["6"])

  def test_cells_of_different_tests_are_not_compared(self):
    # Fails if errors on different problems would be set against each other.
    other = pathlib.Path(tempfile.mkdtemp())
    shutil.copytree(self.workdir / "cells", other / "cells")
    path = other / "cells" / "sft_48_1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"problems": "others"}))
    with self.assertRaisesRegex(UserError, "were tested on different problems"):
      study.results(self.config, other, self.cells)


if __name__ == "__main__":
  absltest.main()
