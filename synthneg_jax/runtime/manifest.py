"""A stage's manifest: what it was made from and what it made, so that it is skipped, continued or
refused rightly.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence

from etils import epath

from synthneg_jax.runtime import config_schema, distributed
from synthneg_jax.runtime.errors import UserError, writing

# of the stages' files; version 1 wrote none, had other leaf names, and made pairs within stage dpo
FORMAT = 2
# besides TensorBoard's; a stage with nothing else has made nothing yet
_LOGS = ("begun.json", "metrics.jsonl")
_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "transformers",
  "numpy",
  "synthneg_jax",
)


def versions() -> dict[str, str]:
  """Installed versions of what a run depends on."""
  found = {}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "not installed"
  return found


def git_commit() -> str:
  """The commit of the source tree, "+" appended where it was changed; empty outside a checkout of
  this project.
  """
  root = pathlib.Path(__file__).resolve().parents[2]

  def git(*args: str) -> str:
    done = subprocess.run(
      ["git", "-C", str(root), *args], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()

  try:
    top = git("rev-parse", "--show-toplevel")
    if (
      not top or pathlib.Path(top).resolve() != root
    ):  # a package within another project's repository has no commit there
      return ""
    commit = git("rev-parse", "HEAD")
    return commit + ("+" if commit and git("status", "--porcelain") else "")
  except OSError:  # no git on this machine
    return ""


def write_json(path: epath.Path, value) -> None:
  """Writes under a temporary name and renames, so that no reader sees half a file; the first
  process alone writes.

  The temporary name is unique: machines that share a study, or a report beside a run, may write one
  file at the same time.

  Raises:
    UserError: it cannot be written; what stood there before does still.
  """
  if not distributed.first():
    return
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
      temporary.write_text(json.dumps(value, indent=1) + "\n")
      temporary.replace(path)
    except BaseException:
      temporary.unlink(missing_ok=True)
      raise


def _file_hash(path: epath.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Stage:
  """One stage of one workdir: is it done, may it go on, what did it make.

  Attributes:
    folder: workdir/<name>, where all its files go.
    done: it was finished before with this config and these inputs.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    name: str,
    config: dict,
    needs: Sequence[str] = (),
    given: dict[str, str] | None = None,
  ):
    """Opens a stage.

    Args:
      workdir: of the run.
      name: of the stage; may have parts, as "dpo/step_dpo".
      config: the flat leaves that this stage depends on.
      needs: stages whose files it reads.
      given: identities of what it reads from outside the workdir, by name.

    Raises:
      UserError: a needed stage is not done, or its files changed since; or this stage has made
        something with another config or other inputs, or in an earlier version's format.
    """
    self.name, self.folder = name, epath.Path(workdir) / name
    self._workdir, self._started = epath.Path(workdir), time.time()
    inputs = {need: self._identity(need) for need in needs} | (given or {})
    self._begun = {"format": FORMAT, "config": json.loads(json.dumps(config)), "inputs": inputs}
    begun_path, manifest_path = self.folder / "begun.json", self.folder / "manifest.json"
    before = json.loads(begun_path.read_text()) if begun_path.exists() else None
    self._geometry = before.pop("geometry", {}) if before else {}
    if before and set(before) == set(self._begun):
      # a leaf that decided results in an earlier version and no longer does is no difference
      before["config"] = {
        leaf: value
        for leaf, value in before["config"].items()
        if config_schema.may_change_results(leaf)
      }
    if before not in (None, self._begun) and not self._made_nothing():
      self._refuse_change(before)
    # and all have read what is there before anything is written
    self.done = distributed.agree(manifest_path.exists())
    if before != self._begun:
      if before is not None and distributed.first():
        self.folder.rmtree()  # logs of a start that made nothing
      self._geometry = {}
      write_json(begun_path, self._begun)
    distributed.barrier()  # the folder is there

  def _made_nothing(self) -> bool:
    """Whether the stage's folder holds nothing but its beginning and logs."""
    names = [path.name for path in self.folder.iterdir()]
    return all(
      name in _LOGS or name.startswith("events.out.") or name.endswith(".tmp") for name in names
    )

  def _identity(self, need: str) -> str:
    path = self._workdir / need / "manifest.json"
    if not path.exists():
      raise UserError(
        f"Stage {self.name} needs stage {need}, which is not done in {self._workdir}; run it first."
      )
    manifest = json.loads(path.read_text())
    self._check_format(manifest, need)
    for file, expected in manifest["files"].items():
      found = self._workdir / need / file
      if not found.exists():
        raise UserError(f"{found} is missing; delete {path} to have stage {need} made again.")
      if _file_hash(found) != expected:
        raise UserError(
          f"{found} was changed or cut off since stage {need} wrote it; delete it and {path} to "
          "have it made again."
        )
    return manifest["identity"]

  def _check_format(self, found: dict, stage: str) -> None:
    if found.get("format") != FORMAT:
      raise UserError(
        f"Stage {stage} in {self._workdir} was made by version 1 of synthneg_jax, whose files and "
        f"config leaves differ; take another --workdir, or delete {self._workdir / stage} and the "
        "stages after it to rebuild them."
      )

  def _refuse_change(self, before: dict):
    self._check_format(before, self.name)
    old, new = before["config"], self._begun["config"]
    for leaf in sorted(set(old) | set(new)):
      if old.get(leaf) != new.get(leaf):
        raise UserError(
          f"Stage {self.name} in {self._workdir} was begun with {leaf}={old.get(leaf)!r}, now it "
          f"is {new.get(leaf)!r}; take another --workdir, or delete {self.folder} and the stages "
          "after it."
        )
    for need, identity in self._begun["inputs"].items():
      if before["inputs"].get(need) != identity:
        source = f"run of stage {need}" if (self._workdir / need).exists() else need
        raise UserError(
          f"Stage {self.name} in {self._workdir} was made from another {source}; delete "
          f"{self.folder} to have it made again."
        )

  def settle(self, name: str, choose: Callable[[], dict]) -> dict:
    """A geometry (core/geometry.py) that was chosen once for this stage, by the first process,
    whoever goes on with it.

    It changes speed and not results, so that it stands beside the fingerprint and not in it.

    Args:
      name: of what it is for.
      choose: gives it as JSON values; called where nothing was chosen before. All processes call
        this method.
    """
    if name not in self._geometry:
      self._geometry[name] = distributed.agree(choose() if distributed.first() else None)
      write_json(self.folder / "begun.json", self._begun | {"geometry": self._geometry})
    return self._geometry[name]

  def finish(self, figures: dict, files: Sequence[epath.Path] = (), identity: str = "") -> dict:
    """Writes the manifest, once all processes are here; it is there when this returns.

    Args:
      figures: what the stage reports, for summary.json.
      files: what later stages read; their hashes are kept.
      identity: of outputs that are not among the files (weights: their fingerprint).

    Returns:
      The figures, with the stage's seconds.
    """
    distributed.barrier()
    hashes = (
      {str(path.relative_to(self.folder)): _file_hash(path) for path in files}
      if distributed.first()
      else {}
    )
    seconds = round(time.time() - self._started, 1)
    everything = hashlib.sha256(json.dumps([self._begun, hashes, identity]).encode()).hexdigest()[
      :16
    ]
    figures = {"seconds": seconds, **figures}
    write_json(
      self.folder / "manifest.json",
      {
        "stage": self.name,
        "identity": everything,
        "figures": figures,
        "files": hashes,
        **self._begun,
        "geometry": self._geometry,
        "versions": versions(),
        "git_commit": git_commit(),
      },
    )
    distributed.barrier()
    return figures


def figures(workdir: epath.PathLike, name: str) -> dict | None:
  """What a finished stage reported; None where it is not done."""
  path = epath.Path(workdir) / name / "manifest.json"
  return json.loads(path.read_text())["figures"] if path.exists() else None
