"""Stage report: collects the results in a workdir and writes them to report/index.html."""

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
from synthneg_jax.pipeline import traces as traces_lib
from synthneg_jax.pipeline.experiment import Experiment, check_config
from synthneg_jax.pipeline.viewer import LABELS
from synthneg_jax.report import report_page, trace_cards
from synthneg_jax.runtime import config_schema, distributed, manifest

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
  """The metrics of each training stage so far, without the last line, which may be incomplete."""
  labels = {"sft": "sft", "rft": "rft", "dpo/dpo": "dpo", "dpo/step_dpo": "step_dpo"}
  training = {}
  for stage, name in labels.items():
    path = experiment.workdir / stage / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    training[stage] = LABELS[name], [json.loads(line) for line in lines]
  return training


def _reasons(experiment: Experiment) -> dict[str, dict[str, int]]:
  """Numbers of verdicts by reason, for the samples and each method's test."""
  columns = {"SFT, samples": "sample"}
  for name in experiment.config.evaluate.methods:
    columns[f"{LABELS.get(name, name)}, test"] = f"evaluate/{name}"
  reasons = {}
  for label, stage in columns.items():
    if figures := manifest.figures(experiment.workdir, stage):
      reasons[label] = figures["reasons"]
  return reasons


def _spread(candidates: Sequence[int], traces: Sequence[Trace], count: int) -> list[int]:
  """At most `count` of the candidates at even distances, one per problem."""
  first_of = {}
  for i in candidates:
    first_of.setdefault(traces[i].problem_id, i)
  return traces_lib.evenly_spaced(list(first_of.values()), count)


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
    step_advantages = jax.vmap(advantages.step_advantages)(q, v0)
    both_known = known & np.concatenate([np.ones_like(known[:, :1]), known[:, :-1]], axis=1)
    by_step = [
      np.asarray(x).tolist() for x in advantages.mean_value_by_step(step_advantages, both_known)
    ]
    return report_page.MeanValues(
      means.tolist(), counts.tolist(), float(v0.mean()), num_problems, *by_step
    )

  def shown(self) -> list[trace_cards.ShownTrace]:
    """The traces that the report shows in full, preferably with a pit."""
    count = self._experiment.config.report.num_traces
    traces = [credited.trace for credited in self.wrong]
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
  """(text of a config file for this config, names of leaves that differ from the default)."""
  default = dict(config_schema.leaves(config_schema.default()))
  changed = {name: value for name, value in config_schema.leaves(config) if value != default[name]}
  lines = "".join(f"  config.{name} = {value!r}\n" for name, value in changed.items())
  return (
    '"""The config of the run whose report is in this folder."""\n\n'
    "from synthneg_jax.runtime import config_schema\n\n\n"
    f"def get_config():\n  config = config_schema.default()\n{lines}  return config\n"
  ), list(changed)


def _origin(
  workdir: epath.Path, names: Sequence[str]
) -> tuple[dict[str, str], list[str], list[str]]:
  """(versions, git commits, devices) of the finished stages; the current ones if none is done."""
  manifests = [m for m in (_manifest(workdir, name) for name in names) if m]
  if not manifests:
    manifests = [{"versions": manifest.versions(), "git_commit": manifest.git_commit()}]
  versions, commits = {}, []  # versions: dicts as ordered sets
  for stage_manifest in manifests:
    for package, version in stage_manifest["versions"].items():
      versions.setdefault(package, {})[version] = None
    commit = stage_manifest["git_commit"]
    if commit and commit not in commits:
      commits.append(commit)
  about = workdir / "config.json"
  devices = json.loads(about.read_text())["devices"] if about.exists() else []
  return {package: " and ".join(numbers) for package, numbers in versions.items()}, commits, devices


def collect(experiment: Experiment) -> report_page.Report:
  """Collects a report from the finished stages and marks the others as unfinished.

  Raises:
    UserError: the config is not the run's, or a file of a finished stage is missing or broken.
  """
  workdir, config = experiment.workdir, experiment.config
  names = [*STAGE_FOLDERS, *(f"evaluate/{method}" for method in config.evaluate.methods)]
  check_config(experiment, names)
  credit = _Credit(experiment) if _manifest(workdir, "credit") else None
  states = []
  for name in names:
    figures = manifest.figures(workdir, name)
    begun = (workdir / name / "begun.json").exists()
    state = "done" if figures is not None else "begun" if begun else "not begun"
    states.append(report_page.StageState(name, state, figures or {}))
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
  """Writes report/: index.html, traces.html, config.py, and each figure as PNG and CSV.

  It is rewritten each time, from the stages that are done, by the first process.

  Raises:
    UserError: the config is not the run's, or a file of a finished stage is missing or broken.
  """
  if not distributed.is_primary():
    return {}
  folder = experiment.workdir / "report"
  path = report_page.write(collect(experiment), folder)
  (folder / "config.py").write_text(_config_file(experiment.config)[0])
  viewer.run(experiment)
  return {"path": str(path)}
