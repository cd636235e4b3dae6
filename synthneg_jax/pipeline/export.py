"""Stage export: writes trained policies as Hugging Face folders, and adapters in PEFT's format."""

import json
import os
import tempfile

import jax
from absl import logging
from etils import epath

from synthneg_jax.decoding.policy import tokenizer_folder
from synthneg_jax.models import adapter as adapter_lib
from synthneg_jax.models import huggingface, model_hub
from synthneg_jax.pipeline import evaluate
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import device_mesh, distributed
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.runtime.manifest import write_json


def run(experiment: Experiment) -> dict:
  """Writes export/<method>/policy/ for every trained policy of evaluate.methods, adapters merged.

  A trained adapter is also written to export/<method>/adapter/ in PEFT's format, for the base model
  of the run. With export.push_to_hub, each policy is then uploaded once.

  Raises:
    UserError: a policy cannot be read, written or uploaded.
  """
  repo = experiment.config.export.push_to_hub
  if repo and (repo.startswith("hf:") or "@" in repo or not model_hub.is_name(repo)):
    raise UserError(f"export.push_to_hub={repo!r} is not a repository name like ORG/NAME.")
  trained = {}
  for method in experiment.config.evaluate.methods:
    stage_name = evaluate.POLICY_OF.get(method)
    if stage_name and (experiment.workdir / stage_name / "manifest.json").exists():
      trained[method] = stage_name
  if not trained:
    raise UserError(
      f"{experiment.workdir} has no trained policy of evaluate.methods="
      f"{tuple(experiment.config.evaluate.methods)!r} to export."
    )
  exported = {}
  for method, stage_name in trained.items():
    stage = experiment.stage(f"export/{method}", ["model", "export"], [stage_name])
    if not stage.done:
      _write(experiment, stage_name, stage.folder)
      folder = stage.folder / "policy"
      exported[method] = stage.finish({"folder": str(folder)}, list(folder.glob("*.safetensors")))
    if repo and distributed.is_primary():
      _push(stage.folder, repo if len(trained) == 1 else f"{repo}-{method}")
    distributed.barrier()
  return exported


def _write(experiment: Experiment, stage_name: str, folder: epath.Path) -> None:
  """Writes a stage's policy to folder/policy and its adapter, if any, to folder/adapter."""
  policy = experiment.policy(stage_name)
  params = (
    jax.tree.map(device_mesh.whole, policy.params) if distributed.count() > 1 else policy.params
  )
  if not distributed.is_primary():
    return
  if (folder / "policy").exists():  # left by a run that was killed before writing its manifest
    (folder / "policy").rmtree()
  with tempfile.TemporaryDirectory() as local:  # Hugging Face folders are written to a local disk
    in_bucket = "://" in os.fspath(folder)
    target = epath.Path(local) if in_bucket else folder
    huggingface.save(
      target / "policy",
      policy.model,
      params,
      tokenizer_folder=tokenizer_folder(policy.about),
      eos_ids=policy.eos_ids,
      max_shard_bytes=experiment.config.export.max_shard_bytes,
    )
    if policy.adapters:
      adapter_lib.save_peft(target / "adapter", policy.adapters, _base_name(policy.base))
    if in_bucket:
      _copy(target, folder)


def _copy(source: epath.Path, target: epath.Path) -> None:
  """Copies the contents of a folder into another."""
  target.mkdir(parents=True, exist_ok=True)
  for path in source.iterdir():
    if path.is_dir():
      _copy(path, target / path.name)
    else:
      path.copy(target / path.name, overwrite=True)


def _base_name(folder: epath.Path) -> str:
  """The base model's name in adapter_config.json: its name on the Hub, else its folder."""
  name = model_hub.name_of(folder)
  return name.removeprefix("hf:").partition("@")[0] if name else os.fspath(folder)


def _push(folder: epath.Path, repo: str) -> None:
  """Uploads an exported policy unless pushed.json records an earlier upload to this repository."""
  record = folder / "pushed.json"
  if record.exists() and json.loads(record.read_text())["repo"] == repo:
    return
  with tempfile.TemporaryDirectory() as local:
    source = folder / "policy"
    if "://" in os.fspath(folder):
      _copy(source, epath.Path(local))
      source = epath.Path(local)
    commit = model_hub.push(source, repo)
  write_json(record, {"repo": repo, "commit": commit})
  logging.info("export: uploaded %s to %s, commit %s.", folder / "policy", repo, commit)
