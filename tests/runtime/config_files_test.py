"""Locating the files of --config and synthesis.prompts."""

import os
import pathlib
import tempfile

from absl.testing import absltest, parameterized

from synthneg_jax.runtime import config_files
from synthneg_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


class ConfigFilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.addCleanup(os.chdir, os.getcwd())
    os.chdir(self.folder)

  @parameterized.parameters(
    ("arithmetic", f"{ROOT}/configs/arithmetic.py"),
    ("arithmetic:smoke", f"{ROOT}/configs/arithmetic.py:smoke"),
    ("gsm8k:model=x,smoke", f"{ROOT}/configs/gsm8k.py:model=x,smoke"),
    ("configs/arithmetic.py:smoke", f"{ROOT}/configs/arithmetic.py:smoke"),
    ("/elsewhere/mine.py:a:b", "/elsewhere/mine.py:a:b"),
    ("mine.py", "mine.py"),
    ("", ""),
  )
  def test_resolve(self, value, path):
    # Fails if a bare name or a path of the checkout depends on the working directory, or if an
    # argument is lost.
    self.assertEqual(config_files.resolve(value), path)

  def test_a_file_of_ones_own_wins(self):
    # Fails if configs/... of the working directory gives way to the file of that name that comes
    # with the project.
    (self.folder / "configs").mkdir()
    (self.folder / "configs/arithmetic.py").write_text("")
    self.assertEqual(config_files.resolve("configs/arithmetic.py:x"), "configs/arithmetic.py:x")
    self.assertEqual(config_files.resolve("arithmetic"), f"{ROOT}/configs/arithmetic.py")

  def test_unknown_names(self):
    # Fails if an unknown name passes, or if the names are not listed.
    with self.assertRaisesRegex(
      UserError,
      r"unknown config 'gsm8'; did you mean 'gsm8k'\? The shipped configs are arithmetic, ",
    ):
      config_files.resolve("gsm8:smoke")

  def test_resolve_flag(self):
    # Fails if a form of the flag is overlooked, or if another flag is taken for it.
    argv = [
      "p",
      "--config.seed=math",
      "--configs=math",
      "--config=math",
      "-config=math",
      "--config",
      "math",
      "--config",
    ]
    path = f"{ROOT}/configs/math.py"
    config_files.resolve_flag(argv)
    expected = [
      "p",
      "--config.seed=math",
      "--configs=math",
      f"--config={path}",
      f"-config={path}",
      "--config",
      path,
    ]
    self.assertEqual(argv, [*expected, "--config"])

  def test_shipped_folders(self):
    # Fails if the prompts are found from the checkout alone.
    self.assertEqual(
      config_files.shipped_path("configs/prompts/gsm8k"), ROOT / "configs/prompts/gsm8k"
    )
    self.assertEqual(config_files.shipped_path("prompts/gsm8k"), pathlib.Path("prompts/gsm8k"))


if __name__ == "__main__":
  absltest.main()
