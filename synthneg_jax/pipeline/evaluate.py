"""Stage evaluate: each policy answers the test problems; errors with 95 % intervals."""

import collections

from synthneg_jax.core import advantages
from synthneg_jax.data.records import Trace
from synthneg_jax.pipeline import traces
from synthneg_jax.pipeline.experiment import Experiment, sampling
from synthneg_jax.runtime.errors import UserError

POLICY_OF = {"sft": "sft", "rft": "rft", "dpo": "dpo/dpo", "step_dpo": "dpo/step_dpo"}


def wilson(count: int, total: int) -> list[float]:
  """The 95 % Wilson interval of a share."""
  interval = advantages.value_interval(count, total)
  return [round(float(end), 4) for end in interval]


def run(experiment: Experiment) -> dict:
  """Writes evaluate/<method>/traces/ for every method of evaluate.methods; each method is a stage
  of its own.
  """
  results = {}
  for method in experiment.config.evaluate.methods:
    if method != "base" and method not in POLICY_OF:
      raise UserError(f"evaluate.methods names {method!r}; known are base, {', '.join(POLICY_OF)}.")
    results[method] = test(experiment, method, POLICY_OF.get(method))
  return {method: figures for method, figures in results.items() if figures}


def test(experiment: Experiment, name: str, folder: str | None) -> dict:
  """Writes evaluate/<name>/traces/: the answers of the policy that stage `folder` made, or of the
  base model if None.
  """
  needs = ["synthesize"] + ([folder] if folder else [])
  stage = experiment.stage(
    f"evaluate/{name}", ["task", "model", "engine", "evaluate"], needs, reads_base=not folder
  )
  if stage.done:
    return {}
  policy = experiment.policy(folder) if folder else experiment.base()
  section = experiment.config.evaluate
  shots = []
  if not folder and section.base_shots:
    shots = [problem for problem in experiment.problems("train").values() if problem.solution][
      : section.base_shots
    ]
  problems = list(experiment.problems("test").values())
  request = traces.Request(
    label=f"evaluate {name}", purpose="evaluate", count=1, sampling=sampling(section), shots=shots
  )
  c = experiment.config.engine
  engine = experiment.engine(
    policy,
    lambda: traces.work(experiment, policy, problems, request),
    lanes=c.lanes * min(c.slots or 1, 4),
    slots=1,
    stage=stage,
  )
  shards = traces.respond(
    experiment, policy, engine, problems=problems, request=request, folder=stage.folder / "traces"
  )
  made: list[Trace] = list(shards.read())
  wrong = sum(not trace.correct for trace in made)
  figures = {
    "test_error": round(wrong / len(made), 4),
    "ci95": wilson(wrong, len(made)),
    "num_problems": len(made),
    "reasons": dict(collections.Counter(trace.reason for trace in made).most_common()),
    "mean_tokens": round(sum(len(trace.ids) for trace in made) / len(made), 1),
  }
  return stage.finish(figures, shards.files())
