"""The decoder in float64: packed trees compared with unpacked sequences, and with numpy."""

import dataclasses
import functools
import itertools

import jax
import jax.extend.core as jax_core
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import losses
from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.models.attention import Cache
from synthneg_jax.runtime import device_mesh
from synthneg_jax.runtime.errors import UserError
from tests import random_trees, tiny_model

# Tokens within a row are distinct and not 0, so that the gradient of an embedding belongs to one
# index of the row.
_A = Tree(
  trunk=[1, 2, 3, 4, 5, 6],
  branches=(
    Branch(
      2, [7, 8, 9], branches=(Branch(4, [23]), Branch(5, [24, 26], branches=(Branch(6, [27]),)))
    ),
    Branch(2, [10, 11]),
    Branch(6, [12, 13]),
    Branch(1, [14]),
  ),
)
_B = Tree(trunk=[15, 16, 17, 18, 19], branches=(Branch(3, [20, 21]), Branch(5, [22])))
_C = Tree(trunk=[30, 9, 2, 25], branches=(Branch(4, [1, 8, 3]),))
ROWS = [[_A, _B], [_C]]
LENGTH = 28  # pads the first row by 2 tokens, the second by 21
F64 = {"dtype": "float64", "param_dtype": "float64"}


def unpack(rows):
  """Unpacks each trunk, and each branch with its trunk, into a sequence.

  Returns:
    (sequences, places): lists of ids, and a dict from (row, index in the row) to (sequence, index
    in the sequence).
  """
  sequences, places = [], {}
  for r, trees in enumerate(rows):
    start = 0
    for tree in trees:
      paths = [np.arange(len(tree.trunk))]
      paths += [np.concatenate(tree.path(n)) for n in range(tree.num_branches)]
      ids_of_paths = [list(tree.trunk)] + [ids for ids, _ in random_trees.sequences(tree)]
      for path, ids in zip(paths, ids_of_paths, strict=True):
        for i, index in enumerate(path):
          places.setdefault((r, start + int(index)), (len(sequences), i))
        sequences.append(ids)
      start += tree.num_tokens
  return sequences, places


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, trees, weight):
  """((Σ weight·logp, logp [B, T]), gradients); logp is arbitrary for tokens without a parent."""

  def weighted(params):
    h, _ = model.hidden(params, trees)
    h = jnp.take_along_axis(h, jnp.maximum(trees.parent, 0)[..., None], axis=1)
    logp = losses.token_logprobs(model.logits(params, h), trees.token)
    return jnp.sum(weight.astype(logp.dtype) * logp), logp

  return jax.value_and_grad(weighted, has_aux=True)(params)


def numpy_logits(config, params, ids):
  """The decoder for one sequence, position by position and head by head; float64 [len(ids), V]."""
  c, params = config, jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  ends, half = params["ends"], config.head_dim // 2
  frequencies = np.array([c.rope_theta ** (-2 * i / c.head_dim) for i in range(half)])

  def norm(x, scale):
    return x / np.sqrt(np.sum(x**2) / len(x) + c.norm_eps) * scale

  def rotated(vector, position):
    pairs = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([pairs.real, pairs.imag])

  def heads(x, matrix):
    return (x @ matrix).reshape(-1, c.head_dim)

  stream = [ends["embedding"][token] for token in ids]
  for y in range(c.num_layers):
    p = jax.tree.map(lambda x, y=y: x[y], params["layers"])
    normed = [norm(x, p["attention_norm"]["scale"]) for x in stream]
    keys = [[rotated(head, t) for head in heads(x, p["key"])] for t, x in enumerate(normed)]
    values = [heads(x, p["value"]) for x in normed]
    for t, x in enumerate(normed):
      out = []
      for n, query in enumerate(heads(x, p["query"])):
        kv = n // (c.num_heads // c.num_kv_heads)
        query = rotated(query, t)
        scores = np.array([query @ keys[k][kv] for k in range(t + 1)]) / np.sqrt(c.head_dim)
        probs = np.exp(scores) / np.sum(np.exp(scores))
        out.append(sum(prob * values[k][kv] for k, prob in enumerate(probs)))
      stream[t] = stream[t] + np.concatenate(out) @ p["output"]
    for t, x in enumerate(stream):
      x = norm(x, p["mlp_norm"]["scale"])
      gate = x @ p["gate"]
      stream[t] = stream[t] + (gate / (1 + np.exp(-gate)) * (x @ p["up"])) @ p["down"]
  matrix = ends["embedding"] if c.tie_embeddings else ends["unembedding"]
  return np.stack([matrix @ norm(x, ends["norm"]["scale"]) for x in stream])


def numpy_logp(config, params, ids):
  """log π of tokens 1, 2, ... of one sequence; NaN for the first."""
  logits = numpy_logits(config, params, ids)
  logp = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
  return np.array([np.nan] + [logp[t - 1, ids[t]] for t in range(1, len(ids))])


def count_products(jaxpr) -> int:
  """The number of matrix products in a program; those in a loop body count once."""
  count = 0
  for eqn in jaxpr.eqns:
    count += eqn.primitive.name == "dot_general"
    count += sum(count_products(inner) for inner in jax_core.jaxprs_in_params(eqn.params))
  return count


class DecoderTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(jax.enable_x64(True))
    cls.model = tiny_model.model(**F64)
    cls.params = tiny_model.make_params(cls.model)
    cls.trees = tree_lib.pack(ROWS, LENGTH)
    cls.sequences, cls.places = unpack(ROWS)
    cls.weight = np.random.default_rng(0).normal(size=cls.trees.token.shape) * (
      cls.trees.parent >= 0
    )
    (_, cls.logp), cls.gradients = run(cls.model, cls.params, cls.trees, cls.weight)

  def predicted(self):
    """(row, index in the row, sequence, index in the sequence) of every predicted token."""
    tokens = [(*key, *place) for key, place in self.places.items() if self.trees.parent[key] >= 0]
    self.assertLen(tokens, sum(tree.num_tokens - 1 for row in ROWS for tree in row))
    return tokens

  def assert_trees_close(self, got, expected, atol):
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(expected))
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))

  def test_packed_equals_unpacked(self):
    # Fails if a branch attends to the trunk's token at its fork or to a sibling, if trees of a row
    # attend to each other, if positions are row indices, if a branch's first token is predicted by
    # the preceding token of the row, or if gradients of shared trunk tokens come from one branch
    # only.
    longest = max(map(len, self.sequences))
    unpacked = tree_lib.pack([[Tree(ids)] for ids in self.sequences], longest)
    weight = np.zeros(unpacked.token.shape)
    for row, index, sequence, t in self.predicted():
      weight[sequence, t] = self.weight[row, index]
    (_, logp), gradients = run(self.model, self.params, unpacked, weight)
    for row, index, sequence, t in self.predicted():
      self.assertAlmostEqual(float(self.logp[row, index]), float(logp[sequence, t]), delta=1e-10)
    self.assertGreater(
      min(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradients)), 0.1
    )
    self.assert_trees_close(self.gradients, gradients, 1e-10)

  def test_packed_equals_numpy(self):
    # Fails for any change of the equations: rotary pairs, angles or base, the kv head of a query
    # head, the scale of scores, the norms and their ε, the gate, the residual sums, the output
    # matrix.
    logp = [numpy_logp(self.model.config, self.params, ids) for ids in self.sequences]
    for row, index, sequence, t in self.predicted():
      self.assertAlmostEqual(float(self.logp[row, index]), logp[sequence][t], delta=1e-9)

  def test_tied_embeddings_equal_numpy(self):
    # Fails if a tied model has an output matrix other than the embedding.
    model = tiny_model.model(
      **F64, tie_embeddings=True, rope_theta=500.0, norm_eps=0.1, num_kv_heads=1, head_dim=6
    )
    params = tiny_model.make_params(model)
    self.assertNotIn("unembedding", params["ends"])
    ids = self.sequences[0]
    h, cache = jax.jit(model.hidden)(params, tree_lib.pack([[Tree(ids)]], len(ids)))
    self.assertIsNone(cache)
    np.testing.assert_allclose(
      model.logits(params, h)[0], numpy_logits(model.config, params, ids), rtol=0, atol=1e-9
    )

  @parameterized.parameters(*itertools.product((True, False), ("none", "full", "selective")))
  def test_scan_and_remat_change_nothing(self, scan, remat):
    # Fails if the scan reorders layers, or if recomputation uses other values.
    model = tiny_model.model(**F64, scan_layers=scan, remat=remat)
    (_, logp), gradients = run(model, self.params, self.trees, self.weight)
    np.testing.assert_allclose(logp, self.logp, rtol=0, atol=1e-12)
    self.assert_trees_close(gradients, self.gradients, 1e-11)

  @parameterized.product(scan=(True, False), remat=("none", "full", "selective"))
  def test_what_is_recomputed(self, scan, remat):
    # Fails if `remat` is ignored, if "full" saves a product, or if "selective" recomputes one that
    # it should save. A layer has 7 matrix products and 2 in attention, and twice as many in the
    # backward pass, which needs all of them but the last.
    model = tiny_model.model(**F64, scan_layers=scan, remat=remat)

    def loss(params):
      return jnp.sum(model.hidden(params, self.trees)[0])

    recomputed = {"none": 0, "full": 8, "selective": 2}[remat]
    self.assertEqual(
      count_products(jax.make_jaxpr(jax.grad(loss))(self.params)),
      (1 if scan else 2) * (3 * 9 + recomputed),
    )

  def test_unstack_is_exact(self):
    # Fails if layers are reordered or bits change, or if an unstacked tree is unstacked again.
    unstacked = self.model.unstack(self.params)
    self.assertLen(unstacked["layers"], 2)
    for i, layer in enumerate(unstacked["layers"]):
      self.assert_trees_close(
        layer, jax.tree.map(lambda leaf, i=i: leaf[i], self.params["layers"]), 0
      )
    self.assert_trees_close(unstacked["ends"], self.params["ends"], 0)
    self.assertIs(self.model.unstack(unstacked), unstacked)

  def test_gradients_of_masked_tokens_are_exactly_zero(self):
    # Fails if masked scores are only small, or if a mask has one token too many or too few.
    probe = np.random.default_rng(1).normal(size=self.model.config.d_model)

    def projected(embedding):
      params = {**self.params, "ends": {**self.params["ends"], "embedding": embedding}}
      return self.model.hidden(params, self.trees)[0][0] @ probe

    jacobian = jax.jit(jax.jacrev(projected))(self.params["ends"]["embedding"])  # [T, V, D]
    expected = np.zeros((LENGTH, self.model.config.vocab_size), bool)
    for (row, index), (sequence, t) in self.places.items():
      if row == 0:
        expected[index, self.sequences[sequence][: t + 1]] = True
    size = sum(tree.num_tokens for tree in ROWS[0])
    np.testing.assert_array_equal(np.any(jacobian != 0, axis=-1)[:size], expected[:size])

  @parameterized.parameters(True, False)
  def test_cache_equals_hidden(self, scan):
    # Fails if a slot attends to the trunk's token at its fork or to the other slot, if positions
    # restart, or if layers share a cache.
    model = tiny_model.model(**F64, scan_layers=scan)
    hidden = jax.jit(model.hidden, static_argnames="with_cache")
    expected, _ = hidden(self.params, self.trees)
    _, (k, v) = hidden(
      self.params, tree_lib.pack([[Tree(_A.trunk)]], len(_A.trunk)), with_cache=True
    )
    suffix = jnp.zeros((2, 1, 2, model.config.num_kv_heads, 3, model.config.head_dim))
    suffix = suffix if scan else tuple(suffix)
    cache = Cache(jax.tree.map(lambda x: x.swapaxes(-1, -2), k), v, suffix, suffix)
    params = self.params if scan else model.unstack(self.params)
    step = jax.jit(model.hidden_step)
    first = np.array([_A.path(0)[1][0], _A.path(5)[1][0]])
    for i in range(2):  # slots: the branches 7 8 9 and 12 13 of _A
      token = jnp.asarray([[_A.branches[0].ids[i], _A.branches[2].ids[i]]], jnp.int32)
      fork, index = jnp.asarray([[2, 6]], jnp.int32), jnp.full((1, 2), i, jnp.int32)
      h, cache = step(params, token, cache, fork=fork, index=index)
      np.testing.assert_allclose(h[0], expected[0, first + i], rtol=0, atol=1e-10)

  def test_bfloat16_is_close(self):
    # Fails if logits or gradients are not float32, or if a step overflows.
    with jax.enable_x64(False):
      model = tiny_model.model(dtype="bfloat16")
      params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float32)), self.params)
      (_, logp), gradients = run(model, params, self.trees, self.weight.astype(np.float32))
      h = jax.eval_shape(lambda: model.hidden(params, self.trees)[0])
      logits = jax.eval_shape(lambda h: model.logits(params, h), h)
      self.assertEqual((h.dtype, logits.dtype), (jnp.bfloat16, jnp.float32))
      self.assertEqual({leaf.dtype for leaf in jax.tree.leaves(gradients)}, {jnp.dtype("float32")})
      self.assertTrue(all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradients)))
    differences = [
      abs(float(logp[row, index] - self.logp[row, index])) for row, index, _, _ in self.predicted()
    ]
    self.assertLess(max(differences), 0.3)
    self.assertGreater(max(differences), 1e-4)  # the model did compute in bfloat16

  def test_empty_rows_are_finite(self):
    # Fails if a query without keys divides by zero or subtracts infinities.
    (_, logp), gradients = run(
      self.model, self.params, tree_lib.empty_rows(2, LENGTH), np.ones((2, LENGTH))
    )
    self.assertTrue(
      all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in (logp, *jax.tree.leaves(gradients)))
    )


class ShapesTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_axes_and_counts_fit_the_parameters(self, tied):
    # Fails if a parameter lacks logical axes or has another rank, or if num_params omits one.
    model = tiny_model.model(tie_embeddings=tied)
    shapes = model.abstract_params()
    axes = jax.tree.map(tuple, model.logical_axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    flat = jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    self.assertEqual(
      [len(names) for names in flat], [leaf.ndim for leaf in jax.tree.leaves(shapes)]
    )
    self.assertContainsSubset({name for names in flat for name in names}, device_mesh.RULES)
    self.assertEqual(sum(leaf.size for leaf in jax.tree.leaves(shapes)), model.config.num_params)

  def test_initial_spread(self):
    # Fails if layers share initial values, or if a matrix is not scaled by its fan-in.
    model = tiny_model.model(d_model=64, head_dim=16, d_ff=48)
    layers = jax.jit(model.init)(jax.random.key(0))["layers"]
    for name, expected in {
      "query": 64**-0.5,
      "gate": 64**-0.5,
      "output": 64**-0.5 / 2,
      "down": 48**-0.5 / 2,
    }.items():
      self.assertAlmostEqual(float(jnp.std(layers[name])) / expected, 1.0, delta=0.1)
      self.assertGreater(float(jnp.max(jnp.abs(layers[name][0] - layers[name][1]))), 0.0)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ({"head_dim": 5}, "head_dim 5 is odd"),
  )
  def test_refuses(self, changes, sentence):
    # Fails if a check is removed.
    with self.assertRaisesRegex(UserError, sentence):
      dataclasses.replace(tiny_model.CONFIG, **changes)


if __name__ == "__main__":
  absltest.main()
