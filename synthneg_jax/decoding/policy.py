"""A policy as stages hand it on: a folder with config.json, the tokenizer, and weights (orbax
params/ or safetensors).

Where an adapter was trained, params/ holds the adapter alone, and adapter.json says what it looks
like and where its base is; it is merged when the policy is loaded, so that whoever decodes with it
sees plain weights.
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

_ADAPTER, _PEFT = (
  "adapter.json",
  ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
)
_PIECE = 4_000_000  # bytes of a file that one message between processes holds
EMBEDDED = pathlib.Path(synthneg_jax.tasks.__file__).parent / "embedded"
# Base models that come with the package: of arithmetic, of jobs, and of stories at toy size.
BASES = {"embedded": EMBEDDED} | {
  name: EMBEDDED.parent / name for name in ("embedded_jobs", "embedded_stories")
}


@dataclasses.dataclass
class Policy:
  """Weights with what reads and writes text for them.

  Attributes:
    model, params: the decoder; adapters are merged.
    fingerprint: of the weights, or of base and adapter.
    folder: where it was read.
    about: folder of its config.json, generation_config.json and tokenizer.
    base: folder of the weights beneath all adapters.
    adapters: pairs (Adapter, its parameters) that were merged, the first one first.
    eos_ids: all tokens that end a response, by the tokenizer, generation_config.json and
      config.json; the tokenizer's EOS first. Whatever handles endings takes them from here.
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
    """Reads a policy folder or a Hugging Face folder: config, tokenizer, endings, weights; then its
    adapter, if any.

    Of several processes, which all call it, each reads its own devices' parts; where one does not
    have the folder, process 0 reads it and sends the others what they need.

    Args:
      path: the folder; one of PEFT, with an adapter, names its base itself.
      config: the config's section `model`.
      mesh: where the weights go.

    Raises:
      UserError: no such folder, weights that are missing or of another shape, a tokenizer that does
        not belong to the model, a model that the mesh cannot split, or orbax weights that a process
        cannot see.
    """
    folder = epath.Path(path)
    has_folder = distributed.gather(folder.exists())
    if not has_folder[0]:
      hint = "; `synthneg get-smollm2` makes it" if "smollm2" in folder.name else ""
      raise UserError(f"The model folder {folder} does not exist{hint}.")
    kind, is_sent = (
      distributed.agree(_kind(folder) if distributed.first() else None),
      not all(has_folder),
    )
    if is_sent and kind in ("adapted", "params"):
      raise UserError(
        f"The policy folder {folder} does not exist in process {has_folder.index(False)}; all "
        "processes read its params."
      )
    if is_sent:
      folder = _received(folder)
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
      is_tied = (
        huggingface.untie_other_head(folder, described).tie_embeddings
        if distributed.first()
        else None
      )
      described = dataclasses.replace(described, tie_embeddings=distributed.agree(is_tied))
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
    """A base model with an adapter of PEFT, whose tokenizer is taken where it brings one."""
    policy = cls.load(
      distributed.agree(os.fspath(peft_base(folder)) if distributed.first() else ""), config, mesh
    )
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
    if spec["base"].startswith(".."):  # in the same workdir, which may have been moved
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
      if distributed.first():
        _copy_about(self.about, folder)
        huggingface.set_tie(folder, self.model.config.tie_embeddings)
        if adapter is not None:
          (folder / _ADAPTER).write_text(json.dumps(_adapter_spec(folder, self, adapter)) + "\n")
        (folder / "fingerprint.json").write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
    distributed.barrier()
    return fingerprint

  def stops(self, strings) -> Stops:
    """EOS and these stop strings."""
    table = stop_table(self.token_text, list(strings))[0] if strings else None
    return Stops(self.eos_ids, table, self.token_text.vocab_size)


def _check_rope_scaling(folder: epath.Path, model: Model, max_length: int) -> None:
  scaling = model.config.rope_scaling
  if scaling is not None and scaling.kind == "dynamic" and max_length > scaling.original_positions:
    raise UserError(
      f"{folder}: beyond {scaling.original_positions} tokens, dynamic rope scaling would change "
      "every key with the length of the text, which is not supported; "
      f"model.max_length={max_length} must not exceed "
      "that."
    )


def _tokenizer_and_eos(
  folder: epath.Path, num_rows: int
) -> tuple[transformers.PreTrainedTokenizerFast, tuple[int, ...]]:
  """A folder's tokenizer, checked against the number of embedding rows, and all end-of-turn ids."""
  tokenizer = load_tokenizer(folder)
  hf_tokenizers.check(folder, tokenizer, num_rows)
  return tokenizer, hf_tokenizers.below(
    hf_tokenizers.eos_ids(folder, tokenizer.eos_token_id), num_rows, folder
  )


def peft_base(folder: epath.Path) -> epath.Path:
  """The folder of the base model that an adapter of PEFT names.

  Raises:
    UserError: it names none, or one that is not there.
  """
  path = folder / "adapter_config.json"
  raw = stored_tensors.read_json(path)
  name = raw.get("base_model_name_or_path")
  if not name:
    raise UserError(
      f"{path}: base_model_name_or_path is empty; name the folder of the adapter's "
      "base model there."
    )
  is_hub = model_hub.is_name(name) and "@" not in name and not epath.Path(name).exists()
  try:
    base = resolve(f"{name}@{raw['revision']}" if is_hub and raw.get("revision") else name)
  except UserError as error:
    raise UserError(f"{path}: base_model_name_or_path={name!r}: {error}") from error
  if not base.exists():
    raise UserError(
      f"{path}: base_model_name_or_path={name!r} does not exist; name the folder of the base model "
      "there."
    )
  return base


def _overlaid(base: epath.Path, adapter: epath.Path) -> epath.Path:
  """A local folder with the configs of a base model and the tokenizer of its adapter."""
  folder = epath.Path(tempfile.mkdtemp(prefix="synthneg_jax_"))
  for name in hf_tokenizers.CONFIG_FILES:
    if (base / name).exists():
      (base / name).copy(folder / name)
  _copy_about(adapter, folder)
  return folder


def _copy_about(source: epath.Path, folder: epath.Path) -> None:
  """Copies a folder's configs and its tokenizer's files."""
  for name in (*hf_tokenizers.CONFIG_FILES, *hf_tokenizers.files(source)):
    if (source / name).exists():
      (folder / name).parent.mkdir(exist_ok=True)
      (source / name).copy(folder / name, overwrite=True)


def load_tokenizer(folder: epath.Path) -> transformers.PreTrainedTokenizerFast:
  """The tokenizer of a policy folder or Hugging Face folder; errors as in `hf_tokenizers.load`."""
  return hf_tokenizers.load(tokenizer_folder(folder))


def load_token_text(folder: epath.Path) -> tuple[transformers.PreTrainedTokenizerFast, TokenText]:
  """A folder's tokenizer and the bytes of its tokens, of which those that end a response have none;
  no weights are read.
  """
  tokenizer = load_tokenizer(folder)
  return tokenizer, TokenText(tokenizer, hf_tokenizers.eos_ids(folder, tokenizer.eos_token_id))


def resolve(path: str, *, weights: bool = True) -> epath.Path:
  """A config's model.path as a folder: one of `BASES`, a folder that exists, or a model of the Hub,
  which is fetched.

  Args:
    path: as in the config.
    weights: of a model of the Hub fetch the weights, too, and not the configs and the tokenizer
      alone.

  Raises:
    UserError: a model of the Hub cannot be fetched.
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
  """`resolve` by process 0, for all processes, which call it; the folder need not exist in the
  others.
  """
  return epath.Path(distributed.agree(os.fspath(resolve(path)) if distributed.first() else ""))


def _kind(folder: epath.Path) -> str:
  """What is loaded from a folder: orbax "params", a Hugging Face model's "tensors", or an adapter,
  "peft" or "adapted".
  """
  if (folder / _ADAPTER).exists():
    return "adapted"
  if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
    return "peft"
  return (
    "tensors"
    if stored_tensors.has_weights(folder) and not (folder / "params").exists()
    else "params"
  )


def _received(folder: epath.Path) -> epath.Path:
  """Process 0's folder; in other processes a local one with its configs, tokenizer and PEFT
  adapter. All call it.
  """
  names = [*hf_tokenizers.CONFIG_FILES, *_PEFT, *hf_tokenizers.files(folder)]
  names = distributed.agree([name for name in names if (folder / name).exists()])
  copy = folder if distributed.first() else epath.Path(tempfile.mkdtemp(prefix="synthneg_jax_"))
  for name in names:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    with (copy / name).open("rb" if distributed.first() else "wb") as file:
      while piece := distributed.agree(
        base64.b64encode(file.read(_PIECE)).decode() if distributed.first() else None
      ):
        if not distributed.first():
          file.write(base64.b64decode(piece))
  return copy


def tokenizer_folder(folder: epath.Path) -> str:
  """A folder from which transformers can read a policy's tokenizer: its own, or a local copy of
  what lies in a bucket.
  """
  if "://" not in os.fspath(folder):
    return os.fspath(folder)
  copy = epath.Path(tempfile.mkdtemp(prefix="synthneg_jax_"))
  _copy_about(folder, copy)
  return os.fspath(copy)


def files_identity(folder: epath.Path) -> str:
  """Tells one base model's files from another's: their names and sizes, and 16 samples of 64 KiB of
  each.

  Reading all of a large model only to open a stage would take too long; training changes nearly all
  of them.
  """
  digest = hashlib.sha256()
  if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
    digest.update(files_identity(peft_base(folder)).encode())
  for path in (
    sorted(
      path for kind in ("safetensors", "bin", "json", "jinja") for path in folder.glob(f"*.{kind}")
    )
    if folder.exists()
    else []
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
  """Hashes base and adapter, not their sum, whose rounding depends on the hardware."""
  parts = f"{base.fingerprint}+{checkpoints.fingerprint(params)}*{adapter.scale!r}"
  return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _adapter_spec(folder: epath.Path, policy: Policy, adapter: Adapter) -> dict:
  base = os.fspath(policy.folder)
  if (policy.folder / "fingerprint.json").exists():  # of another stage of this workdir
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
