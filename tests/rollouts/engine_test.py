"""The engine against a naive loop that runs the whole sequence anew for every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.rollouts.decode import Stops
from synthneg_jax.rollouts.engine import Engine, Trunk
from synthneg_jax.rollouts.sampling import Sampling, draw
from synthneg_jax.runtime import keys as keys_lib
from tests import toy

EOS = 3
NEW = 12
CDF_EDGE = 1e-5


def make_trunks(rng, count=7):
  trunks = []
  for i in range(count):
    ids = rng.integers(4, 31, size=rng.integers(2, 9))
    forks = [int(f) for f in rng.integers(1, len(ids) + 1, size=rng.integers(1, 7))]
    keys = np.stack(
      [keys_lib.draw_key(0, "test", 0, f"p{i}", keys_lib.hash_ids(ids[:f]), r) for r, f in enumerate(forks)]
    )
    trunks.append(Trunk([int(t) for t in ids], forks, keys))
  return trunks


@jax.jit
def _next_logits(params, ids, size):
  trees = jax.tree.map(jnp.asarray, tree_lib.empty_rows(1, ids.shape[0]))
  position = jnp.arange(ids.shape[0])[None]
  trees = dataclasses.replace(trees, token=ids[None], position=position, tree=(position < size).astype(jnp.int32))
  h, _ = toy.model().hidden(params, trees)
  return toy.model().logits(params, h[0, size - 1])


_draw = jax.jit(
  lambda logits, key, at, how: draw(logits, jax.random.fold_in(jax.random.wrap_key_data(key), at), how),
  static_argnums=3,
)


def naive(params, trunk, item, how, stop_table=None):
  """The oracle: one branch, token by token, without cache, lanes or slots."""
  ids, new, logps, state = list(trunk.ids[: trunk.forks[item]]), [], [], 0
  while True:
    padded = np.zeros(24, np.int32)
    padded[: len(ids)] = ids
    logits = _next_logits(params, jnp.asarray(padded), len(ids))
    token, logp, _ = _draw(logits, trunk.keys[item], len(new), how)
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


class EngineTest(parameterized.TestCase):
  @parameterized.parameters(
    Sampling(temperature=0.0),
    Sampling(temperature=0.8),
    Sampling(temperature=1.3, top_k=5),
    Sampling(temperature=1.0, top_p=0.7),
  )
  def test_equals_naive_loop(self, how):
    # Fails if a branch sees trunk tokens at or after its fork, if a refilled slot keeps its suffix, or if keys move.
    params, trunks = toy.params(), make_trunks(np.random.default_rng(0))
    engine = Engine(toy.model(), toy.one_device_mesh(), Stops((EOS,)), lanes=3, slots=2, max_new_tokens=NEW)
    results = dict(engine.run(params, trunks, how))
    self.assertSameElements(results, range(len(trunks)))
    finishes = set()
    for i, trunk in enumerate(trunks):
      self.assertLen(results[i], len(trunk.forks))
      for item, generation in enumerate(results[i]):
        ids, logps, finish = naive(params, trunk, item, how)
        self.assertEqual(generation.ids.tolist(), ids)
        np.testing.assert_allclose(generation.logp, logps, atol=1e-4)
        self.assertEqual(generation.finish, finish)
        finishes.add(finish)
    self.assertEqual(finishes, {"eos", "length"})

  def test_stop_strings_end_branches(self):
    # Fails if the automaton's state is not carried from token to token, or from prefill to the loop.
    table = np.zeros((3, 31), np.int32)  # stops at an odd token followed by an even one
    table[:, 1::2] = 1
    table[1, 0::2] = 2
    table[2] = 2
    params, trunks = toy.params(), make_trunks(np.random.default_rng(1))
    engine = Engine(toy.model(), toy.one_device_mesh(), Stops((EOS,), table), lanes=3, slots=2, max_new_tokens=NEW)
    finishes = set()
    for i, generations in engine.run(params, trunks, Sampling(temperature=1.0)):
      for item, generation in enumerate(generations):
        ids, _, finish = naive(params, trunks[i], item, Sampling(temperature=1.0), table)
        self.assertEqual((generation.ids.tolist(), generation.finish), (ids, finish))
        finishes.add(finish)
    self.assertIn("stop", finishes)

  @parameterized.parameters((1, 1, False), (5, 4, False), (3, 2, True), (8, 3, True))
  def test_tokens_do_not_depend_on_batch_mates(self, lanes, slots, scan):
    # Fails if a key depends on the lane, the slot or the order of trunks.
    params, trunks = toy.params(), make_trunks(np.random.default_rng(2))
    how = Sampling(temperature=1.0)
    reference = Engine(toy.model(), toy.one_device_mesh(), Stops((EOS,)), lanes=3, slots=2, max_new_tokens=NEW)
    expected = dict(reference.run(params, trunks, how))
    order = np.random.default_rng(lanes).permutation(len(trunks))
    other = Engine(
      toy.model(scan_layers=scan), toy.one_device_mesh(), Stops((EOS,)), lanes=lanes, slots=slots, max_new_tokens=NEW
    )
    for i, generations in other.run(params, [trunks[j] for j in order], how):
      for got, wanted in zip(generations, expected[order[i]], strict=True):
        self.assertEqual(got.ids.tolist(), wanted.ids.tolist())

  def test_drawn_logp_is_of_the_tempered_distribution(self):
    # Fails if the log-prob as drawn is the untempered one.
    logits = jnp.asarray([0.0, 1.0, 3.0, -1.0])
    token, logp, drawn = draw(logits, jax.random.key(0), Sampling(temperature=0.5, top_k=2))
    kept = np.array([-np.inf, 2.0, 6.0, -np.inf])
    expected = kept - np.log(np.exp(2.0) + np.exp(6.0))
    np.testing.assert_allclose(drawn, expected[int(token)], rtol=1e-5)
    np.testing.assert_allclose(logp, jax.nn.log_softmax(logits)[int(token)], rtol=1e-6)


if __name__ == "__main__":
  absltest.main()
