"""Stage sample: traces of π_sft on the training problems, each with its verdict."""

import collections

from synthneg_jax.data.credited_traces import by_problem
from synthneg_jax.data.records import Shards, Trace
from synthneg_jax.pipeline import tensorboard_summaries, traces
from synthneg_jax.pipeline.experiment import Experiment, sampling


def run(experiment: Experiment) -> dict:
  """Writes sample/traces/; reports pass@1 and pass@M on the training problems, and verdicts by
  reason.
  """
  stage = experiment.stage("sample", ["task", "model", "engine", "sample"], ["synthesize", "sft"])
  if stage.done:
    return {}
  section, policy = experiment.config.sample, experiment.policy("sft")
  problems = experiment.problems("train")
  request = traces.Request(
    label="sample", purpose="sample", count=section.num_traces, sampling=sampling(section)
  )
  c, wanted = experiment.config.engine, list(problems.values())
  engine = experiment.engine(
    policy,
    lambda: traces.work(experiment, policy, wanted, request),
    lanes=c.lanes,
    slots=min(c.slots, section.num_traces),
    stage=stage,
  )
  shards = traces.respond(
    experiment, policy, engine, problems=wanted, request=request, folder=stage.folder / "traces"
  )
  groups = by_problem(shards.read(), problems)
  every = [trace for group in groups.values() for trace in group]
  figures = {
    "traces": len(every),
    "tokens": sum(len(trace.ids) for trace in every),
    "pass_at_1": round(sum(trace.correct for trace in every) / len(every), 4),
    f"pass_at_{section.num_traces}": round(
      sum(any(trace.correct for trace in group) for group in groups.values()) / len(groups), 4
    ),
    "reasons": dict(collections.Counter(trace.reason for trace in every).most_common()),
    "slot_use": round(engine.stats["busy_slots"] / max(engine.stats["slots"], 1), 3),
  }
  tensorboard_summaries.sampled(experiment, stage.folder, problems, every)
  return stage.finish(figures, Shards(stage.folder / "traces", Trace).files())
