"""Problem files of datasets on the Hugging Face Hub: `hf:ORG/NAME[/SUBSET][@REVISION][:SPLIT]`.

The dataset card (`configs:`) says which files a split has, else the files' names do, by the rules
of the `datasets` library, which is not needed. Files go through huggingface_hub: its cache, and its
variables HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE. A branch is resolved to its commit once
per process, and all files are from that commit.
"""

import collections
import contextlib
import fnmatch
import functools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from absl import logging
from etils import epath

from synthneg_jax.runtime.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".json")  # that problem files have
_FORM = re.compile(
  r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<subset>[^@:]+))?(?:@(?P<revision>[^:]+))?(?::(?P<split>[^:@/]+))?"
)
_SPLITS = {
  "train": {"train", "training"},
  "validation": {"validation", "valid", "dev", "val"},
  "test": {"test", "testing", "eval", "evaluation"},
}
_NO_DATA = ("dataset_infos.json", "dataset_info.json")
_GLOB = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_PART = re.compile(r"-\d+-of-(\d+)(?=[-.])")


class Source(NamedTuple):
  """What a path on the Hub says; "" where it leaves something out."""

  repo: str
  subset: str
  revision: str
  split: str


class _Snapshot(NamedTuple):
  """A dataset at one commit: its files' names, its card's `configs`, whether only the cache was
  asked.
  """

  commit: str
  names: Sequence[str]
  configs: Sequence[Mapping]
  is_cached: bool


def is_hub(path: epath.PathLike) -> bool:
  """Whether a path is one of the Hub."""
  return str(path).startswith("hf:")


def parse(path: epath.PathLike) -> Source:
  """Reads a path of the Hub.

  Raises:
    UserError: it has another form.
  """
  found = _FORM.fullmatch(str(path))
  if not found:
    raise UserError(
      f"{path} is no dataset on the Hub; the form is hf:ORG/NAME[/SUBSET][@REVISION][:SPLIT]."
    )
  return Source(**{name: text or "" for name, text in found.groupdict().items()})


def commit(path: epath.PathLike) -> str:
  """The commit of a path's revision, 40 hex digits; errors as in `files`."""
  source = parse(path)
  return _snapshot(source.repo, source.revision, os.environ.get("HF_ENDPOINT")).commit


def files(path: epath.PathLike, split: str) -> list[epath.Path]:
  """Downloads the files of a split, unless they are in the cache.

  Args:
    path: of the Hub. Without a subset it means the dataset's only or default one; a subset may be a
      pattern, such as `*`.
    split: the one that is meant where the path names none.

  Returns:
    Files in the cache of huggingface_hub, at least one.

  Raises:
    UserError: no such dataset, revision, subset or split, no access, or no network; names the
      dataset.
  """
  source, endpoint = parse(path), os.environ.get("HF_ENDPOINT")
  snapshot = _snapshot(source.repo, source.revision, endpoint)
  splits = collections.defaultdict(list)
  for config in _chosen(source, snapshot):
    for name, found in _splits(config, snapshot.names).items():
      splits[name] += found
  wanted = source.split or split
  if not splits.get(wanted):
    has = (
      ", ".join(name for name in splits if splits[name])
      or f"no files that end in {', '.join(SUFFIXES)}"
    )
    raise UserError(
      f"The dataset {path} has no split {wanted!r}; it has {has}. A path takes a split at its end: "
      "`:train`."
    )
  if snapshot.is_cached:
    _check_parts(source.repo, splits[wanted])
  with _sentences(source.repo):
    return [
      epath.Path(_download(source.repo, name, snapshot.commit, endpoint)) for name in splits[wanted]
    ]


@contextlib.contextmanager
def _sentences(repo: str) -> Iterator[None]:
  """Turns whatever huggingface_hub raises into a UserError that names the dataset."""
  from huggingface_hub import errors

  try:
    yield
  except UserError:
    raise
  except errors.GatedRepoError:
    reason = "is gated: accept its terms on its page, and give a token of that account in HF_TOKEN"
  except errors.RepositoryNotFoundError:
    reason = (
      "does not exist, or it is private and HF_TOKEN holds no token of somebody who may read it"
    )
  except errors.RevisionNotFoundError:
    reason = "has no such revision"
  except Exception as error:  # its own, the HTTP library's and the system's have no common class
    lines = str(error).strip().splitlines() or [""]
    reason = f"could not be fetched ({type(error).__name__}: {lines[0][:200]})"
  else:
    return
  raise UserError(f"The dataset {repo} on the Hub {reason}.")


def _download(repo: str, name: str, revision: str, endpoint: str | None) -> str:
  from huggingface_hub import HfApi

  return HfApi(endpoint=endpoint).hf_hub_download(
    repo, name, repo_type="dataset", revision=revision
  )


@functools.cache
def _snapshot(repo: str, revision: str, endpoint: str | None) -> _Snapshot:
  """Asks the Hub or, where it cannot be reached, the cache."""
  import huggingface_hub
  from huggingface_hub import errors

  card = None
  with _sentences(repo):
    try:
      info = huggingface_hub.HfApi(endpoint=endpoint).dataset_info(repo, revision=revision or None)
      found, names, is_cached = info.sha, [file.rfilename for file in info.siblings], False
      with contextlib.suppress(
        errors.EntryNotFoundError
      ):  # asked for by branch, so that the cache knows its commit
        card = _download(repo, "README.md", revision or "main", endpoint)
    except (errors.HfHubHTTPError, errors.HFValidationError):
      raise  # the Hub was reached, or need not be
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
        raise  # what kept the Hub from answering
      found, is_cached = folder.name, True
      names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
      card = folder / "README.md" if "README.md" in names else None
    configs = (huggingface_hub.metadata_load(card) or {}).get("configs") or [] if card else []
  logging.info(
    "The dataset %s on the Hub: commit %s%s.", repo, found, " (from the cache)" if is_cached else ""
  )
  return _Snapshot(found, sorted(names), configs, is_cached)


def _chosen(source: Source, snapshot: _Snapshot) -> list[Mapping]:
  """The configs of the card that a path means; a config without fields where the card has none."""
  by_name = {config.get("config_name", "default"): config for config in snapshot.configs}
  if source.subset:
    if found := [by_name[name] for name in fnmatch.filter(by_name, source.subset)]:
      return found
    if any(name.startswith(f"{source.subset}/") for name in snapshot.names):
      return [{"data_dir": source.subset}]
    there = f"it has {', '.join(by_name)}" if by_name else "its card names none"
    raise UserError(
      f"The dataset {source.repo} on the Hub has no subset {source.subset!r}; {there}."
    )
  if len(by_name) <= 1:
    return list(by_name.values()) or [{}]
  default = [config for config in by_name.values() if config.get("default")]
  if default or "default" in by_name:
    return default or [by_name["default"]]
  raise UserError(
    f"The dataset {source.repo} on the Hub has several subsets: {', '.join(by_name)}; name one as "
    "in "
    f"hf:{source.repo}/{next(iter(by_name))}."
  )


def _splits(config: Mapping, names: Sequence[str]) -> dict[str, list[str]]:
  """The data files of each split of a config of the card."""
  folder = str(config.get("data_dir") or "").strip("./")
  names = [
    name
    for name in names
    if name.endswith(SUFFIXES) and (not folder or name.startswith(f"{folder}/"))
  ]
  given = config.get("data_files")
  if not given:
    return _splits_by_name(names, folder)
  if isinstance(given, Mapping):
    given = [{"split": split, "path": path} for split, path in given.items()]
  elif isinstance(given, str) or isinstance(given[0], str):
    given = [{"split": "train", "path": given}]
  splits = {}
  for entry in given:
    patterns = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
    found = [name for pattern in patterns for name in names if _matches(name, pattern, folder)]
    splits.setdefault(entry["split"], []).extend(dict.fromkeys(found))
  return splits


def _matches(name: str, pattern: str, folder: str) -> bool:
  """Whether a file matches a pattern of the card; `*` stays within a folder, `**` does not."""
  pattern = "/".join(part for part in (folder, pattern.removeprefix("./")) if part)
  parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
  return bool(
    re.fullmatch("".join(_GLOB.get(part) or _class_or_text(part) for part in parts), name)
  )


def _class_or_text(part: str) -> str:
  return (
    part.replace("[!", "[^") if part.startswith("[") and part.endswith("]") else re.escape(part)
  )


def _splits_by_name(names: Sequence[str], folder: str) -> dict[str, list[str]]:
  """Splits by words in the names of files, else of their folders; without any, all is "train"."""
  splits = {}
  for name in names:
    parts = name[len(folder) :].strip("/").split("/")
    if parts[-1] not in _NO_DATA and not any(part.startswith((".", "__")) for part in parts):
      words = (set(re.split(r"[^a-z]+", part.lower())) for part in reversed(parts))
      found = next(
        (split for of_part in words for split in _SPLITS if of_part & _SPLITS[split]), ""
      )
      splits.setdefault(found, []).append(name)
  unnamed = splits.pop("", [])
  splits = splits or {"train": unnamed}
  return {
    split: _of_first_suffix(splits[split])
    for split in ("train", "validation", "test")
    if split in splits
  }


def _of_first_suffix(names: Sequence[str]) -> list[str]:
  """Those of one suffix: a dataset may hold the same rows in two."""
  return next(
    (found for s in SUFFIXES if (found := [name for name in names if name.endswith(s)])), []
  )


def _check_parts(repo: str, names: Sequence[str]) -> None:
  """Refuses a split of which the cache holds some parts only."""
  parts = collections.Counter(
    (_PART.sub("", name), found.group(1)) for name in names if (found := _PART.search(name))
  )
  if any(count < int(number) for (_, number), count in parts.items()):
    raise UserError(
      f"The dataset {repo} on the Hub cannot be reached, and the cache holds some of its files "
      "only."
    )
