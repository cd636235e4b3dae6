"""The command line: help in both forms, refusals, and the wheel outside a checkout."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent import futures

import pytest
from absl.testing import absltest, parameterized

from synthneg_jax import cli
from tests.xla_flags import xla_flags

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[1]
SYNTHNEG = [sys.executable, "-m", "synthneg_jax.cli"]


def run(command, cwd=ROOT, **env):
  """The finished process of a command, with its output as text."""
  environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
  return subprocess.run(
    list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd, env=environment
  )


def launcher(name: str) -> pathlib.Path:
  """The file of launch/ that runs a command."""
  return ROOT / "launch" / f"{name.replace('-', '_')}.py"


def temporary_folder(case) -> pathlib.Path:
  return pathlib.Path(case.enterContext(tempfile.TemporaryDirectory())).resolve()


class HelpTest(parameterized.TestCase):
  def test_every_command_in_both_forms(self):
    # Fails if a command's --help exits with another status than 0, prints elsewhere than to stdout,
    # lacks a flag that its usage line names, or imports jax or transformers, which take seconds.
    heavy = temporary_folder(self)
    for name in ("jax", "transformers"):
      (heavy / f"{name}.py").write_text(f"raise SystemExit('{name} is imported')")
    forms = []
    for name in cli.COMMANDS:
      forms.append((name, f"synthneg {name}", [*SYNTHNEG, name, "--help"]))
      forms.append(
        (name, f"python launch/{launcher(name).name}", [sys.executable, launcher(name), "--help"])
      )
    with futures.ThreadPoolExecutor(2) as pool:
      finished = list(
        pool.map(lambda form: run(form[2], cwd=heavy, PYTHONPATH=f"{heavy}:{ROOT}"), forms)
      )
    for (name, invocation, _), done in zip(forms, finished, strict=True):
      command = cli.COMMANDS[name]
      self.assertEqual((done.returncode, done.stderr), (0, ""), invocation)
      self.assertStartsWith(done.stdout, command.about)
      self.assertIn(f"\n  {invocation} {command.usage}\n", done.stdout)
      for flag in re.findall(r"--(\w+)", command.usage):
        self.assertRegex(done.stdout, rf"(?m)^  --(\[no\])?{flag}: ", invocation)

  def test_the_list(self):
    # Fails if --help without a command fails, or leaves a command out.
    done = run([*SYNTHNEG, "--help"])
    self.assertEqual((done.returncode, done.stderr), (0, ""))
    self.assertEqual(re.findall(r"(?m)^  ([\w-]+)  ", done.stdout), list(cli.COMMANDS))

  def test_launch_has_the_same_commands(self):
    # Fails if a command has no file in launch/, a file no command, or a file shows another usage
    # line than --help.
    self.assertEqual(set((ROOT / "launch").glob("*.py")), set(map(launcher, cli.COMMANDS)))
    for name, command in cli.COMMANDS.items():
      about = command.about.splitlines()[0]
      usage = f"python launch/{launcher(name).name} {command.usage}"
      tree = ast.parse(launcher(name).read_text())
      words = ast.get_docstring(tree).split()  # whatever the line breaks
      self.assertEqual(words, f"{about} {usage}".split())
      self.assertIn(f"cli.main('{name}')", ast.unparse(tree))

  def test_every_stage_is_a_command(self):
    # Fails if a stage is added to pipeline/stages.py and not to the command line, or the other way
    # round.
    from synthneg_jax.pipeline import stages

    commands = {*cli._STAGES, "report"}
    self.assertEqual(commands, set(stages.STAGES) - {"traces"})  # `report --view=traces`

  def test_preflight_sets_the_environment_first(self):
    # Fails if jax is imported before preflight has told it to look for no chip.
    source = (
      "import os, sys\nfrom synthneg_jax import cli\n"
      "cli.COMMANDS['preflight'].define_flags()\nassert 'jax' not in "
      "sys.modules\nprint(os.environ['JAX_PLATFORMS'])"
    )
    done = run([sys.executable, "-c", source], JAX_PLATFORMS="tpu")
    self.assertEqual((done.returncode, done.stdout), (0, "cpu\n"), done.stderr)


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    ((), "synthneg: the command is missing"),
    (("--workdir=x",), "synthneg: the command is missing"),
    (("pipelin",), "synthneg: unknown command 'pipelin'; did you mean 'pipeline'?"),
    (("import_trace",), "synthneg: unknown command 'import_trace'; did you mean 'import-traces'?"),
    (
      ("sft", "--config=arithmetc", "--workdir=x"),
      "unknown config 'arithmetc'; did you mean 'arithmetic'?",
    ),
    (
      ("sft", "--config=configs/none.py", "--workdir=x"),
      "synthneg sft: --config: configs/none.py does not exist.",
    ),
    (
      ("sft", "--config=arithmetic", "--workdirs=x"),
      "synthneg sft: Unknown command line flag 'workdirs'",
    ),
    (
      ("sft", "--config=arithmetic", "--workdir=x", "extra"),
      "synthneg sft: unexpected argument 'extra'; flags begin with --.",
    ),
    (
      ("import_traces", "--config=arithmetic", "--workdir=x"),
      "synthneg import-traces: flag --traces=None",
    ),
    (("get-smollm2", "--folder=x"), "synthneg get-smollm2: Unknown command line flag 'folder'"),
  )
  def test_one_sentence(self, words, sentence):
    # Fails if a slip of the keyboard ends in a traceback or with status 0, or if the sentence does
    # not say what is meant.
    done = run([*SYNTHNEG, *words])
    self.assertEqual((done.returncode, done.stdout), (1, ""))
    self.assertIn(sentence, done.stderr)
    self.assertLen(done.stderr.splitlines(), 1)


def build_wheel(folder: pathlib.Path) -> pathlib.Path:
  """The project's wheel, built from a copy of what setup.py names, so that nothing else of the
  checkout gets into it.
  """
  source = folder / "source"
  source.mkdir()
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  for name in ("synthneg_jax", "configs"):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  pip = [
    sys.executable,
    "-m",
    "pip",
    "wheel",
    "--no-deps",
    "--quiet",
    "--disable-pip-version-check",
  ]
  done = run([*pip, f"--wheel-dir={folder}", source])
  assert done.returncode == 0, done.stderr
  (wheel,) = folder.glob("*.whl")
  return wheel


class WheelTest(absltest.TestCase):
  """The installed package, in a folder that holds nothing of the checkout."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory())).resolve()
    cls.wheel = build_wheel(cls.folder)
    cls.empty = cls.folder / "empty"
    cls.empty.mkdir()

  def install(self, name: str, borrow: bool) -> pathlib.Path:
    """bin/ of a new virtual environment that holds the wheel, and what it needs: this Python's
    packages or new ones.
    """
    venv = self.folder / name
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", "--quiet"]
    pip.append("--disable-pip-version-check")
    done = run([sys.executable, "-m", "venv", "--without-pip", venv], cwd=self.empty)
    self.assertEqual(done.returncode, 0, done.stderr)
    # Without PYTHONPATH: beside the sources lies the metadata of the editable install, which pip
    # would take for this one.
    done = run(
      [*pip, *(["--no-deps"] if borrow else []), self.wheel], cwd=self.empty, PYTHONPATH=""
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    if borrow:  # afterwards, for the same reason
      (packages,) = venv.glob(
        "lib/python*/site-packages"
      )  # a .pth file within a borrowed folder is not read
      (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin"

  def check_smoke(self, path: pathlib.Path) -> None:
    """Runs the whole recipe at toy size from the empty folder."""
    workdir = path.parent / "run"
    command = [path / "synthneg", "pipeline", "--config=arithmetic:smoke", f"--workdir={workdir}"]
    done = run(
      command, cwd=self.empty, PYTHONPATH="", XLA_FLAGS=xla_flags(1)
    )  # one device, as an ordinary user has
    self.assertEqual(done.returncode, 0, done.stderr)
    summary = json.loads((workdir / "summary.json").read_text())
    self.assertEqual(list(summary["methods"]), ["base", "sft", "rft", "dpo", "step_dpo"])
    self.assertEqual(
      json.loads((workdir / "config.json").read_text())["git_commit"], ""
    )  # of no checkout
    self.assertTrue((workdir / "report/index.html").exists())
    self.assertEqual(list(self.empty.iterdir()), [])

  def test_smoke_outside_a_checkout(self):
    # Fails if the wheel lacks a module, a config, the prompts or the embedded base model; if the
    # console script or a bare config name does not work; if a command needs the checkout and does
    # not say so; or if the checkout is imported.
    path = self.install("borrowing", borrow=True)
    source = (
      "import synthneg_jax\nfrom synthneg_jax.teacher import synthesis\n"
      "for name in ('gsm8k', 'math', 'arithmetic'):\n  "
      "synthesis.Templates.read(f'configs/prompts/{name}')\n"
      "print(synthneg_jax.__file__)"
    )
    done = run([path / "python", "-c", source], cwd=self.empty, PYTHONPATH="")
    self.assertStartsWith(done.stdout, f"{path.parent}/lib/", done.stderr)
    done = run([path / "synthneg", "benchmark", "--suite=train"], cwd=self.empty, PYTHONPATH="")
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr, r"^synthneg benchmark: Benchmarks come with a checkout .*\n$")
    self.check_smoke(path)

  @pytest.mark.long
  def test_full_install(self):
    # Fails if setup.py leaves out a package that the recipe imports, or names a version that does
    # not do.
    path = self.install("full", borrow=False)
    self.check_smoke(path)


if __name__ == "__main__":
  absltest.main()
