"""The real small model for tests: SmolLM2-135M-Instruct as launch/get_smollm2.sh leaves it.

The first call on a machine downloads 93 MB and takes about 12 seconds; later ones find the folder
complete. Several test processes may call at once: the script holds a lock.
"""

import functools
import os
import pathlib
import subprocess

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "launch/get_smollm2.sh"


@functools.cache
def smollm2_dir() -> pathlib.Path:
  """The Hugging Face folder of the model, made when it is missing; fails with the sentence of the
  script.
  """
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  folder = pathlib.Path(cache) / "synthneg_jax/smollm2_135m"
  result = subprocess.run([SCRIPT, f"--dir={folder}"], capture_output=True, text=True, check=False)
  if result.returncode != 0:
    raise RuntimeError(result.stderr.strip())
  return folder
