"""Cells of a study: rows of a grid, validity of a cell's file, and locking."""

import json
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized
from etils import epath

from synthneg_jax.data.records import Shards, Trace
from synthneg_jax.experiments.scaling import grid, methods
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError


def config(**study):
  c = config_schema.default()
  c.credit.best_of = 1
  for leaf, value in study.items():
    c.study[leaf] = value
  return c


def folder() -> epath.Path:
  return epath.Path(tempfile.mkdtemp())


class GridTest(parameterized.TestCase):
  def test_rows_become_cells_small_ones_first_each_once(self):
    # Fails if a size, seed or method is lost or made twice, or if large cells come first.
    rows = (
      ((40, 20), ("sft", "rft"), {}),
      ((20,), ("rft",), {}),
      ((20,), ("step_dpo",), {"dpo.beta": 0.5}),
    )
    cells = grid.read(config(grid=rows, seeds=(1, 2)))
    expected = [
      (20, seed, name) for seed in (1, 2) for name in ("sft", "rft", "step_dpo,dpo.beta=0.5")
    ]
    expected += [(40, seed, name) for seed in (1, 2) for name in ("sft", "rft")]
    self.assertCountEqual([(cell.size, cell.seed, cell.method.name) for cell in cells], expected)
    self.assertEqual([cell.size for cell in cells], [20] * 6 + [40] * 4)
    self.assertLen({cell.name for cell in cells}, 10)

  def test_names_say_what_is_overridden_as_it_is_written(self):
    # Fails if a name, and with it a published cell's file, changes: 1 for a leaf of floats stays 1
    # there and is 1.0 in the config, so that the hash of 1 and 1.0 is one.
    rows = (
      ((20,), ("rft", "arbitrary"), {}),
      ((20,), ("arbitrary",), {"dpo.beta": 1, "pairs.max_per_problem": 2}),
    )
    c = config(grid=rows, seeds=(3,))
    *_, cell = grid.read(c)
    self.assertEqual(cell.method.name, "arbitrary,dpo.beta=1,pairs.max_per_problem=2")
    self.assertEqual(cell.name, "arbitrary-dpo.beta=1-pairs.max_per_problem=2_20_3")
    self.assertIsInstance(methods.configure(c, cell.method).dpo.beta, float)
    twin = grid.Cell(
      20, 3, methods.resolve(c, "arbitrary", {"dpo.beta": 1.0, "pairs.max_per_problem": 2})
    )
    self.assertEqual(twin.method.settings, cell.method.settings)

  def test_rows_survive_a_config_and_its_json(self):
    # Fails if the config turns a row's dict into one whose names may hold no dot, or a fingerprint
    # cannot be written.
    rows = (((20,), ("step_dpo",), {"dpo.beta": 0.5}),)
    c = config(grid=rows, settings=(((20,), {"sft.num_epochs": 2}),), seeds=(1,))
    copied = c.copy_and_resolve_references()
    self.assertEqual(copied.study.grid, rows)
    told = json.loads(json.dumps(config_schema.plain(copied)))
    # lists in place of tuples
    again = config(grid=told["study.grid"], settings=told["study.settings"], seeds=(1,))
    self.assertEqual(grid.read(again), grid.read(c))

  @parameterized.parameters(
    (
      ((20, ("sft",), {}),),
      (),
      r"study.grid: row 1, \(20, \('sft',\), {}\), must be \(sizes in problems, methods, overr",
    ),
    ((((20,), "sft", {}),), (), "study.grid: row 1, .* must be"),
    ((((20,), ("sft",)),), (), "study.grid: row 1, .* must be"),
    ((((20,), (), {}),), (), "study.grid: row 1, .* must be"),
    ((((20,), ("sft",), {}), ((0,), ("sft",), {})), (), "study.grid: row 2, .* must be"),
    (((("20",), ("sft",), {}),), (), "study.grid: row 1, .* must be"),
    (("20: sft",), (), "study.grid: row 1, '20: sft', must be"),
    (
      (((20,), ("sft",), ("sft.num_epochs", 1)),),
      (),
      "study.grid: row 1: overrides must be a dict",
    ),
    ((((20,), ("stf",), {}),), (), "study.grid: row 1 names the method 'stf'; must be one of sft"),
    (
      (((20,), ("rft",), {"dpo.beta": 1}),),
      (),
      r"study.grid: row 1 overrides 'dpo.beta'; rft may "
      r"override rft\.\*",
    ),
    ((((20,), ("base",), {"dpo.beta": 1}),), (), "base may override no leaves"),
    (
      (((20,), ("sft",), {"sft.num_epoch": 1}),),
      (),
      "row 1: .*unknown config leaf 'sft.num_epoch'; did you mean sft.num_epochs",
    ),
    (
      (((20,), ("sft",), {"sft.num_epochs": "1"}),),
      (),
      "sft.num_epochs must be of type int, not '1'",
    ),
    (
      (((20,), ("sft",), {"sft.num_epochs": True}),),
      (),
      "sft.num_epochs must be of type int, not True",
    ),
    (
      (((20,), ("rft",), {"rft.with_teacher": 1}),),
      (),
      "rft.with_teacher must be of type bool, not 1",
    ),
    ((((20,), ("rft",), {"rft.start": "top"}),), (), "rft.start='top' must be one of base, sft"),
    (
      (((20,), ("sft",), {}),),
      (((20,), "sft.num_epochs"),),
      "study.settings: row 1: overrides must be a dict",
    ),
    (
      (((20,), ("sft",), {}),),
      ((20, {}),),
      "study.settings: row 1, .* must be .sizes or methods, overrides",
    ),
    (
      (((20,), ("sft",), {}),),
      ((("rtf",), {"rft.start": "sft"}),),
      "names 'rtf', which is neither a size in problems",
    ),
    (
      (((20,), ("rft",), {}),),
      ((("rft",), {"sft.num_epochs": 1}),),
      "settings: row 1 overrides .*; rft may override rft",
    ),
  )
  def test_bad_rows_are_refused_before_any_work(self, rows, settings, message):
    # Fails if a row that cannot be made is found out only when its cell is reached, or is not
    # named.
    with self.assertRaisesRegex(UserError, message):
      grid.read(config(grid=rows, settings=settings))

  def test_settings_by_size_and_by_method(self):
    # Fails if a row's overrides reach other sizes or methods, or win over those of a method's own.
    rows = (
      ((20, 40), ("sft", "arbitrary", "step_dpo"), {}),
      ((20, 40), ("arbitrary",), {"dpo.beta": 2.0}),
    )
    by_method = (("arbitrary",), {"dpo.beta": 0.7, "dpo.optimizer.learning_rate": 3e-5})
    c = config(grid=rows, settings=(((20,), {"sft.num_epochs": 9}), by_method))
    seen = {
      (cell.size, cell.method.name): methods.configure(grid.configure(c, cell), cell.method)
      for cell in grid.read(c)
    }
    self.assertEqual(
      {size: seen[size, "sft"].sft.num_epochs for size in (20, 40)}, {20: 9, 40: c.sft.num_epochs}
    )
    self.assertEqual(seen[20, "arbitrary"].sft.num_epochs, 9)
    self.assertEqual(seen[40, "arbitrary"].dpo.beta, 0.7)
    self.assertEqual(seen[40, "arbitrary"].dpo.optimizer.learning_rate, 3e-5)
    self.assertEqual(seen[40, "arbitrary,dpo.beta=2.0"].dpo.beta, 2.0)
    self.assertEqual(seen[40, "step_dpo"].dpo.beta, c.dpo.beta)
    self.assertEqual(seen[40, "step_dpo"].pairs.pair_mode, "shared_prefix")

  def test_credit_of_ones_own_has_a_folder_of_its_own(self):
    # Fails if methods with other credit would write into the plain run's stages, what comes before
    # is not shared, two methods of the same credit do not share it, or a cell's hash does not know
    # its credit.
    fewer = {"credit.num_rollouts": 4}
    rows = (
      ((20,), ("step_dpo", "algorithm1"), fewer),
      ((20,), ("step_dpo",), {}),
      ((20,), ("algorithm1",), {"sample.num_traces": 6, "dpo.beta": 0.5}),
      ((20,), ("step_dpo_3_rounds",), {}),
    )
    c = config(grid=rows, seeds=(1,))
    paths = {cell.method.name: cell.method.path for cell in grid.read(c)}
    own = "with_credit.num_rollouts=4"
    first = ("synthesize", "sft", "sample")
    for kind in ("step_dpo", "algorithm1"):
      name = f"{kind}-credit.num_rollouts=4"
      expected = (*first, f"{own}/credit", f"{own}/pairs/{name}", f"{own}/dpo/{name}")
      self.assertEqual(paths[name.replace("-", ",", 1)], expected)
    self.assertEqual(paths["step_dpo"], (*first, "credit", "pairs/step_dpo", "dpo/step_dpo"))
    own, name = "with_sample.num_traces=6", "algorithm1-sample.num_traces=6-dpo.beta=0.5"
    expected = (
      "synthesize",
      "sft",
      *(f"{own}/{stage}" for stage in ("sample", "credit", f"pairs/{name}", f"dpo/{name}")),
    )
    self.assertEqual(paths["algorithm1,sample.num_traces=6,dpo.beta=0.5"], expected)
    once = ("sample", "credit", "pairs/{}", "dpo/{}")
    twice = [f"after_step_dpo/{stage.format('step_dpo_twice')}" for stage in once]
    thrice = [f"after_step_dpo_twice/{stage.format('step_dpo_3_rounds')}" for stage in once]
    self.assertEqual(paths["step_dpo_3_rounds"], (*paths["step_dpo"], *twice, *thrice))
    cells = {cell.method.name: cell for cell in grid.read(c)}
    self.assertEqual(
      methods.configure(c, cells["step_dpo,credit.num_rollouts=4"].method).credit.num_rollouts, 4
    )
    with self.assertRaisesRegex(UserError, r"step_dpo_twice may override dpo\.\* and pairs\.\*"):
      grid.read(config(grid=(((20,), ("step_dpo_twice",), fewer),), seeds=(1,)))

  def test_hash_knows_what_decides_and_nothing_else(self):
    # Fails if a cell made with other settings is taken for this one, or if a leaf of another stage
    # unmakes it.
    c = config(grid=(((20,), ("sft", "step_dpo"), {}),), seeds=(1,))
    sft, dpo = (
      [one for one in grid.read(c) if one.method.name == name][0] for name in ("sft", "step_dpo")
    )
    before = grid.config_hash(c, sft), grid.config_hash(c, dpo)
    c.dpo.beta = 0.7
    self.assertEqual(grid.config_hash(c, sft), before[0])
    self.assertNotEqual(grid.config_hash(c, dpo), before[1])
    c.dpo.beta = 0.1
    c.engine.lanes, c.study.reference_size, c.sft.save_every_steps = 7, 3, 1
    self.assertEqual((grid.config_hash(c, sft), grid.config_hash(c, dpo)), before)
    c.sft.num_epochs += 1
    self.assertNotEqual(grid.config_hash(c, sft), before[0])
    self.assertNotEqual(grid.config_hash(c, dpo), before[1])
    other = grid.Cell(20, 2, sft.method)
    c.sft.num_epochs -= 1
    self.assertNotEqual(grid.config_hash(c, other), before[0])

  def test_hash_knows_the_settings_of_earlier_rounds(self):
    # Fails if cells of later rounds stay when what the first round trained with changes.
    rounds = ("step_dpo_twice", "step_dpo_3_rounds")

    def hashes(*settings):
      c = config(grid=(((20,), rounds, {}),), seeds=(1,), settings=settings)
      return [grid.config_hash(c, cell) for cell in grid.read(c)]

    before = hashes()
    first, second = (
      hashes((("step_dpo",), {"dpo.beta": 9.0})),
      hashes((("step_dpo_twice",), {"dpo.beta": 9.0})),
    )
    self.assertFalse(set(before) & set(first))
    self.assertFalse(set(before) & set(second))
    self.assertEqual(before, hashes((("rft",), {"rft.num_epochs": 9})))

  def test_no_seeds(self):
    # Fails if a study without seeds ends in a traceback.
    with self.assertRaisesRegex(UserError, "study.seeds is empty"):
      grid.read(config(grid=(((20,), ("sft",), {}),), seeds=()))

  def test_a_cell_is_written_and_read_again(self):
    # Fails if a verdict changes its problem on the way, or a file of another config or of none is
    # taken.
    c = config(grid=(((20,), ("sft",), {}),), seeds=(1,))
    (cell,), root = grid.read(c), folder()
    wrong = np.random.default_rng(0).random(37) < 0.4
    order = np.random.default_rng(1).permutation(37)
    Shards(root / "evaluate/sft/traces", Trace).write(
      Trace(
        f"p{i:02d}/e/0",
        f"p{i:02d}",
        0,
        [1],
        [1],
        "",
        not wrong[i],
        "",
        None,
        "eos",
        [0.0],
        [0.0],
        "f",
      )
      for i in order
    )
    self.assertIsNone(grid.load(root, c, cell))
    grid.write(root, root, c, cell=cell, seconds=1.5)
    found = grid.load(root, c, cell)
    np.testing.assert_array_equal(grid.wrong(found), wrong)
    self.assertAlmostEqual(found["test_error"], wrong.mean(), places=5)
    c.sft.num_epochs += 1
    with self.assertRaisesRegex(UserError, "sft_20_1.json was made with another config"):
      grid.load(root, c, cell)
    for text in ("{", "[]", "{}"):
      (root / "sft_20_1.json").write_text(text)
      with self.assertRaisesRegex(UserError, "sft_20_1.json is not a cell of a study"):
        grid.load(root, c, cell)


class PublishedTest(absltest.TestCase):
  def test_published_cells_are_of_the_configs_in_the_repository(self):
    # Fails if a config is changed, or a cell's file lost or edited, so that docs/results.md tells
    # of something else.
    root = pathlib.Path(__file__).parents[3]
    folders = sorted((root / "docs" / "results").rglob("cells"))
    self.assertNotEmpty(folders)
    for results in folders:
      # CONFIG, CONFIG.ARG or CONFIG/ARG
      place = results.parent.relative_to(root / "docs" / "results")
      name, _, arg = ".".join(place.parts).partition(".")
      c = __import__(f"configs.{name}", fromlist=["get_config"]).get_config(arg)
      wanted = {f"{cell.name}.json": cell for cell in grid.read(c)}
      there = {path.name for path in results.glob("*.json")}
      self.assertContainsSubset(there, wanted)
      for name in there:
        found = grid.load(epath.Path(results), c, wanted[name])
        self.assertEqual(json.dumps(found["method"]), json.dumps(wanted[name].method.name))
        self.assertAlmostEqual(float(grid.wrong(found).mean()), found["test_error"], places=5)


if __name__ == "__main__":
  absltest.main()
