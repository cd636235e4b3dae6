"""Stage sample: samples and grades traces of π_sft on the training problems."""

from synthneg_jax.data.credited_traces import by_problem
from synthneg_jax.pipeline import tensorboard_summaries, traces
from synthneg_jax.pipeline.experiment import Experiment, sampling


def run(experiment: Experiment) -> dict:
  """Writes sample/traces/; reports pass@1, pass@M and verdicts by reason."""
  stage = experiment.stage("sample", ["task", "model", "engine", "sample"], ["synthesize", "sft"])
  if stage.done:
    return {}
  section, policy = experiment.config.sample, experiment.policy("sft")
  problems = experiment.problems("train")
  in_order = list(problems.values())
  request = traces.Request(
    label="sample", purpose="sample", count=section.num_traces, sampling=sampling(section)
  )
  c = experiment.config.engine
  engine = experiment.engine(
    policy,
    lambda: traces.expected_work(experiment, policy, in_order, request),
    lanes=c.lanes,
    slots=min(c.slots, section.num_traces),
    stage=stage,
  )
  shards = traces.respond(
    experiment, policy, engine, problems=in_order, request=request, folder=stage.folder / "traces"
  )
  groups = by_problem(shards.read(), problems)
  every = [trace for group in groups.values() for trace in group]
  solved = sum(any(trace.correct for trace in group) for group in groups.values())
  figures = traces.figures(every) | {
    f"pass_at_{section.num_traces}": round(solved / len(groups), 4),
    "slot_use": traces.slot_use(engine),
  }
  tensorboard_summaries.sampled(experiment, stage.folder, problems, every)
  return stage.finish(figures, shards.files())
