"""Runs stages in order and updates the workdir's config.json and summary.json after each."""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence

import jax
from absl import logging

from synthneg_jax.models import torch_parity
from synthneg_jax.pipeline import (
  credit,
  dpo,
  evaluate,
  export,
  pairs,
  pretrain,
  report,
  rft,
  sample,
  sft,
  synthesize,
  viewer,
)
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import config_schema, distributed, manifest, metrics, workdir_lock
from synthneg_jax.runtime.errors import UserError

STAGES = {
  "pretrain": pretrain.run,
  "synthesize": synthesize.run,
  "sft": sft.run,
  "sample": sample.run,
  "rft": rft.run,
  "credit": credit.run,
  "pairs": pairs.run,
  "dpo": dpo.run,
  "evaluate": evaluate.run,
  "report": report.run,
  "traces": viewer.run,  # the trace viewer alone, which report also writes
  "export": export.run,
}
VARIANTS = {"pairs": pairs.variant, "dpo": dpo.variant}  # run one variant, such as pairs/step_dpo
RECIPE = ("synthesize", "sft", "sample", "rft", "credit", "pairs", "dpo", "evaluate", "report")
_READ_ONLY = {"report", "traces"}  # may read other stages' files while a run is writing them


def _function(name: str) -> Callable[[Experiment], dict]:
  """The function of a stage, or of a variant such as dpo/step_dpo.

  Raises:
    UserError: unknown stage or variant.
  """
  if name in STAGES:
    return STAGES[name]
  stage, _, variant = name.partition("/")
  if stage in VARIANTS and variant in pairs.VARIANTS:
    return functools.partial(VARIANTS[stage], name=variant)
  known = [*STAGES, *(f"{stage}/{variant}" for stage in VARIANTS for variant in pairs.VARIANTS)]
  raise UserError(f"--stages names {name!r}; stages are {', '.join(known)}.")


def summarize(experiment: Experiment) -> dict:
  """The contents of summary.json: figures of all finished stages, whatever the current config."""
  methods, stages, step_dpo = {}, {}, {}
  for name in ("pretrain", *report.STAGE_FOLDERS):
    figures = manifest.figures(experiment.workdir, name)
    if figures:
      stages[name] = figures
  for method in report.LABELS:
    figures = manifest.figures(experiment.workdir, f"evaluate/{method}")
    if figures:
      methods[method] = {key: figures[key] for key in ("test_error", "ci95", "num_problems")}
      stages[f"evaluate/{method}"] = figures
  begun = experiment.workdir / "pairs" / "step_dpo" / "begun.json"
  if begun.exists():
    config = json.loads(begun.read_text())["config"]
    step_dpo = {
      "pair_mode": config["pairs.pair_mode"],
      "pit_rule": config.get("pairs.pit_rule", ""),
    }
  return {"methods": methods, "step_dpo": step_dpo, "stages": stages}


def table(methods: dict) -> str:
  """The test errors as a plain-text table."""
  lines = [f"{'method':<24}{'test error':>10}   {'95 % interval':<15}{'problems':>8}"]
  for name, figures in methods.items():
    low, high = figures["ci95"]
    error, count = figures["test_error"], figures["num_problems"]
    lines.append(f"{report.LABELS[name]:<24}{error:>10.3f}   {low:.3f} - {high:.3f}  {count:>8}")
  return "\n".join(lines)


def run(
  config,
  workdir: str,
  stages: Sequence[str] = RECIPE,
  overrides: Mapping[str, Callable[[Experiment], dict]] | None = None,
) -> None:
  """Runs stages in the given order and skips finished ones.

  Args:
    config: the config of the run.
    workdir: the folder of the run.
    stages: names of stages or variants.
    overrides: functions that replace those of some stages, by name.

  Raises:
    UserError: an unknown stage, another run in the workdir, or as the stages.
    Stopped: after SIGTERM; progress is saved.
  """
  functions = {name: _function(name) for name in stages} | dict(overrides or {})
  config_schema.check_values(config)
  metrics.check(config.metrics)
  experiment = Experiment.open(config, workdir)  # compares processes before any file is written
  with contextlib.nullcontext() if _READ_ONLY.issuperset(stages) else workdir_lock.hold(workdir):
    _run(experiment, stages, functions)


def _run(
  experiment: Experiment,
  stages: Sequence[str],
  functions: Mapping[str, Callable[[Experiment], dict]],
) -> None:
  config = experiment.config
  if config.model.check_parity:
    base = experiment.base()
    torch_parity.check(base.folder, base.model, base.params)
    del base
  about = {
    "config": config_schema.plain(config),
    "versions": manifest.versions(),
    "git_commit": manifest.git_commit(),
    "devices": [str(device) for device in jax.devices()],
  }
  for name in stages:
    if distributed.stopping():
      raise distributed.Stopped
    logging.info("Stage %s.", name)
    figures = functions[name](experiment)
    logging.info("Stage %s: %s", name, json.dumps(figures) if figures else "already done.")
    if figures:  # the stage accepted this config
      manifest.write_json(experiment.workdir / "config.json", about)
    summary = summarize(experiment)
    manifest.write_json(experiment.workdir / "summary.json", summary)
  if stages == ["traces"] and distributed.is_primary():
    print(f"Traces: {experiment.workdir / 'report' / 'traces.html'}")
  if "report" in stages and summary["methods"] and distributed.is_primary():
    print(
      f"\n{table(summary['methods'])}\n\nReport: {experiment.workdir / 'report' / 'index.html'}"
    )
