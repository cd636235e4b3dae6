"""tests/pythons.sh with stand-ins for interpreters: which it finds, what it runs, and when it
fails.
"""

import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest
from absl.testing import absltest

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[1]


class PythonsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    for folder in ("tree/tests", "tree/launch", "bin", "pyenv/versions/3.13.0/bin"):
      (self.root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "tests/pythons.sh", self.root / "tree/tests")
    self.program(
      "tree/launch/make_venv.sh", 'mkdir -p "$VENV/bin"; cp "$PYTHON" "$VENV/bin/python"'
    )
    self.program("bin/pyenv", f"echo {self.root / 'pyenv'}")

  def program(self, path: str, body: str):
    file = self.root / path
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)

  def python(self, path: str, version: str, status: int = 0):
    self.program(
      path,
      f'[ "$1" = --version ] && echo "Python {version}" || {{ echo "$@" >> {self.root}/ran; exit '
      f"{status}; }}",
    )

  def run_script(self, **env):
    return subprocess.run(
      ["bash", "tests/pythons.sh", "-k", "x"],
      cwd=self.root / "tree",
      env={"PATH": f"{self.root / 'bin'}:/usr/bin:/bin"} | env,
      capture_output=True,
      text=True,
      check=False,
    )

  def test_what_is_found(self):
    # Fails if PATH or pyenv is passed over, what does not answer is taken for an interpreter, or
    # its tests are not run.
    self.program("bin/python3.11", "exit 127")
    self.python("bin/python3.12", "3.12.1")
    self.python("pyenv/versions/3.13.0/bin/python", "3.13.0")
    done = self.run_script()
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(done.stdout, "pythons.sh: the fast tests ran on 3.12 3.13.\n")
    lines = (self.root / "ran").read_text().splitlines()
    self.assertEqual(
      lines, ["-m pytest tests --ignore=tests/parity --fast -n2 --dist=loadfile -k x"] * 2
    )

  def test_one_that_must_run(self):
    # Fails if a version that is asked for and does not run goes unseen, whether it is missing or
    # its tests fail.
    self.python("bin/python3.12", "3.12.1")
    done = self.run_script(SYNTHNEG_PYTHONS="3.12 3.13")
    self.assertEqual(done.returncode, 1)
    self.assertIn("SYNTHNEG_PYTHONS names 3.13, and no Python 3.13 is found.", done.stderr)
    self.python("pyenv/versions/3.13.0/bin/python", "3.13.0", status=3)
    self.assertNotEqual(self.run_script(SYNTHNEG_PYTHONS="3.13").returncode, 0)

  def test_none(self):
    # Fails if a machine with one Python cannot run its tests.
    os.remove(self.root / "bin/pyenv")
    if not any(
      pathlib.Path(f"/usr/bin/python{version}").exists() for version in ("3.11", "3.12", "3.13")
    ):
      done = self.run_script()
      self.assertEqual(
        (done.returncode, done.stdout),
        (0, "pythons.sh: the fast tests ran on no further Python.\n"),
      )


if __name__ == "__main__":
  absltest.main()
