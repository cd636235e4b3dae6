"""Rotary frequencies, plain and stretched for longer texts, as numpy arrays: constants of the
programs.

Angle of pair i at position p: p · f_i, f_i = θ^(-2i/H) (Su et al.,
https://arxiv.org/abs/2104.09864). What the kinds of scaling do to f, with s = factor, P =
original_positions, and n_i = P·f_i / 2π the turns of pair i over P positions:

  linear   f / s (Chen et al., https://arxiv.org/abs/2306.15595)
  llama3   f / s where n < low, f where n > high, between them the mean of both, weighted by (n - low) / (high - low)
           (Llama 3.1's published config)
  yarn     as llama3, but the ramp is linear in i, from the pair with `high` turns to that with `low`; cosines and sines
           are multiplied by attention_factor (Peng et al., https://arxiv.org/abs/2309.00071)
  longrope f / s_i, a factor for each pair; cosines and sines are multiplied by attention_factor
  (Ding et al.,
           https://arxiv.org/abs/2402.13753). There are two sets of s_i, for texts of up to P
           positions and for longer ones; a run keeps to one of them, since otherwise a token's key
           would change with what follows it
  dynamic  f, up to P positions. What it does beyond depends on the length of the whole text, so that a token's key would
           change with what follows it, and prefill and decoding could not agree: such texts are
           refused.
"""

import math

import numpy as np

from synthneg_jax.models.config import RopeScaling
from synthneg_jax.runtime.errors import UserError


def frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, float]:
  """(f, float64 [H/2] radians a position, what cosines and sines are multiplied by)."""
  pairs = np.arange(0, head_dim, 2) / head_dim
  plain = theta**-pairs
  if scaling is None or scaling.kind == "dynamic":
    return plain, 1.0
  if scaling.kind == "longrope":
    return plain / np.asarray(
      scaling.long if scaling.is_long else scaling.short
    ), scaling.attention_factor
  stretched = plain / scaling.factor
  if scaling.kind == "linear":
    return stretched, 1.0
  if scaling.kind == "llama3":
    turns = scaling.original_positions * plain / (2 * math.pi)
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return (1 - kept) * stretched + kept * plain, 1.0
  if scaling.kind == "yarn":

    def pair_with(
      turns,
    ):  # the number of the pair, a fraction, that turns so often over the original positions
      return (
        head_dim
        * math.log(scaling.original_positions / (turns * 2 * math.pi))
        / (2 * math.log(theta))
      )

    start, end = pair_with(scaling.high), pair_with(scaling.low)
    if scaling.truncate:
      start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, head_dim - 1)
    given_up = np.clip((np.arange(head_dim // 2) - start) / max(end - start, 1e-3), 0.0, 1.0)
    return given_up * stretched + (1 - given_up) * plain, scaling.attention_factor
  raise UserError(
    f"rope_scaling {scaling.kind!r} is none of linear, llama3, yarn, longrope, dynamic."
  )


def tables(
  num_positions: int, head_dim: int, *, theta: float, scaling: RopeScaling | None, dtype
) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines, [num_positions, H/2] of dtype."""
  frequency, factor = frequencies(head_dim, theta, scaling)
  angle = np.arange(num_positions, dtype=dtype)[:, None] * frequency.astype(dtype)[None]
  return (np.cos(angle) * dtype.type(factor), np.sin(angle) * dtype.type(factor))
