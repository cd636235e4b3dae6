"""Stage evaluate: test error of each policy, with 95 % intervals."""

from synthneg_jax.core import advantages
from synthneg_jax.data.records import Trace
from synthneg_jax.pipeline import traces
from synthneg_jax.pipeline.experiment import Experiment, sampling
from synthneg_jax.runtime.errors import UserError

POLICY_OF = {"sft": "sft", "rft": "rft", "dpo": "dpo/dpo", "step_dpo": "dpo/step_dpo"}


def wilson(count: int, total: int) -> list[float]:
  """The 95 % Wilson interval of `count` successes in `total` trials, rounded to 4 digits."""
  return [round(float(end), 4) for end in advantages.value_interval(count, total)]


def run(experiment: Experiment) -> dict:
  """Writes evaluate/<method>/traces/ for every method of evaluate.methods; each is a stage.

  Raises:
    UserError: an unknown method.
  """
  results = {}
  for method in experiment.config.evaluate.methods:
    if method != "base" and method not in POLICY_OF:
      raise UserError(
        f"evaluate.methods contains {method!r}; methods are base, {', '.join(POLICY_OF)}."
      )
    results[method] = test(experiment, method, POLICY_OF.get(method))
  return {method: figures for method, figures in results.items() if figures}


def test(experiment: Experiment, name: str, folder: str | None) -> dict:
  """Writes evaluate/<name>/traces/: responses of a policy to the test problems.

  Args:
    experiment: the run.
    name: the method.
    folder: the stage that trained the policy; None for the base model.
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
    solved = [problem for problem in experiment.problems("train").values() if problem.solution]
    shots = solved[: section.base_shots]
  problems = list(experiment.problems("test").values())
  request = traces.Request(
    label=f"evaluate {name}", purpose="evaluate", count=1, sampling=sampling(section), shots=shots
  )
  c = experiment.config.engine
  engine = experiment.engine(
    policy,
    lambda: traces.expected_work(experiment, policy, problems, request),
    lanes=c.lanes * min(c.slots or 1, 4),
    slots=1,
    stage=stage,
  )
  shards = traces.respond(
    experiment, policy, engine, problems=problems, request=request, folder=stage.folder / "traces"
  )
  responses: list[Trace] = list(shards.read())
  wrong = sum(not trace.correct for trace in responses)
  summary = traces.figures(responses)
  figures = {
    "test_error": round(wrong / len(responses), 4),
    "ci95": wilson(wrong, len(responses)),
    "num_problems": len(responses),
    "reasons": summary["reasons"],
    "mean_tokens": round(summary["tokens"] / len(responses), 1),
  }
  return stage.finish(figures, shards.files())
