"""Programs on meshes of eight devices equal those on one: losses, gradients, log-probs, tokens."""

import functools
import itertools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from etils import epath

from synthneg_jax.core import losses
from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.geometry import Lanes
from synthneg_jax.core.tree import Branch, PackedTrees, Tree
from synthneg_jax.decoding import engine as engine_lib
from synthneg_jax.decoding.decode import Stops
from synthneg_jax.decoding.engine import Engine, Trunk
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.runtime import device_mesh
from synthneg_jax.runtime import keys as keys_lib
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training import objectives, reference
from synthneg_jax.training import step as step_lib
from synthneg_jax.training.batch import Example, PairInTree, Shape
from tests import tiny_model

pytestmark = pytest.mark.slow  # compiles much

# Eight heads, 32 tokens, 24 wide feed-forward: every split dimension divides by 8.
MODEL = tiny_model.model(
  vocab_size=32, num_heads=8, num_kv_heads=8, head_dim=2, scan_layers=True, remat="selective"
)
SHAPE = Shape(rows=8, length=16, scored=12, pairs=3, branches=4)
NEW, EOS = 8, 3
CDF_EDGE = 1e-5  # draws this close to an edge of the CDF may differ between programs
MESHES = (  # data, fsdp, tensor, slices
  (8, 1, 1, 1),
  (1, 8, 1, 1),
  (1, 1, 8, 1),
  (2, 2, 2, 1),
  (2, 2, 1, 2),
)


def make_examples() -> list[Example]:
  rng = np.random.default_rng(0)

  def ids(size):
    return rng.integers(4, 32, size).tolist()

  examples = []
  for number in range(7):  # one of the eight rows stays empty
    branches = tuple(
      Branch(1 + (number + b) % 4, ids(1 + (number + b) % 3)) for b in range(2 + number % 3)
    )
    pairs = tuple(PairInTree(0, r, *-rng.uniform(1.0, 9.0, 2)) for r in range(1, len(branches)))
    examples.append(Example(Tree(ids(5), branches), pairs))
  return examples


def make_trunks() -> list[Trunk]:
  rng = np.random.default_rng(1)
  trunks = []
  for i in range(10):
    ids = rng.integers(4, 32, size=rng.integers(2, 9)).tolist()
    forks = [int(fork) for fork in rng.integers(1, len(ids) + 1, size=rng.integers(1, 5))]
    keys = [
      keys_lib.draw_key(0, "sharding", 0, f"p{i}", keys_lib.hash_ids(ids[:f]), r)
      for r, f in enumerate(forks)
    ]
    trunks.append(Trunk(ids, forks, np.stack(keys)))
  return trunks


def on_mesh(mesh):
  layout = device_mesh.shardings(mesh, MODEL.logical_axes())
  return jax.device_put(tiny_model.make_params(MODEL), layout), layout


@functools.cache
def gradients(mesh):
  """Returns {objective: (loss, metrics, gradients)} of one batch."""
  params, layout = on_mesh(mesh)
  preference = objectives.make_preference(
    MODEL,
    objectives.Preference(
      loss=functools.partial(losses.dpo_loss, beta=0.3), beta=0.3, nll_weight=0.2
    ),
    eos_ids=(EOS,),
  )
  batch = jax.device_put(batch_lib.build(make_examples(), SHAPE), step_lib.batch_shardings(mesh))

  def both(params, batch):
    made = {}
    for name, objective in {"sft": objectives.make_sft(MODEL), "preference": preference}.items():
      (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params, batch)
      made[name] = loss, metrics, grads
    return made

  results = (device_mesh.replicated(mesh), device_mesh.replicated(mesh), layout)
  run = jax.jit(
    device_mesh.under(mesh, both),
    in_shardings=(layout, step_lib.batch_shardings(mesh)),
    out_shardings={"sft": results, "preference": results},
  )
  return jax.tree.map(np.asarray, run(params, batch))


@functools.cache
def scores(mesh) -> dict[str, np.ndarray]:
  """The reference's log-probs by branch."""
  store = reference.Store(epath.Path(tempfile.mkdtemp()) / "scores.npz")
  trees = [example.tree for example in make_examples()]
  reference.score(
    MODEL, on_mesh(mesh)[0], trees, store=store, packing=reference.Packing(mesh, SHAPE.length)
  )
  names = [
    reference.branch_key(tree.trunk, branch.fork, branch.ids)
    for tree in trees
    for branch in tree.branches
  ]
  return {name: store[name] for name in names}


@functools.cache
def draws(mesh):
  """By trunk, (ids, log-probs) of its items."""
  engine = Engine(MODEL, mesh, Stops((EOS,)), lanes=Lanes(8, 2), max_new_tokens=NEW)
  made = dict(engine.run(on_mesh(mesh)[0], make_trunks(), Sampling(temperature=1.0)))
  return [[(item.ids.tolist(), item.logp) for item in made[index]] for index in range(len(made))]


@jax.jit
def _edge_distance(params, token_T, size, uniform):
  """Distance of a uniform number to the nearest edge of the CDF after `size` tokens."""
  position_T = jnp.arange(token_T.shape[0])
  trees = PackedTrees(
    token=token_T[None],
    position=position_T[None],
    leave=jnp.full_like(token_T, token_T.shape[0])[None],
    parent=jnp.zeros_like(token_T)[None],
    scored=jnp.zeros(token_T.shape, bool)[None],
  )
  h_1TD, _ = MODEL.hidden(params, trees)
  edges = jnp.cumsum(jax.nn.softmax(MODEL.logits(params, h_1TD[0, size - 1])))
  return jnp.min(jnp.abs(edges - uniform))


def edge_distance(trunk: Trunk, item: int, ids: list[int]) -> float:
  """The margin of the draw of ids[-1], in a program without cache or lanes."""
  sequence = [*trunk.ids[: trunk.forks[item]], *ids[:-1]]
  key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(trunk.keys[item])), len(ids) - 1)
  token_T = np.zeros(8 + NEW, np.int32)
  token_T[: len(sequence)] = sequence
  return float(
    _edge_distance(tiny_model.make_params(MODEL), token_T, len(sequence), jax.random.uniform(key))
  )


class ShardingTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # Every program here runs once or twice: compiling is all their time.
    cls.addClassCleanup(jax.config.update, "jax_disable_most_optimizations", False)
    jax.config.update("jax_disable_most_optimizations", True)

  def assert_close(self, found, wanted):
    self.assertEqual(jax.tree.structure(found), jax.tree.structure(wanted))
    for (path, got), expected in zip(
      jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
      np.testing.assert_allclose(
        got, expected, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path)
      )

  def test_what_is_compared_is_not_nothing(self):
    # Fails if a gradient is zero everywhere, if there is no pair, or if all drawn branches are
    # alike: the tests below would compare nothing.
    one = gradients(tiny_model.one_device_mesh())
    for name, (loss, _, grads) in one.items():
      self.assertGreater(float(loss), 0.1, name)
      for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        self.assertGreater(np.abs(leaf).max(), 1e-3, name + jax.tree_util.keystr(path))
    self.assertEqual(float(one["preference"][1]["loss/per_pair"][1]), 13.0)
    ends = {len(ids) for items in draws(tiny_model.one_device_mesh()) for ids, _ in items}
    self.assertGreater(len(ends), 3)

  @parameterized.parameters(*MESHES)
  def test_losses_and_gradients(self, *sizes):
    # Fails if a device's part of a loss is a mean of its own rows, if sums are not global, or if a
    # parameter's part is taken for the whole.
    self.assert_close(
      gradients(device_mesh.make_mesh(*sizes)), gradients(tiny_model.one_device_mesh())
    )

  @parameterized.parameters(*MESHES[:4])
  def test_reference_scores(self, *sizes):
    # Fails if rows come back in another order than they were sent, or if the scores of a shard's
    # rows are lost.
    self.assert_close(scores(device_mesh.make_mesh(*sizes)), scores(tiny_model.one_device_mesh()))

  @parameterized.parameters(*MESHES[:4])
  def test_drawn_tokens(self, *sizes):
    # Fails if a lane's items or its cache leave their device, or if a draw depends on the lane.
    trunks, at_an_edge = make_trunks(), 0
    found, wanted = draws(device_mesh.make_mesh(*sizes)), draws(tiny_model.one_device_mesh())
    for i, trunk in enumerate(trunks):
      self.assertLen(found[i], len(trunk.forks))
      for item, ((got, got_logp), (ids, logp)) in enumerate(zip(found[i], wanted[i], strict=True)):
        same = next(
          (n for n, pair in enumerate(itertools.zip_longest(got, ids)) if pair[0] != pair[1]),
          len(ids),
        )
        np.testing.assert_allclose(got_logp[:same], logp[:same], atol=1e-5)
        if got != ids:
          self.assertLess(edge_distance(trunk, item, ids[: same + 1]), CDF_EDGE, (got, ids))
          at_an_edge += 1
    self.assertLessEqual(at_an_edge, 2)


class DecodingTest(absltest.TestCase):
  def test_decoding_reads_less_and_draws_the_same(self):
    # Fails if matrices stay in float32 or split over fsdp (each token would read twice the bytes,
    # or gather them), or if what is cast once differs from what every product would cast.
    mesh = device_mesh.make_mesh(2, 2, 2)
    model = tiny_model.model(
      vocab_size=32, num_heads=8, num_kv_heads=8, head_dim=2, scan_layers=True, dtype="bfloat16"
    )
    params = jax.device_put(
      tiny_model.make_params(model), device_mesh.shardings(mesh, model.logical_axes())
    )
    decoding = device_mesh.decoding(mesh)
    self.assertEqual(
      tuple(decoding.shape.items()), (("slice", 1), ("data", 4), ("fsdp", 1), ("tensor", 2))
    )
    self.assertEqual(decoding.devices.reshape(-1).tolist(), mesh.devices.reshape(-1).tolist())
    layout = engine_lib.params_shardings(model, decoding)
    read = jax.jit(functools.partial(engine_lib.cast_for_decoding, model), out_shardings=layout)(
      params
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(read):
      is_norm = path[-1].key == "scale"
      self.assertEqual(leaf.dtype, jnp.float32 if is_norm else jnp.bfloat16, path)
      self.assertEqual(
        leaf.nbytes // leaf.addressable_shards[0].data.nbytes, 1 if is_norm else 2, path
      )

    trees = tree_lib.pack([[example.tree] for example in make_examples()], SHAPE.length)
    hidden = jax.jit(lambda params: model.hidden(params, trees)[0])
    one = jax.devices()[0]
    np.testing.assert_array_equal(
      *(hidden(jax.device_put(given, one)).astype(np.float32) for given in (params, read))
    )


if __name__ == "__main__":
  absltest.main()
