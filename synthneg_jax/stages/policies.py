"""A policy as stages hand it on: a folder with config.json, the tokenizer, and weights (orbax params/ or safetensors)."""

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
from synthneg_jax.models import huggingface
from synthneg_jax.models.decoder import Model
from synthneg_jax.rollouts.decode import Stops
from synthneg_jax.runtime import checkpoints, processes
from synthneg_jax.runtime import mesh as mesh_lib
from synthneg_jax.runtime.errors import UserError, writing
from synthneg_jax.tasks.token_text import TokenText, stop_table

EMBEDDED = pathlib.Path(synthneg_jax.tasks.__file__).parent / "embedded"


@dataclasses.dataclass
class Policy:
  """Weights with what reads and writes text for them."""

  model: Model
  params: object
  tokenizer: transformers.PreTrainedTokenizerFast
  token_text: TokenText
  fingerprint: str
  folder: epath.Path

  def stops(self, strings) -> Stops:
    """EOS and these stop strings."""
    table = stop_table(self.token_text, list(strings))[0] if strings else None
    return Stops((self.tokenizer.eos_token_id,), table, self.token_text.vocab_size)


def resolve(path: str) -> epath.Path:
  """A config's model.path as a folder; "embedded" is the base model in the package."""
  return epath.Path(EMBEDDED if path == "embedded" else path).expanduser()


def tokenizer_folder(folder: epath.Path) -> str:
  """A folder from which transformers can read a policy's tokenizer: its own, or a local copy of what lies in a bucket."""
  if "://" not in os.fspath(folder):
    return os.fspath(folder)
  copy = epath.Path(tempfile.mkdtemp(prefix="synthneg_jax_"))
  for name in ("config.json", *huggingface.TOKENIZER_FILES):
    if (folder / name).exists():
      (folder / name).copy(copy / name)
  return os.fspath(copy)


def identity(folder: epath.Path) -> str:
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


def shardings(model: Model, mesh: Mesh):
  """Where a model's parameters lie.

  Raises:
    UserError: a dimension, or the heads, do not divide by the mesh.
  """
  c, axes = model.config, model.logical_axes()
  mesh_lib.check_tree(model.abstract_params(), axes, mesh)
  mesh_lib.check("attention", (c.num_heads,), ("heads",), mesh)
  mesh_lib.check("cache", (c.num_kv_heads,), ("kv_heads",), mesh)
  return mesh_lib.shardings(mesh, axes)


def load(path: epath.PathLike, config, mesh: Mesh) -> Policy:
  """Reads a policy folder, or a Hugging Face folder.

  Args:
    path: the folder.
    config: the config's section `model`.
    mesh: where the weights go.

  Raises:
    UserError: no such folder, weights that are missing or of another shape, or a model that the mesh cannot split.
  """
  folder = epath.Path(path)
  if not folder.exists():
    hint = "; bash launch/get_smollm2.sh makes it" if "smollm2" in folder.name else ""
    raise UserError(f"The model folder {folder} does not exist{hint}.")
  model = Model(
    huggingface.read_config(
      folder, dtype=config.dtype, param_dtype=config.param_dtype, scan_layers=config.scan_layers, remat=config.remat
    )
  )
  layout = shardings(model, mesh)
  if (folder / "params").exists() or not list(folder.glob("*.safetensors*")):
    params = checkpoints.load_params(folder, model.abstract_params(), layout)
  else:
    params = huggingface.load_params(folder, model, layout)
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder(folder))
  except (OSError, ValueError) as error:
    raise UserError(f"{folder} has no tokenizer that transformers can load: {str(error).splitlines()[0]}") from error
  return Policy(model, params, tokenizer, TokenText(tokenizer), checkpoints.fingerprint(params), folder)


def save(folder: epath.PathLike, policy: Policy, params) -> str:
  """Writes trained weights as a policy folder with the given policy's architecture and tokenizer.

  Returns:
    The fingerprint of the weights.
  """
  folder = epath.Path(folder)
  fingerprint = checkpoints.fingerprint(params)
  with writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.save_params(folder, params)
    if processes.first():
      for name in ("config.json", "generation_config.json", *huggingface.TOKENIZER_FILES):
        if (policy.folder / name).exists():
          (policy.folder / name).copy(folder / name, overwrite=True)
      (folder / "fingerprint.json").write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
  processes.barrier()
  return fingerprint
