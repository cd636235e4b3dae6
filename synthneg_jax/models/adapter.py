"""Low-rank adapters: W + (α/r)·A·B, of which A and B alone are trained (LoRA, Hu et al.,
https://arxiv.org/abs/2106.09685).

In the decoder, `params` may be a base with an adapter: {"ends", "layers", "adapter"}, where
"adapter" holds for each adapted matrix {"a": [Y, in, r], "b": [Y, r, out]} and a·b is added as it
stands. What is trained and kept is the raw pair; `join` multiplies b by α/r on the way in, `merge`
adds it to the base for decoding and export. With B = 0 at the start a policy begins as its base,
and the base is the reference of DPO: no second copy is held.
"""

import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from synthneg_jax.models import hf_configs, stored_tensors
from synthneg_jax.models.decoder import Model, Params
from synthneg_jax.runtime.errors import UserError

_AXES = {  # matrix -> logical axes of its inputs and outputs, as in models/decoder.py
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
  """What an adapter looks like. Its parameters are {target: {"a", "b"}}, float32 whatever the
  base's dtype.

  Attributes:
    model: the base.
    rank: r.
    alpha: α; a·b counts α/r times.
    targets: matrices that are adapted, of TARGETS.
  """

  model: Model
  rank: int
  alpha: float
  targets: tuple[str, ...]

  def __post_init__(self):
    unknown = [name for name in self.targets if name not in TARGETS]
    if unknown or not self.targets:
      raise UserError(
        f"An adapter's targets are {', '.join(TARGETS)}, not {', '.join(unknown) or 'none at all'}."
      )
    if self.rank < 1 or self.alpha <= 0:
      raise UserError(
        f"An adapter needs a rank of at least 1 and an alpha above 0, not {self.rank} and "
        f"{self.alpha}."
      )

  @property
  def scale(self) -> float:
    """α/r."""
    return self.alpha / self.rank

  def abstract_params(self) -> Params:
    """Shapes and dtypes, nothing computed."""
    layers = self.model.abstract_params()["layers"]

    def pair(shape):
      count, inputs, outputs = shape
      return {
        "a": jax.ShapeDtypeStruct((count, inputs, self.rank), jnp.float32),
        "b": jax.ShapeDtypeStruct((count, self.rank, outputs), jnp.float32),
      }

    return {name: pair(layers[name].shape) for name in self.targets}

  def logical_axes(self) -> Params:
    """For each parameter a tuple of logical axis names: the base's, and none for r."""

    def pair(inputs, outputs):
      return {"a": ("layers", inputs, None), "b": ("layers", None, outputs)}

    return {name: pair(*_AXES[name]) for name in self.targets}

  def init(self, key: jax.Array) -> Params:
    """A uniform within ±1/√in, as PEFT draws it, and B zero."""

    def pair(key, shapes):
      bound = shapes["a"].shape[1] ** -0.5
      a = jax.random.uniform(key, shapes["a"].shape, jnp.float32, -bound, bound)
      return {"a": a, "b": jnp.zeros(shapes["b"].shape, jnp.float32)}

    keys = jax.random.split(key, len(self.targets))
    return {
      name: pair(keys[i], shapes) for i, (name, shapes) in enumerate(self.abstract_params().items())
    }

  def join(self, base: Params, params: Params) -> Params:
    """Base and adapter as the decoder takes them; gradients flow to `params`."""
    scaled = {name: {"a": pair["a"], "b": pair["b"] * self.scale} for name, pair in params.items()}
    return {**base, "adapter": scaled}

  def merge(self, base: Params, params: Params) -> Params:
    """The base's parameters with the adapter added in float32, in the base's dtype and layout; the
    base is consumed.
    """
    layers = dict(base["layers"])
    for name in self.targets:
      add = jax.jit(_add, donate_argnums=0, static_argnums=3, out_shardings=layers[name].sharding)
      layers[name] = add(layers[name], params[name]["a"], params[name]["b"], self.scale)
    return {"ends": base["ends"], "layers": layers}


def _add(kernel_YIO, a_YIR, b_YRO, scale):
  """A layer at a time, so that one layer's float32 exists at once."""

  def layer(_, parts):
    kernel, a, b = parts
    return None, (kernel + scale * jnp.matmul(a, b, precision="highest")).astype(kernel.dtype)

  return jax.lax.scan(layer, None, (kernel_YIO, a_YIR, b_YRO))[1]


def load_peft(folder: epath.PathLike, model: Model) -> tuple[Adapter, Params]:
  """An adapter in the format of PEFT, for the base that it was trained on.

  Matrices of smaller rank than the largest are padded with zeros, and B is scaled, so that α = r.

  Args:
    folder: holds adapter_config.json and adapter_model.safetensors (or .bin, where torch is
      installed).
    model: the base.

  Returns:
    (the adapter, its parameters as numpy arrays).

  Raises:
    UserError: the folder cannot be read, or adapts in another way than LoRA of the decoder's
      matrices.
  """
  folder = epath.Path(folder)
  path = folder / "adapter_config.json"
  config = stored_tensors.read_json(path)
  _refuse_other_peft(path, config)
  pairs = _peft_pairs(folder)
  if not pairs:
    raise UserError(f"{folder}: its weights hold no lora_A and lora_B.")
  most = max(a_RI.shape[0] for a_RI, _ in pairs.values())
  abstract, places = model.abstract_params()["layers"], hf_configs.tensor_places(model.config)
  params, used = {}, set()
  for name in TARGETS:
    place, (count, inputs, outputs) = places[f"layers/{name}"], abstract[name].shape
    modules = [place.name.removesuffix(".weight").format(layer) for layer in range(count)]
    if not pairs.keys() & set(modules):
      continue
    a_YIR, b_YRO = (
      np.zeros((count, inputs, most), np.float32),
      np.zeros((count, most, outputs), np.float32),
    )
    for layer, module in enumerate(modules):
      if module not in pairs:
        continue
      a_RI, b_OR = pairs[module]
      rank, rows = a_RI.shape[0], place.rows or outputs
      if a_RI.shape[1] != inputs or b_OR.shape != (rows, rank):
        raise UserError(
          f"{folder}: {module} has lora_A {a_RI.shape} and lora_B {b_OR.shape}, which do not fit "
          "the base's matrix of "
          f"{inputs} inputs and {rows} outputs."
        )
      a_YIR[layer, :, :rank] = a_RI.T
      b_YRO[layer, :rank] = b_OR[place.start : place.start + outputs].T * _peft_scale(
        config, module, rank
      )
      used.add(module)
    params[name] = {"a": a_YIR, "b": b_YRO}
  if left := sorted(pairs.keys() - used):
    raise UserError(
      f"{folder} adapts {left[0]}, which is none of the decoder's matrices {', '.join(TARGETS)}."
    )
  return Adapter(model, most, float(most), tuple(params)), params


def _refuse_other_peft(path: epath.Path, config) -> None:
  """Refuses what PEFT computes and a pair of matrices does not."""
  if config.get("peft_type") != "LORA":
    raise UserError(
      f"{path}: peft_type {json.dumps(config.get('peft_type'))} is not supported, only LORA is."
    )
  for key, plain in (
    ("bias", "none"),
    ("use_dora", False),
    ("lora_bias", False),
    ("fan_in_fan_out", False),
  ):
    if config.get(key, plain) not in (plain, None):
      raise UserError(
        f"{path}: {key} {json.dumps(config[key])} is not supported, only {json.dumps(plain)} is."
      )
  for key in (
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
  ):
    if config.get(key):
      raise UserError(
        f"{path}: {key} is not supported; have PEFT merge the adapter into its base and name that "
        "folder."
      )


def _peft_pairs(folder: epath.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Module -> (lora_A [r, in], lora_B [out, r]), float32."""
  halves = {}
  for tensor in stored_tensors.read_adapter(folder):
    name = tensor.name.removeprefix("base_model.model.")
    module, found, half = name.removesuffix(".weight").removesuffix(".default").rpartition(".lora_")
    if not found or half not in ("A", "B") or len(tensor.shape) != 2:
      raise UserError(
        f"{tensor.path}: the tensor {tensor.name} is neither lora_A nor lora_B of a matrix."
      )
    values = tensor.read(tuple(slice(0, size) for size in tensor.shape)).astype(np.float32)
    module = stored_tensors.usual_name(module) or module
    halves.setdefault(module, {})[half] = values
  for module, parts in halves.items():
    if len(parts) != 2:
      raise UserError(f"{folder}: {module} has lora_{next(iter(parts))} and not the other matrix.")
  return {module: (parts["A"], parts["B"]) for module, parts in halves.items()}


def _peft_scale(config, module: str, rank: int) -> float:
  """What a·b of a module counts; patterns name modules by the end of their names."""

  def fits(pattern):
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module)

  patterns = config.get("alpha_pattern") or {}
  alpha = next(
    (value for pattern, value in patterns.items() if fits(pattern)), config.get("lora_alpha", 8)
  )
  return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def save_peft(folder: epath.PathLike, chain, base_name: str) -> None:
  """Writes adapters in the format of PEFT, which `peft.PeftModel.from_pretrained` loads onto the
  base.

  Args:
    folder: made with its parents; files of the same names are replaced.
    chain: pairs (Adapter, its parameters). Several that were trained one upon the other become one
      adapter of the first one's base: their A and B stand side by side, and each matrix' rank is
      the sum.
    base_name: of the base, for adapter_config.json.

  Raises:
    UserError: the folder cannot be written.
  """
  places = hf_configs.tensor_places(chain[0][0].model.config)
  # module -> the pairs that adapt it, with the first of the rows that each adapts, and its rows
  modules = {}
  for name in TARGETS:
    # PEFT multiplies by alpha / rank, here 1: the scale stands in B.
    parts = [
      (params[name]["a"], params[name]["b"] * adapter.scale)
      for adapter, params in chain
      if name in params
    ]
    place = places[f"layers/{name}"]
    for a, b in parts:
      pairs = modules.setdefault(place.name.removesuffix(".weight"), [])
      pairs.append(
        (
          np.asarray(jax.device_get(a)),
          np.asarray(jax.device_get(b)),
          place.start,
          place.rows or b.shape[2],
        )
      )
  tensors, ranks = {}, {}
  for module, pairs in modules.items():
    rank, rows = sum(a.shape[2] for a, *_ in pairs), pairs[0][3]
    ranks[module.rpartition(".")[2]] = rank
    for layer in range(pairs[0][0].shape[0]):
      b_OR, first = np.zeros((rows, rank), np.float32), 0
      for _, b, start, _ in pairs:
        b_OR[start : start + b.shape[2], first : first + b.shape[1]] = b[layer].T
        first += b.shape[1]
      prefix = f"base_model.model.{module.format(layer)}"
      tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(
        np.concatenate([a[layer].T for a, *_ in pairs])
      )
      tensors[f"{prefix}.lora_B.weight"] = b_OR
  most = max(ranks.values())
  other = {module: rank for module, rank in ranks.items() if rank != most}
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_name,
    "r": most,
    "lora_alpha": most,
    "rank_pattern": other,
    "alpha_pattern": other,
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
