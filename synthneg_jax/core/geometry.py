"""Sizes that fit the work: rows for trees that are trained on, lanes and slots for branches that
are decoded.

Lengths go in, a geometry comes out; nothing else enters, so that equal lengths in any order give
the same answer on every machine. What is chosen here changes speed and memory and, but for
rounding, no result: a step's examples stay the ones that `batch_size` asks for, its sums are
normalised over the whole step however many rows and microbatches hold them, and a draw depends on
its own key alone.
"""

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Sequence

import numpy as np

from synthneg_jax.core import tree as tree_lib

_LONGEST = 2048  # tokens of a row, at most, where no tree is longer
_AS_GOOD = 1.02  # the shortest rows are taken among those that need so many times the fewest places
_MOST_COUNTS = 8  # numbers of rows, each a program of its own
# share of all places that a further one must save, and as many as so many steps have:
_SAVES = 0.02
_STEPS = 2
_IDLE = 128  # a decoding step takes as long as so many slots beside its own (reading weights);
_LANE = 1  # a lane as so many beside its own (reading its trunk);
_STOP = 2  # a stop to fill lanes as so many steps. All three are ours.
_BUSY = 0.78  # share of slots that should be busy, as far as lengths can be foreseen
_RUNS_ON = 32  # one item in so many is taken to go on to the limit, as some always do


@dataclasses.dataclass(frozen=True)
class Rows:
  """How the trees of training steps are laid in rows.

  Attributes:
    length: T, tokens of a row.
    counts: rising numbers of rows that a step may have; each step takes the first that holds it.
    microbatches: parts that a step's rows are cut into; divides every count.
    by_size: trees go into rows by falling size, else in the step's own order.
  """

  length: int
  counts: tuple[int, ...]
  microbatches: int = 1
  by_size: bool = False

  def split(self, shards: int) -> "Rows":
    """The same with counts that a mesh of so many row shards can split, where another one was
    chosen for.
    """
    counts = sorted({_up(count, self.microbatches * shards) for count in self.counts})
    return dataclasses.replace(self, counts=tuple(counts))

  def order(self, sizes: Sequence[int]) -> list[int]:
    """The order in which trees of these sizes go into rows."""
    return (
      sorted(range(len(sizes)), key=lambda i: -sizes[i])
      if self.by_size
      else list(range(len(sizes)))
    )

  def needed(self, sizes: Sequence[int]) -> int:
    """The number of rows of a step whose trees have these sizes.

    Raises:
      ValueError: no count holds them.
    """
    need = _first_fit(tuple(sizes[i] for i in self.order(sizes)), self.length)
    count = next((count for count in self.counts if count >= need), None)
    if count is None:
      raise ValueError(
        f"A step needs {need} rows of {self.length} tokens; at most {self.counts[-1]} are there."
      )
    return count


def _first_fit(sizes: tuple[int, ...], length: int) -> int:
  return max(len(tree_lib.first_fit(sizes, length)), 1)


def _up(size: float, multiple: int) -> int:
  return -(-int(size) // multiple) * multiple


def row_lengths(longest: int, most: int) -> list[int]:
  """Lengths of rows worth a try where the longest tree and the largest step have so many tokens;
  rising.
  """
  grain = 128 if longest >= 512 else 32 if longest >= 32 else 8
  stride = max(grain, _up(longest / 8, grain))
  last = max(longest, min(4 * longest, _LONGEST, most))
  return list(range(_up(longest, grain), _up(last, grain) + 1, stride))


def _counts(needs: Sequence[int], length: int) -> tuple[tuple[int, ...], int]:
  """(numbers of rows for steps that need so many, places of all steps): a further number only where
  it saves.
  """
  values, times = np.unique(needs, return_counts=True)
  before = np.concatenate([[0], np.cumsum(times)])

  @functools.cache
  def best(last: int, count: int) -> tuple[int, tuple[int, ...]]:
    """Fewest rows of the steps up to the value `last` with `count` numbers, the last of which is
    that value.
    """
    whole = int(values[last]) * int(before[last + 1]), (int(values[last]),)
    if count == 1 or last == 0:
      return whole
    tries = [(best(first, count - 1), first) for first in range(last)]
    split = [
      (
        rows + int(values[last]) * int(before[last + 1] - before[first + 1]),
        (*counts, int(values[last])),
      )
      for (rows, counts), first in tries
    ]
    return min([whole, *split])

  last = len(values) - 1
  chosen = best(last, 1)
  for count in range(2, _MOST_COUNTS + 1):
    further = best(last, count)
    if chosen[0] - further[0] < max(_SAVES * chosen[0], _STEPS * int(values[last])):
      break
    chosen = further
  return chosen[1], chosen[0] * length


def fit_rows(
  steps: Sequence[Sequence[int]],
  *,
  length: int = 0,
  shards: int = 1,
  microbatches: int = 0,
  room: int = 0,
) -> Rows:
  """Rows for the trees of some steps.

  Where the length is given, trees go in their order into rows that all steps have equally many of.
  Where it is not, the fewest places for tokens are sought over lengths of rows and, for each, over
  numbers of rows that a step may have.

  Args:
    steps: the sizes in tokens of each step's trees.
    length: T, at least the longest tree; 0 to choose.
    shards: parts of the mesh that share the rows of a microbatch.
    microbatches: parts of a step; 0 for as few as memory allows.
    room: tokens that a shard's part of a microbatch may have; 0 for no bound. A row always may.

  Raises:
    ValueError: a tree is longer than the given length.
  """

  def laid(length: int, by_size: bool) -> tuple[Rows, int]:
    order = (lambda sizes: sorted(sizes, reverse=True)) if by_size else (lambda sizes: sizes)
    needs = [_first_fit(tuple(order(sizes)), length) for sizes in steps]
    parts = microbatches
    if not parts:
      rows_in_room = max(room // length, 1) if room else max(needs)
      parts = -(-max(needs) // (rows_in_room * shards))
    needs = [_up(need, parts * shards) for need in needs]
    counts, places = (
      _counts(needs, length) if by_size else ((max(needs),), len(needs) * max(needs) * length)
    )
    return Rows(length, counts, parts, by_size), places

  if length:
    return laid(length, by_size=False)[0]
  longest = max(itertools.chain(*steps))
  tried = [laid(length, by_size=True) for length in row_lengths(longest, max(map(sum, steps)))]
  enough = _AS_GOOD * min(places for _, places in tried)
  return next(rows for rows, places in tried if places <= enough)


@dataclasses.dataclass(frozen=True)
class Lanes:
  """How trunks are held while their branches are decoded.

  Attributes:
    lanes: trunks at once; a multiple of the mesh's row shards.
    slots: branches of a trunk that grow at once.
    refill: lanes that are filled together, once so many rest.
    busy: the share of slots that is expected to be busy.
  """

  lanes: int
  slots: int
  refill: int
  busy: float = 0.0


def decoding_time(
  trunks: Sequence[Sequence[int]], lanes: int, slots: int, refill: int
) -> tuple[int, int]:
  """What the engine needs for trunks whose items take so many steps: (steps of its loop, stops to
  fill lanes).

  A lane's slots take its items in order; the loop stops once `refill` lanes rest, and without
  trunks that wait once all do (decoding/decode.py).
  """
  seconds = [_lane_time(tuple(items), slots) for items in trunks]
  return _turns(seconds, lanes, refill)


def _lane_time(items: Sequence[int], slots: int) -> int:
  ends = [0] * slots
  for steps in items:
    heapq.heapreplace(ends, ends[0] + steps)
  return max(ends)


def _turns(times: Sequence[int], lanes: int, refill: int) -> tuple[int, int]:
  waiting, held, now, stops = list(times)[::-1], [], 0, 0
  while waiting or held:
    while waiting and len(held) < lanes:
      heapq.heappush(held, now + waiting.pop())
    to_free = min(refill if waiting else lanes, lanes) - (lanes - len(held))
    freed = 0
    while held and (freed < to_free or held[0] <= now):
      now, freed = max(now, heapq.heappop(held)), freed + 1
    stops += 1
  return now, stops


def fit_lanes(
  trunks: Sequence[Sequence[int]],
  *,
  longest: int = 0,
  lanes: int = 0,
  slots: int = 0,
  shards: int = 1,
  lane_bytes: float = 0.0,
  slot_bytes: float = 0.0,
  room: float = float("inf"),
) -> Lanes:
  """Lanes and slots that decode some trunks soonest, in memory, with most of their slots busy if
  that can be had.

  Lanes and slots are powers of two (lanes times the shards), or as given. The order of the trunks
  does not matter: those with most work are taken to come first, as the engine has it.

  Args:
    trunks: for each the steps that its items are expected to take.
    longest: steps of an item that goes on to the limit; 0 where the steps given are no guess.
    lanes, slots: given ones; 0 to choose.
    shards: parts of the mesh that share the lanes.
    lane_bytes, slot_bytes: what a lane takes besides its slots, and each slot, on its shard.
    room: bytes of a shard. The smallest geometry is always allowed.
  """
  # lengths come in no order; sorted first, so that theirs does not matter
  rng = np.random.default_rng(0)
  trunks = [rng.permutation(items) for items in sorted(map(sorted, trunks))]
  if longest:
    trunks = [
      np.where(rng.integers(_RUNS_ON, size=len(items)) == 0, longest, items) for items in trunks
    ]
  trunks.sort(key=len, reverse=True)
  work = sum(map(sum, trunks))
  most = max(map(len, trunks), default=1)
  found = []
  for s in [slots] if slots else _powers(most):
    times = [_lane_time(items.tolist(), s) for items in trunks]
    for per_shard in [-(-lanes // shards)] if lanes else _powers(-(-len(trunks) // shards)):
      if found and per_shard * (lane_bytes + s * slot_bytes) > room:
        continue
      n = per_shard * shards
      for part in (4, 8, 16):
        refill = max(n // part, 1)
        steps, stops = _turns(times, n, refill)
        busy = work / max(steps * n * s, 1)
        cost = (steps + _STOP * stops) * (_IDLE + per_shard * (_LANE + s))
        found.append((busy < _BUSY, cost, n * s, n, s, refill, busy))
  *_, n, s, refill, busy = min(found)
  return Lanes(n, s, refill, round(float(busy), 3))


def _powers(most: int) -> list[int]:
  """1, 2, 4, ... up to the first that is not below `most`."""
  return [1 << k for k in range(max(most - 1, 0).bit_length() + 1)]
