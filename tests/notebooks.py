"""The notebooks of colab/: keeps their derived parts in step, and runs them.

    python -m tests.notebooks        rewrites setup cells and badges, and syncs scripts
    python -m tests.notebooks --run  also runs all, or those named, and stores their output

A setup cell clones the project from REPOSITORY of setup.py, the one place that holds the address. A
run replaces that cell by one that goes to this checkout; the committed notebook keeps the real one.
"""

import argparse
import os
import pathlib
import re
import resource
import time

import jupytext
import nbclient
import nbformat
from jupytext import combine

from tests.xla_flags import xla_flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "colab"
PAGE = ROOT / "docs" / "notebooks.md"
REPOSITORY = re.search(
  r'^REPOSITORY = "(.+)"', (ROOT / "setup.py").read_text(), re.MULTILINE
).group(1)
_EXTRA = (  # of setup.py, by what hardware there is; no braces, which IPython reads
  "$(ls /dev/nvidia0 > /dev/null 2>&1 && echo [cuda] || (ls /dev/accel* /dev/vfio/[0-9]* 2> "
  "/dev/null | grep -q . && echo [tpu]))"
)
SETUP = f"""import sys

REPOSITORY = "{REPOSITORY}"
!git clone --quiet --depth=1 {{REPOSITORY}} synthneg_jax
%cd -q synthneg_jax
!{{sys.executable}} -m pip install --quiet --editable ".{_EXTRA}\""""
_BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)|^BADGE$", re.MULTILINE)


_NOT_FOR_NOTEBOOKS = (
  "XLA_FLAGS",
  "SYNTHNEG_DATA_DIR",
)  # set by pytest; data that others do not have


def names() -> list[str]:
  """Of all notebooks, without endings."""
  return sorted(path.stem for path in FOLDER.glob("*.py"))


def badge(name: str) -> str:
  """The button, in Markdown, that opens a notebook in Colab."""
  owner = REPOSITORY.removeprefix("https://github.com/")
  target = f"https://colab.research.google.com/github/{owner}/blob/main/colab/{name}.ipynb"
  return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({target})"


def with_badges(page: str) -> str:
  """A page of Markdown whose lines that name a notebook have its badge, not another one."""

  def named(line):
    return re.search(r"colab/(\w+)\.ipynb", line)

  return "\n".join(
    _BADGE.sub(badge(named(line).group(1)), line) if named(line) else line
    for line in page.split("\n")
  )


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
  """The cells with a tag."""
  return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def script(name: str) -> nbformat.NotebookNode:
  """A notebook as its script has it, without outputs."""
  return jupytext.read(FOLDER / f"{name}.py")


def with_derived(name: str) -> nbformat.NotebookNode:
  """The same with setup cell and badge as they should be."""
  notebook = script(name)
  for cell in tagged(notebook, "setup"):
    cell.source = SETUP
  notebook.cells[0].source = _BADGE.sub(badge(name), notebook.cells[0].source)
  return notebook


def executed(
  notebook: nbformat.NotebookNode,
  folder: pathlib.Path | None = None,
  given: str = "",
  timeout_s: int = 600,
) -> nbformat.NotebookNode:
  """Runs a notebook in this checkout.

  Args:
    notebook: changed in place, but for its cells' sources, which come back as they were.
    folder: its runs/ are put here; None for the checkout.
    given: code that is run after each cell tagged "parameters".
    timeout_s: of one cell.

  Returns:
    The notebook with outputs.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell has failed.
  """
  kept = {id(cell): cell.source for cell in notebook.cells}
  for cell in tagged(notebook, "setup"):
    cell.source = f"import os, sys\nos.chdir({str(ROOT)!r})\nsys.path.insert(0, {str(ROOT)!r})"
  for cell in tagged(notebook, "parameters"):
    cell.source += f"\n{given}" + (f"\nWORKDIR = {str(folder)!r} + '/' + WORKDIR" if folder else "")
  environment = {key: value for key, value in os.environ.items() if key not in _NOT_FOR_NOTEBOOKS}
  if "XLA_FLAGS" in os.environ:  # pytest's: as fast to compile, on the one device that a user has
    environment["XLA_FLAGS"] = xla_flags(1)
  client = nbclient.NotebookClient(notebook, timeout=timeout_s, kernel_name="python3", resources={})
  try:
    client.execute(env=environment)
  finally:
    for cell in notebook.cells:
      cell.source = kept[id(cell)]
  return notebook


def without_bars(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
  """The notebook, changed in place, without the text of progress bars and tqdm's warning that it
  cannot draw better ones.
  """
  for cell in notebook.cells:
    for output in cell.get("outputs", ()):
      if output.output_type == "stream":
        bar = "\r" in output.text or "TqdmWarning" in output.text
        output.text = "" if bar else output.text.lstrip("\n")
    if cell.cell_type == "code":
      cell.outputs = [output for output in cell.outputs if output.get("text") != ""]
  return notebook


def write(name: str, run: bool) -> None:
  """Brings one notebook and its script up to date, and runs it if asked to."""
  notebook, path = with_derived(name), FOLDER / f"{name}.ipynb"
  text = jupytext.writes(notebook, fmt="py:percent")
  text = re.sub(
    r"#   jupytext:\n(#     .*\n)+(?=#   kernelspec)", "", text
  )  # versions, which jupytext --sync leaves out, too
  (FOLDER / f"{name}.py").write_text(text)
  if run:
    start, of_kernels = time.time(), lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = of_kernels()
    notebook = without_bars(executed(notebook))
    print(f"{name}: {time.time() - start:.0f} s, {of_kernels() - before:.0f} s of processors")
  elif path.exists():
    notebook = combine.combine_inputs_with_outputs(notebook, nbformat.read(path, as_version=4))
  for number, cell in enumerate(notebook.cells):
    cell["id"] = f"{name}-{number}"
    cell.metadata = {"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {}
  notebook.metadata.pop("language_info", None)
  nbformat.write(notebook, path)


def main() -> None:
  """See the module's docstring."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--run", action="store_true", help="run the notebooks and keep their outputs")
  parser.add_argument(
    "names", nargs="*", help="of notebooks, without endings; all if none is given"
  )
  args = parser.parse_args()
  for name in args.names or names():
    write(name, args.run)
  PAGE.write_text(with_badges(PAGE.read_text()))


if __name__ == "__main__":
  main()
