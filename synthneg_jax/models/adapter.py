"""Low-rank adapters: W + (α/r)·A·B, where only A and B are trained (LoRA).

See Hu et al., https://arxiv.org/abs/2106.09685. The decoder's `params` may include an adapter:
{"ends", "layers", "adapter"}, where "adapter" maps each adapted matrix to {"a": [Y, in, r], "b":
[Y, r, out]}, and the decoder adds a·b without scaling. Training and checkpoints use the unscaled
pair: `join` multiplies b by α/r for the decoder, and `merge` adds the product to the base for
decoding and export. B starts at 0, so that a new policy equals its base. DPO uses the base as
reference and needs no second copy of it.
"""

import dataclasses
import json
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from synthneg_jax.models import hf_configs, stored_tensors
from synthneg_jax.models.decoder import Model, Params
from synthneg_jax.runtime.errors import UserError

_AXES = {  # logical axes of each matrix's inputs and outputs, as in models/decoder.py
  "query": ("embed", "heads"),
  "key": ("embed", "kv_heads"),
  "value": ("embed", "kv_heads"),
  "output": ("heads", "embed"),
  "gate": ("embed", "mlp"),
  "up": ("embed", "mlp"),
  "down": ("mlp", "embed"),
}
TARGETS = tuple(_AXES)


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The form of an adapter; its parameters are {target: {"a", "b"}}, always float32.

  Attributes:
    model: the base.
    rank: r.
    alpha: α; a·b is multiplied by α/r.
    targets: the adapted matrices, a subset of TARGETS.
  """

  model: Model
  rank: int
  alpha: float
  targets: tuple[str, ...]

  def __post_init__(self):
    unknown = [name for name in self.targets if name not in TARGETS]
    if unknown or not self.targets:
      raise UserError(
        f"An adapter's targets must be among {', '.join(TARGETS)}, not "
        f"{', '.join(unknown) or 'empty'}."
      )
    if self.rank < 1 or self.alpha <= 0:
      raise UserError(
        f"An adapter needs rank of at least 1 and alpha above 0, not {self.rank} and {self.alpha}."
      )

  @property
  def scale(self) -> float:
    """α/r."""
    return self.alpha / self.rank

  def abstract_params(self) -> Params:
    """Shapes and dtypes of the parameters."""
    layers = self.model.abstract_params()["layers"]

    def pair(shape):
      num_layers, inputs, outputs = shape
      return {
        "a": jax.ShapeDtypeStruct((num_layers, inputs, self.rank), jnp.float32),
        "b": jax.ShapeDtypeStruct((num_layers, self.rank, outputs), jnp.float32),
      }

    return {name: pair(layers[name].shape) for name in self.targets}

  def logical_axes(self) -> Params:
    """Logical axis names of each parameter: the base's, and None for r."""

    def pair(inputs, outputs):
      return {"a": ("layers", inputs, None), "b": ("layers", None, outputs)}

    return {name: pair(*_AXES[name]) for name in self.targets}

  def init(self, key: jax.Array) -> Params:
    """Draws A uniformly within ±1/√in, like PEFT, and sets B to 0."""

    def pair(key, shapes):
      bound = shapes["a"].shape[1] ** -0.5
      a = jax.random.uniform(key, shapes["a"].shape, jnp.float32, -bound, bound)
      return {"a": a, "b": jnp.zeros(shapes["b"].shape, jnp.float32)}

    keys = jax.random.split(key, len(self.targets))
    return {
      name: pair(keys[i], shapes) for i, (name, shapes) in enumerate(self.abstract_params().items())
    }

  def join(self, base: Params, params: Params) -> Params:
    """Combines base and adapter into parameters of the decoder, differentiable in `params`.

    The layers of both are stacked.
    """
    if isinstance(base["layers"], tuple):
      raise ValueError("Adapter.join needs a base whose layers are stacked.")
    scaled = {name: {"a": pair["a"], "b": pair["b"] * self.scale} for name, pair in params.items()}
    return {**base, "adapter": scaled}

  def merge(self, base: Params, params: Params) -> Params:
    """Adds the adapter to the base in float32; keeps the base's dtype and sharding.

    The adapted matrices of `base` are donated: do not use them afterwards.
    """
    layers = dict(base["layers"])
    for name in self.targets:
      add = jax.jit(
        _add_product,
        donate_argnums=0,
        static_argnames="scale",
        out_shardings=layers[name].sharding,
      )
      layers[name] = add(layers[name], params[name]["a"], params[name]["b"], scale=self.scale)
    return {"ends": base["ends"], "layers": layers}


def _add_product(kernel_YIO, a_YIR, b_YRO, *, scale: float):
  """kernel + scale · a·b; the scan bounds float32 memory by one layer."""

  def add(_, layer):
    kernel, a, b = layer
    return None, (kernel + scale * jnp.matmul(a, b, precision="highest")).astype(kernel.dtype)

  return jax.lax.scan(add, None, (kernel_YIO, a_YIR, b_YRO))[1]


def load_peft(folder: epath.PathLike, model: Model) -> tuple[Adapter, Params]:
  """Loads an adapter in PEFT's format.

  Matrices of smaller rank than the largest are padded with zeros, and B is scaled so that α = r.

  Args:
    folder: contains adapter_config.json and adapter_model.safetensors (or .bin, if torch is
      installed).
    model: the base that the adapter was trained on.

  Returns:
    (the adapter, its parameters as numpy arrays).

  Raises:
    UserError: the folder cannot be read, or is not a LoRA adapter of the decoder's matrices.
  """
  folder = epath.Path(folder)
  path = folder / "adapter_config.json"
  config = stored_tensors.read_json(path)
  _check_peft_config(path, config)
  pairs = _peft_pairs(folder)
  if not pairs:
    raise UserError(f"{folder}: the weights contain no lora_A and lora_B.")
  max_rank = max(a_RI.shape[0] for a_RI, _ in pairs.values())
  abstract, locations = model.abstract_params()["layers"], hf_configs.tensor_locations(model.config)
  params, used = {}, set()
  for name in TARGETS:
    location, (num_layers, inputs, outputs) = locations[f"layers/{name}"], abstract[name].shape
    modules = [location.name.removesuffix(".weight").format(layer) for layer in range(num_layers)]
    if not pairs.keys() & set(modules):
      continue
    a_YIR = np.zeros((num_layers, inputs, max_rank), np.float32)
    b_YRO = np.zeros((num_layers, max_rank, outputs), np.float32)
    for layer, module in enumerate(modules):
      if module not in pairs:
        continue
      a_RI, b_OR = pairs[module]
      rank, rows = a_RI.shape[0], location.rows or outputs
      if a_RI.shape[1] != inputs or b_OR.shape != (rows, rank):
        raise UserError(
          f"{folder}: {module} has lora_A {a_RI.shape} and lora_B {b_OR.shape}, but the base's "
          f"matrix has {inputs} inputs and {rows} outputs."
        )
      own_OR = b_OR[location.start : location.start + outputs]
      a_YIR[layer, :, :rank] = a_RI.T
      b_YRO[layer, :rank] = own_OR.T * _peft_scale(config, module, rank)
      used.add(module)
    params[name] = {"a": a_YIR, "b": b_YRO}
  if unused := sorted(pairs.keys() - used):
    raise UserError(
      f"{folder} adapts {unused[0]}, but only the decoder's matrices {', '.join(TARGETS)} are "
      "supported."
    )
  return Adapter(model, max_rank, float(max_rank), tuple(params)), params


def _check_peft_config(path: epath.Path, config) -> None:
  """Refuses options of PEFT that a pair of matrices cannot represent."""
  if config.get("peft_type") != "LORA":
    raise UserError(
      f"{path}: peft_type {json.dumps(config.get('peft_type'))} is not supported, only LORA is."
    )
  initialised = str(config.get("init_lora_weights"))
  if initialised.startswith(("pissa", "corda", "olora", "loftq")):
    raise UserError(
      f"{path}: init_lora_weights {json.dumps(initialised)} changes the base's weights when PEFT "
      "loads it: merge the adapter into its base with PEFT and use the merged folder."
    )
  supported = {"bias": "none", "use_dora": False, "lora_bias": False, "fan_in_fan_out": False}
  supported["use_qalora"] = False
  for key, value in supported.items():
    if config.get(key, value) not in (value, None):
      raise UserError(
        f"{path}: {key} {json.dumps(config[key])} is not supported, only {json.dumps(value)} is."
      )
  for key in (
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
  ):
    if config.get(key):
      raise UserError(
        f"{path}: {key} is not supported: merge the adapter into its base with PEFT and use the "
        "merged folder."
      )


def _peft_pairs(folder: epath.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """(lora_A [r, in], lora_B [out, r]), float32, of each module."""
  by_module = {}
  for tensor in stored_tensors.read_adapter(folder):
    name = tensor.name.removeprefix("base_model.model.")
    module, _, letter = name.removesuffix(".weight").removesuffix(".default").rpartition(".lora_")
    if not module or letter not in ("A", "B") or len(tensor.shape) != 2:
      raise UserError(
        f"{tensor.path}: the tensor {tensor.name} is neither lora_A nor lora_B of a matrix."
      )
    values = tensor.read(tuple(slice(0, size) for size in tensor.shape)).astype(np.float32)
    module = stored_tensors.canonical_name(module) or module
    by_module.setdefault(module, {})[letter] = values
  for module, matrices in by_module.items():
    if len(matrices) != 2:
      (letter,) = matrices
      raise UserError(f"{folder}: {module} has only lora_{letter} of lora_A and lora_B.")
  return {module: (matrices["A"], matrices["B"]) for module, matrices in by_module.items()}


def _peft_scale(config, module: str, rank: int) -> float:
  """The factor of a·b of a module; PEFT's patterns match the end of a module's name."""
  alpha = config.get("lora_alpha", 8)
  for pattern, value in (config.get("alpha_pattern") or {}).items():
    if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
      alpha = value
      break
  return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def save_peft(folder: epath.PathLike, chain, base_name: str) -> None:
  """Writes adapters as one adapter in PEFT's format, for `peft.PeftModel.from_pretrained`.

  Args:
    folder: created with its parents; existing files of the same names are replaced.
    chain: (Adapter, its parameters) pairs, each trained on top of the previous ones. They become
      one adapter of the first one's base whose A and B are concatenated, so that ranks add up.
    base_name: name of the base, for adapter_config.json.

  Raises:
    UserError: the folder cannot be written.
  """
  tensors, ranks = {}, {}
  for module, parts in _parts_by_module(chain).items():
    rank, rows = sum(part.a_YIR.shape[2] for part in parts), parts[0].rows
    ranks[module.rpartition(".")[2]] = rank
    for layer in range(parts[0].a_YIR.shape[0]):
      b_OR, column = np.zeros((rows, rank), np.float32), 0
      for part in parts:
        own_RO = part.b_YRO[layer]
        own_rows = slice(part.start, part.start + own_RO.shape[1])
        b_OR[own_rows, column : column + own_RO.shape[0]] = own_RO.T
        column += own_RO.shape[0]
      prefix = f"base_model.model.{module.format(layer)}"
      a_RI = np.concatenate([part.a_YIR[layer].T for part in parts])
      tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a_RI)
      tensors[f"{prefix}.lora_B.weight"] = b_OR
  max_rank = max(ranks.values())
  smaller = {module: rank for module, rank in ranks.items() if rank != max_rank}
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_name,
    "r": max_rank,
    "lora_alpha": max_rank,  # PEFT multiplies by alpha / rank = 1: B is scaled already
    "rank_pattern": smaller,
    "alpha_pattern": smaller,
    "target_modules": sorted(ranks),
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "inference_mode": True,
  }
  folder = epath.Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(
      tensors, os.fspath(folder / "adapter_model.safetensors"), metadata={"format": "pt"}
    )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{folder} cannot be written ({error}).") from error


class _Part(NamedTuple):
  """An adapter of rows `start` to `start` + O of a module with `rows` rows; b is scaled by α/r."""

  a_YIR: np.ndarray
  b_YRO: np.ndarray
  start: int
  rows: int


def _parts_by_module(chain) -> dict[str, list[_Part]]:
  """The adapters of each module, in which {} stands for the layer."""
  locations, by_module = hf_configs.tensor_locations(chain[0][0].model.config), {}
  for name in TARGETS:
    location = locations[f"layers/{name}"]
    for adapter, params in chain:
      if name not in params:
        continue
      a_YIR = np.asarray(jax.device_get(params[name]["a"]))
      b_YRO = np.asarray(jax.device_get(params[name]["b"] * adapter.scale))
      part = _Part(a_YIR, b_YRO, location.start, location.rows or b_YRO.shape[2])
      by_module.setdefault(location.name.removesuffix(".weight"), []).append(part)
  return by_module
