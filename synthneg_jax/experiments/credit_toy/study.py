"""Credit by step against credit by response where every value is known: two experiments on the MDP
of `reasoning_mdp`.

Both methods run the same DPO, the same plain gradient descent and the same number of its steps,
from the same π_sft, which is also the reference. They differ in their pairs: a right against a
wrong response, all steps scored; or the pit of a wrong response against the same step of a right
rollout out of the same prefix, that step alone scored. Returns are exact, not sampled. The whole
design is ours.

Training. The update is the train step's own (training/step.py) over the project's losses
(core/losses.py). It is scanned here, in one compiled program, instead of stepped by
training/loop.py, for three reasons. A study is about 700 trainings of 200 updates, each a few
microseconds, which the loop's batches, transfers and one compilation per training would turn from a
minute into an hour. Figures and costs need the weights after every update. And the policies are
tables and logistic functions of step features, which no token tree describes.

Budget. The policy is a table (problem, step, action). What does a pair buy, and what does it cost?
β and learning rate are chosen for each method from one grid, on seeds of their own. And what moves
on the way, from 100 pairs each, at every β? A rollout is a sampled response or a continuation from
a prefix; cost is also counted in steps sampled. The problems are those trained on: what is asked is
how well a sample is used.

Spurious. A teacher writes a remark as first step, more often (`_HABIT`) where the right decision at
the second step is 1. The remark is idle: no verdict depends on it. The student, logistic in
features of the problem and in whether the remark is there, sees 32 right solutions and comes to
lean on the remark. Its own remarks fall as a coin does, since at the first step it sees no
features, and the lean then misleads it: 1 where 0 is right, or 0 where 1 is. In the population both
happen as often, but among 24 training problems one class is more frequent by chance, so that the
remark comes with failure, or with success, in the sample. Which of the two is left to the seed. The
second step is what there is to repair.
"""

import functools
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from scipy import special

from synthneg_jax.core import advantages, losses, masked_stats, pits, statistics
from synthneg_jax.experiments.credit_toy import plots, reasoning_mdp
from synthneg_jax.experiments.credit_toy.reasoning_mdp import Policy, ReasoningMDP
from synthneg_jax.report import figures
from synthneg_jax.training import step as step_lib


class PitSearch(NamedTuple):
  """How a first pit is found: by continuations from every prefix, and a rule of `pits.first_pit`."""

  rollouts: int
  rule: str


METHODS = ("response", "step")
_NUM_STEPS, _EVERY = 200, 10  # of gradient descent, and between the points of a curve
_TUNING_SEEDS = range(10_000, 10_004)

# Budget. The pit is the step with the largest fall of Q. The paper's rule, the first step with the
# lowest Q, is as good for 8 rollouts, but off track, where luck keeps Q above 0, the lowest Q is
# anywhere, and more rollouts only find that out.
_BUDGET_SEARCH = PitSearch(8, "least_advantage")
_PER_PROBLEM = {
  "response": (2, 4, 8, 16, 32, 64),
  "step": (2, 4, 8, 16, 32),
}  # sampled responses per problem
_TUNED_AT = (4, 16)  # responses per problem
_PATH_RESPONSES, _PATH_PAIRS = 16, 100  # of the runs that are followed through training
_PATH_STEPS = (0, 1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160, 200)
_TARGET = 0.6  # return at which costs are compared
_BUDGET_BETAS, _BUDGET_SPEEDS, _PATH_SPEED = (0.03, 0.1, 0.3, 1.0), (1.0, 3.0, 10.0), 3.0

# Spurious. No luck here, hence the paper's rule.
_FEATURES, _HABIT = 8, 0.9
_SOLUTIONS, _PROBLEMS, _TEST_PROBLEMS, _RESPONSES = 32, 24, 1000, 16
_SPURIOUS_SEARCH = PitSearch(32, "lowest_value")
_SFT_LR, _SFT_STEPS = 1.0, 20
_BETAS, _SPEED = (0.1, 0.3, 1.0), 0.05
_DRAWN_BETA = 0.3  # in both figures


class Task(NamedTuple):
  """Problems, and what the policy sees of them.

  Attributes:
    mdp: the problems.
    features: of each step, [X, n^i, F] by problem and prefix, or [X, 1, F].
  """

  mdp: ReasoningMDP
  features: Sequence[np.ndarray]


class Sample(NamedTuple):
  """K responses to every problem and their verdicts, [X, K] each."""

  response_XK: np.ndarray
  right_XK: np.ndarray


class Pairs(NamedTuple):
  """P pairs: the chosen response to a problem is preferred to the rejected one, by the log-probs of
  the scored steps.
  """

  x_P: np.ndarray
  chosen_P: np.ndarray
  rejected_P: np.ndarray
  scored_PL: np.ndarray

  def take(self, index_P) -> "Pairs":
    """Those of the P pairs that an index, mask or slice picks."""
    return Pairs(*(column[index_P] for column in self))


class Responses(NamedTuple):
  """P responses as a policy scores them: features of their prefixes float32 [P, L, F], and actions
  [P, L].
  """

  feature_PLF: np.ndarray
  action_PL: np.ndarray


class PairBatch(NamedTuple):
  """Pairs as the objective takes them, padded; `valid_P` is False at padding."""

  chosen: Responses
  rejected: Responses
  scored_PL: np.ndarray
  valid_P: np.ndarray


class Setting(NamedTuple):
  """Hyperparameters of DPO.

  Attributes:
    beta: per nat.
    speed: β times the learning rate, so that the first gradient steps are alike for every β.
  """

  beta: float
  speed: float

  @property
  def learning_rate(self) -> float:
    """Of gradient descent."""
    return self.speed / self.beta


def draw_sample(
  mdp: ReasoningMDP, policy: Policy, per_problem: int, *, rng: np.random.Generator
) -> Sample:
  """`per_problem` responses to every problem."""
  x_XK = np.repeat(np.arange(mdp.num_problems)[:, None], per_problem, axis=1)
  response_XK = reasoning_mdp.sample(
    mdp, policy, x_XK, prefix_N=np.zeros((1, 1), int), steps=0, rng=rng
  )
  return Sample(response_XK, mdp.right_XN[x_XK, response_XK])


def response_pairs(mdp: ReasoningMDP, sample: Sample, rng: np.random.Generator) -> Pairs:
  """Every wrong response against a right one to the same problem, drawn at random; none where there
  is no right one.
  """
  x_P, k_P = np.nonzero(~sample.right_XK & sample.right_XK.any(axis=1, keepdims=True))
  chosen_P = sample.response_XK[x_P, _random_true(sample.right_XK[x_P], rng)]
  return Pairs(
    x_P, chosen_P, sample.response_XK[x_P, k_P], np.ones((x_P.size, mdp.num_steps), bool)
  )


def step_pairs(
  mdp: ReasoningMDP, policy: Policy, sample: Sample, *, search: PitSearch, rng: np.random.Generator
) -> Pairs:
  """The pit of every wrong response against the same step of a right rollout out of the prefix
  before it.

  Q after each step is estimated from continuations by the policy; after the last it is the verdict.
  The continuations from the prefix before the pit serve again for the chosen step (for a pit at the
  first step: responses to the problem that were sampled anyway). A pit without a right rollout that
  begins otherwise gives no pair.
  """
  response_XK, right_XK = sample
  x_W, k_W = np.nonzero(~right_XK)
  wrong_W, row_W = response_XK[x_W, k_W], np.arange(x_W.size)
  from_LWM = [
    response_XK[x_W[:, None], rng.integers(response_XK.shape[1], size=(x_W.size, search.rollouts))]
  ]
  for steps in range(1, mdp.num_steps):
    prefix_WM = np.repeat(mdp.prefix(wrong_W, steps)[:, None], search.rollouts, axis=1)
    from_LWM.append(
      reasoning_mdp.sample(mdp, policy, x_W[:, None], prefix_N=prefix_WM, steps=steps, rng=rng)
    )
  from_WLM = np.stack(from_LWM, axis=1)
  right_WLM = mdp.right_XN[x_W[:, None, None], from_WLM]
  successes_WL = np.concatenate(
    [right_WLM[:, 1:].sum(axis=-1), np.zeros((x_W.size, 1), int)], axis=1
  )
  pit_W = np.asarray(_pits(successes_WL, right_XK.mean(axis=1)[x_W], search=search))
  begins_WM = np.take_along_axis(
    mdp.actions(from_WLM[row_W, pit_W]), pit_W[:, None, None], axis=-1
  )[..., 0]
  usable_WM = right_WLM[row_W, pit_W] & (begins_WM != mdp.actions(wrong_W)[row_W, pit_W][:, None])
  chosen_W = from_WLM[row_W, pit_W, _random_true(usable_WM, rng)]
  return Pairs(x_W, chosen_W, wrong_W, np.arange(mdp.num_steps) == pit_W[:, None]).take(
    usable_WM.any(axis=1)
  )


@functools.partial(jax.jit, static_argnames="search")
def _pits(successes_WL, v0_W, *, search: PitSearch):
  q_WL, known_WL = advantages.step_values(
    successes_WL, jnp.full(successes_WL.shape, search.rollouts)
  )
  return jax.vmap(functools.partial(pits.first_pit, rule=search.rule))(q_WL, known_WL, v0_W)


def _random_true(which_NK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """The index of a random True in each row; arbitrary for rows without one."""
  return np.argmax(which_NK * (1.0 - rng.random(which_NK.shape)), axis=1)


def policy_of(weight_LFA: np.ndarray, features: Sequence[np.ndarray]) -> list[np.ndarray]:
  """π(a | x, p) ∝ exp(f(x, p)·w_a) at every step; features of step i are [X, n^i, F] or [X, 1, F]."""
  return [
    special.softmax(f_XPF @ w_FA, axis=-1)
    for f_XPF, w_FA in zip(features, np.float64(weight_LFA), strict=True)
  ]


def _responses(task: Task, x_P: np.ndarray, response_P: np.ndarray) -> Responses:
  """Responses to problems, with what the policy saw at each of their steps."""
  rows = [
    task.mdp.prefix(response_P, i) if f_XPF.shape[1] > 1 else 0
    for i, f_XPF in enumerate(task.features)
  ]
  feature_LPF = [f_XPF[x_P, row] for f_XPF, row in zip(task.features, rows, strict=True)]
  return Responses(np.stack(feature_LPF, axis=1).astype(np.float32), task.mdp.actions(response_P))


def _logps(weight_LFA, responses: Responses):
  """Log-probs of the responses' steps, [P, L] nats."""
  logits_PLA = jnp.einsum("plf,lfa->pla", responses.feature_PLF, weight_LFA)
  return losses.token_logprobs(logits_PLA, responses.action_PL)


def _descend(objective, start_LFA, batch, *, learning_rate, num_steps: int):
  """Plain gradient descent on one batch, by the train step's update; the weights after every
  update, [steps, L, F, A].
  """
  optimizer = optax.sgd(learning_rate)
  update = step_lib.make_update(objective, optimizer)

  def step(state, _):
    state, _ = update(state, batch)
    return state, state["params"]

  return jax.lax.scan(step, step_lib.initial_state(optimizer, start_LFA), length=num_steps)[1]


@jax.jit
def _sft(solutions: Responses):
  """The weights after SFT from zero on the solutions, [L, F, A]."""

  def objective(weight_LFA, solutions: Responses):
    loss_P = -jnp.sum(_logps(weight_LFA, solutions), axis=1)
    return jnp.mean(loss_P), {"loss/per_solution": masked_stats.total(loss_P, True)}

  start_LFA = jnp.zeros((*solutions.feature_PLF.shape[1:], 2))
  return _descend(objective, start_LFA, solutions, learning_rate=_SFT_LR, num_steps=_SFT_STEPS)[-1]


@jax.jit
def _dpo(start_LFA, batch: PairBatch, setting: Setting):
  """The weights after every update of DPO, of which `start_LFA` is start and reference;
  [_NUM_STEPS, L, F, A].
  """

  def branches(weight_LFA, batch: PairBatch):
    """Log-probs of the scored steps of the chosen and the rejected responses, [P] nats each."""
    sides = batch.chosen, batch.rejected
    return [
      jnp.sum(jnp.where(batch.scored_PL, _logps(weight_LFA, side), 0.0), axis=1) for side in sides
    ]

  reference = branches(start_LFA, batch)

  def objective(weight_LFA, batch: PairBatch):
    loss_P = losses.dpo_loss(*branches(weight_LFA, batch), *reference, beta=setting.beta)
    total, count = masked_stats.total(loss_P, batch.valid_P)
    return total / count, {"loss/per_pair": (total, count)}

  return _descend(
    objective, start_LFA, batch, learning_rate=setting.learning_rate, num_steps=_NUM_STEPS
  )


def dpo(task: Task, start_LFA: np.ndarray, pairs: Pairs, *, setting: Setting) -> np.ndarray:
  """DPO on pairs, at least one, mean loss per pair.

  Returns:
    The weights before the first update and after each, float32 [_NUM_STEPS + 1, L, F, A].
  """
  num = pairs.x_P.size
  padded = max(64, 1 << (num - 1).bit_length())  # few sizes, so that few programs are compiled
  full = pairs.take(np.arange(padded) % num)
  chosen, rejected = (
    _responses(task, full.x_P, response_P) for response_P in (full.chosen_P, full.rejected_P)
  )
  batch = PairBatch(chosen, rejected, full.scored_PL, np.arange(padded) < num)
  path_TLFA = _dpo(np.float32(start_LFA), batch, setting)
  return np.concatenate([np.float32(start_LFA)[None], path_TLFA])


def _movement(mdp: ReasoningMDP, policy: Policy, reference: Policy) -> tuple[float, float]:
  """Mean KL(π ‖ π_sft) over problems, nats per step: at irrelevant steps, and at critical ones with
  the answer.
  """
  kl_LX = np.stack(
    [special.rel_entr(p, q).sum(axis=-1)[:, 0] for p, q in zip(policy, reference, strict=True)]
  )
  irrelevant_LX = (mdp.keep_XL == reasoning_mdp.ANY).T
  return float(kl_LX[irrelevant_LX].mean()), float(kl_LX[~irrelevant_LX].mean())


class BudgetRun:
  """One task, a table of random logits as π_sft, one sample and the pairs that a method makes of
  it.
  """

  def __init__(self, seed: int, method: str, per_problem: int):
    rng = np.random.default_rng(seed)
    mdp = reasoning_mdp.draw(rng)
    self.task = Task(mdp, [np.eye(mdp.num_problems)[:, None]] * mdp.num_steps)
    self.start_LFA = reasoning_mdp.reference_logits(mdp, rng)
    self.reference = policy_of(self.start_LFA, self.task.features)
    sample = draw_sample(mdp, self.reference, per_problem, rng=rng)
    steps = mdp.num_steps
    self.rollouts, self.steps = sample.right_XK.size, sample.right_XK.size * steps
    if method == "step":
      continued = int(np.sum(~sample.right_XK)) * _BUDGET_SEARCH.rollouts
      self.rollouts += continued * (steps - 1)
      self.steps += (
        continued * steps * (steps - 1) // 2
      )  # from a prefix of i steps, L - i are sampled
      pairs = step_pairs(mdp, self.reference, sample, search=_BUDGET_SEARCH, rng=rng)
    else:
      pairs = response_pairs(mdp, sample, rng)
    self.pairs = pairs.take(rng.permutation(pairs.x_P.size))

  def train(self, setting: Setting, pairs: Pairs, at: Sequence[int] = (_NUM_STEPS,)) -> np.ndarray:
    """(return, KL at irrelevant steps, KL at critical ones) after some updates, [len(at), 3]."""
    path_TLFA = dpo(self.task, self.start_LFA, pairs, setting=setting)
    rows = []
    for t in at:
      policy = policy_of(path_TLFA[t], self.task.features)
      mdp = self.task.mdp
      rows.append((reasoning_mdp.mean_return(mdp, policy), *_movement(mdp, policy, self.reference)))
    return np.array(rows)


def _tuned(method: str) -> Setting:
  """The setting of the grid with the highest mean return over the tuning seeds, for few pairs and
  for more.
  """
  runs = [
    BudgetRun(seed, method, per_problem) for seed in _TUNING_SEEDS for per_problem in _TUNED_AT
  ]
  grid = itertools.starmap(Setting, itertools.product(_BUDGET_BETAS, _BUDGET_SPEEDS))
  score = {
    setting: np.mean([run.train(setting, run.pairs)[0, 0] for run in runs]) for setting in grid
  }
  return max(score, key=score.get)


def budget(
  seeds: Sequence[int],
  per_problem: dict[str, Sequence[int]] = _PER_PROBLEM,
  settings: dict[str, Setting] | None = None,
) -> dict:
  """Return and movement against the number of pairs and of rollouts; see the head of this file.

  Args:
    seeds: each a task of its own, at least 2; the same for both methods.
    per_problem: sampled responses per problem, by method, in rising order.
    settings: by method; None tunes them.
  """
  settings = settings or {method: _tuned(method) for method in METHODS}
  curves, paths, costs = {}, {}, {}
  for method in METHODS:
    runs = [[BudgetRun(seed, method, k) for seed in seeds] for k in per_problem[method]]
    end_KRM = np.array([[run.train(settings[method], run.pairs)[0] for run in row] for row in runs])
    cost_KRM = np.array(
      [[(run.pairs.x_P.size, run.rollouts, run.steps) for run in row] for row in runs]
    )
    columns = np.concatenate([cost_KRM, end_KRM], axis=-1)
    names = ("pairs", "rollouts", "steps", "return", "kl_irrelevant", "kl_critical")
    curves[method] = {
      name: statistics.mean_interval(columns[..., i], axis=1) for i, name in enumerate(names)
    }
    log_cost_KR = np.log(cost_KRM)
    costs[method] = {
      name: np.exp(
        [plots.first_at(log_cost_KR[:, r, i], end_KRM[:, r, 0], _TARGET) for r in range(len(seeds))]
      )
      for i, name in enumerate(names[:3])
    }
    runs = [BudgetRun(seed, method, _PATH_RESPONSES) for seed in seeds]
    paths[method] = {}
    for beta in _BUDGET_BETAS:
      path_RTM = np.stack(
        [
          run.train(Setting(beta, _PATH_SPEED), run.pairs.take(slice(_PATH_PAIRS)), _PATH_STEPS)
          for run in runs
        ]
      )
      paths[method][str(beta)] = {
        name: statistics.mean_interval(path_RTM[..., i]) for i, name in enumerate(names[3:])
      }
      moved = [plots.first_at(path_TM[:, 1], path_TM[:, 0], _TARGET) for path_TM in path_RTM]
      costs[method][f"kl_irrelevant, beta {beta}"] = np.array(moved)
  return {
    "settings": {
      method: {"beta": each.beta, "lr": each.learning_rate} for method, each in settings.items()
    },
    "reference_return": statistics.mean_interval(
      [reasoning_mdp.mean_return(run.task.mdp, run.reference) for run in runs]
    ),
    "curves": curves,
    "paths": paths,
    "target": _TARGET,
    "at_target": {
      name: plots.ratio(costs["response"][name], costs["step"][name]) for name in costs["step"]
    },
  }


def _remark_task(rng: np.random.Generator, teacher_F: np.ndarray, problems: int) -> Task:
  """Problems of two classes, and what the policy sees at the three steps: remark, decision, answer
  (always 1).

  A constant at every step; at the decision also the problem's features and the remark, 1 where it
  is there, else -1.
  """
  seen_XF = rng.normal(size=(problems, _FEATURES))
  class_X = (seen_XF @ teacher_F > 0).astype(int)
  keep_XL = np.stack(
    [np.full(problems, reasoning_mdp.ANY), class_X, np.ones(problems, int)], axis=1
  )
  constant = np.zeros((problems, 1, _FEATURES + 2))
  constant[..., 0] = 1.0
  decision = np.repeat(constant, 2, axis=1)
  decision[..., 1:-1] = seen_XF[:, None]
  decision[..., -1] = (-1.0, 1.0)
  return Task(reasoning_mdp.make(keep_XL, 2, luck=0.0, rng=rng), [constant, decision, constant])


def _log_odds(weight_LFA: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(log-odds of the remark; by how much the remark moves those of the decision), nats; [...] each."""
  difference_LF = weight_LFA[..., 1] - weight_LFA[..., 0]
  return difference_LF[..., 0, 0], 2.0 * difference_LF[..., 1, -1]


def _failure_log_odds_ratio(mdp: ReasoningMDP, sample: Sample) -> float:
  """Log odds ratio of failure with the remark and without it in a sample; half a response is added
  to each count.
  """
  remark_XK = mdp.actions(sample.response_XK)[..., 0] == 1
  (right_with, wrong_with), (right_without, wrong_without) = (
    (np.sum(group_XK & sample.right_XK) + 0.5, np.sum(group_XK & ~sample.right_XK) + 0.5)
    for group_XK in (remark_XK, ~remark_XK)
  )
  return float(np.log(wrong_with * right_without / (right_with * wrong_without)))


def _spurious_run(seed: int) -> dict:
  """One teacher, student, sample; both methods at every β from equally many pairs."""
  rng = np.random.default_rng(seed)
  teacher_F = rng.normal(size=_FEATURES)
  shown = _remark_task(rng, teacher_F, _SOLUTIONS)
  decision_N = shown.mdp.keep_XL[:, 1]
  remark_N = (rng.random(_SOLUTIONS) < np.where(decision_N == 1, _HABIT, 1 - _HABIT)).astype(int)
  solutions = _responses(shown, np.arange(_SOLUTIONS), 4 * remark_N + 2 * decision_N + 1)
  start_LFA = np.asarray(_sft(solutions))

  task = _remark_task(rng, teacher_F, _PROBLEMS)
  test = _remark_task(rng, teacher_F, _TEST_PROBLEMS)
  policy = policy_of(start_LFA, task.features)
  sample = draw_sample(task.mdp, policy, _RESPONSES, rng=rng)
  pairs = {
    "response": response_pairs(task.mdp, sample, rng),
    "step": step_pairs(task.mdp, policy, sample, search=_SPURIOUS_SEARCH, rng=rng),
  }
  num = min(each.x_P.size for each in pairs.values())
  remark, lean = _log_odds(start_LFA)
  tested = policy_of(start_LFA, test.features)
  result = {
    "failure_log_odds_ratio": _failure_log_odds_ratio(task.mdp, sample),
    "value_of_remark": np.diff(reasoning_mdp.values(test.mdp, tested)[1].mean(axis=0))[0],
    "pairs": num,
    "pits_at_remark": pairs["step"].scored_PL[:, 0].mean(),
    "lean": lean,
    "return": reasoning_mdp.mean_return(test.mdp, tested),
  }
  for method in METHODS:
    used = pairs[method].take(rng.permutation(pairs[method].x_P.size)[:num])
    for beta in _BETAS:
      path_TLFA = dpo(task, start_LFA, used, setting=Setting(beta, _SPEED))
      remark_T, lean_T = _log_odds(path_TLFA)
      halved_T = lean_T <= lean / 2
      half = int(np.argmax(halved_T)) if halved_T.any() else _NUM_STEPS
      curve = path_TLFA[::_EVERY]
      returns = [
        reasoning_mdp.mean_return(test.mdp, policy_of(weight_LFA, test.features))
        for weight_LFA in curve
      ]
      result[method, beta] = {
        "shift": (remark_T - remark)[::_EVERY],
        "lean": lean_T[::_EVERY],
        "return": np.array(returns),
        "half": half,
        "halved": halved_T.any(),
        "shift_at_half": remark_T[half] - remark,
      }
  return result


def spurious(seeds: Sequence[int]) -> dict:
  """What becomes of the remark and of the lean on it; see the head of this file.

  `half` is the gradient step at which the lean is first half of what it was (the last one where
  that does not happen), `slope` that of the shift of the remark's log-odds on the sample's log odds
  ratio of failure with the remark.
  """
  runs = [_spurious_run(seed) for seed in seeds]
  ratio_R = np.array([run["failure_log_odds_ratio"] for run in runs])
  names = ("value_of_remark", "pairs", "pits_at_remark", "lean", "return")
  result = {name: statistics.mean_interval([run[name] for run in runs]) for name in names}
  result["failure_log_odds_ratio"] = ratio_R.round(4).tolist()
  result |= {"training_steps": list(range(0, _NUM_STEPS + 1, _EVERY)), "response": {}, "step": {}}
  for method in METHODS:
    for beta in _BETAS:
      at = {
        name: np.array([run[method, beta][name] for run in runs]) for name in runs[0][method, beta]
      }
      result[method][str(beta)] = {
        **{name: statistics.mean_interval(at[name]) for name in ("half", "lean", "return")},
        "halved": int(np.sum(at["halved"])),
        "shift_at_half": at["shift_at_half"].round(4).tolist(),
        "moved_at_half": statistics.mean_interval(np.abs(at["shift_at_half"])),
        "moved": statistics.mean_interval(np.abs(at["shift"])),
        "slope_at_half": plots.slope(ratio_R, at["shift_at_half"]),
        "slope_at_end": plots.slope(ratio_R, at["shift"][:, -1]),
      }
  return result


def write(result: dict, out: epath.PathLike) -> None:
  """credit_matters.json and the figures credit_matters_budget and credit_matters_spurious, as PNG
  and SVG each.
  """
  out = epath.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  (out / "credit_matters.json").write_text(json.dumps(result, indent=1))
  figures.save(plots.budget(result["budget"], _DRAWN_BETA), out / "credit_matters_budget")
  figures.save(plots.spurious(result["spurious"], _DRAWN_BETA), out / "credit_matters_spurious")


def main(out: epath.PathLike, num_seeds: int) -> None:
  """Runs both experiments, prints in short what was found, and writes everything."""
  result = {
    "seeds": num_seeds,
    "budget": budget(range(num_seeds)),
    "spurious": spurious(range(num_seeds)),
  }
  write(result, out)
  names = ("half", "moved_at_half", "slope_at_half")
  found = {
    method: {name: result["spurious"][method][str(_DRAWN_BETA)][name] for name in names}
    for method in METHODS
  }
  print(
    json.dumps(
      {"budget": result["budget"]["at_target"], f"spurious, beta {_DRAWN_BETA}": found}, indent=1
    )
  )
