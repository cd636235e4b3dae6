"""Hugging Face folders: round trips, errors, and SmolLM2's logits compared with torch."""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import tracemalloc
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tokenizers
import transformers
from absl.testing import absltest, parameterized

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.models import hf_configs, huggingface
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import device_mesh
from synthneg_jax.runtime.errors import UserError
from tests import tiny_model
from tests.models import smollm2

SETTINGS = {"dtype": "float32", "param_dtype": "float32", "scan_layers": False, "remat": "none"}
CONFIG = {
  "model_type": "llama",
  "vocab_size": 31,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 4,
  "intermediate_size": 24,
  "rms_norm_eps": 1e-05,
  "rope_theta": 10000.0,
}

# A chat prompt ("What is the capital of France, and why is it famous?"), and its float32 logits at
# the last token by transformers 5.23 and torch 2.13: the five largest, and those of eight fixed
# ids.
PROMPT = [
  1,
  9690,
  198,
  2683,
  359,
  253,
  5356,
  5646,
  11173,
  3365,
  3511,
  308,
  34519,
  28,
  7018,
  411,
  407,
  19712,
  8182,
  2,
  198,
  1,
  4093,
  198,
  1780,
  314,
  260,
  3575,
  282,
  4649,
  28,
  284,
  1701,
  314,
  357,
  4248,
  47,
  2,
  198,
  1,
  520,
  9531,
  198,
]
TOP = {504: 26.678865, 60: 24.408136, 15319: 24.180080, 30904: 24.149361, 50: 23.913246}
OTHERS = {
  0: 9.235891,
  1: 5.819737,
  2: 6.330442,
  198: 13.265615,
  1000: 10.887404,
  10000: 6.593653,
  30000: 5.065942,
  49151: 2.350363,
}


def shardings(model, mesh=None):
  return device_mesh.shardings(mesh or tiny_model.one_device_mesh(), model.logical_axes())


def make_params(model, seed=0):
  """Random parameters, drawn without compiling a program."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), model.abstract_params()
  )


def bits(params):
  return {
    jax.tree_util.keystr(path): (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


class FolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.root = pathlib.Path(folder.name)

  def assert_user_error(self, sentence, call, *args, **kwargs):
    with self.assertRaises(UserError) as caught:
      call(*args, **kwargs)
    self.assertIn(sentence, str(caught.exception))
    self.assertNotIn("\n", str(caught.exception))


class RoundTripTest(FolderTest):
  @parameterized.parameters(
    (False, "float32", None), (True, "bfloat16", 2000), (False, "float16", 1)
  )
  def test_round_trip(self, tied, dtype, limit):
    # Fails if a matrix is transposed only once, if a layer or a shard is lost, or if a value passes
    # through another dtype.
    model = tiny_model.model(
      tie_embeddings=tied, param_dtype=dtype, rope_theta=123.5, norm_eps=2e-6
    )
    params = make_params(model)
    huggingface.save(
      self.root / "a/b", model, params, **({"max_shard_bytes": limit} if limit else {})
    )
    self.assertEqual(
      huggingface.read_config(self.root / "a/b", **SETTINGS | {"param_dtype": dtype}), model.config
    )
    self.assertEqual(
      bits(huggingface.load_params(self.root / "a/b", model, shardings(model))), bits(params)
    )
    self.assertEqual([path.name for path in (self.root / "a").iterdir()], ["b"])
    files = sorted(path.name for path in (self.root / "a/b").glob("*.safetensors*"))
    if limit is None:
      self.assertEqual(files, ["model.safetensors"])
    else:
      self.assert_well_sharded(self.root / "a/b", files, model, limit)

  def assert_well_sharded(self, folder, files, model, limit):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    self.assertEqual(
      index["metadata"]["total_size"],
      sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.abstract_params())),
    )
    shards = [name for name in files if name.endswith(".safetensors")]
    self.assertEqual(
      shards, [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    self.assertGreater(len(shards), 2)
    weight_map = {}
    for shard in shards:
      tensors = safetensors.numpy.load_file(folder / shard)
      self.assertTrue(len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= limit)
      weight_map |= dict.fromkeys(tensors, shard)
    self.assertEqual(index["weight_map"], weight_map)

  def test_shardings(self):
    # Fails if parameters are not sharded by `shardings`, or sharding changes the exported bits.
    model = tiny_model.model(vocab_size=32)
    params, mesh = make_params(model), device_mesh.make_mesh(2, 2, 2)
    huggingface.save(self.root / "x", model, params)
    loaded = huggingface.load_params(str(self.root / "x"), model, shardings(model, mesh))
    self.assertEqual(bits(loaded), bits(params))
    self.assertEqual(jax.tree.map(lambda leaf: leaf.sharding, loaded), shardings(model, mesh))
    huggingface.save(self.root / "y", model, loaded)
    self.assertEqual(
      (self.root / "x/model.safetensors").read_bytes(),
      (self.root / "y/model.safetensors").read_bytes(),
    )

  @parameterized.product(
    source=[np.float32, np.float16, ml_dtypes.bfloat16],
    param_dtype=["float32", "bfloat16", "float16"],
  )
  def test_casts(self, source, param_dtype):
    # Fails if bits are reinterpreted, or if the file's dtype is kept.
    model = tiny_model.model(param_dtype=param_dtype)
    huggingface.save(self.root / "x", tiny_model.model(), make_params(tiny_model.model()))
    path = self.root / "x/model.safetensors"
    tensors = {
      name: value.astype(source) for name, value in safetensors.numpy.load_file(path).items()
    }
    safetensors.numpy.save_file(tensors, path)
    loaded = huggingface.load_params(self.root / "x", model, shardings(model))
    expected = jax.tree.map(
      lambda leaf: leaf.astype(source).astype(param_dtype), make_params(tiny_model.model())
    )
    self.assertEqual(bits(loaded), bits(expected))


class MemoryTest(FolderTest):
  @parameterized.parameters((1, 1, 1), (2, 2, 2), (1, 8, 1), (8, 1, 1))
  def test_the_host_holds_one_parameter_at_a_time(self, data, fsdp, tensor):
    # Fails if two parameters are on the host at once, or if a part is read once per device.
    model = tiny_model.model(vocab_size=4000, d_model=128, d_ff=512, num_layers=8, head_dim=32)
    huggingface.save(self.root / "x", model, make_params(model))
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.abstract_params())]
    mesh = device_mesh.make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])

    def read_and_discard(shape, sharding, part):
      """Acts like an accelerator: on CPU, jax would use the host's buffer as the parameter."""
      for index in sharding.addressable_devices_indices_map(shape).values():
        part(index)
      return jax.ShapeDtypeStruct(shape, np.float32)

    layout = shardings(model, mesh)
    with mock.patch.object(jax, "make_array_from_callback", read_and_discard):
      huggingface.load_params(self.root / "x", model, layout)  # fills imports and caches
      tracemalloc.start()
      huggingface.load_params(self.root / "x", model, layout)
      peak = tracemalloc.get_traced_memory()[1]
      tracemalloc.stop()
    self.assertGreater(sum(sizes), 5 * max(sizes))
    self.assertBetween(peak, max(sizes), 1.1 * max(sizes) + 400_000)


class ExportTest(FolderTest):
  def make_tokenizer(self):
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "one": 3, "two": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(self.root / "base")

  def test_transformers_reads_the_export(self):
    # Fails if a size, the rotary base, ε, the tie or a special token is missing or has another key.
    self.make_tokenizer()
    (self.root / "base/config.json").write_text('{"max_position_embeddings": 77}')
    (self.root / "base/model.safetensors").write_bytes(b"not to be copied")
    model = tiny_model.model(tie_embeddings=True, rope_theta=123.5, norm_eps=2e-6)
    huggingface.save(
      self.root / "x", model, make_params(model), tokenizer_folder=self.root / "base"
    )
    config = transformers.AutoConfig.from_pretrained(self.root / "x")
    self.assertIsInstance(config, transformers.LlamaConfig)
    expected = {
      "architectures": ["LlamaForCausalLM"],
      "vocab_size": 31,
      "hidden_size": 16,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "head_dim": 4,
      "intermediate_size": 24,
      "hidden_act": "silu",
      "rope_parameters": {"rope_theta": 123.5, "rope_type": "default"},
      "rms_norm_eps": 2e-6,
      "tie_word_embeddings": True,
      "attention_bias": False,
      "mlp_bias": False,
      "max_position_embeddings": 77,
      "bos_token_id": 1,
      "eos_token_id": 2,
      "pad_token_id": 0,
    }
    self.assertEqual({key: getattr(config, key) for key in expected}, expected)
    written = json.loads((self.root / "x/config.json").read_text())
    self.assertEqual((written["rope_theta"], written["dtype"]), (123.5, "float32"))
    generation = transformers.GenerationConfig.from_pretrained(self.root / "x")
    self.assertEqual(
      (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id), (1, 2, 0)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(self.root / "x")
    self.assertEqual((tokenizer("one two")["input_ids"], tokenizer.eos_token_id), ([3, 4], 2))
    self.assertEqual(
      os.stat(self.root / "x/model.safetensors").st_mode,
      os.stat(self.root / "x/config.json").st_mode,
    )

  @parameterized.parameters(
    ({"model_type": "gemma"}, True), ({"model_type": "llama"}, False),
    ({"model_type": "gemma", "tie_word_embeddings": False}, False),
    ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, True),
  )  # fmt: skip
  def test_the_config_ties_as_the_weights_do(self, raw, tied):
    # Fails if a family's default counts for an untied head when the key is missing.
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    (folder / "config.json").write_text(json.dumps(raw))
    for ties in (tied, not tied):
      huggingface.write_tie_embeddings(folder, ties)
      written = json.loads((folder / "config.json").read_text())
      self.assertEqual(hf_configs.ties_embeddings(written, folder), ties)
    self.assertEqual(written["tie_word_embeddings"], not tied)

  @parameterized.parameters(("256", 256), (256.0, 256), (None, None))
  def test_positions_are_exported_as_numbers(self, given, expected):
    # Fails if a string or a float of the base's config reaches transformers, which refuses it.
    raw = {"text_config": {"max_position_embeddings": given}}
    self.assertEqual(hf_configs.positions(raw, "x"), expected)
    for wrong in ("many", 0.5, [1]):
      with self.assertRaisesRegex(UserError, "^x: max_position_embeddings is .*, not a whole"):
        hf_configs.positions({"max_position_embeddings": wrong}, "x")

  def test_without_a_tokenizer_special_tokens_are_null(self):
    # Fails if the keys are missing: transformers would use 1 and 2.
    huggingface.save(self.root / "x", tiny_model.model(), make_params(tiny_model.model()))
    config = transformers.AutoConfig.from_pretrained(self.root / "x")
    self.assertEqual([config.bos_token_id, config.eos_token_id, config.pad_token_id], [None] * 3)

  def test_a_failed_call_leaves_no_folder(self):
    # Fails if files are written into the final folder, or if the remains of an interrupted call are
    # an obstacle or remain.
    model = tiny_model.model()
    with mock.patch.object(safetensors.numpy, "save_file", side_effect=OSError("disk full")):
      self.assert_user_error(
        "x cannot be written (disk full).",
        huggingface.save,
        self.root / "x",
        model,
        make_params(model),
      )
    self.assertEqual([path.name for path in self.root.iterdir()], [".x.partial"])
    (self.root / ".x.partial/model-00001-of-00002.safetensors").write_bytes(b"old")
    (self.root / "x").mkdir()
    huggingface.save(self.root / "x", model, make_params(model))
    self.assertEqual([path.name for path in self.root.iterdir()], ["x"])
    self.assertSameElements(
      [path.name for path in (self.root / "x").iterdir()],
      ["config.json", "generation_config.json", "model.safetensors"],
    )

  def test_refuses(self):
    # Fails if a folder in use is overwritten, or if a tokenizer or a size that transformers refuses
    # is exported.
    (self.root / "full").mkdir()
    (self.root / "full/notes.txt").write_text("notes")
    (self.root / "bare").mkdir()

    def save(name, model, base=None):
      huggingface.save(self.root / name, model, make_params(model), tokenizer_folder=base)

    for name in ("full", "full/notes.txt"):
      self.assert_user_error(
        f"{name} already exists and is not an empty folder.", save, name, tiny_model.model()
      )
    self.assert_user_error(
      "bare has no tokenizer that transformers can load",
      save,
      "x",
      tiny_model.model(),
      self.root / "bare",
    )
    self.assert_user_error(
      "d_model is 18 and num_heads is 4.", save, "x", tiny_model.model(d_model=18)
    )
    self.assertSameElements([path.name for path in self.root.iterdir()], ["full", "bare"])


class ConfigTest(FolderTest):
  def read(self, **changes):
    config = {key: value for key, value in (CONFIG | changes).items() if value != "(none)"}
    (self.root / "config.json").write_text(json.dumps(config))
    return huggingface.read_config(self.root, **SETTINGS)

  @parameterized.parameters(
    ({}, {}),
    ({"rope_theta": "(none)"}, {"rope_theta": 10000.0}),
    ({"rope_theta": 500000}, {"rope_theta": 500000.0}),
    (
      {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_scaling": None},
      {"rope_theta": 5e5},
    ),
    ({"rope_theta": "(none)", "rope_parameters": {"rope_theta": 7.0}}, {"rope_theta": 7.0}),
    ({"head_dim": None, "num_key_value_heads": None}, {"head_dim": 4, "num_kv_heads": 4}),
    ({"head_dim": "(none)", "num_key_value_heads": "(none)"}, {"head_dim": 4, "num_kv_heads": 4}),
    ({"rms_norm_eps": "(none)"}, {"norm_eps": 1e-6}),
    ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
    ({"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}, {}),
    ({"partial_rotary_factor": 1.0, "rope_scaling": {"rope_type": "default"}}, {}),
    (
      {"attention_bias": True, "mlp_bias": True},
      {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    ),
    # Numbers in strings, and integral floats.
    (
      {"hidden_size": "16", "vocab_size": 31.0, "num_hidden_layers": "2.0", "rms_norm_eps": "1e-5"},
      {},
    ),
    (
      {"rope_theta": "500000", "tie_word_embeddings": "false", "num_attention_heads": "4"},
      {"rope_theta": 500000.0},
    ),
    (
      {
        "model_type": "qwen2",
        "use_sliding_window": "true",
        "max_window_layers": "1",
        "sliding_window": "7",
      },
      {"family": "qwen2", "qkv_bias": True, "windowed": (False, True), "window": 7},
    ),
    ({"tie_word_embeddings": "True", "partial_rotary_factor": "1.0"}, {"tie_embeddings": True}),
  )
  def test_reads(self, changes, expected):
    # Fails if a default differs from LlamaConfig's, or if rope_parameters of transformers 5 are
    # ignored.
    self.assertEqual(self.read(**changes), dataclasses.replace(tiny_model.CONFIG, **expected))

  @parameterized.parameters(
    ({"model_type": "gpt2"}, 'model_type "gpt2" is not supported, only llama, mistral, qwen2, '),
    ({"model_type": "gemma3"}, "text_config is null, not an object."),
    (
      {"model_type": "qwen3_5"},
      'model_type "qwen3_5" is not supported: linear attention',
    ),
    (
      {"model_type": "gemma4"},
      'model_type "gemma4" is not supported: per-layer inputs',
    ),
    (
      {"model_type": "qwen3_moe"},
      'model_type "qwen3_moe" is not supported: mixtures of experts',
    ),
    (
      {"model_type": "newest", "num_experts": 8},
      'model_type "newest" is not supported: mixtures of experts',
    ),
    (
      {"quantization_config": {"quant_method": "fp8"}},
      'quantization_config names "fp8": quantised weights are not supported',
    ),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers is not a list of 2 numbers"),
    (
      {
        "model_type": "phi3",
        "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]},
      },
      "rope_scaling.short_factor is a list of 1, not a list of 2 numbers",
    ),
    (
      {"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 2.0}},
      'rope_scaling.type "yarn" is not supported, only default, longrope, su are.',
    ),
    ({"model_type": "(none)"}, 'model_type "(none)" is not supported, only llama, '),
    ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not supported, only "silu" is.'),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported, only 1.0 is."),
    (
      {
        "rope_parameters": {
          "rope_theta": 1e4,
          "rope_type": "default",
          "partial_rotary_factor": 0.25,
        }
      },
      "rope_parameters.partial_rotary_factor 0.25 is not supported",
    ),
    (
      {"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope", "factor": 8.0}},
      'rope_parameters.rope_type "longrope" is not supported, only default, linear, dynamic, '
      "llama3, yarn are.",
    ),
    ({"rope_scaling": {"type": "su", "factor": 2.0}}, 'rope_scaling.type "su" is not supported'),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is null, not a positive number."),
    (
      {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
      "rope_parameters.low_freq_factor is null, not a positive number.",
    ),
    (
      {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
      "rope_parameters per kind of layer are not supported in a llama model.",
    ),
    (
      {"layer_types": ["chunked_attention"] * 2},
      'layer_types "chunked_attention" is not supported',
    ),
    (
      {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
      "layer_types of a llama model contradicts its sliding_window.",
    ),
    (
      {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
      "layer_types of a qwen2 model contradicts its sliding_window.",
    ),
    (
      {"model_type": "gemma2", "layer_types": ["sliding_attention"]},
      "layer_types is not a list of 2 kinds, one per layer.",
    ),
    ({"model_type": "gemma2", "layer_types": 3}, "layer_types is not a list of 2 kinds"),
    (
      {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": "many",
      },
      'max_window_layers is "many", not a positive whole number.',
    ),
    (
      {"rope_scaling": {"rope_type": "yarn", "factor": 4, "mscale": "a", "mscale_all_dim": 1}},
      'rope_scaling.mscale is "a", not a positive number.',
    ),
    ({"model_type": ["llama"]}, "is not supported, only llama"),
    (
      {"model_type": "gemma3_text", "rope_parameters": {"full_attention": "x"}},
      "rope_parameters.full_attention is not an object.",
    ),
    (
      {"model_type": "gemma2", "hidden_activation": "gelu"},
      'hidden_activation "gelu" is not supported',
    ),
    (
      {"model_type": "gemma2", "use_bidirectional_attention": True},
      "use_bidirectional_attention true is not supported",
    ),
    (
      {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
      "attn_logit_softcapping 50.0 is not supported",
    ),
    (
      {
        "model_type": "gemma3_text",
        "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}},
      },
      'rope_parameters.sliding_attention.rope_type "linear" is not supported, only default is.',
    ),
    (
      {"model_type": "mistral", "sliding_window": 0},
      "sliding_window is 0, not a positive whole number.",
    ),
    ({"rope_scaling": "linear"}, 'rope_scaling is "linear", not an object.'),
    ({"rope_theta": "big"}, 'rope_theta is "big", not a positive number.'),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, not a positive number."),
    ({"hidden_size": "(none)"}, "hidden_size is null, not a positive whole number."),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not a positive whole number."),
    ({"vocab_size": 31.5}, "vocab_size is 31.5, not a positive whole number."),
    ({"num_attention_heads": True}, "num_attention_heads is true, not a positive whole number."),
    ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3."),
  )
  def test_refuses(self, changes, sentence):
    # Fails if one of these options is ignored.
    self.assert_user_error(sentence, self.read, **changes)

  @parameterized.parameters(
    (None, "config.json cannot be read (No such file or directory)."),
    ("{", "config.json is not valid JSON"),
    ("[1]", "config.json is not a JSON object."),
  )
  def test_unreadable(self, text, sentence):
    # Fails if the error does not name the file.
    if text is not None:
      (self.root / "config.json").write_text(text)
    self.assert_user_error(sentence, huggingface.read_config, self.root, **SETTINGS)


class NamesTest(FolderTest):
  """The same weights under the tensor names of other programs."""

  def load_renamed(self, rename, extra):
    """The model, and parameters loaded from a folder with renamed and extra tensors."""
    model = tiny_model.model(tie_embeddings=True)
    huggingface.save(self.root / "x", model, make_params(model))
    path = self.root / "x/model.safetensors"
    tensors = {rename(name): value for name, value in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(tensors | extra, path)
    return model, huggingface.load_params(self.root / "x", model, shardings(model))

  @parameterized.parameters(
    lambda name: name.removeprefix("model."),
    lambda name: f"language_model.{name}",
    lambda name: name.replace("model.", "model.language_model."),
    lambda name: name.replace("model.", "language_model."),
  )
  def test_prefixes(self, rename):
    # Fails if a base model's folder, or a text model in a wrapper, is refused.
    vision = {"vision_tower.patch.weight": np.zeros(3, np.float32)}
    model, loaded = self.load_renamed(rename, vision)
    self.assertEqual(bits(loaded), bits(make_params(model)))

  def test_duplicates(self):
    # Fails if one of two tensors with the same canonical name is used.
    duplicate = {"norm.weight": np.zeros(16, np.float32)}
    self.assert_user_error(
      "are both model.norm.weight.", self.load_renamed, lambda name: name, duplicate
    )

  def test_a_wrapper(self):
    # Fails if the text model's config is not found, or if Gemma 3's defaults are missing.
    text = {
      "hidden_size": 32,
      "intermediate_size": 48,
      "num_hidden_layers": 3,
      "sliding_window": 16,
    }
    raw = {
      "model_type": "gemma3",
      "text_config": text | {"model_type": "gemma3_text"},
      "vision_config": {},
    }
    (self.root / "config.json").write_text(json.dumps(raw))
    config = huggingface.read_config(self.root, **SETTINGS)
    self.assertEqual(
      (config.family, config.num_layers, config.tie_embeddings), ("gemma3_text", 3, True)
    )
    self.assertEqual(
      (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim),
      (262208, 8, 4, 256),
    )
    self.assertEqual((config.rope_theta, config.windowed_rope_theta), (1e6, 1e4))


class TorchFilesTest(FolderTest):
  def save_torch_files(self, dtype="float32", shards=1):
    """Writes a folder with torch's own files instead of safetensors; needs torch."""
    torch = pytest.importorskip("torch")
    model = tiny_model.model(param_dtype=dtype)
    huggingface.save(self.root / "x", model, make_params(model))
    with safetensors.safe_open(self.root / "x/model.safetensors", framework="pt") as file:
      tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (self.root / "x/model.safetensors").unlink()
    if shards == 1:
      torch.save(tensors, self.root / "x/pytorch_model.bin")
      return model
    weight_map = {}
    for shard in range(shards):
      names = sorted(tensors)[shard::shards]
      torch.save(
        {name: tensors[name] for name in names}, self.root / f"x/pytorch_model-{shard}.bin"
      )
      weight_map |= dict.fromkeys(names, f"pytorch_model-{shard}.bin")
    (self.root / "x/pytorch_model.bin.index.json").write_text(
      json.dumps({"weight_map": weight_map})
    )
    return model

  @parameterized.parameters(("float32", 1), ("bfloat16", 1), ("float16", 3))
  def test_torch_weights(self, dtype, shards):
    # Fails if reading changes bits, or if one of several files is not read.
    model = self.save_torch_files(dtype, shards)
    self.assertEqual(
      bits(huggingface.load_params(self.root / "x", model, shardings(model))),
      bits(make_params(model)),
    )

  def test_code_in_a_file_is_not_run(self):
    # Fails if the file is unpickled without `weights_only`: any callable in it would run.
    torch = pytest.importorskip("torch")
    model = self.save_torch_files()
    torch.save({"x": pathlib.PurePosixPath("a")}, self.root / "x/pytorch_model.bin")
    self.assert_user_error(
      "pytorch_model.bin cannot be read by torch",
      huggingface.load_params,
      self.root / "x",
      model,
      shardings(model),
    )

  def test_without_torch(self):
    # Fails if the error does not give the remedy.
    (self.root / "pytorch_model.bin").write_bytes(b"")
    model = tiny_model.model()
    with mock.patch.dict(sys.modules, {"torch": None}):
      self.assert_user_error(
        "pip install torch, or convert",
        huggingface.load_params,
        self.root,
        model,
        shardings(model),
      )


class LoadErrorsTest(FolderTest):
  def change(self, model, edit):
    """Saves `model`, edits its tensors by name and loads."""
    huggingface.save(self.root / "x", model, make_params(model))
    path = self.root / "x/model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)
    return huggingface.load_params(self.root / "x", model, shardings(model))

  @parameterized.parameters(
    (
      lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
      "x: the tensor model.layers.1.mlp.up_proj.weight is missing.",
    ),
    (lambda t: t.pop("lm_head.weight"), "x: the tensor lm_head.weight is missing."),
    (
      lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros((24, 16))}),
      "model.safetensors: the tensor model.layers.2.mlp.up_proj.weight is not part of this model.",
    ),
    (
      lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(16)}),
      "the tensor model.layers.0.self_attn.q_proj.bias is not part of this model.",
    ),
    (
      lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.zeros((16, 24), np.float32)}),
      "model.safetensors: the tensor model.layers.0.mlp.up_proj.weight has shape (16, 24), not "
      "(24, 16).",
    ),
    (
      lambda t: t.update({"model.norm.weight": np.zeros(16, np.int8)}),
      "model.safetensors: the tensor model.norm.weight has dtype I8, not one of F64, F32, F16, "
      "BF16.",
    ),
    (
      lambda t: t.update({"model.norm.weight": np.zeros(16, ml_dtypes.float8_e4m3fn)}),
      "the tensor model.norm.weight has dtype F8_E4M3, not one of F64, F32, F16, BF16 (quantised "
      "weights are not supported).",
    ),
    (
      lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": np.zeros(1, np.float32)}),
      "weight_scale_inv belongs to quantised weights",
    ),
    (
      lambda t: t.update({"v_head.summary.weight": np.zeros((1, 16), np.float32)}),
      "the tensor v_head.summary.weight belongs to a value head",
    ),
  )
  def test_tensors(self, edit, sentence):
    # Fails if names, shapes or dtypes are not checked, or if the error does not name the tensor.
    self.assert_user_error(sentence, self.change, tiny_model.model(), edit)

  def test_ignores_buffers_and_a_tied_head(self):
    # Fails if rotary buffers of old checkpoints, or the copy of a tied embedding, are refused or
    # read.
    model = tiny_model.model(tie_embeddings=True)
    extra = {
      "lm_head.weight": np.zeros((31, 16)),
      "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2),
    }
    self.assertEqual(
      bits(self.change(model, lambda tensors: tensors.update(extra))), bits(make_params(model))
    )

  def test_files(self):
    # Fails if the error of safetensors, of an index or of a missing shard does not name the file.
    model, folder = tiny_model.model(), self.root / "x"

    def load():
      huggingface.load_params(folder, model, shardings(model))

    folder.mkdir()
    self.assert_user_error(
      "x has neither model.safetensors nor model.safetensors.index.json.", load
    )
    (folder / "consolidated.safetensors").write_bytes(b"")
    self.assert_user_error("x has only consolidated.safetensors", load)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    self.assert_user_error("model.safetensors.index.json has no weight_map", load)
    (folder / "model.safetensors.index.json").write_text(
      '{"weight_map": {"a": "gone.safetensors"}}'
    )
    self.assert_user_error("gone.safetensors is missing or not a safetensors file", load)
    huggingface.save(self.root / "y", model, make_params(model))
    whole = (self.root / "y/model.safetensors").read_bytes()
    for part in (b"", whole[:-1], b"\xff" + whole[1:], whole[:40]):
      (folder / "model.safetensors").write_bytes(part)
      self.assert_user_error("model.safetensors is missing or not a safetensors file", load)


@pytest.mark.slow  # a model of 135 million parameters
class SmolLM2Test(absltest.TestCase):
  def test_logits_equal_torch(self):
    # Fails if two matrices are swapped, if rotary pairs are neighbours, or if the base 100000 or ε
    # is not read.
    folder = smollm2.smollm2_dir()
    model = Model(huggingface.read_config(folder, **SETTINGS | {"scan_layers": True}))
    params = huggingface.load_params(folder, model, shardings(model))
    trees = tree_lib.pack([[tree_lib.Tree(PROMPT)]], len(PROMPT))

    @jax.jit
    def forward(params, trees):
      return model.logits(params, model.hidden(params, trees)[0][0, -1])

    logits = np.asarray(forward(params, trees))
    self.assertEqual(np.argsort(-logits)[:5].tolist(), list(TOP))
    recorded = TOP | OTHERS
    np.testing.assert_allclose(logits[list(recorded)], list(recorded.values()), rtol=0, atol=1e-3)


if __name__ == "__main__":
  absltest.main()
