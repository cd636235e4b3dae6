"""Step-level credit of a single given solution, by rollouts of a policy and without files.

All rollouts share one trunk, the problem and the solution. Branches fork at the end of the problem,
which gives V, and at the end of every step but the last.
"""

import os
from typing import NamedTuple

import numpy as np

from synthneg_jax.core import advantages, pits
from synthneg_jax.data import steps as steps_lib
from synthneg_jax.data.records import Problem
from synthneg_jax.data.token_text import TokenText
from synthneg_jax.decoding.engine import Trunk
from synthneg_jax.decoding.policy import Policy
from synthneg_jax.grading.answers import Verdict
from synthneg_jax.pipeline import traces, train_policy
from synthneg_jax.pipeline.experiment import Experiment, sampling
from synthneg_jax.report.trace_cards import ShownTrace, Step
from synthneg_jax.runtime import keys
from synthneg_jax.runtime.errors import UserError


def _encode(policy: Policy, what: str, text: str) -> list[int]:
  ids = policy.tokenizer.encode(text, add_special_tokens=False)
  decoded = policy.token_text.text(ids)
  if decoded != text:
    start = len(os.path.commonprefix([decoded, text]))
    raise UserError(
      f"The {what} has text that this policy's vocabulary cannot represent, at character "
      f"{start + 1}: {text[start : start + 20]!r}."
    )
  return ids


def credit(
  experiment: Experiment,
  policy: Policy,
  problem: str,
  text: str,
  answer: str,
  *,
  num_rollouts: int = 32,
) -> tuple[ShownTrace, list[list[tuple[str, bool]]]]:
  """Computes the credit of each step of a solution, by rollouts at credit.temperature.

  The solution is treated as finished, with EOS at its end. Q is that of a single response, whatever
  credit.best_of is. The pit follows pairs.pit_rule and is -1 for a right solution.

  Args:
    experiment: gives config and devices; its workdir is neither read nor written.
    policy: generates the rollouts; its tokenizer encodes the solution.
    problem: the problem, in the task's wording.
    text: the solution, answer last.
    answer: the gold answer.
    num_rollouts: rollouts from the problem and from the end of each step but the last.

  Returns:
    (the trace with its credit; (text, right) of the rollouts, first those from the problem, then
    those from each step but the last).

  Raises:
    UserError: the policy's vocabulary cannot represent the text, or it is empty or too long for
      model.max_length.
  """
  config = experiment.config
  record = Problem(id="yours", prompt=problem, solution="", answer=answer, source="yours")
  prompt = train_policy.prompt_ids(experiment, policy.tokenizer, record)
  if config.task.name == "arithmetic":  # other tasks wrap the problem in a template
    _encode(policy, "problem", problem)
  ids = [*_encode(policy, "solution", text), policy.tokenizer.eos_token_id]
  room = config.model.max_length - len(prompt) - config.engine.max_new_tokens
  if not 1 < len(ids) <= room:
    raise UserError(
      f"The solution has {len(ids) - 1} tokens; model.max_length={config.model.max_length} and "
      f"engine.max_new_tokens={config.engine.max_new_tokens} leave room for 1 to {room - 1}."
    )
  ends = steps_lib.ends(ids, policy.token_text, config.task)
  starts = [0, *ends[:-1]]  # where rollouts begin
  forks, draw_keys = [], []
  for start in starts:
    prefix = keys.hash_ids(ids[:start])
    forks += [len(prompt) + start] * num_rollouts
    for index in range(num_rollouts):
      # "one_text" is part of the key: renaming it would change the rollouts
      draw_keys.append(keys.draw_key(config.seed, "one_text", 0, record.id, prefix, index))
  trunk = Trunk([*prompt, *ids[: starts[-1]]], forks, np.stack(draw_keys))
  engine = experiment.engine(policy, lanes=1, slots=num_rollouts)
  ((_, generations),) = engine.run(policy.params, [trunk], sampling(config.credit))
  completions = [policy.token_text.text(generation.ids) for generation in generations]
  texts = [text]
  for index, completion in enumerate(completions):
    texts.append(policy.token_text.text(ids[: starts[index // num_rollouts]]) + completion)
  verdict, *rollout_verdicts = traces.verdicts(
    experiment,
    policy,
    texts,
    [record] * len(texts),
    ["eos", *(generation.finish_reason for generation in generations)],
  )
  right = np.array([v.correct for v in rollout_verdicts]).reshape(len(starts), num_rollouts)
  rollouts = []
  for row in range(len(starts)):
    group = completions[row * num_rollouts : (row + 1) * num_rollouts]
    rollouts.append(list(zip(group, right[row].tolist(), strict=True)))
  solution = _Solution(record, ids, ends, verdict)
  return _shown(config, policy.token_text, solution, right.sum(axis=1), num_rollouts), rollouts


class _Solution(NamedTuple):
  """A solution with its steps and verdict."""

  problem: Problem
  ids: list[int]
  ends: list[int]
  verdict: Verdict


def _shown(
  config, token_text: TokenText, solution: _Solution, successes: np.ndarray, num_rollouts: int
) -> ShownTrace:
  """The solution with its credit, from the number of right rollouts before each step."""
  problem, ids, ends, verdict = solution
  q = np.append(successes[1:] / num_rollouts, float(verdict.correct)).astype(np.float32)
  v0 = float(successes[0] / num_rollouts)
  step_advantages = np.asarray(advantages.step_advantages(q, v0))
  low, high = advantages.value_interval(successes[1:], num_rollouts)
  pit = -1
  if not verdict.correct:
    thresholds = {name: config.pairs[name] for name in ("drop_ratio", "min_before")}
    pit = int(
      pits.first_pit(q, np.ones(len(q), bool), v0, rule=config.pairs.pit_rule, **thresholds)
    )
  steps = []
  for s, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
    last = s == len(ends) - 1
    steps.append(
      Step(
        text=token_text.text(ids[start:end]),
        rollouts=0 if last else num_rollouts,
        successes=0 if last else int(successes[s + 1]),
        interval=None if last else (float(low[s]), float(high[s])),
        q=float(q[s]),
        advantage=float(step_advantages[s]),
        exact=last,
      )
    )
  return ShownTrace(
    id=problem.id,
    problem=problem.prompt,
    gold=problem.answer,
    extracted=verdict.extracted,
    reason=verdict.reason,
    right_samples=int(successes[0]),
    samples=num_rollouts,
    v0=v0,
    steps=steps,
    pit=pit,
    preferred=None,
  )
