"""Rows and lanes: all items fit, order is irrelevant, fullness on three distributions."""

import functools
import itertools
import json
import os
import pathlib

import numpy as np
import transformers
from absl.testing import absltest, parameterized

from synthneg_jax.core import geometry
from synthneg_jax.core.geometry import LaneMemory, RowOptions
from synthneg_jax.core.tree import first_fit
from synthneg_jax.data import prompts
from synthneg_jax.training.batches import Schedule, plan

_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "synthneg_jax"
_LONG = np.clip(np.exp(np.random.default_rng(0).normal(np.log(512), 1.0, 4000)), 64, 4096).astype(
  int
)

# Recorded lengths, each as 25 quantiles from 0 to 1. GSM8K's training problems, with SmolLM2's
# tokenizer and chat template:
_GSM8K_TREES = (
  *(
    96,
    126,
    136,
    144,
    151,
    158,
    164,
    171,
    177,
    183,
    189,
    196,
    203,
    210,
    217,
    226,
    235,
    244,
    254,
    265,
    278,
    297,
    320,
  ),
  *(356, 569),
)
_GSM8K_SOLUTIONS = (
  *(
    31,
    57,
    64,
    70,
    75,
    80,
    85,
    90,
    94,
    99,
    104,
    109,
    114,
    120,
    126,
    132,
    139,
    147,
    154,
    163,
    174,
    188,
    208,
    240,
    455,
  ),
)
# The quickstart with seed 0: traces; trees of SFT, of RFT, of arbitrary and of per-step pairs.
_TRACES = (10, 21, 21, 30, 30, 30, *(39,) * 7, 46, *(48,) * 9, 57, 72)
_TREES = {
  "sft": (*(53,) * 9, *(62,) * 8, *(71,) * 8),
  "rft": (
    *(
      35,
      53,
      62,
      62,
      62,
      71,
      71,
      71,
      71,
      71,
      80,
      83,
      86,
      92,
      94,
      101,
      101,
      104,
      110,
      113,
      113,
      119,
      122,
      131,
      149,
    ),
  ),
  "dpo": (
    *(
      65,
      92,
      92,
      101,
      101,
      104,
      110,
      110,
      110,
      119,
      119,
      119,
      121,
      122,
      131,
      131,
      140,
      140,
      143,
      149,
      149,
      152,
      158,
    ),
    *(158, 159),
  ),
  "step_dpo": (
    *(
      41,
      41,
      41,
      50,
      50,
      50,
      50,
      50,
      53,
      59,
      59,
      59,
      59,
      62,
      62,
      68,
      68,
      68,
      68,
      71,
      71,
      77,
      77,
      80,
      91,
    ),
  ),
}


def drawn(quantiles, count, seed=0):
  """`count` lengths of a recorded distribution."""
  at = np.random.default_rng(seed).random(count)
  return np.interp(at, np.linspace(0, 1, len(quantiles)), quantiles).astype(int)


def steps_of(sizes, batch_size, num_epochs=1, weights=None):
  """The sizes of each training step's trees."""
  weights = [1] * len(sizes) if weights is None else weights
  steps = plan(weights, Schedule(batch_size=batch_size, num_epochs=num_epochs))
  return [[int(sizes[i]) for i in step] for step in steps]


def fullness(rows, steps):
  """The share of the capacity that holds a token."""
  return sum(map(sum, steps)) / sum(rows.needed(sizes) * rows.length for sizes in steps)


@functools.cache
def gsm8k_trees():
  """Prompt and solution lengths in tokens, from the data if data and tokenizer are present."""
  path = pathlib.Path(os.environ.get("SYNTHNEG_DATA_DIR", "-")) / "gsm8k" / "train.jsonl"
  if not path.exists() or not (_CACHE / "smollm2_135m").exists():
    return drawn(_GSM8K_TREES, 1000)
  tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(_CACHE / "smollm2_135m")
  rows = [json.loads(line) for line in path.read_text().splitlines()[:1000]]
  return np.array(
    [
      len(prompts.encode_prompt(tokenizer, row["question"], "chat"))
      + len(prompts.encode_solution(tokenizer, row["answer"]))
      for row in rows
    ]
  )


class RowsTest(parameterized.TestCase):
  @parameterized.product(seed=(0, 1, 2, 3, 4, 5), shards=(1, 4), max_tokens=(0, 300))
  def test_all_trees_fit_and_order_is_irrelevant(self, seed, shards, max_tokens):
    # Fails if a step needs more rows than it gets, if counts cannot be split over shards and
    # microbatches, if a microbatch exceeds max_tokens, or if the order of trees or steps, or a
    # second call, changes the answer.
    rng = np.random.default_rng(seed)
    steps = [
      rng.integers(3, 90 + 100 * (seed % 3), rng.integers(1, 30)).tolist() for _ in range(40)
    ]
    options = RowOptions(shards=shards, max_tokens=max_tokens)
    rows = geometry.fit_rows(steps, options)
    for sizes in steps:
      count = rows.needed(sizes)
      self.assertIn(count, rows.counts)
      self.assertLessEqual(
        len(first_fit([sizes[i] for i in rows.order(sizes)], rows.length)), count
      )
      self.assertEqual(count % (shards * rows.microbatches), 0)
      if max_tokens and rows.microbatches > 1:
        self.assertLessEqual(
          count // (shards * rows.microbatches) * rows.length, max(max_tokens, rows.length)
        )
    shuffled = [rng.permutation(sizes).tolist() for sizes in steps[::-1]]
    self.assertEqual(geometry.fit_rows(shuffled, options), rows)
    self.assertEqual(geometry.fit_rows(steps, options), rows)

  def test_against_all_partitions(self):
    # Fails if numbers of rows are not those with the smallest capacity among all sets of as many
    # counts.
    rng = np.random.default_rng(1)
    for _ in range(20):
      needs = rng.integers(1, 9, 60).tolist()
      counts, capacity = geometry._choose_counts(needs, 10)
      values = sorted(set(needs))
      best = min(
        sum(min(c for c in (*several, values[-1]) if c >= need) for need in needs)
        for several in itertools.combinations(values[:-1], len(counts) - 1)
      )
      self.assertEqual(capacity, 10 * best)
      self.assertEqual(capacity, 10 * sum(min(c for c in counts if c >= need) for need in needs))

  def test_what_is_given_wins(self):
    # Fails if a given length or number of microbatches is changed, if trees of a given length are
    # put in another order, or if a tree that is too long is taken.
    rows = geometry.fit_rows([[5, 7, 6], [7]], RowOptions(length=13, microbatches=2))
    self.assertEqual(rows, geometry.Rows(13, (2,), 2))
    self.assertEqual(rows.order([5, 7, 6]), [0, 1, 2])
    self.assertEqual(geometry.fit_rows([[9] * 12], RowOptions(microbatches=3)).microbatches, 3)
    with self.assertRaisesRegex(ValueError, "more than a row of 6"):
      geometry.fit_rows([[5, 7]], RowOptions(length=6))

  def test_memory_makes_microbatches(self):
    # Fails if a microbatch is not the most rows that fit, if max_tokens counts for the mesh instead
    # of a shard, or if a row that does not fit is rejected.
    self.assertEqual(
      geometry.fit_rows([[10] * 12], RowOptions(length=10, max_tokens=40)).microbatches, 3
    )
    self.assertEqual(
      geometry.fit_rows([[10] * 12], RowOptions(length=10, max_tokens=40, shards=2)).microbatches, 2
    )
    self.assertEqual(
      geometry.fit_rows([[10] * 12], RowOptions(length=10, max_tokens=1)).microbatches, 12
    )

  def test_another_mesh_can_split_them(self):
    # Fails if a run resumed with more shards gets a number of rows that they cannot share, or
    # fewer than before.
    self.assertEqual(geometry.Rows(8, (6, 9, 10), 2).split(4).counts, (8, 16))
    self.assertEqual(geometry.Rows(8, (6, 9, 10)).split(1).counts, (6, 9, 10))

  @parameterized.named_parameters(
    ("sft", "sft", 500, (1,), 5),
    ("rft", "rft", 600, (1, 2, 3), 5),
    ("dpo", "dpo", 830, (1, 2), 3),
    ("step_dpo", "step_dpo", 850, (1,), 3),
  )
  def test_embedded_task(self, name, count, weights, num_epochs):
    # Fails if rows for the embedded task are less than 85 % full; those of its config are 72 to 78
    # %.
    sizes = np.sort(drawn(_TREES[name], count))
    weight = np.repeat(weights, -(-count // len(weights)))[:count].tolist()
    steps = steps_of(sizes, 32, num_epochs, weight)
    rows = geometry.fit_rows(steps)
    self.assertGreaterEqual(fullness(rows, steps), 0.85)
    self.assertGreaterEqual(
      fullness(rows, steps),
      fullness(geometry.fit_rows(steps, RowOptions(length=320)), steps) + 0.05,
    )

  @parameterized.product(batch_size=(16, 128), shards=(1, 8))
  def test_gsm8k(self, batch_size, shards):
    # Fails if rows for GSM8K are less than 85 % full (a batch of 16 on 8 shards has two a shard and
    # cannot be).
    steps = steps_of(gsm8k_trees(), batch_size)
    rows = geometry.fit_rows(steps, RowOptions(shards=shards))
    # Without the data set its lengths are drawn, which gives .849 for 16 on one shard.
    share = round(fullness(rows, steps), 2)
    self.assertGreaterEqual(share, 0.85 if batch_size > 16 or shards == 1 else 0.6)

  @parameterized.parameters(32, 64, 128)
  def test_long_mixed_lengths(self, batch_size):
    # Fails if rows for lengths from 64 to 4096 are less than 85 % full, or longer than the longest
    # tree needs.
    steps = steps_of(_LONG, batch_size)
    rows = geometry.fit_rows(steps)
    self.assertGreaterEqual(fullness(rows, steps), 0.85)
    self.assertEqual(rows.length, 4096)


def busy(lanes, trunks):
  """The share of slots that is busy on these lengths."""
  steps, _ = geometry.decoding_time(
    sorted(trunks, key=len, reverse=True), lanes.lanes, lanes.slots, refill=lanes.refill
  )
  return sum(map(sum, trunks)) / (steps * lanes.lanes * lanes.slots)


def brute_force(trunks, lanes, slots, refill):
  """Steps and stops of the engine's loop, one step at a time."""
  waiting, held, steps, stops = [list(items) for items in trunks], [None] * lanes, 0, 0
  while waiting or any(held):
    for lane in range(lanes):
      if held[lane] is None and waiting:
        queue = waiting.pop(0)
        held[lane] = (queue, [queue.pop(0) for _ in range(min(slots, len(queue)))])
    enough = refill if waiting else lanes
    while sum(lane is None or not lane[1] for lane in held) < enough:
      steps += 1
      for lane in filter(None, held):
        queue, growing = lane
        growing[:] = [left - 1 for left in growing if left > 1]
        while queue and len(growing) < slots:
          growing.append(queue.pop(0))
    held = [None if lane is None or not lane[1] else lane for lane in held]
    stops += 1
  return steps, stops


class LanesTest(parameterized.TestCase):
  @parameterized.parameters((1, 1, 1), (3, 2, 1), (4, 3, 2), (8, 1, 2))
  def test_time_against_a_loop(self, lanes, slots, refill):
    # Fails if a lane's queue, the lanes that rest before they are filled, or the end without
    # waiting trunks is wrong.
    rng = np.random.default_rng(lanes)
    trunks = [rng.integers(1, 9, rng.integers(1, 7)).tolist() for _ in range(20)]
    self.assertEqual(
      geometry.decoding_time(trunks, lanes, slots, refill=refill),
      brute_force(trunks, lanes, slots, refill),
    )

  @parameterized.parameters(0, 1, 2, 3)
  def test_fits_and_order_is_irrelevant(self, seed):
    # Fails if memory is exceeded although one lane with one slot fits, if lanes cannot be shared by
    # the shards, or if the order of trunks or items, or a second call, changes the answer.
    rng = np.random.default_rng(seed)
    trunks = [rng.integers(1, 60, rng.integers(1, 9)).tolist() for _ in range(100)]
    limits = {"longest": 80, "shards": 2, "memory": LaneMemory(3.0, 2.0, 64.0)}
    lanes = geometry.fit_lanes(trunks, **limits)
    self.assertLessEqual(lanes.lanes // 2 * (3 + 2 * lanes.slots), 64)
    self.assertEqual(lanes.lanes % 2, 0)
    self.assertEqual(
      geometry.fit_lanes([rng.permutation(t).tolist() for t in trunks[::-1]], **limits), lanes
    )
    self.assertEqual(geometry.fit_lanes(trunks, **limits), lanes)

  def test_what_is_given_wins(self):
    # Fails if given lanes or slots are changed, even by memory, or if nothing is chosen without any
    # memory.
    trunks = [[5] * 6] * 10
    given = geometry.fit_lanes(trunks, lanes=6, slots=5, memory=LaneMemory(9.0, limit=1.0))
    self.assertEqual((given.lanes, given.slots), (6, 5))
    self.assertEqual(geometry.fit_lanes(trunks, slots=3).slots, 3)
    self.assertEqual(geometry.fit_lanes(trunks, lanes=5).lanes, 5)
    none = geometry.fit_lanes(trunks, memory=LaneMemory(9.0, limit=1.0))
    self.assertEqual((none.lanes, none.slots), (1, 1))
    self.assertEqual(geometry.fit_lanes([]).lanes, 1)

  @parameterized.named_parameters(
    ("embedded", _TREES["sft"], _TRACES, 72, 500),
    ("gsm8k", _GSM8K_SOLUTIONS, _GSM8K_SOLUTIONS, 512, 512),
    ("few_of_gsm8k", _GSM8K_SOLUTIONS, _GSM8K_SOLUTIONS, 512, 64),
    ("long", _LONG, _LONG, 4096, 512),
  )
  def test_sampling_and_evaluation(self, foreseen, real, longest, count):
    # Fails if less than 75 % of slots are busy on lengths drawn independently of
    # the expected ones (less the prompt)
    foreseen = np.minimum(np.asarray(foreseen) - (23 if longest == 72 else 0), longest)
    for items in (8, 1):
      guess = np.random.default_rng(1).choice(foreseen, (count, items)).tolist()
      lanes = geometry.fit_lanes(guess, longest=longest - 1)
      made = drawn(np.sort(real), count * items, seed=2).reshape(count, items).tolist()
      self.assertGreaterEqual(busy(lanes, made), 0.75)

  @parameterized.named_parameters(
    ("embedded", _TRACES, 72, 640),
    ("gsm8k", _GSM8K_SOLUTIONS, 512, 300),
    ("long", _LONG, 4096, 300),
  )
  def test_credit(self, lengths, longest, count):
    # Fails if less than 75 % of slots are busy with six rollouts a step whose lengths depend on
    # their own prefixes only.
    rng = np.random.default_rng(3)
    guess, made = [], []
    for size in drawn(np.sort(lengths), count):
      ends = np.sort(rng.integers(1, size, rng.integers(2, 7)))
      guess.append([int(size - end) for end in ends for _ in range(6)])
      made.append(
        [int(max(other - end, 1)) for end in ends for other in drawn(np.sort(lengths), 6, int(end))]
      )
    self.assertGreaterEqual(busy(geometry.fit_lanes(guess, longest=longest - 1), made), 0.75)


if __name__ == "__main__":
  absltest.main()
