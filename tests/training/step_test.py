"""One train step in float64: accumulated or sharded, it equals one step on one device."""

import functools

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from synthneg_jax.core import losses
from synthneg_jax.core.geometry import RowOptions, Rows
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.models import layer_stacking
from synthneg_jax.runtime import config_schema, device_mesh
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training import batches, objectives, optimizer
from synthneg_jax.training import step as step_lib
from synthneg_jax.training.batch import Example, PairInTree, Shape
from tests import tiny_model

# 32 tokens and 16 wide, so that every axis divides by 2 and the width by 8; one layer compiles
# fastest.
MODEL = tiny_model.model(dtype="float64", param_dtype="float64", vocab_size=32, num_layers=1)
SHAPE = Shape(rows=8, length=12, scored=9, pairs=2, branches=3)


def make_batch() -> batch_lib.Batch:
  """Six trees with one or two pairs in eight rows, two of them empty, with unequal counts."""
  rng = np.random.default_rng(0)

  def ids(size):
    return rng.integers(0, 32, size).tolist()

  examples = []
  for number in range(6):
    branches = tuple(Branch(3, ids(1 + (number + b) % 3)) for b in range(2 + number % 2))
    pairs = tuple(PairInTree(c, 0, *-rng.uniform(1.0, 9.0, 2)) for c in range(1, len(branches)))
    examples.append(Example(Tree(ids(5), branches), pairs))
  return batch_lib.build(examples, SHAPE)


def losses_of(rows) -> list[float]:
  """The losses of three steps of six trees each, packed into these rows."""
  rng = np.random.default_rng(4)

  def ids(size):
    return rng.integers(0, 32, size).tolist()

  trees = [Tree(ids(rng.integers(2, 6)), (Branch(2, ids(3)), Branch(1, ids(2)))) for _ in range(18)]
  planned = batches.Batches(
    [Example(tree, (PairInTree(0, 1, -2.0, -3.0),)) for tree in trees],
    [str(number) for number in range(18)],
    schedule=batches.Schedule(batch_size=6, num_epochs=1),
    row_options=RowOptions(),
    choose_once=lambda choose: rows or choose(),
  )
  section = config_schema.default().dpo.optimizer
  section.update(learning_rate=0.05, schedule="constant", warmup_fraction=0.0)
  made, mesh = optimizer.make_optimizer(section, 3), tiny_model.one_device_mesh()
  preference = objectives.Preference(
    loss=functools.partial(losses.dpo_loss, beta=0.3), beta=0.3, nll_weight=0.2
  )
  objective = objectives.make_preference(MODEL, preference, eos_ids=(2,))
  shardings = step_lib.state_shardings(MODEL, made, mesh)
  step = step_lib.make_step(
    objective, made, shardings, mesh=mesh, num_microbatches=planned.rows.microbatches
  )
  state, found = step_lib.make_init(made, shardings)(tiny_model.make_params(MODEL)), []
  for number in range(planned.num_steps):
    state, metrics = step(
      state, device_mesh.place(planned.build(number), step_lib.batch_shardings(mesh))
    )
    total, count = next(value for name, value in metrics.items() if name.startswith("loss"))
    found.append(float(total) / float(count))
  return found


def take_step(mesh, num_microbatches: int = 1):
  """(metrics, state) after one step from the same parameters, both as numpy."""
  section = config_schema.default().dpo.optimizer
  section.update(learning_rate=0.05, weight_decay=0.1, schedule="constant", warmup_fraction=0.0)
  made = optimizer.make_optimizer(section, 4)
  shardings = step_lib.state_shardings(MODEL, made, mesh)
  loss = functools.partial(losses.dpo_loss, beta=0.3)
  preference = objectives.Preference(loss=loss, beta=0.3, nll_weight=0.2)
  objective = objectives.make_preference(MODEL, preference, eos_ids=(2,))
  params = jax.device_put(
    tiny_model.make_params(MODEL), device_mesh.shardings(mesh, MODEL.logical_axes())
  )
  state = step_lib.make_init(made, shardings)(params)
  batch = jax.device_put(make_batch(), step_lib.batch_shardings(mesh))
  state, metrics = step_lib.make_step(
    objective, made, shardings, mesh=mesh, num_microbatches=num_microbatches
  )(state, batch)
  for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
    if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
      raise AssertionError(f"{leaf.shape} has sharding {leaf.sharding}, not {sharding}")
  return jax.tree.map(np.asarray, (metrics, state))


class StepTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(jax.enable_x64(True))
    # Every program here runs once: compiling is all their time.
    cls.addClassCleanup(jax.config.update, "jax_disable_most_optimizations", False)
    jax.config.update("jax_disable_most_optimizations", True)
    cls.metrics, cls.state = take_step(tiny_model.one_device_mesh())

  def assert_same(self, metrics, state, atol):
    found, wanted = (metrics, state), (self.metrics, self.state)
    self.assertEqual(jax.tree.structure(found), jax.tree.structure(wanted))
    for (path, got), expected in zip(
      jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
      np.testing.assert_allclose(
        got, expected, rtol=1e-9, atol=atol, err_msg=jax.tree_util.keystr(path)
      )

  def test_the_step_moves_all_parameters(self):
    # Fails if the updates are not applied, if a parameter has no gradient, or if the step is not
    # counted; the tests below would compare parameters that stood still.
    before = jax.tree.map(np.asarray, layer_stacking.unstack(tiny_model.make_params(MODEL)))
    for old, new in zip(
      jax.tree.leaves(before), jax.tree.leaves(self.state["params"]), strict=True
    ):
      self.assertGreater(np.abs(new - old).max(), 0.01)
      self.assertLess(np.abs(new - old).max(), 0.1)
    self.assertEqual(int(self.state["step"]), 1)
    self.assertEqual(float(self.metrics["loss/per_pair"][1]), 9)
    self.assertGreater(float(self.metrics["grad_norm"][0]), 0.1)

  def test_accumulation_changes_nothing(self):
    # Fails if microbatches are averaged, if the last one's gradients or metrics are returned, or
    # if counts are split.
    self.assert_same(*take_step(tiny_model.one_device_mesh(), num_microbatches=2), atol=1e-9)

  def test_rows_change_nothing(self):
    # Fails if a step's update depends on how its trees are packed: on their length,
    # number or order, or on microbatches.
    chosen = losses_of(None)
    self.assertLen(chosen, 3)
    self.assertGreater(np.ptp(chosen), 1e-3)
    np.testing.assert_allclose(losses_of(Rows(33, (4, 6), 2)), chosen, atol=1e-9)

  def test_accumulation_takes_batches_without_pairs(self):
    # Fails if microbatches of an empty array are given a size that has to be guessed from it.
    examples = [Example(Tree([1, 2 + i], (Branch(2, [3, 4]),))) for i in range(2)]
    batch = batch_lib.build(examples, Shape(rows=2, length=4, scored=2, pairs=0, branches=1))
    made, mesh = (
      optimizer.make_optimizer(config_schema.default().sft.optimizer, 4),
      tiny_model.one_device_mesh(),
    )
    shardings = step_lib.state_shardings(MODEL, made, mesh)

    def loss(num_microbatches):
      state = step_lib.make_init(made, shardings)(tiny_model.make_params(MODEL))
      step = step_lib.make_step(
        objectives.make_sft(MODEL), made, shardings, mesh=mesh, num_microbatches=num_microbatches
      )
      return np.divide(*jax.device_get(step(state, batch)[1]["loss/per_token"]))

    np.testing.assert_allclose(loss(2), loss(1), rtol=1e-12)

  @pytest.mark.slow  # compiles for eight devices
  @parameterized.parameters((8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8))
  def test_a_mesh_changes_nothing(self, *sizes):
    # Fails if a device's part of the loss is a mean of its own rows, if gradients are not summed
    # over devices, or if moments are sharded unlike their parameters (take_step checks each
    # leaf of the state).
    self.assert_same(*take_step(device_mesh.make_mesh(*sizes)), atol=1e-9)


class MemoryTest(absltest.TestCase):
  def test_against_what_the_compiler_says(self):
    # Fails if what a token keeps is off by half: rows would then be cut into needless microbatches,
    # or exhaust the memory.
    model = tiny_model.model(
      d_model=64, num_layers=4, num_kv_heads=4, num_heads=4, head_dim=16, d_ff=192, vocab_size=256
    )
    tree = Tree([1], (Branch(1, list(range(127))),))
    batch = batch_lib.build(
      [Example(tree)] * 8, Shape(rows=8, length=128, scored=127, pairs=0, branches=1)
    )
    objective = objectives.make_sft(model, 0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    gradient = jax.jit(jax.grad(lambda params, batch: objective(params, batch)[0]))
    used = (
      gradient.lower(model.abstract_params(), abstract)
      .compile()
      .memory_analysis()
      .temp_size_in_bytes
    )
    self.assertBetween(
      step_lib.bytes_per_token(model.config, 128) * batch.trees.token.size, 0.8 * used, 2 * used
    )


class ShardingsTest(absltest.TestCase):
  def test_state_and_batch_lie_as_the_rules_say(self):
    # Fails if moments are replicated, if layers are stacked where they are unrolled, or unstacked
    # where they are scanned or kept, if counts are split over rows, or if a batch's rows are not
    # split.
    mesh = device_mesh.make_mesh(2, 2, 2)
    made = optimizer.make_optimizer(config_schema.default().sft.optimizer, 4)

    def query(model, **kwargs):
      found = jax.tree_util.tree_leaves_with_path(
        step_lib.state_shardings(model, made, mesh, **kwargs)
      )
      return [
        tuple(sharding.spec)
        for path, sharding in found
        if jax.tree_util.keystr(path).endswith("['query']")
      ]

    stacked = [(None, "fsdp", "tensor")] * 3  # two moments and the parameter
    self.assertEqual(
      query(tiny_model.model()), [("fsdp", "tensor")] * 3 * tiny_model.CONFIG.num_layers
    )
    self.assertEqual(query(tiny_model.model(scan_layers=True)), stacked)
    self.assertEqual(query(tiny_model.model(), stacked=True), stacked)
    shardings = step_lib.state_shardings(tiny_model.model(), made, mesh)
    self.assertEqual(tuple(shardings["step"].spec), ())
    batch = step_lib.batch_shardings(mesh)
    self.assertEqual(tuple(batch.trees.spec), (("slice", "data", "fsdp"),))
    self.assertEqual((tuple(batch.num_scored.spec), tuple(batch.num_pairs.spec)), ((), ()))


if __name__ == "__main__":
  absltest.main()
