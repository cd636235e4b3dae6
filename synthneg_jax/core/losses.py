"""The losses of the paper and of the methods it is compared with. One function, one equation;
results per example.

Log-probabilities are natural logarithms (nats), summed over a branch's scored tokens, so that the
same function serves whole responses and single steps. π is the policy, π_ref the reference; no
gradient flows to `ref_*`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def token_logprobs(logits_NV: jax.Array, target_N: jax.Array) -> jax.Array:
  """log π(target) = logit_target - log Σ_v exp(logit_v), in float32 at least.

  Args:
    logits_NV: [..., V].
    target_N: int32 [...], the tokens that came.

  Returns:
    [...] nats.
  """
  logits_NV = logits_NV.astype(jnp.promote_types(logits_NV.dtype, jnp.float32))
  return _picked_logprobs(logits_NV, target_N)


@jax.custom_vjp
def _picked_logprobs(logits_NV, target_N):
  return _picked_forward(logits_NV, target_N)[0]


def _picked_forward(logits_NV, target_N):
  chosen_N = jnp.take_along_axis(logits_NV, target_N[..., None], axis=-1)[..., 0]
  normaliser_N = jax.nn.logsumexp(logits_NV, axis=-1)
  return chosen_N - normaliser_N, (logits_NV, normaliser_N, target_N)


def _picked_backward(kept, d_N):
  """∂/∂logit_v = 1[v = target] - π(v), in one pass over the logits; derived, it would be a scatter
  and a sum of two.
  """
  logits_NV, normaliser_N, target_N = kept
  prob_NV = jnp.exp(logits_NV - normaliser_N[..., None])
  place_NV = lax.broadcasted_iota(target_N.dtype, logits_NV.shape, logits_NV.ndim - 1)
  is_target_NV = place_NV == target_N[..., None]
  return d_N[..., None] * (is_target_NV - prob_NV), None


_picked_logprobs.defvjp(_picked_forward, _picked_backward)


def branch_logprobs(logp_S: jax.Array, tokens_BS: jax.Array) -> jax.Array:
  """log π(branch) = Σ_t log π(y_t | what y_t sees) over the branch's scored tokens, for all
  branches of a row at once.

  A token that several branches share counts once in each of them.

  Summed, not averaged: the losses below compare sums (as DPO's authors do; that the paper does too
  is INFERRED).

  Args:
    logp_S: [..., S] of a row's scored tokens, nats.
    tokens_BS: bool [..., B, S], which of them each branch has.

  Returns:
    [..., B] nats.
  """
  return jnp.sum(jnp.where(tokens_BS, logp_S[..., None, :], 0.0), axis=-1)


def sft_loss(logp_T: jax.Array, count_T: jax.Array) -> jax.Array:
  """Next-token loss: -Σ_t log π(y_t | x, y_<t) over the scored tokens of a sequence, or of several
  that share tokens.

  The paper finetunes the base model so on D_syn (VERIFIED, its captions 1 and 2), and RFT on D⁺.

  Args:
    logp_T: [T] nats.
    count_T: int or bool [T], how many sequences score each token.

  Returns:
    Scalar, nats summed (divide by the count of scored tokens of the whole batch).
  """
  return -jnp.sum(count_T * jnp.where(count_T > 0, logp_T, 0.0))


def preference_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P) -> jax.Array:
  """h = [log π(y⁺) - log π_ref(y⁺)] - [log π(y⁻) - log π_ref(y⁻)]: what all preference losses here
  are functions of.

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

  Whole responses give standard DPO, a step and its alternative give the paper's per-step DPO
  (section 3.5 of https://arxiv.org/abs/2406.14532 as far as public sources carry it; summing, not
  averaging, log-probs is inferred from DPO). ε > 0 is the "conservative" form of the authors'
  repository. See "Direct Preference Optimization" by Rafailov et al.
  (https://arxiv.org/abs/2305.18290).

  Args:
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P: [P] summed branch log-probs, nats.
    beta: β > 0, strength of the pull to the reference, per nat.
    label_smoothing: ε in [0, 0.5), the probability that a pair's label is flipped; of all pairs, or
      [P] of each.

  Returns:
    [P] loss per pair.
  """
  scaled_P = beta * preference_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
  return (1.0 - label_smoothing) * jax.nn.softplus(-scaled_P) + label_smoothing * jax.nn.softplus(
    scaled_P
  )


def nll_term(chosen_P: jax.Array, num_tokens_P: jax.Array) -> jax.Array:
  """-log π(y⁺) / |y⁺|: the chosen branch's next-token loss per token, added to a preference loss so
  that it stays likely.

  Ours to add; see "Iterative Reasoning Preference Optimization" by Pang et al.
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
  (https://arxiv.org/abs/2310.12036), eq. 17. Log-probs are summed here, as in the code of DPO's
  authors (VERIFIED); TRL puts in means per token, which is another loss: its τ is not this one's.

  Args:
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P: [P] summed branch log-probs, nats.
    tau: τ > 0, strength of the pull to the reference, per nat; the margin is drawn to 1/(2τ) nats.

  Returns:
    [P] loss per pair, nats².
  """
  h_P = preference_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
  return jnp.square(h_P - 1.0 / (2.0 * tau))


def dpop_loss(
  chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, *, beta: float, penalty: float
) -> jax.Array:
  """DPO-Positive: -log σ(β(h - λ max(0, log π_ref(y⁺) - log π(y⁺)))), h as in `preference_margin`.

  The penalty stands inside the sigmoid and is multiplied by β; outside of it, as some ports have
  it, is another loss. See "Smaug" by Pal et al. (https://arxiv.org/abs/2402.13228), eq. 3
  (VERIFIED; β = 0.3, λ = 50 there, second-hand). That the kink at π = π_ref, where training starts,
  has no gradient of the penalty is our choice.

  Args:
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P: [P] summed branch log-probs, nats.
    beta: β > 0, per nat.
    penalty: λ >= 0, no unit; 0 gives DPO.

  Returns:
    [P] loss per pair.
  """
  h_P = preference_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
  fallen_P = jax.nn.relu(lax.stop_gradient(ref_chosen_P) - chosen_P)
  return jax.nn.softplus(-beta * (h_P - penalty * fallen_P))


# The choices of dpo.loss: each loss with the leaves of section `dpo` that it takes as arguments.
PREFERENCE_LOSSES = {
  "dpo": (dpo_loss, ("beta", "label_smoothing")),
  "ipo": (ipo_loss, ("tau",)),
  "dpop": (dpop_loss, ("beta", "penalty")),
}


def advantage_weighted_loss(
  logp_S: jax.Array, advantage_S: jax.Array, *, temperature: float, max_weight: float
) -> jax.Array:
  """Advantage-weighted regression on one response: -Σ_i w_i log π(y_i | x, y_<i), w_i =
  min(exp(A_i/β), w_max).

  Eq. 4 of https://arxiv.org/abs/2406.14532 in its standard form (INFERRED: the equation itself was
  not to be had). The cut at w_max is ours, as is usual for this loss; without it the optimum is π ∝
  π_sft exp(A/β). Weights are constants: no gradient flows to the advantages.

  Args:
    logp_S: [S] summed log-probs of the steps, nats.
    advantage_S: [S]; -inf where it is unknown, which gives weight 0.
    temperature: β > 0, in units of the advantage (a probability).
    max_weight: w_max > 0.

  Returns:
    Scalar, nats summed over steps.
  """
  weight_S = lax.stop_gradient(jnp.minimum(jnp.exp(advantage_S / temperature), max_weight))
  return -jnp.sum(weight_S * logp_S)


def advantage_filtered_loss(logp_S: jax.Array, advantage_S: jax.Array) -> jax.Array:
  """The filtered form of `advantage_weighted_loss`: -Σ_i 1[A_i > 0] log π(y_i | x, y_<i).

  Clones the steps that made progress, of right and wrong responses alike, and no others (VERIFIED
  as a co-author's lecture has it; the paper's figure 11 instead drops whole responses, see
  `selection.advantage_filter`).

  Args:
    logp_S: [S] summed log-probs of the steps, nats.
    advantage_S: [S]; 0, -inf or NaN where it is unknown.

  Returns:
    Scalar, nats summed over the steps kept.
  """
  return -jnp.sum(jnp.where(advantage_S > 0, logp_S, 0.0))


_SATURATED = 0.01  # share of DPO's largest gradient that a saturated pair has left, at most


def preference_metrics(
  chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, *, beta: float, penalty: float = 0.0
) -> dict[str, jax.Array]:
  """What to watch while a preference loss falls. The names and the threshold of `saturated` are
  ours.

  That the chosen branch falls too is common (Pal et al., https://arxiv.org/abs/2402.13228) and
  shows in no loss.

  Args:
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P: [P] summed branch log-probs, nats.
    beta: β of the loss, per nat; only `saturated` uses it.
    penalty: λ of `dpop_loss`, 0 for the others; only `saturated` uses it.

  Returns:
    [P] float each, so that means over pairs are rates:
      margin          h of `preference_margin`, nats;
      accuracy        1 where h > 0, a tie counts as wrong;
      chosen_shift    log π(y⁺) - log π_ref(y⁺), nats; negative if the chosen became less likely;
      rejected_shift  log π(y⁻) - log π_ref(y⁻), nats;
      saturated       1 where σ(-z) < 0.01, z the argument of the loss's sigmoid: the pair
                      has almost no gradient. (IPO has no sigmoid; the value is that of DPO.)
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
  """π(EOS | an unfinished branch): the share of samples that would stop where the text was meant to
  go on.

  A per-step pair ends in mid-response, and nothing in its loss says what comes next; a policy that
  learns to stop there loses answers, not margins. Ours.

  Args:
    logits_NV: [..., V] at the last token of branches that do not end in EOS.
    eos_ids: the ids that end a response, at least one.

  Returns:
    [...] probabilities.
  """
  ends = [jnp.full(logits_NV.shape[:-1], eos, jnp.int32) for eos in eos_ids]
  return sum(jnp.exp(token_logprobs(logits_NV, end)) for end in ends)
