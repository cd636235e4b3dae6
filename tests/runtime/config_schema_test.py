"""The default config: every leaf is explained where it stands, and unknown names are refused with the nearest."""

import ast
import inspect
import io
import textwrap
import tokenize

from absl.testing import absltest, parameterized

from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError


def uncommented(source: str) -> tuple[list[str], set[str]]:
  """Leaves of the source's dict literals without a comment behind them, and the names of all leaves.

  A value that is a dict, or a call of a function of the source, is a section and no leaf.
  """
  comments = {
    token.start[0]: token.string.strip("# ")
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }
  tree = ast.parse(source)
  functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
  lines = source.splitlines()
  missing, names = [], set()
  for node in ast.walk(tree):
    for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
      section = (
        isinstance(value, ast.Dict) or isinstance(value, ast.Call) and getattr(value.func, "id", "") in functions
      )
      if key is None or section or not isinstance(key, ast.Constant):
        continue
      names.add(key.value)
      behind = lines[value.end_lineno - 1][value.end_col_offset :].lstrip(", }")
      if not comments.get(value.end_lineno) or not behind.startswith("#"):
        missing.append(f"line {value.lineno}: {key.value}")
  return missing, names


class CommentsTest(absltest.TestCase):
  def test_every_leaf_has_a_comment(self):
    # Fails for a leaf of default() without a comment behind its value.
    parts = (config_schema._optimizer, config_schema._training, config_schema._endpoint, config_schema.default)
    missing, names = uncommented("\n\n".join(map(inspect.getsource, parts)))
    self.assertEqual(missing, [])
    # Fails if leaves are made elsewhere than in the literals that were looked at.
    self.assertContainsSubset({name.split(".")[-1] for name, _ in config_schema.leaves(config_schema.default())}, names)

  def test_the_checker_sees_a_bare_leaf(self):
    # Fails if the checker takes a comment of another line or another leaf, or overlooks nested sections.
    source = textwrap.dedent("""
        def make():
          # beta has no comment of its own
          return {"beta": 0.1,
                  "a": {"rate": 1, "size": 2},  # two leaves, one comment
                  **other(1),
                  "b": make(2),
                  "tuple": (1,
                            2),  # fine
                  "empty": 3,  #
                  "fine": 4}  # comment
        """)
    missing, names = uncommented(source)
    self.assertEqual([leaf.split()[-1] for leaf in missing], ["beta", "empty", "rate"])
    self.assertEqual(names, {"beta", "rate", "size", "tuple", "empty", "fine"})


class NamesTest(parameterized.TestCase):
  def test_every_leaf_is_known(self):
    # Fails if a leaf of the default tree is refused.
    for name, _ in config_schema.leaves(config_schema.default()):
      config_schema.check_name(name, "here")

  @parameterized.parameters(
    ("dpo.betta", "--config.dpo.betta: the config has no leaf 'dpo.betta'; did you mean dpo.beta"),
    ("sft.optimizer.learningrate", "did you mean sft.optimizer.learning_rate"),
    ("beta", "no leaf 'beta'"),  # a leaf's last name alone is none
    ("dpo", "no leaf 'dpo'"),  # nor is a section
    ("zzzzzzzzzzzzzzzz", "the config has no leaf 'zzzzzzzzzzzzzzzz'\\.$"),
  )
  def test_unknown_names(self, name, sentence):
    # Fails if an unknown name passes, or if the nearest names are missing, far off, or offered where there are none.
    with self.assertRaisesRegex(UserError, sentence):
      config_schema.check_name(name, f"--config.{name}")


class TreeTest(absltest.TestCase):
  def test_locked(self):
    # Fails if a misspelt leaf can be added by a config file.
    with self.assertRaises(AttributeError):
      config_schema.default().dpo.betta = 0.1

  def test_two_trees_share_nothing(self):
    # Fails if sections are made once and handed out twice.
    first = config_schema.default()
    first.dpo.optimizer.learning_rate = 9.0
    self.assertNotEqual(config_schema.default().dpo.optimizer.learning_rate, 9.0)
    self.assertNotEqual(first.sft.optimizer.learning_rate, 9.0)

  def test_plain(self):
    # Fails if a section is left out or another let in, if names are not dotted, or if tuples stay (JSON has none).
    config = config_schema.default()
    config.engine.stop = ("Question:",)
    some = config_schema.plain(config, ["seed", "engine"])
    self.assertEqual(
      some,
      {"seed": 0, "engine.lanes": 32, "engine.slots": 8, "engine.max_new_tokens": 256, "engine.stop": ["Question:"]},
    )
    everything = config_schema.plain(config)
    self.assertContainsSubset(some, everything)
    self.assertEqual(set(everything), {name for name, _ in config_schema.leaves(config)})
    self.assertIn("dpo.optimizer.learning_rate", everything)


if __name__ == "__main__":
  absltest.main()
