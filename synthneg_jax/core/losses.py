"""The losses of the paper and its baselines: one function per equation, one value per example.

Log-probabilities are in nats, summed over a branch's scored tokens, so the same function serves
whole responses and single steps. π is the policy, π_ref the reference; no gradient flows to
`ref_*`. docs/method.md lists the sources.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def token_logprobs(logits_NV: jax.Array, target_N: jax.Array) -> jax.Array:
  """log π(target) = logit_target - log Σ_v exp(logit_v), in float32 at least.

  Args:
    logits_NV: [..., V].
    target_N: int32 [...], target token ids.

  Returns:
    [...] nats.
  """
  logits_NV = logits_NV.astype(jnp.promote_types(logits_NV.dtype, jnp.float32))
  return _target_logprobs(logits_NV, target_N)


@jax.custom_vjp
def _target_logprobs(logits_NV, target_N):
  return _target_forward(logits_NV, target_N)[0]


def _target_forward(logits_NV, target_N):
  logit_N = jnp.take_along_axis(logits_NV, target_N[..., None], axis=-1)[..., 0]
  normaliser_N = jax.nn.logsumexp(logits_NV, axis=-1)
  return logit_N - normaliser_N, (logits_NV, normaliser_N, target_N)


def _target_backward(residuals, d_N):
  """∂/∂logit_v = 1[v = target] - π(v) in one pass; autodiff would add a scatter to a softmax."""
  logits_NV, normaliser_N, target_N = residuals
  prob_NV = jnp.exp(logits_NV - normaliser_N[..., None])
  token_NV = lax.broadcasted_iota(target_N.dtype, logits_NV.shape, logits_NV.ndim - 1)
  is_target_NV = token_NV == target_N[..., None]
  return d_N[..., None] * (is_target_NV - prob_NV), None


_target_logprobs.defvjp(_target_forward, _target_backward)


def branch_logprobs(logp_S: jax.Array, tokens_BS: jax.Array) -> jax.Array:
  """log π(branch) = Σ_t log π(y_t | y_<t) over the scored tokens of each branch of a row.

  A token shared by several branches counts once in each. Log-probs are summed, not averaged, as in
  DPO.

  Args:
    logp_S: [..., S] log-probs of a row's scored tokens, nats.
    tokens_BS: bool [..., B, S], True where a scored token belongs to a branch.

  Returns:
    [..., B] nats.
  """
  return jnp.sum(jnp.where(tokens_BS, logp_S[..., None, :], 0.0), axis=-1)


def sft_loss(logp_T: jax.Array, count_T: jax.Array) -> jax.Array:
  """Next-token loss: -Σ_t log π(y_t | x, y_<t) over the scored tokens of a row.

  SFT minimises it on D_syn, RFT on D⁺.

  Args:
    logp_T: [T] nats.
    count_T: int or bool [T], the number of sequences that score each token.

  Returns:
    Scalar, nats summed over tokens; divide by the number of scored tokens of the whole batch.
  """
  return -jnp.sum(count_T * jnp.where(count_T > 0, logp_T, 0.0))


def preference_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P) -> jax.Array:
  """h = [log π(y⁺) - log π_ref(y⁺)] - [log π(y⁻) - log π_ref(y⁻)], the preference margin.

  Args:
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P: [P] summed branch log-probs, nats.

  Returns:
    [P] nats. No gradient flows to the reference.
  """
  ref_P = lax.stop_gradient(ref_chosen_P - ref_rejected_P)
  return (chosen_P - rejected_P) - ref_P


def dpo_loss(
  chosen_P,
  rejected_P,
  ref_chosen_P,
  ref_rejected_P,
  *,
  beta: float,
  label_smoothing: float | jax.Array = 0.0,
) -> jax.Array:
  """Direct Preference Optimization: -(1-ε) log σ(βh) - ε log σ(-βh), h as in `preference_margin`.

  Whole responses give standard DPO; a step and its alternative give the paper's per-step DPO.
  ε > 0 is the "conservative" form in the repository of DPO's authors. See "Direct Preference
  Optimization" by Rafailov et al. (https://arxiv.org/abs/2305.18290).

  Args:
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P: [P] summed branch log-probs, nats.
    beta: β > 0, strength of the pull towards the reference, per nat.
    label_smoothing: ε in [0, 0.5), the probability that a label is flipped; a scalar, or [P] per
      pair.

  Returns:
    [P] loss per pair.
  """
  scaled_P = beta * preference_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
  return (1.0 - label_smoothing) * jax.nn.softplus(-scaled_P) + label_smoothing * jax.nn.softplus(
    scaled_P
  )


def nll_term(chosen_P: jax.Array, num_tokens_P: jax.Array) -> jax.Array:
  """-log π(y⁺) / |y⁺|, added to a preference loss so that the chosen branch stays likely.

  See "Iterative Reasoning Preference Optimization" by Pang et al.
  (https://arxiv.org/abs/2404.19733), eq. 1.

  Args:
    chosen_P: [P] summed log-probs, nats.
    num_tokens_P: [P] scored tokens of the chosen branches.

  Returns:
    [P] nats per token.
  """
  return -chosen_P / jnp.maximum(num_tokens_P, 1)


def ipo_loss(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, *, tau: float) -> jax.Array:
  """Identity Preference Optimization: (h - 1/(2τ))², h as in `preference_margin`.

  See "A General Theoretical Paradigm to Understand Learning from Human Preferences" by Azar et al.
  (https://arxiv.org/abs/2310.12036), eq. 17. Log-probs are summed, as in the code of DPO's authors.
  TRL averages them per token, which is a different loss with a different τ.

  Args:
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P: [P] summed branch log-probs, nats.
    tau: τ > 0, strength of the pull towards the reference, per nat; the target margin is 1/(2τ)
      nats.

  Returns:
    [P] loss per pair, nats².
  """
  h_P = preference_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
  return jnp.square(h_P - 1.0 / (2.0 * tau))


def dpop_loss(
  chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, *, beta: float, penalty: float
) -> jax.Array:
  """DPO-Positive: -log σ(β(h - λ max(0, log π_ref(y⁺) - log π(y⁺)))), h as in `preference_margin`.

  The penalty is inside the sigmoid and is multiplied by β; some ports place it outside, which is a
  different loss. At the kink π = π_ref, where training starts, its gradient is 0. See "Smaug" by
  Pal et al. (https://arxiv.org/abs/2402.13228), eq. 3.

  Args:
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P: [P] summed branch log-probs, nats.
    beta: β > 0, per nat.
    penalty: λ >= 0, dimensionless; 0 gives DPO.

  Returns:
    [P] loss per pair.
  """
  h_P = preference_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
  fallen_P = jax.nn.relu(lax.stop_gradient(ref_chosen_P) - chosen_P)
  return jax.nn.softplus(-beta * (h_P - penalty * fallen_P))


# Choices of dpo.loss: each loss with the names of its arguments in section `dpo`.
PREFERENCE_LOSSES = {
  "dpo": (dpo_loss, ("beta", "label_smoothing")),
  "ipo": (ipo_loss, ("tau",)),
  "dpop": (dpop_loss, ("beta", "penalty")),
}


def advantage_weighted_loss(
  logp_S: jax.Array, advantage_S: jax.Array, *, temperature: float, max_weight: float
) -> jax.Array:
  """Advantage-weighted regression: -Σ_i w_i log π(y_i | x, y_<i), w_i = min(exp(A_i/β), w_max).

  The standard form of eq. 4 of https://arxiv.org/abs/2406.14532. Without the cap w_max, the optimum
  is π ∝ π_sft exp(A/β). No gradient flows to the advantages.

  Args:
    logp_S: [S] summed log-probs of the steps, nats.
    advantage_S: [S]; -inf where unknown, which gives weight 0.
    temperature: β > 0, in units of the advantage (a probability).
    max_weight: w_max > 0.

  Returns:
    Scalar, nats summed over steps.
  """
  weight_S = lax.stop_gradient(jnp.minimum(jnp.exp(advantage_S / temperature), max_weight))
  return -jnp.sum(weight_S * logp_S)


def advantage_filtered_loss(logp_S: jax.Array, advantage_S: jax.Array) -> jax.Array:
  """The filtered form of `advantage_weighted_loss`: -Σ_i 1[A_i > 0] log π(y_i | x, y_<i).

  Clones only the steps that made progress, in right and wrong responses alike. The paper's figure
  11 instead drops whole responses, see `selection.advantage_filter`.

  Args:
    logp_S: [S] summed log-probs of the steps, nats.
    advantage_S: [S]; 0, -inf or NaN where unknown.

  Returns:
    Scalar, nats summed over the cloned steps.
  """
  return -jnp.sum(jnp.where(advantage_S > 0, logp_S, 0.0))


_SATURATED = 0.01  # a saturated pair's gradient, at most, as a share of DPO's largest


def preference_metrics(
  chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, *, beta: float, penalty: float = 0.0
) -> dict[str, jax.Array]:
  """Diagnostics of a preference loss.

  The chosen branch often becomes less likely while the loss improves (Pal et al.,
  https://arxiv.org/abs/2402.13228); only `chosen_shift` shows it.

  Args:
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P: [P] summed branch log-probs, nats.
    beta: β of the loss, per nat; only `saturated` uses it.
    penalty: λ of `dpop_loss`, 0 for the others; only `saturated` uses it.

  Returns:
    [P] float each, so that means over pairs are rates:
      margin          h of `preference_margin`, nats;
      accuracy        1 where h > 0; a tie counts as wrong;
      chosen_shift    log π(y⁺) - log π_ref(y⁺), nats; negative if the chosen became less likely;
      rejected_shift  log π(y⁻) - log π_ref(y⁻), nats;
      saturated       1 where σ(-z) < 0.01, z the argument of the loss's sigmoid, so the pair has
                      almost no gradient. IPO has no sigmoid; DPO's z is used.
  """
  h_P = preference_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
  argument_P = beta * (h_P - penalty * jax.nn.relu(ref_chosen_P - chosen_P))
  return {
    "margin": h_P,
    "accuracy": (h_P > 0).astype(h_P.dtype),
    "chosen_shift": chosen_P - ref_chosen_P,
    "rejected_shift": rejected_P - ref_rejected_P,
    "saturated": (jax.nn.sigmoid(-argument_P) < _SATURATED).astype(h_P.dtype),
  }


def early_eos(logits_NV: jax.Array, eos_ids: Sequence[int]) -> jax.Array:
  """π(EOS | unfinished branch): the probability of stopping where the response should continue.

  A per-step pair ends in mid-response, and its loss does not constrain what follows. A policy that
  learns to stop there loses answers, which no margin shows.

  Args:
    logits_NV: [..., V] at the last token of branches that do not end in EOS.
    eos_ids: the ids that end a response, at least one.

  Returns:
    [...] probabilities.
  """
  ends = [jnp.full(logits_NV.shape[:-1], eos, jnp.int32) for eos in eos_ids]
  return sum(jnp.exp(token_logprobs(logits_NV, end)) for end in ends)
