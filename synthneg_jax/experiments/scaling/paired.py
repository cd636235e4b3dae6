"""Paired difference of two methods over runs that were tested on the same problems."""

import json
from collections.abc import Sequence

import numpy as np
from etils import epath

from synthneg_jax.data.records import Shards, Trace
from synthneg_jax.runtime.errors import UserError

_RESAMPLES = 10_000


def errors(workdir: epath.PathLike, method: str) -> dict[str, bool]:
  """Whether each test problem was answered wrong, by problem id.

  Raises:
    UserError: the method was not evaluated in this workdir.
  """
  folder = epath.Path(workdir) / "evaluate" / method
  if not (folder / "manifest.json").exists():
    raise UserError(f"{workdir} has no finished evaluation of {method}.")
  return {trace.problem_id: not trace.correct for trace in Shards(folder / "traces", Trace).read()}


def paired_difference(
  first_RP: np.ndarray, second_RP: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
  """Mean of first - second with a 95 % percentile bootstrap interval.

  Both runs and problems are resampled.

  Args:
    first_RP, second_RP: bool [runs, problems], errors of the two methods, in the same order of
      problems.
    seed: of the resampling.

  Returns:
    (mean, low, high).
  """
  difference_RP = first_RP.astype(np.float64) - second_RP.astype(np.float64)
  runs, problems = difference_RP.shape
  rng = np.random.default_rng(seed)
  run_share = rng.multinomial(runs, np.full(runs, 1 / runs), size=_RESAMPLES) / runs
  problem_share = (
    rng.multinomial(problems, np.full(problems, 1 / problems), size=_RESAMPLES) / problems
  )
  means = np.einsum("nr,rp,np->n", run_share, difference_RP, problem_share, optimize=True)
  low, high = np.quantile(means, [0.025, 0.975])
  return float(difference_RP.mean()), float(low), float(high)


def compare(workdirs: Sequence[str], first: str, second: str) -> dict:
  """The paired difference of two methods' test errors over finished workdirs.

  Raises:
    UserError: a workdir lacks an evaluation, or has other test problems than the first.
  """
  if not workdirs:
    raise UserError("--workdirs names no run.")
  tables = [(errors(workdir, first), errors(workdir, second)) for workdir in workdirs]
  ids = sorted(tables[0][0])
  for workdir, pair in zip(workdirs, tables, strict=True):
    if any(sorted(table) != ids for table in pair):
      raise UserError(f"{workdir} was not tested on the same problems as {workdirs[0]}.")
  first_RP, second_RP = (
    np.array([[table[i][key] for key in ids] for table in tables]) for i in (0, 1)
  )
  mean, low, high = paired_difference(first_RP, second_RP)
  return {
    "first": first,
    "second": second,
    "runs": len(workdirs),
    "problems": len(ids),
    "errors_first": first_RP.mean(axis=1).round(4).tolist(),
    "errors_second": second_RP.mean(axis=1).round(4).tolist(),
    "difference": round(mean, 4),
    "ci95": [round(low, 4), round(high, 4)],
  }


def main(workdirs: Sequence[str], first: str, second: str) -> None:
  """Prints the comparison as JSON."""
  print(json.dumps(compare(workdirs, first, second)))
