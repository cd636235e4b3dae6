"""Reads and writes Hugging Face folders: config.json, *.safetensors and the tokenizer's files; models/hf_configs.py names them.

Our matrices are the transposes of theirs ([in, out] against [out, in]) and stand stacked over layers; rotary pairs are
the same, so that no row moves. Neither direction needs torch. Folders are local.
"""

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath

from synthneg_jax.models import hf_configs
from synthneg_jax.models.config import ModelConfig
from synthneg_jax.models.decoder import Model, Params
from synthneg_jax.runtime.errors import UserError

_DTYPES = ("F64", "F32", "F16", "BF16")
_ENDS = ("embedding", "unembedding")
_ROWS_COMPARED = 4096  # rows of the embedding that are on the host at a time when a head is compared with it
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(folder: epath.PathLike, *, dtype: str, param_dtype: str, scan_layers: bool, remat: str) -> ModelConfig:
  """The architecture that config.json describes; the other arguments are ModelConfig's.

  Raises:
    UserError: config.json is missing or broken, lacks a size, or asks for what the decoder does not compute.
  """
  path = epath.Path(folder) / "config.json"
  settings = {"dtype": dtype, "param_dtype": param_dtype, "scan_layers": scan_layers, "remat": remat}
  return hf_configs.read(_read_json(path), path, **settings)


def untie_other_head(folder: epath.PathLike, config: ModelConfig) -> ModelConfig:
  """The same architecture, untied where the folder holds an lm_head.weight that differs from the embedding.

  Some trainers leave `tie_word_embeddings: true` in config.json when they have trained a head of its own.

  Raises:
    UserError: a file is missing or corrupt.
  """
  if not config.tie_embeddings:
    return config
  sources = {name: file for _, file in _open_all(epath.Path(folder)) for name in file.keys()}  # noqa: SIM118
  names = hf_configs.tensor_names(config)
  parts = [sources.get(names[f"ends/{end}"]) for end in _ENDS]
  if None in parts:
    return config
  embedding, head = (file.get_slice(names[f"ends/{end}"]) for file, end in zip(parts, _ENDS, strict=True))
  shape = embedding.get_shape()
  if shape == head.get_shape():
    starts = range(0, shape[0], _ROWS_COMPARED)
    spans = [slice(start, min(start + _ROWS_COMPARED, shape[0])) for start in starts]
    if all(np.array_equal(_wide(embedding[span]), _wide(head[span])) for span in spans):
      return config
  logging.info(
    "%s: tie_word_embeddings is true, but lm_head.weight differs from the embedding; the head is kept, untied.", folder
  )
  return dataclasses.replace(config, tie_embeddings=False)


def load_params(folder: epath.PathLike, model: Model, shardings) -> Params:
  """The parameters of a Hugging Face folder, cast to the model's param_dtype, each read straight into its layout.

  Names and shapes are checked before any tensor is read. Of every tensor only the parts that this process's devices hold
  are read; the host holds those of one stacked parameter at a time, and one tensor's part of it as the file has it.

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
  abstract, names = model.abstract_params(), hf_configs.tensor_names(model.config)
  wanted = _stand_ins(names, abstract)
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
    tied = model.config.tie_embeddings and name == names["ends/unembedding"]
    if not tied and not name.endswith("rotary_emb.inv_freq"):
      raise UserError(f"{sources[name][0]}: the tensor {name} has no place in this model.")

  def load(key_path, leaf, sharding):
    name, read = names[_place(key_path)], {}

    def part(index):
      """The part of the parameter at these slices; devices that hold the same part share one copy."""
      spans = tuple(span.indices(size)[:2] for span, size in zip(index, leaf.shape, strict=True))
      if spans not in read:
        cuts = [slice(*span) for span in spans]
        if "{}" in name:
          value = np.empty([stop - start for start, stop in spans], leaf.dtype)
          for at, layer in enumerate(range(*spans[0])):
            full = name.format(layer)
            value[at].T[...] = sources[full][1].get_slice(full)[tuple(cuts[:0:-1])]
        else:
          value = np.asarray(sources[name][1].get_slice(name)[tuple(cuts)], leaf.dtype)
        read[spans] = value
      return read[spans]

    return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, part))

  return jax.tree_util.tree_map_with_path(load, abstract, shardings)


def set_tie(folder: epath.PathLike, tie_embeddings: bool) -> None:
  """Has config.json say whether the head is the embedding, where it says otherwise."""
  path = epath.Path(folder) / "config.json"
  raw = _read_json(path)
  if "tie_word_embeddings" in raw and bool(raw["tie_word_embeddings"]) != tie_embeddings:
    _write_json(path, raw | {"tie_word_embeddings": tie_embeddings})


def save(
  folder,
  model: Model,
  params: Params,
  *,
  tokenizer_folder=None,
  eos_ids: Sequence[int] = (),
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a folder that transformers.AutoModelForCausalLM loads; a killed call leaves nothing under its name.

  Parameters keep their dtype and their bits. One file of weights and one parameter are on the host at a time.

  Args:
    folder: made with its parents; it must be empty or not there.
    model: the architecture.
    params: stacked parameters; this process must be able to address every device's part.
    tokenizer_folder: its tokenizer is copied, its special ids and max_position_embeddings stand in config.json, and its
      generation_config.json, where it has one, is copied too. Both configs name all ids that end a turn.
    eos_ids: all ids that end a turn; where there are none, those of tokenizer_folder.
    max_shard_bytes: a file of weights is larger only where one tensor is; several files get an index.

  Raises:
    UserError: the folder is in use or cannot be written, the tokenizer cannot be read, or transformers refuses a size.
  """
  folder, c = epath.Path(folder), model.config
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f"{folder} exists already and is not an empty folder.")
  special, positions, files = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")), None, []
  generation = {}
  if tokenizer_folder is not None:
    from synthneg_jax.models import hf_tokenizers  # transformers is slow to import; only tokenizers need it

    source = epath.Path(tokenizer_folder)
    tokenizer = hf_tokenizers.load(source)
    special = {key: getattr(tokenizer, key) for key in special}
    ends = list(eos_ids) or hf_tokenizers.eos_ids(source, special["eos_token_id"])
    special["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    files = hf_tokenizers.files(source)
    if (source / "generation_config.json").exists():
      generation = _read_json(source / "generation_config.json") | {"eos_token_id": special["eos_token_id"]}
    if (source / "config.json").exists():
      positions = _read_json(source / "config.json").get("max_position_embeddings")
  config = special | hf_configs.write(c, positions)
  partial = folder.parent / f".{folder.name}.partial"
  try:
    shutil.rmtree(os.fspath(partial), ignore_errors=True)  # of a killed call
    partial.mkdir(parents=True)
    for file in files:
      (partial / file).parent.mkdir(exist_ok=True)
      (source / file).copy(partial / file)
    _write_json(partial / "config.json", config)
    _write_json(partial / "generation_config.json", special | generation)
    _write_weights(partial, hf_configs.tensor_names(c), params, max_shard_bytes=max_shard_bytes)
    os.rename(partial, folder)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{folder} cannot be written ({error}).") from error


def _wide(values: np.ndarray) -> np.ndarray:
  return values.astype(np.promote_types(values.dtype, np.float32) if values.dtype.kind == "f" else np.float32)


def _place(key_path) -> str:
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def _views(name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
  """The Hugging Face names of one parameter's tensors, with views of them in Hugging Face's shape."""
  if "{}" in name:
    return ((name.format(layer), part.T) for layer, part in enumerate(value))
  return iter([(name, value)])


def _stand_ins(names, params) -> dict[str, np.ndarray]:
  """The tensors of all parameters by their Hugging Face names, as arrays of shape and dtype that take no memory."""
  tensors = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    empty = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    tensors.update(_views(names[_place(key_path)], empty))
  return tensors


def _tensors(names, params):
  """(Hugging Face name, array on the host) of all parameters' tensors, one parameter after another."""
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    yield from _views(names[_place(key_path)], np.asarray(jax.device_get(leaf)))


def _write_weights(folder: epath.Path, names: dict[str, str], params: Params, *, max_shard_bytes: int) -> None:
  shard_of, sizes = {}, [0]
  for name, value in _stand_ins(names, params).items():
    if sizes[-1] and sizes[-1] + value.nbytes > max_shard_bytes:
      sizes.append(0)
    sizes[-1] += value.nbytes
    shard_of[name] = len(sizes) - 1
  count = len(sizes)
  files = [_SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]

  for shard, group in itertools.groupby(_tensors(names, params), lambda tensor: shard_of[tensor[0]]):
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
