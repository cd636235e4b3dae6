"""Adapters: what they compute, their gradients, merging, layouts, and the files that PEFT reads."""

import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from synthneg_jax.core import losses
from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.models import adapter as adapter_lib
from synthneg_jax.models.adapter import Adapter
from synthneg_jax.models.attention import Cache
from synthneg_jax.runtime import config_schema, device_mesh
from synthneg_jax.runtime.errors import UserError
from tests import tiny_model
from tests.models import tiny_families

pytestmark = pytest.mark.slow  # compiles much

TREES = tree_lib.pack([[Tree([5, 6, 7, 8], (Branch(4, [9, 10]), Branch(2, [11, 12, 13])))]], 12)


def drawn(adapter: Adapter):
  """Both matrices away from zero."""
  rng = np.random.RandomState(3)
  return jax.tree.map(
    lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype),
    adapter.abstract_params(),
  )


def logp(model, params):
  h, _ = model.hidden(params, TREES)
  h = jnp.take_along_axis(h, jnp.maximum(TREES.parent, 0)[..., None], axis=1)
  return jnp.where(TREES.scored, losses.token_logprobs(model.logits(params, h), TREES.token), 0.0)


class AdapterTest(parameterized.TestCase):
  @parameterized.parameters((True, "gemma3, linear rope"), (False, "qwen2"))
  def test_joined_is_merged(self, scan, name):
    # Fails if a target is left out, α/r is left out or counted twice, a layer gets another's, or
    # unstacking loses it.
    model = tiny_families.model(name, scan_layers=scan)
    adapter = Adapter(model, 3, 6.0, adapter_lib.TARGETS)
    base, params = jax.tree.map(jnp.asarray, tiny_families.params(model)), drawn(adapter)
    joined = jax.jit(lambda base, params: logp(model, adapter.join(base, params)))(base, params)
    by_hand = {
      target: base["layers"][target]
      + 2.0 * np.einsum("yir,yro->yio", params[target]["a"], params[target]["b"])
      for target in adapter_lib.TARGETS
    }
    expected = jax.jit(lambda params: logp(model, params))(
      {**base, "layers": base["layers"] | by_hand}
    )
    before = jax.jit(lambda params: logp(model, params))(base)
    np.testing.assert_allclose(joined, expected, rtol=0, atol=2e-4)
    self.assertGreater(float(jnp.max(jnp.abs(expected - before))), 0.5)
    merged = adapter.merge(jax.tree.map(jnp.copy, base), params)
    for target, value in by_hand.items():
      np.testing.assert_allclose(merged["layers"][target], value, rtol=0, atol=1e-5)
    self.assertEqual(jax.tree.structure(merged), jax.tree.structure(base))

  def test_decoding_takes_adapters_too(self):
    # Fails if the step for one more token forgets the adapter.
    model = tiny_families.model("llama", scan_layers=True)
    adapter = Adapter(model, 2, 2.0, ("query", "value", "down"))
    joined = adapter.join(jax.tree.map(jnp.asarray, tiny_families.params(model)), drawn(adapter))
    expected, _ = jax.jit(model.hidden)(joined, tree_lib.pack([[Tree([5, 6, 7])]], 3))
    c = model.config
    trunk = jnp.zeros((c.num_layers, 1, c.num_kv_heads, 1, c.head_dim))
    suffix = jnp.zeros((c.num_layers, 1, 1, c.num_kv_heads, 3, c.head_dim))
    cache, at = (
      Cache(trunk.swapaxes(-1, -2), trunk, suffix, suffix),
      lambda value: jnp.asarray([[value]], jnp.int32),
    )
    step = jax.jit(model.hidden_step)
    for index, token in enumerate([5, 6, 7]):
      h, cache = step(joined, at(token), cache, fork=at(0), index=at(index))
      np.testing.assert_allclose(h[0, 0], expected[0, index], rtol=0, atol=1e-5)

  def test_starts_as_the_base(self):
    # Fails if B is not zero at the start, or layers or targets share their draws of A.
    model = tiny_families.model("llama")
    adapter = Adapter(model, 4, 8.0, ("query", "gate"))
    base, params = (
      jax.tree.map(jnp.asarray, tiny_families.params(model)),
      jax.jit(adapter.init)(jax.random.key(0)),
    )
    of = jax.jit(lambda params: logp(model, params))
    with_zeros = jax.jit(lambda params: logp(model, adapter.join(base, params)))(params)
    np.testing.assert_allclose(with_zeros, of(base), rtol=0, atol=2e-5)
    a = params["query"]["a"]
    self.assertEqual(
      jax.tree.map(jnp.shape, params), jax.tree.map(jnp.shape, adapter.abstract_params())
    )
    self.assertLessEqual(float(jnp.max(jnp.abs(a))), 32**-0.5)
    self.assertAlmostEqual(float(jnp.std(a)) / (32**-0.5 / 3**0.5), 1.0, delta=0.1)
    self.assertFalse(np.array_equal(a[0], a[1]) or np.array_equal(a, params["gate"]["a"]))

  def test_gradients_are_those_of_the_sum(self):
    # Fails if gradients miss α/r or flow past a matrix: by the chain rule, dA = α/r · dW·Bᵀ and dB
    # = α/r · Aᵀ·dW.
    model = tiny_families.model("llama", scan_layers=True)
    adapter = Adapter(model, 3, 6.0, adapter_lib.TARGETS)
    base, params = jax.tree.map(jnp.asarray, tiny_families.params(model)), drawn(adapter)
    grads = jax.jit(jax.grad(lambda params: jnp.sum(logp(model, adapter.join(base, params)))))(
      params
    )
    merged = adapter.merge(jax.tree.map(jnp.copy, base), params)
    whole = jax.jit(jax.grad(lambda params: jnp.sum(logp(model, params))))(merged)["layers"]
    for name, pair in params.items():
      expected = {
        "a": 2.0 * np.einsum("yio,yro->yir", whole[name], pair["b"]),
        "b": 2.0 * np.einsum("yir,yio->yro", pair["a"], whole[name]),
      }
      for part, value in expected.items():
        scale = np.abs(value).max()
        self.assertGreater(scale, 0.01)
        np.testing.assert_allclose(
          grads[name][part], value, rtol=0, atol=1e-3 * scale, err_msg=f"{name}.{part}"
        )

  def test_lies_as_its_base(self):
    # Fails if A or B is split otherwise than the matrix they belong to, or merging moves the base.
    model, mesh = tiny_model.model(vocab_size=32), device_mesh.make_mesh(2, 2, 2)
    adapter = Adapter(model, 2, 4.0, adapter_lib.TARGETS)
    layout = device_mesh.shardings(mesh, adapter.logical_axes())
    of_base = device_mesh.shardings(mesh, model.logical_axes())
    for name in adapter_lib.TARGETS:
      kernel = of_base["layers"][name].spec
      self.assertEqual(
        (layout[name]["a"].spec[1], layout[name]["b"].spec[2]), (kernel[1], kernel[2])
      )
    one = tiny_model.make_params(model)
    params = drawn(adapter)
    expected = adapter.merge(jax.tree.map(jnp.copy, one), params)
    split = adapter.merge(
      jax.device_put(jax.tree.map(jnp.copy, one), of_base), jax.device_put(params, layout)
    )
    self.assertEqual(jax.tree.map(lambda leaf: leaf.sharding, split), of_base)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), split, expected)

  def test_merging_rounds_once(self):
    # Fails if the product is rounded to bfloat16 before it is added, or the result's dtype changes.
    model = tiny_model.model(param_dtype="bfloat16")
    adapter = Adapter(model, 2, 2.0, ("up",))
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_model.make_params(model))
    params = drawn(adapter)
    added = np.einsum(
      "yir,yro->yio", *(np.asarray(part, np.float64) for part in params["up"].values())
    )
    exact = np.asarray(base["layers"]["up"], np.float64) + added
    merged = adapter.merge(jax.tree.map(jnp.copy, base), params)["layers"]["up"]
    self.assertEqual(merged.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(merged, exact.astype(np.float32).astype(jnp.bfloat16))

  def test_files_of_peft(self):
    # Fails if A and B are not transposed, a layer's stand under another's name, or one of two
    # adapters is lost.
    model = tiny_families.model("qwen2")
    first, second = Adapter(model, 3, 6.0, ("query", "down")), Adapter(model, 2, 1.0, ("query",))
    chain = [(first, drawn(first)), (second, drawn(second))]
    with tempfile.TemporaryDirectory() as folder:
      adapter_lib.save_peft(pathlib.Path(folder) / "x", chain, "the/base")
      config = json.loads((pathlib.Path(folder) / "x/adapter_config.json").read_text())
      tensors = safetensors.numpy.load_file(pathlib.Path(folder) / "x/adapter_model.safetensors")
    self.assertEqual(
      (config["r"], config["lora_alpha"], config["rank_pattern"]), (5, 5, {"down_proj": 3})
    )
    self.assertEqual(config["alpha_pattern"], {"down_proj": 3})
    self.assertEqual(config["target_modules"], ["down_proj", "q_proj"])
    self.assertEqual(config["base_model_name_or_path"], "the/base")
    self.assertLen(tensors, 12)
    merged = jax.tree.map(jnp.asarray, tiny_families.params(model))
    before = jax.tree.map(np.asarray, merged)["layers"]
    for adapter, params in chain:
      merged = adapter.merge(merged, params)
    for name, module in (("query", "self_attn.q_proj"), ("down", "mlp.down_proj")):
      for layer in range(3):
        prefix = f"base_model.model.model.layers.{layer}.{module}"
        added = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
        ours = np.asarray(merged["layers"][name][layer] - before[name][layer]).T
        np.testing.assert_allclose(added, ours, rtol=0, atol=1e-5)

  @parameterized.parameters(
    ((4, 8.0, ("query", "embedding")), "targets are query, .*, not embedding."),
    ((4, 8.0, ()), "not none at all."),
    ((0, 8.0, ("query",)), "a rank of at least 1 and an alpha above 0, not 0 and 8.0."),
    ((4, 0.0, ("query",)), "not 4 and 0.0."),
  )
  def test_refuses(self, how, sentence):
    # Fails if a check is lost.
    with self.assertRaisesRegex(UserError, sentence):
      Adapter(tiny_model.model(), *how)

  def test_the_config_names_the_same_matrices(self):
    # Fails if a matrix is added to the decoder's adapters and the config's check does not know it,
    # or the other way round.
    self.assertEqual(adapter_lib.TARGETS, config_schema.MATRICES)


if __name__ == "__main__":
  absltest.main()
