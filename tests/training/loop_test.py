"""The train loop: bitwise resume, non-finite steps, unusable checkpoints; and the optimizer."""

import dataclasses
import gc
import json
import math
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from etils import epath

from synthneg_jax.core.geometry import RowOptions
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training import loop, objectives
from synthneg_jax.training import optimizer as optimizer_lib
from synthneg_jax.training.batch import Example
from synthneg_jax.training.batches import Batches, Schedule
from tests import tiny_model


class StandIn:
  """A minimal model for the loop: two parameters, so that a step compiles fast."""

  config = tiny_model.CONFIG

  def abstract_params(self):
    return jax.eval_shape(lambda: {"matrix": jnp.zeros((6, 4)), "norm": {"scale": jnp.zeros(4)}})

  def logical_axes(self):
    return {"matrix": ("vocab", "embed"), "norm": {"scale": ("norm",)}}


def objective(params, batch):
  """All parameters and the batch's tokens in one number."""
  weight = (
    jnp.sum(batch.trees.token * jnp.arange(batch.trees.token.shape[1])[None], dtype=jnp.float32)
    / 1000.0
  )
  loss = (
    sum(jnp.sum(jnp.sin(leaf * 3.0 + weight)) for leaf in jax.tree.leaves(params))
    / batch.num_scored
  )
  return loss, {"loss/per_token": (loss, jnp.ones(()))}


class Spy(Batches):
  """Batches that record built steps, raise at one step, and make another non-finite."""

  def __init__(self, kill_at=None, nan_at=None, num_steps=4):
    examples = [Example(Tree([1 + i, 2], (Branch(2, [3, 4 + i]),))) for i in range(num_steps)]
    super().__init__(
      examples,
      [f"problem-{i}" for i in range(num_steps)],
      schedule=Schedule(batch_size=1, num_epochs=1),
      row_options=RowOptions(length=8),
    )
    self.built, self._kill_at, self._nan_at = [], kill_at, nan_at

  def build(self, step):
    self.built.append(step)
    if step == self._kill_at:
      raise KeyboardInterrupt
    batch = super().build(step)
    return (
      dataclasses.replace(batch, num_scored=np.float32(np.nan)) if step == self._nan_at else batch
    )


class LoopTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = epath.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    cls.whole, cls.averages = cls.fit("whole", Spy(), save_every=1)

  @classmethod
  def fit(cls, name, batches, save_every=2, **options):
    section = config_schema.default().sft
    section.update(save_every_steps=save_every, max_to_keep=2)
    section.optimizer.update(learning_rate=0.05, weight_decay=0.1, warmup_fraction=0.3)
    run = loop.Run(
      name=name,
      section=section,
      model=StandIn(),
      objective=objective,
      batches=batches,
      mesh=tiny_model.one_device_mesh(),
      folder=cls.folder / name,
      **options,
    )
    with jax.debug_nans(False):
      params, averages = loop.fit(run, tiny_model.make_params(StandIn()))
    return jax.tree.map(np.asarray, params), averages

  def lines(self, name):
    return [
      json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()
    ]

  def kept(self, name):
    return sorted(
      int(path.name)
      for path in (self.folder / name / "checkpoints").glob("[0-9]*")
      if path.name.isdigit()
    )

  def assert_bitwise(self, got, expected):
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
      np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))

  def test_checkpoints_know_stacked_layers_only(self):
    # Fails if layers that are unrolled are saved, or given back, unstacked: a model that scans them
    # goes on from their checkpoint, and ends where the unrolled one does.
    section = config_schema.default().sft
    section.update(save_every_steps=1, max_to_keep=2)

    def fit(name, batches, scan):
      model = tiny_model.model(num_layers=2, scan_layers=scan)
      run = loop.Run(
        name=name,
        section=section,
        model=model,
        objective=objectives.make_sft(model),
        batches=batches,
        mesh=tiny_model.one_device_mesh(),
        folder=self.folder / name,
      )
      return loop.fit(run, tiny_model.make_params(model))[0]

    with self.assertRaises(KeyboardInterrupt):
      fit("unrolled", Spy(kill_at=1, num_steps=2), scan=False)
    shutil.copytree(self.folder / "unrolled", self.folder / "scanned")
    batches = Spy(num_steps=2)
    scanned = fit("scanned", batches, scan=True)
    self.assertEqual(batches.built, [1])
    unrolled = fit("unrolled", Spy(num_steps=2), scan=False)
    self.assertEqual(jax.tree.structure(unrolled), jax.tree.structure(scanned))
    for a, b in zip(jax.tree.leaves(unrolled), jax.tree.leaves(scanned), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)

  def test_a_killed_run_goes_on_bitwise(self):
    # Fails if the moments, the schedule's count or the data position are not restored, if a
    # checkpoint holds the state of another step, if the loop does not wait for a save when it is
    # left by an error, or if metrics.jsonl keeps lines beyond the checkpoint or loses lines before
    # it.
    with self.assertRaises(KeyboardInterrupt):
      self.fit("killed", Spy(kill_at=2))
    self.assertEqual(self.kept("killed"), [2])
    with (self.folder / "killed" / "metrics.jsonl").open("a") as file:
      # as a run that was killed later leaves it
      file.write('{"step": 2, "loss/per_token": 99.0}\n{"step": 3, "lo')
    batches = Spy()
    resumed, resumed_averages = self.fit("killed", batches)
    self.assertEqual(batches.built, [2, 3])
    self.assert_bitwise(resumed, self.whole)
    self.assertEqual(resumed_averages, self.averages)
    self.assertEqual([line["step"] for line in self.lines("killed")], [0, 1, 2, 3])
    self.assertEqual(self.lines("killed"), self.lines("whole"))
    self.assertGreater(
      max(
        np.abs(a - b).max()
        for a, b in zip(
          jax.tree.leaves(self.whole),
          jax.tree.leaves(tiny_model.make_params(StandIn())),
          strict=True,
        )
      ),
      0.05,
    )

  def test_measures_after_each_update(self):
    # Fails if a measurement sees the parameters of another step, if the last step has none, if a
    # resumed run repeats those of steps before its checkpoint, or if measuring changes what is
    # trained.
    seen = []

    def measure(step, params):
      seen.append((step, float(jnp.sum(params["matrix"]))))

    trained, averages = self.fit("measured", Spy(), after_step=measure)
    self.assert_bitwise(trained, self.whole)
    self.assertEqual(averages, self.averages)
    self.assertEqual([step for step, _ in seen], [1, 2, 3, 4])
    self.assertLen({value for _, value in seen}, 4)
    self.assertEqual(seen[-1][1], float(jnp.sum(trained["matrix"])))
    whole = list(seen)
    with self.assertRaises(KeyboardInterrupt):
      self.fit("measured twice", Spy(kill_at=3), after_step=measure)
    del seen[:]
    self.fit("measured twice", Spy(), after_step=measure)
    self.assertEqual(seen, whole[2:])

  def test_without_checkpoints(self):
    # Fails if a run that is not resumable writes checkpoints, reads those of another, or trains
    # otherwise.
    with self.assertRaises(KeyboardInterrupt):
      self.fit("free", Spy(kill_at=3))
    shutil.copytree(self.folder / "free", self.folder / "copy")
    shutil.rmtree(self.folder / "free" / "checkpoints")
    for name in ("free", "copy"):
      batches = Spy()
      trained, averages = self.fit(name, batches, resumable=False)
      self.assertEqual(batches.built, [0, 1, 2, 3])
      self.assert_bitwise(trained, self.whole)
      self.assertEqual(averages, self.averages)
      self.assertEqual(self.lines(name), self.lines("whole"))
    self.assertFalse((self.folder / "free" / "checkpoints").exists())
    self.assertEqual(self.kept("copy"), [2])
    with self.assertRaisesRegex(UserError, "step 1 is not finite .*; no checkpoint was kept"):
      self.fit("free", Spy(nan_at=1), resumable=False)

  @parameterized.parameters("largest", "metadata", "manifest")
  # orbax leaves coroutines behind
  @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
  def test_a_bad_checkpoint_is_passed_over(self, kind):
    # Fails if a checkpoint that was cut off stops the run, is taken for good, or sends the run back
    # to the start.
    shutil.copytree(self.folder / "whole", self.folder / kind)
    # the newest max_to_keep; the last state is not kept, the policy is
    self.assertEqual(self.kept(kind), [2, 3])
    newest = pathlib.Path(self.folder / kind / "checkpoints" / "3")
    files = [path for path in newest.rglob("*") if path.is_file()]
    bad = {
      "largest": lambda: max(files, key=lambda path: path.stat().st_size),
      "metadata": lambda: next(path for path in files if path.name == "_METADATA"),
      "manifest": lambda: next(path for path in files if path.name == "manifest.ocdbt"),
    }[kind]()
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    batches = Spy()
    again, _ = self.fit(kind, batches, save_every=1)
    self.assertEqual(batches.built, [2, 3])
    self.assert_bitwise(again, self.whole)
    self.assertEqual(self.lines(kind), self.lines("whole"))
    # Fails if the bad one stays in the way of the state that is saved anew at its step.
    batches = Spy()
    self.fit(kind, batches, save_every=1)
    self.assertEqual(batches.built, [3])
    gc.collect()  # orbax's coroutines, within this test

  def test_a_step_that_is_not_finite_stops_the_run(self):
    # Fails if training continues after NaN, if the message names the step after, other examples or
    # no checkpoint folder, if the bad step is written, or if its state is kept as a checkpoint.
    batches = Spy(nan_at=3, num_steps=5)
    with self.assertRaisesRegex(
      UserError,
      f"bad: .* step 3 is not finite .*{batches.keys(3)[0]} .*checkpoints",
    ) as caught:
      self.fit("bad", batches)
    self.assertIn(str(self.folder / "bad" / "checkpoints"), str(caught.exception))
    for step in (0, 1, 2, 4):
      self.assertNotIn(batches.keys(step)[0], str(caught.exception))
    self.assertEqual([line["step"] for line in self.lines("bad")], [0, 1, 2])
    self.assertEqual(self.kept("bad"), [2])

  def test_no_checkpoints_and_the_check_of_the_start(self):
    # Fails if 0 saves anyway, if check_start sees another step than the first or comes after its
    # line was written, or if its error is swallowed.
    seen = []
    self.fit(
      "none",
      Spy(num_steps=2),
      save_every=0,
      check_start=lambda averages: seen.append(dict(averages)),
    )
    self.assertEqual(self.kept("none"), [])
    self.assertEqual([{"step": 0, **averages} for averages in seen], self.lines("none")[:1])

    def refuse(averages):
      raise UserError("not the reference")

    with self.assertRaisesRegex(UserError, "not the reference"):
      self.fit("refused", Spy(), save_every=0, check_start=refuse)
    self.assertEqual(self.lines("refused"), [])


class ScheduleTest(parameterized.TestCase):
  def schedule(self, num_steps, **changes):
    section = config_schema.default().sft.optimizer
    section.update(learning_rate=0.5, **changes)
    made = optimizer_lib.make_schedule(section, num_steps)
    return [float(made(step)) for step in range(num_steps + 1)]

  @parameterized.parameters(
    ("cosine", [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)]),
    ("linear", [1 - i / 8 for i in range(9)]),
    ("constant", [1.0] * 9),
  )
  def test_values(self, name, after):
    # Fails if the first update has no rate, if warm-up takes another share, if the peak is not
    # reached, or if the decay does not end at zero with the last step.
    expected = [0.5 * x for x in [1 / 3, 2 / 3, *after]]
    np.testing.assert_allclose(
      self.schedule(10, schedule=name, warmup_fraction=0.2), expected, rtol=1e-5, atol=1e-8
    )

  def test_no_warmup(self):
    # Fails if a share that rounds to no step still takes the first step's rate away.
    self.assertEqual(self.schedule(4, schedule="constant", warmup_fraction=0.1), [0.5] * 5)
    self.assertAlmostEqual(self.schedule(4, schedule="cosine", warmup_fraction=0.0)[0], 0.5)
    self.assertEqual(self.schedule(1, schedule="constant", warmup_fraction=1.0), [0.5, 0.5])

  def test_unknown_name(self):
    # Fails if an unknown schedule is taken for one of the three.
    with self.assertRaisesRegex(
      UserError, "optimizer.schedule='cosin' must be one of cosine, linear, constant"
    ):
      self.schedule(4, schedule="cosin")


class OptimizerTest(absltest.TestCase):
  def updates(self, gradient, **changes):
    """The first update of every parameter, for gradients that are constant per parameter."""
    section = config_schema.default().sft.optimizer
    section.update(
      learning_rate=0.1, schedule="constant", warmup_fraction=0.0, clip_norm=1e9, **changes
    )
    made, params = (
      optimizer_lib.make_optimizer(section, 4),
      tiny_model.make_params(tiny_model.model(num_layers=1)),
    )

    def first(params):
      return made.update(
        jax.tree.map(lambda x: gradient * jnp.ones_like(x), params), made.init(params), params
      )[0]

    return params, jax.jit(first)(params)

  def test_weight_decay_spares_scales(self):
    # Fails if norms' scales decay, if another parameter does not, or if the decay is not times the
    # rate.
    params, plain = self.updates(1.0)
    _, decayed = self.updates(1.0, weight_decay=0.5)
    scales = 0
    for (path, x), a, b in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(plain),
      jax.tree.leaves(decayed),
      strict=True,
    ):
      spared = path[-1].key == "scale"
      scales += spared
      np.testing.assert_allclose(b - a, np.zeros_like(x) if spared else -0.1 * 0.5 * x, atol=1e-7)
    self.assertEqual(scales, 3)

  def test_clips_as_optax_does(self):
    # Fails if gradients within the norm are touched, if those beyond are scaled otherwise, or if
    # the states differ, so that a checkpoint of one could not be read by the other.
    grads = jax.tree.map(lambda x: 0.1 * x, tiny_model.make_params(tiny_model.model()))
    norm = float(optax.tree.norm(grads))
    for most in (0.3 * norm, 3.0 * norm):
      ours, theirs = optimizer_lib.clip_by_global_norm(most), optax.clip_by_global_norm(most)
      self.assertEqual(ours.init(grads), theirs.init(grads))
      got, expected = (
        jax.jit(lambda x, made=made: made.update(x, made.init(x))[0])(grads)
        for made in (ours, theirs)
      )
      for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)

  def test_clipping_and_betas(self):
    # Fails if clipping is missing or comes after AdamW, or if the betas are swapped.
    section = config_schema.default().sft.optimizer
    section.update(
      learning_rate=0.1,
      schedule="constant",
      warmup_fraction=0.0,
      clip_norm=1.0,
      beta1=0.8,
      beta2=0.9,
    )
    made, x = optimizer_lib.make_optimizer(section, 4), {"w": jnp.zeros(4)}

    @jax.jit
    def second(clipped, free):
      state = made.init(x)
      _, state = made.update({"w": clipped}, state, x)
      return made.update({"w": free}, state, x)[0]["w"]

    # norm 6: clipped to 0.5 each, and so is 2 g, so that both steps have the rate's size
    g = jnp.full(4, 3.0)
    np.testing.assert_allclose(second(g, 2 * g), np.full(4, -0.1), rtol=1e-4)
    # A second gradient of norm 0.25 is not clipped; m and v by hand.
    m, v = 0.8 * 0.2 * 0.5 + 0.2 * 0.125, 0.9 * 0.1 * 0.5**2 + 0.1 * 0.125**2
    expected = -0.1 * (m / (1 - 0.8**2)) / np.sqrt(v / (1 - 0.9**2))
    np.testing.assert_allclose(second(g, jnp.full(4, 0.125)), np.full(4, expected), rtol=1e-4)


if __name__ == "__main__":
  absltest.main()
