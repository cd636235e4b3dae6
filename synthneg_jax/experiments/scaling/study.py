"""A study: the cells of a grid |D_syn| x method x seed, then exponents and efficiency factors.

All results are computed from the cells' JSON files. So a study can resume from cells that another
machine made, and most figures need no run folders.
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
from synthneg_jax.runtime.errors import UserError, writing


@dataclasses.dataclass(frozen=True)
class Point:
  """A method at one size, over its seeds.

  Attributes:
    size: in problems.
    wrong_SN: bool [seeds, test problems].
    mean, low, high: test error with its 95 % bootstrap interval over seeds and problems.
  """

  size: int
  seeds: tuple[int, ...]
  wrong_SN: np.ndarray
  mean: float
  low: float
  high: float


Results = dict[str, list[Point]]  # by method, sorted by size


def _time_left(seconds: dict[str, list[tuple[int, float]]], rest: Sequence[grid.Cell]) -> str:
  """The estimated time for the remaining cells, as text for a log line.

  Args:
    seconds: by kind, (problems, seconds) of the cells made so far; gives the time per problem.
    rest: remaining cells; kinds without a finished cell are assumed to take the mean time.
  """
  if not seconds:
    return ""
  per_problem = {
    kind: sum(s for _, s in done) / sum(n for n, _ in done) for kind, done in seconds.items()
  }
  mean = float(np.mean(list(per_problem.values())))
  left = sum(cell.size * per_problem.get(cell.method.kind, mean) for cell in rest)
  return f", about {math.ceil(left / 60)} min left"


def make(config, workdir: epath.PathLike, cells: Sequence[grid.Cell]) -> bool:
  """Makes the missing cells; returns False if other processes still work on some of them.

  Raises:
    UserError: a cell's file belongs to another config, or a stage fails.
    Stopped: SIGTERM was received.
  """
  workdir = epath.Path(workdir)
  folder, seconds = workdir / "cells", {}
  with writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
  missing = [cell for cell in cells if grid.load(folder, config, cell) is None]
  for unit in dict.fromkeys(cell.unit for cell in missing):
    with workdir_lock.claim(workdir / "runs" / unit) as holder:
      if holder:
        logging.info("Study: skipping %s, which is held by %s.", unit, holder)
        continue
      for cell in (cell for cell in missing if cell.unit == unit):
        if distributed.stopping():
          raise distributed.Stopped
        if grid.load(folder, config, cell) is not None:  # made by another process meanwhile
          continue
        started = time.monotonic()
        experiment = Experiment.open(grid.configure(config, cell), workdir / "runs" / unit)
        methods.make(experiment, cell.method)
        elapsed = time.monotonic() - started
        result = grid.write(folder, experiment.workdir, config, cell=cell, seconds=elapsed)
        seconds.setdefault(cell.method.kind, []).append((cell.size, elapsed))
        rest = [other for other in missing if not (folder / f"{other.name}.json").exists()]
        logging.info(
          "Study: %s, %d problems, seed %d: test error %.4f, %.0f s; %d of %d cells%s.",
          cell.method.name,
          cell.size,
          cell.seed,
          result["test_error"],
          elapsed,
          len(cells) - len(rest),
          len(cells),
          _time_left(seconds, rest),
        )
  return all(grid.load(folder, config, cell) is not None for cell in cells)


def results(config, workdir: epath.PathLike, cells: Sequence[grid.Cell]) -> Results:
  """The points of the finished cells, by method.

  Raises:
    UserError: cells were tested on different problems.
  """
  groups, tested = {}, {}
  for cell in cells:
    result = grid.load(epath.Path(workdir) / "cells", config, cell)
    if result:
      tested.setdefault(result["problems"], cell.name)
      by_size = groups.setdefault(cell.method.name, {})
      by_size.setdefault(cell.size, {})[cell.seed] = grid.wrong(result)
  if len(tested) > 1:
    raise UserError(f"The cells {' and '.join(tested.values())} were tested on different problems.")
  points = {}
  for name, by_size in groups.items():
    for size in sorted(by_size):
      wrong_SN = np.stack([by_size[size][seed] for seed in sorted(by_size[size])])
      mean, low, high = paired_difference(wrong_SN, np.zeros_like(wrong_SN))
      points.setdefault(name, []).append(
        Point(size, tuple(sorted(by_size[size])), wrong_SN, mean, low, high)
      )
  return points


def efficiency(config, results: Results) -> dict[str, dict]:
  """How many times as much data the baseline needs to reach each method's error.

  Returns:
    By method, at study.reference_size: factor, its 95 % bootstrap interval over seeds and problems
    (low, high; null for infinity), whether it was extrapolated, seeds, at (problems of the method),
    and by_size with the same for every size.
  """
  baseline = results.get(config.study.baseline, [])
  seeds = set.intersection(*(set(point.seeds) for point in baseline)) if baseline else set()
  if len(baseline) < 2 or not seeds:
    return {}
  sizes = [point.size for point in baseline]
  baseline_DSN = np.stack([point.wrong_SN[np.isin(point.seeds, list(seeds))] for point in baseline])
  factors, reference_size = {}, config.study.reference_size
  for name, points in results.items():
    if name == config.study.baseline or name == "base":
      continue
    by_size = {}
    for point in points:
      estimate = scaling.bootstrap_efficiency(
        scaling.Baseline(sizes, baseline_DSN), point.size, point.wrong_SN
      )
      by_size[str(point.size)] = {
        "factor": _finite(estimate.factor),
        "low": _finite(estimate.low),
        "high": _finite(estimate.high),
        "extrapolated": estimate.extrapolated,
        "extrapolated_share": round(estimate.extrapolated_share, 3),
        "seeds": len(point.seeds),
      }
    if str(reference_size) in by_size:
      at_reference = by_size[str(reference_size)]
      factors[name] = {**at_reference, "at": reference_size, "by_size": by_size}
  return factors


def _finite(value: float) -> float | None:
  """A rounded factor for JSON: None for infinity."""
  return round(value, 3) if math.isfinite(value) else None


def exponents(results: Results) -> dict[str, dict]:
  """Fits error ≈ b · size^(-a) to every method with at least two sizes.

  Returns:
    By method: exponent a, its 95 % bootstrap interval over seeds (low, high), coefficient b.
  """
  fits = {}
  for name, points in results.items():
    if len(points) < 2:
      continue
    sizes = [point.size for point in points]
    least = [0.5 / point.wrong_SN.size for point in points]  # no mistakes count as half a one
    a, b = scaling.power_law_fit(sizes, np.maximum([point.mean for point in points], least))
    rng, resampled = np.random.default_rng(0), []
    errors = [point.wrong_SN.mean(axis=1) for point in points]
    for _ in range(1000):
      means = np.maximum([rng.choice(by_seed, len(by_seed)).mean() for by_seed in errors], least)
      resampled.append(scaling.power_law_fit(sizes, means)[0])
    low, high = np.quantile(resampled, [0.025, 0.975])
    fits[name] = {
      "exponent": round(a, 4),
      "low": round(float(low), 4),
      "high": round(float(high), 4),
      "coefficient": round(b, 4),
    }
  return fits


def table(results: Results) -> str:
  """Test errors as CSV: a row per method, size and seed, and a row per mean with its interval."""
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(["method", "problems", "seed", "test_error", "low", "high"])
  for name, points in results.items():
    for point in points:
      for seed, error in zip(point.seeds, point.wrong_SN.mean(axis=1), strict=True):
        writer.writerow([name, point.size, seed, f"{error:.5f}", "", ""])
      writer.writerow(
        [name, point.size, "mean", f"{point.mean:.5f}", f"{point.low:.5f}", f"{point.high:.5f}"]
      )
  return buffer.getvalue()


def write(config, workdir: epath.PathLike, cells: Sequence[grid.Cell]) -> dict:
  """Writes results.csv, efficiency.json and exponents.json to report/; returns the factors."""
  report = epath.Path(workdir) / "report"
  report.mkdir(parents=True, exist_ok=True)
  points = results(config, workdir, cells)
  factors = efficiency(config, points)
  (report / "results.csv").write_text(table(points))
  manifest.write_json(report / "efficiency.json", factors)
  manifest.write_json(report / "exponents.json", exponents(points))
  return factors


def main(config, workdir: str) -> bool:
  """Makes all cells and writes their results; prints factors, returns whether all cells exist."""
  cells = grid.read(config)
  if not cells:
    raise UserError(
      "study.grid is empty: --config must be a study, such as configs/study_arithmetic.py."
    )
  complete = make(config, workdir, cells)
  factors = write(config, workdir, cells)
  summary = {
    name: {key: value for key, value in factor.items() if key != "by_size"}
    for name, factor in factors.items()
  }
  print(json.dumps(summary))
  if not complete:
    logging.warning("Study: some cells are missing; other processes still work on them.")
  return complete
