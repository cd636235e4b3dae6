"""Credit by step against credit by response where every value is known: two experiments on the MDP of `reasoning_mdp`.

Both methods run the same DPO, the same plain gradient descent and the same number of its steps, from the same π_sft, which
is also the reference. They differ in their pairs: a right against a wrong response, all steps scored; or the pit of a wrong
response against the same step of a right rollout out of the same prefix, that step alone scored. Returns are exact, not
sampled. The whole design is ours.

Budget. The policy is a table (problem, step, action). What does a pair buy, and what does it cost? β and learning rate are
chosen for each method from one grid, on seeds of their own. And what moves on the way, from 100 pairs each, at every β? A
rollout is a sampled response or a continuation from a prefix; cost is also counted in steps sampled. The problems are those
trained on: what is asked is how well a sample is used.

Spurious. A teacher writes a remark as first step, more often (`_HABIT`) where the right decision at the second step is 1. The
remark is idle: no verdict depends on it. The student, logistic in features of the problem and in whether the remark is there,
sees 32 right solutions and comes to lean on the remark. Its own remarks fall as a coin does, since at the first step it sees
no features, and the lean then misleads it: 1 where 0 is right, or 0 where 1 is. In the population both happen as often, but
among 24 training problems one class is more frequent by chance, so that the remark comes with failure, or with success, in
the sample. Which of the two is left to the seed. The second step is what there is to repair.
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

from synthneg_jax.core import advantages, losses, pits, statistics
from synthneg_jax.experiments.credit_toy import plots, reasoning_mdp
from synthneg_jax.experiments.credit_toy.reasoning_mdp import Policy, ReasoningMDP
from synthneg_jax.report import figures

METHODS = ("response", "step")
_NUM_STEPS, _EVERY = 200, 10  # of gradient descent, and between the points of a curve
_TUNING_SEEDS = range(10_000, 10_004)

# Budget. The pit is the step with the largest fall of Q. The paper's rule, the first step with the lowest Q, is as good for
# 8 rollouts, but off track, where luck keeps Q above 0, the lowest Q is anywhere, and more rollouts only find that out.
_ROLLOUTS, _RULE = 8, "least_advantage"
_PER_PROBLEM = {"response": (2, 4, 8, 16, 32, 64), "step": (2, 4, 8, 16, 32)}  # sampled responses per problem
_TUNED_AT = (4, 16)  # responses per problem
_PATH_RESPONSES, _PATH_PAIRS = 16, 100  # of the runs that are followed through training
_PATH_STEPS = (0, 1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160, 200)
_TARGET = 0.6  # return at which costs are compared
_BUDGET_BETAS, _BUDGET_SPEEDS, _PATH_SPEED = (0.03, 0.1, 0.3, 1.0), (1.0, 3.0, 10.0), 3.0

# Spurious. No luck here, hence the paper's rule.
_FEATURES, _HABIT = 8, 0.9
_SOLUTIONS, _PROBLEMS, _TEST_PROBLEMS, _RESPONSES = 32, 24, 1000, 16
_SPURIOUS_ROLLOUTS, _SPURIOUS_RULE = 32, "lowest_value"
_SFT_LR, _SFT_STEPS = 1.0, 20
_BETAS, _SPEED = (0.1, 0.3, 1.0), 0.05
_DRAWN_BETA = 0.3  # in both figures


class Pairs(NamedTuple):
  """P pairs: the chosen response to a problem is preferred to the rejected one, by the log-probs of the scored steps."""

  x_P: np.ndarray
  chosen_P: np.ndarray
  rejected_P: np.ndarray
  scored_PL: np.ndarray

  def take(self, index_P) -> "Pairs":
    """Those of the P pairs that an index, mask or slice picks."""
    return Pairs(*(column[index_P] for column in self))


def sample(mdp: ReasoningMDP, policy: Policy, per_problem: int, rng: np.random.Generator) -> tuple:
  """`per_problem` responses to every problem and their verdicts, [X, K] each."""
  x_XK = np.repeat(np.arange(mdp.num_problems)[:, None], per_problem, axis=1)
  response_XK = reasoning_mdp.sample(mdp, policy, x_XK, np.zeros((1, 1), int), 0, rng)
  return response_XK, mdp.right_XN[x_XK, response_XK]


def response_pairs(mdp: ReasoningMDP, response_XK, right_XK, rng: np.random.Generator) -> Pairs:
  """Every wrong response against a right one to the same problem, drawn at random; none where there is no right one."""
  x_P, k_P = np.nonzero(~right_XK & right_XK.any(axis=1, keepdims=True))
  chosen_P = response_XK[x_P, _random_true(right_XK[x_P], rng)]
  return Pairs(x_P, chosen_P, response_XK[x_P, k_P], np.ones((x_P.size, mdp.num_steps), bool))


def step_pairs(
  mdp: ReasoningMDP, policy: Policy, response_XK, right_XK, rollouts: int, rule: str, rng: np.random.Generator
) -> Pairs:
  """The pit of every wrong response against the same step of a right rollout out of the prefix before it.

  Q after each step is estimated from `rollouts` continuations by the policy; after the last it is the verdict. The pit is
  that of `pits.first_pit` by `rule`. The continuations from the prefix before the pit serve again for the chosen
  step (for a pit at the first step: responses to the problem that were sampled anyway). A pit without a right rollout
  that begins otherwise gives no pair.
  """
  x_W, k_W = np.nonzero(~right_XK)
  wrong_W, row_W = response_XK[x_W, k_W], np.arange(x_W.size)
  from_LWM = [response_XK[x_W[:, None], rng.integers(response_XK.shape[1], size=(x_W.size, rollouts))]]
  for steps in range(1, mdp.num_steps):
    prefix_WM = np.repeat(mdp.prefix(wrong_W, steps)[:, None], rollouts, axis=1)
    from_LWM.append(reasoning_mdp.sample(mdp, policy, x_W[:, None], prefix_WM, steps, rng))
  from_WLM = np.stack(from_LWM, axis=1)
  right_WLM = mdp.right_XN[x_W[:, None, None], from_WLM]
  successes_WL = np.concatenate([right_WLM[:, 1:].sum(axis=-1), np.zeros((x_W.size, 1), int)], axis=1)
  pit_W = np.asarray(_pits(successes_WL, rollouts, right_XK.mean(axis=1)[x_W], rule))
  begins_WM = np.take_along_axis(mdp.actions(from_WLM[row_W, pit_W]), pit_W[:, None, None], axis=-1)[..., 0]
  usable_WM = right_WLM[row_W, pit_W] & (begins_WM != mdp.actions(wrong_W)[row_W, pit_W][:, None])
  chosen_W = from_WLM[row_W, pit_W, _random_true(usable_WM, rng)]
  return Pairs(x_W, chosen_W, wrong_W, np.arange(mdp.num_steps) == pit_W[:, None]).take(usable_WM.any(axis=1))


@functools.partial(jax.jit, static_argnames="rule")
def _pits(successes_WL, rollouts, v0_W, rule):
  q_WL, known_WL = advantages.step_values(successes_WL, jnp.full(successes_WL.shape, rollouts))
  return jax.vmap(functools.partial(pits.first_pit, rule=rule))(q_WL, known_WL, v0_W)


def _random_true(which_NK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """A random True of every row, as its place; anything where there is none."""
  return np.argmax(which_NK * (1.0 - rng.random(which_NK.shape)), axis=1)


def policy_of(weight_LFA: np.ndarray, features: Sequence[np.ndarray]) -> list[np.ndarray]:
  """π(a | x, p) ∝ exp(f(x, p)·w_a) at every step; features of step i are [X, n^i, F] or [X, 1, F]."""
  return [special.softmax(f_XPF @ w_FA, axis=-1) for f_XPF, w_FA in zip(features, np.float64(weight_LFA), strict=True)]


def _features_at(mdp, features, x_N, response_N) -> np.ndarray:
  """What the policy saw at each step of responses; float32 [N, L, F]."""
  rows = [mdp.prefix(response_N, i) if f_XPF.shape[1] > 1 else 0 for i, f_XPF in enumerate(features)]
  return np.stack([f_XPF[x_N, row] for f_XPF, row in zip(features, rows, strict=True)], axis=1).astype(np.float32)


def _descend(loss_fn, start_LFA, lr, num_steps):
  """Plain gradient descent; the weights after every step, [steps, L, F, A]."""
  optimizer = optax.sgd(lr)

  def step(carry, _):
    weight_LFA, state = carry
    update_LFA, state = optimizer.update(jax.grad(loss_fn)(weight_LFA), state)
    weight_LFA = optax.apply_updates(weight_LFA, update_LFA)
    return (weight_LFA, state), weight_LFA

  return jax.lax.scan(step, (start_LFA, optimizer.init(start_LFA)), length=num_steps)[1]


def _logps(weight_LFA, feature_NLF, action_NL):
  return losses.token_logprobs(jnp.einsum("nlf,lfa->nla", feature_NLF, weight_LFA), action_NL)


@jax.jit
def _sft(feature_NLF, action_NL):
  start_LFA = jnp.zeros((*feature_NLF.shape[1:], 2))
  loss_fn = lambda weight_LFA: -jnp.mean(jnp.sum(_logps(weight_LFA, feature_NLF, action_NL), axis=1))
  return _descend(loss_fn, start_LFA, _SFT_LR, _SFT_STEPS)[-1]


@jax.jit
def _dpo(start_LFA, chosen, rejected, scored_PL, counts_P, beta, lr):
  branch = lambda weight_LFA, side: jnp.sum(jnp.where(scored_PL, _logps(weight_LFA, *side), 0.0), axis=1)
  ref_chosen_P, ref_rejected_P = branch(start_LFA, chosen), branch(start_LFA, rejected)

  def loss_fn(weight_LFA):
    branches = branch(weight_LFA, chosen), branch(weight_LFA, rejected)
    loss_P = losses.dpo_loss(*branches, ref_chosen_P, ref_rejected_P, beta=beta)
    return jnp.sum(counts_P * loss_P) / jnp.sum(counts_P)

  return _descend(loss_fn, start_LFA, lr, _NUM_STEPS)


def dpo(mdp, features, start_LFA, pairs: Pairs, beta: float, speed: float) -> np.ndarray:
  """DPO on pairs, mean loss per pair.

  Args:
    mdp, features: the task, and what the policy sees of it.
    start_LFA: weights of start and reference.
    pairs: at least one.
    beta: per nat.
    speed: β times the learning rate, so that the first gradient steps are alike for every β.

  Returns:
    The weights before the first gradient step and after each, float32 [_NUM_STEPS + 1, L, F, A].
  """
  num = pairs.x_P.size
  padded = max(64, 1 << (num - 1).bit_length())  # few sizes, so that few programs are compiled
  full = pairs.take(np.arange(padded) % num)
  sides = [
    (_features_at(mdp, features, full.x_P, response_P), mdp.actions(response_P))
    for response_P in (full.chosen_P, full.rejected_P)
  ]
  counts_P = (np.arange(padded) < num).astype(np.float32)
  path_TLFA = _dpo(np.float32(start_LFA), *sides, full.scored_PL, counts_P, beta, speed / beta)
  return np.concatenate([np.float32(start_LFA)[None], path_TLFA])


def _movement(mdp: ReasoningMDP, policy: Policy, reference: Policy) -> tuple[float, float]:
  """Mean KL(π ‖ π_sft) over problems, nats per step: at irrelevant steps, and at critical ones with the answer."""
  kl_LX = np.stack([special.rel_entr(p, q).sum(axis=-1)[:, 0] for p, q in zip(policy, reference, strict=True)])
  irrelevant_LX = (mdp.keep_XL == reasoning_mdp.ANY).T
  return float(kl_LX[irrelevant_LX].mean()), float(kl_LX[~irrelevant_LX].mean())


class BudgetRun:
  """One task, a table of random logits as π_sft, one sample and the pairs that a method makes of it."""

  def __init__(self, seed: int, method: str, per_problem: int):
    rng = np.random.default_rng(seed)
    self.mdp = reasoning_mdp.draw(rng)
    self.start_LFA = reasoning_mdp.reference_logits(self.mdp, rng)
    self.features = [np.eye(self.mdp.num_problems)[:, None]] * self.mdp.num_steps
    self.reference = policy_of(self.start_LFA, self.features)
    response_XK, right_XK = sample(self.mdp, self.reference, per_problem, rng)
    steps = self.mdp.num_steps
    self.rollouts, self.steps = right_XK.size, right_XK.size * steps
    if method == "step":
      continued = int(np.sum(~right_XK)) * _ROLLOUTS
      self.rollouts += continued * (steps - 1)
      self.steps += continued * steps * (steps - 1) // 2  # from a prefix of i steps, L - i are sampled
      pairs = step_pairs(self.mdp, self.reference, response_XK, right_XK, _ROLLOUTS, _RULE, rng)
    else:
      pairs = response_pairs(self.mdp, response_XK, right_XK, rng)
    self.pairs = pairs.take(rng.permutation(pairs.x_P.size))

  def train(self, setting: tuple[float, float], pairs: Pairs, at: Sequence[int] = (_NUM_STEPS,)) -> np.ndarray:
    """(return, KL at irrelevant steps, KL at critical ones) at some gradient steps, [len(at), 3]."""
    path_TLFA = dpo(self.mdp, self.features, self.start_LFA, pairs, *setting)
    measure = lambda policy: (reasoning_mdp.mean_return(self.mdp, policy), *_movement(self.mdp, policy, self.reference))
    return np.array([measure(policy_of(path_TLFA[t], self.features)) for t in at])


def _tuned(method: str) -> tuple[float, float]:
  """The (β, speed) of the grid with the highest mean return over the tuning seeds, for few pairs and for more."""
  runs = [BudgetRun(seed, method, per_problem) for seed in _TUNING_SEEDS for per_problem in _TUNED_AT]
  grid = itertools.product(_BUDGET_BETAS, _BUDGET_SPEEDS)
  score = {setting: np.mean([run.train(setting, run.pairs)[0, 0] for run in runs]) for setting in grid}
  return max(score, key=score.get)


def budget(seeds: Sequence[int], per_problem: dict[str, Sequence[int]] = _PER_PROBLEM, settings=None) -> dict:
  """Return and movement against the number of pairs and of rollouts; see the head of this file.

  Args:
    seeds: each a task of its own, at least 2; the same for both methods.
    per_problem: sampled responses per problem, by method, in rising order.
    settings: (β, speed) by method, the speed being β times the learning rate; None tunes them.
  """
  settings = settings or {method: _tuned(method) for method in METHODS}
  curves, paths, costs = {}, {}, {}
  for method in METHODS:
    runs = [[BudgetRun(seed, method, k) for seed in seeds] for k in per_problem[method]]
    end_KRM = np.array([[run.train(settings[method], run.pairs)[0] for run in row] for row in runs])
    cost_KRM = np.array([[(run.pairs.x_P.size, run.rollouts, run.steps) for run in row] for row in runs])
    columns = np.concatenate([cost_KRM, end_KRM], axis=-1)
    names = ("pairs", "rollouts", "steps", "return", "kl_irrelevant", "kl_critical")
    curves[method] = {name: statistics.mean_interval(columns[..., i], axis=1) for i, name in enumerate(names)}
    log_cost_KR = np.log(cost_KRM)
    costs[method] = {
      name: np.exp([plots.first_at(log_cost_KR[:, r, i], end_KRM[:, r, 0], _TARGET) for r in range(len(seeds))])
      for i, name in enumerate(names[:3])
    }
    runs = [BudgetRun(seed, method, _PATH_RESPONSES) for seed in seeds]
    paths[method] = {}
    for beta in _BUDGET_BETAS:
      path_RTM = np.stack(
        [run.train((beta, _PATH_SPEED), run.pairs.take(slice(_PATH_PAIRS)), _PATH_STEPS) for run in runs]
      )
      paths[method][str(beta)] = {name: statistics.mean_interval(path_RTM[..., i]) for i, name in enumerate(names[3:])}
      moved = [plots.first_at(path_TM[:, 1], path_TM[:, 0], _TARGET) for path_TM in path_RTM]
      costs[method][f"kl_irrelevant, beta {beta}"] = np.array(moved)
  return {
    "settings": {method: {"beta": beta, "lr": speed / beta} for method, (beta, speed) in settings.items()},
    "reference_return": statistics.mean_interval([reasoning_mdp.mean_return(run.mdp, run.reference) for run in runs]),
    "curves": curves,
    "paths": paths,
    "target": _TARGET,
    "at_target": {name: plots.ratio(costs["response"][name], costs["step"][name]) for name in costs["step"]},
  }


def _remark_task(
  rng: np.random.Generator, teacher_F: np.ndarray, problems: int
) -> tuple[ReasoningMDP, list[np.ndarray]]:
  """Problems of two classes, and what the policy sees at the three steps: remark, decision, answer (always 1).

  A constant at every step; at the decision also the problem's features and the remark, 1 where it is there, else -1.
  """
  seen_XF = rng.normal(size=(problems, _FEATURES))
  class_X = (seen_XF @ teacher_F > 0).astype(int)
  keep_XL = np.stack([np.full(problems, reasoning_mdp.ANY), class_X, np.ones(problems, int)], axis=1)
  constant = np.zeros((problems, 1, _FEATURES + 2))
  constant[..., 0] = 1.0
  decision = np.repeat(constant, 2, axis=1)
  decision[..., 1:-1] = seen_XF[:, None]
  decision[..., -1] = (-1.0, 1.0)
  return reasoning_mdp.make(keep_XL, 2, 0.0, rng), [constant, decision, constant]


def _log_odds(weight_LFA: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(log-odds of the remark; by how much the remark moves those of the decision), nats; [...] each."""
  difference_LF = weight_LFA[..., 1] - weight_LFA[..., 0]
  return difference_LF[..., 0, 0], 2.0 * difference_LF[..., 1, -1]


def _spurious_run(seed: int) -> dict:
  """One teacher, student, sample; both methods at every β from equally many pairs."""
  rng = np.random.default_rng(seed)
  teacher_F = rng.normal(size=_FEATURES)
  shown, shown_features = _remark_task(rng, teacher_F, _SOLUTIONS)
  remark_N = (rng.random(_SOLUTIONS) < np.where(shown.keep_XL[:, 1] == 1, _HABIT, 1 - _HABIT)).astype(int)
  solution_N = 4 * remark_N + 2 * shown.keep_XL[:, 1] + 1
  seen = _features_at(shown, shown_features, np.arange(_SOLUTIONS), solution_N)
  start_LFA = np.asarray(_sft(seen, shown.actions(solution_N)))

  mdp, features = _remark_task(rng, teacher_F, _PROBLEMS)
  test, test_features = _remark_task(rng, teacher_F, _TEST_PROBLEMS)
  policy = policy_of(start_LFA, features)
  response_XK, right_XK = sample(mdp, policy, _RESPONSES, rng)
  remark_XK = mdp.actions(response_XK)[..., 0]
  count = lambda remark, right: np.sum((remark_XK == remark) & (right_XK == right)) + 0.5
  pairs = {
    "response": response_pairs(mdp, response_XK, right_XK, rng),
    "step": step_pairs(mdp, policy, response_XK, right_XK, _SPURIOUS_ROLLOUTS, _SPURIOUS_RULE, rng),
  }
  num = min(each.x_P.size for each in pairs.values())
  remark, lean = _log_odds(start_LFA)
  result = {
    "failure_log_odds_ratio": np.log(count(1, False) * count(0, True) / (count(1, True) * count(0, False))),
    "value_of_remark": np.diff(reasoning_mdp.values(test, policy_of(start_LFA, test_features))[1].mean(axis=0))[0],
    "pairs": num,
    "pits_at_remark": pairs["step"].scored_PL[:, 0].mean(),
    "lean": lean,
    "return": reasoning_mdp.mean_return(test, policy_of(start_LFA, test_features)),
  }
  for method in METHODS:
    used = pairs[method].take(rng.permutation(pairs[method].x_P.size)[:num])
    for beta in _BETAS:
      path_TLFA = dpo(mdp, features, start_LFA, used, beta, _SPEED)
      remark_T, lean_T = _log_odds(path_TLFA)
      halved_T = lean_T <= lean / 2
      half = int(np.argmax(halved_T)) if halved_T.any() else _NUM_STEPS
      curve = path_TLFA[::_EVERY]
      returns = [reasoning_mdp.mean_return(test, policy_of(weight_LFA, test_features)) for weight_LFA in curve]
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

  `half` is the gradient step at which the lean is first half of what it was (the last one where that does not happen),
  `slope` that of the shift of the remark's log-odds on the sample's log odds ratio of failure with the remark.
  """
  runs = [_spurious_run(seed) for seed in seeds]
  column = lambda name: np.array([run[name] for run in runs])
  ratio_R = column("failure_log_odds_ratio")
  names = ("value_of_remark", "pairs", "pits_at_remark", "lean", "return")
  result = {name: statistics.mean_interval(column(name)) for name in names}
  result["failure_log_odds_ratio"] = ratio_R.round(4).tolist()
  result |= {"training_steps": list(range(0, _NUM_STEPS + 1, _EVERY)), "response": {}, "step": {}}
  for method in METHODS:
    for beta in _BETAS:
      at = {name: np.array([run[method, beta][name] for run in runs]) for name in runs[0][method, beta]}
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
  """credit_matters.json and the figures credit_matters_budget and credit_matters_spurious, as PNG and SVG each."""
  out = epath.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  (out / "credit_matters.json").write_text(json.dumps(result, indent=1))
  figures.save(plots.budget(result["budget"], _DRAWN_BETA), out / "credit_matters_budget")
  figures.save(plots.spurious(result["spurious"], _DRAWN_BETA), out / "credit_matters_spurious")


def main(out: epath.PathLike, num_seeds: int) -> None:
  """Runs both experiments, prints in short what was found, and writes everything."""
  result = {"seeds": num_seeds, "budget": budget(range(num_seeds)), "spurious": spurious(range(num_seeds))}
  write(result, out)
  names = ("half", "moved_at_half", "slope_at_half")
  found = {method: {name: result["spurious"][method][str(_DRAWN_BETA)][name] for name in names} for method in METHODS}
  print(json.dumps({"budget": result["budget"]["at_target"], f"spurious, beta {_DRAWN_BETA}": found}, indent=1))
