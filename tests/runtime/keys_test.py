"""Keys equal recorded values: others would change the tokens of every resumed run."""

import itertools

import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.runtime import keys

_ITEM = {
  "seed": 7,
  "purpose": "sample",
  "round_": 0,
  "problem_id": "gsm8k/12",
  "prefix_hash": "",
  "index": 3,
}


class KeysTest(parameterized.TestCase):
  def test_recorded_values(self):
    # Fails for any change of the hash, of its size, of the text that is hashed, or of the byte
    # order.
    key = keys.draw_key(7, "sample", 0, "gsm8k/12", "", 3)
    self.assertEqual((key.dtype, key.shape), (np.uint32, (2,)))
    self.assertEqual(key.tolist(), [3367341496, 3295908888])
    self.assertEqual(keys.hash_ids([1, 2, 300000]), "8c0a10264a32925a")
    self.assertEqual(keys.hash_ids([]), "e4a6a0577479b2b4")

  @parameterized.parameters(
    ("seed", 8),
    ("purpose", "credit"),
    ("round_", 1),
    ("problem_id", "gsm8k/1"),
    ("prefix_hash", "2"),
    ("index", 4),
  )
  def test_every_part_enters(self, part, value):
    # Fails if the part is left out of what is hashed.
    self.assertNotEqual(
      keys.draw_key(**_ITEM).tolist(), keys.draw_key(**{**_ITEM, part: value}).tolist()
    )

  def test_no_two_items_share_a_key(self):
    # Fails if parts are joined without a mark between them (problem 1, index 12 against problem 11,
    # index 2), or if traces and the rollouts out of them share draws.
    made = {
      tuple(keys.draw_key(seed, purpose, round_, problem, prefix, index).tolist())
      for seed, purpose, round_, problem, prefix, index in itertools.product(
        (0, 1, 10),
        ("sample", "credit", "evaluate"),
        (0, 1),
        ("1", "11", "1|1"),
        ("", "1"),
        range(13),
      )
    }
    self.assertLen(made, 3 * 3 * 2 * 3 * 2 * 13)

  def test_hash_ids(self):
    # Fails if the container or its dtype enters, if ids are joined without a mark, or if their
    # order does not enter.
    for ids in ((1, 2, 3), np.array([1, 2, 3], np.int64), np.array([1, 2, 3], np.uint16)):
      self.assertEqual(keys.hash_ids(ids), keys.hash_ids([1, 2, 3]))
    self.assertLen(
      {
        keys.hash_ids(ids) for ids in ([1, 23], [12, 3], [23, 1], [1, 2, 3], [0, 1, 23], [1, 23, 0])
      },
      6,
    )


if __name__ == "__main__":
  absltest.main()
