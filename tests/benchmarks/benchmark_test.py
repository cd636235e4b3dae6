"""The benchmark's harness on made-up items and a made-up clock; nothing here needs torch."""

import json
import pathlib
import sys
import tempfile
from unittest import mock

import pytest
from absl.testing import absltest

from benchmarks import benchmark, torch_baselines
from benchmarks import items as benchmark_items
from benchmarks.benchmark import Baseline, Item, Limits, Work
from synthneg_jax.runtime.errors import UserError

pytestmark = pytest.mark.slow  # measures


class Bench:
  """Calls that are written down, each moving the clock by its next cost."""

  def __init__(self):
    self.time, self.calls = 0.0, []

  def now(self) -> float:
    return self.time

  def run(self, name: str, *costs: float):
    left = list(costs)

    def call():
      self.calls.append(name)
      self.time += left.pop(0) if len(left) > 1 else left[0]

    return call


def rows_of(item: Item, bench: Bench, limits=None) -> list[dict]:
  return list(benchmark.compare(item, bench.now, limits))


class BenchmarkTest(absltest.TestCase):
  def test_losses_are_compared_by_the_greatest(self):
    def differ(*found):
      return benchmark_items._losses_differ([0.414131, 9.0e-6], iter(found).__next__)

    self.assertEqual(differ(0.414131, 9.1e-6), "")  # 1 % of next to nothing
    self.assertIn("losses [0.414131, 9e-06] and [0.41403, 9e-06]", differ(0.41403, 9.0e-6))
    self.assertIn("losses", differ(0.414131, 9.0e-5))

  def test_calls_alternate(self):
    # Fails if all rounds of one side run before the other's, or if a side is timed before the proof
    # of equality.
    bench = Bench()

    def proof():
      return bench.calls.append("proof") or ""

    baselines = [Baseline(name, bench.run(name, 1.0), proof) for name in "bc"]
    rows_of(Item("x", "T", bench.run("a", 1.0), baselines, rounds=2), bench)
    self.assertEqual("".join(bench.calls), "proofproof" + "a" + "abc" * 2)

  def test_medians_of_rounds(self):
    # Fails if the warming call counts, if the ratio is turned, or if means or totals stand for
    # medians of rounds.
    bench = Bench()
    ours = bench.run("ours", 100.0, 1.0, 2.0, 4.0)  # the first is the warming call
    item = Item(
      "x", "T", ours, [Baseline("b", bench.run("b", 3.0, 20.0, 8.0), lambda: "")], Work(4.0, 6.0), 3
    )
    (row,) = rows_of(item, bench, Limits(flops=2.0, bytes=6.0))
    self.assertEqual((row["ratio"], row["min"], row["max"]), (3.0, 2.0, 10.0))
    self.assertEqual(
      (row["ours"], row["theirs"], row["share_of_limit"]), (2.0, 8.0, 1.0)
    )  # 4 flops at 2 a second
    self.assertTrue(row["equal_outputs"])

  def test_no_ratio_where_outputs_differ(self):
    # Fails if such an item is timed, or if its row, the table or the exit status hide it.
    bench = Bench()
    wrong = Baseline("b", bench.run("b", 1.0), lambda: "3 of 9 sequences")
    right = Baseline("c", bench.run("c", 1.0), lambda: "")
    items = [
      Item("x", "T", bench.run("a", 1.0), [wrong]),
      Item("y", "T", bench.run("a", 1.0), [wrong, right]),
    ]
    rows = [row for item in items for row in rows_of(item, bench)]
    self.assertNotIn("b", bench.calls)
    self.assertEqual([row["equal_outputs"] for row in rows], [False, False, True])
    self.assertIsNone(rows[0]["ratio"])
    self.assertIn("none   outputs differ: 3 of 9 sequences", benchmark.table(rows))
    with self.assertRaisesRegex(UserError, r"x \(T\) against b, y \(T\) against b"):
      benchmark.report("train", items, None, None, bench.now)

  def test_bytes_are_returned_not_timed(self):
    # Fails if an item of bytes is measured in seconds.
    item = Item(
      "m", "T", lambda: 2**20, [Baseline("b", lambda: 2**24, lambda: "")], rounds=1, unit="bytes"
    )
    (row,) = rows_of(item, Bench())
    self.assertEqual((row["ratio"], row["unit"]), (16.0, "bytes"))
    self.assertIn("16.00  16.00–16.00  1 MiB  16 MiB", benchmark.table([row]))

  def test_the_file(self):
    # Fails if a key that others read has another name, or if the file is not written where outputs
    # differ.
    bench, path = (
      Bench(),
      pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "out.json",
    )
    item = Item("x", "T", bench.run("a", 1.0), [Baseline("b", bench.run("b", 2.0), lambda: "")])
    benchmark.report("train", [item], str(path), Limits(2e9, 3e9), bench.now)
    made = json.loads(path.read_text())
    self.assertContainsSubset(["suite", "versions", "load", "rows"], made)
    expected = {
      "item": "x",
      "size": "T",
      "baseline": "b",
      "ratio": 2.0,
      "min": 2.0,
      "max": 2.0,
      "equal_outputs": True,
    }
    self.assertEqual({key: made["rows"][0][key] for key in expected}, expected)
    self.assertIn("jax", made["versions"])
    self.assertEqual(made["limits"], {"gflops": 2.0, "read_gb_per_s": 3.0})
    unequal = Item(
      "x", "T", bench.run("a", 1.0), [Baseline("b", bench.run("b", 2.0), lambda: "all")]
    )
    with self.assertRaises(UserError):
      benchmark.report("train", [unequal], str(path), None, bench.now)
    self.assertFalse(json.loads(path.read_text())["rows"][0]["equal_outputs"])

  def test_without_torch_it_says_what_to_install(self):
    # Fails if a missing package ends in a traceback, or if the sentence does not name it and the
    # extra.
    with mock.patch.dict(sys.modules, {"torch": None}):
      with self.assertRaisesRegex(UserError, r'needs torch: pip install -e "\.\[bench\]"'):
        torch_baselines.need("torch")


if __name__ == "__main__":
  absltest.main()
