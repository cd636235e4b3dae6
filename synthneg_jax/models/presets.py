"""Architectures of published models by name, for uses that need no weights."""

from synthneg_jax.models.config import ModelConfig

# From config.json in each model's Hugging Face repository.
_SIZES = {
  # deepseek-ai/deepseek-math-7b-base (https://arxiv.org/abs/2402.03300)
  "deepseek_math_7b": {
    "vocab_size": 102400,
    "d_model": 4096,
    "num_layers": 30,
    "num_heads": 32,
    "num_kv_heads": 32,
    "head_dim": 128,
    "d_ff": 11008,
    "rope_theta": 10000.0,
    "norm_eps": 1e-6,
  },
  # meta-llama/Llama-2-7b-hf (https://arxiv.org/abs/2307.09288)
  "llama2_7b": {
    "vocab_size": 32000,
    "d_model": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 32,
    "head_dim": 128,
    "d_ff": 11008,
    "rope_theta": 10000.0,
    "norm_eps": 1e-5,
  },
}
NAMES = tuple(_SIZES)


def preset(
  name: str, *, dtype: str, param_dtype: str, scan_layers: bool, remat: str
) -> ModelConfig:
  """The architecture of a published model; the other arguments are ModelConfig's."""
  return ModelConfig(
    **_SIZES[name], dtype=dtype, param_dtype=param_dtype, scan_layers=scan_layers, remat=remat
  )
