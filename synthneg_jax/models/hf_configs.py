"""What Hugging Face's config.json says of the families that the decoder computes, and what their
tensors are called.

A family's defaults are those of transformers' config class: its save_pretrained leaves them out of
config.json. What a file asks for and the decoder does not compute is refused, never passed over.
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
  """One model_type.

  Attributes:
    architecture: transformers' class.
    defaults: values of keys that config.json may leave out.
    only: keys with the one value that is computed, or a tuple of values that mean the same.
    fixed: fields of ModelConfig that do not depend on the file.
    biases: keys that give matrices a bias, with the fields of ModelConfig that they set.
    numbers: keys whose numbers are fields of ModelConfig, with these fields.
    rope_kinds: the rope_types that are computed.
    even_heads: transformers wants a hidden_size that num_attention_heads divides.
    is_fused: one tensor holds the matrices of query, key and value, another those of gate and up.
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
    # Published files say gelu; what they mean, and transformers computes, is the approximation by
    # tanh.
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
    # transformers takes Gemma 3's attn_logit_softcapping and does not apply it.
    only=_GEMMA["only"] | {"attn_logit_softcapping": None},
    fixed=_GEMMA["fixed"] | {"qk_norm": "head"},
    biases=_ATTENTION_BIAS,
    even_heads=True,
  ),
}
_MIXTURE = "it is a mixture of experts, which the decoder does not compute"
_LINEAR = "its layers of linear attention (Gated DeltaNet) are not computed"
_PER_LAYER = "its per-layer inputs and the keys and values that its layers share are not computed"
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
_BY_KIND = (
  "gemma3_text",
  "olmo3",
)  # windowed layers have a rotary base of their own and are never scaled
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _as_number(value):
  """A number that some writer put between quotes; anything else as it is."""
  if isinstance(value, str):
    try:
      return float(value)
    except ValueError:
      return value
  return value


class _File:
  """A config.json with its family's defaults, and sentences about what is wrong with it."""

  def __init__(self, raw: dict[str, Any], path):
    self.path = path
    if raw.get("quantization_config"):
      raise UserError(
        f"{path}: quantization_config names {json.dumps(_quant_method(raw))}; quantised weights "
        "are not supported, take the "
        "folder of the model before it was quantised."
      )
    if raw.get("model_type") == "gemma3":  # the wrapper of the models with images
      raw = _text_part(raw, path)
    kind = raw.get("model_type") or "(none)"
    if kind in _REFUSED or (
      kind not in FAMILIES and any(_as_number(raw.get(key)) for key in _EXPERTS)
    ):
      raise UserError(
        f"{path}: model_type {json.dumps(kind)} is not supported: {_REFUSED.get(kind, _MIXTURE)}."
      )
    if kind not in FAMILIES:
      raise UserError(
        f"{path}: model_type {json.dumps(kind)} is not supported, only {', '.join(FAMILIES)} are."
      )
    self.family, self.kind = FAMILIES[kind], kind
    self.raw = {**self.family.defaults, **raw}

  def get(self, key: str):
    return self.raw.get(key)

  def number(self, key: str, default=None, *, whole: bool = False, within=None, name: str = ""):
    """A positive number of an object of the file; null and a missing key give the default.

    Args:
      key: in the object.
      default: of it.
      whole: refuse fractions.
      within: the object; None for the whole file.
      name: of the object with a dot, for messages.
    """
    within = self.raw if within is None else within
    given = default if within.get(key) is None else within[key]
    value = _as_number(given)
    wanted = "whole number" if whole else "number"
    is_number = (
      isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    )
    if not is_number or (whole and value != int(value)):
      raise UserError(f"{self.path}: {name}{key} is {json.dumps(given)}, not a positive {wanted}.")
    return int(value) if whole else value

  def size(self, key: str, default=None, **where) -> int:
    return self.number(key, default, whole=True, **where)

  def numbers(self, key: str, count: int, *, within, name: str) -> tuple[float, ...]:
    """A list of `count` positive numbers of an object of the file."""
    values = within.get(key)
    if not isinstance(values, list) or len(values) != count:
      found = f"a list of {len(values)}" if isinstance(values, list) else json.dumps(values)
      raise UserError(
        f"{self.path}: {name}{key} is {found}, not a list of {count} numbers, one for each rotated "
        "pair."
      )
    return tuple(float(self.number(key, value, within={}, name=name)) for value in values)

  def flag(self, key: str) -> bool:
    """A truth value; null and a missing key are false."""
    value = self.get(key)
    words = {"true": True, "false": False}
    return (
      words[value.lower()] if isinstance(value, str) and value.lower() in words else bool(value)
    )

  def only(self, key: str, value, covered) -> None:
    """Refuses any value but null and those that are computed."""
    covered = covered if isinstance(covered, tuple) else (covered,)
    if value is not None and value not in covered and _as_number(value) not in covered:
      values = " or ".join(json.dumps(one) for one in covered)
      raise UserError(f"{self.path}: {key} {json.dumps(value)} is not supported, only {values} is.")

  def object(self, key: str) -> dict[str, Any]:
    value = self.get(key) or {}
    if not isinstance(value, dict):
      raise UserError(f"{self.path}: {key} is {json.dumps(value)}, not an object.")
    return value


def _quant_method(raw: Mapping[str, Any]):
  about = raw["quantization_config"]
  return about.get("quant_method") if isinstance(about, dict) else about


def _text_part(raw: Mapping[str, Any], path) -> dict[str, Any]:
  """The text model's config of a Gemma 3 with images; its tie is the wrapper's."""
  text = raw.get("text_config")
  if not isinstance(text, dict):
    raise UserError(f"{path}: text_config is {json.dumps(text)}, not an object.")
  tie = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
  return {**text, "model_type": "gemma3_text", "tie_word_embeddings": tie}


def text_config(raw: dict[str, Any]) -> dict[str, Any]:
  """The part of config.json that describes the text model: all of it, or a wrapper's `text_config`."""
  text = raw.get("text_config")
  return text if isinstance(text, dict) else raw


def read(raw: dict[str, Any], path, *, max_length: int = 0, **settings) -> ModelConfig:
  """The architecture that config.json describes.

  Args:
    raw: its content.
    path: its name, for errors.
    max_length: tokens of the longest text of the run, by which longrope's factors are chosen.
    settings: ModelConfig's dtype, param_dtype, scan_layers and remat.

  Raises:
    UserError: a family that is not known, a size that is missing, or an option that the decoder
      does not compute.
  """
  file = _File(raw, path)
  for key, covered in file.family.only.items():
    file.only(key, file.get(key), covered)
  width, heads, layers = (
    file.size("hidden_size"),
    file.size("num_attention_heads"),
    file.size("num_hidden_layers"),
  )
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
  """ModelConfig's `unrotated` of SmolLM3, whose no_rope_layers holds 1 where a layer is rotated."""
  rotated = file.get("no_rope_layers")
  if rotated is None:
    interval = file.size("no_rope_layer_interval")
    rotated = [(layer + 1) % interval for layer in range(layers)]
  if not isinstance(rotated, list) or len(rotated) != layers:
    raise UserError(
      f"{file.path}: no_rope_layers is not a list of {layers} numbers, one for each layer."
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
    first = _as_number(file.get("max_window_layers")) if file.flag("use_sliding_window") else layers
    windowed = tuple(layer >= first for layer in range(layers))
  else:
    pattern = file.size("sliding_window_pattern")
    windowed = tuple((layer + 1) % pattern > 0 for layer in range(layers))
  kinds = file.get("layer_types")
  if kinds is not None:
    wrong = [kind for kind in kinds if kind not in (_FULL, _SLIDING)]
    if wrong:
      raise UserError(
        f"{file.path}: layer_types {json.dumps(wrong[0])} is not supported, only {_FULL}, "
        f"{_SLIDING} are."
      )
    named = tuple(kind == _SLIDING for kind in kinds)
    by_file = file.kind in ("gemma2", "gemma3_text", "olmo3")
    by_file |= file.kind in ("qwen2", "qwen3", "smollm3") and file.flag("use_sliding_window")
    if named != windowed and not by_file:
      raise UserError(
        f"{file.path}: layer_types of a {file.kind} model differ from what its sliding_window says."
      )
    windowed = named
  return {"windowed": windowed, "window": file.size("sliding_window")} if any(windowed) else {}


def _rope(file: _File, head_dim: int, max_length: int) -> dict[str, Any]:
  """ModelConfig's `rope_theta`, `windowed_rope_theta`, `rotary_dim` and `rope_scaling`.

  transformers 5 has rope_parameters, for some families one a kind of layer; before, there was
  rope_theta, and rope_scaling where positions are scaled.
  """
  new, scaled = file.object("rope_parameters"), file.object("rope_scaling")
  local = {}
  if file.kind in _BY_KIND:
    of_windowed = (
      file.get("rope_local_base_freq") if file.kind == "gemma3_text" else file.get("rope_theta")
    )
    local = {"rope_theta": of_windowed} | dict(new.get(_SLIDING) or {})
    new = dict(new.get(_FULL) or {} if _FULL in new or _SLIDING in new else new)
    _check_kind(file, f"rope_parameters.{_SLIDING}", local, kinds=("default",))
  elif _FULL in new or _SLIDING in new:
    raise UserError(
      f"{file.path}: rope_parameters of a {file.kind} model by kind of layer are not supported."
    )
  kinds = file.family.rope_kinds
  _check_kind(file, "", file.raw, kinds=kinds)
  _check_kind(file, "rope_parameters", new, kinds=kinds)
  _check_kind(file, "rope_scaling", scaled, kinds=kinds)
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


def _check_kind(file: _File, name: str, rope: dict[str, Any], *, kinds: tuple[str, ...]) -> None:
  """Refuses a rotation of the object `name` of another kind, or a partial one where the family has
  none.
  """
  for key in ("rope_type", "type"):
    if rope.get(key) is not None and rope[key] not in kinds:
      place = f"{name}.{key}".lstrip(".")
      covered = f"{', '.join(kinds)} {'are' if len(kinds) > 1 else 'is'}"
      raise UserError(
        f"{file.path}: {place} {json.dumps(rope[key])} is not supported, only {covered}."
      )
  if file.kind != "phi3":
    file.only(f"{name}.partial_rotary_factor".lstrip("."), rope.get("partial_rotary_factor"), 1.0)


def _longrope_stretch(factor: float, positions: int) -> float:
  """What cosines and sines are multiplied by where the file does not say."""
  return math.sqrt(1 + math.log(factor) / math.log(positions)) if factor > 1 else 1.0


def _longrope(
  file: _File, rope: dict[str, Any], name: str, *, rotary_dim: int, max_length: int
) -> RopeScaling:
  """longrope's two sets of factors, and which of them a run with texts of up to max_length tokens
  takes.
  """
  where = {"within": rope, "name": name}
  positions = file.size(
    "original_max_position_embeddings", rope.get("original_max_position_embeddings")
  )
  factor = float(file.number("factor", file.size("max_position_embeddings") / positions, **where))
  short, long = (
    file.numbers(f"{length}_factor", rotary_dim // 2, **where) for length in ("short", "long")
  )
  stretch = float(file.number("attention_factor", _longrope_stretch(factor, positions), **where))
  return RopeScaling(
    "longrope",
    factor,
    positions,
    attention_factor=stretch,
    short=short,
    long=long,
    is_long=max_length > positions,
  )


def _scaling(file: _File, kind: str, rope: dict[str, Any], *, name: str) -> RopeScaling:
  """The scaling of positions that the file's object `rope` asks for, which messages call `name`."""
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

  def stretch(scale):
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

  attention = stretch(1.0)
  if rope.get("mscale") and rope.get("mscale_all_dim"):
    attention = stretch(_as_number(rope["mscale"])) / stretch(_as_number(rope["mscale_all_dim"]))
  return RopeScaling(
    kind,
    factor,
    positions,
    float(file.number("beta_slow", 1, **where)),
    float(file.number("beta_fast", 32, **where)),
    float(file.number("attention_factor", attention, **where)),
    bool(rope.get("truncate", True)),
  )


def write(config: ModelConfig, positions: int | None = None) -> dict[str, Any]:
  """What config.json says of an architecture; the special tokens are the caller's.

  Args:
    config: of a family that is known.
    positions: max_position_embeddings; None for the family's default.

  Raises:
    UserError: no model of this family looks so, or transformers refuses a size.
  """
  c, family = config, FAMILIES[config.family]
  if family.even_heads and c.d_model % c.num_heads:
    raise UserError(
      f"transformers needs a d_model that its num_heads divide, not {c.d_model} and {c.num_heads}."
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
    "rope_theta": c.rope_theta,  # for transformers before 5
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
  settings = {key: getattr(c, key) for key in ("dtype", "param_dtype", "scan_layers", "remat")}
  back = read(
    raw,
    "config.json",
    max_length=s.original_positions + 1 if s is not None and s.is_long else 0,
    **settings,
  )
  for field in dataclasses.fields(ModelConfig):
    ours, theirs = getattr(c, field.name), getattr(back, field.name)
    by_layer = field.name in ("windowed", "unrotated")
    if ours != theirs and not (by_layer and not any((*ours, *theirs))):
      raise UserError(
        f"No {c.family} model has {field.name} {ours!r}; transformers would compute with "
        f"{theirs!r}."
      )
  return raw


def _window_keys(c: ModelConfig) -> dict[str, Any]:
  """The keys of config.json that say which layers are windowed, and which are not rotated."""
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
  """The keys of config.json that say how positions are rotated, for transformers 5 and before."""
  s = c.rope_scaling
  partial = {"partial_rotary_factor": c.rotary_dim / c.head_dim} if c.rotary_dim else {}
  if s is not None and s.kind == "longrope":
    # transformers 4 wants these three keys and no others, where they say all.
    rope = {"type": s.kind, "short_factor": list(s.short), "long_factor": list(s.long)}
    if positions / s.original_positions != s.factor:
      rope["factor"] = s.factor
    if s.attention_factor != _longrope_stretch(s.factor, s.original_positions):
      rope["attention_factor"] = s.attention_factor
    return partial | {
      "rope_scaling": rope,
      "original_max_position_embeddings": s.original_positions,
    }
  rope = {"rope_theta": c.rope_theta, "rope_type": "default"} | _scaling_keys(s) | partial
  raw = partial | {"rope_parameters": rope}
  if s is not None:
    raw["rope_scaling"] = rope  # for transformers before 5
  if c.family in _BY_KIND:
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


class Place(NamedTuple):
  """Where a parameter stands among a folder's tensors.

  Attributes:
    name: of the tensor; {} is the layer's number.
    start: the first of its rows (outputs) that are the parameter's.
    rows: of the whole tensor, where several parameters share it; 0 where the parameter is all of
      it.
  """

  name: str
  start: int = 0
  rows: int = 0


def tensor_names(config: ModelConfig) -> dict[str, str]:
  """Path of a parameter -> name of the tensor that holds it; {} is the layer's number."""
  return {path: place.name for path, place in tensor_places(config).items()}


def tensor_places(config: ModelConfig) -> dict[str, Place]:
  """Path of a parameter -> where it stands."""
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
  places = {f"layers/{ours}": Place(f"{block}{theirs}.weight") for ours, theirs in modules.items()}
  places |= {
    f"layers/{ours}_bias": Place(f"{block}{theirs}.bias") for ours, theirs in modules.items()
  }
  if FAMILIES[c.family].is_fused:
    for module, parts in (
      (
        "self_attn.qkv_proj",
        (("query", c.num_heads), ("key", c.num_kv_heads), ("value", c.num_kv_heads)),
      ),
      ("mlp.gate_up_proj", (("gate", 1), ("up", 1))),
    ):
      unit = c.d_ff if module.startswith("mlp") else c.head_dim
      rows, start = unit * sum(count for _, count in parts), 0
      for ours, count in parts:
        places[f"layers/{ours}"] = Place(f"{block}{module}.weight", start, rows)
        start += unit * count
  norms = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
  if c.post_norms:
    norms |= {
      "attention_post_norm": "post_attention_layernorm",
      "mlp_post_norm": "post_feedforward_layernorm",
    }
  if c.pre_norms:
    before_mlp = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
    norms |= {"attention_norm": "input_layernorm", "mlp_norm": before_mlp}
  places |= {
    f"layers/{ours}/scale": Place(f"{block}{theirs}.weight") for ours, theirs in norms.items()
  }
  ends = {"embedding": "model.embed_tokens", "unembedding": "lm_head", "norm/scale": "model.norm"}
  return places | {f"ends/{ours}": Place(f"{theirs}.weight") for ours, theirs in ends.items()}
