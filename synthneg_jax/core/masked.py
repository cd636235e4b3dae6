"""Sums with their counts: what leaves a compiled step, so that averages are taken once and over everything."""

import jax.numpy as jnp


def total(values, mask):
  """(Σ of the values where the mask is True, how many those are): a pair that can be added over devices and steps."""
  mask = jnp.broadcast_to(mask, values.shape)
  return jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask)
