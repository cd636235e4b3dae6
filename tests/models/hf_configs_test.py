"""Every family: logits recorded with torch, packed rows against decoding, and round trips."""

import dataclasses
import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.models import hf_configs, huggingface, rope
from synthneg_jax.models.attention import Cache
from synthneg_jax.models.config import RopeScaling
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import device_mesh
from synthneg_jax.runtime.errors import UserError
from tests import tiny_model
from tests.models import tiny_families

pytestmark = pytest.mark.slow  # compiles a model per family

F64 = {"dtype": "float64", "param_dtype": "float64"}
# (case, scan_layers): each family unrolled or scanned, and both ways if its layers differ.
FORMS = (
  ("llama, llama3 rope", False),
  ("mistral", False),
  ("mistral", True),
  ("qwen2, windows", True),
  ("qwen3", False),
  ("gemma2", False),
  ("gemma2", True),
  ("gemma3, linear rope", False),
  ("gemma3, linear rope", True),
  ("phi3, window", False),
  ("phi3, longrope, long", True),
  ("olmo2", False),
  ("olmo3", True),
  ("smollm3", False),
  ("smollm3", True),
  ("smollm3, windows", True),
  ("granite", True),
)


class FamiliesTest(parameterized.TestCase):
  @parameterized.parameters(*tiny_families.CASES)
  def test_logits_equal_torch(self, name):
    # Fails if a window, cap, norm, bias, scale, activation or rotary angle of a family changes.
    model = tiny_families.model(name, scan_layers=True)
    trees = tree_lib.pack([[Tree(tiny_families.ids(name))]], tiny_families.LENGTH)

    @jax.jit
    def forward(params, trees):
      h, _ = model.hidden(params, trees)
      return model.logits(params, h[0, jnp.asarray(tiny_families.PLACES)])

    logits = forward(tiny_families.params(model), trees)
    recorded = json.loads(tiny_families.RECORDED.read_text())[name]
    self.assertGreater(np.ptp(recorded), 1.0)
    np.testing.assert_allclose(logits, recorded, rtol=0, atol=1e-4)

  @parameterized.parameters(*FORMS)
  def test_packing_prefill_and_decoding_agree(self, name, scan):
    # Fails if packed branches, prefill or decoding omit a window, a cap or a rotary base: in the
    # trunk, across a fork, or within a branch longer than the window.
    with jax.enable_x64(True):
      model = tiny_families.model(name, scan_layers=scan, **F64)
      params = tiny_families.params(model)
      text = tiny_families.ids(name)
      trunk, fork, branch = text[:10], 8, text[10:18]
      tree = Tree(trunk, (Branch(10, [5, 6, 7]), Branch(fork, branch)))
      hidden = jax.jit(functools.partial(model.hidden, with_cache=True))
      packed, _ = hidden(params, tree_lib.pack([[Tree([9, 9, 9]), tree]], 28))
      unpacked, _ = hidden(params, tree_lib.pack([[Tree(trunk[:fork] + branch)]], 28))
      packed_branch = packed[0, 3 + 10 + 3 :][: len(branch)]
      expected = unpacked[0, fork : fork + len(branch)]
      np.testing.assert_allclose(packed_branch, expected, rtol=0, atol=1e-9)

      _, (k, v) = hidden(params, tree_lib.pack([[Tree(trunk)]], 28))
      c = model.config
      suffix = jnp.zeros((c.num_layers, 1, 1, c.num_kv_heads, len(branch), c.head_dim))
      suffix = suffix if scan else tuple(suffix)
      cache = Cache(jax.tree.map(lambda x: x.swapaxes(-1, -2), k), v, suffix, suffix)
      weights = params if scan else model.unstack(params)
      step = jax.jit(model.hidden_step)
      for index, token in enumerate(branch):
        newest, forks, indices = (
          jnp.asarray([[value]], jnp.int32) for value in (token, fork, index)
        )
        h, cache = step(weights, newest, cache, fork=forks, index=indices)
        np.testing.assert_allclose(h[0, 0], expected[index], rtol=0, atol=1e-9)

  @parameterized.parameters(*tiny_families.CASES)
  def test_round_trip(self, name):
    # Fails if an option is missing from config.json, if a tensor has another name, or if bits
    # change.
    model = tiny_families.model(name)
    raw = hf_configs.write(model.config, 64)
    settings = self.settings(model) | {"max_length": tiny_families.LENGTH}
    self.assertEqual(hf_configs.read(raw, "x", **settings), model.config)
    for key in ("model_type", "num_key_value_heads", "max_position_embeddings", "hidden_size"):
      self.assertEqual(raw[key], tiny_families.config_json(name)[key])
    params = tiny_families.params(model)
    layout = device_mesh.shardings(tiny_model.one_device_mesh(), model.logical_axes())
    with tempfile.TemporaryDirectory() as root:
      ours, theirs = pathlib.Path(root) / "ours", pathlib.Path(root) / "theirs"
      huggingface.save(ours, model, params)
      tiny_families.write_folder(name, theirs)
      for folder in (ours, theirs):
        loaded = huggingface.load_params(folder, model, layout)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
    self.assertEqual(sum(leaf.size for leaf in jax.tree.leaves(params)), model.config.num_params)

  @parameterized.parameters("llama, biases", "olmo2", "phi3", "granite")
  def test_sharded(self, name):
    # Fails if a bias, a norm over all heads or a part of a fused tensor is not sharded like its
    # matrix. The mesh must divide the vocabulary.
    model = Model(dataclasses.replace(tiny_families.model(name).config, vocab_size=64))
    whole, mesh = tiny_families.params(model), device_mesh.make_mesh(2, 2, 2)
    layout = device_mesh.shardings(mesh, model.logical_axes())
    with tempfile.TemporaryDirectory() as folder:
      huggingface.save(pathlib.Path(folder) / "x", model, whole)
      split = huggingface.load_params(pathlib.Path(folder) / "x", model, layout)
    self.assertEqual(jax.tree.map(lambda leaf: leaf.sharding, split), layout)
    trees = tree_lib.pack([[Tree(tiny_families.ids(name))]] * 4, tiny_families.LENGTH)

    def forward(params, trees):
      return model.logits(params, model.hidden(params, trees)[0])

    expected = jax.jit(forward)(whole, trees)
    logits = jax.jit(device_mesh.under(mesh, forward))(split, trees)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)

  def settings(self, model):
    return {
      key: getattr(model.config, key) for key in ("dtype", "param_dtype", "scan_layers", "remat")
    }

  @parameterized.parameters(
    (
      {"qkv_bias": True},
      "llama .* qkv_bias True: transformers would use False.",
    ),
    ({"mlp_bias": True, "family": "qwen3", "qk_norm": "head"}, "qwen3 .* mlp_bias True"),
    ({"residual_scale": 0.5}, "llama .* residual_scale 0.5"),
    ({"attention_cap": 3.0}, "llama .* attention_cap 3.0"),
    ({"family": "gemma2"}, 'hidden_activation "silu" is not supported'),
    ({"family": "qwen2"}, "qwen2 .* qkv_bias False"),
  )
  def test_refuses_to_export_what_transformers_would_ignore(self, changes, pattern):
    # Fails if a folder is written for which transformers would ignore an option.
    with self.assertRaisesRegex(UserError, pattern):
      hf_configs.write(dataclasses.replace(tiny_model.CONFIG, **changes))

  @parameterized.parameters(
    ("gemma3", (5, 5, 5, 5, 5, 0, 5)),
    ("gemma2", (5, 0, 5)),
    ("qwen2, windows", (0, 4, 4)),
    ("mistral", (5, 5, 5)),
    ("llama", (0, 0, 0)),
  )
  def test_windows_by_layer(self, name, windows):
    # Fails if layers without a window are counted from the other end, or have one.
    self.assertEqual(tiny_families.model(name).config.layer_windows, windows)

  def test_a_window_is_exact(self):
    # Fails if a window reaches one position more or less, or counts row indices instead of
    # positions: gradients beyond it are 0.
    with jax.enable_x64(True):
      config = tiny_families.model("mistral", **F64).config
      model = Model(dataclasses.replace(config, num_layers=1, windowed=(True,)))
      params = tiny_families.params(model)
      tree = Tree(list(range(4, 12)), (Branch(3, [20, 21]), Branch(8, [22, 23])))
      trees = tree_lib.pack([[Tree([30, 31]), tree]], 16)

      def last(embedding):
        h, _ = model.hidden({**params, "ends": {**params["ends"], "embedding": embedding}}, trees)
        return jnp.sum(jnp.sin(h[0, jnp.asarray([13, 11])]), axis=-1)

      seen = np.any(jax.jit(jax.jacrev(last))(params["ends"]["embedding"]) != 0, axis=-1)
      # A window of 5: positions 0 to 4, and 5 to 9.
      self.assertEqual(np.flatnonzero(seen[0]).tolist(), [4, 5, 6, 20, 21])
      self.assertEqual(np.flatnonzero(seen[1]).tolist(), [9, 10, 11, 22, 23])


class RopeTest(parameterized.TestCase):
  def test_llama3_bands(self):
    # Fails if high frequencies are scaled, low ones are not, or the ramp between them is inverted.
    plain, _ = rope.frequencies(64, 5e5)
    scaled, factor = rope.frequencies(64, 5e5, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0))
    turns, ratio = 8192 * plain / (2 * np.pi), scaled / plain
    self.assertEqual(factor, 1.0)
    np.testing.assert_allclose(ratio[turns > 4], 1.0)
    np.testing.assert_allclose(ratio[turns < 1], 1 / 8)
    between = ratio[(turns > 1) & (turns < 4)]
    self.assertNotEmpty(between)
    self.assertTrue(np.all((between > 1 / 8) & (between < 1) & (np.diff(between, prepend=1.0) < 0)))

  def test_dynamic_and_unknown(self):
    # Fails if texts within the original length are scaled, or an unknown kind is ignored.
    np.testing.assert_array_equal(
      rope.frequencies(8, 1e4, RopeScaling("dynamic", 4.0, 64))[0], rope.frequencies(8, 1e4)[0]
    )
    with self.assertRaisesRegex(UserError, "'ntk' .* linear, llama3, yarn, longrope, dynamic"):
      rope.frequencies(8, 1e4, RopeScaling("ntk", 2.0))


if __name__ == "__main__":
  absltest.main()
