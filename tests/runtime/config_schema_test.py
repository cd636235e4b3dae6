"""The config schema: leaves are documented and bounded; bad values and names are refused."""

import importlib
import pathlib
import re

from absl.testing import absltest, parameterized

from synthneg_jax.core import losses, rollout_schedules
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.config_schema import LEAVES, Leaf
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import generated


def is_number(value) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


class SchemaTest(parameterized.TestCase):
  def test_every_leaf_is_documented_and_bounded(self):
    # Fails for a leaf without a sentence, a number without a range, or a default that its own leaf
    # refuses.
    self.assertGreater(len(LEAVES), 180)
    for name, leaf in LEAVES.items():
      self.assertRegex(leaf.doc, r"^\S.*\.$", name)
      numbers = leaf.default if isinstance(leaf.default, tuple) else (leaf.default,)
      if any(map(is_number, numbers)):
        self.assertRegex(leaf.within, r"^[\[(]\S+, \S+[\])]$", name)
      self.assertEqual(leaf.problem(leaf.default), "", name)

  def test_defaults_are_those_of_the_tree(self):
    # Fails if a leaf of the schema is missing from the tree, or another value stands there.
    tree = dict(config_schema.leaves(config_schema.default()))
    self.assertEqual(tree, {name: leaf.default for name, leaf in LEAVES.items()})

  @parameterized.parameters(
    ("[0, 1)", 0, 0.99, (-0.001, 1, 1.5)),
    ("(0, 1]", 0.01, 1, (0, 1.01, -1)),
    ("[1, inf)", 1, 10**9, (0, 0.5, -3)),
    ("(0, inf)", 1e-9, 1e9, (0, -1e-9)),
  )
  def test_intervals(self, within, low, high, outside):
    # Fails if a bound is read as the other kind, or if NaN or infinity passes for a number in the
    # interval.
    leaf = Leaf(low, "A number.", within=within)
    self.assertEqual((leaf.problem(low), leaf.problem(high)), ("", ""))
    for value in (*outside, float("nan"), float("inf"), float("-inf")):
      self.assertIn(within, leaf.problem(value))

  def test_every_number_of_a_tuple_counts(self):
    # Fails if only the first is looked at, or if a value of its own meaning is refused.
    self.assertIn("[0, inf)", Leaf((1,), "Numbers.", within="[0, inf)").problem((1, 2, -1)))
    self.assertEqual(Leaf(-1, "A size.", within="[1, inf)", also=(-1,)).problem(-1), "")
    self.assertEqual(
      Leaf(-1, "A size.", within="[1, inf)", also=(-1,)).problem(0), "must be in -1 or [1, inf)"
    )
    self.assertEqual(
      Leaf(("a",), "Names.", choices=("a", "b")).problem(("b", "c")), "must be one of a, b"
    )

  @parameterized.parameters(
    ("sample.top_p", 0.0),  # would draw token 0 for ever
    ("credit.top_p", 1.5),
    ("sample.top_k", -1),
    ("dpo.label_smoothing", 0.7),
    ("dpo.beta", -0.1),
    ("dpo.beta", 0.0),
    ("dpo.tau", 0.0),
    ("dpo.penalty", -1.0),
    ("sft.optimizer.learning_rate", -1.0),
    ("rft.optimizer.beta1", 1.0),
    ("dpo.optimizer.clip_norm", 0.0),
    ("sft.grad_accum_steps", -1),
    ("sft.batch_size", 0),
    ("pretrain.num_layers", 0),
    ("rft.drop_fraction", 1.0),
    ("credit.temperature", -0.5),
    ("pairs.max_flip", 1.2),
    ("task.test_problems", 0),
    ("synthesis.budget_usd", -5.0),
    ("star_graph.seeds", 1),
    ("star_graph.under_trained", (5, -1)),
    ("sft.lora.targets", ("query", "keys")),
    ("mesh.data", 0),
    ("study.seeds", ("a",)),
    ("engine.stop", (1,)),
    ("task.step_delimiter", ""),
    ("task.step_delimiter", "re:("),
    ("task.step_delimiter", "re:\n*"),
    ("task.template_args", "enable_thinking=false"),
    ("task.template_args", "[1]"),
    ("task.template_args", '{"tokenize": true}'),
    ("task.fields", "problem"),
    ("task.fields", "question=query"),
    ("task.fields", "problem=a,problem=b"),
    ("task.fields", "problem="),
  )
  def test_values_that_a_stage_would_stumble_over(self, name, value):
    # Fails if the value is accepted, or if the sentence does not say what the leaf may be.
    config = config_schema.default()
    config.update_from_flattened_dict({name: value})
    with self.assertRaisesRegex(UserError, re.escape(f"{name}={value!r} must ")):
      config_schema.check_values(config)

  def test_adaptive_rollouts_suffice_for_best_of(self):
    # Fails if the search may end with fewer rollouts at the pit than Best-of-k needs, so that the
    # pit rule does not see it.
    config = config_schema.default()
    config.credit.schedule, config.pairs.pit_rule = "adaptive", "first_dead"
    config.credit.num_rollouts = config.credit.best_of + 1
    config_schema.check_values(config)
    config.credit.num_rollouts = config.credit.best_of
    with self.assertRaisesRegex(UserError, "raise num_rollouts or lower best_of"):
      config_schema.check_values(config)

  def test_the_default_tree_and_every_shipped_config_pass(self):
    # Fails if a range is narrower than what the project itself uses.
    config_schema.check_values(config_schema.default())
    folder = pathlib.Path(__file__).parents[2] / "configs"
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    self.assertContainsSubset(["arithmetic", "gsm8k", "star_graph"], names)
    for name in names:
      config_schema.check_values(importlib.import_module(f"configs.{name}").get_config())

  def test_fingerprints_hold_what_changes_results(self):
    # Fails if a leaf that only says how to compute refuses a resumed run, or one that decides
    # results does not.
    for name in (
      "engine.lanes",
      "credit.slots",
      "mesh.fsdp",
      "sft.save_every_steps",
      "dpo.max_to_keep_best",
      "model.remat",
    ):
      self.assertFalse(config_schema.changes_results(name), name)
    for name in (
      "seed",
      "dpo.beta",
      "task.path",
      "credit.endpoint.model",
      "sample.num_traces",
      "model.max_length",
    ):
      self.assertTrue(config_schema.changes_results(name), name)

  def test_choices_are_what_the_code_knows(self):
    # Fails if a loss, a schedule or a task is added to the code and not to the schema, or the other
    # way round.
    self.assertEqual(LEAVES["dpo.loss"].choices, tuple(losses.PREFERENCE_LOSSES))
    self.assertEqual(set(LEAVES["credit.schedule"].choices), set(rollout_schedules.SCHEDULES))
    self.assertContainsSubset(generated.TASKS, LEAVES["task.name"].choices)

  def test_help_text(self):
    # Fails if a section's leaf, its default, range, unit or sentence is missing, or if another
    # section is shown.
    text = config_schema.help_text(["dpo"])
    self.assertIn(
      "--config.dpo.beta=0.1  ((0, inf), per nat)\n      Strength of the KL "
      "regularisation towards the reference.",
      text,
    )
    self.assertIn("--config.dpo.loss='dpo'  (dpo, ipo, dpop)", text)
    self.assertNotIn("config.pairs", text)


class NamesTest(parameterized.TestCase):
  def test_every_leaf_is_known(self):
    # Fails if a leaf of the default tree is refused.
    for name, _ in config_schema.leaves(config_schema.default()):
      config_schema.check_name(name, "here")

  @parameterized.parameters(
    ("dpo.betta", "--config.dpo.betta: unknown config leaf 'dpo.betta'; did you mean dpo.beta"),
    ("sft.optimizer.learningrate", "did you mean sft.optimizer.learning_rate"),
    ("beta", "unknown config leaf 'beta'"),  # a leaf's last name alone is none
    ("dpo", "unknown config leaf 'dpo'"),  # nor is a section
    ("task.leap", "--config.task.leap: task.leap is now called task.arithmetic.skip_step_prob"),
    ("dpo.accumulate", "dpo.accumulate is now called dpo.grad_accum_steps"),
    ("rft.optimizer.warmup_share", "is now called rft.optimizer.warmup_fraction"),
    ("zzzzzzzzzzzzzzzz", "unknown config leaf 'zzzzzzzzzzzzzzzz'\\.$"),
  )
  def test_unknown_names(self, name, sentence):
    # Fails if an unknown name passes, or if the nearest names are missing, far off, or offered
    # where there are none.
    with self.assertRaisesRegex(UserError, sentence):
      config_schema.check_name(name, f"--config.{name}")

  def test_renamed_leaves_lead_to_leaves(self):
    # Fails if an old name is still in use, or its new name leads nowhere.
    for old, new in config_schema.RENAMED.items():
      self.assertNotIn(old, LEAVES)
      self.assertIn(new, LEAVES)


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
    # Fails if a section is left out or another let in, if names are not dotted, or if tuples stay
    # (JSON has none).
    config = config_schema.default()
    config.engine.stop = ("Question:",)
    some = config_schema.plain(config, ["seed", "engine"])
    self.assertEqual(
      some,
      {
        "seed": 0,
        "engine.lanes": 0,
        "engine.slots": 0,
        "engine.max_new_tokens": 256,
        "engine.stop": ["Question:"],
      },
    )
    everything = config_schema.plain(config)
    self.assertContainsSubset(some, everything)
    self.assertEqual(set(everything), {name for name, _ in config_schema.leaves(config)})
    self.assertIn("dpo.optimizer.learning_rate", everything)


if __name__ == "__main__":
  absltest.main()
