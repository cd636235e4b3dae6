"""Sizes of training rows and of decoding lanes, chosen from lengths.

The choice depends on nothing but the lengths, in any order, so every machine makes the same one. It
changes speed and memory and, except for rounding, no result: a step keeps the examples that
`batch_size` gives it, its sums are normalised over the whole step, and a draw depends only on its
own key. The constants below are ours.
"""

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from synthneg_jax.core import tree as tree_lib

_MAX_ROW_LENGTH = 2048  # tokens, unless a tree is longer
_NEAR_BEST = 1.02  # the shortest rows win whose capacity is within this factor of the smallest
_MAX_COUNTS = 8  # row counts of a run; each compiles its own program
# An additional row count must save this share of the capacity and as much as this many steps have.
_MIN_SAVED_SHARE = 0.02
_MIN_SAVED_STEPS = 2
# Costs of decoding in slot steps: of a loop step itself (reading the weights), of a lane (reading
# its trunk); and of a stop to fill lanes, in loop steps.
_STEP_COST = 128
_LANE_COST = 1
_STOP_COST = 2
_TARGET_BUSY = 0.78  # share of slots that should be busy on the expected lengths
_ITEMS_PER_OVERRUN = 32  # one item in this many is assumed to run to the length limit


@dataclasses.dataclass(frozen=True)
class Rows:
  """How the trees of training steps are laid out in rows.

  Attributes:
    length: T, tokens of a row.
    counts: ascending numbers of rows; each step uses the first that is large enough.
    microbatches: parts that a step's rows are split into; divides every count.
    by_size: whether trees are placed by decreasing size instead of in the step's order.
  """

  length: int
  counts: tuple[int, ...]
  microbatches: int = 1
  by_size: bool = False

  def split(self, shards: int) -> "Rows":
    """These rows with counts rounded up so that `shards` row shards can split them."""
    counts = {_round_up(count, self.microbatches * shards) for count in self.counts}
    return dataclasses.replace(self, counts=tuple(sorted(counts)))

  def order(self, sizes: Sequence[int]) -> list[int]:
    """The order in which trees of these sizes are placed."""
    order = list(range(len(sizes)))
    return sorted(order, key=lambda i: -sizes[i]) if self.by_size else order

  def needed(self, sizes: Sequence[int]) -> int:
    """The number of rows of a step whose trees have these sizes.

    Raises:
      ValueError: the largest count is too small.
    """
    need = _num_rows([sizes[i] for i in self.order(sizes)], self.length)
    for count in self.counts:
      if count >= need:
        return count
    raise ValueError(
      f"A step needs {need} rows of {self.length} tokens; at most {self.counts[-1]} are available."
    )


def _num_rows(sizes: Sequence[int], length: int) -> int:
  return max(len(tree_lib.first_fit(sizes, length)), 1)


def _round_up(size: float, multiple: int) -> int:
  return -(-int(size) // multiple) * multiple


def _candidate_lengths(longest: int, most: int) -> list[int]:
  """Row lengths to try, ascending, for trees of at most `longest` and steps of `most` tokens."""
  grain = 128 if longest >= 512 else 32 if longest >= 32 else 8
  stride = max(grain, _round_up(longest / 8, grain))
  last = max(longest, min(4 * longest, _MAX_ROW_LENGTH, most))
  return list(range(_round_up(longest, grain), _round_up(last, grain) + 1, stride))


def _choose_counts(needs: Sequence[int], length: int) -> tuple[tuple[int, ...], int]:
  """Row counts for steps that need `needs` rows each, and the capacity of all steps in tokens."""
  values, times = np.unique(needs, return_counts=True)
  before = np.concatenate([[0], np.cumsum(times)])

  @functools.cache
  def best(last: int, num_counts: int) -> tuple[int, tuple[int, ...]]:
    """(fewest rows, counts) of the steps up to `values[last]`, which is the largest count."""
    largest = int(values[last])
    options = [(largest * int(before[last + 1]), (largest,))]
    if num_counts > 1:
      for first in range(last):
        rows, counts = best(first, num_counts - 1)
        rows += largest * int(before[last + 1] - before[first + 1])
        options.append((rows, (*counts, largest)))
    return min(options)

  last = len(values) - 1
  rows, counts = best(last, 1)
  for num_counts in range(2, _MAX_COUNTS + 1):
    fewer, more_counts = best(last, num_counts)
    if rows - fewer < max(_MIN_SAVED_SHARE * rows, _MIN_SAVED_STEPS * int(values[last])):
      break
    rows, counts = fewer, more_counts
  return counts, rows * length


class RowOptions(NamedTuple):
  """What `fit_rows` must respect.

  Attributes:
    length: T, at least the longest tree; 0 to choose it.
    shards: mesh shards that share the rows of a microbatch.
    microbatches: parts of a step; 0 for as few as `max_tokens` allows.
    max_tokens: tokens of a microbatch on one shard; 0 for no bound. A single row always fits.
  """

  length: int = 0
  shards: int = 1
  microbatches: int = 0
  max_tokens: int = 0


_ANY_ROWS = RowOptions()


def fit_rows(steps: Sequence[Sequence[int]], options: RowOptions = _ANY_ROWS) -> Rows:
  """Chooses rows for the trees of some steps.

  With a given length, trees are placed in their order, and all steps have the same number of rows.
  Otherwise it minimises the capacity in tokens over row lengths and, for each, over row counts.

  Args:
    steps: the sizes in tokens of each step's trees.
    options: given sizes and the memory bound.

  Raises:
    ValueError: a tree is longer than the given length.
  """

  def fit(length: int, *, by_size: bool) -> tuple[Rows, int]:
    """Rows of this length, and the capacity of all steps in tokens."""
    if by_size:
      needs = [_num_rows(sorted(sizes, reverse=True), length) for sizes in steps]
    else:
      needs = [_num_rows(sizes, length) for sizes in steps]
    parts = options.microbatches
    if not parts:
      rows_per_shard = max(needs)
      if options.max_tokens:
        rows_per_shard = max(options.max_tokens // length, 1)
      parts = -(-max(needs) // (rows_per_shard * options.shards))
    needs = [_round_up(need, parts * options.shards) for need in needs]
    if by_size:
      counts, capacity = _choose_counts(needs, length)
    else:
      counts, capacity = (max(needs),), len(needs) * max(needs) * length
    return Rows(length, counts, parts, by_size), capacity

  if options.length:
    return fit(options.length, by_size=False)[0]
  longest, most = max(itertools.chain(*steps)), max(map(sum, steps))
  fitted = [fit(length, by_size=True) for length in _candidate_lengths(longest, most)]
  limit = _NEAR_BEST * min(capacity for _, capacity in fitted)
  return next(rows for rows, capacity in fitted if capacity <= limit)


@dataclasses.dataclass(frozen=True)
class Lanes:
  """How many trunks and branches are decoded at once.

  Attributes:
    lanes: trunks held at once; a multiple of the mesh's row shards.
    slots: branches of a trunk that grow at once.
    refill: lanes that are filled together, once as many are idle; 0 for a quarter of the lanes.
    busy: expected share of busy slots.
  """

  lanes: int
  slots: int
  refill: int = 0
  busy: float = 0.0


def decoding_time(
  trunks: Sequence[Sequence[int]], lanes: int, slots: int, *, refill: int
) -> tuple[int, int]:
  """(steps of the engine's loop, stops to fill lanes) for trunks whose items take these steps.

  A lane's slots take its items in order. The loop stops once `refill` lanes are idle, or all lanes
  if no trunk waits (decoding/decode.py).
  """
  times = [_lane_time(tuple(items), slots) for items in trunks]
  return _loop_time(times, lanes, refill)


def _lane_time(items: Sequence[int], slots: int) -> int:
  """Steps until one lane has finished its items."""
  ends = [0] * slots
  for steps in items:
    heapq.heapreplace(ends, ends[0] + steps)
  return max(ends)


def _loop_time(times: Sequence[int], lanes: int, refill: int) -> tuple[int, int]:
  """`decoding_time` from the time that each trunk takes in its lane."""
  waiting, ends, now, stops = list(times)[::-1], [], 0, 0
  while waiting or ends:
    while waiting and len(ends) < lanes:
      heapq.heappush(ends, now + waiting.pop())
    to_free = min(refill if waiting else lanes, lanes) - (lanes - len(ends))
    freed = 0
    while ends and (freed < to_free or ends[0] <= now):
      now, freed = max(now, heapq.heappop(ends)), freed + 1
    stops += 1
  return now, stops


class LaneMemory(NamedTuple):
  """Bytes on one shard: of a lane without its slots, of a slot, and available to all lanes."""

  lane_bytes: float = 0.0
  slot_bytes: float = 0.0
  limit: float = float("inf")


_UNLIMITED = LaneMemory()


def fit_lanes(
  trunks: Sequence[Sequence[int]],
  *,
  longest: int = 0,
  lanes: int = 0,
  slots: int = 0,
  shards: int = 1,
  memory: LaneMemory = _UNLIMITED,
) -> Lanes:
  """The fastest lanes and slots that fit in memory; those with enough busy slots are preferred.

  Both are powers of two (lanes times the shards) unless given. The engine starts the trunks with
  most items first, so their order does not matter.

  Args:
    trunks: for each, the steps that its items are expected to take.
    longest: steps of an item that runs to the length limit; 0 if the given steps are exact.
    lanes, slots: fixed numbers; 0 to choose.
    shards: mesh shards that share the lanes.
    memory: bytes per shard; the smallest geometry is always allowed.
  """
  # Sorted, then shuffled with a fixed seed, so that the given order does not matter.
  rng = np.random.default_rng(0)
  trunks = [rng.permutation(items) for items in sorted(map(sorted, trunks))]
  if longest:
    trunks = [
      np.where(rng.integers(_ITEMS_PER_OVERRUN, size=len(items)) == 0, longest, items)
      for items in trunks
    ]
  trunks.sort(key=len, reverse=True)
  work = sum(map(sum, trunks))
  best_key, best = None, None
  for s in [slots] if slots else _powers_of_two(max(map(len, trunks), default=1)):
    times = [_lane_time(items.tolist(), s) for items in trunks]
    for per_shard in [-(-lanes // shards)] if lanes else _powers_of_two(-(-len(trunks) // shards)):
      lane_bytes = memory.lane_bytes + s * memory.slot_bytes
      if best is not None and per_shard * lane_bytes > memory.limit:
        continue
      n = per_shard * shards
      for part in (4, 8, 16):
        refill = max(n // part, 1)
        steps, stops = _loop_time(times, n, refill)
        busy = work / max(steps * n * s, 1)
        cost = (steps + _STOP_COST * stops) * (_STEP_COST + per_shard * (_LANE_COST + s))
        key = (busy < _TARGET_BUSY, cost, n * s, n, s, refill)
        if best_key is None or key < best_key:
          best_key, best = key, Lanes(n, s, refill, round(float(busy), 3))
  return best


def _powers_of_two(limit: int) -> list[int]:
  """1, 2, 4, ... up to the first that is not below `limit`."""
  return [1 << k for k in range(max(limit - 1, 0).bit_length() + 1)]
