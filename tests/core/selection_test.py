"""Which right responses are kept."""

from absl.testing import absltest, parameterized

from synthneg_jax.core import selection

RESPONSES = [
  ([1, 2], False),
  ([1, 3], True),
  ([1, 3], True),
  ((1, 2), True),
  ([1, 3, 2], True),
  ([9], False),
  ((1, 3), True),
  ([4], True),
]


class KeepRightTest(parameterized.TestCase):
  @parameterized.parameters((0, []), (1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (4, [1, 3, 4, 7]), (99, [1, 3, 4, 7]))
  def test_by_hand(self, most, expected):
    # Fails if wrong ones are kept, if repeats are kept or count, if a wrong one hides an equal right one, if a list and
    # a tuple of the same ids differ, if the last are kept instead of the first, or if `most` is off by one.
    self.assertEqual(selection.keep_right(RESPONSES, most), expected)

  def test_none(self):
    # Fails if no response, or none that is right, raises.
    self.assertEqual(selection.keep_right([], 4), [])
    self.assertEqual(selection.keep_right([([1], False)], 4), [])


if __name__ == "__main__":
  absltest.main()
