"""Per-item limits on new tokens."""

import dataclasses

import numpy as np
from absl.testing import absltest

from synthneg_jax.core.geometry import Lanes
from synthneg_jax.decoding.decode import Stops
from synthneg_jax.decoding.engine import Engine, Trunk
from synthneg_jax.decoding.sampling import Sampling
from tests import tiny_model

NEW = 6


class LimitsTest(absltest.TestCase):
  def test_a_limit_cuts_the_branch_and_nothing_else(self):
    # Fails if a limit is another item's, is off by one, or changes draws of its own or of its lane
    # mates.
    keys = np.random.default_rng(0).integers(0, 2**32, (5, 2), np.uint32)
    free = Trunk([5, 6, 7], [3, 1, 3, 2, 3], keys)
    bound = dataclasses.replace(free, limits=[2, 1, NEW + 9, 5, 3])
    engine = Engine(
      tiny_model.model(),
      tiny_model.one_device_mesh(),
      Stops(()),
      lanes=Lanes(1, 2),
      max_new_tokens=NEW,
    )
    whole, cut = (
      dict(engine.run(tiny_model.params(), [trunk], Sampling()))[0] for trunk in (free, bound)
    )
    self.assertEqual([len(generation.ids) for generation in whole], [NEW] * 5)
    self.assertEqual([len(generation.ids) for generation in cut], [2, 1, NEW, 5, 3])
    for long, short in zip(whole, cut, strict=True):
      np.testing.assert_array_equal(long.ids[: len(short.ids)], short.ids)
      self.assertEqual(short.finish_reason, "length")


if __name__ == "__main__":
  absltest.main()
