"""A stage's manifest: its inputs and outputs, which decide whether to skip, resume or refuse it."""

import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence

from absl import logging
from etils import epath

from synthneg_jax.runtime import config_schema, distributed
from synthneg_jax.runtime.errors import UserError, writing

# Version of the stages' files. Version 1 wrote none, had other leaf names, and built pairs in dpo.
FORMAT = 2
# A stage with only these and TensorBoard's files has produced nothing yet.
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
  """Installed versions of the packages that a run depends on."""
  installed = {}
  for package in _PACKAGES:
    try:
      installed[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      installed[package] = "not installed"
  return installed


def git_commit() -> str:
  """The commit of this checkout, with "+" if it has changes; empty outside a checkout."""
  root = pathlib.Path(__file__).resolve().parents[2]

  def git(*args: str) -> str:
    done = subprocess.run(
      ["git", "-C", str(root), *args], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()

  try:
    top = git("rev-parse", "--show-toplevel")
    # A package installed inside another project's repository has no commit there.
    if not top or pathlib.Path(top).resolve() != root:
      return ""
    commit = git("rev-parse", "HEAD")
    return commit + ("+" if commit and git("status", "--porcelain") else "")
  except OSError:  # no git on this machine
    return ""


def write_json(path: epath.Path, value) -> None:
  """Writes a JSON file atomically, in process 0 only.

  The temporary file has a unique name, because machines that share a study, or a report beside a
  run, may write the same file at the same time.

  Raises:
    UserError: the file cannot be written; an earlier version remains.
  """
  if not distributed.is_primary():
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
  """One stage of a workdir: whether it is done, may resume, and what it produced.

  Attributes:
    folder: workdir/<name>, which holds all its files.
    done: whether it was finished earlier with this config and these inputs.
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
      name: of the stage; may have parts, as in "dpo/step_dpo".
      config: the flat leaves that this stage depends on.
      needs: stages whose files it reads.
      given: identities of inputs from outside the workdir, by name.

    Raises:
      UserError: a needed stage is not done, or its files were changed; or this stage has output
        from another config, other inputs, or an earlier version's format.
    """
    self.name, self.folder = name, epath.Path(workdir) / name
    self._workdir, self._started = epath.Path(workdir), time.time()
    inputs = {need: self._identity(need) for need in needs} | (given or {})
    self._begun = {"format": FORMAT, "config": json.loads(json.dumps(config)), "inputs": inputs}
    begun_path, manifest_path = self.folder / "begun.json", self.folder / "manifest.json"
    before = json.loads(begun_path.read_text()) if begun_path.exists() else None
    self._geometry = before.pop("geometry", {}) if before else {}
    if before and set(before) == set(self._begun):
      # Ignore leaves that changed results in an earlier version but no longer do.
      before["config"] = {
        leaf: value
        for leaf, value in before["config"].items()
        if config_schema.may_change_results(leaf)
      }
    if before and manifest_path.exists() and self._is_imported(before):
      self._begun = before
    if before not in (None, self._begun) and not self._is_empty():
      self._refuse_change(before)
    # This also waits until every process has read the folder, before anything is written.
    self.done = distributed.broadcast(manifest_path.exists())
    if before != self._begun:
      if before is not None and distributed.is_primary():
        self.folder.rmtree()  # logs of a start that produced nothing
      self._geometry = {}
      write_json(begun_path, self._begun)
    distributed.barrier()  # the folder exists from here on

  def _is_imported(self, before: dict) -> bool:
    """Whether the files were imported: made like this, but from inputs outside the workdir."""
    inputs = self._begun["inputs"]
    imported = {
      name for name in before["inputs"].keys() - inputs if not (self._workdir / name).exists()
    }
    rest = {name: value for name, value in before["inputs"].items() if name not in imported}
    if not imported or before | {"inputs": rest} != self._begun:
      return False
    logging.info("Stage %s: %s are kept.", self.name, ", ".join(sorted(imported)))
    return True

  def _is_empty(self) -> bool:
    """Whether the stage's folder holds only begun.json and logs."""
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
      output = self._workdir / need / file
      if not output.exists():
        raise UserError(f"{output} is missing; delete {path} to run stage {need} again.")
      if _file_hash(output) != expected:
        raise UserError(
          f"{output} was changed or truncated after stage {need} wrote it; delete it and {path} to "
          "run the stage again."
        )
    return manifest["identity"]

  def _check_format(self, manifest: dict, stage: str) -> None:
    if manifest.get("format") != FORMAT:
      raise UserError(
        f"Stage {stage} in {self._workdir} is from version 1 of synthneg_jax, whose files and "
        f"config leaves differ; use another --workdir, or delete {self._workdir / stage} and the "
        "later stages to run them again."
      )

  def _refuse_change(self, before: dict):
    self._check_format(before, self.name)
    old, new = before["config"], self._begun["config"]
    for leaf in sorted(set(old) | set(new)):
      if old.get(leaf) != new.get(leaf):
        raise UserError(
          f"Stage {self.name} in {self._workdir} was started with {leaf}={old.get(leaf)!r}, but "
          f"now it is {new.get(leaf)!r}; use another --workdir, or delete {self.folder} and the "
          "later stages."
        )
    for need in (*self._begun["inputs"], *before["inputs"]):
      if before["inputs"].get(need) != self._begun["inputs"].get(need):
        source = f"run of stage {need}" if (self._workdir / need).exists() else need
        begun = f"was started from another {source}"
        if need not in self._begun["inputs"]:
          begun = f"was started from {source}, which are not given now"
        raise UserError(
          f"Stage {self.name} in {self._workdir} {begun}; delete {self.folder} to run it again."
        )

  def choose_once(self, name: str, choose: Callable[[], dict]) -> dict:
    """Returns a geometry (core/geometry.py), chosen once per stage by process 0.

    A resumed stage keeps it. It changes speed, not results, so it is not part of the fingerprint.
    Every process must call this method.

    Args:
      name: of the geometry.
      choose: returns the geometry as JSON values; called unless one was chosen before.
    """
    if name not in self._geometry:
      self._geometry[name] = distributed.broadcast(choose() if distributed.is_primary() else None)
      write_json(self.folder / "begun.json", self._begun | {"geometry": self._geometry})
    return self._geometry[name]

  def finish(self, figures: dict, files: Sequence[epath.Path] = (), identity: str = "") -> dict:
    """Writes the manifest, which exists when this returns; every process must call it.

    Args:
      figures: reported by the stage, for summary.json.
      files: read by later stages; their hashes are recorded.
      identity: of outputs that are not among the files (weights: their fingerprint).

    Returns:
      The figures, with the stage's seconds.
    """
    distributed.barrier()
    hashes = {}
    if distributed.is_primary():
      hashes = {str(path.relative_to(self.folder)): _file_hash(path) for path in files}
    seconds = round(time.time() - self._started, 1)
    content = json.dumps([self._begun, hashes, identity])
    figures = {"seconds": seconds, **figures}
    write_json(
      self.folder / "manifest.json",
      {
        "stage": self.name,
        "identity": hashlib.sha256(content.encode()).hexdigest()[:16],
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
  """The figures of a finished stage, or None if it is not done."""
  path = epath.Path(workdir) / name / "manifest.json"
  return json.loads(path.read_text())["figures"] if path.exists() else None
