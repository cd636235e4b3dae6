"""Losses against float64 numpy; their symmetry, gradients and extreme margins."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import test_util

from synthneg_jax.core import losses

token_logprobs = jax.jit(losses.token_logprobs)
_COLUMNS = ("chosen", "rejected", "ref_chosen", "ref_rejected")


def draw(seed: int = 0, num: int = 9) -> dict[str, np.ndarray]:
  """Summed log-probs of `num` pairs, float64 nats."""
  rng = np.random.default_rng(seed)
  return {name: -rng.uniform(0.5, 40.0, num) for name in _COLUMNS}


def numpy_dpo(chosen, rejected, ref_chosen, ref_rejected, beta, epsilon=0.0):
  """-(1-ε) log σ(βh) - ε log σ(-βh), written with σ itself; good for moderate βh only."""
  h = (chosen - ref_chosen) - (rejected - ref_rejected)

  def log_sigmoid(x):
    return np.log(1.0 / (1.0 + np.exp(-x)))

  return -(1.0 - epsilon) * log_sigmoid(beta * h) - epsilon * log_sigmoid(-beta * h)


def pair_args(pairs) -> tuple[jax.Array, ...]:
  return tuple(jnp.asarray(pairs[name], jnp.float32) for name in _COLUMNS)


class TokenLogprobsTest(parameterized.TestCase):
  @parameterized.parameters(((5, 7),), ((2, 3, 7),))
  def test_gradients(self, shape):
    # Fails if the gradient lacks the softmax or the target's one, has the wrong sign, or gives it
    # to another place.
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
      logits, targets = (
        jnp.asarray(rng.normal(size=shape)),
        jnp.asarray(rng.integers(0, shape[-1], shape[:-1])),
      )
      weights = jnp.asarray(rng.normal(size=shape[:-1]))

      def loss(logits):
        return jnp.sum(weights * losses.token_logprobs(logits, targets))

      test_util.check_grads(loss, (logits,), order=1, modes=["rev"], rtol=1e-6)

  @parameterized.parameters(((5,),), ((2, 3),), ((),))
  def test_equals_numpy(self, shape):
    # Fails if another entry than the target's is taken, or if the sum runs over another axis than
    # the last.
    rng = np.random.default_rng(0)
    logits, target = 3.0 * rng.normal(size=(*shape, 7)), rng.integers(0, 7, shape)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.log(np.take_along_axis(probs, target[..., None], -1)[..., 0])
    got = token_logprobs(logits.astype(np.float32), target.astype(np.int32))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

  def test_large_logits(self):
    # Fails if exp is taken without the largest logit being subtracted (overflow).
    logits = np.tile(np.array([1e4, 1e4 - 2.0, -1e4], np.float32), (3, 1))
    expected = -np.log1p(np.exp(-2.0)) - np.array([0.0, 2.0, 2e4])
    got = token_logprobs(logits, np.arange(3, dtype=np.int32))
    np.testing.assert_allclose(
      got, expected, rtol=1e-6, atol=1e-3
    )  # float32 has steps of 1e-3 at 1e4

  def test_bfloat16_logits_are_summed_in_float32(self):
    # Fails if the cast to float32 is dropped: the result would be bfloat16, in steps of 1/32.
    got = token_logprobs(jnp.zeros((1, 512), jnp.bfloat16), np.array([3], np.int32))
    self.assertEqual(got.dtype, jnp.float32)
    np.testing.assert_allclose(got, -np.log(512.0), rtol=1e-6)

  def test_float64_stays(self):
    # Fails if the cast narrows.
    with jax.enable_x64(True):
      logits = np.random.default_rng(0).normal(size=(1, 5))
      got = token_logprobs(logits, np.array([2], np.int32))
      np.testing.assert_allclose(got, logits[0, 2] - np.log(np.exp(logits).sum()), rtol=1e-14)


class BranchLogprobsTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if a token that two branches share counts in one of them only, if a mean is taken, if a
    # branch without tokens is not 0, or if masking multiplies (0 · -inf).
    logp = jnp.asarray([-1.0, -2.0, -4.0, -8.0, -jnp.inf])
    tokens = np.array([[1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], bool)
    got = jax.jit(losses.branch_logprobs)(logp, tokens)
    np.testing.assert_array_equal(got, [-3.0, -13.0, 0.0, -np.inf])

  def test_keeps_its_type(self):
    # Fails if sums are narrowed.
    with jax.enable_x64(True):
      values = np.array([-1.0, -1e-12])
      got = losses.branch_logprobs(jnp.asarray(values), np.ones((1, 2), bool))
    self.assertEqual(float(got[0]), values.sum())


class SftLossTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if unscored tokens count, if the mean is taken, if the sign is lost, if masking
    # multiplies (0 · -inf), or if a token of two sequences counts once.
    logp = jnp.asarray([-0.5, -jnp.inf, -2.0, -100.0])
    self.assertEqual(float(losses.sft_loss(logp, jnp.asarray([True, False, True, False]))), 2.5)
    self.assertEqual(float(losses.sft_loss(logp, jnp.asarray([2, 0, 1, 0]))), 3.0)
    self.assertEqual(float(losses.sft_loss(logp, jnp.zeros(4, bool))), 0.0)

  def test_gradient(self):
    # Fails if an unscored token has a gradient, or if tokens weigh differently.
    grad = jax.grad(losses.sft_loss)(
      jnp.asarray([-0.5, -3.0, -2.0]), jnp.asarray([True, False, True])
    )
    np.testing.assert_array_equal(grad, [-1.0, 0.0, -1.0])


class PreferenceMarginTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if any of the four signs is flipped.
    columns = [jnp.asarray([value], jnp.float32) for value in (1.0, 20.0, 300.0, 4000.0)]
    np.testing.assert_array_equal(
      losses.preference_margin(*columns), [(1.0 - 300.0) - (20.0 - 4000.0)]
    )


class DpoLossTest(parameterized.TestCase):
  @parameterized.product(beta=(0.02, 0.1, 1.0), epsilon=(0.0, 0.1, 0.49))
  def test_equals_numpy(self, beta, epsilon):
    # Fails for a changed sign or factor of the margin, β outside the sigmoid, or ε on the wrong
    # term.
    pairs = draw()
    got = losses.dpo_loss(*pair_args(pairs), beta=beta, label_smoothing=epsilon)
    self.assertEqual((got.shape, got.dtype), ((9,), jnp.float32))
    np.testing.assert_allclose(
      got, numpy_dpo(**pairs, beta=beta, epsilon=epsilon), rtol=1e-5, atol=1e-6
    )

  def test_golden(self):
    # Fails if the oracle above is changed along with the loss: h = 3, β = 0.5, ε = 0 and 0.1.
    columns = [jnp.asarray([value]) for value in (-4.0, -9.0, -5.0, -7.0)]
    np.testing.assert_allclose(losses.dpo_loss(*columns, beta=0.5), [0.20141328], rtol=1e-6)
    got = losses.dpo_loss(*columns, beta=0.5, label_smoothing=0.1)
    np.testing.assert_allclose(got, [0.20141328 + 0.1 * 1.5], rtol=1e-6)

  @parameterized.product(beta=(0.1, 1.0), epsilon=(0.0, 0.3))
  def test_symmetry(self, beta, epsilon):
    # Fails if at h = 0 the loss depends on β or ε, or if chosen and rejected are treated unlike
    # each other.
    pairs = draw()
    level = {**pairs, "ref_chosen": pairs["chosen"] + 3.0, "ref_rejected": pairs["rejected"] + 3.0}
    loss = functools.partial(losses.dpo_loss, beta=beta, label_smoothing=epsilon)
    np.testing.assert_allclose(loss(*pair_args(level)), np.log(2.0), rtol=1e-5)
    chosen, rejected, ref_chosen, ref_rejected = pair_args(pairs)
    swapped = loss(rejected, chosen, ref_rejected, ref_chosen)
    h = losses.preference_margin(chosen, rejected, ref_chosen, ref_rejected)
    np.testing.assert_allclose(
      swapped - loss(*pair_args(pairs)), beta * h * (1.0 - 2.0 * epsilon), rtol=1e-4, atol=1e-5
    )

  @parameterized.parameters(0.0, 0.2)
  def test_gradients(self, epsilon):
    # Fails if a gradient is not the loss's (a stop_gradient too many), or if any flows to the
    # reference (one too few).
    args = tuple(draw(1).values())
    with jax.enable_x64(True):
      loss = jax.jit(
        lambda *args: jnp.sum(losses.dpo_loss(*args, beta=0.1, label_smoothing=epsilon))
      )
      test_util.check_grads(lambda c, r: loss(c, r, *args[2:]), args[:2], order=1, rtol=1e-6)
      grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*args)
    scaled = 0.1 * ((args[0] - args[1]) - (args[2] - args[3]))
    expected = -0.1 * (1.0 / (1.0 + np.exp(scaled)) - epsilon)
    np.testing.assert_allclose(grads[0], expected, rtol=1e-12)
    np.testing.assert_allclose(grads[1], -expected, rtol=1e-12)
    for grad in grads[2:]:
      np.testing.assert_array_equal(grad, 0.0)

  def test_label_smoothing_of_each_pair(self):
    # Fails if one ε is taken for all pairs, or if ε cannot be traced.
    pairs, epsilon = draw(), np.linspace(0.0, 0.4, 9).astype(np.float32)
    got = jax.jit(functools.partial(losses.dpo_loss, beta=0.1))(
      *pair_args(pairs), label_smoothing=epsilon
    )
    np.testing.assert_allclose(
      got, numpy_dpo(**pairs, beta=0.1, epsilon=epsilon), rtol=1e-5, atol=1e-6
    )

  def test_jit_and_vmap_change_nothing(self):
    # Fails if the loss branches on values, or mixes the pairs of a batch.
    loss = functools.partial(losses.dpo_loss, beta=0.1, label_smoothing=0.1)
    args = pair_args(draw())
    plain = loss(*args)
    np.testing.assert_allclose(jax.jit(loss)(*args), plain, rtol=2e-6)
    np.testing.assert_allclose(jax.vmap(loss)(*args), plain, rtol=2e-6)
    single = jax.jit(loss)
    np.testing.assert_allclose(
      [single(*(column[i] for column in args)) for i in range(9)], plain, rtol=2e-6
    )

  @parameterized.parameters(0.0, 0.1)
  def test_extreme_margins(self, epsilon):
    # Fails if log σ is computed as log of a σ that has become 0 or 1, or by exp without a guard.
    args = (jnp.asarray([1e4, -1e4, 0.0]), *(jnp.zeros(3) for _ in range(3)))
    loss = functools.partial(losses.dpo_loss, beta=1.0, label_smoothing=epsilon)
    np.testing.assert_allclose(
      loss(*args), [1e4 * epsilon, 1e4 * (1.0 - epsilon), np.log(2.0)], rtol=1e-6
    )
    grad = jax.jit(jax.grad(lambda chosen: jnp.sum(loss(chosen, *args[1:]))))(args[0])
    np.testing.assert_allclose(grad, [epsilon, epsilon - 1.0, epsilon - 0.5], rtol=1e-6)


class SettingsTest(parameterized.TestCase):
  @parameterized.parameters(
    losses.dpo_loss, losses.ipo_loss, losses.dpop_loss, losses.preference_metrics
  )
  def test_go_by_name(self, loss):
    # Fails if β, τ or a penalty can be passed positionally, where they are easily confused.
    with self.assertRaises(TypeError):
      loss(*pair_args(draw()), 0.1, *((5.0,) if loss is losses.dpop_loss else ()))

  def test_weights_go_by_name(self):
    # Fails if temperature and largest weight can be passed positionally.
    with self.assertRaises(TypeError):
      losses.advantage_weighted_loss(jnp.zeros(2), jnp.zeros(2), 0.5, 20.0)


class NllTermTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if the sum is not divided by its own pair's tokens, if the sign is lost, or if no tokens
    # give 0/0.
    got = losses.nll_term(jnp.asarray([-6.0, -6.0, 0.0]), jnp.asarray([3.0, 1.0, 0.0]))
    np.testing.assert_array_equal(got, [2.0, 6.0, 0.0])


def float64_args(seed: int = 0) -> tuple[np.ndarray, ...]:
  return tuple(draw(seed).values())


class IpoLossTest(parameterized.TestCase):
  @parameterized.parameters(0.02, 0.1, 1.0)
  def test_equals_numpy(self, tau):
    # Fails for 1/τ or τ/2 in place of 1/(2τ), for a lost square, and for any flipped sign in h.
    with jax.enable_x64(True):
      got = jax.jit(functools.partial(losses.ipo_loss, tau=tau))(*float64_args())
    chosen, rejected, ref_chosen, ref_rejected = float64_args()
    h = np.log(np.exp(chosen - ref_chosen) / np.exp(rejected - ref_rejected))
    np.testing.assert_allclose(got, (h - 0.5 / tau) ** 2, rtol=1e-12)

  def test_golden(self):
    # Fails if the oracle is changed along with the loss: h = 3, τ = 0.1, (3 - 5)² = 4.
    columns = [jnp.asarray([value]) for value in (-4.0, -9.0, -5.0, -7.0)]
    np.testing.assert_allclose(losses.ipo_loss(*columns, tau=0.1), [4.0], rtol=1e-6)

  def test_gradients(self):
    # Fails if the factor 2(h - 1/(2τ)) is lost or the reference is trained.
    args = float64_args(1)
    with jax.enable_x64(True):
      grads = jax.grad(
        lambda *args: jnp.sum(losses.ipo_loss(*args, tau=0.1)), argnums=(0, 1, 2, 3)
      )(*args)
    expected = 2.0 * ((args[0] - args[1]) - (args[2] - args[3]) - 5.0)
    for grad, factor in zip(grads, (1.0, -1.0, 0.0, 0.0), strict=True):
      np.testing.assert_allclose(grad, factor * expected, rtol=1e-12)


class DpopLossTest(parameterized.TestCase):
  @parameterized.product(beta=(0.02, 0.3), penalty=(0.0, 0.5, 5.0))
  def test_equals_numpy(self, beta, penalty):
    # Fails if the penalty is outside the sigmoid, is not multiplied by β, is added to h, looks
    # at the rejected branch or has its difference negated, or if gains are penalised too (no max
    # with 0).
    with jax.enable_x64(True):
      got = jax.jit(functools.partial(losses.dpop_loss, beta=beta, penalty=penalty))(
        *float64_args()
      )
    chosen, rejected, ref_chosen, ref_rejected = float64_args()
    fallen = np.where(chosen < ref_chosen, ref_chosen - chosen, 0.0)
    self.assertBetween(np.count_nonzero(fallen), 1, 8)
    scaled = beta * (chosen - ref_chosen - rejected + ref_rejected - penalty * fallen)
    np.testing.assert_allclose(got, np.logaddexp(0.0, -scaled), rtol=1e-12)

  def test_golden(self):
    # Fails if the oracle is changed along with the loss: h = 3, fallen by 1, λ = 2, β = 0.5: log(1
    # + exp(-0.5)).
    columns = [jnp.asarray([value]) for value in (-6.0, -11.0, -5.0, -7.0)]
    np.testing.assert_allclose(
      losses.dpop_loss(*columns, beta=0.5, penalty=2.0), [0.47407698], rtol=1e-6
    )

  def test_gradients(self):
    # Fails if the penalty has no gradient (stop_gradient too many), the reference has one, or the
    # kink at π = π_ref gives half the penalty's gradient (jnp.maximum does).
    args = float64_args(1)

    def loss(*args):
      return jnp.sum(losses.dpop_loss(*args, beta=0.1, penalty=3.0))

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    with jax.enable_x64(True):
      grads = grad(*args)
      level = grad(args[0], args[1], args[0], args[1])
    fallen = np.maximum(args[2] - args[0], 0.0)
    pull = 0.1 / (1.0 + np.exp(0.1 * (args[0] - args[1] - args[2] + args[3] - 3.0 * fallen)))
    np.testing.assert_allclose(grads[0], -pull * np.where(fallen > 0, 4.0, 1.0), rtol=1e-12)
    np.testing.assert_allclose(grads[1], pull, rtol=1e-12)
    for column in (*grads[2:], *level[2:]):
      np.testing.assert_array_equal(column, 0.0)
    np.testing.assert_allclose(level[0], -0.05, rtol=1e-12)

  def test_extreme_margins(self):
    # Fails if log σ is computed as log of a σ that has become 0.
    zeros = jnp.zeros(2)
    got = losses.dpop_loss(jnp.asarray([-1e3, 1e3]), zeros, zeros, zeros, beta=1.0, penalty=50.0)
    np.testing.assert_allclose(got, [51e3, 0.0], rtol=1e-6)


class AdvantageLossesTest(parameterized.TestCase):
  @parameterized.product(temperature=(0.1, 0.5, 2.0), max_weight=(1.5, 20.0))
  def test_weighted_equals_numpy(self, temperature, max_weight):
    # Fails for A·β in place of A/β, for a cut of A instead of the weight, a mean, normalised
    # weights or a lost sign.
    rng = np.random.default_rng(0)
    logp, advantage = -rng.uniform(0.1, 9.0, 12), rng.uniform(-1.0, 1.0, 12)
    with jax.enable_x64(True):
      loss = functools.partial(
        losses.advantage_weighted_loss, temperature=temperature, max_weight=max_weight
      )
      got = jax.jit(loss)(logp, advantage)
    expected = -sum(
      min(math.exp(a / temperature), max_weight) * p for p, a in zip(logp, advantage, strict=True)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-12)

  def test_weighted_gradients(self):
    # Fails if a gradient flows to the advantages, if the weights are not the factors of log π, if a
    # weight that overflows is not cut, or if an unknown step (-inf) counts.
    logp, advantage = jnp.asarray([-1.0, -2.0, -3.0, -4.0]), jnp.asarray([0.0, 1e3, -jnp.inf, -0.5])
    loss = functools.partial(losses.advantage_weighted_loss, temperature=0.5, max_weight=20.0)
    np.testing.assert_allclose(
      jax.grad(loss)(logp, advantage), [-1.0, -20.0, 0.0, -np.exp(-1.0)], rtol=1e-6
    )
    np.testing.assert_array_equal(jax.grad(loss, argnums=1)(logp, advantage), 0.0)

  def test_filtered_by_hand(self):
    # Fails if A = 0 or an unknown step is kept, if steps are weighted by A, or if masking
    # multiplies (0 · -inf).
    logp = jnp.asarray([-0.5, -jnp.inf, -2.0, -100.0, -1.0, -50.0])
    advantage = np.array([0.01, -0.2, 0.9, 0.0, 0.5, -np.inf], np.float32)
    self.assertEqual(float(losses.advantage_filtered_loss(logp, jnp.asarray(advantage))), 3.5)
    grad = jax.grad(losses.advantage_filtered_loss)(logp, jnp.asarray(advantage))
    np.testing.assert_array_equal(grad, [-1.0, 0.0, -1.0, 0.0, -1.0, 0.0])


class PreferenceMetricsTest(absltest.TestCase):
  def test_by_hand(self):
    # Fails if a tie counts as right, if margin is scaled by β, if shifts are negated or
    # swapped, or if `saturated` ignores β or takes |h|. σ(-4.5) = 0.011, σ(-4.7) = 0.009.
    columns = [
      np.array([-10.0, -9.0, -1.0, -1.0, -60.0]),
      np.array([-12.0, -9.0, -46.0, -48.0, -2.0]),
      np.array([-8.0, -7.0, -1.0, -1.0, -1.0]),
      np.array([-7.0, -7.0, -1.0, -1.0, -1.0]),
    ]
    with jax.enable_x64(True):
      got = jax.jit(functools.partial(losses.preference_metrics, beta=0.1))(*columns)
    expected = {
      "margin": [3.0, 0.0, 45.0, 47.0, -58.0],
      "accuracy": [1.0, 0.0, 1.0, 1.0, 0.0],
      "chosen_shift": [-2.0, -2.0, 0.0, 0.0, -59.0],
      "rejected_shift": [-5.0, -2.0, -45.0, -47.0, -1.0],
      "saturated": [0.0, 0.0, 0.0, 1.0, 0.0],
    }
    self.assertEqual(set(got), set(expected))
    for name, column in expected.items():
      np.testing.assert_allclose(got[name], column, rtol=1e-12, err_msg=name)

  def test_penalty_saturates_later(self):
    # Fails if the penalty is not in `saturated`, counts gains too, or enters margin or accuracy: h
    # = 60, fallen by 2.
    columns = [jnp.asarray([value, value]) for value in (-12.0, -71.0, -10.0, -9.0)]
    columns[2] = jnp.asarray([-10.0, -12.0])

    def saturated(**how):
      return np.asarray(losses.preference_metrics(*columns, **how)["saturated"]).tolist()

    self.assertEqual(saturated(beta=0.1), [1.0, 1.0])
    self.assertEqual(saturated(beta=0.1, penalty=8.0), [0.0, 1.0])
    got = losses.preference_metrics(*columns, beta=0.1, penalty=100.0)
    np.testing.assert_array_equal(got["margin"], [60.0, 62.0])
    np.testing.assert_array_equal(got["accuracy"], 1.0)
    gains = [jnp.asarray([value]) for value in (-1.0, -71.0, -10.0, -30.0)]
    self.assertEqual(
      float(losses.preference_metrics(*gains, beta=0.1, penalty=8.0)["saturated"][0]), 1.0
    )

  def test_no_penalty_by_default(self):
    # Fails for another default than 0: h = 45 and 47, either side of the bound, fallen by 2.
    columns = [jnp.asarray([value, value]) for value in (-12.0, -71.0, -10.0, 0.0)]
    columns[3] = jnp.asarray([-24.0, -22.0])
    np.testing.assert_array_equal(
      losses.preference_metrics(*columns, beta=0.1)["margin"], [45.0, 47.0]
    )
    np.testing.assert_array_equal(
      losses.preference_metrics(*columns, beta=0.1)["saturated"], [0.0, 1.0]
    )


class EarlyEosTest(parameterized.TestCase):
  @parameterized.parameters(((1,),), ((0, 3),))
  def test_by_hand(self, eos_ids):
    # Fails if another id's probability is taken, if only one of several EOS counts, or for logits
    # in place of probabilities.
    rng = np.random.default_rng(0)
    logits = 2.0 * rng.normal(size=(2, 3, 5))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    got = jax.jit(functools.partial(losses.early_eos, eos_ids=eos_ids))(logits.astype(np.float32))
    np.testing.assert_allclose(got, probs[..., list(eos_ids)].sum(-1), rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
