"""Lazily read tensors of a Hugging Face folder, under canonical names.

Some programs save tensors without the prefix `model.`, or with prefixes of a multimodal wrapper.
Names are mapped to those of the text model's own class, and vision tensors are ignored.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from synthneg_jax.runtime.errors import UserError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TORCH_SINGLE, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_BARE = ("layers.", "embed_tokens.", "norm.")
_VISION = re.compile(r"(?:model\.)?(?:vision_tower|vision_model|multi_modal_projector)\.")
_PREFIX = re.compile(r"(?:language_model\.model|model\.language_model|language_model|model)\.")


class Tensor(NamedTuple):
  """One tensor of a folder.

  Attributes:
    path: its file.
    name: its name in the file.
    shape: its shape.
    dtype: its dtype, as named by safetensors.
    read: takes one slice per dimension and returns that part as a numpy array.
  """

  path: epath.Path
  name: str
  shape: tuple[int, ...]
  dtype: str
  read: Callable[[tuple[slice, ...]], np.ndarray]


def read(folder: epath.PathLike) -> dict[str, Tensor]:
  """The tensors of a folder by the names of `hf_configs.tensor_locations`.

  Args:
    folder: contains model.safetensors, or model.safetensors.index.json and the files that it lists;
      or else pytorch_model.bin, likewise.

  Raises:
    UserError: a file is missing, corrupt or of an unsupported format, or two tensors have the same
      canonical name.
  """
  folder, tensors = epath.Path(folder), {}
  for tensor in _stored(folder):
    name = canonical_name(tensor.name)
    if name is None:
      continue
    if name in tensors:
      both = f"{tensors[name].name} and {tensor.name}"
      raise UserError(f"{tensor.path}: the tensors {both} are both {name}.")
    tensors[name] = tensor
  return tensors


def read_adapter(folder: epath.Path) -> list[Tensor]:
  """The tensors of a PEFT folder: adapter_model.safetensors, or .bin if torch is installed.

  Raises:
    UserError: neither file exists, or the file cannot be read.
  """
  if (folder / "adapter_model.safetensors").exists():
    return list(_safetensors(folder, "adapter_model.safetensors"))
  if (folder / "adapter_model.bin").exists():
    return list(_torch(folder, "adapter_model.bin"))
  raise UserError(f"{folder} has neither adapter_model.safetensors nor adapter_model.bin.")


def canonical_name(name: str) -> str | None:
  """A tensor's name in the text model's own class; None for vision tensors."""
  if _VISION.match(name):
    return None
  if name.startswith("language_model.lm_head."):
    name = name.removeprefix("language_model.")
  if name.startswith(_BARE):
    return f"model.{name}"
  prefix = _PREFIX.match(name)
  return f"model.{name[prefix.end() :]}" if prefix else name


def has_weights(folder: epath.Path) -> bool:
  """Whether a folder contains safetensors or torch weights."""
  return any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", "pytorch_model*.bin*"))


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    UserError: the file is missing, is not valid JSON, or is not an object.
  """
  try:
    value = json.loads(path.read_text())
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from error
  except ValueError as error:  # invalid JSON or invalid UTF-8
    raise UserError(f"{path} is not valid JSON ({error}).") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} is not a JSON object.")
  return value


def _stored(folder: epath.Path) -> Iterator[Tensor]:
  if (folder / _SINGLE).exists() or (folder / _INDEX).exists():
    yield from _safetensors(folder)
  elif (folder / _TORCH_SINGLE).exists() or (folder / _TORCH_INDEX).exists():
    yield from _torch(folder)
  elif (folder / "consolidated.safetensors").exists():
    raise UserError(
      f"{folder} has only consolidated.safetensors, in Mistral's own names and layouts: use the "
      f"folder with {_SINGLE}, which is usually in the same repository."
    )
  else:
    raise UserError(f"{folder} has neither {_SINGLE} nor {_INDEX}.")


def _files(folder: epath.Path, single: str, index: str) -> list[str]:
  if (folder / single).exists():
    return [single]
  weight_map = read_json(folder / index).get("weight_map")
  files = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
  if not all(isinstance(name, str) for name in files):
    raise UserError(f"{folder / index} has no weight_map from tensor names to files.")
  return sorted(set(files))


def _safetensors(folder: epath.Path, single: str = _SINGLE) -> Iterator[Tensor]:
  for name in _files(folder, single, _INDEX):
    path = folder / name
    if "://" in os.fspath(path):
      yield from _in_bucket(path)
      continue
    try:
      file = safetensors.safe_open(os.fspath(path), framework="np")
    except (OSError, safetensors.SafetensorError) as error:
      raise UserError(f"{path} is missing or not a safetensors file ({error}).") from error
    for key in file.keys():  # noqa: SIM118
      part = file.get_slice(key)
      yield Tensor(path, key, tuple(part.get_shape()), part.get_dtype(), _reader(file, key))


def _reader(file, key: str) -> Callable[[tuple[slice, ...]], np.ndarray]:
  return lambda slices: file.get_slice(key)[slices]


_NUMPY_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
}


def _in_bucket(path: epath.Path) -> Iterator[Tensor]:
  """The tensors of a safetensors file that no memory can be mapped to: its header, then the rows
  that are asked for.
  """
  try:
    with path.open("rb") as file:
      start = 8 + int.from_bytes(file.read(8), "little")
      if start > 100_000_000:  # as safetensors itself has it
        raise ValueError("its header is too long")
      header = json.loads(file.read(start - 8))
    tensors = [
      Tensor(path, key, tuple(about["shape"]), about["dtype"], _bucket_reader(path, about, start))
      for key, about in header.items()
      if key != "__metadata__"
    ]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{path} is missing or no safetensors file ({error}).") from error
  yield from tensors


def _bucket_reader(
  path: epath.Path, about: dict[str, Any], start: int
) -> Callable[[tuple[slice, ...]], np.ndarray]:
  def part(cuts):
    count, *others = about["shape"]
    begin, end = about["data_offsets"]
    first, last, _ = cuts[0].indices(count)
    row = (end - begin) // count
    with path.open("rb") as file:
      file.seek(start + begin + first * row)
      content = file.read((last - first) * row)
    values = np.frombuffer(content, _NUMPY_DTYPES[about["dtype"]]).reshape(last - first, *others)
    return values[(slice(None), *cuts[1:])]

  return part


_TORCH_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _torch(folder: epath.Path, single: str = _TORCH_SINGLE) -> Iterator[Tensor]:
  try:
    import torch  # optional: only these files need it
  except ImportError as error:
    files = single.replace("model.bin", "model*.bin")
    raise UserError(
      f"{folder} has {files}, which only torch can read: pip install torch, or convert the folder "
      'on a machine with torch: python -c "import transformers; '
      f"transformers.AutoModelForCausalLM.from_pretrained('{folder}', dtype='auto')"
      f".save_pretrained('{folder}')\"."
    ) from error
  for name in _files(folder, single, _TORCH_INDEX):
    path = folder / name
    try:
      state = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # errors of pickle, zipfile and torch share no class
      reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
      raise UserError(f"{path} cannot be read by torch as weights only ({reason}).") from error
    for key, value in state.items():
      if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        dtype = _TORCH_DTYPES.get(dtype, dtype)
        yield Tensor(path, key, tuple(value.shape), dtype, _torch_reader(value))


def _torch_reader(value) -> Callable[[tuple[slice, ...]], np.ndarray]:
  def read(slices):
    import torch

    part = value[slices].detach().contiguous()
    if part.dtype == torch.bfloat16:
      return part.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return part.numpy()

  return read
