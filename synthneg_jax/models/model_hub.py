"""Models of the Hugging Face Hub as folders, and folders as models of the Hub.

A model is named `ORG/NAME[@REVISION]` or `hf:ORG/NAME[@REVISION]`. Files go through
huggingface_hub: its cache, and its variables HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE. Of
a repository only the files that a policy is read from are fetched.
"""

import contextlib
import fnmatch
import functools
import itertools
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

from absl import logging
from etils import epath

from synthneg_jax.runtime import hub_errors
from synthneg_jax.runtime.errors import UserError

_NAME = re.compile(r"(?:hf:)?(?P<repo>\w[\w.-]*/[\w.-]+)(?:@(?P<revision>[^@:]+))?")
_SNAPSHOT = re.compile(r"models--(?P<repo>.+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})")
_CONFIGS = ("config.json", "adapter_config.json")
_ABOUT = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "tokenizer.model", "merges.txt")
_WEIGHTS = (  # the first of these forms that a repository has is taken
  ("model.safetensors", "model-*.safetensors"),
  ("adapter_model.safetensors",),
  ("pytorch_model.bin", "pytorch_model-*.bin"),
  ("adapter_model.bin",),
  ("*.safetensors",),
)


def is_name(path: str) -> bool:
  """Whether a path has the form of a model's name on the Hub."""
  return bool(_NAME.fullmatch(path))


def download(path: str, *, weights: bool = True) -> epath.Path:
  """The folder, in huggingface_hub's cache, of a model on the Hub; fetched unless it is there.

  Args:
    path: its name.
    weights: fetch them, too, and not the configs and the tokenizer alone.

  Raises:
    UserError: the name has another form; no such model or revision, no access, or no network; names
      the model.
  """
  found = _NAME.fullmatch(path)
  if not found:
    raise UserError(f"{path} is no model on the Hub; the form is hf:ORG/NAME[@REVISION].")
  return _download(found["repo"], found["revision"] or "", os.environ.get("HF_ENDPOINT"), weights)


def name_of(folder: epath.PathLike) -> str | None:
  """The name and commit of the model whose folder in the cache this is; else None."""
  found = _SNAPSHOT.search(os.path.abspath(os.fspath(folder)))
  return f"hf:{found['repo'].replace('--', '/', 1)}@{found['commit']}" if found else None


def push(folder: epath.PathLike, repo: str) -> str:
  """Uploads a folder as a model to the Hub; returns its commit.

  A repository that does not exist is made, private.

  Raises:
    UserError: no network, or HF_TOKEN may not write there; names the model.
  """
  import huggingface_hub

  api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
  with hub_errors.as_user_error("model", repo), _bars_on_a_terminal():
    api.create_repo(repo, private=True, exist_ok=True)
    message = "Upload of a policy"
    about = api.upload_folder(repo_id=repo, folder_path=os.fspath(folder), commit_message=message)
    return about.oid


@functools.cache
def _download(repo: str, revision: str, endpoint: str | None, weights: bool) -> epath.Path:
  import huggingface_hub
  from huggingface_hub import errors

  with hub_errors.as_user_error("model", repo), _bars_on_a_terminal():
    api = huggingface_hub.HfApi(endpoint=endpoint)
    try:
      info = api.model_info(repo, revision=revision or None, files_metadata=True)
    except (errors.HfHubHTTPError, errors.HFValidationError):
      raise  # the Hub was reached, or need not be
    except Exception as error:  # no network, or HF_HUB_OFFLINE
      reason = type(error).__name__
      logging.info("The Hub cannot be reached (%s); the cache is asked for %s.", reason, repo)
      folder = huggingface_hub.snapshot_download(
        repo, revision=revision or None, local_files_only=True, allow_patterns=list(_CONFIGS)
      )
    else:
      wanted = _wanted([file.rfilename for file in info.siblings], weights)
      size = sum(file.size or 0 for file in info.siblings if file.rfilename in wanted)
      logging.info(
        "The model %s on the Hub: commit %s, %.1f MB in %d files.",
        repo,
        info.sha,
        size / 1e6,
        len(wanted),
      )
      if not set(_CONFIGS) & set(wanted):
        raise UserError(f"The model {repo} on the Hub has neither {' nor '.join(_CONFIGS)}.")
      # The first is asked for by branch, so that the cache knows its commit.
      revisions = itertools.chain([revision or "main"], itertools.repeat(info.sha))
      asked = zip(wanted, revisions, strict=False)
      paths = [api.hf_hub_download(repo, name, revision=at) for name, at in asked]
      config = next(path for path in paths if pathlib.Path(path).name in _CONFIGS)
      folder = pathlib.Path(config).parent
  return epath.Path(folder)


def _wanted(names: Sequence[str], with_weights: bool) -> list[str]:
  """Those of a repository's files that a policy is read from."""

  def fits(name, pattern):
    return fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/")

  def matching(patterns):
    return [name for name in names if any(fits(name, pattern) for pattern in patterns)]

  is_adapter = "adapter_config.json" in names  # policy.py reads it even beside a model
  forms = sorted(_WEIGHTS, key=lambda patterns: is_adapter and "adapter" not in patterns[0])
  weights = next((found for patterns in forms if (found := matching(patterns))), [])
  return matching(_ABOUT) + (weights if with_weights else [])


@contextlib.contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
  """Draws huggingface_hub's bars of progress on a terminal only; logs have a line instead."""
  from huggingface_hub import utils

  if sys.stderr.isatty() or utils.are_progress_bars_disabled():
    yield
    return
  utils.disable_progress_bars()
  try:
    yield
  finally:
    utils.enable_progress_bars()
