"""The decoder in float64: packed trees against their unpacked sequences, and against a decoder
written in numpy.
"""

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

# Within a row no token comes twice and none is 0, so that a token's embedding stands for one place
# of the row.
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
LENGTH = 28  # two tokens of padding behind the first row, 21 behind the second
F64 = {"dtype": "float64", "param_dtype": "float64"}


def unpack(rows):
  """Each trunk and each branch on its trunk as a sequence, and where the packed tokens are in them.

  Returns:
    (sequences, places): lists of ids, and a dict from (row, place in the row) to (sequence, place
    in the sequence).
  """
  sequences, places = [], {}
  for r, trees in enumerate(rows):
    at = 0
    for tree in trees:
      paths = [
        np.arange(len(tree.trunk)),
        *(np.concatenate(tree.path(n)) for n in range(tree.num_branches)),
      ]
      for path, ids in zip(
        paths, [list(tree.trunk), *(ids for ids, _ in random_trees.sequences(tree))], strict=True
      ):
        for place, index in enumerate(path):
          places.setdefault((r, at + int(index)), (len(sequences), place))
        sequences.append(ids)
      at += tree.num_tokens
  return sequences, places


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, trees, weight):
  """((Σ weight·logp, logp [B, T]), gradients); a token that nothing predicts gets the logp of a
  wrong guess.
  """

  def weighted(params):
    h, _ = model.hidden(params, trees)
    h = jnp.take_along_axis(h, jnp.maximum(trees.parent, 0)[..., None], axis=1)
    logp = losses.token_logprobs(model.logits(params, h), trees.token)
    return jnp.sum(weight.astype(logp.dtype) * logp), logp

  return jax.value_and_grad(weighted, has_aux=True)(params)


def numpy_logits(config, params, ids):
  """The decoder's equations for one sequence, place by place and head by head; float64 [len(ids),
  V].
  """
  c, params = config, jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  ends, half = params["ends"], config.head_dim // 2
  norm = lambda x, scale: x / np.sqrt(np.sum(x**2) / len(x) + c.norm_eps) * scale
  turn = [
    np.exp(1j * place * np.array([c.rope_theta ** (-2 * i / c.head_dim) for i in range(half)]))
    for place in range(len(ids))
  ]

  def rotated(vector, place):
    pairs = (vector[:half] + 1j * vector[half:]) * turn[place]
    return np.concatenate([pairs.real, pairs.imag])

  stream = [ends["embedding"][token] for token in ids]
  for y in range(c.num_layers):
    p = jax.tree.map(lambda x, y=y: x[y], params["layers"])
    normed = [norm(x, p["attention_norm"]["scale"]) for x in stream]
    heads = lambda x, name, p=p: (x @ p[name]).reshape(-1, c.head_dim)
    keys = [[rotated(head, place) for head in heads(x, "key")] for place, x in enumerate(normed)]
    values = [heads(x, "value") for x in normed]
    for place, x in enumerate(normed):
      out = []
      for n, query in enumerate(heads(x, "query")):
        kv = n // (c.num_heads // c.num_kv_heads)
        query = rotated(query, place)
        scores = np.array([query @ keys[k][kv] for k in range(place + 1)]) / np.sqrt(c.head_dim)
        probs = np.exp(scores) / np.sum(np.exp(scores))
        out.append(sum(prob * values[k][kv] for k, prob in enumerate(probs)))
      stream[place] = stream[place] + np.concatenate(out) @ p["output"]
    for place, x in enumerate(stream):
      x = norm(x, p["mlp_norm"]["scale"])
      gate = x @ p["gate"]
      stream[place] = stream[place] + (gate / (1 + np.exp(-gate)) * (x @ p["up"])) @ p["down"]
  matrix = ends["embedding"] if c.tie_embeddings else ends["unembedding"]
  return np.stack([matrix @ norm(x, ends["norm"]["scale"]) for x in stream])


def numpy_logp(config, params, ids):
  """log π of tokens 1, 2, ... of one sequence; NaN for the first."""
  logits = numpy_logits(config, params, ids)
  logp = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
  return np.array([np.nan] + [logp[place - 1, ids[place]] for place in range(1, len(ids))])


def products(jaxpr) -> int:
  """Matrix products in a program, those of inner programs once."""
  inner = lambda eqn: sum(products(part) for part in jax_core.jaxprs_in_params(eqn.params))
  return sum((eqn.primitive.name == "dot_general") + inner(eqn) for eqn in jaxpr.eqns)


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
    """(row, place in the row, sequence, place in the sequence) of every token that is predicted."""
    found = [(*at, *self.places[at]) for at in self.places if self.trees.parent[at] >= 0]
    self.assertLen(found, sum(tree.num_tokens - 1 for row in ROWS for tree in row))
    return found

  def assert_trees_close(self, got, expected, atol):
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(expected))
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))

  def test_packed_equals_unpacked(self):
    # Fails if a branch sees the trunk's token at its fork or a sibling, if trees of a row see each
    # other, if positions count the row's places, if a branch's first token is predicted by the
    # row's token before it, or if gradients of shared trunk tokens are those of one branch only.
    longest = max(map(len, self.sequences))
    alone = tree_lib.pack([[Tree(ids)] for ids in self.sequences], longest)
    weight = np.zeros(alone.token.shape)
    for row, at, sequence, place in self.predicted():
      weight[sequence, place] = self.weight[row, at]
    (_, logp), gradients = run(self.model, self.params, alone, weight)
    for row, at, sequence, place in self.predicted():
      self.assertAlmostEqual(float(self.logp[row, at]), float(logp[sequence, place]), delta=1e-10)
    self.assertGreater(
      min(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradients)), 0.1
    )
    self.assert_trees_close(self.gradients, gradients, 1e-10)

  def test_packed_equals_numpy(self):
    # Fails for any change of the equations: the rotary pairs, angles or base, which kv head a query
    # head reads, the scale of scores, where the norms stand and their ε, the gate, the residual
    # sums, the output matrix.
    logp = [numpy_logp(self.model.config, self.params, ids) for ids in self.sequences]
    for row, at, sequence, place in self.predicted():
      self.assertAlmostEqual(float(self.logp[row, at]), logp[sequence][place], delta=1e-9)

  def test_tied_embeddings_equal_numpy(self):
    # Fails if the tied model reads another output matrix than the embedding, or keeps one.
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
    # Fails if the scan runs the layers in another order or the recomputation sees other values.
    model = tiny_model.model(**F64, scan_layers=scan, remat=remat)
    (_, logp), gradients = run(model, self.params, self.trees, self.weight)
    np.testing.assert_allclose(logp, self.logp, rtol=0, atol=1e-12)
    self.assert_trees_close(gradients, self.gradients, 1e-11)

  @parameterized.product(scan=(True, False), remat=("none", "full", "selective"))
  def test_what_is_recomputed(self, scan, remat):
    # Fails if `remat` is not read, if "full" keeps a product, or if "selective" computes one anew.
    # A layer has 7 products with matrices and 2 of attention's, and each twice as many in the
    # backward pass; it needs all but the last again.
    model = tiny_model.model(**F64, scan_layers=scan, remat=remat)
    loss = lambda params: jnp.sum(model.hidden(params, self.trees)[0])
    again = {"none": 0, "full": 8, "selective": 2}[remat]
    self.assertEqual(
      products(jax.make_jaxpr(jax.grad(loss))(self.params)), (1 if scan else 2) * (3 * 9 + again)
    )

  def test_unstack_is_exact(self):
    # Fails if layers change places or bits, or if an unstacked tree is unstacked again.
    unstacked = self.model.unstack(self.params)
    self.assertLen(unstacked["layers"], 2)
    for i, layer in enumerate(unstacked["layers"]):
      self.assert_trees_close(
        layer, jax.tree.map(lambda leaf, i=i: leaf[i], self.params["layers"]), 0
      )
    self.assert_trees_close(unstacked["ends"], self.params["ends"], 0)
    self.assertIs(self.model.unstack(unstacked), unstacked)

  def test_tokens_that_are_not_seen_have_gradients_of_exactly_zero(self):
    # Fails if a masked score is merely small, or if a mask lets a token through or holds one back.
    probe = np.random.default_rng(1).normal(size=self.model.config.d_model)

    def projected(embedding):
      params = {**self.params, "ends": {**self.params["ends"], "embedding": embedding}}
      return self.model.hidden(params, self.trees)[0][0] @ probe

    jacobian = jax.jit(jax.jacrev(projected))(self.params["ends"]["embedding"])  # [T, V, D]
    expected = np.zeros((LENGTH, self.model.config.vocab_size), bool)
    for (row, at), (sequence, place) in self.places.items():
      if row == 0:
        expected[at, self.sequences[sequence][: place + 1]] = True
    size = sum(tree.num_tokens for tree in ROWS[0])
    np.testing.assert_array_equal(np.any(jacobian != 0, axis=-1)[:size], expected[:size])

  @parameterized.parameters(True, False)
  def test_cache_equals_hidden(self, scan):
    # Fails if a slot sees the trunk at its fork or the other slot, if positions restart, or if
    # layers share a cache.
    model = tiny_model.model(**F64, scan_layers=scan)
    hidden = jax.jit(model.hidden, static_argnames="with_cache")
    expected, _ = hidden(self.params, self.trees)
    _, (k, v) = hidden(
      self.params, tree_lib.pack([[Tree(_A.trunk)]], len(_A.trunk)), with_cache=True
    )
    suffix = jnp.zeros((2, 1, 2, model.config.num_kv_heads, 3, model.config.head_dim))
    stack = (lambda fields: fields) if scan else tuple
    turned = lambda fields: jax.tree.map(lambda x: x.swapaxes(-1, -2), fields)
    cache = Cache(turned(k), v, stack(suffix), stack(suffix))
    params = self.params if scan else model.unstack(self.params)
    step = jax.jit(model.hidden_step)
    first = np.array([_A.path(0)[1][0], _A.path(5)[1][0]])
    for at in range(2):  # slots: the branches 7 8 9 and 12 13 of _A
      token = jnp.asarray([[_A.branches[0].ids[at], _A.branches[2].ids[at]]], jnp.int32)
      fork, index = jnp.asarray([[2, 6]], jnp.int32), jnp.full((1, 2), at, jnp.int32)
      h, cache = step(params, token, cache, fork=fork, index=index)
      np.testing.assert_allclose(h[0], expected[0, first + at], rtol=0, atol=1e-10)

  def test_bfloat16_is_near(self):
    # Fails if logits or gradients lose their float32, or if a step overflows.
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
      abs(float(logp[row, at] - self.logp[row, at])) for row, at, _, _ in self.predicted()
    ]
    self.assertLess(max(differences), 0.3)
    self.assertGreater(max(differences), 1e-4)  # it did compute in bfloat16

  def test_padding_alone_is_finite(self):
    # Fails if a query that sees nothing divides by zero or takes exp of an infinity's difference.
    (_, logp), gradients = run(
      self.model, self.params, tree_lib.empty_rows(2, LENGTH), np.ones((2, LENGTH))
    )
    self.assertTrue(
      all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in (logp, *jax.tree.leaves(gradients)))
    )


class ShapesTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_axes_and_counts_fit_the_parameters(self, tied):
    # Fails if a parameter has no logical axes or axes of another rank, or if num_params forgets
    # one.
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
    # Fails if layers share their draws, or if a matrix's spread does not follow its fan-in.
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
    # Fails if a check is lost.
    with self.assertRaisesRegex(UserError, sentence):
      dataclasses.replace(tiny_model.CONFIG, **changes)


if __name__ == "__main__":
  absltest.main()
