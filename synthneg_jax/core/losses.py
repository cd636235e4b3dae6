"""The losses of the paper and of the methods it is compared with. One function, one equation; results per example.

Log-probabilities are natural logarithms (nats), summed over a branch's scored tokens, so that the same function serves
whole responses and single steps. π is the policy, π_ref the reference; no gradient flows to `ref_*`.
"""

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
  chosen_N = jnp.take_along_axis(logits_NV, target_N[..., None], axis=-1)[..., 0]
  return chosen_N - jax.nn.logsumexp(logits_NV, axis=-1)


def sft_loss(logp_T: jax.Array, scored_T: jax.Array) -> jax.Array:
  """Next-token loss of one sequence: -Σ_t log π(y_t | x, y_<t) over its scored tokens.

  Args:
    logp_T: [T] nats.
    scored_T: bool [T].

  Returns:
    Scalar, nats summed (divide by the count of scored tokens of the whole batch).
  """
  return -jnp.sum(jnp.where(scored_T, logp_T, 0.0))


def preference_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P) -> jax.Array:
  """h = [log π(y⁺) - log π_ref(y⁺)] - [log π(y⁻) - log π_ref(y⁻)], in nats; [P]."""
  ref_P = lax.stop_gradient(ref_chosen_P - ref_rejected_P)
  return (chosen_P - rejected_P) - ref_P


def dpo_loss(
  chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, *, beta: float, label_smoothing: float = 0.0
) -> jax.Array:
  """Direct Preference Optimization: -(1-ε) log σ(βh) - ε log σ(-βh), h as in `preference_margin`.

  Whole responses give standard DPO, a step and its alternative give the paper's per-step DPO (section 3.5 of
  https://arxiv.org/abs/2406.14532 as far as public sources carry it; summing, not averaging, log-probs is inferred from
  DPO). ε > 0 is the "conservative" form of the authors' repository.
  See "Direct Preference Optimization" by Rafailov et al. (https://arxiv.org/abs/2305.18290).

  Args:
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P: [P] summed branch log-probs, nats.
    beta: β > 0, strength of the pull to the reference, per nat.
    label_smoothing: ε in [0, 0.5), the probability that a pair's label is flipped.

  Returns:
    [P] loss per pair.
  """
  scaled_P = beta * preference_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
  kept_P = (1.0 - label_smoothing) * jax.nn.softplus(-scaled_P)
  return kept_P + label_smoothing * jax.nn.softplus(scaled_P) if label_smoothing else kept_P


def nll_term(chosen_P: jax.Array, num_tokens_P: jax.Array) -> jax.Array:
  """-log π(y⁺) / |y⁺|: the chosen branch's next-token loss per token, added to a preference loss so that it stays likely.

  Ours to add; see "Iterative Reasoning Preference Optimization" by Pang et al. (https://arxiv.org/abs/2404.19733), eq. 1.

  Args:
    chosen_P: [P] summed log-probs, nats.
    num_tokens_P: [P] scored tokens of the chosen branches.

  Returns:
    [P] nats per token.
  """
  return -chosen_P / jnp.maximum(num_tokens_P, 1)
