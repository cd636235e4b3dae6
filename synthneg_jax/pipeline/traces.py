"""Responses of a policy to problems, with verdicts: what sample and evaluate share."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from synthneg_jax.data import prompts, steps, token_text
from synthneg_jax.data.records import Problem, Shards, Trace
from synthneg_jax.decoding.engine import Engine, Generation, Trunk, Work
from synthneg_jax.decoding.policy import Policy
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.grading import answers
from synthneg_jax.pipeline import train_policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import distributed, keys
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.runtime.progress import Progress
from synthneg_jax.tasks import generated, verification
from synthneg_jax.tasks import problems as problems_lib

_SHARD = 512  # problems a shard: what a killed run loses at most


def _thought_open(experiment: Experiment, policy: Policy) -> bool:
  """Whether the chat template ends its prompts within a thought, as those that write <think> do."""
  if problems_lib.prompt_style(experiment.config.task) != "chat":
    return False
  ids = train_policy.prompt_ids(experiment, policy.tokenizer, Problem("", "?", "", "", ""))
  return answers.opens_thought(policy.tokenizer.decode(ids[-64:], skip_special_tokens=False))


def verdicts(
  experiment: Experiment,
  policy: Policy,
  texts: Sequence[str],
  problems: Sequence[Problem],
  finishes: Sequence[str],
) -> list[answers.Verdict]:
  """Grades responses, each to its problem; one that was cut before its answer was whole is
  "truncated".
  """
  stop, task = list(experiment.config.engine.stop), experiment.config.task
  rules = answers.Conventions(
    **{name: value for name, value in task.grading.items() if name != "timeout_s"}
  )
  if task.name in generated.TASKS or task.name == "reasoning_gym":
    # Their solutions end in ####: without it nothing is answered.
    rules = dataclasses.replace(rules, extraction="marked")
  texts = [token_text.cut_at_stop(text, stop) if stop else text for text in texts]
  graded: list[answers.Verdict] = [answers.Verdict(False, "truncated", None)] * len(texts)
  cut = [finish == "length" for finish in finishes]
  judged = {}  # by something else than the grader
  for index, (text, problem) in enumerate(zip(texts, problems, strict=True)):
    if (verdict := verification.verdict(task, text, problem)) is not None:
      judged[index] = verdict
      if not cut[index]:
        graded[index] = verdict
  for was_cut in (False, True):
    chosen = [index for index in range(len(texts)) if cut[index] == was_cut and index not in judged]
    if was_cut and task.answers == "exact":
      continue
    if was_cut:
      # The last line was cut, so what it says is not what the model would have said, and only a
      # marked answer counts.
      rules = dataclasses.replace(rules, extraction="marked")
    found = answers.grade_many(
      [texts[i].rpartition("\n")[0] if was_cut else texts[i] for i in chosen],
      [problems[i].answer for i in chosen],
      kind=task.answers,
      timeout_s=task.grading.timeout_s,
      rules=rules,
      thought_open=_thought_open(experiment, policy),
    )
    for index, verdict in zip(chosen, found, strict=True):
      if not (was_cut and verdict.reason == "no_answer"):
        graded[index] = verdict
  return graded


def traces_of(
  experiment: Experiment,
  policy: Policy,
  purpose: str,
  made: Sequence[tuple[Problem, int, Generation]],
) -> Iterator[Trace]:
  """Responses, each with its problem and its number there, as records with steps and verdicts;
  graded all at once.
  """
  ids = [one.ids.tolist() for _, _, one in made]
  texts = [policy.token_text.text(of_one) for of_one in ids]
  problems, finishes = [problem for problem, _, _ in made], [one.finish for _, _, one in made]
  graded = verdicts(experiment, policy, texts, problems, finishes)

  def rounded(values):
    return [round(float(value), 5) for value in values]

  for (problem, index, one), of_one, text, verdict in zip(made, ids, texts, graded, strict=True):
    yield Trace(
      id=f"{problem.id}/{purpose}/{index}",
      problem_id=problem.id,
      index=index,
      ids=of_one,
      step_ends=steps.ends(of_one, policy.token_text, experiment.config.task),
      text=text,
      correct=verdict.correct,
      reason=verdict.reason,
      extracted=verdict.extracted,
      finish=one.finish,
      logps=rounded(one.logp),
      drawn_logps=rounded(one.drawn_logp),
      policy=policy.fingerprint,
    )


def trunk(
  experiment: Experiment, prompt: Sequence[int], problem: Problem, purpose: str, count: int
) -> Trunk:
  """The prompt of a problem with `count` items, each with its own key."""
  prefix = keys.hash_ids(prompt)
  item_keys = [
    keys.draw_key(experiment.config.seed, purpose, 0, problem.id, prefix, index)
    for index in range(count)
  ]
  return Trunk(prompt, [len(prompt)] * count, np.stack(item_keys))


def _prompt(
  experiment: Experiment, policy: Policy, problem: Problem, shots: Sequence[Problem]
) -> list[int]:
  ids = train_policy.prompt_ids(experiment, policy.tokenizer, problem, shots)
  room, new = experiment.config.model.max_length - len(ids), experiment.config.engine.max_new_tokens
  if room < new:
    raise UserError(
      f"{problem.id}: its prompt has {len(ids)} tokens and leaves {room} of model.max_length="
      f"{experiment.config.model.max_length}, less than engine.max_new_tokens={new}."
    )
  return ids


def work(
  experiment: Experiment, policy: Policy, problems: Sequence[Problem], request: "Request"
) -> Work:
  """What `respond` decodes at once: responses are expected to be as long as the solutions that SFT
  has seen.
  """
  first, new = problems[:_SHARD], experiment.config.engine.max_new_tokens
  solved = [
    problem.solution for problem in experiment.problems("train").values() if problem.solution
  ][:_SHARD]
  sizes = sorted(min(len(prompts.encode_solution(policy.tokenizer, text)), new) for text in solved)
  draws = np.random.default_rng(0).choice(
    sizes or np.arange(1, new + 1), (len(first), request.count)
  )
  longest = max(len(_prompt(experiment, policy, problem, request.shots)) for problem in first)
  return Work(sizes=draws.tolist(), longest=longest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What is asked of a policy for each of some problems.

  Attributes:
    label: for progress lines.
    purpose: separates the random draws of stages, and stands in the traces' ids.
    count: responses per problem.
    sampling: how they are drawn.
    shots: worked problems that stand before each problem in its prompt.
  """

  label: str
  purpose: str
  count: int
  sampling: Sampling
  shots: Sequence[Problem] = ()


def respond(
  experiment: Experiment,
  policy: Policy,
  engine: Engine,
  *,
  problems: Sequence[Problem],
  request: Request,
  folder: epath.Path,
) -> Shards:
  """Writes traces of each problem into folder, a shard at a time; problems that are there are not
  repeated.

  Of several processes each grades and writes its share of every shard; all shards are there when it
  returns.

  Raises:
    UserError: a prompt leaves no room for engine.max_new_tokens within model.max_length.
    Stopped: SIGTERM came; the problems that were finished by then are written.
  """
  shards = Shards(folder, Trace)
  done = {trace.problem_id for trace in shards.read()}
  missing = [problem for problem in problems if problem.id not in done]
  with Progress(request.label, len(missing), "problems") as progress:
    for start in range(0, len(missing), _SHARD):
      part = missing[start : start + _SHARD]
      trunks = []
      for problem in part:
        prompt = _prompt(experiment, policy, problem, request.shots)
        trunks.append(trunk(experiment, prompt, problem, request.purpose, request.count))
      made, stopped = {}, None
      try:
        for index, generations in engine.run(policy.params, trunks, request.sampling):
          made[index] = generations
          progress.update(1)
      except distributed.Stopped as stop:
        stopped = stop
      mine = [
        (part[i], index, one)
        for i in sorted(made)
        if distributed.mine(i)
        for index, one in enumerate(made[i])
      ]
      shards.write(traces_of(experiment, policy, request.purpose, mine))
      if stopped is not None:
        raise stopped
  distributed.barrier()
  return shards
