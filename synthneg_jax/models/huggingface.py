"""Reads and writes local Hugging Face folders: config.json, weights and tokenizer files.

models/hf_configs.py maps configs and tensor names. Our matrices are stacked over layers and
transposed ([in, out] instead of [out, in]); rotary pairs are the same, so rows keep their order.
Torch is needed only to read weights in torch's own format.
"""

import dataclasses
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath

from synthneg_jax.models import hf_configs, stored_tensors
from synthneg_jax.models.config import ModelConfig
from synthneg_jax.models.decoder import Model, Params
from synthneg_jax.runtime import device_mesh, distributed
from synthneg_jax.runtime.errors import UserError

_DTYPES = ("F64", "F32", "F16", "BF16")
_ROWS_COMPARED = 4096  # rows per read when a head is compared with the embedding
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(
  folder: epath.PathLike,
  *,
  dtype: str,
  param_dtype: str,
  scan_layers: bool,
  remat: str,
  max_length: int = 0,
) -> ModelConfig:
  """The architecture described by a folder's config.json.

  Args:
    folder: contains config.json.
    dtype, param_dtype, scan_layers, remat: as in ModelConfig.
    max_length: tokens of the longest text of the run; selects longrope's factors.

  Raises:
    UserError: config.json is missing or invalid, lacks a size, or has an option that the decoder
      does not implement.
  """
  path = epath.Path(folder) / "config.json"
  return hf_configs.read(
    stored_tensors.read_json(path),
    path,
    max_length=max_length,
    dtype=dtype,
    param_dtype=param_dtype,
    scan_layers=scan_layers,
    remat=remat,
  )


def untie_differing_head(folder: epath.PathLike, config: ModelConfig) -> ModelConfig:
  """Sets tie_embeddings to False if the folder's lm_head.weight differs from the embedding.

  Some trainers leave `tie_word_embeddings: true` in config.json after training a separate head.

  Raises:
    UserError: a file is missing or corrupt.
  """
  if not config.tie_embeddings:
    return config
  tensors, locations = stored_tensors.read(folder), hf_configs.tensor_locations(config)
  embedding = tensors.get(locations["ends/embedding"].name)
  head = tensors.get(locations["ends/unembedding"].name)
  if embedding is None or head is None:
    return config
  for tensor in (embedding, head):
    _check_tensor(tensor, tensor.shape)  # before it is read
  if _equal(embedding, head):
    return config
  logging.info(
    "%s: tie_word_embeddings is true, but %s differs from the embedding; keeping an untied head.",
    folder,
    head.name,
  )
  return dataclasses.replace(config, tie_embeddings=False)


def _equal(a: stored_tensors.Tensor, b: stored_tensors.Tensor) -> bool:
  """Whether two matrices are equal, whatever their dtypes; reads them in blocks of rows."""
  if a.shape != b.shape:
    return False
  num_rows, columns = a.shape
  for start in range(0, num_rows, _ROWS_COMPARED):
    block = (slice(start, min(start + _ROWS_COMPARED, num_rows)), slice(0, columns))
    if not np.array_equal(_widen(a.read(block)), _widen(b.read(block))):
      return False
  return True


def load_params(
  folder: epath.PathLike, model: Model, shardings, *, is_sent: bool = False
) -> Params:
  """Reads the parameters of a Hugging Face folder into their shardings, cast to param_dtype.

  Names and shapes are checked before any tensor is read. Each process reads only the parts for its
  devices. Host memory is bounded by one stacked parameter plus one tensor in the file's dtype.

  Args:
    folder: as in `stored_tensors.read`.
    model: its config is from `read_config`.
    shardings: a tree like the parameters.
    is_sent: process 0 alone reads the folder and sends it to the others, one layer of a stacked
      parameter at a time.

  Raises:
    UserError: a file is missing or corrupt, or a tensor is missing, unexpected, of another shape,
      or of a dtype other than float64, float32, float16 and bfloat16.
  """
  locations, abstract = hf_configs.tensor_locations(model.config), model.abstract_params()
  tensors = {}
  if distributed.is_primary() or not is_sent:
    tensors = _checked_tensors(epath.Path(folder), model, locations)

  def load(key_path, leaf, sharding):
    location, parts = locations[_path(key_path)], {}

    def read_part(spans):
      slices = [slice(*span) for span in spans]
      if "{}" not in location.name:
        return np.asarray(tensors[location.name].read(tuple(slices)), leaf.dtype)
      outputs, *inputs = slices[:0:-1]  # tensors are transposed, and have no layers
      rows = slice(outputs.start + location.start, outputs.stop + location.start)
      value = np.empty([stop - start for start, stop in spans], leaf.dtype)
      for i, layer in enumerate(range(*spans[0])):
        value[i].T[...] = tensors[location.name.format(layer)].read((rows, *inputs))
      return value

    def part(index):
      """The part of the parameter at these slices, read once for all devices that hold it."""
      spans = tuple(i.indices(size)[:2] for i, size in zip(index, leaf.shape, strict=True))
      if spans not in parts:
        parts[spans] = read_part(spans)
      return parts[spans]

    def rows(span):
      return part((span, *(slice(None),) * (leaf.ndim - 1)))

    if is_sent:
      rows_per_message = 1 if "{}" in location.name else leaf.shape[0]
      return device_mesh.from_first(leaf.shape, leaf.dtype, sharding, rows, rows=rows_per_message)
    return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, part))

  return jax.tree_util.tree_map_with_path(load, abstract, shardings)


def _checked_tensors(
  folder: epath.Path, model: Model, locations: Mapping[str, hf_configs.Location]
) -> dict[str, stored_tensors.Tensor]:
  """The tensors of a folder, which must be those of the model; errors as in `load_params`."""
  tensors, expected = stored_tensors.read(folder), _shapes(locations, model.abstract_params())
  for name, (shape, _) in expected.items():
    if name not in tensors:
      raise UserError(f"{folder}: the tensor {name} is missing.")
    _check_tensor(tensors[name], shape)
  for name in sorted(set(tensors) - set(expected)):
    tied = model.config.tie_embeddings and name == locations["ends/unembedding"].name
    if not tied and not name.endswith("rotary_emb.inv_freq"):
      _refuse_unexpected(tensors[name])
  return tensors


def _check_tensor(tensor: stored_tensors.Tensor, shape: tuple[int, ...]) -> None:
  if tensor.dtype not in _DTYPES:
    is_quantised = tensor.dtype.startswith(("F8", "F4", "F6"))
    reason = " (quantised weights are not supported)" if is_quantised else ""
    raise UserError(
      f"{tensor.path}: the tensor {tensor.name} has dtype {tensor.dtype}, not one of "
      f"{', '.join(_DTYPES)}{reason}."
    )
  if tensor.shape != shape:
    raise UserError(
      f"{tensor.path}: the tensor {tensor.name} has shape {tensor.shape}, not {shape}."
    )


def _refuse_unexpected(tensor: stored_tensors.Tensor) -> None:
  """Refuses a tensor that the model does not have, with the reason if it is known."""
  where = f"{tensor.path}: the tensor {tensor.name}"
  if tensor.name.startswith("v_head."):
    raise UserError(
      f"{where} belongs to a value head (TRL's AutoModelForCausalLMWithValueHead), which is not "
      "part of a policy: save its attribute pretrained_model instead."
    )
  if tensor.name.endswith(("weight_scale_inv", "weight_scale", "input_scale", "qweight", "qzeros")):
    raise UserError(f"{where} belongs to quantised weights (such as FP8), which are not supported.")
  raise UserError(f"{where} is not part of this model.")


def write_tie_embeddings(folder: epath.PathLike, tie_embeddings: bool) -> None:
  """Corrects tie_word_embeddings in config.json, or adds it where its absence means otherwise."""
  path = epath.Path(folder) / "config.json"
  raw = stored_tensors.read_json(path)
  if hf_configs.ties_embeddings(raw, path) != tie_embeddings:
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
  """Writes a folder that transformers.AutoModelForCausalLM loads.

  Parameters are written bit for bit, and the folder is renamed into place when complete. Host
  memory is bounded by one file of weights plus one parameter.

  Args:
    folder: created with its parents; must not exist or be empty.
    model: the architecture.
    params: stacked parameters, fully addressable by this process.
    tokenizer_folder: the folder from which the tokenizer, generation_config.json, special ids and
      max_position_embeddings are copied; None for none of these.
    eos_ids: all ids that end a turn, written to both configs; by default those of tokenizer_folder.
    max_shard_bytes: maximum size of a file of weights with more than one tensor; several files get
      an index.

  Raises:
    UserError: the folder is in use or cannot be written, the tokenizer cannot be read, or
      transformers refuses a size.
  """
  folder, c = epath.Path(folder), model.config
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f"{folder} already exists and is not an empty folder.")
  special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  positions, files, generation = None, [], {}
  if tokenizer_folder is not None:
    from synthneg_jax.models import hf_tokenizers  # imports transformers, which is slow

    source = epath.Path(tokenizer_folder)
    tokenizer = hf_tokenizers.load(source)
    special = {key: getattr(tokenizer, key) for key in special}
    ends = list(eos_ids) or hf_tokenizers.eos_ids(source, special["eos_token_id"])
    special["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    files = hf_tokenizers.files(source)
    if (source / "generation_config.json").exists():
      generation = stored_tensors.read_json(source / "generation_config.json") | {
        "eos_token_id": special["eos_token_id"]
      }
    if (source / "config.json").exists():
      described = stored_tensors.read_json(source / "config.json")
      positions = hf_configs.positions(described, source / "config.json")
  config = special | hf_configs.write(c, positions)
  partial = folder.parent / f".{folder.name}.partial"
  try:
    shutil.rmtree(os.fspath(partial), ignore_errors=True)  # left by an interrupted call
    partial.mkdir(parents=True)
    for file in files:
      (partial / file).parent.mkdir(exist_ok=True)
      (source / file).copy(partial / file)
    _write_json(partial / "config.json", config)
    _write_json(partial / "generation_config.json", special | generation)
    _write_weights(partial, hf_configs.tensor_locations(c), params, max_shard_bytes=max_shard_bytes)
    os.rename(partial, folder)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{folder} cannot be written ({error}).") from error


def _widen(values: np.ndarray) -> np.ndarray:
  """Casts to float32 or wider; bfloat16's kind is not "f"."""
  is_numpy_float = values.dtype.kind == "f"
  return values.astype(np.promote_types(values.dtype, np.float32) if is_numpy_float else np.float32)


def _path(key_path) -> str:
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def _by_tensor(locations: Mapping[str, hf_configs.Location], params) -> dict[str, list]:
  """The parameters that share each tensor, in the order of their rows."""
  groups = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    location = locations[_path(key_path)]
    groups.setdefault(location.name, {})[location.start] = leaf
  return {name: [leaf for _, leaf in sorted(group.items())] for name, group in groups.items()}


def _shapes(
  locations: Mapping[str, hf_configs.Location], params
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Shape and dtype of all tensors by their Hugging Face names."""
  shapes = {}
  for name, leaves in _by_tensor(locations, params).items():
    shape, dtype = leaves[0].shape, leaves[0].dtype
    if "{}" in name:
      rows = sum(leaf.shape[-1] for leaf in leaves)
      transposed = (rows, *shape[1:-1])
      shapes |= {name.format(layer): (transposed, dtype) for layer in range(shape[0])}
    else:
      shapes[name] = (shape, dtype)
  return shapes


def _tensors(
  locations: Mapping[str, hf_configs.Location], params
) -> Iterator[tuple[str, np.ndarray]]:
  """(Hugging Face name, array on the host) of all tensors, fetching one name's at a time."""
  for name, leaves in _by_tensor(locations, params).items():
    values = [np.asarray(jax.device_get(leaf)) for leaf in leaves]
    if "{}" not in name:
      yield name, values[0]
      continue
    for layer in range(values[0].shape[0]):
      views = [value[layer].T for value in values]
      yield name.format(layer), views[0] if len(views) == 1 else np.concatenate(views)


def _write_weights(folder: epath.Path, locations, params: Params, *, max_shard_bytes: int) -> None:
  shard_of, sizes = {}, [0]
  for name, (shape, dtype) in _shapes(locations, params).items():
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if sizes[-1] and sizes[-1] + size > max_shard_bytes:
      sizes.append(0)
    sizes[-1] += size
    shard_of[name] = len(sizes) - 1
  count = len(sizes)
  files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
  if count == 1:
    files = [_SINGLE]

  def shard_of_tensor(tensor):
    return shard_of[tensor[0]]

  for shard, group in itertools.groupby(_tensors(locations, params), shard_of_tensor):
    path = os.fspath(folder / files[shard])
    contents = {name: np.ascontiguousarray(view) for name, view in group}
    safetensors.numpy.save_file(contents, path, metadata={"format": "pt"})
    # save_file creates files that only their owner can read.
    shutil.copymode(os.fspath(folder / "config.json"), path)
  if count > 1:
    weight_map = {name: files[shard] for name, shard in shard_of.items()}
    _write_json(folder / _INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _write_json(path: epath.Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
