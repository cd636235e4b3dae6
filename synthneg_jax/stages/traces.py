"""Responses of a policy to problems, with verdicts: what sample and evaluate share."""

from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from synthneg_jax.rollouts.engine import Engine, Generation, Trunk
from synthneg_jax.rollouts.sampling import Sampling
from synthneg_jax.runtime import keys
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.runtime.progress import Progress
from synthneg_jax.runtime.records import Problem, Shards, Trace
from synthneg_jax.stages import training
from synthneg_jax.stages.policies import Policy
from synthneg_jax.stages.run import Run
from synthneg_jax.tasks import answers, steps, token_text

_ANSWER = {"integer": "####", "math": "\\boxed"}  # what the answer comes behind
_SHARD = 512  # problems a shard: what a killed run loses at most


def verdicts(run_: Run, texts: Sequence[str], golds: Sequence[str], finishes: Sequence[str]) -> list[answers.Verdict]:
  """Grades responses; one that was cut at the length limit before its answer was whole is "truncated"."""
  stop, task = list(run_.config.engine.stop), run_.config.task
  rules = {name: value for name, value in task.grading.items() if name != "timeout_s"}
  graded = answers.grade_many(
    [token_text.cut_at_stop(text, stop) if stop else text for text in texts],
    golds,
    kind=task.answers,
    timeout_s=task.grading.timeout_s,
    rules=answers.Conventions(**rules),
  )
  marker = _ANSWER[task.answers]
  # The last line was cut, so what it says is not what the model would have said.
  cut = [
    finish == "length" and (verdict.reason == "no_answer" or marker not in text or marker in text.rpartition("\n")[2])
    for text, finish, verdict in zip(texts, finishes, graded, strict=True)
  ]
  truncated = answers.Verdict(False, "truncated", None)
  return [truncated if was_cut else verdict for verdict, was_cut in zip(graded, cut, strict=True)]


def _trace(
  run_: Run,
  policy: Policy,
  problem: Problem,
  purpose: str,
  index: int,
  made: Generation,
  text: str,
  graded: answers.Verdict,
) -> Trace:
  ids = made.ids.tolist()
  rounded = lambda values: [round(float(value), 5) for value in values]
  return Trace(
    id=f"{problem.id}/{purpose}/{index}",
    problem_id=problem.id,
    index=index,
    ids=ids,
    step_ends=steps.ends(ids, policy.token_text, run_.config.task),
    text=text,
    correct=graded.correct,
    reason=graded.reason,
    extracted=graded.extracted,
    finish=made.finish,
    logps=rounded(made.logp),
    drawn_logps=rounded(made.drawn_logp),
    policy=policy.fingerprint,
  )


def graded(run_: Run, policy: Policy, purpose: str, made: Sequence[tuple[Problem, int, Generation]]) -> Iterator[Trace]:
  """Responses, each with its problem and its number there, as traces; all graded at once."""
  texts = [policy.token_text.text(one.ids.tolist()) for _, _, one in made]
  golds, finishes = [problem.answer for problem, _, _ in made], [one.finish for _, _, one in made]
  verdicts_ = verdicts(run_, texts, golds, finishes)
  for (problem, index, one), text, verdict in zip(made, texts, verdicts_, strict=True):
    yield _trace(run_, policy, problem, purpose, index, one, text, verdict)


def trunk(run_: Run, prompt: Sequence[int], problem: Problem, purpose: str, count: int) -> Trunk:
  """The prompt of a problem with `count` items, each with its own key."""
  prefix = keys.hash_ids(prompt)
  item_keys = [keys.draw_key(run_.config.seed, purpose, 0, problem.id, prefix, index) for index in range(count)]
  return Trunk(prompt, [len(prompt)] * count, np.stack(item_keys))


def _prompt(run_: Run, policy: Policy, problem: Problem, shots: Sequence[Problem]) -> list[int]:
  ids = training.prompt_ids(run_, policy, problem, shots)
  room, new = run_.config.model.max_length - len(ids), run_.config.engine.max_new_tokens
  if room < new:
    raise UserError(
      f"{problem.id}: its prompt has {len(ids)} tokens and leaves {room} of model.max_length="
      f"{run_.config.model.max_length}, less than engine.max_new_tokens={new}."
    )
  return ids


def respond(
  run_: Run,
  name: str,
  policy: Policy,
  engine: Engine,
  problems: Sequence[Problem],
  purpose: str,
  count: int,
  how: Sampling,
  folder: epath.Path,
  shots: Sequence[Problem] = (),
) -> Shards:
  """Writes `count` traces of each problem into folder, a shard at a time; problems that are there are not done again.

  `shots` are worked problems that stand before each in its prompt.

  Raises:
    UserError: a prompt leaves no room for engine.max_new_tokens within model.max_length.
  """
  shards = Shards(folder, Trace)
  there = {trace.problem_id for trace in shards.read()}
  missing = [problem for problem in problems if problem.id not in there]
  with Progress(name, len(missing), "problems") as progress:
    for start in range(0, len(missing), _SHARD):
      part = missing[start : start + _SHARD]
      trunks = [trunk(run_, _prompt(run_, policy, problem, shots), problem, purpose, count) for problem in part]
      made = {}
      for index, generations in engine.run(policy.params, trunks, how):
        made[index] = generations
        progress.update(1)
      flat = [(problem, index, one) for i, problem in enumerate(part) for index, one in enumerate(made[i])]
      shards.write(graded(run_, policy, purpose, flat))
  return shards


def by_problem(traces: Iterator[Trace]) -> dict[str, list[Trace]]:
  """Traces grouped by their problem, in the order of their numbers."""
  groups = {}
  for trace in traces:
    groups.setdefault(trace.problem_id, []).append(trace)
  return {key: sorted(group, key=lambda trace: trace.index) for key, group in groups.items()}
