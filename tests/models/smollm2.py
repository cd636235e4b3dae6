"""The real small model for tests: SmolLM2-135M-Instruct, downloaded by launch/get_smollm2.sh.

The first call on a machine downloads 93 MB in about 12 seconds; later calls find the folder.
Several test processes may call concurrently, because the script holds a lock.
"""

import functools
import os
import pathlib
import subprocess

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "launch/get_smollm2.sh"


@functools.cache
def smollm2_dir() -> pathlib.Path:
  """The Hugging Face folder of the model, created if missing; raises the script's error."""
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  folder = pathlib.Path(cache) / "synthneg_jax/smollm2_135m"
  result = subprocess.run([SCRIPT, f"--dir={folder}"], capture_output=True, text=True, check=False)
  if result.returncode != 0:
    raise RuntimeError(result.stderr.strip())
  return folder
