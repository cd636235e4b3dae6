"""Stage report: gathers what the workdir holds and has it drawn as workdir/report/index.html."""

import json
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from synthneg_jax.core import advantages
from synthneg_jax.data.credited_traces import CreditedTraces, first_pits, pad
from synthneg_jax.data.records import Pair, Shards, Trace
from synthneg_jax.data.token_text import TokenText
from synthneg_jax.pipeline import evaluate, viewer
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.pipeline.viewer import LABELS
from synthneg_jax.report import report_page, trace_cards
from synthneg_jax.runtime import config_schema, distributed, manifest
from synthneg_jax.runtime.errors import UserError

STAGE_FOLDERS = (
  "synthesize",
  "sft",
  "sample",
  "rft",
  "credit",
  "pairs/dpo",
  "pairs/step_dpo",
  "dpo/dpo",
  "dpo/step_dpo",
)


def _manifest(workdir: epath.Path, name: str) -> dict | None:
  path = workdir / name / "manifest.json"
  return json.loads(path.read_text()) if path.exists() else None


def _check_config(experiment: Experiment, names: Sequence[str]) -> None:
  """Refuses a config that is not the one the stages were made with: the report would say what is
  not so.
  """
  now = json.loads(json.dumps(config_schema.plain(experiment.config)))
  for name in names:
    path = experiment.workdir / name / "begun.json"
    if not path.exists():
      continue
    for leaf, value in json.loads(path.read_text())["config"].items():
      if now.get(leaf) != value:
        raise UserError(
          f"Stage {name} in {experiment.workdir} was begun with {leaf}={value!r}, now it is "
          f"{now.get(leaf)!r}; give the report the config of the run."
        )


def _methods(experiment: Experiment) -> list[report_page.Method]:
  methods = []
  for name in experiment.config.evaluate.methods:
    figures = manifest.figures(experiment.workdir, f"evaluate/{name}")
    label = LABELS.get(name, name)
    methods.append(
      report_page.Method(label, figures["test_error"], *figures["ci95"], figures["num_problems"])
      if figures
      else report_page.Method(label)
    )
  return methods


def _training(experiment: Experiment) -> dict[str, tuple[str, list[dict]]]:
  """Metrics of the training stages so far; the last line of a running stage may be incomplete."""
  labels = {"sft": "sft", "rft": "rft", "dpo/dpo": "dpo", "dpo/step_dpo": "step_dpo"}
  found = {}
  for stage, name in labels.items():
    path = experiment.workdir / stage / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    found[stage] = LABELS[name], [json.loads(line) for line in lines]
  return found


def _reasons(experiment: Experiment) -> dict[str, dict[str, int]]:
  columns = [("SFT, samples", "sample")]
  columns += [
    (f"{LABELS.get(name, name)}, test", f"evaluate/{name}")
    for name in experiment.config.evaluate.methods
  ]
  found = {label: manifest.figures(experiment.workdir, stage) for label, stage in columns}
  return {label: figures["reasons"] for label, figures in found.items() if figures}


def _spread(candidates: Sequence[int], traces: Sequence[Trace], count: int) -> list[int]:
  """At most `count` of the candidates at even distances, no two of one problem."""
  firsts = list({traces[i].problem_id: i for i in reversed(candidates)}.values())[::-1]
  if len(firsts) <= count:
    return firsts
  return [firsts[int(place)] for place in np.linspace(0, len(firsts) - 1, count)] if count else []


class _Credit:
  """The credited wrong traces with their values and pits."""

  def __init__(self, experiment: Experiment):
    config = experiment.config
    self._experiment = experiment
    self._credited = CreditedTraces.load(
      experiment.workdir, config.credit.best_of, experiment.problems("train")
    )
    self.wrong = self._credited.wrong
    self.pits = first_pits(self.wrong, config.pairs)

  def means(self) -> report_page.MeanValues:
    if not self.wrong:
      return report_page.MeanValues((), (), 0.0, 0, (), ())
    q, known, v0 = pad(self.wrong)
    means, counts = advantages.mean_value_by_step(q, known)
    num_problems = len({credited.trace.problem_id for credited in self.wrong})
    gained = jax.vmap(advantages.step_advantages)(q, v0)
    both = known & np.concatenate([np.ones_like(known[:, :1]), known[:, :-1]], axis=1)
    by_step = [np.asarray(part).tolist() for part in advantages.mean_value_by_step(gained, both)]
    return report_page.MeanValues(
      means.tolist(), counts.tolist(), float(v0.mean()), num_problems, *by_step
    )

  def shown(self) -> list[trace_cards.ShownTrace]:
    """Those that the report shows in full: with a pit if there are enough of them."""
    count, traces = (
      self._experiment.config.report.num_traces,
      [credited.trace for credited in self.wrong],
    )
    chosen = _spread([i for i, pit in enumerate(self.pits) if pit >= 0], traces, count)
    seen = {traces[i].problem_id for i in chosen}
    others = [i for i, trace in enumerate(traces) if trace.problem_id not in seen]
    chosen += _spread(others, traces, count - len(chosen))
    if not chosen:
      return []
    text, preferred = viewer.token_text(self._experiment), None
    if _manifest(self._experiment.workdir, "pairs/step_dpo"):
      pairs = Shards(self._experiment.workdir / "pairs" / "step_dpo" / "pairs", Pair).read()
      preferred = {pair.trace_id: text.text(pair.chosen) for pair in pairs}
    problems = self._experiment.problems("train")
    return [self._show(i, problems[traces[i].problem_id], text, preferred) for i in chosen]

  def _show(
    self, i: int, problem, text: TokenText, preferred: dict[str, str] | None
  ) -> trace_cards.ShownTrace:
    credited = self.wrong[i]
    trace, steps, start = credited.trace, [], 0
    for s, (end, estimate) in enumerate(zip(trace.step_ends, credited.estimates, strict=True)):
      steps.append(
        trace_cards.Step(
          text=text.text(trace.ids[start:end]),
          rollouts=estimate.rollouts,
          successes=estimate.successes,
          interval=tuple(evaluate.wilson(estimate.successes, estimate.rollouts))
          if estimate.rollouts
          else None,
          q=float(credited.q[s]) if credited.known[s] else None,
          advantage=float(credited.advantage[s]) if credited.advantage_known[s] else None,
          exact=estimate.exact,
        )
      )
      start = end
    right, samples = self._credited.start[trace.problem_id]
    return trace_cards.ShownTrace(
      id=trace.id,
      problem=problem.prompt,
      gold=problem.answer,
      extracted=trace.extracted,
      reason=trace.reason,
      right_samples=right,
      samples=samples,
      v0=credited.v0,
      steps=steps,
      pit=self.pits[i],
      preferred=None if preferred is None else preferred.get(trace.id, ""),
    )


def _config_file(config) -> tuple[str, list[str]]:
  """(text of a config file that gives this config, names of the leaves that differ from the
  default).
  """
  default = dict(config_schema.leaves(config_schema.default()))
  changed = {name: value for name, value in config_schema.leaves(config) if value != default[name]}
  lines = "".join(f"  config.{name} = {value!r}\n" for name, value in changed.items())
  return (
    '"""The config of the run whose report stands beside this file."""\n\n'
    "from synthneg_jax.runtime import config_schema\n\n\n"
    f"def get_config():\n  config = config_schema.default()\n{lines}  return config\n"
  ), list(changed)


def _origin(
  workdir: epath.Path, names: Sequence[str]
) -> tuple[dict[str, str], list[str], list[str]]:
  """(versions, git commits, devices) that the finished stages were made with; the installed ones
  where none is.
  """
  manifests = [made for made in (_manifest(workdir, name) for name in names) if made]
  versions = {}
  for made in manifests or [{"versions": manifest.versions()}]:
    for package, version in made["versions"].items():
      versions.setdefault(package, {})[version] = None
  commits = list(
    dict.fromkeys(
      made["git_commit"] for made in manifests or [{"git_commit": manifest.git_commit()}]
    )
  )
  about = workdir / "config.json"
  devices = json.loads(about.read_text())["devices"] if about.exists() else []
  return (
    {package: " and ".join(found) for package, found in versions.items()},
    list(filter(None, commits)),
    devices,
  )


def collect(experiment: Experiment) -> report_page.Report:
  """A report of a run from its finished stages; the others are marked as
  unfinished.

  Raises:
    UserError: the config is not the run's, or a file of a finished stage is missing or broken.
  """
  workdir, config = experiment.workdir, experiment.config
  names = [*STAGE_FOLDERS, *(f"evaluate/{method}" for method in config.evaluate.methods)]
  _check_config(experiment, names)
  credit = _Credit(experiment) if _manifest(workdir, "credit") else None
  states = []
  for name in names:
    made = _manifest(workdir, name)
    begun = (workdir / name / "begun.json").exists()
    states.append(
      report_page.StageState(
        name, "done" if made else "begun" if begun else "not begun", made["figures"] if made else {}
      )
    )
  versions, commits, devices = _origin(workdir, names)
  return report_page.Report(
    title=f"Learning from wrong solutions: {config.task.name}",
    methods=_methods(experiment),
    values=credit.means() if credit else None,
    pits=credit.pits if credit else None,
    traces=credit.shown() if credit else None,
    reasons=_reasons(experiment),
    stages=states,
    training=_training(experiment),
    config=config_schema.plain(config),
    changed=_config_file(config)[1],
    versions=versions,
    commits=commits,
    devices=devices,
    command="synthneg pipeline \\\n  --config=REPORT_FOLDER/config.py \\\n  --workdir=NEW_FOLDER",
    num_rollouts=config.credit.num_rollouts,
    best_of=config.credit.best_of,
    pit_rule=config.pairs.pit_rule,
    pair_mode=config.pairs.pair_mode,
  )


def run(experiment: Experiment) -> dict:
  """Writes report/: index.html, traces.html, config.py, and each figure as PNG and CSV, from
  whatever stages are done.

  It is always made again. Unfinished stages are shown as such. Of several processes the first makes
  it alone.

  Raises:
    UserError: the config is not the run's, or a file of a finished stage is missing or broken.
  """
  if not distributed.first():
    return {}
  folder = experiment.workdir / "report"
  path = report_page.write(collect(experiment), folder)
  (folder / "config.py").write_text(_config_file(experiment.config)[0])
  viewer.run(experiment)
  return {"path": str(path)}
