"""Objectives: the forward pass over trees and the losses of SFT, advantage-weighted RL and DPO.

An objective is `fn(params, batch) -> (loss, metrics)`. The loss is divided by counts over the whole
batch, so losses of rows, devices and accumulation steps add up to the global mean. Each metric is a
pair (sum, count), or (counts [E + 1], count) for a histogram, whose name begins with `HISTOGRAM`
and whose edges are in `EDGES`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from synthneg_jax.core import losses, masked_stats
from synthneg_jax.core.tree import sees
from synthneg_jax.models.decoder import Model
from synthneg_jax.training.batch import Batch

HISTOGRAM = "histogram/"
_MAGNITUDES = tuple(10.0 ** (i / 4) for i in range(-8, 9))  # 0.01 to 100, four per decade
EDGES = {  # nats
  f"{HISTOGRAM}nll/per_token": (0.0, *_MAGNITUDES),
  f"{HISTOGRAM}margin/per_pair": (*(-x for x in reversed(_MAGNITUDES)), 0.0, *_MAGNITUDES),
}


def _histogram(name: str, values, count):
  """A histogram metric by its name."""
  name = f"{HISTOGRAM}{name}"
  return {name: (masked_stats.histogram(values, count, EDGES[name]), jnp.sum(count))}


def scored_logprobs(model: Model, params, batch: Batch, *, chunk: int = 0):
  """Log-probs of the scored tokens; logits are computed only at their parents.

  Args:
    model, params: the policy.
    batch: the batch.
    chunk: number of scored tokens of a row whose logits are computed at once, and recomputed in the
      backward pass, so [S, V] is never stored; 0 for all at once. Saves memory if [S, V] is the
      largest array.

  Returns:
    (logp_RS nats, 0 for padding; bool [R, S], False for padding).
  """
  h_RTD, _ = model.hidden(params, batch.trees)
  return _scored(model, params, batch, h_RTD=h_RTD, chunk=chunk)


def _scored(model: Model, params, batch: Batch, *, h_RTD, chunk: int):
  """`scored_logprobs` from hidden states."""
  valid_RS = batch.scored_at >= 0
  at_RS = jnp.maximum(batch.scored_at, 0)
  target_RS = jnp.take_along_axis(batch.trees.token, at_RS, axis=1)
  parent_RS = jnp.maximum(jnp.take_along_axis(batch.trees.parent, at_RS, axis=1), 0)
  h_RSD = jnp.take_along_axis(h_RTD, parent_RS[..., None], axis=1)

  def logp(h, target):
    return losses.token_logprobs(model.logits(params, h), target)

  if 0 < chunk < target_RS.shape[1]:
    R, S = target_RS.shape
    parts = -(-S // chunk)

    def split(x):
      """Pads [R, S, ...] and reshapes it to [parts, R, chunk, ...]."""
      x = jnp.pad(x, ((0, 0), (0, parts * chunk - S), *((0, 0),) * (x.ndim - 2)))
      return x.reshape(R, parts, chunk, *x.shape[2:]).swapaxes(0, 1)

    def score_part(_, xs):
      return None, jax.checkpoint(logp)(*xs)

    _, logp_PRC = lax.scan(score_part, None, (split(h_RSD), split(target_RS)))
    logp_RS = logp_PRC.swapaxes(0, 1).reshape(R, parts * chunk)[:, :S]
  else:
    logp_RS = logp(h_RSD, target_RS)
  return jnp.where(valid_RS, logp_RS, 0.0), valid_RS


def branch_tokens(batch: Batch) -> jax.Array:
  """bool [R, B, S], True where a scored token belongs to a branch: its last token sees it."""
  at_RS = jnp.maximum(batch.scored_at, 0)
  leave_RS = jnp.where(
    batch.scored_at < 0, 0, jnp.take_along_axis(batch.trees.leave, at_RS, axis=1)
  )
  return sees(batch.branch_end, at_RS, leave_RS)


def _early_eos(model: Model, params, batch: Batch, *, h_RTD, eos_ids: Sequence[int]):
  """(Σ P(EOS) at the ends of branches without EOS, the number of these branches)."""
  last_RB = jnp.maximum(batch.branch_end, 0)
  token_RB = jnp.take_along_axis(batch.trees.token, last_RB, axis=1)
  unfinished_RB = (batch.branch_end >= 0) & ~jnp.isin(token_RB, jnp.asarray(eos_ids))
  h_RBD = jnp.take_along_axis(lax.stop_gradient(h_RTD), last_RB[..., None], axis=1)
  logits_RBV = model.logits(lax.stop_gradient(params), h_RBD)
  return masked_stats.total(losses.early_eos(logits_RBV, eos_ids), unfinished_RB)


def make_sft(model: Model, chunk: int = 0):
  """The next-token objective of SFT, RFT and pretraining: mean nats per scored token.

  `chunk` as in `scored_logprobs`.
  """

  def objective(params, batch: Batch):
    logp_RS, _ = scored_logprobs(model, params, batch, chunk=chunk)
    count_RS = jnp.sum(branch_tokens(batch), axis=1)
    with jax.named_scope("loss"):
      loss = jnp.sum(jax.vmap(losses.sft_loss)(logp_RS, count_RS)) / batch.num_scored
    metrics = {"loss/per_token": masked_stats.total(-logp_RS, count_RS)}
    return loss, metrics | _histogram("nll/per_token", -logp_RS, count_RS)

  return objective


def make_advantage_weighted(model: Model, *, beta: float, max_weight: float, chunk: int = 0):
  """Equation 4, `losses.advantage_weighted_loss`: the mean of -min(exp(A/β), w_max) log π.

  Each scored token has the advantage of its step, so the sum over tokens equals the sum over steps.
  The mean divides by the number of tokens, not by the sum of weights: if all advantages are 0, this
  is `make_sft`.

  Args:
    model: the policy's architecture.
    beta: β > 0, in units of the advantage (a probability).
    max_weight: w_max > 0.
    chunk: as in `scored_logprobs`.
  """
  weighted = functools.partial(
    losses.advantage_weighted_loss, temperature=beta, max_weight=max_weight
  )

  def objective(params, batch: Batch):
    logp_RS, _ = scored_logprobs(model, params, batch, chunk=chunk)
    count_RS = jnp.sum(branch_tokens(batch), axis=1)
    with jax.named_scope("loss"):
      loss = jnp.sum(jax.vmap(weighted)(count_RS * logp_RS, batch.advantage)) / batch.num_scored
    metrics = {
      "loss/per_token": masked_stats.total(-logp_RS, count_RS),
      "weight/per_token": masked_stats.total(
        jnp.minimum(jnp.exp(batch.advantage / beta), max_weight), count_RS
      ),
    }
    return loss, metrics | _histogram("nll/per_token", -logp_RS, count_RS)

  return objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
  """A preference loss and its weights.

  Attributes:
    loss: `dpo_loss`, `ipo_loss` or `dpop_loss` with its settings bound: a function of (chosen,
      rejected, ref_chosen, ref_rejected), [R, P] each, nats.
    beta, penalty: as in `core.losses.preference_metrics`.
    nll_weight: weight of `nll_term`.
  """

  loss: Callable[..., jax.Array]
  beta: float
  penalty: float = 0.0
  nll_weight: float = 0.0


def make_preference(
  model: Model, preference: Preference, *, eos_ids: Sequence[int], chunk: int = 0
):
  """The preference objective: the mean over pairs of loss + nll_weight · nll_term.

  Args:
    model: the policy's architecture.
    preference: the loss and its weights.
    eos_ids: the ids that end a response.
    chunk: as in `scored_logprobs`.
  """

  def at_pairs(values_RB, branch_RP):
    return jnp.take_along_axis(values_RB, jnp.maximum(branch_RP, 0), axis=1)

  def objective(params, batch: Batch):
    h_RTD, _ = model.hidden(params, batch.trees)
    logp_RS, _ = _scored(model, params, batch, h_RTD=h_RTD, chunk=chunk)
    tokens_RBS = branch_tokens(batch)
    logp_RB = losses.branch_logprobs(logp_RS, tokens_RBS)
    count_RB = jnp.sum(tokens_RBS, axis=-1).astype(logp_RS.dtype)
    chosen_RP, tokens_RP = at_pairs(logp_RB, batch.chosen), at_pairs(count_RB, batch.chosen)
    is_pair_RP = batch.chosen >= 0
    args = (chosen_RP, at_pairs(logp_RB, batch.rejected), batch.ref_chosen, batch.ref_rejected)
    with jax.named_scope("loss"):
      loss_RP = preference.loss(*args)
      total_RP = loss_RP + preference.nll_weight * losses.nll_term(chosen_RP, tokens_RP)
      loss = jnp.sum(jnp.where(is_pair_RP, total_RP, 0.0)) / batch.num_pairs
    per_pair = losses.preference_metrics(*args, beta=preference.beta, penalty=preference.penalty)
    metrics = {"loss/per_pair": masked_stats.total(loss_RP, is_pair_RP)}
    for name, values_RP in per_pair.items():
      metrics[f"{name}/per_pair"] = masked_stats.total(values_RP, is_pair_RP)
    metrics["nll_chosen/per_token"] = (
      masked_stats.total(-chosen_RP, is_pair_RP)[0],
      masked_stats.total(tokens_RP, is_pair_RP)[0],
    )
    metrics["early_eos/per_unfinished_branch"] = _early_eos(
      model, params, batch, h_RTD=h_RTD, eos_ids=eos_ids
    )
    return loss, metrics | _histogram("margin/per_pair", per_pair["margin"], is_pair_RP)

  return objective
