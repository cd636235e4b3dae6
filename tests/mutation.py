"""Do the tests of core/ notice when core/ is wrong? Changes it in one place at a time, by seed, and
counts who notices.

  pip install cosmic-ray
  python tests/mutation.py [--mutants=300] [--seed=0] [--modules=tree,pairs] [--out=mutation.json]

A mutant is one of cosmic-ray's changes (an operator, a comparison, a number, a constant, a
decorator, a loop) at one place of one module. Mutants are drawn without replacement from all of
core/, so that a module has its share of them, and each is run against its own module's tests only,
with pytest -x, in a copy of the project.

  killed      a test fails, the import fails, or the tests take ten times as long
              (and ten seconds): the table tells the three apart
  survived    all tests pass; each is listed with its line and its change

Not drawn, since killing them would say nothing about the tests: what does not compile (cosmic-ray
takes the bare * of a signature for a product), and what differs from the module in annotations only
(the | of a union). How many of these came up is printed.

Before it starts, every module's tests must pass without a change, and fail where the module raises
when imported.

A mutant runs in a fork of a process that has imported JAX, but started no backend and no thread,
which spares it the imports, and all share JAX's cache of compiled programs; --fresh takes a new
interpreter for each instead. --again=FILE runs the survivors in FILE (written by --out) instead of
a draw. On one core a mutant takes two or three seconds.
"""

import ast
import difflib
import importlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would not survive a fork

from absl import app, flags  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORE = pathlib.Path("synthneg_jax/core")
TESTS = {"advantages": ("advantages_test", "confidence_test")}  # of the others <module>_test
IMPORTS = (  # what core/ and its tests import from outside, and what pytest's plugins do
  "absl.testing.parameterized",
  "hypothesis",
  "jax.test_util",
  "numpy",
  "pytest",
  "rapidfuzz.distance",
  "scipy.integrate",
  "scipy.special",
  "scipy.stats",
)
MOST_MEMORY = 12 << 30  # bytes that a mutant may take
VERDICTS = ("test", "import", "time")  # what kills

MUTANTS = flags.DEFINE_integer("mutants", 300, "How many mutants are run.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the draw.")
MODULES = flags.DEFINE_list("modules", None, "Modules of core/ to change; all by default.")
OUT = flags.DEFINE_string("out", None, "JSON file to write.")
AGAIN = flags.DEFINE_string(
  "again", None, "JSON file whose survivors are run again, instead of a draw."
)
FRESH = flags.DEFINE_bool("fresh", False, "Run each mutant in an interpreter of its own.")


class Bench:
  """A copy of the project in which one module at a time is changed."""

  def __init__(self, root: pathlib.Path, fresh: bool):
    for folder in ("synthneg_jax", "tests"):
      shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    self.root, self.fresh, self.log = root, fresh, root / "log"
    self.limits = {}
    os.environ |= {  # of what a mutant does not change; the key is the program itself
      "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if not fresh:
      for name in IMPORTS:
        importlib.import_module(name)
      threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
      if threads > 1:
        sys.exit(f"{threads} threads are running, which a fork would lose: use --fresh.")
      warnings.filterwarnings(
        "ignore", message=r"os\.fork", category=RuntimeWarning
      )  # JAX fears for its threads

  def verdict(self, module: str, source: str | None = None) -> str:
    """One of VERDICTS, or "survived", of a module's tests when its source is another one."""
    path = self.root / CORE / f"{module}.py"
    original = path.read_text()
    files = [f"tests/core/{name}.py" for name in TESTS.get(module, (f"{module}_test",))]
    arguments = ["-x", "-q", "-p", "no:cacheprovider", *files]
    try:
      if source is not None:
        path.write_text(source)
      pid = self._start(arguments)
      status = _wait(pid, self.limits.get(module))
    finally:
      path.write_text(original)
    if status is None:
      return "time"
    if status == 0:
      return "survived"
    return "import" if "ERROR collecting" in self.log.read_text(errors="replace") else "test"

  def prove(self, module: str):
    """Sets a module's time limit. Exits where its tests fail without a change, or pass without the
    module.
    """
    start = time.monotonic()
    verdict = self.verdict(module)
    if verdict != "survived":
      sys.exit(f"The tests of core/{module}.py fail without any change:\n{self.log.read_text()}")
    self.limits[module] = 10.0 + 10.0 * (time.monotonic() - start)
    if self.verdict(module, "raise RuntimeError\n") != "import":
      sys.exit(f"The tests of core/{module}.py do not import the copy that is changed.")

  def _start(self, arguments: list[str]) -> int:
    if self.fresh:
      environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(self.root)}
      command = [sys.executable, "-m", "pytest", *arguments]
      with self.log.open("w") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        return subprocess.Popen(
          command, cwd=self.root, env=environment, start_new_session=True, **streams
        ).pid
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
      status = 3
      try:
        status = self._test(arguments)
      except BaseException:
        traceback.print_exc()
      finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return pid

  def _test(self, arguments: list[str]) -> int:
    """In the fork: a process group, an output and a path of its own, then pytest."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
      os.dup2(file, stream)
    os.chdir(self.root)
    sys.path[0] = str(self.root)
    sys.dont_write_bytecode = True
    import pytest

    return int(pytest.main(arguments))


def _wait(pid: int, limit: float | None) -> int | None:
  """The exit status of a process, negative for a signal; None where it, and all it started, had to
  be killed.
  """
  start, done = time.monotonic(), 0
  try:
    while limit is None or time.monotonic() - start <= limit:
      done, status = os.waitpid(pid, os.WNOHANG)
      if done:
        return os.waitstatus_to_exitcode(status)
      time.sleep(0.01)
    return None
  finally:
    if not done:  # too slow, or Ctrl-C
      os.killpg(pid, signal.SIGKILL)
      os.waitpid(pid, 0)


def all_mutations(modules: list[str], folder: pathlib.Path) -> list:
  """cosmic-ray's mutations of the modules, in a fixed order."""
  from cosmic_ray import commands, work_db

  with work_db.use_db(str(folder / "session.sqlite"), mode=work_db.WorkDB.Mode.create) as database:
    commands.init([ROOT / CORE / f"{module}.py" for module in modules], database, {})
    found = [item.mutations[0] for item in database.work_items]
  return sorted(found, key=lambda m: (m.module_path.stem, m.operator_name, m.occurrence))


def program(source: str) -> str:
  """What a source does, annotations apart."""
  tree = ast.parse(source)
  for node in ast.walk(tree):
    if getattr(node, "annotation", None):
      node.annotation = ast.Constant(None)
    if getattr(node, "returns", None):
      node.returns = None
  return ast.dump(tree)


def changed_lines(before: str, after: str) -> list[str]:
  lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
  return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


class Mutants:
  """Mutants made one by one, and why others were not."""

  def __init__(self, mutations: list):
    self.mutations = mutations
    self.sources = {m.module_path.stem: m.module_path.read_text() for m in mutations}
    self.programs = {module: program(source) for module, source in self.sources.items()}
    self.left_out = {"not Python": 0, "annotations only": 0}

  def __iter__(self) -> Iterator[tuple[dict, str]]:
    from cosmic_ray import mutating, plugins

    for mutation in self.mutations:
      module = mutation.module_path.stem
      operator = plugins.get_operator(mutation.operator_name)(**mutation.operator_args)
      source = mutating.mutate_code(self.sources[module], operator, mutation.occurrence)
      try:
        with warnings.catch_warnings(action="ignore"):
          compile(source, module, "exec")
          same = program(source) == self.programs[module]
      except SyntaxError:
        self.left_out["not Python"] += 1
        continue
      if same:
        self.left_out["annotations only"] += 1
        continue
      yield (
        {
          "module": module,
          "line": mutation.start_pos[0],
          "operator": operator_of(mutation),
          "occurrence": mutation.occurrence,
          "diff": changed_lines(self.sources[module], source),
        },
        source,
      )


def operator_of(mutation) -> str:
  return mutation.operator_name.removeprefix("core/")


def identity(result: dict) -> tuple:
  return result["module"], result["operator"], result["occurrence"], *result["diff"]


def describe(result: dict) -> str:
  where = f"{CORE / result['module']}.py:{result['line']}  {result['operator']}"
  return "\n".join([where, *(f"    {line}" for line in result["diff"])])


def table(results: list[dict], modules: list[str]) -> str:
  lines = [
    f"{'module':12}{'drawn':>7}{'killed':>8}{'by test':>9}{'import':>8}{'time':>6}"
    f"{'survived':>10}{'killed %':>10}"
  ]
  for module in (*modules, "all"):
    verdicts = [result["verdict"] for result in results if module in (result["module"], "all")]
    if verdicts:
      by = [verdicts.count(verdict) for verdict in VERDICTS]
      rate = 100.0 * sum(by) / len(verdicts)
      counts = f"{by[0]:9}{by[1]:8}{by[2]:6}{len(verdicts) - sum(by):10}"
      lines.append(f"{module:12}{len(verdicts):7}{sum(by):8}{counts}{rate:10.1f}")
  return "\n".join(lines)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"Unknown argument {argv[1]!r}.")
  try:
    importlib.import_module("cosmic_ray")
  except ImportError:
    sys.exit("cosmic-ray is not installed: pip install cosmic-ray.")
  known = sorted(path.stem for path in (ROOT / CORE).glob("*.py") if path.stem != "__init__")
  modules = sorted(MODULES.value or known)
  if unknown := sorted(set(modules) - set(known)):
    sys.exit(f"No module {', '.join(unknown)} in core/: it has {', '.join(known)}.")
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    bench = Bench(folder / "copy", FRESH.value)
    for module in modules:
      bench.prove(module)
    run(modules, all_mutations(modules, folder), bench)


def run(modules: list[str], mutations: list, bench: Bench):
  print(f"{len(mutations)} mutations of {', '.join(modules)}.")
  mutants, wanted, most = Mutants(mutations), None, MUTANTS.value
  if AGAIN.value:
    earlier = json.loads(pathlib.Path(AGAIN.value).read_text())["mutants"]
    wanted = {identity(result) for result in earlier if result["verdict"] == "survived"}
    most = len(wanted)
    places = {key[:3] for key in wanted}
    mutants.mutations = [
      m for m in mutations if (m.module_path.stem, operator_of(m), m.occurrence) in places
    ]
  else:
    random.Random(SEED.value).shuffle(mutants.mutations)
  results, start = [], time.monotonic()
  for result, source in mutants:
    if wanted is not None and identity(result) not in wanted:
      continue
    began = time.monotonic()
    result["verdict"] = bench.verdict(result["module"], source)
    result["seconds"] = round(time.monotonic() - began, 2)
    results.append(result)
    if result["verdict"] == "survived":
      print(f"survived: {describe(result)}", flush=True)
    killed = sum(other["verdict"] != "survived" for other in results)
    left = (time.monotonic() - start) / len(results) * (most - len(results))
    if len(results) % 20 == 0 or len(results) == most:
      print(f"mutant {len(results)} of {most}: {killed} killed, {left:.0f} s left", flush=True)
    if len(results) == most:
      break
  survivors = [result for result in results if result["verdict"] == "survived"]
  print(f"\n{time.monotonic() - start:.0f} s. Not drawn: {mutants.left_out}.")
  if wanted and len(results) < most:
    print(f"{most - len(results)} of the earlier survivors no longer arise.")
  print(f"\n{table(results, modules)}\n\nSurvivors: {len(survivors)}")
  for result in sorted(survivors, key=lambda result: (result["module"], result["line"])):
    print(describe(result))
  if OUT.value:
    summary = {
      "seed": SEED.value,
      "fresh": FRESH.value,
      "left_out": mutants.left_out,
      "mutants": results,
    }
    pathlib.Path(OUT.value).write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  app.run(main)
