"""Draws tokens from logits: temperature, top-k, top-p, and an inverse CDF without sorting."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Attributes:
    temperature: divides the logits; 0 for greedy decoding.
    top_k: keeps the k most likely tokens; 0 for all.
    top_p: keeps the smallest set of most likely tokens with this total probability (after
      temperature); 1 for all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


def inverse_cdf(prob_V: jax.Array, uniform: jax.Array) -> jax.Array:
  """The first index whose cumulative probability exceeds uniform · Σ prob.

  It searches blocks of about √V, then within one block. It never returns an index of probability 0.

  Args:
    prob_V: [V], not necessarily normalised.
    uniform: scalar in [0, 1).

  Returns:
    int32 scalar.
  """

  def search(weight_N, target):
    cumulative_N = jnp.cumsum(weight_N)
    index = jnp.sum(cumulative_N <= target).astype(jnp.int32)
    last = jnp.int32(weight_N.size - 1) - jnp.argmax(weight_N[::-1] > 0).astype(jnp.int32)
    index = jnp.minimum(index, last)  # rounding may put the target above the total
    return index, target - (cumulative_N[index] - weight_N[index])

  size = 1 << (prob_V.size.bit_length() // 2)
  blocks = jnp.pad(prob_V, (0, -prob_V.size % size)).reshape(-1, size)
  weight_N = jnp.sum(blocks, axis=1)
  block, rest = search(weight_N, uniform * jnp.sum(weight_N))
  # A block's sum and its cumulative sum may differ in the last bit; a negative target would select
  # an index of probability 0.
  return block * size + search(blocks[block], jnp.maximum(rest, 0.0))[0]


def uniforms(key_data: jax.Array, count: int) -> jax.Array:
  """Uniform numbers in [0, 1) for an item's first `count` tokens: token t folds t into the key."""

  def uniform(t):
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_data), t))

  return jax.vmap(uniform)(jnp.arange(count))


def draw(logits_V: jax.Array, key: jax.Array, sampling: Sampling):
  """Draws one token with a key: `pick` with the key's uniform number."""
  return pick(logits_V, jax.random.uniform(key), sampling)


def pick(logits_V: jax.Array, uniform: jax.Array, sampling: Sampling):
  """The token that a uniform number picks.

  Args:
    logits_V: [V] float.
    uniform: scalar in [0, 1).
    sampling: fixed at compile time.

  Returns:
    (token int32, its log-prob under softmax(logits), its log-prob under the distribution it was
    drawn from), nats.
  """
  logp_V = jax.nn.log_softmax(logits_V)
  if sampling.temperature == 0:
    token = jnp.argmax(logits_V).astype(jnp.int32)
    return token, logp_V[token], jnp.zeros((), logp_V.dtype)
  scaled_V = logits_V / sampling.temperature
  if sampling.top_k:
    floor = jax.lax.top_k(scaled_V, min(sampling.top_k, scaled_V.size))[0][-1]
    scaled_V = jnp.where(scaled_V >= floor, scaled_V, -jnp.inf)
  if sampling.top_p < 1:
    prob_V = jax.nn.softmax(scaled_V)
    sorted_V = jnp.sort(prob_V)[::-1]
    # Keep a token if the more likely ones have less than top_p together.
    inside = jnp.cumsum(sorted_V) - sorted_V < sampling.top_p
    floor = jnp.min(jnp.where(inside, sorted_V, jnp.inf))
    scaled_V = jnp.where(prob_V >= floor, scaled_V, -jnp.inf)
  drawn_V = jax.nn.log_softmax(scaled_V)
  token = inverse_cdf(jnp.exp(drawn_V), uniform)
  return token, logp_V[token], drawn_V[token]
