"""How every program starts: flags, config, logs, devices, compilation cache; and how it ends: with
a status that is true.
"""

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
from synthneg_jax.runtime.errors import UserError, of_files


def define_flags(config: bool = True, workdir: bool = True) -> None:
  """--config, --workdir and what every program takes."""
  if config:
    config_flags.DEFINE_config_file(
      "config",
      None,
      "Config that comes with the project, NAME[:arg], or a file, PATH.py[:arg]; "
      "--config.part.leaf=value changes a leaf.",
      lock_config=True,
    )
    flags.mark_flag_as_required("config")
    flags.DEFINE_bool(
      "skip_bad_rows",
      False,
      "Leave broken rows of problem files out, counted; config.task.skip_bad_rows.",
    )
  if workdir:
    flags.DEFINE_string(
      "workdir",
      None,
      "Folder that takes every file of the run; the same command goes on where it was.",
    )
    flags.mark_flag_as_required("workdir")
  if config and workdir:
    flags.DEFINE_bool(
      "check_parity",
      False,
      "First hold some logits of the base model against torch's; needs torch installed.",
    )
    flags.DEFINE_string(
      "profile_steps",
      "",
      "a:b traces updates a to b - 1 of every training stage; config.metrics.profile_steps.",
    )
  flags.DEFINE_string(
    "compilation_cache",
    os.path.join("~", ".cache", "synthneg_jax", "xla"),
    "Folder of compiled programs, kept between runs, local or gs://; empty for none, workdir for "
    "one in the workdir.",
  )
  flags.DEFINE_bool(
    "distributed", False, "This process is one of several that run this command together."
  )
  flags.DEFINE_string(
    "coordinator_address",
    None,
    "With --distributed outside TPU pods and Slurm: HOST:PORT of process 0.",
  )
  flags.DEFINE_integer(
    "num_processes", None, "Likewise: how many processes there are.", lower_bound=1
  )
  flags.DEFINE_integer(
    "process_id", None, "Likewise: the number of this one, from 0.", lower_bound=0
  )
  flags.DEFINE_string(
    "coordinator_bind_address",
    None,
    "With --distributed: HOST:PORT at which process 0 listens; on all interfaces unless given.",
  )
  flags.DEFINE_integer(
    "heartbeat_seconds",
    distributed.HEARTBEAT_S,
    "With --distributed: a process that is silent for so long counts as dead.",
    lower_bound=1,
  )
  flags.DEFINE_integer(
    "initialization_seconds",
    300,
    "With --distributed: how long the other processes may take to come.",
    lower_bound=1,
  )
  flags.DEFINE_bool(
    "keep_freed_memory",
    True,
    "CPU: let malloc keep freed memory, which spares page faults at every step.",
  )


def _keep_freed_memory():
  """glibc: one arena, and no return of large blocks to the system (mallopt M_ARENA_MAX, M_MMAP_,
  M_TRIM_THRESHOLD).
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
  # orbax reports every step of a save at INFO, and what its threads raise where it raises it once
  # more; its warnings stay.
  logging.get_absl_handler().addFilter(
    lambda record: record.levelno == 30 or "orbax" not in record.pathname
  )
  # A line for every request to a server.
  logging.get_absl_handler().addFilter(
    lambda record: record.levelno > 20 or "httpx" not in record.pathname
  )
  hook = sys.unraisablehook

  def unraisable(
    about,
  ):  # tensorstore tells asyncio of a write that failed when nobody listens any more
    if str(about.exc_value) != "Event loop is closed":
      hook(about)

  sys.unraisablehook = unraisable
  # orbax drops the rest of a save that failed; the failure itself is raised.
  warnings.filterwarnings("ignore", message="coroutine .* was never awaited")


def _parse_flags(argv: list[str]) -> list[str]:
  """absl's parsing, with every complaint as one sentence."""
  for arg in argv[1:]:
    match = re.match(r"--(?:no)?config\.([\w.]+)", arg)
    if match:
      config_schema.check_name(match.group(1), arg.split("=")[0])
  if "config" in flags.FLAGS:
    config_files.resolve_flag(argv)
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      _ = flags.FLAGS.config.seed  # a file that is not there is reported only when asked for
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
    # The config file itself failed: the file and line are the last ones of the traceback inside it.
    frames = [
      f
      for f in traceback.extract_tb(error.__traceback__)
      if f"{os.sep}configs{os.sep}" in f.filename or pathlib.Path(f.filename).name in " ".join(argv)
    ]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    raise UserError(f"{where}{_one_sentence(error)}") from error


def _one_sentence(error: Exception) -> str:
  """What ml_collections says of a config file, without its listing of the whole tree."""
  text = " ".join(str(error.args[0] if len(error.args) == 1 else error).split())
  missing = re.search(r'Key "(\w+)" does not exist', text)
  near = re.search(r'Did you mean "(\w+)"', text)
  if missing:
    return f"the config has no leaf {missing.group(1)!r}" + (
      f"; did you mean {near.group(1)!r}?" if near else "."
    )
  missing = re.search(
    r"Failed loading config file .*?(\[Errno 2\] No such file or directory: '([^']*)')", text
  )
  return f"--config: there is no file {missing.group(2)}." if missing else text


def _join() -> None:
  """Under --distributed: finds the other processes."""
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
    if not distributed.first():
      logging.set_verbosity(logging.WARNING)
  elif (f.coordinator_address, f.num_processes, f.process_id) != (None, None, None):
    raise UserError(
      "--coordinator_address, --num_processes and --process_id say something only with "
      "--distributed."
    )


def _keep_compiled(folder: str) -> None:
  """Programs that XLA compiles are kept in this folder, and found there by later runs."""
  import jax

  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def in_notebook() -> None:
  """What a program does before its work, for a notebook: quiet libraries, compiled programs kept in
  ~/.cache.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  warnings.filterwarnings(
    "ignore", message=r"os\.fork\(\) was called"
  )  # by cells that run a shell, which share nothing
  warnings.filterwarnings(
    "ignore", message="IProgress not found"
  )  # a bar of text does without ipywidgets
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  _keep_compiled(os.path.expanduser(os.path.join("~", ".cache", "synthneg_jax", "xla")))


def _cache_folder() -> str:
  """Where compiled programs are kept; empty for nowhere."""
  f = flags.FLAGS
  if f.compilation_cache != "workdir":
    return os.path.expanduser(f.compilation_cache)
  if "workdir" not in f:
    raise UserError("--compilation_cache=workdir: this program has no --workdir.")
  return os.path.join(f.workdir, "compilation_cache")


def _program(argv: list[str]) -> str:
  """The name that stands before every message."""
  return pathlib.Path(argv[0]).name


def _parse_or_exit(argv: list[str]) -> list[str]:
  try:
    rest = _parse_flags(argv)
    if len(rest) > 1:
      raise UserError(f"{rest[1]!r} is no flag.")
    return rest
  except UserError as error:
    print(f"{_program(argv)}: {error}", file=sys.stderr)
    sys.exit(1)


def run_without_jax(main: Callable[[], None]) -> None:
  """Runs a program that computes nothing, in a moment: parses flags, calls main() and exits, 0 only
  if the work is done.
  """

  def start(argv):
    try:
      main()
    except Exception as error:
      meant = error if isinstance(error, UserError) else of_files(error)
      if meant is None:
        raise
      print(f"{_program(argv)}: {meant}", file=sys.stderr)
      sys.exit(1)

  app.run(start, flags_parser=_parse_or_exit)


def run(main: Callable[[], None]) -> None:
  """Runs a program: parses flags, prepares jax, calls main() and exits, 0 only if the work is done.

  A UserError, or a file that cannot be read or written, is printed as one sentence on stderr, exit
  status 1. Exit status 75: SIGTERM came, and what was done is saved; 76: another process of
  --distributed died or hangs. After both the same command goes on where it was.
  """

  def start(argv):
    _quiet_logs()
    if flags.FLAGS.keep_freed_memory and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
      _keep_freed_memory()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    os.environ.setdefault(
      "TRANSFORMERS_VERBOSITY", "error"
    )  # that torch is not installed is no news here
    distributed.watch_signals()
    import jax  # noqa: F401  after the allocator is set, before any array exists

    try:
      if folder := _cache_folder():
        _keep_compiled(folder)
      _join()
      main()
      distributed.finish()
    except distributed.Stopped:
      distributed.finish()
      said = "stopped by SIGTERM; what was done is saved. The same command goes on."
      print(f"{_program(argv)}: {said}", file=sys.stderr)
      sys.exit(distributed.PREEMPTED)
    except Exception as error:
      meant = error if isinstance(error, UserError) else of_files(error)
      if meant is None:
        distributed.await_verdict()
        if distributed.count() > 1:
          traceback.print_exc()
      distributed.fail(str(meant or f"{type(error).__name__}: {error}"))
      if meant is None:
        raise
      print(f"{_program(argv)}: {meant}", file=sys.stderr)
      sys.exit(1)

  app.run(start, flags_parser=_parse_or_exit)
