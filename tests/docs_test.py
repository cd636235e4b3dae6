"""Every command that README, docs and launch/ name exists, in both forms, and takes the flags that
they give it.
"""

import ast
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl.testing import absltest, parameterized

from synthneg_jax import cli
from synthneg_jax.runtime import config_schema

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
  ROOT / "README.md",
  ROOT / "CONTRIBUTING.md",
  *sorted((ROOT / "docs").rglob("*.md")),
  *sorted((ROOT / "launch").glob("*.py")),
  *sorted((ROOT / "launch").glob("*.sh")),
  *sorted((ROOT / "configs").glob("*.py")),
  *sorted((ROOT / "colab").glob("*.py")),
]


def commands() -> list[tuple[str, list[str]]]:
  """(page, words) of every indented command line that runs something of ours."""
  found = []
  for page in PAGES:
    for line in re.sub(r"\\\n[\s#]*", "", page.read_text()).splitlines():
      match = re.match(
        r"\s*(?:#\s+)?!?(?:\.venv/bin/)?((?:(?:python|bash) (?:launch|tests)/|synthneg )\S+.*)",
        line,
      )
      if match:
        text = match.group(1).split("  #")[0].replace("…", "X").replace("[", "").replace("]", "")
        options = re.search(r"\{([\w,]+)\}", text)
        for name in options.group(1).split(",") if options else [None]:
          found.append(
            (page.name, shlex.split(text if name is None else text.replace(options.group(0), name)))
          )
  return found


class CommandsTest(parameterized.TestCase):
  def test_there_are_commands(self):
    # Fails if the pattern above finds nothing, and so the test below tests nothing.
    found = commands()
    self.assertGreater(len(found), 25)
    self.assertGreater(len([words for _, words in found if words[0] == "synthneg"]), 3)

  def test_each_names_a_program_and_flags_that_exist(self):
    # Fails if a program is renamed, or a flag or a leaf of the config dropped, and a page still
    # names it.
    helps, leaves = {}, {name for name, _ in config_schema.leaves(config_schema.default())}
    for page, words in commands():
      if words[0] == "synthneg":
        program, runner = (
          pathlib.Path(f"{words[1]}.py"),
          [sys.executable, "-m", "synthneg_jax.cli", words[1]],
        )
        self.assertIn(words[1], cli.COMMANDS, f"{page}: {' '.join(words)}")
      else:
        program = ROOT / words[1]
        runner = [sys.executable if program.suffix == ".py" else "bash", str(program)]
        self.assertTrue(program.exists(), f"{page}: {' '.join(words)}")
      if program not in helps:
        helps[program] = subprocess.run(
          [*runner, "--help"], capture_output=True, text=True, check=False
        ).stdout
      for word in words[2:]:
        leaf = re.match(r"--config\.([\w.]+)=", word)
        if leaf and leaf.group(1) != "part.leaf":
          self.assertIn(leaf.group(1), leaves, f"{page}: {' '.join(words)}")
        flag = re.match(r"--(\w+)", word)
        if flag and not word.startswith("--config."):
          wanted = (
            rf"(?m)^\s+--(\[no\])?{flag.group(1)}\b"
            if program.suffix == ".py"
            else rf"--{flag.group(1)}\b"
          )
          self.assertRegex(helps[program], wanted, f"{page}: {' '.join(words)}")

  def test_python_blocks(self):
    # Fails if a block is no Python, or imports or calls from the package what is not there.
    blocks = [
      (page, block)
      for page in PAGES
      for block in re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text())
    ]
    self.assertNotEmpty(blocks)
    for page, block in blocks:
      tree, names = ast.parse(block), {}
      ours = [
        node
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module.startswith("synthneg_jax")
      ]
      exec(compile(ast.Module(ours, []), page.name, "exec"), names)
      for node in ast.walk(tree):
        if (
          isinstance(node, ast.Attribute)
          and isinstance(node.value, ast.Name)
          and node.value.id in names
        ):
          self.assertTrue(
            hasattr(names[node.value.id], node.attr), f"{page.name}: {ast.unparse(node)}"
          )

  def test_configs_are_files_that_load(self):
    # Fails if a page names a config, or an argument of one, that is not there.
    modules = {}
    for path in sorted(
      (ROOT / "configs").glob("*.py")
    ):  # by path: math.py must not hide Python's own
      spec = importlib.util.spec_from_file_location(f"{path.stem}_config", path)
      modules[path.stem] = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(modules[path.stem])
    named = set()
    for page in PAGES:
      named |= set(re.findall(r"configs/(\w+)\.py(?::([\w=,]+))?", page.read_text()))
      named |= set(
        re.findall(r"--config=(\w+)(?::([\w=,]+))?(?= |$)", page.read_text(), re.MULTILINE)
      )
    named -= {("NAME", "")}
    self.assertNotEmpty(named)
    for name, argument in sorted(named):
      modules[name].get_config(*([argument] if argument else []))
    for model in ("deepseek_math_7b", "llama2_7b"):
      for name in ("gsm8k", "math"):
        self.assertEqual(modules[name].get_config(f"model={model}").model.dtype, "bfloat16")


if __name__ == "__main__":
  absltest.main()
