"""Policies on disk: config.json, tokenizer files, and weights (orbax params/ or safetensors).

If an adapter was trained, params/ contains only the adapter, and adapter.json describes it and
names its base. Loading merges it into the base.
"""

import base64
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile

import jax
import transformers
from etils import epath
from jax.sharding import Mesh

import synthneg_jax.tasks
from synthneg_jax.data.token_text import TokenText, stop_table
from synthneg_jax.decoding.decode import Stops
from synthneg_jax.models import adapter as adapter_lib
from synthneg_jax.models import hf_tokenizers, huggingface, model_hub, stored_tensors
from synthneg_jax.models.adapter import Adapter
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import checkpoints, device_mesh, distributed
from synthneg_jax.runtime.errors import UserError, writing

_ADAPTER = "adapter.json"
_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_MESSAGE_BYTES = 4_000_000  # of a file, in one message between processes
EMBEDDED = pathlib.Path(synthneg_jax.tasks.__file__).parent / "embedded"
# Toy base models shipped with the package: for arithmetic, jobs and stories.
BASES = {"embedded": EMBEDDED} | {
  name: EMBEDDED.parent / name for name in ("embedded_jobs", "embedded_stories")
}


@dataclasses.dataclass
class Policy:
  """A model's weights with its tokenizer.

  Attributes:
    model, params: the decoder, with adapters merged.
    tokenizer, token_text: the tokenizer, and the bytes of its tokens.
    fingerprint: of the weights, or of base and adapter.
    folder: the folder it was loaded from.
    about: folder of its config.json, generation_config.json and tokenizer.
    base: folder of the base weights, without adapters.
    eos_ids: all tokens that end a response, from the tokenizer, generation_config.json and
      config.json; the tokenizer's EOS first. The only source of end tokens.
    adapters: pairs (Adapter, its parameters) in the order they were merged.
  """

  model: Model
  params: object
  tokenizer: transformers.PreTrainedTokenizerFast
  token_text: TokenText
  fingerprint: str
  folder: epath.Path
  about: epath.Path
  base: epath.Path
  eos_ids: tuple[int, ...]
  adapters: tuple = ()

  @classmethod
  def load(cls, path: epath.PathLike, config, mesh: Mesh) -> "Policy":
    """Loads a policy folder, a Hugging Face folder, or a PEFT adapter with its base.

    All processes call it; each reads the parts for its own devices. If a process does not have the
    folder, process 0 reads it and sends it to the others.

    Args:
      path: the folder.
      config: the config's section `model`.
      mesh: of the devices that receive the weights.

    Raises:
      UserError: the folder does not exist, weights are missing or of another shape, the tokenizer
        does not match the model, the mesh cannot split the model, or a process cannot see orbax
        weights.
    """
    folder = epath.Path(path)
    has_folder = distributed.gather(folder.exists())
    if not has_folder[0]:
      hint = "; create it with `synthneg get-smollm2`" if "smollm2" in folder.name else ""
      raise UserError(f"The model folder {folder} does not exist{hint}.")
    kind = distributed.broadcast(_kind(folder) if distributed.is_primary() else None)
    is_sent = not all(has_folder)
    if is_sent and kind in ("adapted", "params"):
      raise UserError(
        f"The policy folder {folder} does not exist in process {has_folder.index(False)}; every "
        "process must be able to read its params."
      )
    if is_sent:
      folder = _received_folder(folder)
    if kind == "adapted":
      return cls._load_adapted(folder, config, mesh)
    if kind == "peft":
      return cls._load_peft(folder, config, mesh)

    described = huggingface.read_config(
      folder,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
      scan_layers=config.scan_layers,
      remat=config.remat,
      max_length=config.max_length,
    )
    if kind == "tensors":
      is_tied = None
      if distributed.is_primary():
        is_tied = huggingface.untie_differing_head(folder, described).tie_embeddings
      described = dataclasses.replace(described, tie_embeddings=distributed.broadcast(is_tied))
    model = Model(described)
    _check_rope_scaling(folder, model, config.max_length)
    tokenizer, eos_ids = _tokenizer_and_eos(folder, model.config.vocab_size)
    layout = param_shardings(model, mesh)
    if kind == "params":
      params = checkpoints.load_params(folder, model.abstract_params(), layout)
    else:
      params = huggingface.load_params(folder, model, layout, is_sent=is_sent)
    return cls(
      model=model,
      params=params,
      tokenizer=tokenizer,
      token_text=TokenText(tokenizer, eos_ids),
      fingerprint=checkpoints.fingerprint(params),
      folder=folder,
      about=folder,
      base=folder,
      eos_ids=eos_ids,
    )

  @classmethod
  def _load_peft(cls, folder: epath.Path, config, mesh: Mesh) -> "Policy":
    """Loads a PEFT adapter and its base; the adapter's tokenizer, if any, takes precedence."""
    base = distributed.broadcast(os.fspath(_peft_base(folder)) if distributed.is_primary() else "")
    policy = cls.load(base, config, mesh)
    adapter, params = adapter_lib.load_peft(folder, policy.model)
    params = jax.device_put(params, param_shardings(adapter, mesh))
    about, tokenizer, eos_ids = policy.about, policy.tokenizer, policy.eos_ids
    if (folder / "tokenizer.json").exists():
      about = _overlaid(policy.about, folder)
      tokenizer, eos_ids = _tokenizer_and_eos(about, policy.model.config.vocab_size)
    return dataclasses.replace(
      policy,
      params=adapter.merge(policy.params, params),
      tokenizer=tokenizer,
      token_text=TokenText(tokenizer, eos_ids),
      fingerprint=_joint_fingerprint(policy, params, adapter),
      folder=folder,
      about=about,
      eos_ids=eos_ids,
      adapters=(*policy.adapters, (adapter, params)),
    )

  @classmethod
  def _load_adapted(cls, folder: epath.Path, config, mesh: Mesh) -> "Policy":
    spec = json.loads((folder / _ADAPTER).read_text())
    base = folder
    if spec["base"].startswith(".."):  # relative, so that the workdir can be moved
      for part in spec["base"].split("/"):
        base = base.parent if part == ".." else base / part
    else:
      base = resolve_for_all(spec["base"])
    policy = cls.load(base, config, mesh)
    adapter = Adapter(policy.model, spec["rank"], spec["alpha"], tuple(spec["targets"]))
    params = checkpoints.load_params(
      folder, adapter.abstract_params(), param_shardings(adapter, mesh)
    )
    return dataclasses.replace(
      policy,
      params=adapter.merge(policy.params, params),
      fingerprint=_joint_fingerprint(policy, params, adapter),
      folder=folder,
      about=folder if (folder / "config.json").exists() else policy.about,
      adapters=(*policy.adapters, (adapter, params)),
    )

  def save(self, folder: epath.PathLike, params, adapter: Adapter | None = None) -> str:
    """Writes trained weights as a policy folder with this policy's architecture and tokenizer.

    Args:
      folder: created with its parents.
      params: all parameters, or those of `adapter`, whose base is this policy.
      adapter: None if all parameters were trained.

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
      if distributed.is_primary():
        _copy_about(self.about, folder)
        huggingface.write_tie_embeddings(folder, self.model.config.tie_embeddings)
        if adapter is not None:
          (folder / _ADAPTER).write_text(json.dumps(_adapter_spec(folder, self, adapter)) + "\n")
        (folder / "fingerprint.json").write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
    distributed.barrier()
    return fingerprint

  def stops(self, strings) -> Stops:
    """`Stops` of this policy's EOS ids and these stop strings."""
    table = stop_table(self.token_text, list(strings))[0] if strings else None
    return Stops(self.eos_ids, table, self.token_text.vocab_size)


def _check_rope_scaling(folder: epath.Path, model: Model, max_length: int) -> None:
  scaling = model.config.rope_scaling
  if scaling is not None and scaling.kind == "dynamic" and max_length > scaling.original_positions:
    raise UserError(
      f"{folder}: dynamic rope scaling is supported up to {scaling.original_positions} tokens only "
      "(beyond, every key depends on the length of the text); "
      f"model.max_length={max_length} must not exceed that."
    )


def _tokenizer_and_eos(
  folder: epath.Path, num_rows: int
) -> tuple[transformers.PreTrainedTokenizerFast, tuple[int, ...]]:
  """A folder's tokenizer, checked against the number of embedding rows, and all EOS ids."""
  tokenizer = _load_tokenizer(folder)
  hf_tokenizers.check(folder, tokenizer, num_rows)
  return tokenizer, hf_tokenizers.ids_below(
    hf_tokenizers.eos_ids(folder, tokenizer.eos_token_id), num_rows, folder
  )


def _peft_base(folder: epath.Path) -> epath.Path:
  """The folder of a PEFT adapter's base model.

  Raises:
    UserError: the adapter names no base, or one that does not exist.
  """
  path = folder / "adapter_config.json"
  raw = stored_tensors.read_json(path)
  name = raw.get("base_model_name_or_path")
  if not name:
    raise UserError(
      f"{path}: base_model_name_or_path is empty; set it to the folder of the adapter's base model."
    )
  is_hub = model_hub.is_name(name) and "@" not in name and not epath.Path(name).exists()
  try:
    base = resolve(f"{name}@{raw['revision']}" if is_hub and raw.get("revision") else name)
  except UserError as error:
    raise UserError(f"{path}: base_model_name_or_path={name!r}: {error}") from error
  if os.path.realpath(base) == os.path.realpath(folder):
    raise UserError(
      f"{path}: base_model_name_or_path={name!r} is the adapter's own folder; keep the base model "
      "in another one."
    )
  if not base.exists():
    raise UserError(
      f"{path}: base_model_name_or_path={name!r} does not exist; set it to the base model's folder."
    )
  return base


def _overlaid(base: epath.Path, adapter: epath.Path) -> epath.Path:
  """A local copy of a base model's configs, overlaid with its adapter's configs and tokenizer."""
  folder = epath.Path(tempfile.mkdtemp(prefix="synthneg_jax_"))
  for name in hf_tokenizers.CONFIG_FILES:
    if (base / name).exists():
      (base / name).copy(folder / name)
  _copy_about(adapter, folder)
  return folder


def _copy_about(source: epath.Path, folder: epath.Path) -> None:
  """Copies a folder's config and tokenizer files."""
  for name in (*hf_tokenizers.CONFIG_FILES, *hf_tokenizers.files(source)):
    if (source / name).exists():
      (folder / name).parent.mkdir(exist_ok=True)
      (source / name).copy(folder / name, overwrite=True)


def _load_tokenizer(folder: epath.Path) -> transformers.PreTrainedTokenizerFast:
  """The tokenizer of a policy folder or Hugging Face folder; errors as in `hf_tokenizers.load`."""
  return hf_tokenizers.load(tokenizer_folder(folder))


def load_token_text(folder: epath.Path) -> tuple[transformers.PreTrainedTokenizerFast, TokenText]:
  """A folder's tokenizer and the bytes of its tokens (none for EOS ids), without its weights."""
  tokenizer = _load_tokenizer(folder)
  return tokenizer, TokenText(tokenizer, hf_tokenizers.eos_ids(folder, tokenizer.eos_token_id))


def resolve(path: str, *, weights: bool = True) -> epath.Path:
  """The folder of a config's model.path: one of `BASES`, a folder, or a model from the Hub.

  Args:
    path: the value of model.path.
    weights: whether to download weights from the Hub, or only configs and tokenizer.

  Raises:
    UserError: the download fails.
  """
  folder = epath.Path(BASES.get(path, path)).expanduser()
  if folder.exists() or not (path.startswith("hf:") or model_hub.is_name(path)):
    return folder
  try:
    return model_hub.download(path, weights=weights)
  except UserError as error:
    if path.startswith("hf:"):
      raise
    raise UserError(f"There is no folder {path}, and no such model was found: {error}") from error


def resolve_for_all(path: str) -> epath.Path:
  """`resolve` in process 0, broadcast to all; the folder need not exist in other processes."""
  return epath.Path(
    distributed.broadcast(os.fspath(resolve(path)) if distributed.is_primary() else "")
  )


def _kind(folder: epath.Path) -> str:
  """The kind of a folder.

  "params" (orbax), "tensors" (Hugging Face), "adapted" (our adapter), or "peft" (PEFT's).
  """
  if (folder / _ADAPTER).exists():
    return "adapted"
  if _is_peft(folder):
    return "peft"
  if stored_tensors.has_weights(folder) and not (folder / "params").exists():
    return "tensors"
  return "params"


def _is_peft(folder: epath.Path) -> bool:
  """Whether a folder holds an adapter; as in transformers, a model beside it does not count."""
  if not (folder / "adapter_config.json").exists():
    return False
  names = ("adapter_model.safetensors", "adapter_model.bin")
  is_model = (folder / "config.json").exists()
  return not is_model or any((folder / name).exists() for name in names)


def _received_folder(folder: epath.Path) -> epath.Path:
  """Sends configs, tokenizer and PEFT adapter from process 0; all processes call it.

  Returns `folder` in process 0, a local copy in the others.
  """
  names = [*hf_tokenizers.CONFIG_FILES, *_PEFT_FILES, *hf_tokenizers.files(folder)]
  names = distributed.broadcast([name for name in names if (folder / name).exists()])
  copy = (
    folder if distributed.is_primary() else epath.Path(tempfile.mkdtemp(prefix="synthneg_jax_"))
  )
  for name in names:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    with (copy / name).open("rb" if distributed.is_primary() else "wb") as file:
      while message := distributed.broadcast(
        base64.b64encode(file.read(_MESSAGE_BYTES)).decode() if distributed.is_primary() else None
      ):
        if not distributed.is_primary():
          file.write(base64.b64decode(message))
  return copy


def tokenizer_folder(folder: epath.Path) -> str:
  """A local folder with a policy's tokenizer: its own, or a copy of one in a bucket."""
  if "://" not in os.fspath(folder):
    return os.fspath(folder)
  copy = epath.Path(tempfile.mkdtemp(prefix="synthneg_jax_"))
  _copy_about(folder, copy)
  return os.fspath(copy)


def files_identity(folder: epath.Path) -> str:
  """A hash of a base model's files: names, sizes, and 16 samples of 64 KiB of each file.

  Hashing a whole large model would take too long, and training changes nearly all samples.
  """
  digest = hashlib.sha256()
  if _is_peft(folder):
    digest.update(files_identity(_peft_base(folder)).encode())
  paths = []
  if folder.exists():
    for kind in ("safetensors", "bin", "json", "jinja"):
      paths += folder.glob(f"*.{kind}")
  for path in sorted(paths):
    size = path.stat().length
    digest.update(f"{path.name}={size};".encode())
    with path.open("rb") as file:
      for sample in range(16):
        file.seek(size * sample // 16)
        digest.update(file.read(1 << 16))
  return digest.hexdigest()[:16]


def param_shardings(model: Model | Adapter, mesh: Mesh):
  """Shardings of the parameters of a model or an adapter.

  Raises:
    UserError: a dimension or the number of heads is not divisible by its mesh axes.
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
  """Hashes base and adapter separately: the rounding of merged weights depends on the hardware."""
  parts = f"{base.fingerprint}+{checkpoints.fingerprint(params)}*{adapter.scale!r}"
  return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _adapter_spec(folder: epath.Path, policy: Policy, adapter: Adapter) -> dict:
  base = os.fspath(policy.folder)
  if (policy.folder / "fingerprint.json").exists():  # from another stage of this workdir
    base = os.path.relpath(base, os.fspath(folder))
  elif policy.folder in map(epath.Path, BASES.values()):
    base = policy.folder.name
  elif "://" not in base:
    base = model_hub.name_of(base) or os.path.abspath(base)
  return {
    "base": base,
    "rank": adapter.rank,
    "alpha": adapter.alpha,
    "targets": list(adapter.targets),
  }
