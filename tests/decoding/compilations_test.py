"""The number of programs that a mixed run of the engine compiles."""

import jax
import numpy as np
import pytest
from absl.testing import absltest

from synthneg_jax.core.geometry import Lanes
from synthneg_jax.decoding import engine as engine_lib
from synthneg_jax.decoding.decode import Stops
from synthneg_jax.decoding.engine import Engine, Trunk
from synthneg_jax.decoding.sampling import Sampling
from tests import tiny_model

pytestmark = pytest.mark.slow  # compiles much

_compiled = []
jax.monitoring.register_event_duration_secs_listener(
  lambda event, *_, **__: (
    _compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
  )
)


def trunks(rng, count: int, longest: int, items: int):
  """Trunks of 2 to `longest` tokens, one of them that long, with 1 to `items` items."""
  lengths = [longest, *rng.integers(2, longest + 1, count - 1)]
  for length in lengths:
    forks = rng.integers(1, length + 1, size=items)
    yield Trunk(
      rng.integers(4, 31, length).tolist(),
      forks.tolist(),
      rng.integers(0, 2**32, (items, 2), np.uint32),
    )


def stop_table() -> np.ndarray:
  """A new array on each call: an odd token followed by an even one ends a branch."""
  table = np.zeros((3, 31), np.int32)
  table[:, 1::2] = 1
  table[1, 0::2] = 2
  table[2] = 2
  return table


class CompilationsTest(absltest.TestCase):
  def test_bucketed_shapes_share_programs(self):
    # Fails if a program is compiled for every length, number of trunks, of items or of rounds: ten
    # calls fall into two buckets, of five programs each, and some small transfers; repeated, they
    # compile nothing at all.
    engine = Engine(
      tiny_model.model(),
      tiny_model.one_device_mesh(),
      Stops((3,)),
      lanes=Lanes(4, 2),
      max_new_tokens=5,
    )
    params, rng = tiny_model.params(), np.random.default_rng(0)
    calls = [
      list(trunks(rng, 3 + n % 5, 9 + n % 7, 3 + n % 2)) for n in range(5)
    ]  # up to 16 tokens
    calls += [list(trunks(rng, 4 + n % 5, 17 + 3 * n, 3)) for n in range(5)]  # up to 32

    def run():
      return [len(dict(engine.run(params, call, Sampling()))) for call in calls]

    del _compiled[:]
    self.assertEqual(run(), [len(call) for call in calls])
    self.assertBetween(len(_compiled), 10, 16)
    del _compiled[:]
    run()
    self.assertEqual(_compiled, [])

  def test_rounds_share_a_length(self):
    # Fails if `longest` is not used: rounds with ever shorter trunks would each compile anew.
    engine = Engine(
      tiny_model.model(),
      tiny_model.one_device_mesh(),
      Stops((3,)),
      lanes=Lanes(2, 2),
      max_new_tokens=5,
    )
    params, rng = tiny_model.params(), np.random.default_rng(1)

    def run(length):
      return dict(engine.run(params, list(trunks(rng, 4, length, 2)), Sampling(), longest=48))

    run(48)
    del _compiled[:]
    for length in (40, 30, 20, 5):
      run(length)
    self.assertEqual(_compiled, [])

  def test_stops_compare_by_content(self):
    # Fails if a table is hashed by its identity, compared as an array (which raises), or by its
    # bytes alone (two shapes may have the same).
    stops = Stops((3,), stop_table(), 31)
    self.assertEqual(stops, Stops((3,), stop_table(), 31))
    self.assertEqual(hash(stops), hash(Stops((3,), stop_table(), 31)))
    other = stop_table()
    other[0, 0] = 1
    for different in (other, stop_table().reshape(1, -1), None):
      self.assertNotEqual(stops, Stops((3,), different, 31))
    other[0, 0] = 0
    given = Stops((3,), other, 31)
    other[0, 0] = 1  # the caller's array is its own
    self.assertEqual(given, stops)

  def test_engines_with_equal_stop_strings_share_programs(self):
    # Fails if the cache of programs misses for a second engine with the same stop strings:
    # everything compiles again.
    params, call = tiny_model.params(), list(trunks(np.random.default_rng(2), 3, 9, 3))

    def run():
      model, stops = tiny_model.model(), Stops((3,), stop_table(), 31)
      engine = Engine(
        model, tiny_model.one_device_mesh(), stops, lanes=Lanes(2, 2), max_new_tokens=6
      )
      return [
        [item.finish_reason for item in made]
        for _, made in sorted(engine.run(params, call, Sampling()))
      ]

    first = run()
    self.assertIn("stop", sum(first, []))
    before = engine_lib.programs.cache_info()
    del _compiled[:]
    self.assertEqual(run(), first)
    after = engine_lib.programs.cache_info()
    self.assertEqual((after.hits, after.misses), (before.hits + 1, before.misses))
    self.assertLessEqual(
      len(_compiled), 1
    )  # the second engine lays its parameters out; no program of decoding


if __name__ == "__main__":
  absltest.main()
