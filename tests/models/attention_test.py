"""Attention in blocks of queries against the plain softmax of whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.models import attention


def make_rows(rng, length):
  """Two rows (several trees with forks in mid-trunk, and one whose branch fills the row), their
  keys and their mask.
  """

  def ids(size):
    return rng.integers(1, 30, size).tolist()

  quarter = length // 4
  trees = [
    Tree(ids(quarter - 5), (Branch(3, ids(2)), Branch(quarter - 5, ids(3)))) for _ in range(3)
  ]
  packed = tree_lib.pack([trees, [Tree(ids(2), (Branch(2, ids(length - 2)),))]], length)
  keys = tree_lib.row_keys(packed)
  return (
    packed,
    keys,
    np.asarray(tree_lib.attention_mask(tree_lib.Queries(keys.index, keys.position), keys)),
  )


class TreeAttentionTest(parameterized.TestCase):
  @parameterized.parameters(40, 100, 130, 333)
  def test_blocks_change_nothing(self, length):
    # Fails if a block of queries is cut off from a key that it sees, if the parts are joined in
    # another order, or if padding gives NaN. Rows of 40 are one block, of 333 four, the last
    # shorter.
    rng = np.random.default_rng(0)
    trees, keys, mask = make_rows(rng, length)
    self.assertFalse(
      np.triu(mask, 1).any()
    )  # what the blocks rest on: no query sees a key behind it
    heads, kv_heads, size = 6, 2, 4
    q = rng.normal(size=(2, length, heads, size))
    k, v = rng.normal(size=(2, 2, length, kv_heads, size))
    wide_k, wide_v = (np.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    scores = np.einsum("bqnh,bknh->bnqk", q, wide_k) / np.sqrt(size)
    weights = np.exp(scores) * mask[:, None]
    with np.errstate(invalid="ignore"):
      expected = np.einsum("bnqk,bknh->bqnh", weights / weights.sum(-1, keepdims=True), wide_v)
    flat = [jnp.asarray(x.reshape(2 * length, -1, size), jnp.float32) for x in (q, k, v)]
    out, *_ = jax.jit(attention.tree_attention)(*flat, keys=keys)
    out = np.asarray(out).reshape(expected.shape)
    there = np.asarray(trees.token) != 0
    self.assertTrue(np.isfinite(out).all())
    np.testing.assert_allclose(out[there], expected[there], atol=1e-5)

  def test_gradients(self):
    # Fails if a term of the backward pass is missing, has the wrong sign or scale, sums over the
    # wrong heads, or reaches a key that no query sees.
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
      length, heads, kv_heads, size = 130, 4, 2, 4
      trees, keys, mask = make_rows(rng, length)
      q, k, v = (
        jnp.asarray(rng.normal(size=(2 * length, n, size))) for n in (heads, kv_heads, kv_heads)
      )
      # Rows of padding bring no gradient: nothing is scored there, and nothing that is sees them.
      weights = jnp.asarray(
        rng.normal(size=q.shape) * (np.asarray(trees.token) != 0).reshape(-1, 1, 1)
      )

      def plain(q, k, v):
        def rows(x):
          return jnp.repeat(x, heads // x.shape[1], axis=1).reshape(2, length, heads, size)

        scores = jnp.einsum("bqnh,bknh->bnqk", rows(q), rows(k)) / np.sqrt(size)
        shares = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
        return jnp.einsum("bnqk,bknh->bqnh", shares, rows(v)).reshape(q.shape)

      def gradients(fn):
        return jax.jit(jax.grad(lambda *args: jnp.sum(weights * fn(*args)), argnums=(0, 1, 2)))(
          q, k, v
        )

      ours = gradients(lambda *args: attention.tree_attention(*args, keys=keys)[0])
      for name, got, expected in zip("qkv", ours, gradients(plain), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12, err_msg=name)


class CachedAttentionTest(parameterized.TestCase):
  @parameterized.product(
    shape=((1, 1), (2, 3)), dtype=("float32", "bfloat16"), unrolled=(True, False)
  )
  def test_writes_the_newest_tokens_and_nothing_else(self, shape, dtype, unrolled):
    # Fails if a key or value goes to another slot, head, place or layer, or if another one changes
    # by a bit.
    rng = np.random.default_rng(0)
    (lanes, slots), heads, size, layers, layer = shape, 2, 4, 3, 1

    def draw(*axes):
      return jnp.asarray(rng.normal(size=axes), dtype)

    trunk_k, trunk_v = draw(layers, lanes, heads, size, 6), draw(layers, lanes, heads, 6, size)
    suffix_k, suffix_v = (
      draw(layers, lanes, slots, heads, 5, size),
      draw(layers, lanes, slots, heads, 5, size),
    )
    index = rng.integers(0, 5, size=shape)
    k, v = draw(lanes * slots, heads, size), draw(lanes * slots, heads, size)
    fields = (trunk_k, trunk_v, suffix_k, suffix_v)
    cache = attention.Cache(*(map(tuple, fields) if unrolled else fields))
    newest = attention.NewestTokens(layer, jnp.full(shape, 6), jnp.asarray(index), 0)
    step = jax.jit(lambda q, cache: attention.cached_attention(q, k, v, cache=cache, newest=newest))
    _, cache = step(draw(lanes * slots, 2 * heads, size), cache)
    for got, before, new in ((cache.suffix_k, suffix_k, k), (cache.suffix_v, suffix_v, v)):
      expected = np.array(before)
      for lane, slot in np.ndindex(*shape):
        expected[layer, lane, slot, :, index[lane, slot]] = np.asarray(new).reshape(
          *shape, heads, size
        )[lane, slot]
      np.testing.assert_array_equal(np.asarray(jnp.stack(got) if unrolled else got), expected)


if __name__ == "__main__":
  absltest.main()
