"""From parameters and a batch to a loss: the forward pass over trees, and the two objectives of this project.

An objective is `fn(params, batch) -> (loss, metrics)`: the loss is a part of a global mean (its denominators are counts
over the whole batch, so parts add up over rows, devices and accumulation steps), and each metric is a pair
(sum, count).
"""

import jax
import jax.numpy as jnp

from synthneg_jax.core import losses, masked
from synthneg_jax.core import tree as tree_lib
from synthneg_jax.models.decoder import Model
from synthneg_jax.training.batch import Batch


def scored_logprobs(model: Model, params, batch: Batch):
  """Log-probs of the scored tokens; logits exist at their predictors only.

  Returns:
    (logp_RS nats, zero where there is no token; bool [R, S] which are there).
  """
  h_RTD, _ = model.hidden(params, batch.trees)
  there_RS = batch.scored_at >= 0
  at_RS = jnp.maximum(batch.scored_at, 0)
  target_RS = jnp.take_along_axis(batch.trees.token, at_RS, axis=1)
  parent_RS = jnp.maximum(jnp.take_along_axis(batch.trees.parent, at_RS, axis=1), 0)
  h_RSD = jnp.take_along_axis(h_RTD, parent_RS[..., None], axis=1)
  logp_RS = losses.token_logprobs(model.logits(params, h_RSD), target_RS)
  return jnp.where(there_RS, logp_RS, 0.0), there_RS


def branch_logprobs(batch: Batch, logp_RS, there_RS, num_branches: int):
  """Sums over branches: (logp_RB nats, scored tokens_RB), B = num_branches + 1, entry 0 a row's trunks."""
  branch_RS = jnp.take_along_axis(batch.trees.branch, jnp.maximum(batch.scored_at, 0), axis=1)
  sums = jax.vmap(lambda values_S, branch_S: tree_lib.branch_sums(values_S, branch_S, num_branches))
  return sums(logp_RS, branch_RS), sums(there_RS.astype(logp_RS.dtype), branch_RS)


def make_sft(model: Model):
  """The next-token objective, for SFT, RFT and pretraining: mean nats per scored token."""

  def objective(params, batch: Batch):
    logp_RS, there_RS = scored_logprobs(model, params, batch)
    loss = jnp.sum(jax.vmap(losses.sft_loss)(logp_RS, there_RS)) / batch.num_scored
    return loss, {"loss/per_token": masked.total(-logp_RS, there_RS)}

  return objective


def make_dpo(model: Model, num_branches: int, *, beta: float, nll_weight: float, label_smoothing: float = 0.0):
  """The preference objective over pairs of branches: mean per pair of DPO + nll_weight · nll_term.

  Args:
    model: the policy's architecture.
    num_branches: the most branches that a row holds.
    beta, label_smoothing: as `core.losses.dpo_loss` takes them.
    nll_weight: weight of the chosen branch's next-token loss per token.
  """

  def objective(params, batch: Batch):
    logp_RB, count_RB = branch_logprobs(batch, *scored_logprobs(model, params, batch), num_branches)
    of = lambda values, index: jnp.take_along_axis(values, index, axis=1)
    chosen_RP, rejected_RP = of(logp_RB, batch.chosen), of(logp_RB, batch.rejected)
    pair_RP = batch.chosen > 0
    args = (chosen_RP, rejected_RP, batch.ref_chosen, batch.ref_rejected)
    dpo_RP = losses.dpo_loss(*args, beta=beta, label_smoothing=label_smoothing)
    nll_RP = losses.nll_term(chosen_RP, of(count_RB, batch.chosen))
    margin_RP = beta * losses.preference_margin(*args)
    loss = jnp.sum(jnp.where(pair_RP, dpo_RP + nll_weight * nll_RP, 0.0)) / batch.num_pairs
    metrics = {
      "loss/per_pair": masked.total(dpo_RP, pair_RP),
      "nll_chosen/per_token": (
        -jnp.sum(jnp.where(pair_RP, chosen_RP, 0.0)),
        jnp.sum(jnp.where(pair_RP, of(count_RB, batch.chosen), 0.0)),
      ),
      "margin/per_pair": masked.total(margin_RP, pair_RP),
      "accuracy/per_pair": masked.total((margin_RP > 0).astype(margin_RP.dtype), pair_RP),
      "chosen_shift/per_pair": masked.total(chosen_RP - batch.ref_chosen, pair_RP),
      "rejected_shift/per_pair": masked.total(rejected_RP - batch.ref_rejected, pair_RP),
      "saturated/per_pair": masked.total((margin_RP > 5.0).astype(margin_RP.dtype), pair_RP),
    }
    return loss, metrics

  return objective
