"""Attention over packed trees as Pallas kernels for NVIDIA GPUs, through Triton; never run on one
so far.

The algorithm is that of models/fused_attention.py, cut otherwise: a GPU runs the blocks of a grid
at once and in no order, so that each block of the grid has a sum of its own and a loop over what it
visits. The forward pass and the gradients of queries go by blocks of queries, the gradients of keys
and values by blocks of keys. Which blocks are visited is read from a list, as FlexAttention does it
(https://arxiv.org/abs/2412.05496).

JAX 0.11 deprecates Pallas's way through Triton. Once it is gone, attention on GPUs is dense again
(`is_available`); of what could take its place, Pallas's Mosaic GPU has no stable interface, and
tokamax (0.0.17), whose masks can state this rule (`is_causal`, `q_end`), turns it into a dense
mask.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from synthneg_jax.models import fused_attention
from synthneg_jax.models.fused_attention import MASKED, Settings, product

try:
  from jax.experimental.pallas import triton
except ImportError:
  triton = None

_BLOCKS = 16, 64  # tokens of a block, at least and at most
# of a block's keys, so that all that a kernel holds fits its part of the chip
_BLOCK_BYTES = 16 << 10
_NARROW = 64  # of head dimensions: above, a block has eight warps, not four, lest registers spill
_LEAST_HEAD_DIM = 16  # of a product on the tensor cores


def is_available() -> bool:
  """Whether this version of JAX can compile the kernels."""
  return triton is not None


class _Refs(NamedTuple):
  """What every kernel reads: its list of blocks, then one row of the fields and of one key head's
  arrays, whole.

  Attributes:
    count: [1], how many blocks are visited; block: [blocks], their numbers.
    window: [1].
    position, leave: [T].
    q: [G, T, H]; k, v: [T, H].
  """

  count: jax.Array
  block: jax.Array
  window: jax.Array
  position: jax.Array
  leave: jax.Array
  q: jax.Array
  k: jax.Array
  v: jax.Array


def _mask(refs: _Refs, queries: pl.Slice, keys: pl.Slice, query_axis: int, settings: Settings):
  """The rule of core/tree.py for a block of queries and a block of keys; queries lie along
  `query_axis` of the two.
  """

  def lay(x, axis):
    return jnp.expand_dims(x, 1 - axis)

  key_axis, index = 1 - query_axis, jnp.arange(settings.block)
  query = lay(queries.start + index, query_axis)
  mask = (lay(keys.start + index, key_axis) <= query) & (query < lay(refs.leave[keys], key_axis))
  if settings.windowed:
    distance = lay(refs.position[queries], query_axis) - lay(refs.position[keys], key_axis)
    mask &= distance < refs.window[0]
  return mask


def _scores(a, b, mask, cap: float):
  """(masked scores of a's rows with b's, derivative of the cap or 1), float32."""
  scores = product(a, b, 1, 1)
  if not cap:
    return jnp.where(mask, scores, MASKED), 1.0
  turned = jnp.tanh(scores / cap)
  return jnp.where(mask, cap * turned, MASKED), 1.0 - turned * turned


def _span(number, settings: Settings) -> pl.Slice:
  """The tokens of a block."""
  return pl.ds(number * settings.block, settings.block)


def _forward_kernel(settings: Settings, *all_refs):
  """One block of queries of one head: its output and the logarithm of its sum."""
  refs, (out_ref, lse_ref) = _Refs(*all_refs[:-2]), all_refs[-2:]
  queries = _span(pl.program_id(0), settings)
  q_QH = refs.q[0, queries]

  def visit(n, carry):
    most_Q, total_Q, sum_QH = carry
    keys = _span(refs.block[n], settings)
    scores_QK, _ = _scores(
      q_QH, refs.k[keys], _mask(refs, queries, keys, 0, settings), settings.cap
    )
    new_most_Q = jnp.maximum(most_Q, jnp.max(scores_QK, axis=1))
    weights_QK, fade_Q = jnp.exp(scores_QK - new_most_Q[:, None]), jnp.exp(most_Q - new_most_Q)
    v_KH = refs.v[keys]
    sum_QH = sum_QH * fade_Q[:, None] + product(weights_QK.astype(v_KH.dtype), v_KH, 1, 0)
    return new_most_Q, total_Q * fade_Q + jnp.sum(weights_QK, axis=1), sum_QH

  start = jnp.full(q_QH.shape[0], MASKED), jnp.zeros(q_QH.shape[0]), jnp.zeros(q_QH.shape)
  start = jax.tree.map(lambda x: x.astype(jnp.float32), start)
  most_Q, total_Q, sum_QH = jax.lax.fori_loop(0, refs.count[0], visit, start)
  out_ref[...] = (sum_QH / total_Q[:, None]).astype(out_ref.dtype)
  lse_ref[...] = most_Q + jnp.log(total_Q)


def _queries_kernel(settings: Settings, *all_refs):
  """The gradient of one block of queries of one head."""
  refs, (d_out_ref, lse_ref, inner_ref, d_q_ref) = _Refs(*all_refs[:-4]), all_refs[-4:]
  queries = _span(pl.program_id(0), settings)
  q_QH, d_out_QH = refs.q[0, queries], d_out_ref[0, queries]
  lse_Q, inner_Q = lse_ref[0, queries], inner_ref[0, queries]

  def visit(n, sum_QH):
    keys = _span(refs.block[n], settings)
    k_KH = refs.k[keys]
    scores_QK, slope_QK = _scores(q_QH, k_KH, _mask(refs, queries, keys, 0, settings), settings.cap)
    d_weights_QK = product(d_out_QH, refs.v[keys], 1, 1) - inner_Q[:, None]
    d_scores_QK = jnp.exp(scores_QK - lse_Q[:, None]) * d_weights_QK * slope_QK
    return sum_QH + product(d_scores_QK.astype(k_KH.dtype), k_KH, 1, 0)

  zeros = jnp.zeros(q_QH.shape, jnp.float32)
  d_q_ref[...] = jax.lax.fori_loop(0, refs.count[0], visit, zeros).astype(d_q_ref.dtype)


def _keys_kernel(settings: Settings, *all_refs):
  """The gradients of one block of keys and values, over all query heads that share them."""
  refs, (d_out_ref, lse_ref, inner_ref, d_k_ref, d_v_ref) = _Refs(*all_refs[:-5]), all_refs[-5:]
  keys, groups = _span(pl.program_id(0), settings), refs.q.shape[0]
  k_KH, v_KH = refs.k[keys], refs.v[keys]

  def visit(n, carry):
    d_k_KH, d_v_KH = carry
    g, queries = jax.lax.rem(n, groups), _span(refs.block[jax.lax.div(n, groups)], settings)
    q_QH, d_out_QH = refs.q[g, queries], d_out_ref[g, queries]
    scores_KQ, slope_KQ = _scores(k_KH, q_QH, _mask(refs, queries, keys, 1, settings), settings.cap)
    weights_KQ = jnp.exp(scores_KQ - lse_ref[g, queries][None])
    d_weights_KQ = product(v_KH, d_out_QH, 1, 1) - inner_ref[g, queries][None]
    d_scores_KQ = (weights_KQ * d_weights_KQ * slope_KQ).astype(q_QH.dtype)
    d_v_KH += product(weights_KQ.astype(d_out_QH.dtype), d_out_QH, 1, 0)
    return d_k_KH + product(d_scores_KQ, q_QH, 1, 0), d_v_KH

  zeros = jnp.zeros(k_KH.shape, jnp.float32)
  d_k_KH, d_v_KH = jax.lax.fori_loop(0, refs.count[0] * groups, visit, (zeros, zeros))
  d_k_ref[...], d_v_ref[...] = d_k_KH.astype(d_k_ref.dtype), d_v_KH.astype(d_v_ref.dtype)


def _call(kernel, settings: Settings, fields, arrays, *, outputs, by_key: bool = False):
  """Runs a kernel over all blocks of all heads.

  Args:
    kernel: its function.
    settings: what it is compiled for.
    fields: positions, `leave` and the window.
    arrays: q [B, K, G, T, H], k, v [B, K, T, H], and what else it reads, of the queries' form with
      or without H.
    outputs: abstract results [B, heads, T, ...].
    by_key: whether its grid is of blocks of keys of key heads; else of blocks of queries of query
      heads.
  """
  position_BT, leave_BT, window = fields
  q, k, v, *more = arrays
  rows, kv_heads, groups, length, head_dim = q.shape
  needed = fused_attention.needed_blocks(
    position_BT, leave_BT, window[0] if settings.windowed else None, settings.block
  )
  needed = needed.swapaxes(1, 2) if by_key else needed
  count, blocks = jnp.sum(needed, axis=-1, dtype=jnp.int32, keepdims=True), length // settings.block
  visited = jnp.argsort(~needed, axis=-1, stable=True).astype(jnp.int32)
  heads, together = (kv_heads, groups) if by_key else (kv_heads * groups, 1)

  def of_queries(x):
    """A key head's query heads, or one of them."""
    x = x.reshape(rows, heads, together, *x.shape[3:])
    return x, pl.BlockSpec((None, None, *x.shape[2:]), lambda i, b, n: (b, n, *(0,) * (x.ndim - 2)))

  def of_block(shape):
    return pl.BlockSpec(
      (None, None, settings.block, *shape[3:]), lambda i, b, n: (b, n, i, *(0,) * (len(shape) - 3))
    )

  per_block = [pl.BlockSpec((None, None, size), lambda i, b, n: (b, i, 0)) for size in (1, blocks)]
  field = pl.BlockSpec((None, length), lambda i, b, n: (b, 0))
  keys = pl.BlockSpec(
    (None, None, length, head_dim), lambda i, b, n: (b, jax.lax.div(n, heads // kv_heads), 0, 0)
  )
  (q, *more), (q_spec, *more_specs) = zip(*map(of_queries, (q, *more)), strict=True)
  return pl.pallas_call(
    functools.partial(kernel, settings),
    grid=(blocks, rows, heads),
    in_specs=[
      *per_block,
      pl.BlockSpec((1,), lambda i, b, n: (0,)),
      field,
      field,
      q_spec,
      keys,
      keys,
      *more_specs,
    ],
    out_specs=[of_block(x.shape) for x in outputs],
    out_shape=outputs,
    compiler_params=triton.CompilerParams(num_warps=4 if head_dim <= _NARROW else 8, num_stages=2),
    interpret=settings.interpret,
    name=kernel.__name__.strip("_"),
  )(count, visited, window, position_BT, leave_BT, q, k, v, *more)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: Settings, fields, q, k, v):
  return _attend_forward(settings, fields, q, k, v)[0]


def _attend_forward(settings: Settings, fields, q, k, v):
  rows, kv_heads, groups, length, head_dim = q.shape
  per_query = rows, kv_heads * groups, length
  outputs = [
    jax.ShapeDtypeStruct((*per_query, head_dim), q.dtype),
    jax.ShapeDtypeStruct(per_query, jnp.float32),
  ]
  out, lse = _call(_forward_kernel, settings, fields, (q, k, v), outputs=outputs)
  out, lse = out.reshape(q.shape), lse.reshape(q.shape[:-1])
  return out, (fields, q, k, v, out, lse)


def _attend_backward(settings: Settings, kept, d_out):
  fields, q, k, v, out, lse = kept
  rows, kv_heads, groups, length, head_dim = q.shape
  inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  arrays = q, k, v, d_out, lse, inner
  of_q = jax.ShapeDtypeStruct((rows, kv_heads * groups, length, head_dim), q.dtype)
  (d_q,) = _call(_queries_kernel, settings, fields, arrays, outputs=[of_q])
  of_k = jax.ShapeDtypeStruct(k.shape, k.dtype)
  d_k, d_v = _call(_keys_kernel, settings, fields, arrays, outputs=[of_k, of_k], by_key=True)
  return None, d_q.reshape(q.shape), d_k, d_v


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
  q,
  k,
  v,
  position_BT,
  leave_BT,
  *,
  window=0,
  cap: float = 0.0,
  block: int = 0,
  interpret: bool = False,
):
  """As `fused_attention.attend`; `block` is a power of two, at least 16, or 0 to choose."""
  head_dim = q.shape[-1]
  wide = max(_LEAST_HEAD_DIM, pl.next_power_of_2(head_dim))  # zeros beyond change no score
  least, most = _BLOCKS
  block = block or max(least, min(most, _BLOCK_BYTES // (wide * q.dtype.itemsize)))

  def widen(x):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, wide - head_dim)])

  settings, fields, arrays = fused_attention.prepare(
    *map(widen, (q, k, v)),
    position_BT,
    leave_BT,
    window=window,
    cap=cap,
    block=block,
    interpret=interpret,
  )
  return _attend(settings, fields, *arrays)[..., : position_BT.shape[-1], :head_dim]
