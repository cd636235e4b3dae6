"""Drawing a token from logits: temperature, top-k, top-p, inverse CDF without sorting the
vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_k: only the k most likely tokens; 0 for all.
    top_p: only the smallest set of most likely tokens with this much probability (after
      temperature); 1 for all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


def inverse_cdf(prob_V: jax.Array, uniform: jax.Array) -> jax.Array:
  """The first index whose cumulative probability exceeds uniform · Σ prob.

  Searched in two levels, a block of about √V, then within it. Never returns an index of probability
  0.

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
    index = jnp.minimum(index, last)  # rounding may put the target beyond the last sum
    return index, target - (cumulative_N[index] - weight_N[index])

  size = 1 << (prob_V.size.bit_length() // 2)
  blocks = jnp.pad(prob_V, (0, -prob_V.size % size)).reshape(-1, size)
  weight_N = jnp.sum(blocks, axis=1)
  block, rest = search(weight_N, uniform * jnp.sum(weight_N))
  # A block's sum and its own cumulative sum may differ in the last bit: below 0 would be an index
  # of probability 0.
  return block * size + search(blocks[block], jnp.maximum(rest, 0.0))[0]


def uniforms(key_data: jax.Array, count: int) -> jax.Array:
  """The uniform numbers in [0, 1) of an item's first `count` tokens: place t takes its key folded
  with t.
  """

  def uniform(place):
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_data), place))

  return jax.vmap(uniform)(jnp.arange(count))


def draw(logits_V: jax.Array, key: jax.Array, sampling: Sampling):
  """Draws one token with a key of its own: `pick` with the key's uniform number."""
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
    floor = jax.lax.top_k(scaled_V, sampling.top_k)[0][-1]
    scaled_V = jnp.where(scaled_V >= floor, scaled_V, -jnp.inf)
  if sampling.top_p < 1:
    prob_V = jax.nn.softmax(scaled_V)
    sorted_V = jnp.sort(prob_V)[::-1]
    # A token stays if what is more likely than it has less than top_p.
    inside = jnp.cumsum(sorted_V) - sorted_V < sampling.top_p
    floor = jnp.min(jnp.where(inside, sorted_V, jnp.inf))
    scaled_V = jnp.where(prob_V >= floor, scaled_V, -jnp.inf)
  drawn_V = jax.nn.log_softmax(scaled_V)
  token = inverse_cdf(jnp.exp(drawn_V), uniform)
  return token, logp_V[token], drawn_V[token]
