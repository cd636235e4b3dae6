"""Configuration of the decoder: sizes, options of the model families, and how it is computed."""

import dataclasses
from collections.abc import Sequence

from synthneg_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Scaling of rotary frequencies for long texts; see models/rope.py for the equations.

  Attributes:
    kind: linear, llama3, yarn, longrope or dynamic. Dynamic scaling has no effect up to
      `original_positions`; longer texts are refused.
    factor: maximum length of a text, as a multiple of `original_positions`.
    original_positions: maximum length of a text without scaling, tokens; not used by linear.
    low: llama3's low_freq_factor, yarn's beta_slow: pairs with fewer turns over
      `original_positions` are fully scaled.
    high: llama3's high_freq_factor, yarn's beta_fast: pairs with more turns are not scaled.
    attention_factor: yarn, longrope: multiplies cosines and sines.
    truncate: yarn: rounds the ends of the ramp outwards to whole pairs.
    short: longrope: divisor of each pair's frequency for texts of up to `original_positions`.
    long: longrope: divisor of each pair's frequency for longer texts.
    is_long: longrope: use `long` for all texts of a run, however short, so that a token's key does
      not depend on the length of its text.
  """

  kind: str
  factor: float
  original_positions: int = 0
  low: float = 1.0
  high: float = 4.0
  attention_factor: float = 1.0
  truncate: bool = True
  short: tuple[float, ...] = ()
  long: tuple[float, ...] = ()
  is_long: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A Llama-like decoder: RMSNorm, rotary positions, grouped-query attention, gated feed-forward.

  Families differ only in these values; there is one decoder module.

  Attributes:
    vocab_size: V.
    d_model: D, width of the residual stream.
    num_layers: Y.
    num_heads: N, query heads.
    num_kv_heads: K, key and value heads, a divisor of N.
    head_dim: H.
    d_ff: F, width of the feed-forward block.
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: use the transposed embedding as output matrix.
    family: Hugging Face's model_type; determines tensor names and config.json of an export.
    rope_scaling: scaling in layers without a window; None for no scaling.
    windowed: for each layer, whether a token attends only to the last `window` positions; () for
      no windowed layer.
    window: W, positions in a window, including the token's own; 0 if no layer is windowed.
    windowed_rope_theta: rotary base of windowed layers, which are then not scaled; 0 to use
      `rope_theta`.
    rotary_dim: leading dimensions of each head that are rotated; 0 for all.
    unrotated: for each layer, whether queries and keys have no rotary positions; () for none.
    qkv_bias: add a bias to queries, keys and values.
    output_bias: add a bias to the output of attention.
    mlp_bias: add biases in the feed-forward block.
    qk_norm: RMSNorm of queries and keys before the rotation: "" for none, "head" for one over each
      head, "all" for one over all heads together.
    pre_norms: normalise the inputs of attention and feed-forward.
    post_norms: normalise their outputs before the residual sum.
    norm_offset: added to the scale of norms (1 if scales are stored as differences from 1).
    activation: of the gate, silu or gelu_tanh.
    embedding_scale: multiplies embeddings; rounded to dtype.
    query_scalar: scores are multiplied by query_scalar^(-1/2); 0 for head_dim.
    score_multiplier: replaces query_scalar^(-1/2) if not 0.
    residual_scale: multiplies the outputs of attention and feed-forward before the residual sum.
    logit_divisor: divides logits.
    attention_cap: scores s become cap·tanh(s / cap); 0 for none.
    logit_cap: the same for logits.
    dtype: dtype of activations and matrix products.
    param_dtype: dtype of stored parameters.
    scan_layers: scan one compiled layer over stacked parameters (TPU, deep models) instead of
      unrolling Y layers (CPU).
    remat: which parts of a layer the backward pass recomputes: "none", "full" (everything), or
      "selective" (norms, rotary positions, attention scores and the gate's activation, but no
      other matrix products).
  """

  vocab_size: int
  d_model: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  rope_theta: float = 10000.0
  norm_eps: float = 1e-5
  tie_embeddings: bool = False
  family: str = "llama"
  rope_scaling: RopeScaling | None = None
  windowed: tuple[bool, ...] = ()
  window: int = 0
  windowed_rope_theta: float = 0.0
  rotary_dim: int = 0
  unrotated: tuple[bool, ...] = ()
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: str = ""
  pre_norms: bool = True
  post_norms: bool = False
  norm_offset: float = 0.0
  activation: str = "silu"
  embedding_scale: float = 1.0
  query_scalar: float = 0.0
  score_multiplier: float = 0.0
  residual_scale: float = 1.0
  logit_divisor: float = 1.0
  attention_cap: float = 0.0
  logit_cap: float = 0.0
  dtype: str = "float32"
  param_dtype: str = "float32"
  scan_layers: bool = True
  remat: str = "none"

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}."
      )
    if self.head_dim % 2:
      raise UserError(f"head_dim {self.head_dim} is odd; rotary positions need pairs.")
    if self.remat not in ("none", "full", "selective"):
      raise UserError(f"remat {self.remat!r} must be one of none, full, selective.")
    for name in ("windowed", "unrotated"):
      count = len(getattr(self, name))
      if count not in (0, self.num_layers):
        raise UserError(f"{name} has {count} entries, but num_layers is {self.num_layers}.")
    if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
      raise UserError(
        f"rotary_dim {self.rotary_dim} must be even and at most head_dim {self.head_dim}."
      )
    if self.qk_norm not in ("", "head", "all"):
      raise UserError(f"qk_norm {self.qk_norm!r} must be '', 'head' or 'all'.")
    if any(self.windowed) and self.window < 1:
      raise UserError(f"window {self.window} must be at least 1 if a layer is windowed.")

  @property
  def score_scale(self) -> float:
    """The factor of query-key products."""
    return self.score_multiplier or (self.query_scalar or self.head_dim) ** -0.5

  @property
  def layer_windows(self) -> tuple[int, ...]:
    """For each layer, the window in positions; 0 for unlimited."""
    windowed = self.windowed or (False,) * self.num_layers
    return tuple(self.window if is_windowed else 0 for is_windowed in windowed)

  @property
  def layer_rotations(self) -> tuple[str, ...]:
    """The rotation of each layer: "full", "windowed" (windowed_rope_theta, unscaled) or "none"."""
    unrotated = self.unrotated or (False,) * self.num_layers

    def rotation(window, is_unrotated):
      if is_unrotated:
        return "none"
      return "windowed" if window and self.windowed_rope_theta else "full"

    return tuple(map(rotation, self.layer_windows, unrotated))

  def check_ids(self, ids: Sequence[int], where: str) -> None:
    """Checks that token ids have rows in the embedding; a lookup would silently clamp them.

    Args:
      ids: token ids.
      where: what contains the ids; the error starts with it.

    Raises:
      UserError: an id is out of range; names it.
    """
    if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
      wrong = max(ids) if max(ids) >= self.vocab_size else min(ids)
      raise UserError(
        f"{where} holds token id {wrong}, but the model's embedding has {self.vocab_size} rows: "
        "tokenizer and model do not belong together."
      )

  @property
  def num_params(self) -> int:
    """The number of parameters of the whole decoder."""
    attention = self.d_model * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
    norms = 2 * (self.pre_norms + self.post_norms) * self.d_model
    layer = attention + 3 * self.d_model * self.d_ff + norms
    layer += self.head_dim * (self.num_heads + 2 * self.num_kv_heads) if self.qkv_bias else 0
    layer += self.d_model if self.output_bias else 0
    layer += 2 * self.d_ff + self.d_model if self.mlp_bias else 0
    heads_normed = {"": 0, "head": 2, "all": self.num_heads + self.num_kv_heads}[self.qk_norm]
    layer += self.head_dim * heads_normed
    ends = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2) + self.d_model
    return self.num_layers * layer + ends
