"""Ratios against what users would pick instead, measured side by side in one process.

A ratio is the baseline's cost over ours. The calls of an item alternate (ours, baseline, ours,
baseline ...), so that a busy machine slows both; each round gives one ratio, and the median with
the least and the greatest is reported. On CPU the process is kept on one core and its CPU time
counts; on accelerators wall time does, with the devices waited for. Nothing is timed before its
outputs were shown to be equal.
"""

import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from synthneg_jax.runtime.errors import UserError

_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "numpy",
  "torch",
  "transformers",
  "trl",
  "google-tunix",
)


@dataclasses.dataclass(frozen=True)
class Baseline:
  """What ours is held against.

  Attributes:
    name: for the table.
    run: does the work once and returns when it is done; where something else than time counts, it
      returns that.
    differs: says in a few words how its outputs differ from ours; empty where they are equal.
  """

  name: str
  run: Callable[[], float | None]
  differs: Callable[[], str]


@dataclasses.dataclass(frozen=True)
class Work:
  """What one call cannot do with less of: float operations, and bytes of weights and cache that it
  must read.
  """

  flops: float = 0.0
  bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Item:
  """One comparison.

  Attributes:
    name, size: for the table.
    run: our side, as `Baseline.run`.
    baselines: the other side, each timed right after ours in every round.
    work: of one call of ours, for the share of the machine's limit.
    rounds: how often.
    unit: "s" where time counts; else what `run` returns, "bytes" for one.
  """

  name: str
  size: str
  run: Callable[[], float | None]
  baselines: Sequence[Baseline]
  work: Work = Work()
  rounds: int = 5
  unit: str = "s"


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the machine can do at best: float operations and bytes read, per second."""

  flops: float
  bytes: float

  def seconds(self, work: Work) -> float:
    """The least time that this work takes."""
    return max(work.flops / self.flops, work.bytes / self.bytes)


def pin() -> None:
  """On CPU: keeps this thread, and all that it starts from now on, on one core. Call it before any
  array exists.
  """
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  os.environ["OMP_NUM_THREADS"] = "1"


def clock() -> Callable[[], float]:
  """The process's CPU time on CPU, wall time elsewhere, in seconds."""
  return time.process_time if jax.default_backend() == "cpu" else time.perf_counter


def limits(now: Callable[[], float]) -> Limits:
  """The best of a few float32 products of matrices of 2048, and of products of a matrix of 256 MiB
  with a vector.
  """
  small, large, vector = jnp.ones((2048, 2048)), jnp.ones((8192, 8192)), jnp.ones(8192)
  product = jax.jit(jnp.dot)

  def least(*args):
    times = []
    for _ in range(5):
      start = now()
      jax.block_until_ready(product(*args))
      times.append(now() - start)
    return min(times[1:])

  return Limits(2 * 2048**3 / least(small, small), large.nbytes / least(large, vector))


def _cost(run: Callable[[], float | None], unit: str, now: Callable[[], float]) -> float:
  if unit != "s":
    return run()
  gc.collect()
  gc.disable()
  start = now()
  run()
  spent = now() - start
  gc.enable()
  return spent


def compare(item: Item, now: Callable[[], float], limit: Limits | None = None) -> Iterator[dict]:
  """One row a baseline: its cost over ours, median and range over rounds; no ratio where outputs
  differ.
  """
  equal = []
  for baseline in item.baselines:
    why = baseline.differs()
    if why:
      nothing = dict.fromkeys(("ratio", "min", "max"))
      yield {
        **_head(item, baseline),
        **nothing,
        "equal_outputs": False,
        "why": why,
      }
    else:
      equal.append(baseline)
  if not equal:
    return
  if item.unit == "s":
    item.run()  # compiles what the proof did not; the baselines are warm from it
  ours, theirs = [], {baseline.name: [] for baseline in equal}
  for _ in range(item.rounds):
    ours.append(_cost(item.run, item.unit, now))
    for baseline in equal:
      theirs[baseline.name].append(_cost(baseline.run, item.unit, now))
  for baseline in equal:
    ratios = [their / our for our, their in zip(ours, theirs[baseline.name], strict=True)]
    row = {
      **_head(item, baseline),
      "ratio": statistics.median(ratios),
      "min": min(ratios),
      "max": max(ratios),
      "equal_outputs": True,
      "ours": statistics.median(ours),
      "theirs": statistics.median(theirs[baseline.name]),
      "unit": item.unit,
    }
    if limit and limit.seconds(item.work):
      row["share_of_limit"] = limit.seconds(item.work) / row["ours"]
    yield row


def _head(item: Item, baseline: Baseline) -> dict:
  return {"item": item.name, "size": item.size, "baseline": baseline.name}


def table(rows: Iterable[dict]) -> str:
  """The rows for a person's eyes."""
  cells = [("item", "size", "against", "ratio", "min–max", "ours", "theirs", "of the limit")]
  for row in rows:
    if not row["equal_outputs"]:
      cells.append(
        (
          row["item"],
          row["size"],
          row["baseline"],
          "none",
          f"outputs differ: {row['why']}",
          "",
          "",
          "",
        )
      )
      continue
    times, unit = {"s": (1e3, "ms"), "bytes": (2**-20, "MiB")}.get(row["unit"], (1, row["unit"]))
    share = f"{100 * row['share_of_limit']:.0f} %" if "share_of_limit" in row else ""
    spread = f"{row['min']:.2f}–{row['max']:.2f}"
    costs = [f"{row[side] * times:.4g} {unit}" for side in ("ours", "theirs")]
    cells.append(
      (row["item"], row["size"], row["baseline"], f"{row['ratio']:.2f}", spread, *costs, share)
    )
  widths = [
    max(len(line[i]) for line in cells if line[3] != "none" or i < 4) for i in range(len(cells[0]))
  ]
  return "\n".join(
    "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
    for line in cells
  )


def versions() -> dict[str, str]:
  """Of Python and of the packages that both sides rest on, as far as they are installed."""
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def report(
  suite: str, items: Iterable[Item], out: str | None, limit: Limits | None, now: Callable[[], float]
) -> None:
  """Measures the items, prints the table, writes the JSON.

  Raises:
    UserError: an item's outputs differ from its baseline's; the table and the file are there all
      the same.
  """
  before, rows = os.getloadavg(), []
  for item in items:
    for row in compare(item, now, limit):
      rows.append(row)
      logging.info("%s", table([row]).splitlines()[1])
    del item  # its models go before the next item's come
  load = {"before": before, "after": os.getloadavg()}
  result = {"suite": suite, "versions": versions(), "load": load, "rows": rows}
  if limit:
    result["limits"] = {"gflops": limit.flops / 1e9, "read_gb_per_s": limit.bytes / 1e9}
    print(
      f"limits: {limit.flops / 1e9:.0f} GFLOP/s (float32 product), {limit.bytes / 1e9:.0f} GB/s "
      "(read)"
    )
  print(f"load {load['before'][0]:.1f} before, {load['after'][0]:.1f} after; {versions()}")
  print(table(rows))
  if out:
    epath.Path(out).write_text(json.dumps(result, indent=1) + "\n")
  unequal = [
    f"{row['item']} ({row['size']}) against {row['baseline']}"
    for row in rows
    if not row["equal_outputs"]
  ]
  if unequal:
    raise UserError(f"Outputs differ, so there is no ratio: {', '.join(unequal)}.")


def main(suite: str, full: bool, out: str | None) -> None:
  """Runs one suite.

  Raises:
    UserError: torch, transformers or TRL is missing, or outputs differ.
  """
  if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    pin()
  from benchmarks import (
    items as benchmark_items,
  )  # torch reads the number of cores when it is imported

  now = clock()
  report(suite, benchmark_items.SUITES[suite](full), out, limits(now), now)
