"""A policy as stages hand it on: a folder with config.json, the tokenizer, and weights (orbax params/ or safetensors).

Where an adapter was trained, params/ holds the adapter alone, and adapter.json says what it looks like and where its base
is; it is merged when the policy is loaded, so that whoever decodes with it sees plain weights.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile

import transformers
from etils import epath
from jax.sharding import Mesh

import synthneg_jax.tasks
from synthneg_jax.data.token_text import TokenText, stop_table
from synthneg_jax.decoding.decode import Stops
from synthneg_jax.models import huggingface
from synthneg_jax.models.adapter import Adapter
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import checkpoints, device_mesh, processes
from synthneg_jax.runtime.errors import UserError, writing

_ADAPTER = "adapter.json"
EMBEDDED = pathlib.Path(synthneg_jax.tasks.__file__).parent / "embedded"
# Base models that come with the package: of arithmetic, of jobs, and of stories at toy size.
BASES = {"embedded": EMBEDDED} | {name: EMBEDDED.parent / name for name in ("embedded_jobs", "embedded_stories")}


@dataclasses.dataclass
class Policy:
  """Weights with what reads and writes text for them.

  Attributes:
    model, params: the decoder; adapters are merged.
    fingerprint: of the weights, or of base and adapter.
    folder: where it was read.
    base: folder of the weights beneath all adapters.
    adapters: pairs (Adapter, its parameters) that were merged, the first one first.
    eos_ids: tokens that end a response, the tokenizer's EOS first.
  """

  model: Model
  params: object
  tokenizer: transformers.PreTrainedTokenizerFast
  token_text: TokenText
  fingerprint: str
  folder: epath.Path
  base: epath.Path
  eos_ids: tuple[int, ...]
  adapters: tuple = ()

  @classmethod
  def load(cls, path: epath.PathLike, config, mesh: Mesh) -> "Policy":
    """Reads a policy folder or a Hugging Face folder: config, tokenizer, endings, weights; then its adapter, if any.

    Args:
      path: the folder.
      config: the config's section `model`.
      mesh: where the weights go.

    Raises:
      UserError: no such folder, weights that are missing or of another shape, or a model that the mesh cannot split.
    """
    folder = epath.Path(path)
    if not folder.exists():
      hint = "; `synthneg get-smollm2` makes it" if "smollm2" in folder.name else ""
      raise UserError(f"The model folder {folder} does not exist{hint}.")
    if (folder / _ADAPTER).exists():
      return cls._load_adapted(folder, config, mesh)
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
      raise UserError(f"{folder} holds an adapter of PEFT; have PEFT merge it into its base and name that folder.")

    model = Model(
      huggingface.read_config(
        folder, dtype=config.dtype, param_dtype=config.param_dtype, scan_layers=config.scan_layers, remat=config.remat
      )
    )
    _check_rope_scaling(folder, model, config.max_length)
    tokenizer = load_tokenizer(folder)
    eos_ids = tuple(huggingface.eos_ids(folder, tokenizer.eos_token_id))
    layout = param_shardings(model, mesh)
    if (folder / "params").exists() or not list(folder.glob("*.safetensors*")):
      params = checkpoints.load_params(folder, model.abstract_params(), layout)
    else:
      params = huggingface.load_params(folder, model, layout)
    return cls(
      model=model,
      params=params,
      tokenizer=tokenizer,
      token_text=TokenText(tokenizer),
      fingerprint=checkpoints.fingerprint(params),
      folder=folder,
      base=folder,
      eos_ids=eos_ids,
    )

  @classmethod
  def _load_adapted(cls, folder: epath.Path, config, mesh: Mesh) -> "Policy":
    spec = json.loads((folder / _ADAPTER).read_text())
    base = folder
    if spec["base"].startswith(".."):  # in the same workdir, which may have been moved
      for part in spec["base"].split("/"):
        base = base.parent if part == ".." else base / part
    else:
      base = resolve(spec["base"])
    policy = cls.load(base, config, mesh)
    adapter = Adapter(policy.model, spec["rank"], spec["alpha"], tuple(spec["targets"]))
    params = checkpoints.load_params(folder, adapter.abstract_params(), param_shardings(adapter, mesh))
    return dataclasses.replace(
      policy,
      params=adapter.merge(policy.params, params),
      fingerprint=_joint_fingerprint(policy, params, adapter),
      folder=folder,
      adapters=(*policy.adapters, (adapter, params)),
    )

  def save(self, folder: epath.PathLike, params, adapter: Adapter | None = None) -> str:
    """Writes trained weights as a policy folder with this policy's architecture and tokenizer.

    Args:
      folder: made with its parents.
      params: all parameters, or those of `adapter`, whose base this policy is.
      adapter: None where all were trained.

    Returns:
      The fingerprint of the weights.
    """
    folder = epath.Path(folder)
    fingerprint = checkpoints.fingerprint(params)
    if adapter is not None:
      fingerprint = _joint_fingerprint(self, params, adapter)
    with writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
      checkpoints.save_params(folder, params)
      if processes.first():
        for name in ("config.json", "generation_config.json", *huggingface.tokenizer_files(self.folder)):
          if (self.folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).copy(folder / name, overwrite=True)
        if adapter is not None:
          (folder / _ADAPTER).write_text(json.dumps(_adapter_spec(folder, self, adapter)) + "\n")
        (folder / "fingerprint.json").write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
    processes.barrier()
    return fingerprint

  def stops(self, strings) -> Stops:
    """EOS and these stop strings."""
    table = stop_table(self.token_text, list(strings))[0] if strings else None
    return Stops(self.eos_ids, table, self.token_text.vocab_size)


def _check_rope_scaling(folder: epath.Path, model: Model, max_length: int) -> None:
  scaling = model.config.rope_scaling
  if scaling is not None and scaling.kind == "dynamic" and max_length > scaling.original_positions:
    raise UserError(
      f"{folder}: beyond {scaling.original_positions} tokens, dynamic rope scaling would change every key with the "
      f"length of the text, which is not supported; model.max_length={max_length} must not exceed that."
    )


def load_tokenizer(folder: epath.Path) -> transformers.PreTrainedTokenizerFast:
  """The tokenizer of a policy folder or Hugging Face folder.

  Raises:
    UserError: transformers can load no tokenizer from it.
  """
  try:
    return transformers.AutoTokenizer.from_pretrained(tokenizer_folder(folder), local_files_only=True)
  except (OSError, ValueError) as error:
    raise UserError(f"{folder} has no tokenizer that transformers can load: {str(error).splitlines()[0]}") from error


def resolve(path: str) -> epath.Path:
  """A config's model.path as a folder; one of `BASES` is a base model in the package."""
  return epath.Path(BASES.get(path, path)).expanduser()


def tokenizer_folder(folder: epath.Path) -> str:
  """A folder from which transformers can read a policy's tokenizer: its own, or a local copy of what lies in a bucket."""
  if "://" not in os.fspath(folder):
    return os.fspath(folder)
  copy = epath.Path(tempfile.mkdtemp(prefix="synthneg_jax_"))
  for name in ("config.json", *huggingface.tokenizer_files(folder)):
    if (folder / name).exists():
      (copy / name).parent.mkdir(exist_ok=True)
      (folder / name).copy(copy / name)
  return os.fspath(copy)


def files_identity(folder: epath.Path) -> str:
  """Tells one base model's files from another's: their names and sizes, and 16 samples of 64 KiB of each.

  Reading all of a large model only to open a stage would take too long; training changes nearly all of them.
  """
  digest = hashlib.sha256()
  for path in (
    sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")]) if folder.exists() else []
  ):
    size = path.stat().length
    digest.update(f"{path.name}={size};".encode())
    with path.open("rb") as file:
      for sample in range(16):
        file.seek(size * sample // 16)
        digest.update(file.read(1 << 16))
  return digest.hexdigest()[:16]


def param_shardings(model: Model | Adapter, mesh: Mesh):
  """Where a model's parameters, or an adapter's, lie.

  Raises:
    UserError: a dimension, or the heads, do not divide by the mesh.
  """
  axes = model.logical_axes()
  device_mesh.check_tree(model.abstract_params(), axes, mesh)
  if isinstance(model, Adapter):
    return device_mesh.shardings(mesh, axes)
  c = model.config
  device_mesh.check("attention", (c.num_heads,), ("heads",), mesh)
  device_mesh.check("cache", (c.num_kv_heads,), ("kv_heads",), mesh)
  return device_mesh.shardings(mesh, axes)


def _joint_fingerprint(base: Policy, params, adapter: Adapter) -> str:
  """Of base and adapter: their sum is rounded as the hardware likes, so its own bits would not do."""
  parts = f"{base.fingerprint}+{checkpoints.fingerprint(params)}*{adapter.scale!r}"
  return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _adapter_spec(folder: epath.Path, policy: Policy, adapter: Adapter) -> dict:
  base = os.fspath(policy.folder)
  if (policy.folder / "fingerprint.json").exists():  # of another stage of this workdir
    base = os.path.relpath(base, os.fspath(folder))
  elif policy.folder in map(epath.Path, BASES.values()):
    base = policy.folder.name
  elif "://" not in base:
    base = os.path.abspath(base)
  return {"base": base, "rank": adapter.rank, "alpha": adapter.alpha, "targets": list(adapter.targets)}
