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
from jax.ad_checkpoint import checkpoint_name

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.models import attention, layer_stacking
from synthneg_jax.models.config import ModelConfig
from synthneg_jax.runtime import device_mesh

Params = Any

_PRODUCT = "product"  # names the matrix products that selective rematerialisation keeps
_PRODUCTS_KEPT = jax.checkpoint_policies.save_only_these_names(_PRODUCT)


class _Norm(nn.Module):
  """RMSNorm, in float32 at least: x / sqrt(mean(x²) + ε) · (scale + offset), over the last dimension.

  See Zhang & Sennrich, https://arxiv.org/abs/1910.07467.
  """

  eps: float
  param_dtype: Any
  offset: float = 0.0

  @nn.compact
  def __call__(self, x_ND):
    init = nn.initializers.constant(1.0 - self.offset)
    scale_D = self.param("scale", nn.with_logical_partitioning(init, ("norm",)), x_ND.shape[-1:], self.param_dtype)
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    y_ND = x_ND.astype(wide)
    y_ND = y_ND * lax.rsqrt(jnp.mean(y_ND * y_ND, axis=-1, keepdims=True) + self.eps)
    scale_D = scale_D.astype(wide) + self.offset if self.offset else scale_D.astype(wide)
    return (y_ND * jnp.expand_dims(scale_D, tuple(range(y_ND.ndim - 1)))).astype(x_ND.dtype)


_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": lambda x: nn.gelu(x, approximate=True)}


class Layer(nn.Module):
  """Attention and gated feed-forward, each behind a norm and added to the stream. Tokens are flat: x is [N, D].

  The attention itself is given: `attend(q, k, v) -> (out, extra)` on [tokens, heads, head_dim] with rotary positions
  already applied; `extra` (new cache entries) is passed back. `adapter` may hold {"a": [in, r], "b": [r, out]} for a
  matrix by its name; the matrix then acts as if a·b were added to it (models/adapter.py).
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x_ND, rotate, attend, adapter=None):
    c = self.config
    dtype = jnp.dtype(c.dtype)
    fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    adapter, biased = adapter or {}, ("query", "key", "value") if c.qkv_bias else ()

    def matrix(name, axes, shape, init=fan_in):
      kernel = self.param(
        name, nn.with_logical_partitioning(init, axes), (shape[0], shape[1]), jnp.dtype(c.param_dtype)
      )
      return device_mesh.split_as(kernel.astype(dtype), axes)

    def product(y_ND, name, axes, shape, init=fan_in):
      out_NO = y_ND @ matrix(name, axes, shape, init)
      if name in biased:
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes[1:])
        bias_O = self.param(f"{name}_bias", zeros, shape[1:], jnp.dtype(c.param_dtype))
        out_NO += bias_O.astype(dtype)[None]
      if name in adapter:
        out_NO += (y_ND @ adapter[name]["a"].astype(dtype)) @ adapter[name]["b"].astype(dtype)
      return out_NO

    kept = lambda *product_args: checkpoint_name(product(*product_args), _PRODUCT)

    def in_heads(name, logical, count):
      out = kept(y_ND, name, ("embed", logical), (c.d_model, count * c.head_dim))
      return device_mesh.split_as(out.reshape(num, count, c.head_dim), ("rows", logical, None))

    norm = lambda name: _Norm(c.norm_eps, jnp.dtype(c.param_dtype), c.norm_offset, name=name)
    after = norm if c.post_norms else lambda name: lambda y_ND: y_ND
    out_init = nn.initializers.variance_scaling(1.0 / (2 * c.num_layers), "fan_in", "normal")
    num, heads = x_ND.shape[0], c.num_heads * c.head_dim
    with jax.named_scope("attention"):
      y_ND = norm("attention_norm")(x_ND)
      q = in_heads("query", "heads", c.num_heads)
      k, v = (in_heads(name, "kv_heads", c.num_kv_heads) for name in ("key", "value"))
      if c.qk_norm:
        q, k = norm("query_norm")(q), norm("key_norm")(k)
      out, extra = attend(rotate(q), rotate(k), v)
      y_ND = kept(out.reshape(num, heads), "output", ("heads", "embed"), (heads, c.d_model), out_init)
      x_ND = x_ND + after("attention_post_norm")(y_ND)

    with jax.named_scope("feed_forward"):
      y_ND = norm("mlp_norm")(x_ND)
      gate = _ACTIVATIONS[c.activation](kept(y_ND, "gate", ("embed", "mlp"), (c.d_model, c.d_ff)))
      up = kept(y_ND, "up", ("embed", "mlp"), (c.d_model, c.d_ff))
      y_ND = product(gate * up, "down", ("mlp", "embed"), (c.d_ff, c.d_model), out_init)
      return x_ND + after("mlp_post_norm")(y_ND), extra


class Ends(nn.Module):
  """The embedding, the last norm and the output matrix."""

  config: ModelConfig

  def setup(self):
    """The parameters: embedding and unembedding [V, D], and the last norm's scale [D]."""
    c = self.config
    dtype = jnp.dtype(c.param_dtype)
    init = nn.initializers.normal(c.d_model**-0.5)
    shape = (c.vocab_size, c.d_model)
    self.embedding = self.param("embedding", nn.with_logical_partitioning(init, ("vocab", "embed")), shape, dtype)
    if not c.tie_embeddings:
      self.unembedding = self.param("unembedding", nn.with_logical_partitioning(init, ("vocab", "embed")), shape, dtype)
    self.norm = _Norm(c.norm_eps, dtype, c.norm_offset)

  def embed(self, token_N):
    """The stream [N, D] of token ids [N], times the family's embedding scale."""
    x_ND = self.embedding[token_N].astype(jnp.dtype(self.config.dtype))
    return x_ND if self.config.embedding_scale == 1.0 else x_ND * jnp.asarray(self.config.embedding_scale, x_ND.dtype)

  def last_norm(self, x_ND):
    """The stream [N, D] after the last norm."""
    return self.norm(x_ND)

  def logits(self, h_ND):
    """Logits [..., V], float32 at least, of normed hidden states [..., D]; capped where the family caps."""
    matrix_VD = self.embedding if self.config.tie_embeddings else self.unembedding
    dtype = jnp.dtype(self.config.dtype)
    # Of a flat list of tokens: with two dimensions to sum over, the matrix's gradient would take a turned copy of all logits.
    logits_NV = lax.dot_general(
      h_ND.reshape(-1, h_ND.shape[-1]).astype(dtype),
      matrix_VD.astype(dtype),
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )
    logits = logits_NV.reshape(*h_ND.shape[:-1], -1)
    cap = self.config.logit_cap
    return cap * jnp.tanh(logits / cap) if cap else logits

  def __call__(self, token_N):
    return self.logits(self.last_norm(self.embed(token_N)))


def _joined(params: Params) -> Params:
  """An adapter's matrices stand beside those that they are added to."""
  if "adapter" not in params or isinstance(params["layers"], tuple):
    return params
  return {"ends": params["ends"], "layers": {**params["layers"], "adapter": params["adapter"]}}


def _apply(c: ModelConfig, layer_params, x_ND, rotate, attend):
  own = {name: leaf for name, leaf in layer_params.items() if name != "adapter"}
  adapter = layer_params.get("adapter")
  x_ND, extra = Layer(c).apply({"params": own}, device_mesh.split_rows(x_ND), rotate, attend, adapter)
  return device_mesh.split_rows(x_ND), extra


def _scanned(windows: tuple[int, ...]):
  """int32 [Y] where layers differ, None where they do not."""
  return jnp.asarray(windows, jnp.int32) if len(set(windows)) > 1 else None


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
    """For each parameter a tuple of logical axis names; runtime/device_mesh.py maps them to mesh axes."""
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
    return layer_stacking.apart(_joined(params))

  def _of_window(self, make):
    """make(window) for every window that layers have, as a function of a layer's window: an int, or a traced scalar."""
    made = {window: make(window) for window in set(self.config.layer_windows)}

    def of(window):
      if isinstance(window, int):
        return made[window]
      return jax.tree.map(
        lambda windowed, plain: jnp.where(window > 0, windowed, plain), made[self.config.window], made[0]
      )

    return of

  def _rotation(self, position_N, num_positions: int):
    """The rotation of queries and keys as a function of a layer's window: windowed layers may have a base of their own."""
    c = self.config

    def make(window):
      windowed = window > 0 and c.windowed_rope_theta > 0
      theta, scaling = (c.windowed_rope_theta, None) if windowed else (c.rope_theta, c.rope_scaling)
      return attention.rotary(position_N, num_positions, c.head_dim, theta, jnp.dtype(c.dtype), scaling)

    if not c.windowed_rope_theta:
      every = make(0)
      return lambda window: every
    made = {window: make(window) for window in set(c.layer_windows)}

    def of(window):
      if isinstance(window, int):
        return made[window]
      return lambda x: jnp.where(window > 0, made[c.window](x), made[0](x))

    return of

  @jax.named_scope("hidden")
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
    mask_of = self._of_window(lambda window: tree_lib.attention_mask(trees, window))
    rotate_of = self._rotation(trees.position.reshape(-1), length)

    def layer_with(window):
      def attend(q, k, v):
        mask_BTT = mask_of(window)
        out, k_BKTH, v_BKTH = attention.tree_attention(q, k, v, mask_BTT, scale=c.score_scale, cap=c.attention_cap)
        return out, ((k_BKTH, v_BKTH) if with_cache else None)

      def layer(x_ND, layer_params):
        return _apply(c, layer_params, x_ND, rotate_of(window), attend)

      if c.remat == "none":
        return layer
      policy = _PRODUCTS_KEPT if c.remat == "selective" else None
      return jax.checkpoint(layer, policy=policy, prevent_cse=not c.scan_layers)  # a scan keeps the two passes apart

    x_ND = Ends(c).apply({"params": params["ends"]}, trees.token.reshape(-1), method="embed")
    if c.scan_layers:
      windows = _scanned(c.layer_windows)
      same = c.layer_windows[0] if windows is None else None
      body = lambda x_ND, xs: layer_with(same if xs[1] is None else xs[1])(x_ND, xs[0])
      x_ND, cache = lax.scan(body, x_ND, (_joined(params)["layers"], windows))
    else:
      pairs = []
      for layer_params, window in zip(self.unstack(params)["layers"], c.layer_windows, strict=True):
        x_ND, pair = layer_with(window)(x_ND, layer_params)
        pairs.append(pair)
      cache = tuple(zip(*pairs, strict=True)) if with_cache else None
    h_ND = Ends(c).apply({"params": params["ends"]}, x_ND, method="last_norm")
    return h_ND.reshape(num_rows, length, c.d_model), cache

  @jax.named_scope("hidden_step")
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
    rotate_of = self._rotation((fork + index).reshape(-1), cache.num_positions)

    def layer(x_ND, layer_params, cache, at, window):
      how = {"window": window, "scale": c.score_scale, "cap": c.attention_cap}
      if not isinstance(window, int):
        how["window"] = jnp.where(window > 0, window, cache.num_positions)
      attend = lambda q, k, v: attention.cached_attention(q, k, v, cache, at, fork, index, **how)
      return _apply(c, layer_params, x_ND, rotate_of(window), attend)

    x_ND = Ends(c).apply({"params": params["ends"]}, token.reshape(-1), method="embed")
    if isinstance(params["layers"], tuple):
      for at, (layer_params, window) in enumerate(zip(params["layers"], c.layer_windows, strict=True)):
        x_ND, cache = layer(x_ND, layer_params, cache, at, window)
    else:
      windows = _scanned(c.layer_windows)

      def body(carry, xs):
        layer_params, at, window = xs
        return layer(carry[0], layer_params, carry[1], at, c.layer_windows[0] if window is None else window), None

      xs = (_joined(params)["layers"], jnp.arange(c.num_layers), windows)
      (x_ND, cache), _ = lax.scan(body, (x_ND, cache), xs)
    h_ND = Ends(c).apply({"params": params["ends"]}, x_ND, method="last_norm")
    return h_ND.reshape(lanes, slots, c.d_model), cache

  @jax.named_scope("logits")
  def logits(self, params: Params, h_ND: jax.Array) -> jax.Array:
    """Logits [..., V], float32 at least, of hidden states [..., D]: gather the rows that you need first."""
    return Ends(self.config).apply({"params": params["ends"]}, h_ND, method="logits")
