"""Values, estimates and the equivalence theorem on a task whose every value is known
(experiments/credit_toy).
"""

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
  """Probabilities of every action at every prefix, all different and above .02."""
  shapes = [(mdp.num_problems, mdp.num_actions**step) for step in range(mdp.num_steps)]
  return [
    0.06 / mdp.num_actions + 0.94 * rng.dirichlet(np.ones(mdp.num_actions), shape)
    for shape in shapes
  ]


@functools.cache
def small():
  """A task of 27 prefixes a problem before the answer, half of the answers off track right, and a
  policy.
  """
  rng = np.random.default_rng(0)
  mdp = reasoning_mdp.draw(
    rng, problems=PROBLEMS, steps=STEPS, critical=(0, 2), num_actions=ACTIONS, luck=0.3
  )
  return mdp, random_policy(mdp, rng)


def enumerated_value(mdp, policy, x: int, prefix: tuple[int, ...]) -> float:
  """Sum over every completion of its probability, right ones only; each completion walked action by
  action.
  """
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
  """(Q [N], counts of right rollouts [N, repeats]) at every prefix of every problem but whole
  responses.
  """
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
    # Fails if a wrong critical step is forgiven, if an irrelevant one counts, if prefixes are
    # numbered otherwise, or if luck helps a wrong answer on track.
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
    # Fails if the recursion takes another policy's step, weighs actions wrongly, or reads prefixes
    # in another order.
    mdp, policy = small()
    values = reasoning_mdp.values(mdp, policy)
    for x in range(PROBLEMS):
      for length in range(STEPS + 1):
        for node, prefix in enumerate(itertools.product(range(ACTIONS), repeat=length)):
          self.assertAlmostEqual(
            values[length][x, node], enumerated_value(mdp, policy, x, prefix), delta=1e-12
          )

  def test_policies_that_see_the_step_alone(self):
    # Fails if the short form [X, 1, n] means another policy than the same probabilities at every
    # prefix.
    mdp, policy = small()
    short = [step[:, :1] for step in policy]
    long = [np.repeat(step, ACTIONS**i, axis=1) for i, step in enumerate(short)]
    for one, other in zip(
      reasoning_mdp.values(mdp, short), reasoning_mdp.values(mdp, long), strict=True
    ):
      np.testing.assert_allclose(one, other, rtol=1e-12)
    draws = [
      reasoning_mdp.sample(
        mdp, p, np.arange(3), prefix_N=np.zeros(3, int), steps=0, rng=np.random.default_rng(1)
      )
      for p in (short, long)
    ]
    np.testing.assert_array_equal(*draws)

  def test_samples(self):
    # Fails if sampling takes another prefix's row, skips a step, or draws from the wrong end: every
    # response's share.
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
    # Fails if the default reference solves nearly all or none, or if right responses without a
    # wrong step are all there are.
    for seed in range(10):
      rng = np.random.default_rng(seed)
      mdp = reasoning_mdp.draw(rng)
      logits = reasoning_mdp.reference_logits(mdp, rng)
      policy = [special.softmax(step, axis=-1)[:, None] for step in logits]
      self.assertBetween(reasoning_mdp.mean_return(mdp, policy), 0.15, 0.45)
      x, response = np.nonzero(mdp.right_XN)
      astray = (mdp.keep_XL[x] != reasoning_mdp.ANY) & (mdp.keep_XL[x] != mdp.actions(response))
      self.assertGreater(astray.any(axis=1).sum(), 0)


class EstimatesTest(parameterized.TestCase):
  def test_monte_carlo_values_are_unbiased(self):
    # Fails for any estimate but c/M, and for rollouts by another policy or from another prefix:
    # every prefix, 4.5 standard errors (120 prefixes: one of 1000 seeds fails by chance).
    mdp, policy = small()
    q, counts = rollout_counts(mdp, policy, rollouts=8, repeats=250, seed=1)
    estimate, known = advantages.step_values(jnp.asarray(counts), jnp.full(counts.shape, 8))
    self.assertTrue(np.all(known))
    error = np.sqrt(q * (1 - q) / (8 * 250))
    np.testing.assert_array_less(np.abs(np.mean(estimate, axis=1) - q), 4.5 * error + 1e-6)
    self.assertGreater(np.mean((q > 0.05) & (q < 0.95)), 0.5)  # the prefixes are no trivial ones

  @parameterized.product(level=(0.8, 0.95), method=("wilson", "beta"))
  def test_intervals_cover(self, level, method):
    # Fails if z is of one tail, or if the level is another's. Coverage is promised on average over
    # Q alone: over this task's prefixes it is within .03 of its level for 20 rollouts, while for
    # single prefixes it strays much further. What is simulated must be what binomial sums give,
    # within 4.5 standard errors.
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
    # Fails if c/M is put into 1 - (1 - q)^k for the unbiased estimate, or if the plug-in is no
    # longer that. At Q of .1 to .4 the plug-in's bias is .03 to .08 here, many times what is left
    # of the noise.
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
    self.assertGreater(
      np.min(-bias["plugin"] / error["plugin"]), 4.5
    )  # low at every one of these prefixes
    self.assertGreater(between.sum(), 10)


def minimise(loss_fn, logits_NA: np.ndarray) -> np.ndarray:
  """The softmax of the logits with the least loss, float64, by L-BFGS from the given ones."""
  with jax.enable_x64(True):
    value_and_grad = jax.jit(
      jax.value_and_grad(lambda flat: loss_fn(flat.reshape(logits_NA.shape)))
    )
    scipy_fn = lambda flat: tuple(np.asarray(part, np.float64) for part in value_and_grad(flat))
    # factr and pgtol below what rounding allows: it stops when it can do no better
    flat, _, _ = optimize.fmin_l_bfgs_b(
      scipy_fn, logits_NA.ravel(), factr=0.0, pgtol=1e-12, maxiter=5000
    )
  return special.softmax(flat.reshape(logits_NA.shape), axis=-1)


def pair_loss(ref_NA, weight_NAB):
  """Σ weight(a, b) · DPO loss of a over b at one step, as a function of logits; a is chosen, b
  rejected.
  """

  def loss_fn(logits_NA):
    logp_NA, ref_logp_NA = jax.nn.log_softmax(logits_NA, axis=-1), jnp.log(ref_NA)
    sides = [jnp.broadcast_to(each, weight_NAB.shape) for each in both(logp_NA) + both(ref_logp_NA)]
    return jnp.sum(weight_NAB * losses.dpo_loss(*sides, beta=BETA))

  return loss_fn


def both(value_NA):
  """The chosen's and the rejected's values of every pair."""
  return value_NA[:, :, None], value_NA[:, None, :]


def total_variation(p_NA, q_NA) -> np.ndarray:
  return 0.5 * np.abs(p_NA - q_NA).sum(axis=-1)


class TheoremTest(absltest.TestCase):
  """DPO on pairs from one prefix and advantage-weighted regression (theorem 6.1), at prefixes whose
  advantages differ.
  """

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    rng = np.random.default_rng(4)
    # 7 actions at 64 prefixes of one and two steps; those are kept at which the policy has most to
    # gain.
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
    # Fails if the advantages of the fixture are not Q - V of its policy.
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
    # Fails as the one above, and if labels were drawn otherwise; 300 000 pairs a prefix leave a
    # total variation of .03.
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
    # Fails if the weights are not exp(A/β), or have a gradient or a cut that bites.
    def loss_fn(logits_NA):
      of_one = functools.partial(losses.advantage_weighted_loss, temperature=BETA, max_weight=1e9)
      step_NA = jax.vmap(jax.vmap(lambda logp, advantage: of_one(logp[None], advantage[None])))
      return jnp.sum(
        self.ref_NA
        * step_NA(jax.nn.log_softmax(logits_NA, axis=-1), jnp.asarray(self.advantage_NA))
      )

    found_NA = minimise(loss_fn, np.log(self.ref_NA))
    self.assertLess(np.max(total_variation(found_NA, self.optimum_NA)), 1e-4)

  def test_near_misses(self):
    # Fails if the construction is the theorem's after all: y⁻ from the reference, and y⁺ from σ(A -
    # A(y⁻)) normalised for each y⁻, weighted by the reference or not. Their own optima are known:
    # log Z(y⁻) takes part in the advantage.
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
    # Fails if the higher advantage wins with a probability below 1: its margin then stops at the
    # difference of A/β.
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
  """Adam with step size .05 from the given logits."""
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
