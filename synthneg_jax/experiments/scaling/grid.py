"""Cells of a study: a size of D_syn, a seed and a method; each cell writes one small JSON file.

`study.grid` lists them as rows (sizes, methods, overrides). The overrides are leaves of each
method's own stages (methods.py):

    ((250, 500, 1000), ("sft", "rft", "step_dpo"), {})
    ((500,), ("arbitrary", "furthest"), {"dpo.beta": 0.1})

Cells with the same size and seed share a run folder with π_sft, traces and credit. A process locks
the run folder that it works on (runtime/workdir_lock.py), so several machines may share a workdir.
"""

import base64
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from synthneg_jax.data.records import Shards, Trace
from synthneg_jax.experiments.scaling import methods
from synthneg_jax.runtime import config_schema, manifest
from synthneg_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Cell:
  """A method trained on `size` problems with a seed."""

  size: int
  seed: int
  method: methods.Method

  @property
  def name(self) -> str:
    """Name of its JSON file."""
    return f"{self.method.name.replace(',', '-')}_{self.size}_{self.seed}"

  @property
  def unit(self) -> str:
    """Name of its run folder, which other cells share."""
    return f"{self.size}_{self.seed}"


class Row(NamedTuple):
  """A row of study.grid; `methods` are kinds of methods.KINDS."""

  sizes: Sequence[int]
  methods: Sequence[str]
  overrides: Mapping[str, object]


def _rows(config) -> list[Row]:
  """The rows of study.grid.

  Raises:
    UserError: a row is malformed.
  """
  for number, row in enumerate(config.study.grid, start=1):
    well_formed = (
      methods.is_sequence(row) and len(row) == 3 and all(map(methods.is_sequence, row[:2]))
    )
    if not well_formed or not row[0] or not row[1] or not all(map(methods.is_size, row[0])):
      raise UserError(
        f"study.grid: row {number}, {row!r}, must be (sizes in problems, methods, overrides), such "
        'as ((250, 500), ("sft", "rft"), {}).'
      )
  return [Row(*row) for row in config.study.grid]


def read(config) -> list[Cell]:
  """The distinct cells of study.grid, sorted by size.

  Raises:
    UserError: a row of study.grid or study.settings is invalid.
  """
  if not config.study.seeds:
    raise UserError("study.seeds is empty.")
  cells = {}
  for number, row in enumerate(_rows(config), start=1):
    for size, kind in itertools.product(row.sizes, row.methods):
      method = methods.resolve(config, kind, row.overrides, where=f"study.grid: row {number}")
      for seed in config.study.seeds:
        cells.setdefault((size, seed, method.name), cell := Cell(size, seed, method))
      # Check now what a stage would refuse hours later.
      methods.configure(configure(config, cell), method)
  return sorted(cells.values(), key=lambda cell: (cell.size, cell.seed))


def configure(config, cell: Cell):
  """The config of a cell's run folder, which all its methods share.

  Raises:
    UserError: a row of study.settings is malformed.
  """
  leaves = {"seed": cell.seed, "task.train_problems": cell.size}
  for row in methods.settings_rows(config):
    if cell.size in row.sizes_or_kinds:
      leaves |= row.overrides
  return methods.with_leaves(config, leaves)


def config_hash(config, cell: Cell) -> str:
  """A hash of the leaves that affect the cell and differ from the default tree.

  Leaves of stages that the cell does not depend on are excluded. So are defaults, so that published
  cells stay valid when a later version adds a leaf.
  """
  leaves = config_schema.plain(methods.configure(configure(config, cell), cell.method))
  defaults = config_schema.plain(config_schema.default())
  stages = {name.split("/")[0] for name in cell.method.path} | set(
    methods.KINDS[cell.method.kind].sections
  )
  sections = {"seed", "task", "model", "engine", "evaluate"} | stages
  kept = {
    leaf: value
    for leaf, value in leaves.items()
    if leaf.split(".")[0] in sections
    and config_schema.changes_results(leaf)
    and value != defaults[leaf]
  }
  identity = [kept, cell.method.name, cell.seed]
  first = methods.KINDS[cell.method.kind].first
  while first:  # earlier rounds: their own settings, if any
    earlier = methods.resolve(config, first)
    identity += [[first, config_schema.plain(dict(earlier.given))]] if earlier.given else []
    first = methods.KINDS[first].first
  return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def load(folder: epath.Path, config, cell: Cell) -> dict | None:
  """The JSON of a finished cell, or None.

  Raises:
    UserError: the file belongs to another config, or is not a cell's file.
  """
  path = folder / f"{cell.name}.json"
  if not path.exists():
    return None
  try:
    result = json.loads(path.read_text())
    if result["config_hash"] == config_hash(config, cell):
      return result
  except (ValueError, KeyError, TypeError):
    raise UserError(f"{path} is not a cell of a study; delete it to run the cell again.") from None
  raise UserError(
    f"{path} was made with another config; use another --workdir, or delete it to run the cell "
    "again."
  )


def wrong(result: dict) -> np.ndarray:
  """Whether the cell's policy answers each test problem wrong: bool [N], in the order of ids."""
  bits = np.frombuffer(base64.b64decode(result["wrong"]), np.uint8)
  return np.unpackbits(bits, count=result["num_problems"]).astype(bool)


def write(folder: epath.Path, workdir: epath.Path, config, *, cell: Cell, seconds: float) -> dict:
  """Writes a cell's JSON file from its finished run folder, and returns it."""
  test = f"evaluate/{cell.method.name.replace(',', '-')}"
  traces = sorted(
    Shards(workdir / test / "traces", Trace).read(), key=lambda trace: trace.problem_id
  )
  wrong_N = np.array([not trace.correct for trace in traces])
  figures = {name: manifest.figures(workdir, name) for name in (*cell.method.path, test)}
  result = {
    "method": cell.method.name,
    "size": cell.size,
    "seed": cell.seed,
    "config_hash": config_hash(config, cell),
    "test_error": round(float(wrong_N.mean()), 5),
    "num_problems": len(wrong_N),
    "problems": hashlib.sha256(
      "\n".join(trace.problem_id for trace in traces).encode()
    ).hexdigest()[:16],
    "wrong": base64.b64encode(np.packbits(wrong_N).tobytes()).decode(),
    "seconds": round(seconds, 1),
    "stages": figures,
    "versions": manifest.versions(),
    "git_commit": manifest.git_commit(),
  }
  manifest.write_json(folder / f"{cell.name}.json", result)
  return result
