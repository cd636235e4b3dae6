"""Masked sums with their counts, which compiled steps return so that averages are taken once."""

import jax.numpy as jnp


def total(values, count):
  """(Σ count · value, Σ count), a pair that adds up over devices and steps.

  Args:
    values: of any shape.
    count: int or bool that broadcasts to `values`; values with count 0 are ignored, even NaN.
  """
  count = jnp.broadcast_to(count, values.shape)
  return jnp.sum(count * jnp.where(count > 0, values, 0)), jnp.sum(count)


def histogram(values, count, edges):
  """The number of values in each bucket, which adds up over devices and steps.

  Args:
    values: of any shape.
    count: as in `total`.
    edges: E ascending floats.

  Returns:
    int32 [E + 1]: below edges[0], in [edges[i - 1], edges[i]) for i = 1 ... E - 1, and at or above
    edges[-1].
  """
  count_N1 = jnp.broadcast_to(count, values.shape).reshape(-1, 1)
  reached_E = jnp.sum(
    count_N1 * (values.reshape(-1, 1) >= jnp.asarray(edges, values.dtype)[None]), axis=0
  )
  reached = jnp.concatenate([jnp.sum(count_N1)[None], reached_E, jnp.zeros(1, reached_E.dtype)])
  return (reached[:-1] - reached[1:]).astype(jnp.int32)
