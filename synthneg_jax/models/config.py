"""What a decoder looks like: its sizes, and how it computes."""

import dataclasses

from synthneg_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

  Attributes:
    vocab_size: V.
    d_model: D, width of the residual stream.
    num_layers: Y.
    num_heads: N query heads; num_kv_heads: K key and value heads, a divisor of N.
    head_dim: H.
    d_ff: F, width of the gated feed-forward part.
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: the output matrix is the transposed embedding.
    dtype: name of the dtype of activations and matrix products.
    param_dtype: name of the dtype that parameters are kept in.
    scan_layers: one compiled layer scanned over the stacked parameters (TPU, deep models) or Y copies (CPU).
    remat: what of a layer the backward pass computes anew: "none", "full" (all of it), or "selective" (all but the matrix
      products that it needs: norms, rotary positions, attention's scores and the gate's silu).
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
  dtype: str = "float32"
  param_dtype: str = "float32"
  scan_layers: bool = True
  remat: str = "none"

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise UserError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}.")
    if self.head_dim % 2:
      raise UserError(f"head_dim {self.head_dim} is odd; rotary positions need pairs.")
    if self.remat not in ("none", "full", "selective"):
      raise UserError(f"remat {self.remat!r} is none of none, full, selective.")

  @property
  def num_params(self) -> int:
    """Parameters of the whole decoder."""
    attention = self.d_model * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
    layer = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
    ends = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2) + self.d_model
    return self.num_layers * layer + ends
