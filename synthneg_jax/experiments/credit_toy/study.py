"""Credit by step and credit by response compared on the MDP of `reasoning_mdp`, in two experiments.

Both methods run DPO from the same π_sft, which is also the reference, with plain gradient descent
for the same number of steps. They differ in their pairs. By response: a right and a wrong response
to one problem, all steps scored. By step: the pit of a wrong response and the same step of a right
rollout from the same prefix, only that step scored. Returns are exact. The design is ours.

Training uses the update of training/step.py and the losses of core/losses.py, but scans the updates
in one compiled program instead of running training/loop.py: a study is about 700 trainings of 200
updates of a few microseconds each, and the loop's batches, transfers and compilations would turn a
minute into an hour. Figures and costs also need the weights after every update, and the policies
are tables or logistic functions of step features, not token trees.

Budget: the policy is a table over (problem, step, action). The experiment measures the return by
number of pairs, rollouts and sampled steps, where a rollout is a sampled response or a continuation
of a prefix. β and learning rate are chosen for each method from one grid, on separate seeds. For
100 pairs and every β, it also measures how far irrelevant steps move before a return is reached.
Returns are measured on the training problems: the question is how well a sample is used.

Spurious: the first step is an optional remark, on which no verdict depends. The teacher writes it
with probability `_HABIT` if the right decision at the second step is 1, else with 1 − `_HABIT`. The
student, logistic in features of the problem and in the presence of the remark, is fitted to 32
right solutions and learns to rely on the remark. Its own remarks are independent of the problem,
because its first step has no features of the problem, so the reliance misleads it equally often in
both directions over the population. Among the 24 training problems, however, one class is more
frequent by chance, so that the remark correlates with failure or success in the sample, depending
on the seed. Only the second step needs correction.
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
  """How first pits are estimated: rollouts per step, and a rule of `pits.first_pit`."""

  rollouts: int
  rule: str


METHODS = ("response", "step")
_COSTS, _MEASURES = ("pairs", "rollouts", "steps"), ("return", "kl_irrelevant", "kl_critical")
_NUM_STEPS = 200  # of gradient descent
_CURVE_EVERY = 10  # gradient steps between two points of a curve
_TUNING_SEEDS = range(10_000, 10_004)

# Budget. The pit is the step with the largest drop of Q. The paper's rule, the first step with the
# lowest Q, is as good with 8 rollouts, but degrades with more: off track, luck keeps Q above 0, so
# that the lowest Q can be at any step.
_BUDGET_SEARCH = PitSearch(8, "least_advantage")
# Sampled responses per problem.
_PER_PROBLEM = {"response": (2, 4, 8, 16, 32, 64), "step": (2, 4, 8, 16, 32)}
_TUNING_PER_PROBLEM = (4, 16)
_TARGET = 0.6  # return at which costs are compared
_BUDGET_BETAS, _BUDGET_SCALED_LRS = (0.03, 0.1, 0.3, 1.0), (1.0, 3.0, 10.0)
# The runs whose KL is followed through training.
_PATH_RESPONSES, _PATH_PAIRS, _PATH_SCALED_LR = 16, 100, 3.0
_PATH_STEPS = (0, 1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160, 200)

# Spurious. The task has no luck, so the paper's rule applies.
_FEATURES, _HABIT = 8, 0.9
_SOLUTIONS, _PROBLEMS, _TEST_PROBLEMS, _RESPONSES = 32, 24, 1000, 16
_SPURIOUS_SEARCH = PitSearch(32, "lowest_value")
_SFT_LR, _SFT_STEPS = 1.0, 20
_SPURIOUS_BETAS, _SPURIOUS_SCALED_LR = (0.1, 0.3, 1.0), 0.05
_DRAWN_BETA = 0.3  # in both figures


class Task(NamedTuple):
  """Problems and the features that the policy sees.

  Attributes:
    mdp: the problems.
    features: for each step i, [X, n^i, F] by problem and prefix, or [X, 1, F].
  """

  mdp: ReasoningMDP
  features: Sequence[np.ndarray]


class Sample(NamedTuple):
  """K responses to each problem and their verdicts, [X, K] each."""

  response_XK: np.ndarray
  right_XK: np.ndarray


class Pairs(NamedTuple):
  """P preference pairs; only the log-probs of scored steps enter the loss.

  Attributes:
    x_P: int, problems.
    chosen_P: int, right responses.
    rejected_P: int, wrong responses.
    scored_PL: bool.
  """

  x_P: np.ndarray
  chosen_P: np.ndarray
  rejected_P: np.ndarray
  scored_PL: np.ndarray

  def take(self, index_P) -> "Pairs":
    """The pairs selected by an index, mask or slice."""
    return Pairs(*(column[index_P] for column in self))


class Responses(NamedTuple):
  """P responses as input of a policy: prefix features float32 [P, L, F] and actions int [P, L]."""

  feature_PLF: np.ndarray
  action_PL: np.ndarray


class PairBatch(NamedTuple):
  """A padded batch of pairs for the objective; `valid_P` is False at padding."""

  chosen: Responses
  rejected: Responses
  scored_PL: np.ndarray
  valid_P: np.ndarray


class Setting(NamedTuple):
  """Hyperparameters of DPO.

  Attributes:
    beta: β, per nat.
    scaled_lr: β times the learning rate, so that the first updates are similar for every β.
  """

  beta: float
  scaled_lr: float

  @property
  def learning_rate(self) -> float:
    """The learning rate of gradient descent."""
    return self.scaled_lr / self.beta


def draw_sample(
  mdp: ReasoningMDP, policy: Policy, per_problem: int, *, rng: np.random.Generator
) -> Sample:
  """Samples `per_problem` responses to each problem."""
  x_XK = np.repeat(np.arange(mdp.num_problems)[:, None], per_problem, axis=1)
  response_XK = reasoning_mdp.sample(
    mdp, policy, x_XK, prefix_N=np.zeros((1, 1), int), steps=0, rng=rng
  )
  return Sample(response_XK, mdp.right_XN[x_XK, response_XK])


def response_pairs(mdp: ReasoningMDP, sample: Sample, rng: np.random.Generator) -> Pairs:
  """Pairs each wrong response with a random right response to the same problem, if one exists."""
  x_P, k_P = np.nonzero(~sample.right_XK & sample.right_XK.any(axis=1, keepdims=True))
  chosen_P = sample.response_XK[x_P, _random_true(sample.right_XK[x_P], rng)]
  return Pairs(
    x_P, chosen_P, sample.response_XK[x_P, k_P], np.ones((x_P.size, mdp.num_steps), bool)
  )


def step_pairs(
  mdp: ReasoningMDP, policy: Policy, sample: Sample, *, search: PitSearch, rng: np.random.Generator
) -> Pairs:
  """Pairs the pit of each wrong response with the same step of a right rollout from its prefix.

  Q after each step is estimated from rollouts of the policy; after the last step it is the verdict.
  The rollouts from the prefix before the pit also provide the chosen step; for a pit at the first
  step, these are responses that were sampled anyway. A pit without a right rollout whose first
  action differs yields no pair.
  """
  response_XK, right_XK = sample
  x_W, k_W = np.nonzero(~right_XK)
  wrong_W, row_W = response_XK[x_W, k_W], np.arange(x_W.size)
  k_WM = rng.integers(response_XK.shape[1], size=(x_W.size, search.rollouts))
  rollouts = [response_XK[x_W[:, None], k_WM]]  # by the number of steps of their prefix
  for steps in range(1, mdp.num_steps):
    prefix_WM = np.repeat(mdp.prefix(wrong_W, steps)[:, None], search.rollouts, axis=1)
    rollouts.append(
      reasoning_mdp.sample(mdp, policy, x_W[:, None], prefix_N=prefix_WM, steps=steps, rng=rng)
    )
  rollout_WLM = np.stack(rollouts, axis=1)
  right_WLM = mdp.right_XN[x_W[:, None, None], rollout_WLM]
  successes_WL = np.concatenate(
    [right_WLM[:, 1:].sum(axis=-1), np.zeros((x_W.size, 1), int)], axis=1
  )
  pit_W = np.asarray(_pits(successes_WL, right_XK.mean(axis=1)[x_W], search=search))
  from_pit_WM = rollout_WLM[row_W, pit_W]
  action_WM = np.take_along_axis(mdp.actions(from_pit_WM), pit_W[:, None, None], axis=-1)[..., 0]
  differs_WM = action_WM != mdp.actions(wrong_W)[row_W, pit_W][:, None]
  usable_WM = right_WLM[row_W, pit_W] & differs_WM
  chosen_W = from_pit_WM[row_W, _random_true(usable_WM, rng)]
  pairs = Pairs(x_W, chosen_W, wrong_W, np.arange(mdp.num_steps) == pit_W[:, None])
  return pairs.take(usable_WM.any(axis=1))


@functools.partial(jax.jit, static_argnames="search")
def _pits(successes_WL, v0_W, *, search: PitSearch):
  q_WL, known_WL = advantages.step_values(
    successes_WL, jnp.full(successes_WL.shape, search.rollouts)
  )
  return jax.vmap(functools.partial(pits.first_pit, rule=search.rule))(q_WL, known_WL, v0_W)


def _random_true(mask_NK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """The index of a random True in each row; arbitrary for rows without one."""
  return np.argmax(mask_NK * (1.0 - rng.random(mask_NK.shape)), axis=1)


def policy_of(weight_LFA: np.ndarray, features: Sequence[np.ndarray]) -> list[np.ndarray]:
  """The policy π(a | x, p) ∝ exp(f(x, p)·w_a), with features f as in `Task`."""
  return [
    special.softmax(f_XPF @ w_FA, axis=-1)
    for f_XPF, w_FA in zip(features, np.float64(weight_LFA), strict=True)
  ]


def _responses(task: Task, x_P: np.ndarray, response_P: np.ndarray) -> Responses:
  """Responses with the features of their prefixes."""
  feature_LPF = []
  for step, f_XPF in enumerate(task.features):
    prefix_P = task.mdp.prefix(response_P, step) if f_XPF.shape[1] > 1 else 0
    feature_LPF.append(f_XPF[x_P, prefix_P])
  return Responses(np.stack(feature_LPF, axis=1).astype(np.float32), task.mdp.actions(response_P))


def _logps(weight_LFA, responses: Responses):
  """Log-probs of the steps of responses, [P, L] nats."""
  logits_PLA = jnp.einsum("plf,lfa->pla", responses.feature_PLF, weight_LFA)
  return losses.token_logprobs(logits_PLA, responses.action_PL)


def _descend(objective, start_LFA, batch, *, learning_rate, num_steps: int):
  """Full-batch gradient descent; returns the weights after every update, [steps, L, F, A]."""
  optimizer = optax.sgd(learning_rate)
  update = step_lib.make_update(objective, optimizer)

  def step(state, _):
    state, _ = update(state, batch)
    return state, state["params"]

  return jax.lax.scan(step, step_lib.initial_state(optimizer, start_LFA), length=num_steps)[1]


@jax.jit
def _sft(solutions: Responses):
  """Weights [L, F, A] after SFT on the solutions, starting from zero."""

  def objective(weight_LFA, solutions: Responses):
    loss_P = -jnp.sum(_logps(weight_LFA, solutions), axis=1)
    return jnp.mean(loss_P), {"loss/per_solution": masked_stats.total(loss_P, True)}

  start_LFA = jnp.zeros((*solutions.feature_PLF.shape[1:], 2))
  return _descend(objective, start_LFA, solutions, learning_rate=_SFT_LR, num_steps=_SFT_STEPS)[-1]


@jax.jit
def _dpo(start_LFA, batch: PairBatch, setting: Setting):
  """Weights [_NUM_STEPS, L, F, A] after every update of DPO, with `start_LFA` as the reference."""

  def branches(weight_LFA, batch: PairBatch):
    """Summed log-probs of the scored steps, chosen and rejected, [P] nats each."""
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
  """Minimises the mean DPO loss over the pairs, of which at least one is required.

  Returns:
    The weights before the first update and after each, float32 [_NUM_STEPS + 1, L, F, A].
  """
  num = pairs.x_P.size
  padded = max(64, 1 << (num - 1).bit_length())  # few sizes mean few compilations
  full = pairs.take(np.arange(padded) % num)
  chosen, rejected = (
    _responses(task, full.x_P, response_P) for response_P in (full.chosen_P, full.rejected_P)
  )
  batch = PairBatch(chosen, rejected, full.scored_PL, np.arange(padded) < num)
  path_TLFA = _dpo(np.float32(start_LFA), batch, setting)
  return np.concatenate([np.float32(start_LFA)[None], path_TLFA])


def _movement(mdp: ReasoningMDP, policy: Policy, reference: Policy) -> tuple[float, float]:
  """Mean KL(π ‖ π_sft), nats per step: (at irrelevant steps, at critical steps and the answer)."""
  kl_LX = np.stack(
    [special.rel_entr(p, q).sum(axis=-1)[:, 0] for p, q in zip(policy, reference, strict=True)]
  )
  irrelevant_LX = (mdp.required_XL == reasoning_mdp.ANY).T
  return float(kl_LX[irrelevant_LX].mean()), float(kl_LX[~irrelevant_LX].mean())


class BudgetRun:
  """One task with random logits as π_sft, a sample, and a method's pairs with their costs."""

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
      per_prefix = int(np.sum(~sample.right_XK)) * _BUDGET_SEARCH.rollouts
      self.rollouts += per_prefix * (steps - 1)
      # A rollout from a prefix of i steps samples L - i more.
      self.steps += per_prefix * steps * (steps - 1) // 2
      pairs = step_pairs(mdp, self.reference, sample, search=_BUDGET_SEARCH, rng=rng)
    else:
      pairs = response_pairs(mdp, sample, rng)
    self.pairs = pairs.take(rng.permutation(pairs.x_P.size))

  def train(self, setting: Setting, pairs: Pairs, at: Sequence[int] = (_NUM_STEPS,)) -> np.ndarray:
    """[len(at), 3]: return, KL at irrelevant and at critical steps, after the given updates."""
    path_TLFA = dpo(self.task, self.start_LFA, pairs, setting=setting)
    rows = []
    for t in at:
      policy = policy_of(path_TLFA[t], self.task.features)
      mdp = self.task.mdp
      rows.append((reasoning_mdp.mean_return(mdp, policy), *_movement(mdp, policy, self.reference)))
    return np.array(rows)


def _tuned(method: str) -> Setting:
  """The setting of the grid with the highest mean return over the tuning seeds and sample sizes."""
  runs = [
    BudgetRun(seed, method, per_problem)
    for seed in _TUNING_SEEDS
    for per_problem in _TUNING_PER_PROBLEM
  ]

  def score(setting):
    return np.mean([run.train(setting, run.pairs)[0, 0] for run in runs])

  grid = itertools.product(_BUDGET_BETAS, _BUDGET_SCALED_LRS)
  return max(itertools.starmap(Setting, grid), key=score)


def budget(
  seeds: Sequence[int],
  per_problem: dict[str, Sequence[int]] = _PER_PROBLEM,
  settings: dict[str, Setting] | None = None,
) -> dict:
  """Return by number of pairs and rollouts, and KL at irrelevant steps; see the module docstring.

  Args:
    seeds: one task each, at least 2; both methods use the same.
    per_problem: sampled responses per problem, by method, ascending.
    settings: by method; None tunes them.
  """
  settings = settings or {method: _tuned(method) for method in METHODS}
  curves, paths, costs = {}, {}, {}
  for method in METHODS:
    curves[method], costs[method] = _budget_curves(
      seeds, method, per_problem[method], setting=settings[method]
    )
    runs = [BudgetRun(seed, method, _PATH_RESPONSES) for seed in seeds]
    paths[method] = {}
    for beta in _BUDGET_BETAS:
      setting = Setting(beta, _PATH_SCALED_LR)
      path_RTM = np.stack(
        [run.train(setting, run.pairs.take(slice(_PATH_PAIRS)), _PATH_STEPS) for run in runs]
      )
      paths[method][str(beta)] = _intervals(_MEASURES, path_RTM)
      kl_R = [plots.first_crossing(path_TM[:, 1], path_TM[:, 0], _TARGET) for path_TM in path_RTM]
      costs[method][f"kl_irrelevant, beta {beta}"] = np.array(kl_R)
  return {
    "settings": {
      method: {"beta": setting.beta, "lr": setting.learning_rate}
      for method, setting in settings.items()
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


def _intervals(names: Sequence[str], value_RTM: np.ndarray) -> dict:
  """Intervals over runs, the first axis, of the named quantities along the last axis."""
  return {name: statistics.mean_interval(value_RTM[..., i]) for i, name in enumerate(names)}


def _budget_curves(
  seeds: Sequence[int], method: str, per_problem: Sequence[int], *, setting: Setting
) -> tuple[dict, dict]:
  """(intervals by sample size, costs [R] at which each run reaches the target return)."""
  runs = [[BudgetRun(seed, method, k) for k in per_problem] for seed in seeds]
  measure_RKM = np.array([[run.train(setting, run.pairs)[0] for run in row] for row in runs])
  cost_RKM = np.array(
    [[(run.pairs.x_P.size, run.rollouts, run.steps) for run in row] for row in runs]
  )
  target_costs = {}
  for i, name in enumerate(_COSTS):
    log_costs = [
      plots.first_crossing(log_cost_K, measure_KM[:, 0], _TARGET)
      for log_cost_K, measure_KM in zip(np.log(cost_RKM[..., i]), measure_RKM, strict=True)
    ]
    target_costs[name] = np.exp(log_costs)
  return _intervals(_COSTS, cost_RKM) | _intervals(_MEASURES, measure_RKM), target_costs


def _remark_task(rng: np.random.Generator, teacher_F: np.ndarray, problems: int) -> Task:
  """Problems of two classes and the features of the three steps: remark, decision, answer (1).

  Every step has a constant feature; the decision also has the problem's features, and 1 or -1 for
  the presence or absence of the remark.
  """
  seen_XF = rng.normal(size=(problems, _FEATURES))
  class_X = (seen_XF @ teacher_F > 0).astype(int)
  required_XL = np.stack(
    [np.full(problems, reasoning_mdp.ANY), class_X, np.ones(problems, int)], axis=1
  )
  constant = np.zeros((problems, 1, _FEATURES + 2))
  constant[..., 0] = 1.0
  decision = np.repeat(constant, 2, axis=1)
  decision[..., 1:-1] = seen_XF[:, None]
  decision[..., -1] = (-1.0, 1.0)
  return Task(reasoning_mdp.make(required_XL, 2, luck=0.0, rng=rng), [constant, decision, constant])


def _log_odds(weight_LFA: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(log-odds of the remark, reliance: its effect on the decision's log-odds), nats, [...] each."""
  difference_LF = weight_LFA[..., 1] - weight_LFA[..., 0]
  return difference_LF[..., 0, 0], 2.0 * difference_LF[..., 1, -1]


def _failure_log_odds_ratio(mdp: ReasoningMDP, sample: Sample) -> float:
  """Log odds ratio of failure with and without the remark; adds 1/2 to each count."""
  remark_XK, right_XK = mdp.actions(sample.response_XK)[..., 0] == 1, sample.right_XK

  def count(mask_XK):
    return np.sum(mask_XK) + 0.5

  right_with, wrong_with = count(remark_XK & right_XK), count(remark_XK & ~right_XK)
  right_without, wrong_without = count(~remark_XK & right_XK), count(~remark_XK & ~right_XK)
  return float(np.log(wrong_with * right_without / (right_with * wrong_without)))


def _spurious_run(seed: int) -> dict:
  """One teacher, student and sample; trains both methods at every β on equally many pairs."""
  rng = np.random.default_rng(seed)
  teacher_F = rng.normal(size=_FEATURES)
  taught = _remark_task(rng, teacher_F, _SOLUTIONS)
  decision_N = taught.mdp.required_XL[:, 1]
  remark_N = (rng.random(_SOLUTIONS) < np.where(decision_N == 1, _HABIT, 1 - _HABIT)).astype(int)
  solutions = _responses(taught, np.arange(_SOLUTIONS), 4 * remark_N + 2 * decision_N + 1)
  start_LFA = np.asarray(_sft(solutions))

  task = _remark_task(rng, teacher_F, _PROBLEMS)
  test = _remark_task(rng, teacher_F, _TEST_PROBLEMS)
  policy = policy_of(start_LFA, task.features)
  sample = draw_sample(task.mdp, policy, _RESPONSES, rng=rng)
  pairs = {
    "response": response_pairs(task.mdp, sample, rng),
    "step": step_pairs(task.mdp, policy, sample, search=_SPURIOUS_SEARCH, rng=rng),
  }
  num = min(pairs[method].x_P.size for method in METHODS)
  remark, reliance = _log_odds(start_LFA)
  test_policy = policy_of(start_LFA, test.features)
  result = {
    "failure_log_odds_ratio": _failure_log_odds_ratio(task.mdp, sample),
    "value_of_remark": np.diff(reasoning_mdp.values(test.mdp, test_policy)[1].mean(axis=0))[0],
    "pairs": num,
    "pits_at_remark": pairs["step"].scored_PL[:, 0].mean(),
    "reliance": reliance,
    "return": reasoning_mdp.mean_return(test.mdp, test_policy),
  }
  for method in METHODS:
    used = pairs[method].take(rng.permutation(pairs[method].x_P.size)[:num])
    for beta in _SPURIOUS_BETAS:
      path_TLFA = dpo(task, start_LFA, used, setting=Setting(beta, _SPURIOUS_SCALED_LR))
      remark_T, reliance_T = _log_odds(path_TLFA)
      halved_T = reliance_T <= reliance / 2
      half = int(np.argmax(halved_T)) if halved_T.any() else _NUM_STEPS
      returns = [
        reasoning_mdp.mean_return(test.mdp, policy_of(weight_LFA, test.features))
        for weight_LFA in path_TLFA[::_CURVE_EVERY]
      ]
      result[method, beta] = {
        "shift": (remark_T - remark)[::_CURVE_EVERY],
        "reliance": reliance_T[::_CURVE_EVERY],
        "return": np.array(returns),
        "half": half,
        "halved": halved_T.any(),
        "shift_at_half": remark_T[half] - remark,
      }
  return result


def spurious(seeds: Sequence[int]) -> dict:
  """How the remark's log-odds and the reliance on it change; see the module docstring.

  `half` is the first gradient step at which the reliance has halved (the last step if it never
  halves). `slope_*` is the slope of the shift of the remark's log-odds on the sample's log odds
  ratio of failure given the remark.
  """
  runs = [_spurious_run(seed) for seed in seeds]
  ratio_R = np.array([run["failure_log_odds_ratio"] for run in runs])
  names = ("value_of_remark", "pairs", "pits_at_remark", "reliance", "return")
  result = {name: statistics.mean_interval([run[name] for run in runs]) for name in names}
  result["failure_log_odds_ratio"] = ratio_R.round(4).tolist()
  result["training_steps"] = list(range(0, _NUM_STEPS + 1, _CURVE_EVERY))
  for method in METHODS:
    result[method] = {}
    for beta in _SPURIOUS_BETAS:
      trained = [run[method, beta] for run in runs]
      by_run = {name: np.array([run[name] for run in trained]) for name in trained[0]}
      result[method][str(beta)] = {
        **{name: statistics.mean_interval(by_run[name]) for name in ("half", "reliance", "return")},
        "halved": int(np.sum(by_run["halved"])),
        "shift_at_half": by_run["shift_at_half"].round(4).tolist(),
        "abs_shift_at_half": statistics.mean_interval(np.abs(by_run["shift_at_half"])),
        "abs_shift": statistics.mean_interval(np.abs(by_run["shift"])),
        "slope_at_half": plots.slope(ratio_R, by_run["shift_at_half"]),
        "slope_at_end": plots.slope(ratio_R, by_run["shift"][:, -1]),
      }
  return result


def write(result: dict, out: epath.PathLike) -> None:
  """Writes credit_matters.json, and two figures as PNG and SVG, into the folder `out`."""
  out = epath.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  (out / "credit_matters.json").write_text(json.dumps(result, indent=1))
  figures.save(plots.budget(result["budget"], _DRAWN_BETA), out / "credit_matters_budget")
  figures.save(plots.spurious(result["spurious"], _DRAWN_BETA), out / "credit_matters_spurious")


def main(out: epath.PathLike, num_seeds: int) -> None:
  """Runs both experiments, writes their results and figures, and prints a summary."""
  result = {
    "seeds": num_seeds,
    "budget": budget(range(num_seeds)),
    "spurious": spurious(range(num_seeds)),
  }
  write(result, out)
  summary = {"budget": result["budget"]["at_target"]}
  for method in METHODS:
    by_beta = result["spurious"][method]
    summary[f"spurious, by {method}, beta {_DRAWN_BETA}"] = {
      name: by_beta[str(_DRAWN_BETA)][name]
      for name in ("half", "abs_shift_at_half", "slope_at_half")
    }
  print(json.dumps(summary, indent=1))
