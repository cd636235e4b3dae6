"""What Hugging Face's config.json says of the families that the decoder computes, and what their tensors are called.

A family's defaults are those of transformers' config class: its save_pretrained leaves them out of config.json. What a
file asks for and the decoder does not compute is refused, never passed over.
"""

import dataclasses
import json
import math
from typing import Any

from synthneg_jax.models.config import ModelConfig, RopeScaling
from synthneg_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Family:
  """One model_type.

  Attributes:
    architecture: transformers' class.
    defaults: values of keys that config.json may leave out.
    only: keys with the one value that is computed.
    fixed: fields of ModelConfig that do not depend on the file.
    even_heads: transformers wants a hidden_size that num_attention_heads divides.
  """

  architecture: str
  defaults: dict[str, Any]
  only: dict[str, Any]
  fixed: dict[str, Any]
  even_heads: bool = False


_SILU = {"hidden_act": "silu"}
_GEMMA = {
  "defaults": {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
  },
  "only": {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "use_bidirectional_attention": False},
  "fixed": {"activation": "gelu_tanh", "norm_offset": 1.0, "post_norms": True},
}
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {
  "llama": Family(  # Llama 1 to 3, DeepSeek-Math, SmolLM2
    "LlamaForCausalLM",
    {"max_position_embeddings": 2048},
    _SILU | {"attention_bias": False, "mlp_bias": False},
    {},
    even_heads=True,
  ),
  "mistral": Family(
    "MistralForCausalLM",
    {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    _SILU,
    {},
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    {"num_key_value_heads": 32, "max_position_embeddings": 32768, **_QWEN_WINDOW},
    _SILU,
    {"qkv_bias": True},
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, **_QWEN_WINDOW},
    _SILU | {"attention_bias": False},
    {"qk_norm": True},
  ),
  "gemma2": Family(
    "Gemma2ForCausalLM",
    _GEMMA["defaults"]
    | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    _GEMMA["only"],
    _GEMMA["fixed"],
    even_heads=True,
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    _GEMMA["defaults"] | {"max_position_embeddings": 131072},
    # transformers takes Gemma 3's attn_logit_softcapping and does not apply it.
    _GEMMA["only"] | {"attn_logit_softcapping": None},
    _GEMMA["fixed"] | {"qk_norm": True},
    even_heads=True,
  ),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


class _File:
  """A config.json with its family's defaults, and sentences about what is wrong with it."""

  def __init__(self, raw: dict[str, Any], path):
    self.path = path
    kind = raw.get("model_type") or "(none)"
    if kind not in FAMILIES:
      hint = "; of Gemma 3 only the text models are" if kind == "gemma3" else ""
      raise UserError(f"{path}: model_type {json.dumps(kind)} is not supported, only {', '.join(FAMILIES)} are{hint}.")
    self.family, self.kind = FAMILIES[kind], kind
    self.raw = self.family.defaults | raw

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
    value = default if within.get(key) is None else within[key]
    kind, wanted = (int, "whole number") if whole else ((int, float), "number")
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < float("inf"):
      raise UserError(f"{self.path}: {name}{key} is {json.dumps(value)}, not a positive {wanted}.")
    return value

  def size(self, key: str, default=None, **where) -> int:
    return self.number(key, default, whole=True, **where)

  def only(self, key: str, value, covered) -> None:
    """Refuses any value but null and the one that is computed."""
    if value not in (None, covered):
      raise UserError(f"{self.path}: {key} {json.dumps(value)} is not supported, only {json.dumps(covered)} is.")

  def object(self, key: str) -> dict[str, Any]:
    value = self.get(key) or {}
    if not isinstance(value, dict):
      raise UserError(f"{self.path}: {key} is {json.dumps(value)}, not an object.")
    return value


def read(raw: dict[str, Any], path, **settings) -> ModelConfig:
  """The architecture that config.json describes.

  Args:
    raw: its content.
    path: its name, for errors.
    settings: ModelConfig's dtype, param_dtype, scan_layers and remat.

  Raises:
    UserError: a family that is not known, a size that is missing, or an option that the decoder does not compute.
  """
  file = _File(raw, path)
  for key, covered in file.family.only.items():
    file.only(key, file.get(key), covered)
  width, heads, layers = file.size("hidden_size"), file.size("num_attention_heads"), file.size("num_hidden_layers")
  fields = dict(file.family.fixed)
  if file.kind.startswith("gemma"):
    fields["query_scalar"] = float(file.number("query_pre_attn_scalar"))
    fields["embedding_scale"] = math.sqrt(width)
    fields["attention_cap"] = float(file.get("attn_logit_softcapping") or 0.0)
    fields["logit_cap"] = float(file.get("final_logit_softcapping") or 0.0)
  return ModelConfig(
    family=file.kind,
    vocab_size=file.size("vocab_size"),
    d_model=width,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=file.size("num_key_value_heads", heads),
    head_dim=file.size("head_dim", width // heads),
    d_ff=file.size("intermediate_size"),
    norm_eps=float(file.number("rms_norm_eps", 1e-6)),
    tie_embeddings=bool(file.get("tie_word_embeddings")),
    **fields,
    **_windows(file, layers),
    **_rope(file),
    **settings,
  )


def _windows(file: _File, layers: int) -> dict[str, Any]:
  """ModelConfig's `windowed` and `window`."""
  if file.kind == "llama" or file.get("sliding_window") is None:
    windowed = (False,) * layers
  elif file.kind == "mistral":
    windowed = (True,) * layers
  elif file.kind.startswith("qwen"):
    first = file.get("max_window_layers") if file.get("use_sliding_window") else layers
    windowed = tuple(layer >= first for layer in range(layers))
  else:
    pattern = 2 if file.kind == "gemma2" else file.size("sliding_window_pattern", 6)
    windowed = tuple((layer + 1) % pattern > 0 for layer in range(layers))
  kinds = file.get("layer_types")
  if kinds is not None:
    wrong = [kind for kind in kinds if kind not in (_FULL, _SLIDING)]
    if wrong:
      raise UserError(
        f"{file.path}: layer_types {json.dumps(wrong[0])} is not supported, only {_FULL}, {_SLIDING} are."
      )
    named = tuple(kind == _SLIDING for kind in kinds)
    by_file = file.kind.startswith("gemma") or (file.kind.startswith("qwen") and file.get("use_sliding_window"))
    if named != windowed and not by_file:
      raise UserError(f"{file.path}: layer_types of a {file.kind} model differ from what its sliding_window says.")
    windowed = named
  return {"windowed": windowed, "window": file.size("sliding_window")} if any(windowed) else {}


def _rope(file: _File) -> dict[str, Any]:
  """ModelConfig's `rope_theta`, `windowed_rope_theta` and `rope_scaling`.

  transformers 5 has rope_parameters, for Gemma 3 one a kind of layer; before, there was rope_theta, and rope_scaling
  where positions are scaled.
  """
  new, scaled = file.object("rope_parameters"), file.object("rope_scaling")
  local = {}
  if file.kind == "gemma3_text":
    local = {"rope_theta": file.get("rope_local_base_freq")} | dict(new.get(_SLIDING) or {})
    new = dict(new.get(_FULL) or {} if _FULL in new or _SLIDING in new else new)
    _check_kind(file, f"rope_parameters.{_SLIDING}", local, kinds=("default",))
  elif _FULL in new or _SLIDING in new:
    raise UserError(f"{file.path}: rope_parameters of a {file.kind} model by kind of layer are not supported.")
  _check_kind(file, "", file.raw, kinds=_ROPE_KINDS)
  _check_kind(file, "rope_parameters", new, kinds=_ROPE_KINDS)
  _check_kind(file, "rope_scaling", scaled, kinds=_ROPE_KINDS)
  rope = {"rope_theta": file.get("rope_theta")} | {key: value for key, value in new.items() if value is not None}
  rope |= {key: value for key, value in scaled.items() if value is not None}
  name = "rope_scaling." if scaled else "rope_parameters."
  fields = {"rope_theta": float(file.number("rope_theta", 1e6 if local else 1e4, within=rope))}
  if local:
    fields["windowed_rope_theta"] = float(file.number("rope_theta", 1e4, within=local, name=f"{_SLIDING}."))
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if kind != "default":
    fields["rope_scaling"] = _scaling(file, kind, rope, name=name)
  return fields


def _check_kind(file: _File, name: str, rope: dict[str, Any], *, kinds: tuple[str, ...]) -> None:
  """Refuses a rotation of the object `name` of another kind, or a partial one."""
  for key in ("rope_type", "type"):
    if rope.get(key) is not None and rope[key] not in kinds:
      place = f"{name}.{key}".lstrip(".")
      covered = f"{', '.join(kinds)} {'are' if len(kinds) > 1 else 'is'}"
      raise UserError(f"{file.path}: {place} {json.dumps(rope[key])} is not supported, only {covered}.")
  file.only(f"{name}.partial_rotary_factor".lstrip("."), rope.get("partial_rotary_factor"), 1.0)


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
    low, high = (float(file.number(key, **where)) for key in ("low_freq_factor", "high_freq_factor"))
    return RopeScaling(kind, factor, positions, low, high)

  def stretch(scale):
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

  attention = stretch(1.0)
  if rope.get("mscale") and rope.get("mscale_all_dim"):
    attention = stretch(rope["mscale"]) / stretch(rope["mscale_all_dim"])
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
    raise UserError(f"transformers needs a d_model that its num_heads divide, not {c.d_model} and {c.num_heads}.")
  s = c.rope_scaling
  if s is not None and s.kind == "dynamic":
    positions = s.original_positions
  activation = "gelu_pytorch_tanh" if c.activation == "gelu_tanh" else c.activation
  raw = {key: value for key, value in family.only.items() if value is not None}
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
  rope = {"rope_theta": c.rope_theta, "rope_type": "default"} | _scaling_keys(s)
  if s is not None:
    raw["rope_scaling"] = rope  # for transformers before 5
  raw["rope_parameters"] = rope
  kinds = [_SLIDING if windowed else _FULL for windowed in c.windowed or (False,) * c.num_layers]
  if c.family == "mistral":
    raw["sliding_window"] = c.window or None
  elif c.family.startswith("qwen"):
    first = kinds.index(_SLIDING) if _SLIDING in kinds else c.num_layers
    window = {"use_sliding_window": bool(c.window), "sliding_window": c.window or None, "max_window_layers": first}
    raw |= window | {"layer_types": kinds}
  elif c.family.startswith("gemma"):
    raw |= {
      "hidden_activation": activation,
      "layer_types": kinds,
      "sliding_window": c.window or None,
      "query_pre_attn_scalar": int(c.query_scalar),
      "final_logit_softcapping": c.logit_cap or None,
    }
    if c.family == "gemma2":
      raw["attn_logit_softcapping"] = c.attention_cap or None
    else:
      local = {"rope_theta": c.windowed_rope_theta, "rope_type": "default"}
      raw |= {"rope_parameters": {_FULL: rope, _SLIDING: local}, "rope_local_base_freq": c.windowed_rope_theta}
  settings = {key: getattr(c, key) for key in ("dtype", "param_dtype", "scan_layers", "remat")}
  back = read(raw, "config.json", **settings)
  for field in dataclasses.fields(ModelConfig):
    ours, theirs = getattr(c, field.name), getattr(back, field.name)
    if ours != theirs and not (field.name == "windowed" and not any((*ours, *theirs))):
      raise UserError(f"No {c.family} model has {field.name} {ours!r}; transformers would compute with {theirs!r}.")
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
    keys |= {"beta_slow": s.low, "beta_fast": s.high, "attention_factor": s.attention_factor, "truncate": s.truncate}
  return keys


def tensor_names(config: ModelConfig) -> dict[str, str]:
  """Path of a parameter -> name of its tensor; {} is the layer's number."""
  block = "model.layers.{}."
  matrices = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
  }
  names = {f"layers/{ours}": f"{block}{theirs}.weight" for ours, theirs in matrices.items()}
  names |= {f"layers/{ours}_bias": f"{block}{matrices[ours]}.bias" for ours in ("query", "key", "value")}
  norms = {"attention_norm": "input_layernorm", "query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
  if config.post_norms:
    norms |= {
      "attention_post_norm": "post_attention_layernorm",
      "mlp_norm": "pre_feedforward_layernorm",
      "mlp_post_norm": "post_feedforward_layernorm",
    }
  else:
    norms["mlp_norm"] = "post_attention_layernorm"
  names |= {f"layers/{ours}/scale": f"{block}{theirs}.weight" for ours, theirs in norms.items()}
  ends = {"embedding": "model.embed_tokens", "unembedding": "lm_head", "norm/scale": "model.norm"}
  return names | {f"ends/{ours}": f"{theirs}.weight" for ours, theirs in ends.items()}
