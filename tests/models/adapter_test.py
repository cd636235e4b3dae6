"""Adapters: the forward pass, gradients, merging, shardings, and files for PEFT."""

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
  """Parameters with both matrices different from zero."""
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
  def test_join_equals_merge(self, scan, name):
    # Fails if a target is ignored, if α/r is missing or applied twice, or if a layer has another
    # layer's adapter or, unstacked, none.
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

  def test_decoding_uses_the_adapter(self):
    # Fails if `hidden_step` ignores the adapter.
    model = tiny_families.model("llama", scan_layers=True)
    adapter = Adapter(model, 2, 2.0, ("query", "value", "down"))
    joined = adapter.join(jax.tree.map(jnp.asarray, tiny_families.params(model)), drawn(adapter))
    expected, _ = jax.jit(model.hidden)(joined, tree_lib.pack([[Tree([5, 6, 7])]], 3))
    c = model.config
    trunk = jnp.zeros((c.num_layers, 1, c.num_kv_heads, 1, c.head_dim))
    suffix = jnp.zeros((c.num_layers, 1, 1, c.num_kv_heads, 3, c.head_dim))
    cache = Cache(trunk.swapaxes(-1, -2), trunk, suffix, suffix)
    step = jax.jit(model.hidden_step)
    for i, token in enumerate([5, 6, 7]):
      newest, fork, index = (jnp.asarray([[value]], jnp.int32) for value in (token, 0, i))
      h, cache = step(joined, newest, cache, fork=fork, index=index)
      np.testing.assert_allclose(h[0, 0], expected[0, i], rtol=0, atol=1e-5)

  def test_starts_as_the_base(self):
    # Fails if B is not initially zero, or if layers or targets share A.
    model = tiny_families.model("llama")
    adapter = Adapter(model, 4, 8.0, ("query", "gate"))
    base = jax.tree.map(jnp.asarray, tiny_families.params(model))
    params = jax.jit(adapter.init)(jax.random.key(0))
    expected = jax.jit(lambda params: logp(model, params))(base)
    adapted = jax.jit(lambda params: logp(model, adapter.join(base, params)))(params)
    np.testing.assert_allclose(adapted, expected, rtol=0, atol=2e-5)
    a = params["query"]["a"]
    self.assertEqual(
      jax.tree.map(jnp.shape, params), jax.tree.map(jnp.shape, adapter.abstract_params())
    )
    self.assertLessEqual(float(jnp.max(jnp.abs(a))), 32**-0.5)
    self.assertAlmostEqual(float(jnp.std(a)) / (32**-0.5 / 3**0.5), 1.0, delta=0.1)
    self.assertFalse(np.array_equal(a[0], a[1]) or np.array_equal(a, params["gate"]["a"]))

  def test_gradients(self):
    # Fails if gradients lack α/r or bypass a matrix: by the chain rule, dA = α/r · dW·Bᵀ and dB =
    # α/r · Aᵀ·dW.
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

  def test_shardings(self):
    # Fails if A or B is not sharded like the matrix that it adapts, or if merging changes the
    # base's shardings.
    model, mesh = tiny_model.model(vocab_size=32), device_mesh.make_mesh(2, 2, 2)
    adapter = Adapter(model, 2, 4.0, adapter_lib.TARGETS)
    layout = device_mesh.shardings(mesh, adapter.logical_axes())
    base_layout = device_mesh.shardings(mesh, model.logical_axes())
    for name in adapter_lib.TARGETS:
      kernel = base_layout["layers"][name].spec
      self.assertEqual(
        (layout[name]["a"].spec[1], layout[name]["b"].spec[2]), (kernel[1], kernel[2])
      )
    base = tiny_model.make_params(model)
    params = drawn(adapter)
    expected = adapter.merge(jax.tree.map(jnp.copy, base), params)
    sharded = adapter.merge(
      jax.device_put(jax.tree.map(jnp.copy, base), base_layout), jax.device_put(params, layout)
    )
    self.assertEqual(jax.tree.map(lambda leaf: leaf.sharding, sharded), base_layout)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), sharded, expected
    )

  def test_merging_rounds_once(self):
    # Fails if the product is rounded to bfloat16 before the sum, or if the result's dtype changes.
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

  def test_peft_files(self):
    # Fails if A and B are not transposed, if a layer has another layer's name, or if one of two
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
    ((4, 8.0, ("query", "embedding")), "targets .* query, .*, not embedding."),
    ((4, 8.0, ()), "targets .* not empty."),
    ((0, 8.0, ("query",)), "rank .* alpha .* not 0 and 8.0."),
    ((4, 0.0, ("query",)), "rank .* alpha .* not 4 and 0.0."),
  )
  def test_refuses(self, arguments, pattern):
    # Fails if a check is removed.
    with self.assertRaisesRegex(UserError, pattern):
      Adapter(tiny_model.model(), *arguments)

  def test_the_config_has_the_same_targets(self):
    # Fails if adapters and the check of the config know different matrices.
    self.assertEqual(adapter_lib.TARGETS, config_schema.MATRICES)


if __name__ == "__main__":
  absltest.main()
