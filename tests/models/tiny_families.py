"""Tiny models of every family and option, described by config.json, with weights from numpy.

tests/parity computes their logits with transformers and torch; family_logits.json records some.
"""

import json
import pathlib

import jax
import numpy as np
import safetensors.numpy

from synthneg_jax.models import hf_configs
from synthneg_jax.models.decoder import Model
from tests import tiny_model

RECORDED = pathlib.Path(__file__).parent / "family_logits.json"
VOCAB, LENGTH = 61, 24
PLACES = (9, LENGTH - 1)  # positions whose logits are recorded
_SIZES = {
  "vocab_size": VOCAB,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5,
  "max_position_embeddings": 64,
  "bos_token_id": None,
  "eos_token_id": 3,
  "pad_token_id": 0,
}
_LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
_GEMMA = {
  "head_dim": 12,
  "query_pre_attn_scalar": 20,
  "sliding_window": 5,
  "tie_word_embeddings": True,
}
_LONGROPE = {
  "rope_scaling": {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.5],
    "long_factor": [1.0, 2.5, 7.0],
  },
  "partial_rotary_factor": 0.75,
}
CASES = {
  "llama": {"model_type": "llama"},
  "llama, many heads, no ties": {
    "model_type": "llama",
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
  },
  "llama, one kv head, tied": {
    "model_type": "llama",
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
  },
  "llama, head_dim, base": {
    "model_type": "llama",
    "head_dim": 12,
    "rope_theta": 30.0,
    "rms_norm_eps": 0.05,
  },
  "llama, llama3 rope": {
    "model_type": "llama",
    "rope_theta": 500.0,
    "rope_scaling": {"rope_type": "llama3", **_LLAMA3},
  },
  "llama, linear rope": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
  "llama, dynamic rope": {
    "model_type": "llama",
    "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
  },
  "llama, yarn rope": {
    "model_type": "llama",
    "rope_theta": 100.0,
    "head_dim": 16,
    "rope_scaling": {
      "rope_type": "yarn",
      "factor": 4.0,
      "original_max_position_embeddings": 32,
      "beta_fast": 4.0,
    },
  },
  "mistral": {"model_type": "mistral", "sliding_window": 5},
  "mistral, no window": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
  "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
  "qwen2, windows": {
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 1,
  },
  "qwen3": {"model_type": "qwen3", "head_dim": 12, "rope_theta": 1e6},
  "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
  "qwen3, biases": {"model_type": "qwen3", "head_dim": 12, "attention_bias": True},
  "phi3": {"model_type": "phi3"},
  "phi3, window": {
    "model_type": "phi3",
    "sliding_window": 5,
    "partial_rotary_factor": 0.5,
    "num_key_value_heads": 4,
  },
  "phi3, longrope": {"model_type": "phi3", **_LONGROPE, "original_max_position_embeddings": 32},
  "phi3, longrope, long": {
    "model_type": "phi3",
    **_LONGROPE,
    "original_max_position_embeddings": 16,
  },
  "olmo2": {"model_type": "olmo2"},
  "olmo3": {
    "model_type": "olmo3",
    "num_hidden_layers": 5,
    "sliding_window": 5,
    "rope_parameters": {
      "full_attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 100.0,
      },
      "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
  },
  "smollm3": {
    "model_type": "smollm3",
    "num_hidden_layers": 5,
    "tie_word_embeddings": True,
    "rope_theta": 100.0,
  },
  "smollm3, windows": {
    "model_type": "smollm3",
    "no_rope_layers": [1, 0, 1],
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "attention_bias": True,
  },
  "granite": {
    "model_type": "granite",
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "logits_scaling": 1.5,
    "mlp_bias": True,
  },
  "gemma": {
    "model_type": "gemma",
    "head_dim": 12,
    "tie_word_embeddings": True,
    "hidden_act": "gelu",
  },
  "gemma2": {
    "model_type": "gemma2",
    **_GEMMA,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
  },
  "gemma2, no caps": {
    "model_type": "gemma2",
    **_GEMMA,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
  },
  "gemma3": {
    "model_type": "gemma3_text",
    **_GEMMA,
    "num_hidden_layers": 7,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 50.0,
  },
  "gemma3, linear rope": {
    "model_type": "gemma3_text",
    **_GEMMA,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
      "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
    "final_logit_softcapping": 4.0,
  },
}


def config_json(name: str) -> dict:
  """The content of config.json."""
  return _SIZES | CASES[name]


def model(name: str, **changes) -> Model:
  """The decoder described by config.json, for texts of LENGTH tokens."""
  settings = {
    "max_length": LENGTH,
    "dtype": "float32",
    "param_dtype": "float32",
    "scan_layers": False,
    "remat": tiny_model.CONFIG.remat,
  } | changes
  return Model(hf_configs.read(config_json(name), "config.json", **settings))


def ids(name: str) -> list[int]:
  """A text of LENGTH tokens."""
  return np.random.RandomState(len(name)).randint(4, VOCAB, LENGTH).tolist()


def draw(name: str, shape) -> np.ndarray:
  """A tensor by its Hugging Face name, spread widely enough for errors to change the logits."""
  values = np.random.RandomState(sum(map(ord, name))).normal(size=shape)
  return (0.3 * values + (1.0 if "norm" in name else 0.0)).astype(np.float32)


def params(decoder: Model):
  """The parameters made of the tensors that `draw` returns."""
  locations = hf_configs.tensor_locations(decoder.config)

  def leaf(path, abstract):
    location = locations[jax.tree_util.keystr(path, simple=True, separator="/")]
    if "{}" not in location.name:
      return draw(location.name, abstract.shape).astype(abstract.dtype)
    outputs, *inputs = abstract.shape[:0:-1]

    def layer(index):
      tensor = draw(location.name.format(index), (location.rows or outputs, *inputs))
      return tensor[location.start : location.start + outputs].T

    return np.stack([layer(index) for index in range(abstract.shape[0])]).astype(abstract.dtype)

  return jax.tree_util.tree_map_with_path(leaf, decoder.abstract_params())


def write_folder(name: str, folder: pathlib.Path) -> None:
  """Writes a Hugging Face folder of the model without our exporter, except for tensor names."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config_json(name)))
  decoder = model(name)
  locations, tensors = hf_configs.tensor_locations(decoder.config), {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(decoder.abstract_params()):
    location = locations[jax.tree_util.keystr(path, simple=True, separator="/")]
    if "{}" in location.name:
      outputs, *inputs = leaf.shape[:0:-1]
      names = [location.name.format(layer) for layer in range(leaf.shape[0])]
      tensors |= {name: draw(name, (location.rows or outputs, *inputs)) for name in names}
    else:
      tensors[location.name] = draw(location.name, leaf.shape)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
