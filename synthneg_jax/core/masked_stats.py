"""Sums with their counts: what leaves a compiled step, so that averages are taken once and over
everything.
"""

import jax.numpy as jnp


def total(values, count):
  """(Σ of the values, each as often as it counts, Σ of the counts): a pair that can be added over
  devices and steps.

  Args:
    values: of any shape.
    count: int or bool that broadcasts to it, how often each value counts.
  """
  count = jnp.broadcast_to(count, values.shape)
  return jnp.sum(count * jnp.where(count > 0, values, 0)), jnp.sum(count)


def histogram(values, count, edges):
  """How many of the values lie in each bucket; can be added over devices and steps, as `total`.

  Args:
    values: of any shape.
    count: as in `total`.
    edges: E floats, ascending.

  Returns:
    int32 [E + 1]: below edges[0], in [edges[i - 1], edges[i]) for i = 1 ... E - 1, and from
    edges[-1] on.
  """
  count_N1 = jnp.broadcast_to(count, values.shape).reshape(-1, 1)
  reached_E = jnp.sum(
    count_N1 * (values.reshape(-1, 1) >= jnp.asarray(edges, values.dtype)[None]), axis=0
  )
  reached = jnp.concatenate([jnp.sum(count_N1)[None], reached_E, jnp.zeros(1, reached_E.dtype)])
  return (reached[:-1] - reached[1:]).astype(jnp.int32)
