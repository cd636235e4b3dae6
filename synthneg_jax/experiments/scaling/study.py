"""A study: all cells of a grid |D_syn| x method x seed, then figures, fitted exponents and
efficiency factors.

Everything is told from the cells' JSON files: a study goes on from those that another machine made,
and its figures can be drawn where no run folder is.
"""

import csv
import dataclasses
import io
import json
import math
import time
from collections.abc import Sequence

import numpy as np
from absl import logging
from etils import epath

from synthneg_jax.core import scaling
from synthneg_jax.experiments.scaling import grid, methods
from synthneg_jax.experiments.scaling.paired import paired_difference
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import distributed, manifest, workdir_lock
from synthneg_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Point:
  """A method at a size, over its seeds.

  Attributes:
    size: problems.
    wrong_SN: bool [seeds, test problems].
    mean, low, high: test error with its 95 % bootstrap interval over seeds and problems.
  """

  size: int
  seeds: tuple[int, ...]
  wrong_SN: np.ndarray
  mean: float
  low: float
  high: float


Results = dict[str, list[Point]]  # by method, sizes rising


def _time_left(
  cells: Sequence[grid.Cell], seconds: dict[str, list[tuple[int, float]]], rest: Sequence[grid.Cell]
) -> str:
  """What the rest will take, by what a problem cost each method so far; methods not yet seen cost
  as much as the mean.
  """
  if not seconds:
    return ""
  each = {name: sum(s for _, s in seen) / sum(n for n, _ in seen) for name, seen in seconds.items()}
  usual = float(np.mean(list(each.values())))
  left = sum(cell.size * each.get(cell.method.kind, usual) for cell in rest)
  return f", about {math.ceil(left / 60)} min left"


def make(config, workdir: epath.PathLike, cells: Sequence[grid.Cell]) -> bool:
  """Makes the cells that are not there; returns whether all are, which they are not where other
  processes still work.

  Raises:
    UserError: a cell's file of another config, or whatever a stage refuses.
    Stopped: SIGTERM came.
  """
  workdir = epath.Path(workdir)
  folder, seconds = workdir / "cells", {}
  folder.mkdir(parents=True, exist_ok=True)
  missing = [cell for cell in cells if grid.load(folder, config, cell) is None]
  for unit in dict.fromkeys(cell.unit for cell in missing):
    with workdir_lock.claim(workdir / "runs" / unit) as holder:
      if holder:
        logging.info("Study: %s is passed over; it is held by %s.", unit, holder)
        continue
      for cell in (cell for cell in missing if cell.unit == unit):
        if distributed.stopping():
          raise distributed.Stopped
        if grid.load(folder, config, cell) is not None:  # made by another process meanwhile
          continue
        started = time.monotonic()
        experiment = Experiment.open(grid.configure(config, cell), workdir / "runs" / unit)
        methods.make(experiment, cell.method)
        taken = time.monotonic() - started
        found = grid.write(folder, experiment.workdir, config, cell=cell, seconds=taken)
        seconds.setdefault(cell.method.kind, []).append((cell.size, taken))
        rest = [other for other in missing if not (folder / f"{other.name}.json").exists()]
        logging.info(
          "Study: %s, %d problems, seed %d: test error %.4f, %.0f s; %d of %d cells%s.",
          cell.method.name,
          cell.size,
          cell.seed,
          found["test_error"],
          taken,
          len(cells) - len(rest),
          len(cells),
          _time_left(cells, seconds, rest),
        )
  return all(grid.load(folder, config, cell) is not None for cell in cells)


def results(config, workdir: epath.PathLike, cells: Sequence[grid.Cell]) -> Results:
  """What the finished cells say, by method and size.

  Raises:
    UserError: cells that were tested on different problems.
  """
  groups, tested = {}, {}
  for cell in cells:
    found = grid.load(epath.Path(workdir) / "cells", config, cell)
    if found:
      tested.setdefault(found["problems"], cell.name)
      groups.setdefault(cell.method.name, {}).setdefault(cell.size, {})[cell.seed] = grid.wrong(
        found
      )
  if len(tested) > 1:
    raise UserError(f"The cells {' and '.join(tested.values())} were tested on different problems.")
  made = {}
  for name, by_size in groups.items():
    for size in sorted(by_size):
      wrong_SN = np.stack([by_size[size][seed] for seed in sorted(by_size[size])])
      mean, low, high = paired_difference(wrong_SN, np.zeros_like(wrong_SN))
      made.setdefault(name, []).append(
        Point(size, tuple(sorted(by_size[size])), wrong_SN, mean, low, high)
      )
  return made


def efficiency(config, found: Results) -> dict[str, dict]:
  """How many times the data the baseline needs for each method's error, at every size and at
  study.reference_size.

  Returns:
    by method: factor, its 95 % bootstrap interval over seeds and problems (low, high; null for
    infinity), whether it was extrapolated, seeds, at (problems of the method), and by_size with the
    same for every size.
  """
  baseline = found.get(config.study.baseline, [])
  seeds = set.intersection(*(set(point.seeds) for point in baseline)) if baseline else set()
  if len(baseline) < 2 or not seeds:
    return {}
  sizes = [point.size for point in baseline]
  baseline_DSN = np.stack([point.wrong_SN[np.isin(point.seeds, list(seeds))] for point in baseline])
  made = {}
  for name, points in found.items():
    if name == config.study.baseline or name == "base":
      continue
    by_size = {}
    for point in points:
      one = scaling.bootstrap_efficiency(
        scaling.Baseline(sizes, baseline_DSN), point.size, point.wrong_SN
      )
      by_size[str(point.size)] = {
        "factor": _finite(one.factor),
        "low": _finite(one.low),
        "high": _finite(one.high),
        "extrapolated": one.extrapolated,
        "extrapolated_share": round(one.extrapolated_share, 3),
        "seeds": len(point.seeds),
      }
    at = str(config.study.reference_size)
    if at in by_size:
      made[name] = {**by_size[at], "at": config.study.reference_size, "by_size": by_size}
  return made


def _finite(value: float) -> float | None:
  """A factor as JSON has it: null for infinity."""
  return round(value, 3) if math.isfinite(value) else None


def exponents(found: Results) -> dict[str, dict]:
  """error ≈ b · size^(-a) for every method of two sizes or more: a with its 95 % bootstrap interval
  over seeds, and b.
  """
  made = {}
  for name, points in found.items():
    if len(points) < 2:
      continue
    sizes = [point.size for point in points]
    a, b = scaling.power_law_fit(sizes, [point.mean for point in points])
    rng, drawn = np.random.default_rng(0), []
    errors = [point.wrong_SN.mean(axis=1) for point in points]
    for _ in range(1000):
      drawn.append(
        scaling.power_law_fit(sizes, [rng.choice(each, len(each)).mean() for each in errors])[0]
      )
    low, high = np.quantile(drawn, [0.025, 0.975])
    made[name] = {
      "exponent": round(a, 4),
      "low": round(float(low), 4),
      "high": round(float(high), 4),
      "coefficient": round(b, 4),
    }
  return made


def table(found: Results) -> str:
  """Test errors as CSV: a row a method, size and seed, and one for the mean with its interval."""
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(["method", "problems", "seed", "test_error", "low", "high"])
  for name, points in found.items():
    for point in points:
      for seed, error in zip(point.seeds, point.wrong_SN.mean(axis=1), strict=True):
        writer.writerow([name, point.size, seed, f"{error:.5f}", "", ""])
      writer.writerow(
        [name, point.size, "mean", f"{point.mean:.5f}", f"{point.low:.5f}", f"{point.high:.5f}"]
      )
  return buffer.getvalue()


def write(config, workdir: epath.PathLike, cells: Sequence[grid.Cell]) -> dict:
  """Writes report/results.csv, efficiency.json and exponents.json of what is there; returns the
  factors.
  """
  report = epath.Path(workdir) / "report"
  report.mkdir(parents=True, exist_ok=True)
  found = results(config, workdir, cells)
  factors = efficiency(config, found)
  (report / "results.csv").write_text(table(found))
  manifest.write_json(report / "efficiency.json", factors)
  manifest.write_json(report / "exponents.json", exponents(found))
  return factors


def main(config, workdir: str) -> bool:
  """Makes all cells, then what is told from them; prints the factors, and returns whether all cells
  are there.
  """
  cells = grid.read(config)
  if not cells:
    raise UserError(
      "study.grid is empty: --config should be a study's, such as configs/study_arithmetic.py."
    )
  whole = make(config, workdir, cells)
  factors = write(config, workdir, cells)
  print(
    json.dumps(
      {name: {k: v for k, v in one.items() if k != "by_size"} for name, one in factors.items()}
    )
  )
  if not whole:
    logging.warning("Study: not all cells are there; other processes still work on them.")
  return whole
