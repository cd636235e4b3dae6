"""Attention over packed trees, and over a lane's trunk and its slots' suffixes. Rotary positions.

Which token attends to which is decided in core/tree.py: by one rule for rows of trees, and for a
lane's trunk and its slots' suffixes.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.models import fused_attention, fused_attention_gpu, rope
from synthneg_jax.runtime import device_mesh

# Masked scores: finite, so that a row of padding gives numbers and no NaN gradient.
_MASKED = -1e30
# queries of a row are cut into so many blocks, of so many tokens at least
_BLOCKS, _LEAST_BLOCK = 4, 64
# Tokens of a row from which on its scores are not held: a GPU's break-even lies between 512 and
# 2048.
_FUSED_FROM = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of lanes that decode. Each field is one array [Y, ...], or a tuple of Y arrays
  where layers are unrolled.

  A lane holds one trunk, shared by all its slots; a slot holds the suffix that its branch has
  grown.

  Attributes:
    trunk_k: [lanes, K, H, C]; trunk_v: [lanes, K, C, H].
    suffix_k, suffix_v: [lanes, slots, K, L, H].
  """

  trunk_k: jax.Array | tuple
  trunk_v: jax.Array | tuple
  suffix_k: jax.Array | tuple
  suffix_v: jax.Array | tuple

  @property
  def num_positions(self) -> int:
    """C + L: positions of tokens are below it."""
    return self.trunk_v[0].shape[-2] + self.suffix_v[0].shape[-2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
  """How scores are formed from queries and keys.

  Attributes:
    scale: multiplies them; 0 for H^-1/2.
    cap: bounds them, by cap·tanh(score / cap); 0 for none.
  """

  scale: float = 0.0
  cap: float = 0.0


_UNCAPPED = Scoring()


class NewestTokens(NamedTuple):
  """Where the newest tokens of all slots stand, in one layer.

  Attributes:
    layer: its number: an int where the cache is a tuple, a traced scalar where it is stacked.
    fork: int32 [lanes, slots], trunk tokens that each slot sees.
    index: int32 [lanes, slots], the newest tokens' places in their suffixes, from 0.
    window: positions that a token sees, its own included: an int that is 0 for all, or an int32
      scalar.
  """

  layer: int | jax.Array
  fork: jax.Array
  index: jax.Array
  window: int | jax.Array = 0


def rotary(
  position_N: jax.Array, num_positions: int, *, head_dim: int, theta: float, dtype, scaling=None
):
  """Returns rotate(x [N, heads, H]), the rotary embedding at these positions, all below
  `num_positions`.

  Pairs are (i, i + H/2), as in Hugging Face checkpoints of this family; models/rope.py has the
  angles. Cosines and sines are constants of the program: computed in it, they would be computed
  anew by every use.

  Args:
    position_N: int32 [N].
    num_positions: rows of the tables.
    head_dim: H.
    theta: base of the frequencies.
    dtype: of x; angles are computed in float32 at least.
    scaling: RopeScaling, or None.
  """
  wide = jnp.promote_types(dtype, jnp.float32)
  angles = rope.tables(num_positions, head_dim, theta=theta, scaling=scaling, dtype=wide)
  cos, sin = (jnp.asarray(table, dtype)[position_N][:, None] for table in angles)

  def rotate(x):
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

  return rotate


def _capped(scores, cap: float):
  """cap · tanh(scores / cap); unchanged where cap is 0."""
  return cap * jnp.tanh(scores / cap) if cap else scores


def tree_attention(
  q, k, v, *, keys: tree_lib.Keys, window: int | jax.Array = 0, scoring: Scoring = _UNCAPPED
):
  """Attention of rows of packed trees: fused on TPUs and NVIDIA's GPUs where rows are long, else
  XLA's products.

  Args:
    q: [B·T, N, H]; k, v: [B·T, K, H], rotary positions applied.
    keys: where the rows' tokens stand, fields [B, T].
    window: as `tree.attention_mask` takes it.
    scoring: scale and cap of the scores.

  Returns:
    (out [B·T, N, H], keys [B, K, T, H], values [B, K, T, H]).
  """
  rows, length = keys.leave.shape
  kv_heads, head_dim = k.shape[1], k.shape[2]
  groups = q.shape[1] // kv_heads
  q = q.reshape(rows, length, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
  q *= scoring.scale or head_dim**-0.5
  k_BKTH = k.reshape(rows, length, kv_heads, head_dim).transpose(0, 2, 1, 3)
  v_BKTH = v.reshape(rows, length, kv_heads, head_dim).transpose(0, 2, 1, 3)
  fused = kernels(length, q.dtype)
  if fused:
    out = _fused(fused, q, k_BKTH, v_BKTH, keys=keys, window=window, cap=scoring.cap)
  else:
    out = _in_blocks(q, k_BKTH, v_BKTH, keys=keys, window=window, cap=scoring.cap)
  out = out.transpose(0, 3, 1, 2, 4).reshape(rows * length, kv_heads * groups, head_dim)
  return out, k_BKTH, v_BKTH


def kernels(length: int, dtype):
  """The module whose kernels attend in rows of so many tokens; None where XLA's products do."""
  if length >= _FUSED_FROM and dtype in (jnp.bfloat16, jnp.float32):
    if device_mesh.runs_on("TPU"):
      return fused_attention
    if device_mesh.runs_on("NVIDIA") and fused_attention_gpu.is_available():
      return fused_attention_gpu
  return None


def _fused(module, q, k, v, *, keys: tree_lib.Keys, window, cap: float):
  """The kernels on every device's own rows and key heads; where key heads do not divide, each has
  all of them.
  """
  tensor = device_mesh.parts("kv_heads")
  heads = "kv_heads" if k.shape[1] % tensor == 0 else None
  windowed = not isinstance(window, int) or window > 0

  def attend(q, k, v, position, leave, window):
    return module.attend(q, k, v, position, leave, window=window if windowed else 0, cap=cap)

  split = ("rows", heads), ("rows", heads), ("rows", heads), ("rows",), ("rows",), ()
  run = device_mesh.on_each_device(attend, split, ("rows", heads))
  return run(q, k, v, keys.position, keys.leave, jnp.asarray(window, jnp.int32))


def _in_blocks(q, k_BKTH, v_BKTH, *, keys: tree_lib.Keys, window, cap: float):
  """In blocks of queries: no query sees a key that stands behind it, so a block is held against the
  keys up to its end.
  """
  length, parts = q.shape[3], []
  mask_BTT = tree_lib.attention_mask(tree_lib.Queries(keys.index, keys.position), keys, window)
  size = -(-length // min(_BLOCKS, -(-length // _LEAST_BLOCK)))
  for start in range(0, length, size):
    stop = min(start + size, length)
    block = (
      q[:, :, :, start:stop],
      k_BKTH[:, :, :stop],
      v_BKTH[:, :, :stop],
      mask_BTT[:, start:stop, :stop],
    )
    # Capped scores have no backward pass by hand.
    parts.append(_attend_forward(*block, cap)[0] if cap else _attend(*block))
  return jnp.concatenate(parts, axis=3)


@jax.custom_vjp
def _attend(q, k, v, mask):
  """Softmax attention of q [B, K, G, T, H] over k, v [B, K, S, H] where mask [B, T, S] allows."""
  return _attend_forward(q, k, v, mask)[0]


def _attend_forward(q, k, v, mask, cap: float = 0.0):
  """(the result of `_attend`, scores capped unless cap is 0; residuals for the backward pass)."""
  rows, kv_heads, groups, length, head_dim = q.shape
  keys = k.shape[2]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  # One matrix product a kv head: its query heads stand below one another. Rows and kv heads stay
  # dimensions of their own, since they are split over different axes of the mesh.
  q = q.reshape(rows, kv_heads, groups * length, head_dim)
  scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=wide)
  scores = scores.reshape(rows, kv_heads, groups, length, keys)
  scores = jnp.where(mask[:, None, None], _capped(scores, cap), _MASKED)
  weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
  total = jnp.sum(weights, axis=-1).reshape(rows, kv_heads, groups * length, 1)
  weights = weights.reshape(rows, kv_heads, groups * length, keys).astype(v.dtype)
  # Normalised after the product: H columns instead of S.
  out = jnp.einsum("bkts,bksh->bkth", weights, v, preferred_element_type=wide) / total
  return out.astype(v.dtype).reshape(rows, kv_heads, groups, length, head_dim), (
    q,
    k,
    v,
    weights,
    total,
    out,
  )


def _attend_backward(residuals, d_out):
  """By hand, to pass over the scores once: with P = weights / total, dS = P (dO Vᵀ - rowsum(dO ·
  O)), 0 where masked.
  """
  q, k, v, weights, total, out = residuals
  wide = out.dtype
  product = functools.partial(jnp.einsum, preferred_element_type=wide)
  d_scaled = d_out.reshape(out.shape).astype(wide) / total
  inner = jnp.sum(d_scaled * out, axis=-1, keepdims=True)
  d_scaled = d_scaled.astype(v.dtype)
  d_scores = (weights * (product("bkth,bksh->bkts", d_scaled, v) - inner)).astype(q.dtype)
  d_q = product("bkts,bksh->bkth", d_scores, k).astype(q.dtype)
  d_k = product("bkts,bkth->bksh", d_scores, q).astype(k.dtype)
  d_v = product("bkts,bkth->bksh", weights, d_scaled).astype(v.dtype)
  return d_q.reshape(d_out.shape), d_k, d_v, None


_attend.defvjp(_attend_forward, _attend_backward)


def _put(field, place, new, *, index):
  """`field.at[place].set(new)` for suffixes [lanes, slots, K, L, H]; new [lanes, slots, K, H] goes
  to index [lanes, slots].

  On the CPU a bfloat16 field is rewritten by a select: XLA widens a scatter there, and would turn
  the whole cache to float32 and back for every token, which takes 14 times as long.
  """

  def select(field, new):
    here = jnp.arange(field.shape[-2])[None, None] == index[..., None]  # [lanes, slots, L]
    return jnp.where(here[:, :, None, :, None], new[:, :, :, None], field)

  def scatter(field, new):
    return field.at[place].set(new)

  if field.dtype != jnp.bfloat16 or field.ndim != 5:  # a select would write all layers of a scan
    return scatter(field, new)
  return lax.platform_dependent(field, new, cpu=select, default=scatter)


def _decoding_masks(newest: NewestTokens, trunk: int, suffix: int):
  """(bool [lanes, slots, C], bool [lanes, slots, L]): what the newest tokens see of their trunks
  and of their suffixes.

  By the rule of trees, without a copy of the trunk for each slot: of C tokens, the trunk's token j
  leaves at 2C - j, and a slot that forks at f stands at 2C - f. Its suffix stands right before it;
  tokens not yet written leave at 0.
  """
  _, fork, index, window = newest
  queries = tree_lib.Queries(2 * trunk - fork[..., None], (fork + index)[..., None])
  place_C, place_L = jnp.arange(trunk)[None, None], jnp.arange(suffix)[None, None]
  of_trunk = tree_lib.Keys(place_C, place_C, 2 * trunk - place_C)
  leave = jnp.where(place_L <= index[..., None], 2 * trunk + 1, 0)
  of_suffix = tree_lib.Keys(jnp.full_like(place_L, trunk), fork[..., None] + place_L, leave)
  masks = (tree_lib.attention_mask(queries, keys, window) for keys in (of_trunk, of_suffix))
  return tuple(mask[..., 0, :] for mask in masks)


def cached_attention(q, k, v, *, cache: Cache, newest: NewestTokens, scoring: Scoring = _UNCAPPED):
  """One joint softmax of each slot's newest token over its lane's trunk and its own suffix.

  Args:
    q: [lanes·slots, N, H]; k, v: [lanes·slots, K, H], rotary positions applied.
    cache: before the newest tokens.
    newest: where they stand.
    scoring: scale and cap of the scores.

  Returns:
    (out [lanes·slots, N, H], the cache with k and v written at the newest tokens' places).
  """
  layer, fork, index, window = newest
  lanes, slots = fork.shape
  kv_heads, head_dim = k.shape[1], k.shape[2]
  groups = q.shape[1] // kv_heads
  wide = jnp.promote_types(q.dtype, jnp.float32)
  lane = jnp.arange(lanes)[:, None]
  slot = jnp.arange(slots)[None, :]

  # Of a single row a head's part is written at a time: XLA turns a scatter of one index into an
  # update of a slice, then does that once for the attention and once for the loop's state, and
  # copies the cache for each.
  if lanes * slots == 1:
    place = (lane[..., None], slot[..., None], jnp.arange(kv_heads)[None, None], index[..., None])
  else:
    place = (lane, slot, slice(None), index)

  def write(field, new):
    new = new.reshape(lanes, slots, kv_heads, head_dim)
    if isinstance(field, tuple):
      return field[:layer] + (_put(field[layer], place, new, index=index),) + field[layer + 1 :]
    return _put(field, (layer, *place), new, index=index)

  cache = dataclasses.replace(
    cache, suffix_k=write(cache.suffix_k, k), suffix_v=write(cache.suffix_v, v)
  )
  trunk_k, trunk_v = cache.trunk_k[layer], cache.trunk_v[layer]
  suffix_k, suffix_v = cache.suffix_k[layer], cache.suffix_v[layer]

  q = q.reshape(lanes, slots, kv_heads, groups, head_dim) * (scoring.scale or head_dim**-0.5)
  q_trunk = q.transpose(0, 2, 1, 3, 4).reshape(lanes, kv_heads, slots * groups, head_dim)
  trunk = jnp.einsum("lkqh,lkhc->lkqc", q_trunk, trunk_k, preferred_element_type=wide)
  trunk = trunk.reshape(lanes, kv_heads, slots, groups, -1).transpose(0, 2, 1, 3, 4)
  suffix = jnp.einsum("lskgh,lskth->lskgt", q, suffix_k, preferred_element_type=wide)
  trunk_mask, suffix_mask = _decoding_masks(newest, trunk.shape[-1], suffix.shape[-1])
  trunk = jnp.where(trunk_mask[:, :, None, None], _capped(trunk, scoring.cap), _MASKED)
  suffix = jnp.where(suffix_mask[:, :, None, None], _capped(suffix, scoring.cap), _MASKED)
  top = jnp.maximum(jnp.max(trunk, -1), jnp.max(suffix, -1))[..., None]
  trunk, suffix = jnp.exp(trunk - top), jnp.exp(suffix - top)
  total = jnp.sum(trunk, -1) + jnp.sum(suffix, -1)
  trunk = (
    trunk.transpose(0, 2, 1, 3, 4).reshape(lanes, kv_heads, slots * groups, -1).astype(v.dtype)
  )
  out_trunk = jnp.einsum("lkqc,lkch->lkqh", trunk, trunk_v, preferred_element_type=wide)
  out_trunk = out_trunk.reshape(lanes, kv_heads, slots, groups, head_dim).transpose(0, 2, 1, 3, 4)
  out_suffix = jnp.einsum(
    "lskgt,lskth->lskgh", suffix.astype(v.dtype), suffix_v, preferred_element_type=wide
  )
  out = (out_trunk + out_suffix) / total[..., None]
  return out.astype(v.dtype).reshape(lanes * slots, kv_heads * groups, head_dim), cache
