"""Selection of a problem's solutions for RFT."""

import types

from absl.testing import absltest, parameterized

from synthneg_jax.pipeline import rft
from synthneg_jax.runtime import config_schema

TEXTS = (
  "He has 2 + 3 = 5.\n#### 5",
  "So 2+3=5 in all.\n#### 5",  # the equations of the first, in other words
  "He has 2 + 3 = 5!\n#### 5",  # one character from the first
  "First 1 + 4 = 5 apples are counted.\n#### 5",
)


class DeduplicateTest(parameterized.TestCase):
  # Fails if a rule is not applied, or is applied only after the cut at max_per_problem.
  @parameterized.parameters(
    ("none", [0, 1]), ("equations", [0, 3]), ("edit_distance", [0, 1]), ("most_diverse", [0, 3])
  )
  def test_rules(self, rule, kept):
    section = config_schema.default().rft
    section.deduplicate, section.max_per_problem = rule, 2
    clones = [rft._Clone(types.SimpleNamespace(text=text)) for text in TEXTS]
    distinct = rft._distinct(clones, section)
    self.assertEqual([TEXTS.index(clone.trace.text) for clone in distinct], kept)

  def test_near_duplicates_go(self):
    # Fails if the threshold is ignored, or a threshold of 0 drops more than exact repeats.
    section = config_schema.default().rft
    section.deduplicate = "edit_distance"
    clones = [rft._Clone(types.SimpleNamespace(text=text)) for text in TEXTS + TEXTS[:1]]
    for threshold, kept in ((0.0, TEXTS), (0.1, TEXTS[:2] + TEXTS[3:])):
      section.near_duplicate = threshold
      distinct = rft._distinct(clones, section)
      self.assertEqual(tuple(clone.trace.text for clone in distinct), kept)


if __name__ == "__main__":
  absltest.main()
