"""The decoder as pure functions: `hidden` for trees and for decoding, `logits` for the rows that need them.

Linen modules declare each layer's parameters, initialisers and logical axes, and are applied to slices of one stacked
tree: {"ends": ..., "layers": {name: [Y, ...]}}. Whether the layers are scanned or unrolled never changes that tree.
The cache is an argument and a return value; there is no other state.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.models import attention, layout
from synthneg_jax.models.config import ModelConfig
from synthneg_jax.runtime import mesh as mesh_lib

Params = Any


class _Norm(nn.Module):
  """RMSNorm, in float32 at least: x / sqrt(mean(x²) + ε) · scale (Zhang & Sennrich, https://arxiv.org/abs/1910.07467)."""

  eps: float
  param_dtype: Any

  @nn.compact
  def __call__(self, x_ND):
    scale_D = self.param(
      "scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), x_ND.shape[-1:], self.param_dtype
    )
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    y_ND = x_ND.astype(wide)
    y_ND = y_ND * lax.rsqrt(jnp.mean(y_ND * y_ND, axis=-1, keepdims=True) + self.eps)
    return (y_ND * scale_D.astype(wide)[None]).astype(x_ND.dtype)


class Layer(nn.Module):
  """Attention and gated feed-forward, each behind a norm and added to the stream. Tokens are flat: x is [N, D].

  The attention itself is given: `attend(q, k, v) -> (out, extra)` on [tokens, heads, head_dim] with rotary positions
  already applied; `extra` (new cache entries) is passed back.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x_ND, rotate, attend):
    c = self.config
    dtype = jnp.dtype(c.dtype)
    fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

    def matrix(name, axes, shape, init=fan_in):
      kernel = self.param(
        name, nn.with_logical_partitioning(init, axes), (shape[0], shape[1]), jnp.dtype(c.param_dtype)
      )
      return kernel.astype(dtype)

    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    out_init = nn.initializers.variance_scaling(1.0 / (2 * c.num_layers), "fan_in", "normal")
    num = x_ND.shape[0]
    y_ND = _Norm(c.norm_eps, jnp.dtype(c.param_dtype), name="attention_norm")(x_ND)
    q = (y_ND @ matrix("query", ("embed", "heads"), (c.d_model, heads))).reshape(num, c.num_heads, c.head_dim)
    k = (y_ND @ matrix("key", ("embed", "kv_heads"), (c.d_model, kv_heads))).reshape(num, c.num_kv_heads, c.head_dim)
    v = (y_ND @ matrix("value", ("embed", "kv_heads"), (c.d_model, kv_heads))).reshape(num, c.num_kv_heads, c.head_dim)
    out, extra = attend(rotate(q), rotate(k), v)
    x_ND = x_ND + out.reshape(num, heads) @ matrix("output", ("heads", "embed"), (heads, c.d_model), out_init)

    y_ND = _Norm(c.norm_eps, jnp.dtype(c.param_dtype), name="mlp_norm")(x_ND)
    gate = nn.silu(y_ND @ matrix("gate", ("embed", "mlp"), (c.d_model, c.d_ff)))
    up = y_ND @ matrix("up", ("embed", "mlp"), (c.d_model, c.d_ff))
    return x_ND + (gate * up) @ matrix("down", ("mlp", "embed"), (c.d_ff, c.d_model), out_init), extra


class Ends(nn.Module):
  """The embedding, the last norm and the output matrix."""

  config: ModelConfig

  def setup(self):
    c = self.config
    dtype = jnp.dtype(c.param_dtype)
    init = nn.initializers.normal(c.d_model**-0.5)
    shape = (c.vocab_size, c.d_model)
    self.embedding = self.param("embedding", nn.with_logical_partitioning(init, ("vocab", "embed")), shape, dtype)
    if not c.tie_embeddings:
      self.unembedding = self.param("unembedding", nn.with_logical_partitioning(init, ("vocab", "embed")), shape, dtype)
    self.norm = _Norm(c.norm_eps, dtype)

  def embed(self, token_N):
    return self.embedding[token_N].astype(jnp.dtype(self.config.dtype))

  def last_norm(self, x_ND):
    return self.norm(x_ND)

  def logits(self, h_ND):
    matrix_VD = self.embedding if self.config.tie_embeddings else self.unembedding
    dtype = jnp.dtype(self.config.dtype)
    # Of a flat list of tokens: with two dimensions to sum over, the matrix's gradient would take a turned copy of all logits.
    logits_NV = lax.dot_general(
      h_ND.reshape(-1, h_ND.shape[-1]).astype(dtype),
      matrix_VD.astype(dtype),
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )
    return logits_NV.reshape(*h_ND.shape[:-1], -1)

  def __call__(self, token_N):
    return self.logits(self.last_norm(self.embed(token_N)))


@dataclasses.dataclass(frozen=True)
class Model:
  """The two functions that other rooms see, over explicit parameters."""

  config: ModelConfig

  def init(self, key: jax.Array) -> Params:
    """Random parameters: {"ends": {...}, "layers": {...: [Y, ...]}}."""
    return nn.unbox(self._boxed_init(key))

  def abstract_params(self) -> Params:
    """Shapes and dtypes of the parameters, nothing computed."""
    return jax.eval_shape(self.init, jax.random.key(0))

  def logical_axes(self) -> Params:
    """For each parameter a tuple of logical axis names; runtime/mesh.py maps them to mesh axes."""
    boxed = jax.eval_shape(self._boxed_init, jax.random.key(0))
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    names = lambda prefix, part: jax.tree.map(lambda box: prefix + box.names, part, is_leaf=is_box)
    return {"ends": names((), boxed["ends"]), "layers": names(("layers",), boxed["layers"])}

  def _boxed_init(self, key):
    c = self.config
    ends_key, layers_key = jax.random.split(key)
    identity = lambda x: x
    attend = lambda q, k, v: (q, None)

    def init_layer(layer_key):
      return Layer(c).init(layer_key, jnp.zeros((1, c.d_model), jnp.dtype(c.dtype)), identity, attend)["params"]

    layers = jax.vmap(init_layer)(jax.random.split(layers_key, c.num_layers))
    return {"ends": Ends(c).init(ends_key, jnp.zeros(1, jnp.int32))["params"], "layers": layers}

  def unstack(self, params: Params) -> Params:
    """The same parameters with a tuple of single layers, for loops on CPU that would slice the stack at each turn."""
    return layout.apart(params)

  def hidden(self, params: Params, trees: tree_lib.PackedTrees, *, with_cache: bool = False):
    """Hidden states of packed trees.

    Args:
      params: as from `init`.
      trees: fields [B, T].
      with_cache: also return every layer's keys and values, for a cache of these rows.

    Returns:
      (h [B, T, D] after the last norm, cache), cache None or (k, v), each [Y, B, K, T, H] (a tuple of Y arrays where the
      layers are unrolled).
    """
    c = self.config
    num_rows, length = trees.token.shape
    mask_BTT = tree_lib.attention_mask(trees)
    rotate = attention.rotary(trees.position.reshape(-1), length, c.head_dim, c.rope_theta, jnp.dtype(c.dtype))

    def attend(q, k, v):
      out, k_BKTH, v_BKTH = attention.tree_attention(q, k, v, mask_BTT)
      return out, ((k_BKTH, v_BKTH) if with_cache else None)

    def layer(x_ND, layer_params):
      x_ND, extra = Layer(c).apply({"params": layer_params}, mesh_lib.split_rows(x_ND), rotate, attend)
      return mesh_lib.split_rows(x_ND), extra

    layer = jax.checkpoint(layer) if c.remat else layer
    x_ND = Ends(c).apply({"params": params["ends"]}, trees.token.reshape(-1), method="embed")
    if c.scan_layers:
      x_ND, cache = lax.scan(layer, x_ND, params["layers"])
    else:
      pairs = []
      for layer_params in self.unstack(params)["layers"]:
        x_ND, pair = layer(x_ND, layer_params)
        pairs.append(pair)
      cache = tuple(zip(*pairs, strict=True)) if with_cache else None
    h_ND = Ends(c).apply({"params": params["ends"]}, x_ND, method="last_norm")
    return h_ND.reshape(num_rows, length, c.d_model), cache

  def hidden_step(self, params: Params, token, fork, index, cache):
    """One more token for every slot: a branch grows by one.

    Args:
      params: as from `init`, or from `unstack`.
      token: int32 [lanes, slots], the branches' newest tokens.
      fork: int32 [lanes, slots], trunk tokens that each branch sees.
      index: int32 [lanes, slots], the newest tokens' places in their branches, from 0.
      cache: attention.Cache.

    Returns:
      (h [lanes, slots, D] after the last norm, the cache with the new tokens' keys and values).
    """
    c = self.config
    lanes, slots = token.shape
    positions = cache.num_positions
    rotate = attention.rotary((fork + index).reshape(-1), positions, c.head_dim, c.rope_theta, jnp.dtype(c.dtype))

    def layer(x_ND, layer_params, cache, at):
      attend = lambda q, k, v: attention.cached_attention(q, k, v, cache, at, fork, index)
      x_ND, extra = Layer(c).apply({"params": layer_params}, mesh_lib.split_rows(x_ND), rotate, attend)
      return mesh_lib.split_rows(x_ND), extra

    x_ND = Ends(c).apply({"params": params["ends"]}, token.reshape(-1), method="embed")
    if isinstance(params["layers"], tuple):
      for at, layer_params in enumerate(params["layers"]):
        x_ND, cache = layer(x_ND, layer_params, cache, at)
    else:

      def body(carry, layer_params_and_at):
        return layer(carry[0], layer_params_and_at[0], carry[1], layer_params_and_at[1]), None

      (x_ND, cache), _ = lax.scan(body, (x_ND, cache), (params["layers"], jnp.arange(c.num_layers)))
    h_ND = Ends(c).apply({"params": params["ends"]}, x_ND, method="last_norm")
    return h_ND.reshape(lanes, slots, c.d_model), cache

  def logits(self, params: Params, h_ND: jax.Array) -> jax.Array:
    """Logits [..., V], float32 at least, of hidden states [..., D]: gather the rows that you need first."""
    return Ends(self.config).apply({"params": params["ends"]}, h_ND, method="logits")
