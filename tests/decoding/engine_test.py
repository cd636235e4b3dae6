"""The engine against a naive loop that recomputes the whole sequence for every token."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import geometry
from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.geometry import Lanes
from synthneg_jax.decoding import engine as engine_lib
from synthneg_jax.decoding.decode import Stops
from synthneg_jax.decoding.engine import Engine, Trunk
from synthneg_jax.decoding.sampling import Sampling, draw, inverse_cdf
from synthneg_jax.runtime import device_mesh
from synthneg_jax.runtime import keys as keys_lib
from tests import tiny_model

EOS = 3
NEW = 12
# draws this close to an edge of the CDF may differ between programs of other shapes
CDF_EDGE = 1e-5


def make_trunks(rng, count=7):
  trunks = []
  for i in range(count):
    ids = rng.integers(4, 31, size=rng.integers(2, 9))
    forks = [int(f) for f in rng.integers(1, len(ids) + 1, size=rng.integers(1, 7))]
    keys = np.stack(
      [
        keys_lib.draw_key(0, "test", 0, f"p{i}", keys_lib.hash_ids(ids[:f]), r)
        for r, f in enumerate(forks)
      ]
    )
    trunks.append(Trunk([int(t) for t in ids], forks, keys))
  return trunks


@jax.jit
def _next_logits(params, ids, size):
  trees = jax.tree.map(jnp.asarray, tree_lib.empty_rows(1, ids.shape[0]))
  position = jnp.arange(ids.shape[0])[None]
  trees = dataclasses.replace(
    trees, token=ids[None], position=position, leave=jnp.full_like(position, position.shape[1])
  )
  h, _ = tiny_model.model().hidden(params, trees)
  return tiny_model.model().logits(params, h[0, size - 1])


_draw = jax.jit(
  lambda logits, key, at, sampling: draw(
    logits, jax.random.fold_in(jax.random.wrap_key_data(key), at), sampling
  ),
  static_argnums=3,
)


def naive(params, trunk, item, sampling, stop_table=None):
  """The oracle: one branch, token by token, without cache, lanes or slots."""
  ids, new, logps, state = list(trunk.ids[: trunk.forks[item]]), [], [], 0
  while True:
    padded = np.zeros(24, np.int32)
    padded[: len(ids)] = ids
    logits = _next_logits(params, jnp.asarray(padded), len(ids))
    token, logp, _ = _draw(logits, trunk.keys[item], len(new), sampling)
    ids.append(int(token))
    new.append(int(token))
    logps.append(float(logp))
    if int(token) == EOS:
      return new, logps, "eos"
    if stop_table is not None:
      state = stop_table[state, int(token)]
      if state == len(stop_table) - 1:
        return new, logps, "stop"
    if len(new) == NEW:
      return new, logps, "length"


def near_edge(params, trunk, item, ids, sampling):
  """Whether the draw of ids[-1] is within CDF_EDGE of an edge of the naive loop's CDF."""
  padded = np.zeros(24, np.int32)
  sequence = [*trunk.ids[: trunk.forks[item]], *ids[:-1]]
  padded[: len(sequence)] = sequence
  scaled = _next_logits(params, jnp.asarray(padded), len(sequence)) / sampling.temperature
  key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(trunk.keys[item])), len(ids) - 1)
  return (
    float(jnp.min(jnp.abs(jnp.cumsum(jax.nn.softmax(scaled)) - jax.random.uniform(key)))) < CDF_EDGE
  )


class EngineTest(parameterized.TestCase):
  @parameterized.parameters(
    Sampling(temperature=0.0),
    Sampling(temperature=0.8),
    Sampling(temperature=1.3, top_k=5),
    Sampling(temperature=1.0, top_p=0.7),
  )
  def test_equals_naive_loop(self, sampling):
    # Fails if a branch sees trunk tokens at or after its fork, if a refilled slot keeps its suffix,
    # or if keys move.
    params, trunks = tiny_model.params(), make_trunks(np.random.default_rng(0))
    engine = Engine(
      tiny_model.model(),
      tiny_model.one_device_mesh(),
      Stops((EOS,)),
      lanes=Lanes(3, 2),
      max_new_tokens=NEW,
    )
    results = dict(engine.run(params, trunks, sampling))
    self.assertSameElements(results, range(len(trunks)))
    finishes = set()
    for i, trunk in enumerate(trunks):
      self.assertLen(results[i], len(trunk.forks))
      for item, generation in enumerate(results[i]):
        ids, logps, finish = naive(params, trunk, item, sampling)
        self.assertEqual(generation.ids.tolist(), ids)
        np.testing.assert_allclose(generation.logp, logps, atol=1e-4)
        self.assertEqual(generation.finish_reason, finish)
        finishes.add(finish)
    self.assertEqual(finishes, {"eos", "length"})

  def test_stop_strings_end_branches(self):
    # Fails if the automaton's state is not carried from token to token, or from prefill to the
    # loop.
    table = np.zeros((3, 31), np.int32)  # stops at an odd token followed by an even one
    table[:, 1::2] = 1
    table[1, 0::2] = 2
    table[2] = 2
    params, trunks = tiny_model.params(), make_trunks(np.random.default_rng(1))
    engine = Engine(
      tiny_model.model(),
      tiny_model.one_device_mesh(),
      Stops((EOS,), table),
      lanes=Lanes(3, 2),
      max_new_tokens=NEW,
    )
    finishes = set()
    for i, generations in engine.run(params, trunks, Sampling(temperature=1.0)):
      for item, generation in enumerate(generations):
        ids, _, finish = naive(params, trunks[i], item, Sampling(temperature=1.0), table)
        self.assertEqual((generation.ids.tolist(), generation.finish_reason), (ids, finish))
        finishes.add(finish)
    self.assertIn("stop", finishes)

  def assert_same_draws(self, params, trunks, order, engine, sampling, other_params=None):
    """Compares with the shared geometry's tokens, except for draws at an edge of the CDF."""
    reference = Engine(
      tiny_model.model(),
      tiny_model.one_device_mesh(),
      Stops((EOS,)),
      lanes=Lanes(3, 2),
      max_new_tokens=NEW,
    )
    expected, compared = dict(reference.run(params, trunks, sampling)), 0
    for i, generations in engine.run(other_params or params, [trunks[j] for j in order], sampling):
      for item, (got, wanted) in enumerate(zip(generations, expected[order[i]], strict=True)):
        got, wanted = got.ids.tolist(), wanted.ids.tolist()
        if got != wanted:
          first = next(n for n in range(len(wanted)) if got[: n + 1] != wanted[: n + 1])
          self.assertTrue(
            near_edge(params, trunks[order[i]], item, wanted[: first + 1], sampling), (got, wanted)
          )
        compared += 1
    self.assertEqual(compared, sum(len(trunk.forks) for trunk in trunks))

  @parameterized.parameters(
    (1, 1, 0, False), (1, 1, 0, True), (5, 4, 3, False), (3, 2, 0, True), (8, 3, 1, True)
  )
  def test_tokens_do_not_depend_on_batch_mates(self, lanes, slots, refill, scan):
    # Fails if a key depends on the lane, the slot, the order of trunks or when lanes are filled.
    params, trunks = tiny_model.params(), make_trunks(np.random.default_rng(2))
    order = np.random.default_rng(lanes).permutation(len(trunks))
    other = Engine(
      tiny_model.model(scan_layers=scan),
      tiny_model.one_device_mesh(),
      Stops((EOS,)),
      lanes=Lanes(lanes, slots, refill=refill),
      max_new_tokens=NEW,
    )
    self.assert_same_draws(params, trunks, order, other, Sampling(temperature=1.0))

  def test_steps_are_those_foreseen(self):
    # Fails if the engine takes other steps than core/geometry.py counts, or if trunks with most
    # items do not begin.
    params, trunks = tiny_model.params(), make_trunks(np.random.default_rng(5), count=12)
    engine = Engine(
      tiny_model.model(),
      tiny_model.one_device_mesh(),
      Stops((EOS,)),
      lanes=Lanes(3, 2, refill=2),
      max_new_tokens=NEW,
    )
    made = dict(engine.run(params, trunks, Sampling(temperature=1.0)))
    steps = [[len(one.ids) - 1 for one in made[i] if len(one.ids) > 1] for i in range(len(trunks))]
    order = sorted(range(len(trunks)), key=lambda i: -len(trunks[i].forks))
    expected, _ = geometry.decoding_time([steps[i] for i in order], 3, 2, refill=2)
    self.assertEqual(engine.stats["steps"], expected)
    self.assertEqual(engine.stats["busy_slots"], sum(map(sum, steps)))

  @parameterized.parameters(3, 8)
  def test_a_mesh_changes_nothing(self, devices):
    # Fails if lanes are not a multiple of the row shards, or a lane's items leave their device.
    params, trunks = tiny_model.params(), make_trunks(np.random.default_rng(3), count=9)
    mesh = device_mesh.make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
    other = Engine(tiny_model.model(), mesh, Stops((EOS,)), lanes=Lanes(32, 2), max_new_tokens=NEW)
    other_params = jax.device_put(
      params, device_mesh.shardings(mesh, tiny_model.model().logical_axes())
    )
    self.assert_same_draws(
      params, trunks, range(len(trunks)), other, Sampling(temperature=1.0), other_params
    )

  @parameterized.parameters((1, 32), (8, 80))
  def test_few_trunks_compile_few_programs(self, devices, lanes):
    # Fails if each number of trunks is compiled for anew, as credit's rounds would have it, or if
    # few trunks take all lanes.
    mesh = device_mesh.make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
    engine = Engine(
      tiny_model.model(), mesh, Stops((EOS,)), lanes=Lanes(lanes, 2), max_new_tokens=NEW
    )
    params, [trunk], specs = tiny_model.params(), make_trunks(np.random.default_rng(4), count=1), []
    note = mock.patch.object(engine_lib, "programs", lambda spec, mesh: specs.append(spec))
    with note, mock.patch.object(engine, "_cast", lambda params: params):
      for count in range(1, lanes + 1):
        with self.assertRaises(AttributeError):  # of the programs that were not made
          next(engine.run(params, [trunk] * count, Sampling(temperature=1.0)))
        self.assertGreaterEqual(specs[-1].geometry.lanes, count)
    self.assertLessEqual(len(set(specs)), 4)
    self.assertEqual({spec.geometry.lanes % devices for spec in specs}, {0})
    self.assertLessEqual(specs[0].geometry.lanes, max(lanes // 16, devices))

  def test_padding_of_the_vocabulary_is_never_drawn(self):
    # Fails if ids that the tokenizer does not know can be drawn.
    params, trunks = tiny_model.params(), make_trunks(np.random.default_rng(4))
    engine = Engine(
      tiny_model.model(),
      tiny_model.one_device_mesh(),
      Stops((EOS,), None, 20),
      lanes=Lanes(3, 2),
      max_new_tokens=NEW,
    )
    with jax.debug_nans(False):
      made = dict(engine.run(params, trunks, Sampling(temperature=1.5)))
    drawn = {
      int(token)
      for generations in made.values()
      for generation in generations
      for token in generation.ids
    }
    self.assertGreater(len(drawn), 10)
    self.assertLess(max(drawn), 20)

  def test_inverse_cdf_in_two_levels(self):
    # Fails if a block is left out or counted twice, or if rounding at a block's edge picks a token
    # of probability 0.
    rng = np.random.default_rng(0)
    prob = rng.random(3000).astype(np.float32) * (rng.random(3000) < 0.1)
    prob[::256] = 0.0
    edges = np.cumsum(prob.astype(np.float64)) / prob.sum(dtype=np.float64)
    uniforms = np.concatenate([rng.random(2000), edges[255::256] - 1e-9]).astype(np.float32)
    uniforms = np.clip(uniforms, 0.0, np.float32(1 - 2**-24))
    got = np.asarray(jax.jit(jax.vmap(inverse_cdf, (None, 0)))(prob, uniforms))
    self.assertTrue(np.all(prob[got] > 0))
    expected = np.searchsorted(edges, uniforms, side="right")
    near = np.min(np.abs(edges[None] - uniforms[:, None]), axis=1) < CDF_EDGE
    np.testing.assert_array_equal(got[~near], expected[~near])
    self.assertGreater(np.sum(~near), 1500)

  def test_drawn_logp_is_of_the_tempered_distribution(self):
    # Fails if the log-prob as drawn is the untempered one.
    logits = jnp.asarray([0.0, 1.0, 3.0, -1.0])
    token, logp, drawn = draw(logits, jax.random.key(0), Sampling(temperature=0.5, top_k=2))
    kept = np.array([-np.inf, 2.0, 6.0, -np.inf])
    expected = kept - np.log(np.exp(2.0) + np.exp(6.0))
    np.testing.assert_allclose(drawn, expected[int(token)], rtol=1e-5)
    np.testing.assert_allclose(logp, jax.nn.log_softmax(logits)[int(token)], rtol=1e-6)

  def test_more_tokens_than_there_are(self):
    # Fails if top_k beyond the vocabulary is an error, or drops a token.
    logits, key = jnp.asarray([0.0, 1.0, 3.0, -1.0]), jax.random.key(0)
    for found, expected in zip(
      draw(logits, key, Sampling(top_k=50)), draw(logits, key, Sampling()), strict=True
    ):
      np.testing.assert_array_equal(found, expected)


if __name__ == "__main__":
  absltest.main()
