"""Rotary frequencies, plain and scaled for long texts, as numpy constants.

The angle of pair i at position p is p · f_i with f_i = θ^(-2i/H) (Su et al.,
https://arxiv.org/abs/2104.09864). Scaling with s = factor, P = original_positions, and n_i =
P·f_i / 2π, the turns of pair i over P positions, replaces f by

  linear    f / s (Chen et al., https://arxiv.org/abs/2306.15595)
  llama3    f / s if n < low, f if n > high, and in between their mean weighted by
            (n - low) / (high - low) (Llama 3.1's published config)
  yarn      as llama3, with a ramp linear in i from the pair with `high` turns to the pair with
            `low` turns; attention_factor multiplies cosines and sines (Peng et al.,
            https://arxiv.org/abs/2309.00071)
  longrope  f / s_i with a factor for each pair; attention_factor multiplies cosines and sines
            (Ding et al., https://arxiv.org/abs/2402.13753). There are two sets of s_i, for texts of
            up to P positions and for longer texts; a run uses one set throughout, because
            otherwise a token's key would depend on later tokens
  dynamic   f up to P positions. Beyond P, the frequencies depend on the length of the whole text,
            so that prefill and decoding would disagree; longer texts are refused
"""

import math

import numpy as np

from synthneg_jax.models.config import RopeScaling
from synthneg_jax.runtime.errors import UserError


def frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, float]:
  """Rotary frequencies of the pairs of a head.

  Returns:
    (f, float64 [H/2] radians per position; the factor of cosines and sines).

  Raises:
    UserError: the kind of scaling is unknown.
  """
  pairs = np.arange(0, head_dim, 2) / head_dim
  plain = theta**-pairs
  if scaling is None or scaling.kind == "dynamic":
    return plain, 1.0
  if scaling.kind == "longrope":
    divisors = np.asarray(scaling.long if scaling.is_long else scaling.short)
    return plain / divisors, scaling.attention_factor
  scaled = plain / scaling.factor
  if scaling.kind == "linear":
    return scaled, 1.0
  if scaling.kind == "llama3":
    turns = scaling.original_positions * plain / (2 * math.pi)
    plain_share = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return (1 - plain_share) * scaled + plain_share * plain, 1.0
  if scaling.kind == "yarn":

    def pair_index(turns):
      """The fractional index of the pair with so many turns over the original positions."""
      positions_per_radian = scaling.original_positions / (turns * 2 * math.pi)
      return head_dim * math.log(positions_per_radian) / (2 * math.log(theta))

    start, end = pair_index(scaling.high), pair_index(scaling.low)
    if scaling.truncate:
      start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, head_dim - 1)
    scaled_share = np.clip((np.arange(head_dim // 2) - start) / max(end - start, 1e-3), 0.0, 1.0)
    return scaled_share * scaled + (1 - scaled_share) * plain, scaling.attention_factor
  raise UserError(
    f"rope_scaling {scaling.kind!r} must be one of linear, llama3, yarn, longrope, dynamic."
  )


def tables(
  num_positions: int, head_dim: int, *, theta: float, scaling: RopeScaling | None, dtype
) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines of all angles, [num_positions, H/2] each, of dtype."""
  frequency, factor = frequencies(head_dim, theta, scaling)
  angle = np.arange(num_positions, dtype=dtype)[:, None] * frequency.astype(dtype)[None]
  return (np.cos(angle) * dtype.type(factor), np.sin(angle) * dtype.type(factor))
