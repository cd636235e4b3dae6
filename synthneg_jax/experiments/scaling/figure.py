"""The paper's figures from a study's cells: data, drawing, and what each figure needs.

Numbers follow the NeurIPS version; names without a number are beyond the paper. Parts a and b of a
figure show two tasks in the paper and are one drawing here, for the config's task.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from synthneg_jax.data.records import Problem
from synthneg_jax.experiments.scaling import grid, measures, methods, plots, study
from synthneg_jax.experiments.scaling.paired import paired_difference
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.report import dataflow_diagram, figures
from synthneg_jax.runtime import config_schema, manifest
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import generated

Drawn = tuple[object, str]  # a matplotlib figure, and its data as CSV


@dataclasses.dataclass(frozen=True)
class Data:
  """Inputs of a figure.

  Attributes:
    config: of the study.
    workdir: of the study.
    cells: of study.grid, finished or not.
    results: of the finished cells.
    factors: efficiency factors by method.
  """

  config: object
  workdir: epath.Path
  cells: Sequence[grid.Cell]
  results: study.Results
  factors: dict[str, dict]

  @property
  def size(self) -> int:
    """study.reference_size, in problems."""
    return self.config.study.reference_size

  @property
  def title(self) -> str:
    """Title of figures at the reference size."""
    return f"{self.config.study.family}, {self.size} problems"

  def method(self, name: str) -> methods.Method:
    """A method of the study's cells by its name.

    Raises:
      UserError: the study has no such method.
    """
    for cell in self.cells:
      if cell.method.name == name:
        return cell.method
    raise UserError(
      f"This figure needs cells of {name!r}, which are not in study.grid of this config."
    )

  def label(self, name: str) -> str:
    """A method's label in figures."""
    return self.method(name).label

  def points(self, name: str) -> list[study.Point]:
    """A method's points.

    Raises:
      UserError: no cell of the method is finished.
    """
    self.method(name)
    if name not in self.results:
      raise UserError(f"This figure needs cells of {name!r}, and none of them is finished.")
    return self.results[name]

  def series(self, name: str, dashed: bool = False) -> plots.Series:
    """A method's test error against problems."""
    return _point_series(self.label(name), self.points(name), dashed=dashed)

  def stage(self, cell: grid.Cell, name: str) -> dict:
    """Figures of a stage of a cell; empty if there are none."""
    cell_json = grid.load(self.workdir / "cells", self.config, cell) or {}
    return (cell_json.get("stages") or {}).get(name) or {}


def _point_series(
  label: str,
  points: Sequence[study.Point],
  x: Sequence[float] | None = None,
  *,
  dashed: bool = False,
) -> plots.Series:
  """A series of test errors; x defaults to the points' sizes."""
  return plots.Series(
    label,
    [point.size for point in points] if x is None else x,
    mean=[point.mean for point in points],
    low=[point.low for point in points],
    high=[point.high for point in points],
    dots=[point.wrong_SN.mean(axis=1).tolist() for point in points],
    dashed=dashed,
  )


def _seed_series(label: str, x: Sequence[float], values, *, dashed: bool = False) -> plots.Series:
  """A series of means over seeds with 95 % intervals, from values [seeds, len(x)]."""
  values = np.asarray(values)
  mean = values.mean(axis=0)
  half = 1.96 * values.std(axis=0, ddof=len(values) > 1) / np.sqrt(len(values))
  return plots.Series(label, x, mean, mean - half, mean + half, values.T.tolist(), dashed)


def _factor_text(factor: dict) -> str:
  value = factor["factor"]
  return ("beyond the curve" if value is None else f"{value:.3g}x") + (
    " (extrapolated)" if factor["extrapolated"] else ""
  )


def _against_problems(names: Sequence[str], factors: bool = True) -> Callable[[Data], Drawn]:
  def draw(data: Data) -> Drawn:
    series = [data.series(name, dashed=i > 0) for i, name in enumerate(names)]
    reaches = []
    for name in names if factors else ():
      factor = data.factors.get(name)
      if factor and factor["factor"] and not factor["extrapolated"]:
        error = next(point.mean for point in data.points(name) if point.size == factor["at"])
        reaches.append(
          plots.Reach(factor["at"], factor["at"] * factor["factor"], error, _factor_text(factor))
        )
    drawing = plots.against_problems(series, data.config.study.family, reaches)
    return drawing, plots.as_csv(series, "problems")

  return draw


def _swept(data: Data, kinds: Sequence[str], leaf: str, label: str) -> Drawn:
  """Test error against a leaf, for methods that override this leaf alone, or nothing."""
  series = []
  for kind in kinds:
    pairs = []
    for name, points in data.results.items():
      method = data.method(name)
      if method.kind == kind and set(method.settings) <= {leaf}:
        value = dict(config_schema.leaves(methods.configure(data.config, method)))[leaf]
        pairs += [(value, point) for point in points if point.size == data.size]
    if pairs:
      values, points = zip(*sorted(pairs, key=lambda pair: pair[0]), strict=True)
      series.append(_point_series(methods.KINDS[kind].label, points, values))
  if max((len(line.x) for line in series), default=0) < 2:
    raise UserError(
      f"This figure needs cells that set {leaf} at {data.size} problems; study.grid has none."
    )
  baseline = data.config.study.baseline
  means = [point.mean for point in data.points(baseline) if point.size == data.size]
  level = (means[0], data.label(baseline)) if means else None
  drawing = plots.against_setting(series, data.title, label, level=level)
  return drawing, plots.as_csv(series, leaf)


def _reference_series(data: Data, name: str) -> list[plots.Series]:
  """A method's test error at the reference size; empty if it has none."""
  points = [point for point in data.points(name) if point.size == data.size]
  return [_point_series(data.label(name), points)] if points else []


def _bars(names: Sequence[str]) -> Callable[[Data], Drawn]:
  def draw(data: Data) -> Drawn:
    series = [line for name in names for line in _reference_series(data, name)]
    if not series:
      raise UserError(f"No cell of {', '.join(names)} has {data.size} problems yet.")
    return plots.bars(series, data.title, "test error, %"), plots.as_csv(series, "problems")

  return draw


def _dataflow(data: Data) -> Drawn:
  seed = data.config.study.seeds[0]
  cells = {
    name: grid.Cell(data.size, seed, data.method(name))
    for name in (data.config.study.baseline, "rft", "step_dpo")
  }
  for name in cells:
    if data.size not in [point.size for point in data.points(name)]:
      raise UserError(
        f"This figure needs the cell of {name} from {data.size} problems (study.reference_size)."
      )
  last = cells["step_dpo"]
  sft, sample, credit, pairs = (
    data.stage(last, name) for name in ("sft", "sample", "credit", last.method.pairs_folder)
  )
  errors = [
    grid.load(data.workdir / "cells", data.config, cell)["test_error"] for cell in cells.values()
  ]
  counts = dataflow_diagram.Counts(
    problems=data.stage(last, "synthesize")["train"],
    solutions=sft["solutions"],
    traces=sample["traces"],
    right=sample["reasons"].get("right", 0),
    wrong=sample["reasons"].get("wrong", 0),
    rft=data.stage(cells["rft"], "rft")["solutions"],
    credited=credit["traces"],
    steps=credit["steps"],
    rollouts=credit["rollouts"],
    pits=credit["traces"] - pairs["dropped"]["without_pit"],
    pairs=pairs["pairs"],
    errors=tuple(errors),
  )
  drawing = dataflow_diagram.draw(counts, f"{data.title}, seed {seed}")
  return drawing, dataflow_diagram.as_csv(counts)


def _measured(
  data: Data,
  name: str,
  measure: Callable[[Experiment], dict],
  *,
  size: int | None = None,
  needs: str = "sample",
) -> list[dict]:
  """Measures the run folder of each seed at one size; results are cached in measures/.

  Beside each result stands what it was measured of: the cell's config and the run folder's stages.
  A result of another config or of a stage that has changed since is measured anew.

  Args:
    data: of the figure.
    name: of the measure.
    measure: computes it from a run folder.
    size: in problems; None for the reference size.
    needs: a stage that the run folder must have finished.
  """
  results, size = [], size or data.size
  for seed in data.config.study.seeds:
    path = data.workdir / "measures" / f"{name}_{size}_{seed}.json"
    cell = grid.Cell(size, seed, data.method(data.config.study.baseline))
    folder = data.workdir / "runs" / cell.unit
    source = path.with_suffix(".source")
    now = {
      "config": grid.config_hash(data.config, cell),
      "stages": {
        str(file.parent.relative_to(folder)): json.loads(file.read_text())["identity"]
        for pattern in ("*", "*/*", "*/*/*")
        for file in folder.glob(f"{pattern}/manifest.json")
      },
    }
    if not path.exists() or (source.exists() and _is_stale(json.loads(source.read_text()), now)):
      if not (folder / needs / "manifest.json").exists():
        raise UserError(
          f"This figure needs the run folder {folder}, which is missing; `synthneg study` makes it."
        )
      path.parent.mkdir(parents=True, exist_ok=True)
      source.unlink(missing_ok=True)
      manifest.write_json(path, measure(Experiment.open(grid.configure(data.config, cell), folder)))
      manifest.write_json(source, now)
    results.append(json.loads(path.read_text()))
  return results


def _is_stale(source: dict, now: dict) -> bool:
  """Whether a result's config, or a stage of the run folder that is still there, has changed."""
  stages = now["stages"]
  changed = any(stages.get(name, known) != known for name, known in source["stages"].items())
  return changed or source["config"] != now["config"]


def _likelihoods(data: Data) -> Drawn:
  by_seed = _measured(data, "likelihoods", measures.likelihoods)
  samples, rows = [], []
  for name, label in (("D_plus", "self-generated, right"), ("D_syn", "teacher's")):
    samples.append((label, [value for one_seed in by_seed for value in one_seed[name]]))
    means = [float(np.mean(one_seed[name])) for one_seed in by_seed]
    rows.append(plots.Series(label, list(data.config.study.seeds), means, means, means))
  label = "negative log-likelihood under the base model, nats per token"
  return plots.distributions(samples, data.title, label), plots.as_csv(rows, "seed")


FIGURE_7 = ("sft", "arbitrary", "furthest", "step_dpo")
HELD_OUT, ROLLOUTS = 300, 8  # problems, and rollouts per prefix
LEAST_RESPONSES = 20  # a step is drawn if every seed has this many responses with the step


def _held_out_problems(experiment: Experiment) -> list[Problem]:
  problems = experiment.problems("test").values()
  return sorted(problems, key=lambda problem: problem.id)[:HELD_OUT]


def _folders(data: Data, names: Sequence[str]) -> list[str]:
  """The stage folders of methods, each of which must have finished cells."""
  for name in names:
    data.points(name)
  return [data.method(name).folder for name in names]


def _held_out(data: Data) -> list[dict]:
  folders = _folders(data, FIGURE_7)

  def measure(experiment: Experiment) -> dict:
    return measures.held_out(experiment, folders, _held_out_problems(experiment), ROLLOUTS)

  return _measured(data, "values", measure)


def _by_step(data: Data) -> Drawn:
  by_seed, series = _held_out(data), []
  for name in FIGURE_7:
    runs = [one_seed[data.method(name).folder] for one_seed in by_seed]
    width = min(sum(count >= LEAST_RESPONSES for count in run["responses"]) for run in runs)
    values = [[run["start"], *run["mean"][:width]] for run in runs]
    series.append(_seed_series(data.label(name), list(range(width + 1)), values))
  drawing = plots.by_step(series, data.title, "mean Q on held-out problems")
  return drawing, plots.as_csv(series, "step")


def _critical(data: Data) -> Drawn:
  by_seed = [
    {folder: run["critical"] for folder, run in one_seed.items()} for one_seed in _held_out(data)
  ]
  return _q_before_pits(data, FIGURE_7, by_seed)


def _q_before_pits(
  data: Data, names: Sequence[str], by_seed: Sequence[dict[str, list[float]]]
) -> Drawn:
  """Bars of the mean Q before SFT's pits, from the values of each seed by folder."""
  series = []
  for name in names:
    runs = [one_seed[data.method(name).folder] for one_seed in by_seed]
    means, rng = [float(np.mean(run)) for run in runs], np.random.default_rng(0)
    draws = []
    for _ in range(2000):
      drawn_runs = [runs[i] for i in rng.integers(0, len(runs), len(runs))]
      draws.append(np.mean([np.mean(rng.choice(run, len(run))) for run in drawn_runs]))
    low, high = np.quantile(draws, [0.025, 0.975])
    series.append(
      plots.Series(data.label(name), [0], [float(np.mean(means))], [low], [high], [means])
    )
  label = "mean Q before SFT's pits, held-out problems"
  return plots.bars(series, data.title, label, percent=False), plots.as_csv(series, "-")


SAMPLED, SAMPLES = ("sft", "rft", "step_dpo"), 16  # methods, and samples per problem


def _many_samples(data: Data) -> Drawn:
  folders = dict(zip(SAMPLED, _folders(data, SAMPLED), strict=True))

  def measure(experiment: Experiment) -> dict:
    problems = _held_out_problems(experiment)
    return measures.many_samples(experiment, list(folders.values()), problems, SAMPLES)

  by_seed, series = _measured(data, "samples", measure), []
  for kind, words in (("pass", "any of k"), ("majority", "majority of k")):
    for name, folder in folders.items():
      values = [one_seed[folder][kind] for one_seed in by_seed]
      label, ks = f"{data.label(name)}, {words}", by_seed[0][folder]["k"]
      series.append(_seed_series(label, ks, values, dashed=kind == "majority"))
  title = f"{data.title}; {HELD_OUT} held out"
  return plots.against_setting(series, title, "k, samples per problem"), plots.as_csv(series, "k")


def _true_pits(data: Data) -> Drawn:
  known = [name for name, task in generated.TASKS.items() if task.truth]
  if data.config.task.name not in known:
    raise UserError(
      f"This figure needs a task whose pits are known exactly ({', '.join(known)}), not "
      f"{data.config.task.name!r}."
    )
  data.points("step_dpo")
  folder = data.method("step_dpo").pairs_folder

  def measure(experiment: Experiment) -> dict:
    return measures.true_pits(experiment, folder)

  by_seed, series = _measured(data, "true_pits", measure), []
  for part, words in (("pits", "pit by {}"), ("labels", "label {}")):
    for name in by_seed[0][part]:
      label = words.format(name.replace("_", " "))
      series.append(_seed_series(label, [0], [[one_seed[part][name]] for one_seed in by_seed]))
  label = "right, % of wrong traces and of pairs"
  return plots.bars(series, data.title, label), plots.as_csv(series, "-")


EQUATION_4 = ("sft", "rft", "step_dpo", "advantage_weighted")


def _settings_bars(data: Data) -> Drawn:
  """Every method at the reference size; the table adds all paired differences over common seeds."""
  series, points = [], {}
  for name in dict.fromkeys(cell.method.name for cell in data.cells):
    for point in data.results.get(name, []):
      if point.size == data.size:
        points[name] = point
        series.append(_point_series(data.label(name), [point]))
  if not series:
    raise UserError(
      f"This figure needs cells from {data.size} problems (study.reference_size), and none is "
      "finished."
    )
  rows = list(series)
  for first, second in itertools.combinations(points, 2):
    seeds = sorted(set(points[first].seeds) & set(points[second].seeds))
    if seeds:
      wrong = [
        points[name].wrong_SN[np.isin(points[name].seeds, seeds)] for name in (first, second)
      ]
      dots = [(wrong[0].mean(axis=1) - wrong[1].mean(axis=1)).tolist()]
      mean, low, high = paired_difference(*wrong)
      label = f"{data.label(first)} minus {data.label(second)}"
      rows.append(plots.Series(label, [data.size], [mean], [low], [high], dots))
  return plots.bars(series, data.title, "test error, %"), plots.as_csv(rows, "problems")


def _critical_of(names: Sequence[str]) -> Callable[[Data], Drawn]:
  def draw(data: Data) -> Drawn:
    folders = _folders(data, names)

    def measure(experiment: Experiment) -> dict:
      return measures.critical(experiment, folders, _held_out_problems(experiment), ROLLOUTS)

    return _q_before_pits(data, names, _measured(data, "critical", measure))

  return draw


def _shifts(data: Data) -> Drawn:
  names = [name for name in EQUATION_4 if name != data.config.study.baseline]
  folders = _folders(data, names)
  credited = data.method("advantage_weighted")

  def measure(experiment: Experiment) -> dict:
    return measures.shifts(experiment, folders, credited.second)

  by_seed, series = _measured(data, "shifts", measure), []
  for name, folder in zip(names, folders, strict=True):
    runs = [one_seed[folder] for one_seed in by_seed]
    width = min(len(run["mean"]) for run in runs)
    x = np.array([run["middles"][:width] for run in runs]).mean(axis=0).round(2)
    slope, correlation = (np.mean([run[part] for run in runs]) for part in ("slope", "correlation"))
    label = f"{data.label(name)}: slope {slope:.2g}, r {correlation:.2f}"
    series.append(_seed_series(label, x, [run["mean"][:width] for run in runs]))
  beta = methods.configure(data.config, credited).rft.advantage_beta
  ends = np.array([-0.5, 0.5])
  series.append(plots.Series(f"theorem, β = {beta:g}", ends, *[ends / beta] * 3, dashed=True))
  rows = list(series)
  for part in ("slope", "correlation", "good", "bad"):
    for name, folder in zip(names, folders, strict=True):
      values = [[one_seed[folder][part]] for one_seed in by_seed]
      rows.append(_seed_series(f"{part}, {data.label(name)}", [0], values))
  drawing = plots.against_setting(
    series,
    data.title,
    "A minus its mean at the prefix",
    log=False,
    value="log π/π_sft minus its mean, nats",
  )
  return drawing, plots.as_csv(rows, "advantage")


COMPUTED = ("sft", "rft", "step_dpo")


def _against_compute(data: Data) -> Drawn:
  longer = [
    name
    for name in data.results
    if name != "sft" and set(data.method(name).settings) == {"sft.num_epochs"}
  ]
  series = []
  for name in (*COMPUTED, *longer):
    path, operations = data.method(name).path, []

    def measure(experiment: Experiment, path=path) -> dict:
      return measures.compute(experiment, path)

    is_curve = name == COMPUTED[0]
    points = [point for point in data.points(name) if is_curve or point.size == data.size]
    for point in points:
      costs = _measured(data, f"compute-{name}", measure, size=point.size, needs=path[-1])
      operations.append(float(np.mean([sum(cost.values()) for cost in costs])))
    series.append(_point_series(data.label(name), points, operations, dashed=not is_curve))
  return plots.against_compute(series, data.config.study.family), plots.as_csv(series, "operations")


def _samples_kept(data: Data) -> Drawn:
  return _swept(data, ("rft",), "rft.max_per_problem", "maximum right samples per problem")


def _betas(data: Data) -> Drawn:
  return _swept(data, ("arbitrary", "furthest", "dpop", "step_dpo"), "dpo.beta", "β")


ONE_SAMPLE = methods.name_of("rft", {"rft.max_per_problem": 1})
FIGURES: dict[str, Callable[[Data], Drawn]] = {
  "1": _dataflow,
  "2a": _against_problems(("sft", "rft")),
  "2b": _against_problems(("sft", "rft")),
  "2c": _samples_kept,
  "3": _likelihoods,
  "4": _bars(("sft", "rft_clean", "rft_spurious")),
  "5a": _against_problems(("sft", "rft", "step_dpo")),
  "5b": _against_problems(("sft", "rft", "step_dpo")),
  "5c": _betas,
  "7": _by_step,
  "7_critical": _critical,
  "9": _against_problems(("sft", ONE_SAMPLE)),
  "10": _against_problems(("sft", "step_dpo", "step_dpo_both"), factors=False),
  "11": _against_problems(("sft", "rft", "rft_advantage"), factors=False),
  "controls": _bars(("sft", "random_step", "algorithm1", "step_dpo")),
  "rounds": _bars(("sft", "step_dpo", "step_dpo_twice")),
  "samples": _many_samples,
  "compute": _against_compute,
  "true_pits": _true_pits,
  "settings": _settings_bars,
  "equation_4": _against_problems(EQUATION_4),
  "critical": _critical_of(EQUATION_4),
  "shifts": _shifts,
}


def load(config, workdir: epath.PathLike) -> Data:
  """The inputs of figures, from the finished cells of a study's workdir."""
  cells = grid.read(config)
  results = study.results(config, workdir, cells)
  factors = study.efficiency(config, results)
  return Data(config, epath.Path(workdir), cells, results, factors)


def write(data: Data, name: str) -> list[epath.Path]:
  """Writes one figure as report/figure_<name>.svg, .png and .csv; returns the files."""
  drawing, table = FIGURES[name](data)
  folder = data.workdir / "report"
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / f"figure_{name}.{ending}" for ending in ("svg", "png", "csv")]
  paths[0].write_text(figures.svg_file(drawing))
  paths[1].write_bytes(figures.png(drawing))
  paths[2].write_text(table)
  return paths


def check(names: Sequence[str], where: str) -> None:
  """Checks the names of figures.

  Args:
    names: of figures.
    where: the flag or leaf that lists them.

  Raises:
    UserError: there is no figure of this name.
  """
  for name in names:
    if name not in FIGURES:
      raise UserError(f"{where} names {name!r}; figures are {', '.join(FIGURES)}.")


def main(config, workdir: str, names: Sequence[str]) -> None:
  """Makes the study's missing cells, then the figures; prints their paths."""
  check(names, "--figure")
  if not study.make(config, workdir, grid.read(config)):
    raise UserError(
      f"Other processes still work on cells of {workdir}; draw again when they are done."
    )
  data = load(config, workdir)
  for name in names:
    print("\n".join(map(str, write(data, name))))


def whole_study(config, workdir: str) -> None:
  """Makes a study and draws the figures in study.figures."""
  check(config.study.figures, "study.figures")
  if study.main(config, workdir):
    main(config, workdir, config.study.figures)
