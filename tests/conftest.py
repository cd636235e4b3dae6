"""Settings for every test: eight forced CPU devices, strict rank promotion, NaN checks, a disk
cache of compiled programs, and a folder for temporary files that is removed at the end.

Workers, subprocesses and later runs share the cache. After each module, a worker drops its compiled
programs to bound its memory.
"""

import ctypes
import gc
import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest

from tests.xla_flags import xla_flags

_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not _WORKER:  # workers and processes inherit the folder of temporary files
  os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="synthneg_jax_tests_")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TFDS_DATA_DIR"] = os.path.join(tempfile.gettempdir(), "tfds")  # not a user's own
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " " + xla_flags(8)
CACHE = pathlib.Path(__file__).parents[1] / "build" / "test_xla_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_nans", True)


def pytest_unconfigure():
  """Removes what tests leave in the folder of temporary files."""
  if not _WORKER:
    shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)


def pytest_addoption(parser):
  parser.addoption("--long", action="store_true", help="also run full-size tests")
  parser.addoption(
    "--fast", action="store_true", help="skip tests marked slow; no test may start a process"
  )


def pytest_collection_modifyitems(config, items):
  """Deselects slow and long tests; runs the longest modules first, to balance the workers."""
  left_out = set() if config.getoption("--long") else {"long"}
  left_out |= {"slow", "browser"} if config.getoption("--fast") else set()
  deselected = [item for item in items if any(map(item.get_closest_marker, left_out))]
  config.hook.pytest_deselected(items=deselected)
  kept = [item for item in items if not any(map(item.get_closest_marker, left_out))]
  items[:] = sorted(kept, key=_rank)


_LONGEST = (  # modules by duration, longest first
  "pipeline/pods_test.py",
  "pipeline/stages_test.py",
  "experiments/scaling/study_test.py",
  "experiments/scaling/questions_study_test.py",
  "preflight/preflight_test.py",
  "notebooks_test.py",
  "experiments/scaling/stories_study_test.py",
  "pipeline/reasoning_run_test.py",
  "experiments/star_graph/study_test.py",
  "pipeline/export_formats_test.py",
  "cli_test.py",
  "pipeline/smollm2_test.py",
  "pipeline/synthesize_test.py",
  "training/preemption_test.py",
  "training/live_metrics_test.py",
  "runtime/distributed_test.py",
)


def _rank(item) -> int:
  name = item.nodeid.partition("::")[0].removeprefix("tests/")
  return _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)


@pytest.fixture(autouse=True, scope="module")
def _drop_programs():
  yield
  jax.clear_caches()
  gc.collect()
  try:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
  except (OSError, AttributeError):  # not glibc
    pass


@pytest.fixture(autouse=True)
def _no_processes(request, monkeypatch):
  """Under --fast, a test that starts a process fails, but for git, which manifests ask for the
  commit.
  """
  if request.config.getoption("--fast"):
    start = subprocess.Popen.__init__

    def refuse(self, args, *rest, **kwargs):
      if args[0] != "git" and args != "lscpu":  # numpy 2.0 asks lscpu
        raise RuntimeError(f"This test starts a process ({args}); mark it slow.")
      start(self, args, *rest, **kwargs)

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
