"""Start-up of programs (flags, config, logs, devices, compilation cache) and their exit status."""

import ctypes
import os
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from synthneg_jax.runtime import config_files, config_schema, distributed
from synthneg_jax.runtime.errors import UserError, from_os_error


def define_flags(config: bool = True, workdir: bool = True) -> None:
  """Defines --config, --workdir and the flags of every program."""
  if config:
    config_flags.DEFINE_config_file(
      "config",
      None,
      "Shipped config, NAME[:arg], or file, PATH.py[:arg]; "
      "--config.part.leaf=value changes a leaf.",
      lock_config=True,
    )
    flags.mark_flag_as_required("config")
    flags.DEFINE_bool(
      "skip_bad_rows",
      False,
      "Skip and count broken rows of problem files; sets config.task.skip_bad_rows.",
    )
  if workdir:
    flags.DEFINE_string(
      "workdir",
      None,
      "Folder of all files of the run; re-run the same command to resume.",
    )
    flags.mark_flag_as_required("workdir")
  if config and workdir:
    flags.DEFINE_bool(
      "check_parity",
      False,
      "First compare some logits of the base model with torch's; needs torch installed.",
    )
    flags.DEFINE_string(
      "profile_steps",
      "",
      "a:b traces updates a to b - 1 of every training stage; config.metrics.profile_steps.",
    )
  flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder that caches compiled programs between runs, local or gs://; empty for none, workdir "
    "for one in the workdir. By default JAX_COMPILATION_CACHE_DIR, else ~/.cache/synthneg_jax/xla.",
  )
  flags.DEFINE_bool(
    "distributed", False, "This process is one of several that run this command together."
  )
  flags.DEFINE_string(
    "coordinator_address",
    None,
    "With --distributed outside TPU pods and Slurm: HOST:PORT of process 0.",
  )
  flags.DEFINE_integer("num_processes", None, "Likewise: number of processes.", lower_bound=1)
  flags.DEFINE_integer(
    "process_id", None, "Likewise: index of this process, from 0.", lower_bound=0
  )
  flags.DEFINE_string(
    "coordinator_bind_address",
    None,
    "With --distributed: HOST:PORT at which process 0 listens; by default all interfaces.",
  )
  flags.DEFINE_integer(
    "heartbeat_seconds",
    distributed.HEARTBEAT_S,
    "With --distributed: a process without a heartbeat for this long counts as dead.",
    lower_bound=1,
  )
  flags.DEFINE_integer(
    "initialization_seconds",
    300,
    "With --distributed: how long to wait for the other processes.",
    lower_bound=1,
  )
  flags.DEFINE_bool(
    "keep_freed_memory",
    True,
    "CPU: let malloc keep freed memory, which avoids page faults at every step.",
  )


def _keep_freed_memory():
  """Makes glibc use one arena and return no large blocks to the system.

  Sets M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD by mallopt.
  """
  try:
    libc = ctypes.CDLL("libc.so.6")
  except OSError:  # not glibc: nothing to tune
    return
  for parameter, value in ((-8, 1), (-3, 2**31 - 1), (-1, 2**31 - 1)):
    libc.mallopt(parameter, value)


def _quiet_logs():
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  # orbax logs every step of a save at INFO, and errors that it also raises; keep its warnings.
  logging.get_absl_handler().addFilter(
    lambda record: record.levelno == 30 or "orbax" not in record.pathname
  )
  # httpx logs every request at INFO.
  logging.get_absl_handler().addFilter(
    lambda record: record.levelno > 20 or "httpx" not in record.pathname
  )
  hook = sys.unraisablehook

  def unraisable(info):
    # tensorstore reports a failed write to asyncio after the event loop was closed.
    if str(info.exc_value) != "Event loop is closed":
      hook(info)

  sys.unraisablehook = unraisable
  # After a failed save, orbax drops its other coroutines; the failure itself is raised.
  warnings.filterwarnings("ignore", message="coroutine .* was never awaited")


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses flags with absl; every error is one sentence."""
  for arg in argv[1:]:
    match = re.match(r"--(?:no)?config\.([\w.]+)", arg)
    if match:
      config_schema.check_name(match.group(1), arg.split("=")[0])
  if "config" in flags.FLAGS:
    config_files.resolve_flag(argv)
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      _ = flags.FLAGS.config.seed  # a missing file is reported only on access
      for name, _ in config_schema.leaves(flags.FLAGS.config):
        config_schema.check_name(name, "The config file")
      flags.FLAGS.config.task.skip_bad_rows |= flags.FLAGS.skip_bad_rows
      if "check_parity" in flags.FLAGS:
        flags.FLAGS.config.model.check_parity |= flags.FLAGS.check_parity
      if "profile_steps" in flags.FLAGS and flags.FLAGS.profile_steps:
        flags.FLAGS.config.metrics.profile_steps = flags.FLAGS.profile_steps
    return rest
  except flags.Error as error:
    raise UserError(str(error).strip().replace("\n", " ")) from error
  except (
    AttributeError,
    ImportError,
    KeyError,
    NameError,
    SyntaxError,
    TypeError,
    ValueError,
    OSError,
  ) as error:
    # The config file itself failed: report the last traceback entry inside it.
    frames = [
      f
      for f in traceback.extract_tb(error.__traceback__)
      if f"{os.sep}configs{os.sep}" in f.filename or pathlib.Path(f.filename).name in " ".join(argv)
    ]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    raise UserError(f"{where}{_one_sentence(error)}") from error


def _one_sentence(error: Exception) -> str:
  """The message of an error in a config file, without ml_collections' listing of the whole tree."""
  text = " ".join(str(error.args[0] if len(error.args) == 1 else error).split())
  missing = re.search(r'Key "(\w+)" does not exist', text)
  near = re.search(r'Did you mean "(\w+)"', text)
  if missing:
    return f"unknown config leaf {missing.group(1)!r}" + (
      f"; did you mean {near.group(1)!r}?" if near else "."
    )
  missing = re.search(
    r"Failed loading config file .*?(\[Errno 2\] No such file or directory: '([^']*)')", text
  )
  return f"--config: {missing.group(2)} does not exist." if missing else text


def _join() -> None:
  """With --distributed, joins the other processes."""
  f = flags.FLAGS
  if f.distributed:
    distributed.start(
      f.coordinator_address,
      f.num_processes,
      f.process_id,
      bind_address=f.coordinator_bind_address,
      heartbeat_s=f.heartbeat_seconds,
      timeout_s=f.initialization_seconds,
    )
    if not distributed.is_primary():
      logging.set_verbosity(logging.WARNING)
  elif (f.coordinator_address, f.num_processes, f.process_id) != (None, None, None):
    raise UserError("--coordinator_address, --num_processes and --process_id need --distributed.")


def _set_cache(folder: str) -> None:
  """Makes XLA cache all compiled programs in this folder."""
  import jax

  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def in_notebook() -> None:
  """Start-up for notebooks: silences libraries and caches compiled programs in ~/.cache."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  # Cells that run a shell fork, but share nothing with it.
  warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
  # Without ipywidgets the bar is text.
  warnings.filterwarnings("ignore", message="IProgress not found")
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  _set_cache(_default_cache())


def _default_cache() -> str:
  """JAX's own variable, else a folder in the user's home."""
  folder = os.path.join("~", ".cache", "synthneg_jax", "xla")
  return os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.expanduser(folder)


def _cache_folder() -> str:
  """The cache folder of compiled programs; empty for none."""
  f = flags.FLAGS
  if f.compilation_cache is None:
    return _default_cache()
  if f.compilation_cache != "workdir":
    return os.path.expanduser(f.compilation_cache)
  if "workdir" not in f:
    raise UserError("--compilation_cache=workdir: this program has no --workdir.")
  return os.path.join(f.workdir, "compilation_cache")


def _program(argv: list[str]) -> str:
  """The program name, with which every message begins."""
  return pathlib.Path(argv[0]).name


def _parse_or_exit(argv: list[str]) -> list[str]:
  try:
    rest = _parse_flags(argv)
    if len(rest) > 1:
      raise UserError(f"unexpected argument {rest[1]!r}; flags begin with --.")
    return rest
  except UserError as error:
    print(f"{_program(argv)}: {error}", file=sys.stderr)
    sys.exit(1)


def run_without_jax(main: Callable[[], None]) -> None:
  """Runs a program without jax: parses flags, calls main() and exits, with 0 only on success."""

  def start(argv):
    try:
      main()
    except Exception as error:
      user_error = error if isinstance(error, UserError) else from_os_error(error)
      if user_error is None:
        raise
      print(f"{_program(argv)}: {user_error}", file=sys.stderr)
      sys.exit(1)

  app.run(start, flags_parser=_parse_or_exit)


def run(main: Callable[[], None]) -> None:
  """Runs a program: parses flags, sets up jax, calls main() and exits, with 0 only on success.

  A UserError, or a file that cannot be read or written, is printed as one sentence on stderr, with
  exit status 1. Exit status 75: SIGTERM was received, and all completed work is saved. 76: another
  process of --distributed died or hangs. After 75 or 76, re-run the same command to resume.
  """

  def start(argv):
    _quiet_logs()
    if flags.FLAGS.keep_freed_memory and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
      _keep_freed_memory()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that torch is missing
    distributed.watch_signals()
    import jax  # noqa: F401  after the allocator is configured, before any array exists

    try:
      if folder := _cache_folder():
        _set_cache(folder)
      _join()
      main()
      distributed.finish()
    except distributed.Stopped:
      distributed.finish()
      message = (
        "stopped by SIGTERM; all completed work is saved. Re-run the same command to resume."
      )
      print(f"{_program(argv)}: {message}", file=sys.stderr)
      sys.exit(distributed.PREEMPTED)
    except Exception as error:
      user_error = error if isinstance(error, UserError) else from_os_error(error)
      if user_error is None:
        distributed.await_verdict()
        if distributed.count() > 1:
          traceback.print_exc()
      distributed.fail(str(user_error or f"{type(error).__name__}: {error}"))
      if user_error is None:
        raise
      print(f"{_program(argv)}: {user_error}", file=sys.stderr)
      sys.exit(1)

  app.run(start, flags_parser=_parse_or_exit)
