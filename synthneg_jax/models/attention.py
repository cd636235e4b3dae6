"""Attention over packed trees, and over a lane's trunk and its slots' suffixes. Rotary positions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from synthneg_jax.models import rope

# Masked scores: finite, so that a row of padding gives numbers and no NaN gradient.
_MASKED = -1e30
_BLOCKS, _LEAST_BLOCK = 4, 64  # queries of a row are cut into so many blocks, of so many tokens at least


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of lanes that decode. Each field is one array [Y, ...], or a tuple of Y arrays where layers are unrolled.

  A lane holds one trunk, shared by all its slots; a slot holds the suffix that its branch has grown.

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


def rotary(position_N: jax.Array, num_positions: int, head_dim: int, theta: float, dtype, scaling=None):
  """A function that turns [N, heads, H] by the rotary embedding of its positions, all below `num_positions`.

  Pairs are (i, i + H/2), as in Hugging Face checkpoints of this family; models/rope.py has the angles.
  Cosines and sines are constants of the program: computed in it, they would be computed anew by every use.
  """
  angles = rope.tables(num_positions, head_dim, theta, scaling, jnp.promote_types(dtype, jnp.float32))
  cos, sin = (jnp.asarray(table, dtype)[position_N][:, None] for table in angles)

  def rotate(x):
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

  return rotate


def _capped(scores, cap: float):
  """cap · tanh(scores / cap); unchanged where cap is 0."""
  return cap * jnp.tanh(scores / cap) if cap else scores


def tree_attention(q, k, v, mask_BTT, *, scale: float = 0.0, cap: float = 0.0):
  """Attention of rows of packed trees, in blocks of queries.

  Args:
    q: [B·T, N, H]; k, v: [B·T, K, H], rotary positions applied.
    mask_BTT: bool, True where a query sees a key. Of a row's keys no query sees one that stands behind it (trees are
      packed trunk first), so a block of queries is held against the keys up to its end only.
    scale: of the scores; 0 for H^-1/2.
    cap: bounds them, by cap·tanh(score / cap); 0 for none.

  Returns:
    (out [B·T, N, H], keys [B, K, T, H], values [B, K, T, H]).
  """
  rows, length, _ = mask_BTT.shape
  kv_heads, head_dim = k.shape[1], k.shape[2]
  groups = q.shape[1] // kv_heads
  q = q.reshape(rows, length, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4) * (scale or head_dim**-0.5)
  k_BKTH = k.reshape(rows, length, kv_heads, head_dim).transpose(0, 2, 1, 3)
  v_BKTH = v.reshape(rows, length, kv_heads, head_dim).transpose(0, 2, 1, 3)
  size = -(-length // min(_BLOCKS, -(-length // _LEAST_BLOCK)))
  parts = []
  for start in range(0, length, size):
    stop = min(start + size, length)
    block = q[:, :, :, start:stop], k_BKTH[:, :, :stop], v_BKTH[:, :, :stop], mask_BTT[:, start:stop, :stop]
    parts.append(_attend(*block, cap))
  out = jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4).reshape(rows * length, kv_heads * groups, head_dim)
  return out, k_BKTH, v_BKTH


def _attend(q, k, v, mask, cap: float = 0.0):
  """Softmax attention of q [B, K, G, T, H] over k, v [B, K, S, H] where mask [B, T, S] allows; scores capped."""
  return _attend_forward(q, k, v, mask, cap)[0] if cap else _attend_uncapped(q, k, v, mask)


@jax.custom_vjp
def _attend_uncapped(q, k, v, mask):
  return _attend_forward(q, k, v, mask)[0]


def _attend_forward(q, k, v, mask, cap: float = 0.0):
  rows, kv_heads, groups, length, head_dim = q.shape
  keys = k.shape[2]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  # One matrix product a kv head: its query heads stand below one another. Rows and kv heads stay dimensions of their own,
  # since they are split over different axes of the mesh.
  q = q.reshape(rows, kv_heads, groups * length, head_dim)
  scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=wide)
  scores = scores.reshape(rows, kv_heads, groups, length, keys)
  scores = jnp.where(mask[:, None, None], _capped(scores, cap), _MASKED)
  weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
  total = jnp.sum(weights, axis=-1).reshape(rows, kv_heads, groups * length, 1)
  weights = weights.reshape(rows, kv_heads, groups * length, keys).astype(v.dtype)
  # Normalised after the product: H columns instead of S.
  out = jnp.einsum("bkts,bksh->bkth", weights, v, preferred_element_type=wide) / total
  return out.astype(v.dtype).reshape(rows, kv_heads, groups, length, head_dim), (q, k, v, weights, total, out)


def _attend_backward(kept, d_out):
  """By hand, to pass over the scores once: with P = weights / total, dS = P (dO Vᵀ - rowsum(dO · O)), 0 where masked."""
  q, k, v, weights, total, out = kept
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


_attend_uncapped.defvjp(_attend_forward, _attend_backward)


def cached_attention(
  q, k, v, cache: Cache, at, fork, index, *, window: int | jax.Array = 0, scale: float = 0.0, cap: float = 0.0
):
  """One joint softmax of each slot's newest token over its lane's trunk and its own suffix.

  Args:
    q: [lanes·slots, N, H]; k, v: [lanes·slots, K, H], rotary positions applied.
    cache: before the newest token.
    at: the layer's number: an int where the cache is a tuple, a traced scalar where it is stacked.
    fork: int32 [lanes, slots]; index: int32 [lanes, slots], the newest tokens' places in their suffixes.
    window: positions that a token sees, its own included; an int that is 0 for all, or an int32 scalar.
    scale, cap: as in `tree_attention`.

  Returns:
    (out [lanes·slots, N, H], the cache with k and v written at `index`).
  """
  lanes, slots = fork.shape
  kv_heads, head_dim = k.shape[1], k.shape[2]
  groups = q.shape[1] // kv_heads
  wide = jnp.promote_types(q.dtype, jnp.float32)
  lane = jnp.arange(lanes)[:, None]
  slot = jnp.arange(slots)[None, :]

  # Of a single row a head's part is written at a time: XLA turns a scatter of one index into an update of a slice, then
  # does that once for the attention and once for the loop's state, and copies the cache for each.
  if lanes * slots == 1:
    place = (lane[..., None], slot[..., None], jnp.arange(kv_heads)[None, None], index[..., None])
  else:
    place = (lane, slot, slice(None), index)

  def write(field, new):
    new = new.reshape(lanes, slots, kv_heads, head_dim)
    if isinstance(field, tuple):
      return field[:at] + (field[at].at[place].set(new),) + field[at + 1 :]
    return field.at[(at, *place)].set(new)

  cache = dataclasses.replace(cache, suffix_k=write(cache.suffix_k, k), suffix_v=write(cache.suffix_v, v))
  trunk_k, trunk_v, suffix_k, suffix_v = cache.trunk_k[at], cache.trunk_v[at], cache.suffix_k[at], cache.suffix_v[at]

  q = q.reshape(lanes, slots, kv_heads, groups, head_dim) * (scale or head_dim**-0.5)
  q_trunk = q.transpose(0, 2, 1, 3, 4).reshape(lanes, kv_heads, slots * groups, head_dim)
  trunk = jnp.einsum("lkqh,lkhc->lkqc", q_trunk, trunk_k, preferred_element_type=wide)
  trunk = trunk.reshape(lanes, kv_heads, slots, groups, -1).transpose(0, 2, 1, 3, 4)
  suffix = jnp.einsum("lskgh,lskth->lskgt", q, suffix_k, preferred_element_type=wide)
  trunk_place, suffix_place = (jnp.arange(scores.shape[-1])[None, None] for scores in (trunk, suffix))
  trunk_mask = trunk_place < fork[..., None]
  suffix_mask = suffix_place <= index[..., None]
  if not isinstance(window, int) or window:  # a trunk's token stands at its place, a suffix's at fork + its place
    trunk_mask &= trunk_place > (fork + index)[..., None] - window
    suffix_mask &= suffix_place > index[..., None] - window
  trunk = jnp.where(trunk_mask[:, :, None, None], _capped(trunk, cap), _MASKED)
  suffix = jnp.where(suffix_mask[:, :, None, None], _capped(suffix, cap), _MASKED)
  top = jnp.maximum(jnp.max(trunk, -1), jnp.max(suffix, -1))[..., None]
  trunk, suffix = jnp.exp(trunk - top), jnp.exp(suffix - top)
  total = jnp.sum(trunk, -1) + jnp.sum(suffix, -1)
  trunk = trunk.transpose(0, 2, 1, 3, 4).reshape(lanes, kv_heads, slots * groups, -1).astype(v.dtype)
  out_trunk = jnp.einsum("lkqc,lkch->lkqh", trunk, trunk_v, preferred_element_type=wide)
  out_trunk = out_trunk.reshape(lanes, kv_heads, slots, groups, head_dim).transpose(0, 2, 1, 3, 4)
  out_suffix = jnp.einsum("lskgt,lskth->lskgh", suffix.astype(v.dtype), suffix_v, preferred_element_type=wide)
  out = (out_trunk + out_suffix) / total[..., None]
  return out.astype(v.dtype).reshape(lanes * slots, kv_heads * groups, head_dim), cache
