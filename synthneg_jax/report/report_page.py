"""The report of one run: a self-contained index.html, and each figure as PNG and CSV beside it.

The dataclasses below hold a report's contents; pipeline/report.py fills them from files. Steps are
numbered from 0 in the data, as in the records, and from 1 in the page.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from etils import epath

from synthneg_jax.report import figures, markup, trace_cards, training_sections
from synthneg_jax.report.trace_cards import ShownTrace


@dataclasses.dataclass(frozen=True)
class Method:
  """The test error of one policy; `error` is None before its test."""

  label: str
  error: float | None = None  # share of the test problems
  low: float | None = None  # of the 95 % interval
  high: float | None = None
  num_problems: int = 0


@dataclasses.dataclass(frozen=True)
class MeanValues:
  """Mean Q by step over the credited wrong traces."""

  means: Sequence[float]  # [S]
  counts: Sequence[int]  # [S] traces with the step
  start: float  # mean V(x) over the same traces
  num_problems: int  # of these traces
  advantages: Sequence[float]  # [S] mean advantage of each step
  advantage_counts: Sequence[int]  # [S] traces whose advantage is known


@dataclasses.dataclass(frozen=True)
class StageState:
  """The state of a stage and the figures it reported."""

  name: str
  state: str  # done, begun, not begun
  figures: Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class Report:
  """The contents of a report; None for results of unfinished stages."""

  title: str
  methods: Sequence[Method]
  values: MeanValues | None
  pits: Sequence[int] | None  # step of each credited wrong trace from 0, -1 for none
  traces: Sequence[ShownTrace] | None
  reasons: Mapping[str, Mapping[str, int]]  # column -> verdict's reason -> responses
  stages: Sequence[StageState]
  # stage -> (label, metrics of each update)
  training: Mapping[str, tuple[str, Sequence[Mapping[str, float]]]]
  config: Mapping[str, object]  # leaves
  changed: Sequence[str]  # leaves with another value than the default
  versions: Mapping[str, str]  # package -> version
  commits: Sequence[str]  # git commits that ran the stages
  devices: Sequence[str]
  command: str  # reproduces the run
  num_rollouts: int
  best_of: int
  pit_rule: str
  pair_mode: str


_STATES = {"done": "done", "begun": "begun, not finished", "not begun": "not begun"}


def _errors(report: Report, folder: markup.Folder) -> str:
  tested = [method for method in report.methods if method.error is not None]
  rows = []
  for m in report.methods:
    cells = ("not done", "", "")
    if m.error is not None:
      interval = f"{100 * m.low:.1f} – {markup.percent(m.high)}"
      cells = (markup.percent(m.error), interval, str(m.num_problems))
    rows.append((markup.escape(m.label), *cells))
  out = markup.table(
    ("method", "test error", "95 % interval", "problems"),
    rows,
    (1, 2, 3),
    caption=(
      "Test error: the share of test problems whose response is not graded right, with one "
      "response per problem. The interval (Wilson) covers the draw of test problems for one "
      "training run. All methods answer the same problems, so two methods may differ even if their "
      "intervals overlap."
    ),
  )
  if not tested:
    return out + markup.missing("Stage evaluate is not done: no method has been tested yet.")
  figure = figures.errors(
    [m.label for m in tested], [m.error for m in tested], [(m.low, m.high) for m in tested]
  )
  drawn = folder.add(
    "errors",
    figure,
    ("method", "test_error", "ci95_low", "ci95_high", "num_problems"),
    [(m.label, m.error, m.low, m.high, m.num_problems) for m in tested],
    label="Test errors with their intervals",
    caption="Test error of each method; the line is the 95 % interval.",
  )
  return f'<div class="side"><div>{out}</div>{drawn}</div>'


def _values(report: Report, folder: markup.Folder) -> str:
  if report.values is None:
    return markup.missing("Stage credit is not done: no step has a value yet.")
  values, pits = report.values, report.pits
  if not values.means:
    return markup.missing(
      "Stage credit found no wrong trace with an answer, so no step has a value."
    )
  under = (
    f" under Best-of-{report.best_of} (at least one of {report.best_of} rollouts is right)"
    if report.best_of > 1
    else ""
  )
  out = (
    "<p>The Q of a step is the probability that the SFT policy reaches the right answer from the "
    f"end of that step{under}, estimated from {report.num_rollouts} rollouts. The last step of a "
    "wrong trace has Q = 0 without rollouts. A step's advantage is its Q minus the Q of the "
    "previous step, or, for the first step, minus the value of the problem alone, estimated from "
    "its samples. The pit is the step to blame by the rule "
    f"<code>{markup.escape(report.pit_rule)}</code>.</p>"
  )
  mean = folder.add(
    "mean_q",
    figures.mean_values(values.means, values.counts, values.start),
    ("step", "mean_q", "traces"),
    [
      (0, values.start, len(pits)),
      *(
        (s, q if n else "", n)
        for s, (q, n) in enumerate(zip(values.means, values.counts, strict=True), start=1)
      ),
    ],
    label="Mean Q by step",
    caption=(
      "Mean Q after each step over the wrong traces with a known Q there, including last steps (Q "
      f"= 0); {len(pits)} traces of {values.num_problems} problems, weighted equally. The value at "
      "0 is the mean value of the problem alone over these traces. The bars show the number of "
      "traces in each mean."
    ),
  )
  advantage = folder.add(
    "mean_advantage",
    figures.mean_advantages(values.advantages, values.advantage_counts),
    ("step", "mean_advantage", "traces"),
    [
      (step, mean if count else "", count)
      for step, (mean, count) in enumerate(
        zip(values.advantages, values.advantage_counts, strict=True), start=1
      )
    ],
    label="Mean advantage by step",
    caption="Mean advantage of each step over the wrong traces with a known Q before and after it.",
  )
  steps = max((pit + 1 for pit in pits), default=0)
  counts = [sum(pit == step for pit in pits) for step in range(max(steps, len(values.means)))]
  without = sum(pit < 0 for pit in pits)
  note = f"in {without} of them the rule finds no pit, so they give no per-step pair."
  if not without:
    note = "the rule finds one in every trace."
  steps_of_pits = folder.add(
    "pits",
    figures.pits(counts, without),
    ("step", "traces"),
    [*enumerate(counts, start=1), ("none", without)],
    label="Steps of the pits",
    caption=f"Step of the pit in the {len(pits)} credited wrong traces; {note}",
  )
  return f'{out}<div class="figures three">{mean}{advantage}{steps_of_pits}</div>'


def _reasons(report: Report) -> str:
  if not report.reasons:
    return markup.missing("No response has been graded yet.")
  names = [
    name for name in markup.REASONS if any(name in column for column in report.reasons.values())
  ]
  rows = []
  for label, column in report.reasons.items():
    total, cells = sum(column.values()), []
    for name in names:
      share = markup.percent(column.get(name, 0) / total).removesuffix(" %")
      cells.append(f"{column.get(name, 0)} <br>{share.replace('under ', '&lt; ')}")
    rows.append((markup.escape(label), *cells, str(total)))
  return markup.table(
    ("responses", *(markup.REASONS[name] for name in names), "all"),
    rows,
    range(1, len(names) + 2),
    caption=(
      "Number of responses by verdict and, below, their share of the row in %. Samples answer the "
      "training problems; the other rows answer the test problems once each."
    ),
  )


def _stages(report: Report) -> str:
  def count(value):
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else f"{value:g}"

  rows, total = [], 0.0
  for stage in report.stages:
    numbers = [
      f"{markup.escape(name)} {count(value)}"
      for name, value in stage.figures.items()
      if name != "seconds" and isinstance(value, (int, float))
    ]
    seconds = stage.figures.get("seconds")
    total += seconds or 0.0
    shown = "" if seconds is None else f"{seconds:.1f}"
    rows.append((markup.escape(stage.name), _STATES[stage.state], shown, ", ".join(numbers)))
  rows.append(("all", "", f"{total:.1f}", ""))
  return markup.table(
    ("stage", "state", "seconds", "counts"),
    rows,
    (2,),
    caption=(
      "Seconds of the process that finished the stage; an interrupted stage took longer in total. "
      "Names with a / and grad_norm refer to the last training step; the part after the / says "
      "what the mean is over."
    ),
    loose=True,
  )


def _rollouts_and_time(report: Report, folder: markup.Folder) -> str:
  done = {stage.name: stage.figures for stage in report.stages if stage.state == "done"}
  text, figure = training_sections.rollouts_and_time(done, report.num_rollouts, folder)
  return f'{text}<div class="side left">{figure}<div>{_stages(report)}</div></div>'


def _provenance(report: Report) -> str:
  def kind(name):
    return ' class="changed"' if name in report.changed else ""

  leaves = "".join(
    f"<tr{kind(name)}><td><code>{markup.escape(name)}</code></td>"
    f"<td><code>{markup.escape(value)}</code></td></tr>\n"
    for name, value in report.config.items()
  )
  versions = ", ".join(
    f"{markup.escape(name)} {markup.escape(version)}" for name, version in report.versions.items()
  )
  commits = (
    ", ".join(f"<code>{markup.escape(commit)}</code>" for commit in report.commits)
    or "unknown (no git checkout)"
  )
  return (
    f"<p>To repeat this run in another folder:</p><pre>{markup.escape(report.command)}</pre>"
    '<p class="dim">REPORT_FOLDER is the folder of this page; its <code>config.py</code> sets all '
    "leaves that differ from the default."
    f"</p><p>Git commit: {commits} (+ marks uncommitted changes).<br>Versions: {versions}.<br>"
    f"Seed {markup.escape(report.config.get('seed', 'unknown'))} for all random draws.<br>"
    f"Devices of the last command: {markup.escape(', '.join(report.devices)) or 'unknown'}.</p>"
    f"<details><summary>All {len(report.config)} config leaves; bold ones differ from the default"
    "</summary>"
    f'<table class="leaves"><tbody>\n{leaves}</tbody></table></details>'
  )


def page(report: Report, folder: epath.PathLike) -> str:
  """The page as HTML; writes the figures into the folder."""
  figure_folder = markup.Folder(epath.Path(folder))
  unfinished = [stage.name for stage in report.stages if stage.state != "done"]
  note = ""
  if unfinished:
    note = markup.missing(
      f"Not finished yet: {', '.join(unfinished)}. Results that depend on them are missing below."
    )
  rft = "the " + ("SFT policy" if report.config.get("rft.start") == "sft" else "base model")
  rft += " on the SFT policy's own right samples"
  if report.config.get("rft.with_teacher"):
    rft += " and the known solutions"
  sections = (
    ("Test errors", _errors(report, figure_folder)),
    ("Values of the steps of wrong traces", _values(report, figure_folder)),
    (
      "Wrong traces with the credit of each step",
      trace_cards.section(report.traces, report.best_of, report.pair_mode),
    ),
    ("Verdicts", _reasons(report)),
    ("Training", training_sections.curves(report.training, figure_folder)),
    ("Rollouts and time by stage", _rollouts_and_time(report, figure_folder)),
    ("Provenance", _provenance(report)),
  )
  body = "\n".join(f"<section><h2>{title}</h2>\n{text}</section>" for title, text in sections)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta http-equiv="Content-Security-Policy" content="default-src &#39;none&#39;; '
    'style-src &#39;unsafe-inline&#39;">\n'
    f"<title>{markup.escape(report.title)}</title>\n<style>{markup.CSS}</style></head>\n<body>\n"
    f"<h1>{markup.escape(report.title)}</h1>\n"
    f"<p>SFT trains the base model on known solutions. RFT trains {rft}. Both DPO methods start "
    "from the SFT policy: DPO prefers known solutions to wrong ones as a whole (arbitrary pairs); "
    "per-step DPO uses pairs at the pit, the step to blame for a wrong answer (mode "
    f"<code>{markup.escape(report.pair_mode)}</code>).</p>\n"
    f'<p>All traces with rollouts and pairs: <a href="traces.html">the trace viewer</a>.</p>\n'
    f"{note}\n{body}\n</body></html>\n"
  )


def write(report: Report, folder: epath.PathLike) -> epath.Path:
  """Writes index.html, *.png and *.csv.

  Args:
    report: the contents.
    folder: created if missing; its PNG and CSV files are replaced.

  Returns:
    The path of index.html.
  """
  folder = epath.Path(folder)
  text = page(report, folder)
  path = folder / "index.html"
  temporary = folder / "index.html.tmp"
  temporary.write_text(text)
  temporary.replace(path)
  return path
