"""Sampling and grading of responses, shared by the stages sample, credit and evaluate."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from synthneg_jax.data import prompts, steps, token_text
from synthneg_jax.data.records import Problem, Shards, Trace
from synthneg_jax.decoding.engine import Engine, Generation, Trunk, Work
from synthneg_jax.decoding.policy import Policy
from synthneg_jax.decoding.remote import RemoteEngine
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.grading import answers
from synthneg_jax.pipeline import train_policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import distributed, keys
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.runtime.progress import Progress
from synthneg_jax.tasks import generated, verification
from synthneg_jax.tasks import problems as problems_lib

_SHARD = 512  # problems per shard; a killed run loses at most one shard


def _thought_open(experiment: Experiment, policy: Policy) -> bool:
  """Whether the chat template's prompts end inside a thought, that is, after <think>."""
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
  """Grades responses.

  A response that was cut off counts only if it states a marked answer before its last line; else
  its verdict is "truncated".

  Args:
    experiment: gives the task's grading rules.
    policy: the policy that responded.
    texts: the responses.
    problems: the problem of each.
    finishes: the finish reason of each.
  """
  stop, task = list(experiment.config.engine.stop), experiment.config.task
  rules = answers.Conventions(
    **{name: value for name, value in task.grading.items() if name != "timeout_s"}
  )
  marked = dataclasses.replace(rules, extraction="marked")
  if task.name in generated.TASKS or task.name == "reasoning_gym":
    rules = marked  # their solutions always mark the answer with ####
  texts = [token_text.cut_at_stop(text, stop) if stop else text for text in texts]
  graded: list[answers.Verdict] = [answers.Verdict(False, "truncated", None)] * len(texts)
  cut, ungraded = [finish == "length" for finish in finishes], []
  for index, (text, problem) in enumerate(zip(texts, problems, strict=True)):
    verdict = verification.verdict(task, text, problem)
    if verdict is None:  # the task has no verifier of its own
      ungraded.append(index)
    elif not cut[index]:
      graded[index] = verdict
  for was_cut in (False, True):
    if was_cut and task.answers == "exact":
      continue
    chosen = [index for index in ungraded if cut[index] == was_cut]
    verdicts_chosen = answers.grade_many(
      [texts[i].rpartition("\n")[0] if was_cut else texts[i] for i in chosen],
      [problems[i].answer for i in chosen],
      kind=task.answers,
      timeout_s=task.grading.timeout_s,
      rules=marked if was_cut else rules,
      thought_open=_thought_open(experiment, policy),
    )
    for index, verdict in zip(chosen, verdicts_chosen, strict=True):
      if not (was_cut and verdict.reason == "no_answer"):
        graded[index] = verdict
  return graded


def to_records(
  experiment: Experiment,
  policy: Policy,
  purpose: str,
  responses: Sequence[tuple[Problem, int, Generation]],
) -> Iterator[Trace]:
  """Yields responses as records with steps and verdicts; grades them in one batch.

  Args:
    experiment: gives the config.
    policy: the policy that responded.
    purpose: part of the traces' ids.
    responses: (problem, index among its responses, response) each.
  """
  ids = [generation.ids.tolist() for _, _, generation in responses]
  texts = [policy.token_text.text(response_ids) for response_ids in ids]
  problems = [problem for problem, _, _ in responses]
  finishes = [generation.finish_reason for _, _, generation in responses]
  graded = verdicts(experiment, policy, texts, problems, finishes)

  def rounded(values):
    return [round(float(value), 5) for value in values]

  for (problem, index, generation), response_ids, text, verdict in zip(
    responses, ids, texts, graded, strict=True
  ):
    yield Trace(
      id=f"{problem.id}/{purpose}/{index}",
      problem_id=problem.id,
      index=index,
      ids=response_ids,
      step_ends=steps.ends(response_ids, policy.token_text, experiment.config.task),
      text=text,
      correct=verdict.correct,
      reason=verdict.reason,
      extracted=verdict.extracted,
      finish_reason=generation.finish_reason,
      logps=rounded(generation.logp),
      drawn_logps=rounded(generation.drawn_logp),
      policy=policy.fingerprint,
    )


def figures(traces: Sequence[Trace]) -> dict:
  """What stages report of traces: number, tokens, pass@1 and verdicts by reason."""
  return {
    "traces": len(traces),
    "tokens": sum(len(trace.ids) for trace in traces),
    "pass_at_1": round(sum(trace.correct for trace in traces) / len(traces), 4),
    "reasons": dict(collections.Counter(trace.reason for trace in traces).most_common()),
  }


def evenly_spaced(items: Sequence, count: int) -> list:
  """At most `count` of the items, at even distances and in order."""
  indices = np.linspace(0, len(items) - 1, min(count, len(items)))
  return [items[int(index)] for index in indices]


def slot_use(engine: Engine | RemoteEngine) -> float:
  """The fraction of an engine's slot steps that generated a token."""
  return round(engine.stats["busy_slots"] / max(engine.stats["slots"], 1), 3)


def response_trunk(
  experiment: Experiment, prompt: Sequence[int], problem: Problem, purpose: str, count: int
) -> Trunk:
  """A trunk that asks for `count` responses to a problem, each with its own PRNG key.

  Args:
    experiment: gives the seed.
    prompt: the prompt's token ids.
    problem: the problem.
    purpose: separates the random draws of stages.
    count: number of responses.
  """
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
      f"{problem.id}: the prompt has {len(ids)} tokens and leaves {room} of model.max_length="
      f"{experiment.config.model.max_length}, less than engine.max_new_tokens={new}."
    )
  return ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """How to respond to each of some problems.

  Attributes:
    label: shown in progress lines.
    purpose: separates the random draws of stages; part of the traces' ids.
    count: responses per problem.
    sampling: how to sample them.
    shots: worked examples before each problem in its prompt.
  """

  label: str
  purpose: str
  count: int
  sampling: Sampling
  shots: Sequence[Problem] = ()


def expected_work(
  experiment: Experiment, policy: Policy, problems: Sequence[Problem], request: Request
) -> Work:
  """The work of one `respond` shard; assumes that responses are as long as the known solutions."""
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


def respond(
  experiment: Experiment,
  policy: Policy,
  engine: Engine,
  *,
  problems: Sequence[Problem],
  request: Request,
  folder: epath.Path,
) -> Shards:
  """Writes traces of each problem to folder, shard by shard; skips problems that have traces.

  Each process grades and writes its share of every shard. All shards exist when this returns.

  Raises:
    UserError: a prompt leaves less than engine.max_new_tokens of model.max_length.
    Stopped: after SIGTERM; finished problems are written first.
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
        trunks.append(response_trunk(experiment, prompt, problem, request.purpose, request.count))
      completed, stopped = {}, None
      try:
        for number, generations in engine.run(policy.params, trunks, request.sampling):
          completed[number] = generations
          progress.update(1)
      except distributed.Stopped as stop:
        stopped = stop
      responses = []
      for number in filter(distributed.owns, sorted(completed)):
        for index, generation in enumerate(completed[number]):
          responses.append((part[number], index, generation))
      shards.write(to_records(experiment, policy, request.purpose, responses))
      if stopped is not None:
        raise stopped
  distributed.barrier()
  return shards
