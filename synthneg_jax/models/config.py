"""What a decoder looks like: its sizes, and how it computes."""

import dataclasses
from collections.abc import Sequence

from synthneg_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched for longer texts; models/rope.py has the equations.

  Attributes:
    kind: linear, llama3, yarn, longrope, or dynamic (which changes nothing up to
      `original_positions`; longer texts are refused).
    factor: how much longer texts may be than `original_positions`.
    original_positions: tokens of the longest text before scaling; not used by linear.
    low, high: llama3: low_freq_factor and high_freq_factor; yarn: beta_slow and beta_fast. Turns
      over original_positions below `low` are stretched whole, above `high` not at all.
    attention_factor: yarn, longrope: cosines and sines are multiplied by it.
    truncate: yarn: the ramp's ends are rounded outwards to whole frequencies.
    short, long: longrope: what each pair's frequency is divided by, for texts of up to
      `original_positions` and for longer ones.
    is_long: longrope: `long` is taken for all texts of a run, however short, so that a token's key
      never changes.
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
  """A decoder of the Llama kind: RMSNorm, rotary positions, grouped-query attention, a gated
  feed-forward part.

  What families differ in is data here; the decoder is one module.

  Attributes:
    family: Hugging Face's model_type, which names the tensors and the config.json of an export.
    vocab_size: V.
    d_model: D, width of the residual stream.
    num_layers: Y.
    num_heads: N query heads; num_kv_heads: K key and value heads, a divisor of N.
    head_dim: H.
    d_ff: F, width of the gated feed-forward part.
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: the output matrix is the transposed embedding.
    rope_scaling: of layers without a window; None for none.
    windowed: for each layer, whether its tokens see the last `window` positions only; () for none.
    window: W, positions that a windowed layer's token sees, its own included; 0 where no layer has
      one.
    windowed_rope_theta: rotary base of windowed layers, which are never scaled; 0 for that of the
      others.
    rotary_dim: leading dimensions of each head that are rotated; 0 for all.
    unrotated: for each layer, whether its queries and keys have no rotary positions; () for none.
    qkv_bias: queries, keys and values have a bias.
    output_bias: attention's output has a bias.
    mlp_bias: the matrices of the feed-forward part have a bias.
    qk_norm: an RMSNorm over queries and over keys, before the rotation: "" for none, "head" for
      each head's, "all" for those of all heads together.
    pre_norms: attention and feed-forward part have a norm before them.
    post_norms: they have a norm behind them, before they are added to the stream.
    norm_offset: added to a norm's scale (1: scales are kept as their difference from 1).
    activation: of the gate, silu or gelu_tanh.
    embedding_scale: the embedding is multiplied by it, rounded to dtype.
    query_scalar: scores are multiplied by its -1/2-th power; 0 for head_dim.
    score_multiplier: scores are multiplied by it instead; 0 for query_scalar's.
    residual_scale: attention and feed-forward part are multiplied by it before they are added to
      the stream.
    logit_divisor: logits are divided by it.
    attention_cap: scores s become cap·tanh(s / cap); 0 for none.
    logit_cap: the same of logits.
    dtype: name of the dtype of activations and matrix products.
    param_dtype: name of the dtype that parameters are kept in.
    scan_layers: one compiled layer scanned over the stacked parameters (TPU, deep models) or Y
      copies (CPU).
    remat: what of a layer the backward pass computes anew: "none", "full" (all of it), or
      "selective" (all but the matrix products that it needs: norms, rotary positions, attention's
      scores and the gate's silu).
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
      raise UserError(f"remat {self.remat!r} is none of none, full, selective.")
    if self.windowed and len(self.windowed) != self.num_layers:
      raise UserError(
        f"windowed names {len(self.windowed)} layers, num_layers is {self.num_layers}."
      )
    if self.unrotated and len(self.unrotated) != self.num_layers:
      raise UserError(
        f"unrotated names {len(self.unrotated)} layers, num_layers is {self.num_layers}."
      )
    if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
      raise UserError(
        f"rotary_dim {self.rotary_dim} must be even and at most head_dim {self.head_dim}."
      )
    if self.qk_norm not in ("", "head", "all"):
      raise UserError(f"qk_norm {self.qk_norm!r} must be '', 'head' or 'all'.")
    if any(self.windowed) and self.window < 1:
      raise UserError(f"window {self.window} must be at least 1 where layers are windowed.")

  @property
  def score_scale(self) -> float:
    """What products of queries and keys are multiplied by."""
    return self.score_multiplier or (self.query_scalar or self.head_dim) ** -0.5

  @property
  def layer_windows(self) -> tuple[int, ...]:
    """For each layer the positions that a token sees, its own included; 0 for all."""
    return tuple(
      self.window if windowed else 0 for windowed in self.windowed or (False,) * self.num_layers
    )

  @property
  def layer_rotations(self) -> tuple[str, ...]:
    """For each layer how it is rotated: "full", "windowed" (by windowed_rope_theta, never scaled)
    or "none".
    """
    unrotated = self.unrotated or (False,) * self.num_layers

    def rotation(window, is_unrotated):
      return (
        "none" if is_unrotated else "windowed" if window and self.windowed_rope_theta else "full"
      )

    return tuple(map(rotation, self.layer_windows, unrotated))

  def check_ids(self, ids: Sequence[int], where: str) -> None:
    """Refuses token ids that have no row of the embedding, which a lookup would clamp without a
    word.

    Args:
      ids: token ids.
      where: begins the sentence.

    Raises:
      UserError: names the greatest id.
    """
    if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
      wrong = max(ids) if max(ids) >= self.vocab_size else min(ids)
      raise UserError(
        f"{where} holds token id {wrong}, but the model's embedding has {self.vocab_size} rows: "
        "tokenizer and model do not "
        "belong together."
      )

  @property
  def num_params(self) -> int:
    """Parameters of the whole decoder."""
    attention = self.d_model * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
    layer = (
      attention
      + 3 * self.d_model * self.d_ff
      + 2 * (self.pre_norms + self.post_norms) * self.d_model
    )
    layer += self.head_dim * (self.num_heads + 2 * self.num_kv_heads) if self.qkv_bias else 0
    layer += self.d_model if self.output_bias else 0
    layer += 2 * self.d_ff + self.d_model if self.mlp_bias else 0
    heads_normed = {"": 0, "head": 2, "all": self.num_heads + self.num_kv_heads}[self.qk_norm]
    layer += self.head_dim * heads_normed
    ends = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2) + self.d_model
    return self.num_layers * layer + ends
