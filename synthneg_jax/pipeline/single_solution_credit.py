"""Step-level credit of one solution that somebody wrote: Q after each of its steps, by rollouts of
a policy.

The same question that stage credit asks of thousands of traces, asked of one text, with no files:
one trunk, the problem and the text; branches fork off at the end of the problem (they give V) and
at the end of every step but the last.
"""

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


def _encoded(policy: Policy, what: str, text: str) -> list[int]:
  ids = policy.tokenizer.encode(text, add_special_tokens=False)
  if policy.token_text.text(ids) != text:
    same = next(
      i
      for i, (a, b) in enumerate(zip(policy.token_text.text(ids) + "\0", text + "\0", strict=False))
      if a != b
    )
    raise UserError(
      f"The {what} holds what this policy's vocabulary cannot spell, at letter {same + 1}: "
      f"{text[same : same + 20]!r}."
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
  """Credit of each step of a text, by rollouts at credit.temperature of the run's config.

  The text counts as finished: EOS stands at its end. Q is the policy's own, whatever credit.best_of
  says; the pit is by pairs.pit_rule, and -1 for a text that is right.

  Args:
    experiment: gives config and devices; its workdir is neither read nor written.
    policy: rolls out, and its tokenizer splits the text.
    problem: as the task words it.
    text: the solution, its answer last.
    answer: the gold answer.
    num_rollouts: from the problem alone, and from the end of each step but the last.

  Returns:
    (the trace with its credit; the rollouts, first those from the problem alone, then those from
    each step but the last: (text, right) each).

  Raises:
    UserError: what the policy's vocabulary cannot spell, or a text that is empty or too long for
      model.max_length.
  """
  config = experiment.config
  given = Problem(id="yours", prompt=problem, solution="", answer=answer, source="yours")
  prompt = train_policy.prompt_ids(experiment, policy.tokenizer, given)
  if config.task.name == "arithmetic":
    _encoded(policy, "problem", problem)  # other prompts have a template around them
  ids = [*_encoded(policy, "solution", text), policy.tokenizer.eos_token_id]
  room = config.model.max_length - len(prompt) - config.engine.max_new_tokens
  if not 1 < len(ids) <= room:
    raise UserError(
      f"The solution has {len(ids) - 1} tokens; model.max_length={config.model.max_length} and "
      f"engine.max_new_tokens={config.engine.max_new_tokens} leave room for 1 to {room - 1}."
    )
  ends = steps_lib.ends(ids, policy.token_text, config.task)
  forks = [0, *ends[:-1]]
  places = [(fork, index) for fork in forks for index in range(num_rollouts)]
  draw_keys = [
    keys.draw_key(config.seed, "one_text", 0, given.id, keys.hash_ids(ids[:fork]), index)
    for fork, index in places
  ]
  trunk = Trunk(
    [*prompt, *ids[: forks[-1]]], [len(prompt) + fork for fork, _ in places], np.stack(draw_keys)
  )
  engine = experiment.engine(policy, lanes=1, slots=num_rollouts)
  ((_, made),) = engine.run(policy.params, [trunk], sampling(config.credit))
  grown = [policy.token_text.text(one.ids) for one in made]
  wholes = [
    policy.token_text.text(ids[:fork]) + rest for (fork, _), rest in zip(places, grown, strict=True)
  ]
  verdict, *of_rollouts = traces.verdicts(
    experiment,
    policy,
    [text, *wholes],
    [given] * (1 + len(wholes)),
    ["eos", *(one.finish for one in made)],
  )
  right = np.array([one.correct for one in of_rollouts]).reshape(len(forks), num_rollouts)
  drawn = [
    list(zip(grown[first : first + num_rollouts], right[row].tolist(), strict=True))
    for row, first in enumerate(range(0, len(grown), num_rollouts))
  ]
  solution = _Solution(given, ids, ends, verdict)
  return _shown(config, policy.token_text, solution, right.sum(axis=1), num_rollouts), drawn


class _Solution(NamedTuple):
  """A solution with its steps and verdict."""

  problem: Problem
  ids: list[int]
  ends: list[int]
  verdict: Verdict


def _shown(
  config, token_text: TokenText, solution: _Solution, successes: np.ndarray, num_rollouts: int
) -> ShownTrace:
  """The solution with its credit, from the right rollouts before each step."""
  problem, ids, ends, verdict = solution
  q = np.append(successes[1:] / num_rollouts, float(verdict.correct)).astype(np.float32)
  v0 = float(successes[0] / num_rollouts)
  gained = np.asarray(advantages.step_advantages(q, v0))
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
        advantage=float(gained[s]),
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
