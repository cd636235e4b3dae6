"""The notebooks of colab/: no logic, in step with their scripts, one address, and they run."""

import ast
import base64
import pathlib
import re
import shutil
import subprocess
import tempfile

import nbclient
import nbformat
import pytest
from absl.testing import absltest, parameterized

from tests import notebooks

pytestmark = pytest.mark.slow  # runs notebooks

_NAMES = notebooks.names()
_LOGIC = (
  ast.FunctionDef,
  ast.AsyncFunctionDef,
  ast.ClassDef,
  ast.Lambda,
  ast.While,
  ast.Try,
  ast.If,
)
_MOST_BYTES = 500_000
# What a run at small size changes; what is not here runs under --long only.
_SMALL = {
  "the_losses": "",
  "the_method_in_ten_minutes": "TRAIN_PROBLEMS, TEST_PROBLEMS = 120, 32",
  "the_star_graph": "TRAIN_PROBLEMS, TEST_PROBLEMS, BASE_STEPS = 24, 24, 4",
  "step_credit_on_a_text_of_yours": "TRAIN_PROBLEMS, NUM_ROLLOUTS = 96, 8",
}


def committed(name: str) -> nbformat.NotebookNode:
  return nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[str]:
  """Sources of the code cells, lines of the shell and of magics left out; the setup cell is all of
  those but one.
  """
  cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
  return [
    "\n".join(line for line in cell.split("\n") if not re.match(r"[!%]|  python", line))
    for cell in cells
  ]


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  found = [
    output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})
  ]
  return [base64.b64decode(picture) for picture in found]


class NotebookTest(parameterized.TestCase):
  def test_there_are_notebooks(self):
    # Fails if the folder is read wrongly, and so nothing below tests anything.
    self.assertGreaterEqual(len(_NAMES), 3)
    self.assertContainsSubset(_SMALL, _NAMES)

  @parameterized.parameters(*_NAMES)
  def test_defines_no_logic(self, name):
    # Fails if a cell defines a function or a class, branches, loops over more than a print, or
    # imports another project's part.
    for source in code(committed(name)):
      tree = ast.parse(source)
      for node in ast.walk(tree):
        self.assertNotIsInstance(node, _LOGIC, f"{name}: logic belongs into the package:\n{source}")
        if isinstance(node, ast.For):
          self.assertLessEqual(
            len(node.body), 2, f"{name}: a loop with so much in it is logic:\n{source}"
          )
      self.assertLessEqual(len(tree.body), 20, f"{name}: a long cell:\n{source}")

  @parameterized.parameters(*_NAMES)
  def test_notebook_and_script_agree(self, name):
    # Fails if one of the two is edited and not synced, or the setup cell or badge is not that of
    # setup.py's address.
    ours, pair, derived = committed(name), notebooks.script(name), notebooks.with_derived(name)

    def kept(notebook):
      return [
        (cell.cell_type, cell.source, sorted(cell.metadata.get("tags", ())))
        for cell in notebook.cells
      ]

    self.assertEqual(kept(ours), kept(pair))
    self.assertEqual(kept(pair), kept(derived))
    self.assertLen(notebooks.tagged(ours, "setup"), 1)
    self.assertIn(notebooks.badge(name), ours.cells[0].source)

  @parameterized.parameters(*_NAMES)
  def test_is_committed_as_it_came_out_of_a_run(self, name):
    # Fails if outputs were cleared, an error was committed, or the file is too large to be shown.
    ours = committed(name)
    self.assertLess((notebooks.FOLDER / f"{name}.ipynb").stat().st_size, _MOST_BYTES)
    self.assertGreaterEqual(len(pictures(ours)), 3)
    for output in (output for cell in ours.cells for output in cell.get("outputs", ())):
      self.assertNotEqual(output.output_type, "error")
      self.assertNotRegex(
        str(output.get("text", output.get("data", {}).get("text/plain"))),
        r"/(root|home|work|Users)/",
      )
      self.assertNotEqual(output.get("name"), "stderr", f"{name}: {output.get('text')}")
    ran = [
      cell
      for cell in ours.cells
      if cell.cell_type == "code" and cell not in notebooks.tagged(ours, "setup")
    ]
    self.assertNotIn(None, [cell.execution_count for cell in ran])

  def test_page_lists_all_with_their_badges(self):
    # Fails if a notebook is not listed, or a badge leads elsewhere.
    page = notebooks.PAGE.read_text()
    self.assertEqual(page, notebooks.with_badges(page))
    for name in _NAMES:
      self.assertIn(f"(../colab/{name}.ipynb)", page)
      self.assertIn(notebooks.badge(name), page)

  @parameterized.parameters(
    ((), ""),
    (("nvidia0",), "[cuda]"),
    (("accel0",), "[tpu]"),
    (("vfio/0",), "[tpu]"),
    (("nvidia0", "accel0"), "[cuda]"),
  )
  def test_extra_follows_the_hardware(self, present, extra):
    # Fails if a machine with a GPU is given the TPU's packages too, or one without either an extra
    # that pip refuses.
    with tempfile.TemporaryDirectory() as devices:
      (pathlib.Path(devices) / "vfio").mkdir()
      for name in present:
        (pathlib.Path(devices) / name).touch()
      line = re.search(r'--editable "(.*)"', notebooks.SETUP).group(1)
      line = re.sub(r"/dev/(?!null)", f"{devices}/", line)
      told = subprocess.run(
        ["sh", "-c", f'printf %s "{line}"'], capture_output=True, text=True, check=True
      )
    self.assertEqual(told.stdout, "." + extra)

  def test_the_address_stands_in_one_place(self):
    # Fails if the address is typed in anywhere that is not derived from setup.py's constant.
    derived = {
      notebooks.FOLDER / f"{name}.{ending}" for name in _NAMES for ending in ("py", "ipynb")
    }
    elsewhere = [
      path
      for folder in ("synthneg_jax", "launch", "configs", "colab", "tests")
      for path in (notebooks.ROOT / folder).rglob("*")
      if path.suffix in (".py", ".sh", ".ipynb", ".toml") and path not in derived
      if "github.com/OWNER" in path.read_text() and path != pathlib.Path(__file__).resolve()
    ]
    self.assertEmpty(elsewhere)


class RunTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix="notebooks_"))
    self.addCleanup(shutil.rmtree, self.folder)

  @parameterized.parameters(*_SMALL.items())
  def test_runs_at_small_size(self, name, given):
    # Fails if a notebook uses what the package no longer has, or draws nothing.
    made = notebooks.executed(notebooks.script(name), self.folder, given)
    self.assertEqual(len(pictures(made)), len(pictures(committed(name))))
    self.assertEqual(
      [cell.source for cell in made.cells], [cell.source for cell in committed(name).cells]
    )

  def test_a_failing_cell_fails_the_run(self):
    # Fails if errors are swallowed, and so the test above passes whatever happens.
    broken = nbformat.v4.new_notebook(
      cells=[nbformat.v4.new_code_cell("import synthneg_jax.no_such_room")]
    )
    with self.assertRaisesRegex(nbclient.exceptions.CellExecutionError, "no_such_room"):
      notebooks.executed(broken)

  @parameterized.parameters(*_NAMES)
  @pytest.mark.long
  def test_runs_at_full_size(self, name):
    # Fails if a notebook as it is given to people does not run through.
    made = notebooks.executed(notebooks.script(name), self.folder, timeout_s=1200)
    self.assertEqual(len(pictures(made)), len(pictures(committed(name))))


if __name__ == "__main__":
  absltest.main()
