"""Problem files of datasets on the Hugging Face Hub: `hf:ORG/NAME[/SUBSET][@REVISION][:SPLIT]`.

The `configs:` of the dataset card define the files of each split; without them, file names do, by
the rules of the `datasets` library (which is not required). huggingface_hub downloads the files, so
its cache and its variables HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE apply. A branch is
resolved to a commit once per process, and every file comes from that commit.
"""

import collections
import contextlib
import fnmatch
import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from absl import logging
from etils import epath

from synthneg_jax.runtime import hub_errors
from synthneg_jax.runtime.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".json")  # of problem files
_PATH = re.compile(
  r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<subset>[^@:]+))?(?:@(?P<revision>[^:]+))?(?::(?P<split>[^:@/]+))?"
)
_SPLIT_WORDS = {
  "train": {"train", "training"},
  "validation": {"validation", "valid", "dev", "val"},
  "test": {"test", "testing", "eval", "evaluation"},
}
_METADATA_FILES = ("dataset_infos.json", "dataset_info.json")
_GLOB = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_PART = re.compile(r"-\d+-of-(\d+)(?=[-.])")


class Source(NamedTuple):
  """A parsed Hub path; "" for each part that the path omits."""

  repo: str
  subset: str
  revision: str
  split: str


class _Snapshot(NamedTuple):
  """A dataset at one commit."""

  commit: str
  names: Sequence[str]  # of its files
  configs: Sequence[Mapping]  # of its card
  is_cached: bool  # listed from the cache, without asking the Hub


def is_hub(path: epath.PathLike) -> bool:
  """Whether a path names a dataset on the Hub."""
  return str(path).startswith("hf:")


def parse(path: epath.PathLike) -> Source:
  """Parses a Hub path.

  Raises:
    UserError: the path is malformed.
  """
  match = _PATH.fullmatch(str(path))
  if not match:
    raise UserError(
      f"{path} is not a dataset on the Hub; the form is hf:ORG/NAME[/SUBSET][@REVISION][:SPLIT]."
    )
  return Source(**{name: text or "" for name, text in match.groupdict().items()})


def commit(path: epath.PathLike) -> str:
  """The commit of a path's revision, 40 hex digits; errors as in `files`."""
  source = parse(path)
  return _snapshot(source.repo, source.revision, os.environ.get("HF_ENDPOINT")).commit


def files(path: epath.PathLike, split: str) -> list[epath.Path]:
  """Downloads the files of a split that are not yet in the cache.

  Args:
    path: a Hub path. Without a subset, the dataset's only or default subset is used; a subset may
      be a pattern, such as `*`.
    split: used if the path names no split.

  Returns:
    Files in huggingface_hub's cache, at least one.

  Raises:
    UserError: no such dataset, revision, subset or split, no access, or no network; names the
      dataset.
  """
  source, endpoint = parse(path), os.environ.get("HF_ENDPOINT")
  snapshot = _snapshot(source.repo, source.revision, endpoint)
  splits = collections.defaultdict(list)
  for config in _select_configs(source, snapshot):
    for split_name, names in _splits(config, snapshot.names).items():
      splits[split_name] += names
  wanted = source.split or split
  if not splits.get(wanted):
    available = ", ".join(name for name in splits if splits[name])
    available = available or f"no files that end in {', '.join(SUFFIXES)}"
    raise UserError(
      f"The dataset {path} has no split {wanted!r}; it has {available}. Append a split to the "
      "path to choose another, such as `:train`."
    )
  if snapshot.is_cached:
    _check_parts(source.repo, splits[wanted])
  with hub_errors.as_user_error("dataset", source.repo):
    return [
      epath.Path(_download(source.repo, name, snapshot.commit, endpoint)) for name in splits[wanted]
    ]


def _download(repo: str, name: str, revision: str, endpoint: str | None) -> str:
  from huggingface_hub import HfApi

  return HfApi(endpoint=endpoint).hf_hub_download(
    repo, name, repo_type="dataset", revision=revision
  )


@functools.cache
def _snapshot(repo: str, revision: str, endpoint: str | None) -> _Snapshot:
  """Lists a dataset from the Hub or, if the Hub is unreachable, from the cache."""
  import huggingface_hub
  from huggingface_hub import errors

  card = None
  with hub_errors.as_user_error("dataset", repo):
    try:
      info = huggingface_hub.HfApi(endpoint=endpoint).dataset_info(repo, revision=revision or None)
      sha, names, is_cached = info.sha, [file.rfilename for file in info.siblings], False
      with contextlib.suppress(errors.EntryNotFoundError):
        # Requested by branch rather than commit, so that the cache learns the branch's commit.
        card = _download(repo, "README.md", revision or "main", endpoint)
    except (errors.HfHubHTTPError, errors.HFValidationError):
      raise  # the Hub answered, or the name is invalid
    except Exception:  # no network, or HF_HUB_OFFLINE
      try:
        folder = pathlib.Path(
          huggingface_hub.snapshot_download(
            repo, repo_type="dataset", revision=revision or None, local_files_only=True
          )
        )
      except errors.LocalEntryNotFoundError:
        folder = None
      if folder is None:
        raise  # the network error, which says more than a cache miss
      sha, is_cached = folder.name, True
      names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
      card = folder / "README.md" if "README.md" in names else None
    configs = (huggingface_hub.metadata_load(card) or {}).get("configs") or [] if card else []
  logging.info(
    "The dataset %s on the Hub: commit %s%s.", repo, sha, " (from the cache)" if is_cached else ""
  )
  return _Snapshot(sha, sorted(names), configs, is_cached)


def _select_configs(source: Source, snapshot: _Snapshot) -> list[Mapping]:
  """The card's configs that a path selects; one empty config if the card has none."""
  by_name = {config.get("config_name", "default"): config for config in snapshot.configs}
  if source.subset:
    if matching := [by_name[name] for name in fnmatch.filter(by_name, source.subset)]:
      return matching
    if any(name.startswith(f"{source.subset}/") for name in snapshot.names):
      return [{"data_dir": source.subset}]
    available = f"it has {', '.join(by_name)}" if by_name else "its card lists none"
    raise UserError(
      f"The dataset {source.repo} on the Hub has no subset {source.subset!r}; {available}."
    )
  if len(by_name) <= 1:
    return list(by_name.values()) or [{}]
  default = [config for config in by_name.values() if config.get("default")]
  if default or "default" in by_name:
    return default or [by_name["default"]]
  raise UserError(
    f"The dataset {source.repo} on the Hub has several subsets: {', '.join(by_name)}; choose one, "
    f"such as hf:{source.repo}/{next(iter(by_name))}."
  )


def _splits(config: Mapping, names: Sequence[str]) -> dict[str, list[str]]:
  """The data files of each split of one of the card's configs."""
  folder = str(config.get("data_dir") or "").strip("./")
  names = [
    name
    for name in names
    if name.endswith(SUFFIXES) and (not folder or name.startswith(f"{folder}/"))
  ]
  data_files = config.get("data_files")
  if not data_files:
    return _splits_by_name(names, folder)
  if isinstance(data_files, Mapping):
    data_files = [{"split": split, "path": path} for split, path in data_files.items()]
  elif isinstance(data_files, str) or isinstance(data_files[0], str):
    data_files = [{"split": "train", "path": data_files}]
  splits = {}
  for entry in data_files:
    patterns = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
    matching = [name for pattern in patterns for name in names if _matches(name, pattern, folder)]
    splits.setdefault(entry["split"], []).extend(dict.fromkeys(matching))
  return splits


def _matches(name: str, pattern: str, folder: str) -> bool:
  """Whether a file matches a pattern of the card; `*` stays within a folder, `**` does not."""
  pattern = "/".join(part for part in (folder, pattern.removeprefix("./")) if part)
  parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
  regex = "".join(_GLOB.get(part) or _class_or_text(part) for part in parts)
  return bool(re.fullmatch(regex, name))


def _class_or_text(part: str) -> str:
  is_class = part.startswith("[") and part.endswith("]")
  return part.replace("[!", "[^") if is_class else re.escape(part)


def _splits_by_name(names: Sequence[str], folder: str) -> dict[str, list[str]]:
  """Splits by words in file names, else in folder names; all files are "train" if no word fits."""
  splits = {}
  for name in names:
    parts = name[len(folder) :].strip("/").split("/")
    if parts[-1] not in _METADATA_FILES and not any(part.startswith((".", "__")) for part in parts):
      splits.setdefault(_split_of(parts), []).append(name)
  unnamed = splits.pop("", [])
  splits = splits or {"train": unnamed}
  return {split: _one_suffix(splits[split]) for split in _SPLIT_WORDS if split in splits}


def _split_of(parts: Sequence[str]) -> str:
  """The split that the last telling part of a file's path names; "" for none."""
  for part in reversed(parts):
    words = set(re.split(r"[^a-z]+", part.lower()))
    for split, split_words in _SPLIT_WORDS.items():
      if words & split_words:
        return split
  return ""


def _one_suffix(names: Sequence[str]) -> list[str]:
  """Files of the first suffix that occurs: a dataset may hold the same rows in two formats."""
  for suffix in SUFFIXES:
    if matching := [name for name in names if name.endswith(suffix)]:
      return matching
  return []


def _check_parts(repo: str, names: Sequence[str]) -> None:
  """Refuses a split that the cache holds only in part."""
  parts = collections.Counter(
    (_PART.sub("", name), match.group(1)) for name in names if (match := _PART.search(name))
  )
  if any(count < int(number) for (_, number), count in parts.items()):
    raise UserError(
      f"The dataset {repo} on the Hub cannot be reached, and the cache holds only some of its "
      "files."
    )
