"""The GGUF conversion of a tiny file written here, and of SmolLM2-135M-Instruct."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import tempfile

import gguf
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import transformers
from absl.testing import absltest, parameterized
from tokenizers import pre_tokenizers

from synthneg_jax.models import gguf_import
from synthneg_jax.runtime.errors import UserError
from tests.models import smollm2

pytestmark = pytest.mark.slow  # starts processes

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, BLOCKS = 48, 64, 6, 2, 8, 2
# The last has no role, so only its type marks it as special; WHOLE is matched whole but is not
# special.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
WHOLE = "<think>"
MERGES = ["h e", "Ġ t", "Ġt he", "1 2", "Ġ 1"]
TOKENS = (
  SPECIAL
  + [WHOLE]
  + sorted(pre_tokenizers.ByteLevel.alphabet())
  + [merge.replace(" ", "") for merge in MERGES]
)
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def temporary_folder(test: absltest.TestCase) -> pathlib.Path:
  """A folder that is deleted after the test; absl's create_tempdir needs parsed flags."""
  folder = tempfile.TemporaryDirectory()
  test.addCleanup(folder.cleanup)
  return pathlib.Path(folder.name)


def hf_weights() -> dict[str, np.ndarray]:
  """Random weights of a tiny llama by Hugging Face name, float32, with tied embeddings."""
  rng = np.random.default_rng(0)
  shapes = {"model.embed_tokens.weight": (len(TOKENS), HIDDEN), "model.norm.weight": (HIDDEN,)}
  for block in range(BLOCKS):
    prefix = f"model.layers.{block}."
    shapes |= {
      prefix + "input_layernorm.weight": (HIDDEN,),
      prefix + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
      prefix + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
      prefix + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
      prefix + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
      prefix + "post_attention_layernorm.weight": (HIDDEN,),
      prefix + "mlp.gate_proj.weight": (INNER, HIDDEN),
      prefix + "mlp.up_proj.weight": (INNER, HIDDEN),
      prefix + "mlp.down_proj.weight": (HIDDEN, INNER),
    }
  weights = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
  # Multiples of 1/32 up to 127/32 are exact in Q8_0, whose scale is a block's maximum over 127.
  whole = rng.integers(-127, 128, size=(HIDDEN, INNER))
  whole[:, ::32] = 127
  weights["model.layers.0.mlp.down_proj.weight"] = (whole / 32).astype(np.float32)
  return weights


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
  """llama.cpp's row order, as a loop: rows j and j + half of a head become neighbours."""
  head_dim = weight.shape[0] // heads
  rows = []
  for head in range(heads):
    for j in range(head_dim // 2):
      rows += [weight[head * head_dim + j], weight[head * head_dim + head_dim // 2 + j]]
  return np.stack(rows)


def gguf_tensors(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same weights by GGUF name, in llama.cpp's row order."""
  tensors = {
    "token_embd.weight": weights["model.embed_tokens.weight"],
    "output_norm.weight": weights["model.norm.weight"],
  }
  for block in range(BLOCKS):
    by_module = {
      name.split(".")[-2]: value for name, value in weights.items() if f".layers.{block}." in name
    }
    tensors |= {
      f"blk.{block}.attn_norm.weight": by_module["input_layernorm"],
      f"blk.{block}.attn_q.weight": interleave(by_module["q_proj"], HEADS),
      f"blk.{block}.attn_k.weight": interleave(by_module["k_proj"], KV_HEADS),
      f"blk.{block}.attn_v.weight": by_module["v_proj"],
      f"blk.{block}.attn_output.weight": by_module["o_proj"],
      f"blk.{block}.ffn_norm.weight": by_module["post_attention_layernorm"],
      f"blk.{block}.ffn_gate.weight": by_module["gate_proj"],
      f"blk.{block}.ffn_up.weight": by_module["up_proj"],
      f"blk.{block}.ffn_down.weight": by_module["down_proj"],
    }
  return tensors


def gguf_metadata() -> dict:
  """The metadata of the tiny file; `write_gguf` writes floats as float32 and ints as uint32."""
  return {
    "llama.block_count": BLOCKS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [4] + [1] * (len(TOKENS) - len(SPECIAL) - 1),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": TEMPLATE,
  }


def write_gguf(
  path, metadata: dict, tensors: dict[str, np.ndarray], architecture: str = "llama"
) -> None:
  """Writes a GGUF file with float32 tensors, except for block 0's ffn_down in Q8_0."""
  writer = gguf.GGUFWriter(path, architecture)
  for key, value in metadata.items():
    if isinstance(value, str):
      writer.add_string(key, value)
    elif isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    else:
      writer.add_array(key, value)
  for name, value in tensors.items():
    if name == "blk.0.ffn_down.weight":
      q8_0 = gguf.GGMLQuantizationType.Q8_0
      writer.add_tensor(name, gguf.quantize(value, q8_0), raw_dtype=q8_0)
    else:
      writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


class TinyTest(parameterized.TestCase):
  """Compares the conversion of a tiny file with the weights and tokens that it was written from."""

  def setUp(self):
    super().setUp()
    self.folder = temporary_folder(self)
    self.path = self.folder / "tiny.gguf"
    self.out = self.folder / "deep/out"

  def _convert(self, metadata=None, tensors=None, architecture="llama"):
    tensors = gguf_tensors(hf_weights()) if tensors is None else tensors
    write_gguf(self.path, gguf_metadata() | (metadata or {}), tensors, architecture)
    gguf_import.convert(self.path, self.out)

  def test_weights(self):
    # Fails if q or k remains permuted, if k is unpermuted with the number of query heads, if two
    # names are swapped, if a quantised tensor is not dequantised, or if weights are rounded to 16
    # bits.
    self._convert()
    expected = hf_weights()
    got = safetensors.numpy.load_file(self.out / "model.safetensors")
    self.assertEqual(set(got), set(expected))
    for name, value in expected.items():
      self.assertEqual(got[name].dtype, np.float32, name)
      np.testing.assert_array_equal(got[name], value, err_msg=name)

  def test_an_output_tensor_unties_the_embeddings(self):
    # Fails if output.weight is dropped or tie_word_embeddings is always true.
    output = np.random.default_rng(1).standard_normal((len(TOKENS), HIDDEN), dtype=np.float32)
    self._convert(tensors=gguf_tensors(hf_weights()) | {"output.weight": output})
    got = safetensors.numpy.load_file(self.out / "model.safetensors")
    np.testing.assert_array_equal(got["lm_head.weight"], output)
    self.assertFalse(json.loads((self.out / "config.json").read_text())["tie_word_embeddings"])

  def test_config_loads_as_a_llama_config(self):
    # Fails if a field is missing or has another field's value, if rms_norm_eps keeps the digits of
    # float32 (9.99e-06), or if rope_theta is written for transformers 4 or 5 only.
    self._convert()
    config = transformers.AutoConfig.from_pretrained(self.out)
    expected = {
      "model_type": "llama",
      "architectures": ["LlamaForCausalLM"],
      "hidden_size": HIDDEN,
      "intermediate_size": INNER,
      "num_hidden_layers": BLOCKS,
      "num_attention_heads": HEADS,
      "num_key_value_heads": KV_HEADS,
      "head_dim": HEAD_DIM,
      "vocab_size": len(TOKENS),
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 128,
      "tie_word_embeddings": True,
      "hidden_act": "silu",
      "attention_bias": False,
      "mlp_bias": False,
      "bos_token_id": 1,
      "eos_token_id": 2,
      "pad_token_id": 2,
    }
    self.assertEqual({key: getattr(config, key) for key in expected}, expected)
    self.assertEqual(config.rope_parameters["rope_theta"], 100000.0)
    raw = json.loads((self.out / "config.json").read_text())
    self.assertEqual(raw["rope_theta"], 100000.0)
    self.assertEqual(raw["rope_parameters"], {"rope_theta": 100000.0, "rope_type": "default"})
    generation = transformers.GenerationConfig.from_pretrained(self.out)
    self.assertEqual(
      (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id), (1, 2, 2)
    )

  def test_tokenizer_merges_words_and_never_digits(self):
    # Fails if the pre-tokenizer lacks Digits ("12" is a merge), if ByteLevel adds a space, if
    # merges are lost, if special and user-defined strings are not matched whole, or if
    # tokenizer_class is GPT2Tokenizer, which would replace the pre-tokenizer.
    self._convert()
    tokenizer = transformers.AutoTokenizer.from_pretrained(self.out)
    encoded = tokenizer.encode("<|im_start|>the the 12<file_sep><think><|im_end|>")
    self.assertEqual(
      tokenizer.convert_ids_to_tokens(encoded),
      ["<|im_start|>", "t", "he", "Ġthe", "Ġ", "1", "2", "<file_sep>", "<think>", "<|im_end|>"],
    )
    self.assertEqual(
      encoded, [TOKENS.index(token) for token in tokenizer.convert_ids_to_tokens(encoded)]
    )
    self.assertLen(tokenizer, len(TOKENS))

  def test_tokenizer_names_special_tokens_and_template(self):
    # Fails if a role has another id, if control tokens are not special (the decoder would not skip
    # <file_sep>), if user-defined tokens are special, or if the chat template is dropped.
    self._convert()
    tokenizer = transformers.AutoTokenizer.from_pretrained(self.out)
    self.assertEqual(
      (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token),
      ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"),
    )
    self.assertEqual(
      tokenizer.decode([0, 1, *tokenizer.encode(" the<think>"), 2, 3], skip_special_tokens=True),
      " the<think>",
    )
    text = tokenizer.apply_chat_template([{"role": "user", "content": "12"}], tokenize=False)
    self.assertEqual(text, "<|im_start|>user\n12<|im_end|>\n")

  def test_optional_metadata_may_be_absent(self):
    # Fails if a key that GGUF does not require is required.
    metadata = gguf_metadata()
    for key in (
      "tokenizer.chat_template",
      "tokenizer.ggml.padding_token_id",
      "tokenizer.ggml.unknown_token_id",
      "tokenizer.ggml.add_bos_token",
      "llama.rope.dimension_count",
      "llama.rope.freq_base",
    ):
      del metadata[key]
    write_gguf(self.path, metadata, gguf_tensors(hf_weights()))
    gguf_import.convert(self.path, self.out)
    self.assertEqual(
      transformers.AutoConfig.from_pretrained(self.out).rope_parameters["rope_theta"], 10000.0
    )
    self.assertIsNone(transformers.AutoTokenizer.from_pretrained(self.out).pad_token)

  @parameterized.named_parameters(
    ("other_tokenizer", {"tokenizer.ggml.model": "llama"}, "tokenizer is llama"),
    ("other_pre_tokenizer", {"tokenizer.ggml.pre": "qwen2"}, "pre-tokenizer qwen2"),
    ("adds_bos", {"tokenizer.ggml.add_bos_token": True}, "add_bos_token"),
    ("scaled_rotation", {"llama.rope.scaling.type": "yarn"}, "scaled .* .yarn."),
    ("partial_rotation", {"llama.rope.dimension_count": 4}, "only 4 of 8"),
    ("heads_by_block", {"llama.attention.head_count_kv": [2, 1]}, "differs between blocks"),
    (
      "other_width",
      {"llama.feed_forward_length": 32},
      r"blk.0.ffn_gate.weight has shape \(64, 48\), not \(32, 48\)",
    ),
    ("more_blocks", {"llama.block_count": 3}, "blk.2.attn_norm.weight is missing"),
    ("fewer_blocks", {"llama.block_count": 1}, "blk.1.attn_k.weight is not part of"),
    ("merge_of_no_token", {"tokenizer.ggml.merges": ["z z"]}, "merges do not match"),
    ("id_past_the_end", {"tokenizer.ggml.eos_token_id": 9999}, "eos_token has id 9999"),
    (
      "several_ends",
      {"tokenizer.ggml.eos_token_id": [2, 3]},
      "eos_token_id is .2, 3., not an integer",
    ),
    ("too_few_types", {"tokenizer.ggml.token_type": [1]}, "1 token types"),
  )
  def test_refuses_unsupported_metadata(self, metadata, message):
    # Fails if a check is removed.
    with self.assertRaisesRegex(UserError, f"^{self.path}: .*{message}.*[.]$"):
      self._convert(metadata=metadata)
    self.assertFalse(self.out.exists())

  def test_refuses_another_architecture(self):
    # Fails if the architecture is not checked first (the error would name missing llama keys).
    with self.assertRaisesRegex(UserError, "tiny.gguf: the architecture is qwen2; only llama"):
      self._convert(architecture="qwen2")

  def test_names_a_missing_key(self):
    # Fails if a required key has a default.
    metadata = gguf_metadata()
    del metadata["llama.attention.layer_norm_rms_epsilon"]
    write_gguf(self.path, metadata, gguf_tensors(hf_weights()))
    with self.assertRaisesRegex(UserError, "no llama.attention.layer_norm_rms_epsilon"):
      gguf_import.convert(self.path, self.out)

  @parameterized.parameters("blk.1.attn_k.weight", "token_embd.weight", "output_norm.weight")
  def test_names_a_missing_tensor(self, name):
    # Fails if a missing tensor is skipped, or raises KeyError.
    tensors = gguf_tensors(hf_weights())
    del tensors[name]
    with self.assertRaisesRegex(UserError, f"the tensor {name} is missing"):
      self._convert(tensors=tensors)

  def test_names_an_unexpected_tensor(self):
    # Fails if unused tensors, such as a bias, are silently dropped.
    tensors = gguf_tensors(hf_weights()) | {
      "blk.0.attn_q.bias": np.zeros(HEADS * HEAD_DIM, np.float32)
    }
    with self.assertRaisesRegex(UserError, "the tensor blk.0.attn_q.bias is not part of"):
      self._convert(tensors=tensors)

  @parameterized.parameters(2, 30, 2000, -40)
  def test_refuses_a_truncated_file(self, end):
    # Fails if exceptions of the reader are not caught, for a cut in the magic, the header, the
    # metadata or the last tensor.
    write_gguf(self.path, gguf_metadata(), gguf_tensors(hf_weights()))
    self.path.write_bytes(self.path.read_bytes()[:end])
    with self.assertRaisesRegex(UserError, "not a GGUF file|truncated GGUF file"):
      gguf_import.convert(self.path, self.out)

  def test_command_line(self):
    # Fails if a user's error prints a traceback or exits with 0, or if success does not.
    error = io.StringIO()
    self.path.write_text("hello")
    with contextlib.redirect_stderr(error):
      self.assertEqual(gguf_import.main([str(self.path), str(self.out)]), 1)
      self.assertEqual(gguf_import.main([str(self.folder / "none"), str(self.out)]), 1)
      write_gguf(self.path, gguf_metadata(), gguf_tensors(hf_weights()))
      self.assertEqual(gguf_import.main([str(self.path), str(self.path)]), 1)
    lines = error.getvalue().splitlines()
    self.assertLen(lines, 3)
    self.assertIn("is not a GGUF file", lines[0])
    self.assertIn("none: cannot be read (No such file or directory).", lines[1])
    self.assertIn("could not be written", lines[2])
    self.assertEqual(gguf_import.main([str(self.path), str(self.out)]), 0)
    self.assertTrue((self.out / "model.safetensors").exists())


class GetSmollm2Test(absltest.TestCase):
  """The parts of launch/get_smollm2.sh that need no download."""

  def _run(self, *args, **env):
    return subprocess.run(
      [smollm2.SCRIPT, *args],
      capture_output=True,
      text=True,
      check=False,
      cwd="/",
      env=os.environ | env,
    )

  def test_help(self):
    # Fails if --help exits non-zero or starts the download, which would fail without a home.
    result = self._run("--help", HOME="", XDG_CACHE_HOME="")
    self.assertEqual((result.returncode, result.stderr), (0, ""))
    self.assertIn("--dir=DIR", result.stdout)

  def test_complete_folder_is_left_alone(self):
    # Fails if the script changes or refuses a folder with all files, or leaves a lock file.
    folder = temporary_folder(self)
    for name in (
      "config.json",
      "generation_config.json",
      "model.safetensors",
      "tokenizer.json",
      "tokenizer_config.json",
    ):
      (folder / name).write_text("x")
    result = self._run(f"--dir={folder}")
    self.assertEqual(
      (result.returncode, result.stdout), (0, f"{folder} is already complete; nothing to do.\n")
    )
    self.assertFalse(folder.with_name(f"{folder.name}.lock").exists())

  def test_errors_are_one_sentence(self):
    # Fails if an unknown flag is ignored, if a missing PYTHON is replaced, or if a folder
    # with other contents is overwritten.
    folder = temporary_folder(self) / "used"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    cases = [
      (("--folder=x",), {}, "Unknown command line flag 'folder'"),
      (
        (f"--dir={folder}",),
        {"PYTHON": "/nonexistent/python"},
        "'/nonexistent/python' is missing",
      ),
      ((f"--dir={folder}",), {}, "is not a complete model; remove it"),
      ((), {"HOME": "", "XDG_CACHE_HOME": ""}, "neither HOME nor XDG_CACHE_HOME is set"),
    ]
    for args, env, message in cases:
      result = self._run(*args, **env)
      self.assertEqual(result.returncode, 1, message)
      self.assertRegex(result.stderr, rf"^get_smollm2\.(sh|py): .*{message}.*\n$")
    self.assertEqual(os.listdir(folder), ["config.json"])


class RealTest(absltest.TestCase):
  """SmolLM2-135M-Instruct, downloaded and converted if this machine does not have it."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = smollm2.smollm2_dir()
    cls.tokenizer = transformers.AutoTokenizer.from_pretrained(cls.folder)

  def test_every_digit_is_one_token(self):
    # Fails if the pre-tokenizer lacks Digits, or no longer splits digits.
    for text in ("1234567890", "$1,250.75", "In 2024 there were 365 days.", "10% of 48 = 4.8"):
      pieces = self.tokenizer.convert_ids_to_tokens(self.tokenizer.encode(text))
      self.assertEqual(
        [piece for piece in pieces if any(map(str.isdigit, piece))], list(filter(str.isdigit, text))
      )
    self.assertEqual(self.tokenizer.encode("0123456789"), list(range(32, 42)))

  def test_round_trip(self):
    # Fails if ByteLevel adds a space, if the decoder is missing or cleans up spaces, or if merges
    # lose tokens.
    for text in (
      "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 "
      "every day.\n#### 18",
      'It costs $1,250.75 , or about 12% more than $1,100 .\n\n  Is that "fair"?\tYes !',
      "\nx = 3/4; y = -2.5e3\r\n#### -2500\n",
      "Zoë's café is 20° warm — she pays €5 and £3. 😀",
    ):
      self.assertEqual(self.tokenizer.decode(self.tokenizer.encode(text)), text)

  def test_special_tokens_and_chat_template(self):
    # Fails if a special id or the template is lost, or if special strings of a rendered chat are
    # split.
    tokenizer = self.tokenizer
    self.assertEqual(
      (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id), (1, 2, 2)
    )
    self.assertEqual(
      tokenizer.convert_ids_to_tokens([0, 1, 2]), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    )
    self.assertLen(tokenizer, 49152)
    self.assertEqual(sorted(tokenizer.added_tokens_decoder), list(range(17)))
    text = tokenizer.apply_chat_template(
      [{"role": "user", "content": "2+2?"}], tokenize=False, add_generation_prompt=True
    )
    self.assertStartsWith(text, "<|im_start|>system\n")
    self.assertEndsWith(text, "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n")
    encoded = tokenizer.encode(text)
    self.assertEqual((encoded.count(1), encoded.count(2)), (3, 2))

  def test_weights_and_config(self):
    # Fails if a tensor is missing or an lm_head is written, or if config and weights disagree.
    config = transformers.AutoConfig.from_pretrained(self.folder)
    self.assertEqual(
      (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
      ),
      (30, 576, 9, 3, 64),
    )
    self.assertEqual((config.rope_parameters["rope_theta"], config.rms_norm_eps), (100000.0, 1e-5))
    self.assertTrue(config.tie_word_embeddings)
    with safetensors.safe_open(self.folder / "model.safetensors", framework="numpy") as file:
      names = file.keys()
      slices = {name: file.get_slice(name) for name in names}
      self.assertLen(slices, 272)
      self.assertNotIn("lm_head.weight", slices)
      self.assertEqual({piece.get_dtype() for piece in slices.values()}, {"F32"})
      self.assertEqual(sum(int(np.prod(piece.get_shape())) for piece in slices.values()), 134515008)


if __name__ == "__main__":
  absltest.main()
