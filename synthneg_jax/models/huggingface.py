"""Reads and writes Hugging Face folders of the llama type: config.json, *.safetensors and the tokenizer's files.

Our matrices are the transposes of theirs ([in, out] against [out, in]) and stand stacked over layers; rotary pairs are
the same, so that no row moves. Neither direction needs torch. Folders are local.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from synthneg_jax.models.config import ModelConfig
from synthneg_jax.models.decoder import Model, Params
from synthneg_jax.runtime import mesh as mesh_lib
from synthneg_jax.runtime.errors import UserError

# Path of a parameter -> Hugging Face name; {} is the layer's number.
_NAMES = {
  "ends/embedding": "model.embed_tokens.weight",
  "ends/unembedding": "lm_head.weight",
  "ends/norm/scale": "model.norm.weight",
  "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
  "layers/query": "model.layers.{}.self_attn.q_proj.weight",
  "layers/key": "model.layers.{}.self_attn.k_proj.weight",
  "layers/value": "model.layers.{}.self_attn.v_proj.weight",
  "layers/output": "model.layers.{}.self_attn.o_proj.weight",
  "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
  "layers/gate": "model.layers.{}.mlp.gate_proj.weight",
  "layers/up": "model.layers.{}.mlp.up_proj.weight",
  "layers/down": "model.layers.{}.mlp.down_proj.weight",
}
_DTYPES = ("F64", "F32", "F16", "BF16")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "tokenizer.model",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
)


def read_config(folder: epath.PathLike, *, dtype: str, param_dtype: str, scan_layers: bool, remat: str) -> ModelConfig:
  """The architecture that config.json describes; the other arguments are ModelConfig's.

  Raises:
    UserError: config.json is missing or broken, lacks a size, or asks for what the decoder does not compute.
  """
  path = epath.Path(folder) / "config.json"
  raw = _read_json(path)

  def need(key, default, kind, wanted):
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < float("inf"):
      raise UserError(f"{path}: {key} is {json.dumps(value)}, not a positive {wanted}.")
    return value

  def only(key, value, covered):
    if value not in (None, covered):
      raise UserError(f"{path}: {key} {json.dumps(value)} is not supported, only {json.dumps(covered)} is.")

  only("model_type", raw.get("model_type") or "(none)", "llama")
  for key, covered in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
    only(key, raw.get(key), covered)
  # transformers 5 has rope_parameters; before, there was rope_theta, and rope_scaling where positions are scaled.
  for name in ("", "rope_parameters", "rope_scaling"):
    rope = (raw.get(name) or {}) if name else raw
    if not isinstance(rope, dict):
      raise UserError(f"{path}: {name} is {json.dumps(rope)}, not an object.")
    for key, covered in (("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1.0)):
      only(f"{name}.{key}".lstrip("."), rope.get(key), covered)
    raw = raw | {"rope_theta": rope.get("rope_theta") or raw.get("rope_theta")}
  size = lambda key, default=None: need(key, default, int, "whole number")
  number = lambda key, default: float(need(key, default, (int, float), "number"))
  width, heads = size("hidden_size"), size("num_attention_heads")
  return ModelConfig(
    vocab_size=size("vocab_size"),
    d_model=width,
    num_layers=size("num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=size("num_key_value_heads", heads),
    head_dim=size("head_dim", width // heads),
    d_ff=size("intermediate_size"),
    rope_theta=number("rope_theta", 10000.0),
    norm_eps=number("rms_norm_eps", 1e-6),
    tie_embeddings=bool(raw.get("tie_word_embeddings")),
    dtype=dtype,
    param_dtype=param_dtype,
    scan_layers=scan_layers,
    remat=remat,
  )


def load_params(folder: epath.PathLike, model: Model, shardings) -> Params:
  """The parameters of a Hugging Face folder, cast to the model's param_dtype and laid out.

  Names and shapes are checked before any tensor is read. The host holds one parameter of all layers at a time.

  Args:
    folder: holds model.safetensors, or model.safetensors.index.json and the files that it names.
    model: as `read_config` describes it.
    shardings: a tree like the parameters.

  Raises:
    UserError: a file is missing or corrupt; a tensor is missing, has no place in the model, or has another shape or a
      dtype other than float64, float32, float16 or bfloat16.
  """
  folder = epath.Path(folder)
  sources = {name: (path, file) for path, file in _open_all(folder) for name in file.keys()}  # noqa: SIM118
  abstract = model.abstract_params()
  wanted = _stand_ins(abstract)
  for name, value in wanted.items():
    if name not in sources:
      raise UserError(f"{folder}: the tensor {name} is missing.")
    path, file = sources[name]
    shape, dtype = tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype()
    if shape != value.shape:
      raise UserError(f"{path}: the tensor {name} has shape {shape}, not {value.shape}.")
    if dtype not in _DTYPES:
      raise UserError(f"{path}: the tensor {name} has dtype {dtype}, not one of {', '.join(_DTYPES)}.")
  for name in sorted(set(sources) - set(wanted)):
    tied = model.config.tie_embeddings and name == _NAMES["ends/unembedding"]
    if not tied and not name.endswith("rotary_emb.inv_freq"):
      raise UserError(f"{sources[name][0]}: the tensor {name} has no place in this model.")

  def load(key_path, leaf, sharding):
    value = np.empty(leaf.shape, leaf.dtype)
    for name, view in _views(key_path, value):
      view[...] = sources[name][1].get_tensor(name)
    return jax.block_until_ready(mesh_lib.place(value, sharding))

  return jax.tree_util.tree_map_with_path(load, abstract, shardings)


def save(folder, model: Model, params: Params, tokenizer_folder=None, *, max_shard_bytes: int = 5 * 10**9) -> None:
  """Writes a folder that transformers loads as LlamaForCausalLM; a killed call leaves nothing under its name.

  Parameters keep their dtype and their bits. One file of weights and one parameter are on the host at a time.

  Args:
    folder: made with its parents; it must be empty or not there.
    model: the architecture.
    params: stacked parameters; this process must be able to address every device's part.
    tokenizer_folder: its tokenizer is copied, and its special ids and max_position_embeddings stand in config.json.
    max_shard_bytes: a file of weights is larger only where one tensor is; several files get an index.

  Raises:
    UserError: the folder is in use or cannot be written, the tokenizer cannot be read, or transformers refuses a size.
  """
  folder, c = epath.Path(folder), model.config
  if c.d_model % c.num_heads:
    raise UserError(f"transformers needs a d_model that its num_heads divide, not {c.d_model} and {c.num_heads}.")
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f"{folder} exists already and is not an empty folder.")
  special, positions, files = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")), 2048, []
  if tokenizer_folder is not None:
    import transformers  # Slow to import; only an export with a tokenizer needs it.

    source = epath.Path(tokenizer_folder)
    try:
      tokenizer = transformers.AutoTokenizer.from_pretrained(os.fspath(source), local_files_only=True)
    except Exception as error:  # tokenizers raises no narrower class
      raise UserError(f"{source} holds no tokenizer that transformers can read.") from error
    special = {key: getattr(tokenizer, key) for key in special}
    files = [source / name for name in TOKENIZER_FILES if (source / name).exists()]
    if (source / "config.json").exists():
      positions = _read_json(source / "config.json").get("max_position_embeddings", positions)
  config = special | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": c.param_dtype,
    "vocab_size": c.vocab_size,
    "hidden_size": c.d_model,
    "intermediate_size": c.d_ff,
    "num_hidden_layers": c.num_layers,
    "num_attention_heads": c.num_heads,
    "num_key_value_heads": c.num_kv_heads,
    "head_dim": c.head_dim,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": c.norm_eps,
    "max_position_embeddings": positions,
    "tie_word_embeddings": c.tie_embeddings,
    "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
    "rope_theta": c.rope_theta,  # for transformers before 5
  }
  partial = folder.parent / f".{folder.name}.partial"
  try:
    shutil.rmtree(os.fspath(partial), ignore_errors=True)  # of a killed call
    partial.mkdir(parents=True)
    for file in files:
      file.copy(partial / file.name)
    _write_json(partial / "config.json", config)
    _write_json(partial / "generation_config.json", special)
    _write_weights(partial, params, max_shard_bytes)
    os.rename(partial, folder)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{folder} cannot be written ({error}).") from error


def _views(key_path, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
  """The Hugging Face names of one parameter's tensors, with views of them in Hugging Face's shape."""
  place = jax.tree_util.keystr(key_path, simple=True, separator="/")
  if place.startswith("layers/"):
    return ((_NAMES[place].format(layer), part.T) for layer, part in enumerate(value))
  return iter([(_NAMES[place], value)])


def _stand_ins(params) -> dict[str, np.ndarray]:
  """The tensors of all parameters by their Hugging Face names, as arrays of shape and dtype that take no memory."""
  empty = lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return dict(tensor for key_path, leaf in leaves for tensor in _views(key_path, empty(leaf)))


def _write_weights(folder: epath.Path, params: Params, max_shard_bytes: int) -> None:
  shard_of, sizes = {}, [0]
  for name, value in _stand_ins(params).items():
    if sizes[-1] and sizes[-1] + value.nbytes > max_shard_bytes:
      sizes.append(0)
    sizes[-1] += value.nbytes
    shard_of[name] = len(sizes) - 1
  count = len(sizes)
  files = [_SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]

  leaves = jax.tree_util.tree_leaves_with_path(params)
  tensors = (tensor for key_path, leaf in leaves for tensor in _views(key_path, np.asarray(jax.device_get(leaf))))
  for shard, group in itertools.groupby(tensors, lambda tensor: shard_of[tensor[0]]):
    path = os.fspath(folder / files[shard])
    contents = {name: np.ascontiguousarray(view) for name, view in group}
    safetensors.numpy.save_file(contents, path, metadata={"format": "pt"})
    shutil.copymode(os.fspath(folder / "config.json"), path)  # save_file makes files that only their owner reads
  if count > 1:
    weight_map = {name: files[shard] for name, shard in shard_of.items()}
    _write_json(folder / _INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _open_all(folder: epath.Path):
  """(path, open file) for each of the folder's weight files; a tensor stays on disk until it is asked for."""
  if not (folder / _SINGLE).exists() and not (folder / _INDEX).exists():
    raise UserError(f"{folder} holds neither {_SINGLE} nor {_INDEX}.")
  weight_map = {"": _SINGLE} if (folder / _SINGLE).exists() else _read_json(folder / _INDEX).get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
    raise UserError(f"{folder / _INDEX} has no weight_map from tensors to files.")
  for name in sorted(set(weight_map.values())):
    try:
      yield folder / name, safetensors.safe_open(os.fspath(folder / name), framework="np")
    except (OSError, safetensors.SafetensorError) as error:
      raise UserError(f"{folder / name} is missing or no safetensors file ({error}).") from error


def _read_json(path: epath.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text())
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from error
  except ValueError as error:  # of JSON or of UTF-8
    raise UserError(f"{path} is not valid JSON ({error}).") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} does not hold a JSON object.")
  return value


def _write_json(path: epath.Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
