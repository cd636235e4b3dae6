"""The other side of the benchmark in JAX: google-tunix's own Llama and its sampler, as its users
run them.
"""

import functools
import importlib.util
from collections.abc import Sequence

import numpy as np

from synthneg_jax.models.config import ModelConfig

# Of the rotary embedding: tunix 0.1.7's Llama computes it with this base, whatever its config says.
ROPE_THETA = 1_000_000.0


def installed() -> bool:
  """Whether google-tunix can be imported here; its pins may ask for an environment without the
  bench extra.
  """
  return importlib.util.find_spec("tunix") is not None


class _Ids:
  """A tokenizer whose text is ids with blanks between; nothing ends a sequence, and no drawn id
  passes for padding.
  """

  def encode(self, text: str) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))

  def bos_id(self) -> int:
    return 0  # none is put before a prompt

  def pad_id(self) -> int:
    return -1

  def eos_id(self) -> int:
    return -2


@functools.lru_cache(maxsize=1)
def load(folder: str, c: ModelConfig):
  """The exported weights as tunix's Llama3, in float32."""
  from tunix.models.llama3 import model, params

  config = model.ModelConfig(
    num_layers=c.num_layers,
    vocab_size=c.vocab_size,
    embed_dim=c.d_model,
    hidden_dim=c.d_ff,
    num_heads=c.num_heads,
    head_dim=c.head_dim,
    num_kv_heads=c.num_kv_heads,
    rope_theta=int(c.rope_theta),
    norm_eps=c.norm_eps,
    weight_tying=c.tie_embeddings,
  )
  return params.create_model_from_safe_tensors(folder, config, dtype=np.float32)


class Sampler:
  """tunix's sampler for prompts of one length, a power of two, with a cache of just the tokens
  there will be.
  """

  def __init__(self, folder: str, c: ModelConfig, prompts: Sequence[Sequence[int]], new: int):
    from tunix.generate import sampler

    cache = sampler.CacheConfig(len(prompts[0]) + new, c.num_layers, c.num_kv_heads, c.head_dim)
    self._sampler = sampler.Sampler(load(folder, c), _Ids(), cache)
    self._texts, self._new = [_Ids().decode(prompt) for prompt in prompts], new

  def __call__(self, temperature: float) -> list[np.ndarray]:
    """`new` tokens for each prompt: its greedy mode at temperature 0, else draws from the whole
    distribution.
    """
    how = {"temperature": temperature, "top_p": 1.0, "seed": 0} if temperature else {}
    return [np.asarray(row) for row in self._sampler(self._texts, self._new, **how).tokens]
