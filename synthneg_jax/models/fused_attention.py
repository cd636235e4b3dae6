"""Attention over packed trees as Pallas kernels for TPU, forward and backward, that never hold a
row's scores.

A row of T tokens is cut into blocks. A kernel visits pairs of a block of queries and a block of
keys, only those in which some query sees some key: `leave` of a block of keys is at most its
maximum, so that queries behind it see none of them. The visits of all rows are one list, made
before the kernel and read ahead of it (scalar prefetch); the grid is as long as that list. The
softmax is the running one of FlashAttention (Dao et al., https://arxiv.org/abs/2205.14135).

Scores lie transposed in a visit, [keys, queries]: what belongs to a query (maximum, sum) is then a
row of lanes. The backward pass computes scores anew; it goes by blocks of keys, and holds the sums
for all queries of a row on the chip.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MASKED = -1e30  # finite, so that a query whose first block is all masked gives numbers
_BLOCKS = (512, 256, 128)  # tokens of a block, at most and at least; lanes come by 128
_LEAST_BLOCKS = 4  # of a row: with fewer, more of what no query sees is computed
# of a visit's queries, so that all that a kernel holds fits the memory on the chip
_MOST_BYTES = 1 << 20
# Of the gradients of a row's queries that the backward kernel sums on the chip; a single head may
# take more.
_MOST_ROW_BYTES = 4 << 20
_CHIP_BYTES = 16 << 20  # of memory on the chip for all else
_FORWARD, _BACKWARD = 2, 5  # products of a visit, each of 2·block²·H FLOPs


class Visits(NamedTuple):
  """The pairs of blocks that a kernel visits, in its order; int32 [count at most] but for `count`.

  Attributes:
    row: of the batch.
    query, key: numbers of the blocks.
    is_first, is_last: 1 at the first and last visit of the block that is being summed for.
    count: int32 [1], how many there are; entries beyond are not read.
  """

  row: jax.Array
  query: jax.Array
  key: jax.Array
  is_first: jax.Array
  is_last: jax.Array
  count: jax.Array


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a kernel is compiled for.

  Attributes:
    block: tokens of a block.
    cap: as in `attention.Scoring`.
    windowed: whether a window is given.
    interpret: run as JAX operations, on any platform.
  """

  block: int
  cap: float
  windowed: bool
  interpret: bool


def needed_blocks(position_BT, leave_BT, window, block: int) -> jax.Array:
  """bool [B, T/block, T/block]: whether some query of a block may see some key of another, by their
  bounds.

  Args:
    position_BT, leave_BT: fields of the rows, T a multiple of the block.
    window: int32 scalar, or None for none.
    block: tokens of a block.
  """
  rows, length = leave_BT.shape
  first = np.arange(0, length, block)

  def bounds(field_BT):
    blocks = field_BT.reshape(rows, -1, block)
    return jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)

  _, most_leave = bounds(leave_BT)
  needed = (first[None, :] <= first[:, None])[None] & (
    most_leave[:, None, :] > first[None, :, None]
  )
  if window is None:
    return needed
  least, most = bounds(position_BT)
  return needed & (least[:, :, None] - most[:, None, :] < window)


def _visits(needed_BQK, *, by_key: bool) -> Visits:
  """The needed pairs, sorted by row, by the block that is summed for (queries', or keys'), and by
  the other.
  """
  rows, count, _ = needed_BQK.shape
  query, key = np.nonzero(np.tri(count, dtype=bool))
  if by_key:
    order = np.lexsort((query, key))
    query, key = query[order], key[order]
  pairs = len(query)
  needed = needed_BQK[:, query, key].reshape(-1)
  order = jnp.argsort(~needed, stable=True).astype(jnp.int32)
  number, pair = jnp.sum(needed, dtype=jnp.int32), order % pairs
  row, query, key = (
    order // pairs,
    jnp.asarray(query, jnp.int32)[pair],
    jnp.asarray(key, jnp.int32)[pair],
  )
  block = row * count + (key if by_key else query)
  turns = (block[1:] != block[:-1]).astype(jnp.int32)
  one = jnp.ones(1, jnp.int32)
  is_last = jnp.maximum(jnp.concatenate([turns, one]), jnp.arange(len(block)) == number - 1)
  return Visits(
    row, query, key, jnp.concatenate([one, turns]), is_last.astype(jnp.int32), number[None]
  )


def product(a, b, a_axis: int, b_axis: int):
  """a·b over one axis of each, float32; of bfloat16 in one pass, whatever precision the program
  asks of its own products.
  """
  precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
  axes = (((a_axis,), (b_axis,)), ((), ()))
  return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


class _Refs(NamedTuple):
  """What every kernel reads: scalars (the visits, the window [1]), then blocks of the rows' fields
  and of q, k, v.
  """

  visits: Visits
  window: jax.Array
  query_position: jax.Array
  key_position: jax.Array
  key_leave: jax.Array
  q: jax.Array
  k: jax.Array
  v: jax.Array


def _split_refs(refs) -> tuple[_Refs, tuple]:
  visits, rest = Visits(*refs[: len(Visits._fields)]), refs[len(Visits._fields) :]
  used = len(_Refs._fields) - 1
  return _Refs(visits, *rest[:used]), rest[used:]


def _mask_KQ(refs: _Refs, visit, settings: Settings):
  """The rule of core/tree.py within a visit, bool [keys, queries]."""
  block = settings.block
  shape = (block, block)
  query = refs.visits.query[visit] * block + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  key = refs.visits.key[visit] * block + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  mask = (key <= query) & (query < jnp.expand_dims(refs.key_leave[0, 0], -1))
  if settings.windowed:
    mask &= refs.query_position[0] - jnp.expand_dims(refs.key_position[0, 0], -1) < refs.window[0]
  return mask


def _scores_KQ(q_QH, k_KH, mask_KQ, cap: float):
  """(masked scores, derivative of the cap or None), float32 [keys, queries]."""
  scores = product(k_KH, q_QH, 1, 1)
  if not cap:
    return jnp.where(mask_KQ, scores, MASKED), None
  turned = jnp.tanh(scores / cap)
  return jnp.where(mask_KQ, cap * turned, MASKED), 1.0 - turned * turned


def _forward_kernel(settings: Settings, *all_refs):
  refs, (out_ref, lse_ref, most_ref, total_ref, sum_ref) = _split_refs(all_refs)
  visit, groups = pl.program_id(1), refs.q.shape[2]

  @pl.when(refs.visits.is_first[visit] == 1)
  def _start():
    most_ref[...] = jnp.full_like(most_ref, MASKED)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  mask_KQ, k_KH, v_KH = _mask_KQ(refs, visit, settings), refs.k[0, 0], refs.v[0, 0]
  for g in range(groups):
    scores_KQ, _ = _scores_KQ(refs.q[0, 0, g], k_KH, mask_KQ, settings.cap)
    before, row = most_ref[g : g + 1], slice(g, g + 1)
    most = jnp.maximum(before, jnp.max(scores_KQ, axis=0, keepdims=True))
    weights_KQ, fade = jnp.exp(scores_KQ - most), jnp.exp(before - most)
    most_ref[row] = most
    total_ref[row] = total_ref[row] * fade + jnp.sum(weights_KQ, axis=0, keepdims=True)
    sum_ref[g] = sum_ref[g] * fade + product(v_KH, weights_KQ.astype(v_KH.dtype), 0, 0)

  @pl.when(refs.visits.is_last[visit] == 1)
  def _end():
    for g in range(groups):
      out_ref[0, 0, g] = (sum_ref[g] / total_ref[g : g + 1]).T.astype(out_ref.dtype)
    lse_ref[0, 0] = most_ref[...] + jnp.log(total_ref[...])


def _backward_kernel(settings: Settings, *all_refs):
  """Sums into its results: of the queries for a whole row, [blocks, H, block]; of the keys for a
  block.
  """
  refs, (d_out_ref, lse_ref, inner_ref, d_q_ref, d_k_ref, d_v_ref) = _split_refs(all_refs)
  visit, groups = pl.program_id(1), refs.q.shape[2]
  query, key = refs.visits.query[visit], refs.visits.key[visit]

  @pl.when(refs.visits.is_first[visit] == 1)
  def _start():
    d_k_ref[...] = jnp.zeros_like(d_k_ref)
    d_v_ref[...] = jnp.zeros_like(d_v_ref)

    @pl.when(key == 0)
    def _start_row():
      d_q_ref[...] = jnp.zeros_like(d_q_ref)

  mask_KQ, k_KH, v_KH = _mask_KQ(refs, visit, settings), refs.k[0, 0], refs.v[0, 0]
  for g in range(groups):
    q_QH, d_out_QH = refs.q[0, 0, g], d_out_ref[0, 0, g]
    scores_KQ, slope_KQ = _scores_KQ(q_QH, k_KH, mask_KQ, settings.cap)
    weights_KQ = jnp.exp(scores_KQ - lse_ref[0, 0, g : g + 1])
    d_scores_KQ = weights_KQ * (product(v_KH, d_out_QH, 1, 1) - inner_ref[0, 0, g : g + 1])
    d_scores_KQ = (d_scores_KQ if slope_KQ is None else d_scores_KQ * slope_KQ).astype(k_KH.dtype)
    d_q_ref[0, 0, g, query] += product(k_KH, d_scores_KQ, 0, 0)
    d_k_ref[0, 0] += product(d_scores_KQ, q_QH, 1, 0)
    d_v_ref[0, 0] += product(weights_KQ.astype(d_out_QH.dtype), d_out_QH, 1, 0)


def cost(shape, block: int, products: int, *, itemsize: int) -> pl.CostEstimate:
  """What a kernel does at most, for rows that are one sequence each: which blocks are skipped only
  the data knows.

  Args:
    shape: B, K, G, T, H of the queries.
    block: tokens of a block.
    products: of a visit, `_FORWARD` or `_BACKWARD`.
    itemsize: bytes of a number of q, k and v.
  """
  rows, kv_heads, groups, length, head_dim = shape
  count = length // block
  pairs = rows * kv_heads * count * (count + 1) // 2
  scores = pairs * groups * block * block
  of_keys = block * head_dim
  of_queries = groups * of_keys
  if products == _FORWARD:  # keys and values at each visit; queries and what comes out once a block
    moved = itemsize * (pairs * 2 * of_keys + rows * kv_heads * count * 2 * of_queries)
  else:  # queries and their gradients per visit; keys, values and float32 sums once per block
    moved = itemsize * (pairs * 2 * of_queries + rows * kv_heads * count * 2 * of_keys)
    moved += 4 * rows * kv_heads * count * (of_queries + 2 * of_keys)
  return pl.CostEstimate(
    flops=products * 2 * scores * head_dim, transcendentals=scores, bytes_accessed=moved
  )


def _call(kernel, settings: Settings, fields, arrays, *, outputs, scratch=(), products: int):
  """Runs a kernel over its visits.

  Args:
    kernel: its function.
    settings: what it is compiled for.
    fields: positions, `leave` and the window.
    arrays: q [B, K·n, G/n, T, H], k, v [B, K, T, H], and what else it reads: of the form of q, or a
      number a query.
    outputs: (abstract array, its form) of each: "queries", "per_query", "keys" or "row".
    scratch: shapes of its float32 scratch.
    products: as `cost` takes them.
  """
  position_BT, leave_BT, window = fields
  q, k, block = arrays[0], arrays[1], settings.block
  _, heads, groups, length, head_dim = q.shape
  repeats = heads // k.shape[1]  # steps of the grid that share a key head
  needed = needed_blocks(position_BT, leave_BT, window[0] if settings.windowed else None, block)
  visits = _visits(needed, by_key=products == _BACKWARD)

  def of_field(side):
    """Of a field [B, 1, T] at the queries or at the keys of a visit."""
    return pl.BlockSpec(
      (1, 1, block), lambda h, n, row, query, key, *_: (row[n], 0, (query, key)[side][n])
    )

  queries, of_keys = (1, 1, groups, block, head_dim), (1, 1, block, head_dim)
  specs = {
    "queries": pl.BlockSpec(queries, lambda h, n, row, query, *_: (row[n], h, 0, query[n], 0)),
    "per_query": pl.BlockSpec(queries[:-1], lambda h, n, row, query, *_: (row[n], h, 0, query[n])),
    "shared_keys": pl.BlockSpec(
      of_keys, lambda h, n, row, query, key, *_: (row[n], jax.lax.div(h, repeats), key[n], 0)
    ),
    "keys": pl.BlockSpec(of_keys, lambda h, n, row, query, key, *_: (row[n], h, key[n], 0)),
    "row": pl.BlockSpec(
      (1, 1, groups, length // block, head_dim, block),
      lambda h, n, row, *_: (row[n], h, 0, 0, 0, 0),
    ),
  }
  forms = [
    "queries",
    "shared_keys",
    "shared_keys",
    *("queries" if x.ndim == 5 else "per_query" for x in arrays[3:]),
  ]
  # the form "row", twice
  on_chip = 2 * 4 * groups * length * head_dim if products == _BACKWARD else 0
  return pl.pallas_call(
    functools.partial(kernel, settings),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(visits) + 1,
      grid=(heads, visits.count[0]),
      in_specs=[of_field(0), of_field(1), of_field(1), *(specs[form] for form in forms)],
      out_specs=[specs[form] for _, form in outputs],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    out_shape=[abstract for abstract, _ in outputs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_CHIP_BYTES + on_chip
    ),
    cost_estimate=cost(q.shape, block, products, itemsize=q.dtype.itemsize),
    interpret=settings.interpret,
    name=kernel.__name__.strip("_"),
  )(*visits, window, *(field[:, None] for field in (position_BT, position_BT, leave_BT)), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: Settings, fields, q, k, v):
  return _attend_forward(settings, fields, q, k, v)[0]


def _attend_forward(settings: Settings, fields, q, k, v):
  _, _, groups, _, head_dim = q.shape
  out, lse = _call(
    _forward_kernel,
    settings,
    fields,
    (q, k, v),
    outputs=[
      (jax.ShapeDtypeStruct(q.shape, q.dtype), "queries"),
      (jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32), "per_query"),
    ],
    scratch=[
      (groups, settings.block),
      (groups, settings.block),
      (groups, head_dim, settings.block),
    ],
    products=_FORWARD,
  )
  return out, (fields, q, k, v, out, lse)


def _attend_backward(settings: Settings, kept, d_out):
  fields, q, k, v, out, lse = kept
  rows, kv_heads, groups, length, head_dim = q.shape
  inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  row_bytes = 4 * length * head_dim
  together = next(
    n
    for n in range(groups, 0, -1)
    if groups % n == 0 and (n * row_bytes <= _MOST_ROW_BYTES or n == 1)
  )

  def regroup(x):
    """Query heads of a key head that one step cannot hold, as heads of their own."""
    return x.reshape(rows, kv_heads * (groups // together), together, *x.shape[3:])

  q_again, *more = map(regroup, (q, d_out, lse, inner))
  row = (*q_again.shape[:3], length // settings.block, head_dim, settings.block)
  of_keys = (rows, q_again.shape[1], length, head_dim)
  d_q, d_k, d_v = _call(
    _backward_kernel,
    settings,
    fields,
    (q_again, k, v, *more),
    outputs=[
      (jax.ShapeDtypeStruct(s, jnp.float32), form)
      for s, form in ((row, "row"), (of_keys, "keys"), (of_keys, "keys"))
    ],
    products=_BACKWARD,
  )

  def over_heads(d_keys):
    return jnp.sum(d_keys.reshape(rows, kv_heads, -1, length, head_dim), axis=2).astype(k.dtype)

  return (
    None,
    d_q.swapaxes(-1, -2).reshape(q.shape).astype(q.dtype),
    over_heads(d_k),
    over_heads(d_v),
  )


_attend.defvjp(_attend_forward, _attend_backward)


def block_of(length: int, groups: int, head_dim: int, itemsize: int) -> int:
  """Tokens of a block for rows of T tokens and G query heads a key head, H wide, of numbers of so
  many bytes.
  """
  padded = -(-length // _BLOCKS[-1]) * _BLOCKS[-1]
  most = min(_MOST_BYTES // (groups * head_dim * itemsize), padded // _LEAST_BLOCKS)
  return next((block for block in _BLOCKS if padded % block == 0 and block <= most), _BLOCKS[-1])


def prepare(q, k, v, position_BT, leave_BT, *, window, cap: float, block: int, interpret: bool):
  """(settings, fields, (q, k, v)) for kernels, rows padded to whole blocks; arguments as `attend`
  takes them.
  """
  length = q.shape[-2]
  more = -length % block
  if more:  # padding sees itself only

    def pad(x, axis):
      return jnp.pad(x, [(0, more if place == axis % x.ndim else 0) for place in range(x.ndim)])

    q, k, v, position_BT = pad(q, -2), pad(k, -2), pad(v, -2), pad(position_BT, -1)
    behind = jnp.arange(length + 1, length + more + 1, dtype=leave_BT.dtype)
    leave_BT = jnp.concatenate([leave_BT, jnp.broadcast_to(behind, (len(leave_BT), more))], axis=1)
  windowed = not (isinstance(window, int) and window == 0)
  fields = position_BT, leave_BT, jnp.asarray(window, jnp.int32).reshape(1)
  return Settings(block, cap, windowed, interpret), fields, (q, k, v)


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
  """Softmax attention of rows of packed trees by the rule of core/tree.py.

  Args:
    q: [B, K, G, T, H], scaled; k, v: [B, K, T, H].
    position_BT, leave_BT: int32, as in `PackedTrees`.
    window: as `tree.attention_mask` takes it.
    cap: as in `attention.Scoring`.
    block: tokens of a block, a multiple of 128 but where interpreted; 0 to choose.
    interpret: run as JAX operations, on any platform.

  Returns:
    [B, K, G, T, H], as q.
  """
  _, _, groups, length, head_dim = q.shape
  settings, fields, arrays = prepare(
    q,
    k,
    v,
    position_BT,
    leave_BT,
    window=window,
    cap=cap,
    block=block or block_of(length, groups, head_dim, q.dtype.itemsize),
    interpret=interpret,
  )
  return _attend(settings, fields, *arrays)[..., :length, :]
