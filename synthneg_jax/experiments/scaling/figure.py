"""The paper's figures, each from the cells of a study: its data, its drawing, and what it needs to
be made.

Numbers are those of the NeurIPS version; names without a number are beyond the paper. A figure's a
and b are two tasks there and one drawing here: the config says which task it is of.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from synthneg_jax.experiments.scaling import grid, measures, methods, plots, study
from synthneg_jax.experiments.scaling.paired import paired_difference
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.report import dataflow_diagram, figures
from synthneg_jax.runtime import config_schema, manifest
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import generated

Drawn = tuple[object, str]  # a matplotlib figure, and the same as CSV


@dataclasses.dataclass(frozen=True)
class Data:
  """What a figure is drawn from."""

  config: object
  workdir: epath.Path
  cells: Sequence[grid.Cell]
  found: study.Results
  factors: dict[str, dict]

  def method(self, name: str) -> methods.Method:
    """A method of the study's cells by its name.

    Raises:
      UserError: the study has none of that name.
    """
    for cell in self.cells:
      if cell.method.name == name:
        return cell.method
    raise UserError(
      f"This figure needs cells of {name!r}, which study.grid of this config does not make."
    )

  def label(self, name: str) -> str:
    """A method as figures call it."""
    return self.method(name).label

  def points(self, name: str) -> list[study.Point]:
    """A method's points.

    Raises:
      UserError: the study has none.
    """
    self.method(name)
    if name not in self.found:
      raise UserError(f"This figure needs cells of {name!r}, and none of them is finished.")
    return self.found[name]

  def series(self, name: str, dashed: bool = False) -> plots.Series:
    """A method's test error against problems."""
    points = self.points(name)
    dots = [point.wrong_SN.mean(axis=1).tolist() for point in points]
    columns = zip(
      *((point.size, point.mean, point.low, point.high) for point in points), strict=True
    )
    return plots.Series(self.label(name), *map(list, columns), dots, dashed)

  def stage(self, cell: grid.Cell, name: str) -> dict:
    """What a stage of a cell reported."""
    found = grid.load(self.workdir / "cells", self.config, cell) or {}
    return (found.get("stages") or {}).get(name) or {}


def _factor_text(factor: dict) -> str:
  value = factor["factor"]
  return ("beyond the curve" if value is None else f"{value:.3g}x") + (
    " (extrapolated)" if factor["extrapolated"] else ""
  )


def _against_problems(names: Sequence[str], factors: bool = True) -> Callable[[Data], Drawn]:
  def make(data: Data) -> Drawn:
    series = [data.series(name, dashed=i > 0) for i, name in enumerate(names)]
    reaches = []
    for name in names if factors else ():
      factor = data.factors.get(name)
      if factor and factor["factor"] and not factor["extrapolated"]:
        error = next(point.mean for point in data.points(name) if point.size == factor["at"])
        reaches.append(
          plots.Reach(factor["at"], factor["at"] * factor["factor"], error, _factor_text(factor))
        )
    return plots.against_problems(series, data.config.study.family, reaches), plots.as_csv(
      series, "problems"
    )

  return make


def _settings(data: Data, kind: str, leaf: str) -> list[tuple[float, study.Point]]:
  """(value, point) of every method of a kind that sets this leaf alone, or nothing, at
  study.reference_size.
  """
  found = []
  for name, points in data.found.items():
    method = data.method(name)
    if method.kind == kind and set(method.settings) <= {leaf}:
      value = dict(config_schema.leaves(methods.configure(data.config, method)))[leaf]
      found += [
        (value, point) for point in points if point.size == data.config.study.reference_size
      ]
  return sorted(found, key=lambda pair: pair[0])


def _swept(data: Data, kinds: Sequence[str], leaf: str, label: str) -> Drawn:
  series = []
  for kind in kinds:
    of_kind = _settings(data, kind, leaf)
    if of_kind:
      values, points = zip(*of_kind, strict=True)
      parts = [[getattr(point, part) for point in points] for part in ("mean", "low", "high")]
      dots = [point.wrong_SN.mean(axis=1).tolist() for point in points]
      series.append(plots.Series(methods.KINDS[kind].label, values, *parts, dots))
  if max((len(one.x) for one in series), default=0) < 2:  # one value is no sweep
    raise UserError(
      f"This figure needs cells that set {leaf} at {data.config.study.reference_size} problems; "
      "study.grid has none."
    )
  baseline = [
    p for p in data.points(data.config.study.baseline) if p.size == data.config.study.reference_size
  ]
  level = (baseline[0].mean, data.label(data.config.study.baseline)) if baseline else None
  title = f"{data.config.study.family}, {data.config.study.reference_size} problems"
  return plots.against_setting(series, title, label, level=level), plots.as_csv(series, leaf)


def _bars(names: Sequence[str]) -> Callable[[Data], Drawn]:
  def make(data: Data) -> Drawn:
    series, size = [], data.config.study.reference_size
    for name in names:
      for point in data.points(name):
        if point.size == size:
          dots = [point.wrong_SN.mean(axis=1).tolist()]
          series.append(
            plots.Series(data.label(name), [size], [point.mean], [point.low], [point.high], dots)
          )
    return plots.bars(
      series, f"{data.config.study.family}, {size} problems", "test error, %"
    ), plots.as_csv(series, "problems")

  return make


def _way(data: Data) -> Drawn:
  size, seed = data.config.study.reference_size, data.config.study.seeds[0]
  cells = {
    name: grid.Cell(size, seed, data.method(name))
    for name in (data.config.study.baseline, "rft", "step_dpo")
  }
  for name in cells:
    if size not in [point.size for point in data.points(name)]:
      raise UserError(
        f"This figure needs the cell of {name} from {size} problems (study.reference_size)."
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
  return dataflow_diagram.draw(
    counts, f"{data.config.study.family}, {size} problems, seed {seed}"
  ), dataflow_diagram.as_csv(counts)


def _measured(
  data: Data,
  name: str,
  measure: Callable[[Experiment], dict],
  *,
  size: int | None = None,
  needs: str = "sample",
) -> list[dict]:
  """A measure in the run folder of every seed at a size (study.reference_size), kept in measures/;
  `needs` is a stage.
  """
  made, size = [], size or data.config.study.reference_size
  for seed in data.config.study.seeds:
    path = data.workdir / "measures" / f"{name}_{size}_{seed}.json"
    if not path.exists():
      unit = grid.Cell(size, seed, data.method(data.config.study.baseline))
      folder = data.workdir / "runs" / unit.unit
      if not (folder / needs / "manifest.json").exists():
        raise UserError(
          f"This figure measures in {folder}, which is not there; `synthneg study` makes it."
        )
      path.parent.mkdir(parents=True, exist_ok=True)
      manifest.write_json(path, measure(Experiment.open(grid.configure(data.config, unit), folder)))
    made.append(json.loads(path.read_text()))
  return made


def _likelihoods(data: Data) -> Drawn:
  made = _measured(data, "likelihoods", measures.likelihoods)
  joined = {name: sum((each[name] for each in made), []) for name in ("D_plus", "D_syn")}
  labels = {"D_plus": "self-generated, right", "D_syn": "teacher's"}
  samples = [(labels[name], values) for name, values in joined.items()]
  rows = [
    plots.Series(
      labels[name],
      list(data.config.study.seeds),
      *[[float(np.mean(each[name])) for each in made]] * 3,
    )
    for name in joined
  ]
  title = f"{data.config.study.family}, {data.config.study.reference_size} problems"
  return plots.distributions(
    samples, title, "negative log-likelihood under the base, nats a token"
  ), plots.as_csv(rows, "seed")


FIGURE_7 = ("sft", "arbitrary", "furthest", "step_dpo")
HELD_OUT, ROLLOUTS = 300, 8  # problems and rollouts a prefix
LEAST_RESPONSES = 20  # of a seed that have a step, for the step to be drawn


def _held_out(data: Data) -> list[dict]:
  for name in FIGURE_7:
    data.points(name)
  folders = [data.method(name).folder for name in FIGURE_7]

  def measure(experiment: Experiment) -> dict:
    problems = sorted(experiment.problems("test").values(), key=lambda problem: problem.id)[
      :HELD_OUT
    ]
    return measures.held_out(experiment, folders, problems, ROLLOUTS)

  return _measured(data, "values", measure)


def _by_step(data: Data) -> Drawn:
  made, series = _held_out(data), []
  for name in FIGURE_7:
    each = [one[data.method(name).folder] for one in made]
    width = min(sum(count >= LEAST_RESPONSES for count in one["responses"]) for one in each)
    values = np.array([[one["start"], *one["mean"][:width]] for one in each])
    mean, half = values.mean(axis=0), _half_width(values)
    series.append(
      plots.Series(
        data.label(name), list(range(width + 1)), mean, mean - half, mean + half, values.T.tolist()
      )
    )
  title = f"{data.config.study.family}, {data.config.study.reference_size} problems"
  return plots.by_step(series, title, "mean Q on held-out problems"), plots.as_csv(series, "step")


def _half_width(values) -> np.ndarray:
  """Of a 95 % interval of the mean over seeds, which are the first axis."""
  return 1.96 * values.std(axis=0, ddof=len(values) > 1) / np.sqrt(len(values))


def _critical(data: Data) -> Drawn:
  made = [{folder: of["critical"] for folder, of in one.items()} for one in _held_out(data)]
  return _q_before_pits(data, FIGURE_7, made)


def _q_before_pits(
  data: Data, names: Sequence[str], made: Sequence[dict[str, list[float]]]
) -> Drawn:
  """Bars of the mean Q before SFT's pits; `made` has a seed's values by folder."""
  series = []
  for name in names:
    each = [one[data.method(name).folder] for one in made]
    values, rng = [float(np.mean(one)) for one in each], np.random.default_rng(0)
    draws = [
      np.mean(
        [np.mean(rng.choice(each[i], len(each[i]))) for i in rng.integers(0, len(each), len(each))]
      )
      for _ in range(2000)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    series.append(
      plots.Series(data.label(name), [0], [float(np.mean(values))], [low], [high], [values])
    )
  title, label = (
    f"{data.config.study.family}, {data.config.study.reference_size} problems",
    "mean Q before SFT's pits, held-out problems",
  )
  return plots.bars(series, title, label, percent=False), plots.as_csv(series, "-")


SAMPLED, SAMPLES = ("sft", "rft", "step_dpo"), 16  # methods, and samples a problem


def _many_samples(data: Data) -> Drawn:
  for name in SAMPLED:
    data.points(name)
  folders = {name: data.method(name).folder for name in SAMPLED}

  def measure(experiment: Experiment) -> dict:
    problems = sorted(experiment.problems("test").values(), key=lambda problem: problem.id)[
      :HELD_OUT
    ]
    return measures.many_samples(experiment, list(folders.values()), problems, SAMPLES)

  made, series = _measured(data, "samples", measure), []
  for kind, words in (("pass", "any of k"), ("majority", "majority of k")):
    for name in SAMPLED:
      values = np.array([one[folders[name]][kind] for one in made])
      mean, half = values.mean(axis=0), _half_width(values)
      label = f"{data.label(name)}, {words}"
      ks = made[0][folders[name]]["k"]
      series.append(
        plots.Series(
          label, ks, mean, mean - half, mean + half, values.T.tolist(), kind == "majority"
        )
      )
  title = (
    f"{data.config.study.family}, {data.config.study.reference_size} problems; {HELD_OUT} held out"
  )
  return plots.against_setting(series, title, "k, samples a problem"), plots.as_csv(series, "k")


def _true_pits(data: Data) -> Drawn:
  known = [name for name, task in generated.TASKS.items() if task.truth]
  if data.config.task.name not in known:
    raise UserError(
      f"This figure needs a task whose pits are known exactly ({', '.join(known)}), not "
      f"{data.config.task.name!r}."
    )
  data.points("step_dpo")
  folder = data.method("step_dpo").pairs_folder
  made, series = (
    _measured(data, "true_pits", lambda experiment: measures.true_pits(experiment, folder)),
    [],
  )
  for part, words in (("pits", "pit by {}"), ("labels", "label {}")):
    for name in made[0][part]:
      values = np.array([one[part][name] for one in made])
      half = _half_width(values)
      label = words.format(name.replace("_", " "))
      series.append(
        plots.Series(
          label,
          [0],
          [values.mean()],
          [values.mean() - half],
          [values.mean() + half],
          [values.tolist()],
        )
      )
  title = f"{data.config.study.family}, {data.config.study.reference_size} problems"
  label = "right, % of wrong traces and of pairs"
  return plots.bars(series, title, label), plots.as_csv(series, "-")


EQUATION_4 = ("sft", "rft", "step_dpo", "advantage_weighted")


def _settings_bars(data: Data) -> Drawn:
  """Every method at study.reference_size; the table also has all paired differences over the seeds
  that both have.
  """
  size, series, points = data.config.study.reference_size, [], {}
  for name in dict.fromkeys(cell.method.name for cell in data.cells):
    for point in data.found.get(name, []):
      if point.size == size:
        points[name] = point
        dots = [point.wrong_SN.mean(axis=1).tolist()]
        series.append(
          plots.Series(data.label(name), [size], [point.mean], [point.low], [point.high], dots)
        )
  if not series:
    raise UserError(
      f"This figure needs cells from {size} problems (study.reference_size), and none is finished."
    )
  table = list(series)
  for (first, one), (second, other) in itertools.combinations(points.items(), 2):
    seeds = sorted(set(one.seeds) & set(other.seeds))
    if seeds:
      pair = [each.wrong_SN[np.isin(each.seeds, seeds)] for each in (one, other)]
      dots = [(pair[0].mean(axis=1) - pair[1].mean(axis=1)).tolist()]
      mean, low, high = paired_difference(*pair)
      table.append(
        plots.Series(
          f"{data.label(first)} minus {data.label(second)}", [size], [mean], [low], [high], dots
        )
      )
  title = f"{data.config.study.family}, {size} problems"
  return plots.bars(series, title, "test error, %"), plots.as_csv(table, "problems")


def _critical_of(names: Sequence[str]) -> Callable[[Data], Drawn]:
  def make(data: Data) -> Drawn:
    for name in names:
      data.points(name)
    folders = [data.method(name).folder for name in names]

    def measure(experiment: Experiment) -> dict:
      problems = sorted(experiment.problems("test").values(), key=lambda problem: problem.id)[
        :HELD_OUT
      ]
      return measures.critical(experiment, folders, problems, ROLLOUTS)

    return _q_before_pits(data, names, _measured(data, "critical", measure))

  return make


def _shifts(data: Data) -> Drawn:
  names = [name for name in EQUATION_4 if name != data.config.study.baseline]
  for name in names:
    data.points(name)
  credited = data.method("advantage_weighted")
  folders = [data.method(name).folder for name in names]
  made = _measured(
    data, "shifts", lambda experiment: measures.shifts(experiment, folders, credited.second)
  )
  series = []
  for name, folder in zip(names, folders, strict=True):
    each = [one[folder] for one in made]
    width = min(len(one["mean"]) for one in each)
    x, values = (np.array([one[part][:width] for one in each]) for part in ("middles", "mean"))
    mean, half = values.mean(axis=0), _half_width(values)
    slope, correlation = (np.mean([one[part] for one in each]) for part in ("slope", "correlation"))
    label = f"{data.label(name)}: slope {slope:.2g}, r {correlation:.2f}"
    series.append(
      plots.Series(
        label, x.mean(axis=0).round(2), mean, mean - half, mean + half, values.T.tolist()
      )
    )
  beta = methods.configure(data.config, credited).rft.advantage_beta
  ends = np.array([-0.5, 0.5])
  series.append(plots.Series(f"theorem, β = {beta:g}", ends, *[ends / beta] * 3, dashed=True))
  rows = list(series)
  for part in ("slope", "correlation", "good", "bad"):
    for name, folder in zip(names, folders, strict=True):
      values = np.array([one[folder][part] for one in made])
      mean, half = values.mean(), _half_width(values)
      rows.append(
        plots.Series(
          f"{part}, {data.label(name)}",
          [0],
          [mean],
          [mean - half],
          [mean + half],
          [values.tolist()],
        )
      )
  title = f"{data.config.study.family}, {data.config.study.reference_size} problems"
  drawn = plots.against_setting(
    series,
    title,
    "A less the mean at its prefix",
    log=False,
    value="log π/π_sft less its mean, nats",
  )
  return drawn, plots.as_csv(rows, "advantage")


COMPUTED = ("sft", "rft", "step_dpo")


def _against_compute(data: Data) -> Drawn:
  longer = [
    name
    for name in data.found
    if name != "sft" and set(data.method(name).settings) == {"sft.num_epochs"}
  ]
  names = [*COMPUTED, *longer]
  series = []
  for name in names:
    path, columns = data.method(name).path, []
    points = [
      p for p in data.points(name) if name == names[0] or p.size == data.config.study.reference_size
    ]
    for point in points:
      costs = _measured(
        data,
        f"compute-{name}",
        lambda experiment, path=path: measures.compute(experiment, path),
        size=point.size,
        needs=path[-1],
      )
      columns.append(
        (float(np.mean([sum(cost.values()) for cost in costs])), point.mean, point.low, point.high)
      )
    dots = [point.wrong_SN.mean(axis=1).tolist() for point in points]
    series.append(
      plots.Series(data.label(name), *map(list, zip(*columns, strict=True)), dots, name != names[0])
    )
  return plots.against_compute(series, data.config.study.family), plots.as_csv(series, "operations")


def _samples_kept(data: Data) -> Drawn:
  return _swept(data, ("rft",), "rft.max_per_problem", "right samples a problem, at most")


def _betas(data: Data) -> Drawn:
  return _swept(data, ("arbitrary", "furthest", "dpop", "step_dpo"), "dpo.beta", "β")


ONE_SAMPLE = methods.name_of("rft", {"rft.max_per_problem": 1})
FIGURES: dict[str, Callable[[Data], Drawn]] = {
  "1": _way,
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


def data(config, workdir: epath.PathLike) -> Data:
  """What figures are drawn from: the finished cells of a study's workdir."""
  cells = grid.read(config)
  found = study.results(config, workdir, cells)
  return Data(config, epath.Path(workdir), cells, found, study.efficiency(config, found))


def write(of: Data, name: str) -> list[epath.Path]:
  """Draws one figure as report/figure_<name>.svg, .png and .csv; returns the files."""
  figure, table = FIGURES[name](of)
  folder = of.workdir / "report"
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / f"figure_{name}.{ending}" for ending in ("svg", "png", "csv")]
  paths[0].write_text(figures.svg_file(figure))
  paths[1].write_bytes(figures.png(figure))
  paths[2].write_text(table)
  return paths


def check(names: Sequence[str], where: str) -> None:
  """Refuses a figure that there is not.

  Raises:
    UserError: says `where` it was asked for.
  """
  for name in names:
    if name not in FIGURES:
      raise UserError(f"{where} names {name!r}; figures are {', '.join(FIGURES)}.")


def main(config, workdir: str, names: Sequence[str]) -> None:
  """Makes the study's missing cells, then the figures; prints their files."""
  check(names, "--figure")
  if not study.make(config, workdir, grid.read(config)):
    raise UserError(
      f"Other processes still work on cells of {workdir}; draw again when they are done."
    )
  of = data(config, workdir)
  for name in names:
    print("\n".join(map(str, write(of, name))))


def whole_study(config, workdir: str) -> None:
  """A study with the figures that it ends in."""
  check(config.study.figures, "study.figures")
  if study.main(config, workdir):
    main(config, workdir, config.study.figures)
