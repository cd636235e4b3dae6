"""The other side of the benchmark: transformers' `generate`, a PyTorch train step, TRL's DPO, as
their users run them.
"""

import functools
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence

import jax
import numpy as np

from synthneg_jax.models.config import ModelConfig
from synthneg_jax.runtime.errors import UserError

PAD = 0


def need(*names: str):
  """Imports packages of the bench extra.

  Raises:
    UserError: one is not installed.
  """
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  try:
    return [importlib.import_module(name) for name in names]
  except ImportError as error:
    raise UserError(
      f'The benchmark needs {error.name}: pip install -e ".[bench]" brings it.'
    ) from error


def installed() -> bool:
  """Whether what the rows against transformers need can be imported here."""
  return importlib.util.find_spec("torch") is not None


@functools.cache
def _torch():
  """torch, on one thread where it computes on the CPU."""
  (torch,) = need("torch")
  if device() == "cpu":
    torch.set_num_threads(1)
  return torch


def device() -> str:
  """Where torch computes: on the accelerator if jax does."""
  (torch,) = need("torch")
  if jax.default_backend() == "cpu":
    return "cpu"
  if not torch.cuda.is_available():
    raise UserError(
      "jax computes on an accelerator that torch does not see; JAX_PLATFORMS=cpu "
      "compares on the CPU."
    )
  return "cuda"


def wait() -> None:
  """Until the accelerator has done what it was given."""
  if device() == "cuda":
    _torch().cuda.synchronize()


def load(folder: str):
  """The exported weights as transformers' LlamaForCausalLM, in float32."""
  _torch()
  (transformers,) = need("transformers")
  return transformers.LlamaForCausalLM.from_pretrained(folder, dtype="float32").eval().to(device())


def generate(
  model, prompts: Sequence[Sequence[int]], new: int, temperature: float, copies: int = 1
) -> np.ndarray:
  """`new` tokens for each prompt, int [prompts · copies, new]; prompts are padded on the left to
  the longest.
  """
  torch = _torch()
  longest = max(map(len, prompts))

  def pad(values, fill):
    return [[fill] * (longest - len(row)) + list(row) for row in values]

  ids = torch.tensor(pad(prompts, PAD), device=device())
  mask = torch.tensor(pad([[1] * len(row) for row in prompts], 0), device=device())
  how = (
    {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
  )
  if copies > 1:
    how["num_return_sequences"] = copies
  out = model.generate(
    ids,
    attention_mask=mask,
    max_new_tokens=new,
    eos_token_id=None,
    pad_token_id=PAD,
    **({"do_sample": False} | how),
  )
  return out[:, longest:].cpu().numpy()


def random(c: ModelConfig, dtype: str):
  """transformers' LlamaForCausalLM of these sizes with random weights, its attention PyTorch's
  fused one.
  """
  torch = _torch()
  (transformers,) = need("transformers")
  config = transformers.LlamaConfig(
    vocab_size=c.vocab_size,
    hidden_size=c.d_model,
    num_hidden_layers=c.num_layers,
    num_attention_heads=c.num_heads,
    num_key_value_heads=c.num_kv_heads,
    head_dim=c.head_dim,
    intermediate_size=c.d_ff,
    tie_word_embeddings=c.tie_embeddings,
    attn_implementation="sdpa",
  )
  with torch.device(device()):
    return transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


class _Step:
  """A train step with fused AdamW; `run` takes one and returns the loss before it."""

  def __init__(self, model, learning_rate: float, autocast: bool = False):
    """`autocast` computes products in bfloat16."""
    self._model, self._autocast = model.train(), autocast
    self._optimizer = _torch().optim.AdamW(
      model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

  def run(self) -> float:
    with _torch().autocast(device(), _torch().bfloat16, enabled=self._autocast):
      loss = self._loss()
    loss.backward()
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


class SftStep(_Step):
  """The next-token loss that transformers' models return, on rows of equal length."""

  def __init__(
    self,
    model,
    ids: np.ndarray,
    learning_rate: float,
    *,
    compiled: bool = False,
    autocast: bool = False,
  ):
    super().__init__(model, learning_rate, autocast)
    self._ids = _torch().tensor(ids, device=device())
    self._forward = _torch().compile(self._model) if compiled else self._model

  def _loss(self):
    return self._forward(input_ids=self._ids, labels=self._ids, use_cache=False).loss


class DpoStep(_Step):
  """`compute_loss` of TRL's DPOTrainer on its own collator's batch."""

  def __init__(
    self,
    model,
    reference,
    tokenizer: str,
    rows: Sequence[dict],
    beta: float,
    rate: float,
    *,
    autocast: bool = False,
  ):
    """Rows hold prompt_ids, chosen_ids, rejected_ids, and ref_chosen_logps, ref_rejected_logps
    where precomputed.
    """
    super().__init__(model, rate, autocast)
    transformers, datasets, trl = need("transformers", "datasets", "trl")
    collator = importlib.import_module("trl.trainer.dpo_trainer").DataCollatorForPreference(
      pad_token_id=PAD
    )
    self._trainer = trl.DPOTrainer(
      model=self._model,
      ref_model=reference,
      args=trl.DPOConfig(
        output_dir=tempfile.mkdtemp(),
        beta=beta,
        use_cpu=device() == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
      ),
      train_dataset=datasets.Dataset.from_list(
        [{"prompt": "Question", "chosen": " 1", "rejected": " 2"}]
      ),
      processing_class=transformers.AutoTokenizer.from_pretrained(tokenizer),
    )
    # as after its own precomputation, which would run over its data set of one text
    if "ref_chosen_logps" in rows[0]:
      self._trainer.precompute_ref_logps, self._trainer.ref_model = True, None
    self._inputs = {name: value.to(device()) for name, value in collator(list(rows)).items()}

  def _loss(self):
    return self._trainer.compute_loss(self._model, self._inputs)
