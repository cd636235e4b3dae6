"""The rooms of the project and the arrows between them, read from the sources."""

import ast
import pathlib
import sys
from collections.abc import Iterator

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "synthneg_jax"
ROOMS = (  # low to high: a room knows those before it
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
  "benchmarks",
  "cli",
  "launch",
)
ARRAY_MODULES = ("tree", "losses", "advantages", "masked_stats")
NO_NAMES = ("utils", "util", "helpers", "helper", "misc", "common")


def sources(*folders: str) -> dict[str, str]:
  """Text of every module by its dotted name: synthneg_jax.core.tree, launch.sft."""
  found = {}
  for folder in folders:
    for path in sorted((ROOT / folder).rglob("*.py")):
      parts = path.relative_to(ROOT).with_suffix("").parts
      found[".".join(parts)] = path.read_text()
  return found


def imports(module: str, source: str) -> Iterator[str]:
  """Dotted names of all that a module imports, at its top or within functions; relative ones made
  absolute.
  """
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        above = module.split(".")[: -node.level]
        base = ".".join([*above, base] if base else above)
      yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str | None:
  """The room of a dotted name; None for what is outside the project and for the package itself."""
  parts = name.split(".")
  if parts[0] in ("benchmarks", "launch"):
    return parts[0]
  return parts[1] if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in ROOMS else None


def arrows(modules: dict[str, str]) -> set[tuple[str, str, str]]:
  """(module, room it stands in, room that it imports from), other rooms only."""
  found = set()
  for module, source in modules.items():
    here = room_of(module)
    for name in imports(module, source):
      there = room_of(name)
      if there is not None and there != here:
        found.add((module, here, there))
  return found


def upward(modules: dict[str, str]) -> list[str]:
  """The imports that go up; the package's own __init__ stands below all rooms."""

  def height(room):
    return -1 if room is None else ROOMS.index(room)

  return sorted(
    f"{module} imports {there}"
    for module, here, there in arrows(modules)
    if height(there) > height(here)
  )


def mutual(modules: dict[str, str]) -> set[tuple[str, str]]:
  """Pairs of rooms that import each other."""
  edges = {(here, there) for _, here, there in arrows(modules)}
  return {(here, there) for here, there in edges if (there, here) in edges}


def foreign(module: str, source: str) -> list[str]:
  """What an array module imports beyond jax, numpy, scipy.special, the standard library and its own
  room.
  """
  allowed = {"jax", "numpy", *sys.stdlib_module_names}
  return [
    name
    for name in imports(module, source)
    if name.split(".")[0] not in allowed
    and name != "scipy.special"
    and not name.startswith(f"{PACKAGE}.core.")
  ]


class ArchitectureTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.modules = sources(PACKAGE, "benchmarks", "launch")

  def test_every_module_is_in_a_room(self):
    # Fails if a folder is added that the order of rooms does not name, or if the sources are not
    # found.
    homeless = [module for module in self.modules if room_of(module) is None]
    self.assertEqual(homeless, [f"{PACKAGE}.__init__"])
    self.assertContainsSubset({room_of(module) for module in self.modules} - {None}, ROOMS)
    self.assertGreater(len(self.modules), 40)

  def test_arrows_run_down(self):
    # Fails if a module imports from a room above its own.
    self.assertEqual(upward(self.modules), [])

  def test_no_two_rooms_import_each_other(self):
    # Fails if two rooms know each other; without it a wrong order of ROOMS above could hide one
    # direction.
    self.assertEqual(mutual(self.modules), set())

  @parameterized.parameters(*ARRAY_MODULES)
  def test_array_modules_know_arrays_only(self, name):
    # Fails if the mathematics comes to depend on files, models or other libraries.
    self.assertEqual(foreign(f"{PACKAGE}.core.{name}", self.modules[f"{PACKAGE}.core.{name}"]), [])

  def test_no_file_without_a_subject(self):
    # Fails if a file or folder is named for nothing in particular.
    everywhere = [
      path
      for folder in (PACKAGE, "benchmarks", "launch", "configs", "tests")
      for path in (ROOT / folder).rglob("*")
    ]
    self.assertEqual(
      [str(path) for path in everywhere if path.stem.removesuffix("_test").lower() in NO_NAMES], []
    )


class CheckerTest(parameterized.TestCase):
  """The checks above pass on anything if the checker is blind; these sources must be caught."""

  @parameterized.parameters(
    (
      "synthneg_jax.core.tree",
      "from synthneg_jax.runtime import keys",
      ["synthneg_jax.core.tree imports runtime"],
    ),
    (
      "synthneg_jax.core.tree",
      "import synthneg_jax.pipeline.experiment",
      ["synthneg_jax.core.tree imports pipeline"],
    ),
    (
      "synthneg_jax.models.decoder",
      "from synthneg_jax import training",
      ["synthneg_jax.models.decoder imports training"],
    ),
    (
      "synthneg_jax.models.decoder",
      "from ..tasks import answers",
      ["synthneg_jax.models.decoder imports tasks"],
    ),
    (
      "synthneg_jax.models.decoder",
      "from .. import tasks as t",
      ["synthneg_jax.models.decoder imports tasks"],
    ),
    (
      "synthneg_jax.pipeline.experiment",
      "def f():\n  if True:\n    import launch.sft",
      ["synthneg_jax.pipeline.experiment imports launch"],
    ),
    (
      "synthneg_jax.__init__",
      "from synthneg_jax import core",
      ["synthneg_jax.__init__ imports core"],
    ),
    (
      "synthneg_jax.training.step",
      "from synthneg_jax.core import tree\nfrom . import batch\nimport jax",
      [],
    ),
    ("launch.sft", "from synthneg_jax.pipeline import stages", []),
    ("synthneg_jax.core.tree", "import tasks\nfrom runtime import keys\n'synthneg_jax.stages'", []),
  )
  def test_upward(self, module, source, found):
    # Fails if a form of import is overlooked, or if something that is no import of a room counts.
    self.assertEqual(upward({module: source}), found)

  def test_mutual(self):
    # Fails if two rooms that import each other through different modules are not seen.
    modules = {
      "synthneg_jax.core.a": "from synthneg_jax.runtime import b",
      "synthneg_jax.runtime.c": "import synthneg_jax.core.d",
      "synthneg_jax.models.e": "from synthneg_jax.core import a",
    }
    self.assertEqual(mutual(modules), {("core", "runtime"), ("runtime", "core")})

  def test_foreign(self):
    # Fails if another library or room passes for an array module's, or if an allowed one does not.
    source = (
      "import jax.numpy as jnp\nimport flax\nfrom etils import epath\nimport "
      "dataclasses\nimport numpy as np\n"
    )
    source += (
      "from synthneg_jax.core import tree\nfrom synthneg_jax.runtime import "
      "device_mesh\nfrom . import masked_stats\n"
    )
    self.assertEqual(
      foreign("synthneg_jax.core.losses", source),
      ["flax", "etils.epath", "synthneg_jax.runtime.device_mesh"],
    )


if __name__ == "__main__":
  absltest.main()
