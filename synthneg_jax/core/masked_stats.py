"""Sums with their counts: what leaves a compiled step, so that averages are taken once and over everything."""

import jax.numpy as jnp


def total(values, mask):
  """(Σ of the values where the mask is True, how many those are): a pair that can be added over devices and steps."""
  mask = jnp.broadcast_to(mask, values.shape)
  return jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask)


def histogram(values, mask, edges):
  """How many of the values where the mask is True lie in each bucket; can be added over devices and steps, as `total`.

  Args:
    values: of any shape.
    mask: bool, as the values.
    edges: E floats, ascending.

  Returns:
    int32 [E + 1]: below edges[0], in [edges[i - 1], edges[i]) for i = 1 ... E - 1, and from edges[-1] on.
  """
  mask_N1 = jnp.broadcast_to(mask, values.shape).reshape(-1, 1)
  reached_E = jnp.sum(mask_N1 & (values.reshape(-1, 1) >= jnp.asarray(edges, values.dtype)[None]), axis=0)
  reached = jnp.concatenate([jnp.sum(mask_N1)[None], reached_E, jnp.zeros(1, reached_E.dtype)])
  return (reached[:-1] - reached[1:]).astype(jnp.int32)
