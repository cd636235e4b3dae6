"""Do the imported weights compute what the original does? A few logits beside those of transformers with torch."""

import os

import jax
import numpy as np
from absl import logging
from etils import epath

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.models.decoder import Model, Params
from synthneg_jax.runtime.errors import UserError

_TOKENS = 16
# Largest difference over the largest logit. Ours: float32 leaves 3e-6 on SmolLM2; two bfloat16 programs that round at
# different places stay within some per cent.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def check(folder: epath.PathLike, model: Model, params: Params) -> float:
  """Compares logits of 16 tokens at all places; the original is read a second time, on the host, in model.dtype.

  Windows longer than the text, and stretched positions beyond it, are not seen by it.

  Args:
    folder: the Hugging Face folder that the parameters were read from.
    model, params: as imported.

  Returns:
    The largest difference of two logits.

  Raises:
    UserError: torch is not installed, transformers cannot read the folder, or the logits differ.
  """
  try:
    import torch  # Never a requirement: only who asks for this check needs it.
    import transformers
  except ImportError as error:
    raise UserError("--check_parity compares with torch, which is not installed: pip install torch.") from error
  c = model.config
  ids = np.random.RandomState(0).randint(0, c.vocab_size, _TOKENS).tolist()
  try:
    original = transformers.AutoModelForCausalLM.from_pretrained(
      os.fspath(folder), dtype=getattr(torch, c.dtype), local_files_only=True
    )
  except (OSError, ValueError, RuntimeError) as error:
    raise UserError(f"--check_parity: transformers cannot read {folder}: {str(error).splitlines()[0]}") from error
  with torch.no_grad():
    theirs = original.eval()(torch.tensor([ids])).logits[0].float().numpy()
  del original
  forward = jax.jit(lambda params, trees: model.logits(params, model.hidden(params, trees)[0][0]))
  ours = np.asarray(forward(params, tree_lib.pack([[tree_lib.Tree(ids)]], _TOKENS)), np.float32)
  difference, largest = float(np.max(np.abs(ours - theirs))), float(np.max(np.abs(theirs)))
  logging.info(
    "Parity with torch: %d logits of %s differ by %.1e at most; the largest is %.1f.",
    ours.size,
    folder,
    difference,
    largest,
  )
  if not difference <= _TOLERANCE[c.dtype] * largest:  # NaN differs, too
    raise UserError(
      f"--check_parity: logits of {folder} differ from torch's by {difference:.2g}, more than "
      f"{_TOLERANCE[c.dtype]:g} of the largest, {largest:.2g}."
    )
  return difference
