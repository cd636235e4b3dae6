"""Maps Hugging Face's config.json and tensor names of the supported families to the decoder's.

The defaults of a family are those of transformers' config class, whose save_pretrained omits them
from config.json. Options that the decoder does not implement are refused, never ignored.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from synthneg_jax.models.config import ModelConfig, RopeScaling
from synthneg_jax.runtime.errors import UserError

_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A family of models, identified by its model_type.

  Attributes:
    architecture: the model class in transformers.
    defaults: values of keys that config.json may omit.
    only: the supported value of a key, or a tuple of equivalent values.
    fixed: fields of ModelConfig that do not depend on config.json.
    biases: keys that enable biases, and the fields of ModelConfig that they set.
    numbers: keys with numbers, and the fields of ModelConfig that take them.
    rope_kinds: the supported rope_types.
    even_heads: whether transformers requires num_attention_heads to divide hidden_size.
    is_fused: whether one tensor holds query, key and value, and another gate and up.
  """

  architecture: str
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  biases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  rope_kinds: tuple[str, ...] = _ROPE_KINDS
  even_heads: bool = False
  is_fused: bool = False


_SILU = {"hidden_act": "silu"}
_ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "output_bias")}
_MLP_BIAS = {"mlp_bias": ("mlp_bias",)}
_GEMMA = {
  "defaults": {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
  },
  "only": {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
  "fixed": {"activation": "gelu_tanh", "norm_offset": 1.0, "post_norms": True},
}
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_OLMO = {
  "only": _SILU,
  "fixed": {"qk_norm": "all", "pre_norms": False, "post_norms": True},
  "biases": _ATTENTION_BIAS,
}
FAMILIES = {
  "llama": Family(  # Llama 1 to 3, DeepSeek-Math, SmolLM2
    architecture="LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048},
    only=_SILU,
    biases=_ATTENTION_BIAS | _MLP_BIAS,
    even_heads=True,
  ),
  "mistral": Family(
    architecture="MistralForCausalLM",
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    only=_SILU,
  ),
  "qwen2": Family(
    architecture="Qwen2ForCausalLM",
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, **_QWEN_WINDOW},
    only=_SILU,
    fixed={"qkv_bias": True},
  ),
  "qwen3": Family(
    architecture="Qwen3ForCausalLM",
    defaults={
      "num_key_value_heads": 32,
      "head_dim": 128,
      "max_position_embeddings": 32768,
      **_QWEN_WINDOW,
    },
    only=_SILU,
    fixed={"qk_norm": "head"},
    biases=_ATTENTION_BIAS,
  ),
  "phi3": Family(  # Phi-3, Phi-3.5, Phi-4 and Phi-4-mini
    architecture="Phi3ForCausalLM",
    defaults={
      "max_position_embeddings": 4096,
      "original_max_position_embeddings": 4096,
      "rms_norm_eps": 1e-5,
    },
    only=_SILU,
    rope_kinds=("default", "longrope", "su"),
    is_fused=True,
  ),
  "olmo2": Family(
    architecture="Olmo2ForCausalLM",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    **_OLMO,
  ),
  "olmo3": Family(
    architecture="Olmo3ForCausalLM",
    defaults={
      "max_position_embeddings": 2048,
      "rms_norm_eps": 1e-5,
      "rope_theta": 5e5,
      "sliding_window": 4096,
      "sliding_window_pattern": 4,
    },
    **_OLMO,
  ),
  "smollm3": Family(
    architecture="SmolLM3ForCausalLM",
    defaults={
      "num_key_value_heads": 4,
      "max_position_embeddings": 32768,
      "rope_theta": 2e6,
      "tie_word_embeddings": True,
      "no_rope_layer_interval": 4,
    },
    only=_SILU,
    biases=_ATTENTION_BIAS | _MLP_BIAS,
  ),
  "granite": Family(
    architecture="GraniteForCausalLM",
    defaults={
      "max_position_embeddings": 2048,
      "embedding_multiplier": 1.0,
      "attention_multiplier": 1.0,
      "residual_multiplier": 1.0,
      "logits_scaling": 1.0,
    },
    only=_SILU,
    biases=_ATTENTION_BIAS | _MLP_BIAS,
    numbers={
      "embedding_multiplier": "embedding_scale",
      "attention_multiplier": "score_multiplier",
      "residual_multiplier": "residual_scale",
      "logits_scaling": "logit_divisor",
    },
  ),
  "gemma": Family(
    architecture="GemmaForCausalLM",
    defaults={
      "num_key_value_heads": 16,
      "head_dim": 256,
      "tie_word_embeddings": True,
      "max_position_embeddings": 8192,
    },
    # Published files say gelu, but transformers computes the tanh approximation, which they mean.
    only={
      "hidden_act": ("gelu_pytorch_tanh", "gelu"),
      "hidden_activation": "gelu_pytorch_tanh",
      "use_bidirectional_attention": False,
    },
    fixed={"activation": "gelu_tanh", "norm_offset": 1.0},
    biases=_ATTENTION_BIAS,
  ),
  "gemma2": Family(
    architecture="Gemma2ForCausalLM",
    defaults=_GEMMA["defaults"]
    | {
      "max_position_embeddings": 8192,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
      "sliding_window_pattern": 2,
    },
    only=_GEMMA["only"],
    fixed=_GEMMA["fixed"],
    biases=_ATTENTION_BIAS,
    even_heads=True,
  ),
  "gemma3_text": Family(
    architecture="Gemma3ForCausalLM",
    defaults=_GEMMA["defaults"]
    | {
      "vocab_size": 262208,
      "hidden_size": 2304,
      "intermediate_size": 9216,
      "num_hidden_layers": 26,
      "num_attention_heads": 8,
      "max_position_embeddings": 131072,
      "rope_theta": 1e6,
      "sliding_window_pattern": 6,
    },
    # transformers accepts Gemma 3's attn_logit_softcapping but does not apply it.
    only=_GEMMA["only"] | {"attn_logit_softcapping": None},
    fixed=_GEMMA["fixed"] | {"qk_norm": "head"},
    biases=_ATTENTION_BIAS,
    even_heads=True,
  ),
}
_MIXTURE = "mixtures of experts are not implemented"
_LINEAR = "linear attention layers (Gated DeltaNet) are not implemented"
_PER_LAYER = "per-layer inputs and keys and values shared between layers are not implemented"
_REFUSED = {
  **dict.fromkeys(
    ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _LINEAR
  ),
  **dict.fromkeys(
    ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified"), _PER_LAYER
  ),
  **dict.fromkeys(
    ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss", "llama4"),
    _MIXTURE,
  ),
  **dict.fromkeys(
    ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "llama4_text"), _MIXTURE
  ),
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# Families whose windowed layers have a separate rotary base and no scaling.
_WINDOWED_ROPE = ("gemma3_text", "olmo3")
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _as_number(value):
  """Converts numbers in strings, which some programs write; returns other values unchanged."""
  if isinstance(value, str):
    try:
      return float(value)
    except ValueError:
      return value
  return value


class _File:
  """A config.json with its family's defaults; errors name the file and the key."""

  def __init__(self, raw: dict[str, Any], path):
    self.path = path
    if raw.get("quantization_config"):
      raise UserError(
        f"{path}: quantization_config names {json.dumps(_quant_method(raw))}: quantised weights "
        "are not supported; use the unquantised model."
      )
    if raw.get("model_type") == "gemma3":  # the wrapper of the models with images
      raw = _text_part(raw, path)
    kind = raw.get("model_type") or "(none)"
    kind = kind if isinstance(kind, str) else json.dumps(kind)
    reason = _REFUSED.get(kind)
    if kind not in FAMILIES and any(_as_number(raw.get(key)) for key in _EXPERTS):
      reason = reason or _MIXTURE
    if reason is not None:
      raise UserError(f"{path}: model_type {json.dumps(kind)} is not supported: {reason}.")
    if kind not in FAMILIES:
      raise UserError(
        f"{path}: model_type {json.dumps(kind)} is not supported, only {', '.join(FAMILIES)} are."
      )
    self.family, self.kind = FAMILIES[kind], kind
    self.raw = {**self.family.defaults, **raw}

  def get(self, key: str):
    return self.raw.get(key)

  def number(self, key: str, default=None, *, whole: bool = False, within=None, name: str = ""):
    """A positive number in an object of the file.

    Args:
      key: the key in the object.
      default: the value if the key is missing or null.
      whole: whether to refuse fractions.
      within: the object; None for the top level.
      name: the object's name followed by a dot, for messages.
    """
    within = self.raw if within is None else within
    given = default if within.get(key) is None else within[key]
    value = _as_number(given)
    expected = "whole number" if whole else "number"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_positive = is_number and 0 < value < float("inf")
    if not is_positive or (whole and value != int(value)):
      raise UserError(
        f"{self.path}: {name}{key} is {json.dumps(given)}, not a positive {expected}."
      )
    return int(value) if whole else value

  def size(self, key: str, default=None, **where) -> int:
    return self.number(key, default, whole=True, **where)

  def numbers(self, key: str, count: int, *, within, name: str) -> tuple[float, ...]:
    """A list of `count` positive numbers, one per rotated pair, in an object of the file."""
    values = within.get(key)
    if not isinstance(values, list) or len(values) != count:
      given = f"a list of {len(values)}" if isinstance(values, list) else json.dumps(values)
      raise UserError(
        f"{self.path}: {name}{key} is {given}, not a list of {count} numbers, one per rotated pair."
      )
    return tuple(float(self.number(key, value, within={}, name=name)) for value in values)

  def flag(self, key: str) -> bool:
    """A boolean, possibly in a string; False if the key is missing or null."""
    value = self.get(key)
    if isinstance(value, str) and value.lower() == "false":
      return False
    return bool(value)

  def only(self, key: str, value, supported) -> None:
    """Refuses any value except null and the supported ones."""
    supported = supported if isinstance(supported, tuple) else (supported,)
    if value is not None and value not in supported and _as_number(value) not in supported:
      values = " or ".join(map(json.dumps, supported))
      raise UserError(f"{self.path}: {key} {json.dumps(value)} is not supported, only {values} is.")

  def object(self, key: str) -> dict[str, Any]:
    value = self.get(key) or {}
    if not isinstance(value, dict):
      raise UserError(f"{self.path}: {key} is {json.dumps(value)}, not an object.")
    return value


def _quant_method(raw: Mapping[str, Any]):
  config = raw["quantization_config"]
  return config.get("quant_method") if isinstance(config, dict) else config


def _text_part(raw: Mapping[str, Any], path) -> dict[str, Any]:
  """The text model's config of a Gemma 3 with images, with the wrapper's tie_word_embeddings."""
  text = raw.get("text_config")
  if not isinstance(text, dict):
    raise UserError(f"{path}: text_config is {json.dumps(text)}, not an object.")
  tie = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
  return {**text, "model_type": "gemma3_text", "tie_word_embeddings": tie}


def text_config(raw: dict[str, Any]) -> dict[str, Any]:
  """The text model's part of config.json: a wrapper's `text_config`, or everything."""
  text = raw.get("text_config")
  return text if isinstance(text, dict) else raw


def ties_embeddings(raw: dict[str, Any], path) -> bool:
  """Whether the head is the embedding by config.json, or by its family's default."""
  return _File(raw, path).flag("tie_word_embeddings")


def positions(raw: dict[str, Any], path) -> int | None:
  """max_position_embeddings of config.json, or of a wrapper's text_config; None if missing."""
  given = text_config(raw).get("max_position_embeddings")
  value = _as_number(given)
  if given is not None and (not isinstance(value, int | float) or value != int(value)):
    raise UserError(f"{path}: max_position_embeddings is {json.dumps(given)}, not a whole number.")
  return None if given is None else int(value)


def read(raw: dict[str, Any], path, *, max_length: int = 0, **settings) -> ModelConfig:
  """The architecture described by config.json.

  Args:
    raw: its content.
    path: its path, for errors.
    max_length: tokens of the longest text of the run; selects longrope's factors.
    settings: dtype, param_dtype, scan_layers and remat of ModelConfig.

  Raises:
    UserError: the family is not supported, a size is missing, or the decoder does not implement an
      option.
  """
  file = _File(raw, path)
  for key, supported in file.family.only.items():
    file.only(key, file.get(key), supported)
  width = file.size("hidden_size")
  heads = file.size("num_attention_heads")
  layers = file.size("num_hidden_layers")
  head_dim = file.size("head_dim", width // heads)
  fields = dict(file.family.fixed)
  for key, names in file.family.biases.items():
    fields |= dict.fromkeys(names, file.flag(key))
  for key, name in file.family.numbers.items():
    fields[name] = float(file.number(key))
  if file.kind.startswith("gemma"):
    fields["embedding_scale"] = math.sqrt(width)
  if file.kind in ("gemma2", "gemma3_text"):
    fields["query_scalar"] = float(file.number("query_pre_attn_scalar"))
    for key, name in (
      ("attn_logit_softcapping", "attention_cap"),
      ("final_logit_softcapping", "logit_cap"),
    ):
      fields[name] = float(file.number(key)) if _as_number(file.get(key)) else 0.0
  if file.kind == "smollm3":
    fields |= _unrotated(file, layers)
  return ModelConfig(
    family=file.kind,
    vocab_size=file.size("vocab_size"),
    d_model=width,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=file.size("num_key_value_heads", heads),
    head_dim=head_dim,
    d_ff=file.size("intermediate_size"),
    norm_eps=float(file.number("rms_norm_eps", 1e-6)),
    tie_embeddings=file.flag("tie_word_embeddings"),
    **fields,
    **_windows(file, layers, fields.get("unrotated") or (False,) * layers),
    **_rope(file, head_dim, max_length),
    **settings,
  )


def _unrotated(file: _File, layers: int) -> dict[str, Any]:
  """ModelConfig's `unrotated` for SmolLM3, whose no_rope_layers has 1 for rotated layers."""
  rotated = file.get("no_rope_layers")
  if rotated is None:
    interval = file.size("no_rope_layer_interval")
    rotated = [(layer + 1) % interval for layer in range(layers)]
  if not isinstance(rotated, list) or len(rotated) != layers:
    raise UserError(
      f"{file.path}: no_rope_layers is not a list of {layers} numbers, one per layer."
    )
  unrotated = tuple(not _as_number(value) for value in rotated)
  return {"unrotated": unrotated} if any(unrotated) else {}


def _windows(file: _File, layers: int, unrotated: tuple[bool, ...]) -> dict[str, Any]:
  """ModelConfig's `windowed` and `window`."""
  if file.kind in ("llama", "olmo2", "granite", "gemma") or file.get("sliding_window") is None:
    windowed = (False,) * layers
  elif file.kind in ("mistral", "phi3"):
    windowed = (True,) * layers
  elif file.kind == "smollm3":
    windowed = unrotated if file.flag("use_sliding_window") else (False,) * layers
  elif file.kind.startswith("qwen"):
    first = layers
    if file.flag("use_sliding_window"):
      is_zero = _as_number(file.get("max_window_layers")) == 0
      first = 0 if is_zero else file.size("max_window_layers", layers)
    windowed = tuple(layer >= first for layer in range(layers))
  else:
    pattern = file.size("sliding_window_pattern")
    windowed = tuple((layer + 1) % pattern > 0 for layer in range(layers))
  kinds = file.get("layer_types")
  if kinds is not None:
    if not isinstance(kinds, list) or len(kinds) != layers:
      raise UserError(f"{file.path}: layer_types is not a list of {layers} kinds, one per layer.")
    unknown = [kind for kind in kinds if kind not in (_FULL, _SLIDING)]
    if unknown:
      raise UserError(
        f"{file.path}: layer_types {json.dumps(unknown[0])} is not supported, only {_FULL} and "
        f"{_SLIDING} are."
      )
    by_layer_types = tuple(kind == _SLIDING for kind in kinds)
    is_free = file.kind in ("gemma2", "gemma3_text", "olmo3")
    is_free |= file.kind in ("qwen2", "qwen3", "smollm3") and file.flag("use_sliding_window")
    if by_layer_types != windowed and not is_free:
      raise UserError(
        f"{file.path}: layer_types of a {file.kind} model contradicts its sliding_window."
      )
    windowed = by_layer_types
  return {"windowed": windowed, "window": file.size("sliding_window")} if any(windowed) else {}


def _rope(file: _File, head_dim: int, max_length: int) -> dict[str, Any]:
  """ModelConfig's `rope_theta`, `windowed_rope_theta`, `rotary_dim` and `rope_scaling`.

  transformers 5 writes rope_parameters, in some families one per kind of layer; earlier versions
  wrote rope_theta and, if positions are scaled, rope_scaling.
  """
  new, scaled = file.object("rope_parameters"), file.object("rope_scaling")
  by_layer_kind = _FULL in new or _SLIDING in new
  for key in (_FULL, _SLIDING):
    if not isinstance(new.get(key) or {}, dict):
      raise UserError(f"{file.path}: rope_parameters.{key} is not an object.")
  local = {}
  if file.kind in _WINDOWED_ROPE:
    local_key = "rope_local_base_freq" if file.kind == "gemma3_text" else "rope_theta"
    local = {"rope_theta": file.get(local_key)} | dict(new.get(_SLIDING) or {})
    new = dict(new.get(_FULL) or {}) if by_layer_kind else dict(new)
    _check_rope_kind(file, f"rope_parameters.{_SLIDING}", local, kinds=("default",))
  elif by_layer_kind:
    raise UserError(
      f"{file.path}: rope_parameters per kind of layer are not supported in a {file.kind} model."
    )
  kinds = file.family.rope_kinds
  _check_rope_kind(file, "", file.raw, kinds=kinds)
  _check_rope_kind(file, "rope_parameters", new, kinds=kinds)
  _check_rope_kind(file, "rope_scaling", scaled, kinds=kinds)
  rope = {key: file.get(key) for key in ("rope_theta", "partial_rotary_factor")}
  rope |= {key: value for key, value in new.items() if value is not None}
  rope |= {key: value for key, value in scaled.items() if value is not None}
  name = "rope_scaling." if scaled else "rope_parameters."
  fields = {"rope_theta": float(file.number("rope_theta", 1e4, within=rope))}
  if local:
    fields["windowed_rope_theta"] = float(
      file.number("rope_theta", 1e4, within=local, name=f"{_SLIDING}.")
    )
  rotary_dim = int(head_dim * file.number("partial_rotary_factor", 1.0, within=rope))
  if rotary_dim != head_dim:
    fields["rotary_dim"] = rotary_dim
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if kind in ("longrope", "su"):
    fields["rope_scaling"] = _longrope(
      file, rope, name, rotary_dim=rotary_dim, max_length=max_length
    )
  elif kind != "default":
    fields["rope_scaling"] = _scaling(file, kind, rope, name=name)
  return fields


def _check_rope_kind(
  file: _File, name: str, rope: dict[str, Any], *, kinds: tuple[str, ...]
) -> None:
  """Refuses another rope_type, or an unsupported partial rotation, in the object `name`."""
  for key in ("rope_type", "type"):
    if rope.get(key) is not None and rope[key] not in kinds:
      full_key = f"{name}.{key}".lstrip(".")
      supported = f"{', '.join(kinds)} {'are' if len(kinds) > 1 else 'is'}"
      raise UserError(
        f"{file.path}: {full_key} {json.dumps(rope[key])} is not supported, only {supported}."
      )
  if file.kind != "phi3":
    file.only(f"{name}.partial_rotary_factor".lstrip("."), rope.get("partial_rotary_factor"), 1.0)


def _longrope_attention_factor(factor: float, positions: int) -> float:
  """The default factor of cosines and sines."""
  return math.sqrt(1 + math.log(factor) / math.log(positions)) if factor > 1 else 1.0


def _longrope(
  file: _File, rope: dict[str, Any], name: str, *, rotary_dim: int, max_length: int
) -> RopeScaling:
  """longrope's two sets of factors, and which of them a run with texts up to max_length uses."""
  where = {"within": rope, "name": name}
  positions = file.size(
    "original_max_position_embeddings", rope.get("original_max_position_embeddings")
  )
  factor = float(file.number("factor", file.size("max_position_embeddings") / positions, **where))
  short, long = (
    file.numbers(f"{length}_factor", rotary_dim // 2, **where) for length in ("short", "long")
  )
  attention_factor = _longrope_attention_factor(factor, positions)
  return RopeScaling(
    "longrope",
    factor,
    positions,
    attention_factor=float(file.number("attention_factor", attention_factor, **where)),
    short=short,
    long=long,
    is_long=max_length > positions,
  )


def _scaling(file: _File, kind: str, rope: dict[str, Any], *, name: str) -> RopeScaling:
  """The scaling described by the object `rope`, which messages call `name`."""
  where = {"within": rope, "name": name}
  factor = float(file.number("factor", **where))
  if kind == "linear":
    return RopeScaling(kind, factor)
  positions = file.size("max_position_embeddings")
  if kind == "dynamic":
    return RopeScaling(kind, factor, positions)
  positions = file.size("original_max_position_embeddings", positions, **where)
  if kind == "llama3":
    low, high = (
      float(file.number(key, **where)) for key in ("low_freq_factor", "high_freq_factor")
    )
    return RopeScaling(kind, factor, positions, low, high)

  def mscale(scale):
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

  attention_factor = mscale(1.0)
  if rope.get("mscale") and rope.get("mscale_all_dim"):
    all_dim = mscale(file.number("mscale_all_dim", **where))
    attention_factor = mscale(file.number("mscale", **where)) / all_dim
  return RopeScaling(
    kind,
    factor,
    positions,
    low=float(file.number("beta_slow", 1, **where)),
    high=float(file.number("beta_fast", 32, **where)),
    attention_factor=float(file.number("attention_factor", attention_factor, **where)),
    truncate=str(rope.get("truncate", True)).lower() not in ("false", "none", "0"),
  )


def write(config: ModelConfig, positions: int | None = None) -> dict[str, Any]:
  """The content of config.json for an architecture, without special tokens.

  Args:
    config: the architecture, of a supported family.
    positions: max_position_embeddings; None for the family's default.

  Raises:
    UserError: the family cannot represent the architecture, or transformers refuses a size.
  """
  c, family = config, FAMILIES[config.family]
  if family.even_heads and c.d_model % c.num_heads:
    raise UserError(
      f"transformers requires num_heads to divide d_model, but d_model is {c.d_model} and "
      f"num_heads is {c.num_heads}."
    )
  s = c.rope_scaling
  if s is not None and s.kind == "dynamic":
    positions = s.original_positions
  if s is not None and s.kind == "longrope":
    positions = positions or round(s.factor * s.original_positions)
  activation = "gelu_pytorch_tanh" if c.activation == "gelu_tanh" else c.activation
  only = {
    key: value[0] if isinstance(value, tuple) else value for key, value in family.only.items()
  }
  raw = {key: value for key, value in only.items() if value is not None}
  raw |= {key: getattr(c, names[-1]) for key, names in family.biases.items()}
  raw |= {key: getattr(c, name) for key, name in family.numbers.items()}
  raw |= {
    "architectures": [family.architecture],
    "model_type": c.family,
    "dtype": c.param_dtype,
    "vocab_size": c.vocab_size,
    "hidden_size": c.d_model,
    "intermediate_size": c.d_ff,
    "num_hidden_layers": c.num_layers,
    "num_attention_heads": c.num_heads,
    "num_key_value_heads": c.num_kv_heads,
    "head_dim": c.head_dim,
    "hidden_act": activation,
    "rms_norm_eps": c.norm_eps,
    "max_position_embeddings": positions or family.defaults["max_position_embeddings"],
    "tie_word_embeddings": c.tie_embeddings,
    "rope_theta": c.rope_theta,  # read by transformers before version 5
  }
  raw |= _rope_keys(c, raw["max_position_embeddings"]) | _window_keys(c)
  if c.family in ("gemma2", "gemma3_text"):
    raw |= {
      "hidden_activation": activation,
      "query_pre_attn_scalar": int(c.query_scalar),
      "final_logit_softcapping": c.logit_cap or None,
    }
  if c.family == "gemma2":
    raw["attn_logit_softcapping"] = c.attention_cap or None
  _check_round_trip(c, raw)
  return raw


def _check_round_trip(config: ModelConfig, raw: dict[str, Any]) -> None:
  """Checks that config.json describes the same architecture."""
  settings = {key: getattr(config, key) for key in ("dtype", "param_dtype", "scan_layers", "remat")}
  s = config.rope_scaling
  max_length = s.original_positions + 1 if s is not None and s.is_long else 0
  described = read(raw, "config.json", max_length=max_length, **settings)
  for field in dataclasses.fields(ModelConfig):
    ours, theirs = getattr(config, field.name), getattr(described, field.name)
    if field.name in ("windowed", "unrotated") and not any((*ours, *theirs)):
      continue  # () and a tuple of False mean the same
    if ours != theirs:
      raise UserError(
        f"A {config.family} model cannot have {field.name} {ours!r}: transformers would use "
        f"{theirs!r}."
      )


def _window_keys(c: ModelConfig) -> dict[str, Any]:
  """The keys of config.json for windowed and unrotated layers."""
  kinds = [_SLIDING if windowed else _FULL for windowed in c.windowed or (False,) * c.num_layers]
  window = {"sliding_window": c.window or None}
  if c.family in ("mistral", "phi3"):
    return window
  if c.family in ("qwen2", "qwen3"):
    first = kinds.index(_SLIDING) if _SLIDING in kinds else c.num_layers
    return window | {
      "use_sliding_window": bool(c.window),
      "max_window_layers": first,
      "layer_types": kinds,
    }
  if c.family in ("gemma2", "gemma3_text", "olmo3"):
    return window | {"layer_types": kinds}
  if c.family == "smollm3":
    rotated = [int(not unrotated) for unrotated in c.unrotated or (False,) * c.num_layers]
    return window | {
      "use_sliding_window": bool(c.window),
      "layer_types": kinds,
      "no_rope_layers": rotated,
    }
  return {}


def _rope_keys(c: ModelConfig, positions: int) -> dict[str, Any]:
  """The keys of config.json for rotary positions, for transformers 5 and earlier."""
  s = c.rope_scaling
  partial = {"partial_rotary_factor": c.rotary_dim / c.head_dim} if c.rotary_dim else {}
  if s is not None and s.kind == "longrope":
    # transformers 4 accepts only these three keys, so others are written only if they matter.
    rope = {"type": s.kind, "short_factor": list(s.short), "long_factor": list(s.long)}
    if positions / s.original_positions != s.factor:
      rope["factor"] = s.factor
    if s.attention_factor != _longrope_attention_factor(s.factor, s.original_positions):
      rope["attention_factor"] = s.attention_factor
    return partial | {
      "rope_scaling": rope,
      "original_max_position_embeddings": s.original_positions,
    }
  rope = {"rope_theta": c.rope_theta, "rope_type": "default"} | _scaling_keys(s) | partial
  raw = partial | {"rope_parameters": rope}
  if s is not None:
    raw["rope_scaling"] = rope  # read by transformers before version 5
  if c.family in _WINDOWED_ROPE:
    local = {"rope_theta": c.windowed_rope_theta, "rope_type": "default"}
    raw["rope_parameters"] = {_FULL: rope, _SLIDING: local}
  if c.family == "gemma3_text":
    raw["rope_local_base_freq"] = c.windowed_rope_theta
  return raw


def _scaling_keys(s: RopeScaling | None) -> dict[str, Any]:
  if s is None:
    return {}
  keys = {"rope_type": s.kind, "factor": s.factor}
  if s.kind in ("llama3", "yarn"):
    keys["original_max_position_embeddings"] = s.original_positions
  if s.kind == "llama3":
    keys |= {"low_freq_factor": s.low, "high_freq_factor": s.high}
  if s.kind == "yarn":
    keys |= {
      "beta_slow": s.low,
      "beta_fast": s.high,
      "attention_factor": s.attention_factor,
      "truncate": s.truncate,
    }
  return keys


class Location(NamedTuple):
  """The location of a parameter in the tensors of a Hugging Face folder.

  Attributes:
    name: the tensor's name; {} stands for the layer's index.
    start: the parameter's first row (output) in the tensor.
    rows: rows of the whole tensor if several parameters share it, else 0.
  """

  name: str
  start: int = 0
  rows: int = 0


def tensor_names(config: ModelConfig) -> dict[str, str]:
  """The tensor's name for each parameter's path; {} stands for the layer's index."""
  return {path: location.name for path, location in tensor_locations(config).items()}


def tensor_locations(config: ModelConfig) -> dict[str, Location]:
  """The location of each parameter, by its path."""
  c, block = config, "model.layers.{}."
  modules = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
  }
  locations = {}
  for ours, theirs in modules.items():
    locations[f"layers/{ours}"] = Location(f"{block}{theirs}.weight")
    locations[f"layers/{ours}_bias"] = Location(f"{block}{theirs}.bias")
  if FAMILIES[c.family].is_fused:
    kv_rows = c.num_kv_heads * c.head_dim
    fused = {
      "self_attn.qkv_proj": {
        "query": c.num_heads * c.head_dim,
        "key": kv_rows,
        "value": kv_rows,
      },
      "mlp.gate_up_proj": {"gate": c.d_ff, "up": c.d_ff},
    }
    for module, rows_of in fused.items():
      start, total = 0, sum(rows_of.values())
      for ours, rows in rows_of.items():
        locations[f"layers/{ours}"] = Location(f"{block}{module}.weight", start, total)
        start += rows
  norms = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
  if c.post_norms:
    norms |= {
      "attention_post_norm": "post_attention_layernorm",
      "mlp_post_norm": "post_feedforward_layernorm",
    }
  if c.pre_norms:
    before_mlp = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
    norms |= {"attention_norm": "input_layernorm", "mlp_norm": before_mlp}
  for ours, theirs in norms.items():
    locations[f"layers/{ours}/scale"] = Location(f"{block}{theirs}.weight")
  ends = {"embedding": "model.embed_tokens", "unembedding": "lm_head", "norm/scale": "model.norm"}
  for ours, theirs in ends.items():
    locations[f"ends/{ours}"] = Location(f"{theirs}.weight")
  return locations
