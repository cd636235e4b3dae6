"""MkDocs hook: the pages that no file holds. Home is the README, and what the code knows is read
from the code.

configuration.md: every leaf of the default tree with its value and comment. commands.md: each
command's --help. api/*.md: every public name of each room with its docstring. Pages of docs/ that
mkdocs.yml does not name go to the end of the menu.
"""

import ast
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures

from synthneg_jax import cli
from synthneg_jax.runtime import config_schema

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = (
  "core",
  "runtime",
  "models",
  "grading",
  "data",
  "tasks",
  "teacher",
  "decoding",
  "training",
  "report",
  "pipeline",
  "preflight",
  "experiments",
)


def configuration() -> str:
  """The page of all leaves, one table per section."""
  sections = {}
  for name, leaf in config_schema.LEAVES.items():
    sections.setdefault(name.split(".")[0], []).append((name, leaf))
  parts = [
    "# Configuration\n\nEvery leaf of the config. A config file (`configs/NAME.py`) changes some, "
    "the command line others: `--config.part.leaf=value`. An unknown leaf is refused with the "
    "nearest names, a value outside its range with the range. Leaves marked * say how something is "
    "computed or what is kept, not what comes out: they may change when a "
    "stage is resumed.\n"
  ]
  for section, leaves in sections.items():
    rows = "\n".join(_leaf_row(name, leaf) for name, leaf in leaves)
    header = "| leaf | default | values | unit | meaning |\n| --- | --- | --- | --- | --- |"
    parts.append(f"## {section}\n\n{header}\n{rows}\n")
  return "\n".join(parts)


def _leaf_row(name: str, leaf: config_schema.Leaf) -> str:
  mark = "" if leaf.changes_results else "*"
  default = repr(leaf.default)
  default = f"`` {default} ``" if "`" in default else f"`{default}`"
  cells = [f"`{name}`{mark}", default, leaf.domain, leaf.unit, leaf.doc]
  return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def commands() -> str:
  """The page of all commands and scripts, with the --help of each."""
  scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "tests/run.sh"]
  calls = {
    f"synthneg {name}": [sys.executable, "-m", "synthneg_jax.cli", name] for name in cli.COMMANDS
  }
  calls |= {f"bash {path.relative_to(ROOT)}": ["bash", str(path)] for path in scripts}

  def section(title: str) -> str:
    done = subprocess.run(
      [*calls[title], "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return f"## {title}\n\n```text\n{done.stdout.strip()}\n```\n"

  with futures.ThreadPoolExecutor(4) as pool:
    sections = list(pool.map(section, calls))
  about = (
    "`synthneg NAME` runs a command wherever the package is installed. In a checkout, `python "
    "launch/NAME.py` is the same command, with underscores for hyphens. Below is the `--help` of "
    "each command and of each shell script."
  )
  return f"# Commands\n\n{about}\n\n" + "\n".join(sections)


def public(source: str) -> Iterator[tuple[str, str, str | None]]:
  """(name, signature, docstring) of the public classes, functions, methods and properties of a
  module.
  """

  def functions(nodes, prefix=""):
    for node in nodes:
      if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
        kind = (
          ""
          if any(getattr(mark, "id", "") == "property" for mark in node.decorator_list)
          else ast.unparse(node.args)
        )
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        yield (
          f"{prefix}{node.name}",
          f"({kind}){returns}" if kind or not prefix else f"(){returns}",
          ast.get_docstring(node),
        )
      elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
        bases = ", ".join(map(ast.unparse, node.bases))
        yield f"{prefix}{node.name}", f"({bases})" if bases else "", ast.get_docstring(node)
        yield from functions(node.body, f"{prefix}{node.name}.")

  yield from functions(ast.parse(source).body)


def api(room: str) -> str:
  """The page of a room: its modules with their public names."""
  parts = [f"# synthneg_jax/{room}\n"]

  def fenced(text):
    return f"```text\n{text}\n```\n"

  for path in sorted((ROOT / "synthneg_jax" / room).rglob("*.py")):
    source = path.read_text()
    about, title = (
      ast.get_docstring(ast.parse(source)),
      path.relative_to(ROOT / "synthneg_jax").with_suffix("").as_posix(),
    )
    if path.name == "__init__.py":
      parts.insert(1, f"{about}\n") if path.parent.name == room else None
      continue
    parts.append(f"## {title}\n\n{fenced(about)}")
    for name, signature, docstring in public(source):
      parts.append(
        f"### {title.rpartition('/')[2]}.{name}\n\n"
        f"```python\n{name.rpartition('.')[2]}{signature}\n```\n"
      )
      parts.append(fenced(docstring) if docstring else "")
  return "\n".join(parts)


def _of_root(name: str) -> str:
  """A Markdown file of the root as a page of the site."""
  text = (ROOT / name).read_text()
  text = re.sub(r"\]\(docs/", "](", text)
  text = re.sub(r'(src|srcset)="docs/', r'\1="', text)
  for root, page in (
    ("README", "index"),
    ("CONTRIBUTING", "contributing"),
    ("CHANGELOG", "changelog"),
  ):
    text = text.replace(f"]({root}.md", f"]({page}.md")
  return re.sub(
    r"\[([^\]]+)\]\((LICENSE|CITATION\.cff|colab/[^)]*|synthneg_jax/[^)]*|configs/[^)]*)\)",
    r"\1",
    text,
  )


def pages() -> dict[str, str]:
  """Markdown by the page's path."""
  made = {"configuration.md": configuration(), "commands.md": commands()}
  made |= {f"api/{room}.md": api(room) for room in ROOMS}
  roots = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
  }
  return made | {page: _of_root(name) for page, name in roots.items()}


def on_config(config):
  """Adds to the menu what mkdocs.yml does not name."""
  named = set(re.findall(r"[\w/]+\.md", str(config.nav)))
  left = sorted(
    path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")
  )
  left = [path for path in left if path not in named]
  if left:
    config.nav.insert(-1, {"Results and more": left})
  reference = next(part["Reference"] for part in config.nav if "Reference" in part)
  reference.append({"Every public name": [f"api/{room}.md" for room in ROOMS]})
  return config


def on_files(files, config):
  """Adds the made pages."""
  from mkdocs.structure.files import File

  for path, text in pages().items():
    files.append(File.generated(config, path, content=text))
  return files


def on_page_markdown(markdown, page, config, files):
  """Makes links to what lies outside docs/ into ones to the repository."""
  address = re.search(r'^REPOSITORY = "(.+)"', (ROOT / "setup.py").read_text(), re.MULTILINE).group(
    1
  )
  outside = "../" * (1 + page.file.src_uri.count("/"))
  return markdown.replace(f"]({outside}", f"]({address}/blob/main/")
