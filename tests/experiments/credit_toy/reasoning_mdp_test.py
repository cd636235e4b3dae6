"""Values, estimates and theorem 6.1 on the task of experiments/credit_toy, solved exactly."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from scipy import optimize, special, stats

from synthneg_jax.core import advantages, losses
from synthneg_jax.experiments.credit_toy import reasoning_mdp

ACTIONS, STEPS, PROBLEMS, BETA = 3, 4, 3, 0.15


def random_policy(mdp, rng) -> list[np.ndarray]:
  """A policy whose action probabilities differ at every prefix and exceed .02."""
  shapes = [(mdp.num_problems, mdp.num_actions**step) for step in range(mdp.num_steps)]
  return [
    0.06 / mdp.num_actions + 0.94 * rng.dirichlet(np.ones(mdp.num_actions), shape)
    for shape in shapes
  ]


@functools.cache
def small():
  """A task with 27 prefixes per problem before the answer, luck .3, and a policy."""
  rng = np.random.default_rng(0)
  mdp = reasoning_mdp.draw(
    rng, problems=PROBLEMS, steps=STEPS, critical=(0, 2), num_actions=ACTIONS, luck=0.3
  )
  return mdp, random_policy(mdp, rng)


def enumerated_value(mdp, policy, x: int, prefix: tuple[int, ...]) -> float:
  """The total probability of the right completions, each walked action by action."""
  total = 0.0
  for tail in itertools.product(range(mdp.num_actions), repeat=mdp.num_steps - len(prefix)):
    probability, node = 1.0, 0
    for step, action in enumerate(prefix + tail):
      if step >= len(prefix):
        probability *= policy[step][x, node, action]
      node = node * mdp.num_actions + action
    total += probability * mdp.right_XN[x, node]
  return total


def rollout_counts(mdp, policy, rollouts: int, repeats: int, seed: int):
  """(Q [N], counts of right rollouts [N, repeats]) at all prefixes shorter than a response."""
  rng = np.random.default_rng(seed)
  q, counts = [], []
  for steps, value_XP in enumerate(reasoning_mdp.values(mdp, policy)[:-1]):
    x, prefix = (index[..., None] for index in np.indices(value_XP.shape).reshape(2, -1))
    response = reasoning_mdp.sample(
      mdp, policy, x, prefix_N=np.repeat(prefix, rollouts * repeats, axis=1), steps=steps, rng=rng
    )
    counts.append(mdp.right_XN[x, response].reshape(-1, repeats, rollouts).sum(axis=-1))
    q.append(value_XP.reshape(-1))
  return np.concatenate(q), np.concatenate(counts)


class ReasoningMDPTest(parameterized.TestCase):
  def test_verdicts_by_hand(self):
    # Fails if a wrong critical step stays on track, if an irrelevant one does not, if prefixes are
    # numbered differently, or if luck applies to a wrong answer on track.
    keep = np.array([[reasoning_mdp.ANY, 1, 0]])
    on_track = np.array([[0, 0, 1, 0, 0, 0, 1, 0]], bool)  # 010 and 110
    np.testing.assert_array_equal(
      reasoning_mdp.make(keep, 2, luck=0.0, rng=np.random.default_rng(0)).right_XN, on_track
    )
    off_track = np.array([[1, 1, 0, 0, 1, 1, 0, 0]], bool)  # 00a and 10a
    lucky = reasoning_mdp.make(keep, 2, luck=1.0, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(lucky.right_XN, on_track | off_track)
    np.testing.assert_array_equal(lucky.actions(np.array([2, 6])), [[0, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(lucky.prefix(np.array([2, 6]), 2), [1, 3])

  def test_values_equal_enumeration(self):
    # Fails if the recursion uses another step's policy, weights actions wrongly, or orders prefixes
    # differently.
    mdp, policy = small()
    values = reasoning_mdp.values(mdp, policy)
    for x in range(PROBLEMS):
      for length in range(STEPS + 1):
        for node, prefix in enumerate(itertools.product(range(ACTIONS), repeat=length)):
          self.assertAlmostEqual(
            values[length][x, node], enumerated_value(mdp, policy, x, prefix), delta=1e-12
          )

  def test_policies_that_ignore_the_prefix(self):
    # Fails if the short form [X, 1, n] differs from the same probabilities at every prefix.
    mdp, policy = small()
    short = [step[:, :1] for step in policy]
    long = [np.repeat(step, ACTIONS**i, axis=1) for i, step in enumerate(short)]
    for short_XP, long_XP in zip(
      reasoning_mdp.values(mdp, short), reasoning_mdp.values(mdp, long), strict=True
    ):
      np.testing.assert_allclose(short_XP, long_XP, rtol=1e-12)
    draws = [
      reasoning_mdp.sample(
        mdp, p, np.arange(3), prefix_N=np.zeros(3, int), steps=0, rng=np.random.default_rng(1)
      )
      for p in (short, long)
    ]
    np.testing.assert_array_equal(*draws)

  def test_samples(self):
    # The share of every response. Fails if sampling reads another prefix's row, skips a step, or
    # maps random numbers to the wrong actions.
    mdp, policy = small()
    num = 30_000
    x = np.arange(PROBLEMS)[:, None]
    drawn = reasoning_mdp.sample(
      mdp, policy, x, prefix_N=np.zeros((1, num), int), steps=0, rng=np.random.default_rng(0)
    )
    share = np.stack([np.bincount(row, minlength=ACTIONS**STEPS) for row in drawn]) / num
    expected = np.ones((PROBLEMS, 1))
    for step in policy:
      expected = (expected[:, :, None] * step).reshape(PROBLEMS, -1)
    self.assertLess(np.max(np.abs(share - expected) / np.sqrt(expected / num)), 5.0)
    self.assertAlmostEqual(
      reasoning_mdp.mean_return(mdp, policy),
      np.sum(expected * mdp.right_XN) / PROBLEMS,
      delta=1e-12,
    )

  def test_the_reference_is_imperfect(self):
    # Fails if the default reference solves nearly all or no problems, or if no right response has a
    # wrong step.
    for seed in range(10):
      rng = np.random.default_rng(seed)
      mdp = reasoning_mdp.draw(rng)
      logits = reasoning_mdp.reference_logits(mdp, rng)
      policy = [special.softmax(step, axis=-1)[:, None] for step in logits]
      self.assertBetween(reasoning_mdp.mean_return(mdp, policy), 0.15, 0.45)
      x, response = np.nonzero(mdp.right_XN)
      required = mdp.required_XL[x]
      off_track = (required != reasoning_mdp.ANY) & (required != mdp.actions(response))
      self.assertGreater(off_track.any(axis=1).sum(), 0)


class EstimatesTest(parameterized.TestCase):
  def test_monte_carlo_values_are_unbiased(self):
    # Fails for any estimate but c/M, and for rollouts of another policy or from another prefix.
    # Every prefix must be within 4.5 standard errors (120 prefixes: one of 1000 seeds fails by
    # chance).
    mdp, policy = small()
    q, counts = rollout_counts(mdp, policy, rollouts=8, repeats=250, seed=1)
    estimate, known = advantages.step_values(jnp.asarray(counts), jnp.full(counts.shape, 8))
    self.assertTrue(np.all(known))
    error = np.sqrt(q * (1 - q) / (8 * 250))
    np.testing.assert_array_less(np.abs(np.mean(estimate, axis=1) - q), 4.5 * error + 1e-6)
    self.assertGreater(np.mean((q > 0.05) & (q < 0.95)), 0.5)  # most prefixes are not trivial

  @parameterized.product(level=(0.8, 0.95), method=("wilson", "beta"))
  def test_intervals_cover(self, level, method):
    # Fails if z is one-sided, or belongs to another level. Only the coverage averaged over Q is
    # guaranteed: over this task's prefixes it is within .03 of its level for 20 rollouts, and much
    # further from it at single prefixes. The simulated coverage must agree with the exact binomial
    # sum within 4.5 standard errors.
    mdp, policy = small()
    q, counts = rollout_counts(mdp, policy, rollouts=20, repeats=200, seed=2)
    inside = (q > 0.02) & (q < 0.98)  # at 0 and 1 every interval covers
    low, high = advantages.value_interval(counts[inside], 20, level=level, method=method)
    covered = (low <= q[inside, None]) & (q[inside, None] <= high)
    low, high = advantages.value_interval(np.arange(21), 20, level=level, method=method)
    exact = np.sum(
      stats.binom.pmf(np.arange(21), 20, q[inside, None])
      * ((low <= q[inside, None]) & (q[inside, None] <= high)),
      axis=1,
    )
    error = np.sqrt(np.mean(exact * (1 - exact)) / covered.size)
    self.assertAlmostEqual(covered.mean(), exact.mean(), delta=4.5 * error)
    self.assertAlmostEqual(covered.mean(), level, delta=0.03)

  def test_best_of_k(self):
    # Fails if the unbiased estimate becomes 1 - (1 - c/M)^k, or if the plug-in is anything else. At
    # Q from .1 to .4, the plug-in's bias is .03 to .08 here, many times the remaining noise.
    mdp, policy = small()
    k, rollouts, repeats = 5, 8, 2000
    q, counts = rollout_counts(mdp, policy, rollouts, repeats, seed=3)
    between = (q > 0.1) & (q < 0.4)
    expected = 1 - (1 - q[between]) ** k
    bias, error = {}, {}
    for name, estimate in (
      ("unbiased", advantages.best_of_k),
      ("plugin", advantages.best_of_k_plugin),
    ):
      values, known = estimate(
        jnp.asarray(counts[between]), jnp.full(counts[between].shape, rollouts), k
      )
      self.assertTrue(np.all(known))
      values = np.asarray(values, np.float64)
      bias[name] = values.mean(axis=1) - expected
      error[name] = values.std(axis=1) / np.sqrt(repeats)
    self.assertLess(np.max(np.abs(bias["unbiased"]) / error["unbiased"]), 4.5)
    # The plug-in is too low at each of these prefixes.
    self.assertGreater(np.min(-bias["plugin"] / error["plugin"]), 4.5)
    self.assertGreater(between.sum(), 10)


def minimise(loss_fn, logits_NA: np.ndarray) -> np.ndarray:
  """The softmax of the logits that minimise the loss: L-BFGS in float64 from the given logits."""
  with jax.enable_x64(True):
    value_and_grad = jax.jit(
      jax.value_and_grad(lambda flat: loss_fn(flat.reshape(logits_NA.shape)))
    )

    def scipy_fn(flat):
      return tuple(np.asarray(part, np.float64) for part in value_and_grad(flat))

    # With tolerances below rounding error, it stops only when it cannot improve.
    flat, _, _ = optimize.fmin_l_bfgs_b(
      scipy_fn, logits_NA.ravel(), factr=0.0, pgtol=1e-12, maxiter=5000
    )
  return special.softmax(flat.reshape(logits_NA.shape), axis=-1)


def pair_loss(ref_NA, weight_NAB):
  """Returns loss(logits) = Σ weight(a, b) · DPO loss of a chosen over b at one step."""

  def loss_fn(logits_NA):
    logp_NA, ref_logp_NA = jax.nn.log_softmax(logits_NA, axis=-1), jnp.log(ref_NA)
    sides = [jnp.broadcast_to(each, weight_NAB.shape) for each in both(logp_NA) + both(ref_logp_NA)]
    return jnp.sum(weight_NAB * losses.dpo_loss(*sides, beta=BETA))

  return loss_fn


def both(value_NA):
  """The values of the chosen and of the rejected actions of all pairs, ready to broadcast."""
  return value_NA[:, :, None], value_NA[:, None, :]


def total_variation(p_NA, q_NA) -> np.ndarray:
  return 0.5 * np.abs(p_NA - q_NA).sum(axis=-1)


class TheoremTest(absltest.TestCase):
  """Theorem 6.1: DPO on pairs that share a prefix, and advantage-weighted regression."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    rng = np.random.default_rng(4)
    # 7 actions at 64 prefixes; keeps the 8 prefixes whose values of actions differ most.
    mdp = reasoning_mdp.draw(rng, problems=8, steps=3, critical=(0, 1), num_actions=7, luck=0.3)
    policy = random_policy(mdp, rng)
    values = reasoning_mdp.values(mdp, policy)
    q_NA = np.concatenate([values[i + 1].reshape(-1, 7) for i in (0, 1)])
    cls.ref_NA = np.concatenate([policy[i].reshape(-1, 7) for i in (0, 1)])
    v_N = np.concatenate([values[i].reshape(-1) for i in (0, 1)])
    best = np.argsort(-np.ptp(q_NA, axis=1))[:8]
    cls.ref_NA, cls.advantage_NA = cls.ref_NA[best], (q_NA - v_N[:, None])[best]
    cls.optimum_NA = special.softmax(np.log(cls.ref_NA) + cls.advantage_NA / BETA, axis=-1)
    chosen_NAB, rejected_NAB = both(cls.advantage_NA)
    cls.wins_NAB = special.expit(chosen_NAB - rejected_NAB)

  def test_advantages_average_to_zero(self):
    # Fails if the fixture's advantages are not Q - V of its policy.
    np.testing.assert_allclose(np.sum(self.ref_NA * self.advantage_NA, axis=1), 0.0, atol=1e-12)
    self.assertGreater(np.min(total_variation(self.optimum_NA, self.ref_NA)), 0.1)

  def test_population(self):
    # Fails if β or a sign of the DPO loss changes, or if no reference is subtracted.
    chosen_NAB, rejected_NAB = both(self.ref_NA)
    found_NA = minimise(
      pair_loss(self.ref_NA, chosen_NAB * rejected_NAB * self.wins_NAB), np.log(self.ref_NA)
    )
    self.assertLess(np.max(total_variation(found_NA, self.optimum_NA)), 1e-4)

  def test_finite_sample(self):
    # Fails as test_population does, and if labels are drawn differently; with 300 000 pairs per
    # prefix, the total variation is at most .03.
    rng = np.random.default_rng(5)
    num = 300_000
    count_NAB = np.zeros(self.wins_NAB.shape)
    for row, (ref_A, wins_AB) in enumerate(zip(self.ref_NA, self.wins_NAB, strict=True)):
      first, second = rng.choice(7, size=(2, num), p=ref_A)
      won = rng.random(num) < wins_AB[first, second]
      np.add.at(
        count_NAB[row], (np.where(won, first, second), np.where(won, second, first)), 1.0 / num
      )
    found_NA = minimise(pair_loss(self.ref_NA, count_NAB), np.log(self.ref_NA))
    self.assertLess(np.max(total_variation(found_NA, self.optimum_NA)), 0.03)

  def test_advantage_weighted_regression(self):
    # Fails if the weights are not exp(A/β), have a gradient, or are clipped.
    def loss_fn(logits_NA):
      awr_loss = functools.partial(losses.advantage_weighted_loss, temperature=BETA, max_weight=1e9)
      step_NA = jax.vmap(jax.vmap(lambda logp, advantage: awr_loss(logp[None], advantage[None])))
      return jnp.sum(
        self.ref_NA
        * step_NA(jax.nn.log_softmax(logits_NA, axis=-1), jnp.asarray(self.advantage_NA))
      )

    found_NA = minimise(loss_fn, np.log(self.ref_NA))
    self.assertLess(np.max(total_variation(found_NA, self.optimum_NA)), 1e-4)

  def test_similar_constructions_have_other_optima(self):
    # y⁻ from the reference, and y⁺ from σ(A - A(y⁻)) normalised for each y⁻, weighted by the
    # reference or not. Fails if these share the theorem's optimum; their own optima, to which
    # log Z(y⁻) contributes, are known.
    for name, weight_NAB in (
      ("weighted", self.ref_NA[:, :, None] * self.wins_NAB),
      ("unweighted", self.wins_NAB),
    ):
      z_NB = weight_NAB.sum(axis=1)
      found_NA = minimise(
        pair_loss(self.ref_NA, self.ref_NA[:, None, :] * weight_NAB / z_NB[:, None]), 0 * z_NB
      )
      score_NA = (
        self.advantage_NA + np.log(z_NB) - (np.log(self.ref_NA) if name == "unweighted" else 0.0)
      )
      own_NA = special.softmax(np.log(self.ref_NA) + score_NA / BETA, axis=-1)
      with self.subTest(name):
        self.assertLess(np.max(total_variation(found_NA, own_NA)), 1e-3)
        distance_N = total_variation(found_NA, self.optimum_NA)
        self.assertGreater(np.min(distance_N), 0.05)
        self.assertGreater(np.mean(distance_N), {"weighted": 0.1, "unweighted": 0.5}[name])

  def test_hard_labels_have_no_optimum(self):
    # Fails if the higher advantage wins with a probability below 1: the margin then converges to
    # the difference of A/β.
    chosen_NAB, rejected_NAB = both(self.ref_NA)
    always_NAB = (self.wins_NAB > 0.5).astype(np.float32)
    margins = {"hard": [], "soft": []}
    for name, labels_NAB in (("hard", always_NAB), ("soft", np.float32(self.wins_NAB))):
      loss_fn = pair_loss(
        jnp.float32(self.ref_NA), jnp.float32(chosen_NAB * rejected_NAB) * labels_NAB
      )
      for num_steps in (1000, 4000):
        logits_NA = descend(loss_fn, np.log(self.ref_NA).astype(np.float32), num_steps)
        shift_NA = logits_NA - np.log(self.ref_NA)
        best, worst = np.argmax(self.advantage_NA, axis=1), np.argmin(self.advantage_NA, axis=1)
        rows = np.arange(len(best))
        margins[name].append(shift_NA[rows, best] - shift_NA[rows, worst])
    np.testing.assert_array_less(margins["hard"][0] + 3.0, margins["hard"][1])
    np.testing.assert_allclose(
      margins["soft"][1], np.ptp(self.advantage_NA, axis=1) / BETA, rtol=0.02
    )


def descend(loss_fn, logits_NA: np.ndarray, num_steps: int) -> np.ndarray:
  """Minimises the loss by Adam with step size .05 from the given logits."""
  optimizer = optax.adam(0.05)

  @jax.jit
  def run(logits_NA):
    def step(carry, _):
      updates, state = optimizer.update(jax.grad(loss_fn)(carry[0]), carry[1])
      return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (logits_NA, optimizer.init(logits_NA)), length=num_steps)[0][0]

  return np.asarray(run(logits_NA))


if __name__ == "__main__":
  absltest.main()
