"""The decoder as pure functions: hidden states of packed trees and of decoding steps, and logits.

Linen modules declare the parameters of a layer, their initialisers and logical axes, and are
applied to slices of one stacked tree, {"ends": ..., "layers": {name: [Y, ...]}}, whether layers are
scanned or unrolled. The cache is an argument and a return value; nothing else is stateful.
"""

import dataclasses
import functools
from collections.abc import Callable
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

_PRODUCT = "product"  # checkpoint name of the matrix products that remat="selective" saves
_SAVE_PRODUCTS = jax.checkpoint_policies.save_only_these_names(_PRODUCT)


class _Norm(nn.Module):
  """RMSNorm over the last dimension:  x / sqrt(mean(x²) + ε) · (scale + offset).

  Computed in at least float32. See Zhang & Sennrich, https://arxiv.org/abs/1910.07467.
  """

  eps: float
  param_dtype: Any
  offset: float = 0.0

  @nn.compact
  def __call__(self, x_ND):
    init = nn.initializers.constant(1.0 - self.offset)
    scale_D = self.param(
      "scale", nn.with_logical_partitioning(init, ("norm",)), x_ND.shape[-1:], self.param_dtype
    )
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    y_ND = x_ND.astype(wide)
    y_ND = y_ND * lax.rsqrt(jnp.mean(y_ND * y_ND, axis=-1, keepdims=True) + self.eps)
    scale_D = scale_D.astype(wide) + self.offset if self.offset else scale_D.astype(wide)
    return (y_ND * jnp.expand_dims(scale_D, tuple(range(y_ND.ndim - 1)))).astype(x_ND.dtype)


def _gelu_tanh(x):
  return nn.gelu(x, approximate=True)


_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": _gelu_tanh}


def _biased(c: ModelConfig) -> tuple[str, ...]:
  """The matrices of a layer that have biases."""
  names = ("query", "key", "value") if c.qkv_bias else ()
  names += ("output",) if c.output_bias else ()
  return names + (("gate", "up", "down") if c.mlp_bias else ())


def _unrotated(x):
  return x


class Layer(nn.Module):
  """Attention and gated feed-forward with residual sums, and norms before or after each.

  The caller supplies the attention: `attend(q, k, v) -> (out, extra)` on [tokens, heads, head_dim]
  with rotary positions already applied; `extra` (new cache entries) is returned to the caller.
  `adapter` may contain {"a": [in, r], "b": [r, out]} under the name of a matrix, which then acts as
  if a·b were added to it (models/adapter.py).
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x_ND, rotate, attend, *, adapter=None):
    """Returns (the stream [N, D] after the layer, `extra`); tokens are flat, x is [N, D]."""
    c = self.config
    dtype = jnp.dtype(c.dtype)
    fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    adapter, biased = adapter or {}, _biased(c)

    def matrix(name, axes, *, shape, init):
      kernel = self.param(
        name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(c.param_dtype)
      )
      return device_mesh.split_as(kernel.astype(dtype), axes)

    def product(y_ND, name, axes, *, shape, init=fan_in):
      """y times the named matrix [in, out], plus its bias and adapter, if any."""
      out_NO = _matmul(y_ND, matrix(name, axes, shape=shape, init=init))
      if name in biased:
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes[1:])
        bias_O = self.param(f"{name}_bias", zeros, shape[1:], jnp.dtype(c.param_dtype))
        out_NO += bias_O.astype(dtype)[None]
      if name in adapter:
        out_NO += (y_ND @ adapter[name]["a"].astype(dtype)) @ adapter[name]["b"].astype(dtype)
      return out_NO

    def saved_product(y_ND, name, axes, **kwargs):
      """A product that remat="selective" saves for the backward pass."""
      return checkpoint_name(product(y_ND, name, axes, **kwargs), _PRODUCT)

    def in_heads(y_ND, name, *, logical, count):
      out = saved_product(y_ND, name, ("embed", logical), shape=(c.d_model, count * c.head_dim))
      if c.qk_norm == "all" and name in ("query", "key"):
        out = norm(f"{name}_norm", out)
      return device_mesh.split_as(out.reshape(num, count, c.head_dim), ("rows", logical, None))

    def norm(name, y):
      return _Norm(c.norm_eps, jnp.dtype(c.param_dtype), c.norm_offset, name=name)(y)

    def pre_norm(name, y_ND):
      return norm(name, y_ND) if c.pre_norms else y_ND

    def add_residual(x_ND, y_ND, name):
      y_ND = norm(name, y_ND) if c.post_norms else y_ND
      if c.residual_scale != 1.0:
        y_ND *= jnp.asarray(c.residual_scale, dtype)
      return x_ND + y_ND

    out_init = nn.initializers.variance_scaling(1.0 / (2 * c.num_layers), "fan_in", "normal")
    num, heads = x_ND.shape[0], c.num_heads * c.head_dim
    with jax.named_scope("attention"):
      y_ND = pre_norm("attention_norm", x_ND)
      q = in_heads(y_ND, "query", logical="heads", count=c.num_heads)
      k = in_heads(y_ND, "key", logical="kv_heads", count=c.num_kv_heads)
      v = in_heads(y_ND, "value", logical="kv_heads", count=c.num_kv_heads)
      if c.qk_norm == "head":
        q, k = norm("query_norm", q), norm("key_norm", k)
      out, extra = attend(rotate(q), rotate(k), v)
      out = out.reshape(num, heads)
      y_ND = saved_product(
        out, "output", ("heads", "embed"), shape=(heads, c.d_model), init=out_init
      )
      x_ND = add_residual(x_ND, y_ND, "attention_post_norm")

    with jax.named_scope("feed_forward"):
      y_ND = pre_norm("mlp_norm", x_ND)
      gate = saved_product(y_ND, "gate", ("embed", "mlp"), shape=(c.d_model, c.d_ff))
      gate = _ACTIVATIONS[c.activation](gate)
      up = saved_product(y_ND, "up", ("embed", "mlp"), shape=(c.d_model, c.d_ff))
      y_ND = product(gate * up, "down", ("mlp", "embed"), shape=(c.d_ff, c.d_model), init=out_init)
      return add_residual(x_ND, y_ND, "mlp_post_norm"), extra


def _contract(a, b, *, a_axis: int, b_axis: int):
  """a·b over one axis of each, accumulated and returned in at least float32."""
  wide = jnp.promote_types(a.dtype, jnp.float32)
  return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_on_cpu(a_NK, b, b_axis: int):
  """a·b over b's axis in at least float32; the products of its gradient are computed alike.

  XLA on CPU multiplies bfloat16 in hardware (AMX, AVX512_BF16) only if the result is float32, and
  otherwise widens the operands first.
  """
  return _contract(a_NK, b, a_axis=1, b_axis=b_axis)


def _forward_on_cpu(a_NK, b, b_axis: int):
  return _product_on_cpu(a_NK, b, b_axis), (a_NK, b)


def _backward_on_cpu(b_axis: int, operands, grad_NM):
  a_NK, b = operands
  grad_NM = grad_NM.astype(a_NK.dtype)
  grad_a = _contract(grad_NM, b, a_axis=1, b_axis=1 - b_axis)
  factors = (grad_NM, a_NK) if b_axis else (a_NK, grad_NM)
  grad_b = _contract(*factors, a_axis=0, b_axis=0)
  return grad_a.astype(a_NK.dtype), grad_b.astype(b.dtype)


_product_on_cpu.defvjp(_forward_on_cpu, _backward_on_cpu)


def _matmul(x_NI, kernel_IO):
  """x·kernel [N, O] in x's dtype."""
  if x_NI.dtype != jnp.bfloat16:
    return x_NI @ kernel_IO
  return lax.platform_dependent(
    *(x_NI, kernel_IO),
    cpu=lambda x, kernel: _product_on_cpu(x, kernel, 0).astype(x.dtype),
    default=jnp.matmul,
  )


def _logits(h_ND, matrix_VD):
  """h·matrixᵀ [N, V] in at least float32."""
  plain = functools.partial(_contract, a_axis=1, b_axis=1)
  if h_ND.dtype != jnp.bfloat16:
    return plain(h_ND, matrix_VD)
  return lax.platform_dependent(
    *(h_ND, matrix_VD),
    cpu=lambda h, matrix: _product_on_cpu(h, matrix, 1),
    default=plain,
  )


class Ends(nn.Module):
  """The embedding, the final norm and the output matrix."""

  config: ModelConfig

  def setup(self):
    """Declares embedding and unembedding [V, D], and the scale of the final norm [D]."""
    c = self.config
    dtype = jnp.dtype(c.param_dtype)
    init = nn.initializers.normal(c.d_model**-0.5)
    shape = (c.vocab_size, c.d_model)
    self.embedding = self.param(
      "embedding", nn.with_logical_partitioning(init, ("vocab", "embed")), shape, dtype
    )
    if not c.tie_embeddings:
      self.unembedding = self.param(
        "unembedding", nn.with_logical_partitioning(init, ("vocab", "embed")), shape, dtype
      )
    self.norm = _Norm(c.norm_eps, dtype, c.norm_offset)

  def embed(self, token_N):
    """Scaled embeddings [N, D] of token ids [N]."""
    x_ND = self.embedding[token_N].astype(jnp.dtype(self.config.dtype))
    if self.config.embedding_scale != 1.0:
      x_ND *= jnp.asarray(self.config.embedding_scale, x_ND.dtype)
    return x_ND

  def final_norm(self, x_ND):
    """The stream [N, D] after the final norm."""
    return self.norm(x_ND)

  def logits(self, h_ND):
    """Logits [..., V] in at least float32 of normalised hidden states [..., D]."""
    matrix_VD = self.embedding if self.config.tie_embeddings else self.unembedding
    dtype = jnp.dtype(self.config.dtype)
    # Flattened: with two dimensions to sum over, the gradient of the matrix would need a transposed
    # copy of all logits.
    logits_NV = _logits(h_ND.reshape(-1, h_ND.shape[-1]).astype(dtype), matrix_VD.astype(dtype))
    logits = logits_NV.reshape(*h_ND.shape[:-1], -1)
    if self.config.logit_divisor != 1.0:
      logits /= self.config.logit_divisor
    cap = self.config.logit_cap
    return cap * jnp.tanh(logits / cap) if cap else logits

  def __call__(self, token_N):
    return self.logits(self.final_norm(self.embed(token_N)))


def _with_adapter_in_layers(params: Params) -> Params:
  """Moves the adapter, if any, into "layers", so that it is scanned or unstacked with them."""
  if "adapter" not in params or isinstance(params["layers"], tuple):
    return params
  return {"ends": params["ends"], "layers": {**params["layers"], "adapter": params["adapter"]}}


def _apply_layer(c: ModelConfig, layer_params, x_ND, *, rotate, attend):
  """`Layer` with its parameters and adapter: (the stream [N, D] after it, `extra`)."""
  base = {name: leaf for name, leaf in layer_params.items() if name != "adapter"}
  adapter = layer_params.get("adapter")
  x_ND, extra = Layer(c).apply(
    {"params": base}, device_mesh.split_rows(x_ND), rotate, attend, adapter=adapter
  )
  return device_mesh.split_rows(x_ND), extra


def _is_box(leaf) -> bool:
  return isinstance(leaf, nn.LogicallyPartitioned)


def _axis_names(boxed, prefix: tuple[str, ...] = ()):
  """The logical axes of each parameter, preceded by `prefix`."""
  return jax.tree.map(lambda box: prefix + box.names, boxed, is_leaf=_is_box)


@dataclasses.dataclass(frozen=True)
class Model:
  """The decoder's functions over explicit parameters."""

  config: ModelConfig

  def init(self, key: jax.Array) -> Params:
    """Random parameters: {"ends": {...}, "layers": {...: [Y, ...]}}."""
    return nn.unbox(self._boxed_init(key))

  def abstract_params(self) -> Params:
    """Shapes and dtypes of the parameters."""
    return jax.eval_shape(self.init, jax.random.key(0))

  def logical_axes(self) -> Params:
    """Logical axis names of each parameter; runtime/device_mesh.py maps them to mesh axes."""
    boxed = jax.eval_shape(self._boxed_init, jax.random.key(0))
    return {"ends": _axis_names(boxed["ends"]), "layers": _axis_names(boxed["layers"], ("layers",))}

  def _boxed_init(self, key):
    c = self.config
    ends_key, layers_key = jax.random.split(key)

    def attend(q, k, v):  # attention and rotation have no parameters
      return q, None

    def init_layer(layer_key):
      x_ND = jnp.zeros((1, c.d_model), jnp.dtype(c.dtype))
      return Layer(c).init(layer_key, x_ND, _unrotated, attend)["params"]

    layers = jax.vmap(init_layer)(jax.random.split(layers_key, c.num_layers))
    return {"ends": Ends(c).init(ends_key, jnp.zeros(1, jnp.int32))["params"], "layers": layers}

  def unstack(self, params: Params) -> Params:
    """The parameters with a tuple of single layers, for unrolled loops; see layer_stacking.py."""
    return layer_stacking.unstack(_with_adapter_in_layers(params))

  @property
  def _scoring(self) -> attention.Scoring:
    return attention.Scoring(scale=self.config.score_scale, cap=self.config.attention_cap)

  def _ends(self, params: Params, x, method: str):
    """Applies a method of `Ends`."""
    return Ends(self.config).apply({"params": params["ends"]}, x, method=method)

  def _rotations(self, position_N, num_positions: int) -> dict[str, Callable]:
    """Functions that rotate queries or keys [N, heads, H], by the kinds of `layer_rotations`."""
    c = self.config
    rotary_dim = c.rotary_dim or c.head_dim

    def rotation(kind):
      if kind == "none":
        return _unrotated
      is_windowed = kind == "windowed"
      rotate = attention.rotary(
        position_N,
        num_positions,
        head_dim=rotary_dim,
        theta=c.windowed_rope_theta if is_windowed else c.rope_theta,
        dtype=jnp.dtype(c.dtype),
        scaling=None if is_windowed else c.rope_scaling,
      )
      if rotary_dim == c.head_dim:
        return rotate
      return lambda x: jnp.concatenate([rotate(x[..., :rotary_dim]), x[..., rotary_dim:]], axis=-1)

    return {kind: rotation(kind) for kind in sorted(set(c.layer_rotations))}

  def _layer_kinds(self, rotations: dict[str, Callable], num_positions: int):
    """(windows, indices into `rotations`), both int32 [Y], for a scan over layers that differ.

    The window of a layer without one is `num_positions`.
    """
    windows = [window or num_positions for window in self.config.layer_windows]
    indices = [list(rotations).index(kind) for kind in self.config.layer_rotations]
    return jnp.asarray(windows, jnp.int32), jnp.asarray(indices, jnp.int32)

  def _select_rotation(self, index, rotations: dict[str, Callable]) -> Callable:
    """The rotation with the given index, which may be a traced scalar."""
    first, *others = rotations.values()

    def rotate(x):
      rotated = first(x)
      for i, other in enumerate(others, start=1):
        rotated = jnp.where(index == i, other(x), rotated)
      return rotated

    return rotate

  @jax.named_scope("hidden")
  def hidden(self, params: Params, trees: tree_lib.PackedTrees, *, with_cache: bool = False):
    """Hidden states of packed trees.

    Args:
      params: from `init`, or from `unstack` if layers are unrolled.
      trees: fields [B, T].
      with_cache: also return the keys and values of all layers.

    Returns:
      (h [B, T, D] after the final norm, cache): cache is None or (k, v), each [Y, B, K, T, H], or a
      tuple of Y arrays if layers are unrolled.
    """
    x_ND = self._ends(params, trees.token.reshape(-1), "embed")
    layers = self._scanned_layers if self.config.scan_layers else self._unrolled_layers
    x_ND, cache = layers(params, x_ND, trees, with_cache=with_cache)
    h_ND = self._ends(params, x_ND, "final_norm")
    return h_ND.reshape(*trees.token.shape, -1), cache

  def _unrolled_layers(
    self, params: Params, x_ND, trees: tree_lib.PackedTrees, *, with_cache: bool
  ):
    """The layers of `hidden` as a Python loop."""
    c, keys, pairs = self.config, tree_lib.row_keys(trees), []
    rotations = self._rotations(trees.position.reshape(-1), trees.token.shape[1])
    layers = zip(self.unstack(params)["layers"], c.layer_windows, c.layer_rotations, strict=True)
    for layer_params, window, kind in layers:
      layer = self._tree_layer(keys, window, rotations[kind], with_cache=with_cache)
      x_ND, pair = layer(x_ND, layer_params)
      pairs.append(pair)
    return x_ND, tuple(zip(*pairs, strict=True)) if with_cache else None

  def _scanned_layers(self, params: Params, x_ND, trees: tree_lib.PackedTrees, *, with_cache: bool):
    """The layers of `hidden` as a scan, over windows and rotations too if these differ."""
    windows, keys = set(self.config.layer_windows), tree_lib.row_keys(trees)
    rotations = self._rotations(trees.position.reshape(-1), trees.token.shape[1])
    layers = _with_adapter_in_layers(params)["layers"]
    if len(windows) == len(rotations) == 1:
      (window,), (rotate,) = windows, rotations.values()
      return lax.scan(self._tree_layer(keys, window, rotate, with_cache=with_cache), x_ND, layers)

    def body(x_ND, xs):
      layer_params, (window, kind) = xs
      window = self.config.layer_windows[0] if len(windows) == 1 else window
      rotate = self._select_rotation(kind, rotations)
      return self._tree_layer(keys, window, rotate, with_cache=with_cache)(x_ND, layer_params)

    return lax.scan(body, x_ND, (layers, self._layer_kinds(rotations, trees.token.shape[1])))

  def _tree_layer(self, keys: tree_lib.Keys, window, rotate: Callable, *, with_cache: bool):
    """Returns layer(x [N, D], its parameters) -> (x, (keys, values) or None), rematerialised.

    Args:
      keys: positions and extents of the rows' tokens, fields [B, T].
      window: see `attention.tree_attention`.
      rotate: applies rotary positions.
      with_cache: also return keys and values [B, K, T, H].
    """
    c = self.config

    def attend(q, k, v):
      out, k_BKTH, v_BKTH = attention.tree_attention(
        q, k, v, keys=keys, window=window, scoring=self._scoring
      )
      return out, ((k_BKTH, v_BKTH) if with_cache else None)

    def layer(x_ND, layer_params):
      return _apply_layer(c, layer_params, x_ND, rotate=rotate, attend=attend)

    if c.remat == "none":
      return layer
    policy = _SAVE_PRODUCTS if c.remat == "selective" else None
    # A scan already prevents XLA from merging recomputed values with those of the forward pass.
    return jax.checkpoint(layer, policy=policy, prevent_cse=not c.scan_layers)

  @jax.named_scope("hidden_step")
  def hidden_step(self, params: Params, token, cache: attention.Cache, *, fork, index):
    """One decoding step: hidden states of the newest token of every slot's branch.

    Args:
      params: from `init` or `unstack`.
      token: int32 [lanes, slots], the newest token of each branch.
      cache: keys and values of earlier tokens.
      fork: int32 [lanes, slots], the number of trunk tokens that each branch attends to.
      index: int32 [lanes, slots], the index of the newest token in its branch, from 0.

    Returns:
      (h [lanes, slots, D] after the final norm, the cache including the new keys and values).
    """
    rotations = self._rotations((fork + index).reshape(-1), cache.num_positions)
    x_ND = self._ends(params, token.reshape(-1), "embed")
    newest = attention.NewestTokens(0, fork, index)
    layers = self._unrolled_step if isinstance(params["layers"], tuple) else self._scanned_step
    x_ND, cache = layers(params, (x_ND, cache), newest=newest, rotations=rotations)
    h_ND = self._ends(params, x_ND, "final_norm")
    return h_ND.reshape(*token.shape, -1), cache

  def _unrolled_step(
    self, params: Params, carry, *, newest: attention.NewestTokens, rotations: dict[str, Callable]
  ):
    """The layers of `hidden_step` as a Python loop; carry is (x [N, D], cache)."""
    c = self.config
    layers = zip(params["layers"], c.layer_windows, c.layer_rotations, strict=True)
    for number, (layer_params, window, kind) in enumerate(layers):
      in_layer = newest._replace(layer=number, window=window)
      carry = self._step_layer(layer_params, carry, newest=in_layer, rotate=rotations[kind])
    return carry

  def _scanned_step(
    self, params: Params, carry, *, newest: attention.NewestTokens, rotations: dict[str, Callable]
  ):
    """The layers of `hidden_step` as a scan, over windows and rotations too if these differ."""
    c = self.config
    layers, numbers = _with_adapter_in_layers(params)["layers"], jnp.arange(c.num_layers)
    if len(rotations) == len(set(c.layer_windows)) == 1:
      window = c.layer_windows[0]
      (rotate,) = rotations.values()

      def body(carry, xs):
        layer_params, number = xs
        in_layer = newest._replace(layer=number, window=window)
        return self._step_layer(layer_params, carry, newest=in_layer, rotate=rotate), None

      return lax.scan(body, carry, (layers, numbers))[0]

    def mixed_body(carry, xs):
      layer_params, number, (window, kind) = xs
      in_layer = newest._replace(layer=number, window=window)
      rotate = self._select_rotation(kind, rotations)
      return self._step_layer(layer_params, carry, newest=in_layer, rotate=rotate), None

    kinds = self._layer_kinds(rotations, carry[1].num_positions)
    return lax.scan(mixed_body, carry, (layers, numbers, kinds))[0]

  def _step_layer(self, layer_params, carry, *, newest: attention.NewestTokens, rotate: Callable):
    """One layer of `hidden_step`: (x [N, D], cache) -> (x, cache with the new keys and values)."""
    x_ND, cache = carry

    def attend(q, k, v):
      return attention.cached_attention(q, k, v, cache=cache, newest=newest, scoring=self._scoring)

    return _apply_layer(self.config, layer_params, x_ND, rotate=rotate, attend=attend)

  @jax.named_scope("logits")
  def logits(self, params: Params, h_ND: jax.Array) -> jax.Array:
    """Logits [..., V] in at least float32 of hidden states [..., D].

    Gather the rows that need logits first: V is usually much larger than D.
    """
    return self._ends(params, h_ND, "logits")
