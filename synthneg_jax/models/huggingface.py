"""Reads and writes Hugging Face folders: config.json, *.safetensors and the tokenizer's files;
models/hf_configs.py names them.

Our matrices are the transposes of theirs ([in, out] against [out, in]) and stand stacked over
layers; rotary pairs are the same, so that no row moves. Neither direction needs torch, but for
weights in torch's own format. Folders are local.
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
# rows of the embedding that are on the host at a time when a head is compared with it
_ROWS_COMPARED = 4096
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
  """The architecture that config.json describes; the other arguments are ModelConfig's.

  Args:
    folder: holds config.json.
    dtype, param_dtype, scan_layers, remat: as ModelConfig has them.
    max_length: tokens of the longest text of the run, by which longrope's factors are chosen.

  Raises:
    UserError: config.json is missing or broken, lacks a size, or asks for what the decoder does not
      compute.
  """
  path = epath.Path(folder) / "config.json"
  settings = {
    "dtype": dtype,
    "param_dtype": param_dtype,
    "scan_layers": scan_layers,
    "remat": remat,
  }
  return hf_configs.read(stored_tensors.read_json(path), path, max_length=max_length, **settings)


def untie_other_head(folder: epath.PathLike, config: ModelConfig) -> ModelConfig:
  """The same architecture, untied where the folder holds an lm_head.weight that differs from the
  embedding.

  Some trainers leave `tie_word_embeddings: true` in config.json when they have trained a head of
  its own.

  Raises:
    UserError: a file is missing or corrupt.
  """
  if not config.tie_embeddings:
    return config
  tensors, places = stored_tensors.read(folder), hf_configs.tensor_locations(config)
  embedding, head = (
    tensors.get(places[f"ends/{end}"].name) for end in ("embedding", "unembedding")
  )
  if embedding is None or head is None:
    return config
  if embedding.shape == head.shape:
    count, columns = embedding.shape
    spans = [
      (slice(at, min(at + _ROWS_COMPARED, count)), slice(0, columns))
      for at in range(0, count, _ROWS_COMPARED)
    ]
    if all(np.array_equal(_wide(embedding.read(span)), _wide(head.read(span))) for span in spans):
      return config
  logging.info(
    "%s: tie_word_embeddings is true, but %s differs from the embedding; the head is kept, untied.",
    folder,
    head.name,
  )
  return dataclasses.replace(config, tie_embeddings=False)


def load_params(
  folder: epath.PathLike, model: Model, shardings, *, is_sent: bool = False
) -> Params:
  """The parameters of a Hugging Face folder, cast to the model's param_dtype, each read straight
  into its layout.

  Names and shapes are checked before any tensor is read. Of every tensor only the parts that this
  process's devices hold are read; the host holds those of one stacked parameter at a time, and one
  tensor's part of it as the file has it.

  Args:
    folder: as `stored_tensors.read` takes it.
    model: as `read_config` describes it.
    shardings: a tree like the parameters.
    is_sent: process 0 alone reads the folder, whole, and sends it to the others: of stacked
      parameters a layer at a time.

  Raises:
    UserError: a file is missing or corrupt; a tensor is missing, has no place in the model, or has
      another shape or a dtype other than float64, float32, float16 or bfloat16.
  """
  places, abstract = hf_configs.tensor_locations(model.config), model.abstract_params()
  tensors = (
    _checked_tensors(epath.Path(folder), model, places)
    if distributed.first() or not is_sent
    else {}
  )

  def load(key_path, leaf, sharding):
    place, read = places[_path(key_path)], {}

    def rows(span):
      return slice(span.start + place.start, span.stop + place.start)

    def part(index):
      """The part of the parameter at these slices; devices with the same part share one copy."""
      spans = tuple(span.indices(size)[:2] for span, size in zip(index, leaf.shape, strict=True))
      if spans not in read:
        cuts = [slice(*span) for span in spans]
        if "{}" in place.name:
          value = np.empty([stop - start for start, stop in spans], leaf.dtype)
          for at, layer in enumerate(range(*spans[0])):
            first, *others = cuts[:0:-1]
            value[at].T[...] = tensors[place.name.format(layer)].read((rows(first), *others))
        else:
          value = np.asarray(tensors[place.name].read(tuple(cuts)), leaf.dtype)
        read[spans] = value
      return read[spans]

    if is_sent:

      def read_rows(span):
        return part((span, *(slice(None),) * (leaf.ndim - 1)))

      by = 1 if "{}" in place.name else leaf.shape[0]
      return device_mesh.from_first(leaf.shape, leaf.dtype, sharding, read_rows, rows=by)
    return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, part))

  return jax.tree_util.tree_map_with_path(load, abstract, shardings)


def _checked_tensors(
  folder: epath.Path, model: Model, places: Mapping[str, hf_configs.Location]
) -> dict[str, stored_tensors.Tensor]:
  """The tensors of a folder, all that the model has and no others; errors as in `load_params`."""
  tensors, wanted = stored_tensors.read(folder), _shapes(places, model.abstract_params())
  for name, (shape, _) in wanted.items():
    if name not in tensors:
      raise UserError(f"{folder}: the tensor {name} is missing.")
    tensor = tensors[name]
    if tensor.dtype not in _DTYPES:
      reason = (
        " (quantised weights are not supported)"
        if tensor.dtype.startswith(("F8", "F4", "F6"))
        else ""
      )
      raise UserError(
        f"{tensor.path}: the tensor {tensor.name} has dtype {tensor.dtype}, not one of "
        f"{', '.join(_DTYPES)}{reason}."
      )
    if tensor.shape != shape:
      raise UserError(
        f"{tensor.path}: the tensor {tensor.name} has shape {tensor.shape}, not {shape}."
      )
  for name in sorted(set(tensors) - set(wanted)):
    tied = model.config.tie_embeddings and name == places["ends/unembedding"].name
    if not tied and not name.endswith("rotary_emb.inv_freq"):
      _refuse_extra(tensors[name])
  return tensors


def _refuse_extra(tensor: stored_tensors.Tensor) -> None:
  """Refuses a tensor that has no place in the model, with the reason where it is known."""
  where = f"{tensor.path}: the tensor {tensor.name}"
  if tensor.name.startswith("v_head."):
    raise UserError(
      f"{where} belongs to a value head (TRL's AutoModelForCausalLMWithValueHead), which is not "
      "part of a policy; save the model without it (its attribute pretrained_model)."
    )
  if tensor.name.endswith(("weight_scale_inv", "weight_scale", "input_scale", "qweight", "qzeros")):
    raise UserError(f"{where} belongs to quantised weights, which are not supported.")
  raise UserError(f"{where} is not part of this model.")


def set_tie(folder: epath.PathLike, tie_embeddings: bool) -> None:
  """Has config.json say whether the head is the embedding, where it says otherwise."""
  path = epath.Path(folder) / "config.json"
  raw = stored_tensors.read_json(path)
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
  """Writes a folder that transformers.AutoModelForCausalLM loads; a killed call leaves nothing
  under its name.

  Parameters keep their dtype and their bits. One file of weights and one parameter are on the host
  at a time.

  Args:
    folder: made with its parents; it must be empty or not there.
    model: the architecture.
    params: stacked parameters; this process must be able to address every device's part.
    tokenizer_folder: its tokenizer is copied, its special ids and max_position_embeddings stand in
      config.json, and its generation_config.json, where it has one, is copied too. Both configs
      name all ids that end a turn.
    eos_ids: all ids that end a turn; where there are none, those of tokenizer_folder.
    max_shard_bytes: a file of weights is larger only where one tensor is; several files get an
      index.

  Raises:
    UserError: the folder is in use or cannot be written, the tokenizer cannot be read, or
      transformers refuses a size.
  """
  folder, c = epath.Path(folder), model.config
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f"{folder} already exists and is not an empty folder.")
  special, positions, files = (
    dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    None,
    [],
  )
  generation = {}
  if tokenizer_folder is not None:
    # transformers is slow to import; only tokenizers need it
    from synthneg_jax.models import hf_tokenizers

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
      described = hf_configs.text_config(stored_tensors.read_json(source / "config.json"))
      positions = described.get("max_position_embeddings")
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
    _write_weights(partial, hf_configs.tensor_locations(c), params, max_shard_bytes=max_shard_bytes)
    os.rename(partial, folder)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{folder} cannot be written ({error}).") from error


def _wide(values: np.ndarray) -> np.ndarray:
  return values.astype(
    np.promote_types(values.dtype, np.float32) if values.dtype.kind == "f" else np.float32
  )


def _path(key_path) -> str:
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def _grouped(places: Mapping[str, hf_configs.Location], params):
  """The parameters that share a tensor: its name -> leaves in the order of their rows."""
  groups = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    place = places[_path(key_path)]
    groups.setdefault(place.name, []).append((place.start, leaf))
  return {
    name: [leaf for _, leaf in sorted(parts, key=lambda part: part[0])]
    for name, parts in groups.items()
  }


def _shapes(
  places: Mapping[str, hf_configs.Location], params
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Shape and dtype of all tensors by their Hugging Face names."""
  shapes = {}
  for name, leaves in _grouped(places, params).items():
    shape = leaves[0].shape
    if "{}" in name:
      rows, *others = shape[:0:-1]
      rows = sum(leaf.shape[-1] for leaf in leaves)
      shapes |= {
        name.format(layer): ((rows, *others), leaves[0].dtype) for layer in range(shape[0])
      }
    else:
      shapes[name] = (shape, leaves[0].dtype)
  return shapes


def _tensors(places: Mapping[str, hf_configs.Location], params) -> Iterator[tuple[str, np.ndarray]]:
  """(Hugging Face name, array on the host) of all tensors; the parameters that one name stands for
  are there at a time.
  """
  for name, leaves in _grouped(places, params).items():
    values = [np.asarray(jax.device_get(leaf)) for leaf in leaves]
    if "{}" not in name:
      yield name, values[0]
      continue
    for layer in range(values[0].shape[0]):
      views = [value[layer].T for value in values]
      yield name.format(layer), views[0] if len(views) == 1 else np.concatenate(views)


def _write_weights(folder: epath.Path, places, params: Params, *, max_shard_bytes: int) -> None:
  shard_of, sizes = {}, [0]
  for name, (shape, dtype) in _shapes(places, params).items():
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if sizes[-1] and sizes[-1] + size > max_shard_bytes:
      sizes.append(0)
    sizes[-1] += size
    shard_of[name] = len(sizes) - 1
  count = len(sizes)
  files = (
    [_SINGLE]
    if count == 1
    else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
  )

  for shard, group in itertools.groupby(
    _tensors(places, params), lambda tensor: shard_of[tensor[0]]
  ):
    path = os.fspath(folder / files[shard])
    contents = {name: np.ascontiguousarray(view) for name, view in group}
    safetensors.numpy.save_file(contents, path, metadata={"format": "pt"})
    # save_file makes files that only their owner reads
    shutil.copymode(os.fspath(folder / "config.json"), path)
  if count > 1:
    weight_map = {name: files[shard] for name, shard in shard_of.items()}
    _write_json(folder / _INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _write_json(path: epath.Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
