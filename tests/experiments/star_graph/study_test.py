"""Figure 8's study: values against enumeration, pairs and losses against the token tree, cells."""

import functools
import itertools
import json
import os
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from configs import star_graph as star_config
from synthneg_jax.core import losses
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.experiments.star_graph import study as star_graph_study
from synthneg_jax.pipeline import stages
from synthneg_jax.runtime import workdir_lock
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import star_graph
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training import objectives
from synthneg_jax.training.batch import Example
from tests import tiny_model

pytestmark = pytest.mark.slow  # trains


def config(**changes):
  found = star_config.get_config("smoke")
  found.update_from_flattened_dict(changes)
  return found


@functools.cache
def study(**changes):
  """A study of graphs small enough to enumerate all completions, with random weights."""
  small = config(
    **{
      "task.star_graph.degree": 2,
      "task.star_graph.num_nodes": 5,
      "task.train_problems": 6,
      "task.test_problems": 3,
      **changes,
    }
  )
  made = star_graph_study.Study(small, tempfile.mkdtemp())
  return made, tiny_model.make_params(made.model)


def by_tree(model, params, trees: list[Tree]) -> np.ndarray:
  """Summed log-probs [trees, branches] by the token tree, for equal numbers of branches."""
  examples = [Example(tree) for tree in trees]
  batch = batch_lib.build(
    examples, batch_lib.measure(examples, max(tree.num_tokens for tree in trees))
  )
  logp_RS, _ = jax.jit(objectives.scored_logprobs, static_argnums=0)(model, params, batch)
  return np.asarray(losses.branch_logprobs(logp_RS, objectives.branch_tokens(batch)))


class ValuesTest(absltest.TestCase):
  def test_critical_values_by_enumeration(self):
    # Fails if Q is read one place off, leaves out EOS, goes to another arm, or if π is taken after
    # another prefix.
    made, params = study()
    policy_NA, q_NA = star_graph_study.critical_values(made.model, params, made.test)
    prompt_NC, vocab = star_graph.prompt_ids(made.test), made.model.config.vocab_size
    endings = list(itertools.product(range(vocab), repeat=2))  # leaf and EOS, or anything else
    for row in range(3):
      prompt, right = (
        prompt_NC[row].tolist(),
        star_graph.text(star_graph.solution_ids(made.test)[row]),
      )
      center = star_graph.tokens(made.test.arm_NAL[row, 0, 0])
      for arm in range(2):
        node = star_graph.tokens(made.test.arm_NAL[row, arm, 1])
        trunk = [*prompt, center, node]
        grown = [Branch(len(trunk), list(ending)) for ending in endings] + [
          Branch(len(trunk) - 1, [node])
        ]
        *logp_E, first = by_tree(made.model, params, [Tree(trunk, tuple(grown))])[0]
        said = [star_graph.text([center, node, *ending]) for ending in endings]
        hits = [
          text == right and ending[-1] == star_graph.WORDS.index("<eos>")
          for text, ending in zip(said, endings, strict=True)
        ]
        self.assertAlmostEqual(np.exp(logp_E).sum(), 1.0, places=4)
        self.assertAlmostEqual(np.exp(logp_E)[np.array(hits)].sum(), q_NA[row, arm], places=5)
        self.assertAlmostEqual(np.exp(first), policy_NA[row, arm], places=5)

  def test_measures_are_means_of_the_values(self):
    # Fails if `value` is not the probability of the right path given the centre, or if the last,
    # filled-up call counts twice.
    made, params = study()
    trees = [
      Tree([*prompt, path[0]], (Branch(len(prompt) + 1, path[1:]),))
      for prompt, path in zip(
        star_graph.prompt_ids(made.test).tolist(),
        star_graph.solution_ids(made.test).tolist(),
        strict=True,
      )
    ]
    whole_N = np.exp(by_tree(made.model, params, trees)[:, 0])
    found = star_graph_study.measure(made.model, params, made.test)
    self.assertAlmostEqual(found["value"], whole_N.mean(), places=5)
    again = made.test.take(np.arange(1001) % 3)  # two calls
    self.assertAlmostEqual(
      star_graph_study.measure(made.model, params, again)["value"],
      whole_N[np.arange(1001) % 3].mean(),
      places=4,
    )

  def test_pairs_and_their_loss(self):
    # Fails if a right node is rejected, equal pairs count twice, or reference and policy score
    # other tokens than the pair's.
    made, params = study()
    graphs = made.train_set(0)
    pairs = made.pairs(params, graphs, np.random.default_rng(0))
    problem_P, wrong_P = pairs.problem_P, pairs.wrong_P
    self.assertNotEmpty(problem_P)
    self.assertLen({*zip(problem_P, wrong_P, strict=True)}, len(problem_P))
    self.assertFalse(np.any(wrong_P == star_graph.tokens(graphs.path_NL[problem_P, 1])))
    prompt_NC, solution_NS = star_graph.prompt_ids(graphs), star_graph.solution_ids(graphs)
    trees = []
    for problem, wrong in zip(problem_P, wrong_P, strict=True):
      trunk = [*prompt_NC[problem].tolist(), int(solution_NS[problem, 0])]
      trees.append(
        Tree(
          trunk,
          (Branch(len(trunk), solution_NS[problem, 1:].tolist()), Branch(len(trunk), [int(wrong)])),
        )
      )
    logp_P2 = by_tree(made.model, params, trees)
    np.testing.assert_allclose(
      np.stack([pairs.ref_chosen_P, pairs.ref_rejected_P], axis=1), logp_P2, atol=1e-4
    )
    margin_P = logp_P2[:, 0] - logp_P2[:, 1]
    zeros_P = 0 * pairs.ref_chosen_P
    no_reference = pairs._replace(ref_chosen_P=zeros_P, ref_rejected_P=zeros_P)
    nll = -np.mean(logp_P2[:, 0]) / 3  # critical node, leaf, EOS
    for used, wanted in (
      (pairs, np.log(2)),
      (no_reference, np.mean(np.log1p(np.exp(-0.5 * margin_P)))),
    ):
      for nll_weight in (0.0, 2.0):
        loss = loss_of(made, params, star_graph_study.pair_examples(graphs, used), nll_weight)
        self.assertAlmostEqual(loss, wanted + nll_weight * nll, places=3)

  def test_greedy_draws(self):
    # Fails if temperature 0 draws anything but the likeliest node.
    made, params = study(**{"sample.temperature": 0.0})
    graphs = made.train_set(0)
    found = made.pairs(params, graphs, np.random.default_rng(0))
    critical_NV = star_graph_study.force(made.model, params, graphs).critical_NV
    np.testing.assert_array_equal(found.wrong_P, critical_NV[found.problem_P].argmax(axis=1))


def loss_of(made, params, examples, nll_weight: float) -> float:
  """The study's DPO objective with beta 0.5 for pairs packed into one batch."""
  section = config(**{"dpo.beta": 0.5, "dpo.nll_weight": nll_weight}).dpo
  batch = batch_lib.build(examples, batch_lib.measure(examples, section.row_length))
  objective = star_graph_study.dpo_objective(made.model, section)
  return float(jax.jit(objective)(params, batch)[0])


class StudyTest(absltest.TestCase):
  """All cells at toy size, made once; records the examples of each training run."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.config = config(**{"star_graph.under_trained": (2,)})
    cls.workdir = pathlib.Path(tempfile.mkdtemp()) / "run"
    cls.batches, fit = {}, star_graph_study.Study._fit

    def spy(self, name, params, **kwargs):
      cls.batches[name] = kwargs["batches"]
      return fit(self, name, params, **kwargs)

    with absltest.mock.patch.object(star_graph_study.Study, "_fit", spy):
      cls.result = star_graph_study.run(cls.config, cls.workdir)

  def test_end_to_end(self):
    # Fails if a cell, a measurement or a file is missing, or if SFT trains on other responses.
    self.assertEqual(self.result["seeds"], 2)
    self.assertEqual(set(self.result["dpo"]), {"2", "4"})
    self.assertEqual(self.result["sft"]["step"], [0, 2, 4])
    self.assertLess(self.result["sft"]["train/loss"][-1][0], self.result["sft"]["train/loss"][0][0])
    for suffix in ("json", "csv", "png", "svg"):
      self.assertTrue((self.workdir / f"report/star_graph.{suffix}").exists(), suffix)
    self.assertIn("under-trained", (self.workdir / "report/star_graph.svg").read_text())

  def test_made_again(self):
    # Fails if a cell is not taken from its file, if one that is made again from scratch differs, or
    # if one of another beta or of another base is taken.
    cell, weights = self.workdir / "cells/dpo_1_2.json", self.workdir / "weights/sft_1_2.npz"
    before = json.loads(cell.read_text())
    cell.unlink()
    weights.unlink()
    stamps = {path.name: path.stat().st_mtime_ns for path in (self.workdir / "cells").iterdir()}
    self.assertEqual(star_graph_study.run(self.config, self.workdir)["dpo"], self.result["dpo"])
    after = json.loads(cell.read_text())
    self.assertEqual({**after, "seconds": 0}, {**before, "seconds": 0})
    self.assertEqual(
      {
        path.name: path.stat().st_mtime_ns
        for path in (self.workdir / "cells").iterdir()
        if path != cell
      },
      stamps,
    )
    for change in ({"dpo.beta": 0.7}, {"seed": 1}):
      other = config(**{"star_graph.under_trained": (2,), **change})
      with self.assertRaisesRegex(UserError, "other settings"):
        star_graph_study.run(other, self.workdir)

  def test_a_seed_held_by_another_is_passed_over(self):
    # Fails if two processes would make one seed's cells or the base, if no other seed is made, or
    # if a study with cells missing is reported.
    folder = pathlib.Path(tempfile.mkdtemp()) / "run"
    shutil.copytree(self.workdir, folder, ignore=shutil.ignore_patterns("report"))
    for seed in (0, 1):
      (folder / f"cells/dpo_{seed}_2.json").unlink()
    with workdir_lock.claim(folder / "claims/seed_0"), self.assertLogs(level="INFO") as logs:
      self.assertEqual(star_graph_study.run(self.config, folder), {})
    self.assertRegex(
      "\n".join(logs.output), f"Skipping seed 0, which is held by process {os.getpid()} on"
    )
    self.assertFalse((folder / "report").exists())
    self.assertEqual(
      [(folder / f"cells/dpo_{seed}_2.json").exists() for seed in (0, 1)], [False, True]
    )
    self.assertEqual(star_graph_study.run(self.config, folder)["dpo"], self.result["dpo"])
    (folder / "cells/base.json").unlink()
    refused = self.assertRaisesRegex(UserError, "claims/base is held by another run")
    with workdir_lock.claim(folder / "claims/base"), refused:
      star_graph_study.run(self.config, folder)

  def test_base_reads_tours_then_walks(self):
    # Fails if the curriculum is shuffled, or its share of tours is another.
    nodes, base = self.config.task.star_graph.path_nodes, self.batches["base"]
    self.assertEqual(base.num_steps, 4)
    self.assertEqual(sum(map(base.keys, range(4)), []), [str(i) for i in range(4 * 64)])
    scored = [float(base.build(step).num_scored) for step in range(4)]
    self.assertEqual(scored, [64 * 2 * nodes] * 3 + [64 * (nodes + 1)])

  def test_dpo_loss_is_told_of_the_steps_before_its_point(self):
    # Fails if a point's loss is a mean over other updates than those since the point before, or
    # another metric.
    cell = json.loads((self.workdir / "cells/dpo_0_2.json").read_text())
    lines = (self.workdir / "training/dpo_0_2/metrics.jsonl").read_text().splitlines()
    loss_T = [json.loads(line)["loss/per_pair"] for line in lines]
    self.assertEqual([point["step"] for point in cell["curve"]], [0, 2, 4])
    told = [point["dpo_loss"] for point in cell["curve"]]
    np.testing.assert_allclose(
      told, [np.log(2), np.mean(loss_T[:2]), np.mean(loss_T[2:])], atol=1e-5
    )

  def test_sft_memorises_its_problems(self):
    # Fails if batches hold other responses than their prompts', or if training does not start where
    # the base ends.
    few = config(**{"task.train_problems": 4, "sft.max_steps": 150,
    "sft.optimizer.learning_rate": 0.01,
                    "star_graph.every_steps": 150, "star_graph.over_trained": (150,)})  # fmt: skip
    made = star_graph_study.Study(few, tempfile.mkdtemp())
    base, first, last = made.base()["test"], *[made.sft(0)["curve"][i] for i in (0, -1)]
    self.assertEqual(first["test"], base)
    self.assertGreater(last["train"]["value"], 0.9)

  def test_bad_settings(self):
    # Fails if checkpoints beyond SFT's end, a single seed or another task are taken.
    for changes in (
      {"star_graph.over_trained": (9,)},
      {"star_graph.seeds": 1},
      {"star_graph.every_steps": 0},
      {"task.name": "arithmetic"},
    ):
      with self.assertRaisesRegex(UserError, next(iter(changes)).replace(".", r"\.")):
        star_graph_study.Study(config(**changes), tempfile.mkdtemp())


class PublishedTest(parameterized.TestCase):
  @parameterized.parameters(("", "."), ("plan", "plan"))
  def test_published_cells_are_of_the_configs_in_the_repository(self, arg, folder):
    # Fails if a config is changed, or a cell lost or edited, so that docs/star_graph.md tells of
    # something else: a cell of other settings is refused, and one that is missing would be made
    # here.
    published = pathlib.Path(__file__).parents[3] / "docs" / "star_graph" / folder
    workdir = pathlib.Path(tempfile.mkdtemp())
    (workdir / "cells").mkdir()
    for path in published.glob("*_*.json"):
      shutil.copy(path, workdir / "cells")
    shutil.copy(published / "base.json", workdir / "cells")
    with absltest.mock.patch.object(
      star_graph_study.Study, "_fit", side_effect=AssertionError("a cell is missing")
    ):
      star_graph_study.run(star_config.get_config(arg), workdir)
    for name in ("star_graph.json", "star_graph.csv"):
      self.assertEqual((workdir / "report" / name).read_text(), (published / name).read_text())


@pytest.mark.long
class PipelineTest(absltest.TestCase):
  def test_every_stage_takes_the_task(self):
    # Fails if a stage knows the embedded task alone: base, π_sft, traces, credit, pairs and
    # verdicts all meet here.
    workdir = pathlib.Path(tempfile.mkdtemp()) / "run"
    small = config(
      **{
        "pretrain.num_problems": 64,
        "engine.lanes": 8,
        "credit.lanes": 8,
        "sft.num_epochs": 80,
        "sft.max_steps": 0,
        "sft.save_every_steps": 0,
        "sft.optimizer.learning_rate": 0.01,
        "sample.num_traces": 8,
      }
    )
    stages.run(small, workdir, ["pretrain"])
    small.model.path = str(workdir / "pretrain/policy")
    stages.run(small, workdir)
    found = json.loads((workdir / "summary.json").read_text())
    self.assertIn("step_dpo", json.dumps(found))


if __name__ == "__main__":
  absltest.main()
