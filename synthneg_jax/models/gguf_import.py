"""Converts a GGUF file of llama architecture to a Hugging Face folder.

GGUF is llama.cpp's format: one file with metadata, tokenizer and (mostly quantised) weights. The
folder, which AutoTokenizer and LlamaForCausalLM can load, has float32 weights, so that conversion
adds no rounding.

  python -m synthneg_jax.models.gguf_import MODEL.gguf OUT_DIR

Other architectures, scaled rotary embeddings, biases, experts and other pre-tokenizers have not
been tested and are refused.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as token_models

from synthneg_jax.runtime.errors import UserError

_MAGIC = b"GGUF"

# Hugging Face names by GGUF names. Those of block i have the prefixes "blk.<i>." and
# "model.layers.<i>.".
_TOP_NAMES = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
  "attn_norm.weight": "input_layernorm.weight",
  "attn_q.weight": "self_attn.q_proj.weight",
  "attn_k.weight": "self_attn.k_proj.weight",
  "attn_v.weight": "self_attn.v_proj.weight",
  "attn_output.weight": "self_attn.o_proj.weight",
  "ffn_norm.weight": "post_attention_layernorm.weight",
  "ffn_gate.weight": "mlp.gate_proj.weight",
  "ffn_up.weight": "mlp.up_proj.weight",
  "ffn_down.weight": "mlp.down_proj.weight",
}

# The token types of a GGUF vocabulary that are matched in the text before merges.
_CONTROL, _USER_DEFINED = 3, 4


def convert(gguf_path, out_dir) -> None:
  """Writes config, weights and tokenizer of a GGUF file into a Hugging Face folder.

  Args:
    gguf_path: the GGUF file.
    out_dir: created with its parents; receives config.json, generation_config.json,
      model.safetensors, tokenizer.json and tokenizer_config.json, replacing existing files.

  Raises:
    UserError: the file is not a GGUF file or is not supported, or the folder cannot be written.
  """
  source = _Source(pathlib.Path(gguf_path))
  out_dir = pathlib.Path(out_dir)
  config = _config(source)
  tokenizer, tokenizer_config = _tokenizer(source, config)
  weights = _weights(source, config)
  generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
  try:
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_json(out_dir / "config.json", config)
    _write_json(out_dir / "generation_config.json", generation)
    _write_json(out_dir / "tokenizer_config.json", tokenizer_config)
    (out_dir / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    safetensors.numpy.save_file(weights, out_dir / "model.safetensors", metadata={"format": "pt"})
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{out_dir}: the converted model could not be written ({error}).") from error


class _Source:
  """The metadata and tensors of a GGUF file; errors name the file."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    try:
      import gguf  # optional: only this conversion needs it
    except ModuleNotFoundError as error:
      raise UserError(
        "Reading a GGUF file needs the pip package gguf: pip install gguf."
      ) from error
    try:
      with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    except OSError as error:
      raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    if magic != _MAGIC:
      raise UserError(f"{path}: is not a GGUF file (it does not start with GGUF).")
    try:
      reader = gguf.GGUFReader(path)
    except (IndexError, KeyError, OverflowError, ValueError) as error:
      raise UserError(f"{path}: is a damaged or truncated GGUF file ({error}).") from error
    self._fields = reader.fields
    self._tensors = {tensor.name: tensor for tensor in reader.tensors}
    self._dequantize = gguf.dequantize

  def get(self, key: str, default: Any = None) -> Any:
    """The metadata value of `key`, or `default` if it is missing."""
    field = self._fields.get(key)
    return default if field is None else field.contents()

  def need(self, key: str) -> Any:
    """The metadata value of `key`, which is required."""
    if key not in self._fields:
      raise UserError(f"{self.path}: the metadata has no {key}.")
    return self.get(key)

  def token_id(self, name: str) -> int | None:
    """The id of a special token; EOS is required."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = self.need(key) if name == "eos" else self.get(key)
    if value is not None and type(value) is not int:
      raise UserError(f"{self.path}: {key} is {value!r}, not an integer.")
    return value

  def names(self) -> set[str]:
    """The names of all tensors."""
    return set(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a required tensor, slowest axis first as in numpy and Hugging Face."""
    if name not in self._tensors:
      raise UserError(f"{self.path}: the tensor {name} is missing.")
    return tuple(int(size) for size in reversed(self._tensors[name].shape))

  def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A required tensor as float32; it must have this shape."""
    if self.shape(name) != shape:
      raise UserError(f"{self.path}: the tensor {name} has shape {self.shape(name)}, not {shape}.")
    tensor = self._tensors[name]
    try:
      values = self._dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise UserError(
        f"{self.path}: the tensor {name} has an unsupported type ({error})."
      ) from error
    return np.asarray(values, dtype=np.float32).reshape(shape)


def _config(source: _Source) -> dict[str, Any]:
  """The fields of a LlamaConfig; the vocabulary size is that of the embedding."""
  architecture = source.need("general.architecture")
  if architecture != "llama":
    raise UserError(
      f"{source.path}: the architecture is {architecture}; only llama can be converted."
    )
  hidden = source.need("llama.embedding_length")
  heads = source.need("llama.attention.head_count")
  kv_heads = source.get("llama.attention.head_count_kv", heads)
  if not isinstance(heads, int) or not isinstance(kv_heads, int):
    raise UserError(
      f"{source.path}: the number of attention heads differs between blocks (not supported)."
    )
  head_dim = source.get("llama.attention.key_length", hidden // heads)
  rotary = source.get("llama.rope.dimension_count", head_dim)
  if rotary != head_dim:
    raise UserError(
      f"{source.path}: only {rotary} of {head_dim} head dimensions rotate (not supported)."
    )
  scaling = source.get("llama.rope.scaling.type", "none")
  if scaling != "none":
    raise UserError(f"{source.path}: scaled rotary embeddings ({scaling}) are not supported.")
  theta = _shortest(source.get("llama.rope.freq_base", 10000.0))
  return {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": source.token_id("bos"),
    "dtype": "float32",
    "eos_token_id": source.token_id("eos"),
    "head_dim": head_dim,
    "hidden_act": "silu",
    "hidden_size": hidden,
    "intermediate_size": source.need("llama.feed_forward_length"),
    "max_position_embeddings": source.need("llama.context_length"),
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": heads,
    "num_hidden_layers": source.need("llama.block_count"),
    "num_key_value_heads": kv_heads,
    "pad_token_id": source.token_id("padding"),
    "rms_norm_eps": _shortest(source.need("llama.attention.layer_norm_rms_epsilon")),
    # transformers 5 reads rope_parameters, earlier versions read rope_theta.
    "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
    "rope_theta": theta,
    # Files without an output matrix use the embedding.
    "tie_word_embeddings": "output.weight" not in source.names(),
    "vocab_size": source.shape("token_embd.weight")[0],
  }


def _weights(source: _Source, config: dict[str, Any]) -> dict[str, np.ndarray]:
  """All weights as float32 by their Hugging Face names.

  Raises:
    UserError: a tensor is missing, has another shape than the config implies, or is not part of a
      LlamaForCausalLM.
  """
  hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
  heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
  head_dim = config["head_dim"]
  block_shapes = {
    "attn_norm.weight": (hidden,),
    "attn_q.weight": (heads * head_dim, hidden),
    "attn_k.weight": (kv_heads * head_dim, hidden),
    "attn_v.weight": (kv_heads * head_dim, hidden),
    "attn_output.weight": (hidden, heads * head_dim),
    "ffn_norm.weight": (hidden,),
    "ffn_gate.weight": (inner, hidden),
    "ffn_up.weight": (inner, hidden),
    "ffn_down.weight": (hidden, inner),
  }
  rotated = {"attn_q.weight": heads, "attn_k.weight": kv_heads}

  top_shapes = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
  if not config["tie_word_embeddings"]:
    top_shapes["output.weight"] = (vocab, hidden)
  weights = {_TOP_NAMES[name]: source.read(name, shape) for name, shape in top_shapes.items()}
  unused = source.names() - set(top_shapes)
  for block in range(config["num_hidden_layers"]):
    for suffix, shape in block_shapes.items():
      name = f"blk.{block}.{suffix}"
      value = source.read(name, shape)
      unused.discard(name)
      if suffix in rotated:
        value = _undo_permutation(value, rotated[suffix])
      weights[f"model.layers.{block}.{_BLOCK_NAMES[suffix]}"] = value
  if unused:
    raise UserError(f"{source.path}: the tensor {min(unused)} is not part of a llama model.")
  return {name: np.ascontiguousarray(value) for name, value in weights.items()}


def _undo_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
  """Restores Hugging Face's row order in a query or key projection.

  Rotary embeddings rotate pairs of head dimensions. Hugging Face pairs row j of a head with row j +
  half; llama.cpp pairs neighbours, so its converter moved row j to 2j and row j + half to 2j + 1.
  """
  rows, columns = weight.shape
  pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
  return pairs.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(
  source: _Source, config: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
  """The file's byte-level BPE tokenizer, and the content of tokenizer_config.json."""
  kind, pre_tokenizer = source.need("tokenizer.ggml.model"), source.get("tokenizer.ggml.pre")
  if (kind, pre_tokenizer) != ("gpt2", "smollm"):
    raise UserError(
      f"{source.path}: the tokenizer is {kind} with pre-tokenizer {pre_tokenizer}; only gpt2 with "
      "smollm is supported."
    )
  if source.get("tokenizer.ggml.add_bos_token", False):
    raise UserError(f"{source.path}: add_bos_token is not supported.")
  tokens, types = source.need("tokenizer.ggml.tokens"), source.need("tokenizer.ggml.token_type")
  if not len(tokens) == len(types) == config["vocab_size"]:
    raise UserError(
      f"{source.path}: {len(tokens)} tokens, {len(types)} token types and {config['vocab_size']} "
      "rows of the embedding must be equal."
    )
  special_ids = {
    "bos_token": config["bos_token_id"],
    "eos_token": config["eos_token_id"],
    "pad_token": config["pad_token_id"],
    "unk_token": source.get("tokenizer.ggml.unknown_token_id"),
  }
  special_ids = {role: index for role, index in special_ids.items() if index is not None}
  for role, index in special_ids.items():
    if index >= len(tokens):
      raise UserError(
        f"{source.path}: {role} has id {index}, but the file has {len(tokens)} tokens."
      )

  vocab = {token: index for index, token in enumerate(tokens)}
  merges = [tuple(merge.split(" ")) for merge in source.need("tokenizer.ggml.merges")]
  try:
    model = token_models.BPE(vocab=vocab, merges=merges)
  except Exception as error:  # tokenizers raises no narrower class.
    raise UserError(f"{source.path}: the merges do not match the tokens ({error}).") from error
  tokenizer = tokenizers.Tokenizer(model)
  # llama.cpp's "smollm" isolates digits, then splits the rest into words by GPT-2's pattern.
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_tokens(
    [
      tokenizers.AddedToken(token, special=token_type == _CONTROL, normalized=False)
      for token, token_type in zip(tokens, types, strict=True)
      if token_type in (_CONTROL, _USER_DEFINED)
    ]
  )

  tokenizer_config = {
    "clean_up_tokenization_spaces": False,
    "model_max_length": config["max_position_embeddings"],
    # GPT2Tokenizer of transformers 5 would replace the pre-tokenizer.
    "tokenizer_class": "PreTrainedTokenizerFast",
  }
  tokenizer_config |= {role: tokens[index] for role, index in special_ids.items()}
  template = source.get("tokenizer.chat_template")
  if template is not None:
    tokenizer_config["chat_template"] = template
  return tokenizer, tokenizer_config


def _shortest(value: float) -> float:
  """The shortest decimal with the same float32, such as 1e-05 for 9.999999747378752e-06."""
  return float(str(np.float32(value)))


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  path.write_text(
    json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Converts the file named on the command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m synthneg_jax.models.gguf_import",
    description="Converts a GGUF file of llama architecture to a Hugging Face folder with float32 "
    "weights.",
  )
  parser.add_argument("gguf", metavar="GGUF", help="GGUF file to read")
  parser.add_argument("out", metavar="OUT", help="folder to write; created if missing")
  args = parser.parse_args(argv)
  try:
    convert(args.gguf, args.out)
  except UserError as error:
    print(f"gguf_import: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
