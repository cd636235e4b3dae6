"""What schedules of credit cost: rollouts until the pit is found, at equal error, where the true
pit is known.

Rollouts are drawn as coins from known values, so that no model runs: a schedule sees counts alone.
The values are exact ones of a solved task, or those that very many rollouts gave a run's own
traces.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from benchmarks.benchmark import Baseline, Item
from synthneg_jax.core import rollout_schedules
from synthneg_jax.data.records import Shards, StepEstimate
from synthneg_jax.experiments.credit_toy import reasoning_mdp
from synthneg_jax.runtime.errors import UserError

_ROLLOUTS = 8  # R of the baseline
_ROUNDS = 5


def exact_values(num: int = 400, seed: int = 0) -> list[np.ndarray]:
  """Q after each step of wrong responses to the solved task; 0 from the true pit on."""
  rng = np.random.default_rng(seed)
  mdp = reasoning_mdp.draw(rng, problems=32, steps=8, critical=(1, 3, 5), num_actions=3, luck=0.0)
  logits_LXA = reasoning_mdp.reference_logits(mdp, rng)
  policy = [np.exp(z)[:, None] / np.exp(z).sum(-1)[:, None, None] for z in logits_LXA]
  value, found = reasoning_mdp.values(mdp, policy), []
  while len(found) < num:
    x = rng.integers(mdp.num_problems)
    response = reasoning_mdp.sample(
      mdp, policy, np.array([x]), prefix_N=np.array([0]), steps=0, rng=rng
    )[0]
    if not mdp.right_XN[x, response]:
      steps = range(1, mdp.num_steps + 1)
      found.append(np.array([value[step][x, mdp.prefix(response, step)] for step in steps]))
  return found


def estimated_values(workdir: epath.PathLike, least: int = 100) -> list[np.ndarray]:
  """Q after each step of the wrong traces of a run, as the rates of its many rollouts.

  Raises:
    UserError: a step has fewer than `least` rollouts.
  """
  by_trace = {}
  for estimate in Shards(epath.Path(workdir) / "credit" / "estimates", StepEstimate).read():
    if not estimate.exact and estimate.rollouts < least:
      raise UserError(
        f"{workdir}: {estimate.key} has {estimate.rollouts} rollouts; a reference takes {least} at "
        "least."
      )
    rate = float(estimate.correct) if estimate.exact else estimate.successes / estimate.rollouts
    by_trace.setdefault(estimate.trace_id, []).append(rate)
  return [np.array(values) for values in by_trace.values() if len(values) > 1 and values[-1] == 0]


def spend(
  schedule: Callable, values: Sequence[np.ndarray], num_rollouts: int, seed: int
) -> tuple[float, float]:
  """(rollouts a response, share of responses whose pit is not the first step with the lowest
  value).
  """
  rng, spent, wrong = np.random.default_rng(seed), 0, 0
  for q in values:
    successes, rollouts = [0] * (len(q) - 1), [0] * (len(q) - 1)
    while any(more := schedule(successes, rollouts, num_rollouts)):
      for step, n in enumerate(more):
        successes[step] += int(rng.binomial(n, q[step]))
        rollouts[step] += n
    spent += sum(rollouts)
    alive = max((i for i, c in enumerate(successes) if c), default=-1)
    pit = next((i for i in range(alive + 1, len(rollouts)) if rollouts[i]), len(rollouts))
    wrong += pit != int(np.argmin(q))
  return spent / len(values), wrong / len(values)


def item(name: str, values: Sequence[np.ndarray]) -> Item:
  """`adaptive` against `until_first_zero` with 8 rollouts a step: rollouts a response, at no higher
  error.
  """
  cost = functools.cache(
    lambda schedule, most, seed: spend(rollout_schedules.SCHEDULES[schedule], values, most, seed)
  )

  def error(schedule, most):
    return np.mean([cost(schedule, most, seed)[1] for seed in range(_ROUNDS)])

  goal = error("until_first_zero", _ROLLOUTS)
  fits = next((most for most in range(2, 4 * _ROLLOUTS) if error("adaptive", most) <= goal), None)
  ours, theirs = iter(range(10**6)), iter(range(10**6))

  def draw(schedule, most, rounds):
    return cost(schedule, most, next(rounds) % _ROUNDS)[0]

  baseline = Baseline(
    "until_first_zero",
    lambda: draw("until_first_zero", _ROLLOUTS, theirs),
    lambda: "" if fits else f"adaptive does not reach its error, {goal:.3f}",
  )
  most = fits or _ROLLOUTS
  size = f"{len(values)} traces, error {goal:.2f}, R={most} for 8"
  return Item(
    name, size, lambda: draw("adaptive", most, ours), [baseline], rounds=_ROUNDS, unit="rollouts"
  )
